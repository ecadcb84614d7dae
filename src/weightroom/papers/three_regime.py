"""A three-regime model of network pruning (Zhou et al., ICML 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from weightroom import diagnostics, optim, prune, tasks, train
from weightroom.compare.base import Method
from weightroom.diagnostics.three_regime import retraining_seed
from weightroom.metrics import copy_model
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.train import Batches

__all__ = ["PAPER", "study"]

_SAM = """@inproceedings{foret2021sharpness,
  title = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
  author = {Pierre Foret and Ariel Kleiner and Hossein Mobahi and Behnam Neyshabur},
  year = {2021},
  booktitle = {ICLR}
}"""


def _sam(params: Any, **hyper: Any) -> optim.SAM:
    return optim.SAM(params, torch.optim.SGD, momentum=0.9, **hyper)


PAPER = Paper(
    key="three-regime",
    number=25,
    family="prune",
    parts=(
        diagnostics.ThreeRegimeStudy,
        diagnostics.classify_regime,
        diagnostics.linear_mode_connectivity,
        diagnostics.linear_cka,
        diagnostics.output_cka,
        optim.SAM,
    ),
    title="A Three-regime Model of Network Pruning",
    authors="Yefan Zhou, Yaoqing Yang, Arin Chang, Michael W. Mahoney",
    year=2023,
    venue="ICML",
    arxiv="2305.18383",
    code="YefanZhou/ThreeRegimePruning",
    summary="Says from two retrainings of a pruned network whether its dense training should have been longer or shorter.",
    claim="Whether a noisier dense training (fewer epochs, smaller batches, a larger radius of SAM) helps or hurts the network that "
    "is pruned from it depends on the density, with a sharp switch; connectivity and similarity of two retrainings tell on which "
    "side one is.",
    limits="It prunes nothing, so it adds no arm to a comparison of pruning methods; SAM, one of its temperatures, joins the "
    "optimizers. The thresholds of the regimes are ours (a barrier of 0.05 in training error, a CKA of 0.98); the paper "
    "draws its borders by eye. Its barriers of half the training error belong to a ResNet-20 on CIFAR-10; a small network "
    "on digits shows them at 3 % of its weights (6.4 points of training error, 16 seeds), and there the flip of the "
    "temperature was not decided: fewer epochs and SAM made neither barrier nor error reliably smaller, and what the advice "
    "is worth is open. Under light pruning all is as the paper says: connected, similar, the advice costs nothing. A "
    "perceptron has no flip, and with 30 % random labels, where the paper's picture would have the higher temperature win, "
    "training on gave the lower error. The authors' code takes the first of points equally far from the mean of both ends; "
    "the part takes the highest, so that the order of the two networks does not matter. Batch sizes as temperatures were "
    "not run here, and the full scale trains without the paper's augmentation.",
    also={
        "optimizer": {
            "sam": Method(
                _sam, {"lr": 0.05, "rho": 0.05}, {"lr": (1e-3, 1.0, "log"), "rho": (0.01, 0.5, "log")}, cites=(_SAM,)
            )
        }
    },
)  # fmt: skip

#: Radius of SAM as a temperature; the paper's range is 0.1 to 0.8.
_RHO = 0.2


def _convolutions() -> nn.Module:
    """Four 3 x 3 convolutions with batch norm, pooled after the first two, and a linear head."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((1, 16), (16, 16), (16, 32), (32, 32))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (i < 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class _Setup:
    """What is trained, for how long, and cut to which densities.

    Args:
        task: model, data, and the recipe of dense training and retraining alike.
        epochs: of the hot, the medium and the cold network; the last is the full training.
        kinds: which layers are pruned.
    """

    def __init__(self, task: Task, epochs: tuple[int, int, int], kinds: tuple[type[nn.Module], ...]) -> None:
        self.task, self.epochs, self.kinds = task, epochs, kinds

    @property
    def decides(self) -> dict[str, Any]:
        """What its cached results depend on."""
        return {"task": self.task, "epochs": self.epochs, "kinds": self.kinds}

    def fit(
        self, model: nn.Module, seed: int, epochs: int, after_step: Callable[[int], None] | None = None, rho: float = 0.0
    ) -> None:
        """SGD with momentum, a tenth of the rate from half of the epochs on and a hundredth from three quarters on."""
        recipe = self.task.recipe
        make: Callable[[Any], torch.optim.Optimizer] = recipe.make
        if rho:
            make = partial(_sam, lr=recipe.lr, weight_decay=recipe.weight_decay, rho=rho)
        train.fit(
            model, self.task.train, loss=self.task.loss, optimizer=make, epochs=epochs, batch_size=recipe.batch_size,
            schedule=lambda o, total: MultiStepLR(o, [total // 2, 3 * total // 4], 0.1), after_step=after_step, seed=seed,
        )  # fmt: skip

    def dense(self, trial: Trial, epochs: int, rho: float = 0.0) -> nn.Module:
        """The dense network, stopped after so many epochs of one full training."""
        model = self.task.model(seed=trial.seed).to(trial.device)

        def snapshots() -> dict[str, Tensor]:
            per_epoch = math.ceil(len(self.task.train) / self.task.recipe.batch_size)
            found: dict[str, Tensor] = {}

            def keep(step: int) -> None:
                if step % per_epoch == 0 and step // per_epoch in self.epochs:
                    found.update({f"{step // per_epoch}/{k}": v.clone() for k, v in model.state_dict().items()})

            self.fit(model, trial.seed, self.epochs[-1], keep, rho)
            return found

        found = trial.cached("dense", snapshots, seed=trial.seed, device=trial.device, rho=rho, **self.decides)
        prefix = f"{epochs}/"
        model.load_state_dict({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
        return model

    def cell(self, trial: Trial, epochs: int, density: float, rho: float = 0.0) -> dict[str, float]:
        """Prunes the dense network uniformly, retrains it twice, measures; made once for all arms that ask."""

        def measure() -> dict[str, Tensor]:
            pruned = self.dense(trial, epochs, rho)
            prune.UniformMagnitudePruner(1 - density, targets=self.kinds).fit(pruned).apply(pruned)
            models = [self.retrained(trial, pruned, r) for r in range(2)]
            data = Batches(self.task.train, 64, shuffle=False)
            report = diagnostics.measure_regime(models, data)
            error = {split: sum(1 - self.task.evaluate(m, split)["accuracy"] for m in models) / 2 for split in ("val", "test")}
            values = {"lmc": report.lmc, "cka": report.cka, "train_error": report.train_error, **error}
            return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}

        found = trial.cached(
            "three-regime", measure, seed=trial.seed, device=trial.device, stop=epochs, density=density, rho=rho, **self.decides
        )  # fmt: skip
        trial.spend(trainings=3.0)
        return {name: float(value) for name, value in found.items()}

    def retrained(self, trial: Trial, model: nn.Module, r: int, longer: int = 1) -> nn.Module:
        """A copy, trained in full with its mask; ``longer`` times as long."""
        copy = copy_model(model)
        self.fit(copy, retraining_seed(trial.seed, r), longer * self.epochs[-1])
        return copy


def _result(trial: Trial, cell: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a cell; without the similarity where a network is constant and has none."""
    found = {"test_error": cell[trial.split], "train_error": cell["train_error"], "lmc": cell["lmc"], "cka": cell["cka"]}
    return {name: value for name, value in found.items() if not math.isnan(value)}


_METRICS: dict[str, Any] = {"lmc": "max", "cka": "max", "train_error": "min"}


def _name(epochs: int) -> str:
    return f"{epochs} epochs"


def _setup(scale: Scale) -> _Setup:
    if scale is Scale.FULL:
        recipe = Recipe("sgd", lr=0.1, weight_decay=1e-4, epochs=160, batch_size=64)
        task = tasks.cifar10().with_(name="cifar10, ResNet-20", model=lambda: ResNet(blocks=(3, 3, 3)), recipe=recipe)
        return _Setup(task, (40, 90, 160), (nn.Conv2d,))
    recipe = Recipe("sgd", lr=0.1, weight_decay=1e-4, epochs=16, batch_size=32)
    task = _less(scale, tasks.digits("cnn").with_(name="digits, four convolutions", model=_convolutions, recipe=recipe))
    return _Setup(task, scale.pick((1, 2, 3), (2, 7, 16), (2, 7, 16)), (nn.Conv2d,))


def _less(scale: Scale, task: Task) -> Task:
    return task.spoil(samples=200) if scale is Scale.SMOKE else task


def _densities(scale: Scale) -> dict[str, float]:
    return {f"{d:g}": d for d in scale.pick((0.03, 0.5), (0.03, 0.08, 0.5), (0.06, 0.14, 0.4))}


def _study(scale: Scale, setup: _Setup, name: str, arms: Mapping[str, Arm], **more: Any) -> Study:
    hot, medium, cold = setup.epochs
    notes = {
        "training": f"{setup.task.name}: dense for {cold} epochs, of which one run gives the networks after {hot}, {medium} and "
        f"{cold}; fewer epochs are a higher temperature",
        "pruning": "by magnitude, the same share of every layer, then two retrainings in full from what pruning left; batches of "
        "the retrainings are the same in all arms",
        "lmc, cka": "training error and softmax outputs on the training data, without augmentation",
    }
    more = {"metric": "test_error", "direction": "min", "metrics": _METRICS, **more}
    return Study(f"three-regime: {name}", arms, scale=scale, paper=PAPER, notes=notes, **more)


# ---- temperature and load


def _grid(scale: Scale) -> Study:
    setup, settings = _setup(scale), _densities(scale)
    hot, _, cold = (_name(e) for e in setup.epochs)

    def arm(epochs: int, rho: float = 0.0) -> Arm:
        return Arm(lambda trial: _result(trial, setup.cell(trial, epochs, trial.setting, rho)), cites=(PAPER,))

    arms = {_name(e): arm(e) for e in setup.epochs}
    sam = f"{cold}, SAM"
    arms[sam] = arm(setup.epochs[-1], _RHO)
    low, *middle, high = settings
    expect = [
        *(
            claim
            for name in (hot, cold)
            for claim in (
                Claim(
                    f"at density {high} two retrainings after {name} are connected",
                    Expect(name, "lmc", on=high).within(low=-0.05),
                ),
                Claim(
                    f"at density {high} two retrainings after {name} are similar", Expect(name, "cka", on=high).within(low=0.98)
                ),
            )
        ),
        *(
            Claim(f"at density {m} two retrainings after {cold} are still connected", Expect(cold, "lmc", on=m).within(low=-0.05))
            for m in middle
        ),
        Claim(f"at density {low} after {cold} there is a barrier (regime I)", Expect(cold, "lmc", on=low).within(high=-0.05)),
        Claim(f"at density {low} after {cold} the retrainings differ", Expect(cold, "cka", on=low).within(high=0.98)),
        Claim(
            f"at density {low} a higher temperature connects: the barrier after {hot} is lower",
            Expect(hot, "lmc", on=low).better_than(cold),
        ),
        Claim(f"at density {low} SAM, too, makes the barrier lower", Expect(sam, "lmc", on=low).better_than(cold)),
        Claim(f"at density {low} the higher temperature gives the lower error", Expect(hot, on=low).better_than(cold)),
        Claim(f"at density {high} the lower temperature gives the lower error", Expect(cold, on=high).better_than(hot)),
    ]
    return _study(
        scale, setup, "temperature and load", arms, baseline=cold, settings=settings, expect=expect,
        seeds=scale.pick(range(1), range(100, 108), range(3)), max_seeds=scale.pick(1, 16, 3),
    )  # fmt: skip


def _interaction(scale: Scale) -> Study:
    setup = _setup(scale)
    hot, _, cold = setup.epochs
    low, *_, high = _densities(scale).values()
    name = f"{cold} epochs instead of {hot}"

    def run(trial: Trial) -> dict[str, float]:
        gain = {d: setup.cell(trial, cold, d)[trial.split] - setup.cell(trial, hot, d)[trial.split] for d in (low, high)}
        return {"interaction": gain[low] - gain[high], "at_low": gain[low], "at_high": gain[high]}

    says = f"training longer costs more at density {low:g} than at {high:g}: the temperature's sign depends on the load"
    return _study(
        scale, setup, "interaction", {name: Arm(run, cites=(PAPER,))}, metric="interaction", direction="max",
        metrics={"at_low": "min", "at_high": "min"}, expect=[Claim(says, Expect(name, "interaction").within(low=0.0))],
        seeds=scale.pick(range(1), range(100, 108), range(3)), max_seeds=scale.pick(1, 16, 3),
    )  # fmt: skip


# ---- following the advice

#: Arm -> sparsity, seed, kinds -> pruner of the fully trained network.
_PRUNERS: dict[str, Callable[[float, int, Any], prune.PlanPruner | None]] = {
    "dense": lambda sparsity, seed, kinds: None,
    "global magnitude": lambda sparsity, seed, kinds: prune.GlobalMagnitudePruner(sparsity, targets=kinds),
    "LAMP": lambda sparsity, seed, kinds: prune.LAMPPruner(sparsity, targets=kinds),
    "ERK": lambda sparsity, seed, kinds: prune.ERKPruner(sparsity, targets=kinds),
    "random": lambda sparsity, seed, kinds: prune.RandomPruner(sparsity, seed=seed, targets=kinds),
}


def _advice(scale: Scale) -> Study:
    setup, densities = _setup(scale), _densities(scale)
    low, *_, high = densities
    hot, medium, cold = setup.epochs

    def always(trial: Trial) -> dict[str, float]:
        return {**_result(trial, setup.cell(trial, cold, trial.setting)), "epochs": float(cold)}

    def advised(trial: Trial) -> dict[str, float]:
        seen = setup.cell(trial, medium, trial.setting)
        direction = diagnostics.classify_regime(seen["lmc"], seen["cka"]).direction
        epochs = {1: hot, 0: medium, -1: cold}[direction]
        return {**_result(trial, setup.cell(trial, epochs, trial.setting) if direction else seen), "epochs": float(epochs)}

    def validated(trial: Trial) -> dict[str, float]:
        cells = {epochs: setup.cell(trial, epochs, trial.setting) for epochs in setup.epochs}
        best = min(cells, key=lambda epochs: (cells[epochs]["val"], -epochs))
        return {**_result(trial, cells[best]), "epochs": float(best)}

    def pruned(make: Callable[[float, int, Any], prune.PlanPruner | None], trial: Trial) -> dict[str, float]:
        model = setup.dense(trial, cold)
        if (pruner := make(1 - trial.setting, trial.seed, setup.kinds)) is not None:
            pruner.fit(model).apply(model)
        trial.spend(trainings=2.0)
        return {"test_error": 1 - setup.task.evaluate(setup.retrained(trial, model, 0), trial.split)["accuracy"]}

    def from_scratch(trial: Trial) -> dict[str, float]:
        model = setup.task.model(seed=trial.seed).to(trial.device)
        prune.RandomPruner(1 - trial.setting, seed=trial.seed, targets=setup.kinds).fit(model).apply(model)
        trial.spend(trainings=2.0)
        model = setup.retrained(trial, model, 0, longer=2)
        return {"test_error": 1 - setup.task.evaluate(model, trial.split)["accuracy"]}

    usual, ours, validation, scratch = _name(cold), "advised", "chosen by validation", "random, retrained"
    arms = {usual: Arm(always), ours: Arm(advised, cites=(PAPER,)), validation: Arm(validated)}
    arms |= {name: Arm(partial(pruned, make)) for name, make in _PRUNERS.items()}
    arms[scratch] = Arm(from_scratch)
    expect = [
        Claim(f"at density {low} the advised temperature beats the full training", Expect(ours, on=low).better_than(usual)),
        *(
            Claim(
                f"at density {d} the advised temperature costs less than half a point against the full training",
                Expect(ours, on=d).not_worse_than(usual, by=0.005),
            )
            for d in (low, high)
        ),
        *(
            Claim(
                f"at density {d} it is within half a point of trying all temperatures on validation data",
                Expect(ours, on=d).not_worse_than(validation, by=0.005),
            )
            for d in (low, high)
        ),
        Claim(
            f"at density {low} it beats a random sub-network trained as long",
            Expect(ours, on=low).better_than(scratch),
        ),
    ]
    return _study(
        scale, setup, "advice", arms, baseline=usual, settings={d: densities[d] for d in (low, high)},
        metrics={**_METRICS, "epochs": "min"}, expect=expect, seeds=scale.pick(range(1), range(100, 106), range(3)),
        max_seeds=scale.pick(1, 10, 3),
    )  # fmt: skip


# ---- without batch norm


def _perceptron(scale: Scale) -> Study:
    recipe = Recipe("sgd", lr=0.1, weight_decay=1e-4, epochs=16, batch_size=32)
    task = _less(scale, tasks.digits().with_(recipe=recipe))
    epochs = scale.pick((1, 2, 3), (2, 7, 16), (2, 7, 16))
    clean, noisy = "clean labels", "30 % of labels random"
    setups = {
        clean: _Setup(task, epochs, (nn.Linear,)),
        noisy: _Setup(task.spoil(label_noise=0.3), epochs, (nn.Linear,)),
    }

    def arm(e: int) -> Arm:
        return Arm(lambda trial: _result(trial, setups[trial.setting].cell(trial, e, 0.04)), cites=(PAPER,))

    hot, _, cold = (_name(e) for e in epochs)
    expect = [
        *(
            Claim(
                f"a perceptron without batch norm shows no barrier after {name}", Expect(name, "lmc", on=clean).within(low=-0.05)
            )
            for name in (hot, cold)
        ),
        Claim("and no flip: training longer does not cost it anything", Expect(cold, on=clean).not_worse_than(hot)),
        Claim("with random labels the higher temperature gives the lower error", Expect(hot, on=noisy).better_than(cold)),
    ]
    return _study(
        scale, setups[clean], "perceptron at density 0.04", {_name(e): arm(e) for e in epochs}, baseline=cold,
        settings={name: name for name in setups}, expect=expect, seeds=scale.pick(range(1), range(100, 108), range(3)),
        max_seeds=scale.pick(1, 16, 3),
    )  # fmt: skip


def study(scale: Scale) -> list[Study]:
    """Four studies: temperature and load, their interaction, what the advice is worth, and a network without batch norm."""
    return [_grid(scale), _interaction(scale), _advice(scale), _perceptron(scale)]

"""AP, Activate-while-Pruning (Liu et al., TMLR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import TensorDataset

from weightroom import diagnostics, prune, tasks, train
from weightroom.compare.prune import PruneMethod
from weightroom.metrics import copy_model
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.prune.plan import Inputs
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]


@dataclass(frozen=True)
class _Rewound:
    """The procedure as one plan pruner: trains a copy of the model, which is at initialisation, once for each cycle."""

    sparsity: float
    share: float = 0.1
    cycles: int = 3
    epochs: int = 10
    lr: float = 1e-3

    def fit(
        self, model: nn.Module, data: Iterable[Any], example_inputs: Inputs | None, loss_fn: Callable[..., Tensor]
    ) -> prune.PruningPlan:
        copy, steps = copy_model(model), self.epochs * sum(1 for _ in data)

        def one_cycle(copy: nn.Module) -> None:
            batches = chain.from_iterable(repeat(data))
            train.fit(copy, batches, loss=loss_fn, optimizer=partial(torch.optim.Adam, lr=self.lr), steps=steps)

        ap = prune.ActivateWhilePruning(prune.GlobalMagnitudePruner(self.sparsity), self.share * self.sparsity)
        plan = ap.iterate(copy, prune.successive_sparsities(self.sparsity, self.cycles), one_cycle, data=data, loss_fn=loss_fn)
        return prune.PruningPlan(plan.masks, model=model, example_inputs=example_inputs)


PAPER = Paper(
    key="selective-activation",
    number=44,
    family="prune",
    parts=(prune.ActivateWhilePruning, diagnostics.dead_neuron_rate),
    title="AP: Selective Activation for De-sparsifying Pruned Networks",
    authors="Shiyu Liu, Rohan Ghosh, Mehul Motani",
    year=2023,
    venue="TMLR",
    arxiv="2212.06145",
    code="Martin1937/Activate-While-Pruning",
    summary="Beside any iterative pruner of ReLU networks: a small part of what goes are negative weights that stood still, so that "
    "fewer units are silent.",
    claim="The more a network is pruned, the fewer of its units are silent on some inputs, and what silence is left is no longer of "
    "use: removing also negative weights that have hardly moved lowers it and gains 3 to 4 points on CIFAR-10 and CIFAR-100, 2 to 3 on "
    "ImageNet, over the same pruner alone.",
    limits="Only the abstract, the first section and the script for ResNet-20 were at hand; the formula of the dead-neuron rate "
    "and the variants in the last cycles only follow their description. The part leaves norms and layers that no ReLU feeds "
    "alone and removes exactly as many weights as asked; the script does not. The dynamic rate leaves out units that are "
    "silent on all inputs, so that it also falls where units die: at 2.3 % of the weights of a wide network by 36 points, "
    "counted with these by 5. On digits activating gains nothing over the same pruner alone: half a point less on the wide "
    "network, 22 to 33 on the narrow one. Weight decay moves all weights, so that those that stand still are the small "
    "ones, which magnitude would remove as well. Taking AP's part only from layers that a ReLU feeds, as the argument asks, "
    "uses up their negative weights in some dozen cycles; on a narrow network that does far more harm than taking it from "
    "all layers, as the script does. In the comparison of pruners the method trains a copy of the network once per cycle, "
    "with Adam, before the training that counts: look at its seconds.",
    methods={
        "global magnitude, rewound": PruneMethod(partial(_Rewound, share=0.0), start="initial"),
        "global magnitude + AP, rewound": PruneMethod(_Rewound, {"share": 0.1}, {"share": (0.02, 0.5)}, start="initial"),
    },
)

#: What a cycle removes of the weights that are there (p), and AP's part of it (q).
_P, _Q = 0.2, 0.02
_AP, _RANDOM, _POSITIVE = "magnitude + AP", "magnitude + random negative", "magnitude + still positive"
#: The same from all layers, also those that no ReLU feeds, as the authors' script has it.
_AP_ALL, _RANDOM_ALL = f"{_AP}, all layers", f"{_RANDOM}, all layers"

Host = type[prune.PlanPruner]

#: Arm -> host, q, and how AP chooses.
_ITERATED: dict[str, tuple[Host, float, dict[str, Any]]] = {
    "magnitude": (prune.GlobalMagnitudePruner, 0.0, {}),
    _AP: (prune.GlobalMagnitudePruner, _Q, {}),
    _RANDOM: (prune.GlobalMagnitudePruner, _Q, {"criterion": "random"}),
    _POSITIVE: (prune.GlobalMagnitudePruner, _Q, {"sign": "positive"}),
    _AP_ALL: (prune.GlobalMagnitudePruner, _Q, {"skip_first": False}),
    _RANDOM_ALL: (prune.GlobalMagnitudePruner, _Q, {"criterion": "random", "skip_first": False}),
    "LAMP": (prune.LAMPPruner, 0.0, {}),
    "LAMP + AP": (prune.LAMPPruner, _Q, {}),
    "ERK": (prune.ERKPruner, 0.0, {}),
    "uniform": (prune.UniformMagnitudePruner, 0.0, {}),
}
_METRICS = ("accuracy", "dynamic", "static", "total", "density")


@dataclass(frozen=True)
class _Setup:
    """A task, the learning rate's course (share of the training that has passed, steps taken -> factor), and which cycles count."""

    task: Task
    rate: Callable[[float, int], float]
    cycles: tuple[int, ...]

    def train(self, trial: Trial, model: nn.Module) -> None:
        recipe = self.task.recipe

        def schedule(optimizer: Optimizer, total: int) -> LRScheduler:
            return LambdaLR(optimizer, lambda step: self.rate(step / total, step))

        train.fit(
            model, self.task.train, loss=self.task.loss, optimizer=recipe.make, epochs=recipe.epochs, batch_size=recipe.batch_size,
            schedule=schedule, seed=trial.seed, device=trial.device,
        )  # fmt: skip

    def measure(self, trial: Trial, model: nn.Module) -> Tensor:
        """Those of ``_METRICS``, float64."""
        dead = diagnostics.dead_neuron_rate(model, getattr(self.task, trial.split))
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        density = sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)
        accuracy = self.task.evaluate(model, trial.split)["accuracy"]
        return torch.tensor([accuracy, dead.dynamic, dead.static, dead.total, density], dtype=torch.float64)


def _arm(setup: _Setup, name: str) -> Arm:
    """All cycles of one arm and seed are run once; a trial is one of them."""

    def dense(trial: Trial, model: nn.Module) -> Tensor:
        setup.train(trial, model)
        return setup.measure(trial, model).expand(len(setup.cycles), -1)

    def retrained(trial: Trial, model: nn.Module) -> Tensor:
        rows = []
        for cycle in setup.cycles:
            ticket = copy_model(model)
            prune.RandomPruner(1 - (1 - _P) ** cycle, seed=trial.seed).fit(ticket).apply(ticket)
            setup.train(trial, ticket)
            rows.append(setup.measure(trial, ticket))
        return torch.stack(rows)

    def iterated(trial: Trial, model: nn.Module) -> Tensor:
        host, rate, how = _ITERATED[name]
        ap = prune.ActivateWhilePruning(host(_P), rate, seed=trial.seed, **how)
        rows: list[Tensor] = []

        def one_cycle(model: nn.Module) -> None:
            setup.train(trial, model)
            rows.append(setup.measure(trial, model))

        ap.iterate(model, prune.successive_sparsities(1 - (1 - _P) ** max(setup.cycles), max(setup.cycles)), one_cycle)
        one_cycle(model)
        return torch.stack([rows[cycle] for cycle in setup.cycles])

    rows = {"dense": dense, "random, retrained": retrained}.get(name, iterated)

    def run(trial: Trial) -> dict[str, float]:
        def make() -> dict[str, Tensor]:
            return {"rows": rows(trial, setup.task.model(seed=trial.seed).to(trial.device))}

        decides = {"arm": name, "setup": setup, "seed": trial.seed, "split": trial.split, "device": trial.device}
        row = trial.cached("cycles", make, **decides)["rows"][setup.cycles.index(trial.setting)]
        trial.spend(trainings=1 + (trial.setting if name in _ITERATED else 0))
        return dict(zip(_METRICS, row.tolist(), strict=True))

    return Arm(run, cites=(PAPER,) if "AP" in name else ())


def _study(scale: Scale, net: str, setup: _Setup, claims: list[Claim]) -> Study:
    settings = {_density(cycle): cycle for cycle in setup.cycles}
    recipe = setup.task.recipe
    return Study(
        name=f"selective-activation: {net}",
        arms={name: _arm(setup, name) for name in ("dense", *_ITERATED, "random, retrained")},
        metric="accuracy",
        metrics={"dynamic": "min", "static": "min", "total": "min", "density": "min"},
        baseline="magnitude",
        settings=settings,
        expect=[claim for claim in claims if claim.expect.on in settings],
        seeds=scale.pick(range(200, 201), range(200, 208), range(200, 203)),
        max_seeds=scale.pick(1, 12, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{setup.task.name}: {recipe.epochs} epochs of {recipe.optimizer} at {recipe.lr:g} in each cycle, after which "
            f"{_P:.0%} of the weights go and the others are rewound to their initial values; AP takes {_Q / _P:.0%} of what goes",
            "settings": "share of the weights that is left",
            "dynamic": "mean share of ReLU units that are 0 on a test input, without those that are 0 on all (static); total is both",
            "random, retrained": "a random sub-network of the initial one, trained once: with rewinding that is also what random removal "
            "in cycles comes to",
        },
    )


def _density(cycle: int) -> str:
    return f"{(1 - _P) ** cycle:.3f}"


def _claims(cycles: tuple[int, ...], gains: tuple[float, ...], hosts: dict[str, str]) -> list[Claim]:
    found = []
    for d in map(_density, cycles):
        for ap, host in hosts.items():
            found += [
                Claim(
                    f"at density {d} {ap} gains {f'{by:.0%} over' if by else 'over'} {host} alone",
                    Expect(ap, on=d).better_than(host, by),
                )
                for by in gains
            ]
            found.append(
                Claim(
                    f"at density {d} {ap} has a lower dynamic rate than {host} alone",
                    Expect(ap, "dynamic", on=d).better_than(host),
                )
            )
        found += [
            Claim(f"at density {d} {ap} is better than {other}", Expect(ap, on=d).better_than(other))
            for ap, other in ((_AP, _RANDOM), (_AP_ALL, _RANDOM_ALL), (_AP, _POSITIVE), (_AP, "random, retrained"))
        ]
    return found


def _wide(scale: Scale) -> Study:
    if scale is Scale.FULL:
        recipe = Recipe("sgd", lr=0.1, weight_decay=5e-4, epochs=50, batch_size=64)
        task = tasks.cifar10().with_(name="cifar10, ResNet-20", model=lambda: ResNet(blocks=(3, 3, 3)), recipe=recipe)
        setup = _Setup(task, _authors_rate, (6, 9, 11, 13, 17))
    else:
        recipe = Recipe("sgd", lr=0.05, weight_decay=5e-4, epochs=scale.pick(1, 8, 8), batch_size=64)
        task = _digits((400, 200), recipe)
        setup = _Setup(task, lambda passed, step: 1.0 if passed < 0.75 else 0.1, scale.pick((2,), (6, 10, 14, 17), ()))
    rate = [
        Claim(
            f"at density {d} the {rate} rate is 8 points below that of the dense network",
            Expect("magnitude", rate, on=d).better_than("dense", by=0.08),
        )
        for d in map(_density, setup.cycles)
        for rate in ("dynamic", "total")
    ]
    return _study(
        scale,
        "wide",
        setup,
        rate + _claims(setup.cycles[-2:], (0.0,), {_AP: "magnitude", _AP_ALL: "magnitude", "LAMP + AP": "LAMP"}),
    )


def _digits(hidden: tuple[int, ...], recipe: Recipe) -> Task:
    """Digits scaled to mean 0 and variance 1 over all pixels; as they come, in [0, 1], sparse networks hardly train in so few epochs."""
    task = tasks.digits(hidden=hidden)
    splits: dict[str, Any] = {"train": task.train, "val": task.val, "test": task.test}
    x = splits["train"][:][0]
    scaled = {name: TensorDataset((part[:][0] - x.mean()) / x.std(), part[:][1]) for name, part in splits.items()}
    return task.with_(name=f"digits, {'-'.join(map(str, hidden))}", recipe=recipe, **scaled)


def _authors_rate(passed: float, step: int) -> float:
    """Linear warm-up over 20,000 steps, a tenth from epoch 25 of 50, a hundredth from epoch 32."""
    return min(1.0, step / 20_000) if passed < 25 / 50 else 0.1 if passed < 32 / 50 else 0.01


def _narrow(scale: Scale) -> Study:
    recipe = Recipe("adam", lr=2e-3, epochs=scale.pick(1, 6, 6), batch_size=64)
    task = _digits((128, 128, 64), recipe)
    setup = _Setup(task, lambda passed, step: 1.0, scale.pick((2,), (14, 16), (14, 16)))
    harm = [
        Claim(f"at density {d} {ap} does no harm of a point", Expect(ap, on=d).not_worse_than("magnitude", by=0.01))
        for d in map(_density, setup.cycles)
        for ap in (_AP, _AP_ALL)
    ]
    return _study(scale, "narrow", setup, _claims(setup.cycles, (0.0, 0.03), {_AP: "magnitude", _AP_ALL: "magnitude"}) + harm)


def study(scale: Scale) -> list[Study]:
    """Two studies of pruning in cycles with rewinding: a wide network, and a narrow one at extreme sparsity."""
    return [_wide(scale), _narrow(scale)]

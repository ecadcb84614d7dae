"""Consensus sub-network: polarised gates in one training (Zhi et al., arXiv 2302.10798)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightroom import prune, tasks
from weightroom.compare.base import sample_inputs, train_by_recipe
from weightroom.compare.prune import PruneMethod
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.prune.base import prunable
from weightroom.prune.consensus_gates import GatedModel
from weightroom.prune.plan import Inputs
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.train import Batches

__all__ = ["PAPER", "residual_mlp", "study"]

Unit = Literal["block", "channel"]


class _AtSparsity(prune.ConsensusGatePruner):
    """Gates that are to take a share of the whole model's weights, though they control only a part of them."""

    def __init__(self, sparsity: float, **how: Any) -> None:
        super().__init__(cost="params", **how)
        self.sparsity = sparsity

    def wrap(self, model: nn.Module, example_inputs: Inputs) -> GatedModel:
        wrapped = super().wrap(model, example_inputs)
        total = sum(p.numel() for p in model.parameters())
        self.keep = 1 - self.sparsity * total / wrapped.gated_cost
        if self.keep <= 0:
            raise ValueError(
                f"sparsity {self.sparsity:g} cannot be reached: the gates control {wrapped.gated_cost / total:.0%} of the weights"
            )
        return wrapped


def _unfit(unit: Unit, task: Task) -> str | None:
    try:
        prune.ConsensusGatePruner(unit=unit).wrap(task.model(), sample_inputs(task)[:1])
    except ValueError as error:
        return str(error)
    return None


def _method(unit: Unit) -> PruneMethod:
    space = {"lambda_pol": (0.5, 5.0, "log"), "lambda_size": (2.0, 20.0, "log")}
    return PruneMethod(partial(_AtSparsity, unit=unit), space=space, start="initial", unfit=partial(_unfit, unit))


PAPER = Paper(
    key="consensus-subnetwork",
    number=14,
    family="prune",
    parts=(prune.ConsensusGatePruner, prune.PolarizationLoss),
    title="Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
    authors="Xiaoying Zhi, Varun Babbar, Rundong Liu, Pheobe Sun, Fran Silavong, Ruibo Shi, Sean Moran",
    year=2025,
    venue="arXiv",
    arxiv="2302.10798",
    summary="Trains a residual network with binary gates that look at the input and are made to agree, so that one training gives a "
    "smaller static network.",
    claim="A regulariser that is zero only where all inputs agree on each gate turns a dynamic network into a static one at no cost: 50 % "
    "of the connections go for less than a point of accuracy on CIFAR-10, CIFAR-100 and Tiny ImageNet (abstract); summaries of the last "
    "version speak of 14 to 22 % fewer FLOPs, often within three points. The drop is lower than that of related pruning methods.",
    limits="No code was published and only abstracts and summaries were at hand: the layout of the gate, the size term with a "
    "target, the warm-up, the weights of the terms and the recalibration of batch norm are this part's own. On digits (10 "
    "seeds) polarised gates agree and freezing them costs nothing; but without polarisation, where eight gates of ten are "
    "undecided, freezing costs only a point or two as well, not four. Half of the channels go for .4 points; of half of the "
    "blocks that is open. A random sub-network of the same size, gates that do not look at the input, Gumbel gates and "
    "magnitude pruning are all within a point. The share that is kept is of what the gates control; stem, head and blocks "
    "with a projection stay whole, so that a comparison refuses a sparsity beyond that, and after a short training gates "
    "may be undecided and less be removed than asked for. With few blocks the size can only be met to the nearest sum of "
    "their costs. A channel in front of a layer or group norm gets no gate.",
    methods={"consensus blocks": _method("block"), "consensus channels": _method("channel")},
)


def residual_mlp(width: int = 64, depth: int = 6, inner: int | None = None) -> nn.Sequential:
    """Perceptron of pre-norm residual blocks, x + outer(relu(inner(norm(x)))).

    Args:
        width: of the residual stream.
        depth: number of blocks.
        inner: width inside a block; that of the stream when None.
    """
    blocks = [_Block(width, width if inner is None else inner) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *blocks, nn.Linear(width, 10))


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


_FREE, _POLARISED, _STATIC, _GUMBEL = "no polarisation", "polarised", "static gates", "gumbel gates"
_GATED: dict[str, dict[str, Any]] = {
    _FREE: {"lambda_pol": 0.0},
    _POLARISED: {},
    _STATIC: {"gate": "static"},
    _GUMBEL: {"gate": "gumbel"},
}
_RANDOM, _FOUND, _HALF = "random sub-network, retrained", "found sub-network, retrained", "half as deep"
#: Pruners of single weights, on the dense network once it is trained, which is then trained on.
_WEIGHTS: dict[str, Callable[..., prune.PlanPruner]] = {
    "global magnitude": prune.GlobalMagnitudePruner,
    "LAMP": prune.LAMPPruner,
    "ERK": prune.ERKPruner,
    "uniform": prune.UniformMagnitudePruner,
    "random": prune.RandomPruner,
}
#: Share of the epochs by which they are trained on.
_TUNING = 0.4


@dataclass(frozen=True)
class _Setup:
    task: Task
    half: Task
    unit: Unit
    keep: float = 0.5

    def gated(self, trial: Trial, **how: Any) -> tuple[prune.ConsensusGatePruner, Any]:
        """The pruner and the network at initialisation with its gates, which depend on the seed alone."""
        model = self.task.model(seed=trial.seed).to(trial.device)
        pruner = prune.ConsensusGatePruner(self.keep, unit=self.unit, **how)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.seed)
            return pruner, pruner.wrap(model, sample_inputs(self.task)[:1].to(trial.device))

    def trained(self, trial: Trial, name: str) -> tuple[dict[str, float], nn.Module, Tensor, float]:
        """Trains with gates: the metrics, the derived network, which gates are open, and the share of prunable weights gone."""
        pruner, wrapped = self.gated(trial, **_GATED[name])
        train_by_recipe(
            self.task, trial, wrapped, passed=wrapped.advance,
            step=lambda net, batch: self.task.loss(net(batch[0]), batch[1]) + wrapped.aux_loss(),
            optimizer=lambda _: self.task.recipe.make(wrapped.param_groups()),
        )  # fmt: skip
        dynamic = self.accuracy(trial, wrapped)
        report = wrapped.report(self.batches(trial))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that gates are undecided is what is measured
            small, plan = pruner.derive(wrapped, self.batches(trial))
        accuracy = self.accuracy(trial, small)
        gone, size = 0, 0
        for site in prunable(wrapped.model):
            layer = plan.layers()[site.name]
            gone, size = gone + layer.removed, size + layer.size
        found = {"accuracy": accuracy, "drop": dynamic - accuracy, "undecided": report.undecided, "kept": report.kept}
        return found, small, (report.gbar > 0.5), gone / size

    def batches(self, trial: Trial) -> list[tuple[Tensor, ...]]:
        return list(Batches(self.task.train, 256, shuffle=False))

    def accuracy(self, trial: Trial, model: nn.Module) -> float:
        return self.task.evaluate(model, trial.split)["accuracy"]

    def consensus(self, trial: Trial) -> dict[str, Tensor]:
        """What the polarised gates of this seed have kept, and the share of weights that is gone."""

        def make() -> dict[str, Tensor]:
            _, _, opened, gone = self.trained(Trial(trial.seed, trial.scale, device=trial.device), _POLARISED)
            return {"open": opened, "gone": torch.tensor(gone, dtype=torch.float64)}

        decides = {"setup": self, "seed": trial.seed, "scale": trial.scale.value, "device": trial.device}
        return trial.cached("consensus", make, **decides)


def _cut_at_start(setup: _Setup, trial: Trial, opened: Tensor) -> nn.Module:
    """The network at initialisation without the units that are not open."""
    pruner, wrapped = setup.gated(trial, gate="static")
    parts = opened.float().split([gate.units for gate in wrapped.gates])
    with torch.no_grad():
        for gate, part in zip(wrapped.gates, parts, strict=True):
            gate.logits.copy_(part)
    return pruner.derive(wrapped, setup.batches(trial))[0]


def _plain(setup: _Setup, trial: Trial, model: nn.Module, kept: float, **how: Any) -> dict[str, float]:
    train_by_recipe(setup.task, trial, model, **how)
    trial.spend(trainings=1)
    trial.spend(parameters=sum(p.numel() for p in model.parameters()))
    return {"accuracy": setup.accuracy(trial, model), "drop": 0.0, "undecided": 0.0, "kept": kept}


def _arms(setup: _Setup) -> dict[str, Arm]:
    def dense(trial: Trial) -> dict[str, float]:
        return _plain(setup, trial, setup.task.model(seed=trial.seed).to(trial.device), 1.0)

    def half(trial: Trial) -> dict[str, float]:
        return _plain(setup, trial, setup.half.model(seed=trial.seed).to(trial.device), 0.5)

    def gated(name: str, trial: Trial) -> dict[str, float]:
        found, small, _, _ = setup.trained(trial, name)
        trial.spend(trainings=1, parameters=sum(p.numel() for p in small.parameters()))
        return found

    def retrained(shuffle: bool, trial: Trial) -> dict[str, float]:
        opened = setup.consensus(trial)["open"]
        if shuffle:
            opened = opened[torch.randperm(len(opened), generator=torch.Generator().manual_seed(trial.seed))]
        return _plain(setup, trial, _cut_at_start(setup, trial, opened), float(opened.double().mean()))

    def weights(make: Callable[..., prune.PlanPruner], trial: Trial) -> dict[str, float]:
        model = setup.task.model(seed=trial.seed).to(trial.device)

        def trained() -> dict[str, Tensor]:
            train_by_recipe(setup.task, Trial(trial.seed, trial.scale, device=trial.device), model, log=False)
            return model.state_dict()

        decides = {"setup": setup, "seed": trial.seed, "scale": trial.scale.value, "device": trial.device}
        model.load_state_dict(trial.cached("dense", trained, **decides))
        gone = float(setup.consensus(trial)["gone"])
        plan = make(gone, **({"seed": trial.seed} if make is prune.RandomPruner else {})).fit(model)
        plan.apply(model)
        return _plain(setup, trial, model, 1 - gone, epochs=max(1, round(_TUNING * setup.task.recipe.epochs)))

    return {
        "dense": Arm(dense),
        **{name: Arm(partial(gated, name), cites=(PAPER,)) for name in _GATED},
        _RANDOM: Arm(partial(retrained, True)),
        _FOUND: Arm(partial(retrained, False), cites=(PAPER,)),
        _HALF if setup.unit == "block" else "half as wide inside": Arm(half),
        **{name: Arm(partial(weights, make)) for name, make in _WEIGHTS.items()},
    }


def _study(scale: Scale, unit: Unit) -> Study:
    if scale is Scale.FULL:
        recipe = Recipe("sgd", lr=0.1, weight_decay=1e-4, epochs=200, batch_size=128, schedule="cosine")
        task = tasks.cifar10().with_(name="cifar10, ResNet-56", model=lambda: ResNet(blocks=(9, 9, 9)), recipe=recipe)
        half = task.with_(model=lambda: ResNet(blocks=(5, 5, 5)))
    else:
        recipe = Recipe("adam", lr=2e-3, epochs=20, batch_size=64)
        task = tasks.digits().with_(name="digits, residual MLP", model=residual_mlp, recipe=recipe)
        half = task.with_(model=partial(residual_mlp, depth=3) if unit == "block" else partial(residual_mlp, inner=32))
    setup = _Setup(task, half, unit)
    claims = [
        Claim("without polarisation, freezing the gates costs four points", Expect(_FREE, "drop").within(low=0.04)),
        Claim(
            "with polarisation, freezing the gates costs half a point at the most", Expect(_POLARISED, "drop").within(high=0.005)
        ),
        Claim(
            "polarisation lowers the cost of freezing by two points or more",
            Expect(_POLARISED, "drop").better_than(_FREE, by=0.02),
        ),
        Claim("without polarisation, half of the gates or more are undecided", Expect(_FREE, "undecided").within(low=0.5)),
        Claim(
            "with polarisation, one gate in twenty at the most is undecided", Expect(_POLARISED, "undecided").within(high=0.05)
        ),
        Claim("the size asked for is met within ten points", Expect(_POLARISED, "kept").within(0.4, 0.6)),
        Claim("half of it goes for less than a point", Expect(_POLARISED).not_worse_than("dense", by=0.01)),
        Claim("the network is better than the one frozen from gates without polarisation", Expect(_POLARISED).better_than(_FREE)),
        Claim("it is better than a random sub-network of the same size", Expect(_POLARISED).better_than(_RANDOM)),
        Claim(
            "it is not worse by a point than a random sub-network of the same size",
            Expect(_POLARISED).not_worse_than(_RANDOM, by=0.01),
        ),
        Claim("found and retrained, it is better than a random one", Expect(_FOUND).better_than(_RANDOM)),
        Claim("gates that look at the input find a better network than constants", Expect(_POLARISED).better_than(_STATIC)),
        Claim("straight-through gates are better than Gumbel gates", Expect(_POLARISED).better_than(_GUMBEL)),
        Claim("it is better than magnitude pruning at equal sparsity", Expect(_POLARISED).better_than("global magnitude")),
    ]
    return Study(
        name=f"consensus-subnetwork: {unit}s",
        arms=_arms(setup),
        metric="accuracy",
        metrics={"drop": "min", "undecided": "min", "kept": "min"},
        baseline="dense",
        expect=claims,
        seeds=scale.pick(range(100, 101), range(100, 106), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{task.name}: {recipe.epochs} epochs of {recipe.optimizer} at {recipe.lr:g}; weights and gates together, from scratch",
            "drop": "accuracy of the network with gates that look at the input, less that of the one derived from it",
            "undecided": "share of the gates that are open for more than 2 % and less than 98 % of the training data",
            "kept": "share of the gates that are open; of the weights, for pruners of weights",
            _RANDOM: f"as many {unit}s as the polarised gates of that seed have kept, drawn at random, trained from the initial weights",
            "pruners of weights": "take as large a share of all weights from the trained dense network, which is then trained for "
            f"{_TUNING:.0%} more epochs",
        },
    )  # fmt: skip


def study(scale: Scale) -> list[Study]:
    """Two studies: gates on whole blocks, and on the channels inside blocks."""
    return [_study(scale, "block"), _study(scale, "channel")]

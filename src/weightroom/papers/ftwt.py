"""FTWT: masks predicted for every sample (Elkerdawy et al., CVPR 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from weightroom import metrics, prune, tasks, train
from weightroom.compare.base import sample_inputs, train_by_recipe
from weightroom.compare.prune import PruneMethod
from weightroom.nets.small import ConvNet
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.train import Batches

__all__ = ["PAPER", "study"]


def _pruner(sparsity: float, seed: int = 0, **how: Any) -> prune.DynamicMaskPruner:
    """Both ends of a convolution lose a share of their channels, so that about ``sparsity`` of its MACs go."""
    return prune.DynamicMaskPruner(1 - math.sqrt(1 - sparsity), target="ratio", seed=seed, **how)


def _unfit(task: Task) -> str | None:
    try:
        prune.DynamicMaskPruner().wrap(task.model(seed=0), sample_inputs(task)[:2])
    except ValueError as error:
        return str(error)
    return None


PAPER = Paper(
    key="ftwt",
    number=26,
    family="prune",
    parts=(prune.DynamicMaskPruner, prune.DynamicConvBlock, prune.MaskPredictor, prune.mass_targets),
    title="Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
    authors="Sara Elkerdawy, Mostafa Elhoushi, Hong Zhang, Nilanjan Ray",
    year=2022,
    venue="CVPR",
    arxiv="2110.08232",
    code="selkerdawy/FTWT",
    summary="A small gate before every convolution predicts, sample by sample, which filters are worth computing; it learns from "
    "the convolution's own output which those would have been.",
    claim="Masks predicted for every sample save half of the multiply-accumulates and more at about a point of accuracy, more than "
    "static pruning does, and what will be saved can be estimated before training.",
    limits="Masks differ from sample to sample: in a batch every filter is computed and nothing is saved. At a batch of one and a "
    "quarter of the MACs, four layers of 256 channels take about 0.4 of the time on a CPU and narrower ones 0.7. On digits "
    "(10 seeds) predicted masks beat random ones of the same size by 44 points at half of the channels. Gates miss their "
    "targets: at r = .9 and .8 they lean to 'on', the accuracy stays, and 11 and 44 % of the MACs go, about 28 and 16 "
    "points less than estimated; r = .7 saves 72 % and is unstable (accuracies of 36 to 99 %); at r = .5 and at 30 % of the "
    "channels gates lean to 'off', the last layer may be left with a channel or two, and most of the accuracy goes, where "
    "one fixed choice of as many channels keeps 98 %. Digits are too easy to tell dynamic masks from one fixed choice of "
    "channels, and a small network on them says nothing of ImageNet. The paper's code counts the input of a block as masked "
    "where a skip connection has filled it again, and counts a depthwise convolution as free as soon as one channel is off; "
    "counted as they are, the savings of residual networks and of MobileNets are smaller than its numbers.",
    methods={"FTWT": PruneMethod(_pruner, seeded=True, unfit=_unfit)},
)

#: The share of channels, and of weights, that the arms with a given size keep.
_KEPT = (0.5, 0.3)
_MASS = (0.9, 0.8, 0.7, 0.5)
#: Weights that go where arms prune single weights: as many as a half of all channels takes with it.
_SPARSITY = 0.75
_BASELINE = "baseline, fine-tuned"

Prepare = Callable[[prune.DynamicModel, list[Tensor], int], None]


class _Random(nn.Module):
    """Chooses a share of the channels at random, others for every sample and pass."""

    def __init__(self, width: int, kept: float, seed: int) -> None:
        super().__init__()
        self.width, self.kept = width, round(kept * width)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(len(x), self.width, generator=self.generator).argsort(1).to(x.device)
        return torch.where(order < self.kept, 1.0, -1.0)


class _Fixed(nn.Module):
    """Chooses the same channels for every sample."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", torch.where(chosen, 1.0, -1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(x), -1)


def random_masks(kept: float) -> Prepare:
    """Gates that choose ``kept`` of the channels at random."""

    def prepare(model: prune.DynamicModel, inputs: list[Tensor], seed: int) -> None:
        for i, block in enumerate(model.blocks.values()):
            block.gate = _Random(block.conv.out_channels, kept, 1000 * seed + i)  # type: ignore[assignment]

    return prepare


def static_masks(kept: float) -> Prepare:
    """Gates that choose the ``kept`` channels of the highest mean rank among the heat maps."""

    @torch.no_grad()
    def prepare(model: prune.DynamicModel, inputs: list[Tensor], seed: int) -> None:
        blocks = model.blocks.values()
        ranks = [torch.zeros(block.conv.out_channels, dtype=torch.float64, device=block.conv.weight.device) for block in blocks]
        with model.opened():
            model.eval()
            for x in inputs:
                model(x)
                for rank, block in zip(ranks, blocks, strict=True):
                    rank += block.heat.argsort(1).argsort(1).double().sum(0)
        for rank, block in zip(ranks, blocks, strict=True):
            chosen = torch.zeros(len(rank), dtype=torch.bool, device=rank.device)
            chosen[rank.topk(round(kept * len(rank))).indices] = True
            block.gate = _Fixed(chosen)  # type: ignore[assignment]

    return prepare


def _start(task: Task, trial: Trial) -> nn.Module:
    """The trained baseline."""
    model = task.model(seed=trial.seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), model, log=False)
        return model.state_dict()

    state = trial.cached("baseline", make, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device)
    model.load_state_dict(state)
    return model


def _tune(task: Task, trial: Trial, model: nn.Module, groups: Any, **more: Any) -> None:
    """As many epochs again with SGD, the rate a tenth for the last quarter; the gates' stays."""
    epochs = trial.scale.pick(2, task.recipe.epochs, task.recipe.epochs)
    optimizer = SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        falls: Callable[[int], float] = lambda step: 0.1 if step >= 0.75 * steps else 1.0  # noqa: E731
        return LambdaLR(optimizer, [falls, lambda step: 1.0][: len(optimizer.param_groups)])

    done = train.fit(
        model, task.train, optimizer=optimizer, epochs=epochs, batch_size=task.recipe.batch_size, schedule=schedule, seed=trial.seed,
        device=trial.device, after_epoch=lambda epoch, value: trial.log(epoch, loss=value), **more,
    )  # fmt: skip
    trial.spend(train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards)


def _dynamic(task: Task, pruner: Callable[[int], prune.DynamicMaskPruner], prepare: Prepare | None = None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model = pruner(trial.seed).wrap(_start(task, trial), sample_inputs(task)[:1].to(trial.device))
        batches = [x.to(trial.device) for x, *_ in Batches(task.train, 256, shuffle=False)]
        estimate = model.estimate_reduction(batches)
        if prepare is not None:
            prepare(model, batches, trial.seed)
        model.train()
        epochs = trial.scale.pick(2, task.recipe.epochs, task.recipe.epochs)
        total = epochs * len(Batches(task.train, task.recipe.batch_size))
        learns = prepare is None
        groups = [group for group in model.param_groups(0.01, 0.1) if group["params"]]
        _tune(
            task, trial, model, groups, after_step=lambda step: model.advance(step / total),
            step=lambda net, batch: task.loss(net(batch[0]), batch[1]) + (model.aux_loss() if learns else 0.0),
        )  # fmt: skip
        result = {"accuracy": task.evaluate(model, trial.split)["accuracy"]}
        dataset: Any = getattr(task, trial.split)
        report = model.report([x.to(trial.device) for x, *_ in Batches(dataset, 256, shuffle=False)])
        result["macs_cut"] = report.macs_cut
        if learns:
            assert report.mask_accuracy is not None
            result |= {
                "mask_accuracy": report.mask_accuracy,
                "estimated_cut": estimate,
                "estimate_gap": abs(estimate - report.macs_cut),
            }
        return result

    return Arm(run, cites=(PAPER,) if prepare is None else ())


def _plain(task: Task, make: Callable[[int], prune.PlanPruner] | None, *, start: str = "trained") -> Arm:
    """Single weights are pruned, or none; the mask at initialisation is trained as long in all."""

    def run(trial: Trial) -> dict[str, float]:
        model = _start(task, trial) if start == "trained" else task.model(seed=trial.seed).to(trial.device)
        inputs, cut = sample_inputs(task)[:1].to(trial.device), 0.0
        if make is not None:
            plan = make(trial.seed).fit(model, example_inputs=inputs)
            cut = 1 - plan.macs() / metrics.macs(model, inputs)
            plan.apply(model)
            if start == "initial":
                train_by_recipe(task, trial, model, log=False)
        _tune(task, trial, model, model.parameters(), loss=task.loss)
        return {"accuracy": task.evaluate(model, trial.split)["accuracy"], "macs_cut": cut}

    return Arm(run)


def _arms(task: Task) -> dict[str, Arm]:
    P = prune.DynamicMaskPruner
    sized = lambda kept: lambda seed: P(1 - kept, target="ratio", seed=seed)  # noqa: E731
    arms = {_BASELINE: _plain(task, None)}
    arms |= {f"FTWT, r {r:g}": _dynamic(task, lambda seed, r=r: P(r, seed=seed)) for r in _MASS}  # type: ignore[misc]
    arms["FTWT, r 0.7, joint"] = _dynamic(task, lambda seed: P(0.7, mode="joint", seed=seed))
    arms["FTWT, r 0.7, average pooling"] = _dynamic(task, lambda seed: P(0.7, pool="avg", seed=seed))
    for kept in _KEPT:
        arms[f"top {kept:g}"] = _dynamic(task, sized(kept))
        arms[f"random masks, {kept:g}"] = _dynamic(task, sized(kept), random_masks(kept))
        arms[f"static, {kept:g}"] = _dynamic(task, sized(kept), static_masks(kept))
    return arms | {
        "global magnitude": _plain(task, lambda seed: prune.GlobalMagnitudePruner(_SPARSITY)),
        "LAMP": _plain(task, lambda seed: prune.LAMPPruner(_SPARSITY)),
        "ERK": _plain(task, lambda seed: prune.ERKPruner(_SPARSITY)),
        "uniform": _plain(task, lambda seed: prune.UniformMagnitudePruner(_SPARSITY)),
        "random weights": _plain(task, lambda seed: prune.RandomPruner(_SPARSITY, seed=seed)),
        "random weights, retrained": _plain(task, lambda seed: prune.RandomPruner(_SPARSITY, seed=seed), start="initial"),
    }


def _claims() -> list[Claim]:
    cut = "macs_cut"
    claims = []
    for kept in _KEPT:
        on = f"where {kept:.0%} of the channels are on"
        claims += [
            Claim(f"{on}, predicted masks beat random ones", Expect(f"top {kept:g}").better_than(f"random masks, {kept:g}")),
            Claim(f"{on}, they spend no more MACs than random ones, within 5 %",
                  Expect(f"top {kept:g}", cut).not_worse_than(f"random masks, {kept:g}", by=0.05)),
            Claim(f"{on}, dynamic masks beat a static choice", Expect(f"top {kept:g}").better_than(f"static, {kept:g}")),
        ]  # fmt: skip
    for name in ("FTWT, r 0.7", "top 0.5"):
        claims += [
            Claim(f"{name} is within a point of the baseline", Expect(name).not_worse_than(_BASELINE, by=0.01)),
            Claim(f"{name} saves more than half of the MACs", Expect(name, cut).within(low=0.5)),
        ]
    claims += [
        Claim(f"the saving at r = {r:g} is estimated before training within 0.1",
              Expect(f"FTWT, r {r:g}", "estimate_gap").within(high=0.1)) for r in _MASS
    ]  # fmt: skip
    return [
        *claims,
        Claim("joint training equals decoupled training within a point", Expect("FTWT, r 0.7, joint").equal_to("FTWT, r 0.7", 0.01)),
        Claim("gates that pool by the average equal those that pool by the maximum within a point",
              Expect("FTWT, r 0.7, average pooling").equal_to("FTWT, r 0.7", 0.01)),
        Claim("at 75 % fewer MACs FTWT beats global magnitude on single weights", Expect("top 0.5").better_than("global magnitude")),
    ]  # fmt: skip


def study(scale: Scale) -> Study:
    """One trained CNN: gates of several budgets against random and fixed masks of the same size and against single weights."""
    digits = tasks.digits("cnn").with_(
        name="digits, CNN 16-32-32-64",
        model=lambda: ConvNet(1, 10, channels=(16, 32, 32, 64), hidden=64),
        recipe=Recipe("adam", lr=3e-3, epochs=8, batch_size=64),
    )
    task = scale.pick(lambda: digits.spoil(samples=256), lambda: digits, lambda: tasks.cifar10(blocks=(9, 9, 9), epochs=200))()
    return Study(
        name="ftwt",
        arms=_arms(task),
        metric="accuracy",
        metrics={"macs_cut": "max", "mask_accuracy": "max", "estimated_cut": "max", "estimate_gap": "min"},
        baseline=_BASELINE,
        expect=_claims(),
        seeds=scale.pick(range(100, 101), range(100, 105), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{task.name}: the baseline by its recipe, then {task.recipe.epochs} epochs of SGD (0.01, gates 0.1, a tenth "
            "for the last quarter; momentum 0.9, weight decay 5e-4) in every arm; gates learn in the first half",
            "macs_cut": "share of the convolutions' multiply-accumulates of the test set that is saved; of single weights, of all layers",
            "estimated_cut": "the same if the targets of the baseline on the training data were the masks",
        },
    )

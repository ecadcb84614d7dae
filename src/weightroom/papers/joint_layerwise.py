"""Output-distortion pruning by a dynamic programme over layers (Xu, Wang et al., ICCV 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from weightroom import data, prune, tasks
from weightroom.compare.base import Method, train_by_recipe
from weightroom.metrics import nonzero_parameters
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.prune.base import prunable, remove_smallest
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]

PAPER = Paper(
    key="joint-layerwise",
    number=3,
    family="prune",
    parts=(prune.RDPruner, prune.RDPlan, prune.allocate_dp, prune.output_distortion),
    title="Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks",
    authors="Kaixin Xu, Zhe Wang, Xue Geng, Jie Lin, Min Wu, Xiaoli Li, Weisi Lin",
    year=2023,
    venue="ICCV",
    arxiv="2308.10438",
    code="Akimoto-Cris/RD_VIT_PRUNE",
    real=("cifar10-jpg",),
    summary="Shares a sparsity out over the layers so that the network's output moves least, by measured curves and a knapsack.",
    claim="The distortions that pruning single layers causes at the output add up, so that the amounts of all layers can be "
    "optimised together by a dynamic programme; the network is then better at the same sparsity than under LAMP, ERK, global or "
    "uniform magnitude, pruned in rounds or at once, with a few unlabelled inputs or with noise.",
    limits="The distortions add up only while little is removed: with half of every layer gone the whole moves the output half as "
    "much again as the sum says. On digits one cut to 70 % moves the output no less than LAMP and ERK do, and one to 95 % "
    "leaves a lower accuracy than theirs; no layer dies there, so that the limit per layer makes no difference. In rounds "
    "with training in between the accuracy right after the last cut was ten to thirty points above that of the others on "
    "average, but so different from start to start that ten of them do not decide it; the training that follows levels most "
    "of it. On a small ResNet for photographs (three seeds) the cut at 70 % leaves on average five points more than LAMP, "
    "ERK and global magnitude, which three seeds do not decide. Noise serves as well as inputs where these are scaled to "
    "variance 1. The part follows the paper; the authors' code leaves out a term of the second smallest layer, reads its "
    "table one weight off and so removes slightly less than asked for, and lets whole layers go. The form that removes "
    "input channels is not here.",
    methods={
        "RD": Method(
            prune.RDPruner,
            {},
            {"distortion": ["mean", "worst"], "n_calibration": [64, 256, 1024], "max_layer_sparsity": (0.97, 0.999)},
        ),
        "RD, no data": Method(prune.RDPruner, {"calibration": "noise"}, {"distortion": ["mean", "worst"]}),
    },
)

#: Share of the weights still there that a round removes, and how many inputs the curves are measured on.
_ROUND, _CALIBRATION = 0.2, 256
#: Training images at real scale.
_IMAGES = 5000
Maker = Callable[[float, int], prune.PlanPruner | None]


def _ours(**options: Any) -> Maker:
    return lambda sparsity, seed: prune.RDPruner(sparsity, seed=seed, n_calibration=_CALIBRATION, **options)


#: Arm -> (sparsity, seed) -> pruner of the trained network.
_TRAINED: dict[str, Maker] = {
    "dense": lambda sparsity, seed: None,
    "global": lambda sparsity, seed: prune.GlobalMagnitudePruner(sparsity),
    "LAMP": lambda sparsity, seed: prune.LAMPPruner(sparsity),
    "ERK": lambda sparsity, seed: prune.ERKPruner(sparsity),
    "uniform": lambda sparsity, seed: prune.UniformMagnitudePruner(sparsity),
    "random": lambda sparsity, seed: prune.RandomPruner(sparsity, seed=seed),
    "RD": _ours(),
    "RD, worst input": _ours(distortion="worst"),
    "RD, no data": _ours(calibration="noise"),
    "RD, no limit": _ours(max_layer_sparsity=1.0),
}
_RIVALS = ("LAMP", "ERK", "global", "uniform")
_RETRAINED = "random, retrained"


def _dense(task: Task, trial: Trial) -> nn.Module:
    """The trained network that all arms of a seed start from."""
    model = task.model(seed=trial.seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        full = copy.deepcopy(model)
        train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), full, log=False)
        return full.state_dict()

    model.load_state_dict(trial.cached("dense", make, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device))
    return model


def _whole(dataset: Any) -> list[Tensor]:
    return data.gather(dataset, torch.arange(len(dataset)))


def _inputs(dataset: Any, device: str) -> Tensor:
    return _whole(dataset)[0].to(device)


def _retrained(task: Task, trial: Trial, epochs: int) -> dict[str, float]:
    """A random sub-network, trained from its initial weights for as long as the others have been by the end."""
    model = task.model(seed=trial.seed).to(trial.device)
    plan = prune.RandomPruner(trial.setting, seed=trial.seed).fit(model)
    plan.apply(model)
    train_by_recipe(task, trial, model, epochs=task.recipe.epochs + epochs)
    trial.spend(parameters=nonzero_parameters(model))
    return {"accuracy": task.evaluate(model, trial.split)["accuracy"], "sparsity": plan.sparsity()}


# ---- in rounds


def _in_rounds(task: Task, maker: Maker, rounds: int, epochs: int, trial: Trial) -> dict[str, float]:
    model = _dense(task, trial)
    x = _inputs(task.train, trial.device)[:_CALIBRATION]
    pruned = task.evaluate(model, trial.split)["accuracy"]
    sparsity = 0.0
    for number in range(1, rounds + 1):
        pruner = maker(1 - (1 - _ROUND) ** number, trial.seed)
        if pruner is not None:
            plan = pruner.fit(model, [x], example_inputs=x[:1])
            plan.apply(model)
            pruned, sparsity = task.evaluate(model, trial.split)["accuracy"], plan.sparsity()
            trial.log(number, pruned=pruned)
        train_by_recipe(task, trial, model, epochs=epochs, log=False)
    trial.spend(parameters=nonzero_parameters(model))
    return {"accuracy": task.evaluate(model, trial.split)["accuracy"], "pruned": pruned, "sparsity": sparsity}


def _rounds(scale: Scale) -> Study:
    rounds, epochs = scale.pick((2, 1), (16, 2), (14, 80))
    task = scale.pick(_perceptron, _perceptron, _resnet32)()
    arms = {
        name: Arm(partial(_in_rounds, task, maker, rounds, epochs), cites=(PAPER,) if name.startswith("RD") else ())
        for name, maker in _TRAINED.items()
        if name != "RD, no limit"
    }
    arms[_RETRAINED] = Arm(lambda trial: _retrained(task, trial, rounds * epochs))
    sparsity = 1 - (1 - _ROUND) ** rounds
    return Study(
        name="joint-layerwise: in rounds",
        arms=arms,
        metric="accuracy",
        metrics={"pruned": "max", "sparsity": "max"},
        baseline="LAMP",
        settings={f"{sparsity:.3f}": sparsity},
        expect=[
            *(
                Claim(
                    f"the last cut leaves an accuracy more than five points above that of {rival}",
                    Expect("RD", "pruned").better_than(rival, by=0.05),
                )
                for rival in _RIVALS
            ),
            *(Claim(f"once trained again it is above {rival}", Expect("RD").better_than(rival)) for rival in _RIVALS),
            Claim("once trained again it is above a random sub-network trained as long", Expect("RD").better_than(_RETRAINED)),
            Claim("noise does as well as inputs, within a point", Expect("RD, no data").not_worse_than("RD", by=0.01)),
        ],
        seeds=scale.pick(range(1), range(100, 105), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{task.name}: {task.recipe.epochs} epochs dense, then {rounds} rounds, each of which removes a fifth of the "
            f"weights still there and trains for {epochs} epochs with the masks held; the dense arm trains as long",
            "pruned": "accuracy right after the last cut, before the training that follows",
        },
    )


# ---- at once


def _at_once(task: Task, maker: Maker, epochs: int, trial: Trial) -> dict[str, float]:
    model = _dense(task, trial)
    result: dict[str, float] = {}
    pruner = maker(trial.setting, trial.seed)
    if pruner is not None:
        x = _inputs(task.train, trial.device)[:_CALIBRATION]
        plan = pruner.fit(model, [x], example_inputs=x[:1])
        moved = prune.output_distortion(model, plan, _inputs(getattr(task, trial.split), trial.device))
        plan.apply(model)
        result = {"distortion": moved, "log_distortion": math.log(moved), "sparsity": plan.sparsity()}
    result["pruned"] = task.evaluate(model, trial.split)["accuracy"]
    train_by_recipe(task, trial, model, epochs=epochs)
    trial.spend(parameters=nonzero_parameters(model))
    return {"accuracy": task.evaluate(model, trial.split)["accuracy"], **result}


def _one_shot(scale: Scale) -> Study:
    epochs = scale.pick(1, 2, 80, 2)
    task = scale.pick(_perceptron, _perceptron, _resnet32, _small_resnet)()
    arms = {
        name: Arm(partial(_at_once, task, maker, epochs), cites=(PAPER,) if name.startswith("RD") else ())
        for name, maker in _TRAINED.items()
    }
    arms[_RETRAINED] = Arm(lambda trial: _retrained(task, trial, epochs))
    settings = {f"{s:g}": s for s in scale.pick((0.7,), (0.7, 0.95), (0.58, 0.7, 0.95), (0.7, 0.95))}
    claims = [
        *(
            Claim(
                f"at 70 % it moves the output on new inputs less than {rival}",
                Expect("RD", "distortion", on="0.7").better_than(rival),
            )
            for rival in _RIVALS
        ),
        Claim(
            "at 70 % noise finds a plan of the same distortion within 1 %",
            Expect("RD, no data", "log_distortion", on="0.7").equal_to("RD", within=0.01),
        ),
        *(
            Claim(f"at 70 % the cut leaves a higher accuracy than {rival}", Expect("RD", "pruned", on="0.7").better_than(rival))
            for rival in _RIVALS
        ),
        Claim(
            "after a short training at 70 % it is above a random sub-network trained as long",
            Expect("RD", on="0.7").better_than(_RETRAINED),
        ),
        Claim(
            "at 95 % without a limit per layer it collapses: more than twenty points below LAMP",
            Expect("RD, no limit", "pruned", on="0.95").worse_than("LAMP", by=0.2),
        ),
        Claim("at 95 % the limit saves it: not below LAMP", Expect("RD", "pruned", on="0.95").not_worse_than("LAMP")),
    ]
    return Study(
        name="joint-layerwise: at once",
        arms=arms,
        metric="accuracy",
        metrics={"distortion": "min", "log_distortion": "min", "pruned": "max", "sparsity": "max"},
        baseline="LAMP",
        settings=settings,
        expect=[claim for claim in claims if claim.expect.on in settings],
        seeds=scale.pick(range(1), range(100, 105), range(100, 103), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{task.name}: {task.recipe.epochs} epochs dense, one cut, {epochs} epochs more",
            "distortion": "mean squared difference of the logits to those of the dense network, on the test inputs, right after the "
            "cut; log_distortion is its natural logarithm, in which a difference of 0.01 is 1 %",
            "pruned": "accuracy right after the cut",
        },
    )


# ---- do distortions add up?


def _additivity(task: Task, kind: str, trial: Trial) -> dict[str, float]:
    """Distortion of all layers changed together over the sum of those of each changed alone."""
    model = _dense(task, trial).eval()
    x = _inputs(getattr(task, trial.split), trial.device)
    generator = torch.Generator().manual_seed(trial.seed)
    changed = {}
    for site in prunable(model):
        w = site.tensor.detach()
        keep = remove_smallest([w.abs()], [None], round(trial.setting * w.numel()))[0]
        noise = torch.randn(w.shape, generator=generator).to(w.device)
        changed[site.name] = w * keep if kind == "pruned" else w + noise * (w * ~keep).norm() / noise.norm()
    with torch.no_grad():
        f = model(x).double()
        moved = lambda names: float((functional_call(model, names, (x,)).double() - f).square().mean())  # noqa: E731
        together, alone = moved(changed), [moved({name: w}) for name, w in changed.items()]
    return {"ratio": together / sum(alone), "largest_share": max(alone) / sum(alone)}


def _adding_up(scale: Scale) -> Study:
    task = scale.pick(_perceptron, _perceptron, _resnet32)()
    amounts = scale.pick((0.1, 0.5), *[tuple(i / 10 for i in range(1, 9))] * 2)
    settings = {f"{a:g}": a for a in amounts}
    regions = [("pruned", a, 0.75, 1.2) for a in (0.1, 0.2, 0.3)] + [("pruned", a, 1.4, 1.6) for a in (0.4, 0.5, 0.6, 0.7)]
    regions += [("noise of equal norm", a, 1.0, 1.2) for a in (0.1, 0.3, 0.5, 0.7)]
    return Study(
        name="joint-layerwise: adding up",
        arms={kind: Arm(partial(_additivity, task, kind)) for kind in ("pruned", "noise of equal norm")},
        metric="ratio",
        direction="min",
        metrics={"largest_share": "min"},
        settings=settings,
        expect=[
            Claim(
                f"with {a:.0%} of every layer {'removed' if kind == 'pruned' else 'replaced by noise as large'}, joint over summed "
                f"distortion is between {low:g} and {high:g}",
                Expect(kind, on=f"{a:g}").within(low, high),
            )
            for kind, a, low, high in regions
            if f"{a:g}" in settings
        ],
        seeds=scale.pick(range(1), range(100, 105), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "ratio": "distortion of all layers changed together over the sum of what each changed alone causes, on the test inputs; "
            "1 is additivity",
            "largest_share": "share of the layer that causes most in that sum",
        },
    )


def _perceptron() -> Task:
    """Digits with every pixel scaled to mean 0 and variance 1, as the noise has them."""
    task = tasks.digits(hidden=(256, 256, 128), epochs=12)
    x = _inputs(task.train, "cpu")
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1
    splits = {name: _whole(getattr(task, name)) for name in ("train", "val", "test")}
    scaled: dict[str, Any] = {name: TensorDataset((x - mean) / std, y) for name, (x, y) in splits.items()}
    return task.with_(name="digits, standardised", **scaled)


def _small_resnet() -> Task:
    """Three blocks of 8, 16 and 32 channels on a part of CIFAR-10, every channel of mean 0 and variance 1."""
    return tasks.cifar10(epochs=8).with_(model=partial(ResNet, width=8)).spoil(samples=_IMAGES)


def _resnet32() -> Task:
    """The authors' recipe on CIFAR-10: AdamW in batches of 100, 40,000 steps."""
    recipe = Recipe("adamw", lr=3e-4, weight_decay=1e-2, epochs=80, batch_size=100)
    return tasks.cifar10().with_(name="cifar10, ResNet-32", model=lambda: ResNet(blocks=(5, 5, 5)), recipe=recipe)


def study(scale: Scale) -> list[Study]:
    """Three studies: pruning in rounds, pruning at once, and whether distortions add up; at real scale the second alone."""
    if scale is Scale.REAL:
        return [_one_shot(scale)]
    return [_rounds(scale), _one_shot(scale), _adding_up(scale)]

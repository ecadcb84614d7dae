"""Data-independent module-aware pruning (He, Zhou, ICLR 2024)."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import cast

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from weightroom import prune, tasks, train
from weightroom.compare.base import train_by_recipe
from weightroom.compare.prune import PruneMethod
from weightroom.errors import MissingExtraError
from weightroom.metrics import nonzero_parameters
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]


def _unfit(task: Task) -> str | None:
    """DIMAP is for networks of attention and MLP blocks."""
    try:
        prune.DIMAPPruner(0.5).groups(task.model())
    except ValueError as error:
        return str(error)
    return None


PAPER = Paper(
    key="dimap",
    number=22,
    family="prune",
    parts=(prune.DIMAPPruner, prune.distortion_importance),
    title="Data-independent Module-aware Pruning for Hierarchical Vision Transformers",
    authors="Yang He, Joey Tianyi Zhou",
    year=2024,
    venue="ICLR",
    arxiv="2404.13648",
    real=("cifar10-jpg",),
    summary="Cuts a Swin in one shot without data: each weight by its share of its layer's norm, with a threshold of their own for "
    "the QKV matrices, the attention projections and the MLPs.",
    claim="Scored by the share of its layer's norm and cut with one threshold per kind of module, a Swin loses half of its weights "
    "almost without loss after fine-tuning, keeps far more accuracy right after the cut than under uniform magnitude pruning, and "
    "does better than with one threshold for all.",
    limits="On digits (10 seeds) it beats random pruning and, in the mean, uniform magnitude right after the cut (13 points at 70 "
    "%, -3 to 30: open); against LAMP over all layers, ERK and one threshold for all it does not gain: at 80 % after "
    "fine-tuning these are 1 to 3 points above it, and a random mask trained from the start 5. It also saves 8 points less "
    "of the multiply-accumulates than uniform pruning. On photographs three seeds decide nothing else. The score is that of "
    "LAMP, as the paper's own reference to it says; what is new is the grouping, and its gain in the paper (0.1 to 0.3 "
    "points) is smaller than a small study can show. There is no published code, and the text does not say how the budget "
    "is split: the same share of each module is what the parameter table fits. The paper's FLOPs fall in proportion to the "
    "weights, as they would if every layer lost the same share; here they are counted from the masks. Embedding, merging, "
    "head and norms stay dense, so that in a comparison a sparsity is a share of the blocks' matrices only, while other "
    "methods count all weights. Queries, keys and values stored apart are scored as the one layer that the paper has.",
    methods={"DIMAP": PruneMethod(prune.DIMAPPruner, unfit=_unfit)},
)


#: Training images at real scale.
_IMAGES = 5000


class _Swin(nn.Module):
    """A Swin of the transformers library, with torch's own initial weights.

    The library's start (deviation 0.02, biases 0) blinds a network of one-pixel patches: the norm after the embedding then takes
    out all that a pixel says. Absolute positions are an option of Swin that so small a network needs.
    """

    def __init__(self, image: int, channels: int, patch: int, width: int, depths: Sequence[int], heads: Sequence[int]) -> None:
        super().__init__()
        try:
            from transformers import SwinConfig, SwinForImageClassification
        except ImportError as error:
            raise MissingExtraError("transformers", "adapt", "the Swin of this study") from error
        config = SwinConfig(
            image_size=image, num_channels=channels, patch_size=patch, embed_dim=width, depths=list(depths), num_heads=list(heads),
            window_size=4, use_absolute_embeddings=True,
        )  # fmt: skip
        config.num_labels = 10
        self.net = SwinForImageClassification(config)
        for module in self.net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


def _training(scale: Scale) -> int:
    """Epochs of the dense network."""
    return scale.pick(2, 40, 200, 20)


def _task(scale: Scale) -> Task:
    """Digits, a token per pixel; CIFAR-10 at real and full scale."""
    if scale in (Scale.SMOKE, Scale.SMALL):
        recipe = Recipe(lr=2e-3, epochs=_training(scale), batch_size=64, schedule="cosine")
        model = functools.partial(_Swin, 8, 1, 1, 24, (2, 2), (2, 4))
        return tasks.digits().with_(name="digits, Swin", model=model, recipe=recipe)
    recipe = Recipe("adamw", lr=1e-3, weight_decay=0.05, epochs=_training(scale), batch_size=128, schedule="cosine")
    if scale is Scale.FULL:
        model = functools.partial(_Swin, 32, 3, 2, 96, (2, 2, 6), (3, 6, 12))
        return tasks.cifar10().with_(name="cifar10, Swin", model=model, recipe=recipe)
    model = functools.partial(_Swin, 32, 3, 4, 32, (2, 2), (2, 4))
    return tasks.cifar10().with_(name="cifar10, small Swin", model=model, recipe=recipe).spoil(samples=_IMAGES)


Modules = Mapping[str, Sequence[str]]
#: (sparsity, seed, module -> its parameters) -> pruners, one after the other.
Make = Callable[[float, int, Modules], list[prune.PlanPruner]]


def _layers(modules: Modules) -> tuple[str, ...]:
    return tuple(name for names in modules.values() for name in names)


#: What prunes; all of them the same layers, those of the three modules.
_PRUNERS: dict[str, Make] = {
    "dense": lambda s, seed, modules: [prune.DIMAPPruner(0.0)],
    "uniform": lambda s, seed, modules: [prune.UniformMagnitudePruner(s, targets=_layers(modules))],
    "global magnitude": lambda s, seed, modules: [prune.GlobalMagnitudePruner(s, targets=_layers(modules))],
    "magnitude by module": lambda s, seed, modules: [
        prune.GlobalMagnitudePruner(s, targets=tuple(names)) for names in modules.values()
    ],
    "LAMP": lambda s, seed, modules: [prune.LAMPPruner(s, targets=_layers(modules))],
    "ERK": lambda s, seed, modules: [prune.ERKPruner(s, targets=_layers(modules))],
    "random": lambda s, seed, modules: [prune.RandomPruner(s, seed=seed, targets=_layers(modules))],
    "one module": lambda s, seed, modules: [prune.DIMAPPruner(s, single_module=True)],
    "DIMAP": lambda s, seed, modules: [prune.DIMAPPruner(s)],
}
_APART = "DIMAP, q, k, v apart"
_RETRAINED = "random, retrained"


def _prune(trial: Trial, task: Task, model: nn.Module, make: Make) -> dict[str, float]:
    """Masks the model in place; returns what is gone."""
    modules = prune.DIMAPPruner(0.0).groups(model)
    inputs = task.test[0][0][None].to(trial.device)
    dense = prune.DIMAPPruner(0.0).fit(model, example_inputs=inputs).macs()
    plans = [pruner.fit(model, example_inputs=inputs) for pruner in make(trial.setting, trial.seed, modules)]
    plan = functools.reduce(prune.PruningPlan.merge, plans)
    macs = plan.macs(inputs, model=model)
    plan.apply(model)
    trial.spend(parameters=nonzero_parameters(model), flops=2 * macs)
    return {"sparsity": plan.sparsity(), "macs_removed": 1 - macs / dense}


def _dense(trial: Trial, task: Task) -> nn.Module:
    model = task.model(seed=trial.seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        full = copy.deepcopy(model)
        train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), full, log=False)
        return full.state_dict()

    model.load_state_dict(trial.cached("dense", make, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device))
    return model


def _arm(task: Task, name: str, make: Make, *, tuned: bool) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        if name == _RETRAINED:
            model = task.model(seed=trial.seed).to(trial.device)
            found = _prune(trial, task, model, make)
            train_by_recipe(task, trial, model)
        else:
            model = _dense(trial, task)
            found = _prune(trial, task, model, make)
        if tuned:
            _fine_tune(trial, task, model)
        return {"accuracy": task.evaluate(model, trial.split)["accuracy"], **found}

    return Arm(run, cites=(PAPER,) if "DIMAP" in name else ())


def _fine_tune(trial: Trial, task: Task, model: nn.Module) -> None:
    done = train.fit(
        model, task.train, loss=task.loss, epochs=_epochs(trial.scale), batch_size=task.recipe.batch_size, seed=trial.seed,
        optimizer=lambda params: AdamW(params, lr=task.recipe.lr / trial.scale.pick(10, 10, 50), weight_decay=1e-8),
        schedule=_warm_up_and_cosine, device=trial.device,
    )  # fmt: skip
    trial.spend(train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards)


def _epochs(scale: Scale) -> int:
    return scale.pick(1, 6, 30, 3)


def _warm_up_and_cosine(optimizer: Optimizer, total: int) -> LRScheduler:
    """The paper's: from a thousandth up to the learning rate in half of the steps, then by a cosine down to a hundredth."""
    half = max(1, total // 2)

    def factor(step: int) -> float:
        if step < half:
            return 1e-3 + (1 - 1e-3) * step / half
        return 0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, (step - half) / max(1, total - half)))) / 2

    return LambdaLR(optimizer, factor)


def _study(
    scale: Scale, task: Task, name: str, arms: Mapping[str, Make], claims: Sequence[Claim], points: Sequence[float], notes: str
) -> Study:
    settings = {f"{s:g}": s for s in points}
    return Study(
        name=f"dimap: {name}",
        arms={arm: _arm(task, arm, make, tuned=name == "after fine-tuning") for arm, make in arms.items()},
        metric="accuracy",
        metrics={"sparsity": "max", "macs_removed": "max"},
        baseline="uniform",
        settings=settings,
        expect=[claim for claim in claims if claim.expect.on in settings],
        seeds=scale.pick(range(1), range(100, 105), range(100, 103), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "network": "a Swin of four blocks and 77,000 parameters on digits, a token per pixel"
            if scale in (Scale.SMOKE, Scale.SMALL)
            else f"a Swin on CIFAR-10, {len(cast(Sized, task.train))} images to train",
            "training": f"{_training(scale)} epochs, then pruned{notes}",
            "sparsity": "share of the matrices in the blocks; embedding, merging and head stay dense in every arm",
            "macs_removed": "share of the multiply-accumulates of the dense network that the masks save",
        },
    )


def _one_shot(scale: Scale, task: Task) -> Study:
    def beats(other: str, on: str, by: float = 0.0) -> Claim:
        more = f" by more than {100 * by:g} points" if by else ""
        return Claim(f"at sparsity {on} it beats {other}{more}", Expect("DIMAP", on=on).better_than(other, by=by))

    good = Claim("the dense network is a good one: 95 %", Expect("dense", on="0.7").within(0.95, 1))
    claims = [
        *([] if scale is Scale.REAL else [good]),
        Claim("at sparsity 0.3 it equals uniform magnitude within two points", Expect("DIMAP", on="0.3").equal_to("uniform", within=0.02)),
        beats("uniform", "0.5"),
        beats("uniform", "0.7", by=0.05),
        beats("uniform", "0.8", by=0.05),
        *(beats(other, on) for on in ("0.7", "0.8") for other in ("magnitude by module", "one module")),
        *(beats(other, "0.7") for other in ("global magnitude", "LAMP", "ERK", "random")),
        Claim(
            "scoring queries, keys and values apart changes less than two points at sparsity 0.7",
            Expect("DIMAP", on="0.7").equal_to(_APART, within=0.02),
        ),
        Claim(
            "at sparsity 0.5 it saves as many multiply-accumulates as uniform pruning, within two points",
            Expect("DIMAP", "macs_removed", on="0.5").equal_to("uniform", within=0.02),
        ),
    ]  # fmt: skip
    apart: dict[str, Make] = {_APART: lambda s, seed, modules: [prune.DIMAPPruner(s, fuse_qkv=False)]}
    points = scale.pick((0.7,), (0.3, 0.5, 0.7, 0.8, 0.9), (0.3, 0.5, 0.7, 0.8, 0.9), (0.5, 0.7, 0.8))
    return _study(
        scale, task, "right after the cut", {**_PRUNERS, **apart}, claims, points, "; accuracy right after, without fine-tuning"
    )


def _fine_tuned(scale: Scale, task: Task) -> Study:
    def beats(other: str, on: str) -> Claim:
        return Claim(f"at sparsity {on} it beats {other}", Expect("DIMAP", on=on).better_than(other))

    claims = [
        Claim("at sparsity 0.55 it costs less than a point", Expect("DIMAP", on="0.55").not_worse_than("dense", by=0.01)),
        *(beats(other, on) for on in ("0.55", "0.8") for other in ("one module", "uniform")),
        *(beats(other, "0.8") for other in ("magnitude by module", "global magnitude", "LAMP", "ERK", _RETRAINED)),
    ]
    points = scale.pick((0.8,), (0.55, 0.8), (0.55, 0.8))
    notes = f" and fine-tuned for {_epochs(scale)} epochs with the masks held (AdamW, half of it warm-up, then a cosine)"
    return _study(scale, task, "after fine-tuning", {**_PRUNERS, _RETRAINED: _PRUNERS["random"]}, claims, points, notes)


def study(scale: Scale) -> list[Study]:
    """Two studies of a small Swin: right after the cut, and after fine-tuning."""
    task = _task(scale)
    return [_one_shot(scale, task), _fine_tuned(scale, task)]

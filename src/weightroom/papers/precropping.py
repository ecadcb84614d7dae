"""PreCrop: channel-level pruning at initialisation (Cai et al., 2022)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightroom import prune, tasks
from weightroom.compare.base import measure, train_by_recipe
from weightroom.compare.prune import PruneMethod
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.prune.base import apportion, prunable
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.train import Batches

__all__ = ["PAPER", "study"]


class _Crop:
    """PreCrop at the density of a mask, called as a pruner."""

    def __init__(self, sparsity: float, rule: Literal["sqrt", "gp"]) -> None:
        self.crop = prune.PreCrop(params=1 - sparsity, rule=rule, count="weights")

    def fit(
        self, model: nn.Module, data: Iterable[Any], example_inputs: Tensor, loss_fn: Callable[..., Tensor]
    ) -> prune.WidthPlan:
        return self.crop.fit(model, example_inputs, data=data, loss_fn=loss_fn)


PAPER = Paper(
    key="precropping",
    number=48,
    family="prune",
    parts=(prune.PreCrop, prune.layerwise_density, prune.SynFlowPruner, prune.shuffle_masks),
    title="Structured Pruning is All You Need for Pruning CNNs at Initialization",
    authors="Yaohui Cai, Weizhe Hua, Hongzheng Chen, G. Edward Suh, Christopher De Sa, Zhiru Zhang",
    year=2022,
    venue="arXiv",
    arxiv="2203.02549",
    real=("cifar10-jpg",),
    summary="Finds the share of weights that each layer should keep from the architecture alone, and builds the network that "
    "much narrower before training.",
    claim="The accuracy of a network pruned at initialisation depends on the density of its layers alone, whatever the granularity; "
    "the best densities solve a small convex problem, and cropping channels to them costs no accuracy while it makes a small "
    "dense network that trains and runs faster.",
    limits="On digits the first half holds where a mask is not extreme: at 20 and 8 % of the weights a shuffled mask is about as "
    "good as SynFlow's or SNIP's own, and random masks of the closed form's densities as SynFlow's. The closed form gives "
    "the densities of a hundred rounds of SynFlow at 20 % (0.11 apart at most), not at 8 and 3 % (up to 0.4), where SynFlow "
    "also removes small weights of layers that the closed form leaves whole. Cropping is nearly free at 20 % and costs "
    "sixteen points at 3 %: it leaves layers of three to five channels; one share of all widths is better there, and so is "
    "the geometric programme, which is worse at larger budgets. Only crops make an epoch shorter, and they reach their "
    "share of the FLOPs only with widths that are multiples of the kernels' block (round_to). On a small ResNet for "
    "photographs the closed form is as far as 0.65 from SynFlow's densities already at 20 %; three seeds decide nothing "
    "else there. At equal density a crop also has fewer norms and biases than a mask. No code was published: what happens "
    "at residual additions, the rounding and the scaling to the exact budget are this part's own.",
    methods={
        "SynFlow": PruneMethod(prune.SynFlowPruner, start="initial"),
        "PreCrop": PruneMethod(_Crop, {"rule": "sqrt"}, start="initial", mode="rebuild"),
        "PreCrop, gp": PruneMethod(_Crop, {"rule": "gp"}, start="initial", mode="rebuild"),
    },
)

#: Share of the epochs that fine-tuning takes where the network is pruned after training.
_TUNING = 0.4
#: Training images at real scale.
_IMAGES = 4000
_DENSITIES = "random at SynExp densities"
_PRECROP, _PRECROP_SYNFLOW, _GP, _WIDTH = "PreCrop", "PreCrop, SynFlow densities", "PreCrop, gp", "uniform width"

Plan = Callable[[Task, nn.Module, list[Any], float, int, int], prune.PruningPlan]


def plain_cnn() -> nn.Sequential:
    """Convolutions of 16, 32, 32 and 64 channels with batch norm, pooled after the second and third: 33,040 weights."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise((1, 16, 32, 32, 64))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *[nn.MaxPool2d(2)] * (i in (1, 2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def random_masks(model: nn.Module, densities: Mapping[str, float], kept: int, seed: int) -> prune.PruningPlan:
    """Random masks that keep ``kept`` weights in all, shared out as the densities say."""
    sizes = {site.name: site.tensor.numel() for site in prunable(model)}
    counts = apportion([densities[name] * size for name, size in sizes.items()], list(sizes.values()), kept)
    masks = {
        site.name: (torch.arange(site.tensor.numel()) < count).view(site.tensor.shape)
        for site, count in zip(prunable(model), counts, strict=True)
    }
    return prune.shuffle_masks(prune.PruningPlan(masks, model=model), seed)


def _synflow(task: Task, model: nn.Module, batch: list[Any], share: float, seed: int, rounds: int) -> prune.PruningPlan:
    return prune.SynFlowPruner(1 - share, rounds=rounds).fit(model, batch)


def _snip(task: Task, model: nn.Module, batch: list[Any], share: float, seed: int, rounds: int) -> prune.PruningPlan:
    return prune.SNIPPruner(1 - share, seed=seed).fit(model, batch, loss_fn=task.loss)


def _at_synexp(task: Task, model: nn.Module, batch: list[Any], share: float, seed: int, rounds: int) -> prune.PruningPlan:
    total = sum(site.tensor.numel() for site in prunable(model))
    kept = total - round((1 - share) * total)
    return random_masks(model, prune.layerwise_density(model, params=kept), kept, seed)


def _shuffled(plan: Plan) -> Plan:
    return lambda task, model, batch, share, seed, rounds: prune.shuffle_masks(
        plan(task, model, batch, share, seed, rounds), seed
    )


def _pruner(make: Callable[..., prune.PlanPruner], *, seeded: bool = False) -> Plan:
    return lambda task, model, batch, share, seed, rounds: make(1 - share, **({"seed": seed} if seeded else {})).fit(model, batch)


#: Masks of the network at initialisation, which then trains for all epochs.
_INITIAL: dict[str, Plan] = {
    "SynFlow": _synflow,
    "SynFlow, shuffled": _shuffled(_synflow),
    "SNIP": _snip,
    "SNIP, shuffled": _shuffled(_snip),
    _DENSITIES: _at_synexp,
    "random, retrained": _pruner(prune.RandomPruner, seeded=True),
}
#: Masks of the trained network, which is then fine-tuned; all epochs together are as many.
_TRAINED: dict[str, Plan] = {
    "global magnitude": _pruner(prune.GlobalMagnitudePruner),
    "LAMP": _pruner(prune.LAMPPruner),
    "ERK": _pruner(prune.ERKPruner),
    "uniform": _pruner(prune.UniformMagnitudePruner),
    "random": _pruner(prune.RandomPruner, seeded=True),
}
#: Crops of the network at initialisation, which train for all epochs.
_CROPS: dict[str, dict[str, Any]] = {
    _PRECROP: {},
    _PRECROP_SYNFLOW: {"method": "synflow"},
    _GP: {"rule": "gp"},
    _WIDTH: {"method": "uniform"},
}


def _finish(
    task: Task, trial: Trial, model: nn.Module, epochs: int, densities: Mapping[str, float], share: float
) -> dict[str, float]:
    done = train_by_recipe(task, trial, model, epochs=epochs)
    result = {"accuracy": measure(task, trial, model)["accuracy"], "seconds_per_epoch": done.seconds / len(done.losses)}
    kept = sum(site.tensor.numel() if site.mask is None else int(site.mask.sum()) for site in prunable(model))
    full = task.model(seed=trial.seed)
    total = sum(site.tensor.numel() for site in prunable(full))
    if densities:
        best = prune.layerwise_density(full, params=share)
        result["density_gap"] = max(abs(densities[name] - p) for name, p in best.items())
    return {**result, "density": kept / total}


def _dense(task: Task) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        return _finish(task, trial, task.model(seed=trial.seed).to(trial.device), task.recipe.epochs, {}, 1.0)

    return Arm(run)


def _masked(task: Task, make: Plan, *, trained: bool) -> Arm:
    tuning = round(_TUNING * task.recipe.epochs)

    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed).to(trial.device)
        if trained:

            def dense() -> dict[str, Tensor]:
                full = copy.deepcopy(model)
                train_by_recipe(
                    task, Trial(trial.seed, trial.scale, device=trial.device), full, epochs=task.recipe.epochs - tuning, log=False
                )
                return full.state_dict()

            model.load_state_dict(
                trial.cached("dense", dense, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device)
            )
        batch = [tuple(x.to(trial.device) for x in next(iter(Batches(task.train, task.recipe.batch_size, seed=trial.seed))))]
        plan = make(task, model, batch, trial.setting, trial.seed, trial.scale.pick(10, 100, 100))
        plan.apply(model)
        densities = {name: 1 - layer.sparsity for name, layer in plan.layers().items()}
        return _finish(task, trial, model, tuning if trained else task.recipe.epochs, densities, trial.setting)

    return Arm(run)


def _cropped(task: Task, how: Mapping[str, Any], *, cites: tuple[Any, ...]) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed)
        dataset: Any = task.train
        plan = prune.PreCrop(trial.setting, count="weights", **how).fit(model, dataset[0][0][None])
        small = plan.build(model, seed=trial.seed).to(trial.device)
        return _finish(task, trial, small, task.recipe.epochs, {}, trial.setting)

    return Arm(run, cites=cites)


def _claims(shares: tuple[float, ...]) -> list[Claim]:
    claims = []
    for on, share in ((f"{share:g}", f"{share:.3g}") for share in shares):
        claims += [
            Claim(f"at {share} of the weights a shuffled {name} mask equals it within a point",
                  Expect(f"{name}, shuffled", on=on).equal_to(name, within=0.01)) for name in ("SynFlow", "SNIP")
        ]  # fmt: skip
        claims += [
            Claim(f"at {share} random masks of the closed form's densities equal SynFlow within a point",
                  Expect(_DENSITIES, on=on).equal_to("SynFlow", within=0.01)),
            Claim(f"at {share} cropping channels costs less than a point against masks of the same densities",
                  Expect(_PRECROP, on=on).not_worse_than(_DENSITIES, by=0.01)),
            Claim(f"at {share} PreCrop beats one share of all widths", Expect(_PRECROP, on=on).better_than(_WIDTH)),
            Claim(f"at {share} PreCrop with SynFlow's densities equals it with the closed form's within a point",
                  Expect(_PRECROP_SYNFLOW, on=on).equal_to(_PRECROP, within=0.01)),
            Claim(f"at {share} PreCrop beats a random mask of one density", Expect(_PRECROP, on=on).better_than("random, retrained")),
            Claim(f"at {share} SynFlow's densities are the closed form's within 0.15",
                  Expect("SynFlow", "density_gap", on=on).within(high=0.15)),
        ]  # fmt: skip
    most, least = f"{max(shares):g}", f"{min(shares):g}"
    return [
        *claims,
        Claim(
            "a crop trains in less time per epoch than a mask",
            Expect(_PRECROP, "seconds_per_epoch", on=most).better_than("SynFlow"),
        ),
        Claim(
            "it trains in less time per epoch than the dense network",
            Expect(_PRECROP, "seconds_per_epoch", on=most).better_than("dense"),
        ),
        Claim("a mask makes no epoch shorter", Expect("SynFlow", "seconds_per_epoch", on=most).worse_than("dense")),
        Claim(
            "at the smallest budget the geometric programme beats the square-root rule",
            Expect(_GP, on=least).better_than(_PRECROP),
        ),
        Claim(
            "at the smallest budget pruning after training beats PreCrop in as many epochs",
            Expect("LAMP", on=least).better_than(_PRECROP),
        ),
    ]


def _small_resnet() -> Task:
    """Three blocks of 8, 16 and 32 channels on a part of CIFAR-10."""
    return tasks.cifar10(epochs=6).with_(model=partial(ResNet, width=8)).spoil(samples=_IMAGES)


def study(scale: Scale) -> Study:
    """One network at several budgets of weights: masks before and after training, shuffled masks, and crops."""
    recipe = Recipe("adam", lr=5e-3, epochs=8, batch_size=64)
    plain = tasks.digits().with_(name="digits, plain CNN", model=plain_cnn, recipe=recipe)
    task = scale.pick(
        lambda: plain.spoil(samples=256),
        lambda: plain,
        lambda: tasks.cifar10(blocks=(3, 3, 3), epochs=160),
        _small_resnet,
    )()
    shares = scale.pick((0.2,), (0.2, 0.08, 0.03), (0.5, 0.25, 0.125, 0.0625), (0.2,))
    arms = {"dense": _dense(task)}
    arms |= {name: _masked(task, plan, trained=False) for name, plan in _INITIAL.items()}
    arms |= {name: _cropped(task, how, cites=(PAPER,) if name != _WIDTH else ()) for name, how in _CROPS.items()}
    arms |= {name: _masked(task, plan, trained=True) for name, plan in _TRAINED.items()}
    return Study(
        name="precropping",
        arms=arms,
        metric="accuracy",
        metrics={"density": "min", "density_gap": "min", "seconds_per_epoch": "min"},
        baseline="dense",
        settings={f"{share:g}": share for share in shares},
        expect=_claims(shares),
        seeds=scale.pick(range(100, 101), range(100, 105), range(100, 103), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "settings": "share of the weights that is left; every mask keeps all norms and biases, a crop only those of its channels",
            "training": f"{task.name}: {task.recipe.epochs} epochs after pruning at initialisation; the arms that prune after "
            f"training have the same number, the last {round(_TUNING * task.recipe.epochs)} of them with the mask",
            "density_gap": "largest difference of a layer's density from the closed form's",
        },
    )

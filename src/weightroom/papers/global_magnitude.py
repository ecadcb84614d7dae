"""Global magnitude pruning with a minimum threshold (Gupta, Camci et al., 2022-2024)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from weightroom import prune, tasks
from weightroom.compare.base import Method, train_by_recipe
from weightroom.metrics import nonzero_parameters
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.prune.base import prunable
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.train import Batches

__all__ = ["PAPER", "study"]

PAPER = Paper(
    key="global-magnitude",
    number=59,
    family="prune",
    parts=(prune.GlobalMagnitudePruner, prune.global_keep_counts, prune.minimum_threshold_sparsities),
    title="Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    authors="Manas Gupta, Efe Camci, Vishandi Rudy Keneta, Abhishek Vaidyanathan, Ritwik Kanodia, Chuan-Sheng Foo, Wu Min, "
    "Lin Jie",
    year=2024,
    venue="arXiv",
    arxiv="2209.14624",
    code="manasgupta-1/GlobalMP",
    real=("cifar10-jpg",),
    summary="Removes the smallest weights of the whole network; a minimum kept in every layer saves it at extreme sparsity.",
    claim="Ranking all weights by magnitude with one threshold gives a better trade-off of sparsity and accuracy than far more "
    "complex pruners; its one weakness, wiping out a whole layer at extreme sparsity, is cured by a minimum number of weights "
    "in every layer.",
    limits="On digits it equals LAMP and ERK at 90 % on a perceptron and is well behind both from 95 % on; on a small network of "
    "convolutions it is behind already at 90 %, even behind a random sub-network trained as long: the thinnest layers lose most, "
    "and 8 epochs do not repair that. SNIP, which gets all its epochs after the cut, is worse at 90 % on the perceptron and far "
    "better from 98 % on. The minimum helps (about 15 points at 98 and 99 % on the perceptron) but is no full cure: at 99.5 % "
    "nothing is left to help, and what fails is seldom a layer of no weights but one of a few dozen. Where no layer is at risk "
    "it changes nothing. The authors' code keeps the weight at the threshold, prunes every layer again with the same slip, and "
    "rescales in a loop that need not end; the part removes exactly round(S N) weights and solves for the loop's fixed point.",
    methods={
        "global magnitude, minimum kept": Method(
            prune.GlobalMagnitudePruner, {"min_fraction": 5e-4}, {"min_fraction": (5e-5, 2e-3, "log")}
        )
    },
)

#: The minimum of the study, as a share of all weights, and the most that all minima together may take of what is kept.
_FLOOR, _FLOORS_OF_KEPT = 0.002, 0.8
_MT = "global + MT"
#: Training images at real scale.
_IMAGES = 5000


def _with_minimum(sparsity: float, layers: int) -> prune.PlanPruner:
    fraction = min(_FLOOR, _FLOORS_OF_KEPT * (1 - sparsity) / layers)
    return prune.GlobalMagnitudePruner(sparsity, min_fraction=fraction)


#: Arm -> (sparsity, seed, number of layers) -> pruner of the trained network.
_TRAINED: dict[str, Callable[[float, int, int], prune.PlanPruner | None]] = {
    "dense": lambda sparsity, seed, layers: None,
    "global": lambda sparsity, seed, layers: prune.GlobalMagnitudePruner(sparsity),
    _MT: lambda sparsity, seed, layers: _with_minimum(sparsity, layers),
    "LAMP": lambda sparsity, seed, layers: prune.LAMPPruner(sparsity),
    "ERK": lambda sparsity, seed, layers: prune.ERKPruner(sparsity),
    "uniform": lambda sparsity, seed, layers: prune.UniformMagnitudePruner(sparsity),
    "random": lambda sparsity, seed, layers: prune.RandomPruner(sparsity, seed=seed),
}
#: The same for the network at initialisation, which is then trained for as many steps as the others have had by the end.
_INITIAL: dict[str, Callable[[float, int, int], prune.PlanPruner | None]] = {
    "SNIP": lambda sparsity, seed, layers: prune.SNIPPruner(sparsity, seed=seed),
    "random, retrained": lambda sparsity, seed, layers: prune.RandomPruner(sparsity, seed=seed),
}


def _arm(task: Task, make: Callable[[float, int, int], prune.PlanPruner | None], *, trained: bool, cites: tuple[Any, ...]) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed).to(trial.device)
        if trained:

            def dense() -> dict[str, Tensor]:
                full = copy.deepcopy(model)
                train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), full, log=False)
                return full.state_dict()

            model.load_state_dict(
                trial.cached("dense", dense, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device)
            )
        pruner = make(trial.setting, trial.seed, len(prunable(model)))
        plan = None
        if pruner is not None:
            batch = next(iter(Batches(task.train, task.recipe.batch_size, seed=trial.seed)))
            plan = pruner.fit(model, [batch], loss_fn=task.loss)
            plan.apply(model)
        train_by_recipe(task, trial, model, epochs=_tuning(task) + (0 if trained else task.recipe.epochs))
        result = {"accuracy": task.evaluate(model, trial.split)["accuracy"]}
        trial.spend(parameters=nonzero_parameters(model))
        if plan is not None:
            result |= {"sparsity": plan.sparsity(), "smallest_layer": float(min(layer.kept for layer in plan.layers().values()))}
        return result

    return Arm(run, cites=cites)


def _tuning(task: Task) -> int:
    """Epochs of fine-tuning: 8 after 20."""
    return max(1, round(0.4 * task.recipe.epochs))


def _study(scale: Scale, net: str, task: Task, sparsities: tuple[float, ...], claims: list[Claim]) -> Study:
    arms = {name: _arm(task, make, trained=True, cites=(PAPER,) if name == _MT else ()) for name, make in _TRAINED.items()}
    arms |= {name: _arm(task, make, trained=False, cites=()) for name, make in _INITIAL.items()}
    settings = {f"{sparsity:g}": sparsity for sparsity in sparsities}
    return Study(
        name=f"global-magnitude: {net}",
        arms=arms,
        metric="accuracy",
        metrics={"sparsity": "max", "smallest_layer": "max"},
        baseline="global",
        settings=settings,
        expect=[claim for claim in claims if claim.expect.on in settings],
        seeds=scale.pick(range(1), range(5), range(3), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{task.name}: {task.recipe.epochs} epochs dense, pruned in one shot, {_tuning(task)} epochs more with "
            "the masks held; what is pruned at initialisation trains for all of these",
            "minimum": f"{_FLOOR:.1%} of all weights in every layer, less where that would be over "
            f"{_FLOORS_OF_KEPT:.0%} of what stays",
            "smallest_layer": "weights kept in the layer that keeps fewest",
        },
    )


def _equal(rival: str, sparsity: str) -> Claim:
    return Claim(
        f"at sparsity {sparsity} it equals {rival} within a point", Expect("global", on=sparsity).equal_to(rival, within=0.01)
    )


def _beats(rival: str, sparsity: str) -> Claim:
    return Claim(f"with a minimum it beats {rival} at sparsity {sparsity}", Expect(_MT, on=sparsity).better_than(rival))


def _perceptron(scale: Scale) -> Study:
    claims = [
        *(_equal(rival, "0.9") for rival in ("LAMP", "ERK", "SNIP")),
        Claim(
            "at sparsity 0.9 it beats a random sub-network trained as long",
            Expect("global", on="0.9").better_than("random, retrained"),
        ),
        *(
            Claim(f"a minimum saves the collapsed network at sparsity {s}", Expect(_MT, on=s).better_than("global", by=0.1))
            for s in ("0.98", "0.99", "0.995")
        ),
        Claim(
            "a minimum costs less than a point where no layer is at risk", Expect(_MT, on="0.9").not_worse_than("global", by=0.01)
        ),
        *(
            Claim(
                f"without a minimum a whole layer is wiped out at sparsity {s}",
                Expect("global", "smallest_layer", on=s).within(high=1),
            )
            for s in ("0.98", "0.99")
        ),
        *(_beats(rival, s) for s in ("0.95", "0.98") for rival in ("LAMP", "ERK", "uniform")),
    ]
    task = tasks.digits(hidden=(256, 256, 128))
    return _study(
        scale, "perceptron", task, scale.pick((0.98,), (0.9, 0.95, 0.98, 0.99, 0.995), (0.9, 0.95, 0.98, 0.99, 0.995)), claims
    )


def _convolutions(scale: Scale) -> Study:
    claims = [
        *(_equal(rival, "0.9") for rival in ("LAMP", "ERK")),
        Claim(
            "at sparsity 0.9 it beats a random sub-network trained as long",
            Expect("global", on="0.9").better_than("random, retrained"),
        ),
        Claim("a minimum costs less than a point at sparsity 0.9", Expect(_MT, on="0.9").not_worse_than("global", by=0.01)),
        *(_beats(rival, "0.95") for rival in ("LAMP", "ERK", "uniform")),
    ]
    task = scale.pick(lambda: tasks.digits("cnn"), lambda: tasks.digits("cnn"), _wide_resnet, _small_resnet)()
    return _study(scale, "convolutions", task, scale.pick((0.9,), (0.9, 0.95), (0.9, 0.95, 0.98)), claims)


def _small_resnet() -> Task:
    """Three blocks of 8, 16 and 32 channels on a part of CIFAR-10."""
    return tasks.cifar10(epochs=8).with_(model=partial(ResNet, width=8)).spoil(samples=_IMAGES)


def _wide_resnet() -> Task:
    """Four blocks in each of three stages, eight times as wide as usual, on CIFAR-10."""
    recipe = Recipe("sgd", lr=0.1, weight_decay=5e-4, epochs=200, batch_size=128, schedule="cosine")
    return tasks.cifar10().with_(name="cifar10, wide ResNet", model=lambda: ResNet(blocks=(4, 4, 4), width=128), recipe=recipe)


def study(scale: Scale) -> list[Study]:
    """Two studies: a perceptron up to the sparsity at which layers collapse, and a convolutional network; the second at real scale."""
    if scale is Scale.REAL:
        return [_convolutions(scale)]
    return [_perceptron(scale), _convolutions(scale)]

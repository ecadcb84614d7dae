"""Linear mode connectivity by permutation (Ito, Yamada, Kumagai, ICLR 2025), and the searches of Git Re-Basin."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from weightroom import data, tasks, train
from weightroom.compare.base import Method
from weightroom.compare.merge import Trained
from weightroom.errors import TaskError
from weightroom.nets.small import MLP, ResNet
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial
from weightroom.weights import (
    PermutationSpec,
    alignment_score,
    apply_permutation,
    interpolate,
    l2_reduction,
    loss_barrier,
    loss_path,
    match_many,
    merge_many,
    reestimate_batchnorm,
    ste_matching,
    taylor_barrier,
    weight_matching,
)
from weightroom.weights.permutation import identity
from weightroom.weights.weight_matching import mean_state

__all__ = ["PAPER", "study"]

State = dict[str, Tensor]
_REBASIN = """@inproceedings{ainsworth2023git,
  title = {{Git Re-Basin}: Merging Models modulo Permutation Symmetries},
  author = {Samuel K. Ainsworth and Jonathan Hayase and Siddhartha Srinivasa},
  year = {2023},
  booktitle = {ICLR}
}"""


def _to_the_first(trained: Trained) -> list[State]:
    return match_many(trained.spec, trained.states, anchor=0, seed=trained.trial.seed)


def _to_the_mean(trained: Trained) -> list[State]:
    return match_many(trained.spec, trained.states, seed=trained.trial.seed)


def _spend(trial: Trial, done: train.Fit) -> None:
    trial.spend(train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards)


def _straight_through(trained: Trained, lr: float, epochs: int) -> list[State]:
    task, trial, (first, *others) = trained.task, trained.trial, trained.states
    batches = train.Batches(task.train, 256, seed=trial.seed)

    def matched(state: State) -> State:
        perm = ste_matching(
            trained.spec, trained.model(first), first, state, batches, task.loss, trial.scale.pick(min(2, epochs), epochs, epochs),
            seed=trial.seed, optimizer=lambda params: torch.optim.Adam(params, lr), on_fit=partial(_spend, trial),
        )  # fmt: skip
        return apply_permutation(trained.spec, perm, state)

    return [first, *map(matched, others)]


PAPER = Paper(
    key="weight-matching",
    number=30,
    family="merge",
    parts=(
        PermutationSpec, weight_matching, ste_matching, apply_permutation, interpolate, loss_barrier, loss_path, alignment_score,
        l2_reduction, taylor_barrier, match_many, merge_many,
    ),
    title="Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching: With Insights into Other Permutation Search "
    "Methods",
    authors="Akira Ito, Masanori Yamada, Atsutoshi Kumagai",
    year=2025,
    venue="ICLR",
    arxiv="2402.04051",
    code="samuela/git-re-basin",
    real=("cifar10-jpg",),
    summary="Permutes the hidden units of networks trained from different seeds so that they can be averaged, and measures why that "
    "works.",
    claim="Weight matching removes the barrier between two networks though it shortens their distance little: it aligns the singular "
    "vectors of large singular values. A straight-through search with data removes the barrier without aligning them, and is "
    "worse when three or more networks are to be merged.",
    limits="On perceptrons for photographs (CIFAR-10, 5,000 images) matching takes away 62 % of the barrier, not 80, and what it "
    "does for narrow residual networks there is open. No code came with the paper; the searches are those of Git Re-Basin "
    "(the repository named here), whose released straight-through search returns the permutation of the last step, against "
    "its intention: a reference to the best one is overwritten. It also starts at the first model, so that its first "
    "permutation is that of weight matching; ours starts at the second model unless told otherwise. In a small network the "
    "distance falls by more than the paper's 6 to 20 % (by about 30 % at width 64, and less the wider it is), and the "
    "straight-through search aligns the singular vectors in part, where the paper finds that it does not. Networks with "
    "batch norm need their statistics re-estimated after merging. Grouped convolutions, attention and concatenated channels "
    "are not traced; their specification can be written by hand where it exists.",
    methods={
        "weight matching": Method(_to_the_first, cites=(_REBASIN,)),
        "weight matching to the mean": Method(_to_the_mean, cites=(_REBASIN,)),
        "straight-through matching": Method(
            _straight_through, {"lr": 0.1, "epochs": 25}, {"lr": [0.01, 0.03, 0.1, 0.3]}, (_REBASIN,)
        ),
    },
)  # fmt: skip


Find = Callable[..., Mapping[str, Tensor]]
#: How many training samples a loss is taken on, at the most.
_SAMPLES = 4000
#: At real scale: training images of the perceptrons and of the residual networks, and epochs of both.
_IMAGES, _RESIDUAL_IMAGES, _EPOCHS = 5000, 2500, 15


def _none(
    trial: Trial, spec: PermutationSpec, model: nn.Module, a: State, b: State, task: Task, seed: int
) -> Mapping[str, Tensor]:
    return identity(spec.sizes(b))


def _random(
    trial: Trial, spec: PermutationSpec, model: nn.Module, a: State, b: State, task: Task, seed: int
) -> Mapping[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(n, generator=g) for name, n in spec.sizes(b).items()}


def _weights(
    trial: Trial, spec: PermutationSpec, model: nn.Module, a: State, b: State, task: Task, seed: int
) -> Mapping[str, Tensor]:
    return weight_matching(spec, a, b, seed=seed)


def _straight(
    trial: Trial, spec: PermutationSpec, model: nn.Module, a: State, b: State, task: Task, seed: int, *, init: Literal["a", "b"], passes: int,
    select: bool,
) -> Mapping[str, Tensor]:  # fmt: skip
    """With ``select`` the loss on all samples chooses the permutation, else that of the batch."""
    held = _held(task)
    return ste_matching(
        spec, model, a, b, train.Batches(held, 256, seed=seed), task.loss, passes, init=init, seed=seed,
        optimizer=lambda params: torch.optim.Adam(params, trial.params["lr"]),
        select=train.Batches(held, 1024, shuffle=False) if select else None, on_fit=partial(_spend, trial),
    )  # fmt: skip


def _held(task: Task) -> Dataset:
    samples: Any = task.train
    return data.take(samples, min(_SAMPLES, len(samples)), seed=0)


def _trained(task: Task, trial: Trial, number: int, epochs: int) -> State:
    seed = trial.seed + 100_003 * number

    def make() -> State:
        model, recipe = task.model(seed=seed), task.recipe
        train.fit(
            model, task.train, loss=task.loss, optimizer=recipe.make, epochs=epochs, batch_size=recipe.batch_size,
            schedule=recipe.schedule, seed=seed, device=trial.device,
        )  # fmt: skip
        return dict(model.state_dict())

    states = trial.cached("weight-matching", make, task=task, seed=seed, epochs=epochs, device=trial.device)
    return {key: value.to(trial.device) for key, value in states.items()}


def _run(trial: Trial, *, find: Find, make_task: Callable[[], Task], epochs: int) -> dict[str, float]:
    task = make_task()
    batches = train.Batches(_held(task), 1024, shuffle=False)
    a, b, c = (_trained(task, trial, number, epochs) for number in range(3))
    trial.spend(trainings=3)
    model = task.model(seed=trial.seed).to(trial.device).eval()
    norm = any("running_mean" in key for key in a)
    reset = batches if norm else None
    spec = PermutationSpec.trace(model, next(iter(batches))[0][:2].to(trial.device))
    perm_b, perm_c = (find(trial, spec, model, a, state, task, trial.seed + i) for i, state in enumerate((b, c)))
    pi_b, pi_c = apply_permutation(spec, perm_b, b), apply_permutation(spec, perm_c, c)

    def barrier(one: State, other: State) -> float:
        return loss_barrier(model, one, other, batches, task.loss, reset=reset)

    for t, loss in zip(*loss_path(model, a, pi_b, batches, task.loss, reset=reset), strict=True):
        trial.log(t, loss=loss)
    found, before = barrier(a, pi_b), barrier(a, b)
    scores = {gamma: [alignment_score(spec, a, state, gamma) for state in (b, pi_b)] for gamma in (0.0, 0.3)}
    model.load_state_dict(mean_state([a, pi_b, pi_c]))
    if reset is not None:
        reestimate_batchnorm(model, reset)
    result = {
        "barrier": found,
        "barrier_cut": 1 - found / before if before else 0.0,
        "barrier_bc": barrier(pi_b, pi_c),
        "l2_reduction": l2_reduction(spec, a, b, perm_b),
        "R_0": scores[0.0][1],
        "R_0.3": scores[0.3][1],
        "rise_difference": (scores[0.3][1] - scores[0.3][0]) - (scores[0.0][1] - scores[0.0][0]),
        "merged_accuracy": task.evaluate(model, trial.split)["accuracy"],
    }
    if found and not norm:
        result["taylor_error"] = abs(taylor_barrier(model, a, pi_b, batches, task.loss) / found - 1)
    return result


_METRICS: dict[str, Any] = {
    "barrier_cut": "max", "barrier_bc": "min", "l2_reduction": "max", "R_0": "max", "R_0.3": "max", "rise_difference": "max",
    "merged_accuracy": "max", "taylor_error": "min",
}  # fmt: skip
_NONE, _RANDOM, _WM, _STE = "no permutation", "random permutation", "weight matching", "straight-through"


def _study(
    scale: Scale, name: str, make_task: Callable[[], Task], epochs: int, passes: int, select: bool, *,
    starts: Sequence[Literal["a", "b"]] = ("b", "a"), **how: Any,
) -> Study:  # fmt: skip
    finds: dict[str, Find] = {_NONE: _none, _RANDOM: _random, _WM: _weights}
    arms = {arm: Arm(partial(_run, find=find, make_task=make_task, epochs=epochs)) for arm, find in finds.items()}
    for init in starts:
        arm = _STE if init == "b" else f"{_STE} from a"
        find = partial(_straight, init=init, passes=passes, select=select)
        arms[arm] = Arm(partial(_run, find=find, make_task=make_task, epochs=epochs), {"lr": 0.1}, cites=(_REBASIN,))
    return Study(
        name=f"weight-matching: {name}", arms=arms, metric="barrier", direction="min", metrics=_METRICS, baseline=_NONE, scale=scale,
        paper=PAPER, **how,
    )  # fmt: skip


def _digits() -> Task:
    return tasks.digits(hidden=(64, 64))


def _photographs(width: int, blocks: int, epochs: int) -> Task:
    return tasks.cifar10(epochs=epochs).with_(name="cifar10, ResNet", model=partial(ResNet, blocks=(blocks,) * 3, width=width))


def _perceptron_claims() -> list[Claim]:
    return [
        Claim("Weight matching takes away more than 80 % of the barrier", Expect(_WM, "barrier_cut").within(low=0.8)),
        Claim("Meanwhile the distance falls by less than 40 %", Expect(_WM, "l2_reduction").within(high=0.4)),
        Claim(
            "The alignment of the vectors of large singular values rises by 0.15 more than that of all",
            Expect(_WM, "rise_difference").within(low=0.15),
        ),
        Claim("A random permutation takes away nothing", Expect(_RANDOM, "barrier_cut").within(high=0.1)),
        Claim("The straight-through search takes away half of the barrier", Expect(_STE, "barrier_cut").within(low=0.5)),
        Claim("It aligns those vectors less than weight matching does", Expect(_WM, "R_0.3").better_than(_STE)),
        Claim("It leaves them as unaligned as they were, within 0.1", Expect(_STE, "R_0.3").equal_to(_NONE, within=0.1)),
        Claim(
            "Between two networks matched to a third one the barrier is lower after weight matching",
            Expect(_WM, "barrier_bc").better_than(_STE),
        ),
        Claim(
            "The mean of three networks is more accurate after weight matching", Expect(_WM, "merged_accuracy").better_than(_STE)
        ),
        Claim(
            "Started at the first network the search is better there than started at the second",
            Expect(f"{_STE} from a", "barrier_bc").better_than(_STE),
        ),
        *(
            Claim(
                f"The quadratic estimate is off by a quarter of the barrier or more: {arm}",
                Expect(arm, "taylor_error").within(low=0.25),
            )
            for arm in (_NONE, _WM)
        ),
    ]


def _residual_claims() -> list[Claim]:
    return [
        Claim("Weight matching lowers the barrier of residual networks", Expect(_WM).better_than(_NONE)),
        Claim("Meanwhile their distance falls by less than 20 %", Expect(_WM, "l2_reduction").within(high=0.2)),
        Claim("A random permutation takes away nothing of it", Expect(_RANDOM, "barrier_cut").within(high=0.1)),
        Claim(
            "Between two matched to a third one it is lower after weight matching",
            Expect(_WM, "barrier_bc").better_than(_STE),
        ),
    ]


def _on_photographs() -> list[Study]:
    """Both kinds of networks on a part of CIFAR-10, small enough for tens of minutes."""
    task = tasks.cifar10(epochs=_EPOCHS)
    perceptrons = task.with_(model=partial(MLP, (3072, 128, 128, 10))).spoil(samples=_IMAGES)
    residual = task.with_(model=partial(ResNet, width=8)).spoil(samples=_RESIDUAL_IMAGES)
    return [
        _study(
            Scale.REAL, "perceptrons on photographs", lambda: perceptrons, _EPOCHS, passes=10, select=True, expect=_perceptron_claims(),
            seeds=range(100, 103), max_seeds=5,
            notes={
                "networks": f"perceptrons 3072-128-128-10, {_EPOCHS} epochs by the task's recipe; other initial weights and batches each",
                "data": f"{perceptrons.name}; barriers on at most {_SAMPLES} of those, 11 points",
                "straight-through": "Adam 0.1 on the latent weights, batches of 256, 10 epochs; the loss at the midpoint chooses",
            },
        ),
        _study(
            Scale.REAL, "residual networks on photographs", lambda: residual, _EPOCHS, passes=5, select=False, starts=("b",),
            expect=_residual_claims(), seeds=range(100, 103), max_seeds=3,
            notes={
                "networks": f"3 stages of a block, 8 channels in the first; {_EPOCHS} epochs by the task's recipe",
                "data": f"{residual.name}; barriers on those, 11 points",
                "statistics": "of batch norm are re-estimated on these images at every point",
            },
        ),
    ]  # fmt: skip


def study(scale: Scale) -> list[Study]:
    """Triples of networks a, b, c: b and c are matched to a.

    ``barrier`` is that between a and b, ``barrier_bc`` that between b and c, both on training data; ``barrier_cut`` is the share
    that is gone, ``rise_difference`` how much more R_0.3 has risen than R_0, ``taylor_error`` how far the quadratic estimate is
    from the barrier, as a share of it, and ``merged_accuracy`` that of the mean of all three. At real scale all networks are trained on
    photographs.
    """
    if scale is Scale.REAL:
        return _on_photographs()
    epochs = scale.pick(2, 25, 25)
    studies = [
        _study(
            scale, "perceptrons on digits", _digits, epochs, passes=epochs, select=True, expect=_perceptron_claims(),
            seeds=scale.pick(range(1), range(100, 105), range(100, 105)), max_seeds=scale.pick(1, 15, 15),
            notes={
                "networks": f"perceptrons 64-64-64-10, Adam 1e-3, {epochs} epochs, batches of 64; other initial weights and batches each",
                "data": "scikit-learn digits / 16, 1,078 to train; barriers on those, 11 points",
                "straight-through": f"Adam 0.1 on the latent weights, batches of 256, {epochs} epochs; the loss at the midpoint on all "
                "training data chooses",
            },
        )
    ]  # fmt: skip
    if scale is Scale.FULL:
        width, blocks, epochs = 128, 3, 100
        try:
            make_task = partial(_photographs, width, blocks, epochs)
            make_task()
        except TaskError as error:
            studies[0].notes = {**studies[0].notes, "left out": f"residual networks on photographs: {error}"}
            warnings.warn(f"weight-matching leaves out its study of residual networks: {error}", stacklevel=2)
        else:
            studies.append(
                _study(
                    scale, "residual networks on photographs", make_task, epochs, passes=5, select=False,
                    expect=_residual_claims(),
                    seeds=range(100, 103),
                    notes={
                        "networks": f"3 stages of {blocks} blocks, {width} channels in the first; {epochs} epochs by the task's recipe",
                        "statistics": f"of batch norm are re-estimated on {_SAMPLES} training images at every point",
                    },
                )
            )  # fmt: skip
    return studies

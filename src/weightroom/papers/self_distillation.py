"""Self-distillation with weighted ground truth (Borup and Andersen, NeurIPS 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import data, tasks, train
from weightroom.compare.distill import DistillMethod
from weightroom.distill import SelfDistiller, softmax_mse, sum_of_norms
from weightroom.kernels import SelfDistilledKernelRidge, distillation_shrinkage, optimal_alpha
from weightroom.nets.small import MLP
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]


def _whole(task: Task, trial: Trial, fit: Callable[..., Any], *, alpha: Any = "estimate", steps: int = 2) -> nn.Module:
    """Distils a task's model from itself; its validation data serve to estimate alpha."""
    splits = [_tensors(task.train, trial.device), _tensors(task.val, trial.device)]
    seeds = itertools.count(trial.seed)

    def fit_fn(model: nn.Module, X: Tensor, targets: Tensor) -> nn.Module:
        fit(model, loss=softmax_mse, data=TensorDataset(X, targets))
        return model

    distiller = SelfDistiller(lambda: task.model(seed=next(seeds)).to(trial.device), fit_fn, alpha, steps)
    return distiller.fit(*splits[0], *splits[1]).models_[-1]


def _tensors(dataset: Any, device: str) -> tuple[Tensor, Tensor]:
    x, y, *_ = data.gather(dataset, torch.arange(len(dataset)))
    return x.to(device), y.to(device)


PAPER = Paper(
    key="self-distillation",
    number=67,
    family="distill",
    parts=(SelfDistilledKernelRidge, SelfDistiller, optimal_alpha, distillation_shrinkage, softmax_mse, sum_of_norms),
    title="Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
    authors="Kenneth Borup, Lars N. Andersen",
    year=2021,
    venue="NeurIPS",
    arxiv="2102.13088",
    code="Kennethborup/self_distillation",
    summary="Trains a model again and again on a mixture of the labels and its own predictions, with a formula for the mixture.",
    claim="In kernel ridge regression every step of self-distillation is closed form and shrinks more; labels in the mixture dampen "
    "that, so that the steps converge to ridge with an amplified penalty instead of zero; the best weight of the labels has a "
    "formula, and for networks an estimate that spares the grid search.",
    limits="Distillation only adds regularisation: where the penalty is large enough already a further step harms, and a ridge "
    "whose penalty is chosen on the same validation points needs no distillation. The estimate for networks takes "
    "predictions to be affine in the weight, which holds for the squared error of a linear model alone, and it needs "
    "validation data with clean labels. The authors' script asks the teacher about each augmented batch and keeps the "
    "checkpoint with the best test accuracy; here the targets are computed once and nothing is chosen on test data. On "
    "digits with wrong labels the estimate was about a point below the grid (undecided with ten seeds) for half of its "
    "trainings, and no better than distillation without any labels; the three points over cross entropy belong to the "
    "squared error, for the teacher has them, too. On the sine, fitting the validation points as well was worth as much as "
    "distilling with them.",
    methods={
        "self-distillation": DistillMethod(
            _whole,
            {"alpha": "estimate", "steps": 2},
            {"lr": (1e-4, 1e-1, "log"), "alpha": ["estimate", 0.0, 0.25, 0.5, 0.75], "steps": [2, 3]},
            whole=True,
        )
    },
)


# ---- kernel ridge regression


Floats = NDArray[np.float64]
_PENALTIES = np.logspace(-4, 2, 61)
_STEPS = 6
_ALPHA = 0.35


class _Sine:
    """A noisy sine: 40 points, 20 more to validate on, and the truth on 500; the seed decides."""

    def __init__(self, trial: Trial) -> None:
        self.gamma, self.lam = trial.setting
        rng = np.random.default_rng(trial.seed)
        x = rng.random((60, 1))
        y = np.sin(2 * np.pi * x[:, 0]) + 0.5 * rng.standard_normal(60)
        self.X, self.y, self.X_val, self.y_val = x[:40], y[:40], x[40:], y[40:]
        self.grid = np.linspace(0, 1, 500)[:, None]

    def distilled(self, **how: Any) -> SelfDistilledKernelRidge:
        model = SelfDistilledKernelRidge(gamma=self.gamma, lam=self.lam, **how)
        return model.fit(self.X, self.y, self.X_val, self.y_val)

    def ridges(self, x: Floats) -> Floats:
        """Predictions at x of the ridges with all penalties, a row each."""
        d, V = np.linalg.eigh(rbf_kernel(self.X, gamma=self.gamma))
        return (V.T @ self.y / (d + _PENALTIES[:, None])) @ V.T @ rbf_kernel(self.X, x, gamma=self.gamma)

    def error(self, predictions: Floats) -> float:
        return float(np.mean((predictions - np.sin(2 * np.pi * self.grid[:, 0])) ** 2))


def _one_fit(sine: _Sine) -> Floats:
    return sine.distilled(steps=1).predict(sine.grid)


def _fixed(sine: _Sine, *, alpha: float, steps: float = _STEPS) -> Floats:
    return sine.distilled(alpha=alpha, steps=steps).predict(sine.grid)


def _validated(sine: _Sine, *, clip: bool) -> Floats:
    return sine.distilled(alpha="validate", steps=_STEPS, clip_alpha=clip).predict(sine.grid)


def _more_data(sine: _Sine) -> Floats:
    X, y = np.concatenate([sine.X, sine.X_val]), np.concatenate([sine.y, sine.y_val])
    return KernelRidge(kernel="rbf", gamma=sine.gamma, alpha=sine.lam).fit(X, y).predict(sine.grid)


def _tuned_ridge(sine: _Sine) -> Floats:
    errors = ((sine.ridges(sine.X_val) - sine.y_val) ** 2).mean(1)
    return sine.ridges(sine.grid)[int(np.argmin(errors))]


def _oracle_ridge(sine: _Sine) -> Floats:
    return min(sine.ridges(sine.grid), key=sine.error)


def _run_sine(trial: Trial, *, predict: Callable[[_Sine], Floats]) -> dict[str, float]:
    sine = _Sine(trial)
    error, first = sine.error(predict(sine)), sine.error(_one_fit(sine))
    return {"error": error, "excess": error - 1.15 * first, "relative": error / first}


def _theory(scale: Scale) -> Study:
    arms: dict[str, Callable[[_Sine], Floats]] = {
        "one fit": _one_fit,
        "alpha 0": partial(_fixed, alpha=0.0),
        "alpha 0.35": partial(_fixed, alpha=_ALPHA),
        "alpha*": partial(_validated, clip=True),
        "alpha*, not clipped": partial(_validated, clip=False),
        "limit": partial(_fixed, alpha=_ALPHA, steps=np.inf),
        "one fit, validation points too": _more_data,
        "tuned ridge": _tuned_ridge,
        "oracle ridge": _oracle_ridge,
    }
    gammas, penalties = (20, 80), (0.02, 0.2, 1.0)
    settings = {f"gamma {gamma}, lambda {lam:g}": (float(gamma), lam) for gamma in gammas for lam in penalties}
    expect: list[Claim] = []
    for gamma in gammas:
        small, medium, large = (f"gamma {gamma}, lambda {lam:g}" for lam in penalties)
        at = f"with gamma = {gamma}"
        expect += [
            Claim(
                f"Without labels six steps collapse where lambda is large enough already, {at}",
                Expect("alpha 0", on=large).worse_than("one fit"),
            ),
            Claim(
                f"The best alpha of each step is there at most 15 percent worse than one fit, {at}",
                Expect("alpha*", "excess", on=large).within(high=0.0),
            ),
            Claim(
                f"Where lambda is too small the best alpha of each step is better than one fit, {at}",
                Expect("alpha*", on=small).better_than("one fit"),
            ),
            Claim(
                f"It is better there than one fit to the validation points as well, {at}",
                Expect("alpha*", on=small).better_than("one fit, validation points too"),
            ),
            Claim(
                f"A ridge tuned on the same validation points does as well there, {at}",
                Expect("tuned ridge", on=small).not_worse_than("alpha*"),
            ),
            Claim(
                f"Six steps with alpha = 0.35 are at the limit, ridge with lambda/alpha, {at}",
                Expect("alpha 0.35", on=medium).equal_to("limit", within=0.005),
            ),
            *(
                Claim(
                    f"Nothing beats ridge with the best lambda: {arm} at lambda = {lam:g}, {at}",
                    Expect("oracle ridge", on=on).better_than(arm),
                )
                for arm, lam, on in (
                    ("alpha*", penalties[0], small),
                    ("alpha*", penalties[1], medium),
                    ("alpha 0", penalties[1], medium),
                    ("alpha*", penalties[2], large),
                )
            ),
        ]
    return Study(
        name="self-distillation: kernel ridge on a sine",
        paper=PAPER,
        scale=scale,
        metric="error",
        direction="min",
        metrics={"excess": "min", "relative": "min"},
        baseline="one fit",
        settings=settings,
        arms={name: Arm(partial(_run_sine, predict=predict)) for name, predict in arms.items()},
        expect=expect,
        seeds=scale.pick(range(1), range(100, 150), range(100, 300)),
        notes={
            "seeds": "0 to 49 served to plan the study; others decide",
            "data": "40 points, sin(2 pi x) + 0.5 N(0, 1), x uniform in [0, 1]; 20 more to validate on; the error is the mean "
            "squared distance to the sine at 500 points",
            "steps": f"{_STEPS}, the first fit included; alpha = {_ALPHA} for the limit",
            "excess": "error less 1.15 times that of one fit to the same points; its mean compares mean errors",
            "relative": "error divided by that of one fit; its mean weighs the seeds where one fit is lucky",
            "ridge": f"penalty from {len(_PENALTIES)} values between {_PENALTIES[0]:g} and {_PENALTIES[-1]:g}; the oracle chooses "
            "by the true error",
        },
    )


# ---- networks


_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def _perceptron() -> nn.Module:
    return MLP((64, 128, 128, 10))


def _noisy(trial: Trial) -> Task:
    """Digits, 600 to train with wrong labels, 300 clean ones to validate, 897 to test; the seed decides split and noise."""
    if trial.scale is Scale.FULL:
        task = tasks.cifar10((3, 4, 6, 3))
    else:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        whole = TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long())
        n = len(whole)
        kept, val, test = data.split(whole, (600 / n, 300 / n, (n - 900) / n), seed=trial.seed)
        task = Task("digits", model=_perceptron, train=kept, val=val, test=test)
    return task.with_(train=data.noisy_labels(task.train, trial.setting, seed=trial.seed))


def _run_network(trial: Trial, *, alpha: Any, steps: int, loss: Callable[..., Tensor]) -> dict[str, float]:
    task, scale = _noisy(trial), trial.scale
    seeds = itertools.count(1000 * trial.seed)  # the first model is the same in every arm

    def fit_fn(model: nn.Module, X: Tensor, targets: Tensor) -> nn.Module:
        seed = next(seeds)

        def trained() -> dict[str, Tensor]:
            train.fit(
                model, TensorDataset(X, targets), loss=loss, optimizer=partial(torch.optim.Adam, lr=scale.pick(3e-3, 3e-3, 1e-3)),
                epochs=scale.pick(2, 60, 75), batch_size=scale.pick(64, 64, 16), seed=seed, device=trial.device,
            )  # fmt: skip
            return model.state_dict()

        trial.spend(trainings=1)
        given = {"inputs": X, "targets": targets, "loss": loss, "seed": seed, "scale": scale.value, "device": trial.device}
        model.load_state_dict(trial.cached("network", trained, **given))
        return model

    distiller = SelfDistiller(lambda: task.model(seed=next(seeds)), fit_fn, alpha, steps)
    distiller.fit(*_tensors(task.train, trial.device), *_tensors(task.val, trial.device))
    result = {"accuracy": task.evaluate(distiller.models_[-1], trial.split)["accuracy"]}
    if steps > 1:
        result |= {"alpha": distiller.alphas_[-1], "raw_alpha": distiller.raw_alphas_[-1]}
    return result


def _network(scale: Scale) -> Study:
    steps = scale.pick(2, 2, 6)

    def arm(alpha: Any = 1.0, steps: int = 1, loss: Callable[..., Tensor] = softmax_mse) -> Arm:
        return Arm(partial(_run_network, alpha=alpha, steps=steps, loss=loss))

    noises = {"noise 0.2": 0.2, "noise 0.4": 0.4}
    students = steps - 1
    expect: list[Claim] = [
        Claim(
            "A step with the estimate costs 2 trainings instead of 5",
            Expect("alpha estimated", "trainings").better_than("alpha by grid", by=3 * students - 0.5),
        )
    ]
    for on in noises:
        estimate = Expect("alpha estimated", on=on)
        expect += [
            Claim(f"The estimate is within a point of the grid, {on}", estimate.not_worse_than("alpha by grid", by=0.01)),
            Claim(f"It is above the teacher, {on}", estimate.better_than("teacher")),
            Claim(f"It is above a second network trained on the labels, {on}", estimate.better_than("alpha 1")),
            Claim(f"It is above distillation without labels, {on}", estimate.better_than("alpha 0")),
            Claim(f"It is above cross entropy, {on}", estimate.better_than("cross entropy")),
            Claim(f"It is above cross entropy with label smoothing, {on}", estimate.better_than("label smoothing")),
        ]
    return Study(
        name="self-distillation: a network with wrong labels",
        paper=PAPER,
        scale=scale,
        metric="accuracy",
        metrics={"alpha": "max", "raw_alpha": "max"},
        baseline="teacher",
        settings=noises,
        arms={
            "teacher": arm(),
            "alpha 0": arm(0.0, steps),
            "alpha 1": arm(1.0, steps),
            "alpha estimated": arm("estimate", steps),
            "alpha by grid": arm(_GRID, steps),
            "cross entropy": arm(loss=F.cross_entropy),
            "label smoothing": arm(loss=partial(F.cross_entropy, label_smoothing=0.1)),
        },
        expect=expect,
        seeds=scale.pick(range(1), range(100, 110), range(3)),
        notes={
            "seeds": "0 and 7 served to plan the study; others decide",
            "data": "digits of scikit-learn, 600 / 300 / 897; labels of the training part are replaced by a uniform one with the "
            "probability that names the setting; the validation part, which decides alpha, is clean",
            "training": "64-128-128-10 perceptron, Adam 3e-3, 60 epochs, batches of 64, mean squared error of the softmax; a fresh "
            "network for every training",
            "trainings": "all that the arm needs, the teacher included; one that two arms share is run once, so that seconds say little",
        },
    )


def study(scale: Scale) -> list[Study]:
    """The two studies: kernel ridge, where all is closed form, and a network, where alpha is estimated."""
    return [_theory(scale), _network(scale)]

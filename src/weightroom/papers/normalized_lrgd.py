"""Normalized LR+GD: from logistic regression to the perceptron (Tyurin, AAAI 2025)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weightroom.compare.base import Method
from weightroom.estimators import NormalizedLogisticGD
from weightroom.losses import NormalizedLogisticLoss
from weightroom.optim import NormalizedLRGD
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial
from weightroom.study.core import Direction

__all__ = ["PAPER", "study"]


class _Difference(nn.Module):
    """The normalized logistic loss of the difference of two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = NormalizedLogisticLoss()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits[:, 1] - logits[:, 0], target)


def _of_two_logits(task: Task) -> nn.Module:
    return _Difference()


def _unfit(task: Task) -> str | None:
    with torch.no_grad():
        logits = task.model().eval().cpu()(torch.as_tensor(task.train[0][0])[None])
    return (
        None
        if logits.shape == (1, 2)
        else f"its loss needs two logits for each sample, the model gives {tuple(logits.shape[1:])}"
    )


PAPER = Paper(
    key="normalized-lrgd",
    number=40,
    family="loss",
    parts=(NormalizedLogisticGD, NormalizedLogisticLoss, NormalizedLRGD),
    title="From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes",
    authors="Alexander Tyurin",
    year=2025,
    venue="AAAI",
    arxiv="2412.08424",
    summary="Separates two classes by gradient descent on the logistic loss with very large steps, divided by the mean wrongness.",
    claim="Gradient descent on the logistic loss tends to a batch perceptron as its step grows and may need iterations in proportion "
    "to the number of rows; divided by the mean wrongness it needs no more than a perceptron does, on imbalanced data fewer, and "
    "a high loss says nothing about how far it is.",
    limits="It looks for a separating hyperplane and nothing else: the scores are no probabilities, the margin may be small, and "
    "on data without one it never settles. A linear program tells at once that the digits 8 and 9 cannot be separated from "
    "the rest and that 1 and 3 can, which no method here finds out in 6,000 iterations. On imbalanced data LR+GD needed "
    "three times as many iterations, but L-BFGS four fewer, a perceptron that updates after every wrong row seven fewer "
    "passes, and balanced class weights save LR+GD about as much as normalising does. On classes of equal size it needs "
    "more iterations than LR+GD in the paper and on MNIST; of four pairs of small digits it needed fewer on three. A line "
    "of the paper says that the factor tends to the number of wrong rows; it tends to n over that, and the steps are right. "
    "No public code was found. Networks and minibatches, and so the arm in a comparison of losses, are outside the theory.",
    methods={"normalized logistic": Method(_of_two_logits, {}, {"lr": (1e-4, 1e-1, "log")}, unfit=_unfit)},
)

Floats = NDArray[np.float64]
Data = tuple[Floats, Floats]

_NORMALIZED: dict[str, Any] = {"normalize": True}
_PLAIN: dict[str, Any] = {"normalize": False}
_LIMITS: dict[str, dict[str, Any]] = {
    "batch perceptron": {"normalize": False, "limit": "batch"},
    "normalized batch perceptron": {"normalize": True, "limit": "batch"},
    "perceptron": {"limit": "online"},
}


def _worst_case(n: int) -> Data:
    """Theorem 5.1: one row of one class, n - 1 equal rows of the other."""
    A, y = np.tile([-0.5, -1.0], (n, 1)), -np.ones(n)
    A[0, 0], y[0] = 0.5, 1.0
    return A, y


def _imbalanced(seed: int, positives: int = 10, negatives: int = 1000, d: int = 20) -> Data:
    """Gaussian rows, at least 0.3 away from a random hyperplane, and the constant feature."""
    rng = np.random.default_rng(seed)
    w, A = rng.standard_normal(d), rng.standard_normal((positives + negatives, d))
    w /= np.linalg.norm(w)
    y = np.repeat([1.0, -1.0], [positives, negatives])
    A += np.outer(y * (0.3 + 0.5 * np.abs(rng.standard_normal(len(y)))) - A @ w, w)
    return np.column_stack([A, np.ones(len(y))]), y


def _digits(one: int, other: int | None) -> Data:
    """A digit against another, or against all others; pixels in [0, 1] and the constant feature."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _against(images / 16, labels, one, other)


def _mnist(one: int, other: int | None, most: int | None = None) -> Data:
    """As ``_digits``, of the training part of MNIST; ``most`` of the first digit."""
    from weightroom import data

    images, labels = (x.numpy() for x in data.mnist()[:2])
    A, y = _against(images.reshape(len(images), -1).astype(float), labels, one, other)
    kept = (y < 0) | (np.cumsum(y > 0) <= (most or len(y)))
    return A[kept], y[kept]


def _against(images: Floats, labels: NDArray[Any], one: int, other: int | None) -> Data:
    kept = (labels == one) | (labels == other) if other is not None else np.full(len(labels), True)
    return np.column_stack([images[kept], np.ones(kept.sum())]), np.where(labels[kept] == one, 1.0, -1.0)


def _nine_tenths(A: Floats, y: Floats, seed: int) -> Data:
    """Nine tenths of the rows of each class."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(np.flatnonzero(y == side)) for side in (1, -1)]
    kept = np.sort(np.concatenate([rows[: math.ceil(0.9 * len(rows))] for rows in parts]))
    return A[kept], y[kept]


def _repeated(A: Floats, y: Floats) -> Data:
    """The rows of the rare class repeated until it is as frequent as the other: LR+GD with balanced class weights."""
    positive, negative = (y > 0).sum(), (y < 0).sum()
    times = np.where(y > 0, max(1, negative // positive), max(1, positive // negative))
    return np.repeat(A, times, axis=0), np.repeat(y, times)


def _margin(Z: Floats) -> float:
    """mu, exactly: the shortest v with Zv >= 1 has length 1/mu; Lawson and Hanson find it by non-negative least squares."""
    from scipy.optimize import nnls

    Z = np.unique(Z, axis=0)
    E, f = np.vstack([Z.T, np.ones(len(Z))]), np.append(np.zeros(Z.shape[1]), 1.0)
    r = E @ nnls(E, f)[0] - f
    return float(abs(r[-1]) / np.linalg.norm(r[:-1]))


def _bound(A: Floats, y: Floats, gamma: float, normalize: bool = True, limit: str = "none") -> float:
    """The most iterations that the paper allows (Theorems 3.3, 5.2, 5.3, 6.1)."""
    n, mu, R = len(A), _margin(y[:, None] * A), float(np.linalg.norm(A, axis=1).max())
    if limit == "none":
        return R**2 / mu**2 + 2 * math.log(2 * n - 1) / (gamma * mu**2)
    return R**2 / mu**2 * (n if limit == "batch" and not normalize else 1)


def _fit(A: Floats, y: Floats, gamma: float, max_iter: int = 100_000, **how: Any) -> NormalizedLogisticGD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not separated: a metric says so
        return NormalizedLogisticGD(gamma, fit_intercept=False, max_iter=max_iter, record=True, **how).fit(A, y)


def _separate(trial: Trial, *, draw: Callable[[Trial], Data], gamma: float = 1.0, balance: bool = False, max_iter: int = 100_000,
              ratio: bool = False, bound: bool = False, **how: Any) -> dict[str, float]:  # fmt: skip
    """One of the five methods until it separates."""
    A, y = draw(trial)
    model = _fit(*(_repeated(A, y) if balance else (A, y)), gamma, max_iter, **how)
    trial.spend(oracle_calls=model.n_iter_)
    loss, wrong = model.history_["loss"], model.history_["misclassified"]
    for t in range(0, len(loss), 1 + len(loss) // 300):
        trial.log(t, loss=loss[t], misclassified=wrong[t])
    result = {
        "iterations": float(model.n_iter_), "separated": float(model.separated_), "per_row": model.n_iter_ / len(y),
        "peak_loss": float(loss.max()), "misclassified": float(wrong[-1]),
    }  # fmt: skip
    if ratio and "limit" not in how:
        result["ratio"] = _fit(A, y, gamma, max_iter, normalize=False).n_iter_ / model.n_iter_
    if bound and (how.get("normalize", True) or "limit" in how):
        result["bound_share"] = model.n_iter_ / _bound(A, y, gamma, **how)
    return result


def _outside(
    trial: Trial, *, draw: Callable[[Trial], Data], make: Callable[[int, int], Any], most: int = 500
) -> dict[str, float]:
    """A library's classifier, given as few iterations as separate."""
    A, y = draw(trial)
    k, separated = 0, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        while k < most and not separated:
            k += 1
            separated = bool((y * make(k, trial.seed).fit(A, y).decision_function(A) > 0).all())
    trial.spend(oracle_calls=k)
    return {"iterations": float(k), "per_row": k / len(y), "separated": float(separated)}


def _lbfgs(k: int, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1e6, max_iter=k, tol=1e-12, fit_intercept=False)


def _perceptron(k: int, seed: int) -> Any:
    from sklearn.linear_model import Perceptron

    return Perceptron(max_iter=k, tol=None, random_state=seed, fit_intercept=False)


def _program(trial: Trial, *, draw: Callable[[Trial], Data]) -> dict[str, float]:
    """Whether any hyperplane separates at all: a linear program."""
    from scipy.optimize import linprog

    A, y = draw(trial)
    Z = y[:, None] * A
    found = linprog(np.zeros(Z.shape[1]), A_ub=-Z, b_ub=-np.ones(len(Z)), bounds=(None, None), method="highs")
    return {"separated": float(found.status == 0)}


def _draw_worst_case(trial: Trial) -> Data:
    return _worst_case(trial.setting)


def _draw_imbalanced(trial: Trial) -> Data:
    return _imbalanced(trial.seed)


def _draw_pair(trial: Trial) -> Data:
    read, *which = trial.setting
    return _nine_tenths(*{"digits": _digits, "mnist": _mnist}[read](*which), trial.seed)


def _draw_rest(trial: Trial) -> Data:
    return _digits(trial.setting, None)


def _arms(draw: Callable[[Trial], Data], gammas: Mapping[str, tuple[float, ...]], **given: Any) -> dict[str, Arm]:
    """LR+GD and Normalized LR+GD at some steps, and the three perceptrons."""
    arms = {
        f"{name}, gamma {gamma:g}": Arm(
            partial(_separate, draw=draw, gamma=gamma, normalize=name == "normalized", **given),
            cites=(PAPER,) if name == "normalized" else (),
        )
        for name, steps in gammas.items()
        for gamma in steps
    }
    return arms | {name: Arm(partial(_separate, draw=draw, **how, **given)) for name, how in _LIMITS.items()}


_TABLE_1 = {
    "normalized, gamma 100": 2, "normalized, gamma 10": 2, "normalized, gamma 1": 16, "normalized, gamma 0.1": 157,
    "lr+gd, gamma 100": 308,
}  # fmt: skip
_SIZES = {"100": 100, "1000": 1000, "5000": 5000}
_PAIRS = {f"{a}-{b}": ("digits", a, b) for a, b in ((3, 8), (8, 1), (5, 9), (4, 7))}
_REST = {"1": 1, "3": 3, "8": 8, "9": 9}
_METRICS: dict[str, Direction] = {
    "iterations": "min", "per_row": "min", "separated": "max", "peak_loss": "min", "misclassified": "min", "ratio": "max", "bound_share": "min",
}  # fmt: skip


def study(scale: Scale) -> list[Study]:
    """The worst case, imbalanced data, balanced pairs of digits, a digit against all others; at real scale MNIST.

    ``iterations`` is the least t at which all rows are strictly on their side, or the most that were allowed where ``separated``
    is 0. ``ratio`` is how many times as many LR+GD needs with the same step on the same rows. ``bound_share`` is the share of the
    paper's bound that was used, with mu from an exact quadratic program. ``peak_loss`` is the highest mean logistic loss on the way.
    """

    def common(name: str, metric: str = "iterations", **given: Any) -> Study:
        return Study(
            name=f"normalized-lrgd: {name}", paper=PAPER, scale=scale, metric=metric, direction=_METRICS[metric], metrics=_METRICS,
            **given,
        )  # fmt: skip

    worst = common(
        "worst case",
        baseline="lr+gd, gamma 100",
        settings=_SIZES,
        arms=_arms(_draw_worst_case, {"lr+gd": (100.0,), "normalized": (100.0, 10.0, 1.0, 0.1)}, bound=True),
        expect=[
            *(
                Claim(f"LR+GD needs at least n / 4 iterations, n = {n}", Expect("lr+gd, gamma 100", "per_row", on=n).always(0.25))
                for n in _SIZES
            ),
            *(
                Claim(
                    f"Normalised, gamma = {gamma}, it needs 2, n = {n}",
                    Expect(f"normalized, gamma {gamma}", on=n).always(2, 2),
                )
                for gamma in (100, 10)
                for n in ("100", "5000")
            ),
            *(
                Claim(f"Table 1, n = 1000: {arm} needs {t} iterations", Expect(arm, on="1000").always(t, t))
                for arm, t in _TABLE_1.items()
            ),
            Claim(
                "At gamma = 0.1 it keeps to the bound", Expect("normalized, gamma 0.1", "bound_share", on="1000").always(high=1.0)
            ),
        ],
        seeds=1,
        notes={"data": "(0.5, -1) of one class, n - 1 times (-0.5, -1) of the other; nothing is random", "settings": "n"},
    )
    steps = {"lr+gd": (10.0, 100.0, 1000.0), "normalized": (10.0, 100.0)}
    imbalanced = common(
        "imbalanced",
        baseline="lr+gd, gamma 100",
        arms={
            **_arms(_draw_imbalanced, steps, ratio=True, bound=True),
            **{
                f"lr+gd, balanced classes, gamma {gamma:g}": Arm(
                    partial(_separate, draw=_draw_imbalanced, gamma=gamma, balance=True, ratio=True, normalize=False)
                )
                for gamma in (10.0, 100.0)
            },
            "scikit-learn logistic regression": Arm(partial(_outside, draw=_draw_imbalanced, make=_lbfgs)),
            "scikit-learn perceptron": Arm(partial(_outside, draw=_draw_imbalanced, make=_perceptron)),
        },
        expect=[
            Claim("At gamma = 100 normalising saves iterations", Expect("normalized, gamma 100").better_than("lr+gd, gamma 100")),
            Claim("LR+GD needs at least 1.2 times as many", Expect("normalized, gamma 100", "ratio").within(low=1.2)),
            Claim("It saves some on every data set", Expect("normalized, gamma 100", "ratio").always(low=1.0)),
            Claim(
                "At gamma = 10 it saves a larger share than at 100",
                Expect("normalized, gamma 10", "ratio").better_than("normalized, gamma 100"),
            ),
            Claim("It keeps to the bound", Expect("normalized, gamma 10", "bound_share").always(high=1.0)),
            Claim("A larger step alone does not do the same", Expect("normalized, gamma 100").better_than("lr+gd, gamma 1000")),
            Claim(
                "Balanced class weights do not do the same",
                Expect("normalized, gamma 100").better_than("lr+gd, balanced classes, gamma 100"),
            ),
            Claim(
                "Normalising saves iterations in the limit, too",
                Expect("normalized batch perceptron").better_than("batch perceptron"),
            ),
            Claim(
                "With gamma = 10 it is better than the perceptron it tends to",
                Expect("normalized, gamma 10").better_than("normalized batch perceptron"),
            ),
            Claim(
                "It needs fewer iterations than L-BFGS on the logistic loss",
                Expect("normalized, gamma 10").better_than("scikit-learn logistic regression"),
            ),
            Claim(
                "It needs fewer passes than scikit-learn's perceptron",
                Expect("normalized, gamma 10").better_than("scikit-learn perceptron"),
            ),
        ],
        seeds=scale.pick(range(2), range(100, 120), range(100, 200)),
        notes={
            "data": "10 against 1,000 Gaussian rows, d = 20, at least 0.3 from a random hyperplane, and a constant feature",
            "passes": "an iteration is one gradient over all rows. Of scikit-learn: iterations of L-BFGS, of one gradient each here, and "
            "one more at the start, and epochs of the perceptron, each one pass with an update after every wrong row. Both get the "
            "least number that separates, found by trying, which is not counted",
            "balanced classes": "the rows of the rare class repeated 100 times",
        },
    )
    steps = {"lr+gd": (1.0, 10.0, 100.0), "normalized": (1.0, 10.0, 100.0)}
    pairs = common(
        "pairs of digits",
        baseline="lr+gd, gamma 100",
        settings=_PAIRS,
        arms=_arms(_draw_pair, steps),
        expect=[
            *(
                Claim(
                    f"On {pair}, classes of equal size, normalising saves nothing at gamma = 100",
                    Expect("lr+gd, gamma 100", on=pair).not_worse_than("normalized, gamma 100"),
                )
                for pair in _PAIRS
            ),
            *(
                Claim(
                    f"On {pair} LR+GD with gamma = 100 goes through a higher loss than with 1",
                    Expect("lr+gd, gamma 100", "peak_loss", on=pair).worse_than("lr+gd, gamma 1"),
                )
                for pair in _PAIRS
            ),
            *(
                Claim(
                    f"On {pair} it yet needs fewer iterations", Expect("lr+gd, gamma 100", on=pair).better_than("lr+gd, gamma 1")
                )
                for pair in _PAIRS
            ),
        ],
        seeds=scale.pick(range(1), range(100, 110), range(100, 120)),
        notes={
            "data": "scikit-learn's digits, some 180 of each, nine tenths of them by seed; pixels in [0, 1] and a constant feature",
            "reading": "no winner is expected over the pairs: the first four claims are there to differ",
        },
    )
    most = scale.pick(200, 6000, 6000)
    rest = common(
        "a digit against the rest",
        "separated",
        baseline="lr+gd, gamma 10",
        settings=_REST,
        arms={
            **_arms(_draw_rest, {"lr+gd": (10.0, 100.0), "normalized": (10.0, 100.0)}, max_iter=most),
            "linear program": Arm(partial(_program, draw=_draw_rest)),
        },
        expect=[
            *(
                Claim(
                    f"In {most} iterations {c} is not separated", Expect("normalized, gamma 10", "separated", on=c).always(0, 0)
                )
                for c in _REST
            ),
            *(Claim(f"Yet {c} can be", Expect("linear program", "separated", on=c).always(1, 1)) for c in ("1", "3")),
            *(Claim(f"And {c} cannot", Expect("linear program", "separated", on=c).always(0, 0)) for c in ("8", "9")),
        ],
        seeds=1,
        notes={"data": "scikit-learn's digits, all 1,797; nothing is random", "settings": "the digit"},
    )
    studies = [worst, imbalanced, pairs, rest]
    if scale in (Scale.REAL, Scale.FULL):
        few, even = "20 of 3 against 8", "3 against 8"
        studies.append(
            common(
                "mnist",
                baseline="lr+gd, gamma 100",
                settings={few: ("mnist", 3, 8, 20), even: ("mnist", 3, 8)},
                arms=_arms(_draw_pair, steps, max_iter=20_000),
                expect=[
                    Claim(
                        "On few against many normalising saves iterations",
                        Expect("normalized, gamma 100", on=few).better_than("lr+gd, gamma 100"),
                    ),
                    Claim(
                        "On classes of equal size it saves nothing",
                        Expect("lr+gd, gamma 100", on=even).not_worse_than("normalized, gamma 100"),
                    ),
                ],
                seeds=range(100, 105),
                notes={"data": "MNIST's training part, nine tenths of it by seed; pixels in [0, 1] and a constant feature"},
            )
        )
    return studies

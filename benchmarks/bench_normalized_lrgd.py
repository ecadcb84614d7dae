"""An iteration of Normalized LR+GD beside a plain loop of LR+GD, and the time to separate beside scikit-learn's perceptron."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Perceptron

from benchmarks.base import Race, race
from weightroom.estimators import NormalizedLogisticGD

Floats = NDArray[np.float64]


def data(n: int, d: int, positives: int, gap: float) -> tuple[Floats, Floats]:
    """Gaussian rows, ``gap`` away from a random hyperplane, on its positive side in the first ``positives``."""
    rng = np.random.default_rng(0)
    w, X, y = rng.standard_normal(d), rng.standard_normal((n, d)), np.where(np.arange(n) < positives, 1.0, -1.0)
    w /= np.linalg.norm(w)
    X += np.outer(y * (gap + 0.5 * np.abs(rng.standard_normal(n))) - X @ w, w)
    return X, y


def plain(X: Floats, y: Floats, gamma: float, iterations: int) -> Floats:
    """LR+GD as one writes it down, until all rows are on their side."""
    Z, theta = y[:, None] * np.column_stack([X, np.ones(len(X))]), np.zeros(X.shape[1] + 1)
    with np.errstate(over="ignore"):
        for _ in range(iterations):
            m = Z @ theta
            if m.min() > 0:
                break
            theta += gamma / len(Z) * ((1 / (1 + np.exp(m))) @ Z)
    return theta


def quiet(fit: Callable[..., object], *given: Floats) -> Callable[[], object]:
    def call() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(*given)

    return call


def races() -> Iterator[Race]:
    for n, d, iterations in ((1010, 20, 2000), (5000, 784, 50)):
        X, y = data(n, d, n // 2, gap=0.3)
        y[::7] *= -1  # not separable: both take all iterations
        peer = lambda X=X, y=y, iterations=iterations: plain(X, y, 10.0, iterations)  # noqa: E731
        for name, normalize in (("normalized lr+gd", True), ("lr+gd", False)):
            ours = NormalizedLogisticGD(normalize=normalize, max_iter=iterations)
            yield race(f"{name}: {iterations} iterations, {n} x {d}", quiet(ours.fit, X, y), "numpy loop", peer, target=1.1)
    for n, d, positives in ((1010, 20, 10), (5000, 784, 50)):
        X, y = data(n, d, positives, gap=0.3)
        ours, peer = NormalizedLogisticGD(), Perceptron(max_iter=10_000, tol=None)
        # The perceptron cannot stop when it has separated: it gets the epochs that it needs, known beforehand.
        peer.max_iter = next(k for k in range(1, 10_000) if Perceptron(max_iter=k, tol=None).fit(X, y).score(X, y) == 1)
        yield race(
            f"normalized lr+gd: separate {n} x {d}, {positives} positive", quiet(ours.fit, X, y),
            f"scikit-learn Perceptron, {peer.max_iter} epochs", quiet(peer.fit, X, y),
        )  # fmt: skip

"""Iterations of LV-HBA by autograd against the same loop written by hand, an implicit-gradient step, and the SVM projection."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.base import Race, race
from weightroom.optim import BilevelProblem, lv_hba, project_affine, project_halfspaces, svm_margin_projection


def llc(n: int) -> BilevelProblem:
    """The paper's toy problem with a merely convex lower level and one equality, its row scaled to unit norm."""
    s = 1 / math.sqrt(3 * n)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.view(2, n).unbind()
        d, e = x - y2, y1 - 1
        return (d.dot(d) + e.dot(e)) / 2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.view(2, n).unbind()
        return y1.dot(y1 / 2 - x) + y2.sum()

    return BilevelProblem(
        upper, lower, lambda x, y: (x.sum() + y.sum()).mul(s).view(1),
        project_joint=project_affine(torch.full((1, 3 * n), s, dtype=torch.float64)), equality=True,
    )  # fmt: skip


def by_hand(
    n: int, steps: int, alpha: float = 0.05, beta: float = 0.1, eta: float = 0.3, c: float = 1.0, p: float = 0.49
) -> np.ndarray:
    """LV-HBA on this problem, every gradient by hand."""
    s = 1 / math.sqrt(3 * n)
    x, y1, y2 = np.zeros(n), np.zeros(n), np.zeros(n)
    t1, t2, lam, z = y1.copy(), y2.copy(), 0.0, 0.0
    for k in range(steps):
        c_k = c * (k + 1) ** p
        g = s * (x.sum() + t1.sum() + t2.sum())
        d1, d2 = t1 - x + lam * s + (t1 - y1), 1 + lam * s + (t2 - y2)
        t1, t2 = t1 - eta * d1, t2 - eta * d2
        lam = min(max(lam + eta * (g - (lam - z)), -1000.0), 1000.0)
        e = x - y2
        d_x = e / c_k - y1 + t1 - lam * s
        d_y1, d_y2 = (y1 - 1) / c_k + y1 - x - (y1 - t1), 1 - e / c_k - (y2 - t2)
        x, y1, y2 = x - alpha * d_x, y1 - alpha * d_y1, y2 - alpha * d_y2
        mean = (x.sum() + y1.sum() + y2.sum()) / (3 * n)
        x, y1, y2 = x - mean, y1 - mean, y2 - mean
        z = min(max(z + beta * (lam - z), -1000.0), 1000.0)
    return x


def implicit_step(n: int) -> Callable[[], object]:
    """One implicit-gradient step by dense linear algebra: the KKT matrix of the lower level, factorised by its eigenvalues."""
    H = np.diag(np.repeat([1.0, 0.0], n))
    K = np.block([[H, np.ones((2 * n, 1))], [np.ones((1, 2 * n)), np.zeros((1, 1))]])
    right = np.ones(2 * n + 1)

    def step() -> np.ndarray:
        values, vectors = np.linalg.eigh(K)
        inverse = np.where(np.abs(values) > 1e-10, 1 / np.where(values == 0, 1, values), 0)
        return vectors @ (inverse * (vectors.T @ right))

    return step


def iteration(solve: Callable[[int], object], few: int, many: int) -> float:
    """Seconds of one iteration, without what is done once."""
    seconds = []
    for steps in (few, many):
        start = time.perf_counter()
        solve(steps)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (many - few)


def races() -> Iterator[Race]:
    zeros = lambda n: (torch.zeros(n, dtype=torch.float64), torch.zeros(2 * n, dtype=torch.float64))  # noqa: E731
    for n, many in ((100, 600), (1000, 600), (10_000, 300)):
        for trace in (True, False):
            problem = llc(n)
            ours, peer = [], []
            for _ in range(11):
                solve = lambda steps: lv_hba(problem, *zeros(n), steps=steps, trace=trace, record_every=10_000)  # noqa: B023, E731
                ours.append(iteration(solve, 50, many))
                peer.append(iteration(lambda steps: by_hand(n, steps), 50, many))  # noqa: B023
            name = f"LV-HBA iteration{', trace=True' if trace else ''}, n={n}"
            goal = 5.0 if trace and n == 1000 else None
            yield Race(name, "numpy, by hand", statistics.median(ours), statistics.median(peer), goal)
        if n <= 1000:
            start = time.perf_counter()
            implicit_step(n)()
            yield Race(
                f"LV-HBA iteration, n={n}", "implicit step, dense KKT", statistics.median(ours), time.perf_counter() - start, None
            )

    generator = torch.Generator().manual_seed(0)
    n, d = 250, 30
    Z = torch.randn(n, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    y = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    u = torch.randn(d + 1 + n, generator=generator, dtype=torch.float64)
    A = -torch.cat([y[:, None] * Z, y[:, None], torch.eye(n, dtype=torch.float64)], dim=1)
    general = project_halfspaces(A, -1.0)
    yield race(
        f"SVM margin projection, n={n} d={d}", lambda: svm_margin_projection(u[:d], u[d], u[d + 1 :], Z, y),
        "non-negative least squares (scipy)", lambda: general(u), rounds=3,
    )  # fmt: skip

"""Every step of a self-distilled kernel ridge beside as many fits of scikit-learn's KernelRidge."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.kernel_ridge import KernelRidge

from benchmarks.base import Race, race
from weightroom.kernels import SelfDistilledKernelRidge

N, LAM, ALPHA = 2000, 0.1, 0.35


def races() -> Iterator[Race]:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((N, 10)), rng.standard_normal(N)
    for steps in (3, 10):

        def ours(steps: int = steps) -> object:
            return SelfDistilledKernelRidge(gamma=0.1, lam=LAM, alpha=ALPHA, steps=steps).fit(X, y)

        def peer(steps: int = steps) -> object:
            ridge, target = KernelRidge(kernel="rbf", gamma=0.1, alpha=LAM), y
            for _ in range(steps):
                ridge.fit(X, target)
                target = ALPHA * y + (1 - ALPHA) * (target - LAM * ridge.dual_coef_)
            return ridge

        name = f"self-distillation: {steps} steps, n = {N}"
        yield race(name, ours, f"KernelRidge, {steps} fits", peer, target=1 / (0.8 * steps), rounds=5)

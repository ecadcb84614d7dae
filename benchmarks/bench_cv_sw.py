"""Sliced Wasserstein distance: ours beside POT's, and what the control variates add to the plain estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.base import Race, race
from weightroom.transport import sliced_wasserstein
from weightroom.transport.base import sample_directions


def races() -> Iterator[Race]:
    import ot

    torch.manual_seed(0)
    n, d, L = 2048, 3, 100
    x, y, theta = torch.randn(n, d, requires_grad=True), torch.randn(n, d) + 0.5, sample_directions(L, d)

    def ours(control_variate: str | None) -> Callable[[], Tensor]:
        return lambda: sliced_wasserstein(x, y, projections=theta, control_variate=control_variate)

    def weighted() -> Tensor:
        return sliced_wasserstein(x, y, a, b, theta, control_variate=None)

    def unequal() -> Tensor:
        return sliced_wasserstein(x, y[:1500], projections=theta, control_variate=None)

    def pot(points: Tensor = y, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return ot.sliced_wasserstein_distance(x, points, a, b, projections=theta.T)

    def forward(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def both(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), x)

    a, b = (w / w.sum() for w in (torch.rand(n) + 0.1, torch.rand(n) + 0.1))
    size, peer = f"n={n} d={d} L={L}", "ot.sliced_wasserstein_distance"
    for what, passes in (("forward", forward), ("forward+backward", both)):
        yield race(f"SW, plain, {size}, {what}", passes(ours(None)), peer, passes(pot), target=1.0)
        yield race(f"SW, n != m, {size}, {what}", passes(unequal), peer, passes(lambda: pot(y[:1500])), target=1.0)
        yield race(f"SW, weights, {size}, {what}", passes(weighted), peer, passes(lambda: pot(y, a, b)), target=1.0)
        yield race(f"CV-SW, lower, {size}, {what}", passes(ours("lower")), "ours, plain", passes(ours(None)), target=1.1)
        yield race(f"CV-SW, upper, {size}, {what}", passes(ours("upper")), "ours, plain", passes(ours(None)), target=1.3)

"""Inverse Fisher products against the paper's recursion and dense solves; steps of M-FAC against AdamW's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.base import Race, measure, race
from weightroom.curvature import EmpiricalFisherInverse
from weightroom.optim import MFAC


def gradients(m: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Recursion:
    """The static algorithm as the paper has it, one gradient after the other, for all blocks at once, in the gradients' dtype."""

    def __init__(self, grads: Tensor, damping: float = 1e-5, block_size: int | None = None) -> None:
        m, d = grads.shape
        self.damping, self.blocks = damping, d // (block_size or d)
        G = grads.unflatten(1, (self.blocks, -1)).transpose(0, 1).contiguous()  # (n, m, B)
        self.V, self.den = torch.empty_like(G), G.new_empty(self.blocks, m)
        for i in range(m):
            g = G[:, i].unsqueeze(2)  # (n, B, 1)
            before = self.V[:, :i]
            coefficients = (before @ g).squeeze(2) / self.den[:, :i]
            self.V[:, i] = G[:, i] / damping - (coefficients.unsqueeze(1) @ before).squeeze(1)
            self.den[:, i] = m + (self.V[:, i] * G[:, i]).sum(1)

    def mul(self, x: Tensor) -> Tensor:
        """The product with x, (d,)."""
        x = x.unflatten(0, (self.blocks, -1))
        coefficients = (self.V @ x.unsqueeze(2)).squeeze(2) / self.den
        return (x / self.damping - (coefficients.unsqueeze(1) @ self.V).squeeze(1)).flatten()


def dense(G: Tensor, x: Tensor, damping: float = 1e-5) -> Tensor:
    F = G.T @ G / len(G) + damping * torch.eye(G.shape[1], dtype=G.dtype)
    return torch.linalg.solve(F, x)


def woodbury(G: Tensor, x: Tensor, damping: float = 1e-5) -> Tensor:
    A = G @ G.T + len(G) * damping * torch.eye(len(G), dtype=G.dtype)
    return (x - G.T @ torch.linalg.solve(A, G @ x)) / damping


def parameters(d: int) -> list[Tensor]:
    params: list[Tensor] = []
    for shape in ((100, d // 100 - 1), (100,)):
        p = nn.Parameter(gradients(1, shape[0] * (shape[1] if len(shape) > 1 else 1)).view(shape))
        p.grad = torch.randn_like(p)
        params.append(p)
    return params


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def races() -> Iterator[Race]:
    for m, d, B, dtype, target in (
        (64, 102_400, 128, torch.float32, 1.0),
        (64, 102_400, 128, torch.float64, 1.0),
        (128, 8832, None, torch.float64, 1.0),
        (128, 8832, None, torch.float32, None),
        (64, 102_400, None, torch.float32, None),
    ):
        G = gradients(m, d, dtype)
        name = f"{d // 1000} k weights, m {m}, {f'blocks of {B}' if B else 'one block'}"
        peer = f"the recursion in {str(dtype).removeprefix('torch.')}"
        make, make_peer = partial(EmpiricalFisherInverse, G, block_size=B), partial(Recursion, G, block_size=B)
        yield race(f"mfac set-up, {name}", make, peer, make_peer, target=target, rounds=5)
        x = gradients(1, d, dtype)[0]
        yield race(f"mfac product, {name}", partial(make().mul, x), peer, partial(make_peer().mul, x), rounds=5)
    G, x = gradients(64, 1000, torch.float64), gradients(1, 1000, torch.float64)[0]
    once = lambda: EmpiricalFisherInverse(G).mul(x)  # noqa: E731
    yield race("mfac one product, 1000 weights, m 64", once, "torch.linalg.solve", lambda: dense(G, x), target=1.0, rounds=5)
    yield race("mfac one product, 1000 weights, m 64", once, "Woodbury, nothing kept", lambda: woodbury(G, x), rounds=5)
    ours = EmpiricalFisherInverse(G)
    yield race(
        "mfac another product, 1000 weights, m 64",
        lambda: ours.mul(x),
        "Woodbury, nothing kept",
        lambda: woodbury(G, x),
        target=1.0,
        rounds=5,
    )
    # How the cost grows: the ratio is 2 to the power of the exponent.
    for what, (m, d), (m2, d2) in (("d", (64, 40_000), (64, 80_000)), ("m", (64, 40_000), (128, 40_000))):
        one, two = (partial(EmpiricalFisherInverse, gradients(*size)) for size in ((m, d), (m2, d2)))
        yield race(f"mfac set-up, twice the {what}", two, "once", one, rounds=5)
        products = [partial(make().mul, gradients(1, n)[0]) for make, n in ((two, d2), (one, d))]
        yield race(f"mfac product, twice the {what}", products[0], "once", products[1], rounds=5)
    step = MFAC(parameters(10_000), window=128).step
    step()
    yield Race("mfac step, 10 k weights, m 128", "a budget of 5 ms", min(measure(step) for _ in range(5)), 5e-3, 1.0)
    yield race("mfac step, 10 k weights, m 128", step, "AdamW", AdamW(parameters(10_000)).step, rounds=5)
    large, adamw = MFAC(parameters(10_000_000), window=8), AdamW(parameters(10_000_000), foreach=True)
    yield race("mfac step, 10 M weights, m 8", large.step, "AdamW(foreach=True)", adamw.step, rounds=3)
    yield Race("mfac state, 10 M weights, m 8", "AdamW", state_bytes(large), state_bytes(adamw), None, unit="B")

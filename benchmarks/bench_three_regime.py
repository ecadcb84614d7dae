"""Connectivity against a curve network, CKA against Gram matrices, and a step of SAM against two of its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.base import Race, race
from benchmarks.bench_lion_k import transformer
from weightroom.diagnostics import linear_cka, linear_mode_connectivity
from weightroom.nets.small import ConvNet, ResNet
from weightroom.optim import SAM


class Curve(nn.Module):
    """A quadratic Bezier curve through three networks, which combines their weights in every forward pass."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.net = a
        ends = [{name: p.detach() for name, p in net.named_parameters()} for net in (a, b)]
        self.bends = [ends[0], {name: (p + ends[1][name]) / 2 for name, p in ends[0].items()}, ends[1]]

    def forward(self, x: Tensor, t: float) -> Tensor:
        """Outputs of the network at t."""
        c = ((1 - t) ** 2, 2 * t * (1 - t), t**2)
        weights = {name: sum(k * bend[name] for k, bend in zip(c, self.bends, strict=True)) for name in self.bends[0]}
        return functional_call(self.net, weights, (x,))  # type: ignore[arg-type]


@torch.no_grad()
def by_curve(a: nn.Module, b: nn.Module, loader: DataLoader, points: int = 11) -> list[float]:
    """Training error along the line, a network and two passes over the data for each point."""
    curve, values = Curve(a, b), []
    norms = [m for m in a.modules() if isinstance(m, nn.BatchNorm2d)]
    for i in range(points):
        for norm in norms:
            norm.reset_running_stats()
        curve.train()
        seen, missed = 0, 0
        for x, _ in loader:
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen
            curve(x, i / (points - 1))
        curve.eval()
        for x, y in loader:
            missed += int((curve(x, i / (points - 1)).argmax(1) != y).sum())
        values.append(missed / seen)
    return values


@torch.no_grad()
def by_gram(X: Tensor, Y: Tensor) -> float:
    """CKA from centred Gram matrices."""
    K, L = (Z @ Z.T for Z in (X, Y))
    K, L = (G - G.mean(0) - G.mean(0)[:, None] + G.mean() for G in (K, L))
    return float((K * L).sum() / (K.norm() * L.norm()))


def closure_of(params: list[Tensor]) -> Callable[[], Tensor]:
    """A closure whose passes cost nothing, so that the steps are what is timed."""
    gradients, loss = [p.grad for p in params], torch.zeros(())

    def closure() -> Tensor:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        return loss

    return closure


def networks(make: Callable[[], nn.Module], n: int, size: int, channels: int) -> tuple[nn.Module, nn.Module, DataLoader]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(n, channels, size, size), torch.randint(10, (n,)))
    return make(), make(), DataLoader(data, batch_size=64)


def races() -> Iterator[Race]:
    small = partial(ConvNet, 1, 10, channels=(16, 16, 32, 32))
    for name, (a, b, loader), goal in (
        ("CNN on 1078 images of 8 x 8", networks(small, 1078, 8, 1), 0.67),
        ("ResNet-8 on 192 images of 32 x 32", networks(ResNet, 192, 32, 3), None),  # convolutions alone decide
    ):
        ours = partial(linear_mode_connectivity, a, b, loader)
        assert list(ours().values) == by_curve(a, b, loader)
        yield race(f"connectivity, {name}", ours, "curve network", partial(by_curve, a, b, loader), target=goal, rounds=5)
    X, Y = torch.randn(2000, 10), torch.randn(2000, 10)
    yield race("CKA, 2000 x 10", partial(linear_cka, X, Y), "Gram matrices", partial(by_gram, X, Y), target=0.1)
    X, Y = torch.randn(500, 4096), torch.randn(500, 4096)
    yield race("CKA, 500 x 4096", partial(linear_cka, X, Y), "Gram matrices", partial(by_gram, X, Y))
    bases: dict[str, tuple[type[Optimizer], dict[str, Any], float | None]] = {
        "AdamW": (AdamW, {"lr": 1e-4}, 1.0),
        "SGD with momentum": (SGD, {"lr": 1e-4, "momentum": 0.9}, None),
    }
    for name, (base, args, goal) in bases.items():
        weights, others = transformer(320, 6, 8000), transformer(320, 6, 8000)
        sam, plain = SAM(weights, base, foreach=True, **args), base(others, foreach=True, **args)  # type: ignore[call-arg]
        first, second = closure_of(weights), closure_of(others)

        def twice(plain: Optimizer = plain, closure: Callable[[], Tensor] = second) -> None:
            plain.step(closure)  # type: ignore[arg-type]
            plain.step(closure)  # type: ignore[arg-type]

        yield race("SAM step, 10 M weights", partial(sam.step, first), f"two steps of {name}", twice, target=goal, rounds=7)

"""Comp-sum losses beside cross entropy on logits of 1000 classes, and the adversarial one beside TRADES at equal steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.base import Race, race
from weightroom.adversarial import TRADES, AdversarialObjective, SmoothAdversarialCompSum
from weightroom.losses import CompSumLoss
from weightroom.nets.small import MLP, ConvNet

SAMPLES, CLASSES = 4096, 1000


def races() -> Iterator[Race]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SAMPLES, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    peer = _step(F.cross_entropy, logits, labels)
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
        name = f"comp-sum: tau {tau:g} ({SAMPLES}, {CLASSES})"
        yield race(name, _step(CompSumLoss(tau), logits, labels), "F.cross_entropy", peer, target=1.2)
    yield race(
        f"comp-sum: tau 1.5, rho 0.5 ({SAMPLES}, {CLASSES})",
        _step(CompSumLoss(1.5, 0.5), logits, labels),
        "F.cross_entropy",
        peer,
    )
    for name, model, shape in (
        ("perceptron", MLP((784, 256, 128, 10)), (128, 1, 28, 28)),
        ("CNN", ConvNet(3, 10), (32, 3, 16, 16)),
    ):
        x, y = torch.rand(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)
        ours, theirs = (_train(objective, model, x, y) for objective in (SmoothAdversarialCompSum(eps=0.1), TRADES(eps=0.1)))
        yield race(f"comp-sum: adversarial, {name}, 10 steps", ours, "TRADES", theirs, target=1.1)


def _step(loss: Callable[..., Tensor], values: Tensor, labels: Tensor) -> Callable[[], object]:
    logits = values.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, labels), logits)


def _train(objective: AdversarialObjective, model: torch.nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(objective(model, x, y), parameters)

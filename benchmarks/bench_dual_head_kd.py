"""A training step of dual-head distillation beside one of plain distillation: the price of a second head, and of alignment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.base import Race, race
from weightroom.distill import DHKDObjective, DKDLoss, DualHead, KDObjective, SoftmaxKDLoss
from weightroom.nets.small import ResNet

CLASSES, BATCH = 100, 16


def races() -> Iterator[Race]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    teacher = ResNet(out_channels=CLASSES, width=16).eval()

    def student() -> nn.Module:
        return ResNet(out_channels=CLASSES, width=16)

    def dual(aux: str) -> nn.Module:
        return DualHead(student(), head="head", aux=aux)  # type: ignore[arg-type]

    def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        with torch.no_grad():
            soft = (teacher(x) / 4).log_softmax(1)
        kd = F.kl_div((logits / 4).log_softmax(1), soft, reduction="batchmean", log_target=True)
        return 0.1 * F.cross_entropy(logits, y) + 0.9 * 16 * kd

    peer = _step(student(), plain, x, y)
    for name, model, objective, target in (
        ("KD", student(), KDObjective(teacher, SoftmaxKDLoss(4.0), ce=0.1, kd=0.9), 1.05),
        ("DKD", student(), KDObjective(teacher, DKDLoss()), 1.05),
        ("DHKD, linear", dual("linear"), DHKDObjective(teacher), 1.05),
        ("DHKD, nonlinear", dual("nonlinear"), DHKDObjective(teacher), 1.05),
        ("DHKD, linear, aligned", dual("linear"), DHKDObjective(teacher, align=True), None),
    ):
        shape = f"ResNet-8, {BATCH} images, {CLASSES} classes"
        yield race(
            f"dual-head-kd: {name}, {shape}", _step(model, objective, x, y), "KD step by hand", peer, target=target, rounds=25
        )


def _step(
    model: nn.Module, objective: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        objective(model, x, y).backward()
        optimizer.step()

    return step

"""Maximum-intensity projections along three axes beside the voxel term, forward and backward, on a batch of two 64^3 patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.base import Race, race
from weightroom.losses.mip import FocalTverskyLoss, MIPLoss, SPOCKMIPLoss

SHAPE = (2, 1, 64, 64, 64)


def races() -> Iterator[Race]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator)
    target = (torch.rand(SHAPE, generator=generator) < 0.05).float()
    voxel = _step(FocalTverskyLoss(), logits.sigmoid(), target)
    yield race(
        "mip-loss: MIP multi",
        _step(MIPLoss(axes="multi"), logits.sigmoid(), target),
        "FocalTverskyLoss of the voxels",
        voxel,
        target=4.0,
    )
    yield race(
        "mip-loss: focal Tversky", voxel, "as published, term by term", _step(_published, logits.sigmoid(), target), target=1.0
    )
    yield race(
        "mip-loss: SPOCKMIP from logits",
        _step(SPOCKMIPLoss(), logits, target),
        "the same, put together from torch's amax",
        _step(_published_total, logits, target),
        target=1.0,
    )


def _step(loss: Callable[[Tensor, Tensor], Tensor], values: Tensor, target: Tensor) -> Callable[[], object]:
    pred = values.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(pred, target), pred)


def _published(P: Tensor, Y: Tensor, alpha: float = 0.7, gamma: float = 0.75, smooth: float = 1.0) -> Tensor:
    tp, fn, fp = (Y * P).sum(), (Y * (1 - P)).sum(), ((1 - Y) * P).sum()
    return (1 - (tp + smooth) / (tp + alpha * fn + (1 - alpha) * fp + smooth)).abs().pow(gamma)


def _published_total(logits: Tensor, Y: Tensor) -> Tensor:
    P = logits.sigmoid()
    projected = [_published(p.amax(d), y.amax(d)) for p, y in zip(P, Y, strict=True) for d in (1, 2, 3)]
    return 0.7 * _published(P, Y) + 0.3 * torch.stack(projected).sum() / len(P)

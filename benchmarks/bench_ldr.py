"""LDR-KL and ALDR-KL beside cross entropy, forward and backward, on logits of 1000 classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.base import Race, race
from weightroom.losses import ALDRKLLoss, LDRKLLoss

CLASSES = 1000


def races() -> Iterator[Race]:
    for n_samples, target in ((4096, 2.0), (1024, 3.0)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(n_samples, CLASSES, generator=generator)
        labels = torch.randint(CLASSES, (n_samples,), generator=generator)
        index = torch.randperm(n_samples, generator=generator)
        peer = _step(F.cross_entropy, logits, labels)
        shape = f"({n_samples}, {CLASSES})"
        yield race(f"ldr: LDR-KL {shape}", _step(LDRKLLoss(), logits, labels), "F.cross_entropy", peer, target=target)
        yield race(f"ldr: ALDR-KL {shape}", _step(ALDRKLLoss(n_samples), logits, labels, index), "F.cross_entropy", peer)


def _step(loss: Callable[..., Tensor], values: Tensor, *rest: Tensor) -> Callable[[], object]:
    logits = values.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, *rest), logits)

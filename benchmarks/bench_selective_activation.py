"""One pruning step, plan and mask, with AP beside the host against the host alone, on the layers of a ResNet-50 (25.5 M weights)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.base import Race, race
from benchmarks.bench_global_magnitude import resnet50, restore
from weightroom.prune import ActivateWhilePruning, GlobalMagnitudePruner


def network() -> nn.Sequential:
    """The layers with a ReLU before each but the first; they are traced, never run."""
    first, *others = resnet50()
    return nn.Sequential(first, *(part for layer in others for part in (nn.ReLU(), layer)))


def races() -> Iterator[Race]:
    model = network()
    host = GlobalMagnitudePruner(0.2)
    ap = ActivateWhilePruning(host, 0.02)
    ap.snapshot(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))

    def step(pruner: GlobalMagnitudePruner | ActivateWhilePruning) -> None:
        pruner.fit(model).apply(model)
        restore(model)

    yield race("AP beside global magnitude", lambda: step(ap), "the host alone", lambda: step(host), target=1.1, rounds=7)
    yield race(
        "AP beside global magnitude, plan only", lambda: ap.fit(model), "the host alone", lambda: host.fit(model), rounds=7
    )

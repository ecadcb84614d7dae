"""Global magnitude masks on the layers of a ResNet-50 (25.5 M weights) against torch.nn.utils.prune: time and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from benchmarks.base import Race, race
from weightroom.prune import GlobalMagnitudePruner

SPARSITY = 0.9


def resnet50() -> nn.ModuleList:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    width = 64
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [
                nn.Conv2d(width, inner, 1, bias=False),
                nn.Conv2d(inner, inner, 3, bias=False),
                nn.Conv2d(inner, 4 * inner, 1, bias=False),
            ]
            if block == 0:
                layers.append(nn.Conv2d(width, 4 * inner, 1, bias=False))
            width = 4 * inner
    return nn.ModuleList([*layers, nn.Linear(width, 1000, bias=False)])


def restore(model: nn.ModuleList) -> None:
    """Takes the masks off again, with the weights as they were."""
    for layer in model:
        if "weight_orig" in layer._parameters:
            layer._forward_pre_hooks.clear()
            weight = layer._parameters.pop("weight_orig")
            del layer._buffers["weight_mask"], layer.weight
            layer.weight = weight


def ours(model: nn.ModuleList) -> None:
    GlobalMagnitudePruner(SPARSITY).fit(model).apply(model)


def peer(model: nn.ModuleList) -> None:
    torch_prune.global_unstructured([(layer, "weight") for layer in model], torch_prune.L1Unstructured, amount=SPARSITY)


def races() -> Iterator[Race]:
    model = resnet50()

    def timed(prune):
        def call() -> None:
            prune(model)
            restore(model)

        return call

    yield race("global magnitude, 25.5 M weights", timed(ours), "prune.global_unstructured", timed(peer), target=1.0, rounds=3)
    mine, theirs = (peak(name) for name in ("ours", "peer"))
    yield Race("global magnitude, peak memory above the weights", "prune.global_unstructured", mine, theirs, 1.3, "MB")


def peak(name: str) -> float:
    """Megabytes that pruning takes beyond what the process holds before, in a process of its own."""
    code = (
        "from benchmarks import bench_global_magnitude as b; model = b.resnet50(); before = b.high_water();"
        f"b.{name}(model); print(b.high_water() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    return float(run.stdout)


def high_water() -> float:
    """The most memory this process has held, in megabytes; unlike ``ru_maxrss`` not that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

"""Cutting half of the channels out of a network: "shrink", which checks every cut, beside torch-pruning's own pruner, which does not.

Both find the same channels, those of the smallest norm, trace the network and cut; the networks that are left are timed too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.base import Race, race
from weightroom.nets.small import ResNet
from weightroom.prune import PruningPlan


def inner(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions whose outputs stay inside a residual block."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name.endswith("conv1")}


def ours(model: nn.Module, x: Tensor) -> nn.Module:
    channels = {
        name: conv.weight.detach().flatten(1).norm(dim=1).argsort()[: conv.out_channels // 2]
        for name, conv in inner(model).items()
    }
    return PruningPlan.from_channels(model, channels, example_inputs=x).apply(model, "shrink")


def theirs(model: nn.Module, x: Tensor) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(model)
    inside = set(inner(model).values())
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inside]
    torch_pruning.pruner.BasePruner(
        model, x, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=layers
    ).step()
    return model


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    model, x = ResNet(blocks=(3, 3, 3), width=16), torch.randn(1, 3, 32, 32)
    yield race(
        "ResNet-20 without half of its inner channels", lambda: ours(model, x), "torch-pruning's pruner", lambda: theirs(model, x),
        rounds=5,
    )  # fmt: skip
    small, other, batch = ours(model, x).eval(), theirs(model, x).eval(), torch.randn(64, 3, 32, 32)
    with torch.inference_mode():
        yield race("a batch of 64 in what is left", lambda: small(batch), "torch-pruning's", lambda: other(batch), target=1.1)

"""Stage-wise weight sharing: a 12-layer descendant of width 384 against 0.2 s, and against making its layers anew."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.base import Race, race
from weightroom.weights import StageSharedEncoder, build_descendant


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)


class Unshared(nn.Module):
    """A list of blocks, as a model without sharing has it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One layer after the other."""
        for layer in self.blocks:
            x = layer(x)
        return x


def seconds_to_build(aux: nn.Module, rounds: int = 11) -> float:
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        build_descendant(aux, 12)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    vit = nn.Sequential(nn.Linear(768, 384), StageSharedEncoder(block), nn.LayerNorm(384), nn.Linear(384, 1000))
    yield Race("12 layers of width 384 from 5", "0.2 s", seconds_to_build(vit), 0.2, 1.0)
    yield race("12 layers from 5", lambda: build_descendant(vit, 12), "12 new layers", lambda: Unshared(12), target=1.0, rounds=5)

    shared, unshared, x = StageSharedEncoder(block, (2, 2)), Unshared(4), torch.randn(4, 64, 384)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    yield race("forward and backward, 4 layers", lambda: step(shared), "unshared", lambda: step(unshared), target=1.1, rounds=7)

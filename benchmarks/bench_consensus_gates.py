"""One training step with gates against dense training, on a ResNet-20 for images of 32 x 32; and the network derived from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.base import Race, race
from weightroom.nets.small import ResNet
from weightroom.prune import ConsensusGatePruner

UNITS: tuple[Literal["block", "channel"], ...] = ("block", "channel")


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    dense = ResNet(blocks=(3, 3, 3))
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    peer = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, aux: Callable[[], torch.Tensor] | None) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        (loss if aux is None else loss + aux()).backward()
        optimizer.step()

    for unit in UNITS:
        wrapped = ConsensusGatePruner(unit=unit).wrap(dense, x[:1]).train()
        ours = torch.optim.SGD(wrapped.param_groups(), lr=0.01, momentum=0.9)
        yield race(
            f"training step, {unit} gates",
            lambda w=wrapped, o=ours: step(w, o, w.aux_loss),
            "dense training",
            lambda: step(peer, optimizer, None),
            target=1.15,
            rounds=7,
        )
    pruner = ConsensusGatePruner(unit="channel", gate="static")
    wrapped = pruner.wrap(dense, x[:1])
    with torch.no_grad():
        for gate in wrapped.gates:
            gate.logits[::2] = 0
        small = pruner.derive(wrapped, [x])[0].eval()
        widths = copy.deepcopy(dense).eval()
        for block in widths.stages:
            if not isinstance(block.shortcut, nn.Identity):
                continue
            width = block.conv1.out_channels
            block.conv1 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
            block.norm1 = nn.BatchNorm2d(width // 2)
            block.conv2 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        widths.eval()
        yield race(
            "inference of the derived net, half of the channels", lambda: small(x), "the same built narrower", lambda: widths(x),
            target=1.05, rounds=7,
        )  # fmt: skip

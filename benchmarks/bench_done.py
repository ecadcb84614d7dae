"""A training step of DONE against one of PGD-AT with as many attack steps: the weights and, where asked for, the implicit gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.base import Race, race
from weightroom.adversarial import DONE, PGDAT
from weightroom.nets.small import ConvNet


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    model = ConvNet(3, 10)
    x, y = torch.rand(64, 3, 16, 16), torch.randint(10, (64,))

    def step(objective: nn.Module) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            objective(model, x, y).backward()

        return call

    peer = step(PGDAT(eps=0.03))
    yield race("DONE, first order", step(DONE(eps=0.03)), "PGDAT", peer, target=1.05)
    yield race("DONE, implicit", step(DONE(eps=0.03, hypergradient="implicit")), "PGDAT", peer)

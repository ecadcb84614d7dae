"""Training steps and forward passes of a residual network with companded weights against the plain one.

The convolutions have to dominate, as they do in any real training: the compander's cost goes with the number of weights, that of
a convolution with weights times positions times samples. Here the batch has 64 images of 32 x 32 and the net 0.3 M weights. The
perceptron, whose every weight is used once per sample, shows the other end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.base import Race, race
from weightroom.nets.small import MLP, ResNet
from weightroom.weights import compand, compand_param_groups, fold


def steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(compand_param_groups(model, 1e-4, 5e-4), momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    net = ResNet(3, 10, blocks=(1, 1, 1), width=32)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    plain = copy.deepcopy(net)
    for name, arguments in {"fixed": {}, "learnable": {"learnable": True}}.items():
        ours = steps(compand(copy.deepcopy(net), **arguments), x, y)
        yield race(f"weight-compander step, {name}, 64 images", ours, "plain net", steps(plain, x, y), target=1.05, rounds=15)
    folded, plain = fold(compand(copy.deepcopy(net))).eval(), copy.deepcopy(net).eval()
    with torch.no_grad():
        yield race("weight-compander forward, folded", lambda: folded(x), "plain net", lambda: plain(x), target=1.02)
    perceptron = MLP((784, 512, 512, 10))
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    ours = steps(compand(copy.deepcopy(perceptron)), x, y)
    yield race("weight-compander step, perceptron, 128 samples", ours, "plain net", steps(perceptron, x, y))

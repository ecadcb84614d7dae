"""FTWT: what gates cost where all filters are computed, and what skipping filters brings against what its MACs promise.

With a batch the masks differ from sample to sample; what a batch can gain is the static network without the channels that no
sample chooses, and that gain is asked for. One sample can skip what it does not choose ("gather"); there the weights are gathered
anew in every pass, pooling and gates stay whole, and convolutions of odd widths are slower than their MACs say even when they are
static: those shares are shown, and what is asked for is half of the dense time for a wide network with half of its channels on.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.base import Race, measure, race
from weightroom.prune import DynamicConvBlock, DynamicMaskPruner

BATCH = 64
#: A network that skips filters should have at least so much of the speed-up that its multiply-accumulates promise.
SHARE = 0.8


def vgg(widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *[nn.MaxPool2d(2)] * (i % 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()

    def call() -> None:
        with torch.inference_mode():
            model(x)

    return call


def step(model: nn.Module, x: Tensor, groups: list[dict[str, object]], extra: Callable[[], Tensor]) -> Callable[[], object]:
    y = torch.zeros(len(x), dtype=torch.long)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def call() -> None:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + extra()).backward()
        optimizer.step()

    return call


def choose(model: nn.Module, share: float) -> None:
    """Makes every gate choose this share of its channels, the same ones for all samples."""
    generator = torch.Generator().manual_seed(0)
    for block in (m for m in model.modules() if isinstance(m, DynamicConvBlock)):
        width = block.conv.out_channels
        chosen = torch.randperm(width, generator=generator)[: round(share * width)]
        nn.init.zeros_(block.gate.linear.weight)
        block.gate.linear.bias.data.fill_(-1.0)[chosen] = 1.0


def skipping(
    name: str, sparse: Callable[[], object], dense: Callable[[], object], macs: float, target: float | None, rounds: int = 7
) -> Race:
    """Seconds as a share of the dense network's, against its share of the multiply-accumulates."""
    sparse(), dense()
    pairs = [(measure(sparse), measure(dense)) for _ in range(rounds)]
    return Race(name, "its share of the MACs", statistics.median(a / b for a, b in pairs), macs, target, "")


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    conv, bn, act = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    x = torch.randn(BATCH, 64, 16, 16)
    yield race(
        "gated block of 64 channels, all filters computed, batch of 64", forward(DynamicConvBlock(conv, bn, act), x),
        "convolution, batch norm and ReLU", forward(nn.Sequential(conv, bn, act), x), target=1.1,
    )  # fmt: skip

    dense, image = vgg(), torch.randn(BATCH, 3, 32, 32)
    wrapped = DynamicMaskPruner().wrap(dense, image[:1])
    plain = copy.deepcopy(dense)
    yield race(
        "training step of a gated VGG, batch of 64", step(wrapped, image, wrapped.param_groups(), wrapped.aux_loss),
        "training step without gates", step(plain, image, [{"params": plain.parameters()}], lambda: torch.zeros(())),
        target=1.35, rounds=3,
    )  # fmt: skip

    for size, widths, wide in ((32, (256,) * 4, True), (32, (64, 64, 128, 128, 256, 256), False)):
        dense, one = vgg(widths), torch.randn(1, 3, size, size)
        wrapped = DynamicMaskPruner(execute="gather").wrap(dense, one)
        for share in (0.7, 0.5, 0.3):
            choose(wrapped, share)
            run = forward(wrapped, one)
            run()
            macs = float(wrapped.macs(others=True, gates=True)[0] / wrapped.macs("dense", others=True)[0])
            yield skipping(
                f"skips filters, {share:.0%} of the channels of {widths}, batch of 1", run, forward(dense, one), macs, target=None
            )
            if wide and share == 0.5:
                yield race(
                    "skips half of the filters of four layers of 256, batch of 1", run,
                    "network without gates", forward(dense, one), target=0.5, rounds=7,
                )  # fmt: skip

    dense, image = vgg((256,) * 4), torch.randn(BATCH, 3, 16, 16)
    wrapped = DynamicMaskPruner().wrap(dense, image[:1])
    choose(wrapped, 0.5)
    static, _ = DynamicMaskPruner().derive(wrapped, [(image[:1],)])
    forward(wrapped, image[:1])()
    macs = float(wrapped.macs(others=True)[0] / wrapped.macs("dense", others=True)[0])
    yield skipping(
        "static network of the half of the channels that are chosen, batch of 64", forward(static, image), forward(dense, image),
        macs, target=1 / SHARE, rounds=3,
    )  # fmt: skip
    yield race(
        "dynamic network with half of the channels masked, batch of 64", forward(wrapped, image),
        "network without gates", forward(dense, image), rounds=3,
    )  # fmt: skip

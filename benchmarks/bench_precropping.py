"""PreCrop: the closed form against SynFlow for the densities, and whether a cropped network is as fast as its FLOPs promise.

Widths are multiples of 16, the block of the kernels: without that a crop of the same FLOPs is up to a third slower.
"""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.base import Race, measure, race
from weightroom.nets.small import ResNet
from weightroom.prune import PreCrop, layerwise_density

BATCH = 64
#: A crop should be at least so much of the speed-up that its FLOPs promise.
SHARE = 0.8


def vgg(widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *[nn.MaxPool2d(2)] * (i % 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def speed_up(name: str, dense: Callable[[], object], small: Callable[[], object], flops: float, rounds: int = 5) -> Race:
    """Seconds of the crop as a share of the dense network's, against its share of the FLOPs."""
    dense(), small()
    pairs = [(measure(small), measure(dense)) for _ in range(rounds)]
    return Race(name, "its share of the FLOPs", statistics.median(a / b for a, b in pairs), flops, 1 / SHARE, "")


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(model).eval()

    def call() -> None:
        with torch.inference_mode():
            model(x)

    return call


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model, y = copy.deepcopy(model), torch.zeros(len(x), dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return call


def onnx(model: nn.Module, x: Tensor) -> Callable[[], object]:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(copy.deepcopy(model).eval(), (x,), file, dynamo=False, input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    array = np.ascontiguousarray(x.numpy())
    return lambda: session.run(None, {"x": array})


def races() -> Iterator[Race]:
    torch.manual_seed(0)
    resnet, image = ResNet(blocks=(3, 3, 3)), torch.randn(1, 3, 32, 32)
    yield race(
        "layer-wise densities of a ResNet-20", lambda: layerwise_density(resnet, params=0.2),
        "100 rounds of SynFlow", lambda: layerwise_density(resnet, image, params=0.2, method="synflow"), target=1e-3, rounds=3,
    )  # fmt: skip
    x = torch.randn(BATCH, 3, 16, 16).to(memory_format=torch.channels_last)
    dense = vgg().to(memory_format=torch.channels_last)
    whole = PreCrop(1.0).fit(dense, x).flops
    plan = PreCrop(flops=0.25, round_to=16).fit(dense, x)
    small = plan.build(dense, seed=0).to(memory_format=torch.channels_last)
    share = plan.flops / whole
    yield speed_up("forward pass of a crop to a quarter of the FLOPs, batch of 64", forward(dense, x), forward(small, x), share)
    yield speed_up("training step of the same crop, batch of 64", step(dense, x), step(small, x), share)
    uniform = PreCrop(flops=0.25, method="uniform", round_to=16).fit(dense, x).build(dense, seed=0)
    yield race(
        "training step of the crop, batch of 64", step(small, x),
        "one share of all widths, equal FLOPs", step(uniform.to(memory_format=torch.channels_last), x), target=1.2, rounds=5,
    )  # fmt: skip
    try:
        import onnx as _onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError:
        return
    yield speed_up("the same forward pass in ONNX Runtime", onnx(dense, x), onnx(small, x), share)

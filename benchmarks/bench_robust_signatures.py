"""Robust weight signatures of VGG-16: extract, patch and take off; the peer is a dictionary merged and loaded by hand, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.base import Race, measure, race
from weightroom.weights import RobustWeightSignature, patch

#: Seconds that extracting and patching may take.
LIMIT_S = 0.2
_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def vgg16() -> nn.Module:
    torch.manual_seed(0)
    convolutions = [layer for a, b in pairwise(_WIDTHS) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def races() -> Iterator[Race]:
    pre = vgg16()
    standard, robust = copy.deepcopy(pre), copy.deepcopy(pre)
    with torch.no_grad():
        for model in (standard, robust):
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
    start, clean, corrupted = (model.state_dict() for model in (pre, standard, robust))
    for layers in (7, 13):
        names = [f"{2 * i}.{kind}" for i in range(layers) for kind in ("weight", "bias")]

        def ours(layers: int = layers) -> Tensor:
            with patch(standard, RobustWeightSignature.extract(pre, standard, robust, layers)):
                return clean["0.weight"]

        def peer(names: list[str] = names) -> Tensor:
            patched = dict(clean)
            for name in names:
                d_c, d_std = corrupted[name] - start[name], clean[name] - start[name]
                patched[name] = clean[name] + d_c - (d_c * d_std).sum() / (d_std * d_std).sum() * d_std
            before = copy.deepcopy(clean)
            standard.load_state_dict(patched)
            standard.load_state_dict(before)
            return patched["0.weight"]

        yield race(f"VGG-16, {layers} layers: extract, patch, remove", ours, "by hand, all tensors copied", peer, rounds=5)
        yield Race(f"VGG-16, {layers} layers: seconds", "the limit", measure(ours), LIMIT_S, 1.0 if layers == 7 else None)
    signature = RobustWeightSignature.extract(pre, standard, robust, 7)
    full = sum(t.nbytes for t in clean.values())
    small = signature.quantize(16)
    yield Race("VGG-16, 7 layers at 16 levels: size", "a 13th of a full copy", small.nbytes / 1e6, full / 13e6, 1.0, unit="MB")
    with TemporaryDirectory() as folder:
        path = f"{folder}/signature.safetensors"
        yield race("VGG-16, 7 layers: quantise and save", lambda: signature.quantize(16).save(path), "torch.save of the floats",
                   lambda: torch.save(dict(signature), path), rounds=3)  # fmt: skip

"""Corrupted inputs: seeded shifts of images and tables that leave the labels true.

Images (N, C, H, W), as strong as the severest level of ImageNet-C or about so (Hendrycks and Dietterich, ICLR 2019), in units in
which the inputs lie in [0, 1]: "noise" (normal, 0.5), "blur" (Gaussian, one pixel), "contrast" (a fifth of it, about the mean of
each channel), "brightness" (plus 0.5) and "fog" (0.4 of the image and a white that grows to 0.6 at the bottom). Tables (N, F), in
units in which each feature has mean 0 and variance 1: "noise" (normal, 1) and "dropout" (each value is 0 with probability a half).
"""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from weightroom.data.spoil import gather
from weightroom.errors import UsageError, unknown

__all__ = ["corrupt", "corrupted", "corruptions"]

_IMAGES = ("noise", "blur", "contrast", "brightness", "fog")
_TABLES = ("noise", "dropout")


def corruptions(x: Tensor) -> tuple[str, ...]:
    """Returns the names of the corruptions for a batch of inputs: images (N, C, H, W) or rows of a table (N, F).

    Raises:
        UsageError: the inputs are neither, or not floating point.
    """
    if x.ndim not in (2, 4) or not x.is_floating_point():
        raise UsageError(
            f"corruptions need images (N, C, H, W) or rows (N, F) of floats, got {x.dtype} of shape {tuple(x.shape)}"
        )
    return _IMAGES if x.ndim == 4 else _TABLES


def corrupt(
    x: Tensor, kind: str, *, generator: torch.Generator | None = None, offset: Tensor | float = 0.0, scale: Tensor | float = 1.0
) -> Tensor:
    """Returns the inputs corrupted; ``x`` is left as it is.

    Args:
        x: images (N, C, H, W) or rows (N, F), of any floating-point dtype.
        kind: one of ``corruptions(x)``.
        generator: of the random numbers, on the CPU; the global one when None.
        offset: (x - offset) / scale are the units of the module: for images the least value that an input can have, for tables
            the mean of each feature.
        scale: for images the range of the values, for tables the standard deviation of each feature.

    Raises:
        UsageError: there is no such corruption for such inputs.
    """
    if kind not in (known := corruptions(x)):
        raise unknown("corruption", kind, known)
    z = (x - offset) / scale
    if z.ndim == 2:
        random = torch.rand if kind == "dropout" else torch.randn
        drawn = random(z.shape, generator=generator, dtype=torch.float32).to(z)
        z = z + drawn if kind == "noise" else z * (drawn < 0.5)
    elif kind == "noise":
        z = (z + 0.5 * torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z)).clamp(0, 1)
    elif kind == "blur":
        z = _blur(z)
    elif kind == "contrast":
        mean = z.mean((2, 3), keepdim=True)
        z = mean + 0.2 * (z - mean)
    elif kind == "brightness":
        z = (z + 0.5).clamp(0, 1)
    else:
        z = 0.4 * z + 0.6 * torch.linspace(0, 1, z.shape[2]).to(z)[:, None]
    return z * scale + offset


def corrupted(
    dataset: Dataset, kind: str, *, seed: int = 0, offset: Tensor | float = 0.0, scale: Tensor | float = 1.0
) -> TensorDataset:
    """Returns a data set with every input corrupted once, in memory; a sample's other fields stay.

    Args:
        dataset: has ``len()`` and indexing; its samples are (input, ...).
        kind: as for ``corrupt``, like the rest.
        seed: decides the random numbers.
        offset: see ``corrupt``.
        scale: see ``corrupt``.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for indices in torch.arange(len(cast(Sized, dataset))).split(1024):
        x, *rest = gather(dataset, indices)
        parts.append([corrupt(x, kind, generator=generator, offset=offset, scale=scale), *rest])
    return TensorDataset(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _blur(z: Tensor) -> Tensor:
    """Gaussian of one pixel, cut off at three; beyond the border the image goes on with its last row or column."""
    at = torch.arange(-3.0, 4.0).to(z)
    kernel = torch.exp(-at.square() / 2)
    kernel = (kernel / kernel.sum()).expand(z.shape[1], 1, 1, 7)
    z = F.conv2d(F.pad(z, (3, 3, 0, 0), mode="replicate"), kernel, groups=z.shape[1])
    return F.conv2d(F.pad(z, (0, 0, 3, 3), mode="replicate"), kernel.transpose(2, 3), groups=z.shape[1])

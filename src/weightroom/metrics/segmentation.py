"""Metrics of segmentations: overlap, overlap of centre lines and of projections, and connectedness.

Every metric takes two masks of shape (B, C, \\*spatial), boolean or of zeros and ones (threshold logits first: ``logits > 0``),
and returns one value for each sample and channel: shape (B, C), float64.

**Empty masks.** A ratio whose denominator is 0 (Dice of two empty masks, precision where nothing was predicted, recall where
there is nothing to find) has no value of its own. ``empty`` says which it gets: 1 by default (nothing was got wrong), 0 (nothing
was got right), or NaN to leave such samples out with ``nanmean``. A ratio that is defined is not touched. Counts of components
need no such rule: an empty mask has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

__all__ = ["cl_dice", "component_difference", "components", "dice", "mip_dice", "precision", "recall", "skeleton"]


def dice(pred: Tensor, target: Tensor, *, empty: float = 1.0) -> Tensor:
    """2 |P and Y| / (|P| + |Y|); undefined where both are empty."""
    P, Y = _masks(pred, target, empty)
    return _ratio(2 * _count(P & Y), _count(P) + _count(Y), empty)


def precision(pred: Tensor, target: Tensor, *, empty: float = 1.0) -> Tensor:
    """Share of the voxels found that are right, |P and Y| / |P|; undefined where P is empty."""
    P, Y = _masks(pred, target, empty)
    return _ratio(_count(P & Y), _count(P), empty)


def recall(pred: Tensor, target: Tensor, *, empty: float = 1.0) -> Tensor:
    """Share of the right voxels that are found, |P and Y| / |Y|; undefined where Y is empty."""
    P, Y = _masks(pred, target, empty)
    return _ratio(_count(P & Y), _count(Y), empty)


def mip_dice(pred: Tensor, target: Tensor, *, axes: Sequence[int] | None = None, empty: float = 1.0) -> Tensor:
    """Mean over axes of the Dice of the maximum-intensity projections.

    Args:
        pred: mask with at least two spatial dimensions.
        target: mask of the same shape.
        axes: spatial dimensions to project along, counted from 0; all of them when None.
        empty: the value of a projection that is empty in both.

    Raises:
        ValueError: an axis is outside the spatial dimensions; and as the other metrics.
    """
    P, Y = _masks(pred, target, empty)
    chosen = tuple(range(P.ndim - 2)) if axes is None else tuple(axes)
    if P.ndim < 4 or not chosen or not all(0 <= axis < P.ndim - 2 for axis in chosen):
        raise ValueError(f"axes must be among the spatial dimensions 0 to {P.ndim - 3} of at least two, got {axes}")
    return torch.stack([dice(P.amax(axis + 2), Y.amax(axis + 2), empty=empty) for axis in chosen]).mean(0)


def cl_dice(pred: Tensor, target: Tensor, *, empty: float = 1.0) -> Tensor:
    """clDice: harmonic mean of the share of P's skeleton inside Y and of Y's skeleton inside P (two or three dimensions).

    Shit et al., "clDice", CVPR 2021, arXiv 2003.07311, with the morphological skeleton of its Algorithm 1. It is 0 where only one
    mask is empty, and undefined where both are.
    """
    P, Y = _masks(pred, target, empty)
    skeleton_p, skeleton_y = skeleton(P), skeleton(Y)
    t_prec = _ratio(_count(skeleton_p & Y), _count(skeleton_p), 0.0)
    t_sens = _ratio(_count(skeleton_y & P), _count(skeleton_y), 0.0)
    value = _ratio(2 * t_prec * t_sens, t_prec + t_sens, 0.0)
    return torch.where(_count(P) + _count(Y) == 0, empty, value)


def component_difference(pred: Tensor, target: Tensor) -> Tensor:
    """|beta0(P) - beta0(Y)|, the connected components too many or too few (see :func:`components`). Lower is better."""
    P, Y = _masks(pred, target, 1.0)
    return (components(P) - components(Y)).abs()


def components(mask: Tensor) -> Tensor:
    """Number of connected components, shape (B, C), float64; diagonal neighbours touch (8 in the plane, 26 in space).

    Computed on the CPU, one volume after the other.
    """
    volumes = _mask("mask", mask).cpu().numpy()
    touch = ndimage.generate_binary_structure(volumes.ndim - 2, volumes.ndim - 2)
    counts = [[float(ndimage.label(channel, touch)[1]) for channel in sample] for sample in volumes]
    return torch.tensor(counts, dtype=torch.float64, device=mask.device).reshape(mask.shape[:2])


def skeleton(mask: Tensor) -> Tensor:
    """Morphological skeleton, boolean, of the mask's shape: over all erosions, what an opening removes (2 or 3 dimensions).

    Erosion takes the minimum over the voxel and its 4 (in space 6) neighbours, dilation the maximum over all 9 (27); outside the
    volume there is no evidence against the mask. The skeleton lies inside the mask and is empty only where the mask is; it need
    not be connected or one voxel wide.
    """
    left = _mask("mask", mask)
    if left.ndim not in (4, 5):
        raise ValueError(f"mask must have 2 or 3 spatial dimensions, got shape {tuple(mask.shape)}")
    found = torch.zeros_like(left)
    while bool(left.any()):
        eroded = _erode(left)
        if torch.equal(eroded, left):  # a full volume: no erosion empties it
            return found | left
        found |= left & ~_dilate(eroded)
        left = eroded
    return found


def _erode(mask: Tensor) -> Tensor:
    kernels = ((3, 1), (1, 3)) if mask.ndim == 4 else ((3, 1, 1), (1, 3, 1), (1, 1, 3))
    outside = (~mask).float()
    return torch.stack([_pool(outside, kernel) == 0 for kernel in kernels]).all(0)


def _dilate(mask: Tensor) -> Tensor:
    return _pool(mask.float(), (3,) * (mask.ndim - 2)) > 0


def _pool(values: Tensor, kernel: tuple[int, ...]) -> Tensor:
    pool = F.max_pool2d if values.ndim == 4 else F.max_pool3d
    return pool(values, kernel, stride=1, padding=tuple(k // 2 for k in kernel))


def _count(mask: Tensor) -> Tensor:
    return mask.flatten(2).sum(-1).double()


def _ratio(above: Tensor, below: Tensor, empty: float) -> Tensor:
    return torch.where(below == 0, empty, above / below)


def _masks(pred: Tensor, target: Tensor, empty: float) -> tuple[Tensor, Tensor]:
    if not (0 <= empty <= 1 or empty != empty):
        raise ValueError(f"empty must be in [0, 1] or NaN, got {empty}")
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have the same shape, got {tuple(pred.shape)} and {tuple(target.shape)}")
    return _mask("pred", pred), _mask("target", target)


def _mask(name: str, mask: Tensor) -> Tensor:
    if mask.ndim < 3:
        raise ValueError(f"{name} must have shape (B, C, *spatial), got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    true = mask != 0
    if not torch.equal(true.to(mask.dtype), mask):
        raise ValueError(f"{name} must be a mask of 0 and 1, got other values: threshold it first, e.g. logits > 0")
    return true

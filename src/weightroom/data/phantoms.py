"""Phantoms: seeded images whose ground truth is known because it was drawn first.

Each sample is decided by (seed, index) alone: the first ten of a hundred are the ten that a call for ten returns, and no global
random state is read or changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from weightroom.errors import UsageError

__all__ = ["vessels"]

Array = NDArray[np.float64]


def vessels(
    n: int,
    size: int = 32,
    seed: int = 0,
    *,
    tubes: int = 5,
    radii: Sequence[float] = (0.6, 1.0, 1.6),
    amplitude: tuple[float, float] = (0.5, 1.0),
    dropouts: int = 2,
    dropout_length: float = 8.0,
    dropout_factor: float = 0.35,
    bend: float = 0.25,
    blur: float = 0.6,
    noise: float = 0.35,
) -> tuple[Tensor, Tensor]:
    """Returns noisy volumes of curved tubes that fade in places, and the tubes themselves.

    A tube's centre line is a parabola through a random point of the volume, long enough to leave it on both sides. The voxels
    that hold a point of the line belong to the tube, and those whose centre is within the radius: however thin, a tube is whole
    under 26-neighbourhood (it may leave the volume and come back as a second piece). In a drop-out the tube is still labelled,
    but hardly brighter than the noise: this is where a segmentation breaks.

    Args:
        n: number of volumes.
        size: voxels along each side.
        seed: with the volume's index decides everything about it.
        tubes: tubes in each volume.
        radii: a tube's radius in voxels is one of these.
        amplitude: a tube's brightness is uniform between these; the background is 0.
        dropouts: drop-outs of each tube, at random places inside the volume; they may overlap.
        dropout_length: arc length of a drop-out in voxels.
        dropout_factor: brightness inside a drop-out, as a share of the tube's.
        bend: the centre line departs from a straight line by up to this share of ``size`` at half a ``size`` from its point.
        blur: standard deviation in voxels of the Gaussian that blurs the brightness.
        noise: standard deviation of the Gaussian noise added at last.

    Returns:
        Images and labels (0 and 1), both float32 of shape (n, 1, size, size, size).

    Raises:
        UsageError: an argument is out of its range.
    """
    for name, count, low in (("n", n, 0), ("size", size, 1), ("seed", seed, 0), ("tubes", tubes, 0), ("dropouts", dropouts, 0)):
        if count < low:
            raise UsageError(f"{name} must be >= {low}, got {count}")
    for name, value in (("dropout_length", dropout_length), ("bend", bend), ("blur", blur), ("noise", noise)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} must be >= 0 and finite, got {value}")
    if not radii or min(radii) < 0:
        raise UsageError(f"radii must be at least one number >= 0, got {tuple(radii)}")
    if not 0 <= amplitude[0] <= amplitude[1]:
        raise UsageError(f"amplitude must be two numbers, 0 <= low <= high, got {amplitude}")
    images = np.empty((n, 1, size, size, size), dtype=np.float32)
    labels = np.zeros_like(images)
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        bright = np.zeros((size, size, size))
        for _ in range(tubes):
            line = _parabola(rng, size, bend)
            shine = np.full(len(line), rng.uniform(*amplitude))
            radius = rng.choice(np.asarray(radii, dtype=float))
            shine[_stretches(rng, line, size, dropouts, dropout_length)] *= dropout_factor
            voxels, nearest = _tube(line, radius, size)
            labels[index, 0][voxels] = 1
            bright[voxels] = np.maximum(bright[voxels], shine[nearest])
        images[index, 0] = ndimage.gaussian_filter(bright, blur) + noise * rng.standard_normal(bright.shape)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _parabola(rng: np.random.Generator, size: int, bend: float) -> Array:
    """Points a quarter of a voxel or less apart on p + t u + k t^2 v, with v perpendicular to u."""
    point = rng.uniform(0, size - 1, 3)
    u, v = np.linalg.qr(rng.standard_normal((3, 2)))[0].T
    k = rng.uniform(-bend, bend) * 4 / size
    reach = math.sqrt(3) * size
    slope = math.hypot(1, 2 * k * reach)  # the fastest the point moves with t
    t = np.linspace(-reach, reach, math.ceil(8 * reach * slope) + 1)[:, None]
    return point + t * u + k * t**2 * v


def _stretches(rng: np.random.Generator, line: Array, size: int, count: int, length: float) -> NDArray[np.bool_]:
    """Which points lie in one of ``count`` stretches of the arc, each centred at a random point inside the volume."""
    arc = np.concatenate(([0.0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()))
    inside = np.flatnonzero(((line > -0.5) & (line < size - 0.5)).all(1))
    centres = arc[rng.choice(inside, count)]
    return (np.abs(arc[:, None] - centres) <= length / 2).any(1)


def _tube(line: Array, radius: float, size: int) -> tuple[tuple[NDArray[np.intp], ...], NDArray[np.intp]]:
    """The voxels on the line or within ``radius`` of it, each once, and the point of the line nearest to each."""
    steps = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    around = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    home = np.rint(line).astype(np.intp)
    voxels = home[:, None] + around
    distance = np.linalg.norm(voxels - line[:, None], axis=-1)
    belongs = ((distance <= radius) | ~around.any(1)) & ((voxels >= 0) & (voxels < size)).all(-1)
    point = np.broadcast_to(np.arange(len(line))[:, None], belongs.shape)[belongs]
    order = np.argsort(distance[belongs], kind="stable")
    flat, first = np.unique(np.ravel_multi_index(tuple(voxels[belongs][order].T), (size,) * 3), return_index=True)
    return np.unravel_index(flat, (size,) * 3), point[order][first]

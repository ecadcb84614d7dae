"""Global magnitude pruning with a minimum threshold (Global MP, MT), and the pruners that it must be compared with.

Remove the smallest weights of the whole network and fine-tune with the zeros held fast. Reach for it first: it needs no data,
takes a second, and no new pruner is worth having that does not beat it. The companions are the other baselines of every
pruning study: uniform magnitude, Erdos-Renyi-kernel (ERK) densities, layer-adaptive magnitude (LAMP), and random removal.

"Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning", Gupta, Camci et al., arXiv
2209.14624 (steps A and B below are its sections on Global MP and on the minimum threshold, in the form of the authors' code).
ERK: Evci et al., ICML 2020, arXiv 1911.11134, section 3.1 (1). LAMP: Lee et al., ICLR 2021, arXiv 2010.07611, eq. (2).

Known not to work: without a floor the smallest-scaled layer goes first, and at extreme sparsity (from about 98 % on a small
perceptron) it is left with a handful of weights or none, after which nothing can be fine-tuned; ``min_fraction`` helps, and is
no full cure. Well before that point LAMP and ERK are better at small scale. Zeros speed nothing up on dense hardware. With a
floor, masks at successive sparsities need not nest (the other pruners' do). The authors' code keeps the weight that equals the
threshold and so removes one too few; here exactly ``round(S N)`` weights go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from weightroom.prune.base import (
    PRUNABLE,
    PlanPruner,
    ScheduleSpec,
    alive_magnitudes,
    apportion,
    check_finite,
    lamp_scores,
    magnitudes,
    remove_smallest,
)
from weightroom.prune.plan import Site

__all__ = [
    "ERKPruner",
    "GlobalMagnitudePruner",
    "LAMPPruner",
    "RandomPruner",
    "UniformMagnitudePruner",
    "global_keep_counts",
    "minimum_threshold_sparsities",
]


class MagnitudePruner(PlanPruner):
    """A pruner that ranks by :math:`|w|`."""

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        return [magnitudes(site) for site in tensors]


class GlobalMagnitudePruner(MagnitudePruner):
    r"""Removes the weights of least magnitude of the whole network, if asked with a minimum kept in every layer.

    Without a floor: the :math:`\mathrm{round}(S N)` smallest :math:`|w|` go, ties by layer, then by flat index. With a floor
    of T weights (MT): the layer sparsities :math:`s_l` of that ranking become :math:`\min(c\, s_l, 1 - T/n_l)`, 0 for layers
    of T weights or fewer, with the c that meets S; then every layer is pruned by its own magnitudes.

    Args:
        sparsity: S, in [0, 1).
        min_weights: T, the number of weights that every layer keeps at least.
        min_fraction: T as a share of all prunable weights of the network, in [0, 1); the authors' ``mt`` is this in percent,
            0.05 by default.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``; ("cubic", t0, t1, every) is gradual Global MP.

    Raises:
        ValueError: an argument is out of range, or both floors are given; from ``fit`` also where the floors of all layers
            together need more weights than the sparsity leaves.

    Example::

        plan = GlobalMagnitudePruner(0.98, min_fraction=0.0005).fit(model)
        plan.apply(model)                                   # fine-tune as usual: the zeros stay zero
    """

    def __init__(
        self,
        sparsity: float,
        *,
        min_weights: int | None = None,
        min_fraction: float | None = None,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        if min_weights is not None and min_fraction is not None:
            raise ValueError(f"give min_weights or min_fraction, not both: got {min_weights} and {min_fraction}")
        if min_weights is not None and (min_weights < 0 or min_weights != int(min_weights)):
            raise ValueError(f"min_weights must be an integer >= 0, got {min_weights}")
        if min_fraction is not None and not 0 <= min_fraction < 1:
            raise ValueError(f"min_fraction must be in [0, 1), got {min_fraction}")
        self.min_weights, self.min_fraction = min_weights, min_fraction

    def _select(self, tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
        keep = super()._select(tensors, scores, removed)  # A
        sizes = [score.numel() for score in scores]
        floor = int(self.min_weights or 0) if self.min_fraction is None else int(self.min_fraction * sum(sizes))  # B.1
        if floor == 0:
            return keep
        gone = [0 if site.mask is None else site.mask.numel() - int(torch.count_nonzero(site.mask)) for site in tensors]
        _check_floor(sizes, gone, floor, removed, self.sparsity)
        s, _ = _rescale(sizes, [1 - int(torch.count_nonzero(mask)) / mask.numel() for mask in keep], removed, floor, gone)
        counts = _whole(sizes, s, removed, floor, gone)
        return [
            remove_smallest([score], [site.mask], count)[0] for score, site, count in zip(scores, tensors, counts, strict=True)
        ]  # B.5


class UniformMagnitudePruner(MagnitudePruner):
    """Removes the same share of every layer, by magnitude; counts are rounded so that the total is exact and masks nest.

    Args and errors as for ``PlanPruner``.
    """

    def _select(self, tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
        return _by_quota([score.numel() for score in scores], tensors, scores, removed)


class ERKPruner(MagnitudePruner):
    r"""Removes by magnitude within layers whose densities follow Erdos-Renyi-kernel.

    A layer keeps weights in proportion to the sum of its dimensions, for a convolution
    :math:`c_{out} + c_{in} + \sum_i k_i`, up to all of them: small layers stay dense, large ones become sparse.

    Args and errors as for ``PlanPruner``.
    """

    def _select(self, tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
        return _by_quota([sum(score.shape) for score in scores], tensors, scores, removed)


class LAMPPruner(PlanPruner):
    r"""Ranks the whole network by the LAMP score: a weight's share of the squares not smaller than its own in its layer.

    :math:`\mathrm{score}(u) = w_u^2 / \sum_{v:\, |w_v| \ge |w_u|} w_v^2`. The largest weight of a layer scores 1, so that no
    layer is wiped out before all others are down to one weight, and a layer's scale does not matter.

    Args and errors as for ``PlanPruner``.
    """

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        return [lamp_scores(alive_magnitudes(site)) for site in tensors]


class RandomPruner(PlanPruner):
    """Removes weights at random, all equally likely: what any criterion must beat.

    The same seed gives the same ranking whatever the sparsity, so that masks nest.

    Args:
        sparsity: see ``PlanPruner``.
        seed: decides which weights go, independent of the device and of torch's global random state.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        seed: int = 0,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        self.seed = seed

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.rand(site.tensor.shape, generator=generator, dtype=torch.float64).to(site.tensor.device) for site in tensors
        ]


@overload
def global_keep_counts(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, int]: ...
@overload
def global_keep_counts(weights: Sequence[Tensor], sparsity: float) -> list[int]: ...
def global_keep_counts(weights: Mapping[str, Tensor] | Sequence[Tensor], sparsity: float) -> dict[str, int] | list[int]:
    """How many weights each tensor keeps when the ``round(sparsity * N)`` smallest of all N go.

    Args:
        weights: tensors of any shape, or a mapping of name -> tensor.
        sparsity: in [0, 1).

    Returns:
        The counts, in a list or under the names given.

    Raises:
        ValueError: the sparsity is out of range, there is no weight, or one is NaN or infinite.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    names = list(weights) if isinstance(weights, Mapping) else list(range(len(weights)))
    tensors = [weight.detach().abs() for weight in (weights.values() if isinstance(weights, Mapping) else weights)]
    if not sum(tensor.numel() for tensor in tensors):
        raise ValueError("weights must hold at least one weight")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.numel():
            check_finite(f"weights[{name!r}]", tensor)
    scores = [tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor for tensor in tensors]
    masks = remove_smallest(scores, [None] * len(scores), round(sparsity * sum(score.numel() for score in scores)))
    counts = [int(torch.count_nonzero(mask)) for mask in masks]
    return dict(zip(weights, counts, strict=True)) if isinstance(weights, Mapping) else counts


def minimum_threshold_sparsities(
    sizes: Sequence[int], sparsities: Sequence[float], target: float, floor: int
) -> tuple[np.ndarray, float]:
    r"""Layer sparsities that keep a minimum in every layer and meet the target exactly.

    The fixed point of the authors' rescaling loop, without the loop:
    :math:`s_l = \min(c\, s_l^0, 1 - T / n_l)`, 0 where :math:`n_l \le T`, with c such that :math:`\sum_l n_l s_l = S N`.
    Where no c does that because only the layers with :math:`s_l^0 = 0` have weights to spare, these share the rest evenly and
    c is infinite.

    Args:
        sizes: :math:`n_l`.
        sparsities: :math:`s_l^0`, in [0, 1]; those of the global ranking.
        target: S, in [0, 1).
        floor: T, the number of weights to keep in each layer.

    Returns:
        (s, c): the sparsities, float64 of shape (n_layers,), and the factor.

    Raises:
        ValueError: the arguments do not fit together, or T weights in every layer are more than S leaves.
    """
    if not 0 <= target < 1:
        raise ValueError(f"target must be in [0, 1), got {target}")
    if floor < 0:
        raise ValueError(f"floor must be >= 0, got {floor}")
    n, s = np.asarray(sizes, dtype=np.float64), np.asarray(sparsities, dtype=np.float64)
    if n.ndim != 1 or n.shape != s.shape or not len(n):
        raise ValueError(f"sizes and sparsities must be sequences of one length, got shapes {n.shape} and {s.shape}")
    if n.min() < 1 or s.min() < 0 or s.max() > 1:
        raise ValueError("sizes must be >= 1 and sparsities in [0, 1]")
    _check_floor(sizes, [0] * len(n), floor, target * n.sum(), target)
    return _rescale(sizes, sparsities, target * n.sum(), floor, [0] * len(n))


def _check_floor(sizes: Sequence[int], gone: Sequence[int], floor: int, removed: float, sparsity: float) -> None:
    needed, left = sum(min(floor, n - g) for n, g in zip(sizes, gone, strict=True)), sum(sizes) - removed
    if needed > left + 1e-6:
        raise ValueError(
            f"keeping at least {floor} weights in each of {len(sizes)} layers needs {needed} weights, "
            f"but sparsity {sparsity:g} leaves {math.floor(left + 1e-6)}"
        )


def _bounds(sizes: Sequence[int], floor: int, gone: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Fewest and most weights that may go from each layer."""
    low = np.asarray(gone, dtype=np.float64)
    return low, np.maximum(low, np.asarray(sizes, dtype=np.float64) - floor)


def _rescale(
    sizes: Sequence[int], sparsities: Sequence[float], removed: float, floor: int, gone: Sequence[int]
) -> tuple[np.ndarray, float]:
    """B.2-4: n_l s_l = c n_l s_l^0 within its bounds, by the break points of a piecewise linear function of c."""
    n = np.asarray(sizes, dtype=np.float64)
    low, high = _bounds(sizes, floor, gone)
    base = n * np.asarray(sparsities, dtype=np.float64)

    def solve(base: np.ndarray, total: float) -> tuple[np.ndarray, float]:
        grows = base > 0
        points = np.unique(np.concatenate([[0.0], low[grows] / base[grows], high[grows] / base[grows]]))
        sums = np.array([np.clip(c * base, low, np.where(grows, high, low)).sum() for c in points])
        if sums[-1] < total - 1e-9 * n.sum():
            return np.where(grows, high, low), math.inf
        after = min(int(np.searchsorted(sums, total)), len(points) - 1)
        c = points[after]
        if after and sums[after] > sums[after - 1]:
            c = points[after - 1] + (total - sums[after - 1]) * (points[after] - points[after - 1]) / (
                sums[after] - sums[after - 1]
            )
        return np.clip(c * base, low, np.where(grows, high, low)), float(c)

    goes, c = solve(base, removed)
    if math.isinf(c):
        rest = solve(np.where(base > 0, 0.0, n), removed - float((goes - low)[base > 0].sum()))[0]
        goes = np.where(base > 0, goes, rest)
    return goes / n, c


def _whole(sizes: Sequence[int], s: np.ndarray, removed: int, floor: int, gone: Sequence[int]) -> list[int]:
    """Whole numbers of weights to remove, in all exactly ``removed``: largest remainders, within the bounds."""
    exact = np.asarray(sizes) * s
    counts = np.floor(exact + 1e-6).astype(np.int64)
    room = _bounds(sizes, floor, gone)[1].astype(np.int64) - counts
    missing = removed - int(counts.sum())
    for i in np.argsort(-(exact - counts), kind="stable"):
        if missing > 0 and room[i] > 0:
            counts[i] += 1
            missing -= 1
    return [int(count) for count in counts]


def _by_quota(quotas: Sequence[float], tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
    sizes = [score.numel() for score in scores]
    caps = [size if site.mask is None else int(torch.count_nonzero(site.mask)) for size, site in zip(sizes, tensors, strict=True)]
    kept = apportion(quotas, caps, sum(sizes) - removed)
    return [
        remove_smallest([score], [site.mask], size - count)[0]
        for score, site, size, count in zip(scores, tensors, sizes, kept, strict=True)
    ]

r"""How much to remove from each layer when every amount has a price: an exact knapsack by dynamic programming.

Each layer chooses one amount from a grid, at the distortion that a curve says, and the amounts together must remove a given
number of weights at the least summed distortion (a multiple-choice knapsack). The table of the textbook,
:math:`T_l(b) = \min_a T_{l-1}(b - \lfloor a n_l \rfloor) + D_l(a)`, has a column per weight of the network. Here a row holds only
the entries that can still lead to the optimum: no other entry removes as much for less, and a Lagrangian lower bound of what is
left to pay does not exceed the best complete answer found so far. That is the same minimum to the weight, with memory that does
not grow with the size of the network.

Xu, Wang et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", ICCV 2023, arXiv
2308.10438 (the recursion); Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995 (the bounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weightroom.errors import check_range

__all__ = ["allocate_counts", "allocate_dp", "amounts_of", "removed_counts"]

#: Entries per row, sweep by sweep: the narrow ones find a good answer fast, with which a wider one has little left to look at.
_WIDTHS = (1 << 8, 1 << 11, 1 << 14)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def allocate_dp(
    curves: ArrayLike,
    sizes: Sequence[int],
    sparsity: float,
    grid: int | Sequence[float],
    prev: Sequence[float] | None = None,
    *,
    max_layer_sparsity: float = 1.0,
) -> Floats:
    r"""The amounts of least summed distortion that reach a sparsity.

    .. math:: \min_a \sum_l D_l(a_l) \quad \text{subject to} \quad \sum_l \lfloor a_l n_l \rfloor \ge S \sum_l n_l

    The minimum is exact as long as no row of the dynamic programme holds more than 16,384 entries that nothing rules out (never
    with fewer weights than that; with curves that come near convexity not with any number), and near it otherwise. Of several
    answers of one cost no layer can be lowered alone.

    Args:
        curves: :math:`D_l(a)`, finite, of shape (L, P + 1); they need not rise.
        sizes: :math:`n_l`, the number of weights of each layer.
        sparsity: S, in [0, 1).
        grid: P, for the amounts 0, 1/P, ..., 1, or the amounts themselves, rising from 0 to at most 1.
        prev: amounts that are gone already, which no layer may go below. Where one is not on the grid it is a choice all the
            same, at the distortion of the amount next below it (in a network that is masked so far, both are 0).
        max_layer_sparsity: no layer goes beyond this amount, unless ``prev`` does.

    Returns:
        :math:`a_l`, float64 of shape (L,); ``prev`` as it is where that reaches the sparsity already.

    Raises:
        ValueError: an argument is out of range or does not fit the others, or the sparsity cannot be reached; the message
            names the largest that can.
    """
    D, amounts, n = np.asarray(curves, dtype=np.float64), amounts_of(grid), np.asarray(sizes, dtype=np.int64)
    if n.ndim != 1 or not len(n) or n.min() < 1:
        raise ValueError(f"sizes must be a sequence of integers >= 1, got {sizes!r}")
    if D.shape != (len(n), len(amounts)):
        raise ValueError(f"curves must be of shape {(len(n), len(amounts))}, a row per layer, got {D.shape}")
    if not np.isfinite(D).all():
        raise ValueError("curves hold NaN or infinity")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    check_range("max_layer_sparsity", max_layer_sparsity, low=0.0, high=1.0, open_low=True)
    before = np.zeros(len(n)) if prev is None else np.asarray(prev, dtype=np.float64)
    if before.shape != n.shape or not ((before >= 0) & (before <= 1)).all():
        raise ValueError(f"prev must be {len(n)} amounts in [0, 1], got {prev!r}")
    gone = np.floor(before * n + 1e-6).astype(np.int64)
    needed = math.ceil(sparsity * int(n.sum()) * (1 - 1e-15))
    counts = removed_counts(n, grid)
    allowed = (amounts >= before[:, None]) & (amounts <= max_layer_sparsity + 1e-12)
    stay = D[np.arange(len(n)), np.searchsorted(amounts, before, side="right") - 1]
    picks = allocate_counts(D, counts, allowed, gone, stay, needed)
    return np.array([before[layer] if i < 0 else amounts[i] for layer, i in enumerate(picks)])


def amounts_of(grid: int | Sequence[float]) -> Floats:
    """The amounts of a grid: P + 1 even ones for an integer P, else those given."""
    if isinstance(grid, Integral):
        if grid < 1:
            raise ValueError(f"grid must be an integer >= 1 or amounts rising from 0 to at most 1, got {grid}")
        return np.arange(int(grid) + 1) / int(grid)
    amounts = np.asarray(grid, dtype=np.float64)
    if amounts.ndim != 1 or len(amounts) < 2 or not (np.diff(amounts) > 0).all() or amounts[0] != 0 or amounts[-1] > 1:
        raise ValueError(f"grid must be an integer >= 1 or amounts rising from 0 to at most 1, got {grid!r}")
    return amounts


def removed_counts(sizes: Ints, grid: int | Sequence[float]) -> Ints:
    r""":math:`\lfloor a n_l \rfloor`, of shape (L, P + 1); of an even grid without rounding (0.29 * 100 is 28.99... in floats)."""
    if isinstance(grid, Integral):
        return sizes[:, None] * np.arange(int(grid) + 1) // int(grid)
    return np.floor(sizes[:, None] * amounts_of(grid) + 1e-6).astype(np.int64)


def allocate_counts(D: Floats, counts: Ints, allowed: NDArray[np.bool_], gone: Ints, stay: Floats, needed: int) -> list[int]:
    """The choice of each layer: an index into the grid, or -1 where it stays as it is.

    Args:
        D: distortions, (L, P + 1).
        counts: weights removed, (L, P + 1), at least those gone where allowed.
        allowed: which of them may be chosen, (L, P + 1).
        gone: weights removed so far, (L,).
        stay: the distortion of staying at those, (L,).
        needed: weights to remove in all, those gone included.

    Raises:
        ValueError: no combination removes so many.
    """
    if gone.sum() >= needed:
        return [-1] * len(gone)
    # The answer must not hang on the order of the layers, also where rounding does.
    order = sorted(range(len(gone)), key=lambda layer: (-counts[layer, -1], *D[layer], gone[layer]))
    index = [np.concatenate([[-1], allowed[layer].nonzero()[0]]) for layer in order]
    w = [np.append(gone[layer], counts[layer, i[1:]]) for layer, i in zip(order, index, strict=True)]
    d = [np.append(stay[layer], D[layer, i[1:]]) for layer, i in zip(order, index, strict=True)]
    most, total = sum(int(x.max()) for x in w), int(counts[:, -1].sum())
    if most < needed:
        raise ValueError(
            f"a sparsity of {needed / total:g} cannot be reached: the largest within the limit of each layer is {most / total:g}"
        )
    picks = [-1] * len(gone)
    for layer, i, chosen in zip(order, index, _knapsack(w, d, needed), strict=True):
        picks[layer] = int(i[chosen])
    return picks


def _knapsack(w: list[Ints], d: list[Floats], needed: int) -> list[int]:
    """One choice per layer with sum of w >= needed and the least sum of d."""
    slope, picks = _relaxed(w, d, needed)
    cost = sum(float(x[i]) for x, i in zip(d, picks, strict=True))
    reduced = [x - slope * y for x, y in zip(d, w, strict=True)]
    base = slope * needed + sum(float(r.min()) for r in reduced)  # Lagrange: no answer costs less
    for width in _WIDTHS:
        # A choice that no answer better than the best so far can contain is out, as is one that a second one dominates.
        live = [np.flatnonzero(base + (r - r.min()) < cost) for r in reduced]
        live = [k[_undominated(y[k], x[k])] for k, x, y in zip(live, d, w, strict=True)]
        if not all(len(k) for k in live):
            break
        found, exact = _sweep(
            [y[k] for k, y in zip(live, w, strict=True)], [x[k] for k, x in zip(live, d, strict=True)], needed, slope, cost, width
        )
        if found is not None:
            picks = [int(k[i]) for k, i in zip(live, found, strict=True)]
            cost = sum(float(x[i]) for x, i in zip(d, picks, strict=True))
        if exact:
            break
    return _lowered(w, d, picks, needed)


def _relaxed(w: list[Ints], d: list[Floats], needed: int) -> tuple[float, list[int]]:
    """The price of a weight at which the layers, each for itself, choose just enough; and what they choose."""
    span = max(len(x) for x in w)
    W = np.stack([np.pad(x, (0, span - len(x))) for x in w])
    D = np.stack([np.pad(x, (0, span - len(x)), constant_values=np.inf) for x in d])
    rows = np.arange(len(w))

    def choose(price: float) -> tuple[int, Ints]:
        net = D - price * W
        tied = net <= net.min(1, keepdims=True)
        best = np.where(tied, W, -1).argmax(1)
        return int(W[rows, best].sum()), best

    low, high = 0.0, 2.0 * float(max(x.max() - x.min() for x in d)) + 1.0  # at this price one weight more outweighs all
    if choose(low)[0] >= needed:
        return low, [int(i) for i in choose(low)[1]]
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if choose(middle)[0] >= needed else (middle, high)
    return high, [int(i) for i in choose(high)[1]]


def _sweep(w: list[Ints], d: list[Floats], needed: int, slope: float, cost: float, width: int) -> tuple[list[int] | None, bool]:
    """The recursion over layers; the best answer below ``cost``, None if there is none, and whether no entry was given up."""
    after = lambda values: np.concatenate([np.cumsum(values[::-1])[::-1][1:], [0]])  # noqa: E731
    most = after(np.array([y.max() for y in w]))
    least = after(np.array([x.min() for x in d]))
    net = after(np.array([(x - slope * y).min() for x, y in zip(d, w, strict=True)]))
    removed, paid = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    exact = True
    for layer, (y, x) in enumerate(zip(w, d, strict=True)):
        b = np.minimum(removed[:, None] + y, needed).ravel()  # more than needed is as good as needed
        T = (paid[:, None] + x).ravel()
        bound = T + np.maximum(net[layer] + slope * (needed - b), least[layer])
        k = np.flatnonzero((bound < cost) & (b + most[layer] >= needed))
        k = k[_undominated(b[k], T[k])]
        if not len(k):
            return None, exact
        if len(k) > width:
            k, exact = k[np.argpartition(bound[k], width)[:width]], False
        trail.append((k // len(y), k % len(y)))
        removed, paid = b[k], T[k]
    at, picks = int(paid.argmin()), []
    for parent, choice in reversed(trail):
        picks.append(int(choice[at]))
        at = int(parent[at])
    return picks[::-1], exact


def _undominated(w: Ints, d: Floats) -> Ints:
    """Indices of the entries for which no other has as large a w and as small a d."""
    order = np.lexsort((d, -w))
    ranked = d[order]
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = ranked[1:] < np.minimum.accumulate(ranked)[:-1]
    return order[keep]


def _lowered(w: list[Ints], d: list[Floats], picks: list[int], needed: int) -> list[int]:
    """The same cost with as little removed as a change of single layers allows."""
    spare = sum(int(y[i]) for y, i in zip(w, picks, strict=True)) - needed
    for layer, (y, x) in enumerate(zip(w, d, strict=True)):
        now = picks[layer]
        equal = np.flatnonzero((x <= x[now]) & (y <= y[now]) & (y >= y[now] - spare))
        picks[layer] = int(equal[y[equal].argmin()])
        spare -= int(y[now] - y[picks[layer]])
    return picks

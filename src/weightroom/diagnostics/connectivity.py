r"""Linear mode connectivity: is there a barrier on the straight line between two networks?

.. math:: \theta_t = (1 - t)\, \theta_1 + t\, \theta_2, \qquad e(t) = \text{training error of } \theta_t, \qquad
          \mathrm{LMC} = \tfrac12 (e(0) + e(1)) - e(t^*), \quad t^* = \arg\max_t \big|\tfrac12 (e(0) + e(1)) - e(t)\big|

Negative: a barrier as high as that. Zero: connected. Positive: the line dips below its ends, which are not trained to the end.

Reach for it to tell whether two trainings (two retrainings of one pruned network, say) ended in one basin. Measure on training
data, without augmentation. Known to mislead: networks that differ by a permutation of their units have a barrier although they are
the same function (``weightroom.weights`` matches them first); averaged batch-norm statistics make barriers of their own, hence
``bn="recompute"``; a network that fits nothing is connected to everything.

Zhou, Yang, Chang, Mahoney, "A Three-regime Model of Network Pruning", ICML 2023, arXiv 2305.18383, whose measure is that of Yang
et al., "Taxonomizing local versus global structure in neural network loss landscapes", NeurIPS 2021, arXiv 2107.11228.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightroom.diagnostics.base import batches, masks_of, plain_copy
from weightroom.errors import UsageError, unknown
from weightroom.metrics import device_of
from weightroom.train import gathering_statistics

__all__ = ["LMCResult", "linear_mode_connectivity"]

#: Differences of errors below this are rounding, not rank.
ROUNDING = 1e-12
#: Targets that ``F.cross_entropy`` leaves out.
IGNORED = -100


@dataclass(frozen=True, eq=False)
class LMCResult:
    """What lies on the line between two networks.

    Args:
        ts: the points, from 0 to 1, float64 of shape (points,).
        values: error or loss at each, of the same shape.
        lmc: mid - value at the point farthest from mid, the mean of both ends; among points equally far, at the highest.
        barrier: how far the values rise at most above the line between both ends; >= 0.
    """

    ts: np.ndarray
    values: np.ndarray
    lmc: float
    barrier: float


@torch.no_grad()
def linear_mode_connectivity(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    points: int = 11,
    metric: Literal["error", "loss"] = "error",
    bn: Literal["recompute", "keep"] = "recompute",
    allow_different_masks: bool = False,
) -> LMCResult:
    """Measures error or loss on the straight line between two networks.

    Masks of ``torch.nn.utils.prune`` are made permanent first, so that the line between two networks with one mask stays sparse.
    Both networks are left as they were; the networks of all points are in memory together and share each batch, so that the data
    are read twice ("keep": once) whatever the number of points, and shuffling or augmentation is the same for all of them.

    Args:
        model_a: at t = 0.
        model_b: at t = 1, of the same architecture; moved to the device of ``model_a``.
        loader: batches (inputs, targets, ...) of the training data, as often as it is iterated over.
        points: of the even grid on [0, 1], both ends among them.
        metric: "error", the share of targets (N, ...) missed by the largest of the outputs (N, K, ...), or "loss", their mean
            cross-entropy. Targets of -100 are left out of both. Between the ends a target whose scores hold NaN or inf counts as
            missed, its loss as infinite.
        bn: "recompute" estimates the statistics of every batch norm anew at each point, ends included, as the mean over the
            batches by their size (each of two samples or more where a batch norm sees one value per sample and channel); "keep"
            interpolates them like weights.
        allow_different_masks: interpolate networks whose masks differ; the line between them leaves both masks.

    Returns:
        The points, their values, the LMC and the barrier.

    Raises:
        ValueError: the networks differ in a tensor or its shape, in which tensors they share among layers, or in their masks;
            ``points`` < 2; ``metric`` or ``bn`` is unknown; ``loader`` is empty, is so at the second pass, or has no target but
            -100; the outputs are no scores of two or more classes; those of ``model_a`` or ``model_b`` are not finite: a network
            that diverged has no error that says anything about the line.
    """
    if points < 2 or points != int(points):
        raise UsageError(f"points must be an integer >= 2, got {points}")
    if metric not in ("error", "loss"):
        raise unknown("metric", metric, ("error", "loss"))
    if bn not in ("recompute", "keep"):
        raise unknown("bn", bn, ("recompute", "keep"))
    device = device_of(model_a)
    a, b = plain_copy(model_a), plain_copy(model_b).to(device)
    _check_alike(a, b)
    if not allow_different_masks:
        _check_masks(model_a, model_b, a, b)
    n = int(points) - 1
    nets = [a, *(_between(a, b, k, n) for k in range(1, n)), b]
    if bn == "recompute":
        _recompute_batchnorm(nets, loader, device)
    values, finite = _values(nets, loader, device, metric)
    for k, which in ((0, "first"), (-1, "second")):
        if not finite[k]:
            raise UsageError(f"the outputs of the {which} model are not finite: did it diverge?")
    return _result(values)


def _result(e: np.ndarray) -> LMCResult:
    t = np.linspace(0, 1, len(e))
    gaps = (e[0] + e[-1]) / 2 - e
    farthest = np.abs(gaps) >= np.abs(gaps).max() - ROUNDING
    chord = e[0] + t * (e[-1] - e[0])
    return LMCResult(t, e, float(gaps[farthest].min()), max(0.0, float((e - chord).max())))


def _between(a: nn.Module, b: nn.Module, k: int, n: int) -> nn.Module:
    """The network at t = k / n; what is not a floating-point number is that of the nearer end."""
    net = deepcopy(a)
    ours, theirs = a.state_dict(), b.state_dict()
    for key, at in net.state_dict().items():  # a tensor that layers share comes once for each, with the same result
        x, y = ours[key], theirs[key]
        if not (x.is_floating_point() or x.is_complex()):
            at.copy_(x if 2 * k <= n else y)
        elif 2 * k == n:
            at.copy_((x + y) / 2)
        else:  # from the nearer end: the same numbers if a and b change places
            at.copy_(torch.add(x, y - x, alpha=k / n) if 2 * k < n else torch.add(y, x - y, alpha=(n - k) / n))
    return net


def _recompute_batchnorm(nets: Sequence[nn.Module], loader: Iterable[Any], device: torch.device) -> None:
    if not any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in nets[0].modules()):
        return
    with gathering_statistics(*nets) as count:
        for x, *_ in _feed(nets, loader, device):
            count(len(x))
            for net in nets:
                net(x)


def _values(nets: Sequence[nn.Module], loader: Iterable[Any], device: torch.device, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The error or loss of each network, and whether it was finite in all that it said of the targets that count."""
    sums, finite, counts = [], [], []
    for x, y, *_ in _feed(nets, loader, device):
        found = [_score(net(x), y, metric) for net in nets]
        sums.append(torch.stack([value for value, _ in found]))
        finite.append(torch.stack([well for _, well in found]))
        counts.append(torch.count_nonzero(y != IGNORED))
    count = int(torch.stack(counts).sum())
    if not count:
        raise UsageError(f"loader gave no target that counts: all are {IGNORED}")
    return torch.stack(sums).cpu().double().sum(0).numpy() / count, torch.stack(finite).all(0).cpu().numpy()


def _feed(nets: Sequence[nn.Module], loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches; before the first the networks take the layout in which a CPU convolves faster, if they can."""
    first = device.type == "cpu"
    for batch in batches(loader, device):
        if first and batch[0].ndim == 4:
            try:
                _channels_last(deepcopy(nets[0]).eval())(batch[0])
            except Exception:  # a view of features that lie in another order, most likely
                pass
            else:
                for net in nets:
                    _channels_last(net)
        first = False
        yield batch


def _channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _score(outputs: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The sum of errors or losses of a batch, and whether all scores behind it are finite."""
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise UsageError(f"the outputs must be scores (N, K, ...) of K >= 2 classes, got shape {tuple(outputs.shape)}")
    if metric == "error":
        best, at = outputs.max(1)  # NaN or inf if one of the scores is; -inf excludes a class
        counts, well = targets != IGNORED, best.isfinite()
        return torch.count_nonzero(counts & ((at != targets) | ~well)), (well | ~counts).all()
    loss = F.cross_entropy(outputs.float(), targets, reduction="sum", ignore_index=IGNORED)
    return loss.nan_to_num(nan=math.inf, posinf=math.inf), loss.isfinite()


def _check_alike(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
    for key in [*x, *y]:
        if key not in x or key not in y:
            raise UsageError(f"the models differ: the {'second' if key in x else 'first'} has no {key!r}")
        if x[key].shape != y[key].shape:
            raise UsageError(f"the models differ: {key!r} has shapes {tuple(x[key].shape)} and {tuple(y[key].shape)}")
    shared_a, shared_b = _shared(x), _shared(y)
    for key in x:
        if shared_a[key] != shared_b[key]:
            raise UsageError(
                f"the models differ: {key!r} is shared with {shared_a[key]!r} in the first, {shared_b[key]!r} in the second"
            )


def _shared(state: dict[str, Tensor]) -> dict[str, str]:
    """Each tensor's name -> the first name of that tensor."""
    first: dict[int, str] = {}
    return {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}


def _check_masks(model_a: nn.Module, model_b: nn.Module, a: nn.Module, b: nn.Module) -> None:
    """A tensor that only one of the two masks must be zero in the other where the mask is: masked once, for good."""
    masks_a, masks_b = masks_of(model_a), masks_of(model_b)
    state_a, state_b = a.state_dict(), b.state_dict()
    for name in {**masks_a, **masks_b}:
        in_a, in_b = masks_a.get(name), masks_b.get(name)
        if in_a is not None and in_b is not None:
            same = torch.equal(in_a, in_b.to(in_a.device))
        else:
            mask, other = (in_a, state_b[name]) if in_a is not None else (in_b, state_a[name])
            same = not other[~mask.to(other.device)].any()  # type: ignore[union-attr]
        if not same:
            raise UsageError(
                f"the models differ in the mask of {name!r}, so that the line between them leaves it: "
                "prune once and retrain copies, or say allow_different_masks=True"
            )

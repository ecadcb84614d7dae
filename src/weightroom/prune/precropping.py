r"""PreCrop: a network of a given budget, cut out of a larger architecture before any training.

Pruning at initialisation decides how many weights each layer keeps; which ones hardly matters. So the densities of the layers
are found from the architecture alone, by a small convex problem, and each layer is built with fewer channels from the start:
dense kernels, less memory from the first step, no fine-tuning. Reach for it when a convolutional network must fit a budget of
parameters or FLOPs before it is trained.

Cai, Hua, Chen, Suh, De Sa, Zhang, "Structured Pruning is All You Need for Pruning CNNs at Initialization", arXiv 2203.02549.

SynExp, the mean over random weights and masks of the value that SynFlow keeps, is for a chain of layers of widths n, densities
p and mean absolute weights :math:`\mu`

.. math:: E[R] = \textstyle\prod_{l=0}^{L} n_l \, \prod_{l=1}^{L} p_l \mu_l

whatever the granularity, so that its best densities maximise :math:`\sum_l \log p_l` under the budgets
:math:`\sum_l a_l p_l \le B_{params}` and :math:`\sum_l f_l p_l \le B_{flops}`, :math:`p_l \le 1`: the solution is
:math:`p_l = \min(1, 1 / (\lambda a_l + \mu f_l))`, under one budget every layer that is cut keeps the same number of weights.

Known not to work: at small budgets crops are worse than masks of the same densities, and worse than the same share of every
width: where whole channels go, the masks of neighbouring layers are aligned, the paths that are left are
:math:`\prod_l r_l` for width ratios r, not :math:`\prod_l p_l = \prod_l r_{l-1} r_l`, and ``sqrt`` widths starve the widest
layers. ``rule="gp"`` maximises :math:`\sum_l \log r_l` instead. Pruning after training is far better than either. The method
ignores weights and data: it is a cheap search for an architecture.
"""

from __future__ import annotations

import heapq
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from weightroom.errors import unknown
from weightroom.metrics import copy_model
from weightroom.prune.base import prunable
from weightroom.prune.plan import Inputs, PruningPlan
from weightroom.prune.shrink import reset
from weightroom.prune.snip import SNIPPruner
from weightroom.prune.synflow import SynFlowPruner
from weightroom.prune.widths import Array, Layout, WidthPlan, layout_of, needed, uses_of, uses_of_site, weight_name

__all__ = ["PreCrop", "layerwise_density", "shuffle_masks"]

Budget = float | int | None
DensityMethod = Literal["synexp", "synflow", "snip", "erk", "uniform"]

_METHODS = ("synexp", "synflow", "snip", "erk", "uniform")
#: Steps in which the sparsity of a pruner is halved in on where it must meet a budget of FLOPs.
_BISECTIONS = 16
#: Weights spread this many times as widely as a fresh draw are trained ones: He's initialisation is wider by 2.4 than torch's own.
_FAR = 4.0
#: Fewer weights than this show no spread.
_FEW = 16


def layerwise_density(
    model: nn.Module,
    example_input: Inputs | None = None,
    *,
    params: Budget = None,
    flops: Budget = None,
    method: DensityMethod = "synexp",
    widen: bool = False,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> dict[str, float]:
    r"""The share of its weights that each layer keeps under a budget.

    Args:
        model: left as it is. Its layers are the prunable tensors of ``weightroom.prune``; biases and norms do not count.
        example_input: what the model takes; needed for ``flops`` and by "synflow".
        params: budget of weights: a share in (0, 1] of all, or a whole number of weights.
        flops: budget of FLOPs (two for each multiply-accumulate) of a forward pass of ``example_input``: a share in (0, 1], or a
            whole number.
        method: "synexp", the optimum of :math:`\sum_l \log p_l`; the densities of a mask of ``SynFlowPruner`` ("synflow") or
            ``SNIPPruner`` ("snip", with ``data`` and ``loss_fn``), at the highest density that meets the budgets; Erdos-Renyi
            kernel ("erk"); or the same for all ("uniform").
        widen: let "synexp", "erk" and "uniform" go above 1: what the small layers do not need widens others (PreConfig).
        data: batches (inputs, targets), for "snip".
        loss_fn: ``loss_fn(outputs, targets) -> scalar``, for "snip".

    Returns:
        Name of the weight -> density in (0, 1] (with "snip" and "synflow" it may be 0).

    Raises:
        ValueError: no budget, a budget out of its range, an unknown method, or FLOPs of a layer that is not linear or a
            convolution.
        TypeError: ``example_input`` is missing where it is needed, or ``data`` or ``loss_fn`` is.
    """
    if method not in _METHODS:
        raise unknown("method", method, _METHODS)
    tensors = prunable(model)
    a = np.array([site.tensor.numel() for site in tensors], dtype=np.float64)
    _check_budgets(params, flops, example_input)
    costs, budgets = [], []
    if params is not None:
        costs.append(a)
        budgets.append(_absolute("params", params, a.sum()))
    if flops is not None:
        uses = uses_of(model, needed(example_input, "flops"))
        f = np.array([2.0 * size * uses_of_site(site, uses) for site, size in zip(tensors, a, strict=True)])
        costs.append(f)
        budgets.append(_absolute("flops", flops, f.sum()))
    if method in ("synflow", "snip"):
        if widen:
            raise ValueError(f"widen needs method 'synexp', 'erk' or 'uniform': the masks of {method!r} cannot add weights")
        pruner = SynFlowPruner(0.0) if method == "synflow" else SNIPPruner(0.0)
        if method == "synflow":
            needed(example_input, "method='synflow'")
        batches = None if data is None else list(itertools.islice(data, 1))
        p = _of_masks(lambda sparsity: pruner.at(sparsity).fit(model, batches, example_input, loss_fn), a, costs, budgets)
    else:
        erk = np.array([sum(site.tensor.shape) for site in tensors]) / a
        profile = {"synexp": None, "erk": erk, "uniform": np.ones_like(a)}[method]
        p = _fill(costs, budgets, profile, math.inf if widen else 1.0)
    return {site.name: float(density) for site, density in zip(tensors, p, strict=True)}


def shuffle_masks(plan: PruningPlan, seed: int) -> PruningPlan:
    """Returns the plan that keeps as many weights of each tensor, but others: what a choice of weights must beat.

    Args:
        plan: a plan of masks alone.
        seed: decides which weights are kept; torch's global random state is neither read nor changed.

    Raises:
        ValueError: the plan also cuts out channels or corrects weights, which belong to the weights that were chosen.
    """
    if plan.channels or plan.deltas:
        raise ValueError("only masks can be shuffled: the plan also has " + ("channels" if plan.channels else "deltas"))
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
        for name, mask in plan.masks.items()
    }
    return PruningPlan(masks, model=plan._model() if plan._model else None, example_inputs=plan.example_inputs)


class PreCrop:
    r"""Finds the widths of a network that meets a budget.

    Densities :math:`p_l` come from ``layerwise_density``. "sqrt": a layer in a chain gives :math:`\sqrt{p_l} c_l` channels and
    takes what the one before it gives; inside a residual block whose ends keep their widths, every inner width becomes the
    mean density of the block's layers times what it was; a width that several layers add up to follows the root of the mean
    of their densities. "gp": the width ratios r maximise :math:`\sum_l \log r_{out(l)}`, the logarithm of SynExp for the
    cropped chain, under the budgets, a geometric programme. Then all widths are scaled by one factor and rounded, so that the
    true count is the largest that meets the budgets; what room is left is filled channel by channel, until no layer can
    have one more. A depthwise convolution follows its input; a grouped one keeps its groups. Image channels and outputs stay.

    Args:
        params: budget of parameters: a share in (0, 1] of the model's, or a whole number.
        flops: budget of FLOPs (two for each multiply-accumulate) of a forward pass of the example input, given likewise.
        method: where the densities come from, see ``layerwise_density``; "uniform" gives every layer the same share.
        rule: "sqrt" or "gp" (which needs no densities).
        round_to: widths are multiples of this (of fewer channels where a layer has no more).
        tied: what becomes of tensors that are added to one another: False keeps their width and crops inside the blocks, True
            makes it one width like any other, "auto" is False where the budget can be met so, else True.
        count: what ``params`` counts: "all" parameters, or the prunable "weights" without biases and norms, as masks are
            counted.
        widen: let widths grow beyond the model's (PreConfig).

    The widths that hang together are read off a chain of modules in ``nn.Sequential``; off a model's ``width_config`` (a mapping
    of names to widths, with a method ``with_widths(config) -> nn.Module`` that returns a new model of other widths); or else
    off torch-pruning's dependency graph (extra "prune"). Widths that the code fixes (heads of attention, splits, raw
    parameters) stay.

    Raises:
        ValueError: no budget, or an argument is out of range.

    Example::

        plan = PreCrop(params=0.2).fit(model, images[:1])
        small = plan.build(model, seed=0)                   # train as the large one would be
    """

    def __init__(
        self,
        params: Budget = None,
        flops: Budget = None,
        *,
        method: DensityMethod = "synexp",
        rule: Literal["sqrt", "gp"] = "sqrt",
        round_to: int = 1,
        tied: bool | Literal["auto"] = "auto",
        count: Literal["all", "weights"] = "all",
        widen: bool = False,
    ) -> None:
        _check_budgets(params, flops, ())
        for name, given, accepted in (
            ("method", method, _METHODS),
            ("rule", rule, ("sqrt", "gp")),
            ("count", count, ("all", "weights")),
        ):
            if given not in accepted:
                raise unknown(name, given, accepted)
        if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
            raise ValueError(f"round_to must be an integer >= 1, got {round_to!r}")
        if tied not in (True, False, "auto"):
            raise ValueError(f"tied must be True, False or 'auto', got {tied!r}")
        self.params = params
        self.flops = flops
        self.method = method
        self.rule = rule
        self.round_to = round_to
        self.tied = tied
        self.count = count
        self.widen = widen

    def fit(
        self,
        model: nn.Module,
        example_input: Inputs | None = None,
        *,
        data: Iterable[Any] | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> WidthPlan:
        """Returns the widths; the model is left as it is.

        Args:
            model: an untrained model of the full size.
            example_input: what the model takes (a batch of one will do); not needed for a chain in ``nn.Sequential`` under a
                budget of parameters.
            data: batches (inputs, targets), for the densities of "snip".
            loss_fn: ``loss_fn(outputs, targets) -> scalar``, for the densities of "snip".

        Raises:
            ValueError: the budget is below what the fewest channels need (the message says how much that is), or the model
                carries masks.
            TypeError: ``example_input`` is missing where it is needed.
            RuntimeError: torch-pruning cannot trace the model, see ``PruningPlan.apply``.
            MissingExtraError: torch-pruning is needed and not installed.

        Warns:
            UserWarning: the model looks trained; its weights play no part. What shows it: gradients, norms whose weights or biases
                differ, or linear and convolution weights spread four times as widely as their ``reset_parameters`` draws them.
                A trained model with none of these is not recognised.
        """
        _check_budgets(self.params, self.flops, example_input)
        if _trained(model):
            warnings.warn("PreCrop looks at the architecture alone: the trained weights of this model are lost", stacklevel=2)
        layout = layout_of(model, example_input, self.flops is not None)
        budgets = _Budgets(layout, self.params, self.flops, self.count)
        free = ~layout.held & ~(layout.added if self.tied in (False, "auto") else np.zeros_like(layout.held))
        low, high = self._bounds(layout, free)
        if self.tied == "auto" and not budgets.met(low):
            free = ~layout.held
            low, high = self._bounds(layout, free)
        budgets.check(low)
        if self.rule == "gp":
            p = None
            widths = _geometric_programme(layout, budgets, free, low, high)
        else:
            share = {name: min(1.0, budget) for name, budget in budgets.shares.items()}
            p = layerwise_density(
                model, example_input, method=self.method, widen=self.widen and self.method not in ("synflow", "snip"),
                data=data, loss_fn=loss_fn, **share,
            )  # fmt: skip
            widths = layout.sizes * _square_root_rule(layout, p, free)
        w = _largest(widths, self._step(layout), low, high, budgets)
        return layout.plan(w, p, example_input)

    def _step(self, layout: Layout) -> Array:
        wanted = np.lcm(layout.step, self.round_to)
        return np.where(wanted <= layout.sizes, wanted, layout.step)

    def _bounds(self, layout: Layout, free: Array) -> tuple[Array, Array]:
        low = np.where(free, self._step(layout), layout.sizes).astype(float)
        return low, np.where(free, np.inf if self.widen else layout.sizes, layout.sizes)


# --- densities ---------------------------------------------------------------------------------------------------------


def _fill(costs: Sequence[Array], budgets: Sequence[float], profile: Array | None, cap: float) -> Array:
    r"""Densities under budgets :math:`\sum_l c_l p_l \le B`: the optimum of :math:`\sum_l \log p_l`, or along a profile."""
    if profile is not None:
        level = min(_level(c, profile, B, cap) for c, B in zip(costs, budgets, strict=True))
        return np.minimum(cap, level * profile) if np.isfinite(level) else np.ones_like(profile)
    alone = []
    for c, B in zip(costs, budgets, strict=True):
        with np.errstate(divide="ignore"):
            d = np.where(c > 0, 1 / c, 0.0)
        level = _level(c, d, B, cap)  # p_l = min(1, nu / c_l)
        p = np.minimum(cap, level * d) if np.isfinite(level) else np.ones_like(d)
        alone.append(np.where(c > 0, p, 1.0))
    for p in alone:  # one budget is enough where the other holds anyway
        if all(c @ p <= B * (1 + 1e-12) for c, B in zip(costs, budgets, strict=True)):
            return p
    a, f = (c / B for c, B in zip(costs, budgets, strict=True))
    p_of = lambda lam, mu: np.minimum(cap, 1 / np.maximum(lam * a + mu * f, 1e-300))  # noqa: E731
    lam_of = lambda mu: _root(lambda lam: a @ p_of(lam, mu) - 1, 0.0, len(a))  # noqa: E731
    mu_alone = _root(lambda mu: f @ p_of(0.0, mu) - 1, 0.0, len(f))
    mu = _root(lambda mu: f @ p_of(lam_of(mu), mu) - 1, 0.0, mu_alone)
    return p_of(lam_of(mu), mu)  # both are tight: p_l = min(1, 1 / (lambda a_l + mu f_l))


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is zero; the nearer end where it is not between."""
    if excess(low) <= 0:
        return low
    return high if excess(high) >= 0 else float(brentq(excess, low, high, xtol=1e-300, rtol=1e-14, maxiter=5000))


def _level(c: Array, d: Array, budget: float, cap: float) -> float:
    r"""The level :math:`\nu` at which :math:`\sum_l c_l \min(cap, \nu d_l)` is the budget, by sorting; infinite where it never is."""
    if not math.isfinite(cap):
        return budget / float(c @ d)
    if c.sum() * cap <= budget:
        return math.inf
    with np.errstate(divide="ignore"):
        full_at = np.where(d > 0, cap / d, np.inf)
    order = np.argsort(full_at, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(c[order] * cap)[:-1]])
    slope = np.cumsum((c * d)[order][::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        level = (budget - full) / slope
    return float(level[np.argmax(level <= full_at[order])])


def _of_masks(plan_at: Callable[[float], PruningPlan], sizes: Array, costs: Sequence[Array], budgets: Sequence[float]) -> Array:
    """Densities of a pruner's masks at the most weights that meet all budgets."""
    total = int(sizes.sum())

    def densities(kept: int) -> Array:
        return 1 - np.array([layer.sparsity for layer in plan_at(1 - kept / total).layers().values()])

    def met(p: Array) -> bool:
        return all(c @ p <= B * (1 + 1e-12) for c, B in zip(costs, budgets, strict=True))

    most = min([total, *(int(B + 1e-6) for c, B in zip(costs, budgets, strict=True) if c is sizes)])
    p = densities(most)
    if met(p):
        return p
    least, low = densities(1), 1
    if not met(least):
        raise ValueError("the budget of FLOPs is below what a single weight costs")
    for _ in range(_BISECTIONS):
        if most - low <= 1:
            break
        middle = (low + most) // 2
        if met(p := densities(middle)):
            low, least = middle, p
        else:
            most = middle
    return least


def _check_budgets(params: Budget, flops: Budget, example_input: Inputs | None) -> None:
    if params is None and flops is None:
        raise ValueError("give a budget: params, flops or both")
    for name, budget in (("params", params), ("flops", flops)):
        if budget is None:
            continue
        if not isinstance(budget, int | float | np.number) or isinstance(budget, bool):
            raise TypeError(f"{name} must be a share or a whole number, got {type(budget).__name__}")
        if not (budget >= 1 if isinstance(budget, int | np.integer) else 0 < budget <= 1):
            raise ValueError(f"{name} must be a share in (0, 1] or a whole number >= 1, got {budget!r}")
    if flops is not None:
        needed(example_input, "flops")


def _absolute(name: str, budget: float, total: float) -> float:
    return float(budget) if isinstance(budget, int | np.integer) else float(budget) * total


# --- rules -------------------------------------------------------------------------------------------------------------


class _Budgets:
    """What the widths may cost."""

    def __init__(self, layout: Layout, params: Budget, flops: Budget, count: str) -> None:
        self.layout = layout
        self.limits: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        for name, kind, budget in (("params", count, params), ("flops", "flops", flops)):
            if budget is not None:
                total = layout.cost(kind, layout.sizes)
                self.limits[kind] = _absolute(name, budget, total)
                self.shares[name] = self.limits[kind] / total

    def met(self, w: Array) -> bool:
        return all(self.layout.cost(kind, w) <= limit + 1e-6 for kind, limit in self.limits.items())

    def check(self, low: Array) -> None:
        for kind, limit in self.limits.items():
            least = round(self.layout.cost(kind, low))
            if least > limit + 1e-6:
                words = {"all": "parameters", "weights": "weights", "flops": "FLOPs"}[kind]
                raise ValueError(f"a budget of {limit:.10g} {words} cannot be met: the fewest channels need {least}")


def _square_root_rule(layout: Layout, densities: Mapping[str, float], free: Array) -> Array:
    r"""Width ratios: :math:`\sqrt{p_l}` after a layer; the mean density of the layers inside blocks whose ends are held."""
    p = np.array([densities.get(weight_name(name), 1.0) for name in layout.names])
    gives = (layout.Out != 0) & (layout.dense > 0)[:, None]
    touches = ((layout.Out != 0) | (layout.In != 0)) & (layout.dense + layout.lone > 0)[:, None]
    ratio = np.ones(len(free))
    ratio[free] = [np.sqrt(p[gives[:, v]].mean()) for v in np.flatnonzero(free)]
    inner = touches[:, free]
    _, block = connected_components(inner.T.astype(int) @ inner.astype(int), directed=False)
    ends = touches[:, layout.added & ~free].any(1)
    for b in np.unique(block):
        layers = inner[:, block == b].any(1)
        if (layers & ends).any():
            ratio[np.flatnonzero(free)[block == b]] = p[layers].mean()
    return ratio


def _geometric_programme(layout: Layout, budgets: _Budgets, free: Array, low: Array, high: Array) -> Array:
    r"""Widths that maximise :math:`\sum_l \log r_{out(l)}` under the budgets: convex in the logarithms of the widths."""
    weight = ((layout.Out != 0) & (layout.dense > 0)[:, None]).sum(0)[free].astype(float)
    full = layout.sizes.copy()

    def at(x: Array) -> Array:
        w = full.copy()
        w[free] = np.exp(x)
        return w

    def slack(x: Array) -> Array:
        return np.array([math.log(limit / layout.cost(kind, at(x))) for kind, limit in budgets.limits.items()])

    def slack_slope(x: Array) -> Array:
        w = at(x)
        return np.stack([-(layout.slope(kind, w) * w)[free] / layout.cost(kind, w) for kind in budgets.limits])

    least, most = np.log(low[free]), np.log(high[free])
    if not free.any() or (np.isfinite(most).all() and (slack(most) >= 0).all()):
        return np.where(free, np.where(np.isfinite(high), high, full), full)
    inside = brentq(lambda t: slack(least + t).min(), 0.0, 50.0) if (slack(least) > 0).all() else 0.0
    result = cast(Any, minimize)(
        lambda x: -weight @ x, np.minimum(least + 0.9 * inside, most), jac=lambda x: -weight, bounds=list(zip(least, most, strict=True)),
        constraints={"type": "ineq", "fun": slack, "jac": slack_slope}, method="SLSQP", options={"maxiter": 1000, "ftol": 1e-12},
    )  # fmt: skip
    return at(np.clip(result.x, least, most))


def _largest(widths: Array, step: Array, low: Array, high: Array, budgets: _Budgets) -> Array:
    """The largest whole widths in the proportions of ``widths`` that meet the budgets, and then every channel that still fits."""

    def at(scale: float) -> Array:
        return np.clip(step * np.floor(scale * widths / step + 0.5), low, high)

    inside, outside = 0.0, 1.0
    while budgets.met(w := at(outside)) and (w < high).any():
        inside, outside = outside, 2 * outside
    if budgets.met(w):
        return w
    while inside < (middle := (inside + outside) / 2) < outside:
        inside, outside = (middle, outside) if budgets.met(at(middle)) else (inside, middle)
    w = at(inside)
    due = [((w[v] + step[v] / 2) / widths[v], v) for v in range(len(w)) if w[v] < high[v]]
    heapq.heapify(due)
    while due:
        _, v = heapq.heappop(due)
        more = w.copy()
        more[v] = min(w[v] + step[v], high[v])
        if budgets.met(more):  # costs only grow: what does not fit now never will
            w = more
            if w[v] < high[v]:
                heapq.heappush(due, ((w[v] + step[v] / 2) / widths[v], v))
    return w


def _trained(model: nn.Module) -> bool:
    """Whether something shows that the model has been trained."""
    if any(parameter.grad is not None for parameter in model.parameters()):
        return True
    for module in model.modules():
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                if parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any()):
                    return True
    fresh = copy_model(model)
    try:
        with torch.random.fork_rng():
            reset(fresh)
    except ValueError:  # nothing to compare with
        return False
    weights = lambda model: [m.weight for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]  # noqa: E731
    return any(
        old.numel() >= _FEW and old.std() > _FAR * new.std() for old, new in zip(weights(model), weights(fresh), strict=True)
    )

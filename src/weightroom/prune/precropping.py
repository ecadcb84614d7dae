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
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.optimize import brentq, minimize
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weightroom.errors import unknown
from weightroom.metrics import copy_model
from weightroom.prune.base import prunable
from weightroom.prune.plan import Inputs, PruningPlan, Site, call, evaluating, sites
from weightroom.prune.shrink import _depthwise, _Graph, _tensors, reset
from weightroom.prune.snip import SNIPPruner
from weightroom.prune.synflow import SynFlowPruner

__all__ = ["PreCrop", "WidthPlan", "layerwise_density", "shuffle_masks"]

Budget = float | int | None
DensityMethod = Literal["synexp", "synflow", "snip", "erk", "uniform"]
Array = np.ndarray

_METHODS = ("synexp", "synflow", "snip", "erk", "uniform")
#: Steps in which the sparsity of a pruner is halved in on where it must meet a budget of FLOPs.
_BISECTIONS = 16
_RESIZABLE = (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
#: What autograd calls operations that fix a width where they stand: heads of attention are counted in the code.
_FIXING = ("ScaledDotProduct", "Softmax", "Bmm")
#: What torch-pruning calls those whose sizes stand in the code.
_FIXED = ("_OutputOp", "_SplitOp", "_UnbindOp", "_SliceOp", "_CustomizedOp")


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
        uses = _uses(model, _given(example_input, "flops"))
        f = np.array([2.0 * size * _uses_of(site, uses) for site, size in zip(tensors, a, strict=True)])
        costs.append(f)
        budgets.append(_absolute("flops", flops, f.sum()))
    if method in ("synflow", "snip"):
        if widen:
            raise ValueError(f"widen needs method 'synexp', 'erk' or 'uniform': the masks of {method!r} cannot add weights")
        pruner = SynFlowPruner(0.0) if method == "synflow" else SNIPPruner(0.0)
        if method == "synflow":
            _given(example_input, "method='synflow'")
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


@dataclass(frozen=True)
class WidthPlan:
    """The widths of a smaller (or, with ``widen``, reshaped) network of a known architecture.

    Args:
        widths: name of every linear, convolution and norm layer -> its output channels.
        densities: name of every weight -> the density that the widths follow; for "gp" the share that is left of it.
        parameters: how many parameters the network has.
        flops: FLOPs of a forward pass of the example input; None where there was none.
        example_input: what the model takes; ``build`` checks the new network on it.
    """

    widths: dict[str, int]
    densities: dict[str, float]
    parameters: int
    flops: int | None
    example_input: Inputs | None = field(default=None, repr=False)
    _weights: tuple[float, float] = field(default=(1.0, 1.0), repr=False)
    _before: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _after: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _config: dict[str, int] | None = field(default=None, repr=False)

    def sparsity(self) -> float:
        """Share of the weights (biases and norms aside) that the widths remove; negative where they add some."""
        before, after = self._weights
        return 1.0 - after / before

    def apply(self, model: nn.Module, mode: Literal["rebuild"] = "rebuild") -> nn.Module:
        """Does what ``build`` does, under the name and mode that a ``PruningPlan`` has for it; ``model`` is left as it is.

        Raises:
            ValueError: as ``build``, or another mode: widths say nothing of which weights to keep.
        """
        if mode != "rebuild":
            raise ValueError(f"mode must be 'rebuild': a plan of widths has no masks, got {mode!r}")
        return self.build(model)

    def build(self, model: nn.Module, *, seed: int | None = None) -> nn.Module:
        """Returns a new network of the plan's widths with fresh weights, drawn by each module's own ``reset_parameters``.

        Args:
            model: one of the architecture that the plan was made for; left as it is, and none of its weights survives.
            seed: of the draw, which then leaves torch's random state alone; None draws from the global random state.

        Raises:
            ValueError: the model's widths are not those that the plan was made for, a module cannot reset its parameters, or
                the new network does not run or gives outputs of another shape: the code of the model fixes a width.
        """
        modules = dict(model.named_modules())
        for name, (n_in, n_out) in self._before.items():
            if name not in modules or _channels(modules[name]) != (n_in, n_out):
                raise ValueError(f"the plan does not fit the model: {name!r} should take {n_in} channels and give {n_out}")
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            small = self._fresh(model)
        small.to(device).train(model.training)
        if self.example_input is not None:
            self._check(model, small, self.example_input)
        return small

    def _fresh(self, model: nn.Module) -> nn.Module:
        if self._config is not None:
            return model.with_widths(dict(self._config))  # type: ignore[operator]
        small = copy_model(model)
        for name, module in small.named_modules():
            if name in self._after:
                _resize(module, *self._after[name])
        reset(small)
        return small

    def _check(self, model: nn.Module, small: nn.Module, inputs: Inputs) -> None:
        with evaluating(model), evaluating(small), torch.no_grad():
            before = [tuple(t.shape) for t in _tensors(call(model, inputs))]
            try:
                after = [tuple(t.shape) for t in _tensors(call(small, inputs))]
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"the model does not run at the widths of the plan: its code fixes a width ({error})") from error
        if before != after:
            raise ValueError(f"the widths of the plan change the shape of the output from {before} to {after}")


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
            RuntimeError: torch-pruning cannot trace the model.
            MissingExtraError: torch-pruning is needed and not installed.

        Warns:
            UserWarning: the model looks trained; its weights play no part.
        """
        _check_budgets(self.params, self.flops, example_input)
        if _trained(model):
            warnings.warn("PreCrop looks at the architecture alone: the trained weights of this model are lost", stacklevel=2)
        layout = _layout(model, example_input, self.flops is not None)
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

    def _step(self, layout: _Layout) -> Array:
        wanted = np.lcm(layout.step, self.round_to)
        return np.where(wanted <= layout.sizes, wanted, layout.step)

    def _bounds(self, layout: _Layout, free: Array) -> tuple[Array, Array]:
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
        _given(example_input, "flops")


def _absolute(name: str, budget: float, total: float) -> float:
    return float(budget) if isinstance(budget, int | np.integer) else float(budget) * total


def _given(example_input: Inputs | None, what: str) -> Inputs:
    if example_input is None:
        raise TypeError(f"{what} needs example_input: a batch that the model takes")
    return example_input


def _uses(model: nn.Module, inputs: Inputs) -> dict[nn.Module, int]:
    """How often each weight of a linear or convolution layer is used in one forward pass."""
    uses: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = [*args, *kwargs.values()][0]
        n = given.numel() if isinstance(module, _ConvTransposeNd) else output.numel()
        uses[module] = uses.get(module, 0) + n // _channels(module)[not isinstance(module, _ConvTransposeNd)]

    hooks = [m.register_forward_hook(count, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def _uses_of(site: Site, uses: Mapping[nn.Module, int]) -> int:
    for _, module, _ in site.places:
        if not isinstance(module, nn.Linear | _ConvNd):
            raise ValueError(
                f"the FLOPs of {site.name!r} ({type(module).__name__}) cannot be counted: only linear and convolution"
            )
    return sum(uses.get(module, 0) for _, module, _ in site.places)


# --- widths ------------------------------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """Which widths a network has and how its layers depend on them: layer l takes ``In[l] @ w + in0[l]`` channels, gives ``Out``.

    ``dense``, ``lone`` and ``extra`` are a layer's weights per pair of channels, weights per output channel (depthwise), and
    other parameters per output channel (bias, norm).
    """

    names: list[str]
    sizes: Array
    step: Array
    held: Array
    added: Array
    In: Array
    in0: Array
    Out: Array
    out0: Array
    dense: Array
    lone: Array
    extra: Array
    uses: Array | None
    fixed: dict[str, float]
    config: list[str] | None

    def channels(self, w: Array) -> tuple[Array, Array]:
        return self.In @ w + self.in0, self.Out @ w + self.out0

    def weights(self, w: Array) -> Array:
        taken, given = self.channels(w)
        return self.dense * taken * given + self.lone * given

    def cost(self, kind: str, w: Array) -> float:
        parts = self.weights(w)
        if kind == "flops":
            parts = 2 * cast(Array, self.uses) * parts
        elif kind == "all":
            parts = parts + self.extra * self.channels(w)[1]
        return float(parts.sum()) + self.fixed[kind]

    def slope(self, kind: str, w: Array) -> Array:
        taken, given = self.channels(w)
        scale = 2 * cast(Array, self.uses) if kind == "flops" else np.ones(len(self.names))
        alone = self.lone + self.extra if kind == "all" else self.lone
        return (scale * self.dense * given) @ self.In + (scale * (self.dense * taken + alone)) @ self.Out

    def plan(self, w: Array, densities: dict[str, float] | None, inputs: Inputs | None) -> WidthPlan:
        as_dict = lambda w: {  # noqa: E731
            name: (round(i), round(o)) for name, i, o in zip(self.names, *self.channels(w), strict=True)
        }
        before, after = as_dict(self.sizes), as_dict(w)
        if densities is None:
            now, full = self.weights(w), self.weights(self.sizes)
            densities = {_weight(n): float(a / b) for n, a, b in zip(self.names, now, full, strict=True) if b}
        return WidthPlan(
            widths={name: given for name, (_, given) in after.items()}, densities=densities, parameters=round(self.cost("all", w)),
            flops=None if self.uses is None else round(self.cost("flops", w)), example_input=inputs,
            _weights=(self.cost("weights", self.sizes), self.cost("weights", w)), _before=before,
            _after={name: io for name, io in after.items() if io != before[name]},
            _config=None if self.config is None else {name: round(width) for name, width in zip(self.config, w, strict=True)},
        )  # fmt: skip


@dataclass
class _Width:
    """One width: how many channels, which layers give or take how many times as many, and what is known of it."""

    size: int
    given: dict[str, float] = field(default_factory=dict)
    taken: dict[str, float] = field(default_factory=dict)
    held: bool = False
    added: bool = False


def _layout(model: nn.Module, inputs: Inputs | None, need_flops: bool) -> _Layout:
    known = sites(model)
    if masked := next((site.name for site in known.values() if site.mask is not None), None):
        raise ValueError(f"the model carries a mask on {masked!r}: PreCrop builds a dense network from an unmasked one")
    shared = {name for site in known.values() if len(site.places) > 1 for name, _, _ in site.places}
    config = list(model.width_config) if hasattr(model, "width_config") else None  # type: ignore[arg-type]
    if config is not None:
        widths = _configured(model)
    elif (chain := _chain(model)) is not None:
        widths = chain
    else:
        widths = _traced(model, _given(inputs, f"{type(model).__name__} is no chain in nn.Sequential: tracing it"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _RESIZABLE) and n not in shared and _channels(m)[1]}
    steps = []
    for width in widths:
        width.held |= not (set(width.given) | set(width.taken)) <= set(layers)
        step = 1
        for name, times in [*width.given.items(), *width.taken.items()]:
            groups = _groups(layers[name]) if name in layers else 1
            step = math.lcm(step, groups // math.gcd(groups, round(times)))
        steps.append(step)

    def matrix(part: str) -> Array:
        rows = [[getattr(width, part).get(name, 0.0) for width in widths] for name in layers]
        return np.array(rows).reshape(len(layers), len(widths))

    In, Out = matrix("taken"), matrix("given")
    sizes = np.array([w.size for w in widths], dtype=float)
    taken, given = np.array([_channels(m) for m in layers.values()], dtype=float).reshape(-1, 2).T
    dense, lone, extra = np.array([_per_channel(m) for m in layers.values()], dtype=float).reshape(-1, 3).T
    weights = prunable(model)
    countable = all(isinstance(module, nn.Linear | _ConvNd) for site in weights for _, module, _ in site.places)
    counted = _uses(model, inputs) if inputs is not None and (countable or need_flops) else None
    uses = None if counted is None else np.array([counted.get(m, 0) for m in layers.values()], dtype=float)
    layout = _Layout(
        list(layers), sizes, np.array(steps, dtype=int), np.array([w.held for w in widths], dtype=bool),
        np.array([w.added for w in widths], dtype=bool), In, taken - In @ sizes, Out, given - Out @ sizes, dense, lone, extra,
        uses, {"all": 0.0, "weights": 0.0, "flops": 0.0}, config,
    )  # fmt: skip
    layout.fixed["all"] = sum(site.tensor.numel() for site in known.values()) - layout.cost("all", sizes)
    layout.fixed["weights"] = sum(site.tensor.numel() for site in weights) - layout.cost("weights", sizes)
    if counted is not None:
        total = sum(2 * site.tensor.numel() * _uses_of(site, counted) for site in weights)
        layout.fixed["flops"] = total - layout.cost("flops", sizes)
    return layout


def _chain(model: nn.Module) -> list[_Width] | None:
    """The widths of a model whose modules are called one after the other; None if it is not known to be one."""
    leaves: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            return all(walk(m, f"{name}.{key}" if name else key) for key, m in module._modules.items() if m is not None)
        leaves.append((name, module))
        plain = next(module.parameters(), None) is None
        return plain or (isinstance(module, _RESIZABLE) and sum(module is m for _, m in leaves) == 1)

    if not walk(model, ""):
        return None
    widths: list[_Width] = []
    for name, module in leaves:
        if not isinstance(module, _RESIZABLE) or _common(module):
            continue
        n_in, n_out = _channels(module)
        through = not isinstance(module, nn.Linear | _ConvNd) or _depthwise(module)
        if widths:
            times = n_in / widths[-1].size
            if times != round(times) and n_in:
                return None
            (widths[-1].given if through else widths[-1].taken)[name] = times
        if not through:
            widths.append(_Width(n_out, given={name: 1.0}))
    if widths:
        widths[-1].held = True  # the model's output
    return widths


def _traced(model: nn.Module, inputs: Inputs) -> list[_Width]:
    """The widths of any model that torch-pruning can trace: layers whose channels hang together."""
    graph = _Graph(copy_model(model), inputs)
    widths: list[_Width] = []
    visited: set[nn.Module] = set()
    for module in graph.names:
        if module in visited or module not in graph or not isinstance(module, nn.Linear | _ConvNd) or _depthwise(module):
            continue
        width = _Width(_channels(module)[1])
        group = graph.group(module, range(width.size))
        for item, member in zip(group, graph.members(group), strict=True):
            name = graph.names.get(member.module)
            if member.produces:
                visited.add(member.module)
            if isinstance(member.module, nn.Module) and _common(member.module):
                continue
            if isinstance(member.module, _RESIZABLE) and name is not None:
                side = width.given if member.out or not member.reads else width.taken
                side[name] = side.get(name, 0.0) + len(member.indices) / width.size
                width.held |= len(member.indices) % width.size != 0
                continue
            kind = type(member.module).__name__
            operation = item.dep.target.grad_fn.name() if item.dep.target.grad_fn is not None else ""
            width.held |= type(member.module).__module__ != "torch_pruning.ops" or kind in _FIXED
            width.held |= any(word in operation for word in _FIXING)
            width.added |= operation.startswith(("AddBackward", "SubBackward")) and len(item.dep.target.inputs) > 1
        width.held |= not width.taken
        widths.append(width)
    return widths


def _configured(model: nn.Module) -> list[_Width]:
    """The widths that a model declares; doubling each in turn shows which layers follow it."""
    config: dict[str, int] = dict(model.width_config)  # type: ignore[arg-type]

    def channels(config: dict[str, int]) -> dict[str, tuple[int, int]]:
        with torch.random.fork_rng(), torch.device("meta"):
            other = model.with_widths(config)  # type: ignore[operator]
        return {n: _channels(m) for n, m in other.named_modules() if isinstance(m, _RESIZABLE)}

    base = channels(config)
    widths = []
    for name, size in config.items():
        other = channels({**config, name: 2 * size})
        width = _Width(size)
        for layer, module in model.named_modules():
            if layer in base and base[layer] != other[layer]:
                (n_in, n_out), (m_in, m_out) = base[layer], other[layer]
                if m_out > n_out:
                    width.given[layer] = (m_out - n_out) / size
                if m_in > n_in and isinstance(module, nn.Linear | _ConvNd) and not _depthwise(module):
                    width.taken[layer] = (m_in - n_in) / size
        widths.append(width)
    return widths


def _channels(module: nn.Module) -> tuple[int, int]:
    """Channels that a layer takes and gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.LayerNorm):
        n = module.normalized_shape[0] if len(module.normalized_shape) == 1 else 0
    else:
        n = next((getattr(module, a) for a in ("num_features", "num_channels", "num_parameters") if hasattr(module, a)), 0)
        n = 0 if _common(module) else n
    return n, n


def _common(module: nn.Module) -> bool:
    """Whether it is a PReLU with one slope for all channels."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _per_channel(module: nn.Module) -> tuple[float, float, float]:
    """A layer's weights per pair of channels, weights per output channel, and other parameters per output channel."""
    _, given = _channels(module)
    if not isinstance(module, nn.Linear | _ConvNd):
        return 0.0, 0.0, sum(p.numel() for p in module.parameters(recurse=False)) / given
    bias = float(module.bias is not None)
    kernel = math.prod(module.kernel_size) if isinstance(module, _ConvNd) else 1
    if _depthwise(module):
        return 0.0, kernel, bias
    return kernel / _groups(module), 0.0, bias


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _groups(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, _ConvNd) and not _depthwise(module) else 1


def _resize(module: nn.Module, n_in: int, n_out: int) -> None:
    """Gives a layer room for other numbers of channels; what is in it is undefined until it is reset."""
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (n_out, n_in)
        module.in_features, module.out_features = n_in, n_out
    elif isinstance(module, _ConvNd):
        if _depthwise(module):
            n_in = module.groups = n_out
        module.in_channels, module.out_channels = n_in, n_out
        sides = (n_in, n_out // module.groups) if isinstance(module, _ConvTransposeNd) else (n_out, n_in // module.groups)
        shape = (*sides, *module.kernel_size)
    else:
        shape = (n_out,)
        for attribute in ("num_features", "num_channels", "num_parameters"):
            if hasattr(module, attribute):
                setattr(module, attribute, n_out)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (n_out,)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.ndim:
                setattr(module, name, buffer.new_empty(n_out))
    for name, old in module.named_parameters(recurse=False):
        new = old.detach().new_empty(shape if name == "weight" else (n_out,))
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


class _Budgets:
    """What the widths may cost."""

    def __init__(self, layout: _Layout, params: Budget, flops: Budget, count: str) -> None:
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


def _square_root_rule(layout: _Layout, densities: Mapping[str, float], free: Array) -> Array:
    r"""Width ratios: :math:`\sqrt{p_l}` after a layer; the mean density of the layers inside blocks whose ends are held."""
    p = np.array([densities.get(_weight(name), 1.0) for name in layout.names])
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


def _geometric_programme(layout: _Layout, budgets: _Budgets, free: Array, low: Array, high: Array) -> Array:
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
    """Whether something shows that the model has been trained: gradients, statistics of norms, or affine weights that differ."""
    if any(parameter.grad is not None for parameter in model.parameters()):
        return True
    for module in model.modules():
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None and int(module.num_batches_tracked) > 0:
            return True
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                if parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any()):
                    return True
    return False

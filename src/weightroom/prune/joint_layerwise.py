r"""Output-distortion pruning: as much from each layer as the network's output can bear.

For every layer alone it is measured how far the output moves when the smallest x % of that layer's weights are zero. The
distortions of several layers are taken to add up, and a dynamic programme picks the amounts that reach the wanted sparsity at the
least sum. Within a layer the smallest weights go. Reach for it with a trained network and a few hundred inputs, labelled or not;
Gaussian noise does nearly as well as inputs.

Xu, Wang et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", ICCV 2023, arXiv
2308.10438: the curves, theorem 1 (additivity) and the recursion, in the form of the authors' code (RD_VIT_PRUNE). Different from
that code: the dynamic programme is exact (the code's drops a term of the second smallest layer and reads its table one weight
off); a layer is not removed as a whole; exactly ``round(S N)`` weights go. ``distortion="worst", max_layer_sparsity=1`` is what
the published commands measure and allow.

Known not to work: one cut to a high sparsity. Additivity is a first-order argument, and from about 40 % on the layers together do
more harm than the sum says (``RDPlan.measured_distortion`` against ``predicted_distortion`` tells); LAMP and ERK are then ahead. A
curve is flat once its layer is dead, so that without ``max_layer_sparsity`` the cheapest answer can be to kill a layer. Prune in
rounds, with training in between.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from weightroom.errors import check_range, unknown
from weightroom.metrics import copy_model
from weightroom.prune.allocation import Floats, Ints, allocate_counts, amounts_of, removed_counts
from weightroom.prune.base import (
    PRUNABLE,
    PlanPruner,
    ScheduleSpec,
    check_finite,
    magnitudes,
    prunable,
    refuse_samples,
    remove_smallest,
    seeded,
)
from weightroom.prune.plan import Inputs, PruningPlan, Site, call, sites, to_device
from weightroom.prune.shrink import _make_permanent

__all__ = ["RDPlan", "RDPruner", "output_distortion"]

Forward = Callable[[nn.Module, Inputs], Tensor]
Distortion = Literal["mean", "worst"]

#: Inputs that pass through the network at once where no loader says how many.
_CHUNK = 256


class RDPlan(PruningPlan):
    r"""A plan with the curves that it was read off. Only the masks are saved: ``PruningPlan.load`` reads them.

    Args:
        masks: see ``PruningPlan``.
        grid: the amounts, float64 of shape (P + 1,).
        curves: :math:`D_l(a)`, float64 of shape (L, P + 1), a row per tensor of ``masks``.
        predicted_distortion: :math:`\sum_l D_l`, read between the amounts of the grid where need be.
        distortion: what D is, see ``RDPruner``.
        forward_fn: see ``RDPruner``.
        model: see ``PruningPlan``.
        example_inputs: see ``PruningPlan``.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        grid: Floats,
        curves: Floats,
        predicted_distortion: float,
        distortion: Distortion = "mean",
        forward_fn: Forward | None = None,
        model: nn.Module | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        super().__init__(masks, model=model, example_inputs=example_inputs)
        self.grid, self.curves, self.predicted_distortion = grid, curves, predicted_distortion
        self.distortion, self.forward_fn = distortion, forward_fn

    @property
    def amounts(self) -> dict[str, float]:
        """Share of each tensor that goes."""
        return {name: layer.sparsity for name, layer in self.layers().items()}

    def measured_distortion(self, model: nn.Module, data: Tensor | Iterable[Any]) -> float:
        """How far this plan really moves the output of ``model`` (not yet pruned by it), see ``output_distortion``."""
        return output_distortion(model, self, data, distortion=self.distortion, forward_fn=self.forward_fn)


class RDPruner(PlanPruner):
    r"""Removes the smallest weights of each layer, as many as keep the network's output closest to what it was.

    .. math::
        D_l(a) = \frac1M \sum_{m=1}^M \frac1C \|f(x_m) - f_{l,a}(x_m)\|^2, \qquad
        \min_{a_1 .. a_L} \sum_l D_l(a_l) \ \text{ with }\ \sum_l \lfloor a_l n_l \rfloor \ge S \sum_l n_l

    where f is the output before any softmax, in eval mode, and :math:`f_{l,a}` the network without the
    :math:`\lfloor a n_l \rfloor` smallest weights of layer l. What the grid removes beyond ``round(S N)`` is given back where the
    last step costs most per weight. In a network that carries masks the curves are those of the masked network, amounts are still
    shares of all weights, and no layer goes below what is gone.

    Args:
        sparsity: S, see ``PlanPruner``.
        grid: P, for the amounts 0, 1/P, ..., 1, or the amounts themselves, rising from 0 to at most 1.
        distortion: "mean" over the inputs, or "worst": the greatest among them, as in the authors' commands.
        calibration: the inputs to measure on: a tensor of them, an iterable of batches (of inputs, or (inputs, ...)), or "noise":
            standard normal of the shape of ``example_inputs``. None takes the ``data`` that ``fit`` is given.
        n_calibration: M, the most inputs to use; None for all. The authors take 1,024 (CIFAR) and 256 (ImageNet).
        max_layer_sparsity: the most that goes from any layer, in (0, 1].
        seed: of the noise and of torch's random state meanwhile, which is restored afterwards; it decides what a shuffling loader
            gives.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``.
        forward_fn: ``forward_fn(model, inputs) -> Tensor`` of shape (M, ...), for models that return something else or several
            things; the model's own call when None.

    ``fit`` uses neither targets nor ``loss_fn``. It costs one pass of the M inputs per layer and amount, without the part of the
    network before the layer, and memory for all activations of one batch.

    Raises:
        TypeError: ``fit`` gets neither ``data`` nor has ``calibration``, or a data set of samples, not of batches; the model's
            output is not a tensor.
        ValueError: an argument is out of range; the output is not finite; the layers' limits do not let the sparsity be reached.

    Example::

        plan = RDPruner(0.6).fit(model, loader)
        plan.predicted_distortion, plan.measured_distortion(model, loader)   # far apart: rather prune in rounds
        plan.apply(model)
    """

    def __init__(
        self,
        sparsity: float,
        *,
        grid: int | Sequence[float] = 100,
        distortion: Distortion = "mean",
        calibration: Tensor | Iterable[Any] | Literal["noise"] | None = None,
        n_calibration: int | None = 256,
        max_layer_sparsity: float = 0.99,
        seed: int = 0,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
        forward_fn: Forward | None = None,
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        amounts_of(grid)
        if distortion not in ("mean", "worst"):
            raise unknown("distortion", str(distortion), ("mean", "worst"))
        if isinstance(calibration, str) and calibration != "noise":
            raise ValueError(f"calibration must be a tensor, an iterable of batches, 'noise' or None, got {calibration!r}")
        if n_calibration is not None and (not isinstance(n_calibration, int) or n_calibration < 1):
            raise ValueError(f"n_calibration must be an integer >= 1 or None, got {n_calibration!r}")
        check_range("max_layer_sparsity", max_layer_sparsity, low=0.0, high=1.0, open_low=True)
        self.grid, self.distortion, self.calibration, self.n_calibration = grid, distortion, calibration, n_calibration
        self.max_layer_sparsity, self.seed, self.forward_fn = max_layer_sparsity, seed, forward_fn

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> RDPlan:
        """Measures the curves and plans which weights go; see ``PlanPruner.fit``."""
        tensors = prunable(model, self.targets, self.ignore)
        removed = self._count(tensors)
        for site in tensors:
            check_finite(repr(site.name), site.tensor.detach())
        scores = self._scores(model, tensors, data, loss_fn)
        device = tensors[0].tensor.device
        with seeded(self.seed), torch.no_grad():
            batches = list(self._batches(data, example_inputs, device))
            amounts = amounts_of(self.grid)
            gone = np.array([0 if s.mask is None else s.mask.numel() - int(torch.count_nonzero(s.mask)) for s in tensors])
            counts = removed_counts(np.array([site.tensor.numel() for site in tensors]), self.grid)
            counts = np.maximum(counts, gone[:, None])
            D = self._curves(model, tensors, scores, batches, counts, gone)
        allowed = np.broadcast_to(amounts <= self.max_layer_sparsity + 1e-12, D.shape)
        picks = allocate_counts(D, counts, allowed, gone, np.zeros(len(D)), removed)
        chosen = np.array([gone[layer] if i < 0 else counts[layer, i] for layer, i in enumerate(picks)])
        goes = _give_back(D, counts, gone, chosen, removed)
        return RDPlan(
            {s.name: remove_smallest([x], [s.mask], int(k))[0] for s, x, k in zip(tensors, scores, goes, strict=True)},
            grid=amounts,
            curves=D,
            predicted_distortion=sum(float(np.interp(k, n, d)) for k, n, d in zip(goes, counts, D, strict=True)),
            distortion=self.distortion,
            forward_fn=self.forward_fn,
            model=model,
            example_inputs=example_inputs,
        )

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        return [magnitudes(site) for site in tensors]

    def _batches(self, data: Iterable[Any] | None, example_inputs: Inputs | None, device: torch.device) -> Iterator[Inputs]:
        if isinstance(self.calibration, str):
            like = next(_batches(data, 1), None) if example_inputs is None and data is not None else example_inputs
            if like is None:
                raise TypeError("RDPruner.fit needs example_inputs: calibration='noise' has their shape")
            generator = torch.Generator().manual_seed(self.seed)
            n = self.n_calibration or _CHUNK
            source: Any = (_noise_like(like, min(_CHUNK, n - i), generator) for i in range(0, n, _CHUNK))
        else:
            source = data if self.calibration is None else self.calibration
            if source is None:
                raise TypeError(
                    "RDPruner.fit needs inputs to measure on: give data, or calibration= (a tensor, batches or 'noise')"
                )
            source = _batches(source, self.n_calibration)
        for batch in source:
            yield to_device(batch, device)

    def _curves(
        self, model: nn.Module, tensors: Sequence[Site], scores: list[Tensor], batches: list[Inputs], counts: Ints, gone: Ints
    ) -> Floats:
        """D, (L, P + 1)."""
        total = sum(_length(batch) for batch in batches)
        if not total:
            raise ValueError("data holds no inputs to measure on")
        dense = copy_model(model).eval()
        _make_permanent(dense)
        places, passes, worst = sites(dense), _Passes(dense), self.distortion == "worst"
        D = np.zeros(counts.shape)
        for batch in batches:
            output = functools.partial(_outputs, dense, batch, self.forward_fn)
            f = passes.record(output)
            if not bool(torch.isfinite(f).all()):
                raise ValueError("the model's output on the calibration inputs is NaN or infinite")
            moved = lambda f=f, output=output: (f - output()).square().mean(1)  # noqa: E731  # 1/C sum_c, per input
            for row, site, score in zip(range(len(tensors)), tensors, scores, strict=True):
                steps, where = np.unique(counts[row], return_inverse=True)
                goes = [int(k) for k in steps if k > gone[row]]
                order = _ascending(score, site.mask)
                each = [m.amax() if worst else m.sum() / total for m in passes.pruned(moved, places[site.name], order, goes)]
                d = np.zeros(len(steps))
                d[len(steps) - len(goes) :] = torch.stack(each).cpu().numpy() if each else []
                if not np.isfinite(d).all():
                    amount = steps[np.flatnonzero(~np.isfinite(d))[0]] / score.numel()
                    raise ValueError(f"without {amount:.0%} of {site.name!r} the model's output is NaN or infinite")
                D[row] = np.maximum(D[row], d[where.ravel()]) if worst else D[row] + d[where.ravel()]
        return D


@torch.no_grad()
def output_distortion(
    model: nn.Module,
    plan: PruningPlan,
    data: Tensor | Iterable[Any],
    *,
    distortion: Distortion = "mean",
    forward_fn: Forward | None = None,
) -> float:
    r"""How far a plan moves the output of a model: :math:`\frac1C \|f(x) - \tilde f(x)\|^2`, in eval mode, in float64.

    Args:
        model: as it is before the plan is applied; left as it was.
        plan: any plan.
        data: inputs, or batches of inputs or (inputs, ...).
        distortion: "mean" over all inputs, or the "worst" among them.
        forward_fn: see ``RDPruner``.

    Raises:
        ValueError: there is no input, or the plan does not fit the model.
        TypeError: the model's output is not a tensor.
    """
    if distortion not in ("mean", "worst"):
        raise unknown("distortion", str(distortion), ("mean", "worst"))
    dense = copy_model(model).eval()
    pruned = plan.apply(copy_model(model)).eval()
    device = next(dense.parameters()).device
    moved = [
        (_outputs(dense, x, forward_fn) - _outputs(pruned, x, forward_fn)).square().mean(1)
        for x in (to_device(batch, device) for batch in _batches(data, None))
    ]
    if not moved:
        raise ValueError("data holds no inputs to measure on")
    every = torch.cat(moved)
    return float(every.mean() if distortion == "mean" else every.amax())


@dataclass
class _Call:
    """One call of a module in a pass: what it returned, the number of the call after it, and whether it may be returned again.

    The lists and dicts of an output are kept and given as copies, as the caller may change them; the tensors are the same ones.
    """

    module: nn.Module
    end: int = 0
    output: Any = None
    versions: list[int] | None = None


class _Passes:
    """Runs a model over and over on one input while one layer changes, without repeating the modules that come before it.

    Every module's ``forward`` is replaced for good. A pass is recorded as the sequence of calls; up to the first call that uses the
    layer, later passes return what each call returned. What was changed in place after it was returned is computed again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[_Call] = []
        self.first, self.cursor, self.recording = 0, 0, False
        self.parents: dict[nn.Module, list[nn.Module]] = {}
        for module in list(model.modules()):
            for child in module.children():
                self.parents.setdefault(child, []).append(module)
            module.forward = self._wrap(module, module.forward)

    def record(self, output: Callable[[], Tensor]) -> Tensor:
        """Runs a pass and notes its calls."""
        self.calls, self.recording = [], True
        result = output()
        self.recording = False
        self.starts: dict[nn.Module, int] = {}
        for number, made in enumerate(self.calls):
            self.starts.setdefault(made.module, number)
            if made.versions is not None and made.versions != _versions(made.output):
                made.versions = made.output = None
        return result

    def pruned(self, output: Callable[[], Tensor], place: Site, order: Tensor, counts: list[int]) -> list[Tensor]:
        """What ``output`` gives without the first so many weights of ``order``, for rising counts; the weight is put back."""
        if not counts:
            return []
        weight = place.tensor
        original = weight.detach().clone()

        def sweep(first: int) -> list[Tensor] | None:
            flat, gone, results = original.flatten().clone(), 0, []
            for number, count in enumerate(counts):
                flat[order[gone:count]] = 0
                weight.copy_(flat.view(weight.shape))
                results.append(self._run(output, first))
                # What comes before the layer was read off the modules: look once whether something else reads its weight.
                if first and number == len(counts) // 2 and not _close(results[-1], self._run(output, 0)):
                    return None
                gone = count
            return results

        try:
            return sweep(min(self._first_use(module) for _, module, _ in place.places)) or cast(list[Tensor], sweep(0))
        finally:
            weight.copy_(original)

    def _run(self, output: Callable[[], Tensor], first: int) -> Tensor:
        self.first, self.cursor = first, 0
        return output()

    def _first_use(self, module: nn.Module) -> int:
        """The number of the first call of a module, or, where it is never called itself, of one that holds it."""
        if module in self.starts:
            return self.starts[module]
        return min((self._first_use(parent) for parent in self.parents.get(module, [])), default=0)

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.recording:
                made = _Call(module)
                self.calls.append(made)
                output = forward(*args, **kwargs)
                made.end, made.versions = len(self.calls), _versions(output)
                made.output = None if made.versions is None else _structure(output)
                return output
            if self.cursor < self.first:
                made = self.calls[self.cursor]
                if made.module is module and made.end <= self.first and made.versions is not None:
                    self.cursor = made.end
                    return _structure(made.output)
            self.cursor += 1
            return forward(*args, **kwargs)

        return run


def _structure(output: Any) -> Any:
    """A copy of an output that holds the same tensors."""
    return copy.deepcopy(output, {id(tensor): tensor for tensor in _tensors(output)})


def _versions(output: Any) -> list[int] | None:
    """How often each tensor of an output has been changed in place; None where the output holds more than tensors."""
    if output is None:
        return []
    if isinstance(output, Tensor):
        return [output._version]
    parts = list(output.values()) if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else None
    found = [None] if parts is None else [_versions(part) for part in parts]
    return None if any(part is None for part in found) else [version for part in found if part is not None for version in part]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().amax() <= 1e-4 * b.abs().amax())


def _give_back(D: Floats, counts: Ints, gone: Ints, chosen: Ints, needed: int) -> Ints:
    """Removes exactly ``needed``: layers go back towards their next lower amount, the most costly per weight first."""
    goes = chosen.copy()
    while (spare := int(goes.sum()) - needed) > 0:
        gain = np.full(len(goes), -np.inf)
        lower = gone.copy()
        for layer in (goes > gone).nonzero()[0]:
            lower[layer] = max(gone[layer], counts[layer][counts[layer] < goes[layer]].max(initial=0))
            high, low = np.interp([goes[layer], lower[layer]], counts[layer], D[layer])
            gain[layer] = (high - low) / (goes[layer] - lower[layer])
        dearest = int(gain.argmax())
        goes[dearest] = max(lower[dearest], goes[dearest] - spare)
    return goes


def _ascending(score: Tensor, mask: Tensor | None) -> Tensor:
    """Flat indices in the order in which weights go: what is masked, then the smallest, ties by index."""
    return (score if mask is None else score.masked_fill(~mask, -1)).flatten().argsort(stable=True)


def _outputs(model: nn.Module, inputs: Inputs, forward_fn: Forward | None) -> Tensor:
    """f(x) in float64, (M, C)."""
    y = call(model, inputs) if forward_fn is None else forward_fn(model, inputs)
    if not isinstance(y, Tensor):
        raise TypeError(f"the model's output must be a tensor, got {type(y).__name__}: give forward_fn(model, inputs) -> Tensor")
    return (y.cpu() if y.device.type == "mps" else y).double().reshape(len(y), -1)


def _batches(data: Tensor | Iterable[Any], limit: int | None) -> Iterator[Inputs]:
    """The inputs of each batch that holds any, up to so many in all."""
    refuse_samples(data)
    left = limit
    for batch in data.split(_CHUNK) if isinstance(data, Tensor) else data:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        if not _length(inputs):
            continue
        if left is not None:
            inputs = _head(inputs, left)
            left -= _length(inputs)
        yield inputs
        if left == 0:
            return


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _length(inputs: Inputs) -> int:
    return next((len(tensor) for tensor in _tensors(inputs) if tensor.ndim), 0)


def _map(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: _map(part, change) for name, part in inputs.items()}
    return [_map(part, change) for part in inputs] if isinstance(inputs, list | tuple) else inputs


def _head(inputs: Inputs, n: int) -> Inputs:
    length = _length(inputs)
    return inputs if length <= n else _map(inputs, lambda tensor: tensor[:n] if tensor.ndim and len(tensor) == length else tensor)


def _noise_like(inputs: Inputs, n: int, generator: torch.Generator) -> Inputs:
    def noise(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            raise ValueError(f"calibration='noise' needs inputs of floating point, got {like.dtype}")
        return torch.randn(n, *like.shape[1:], generator=generator).to(like.dtype)

    return _map(inputs, noise)

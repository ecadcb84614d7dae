"""What plan pruners share: which weights count, how many go, which of them, and over how many steps.

A plan pruner is four things put together. A *score* says what each weight is worth. An *allocation* says how many weights each
tensor keeps: one ranking over the whole network, or quotas by layer. The *granularity* is what is removed at once; here single
weights. A *schedule* spreads the removal over training. ``PlanPruner`` fixes the first three for one target sparsity;
``GradualPruning`` and ``prune_gradually`` apply any of them in steps.
"""

from __future__ import annotations

import copy
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import Dataset, IterableDataset

from weightroom.errors import unknown
from weightroom.prune.plan import Inputs, PruningPlan, Site, sites, to_device

__all__ = [
    "PRUNABLE",
    "GradualPruning",
    "PlanPruner",
    "Schedule",
    "ScheduleSpec",
    "alive_magnitudes",
    "apportion",
    "check_finite",
    "lamp_scores",
    "magnitudes",
    "prunable",
    "prune_gradually",
    "remove_smallest",
    "seeded",
    "sparsity_at",
    "successive_sparsities",
]

#: Layers whose weights are pruned unless said otherwise: linear, (transposed) convolution, recurrent, attention.
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)

_WEIGHT = re.compile(r"weight|(in|q|k|v)_proj_weight|weight_(ih|hh|hr)_l\d+(_reverse)?")

Kind = Literal["linear", "geometric", "cubic"]
ScheduleSpec = Literal["oneshot"] | tuple[str, int, int, int]


def prunable(
    model: nn.Module, targets: Sequence[type[nn.Module] | str] = PRUNABLE, ignore: Sequence[str | int] = ()
) -> list[Site]:
    """The parameters that a pruner may touch, in the order of the model's modules; shared ones once.

    Args:
        model: any module.
        targets: module types, whose weights count (biases never do), and patterns of full parameter names ("head.bias",
            "*.norm?.weight"), which count whatever they are.
        ignore: what stays dense: names or patterns of modules ("head", "*.attn") or parameters, and positions among the
            tensors that would be pruned (0 is the first, -1 the last). A shared parameter stays if one of its names is named.

    Raises:
        ValueError: nothing is left to prune, an entry of ``ignore`` matches nothing, or a weight cannot be pruned: it is not
            initialised, not of floating point, not finite in shape, or computed from other tensors.
        TypeError: an entry of ``targets`` or ``ignore`` is of another kind.
    """
    types = tuple(target for target in targets if isinstance(target, type))
    patterns = [target for target in targets if isinstance(target, str)]
    for kind, given, accepted in (("targets", targets, (type, str)), ("ignore", ignore, (str, int))):
        for entry in given:
            if isinstance(given, str) or not isinstance(entry, accepted) or isinstance(entry, bool):
                words = " and ".join({type: "module types", str: "names", int: "positions"}[a] for a in accepted)
                raise TypeError(f"{kind} must be a sequence of {words}, got {given!r}")
    names = [entry for entry in ignore if isinstance(entry, str)]
    _refuse_computed(model, types, names)
    found = [
        site
        for site in sites(model).values()
        if any(isinstance(m, types) and _WEIGHT.fullmatch(a) for _, m, a in site.places)
        or any(fnmatchcase(name, pattern) for name in site.names for pattern in patterns)
    ]
    found = [site for site in found if isinstance(site.tensor, UninitializedParameter) or site.tensor.numel()]
    _refuse_unknown(model, ignore, len(found))
    spared = {i % len(found) for i in ignore if isinstance(i, int)} if found else set()
    found = [site for i, site in enumerate(found) if i not in spared and not any(_matches(site.names, name) for name in names)]
    if not found:
        looked = ", ".join([t.__name__.lstrip("_") for t in types] + [repr(p) for p in patterns])
        spare = f", except {tuple(ignore)}" if ignore else ""
        raise ValueError(f"the model has no weight to prune: looked for {looked or 'nothing'}{spare}")
    for site in found:
        if isinstance(site.tensor, UninitializedParameter):
            raise ValueError(f"{site.name!r} is not initialised: run the model once before pruning it")
        if not (site.tensor.is_floating_point() or site.tensor.is_complex()):
            raise ValueError(f"{site.name!r} is of dtype {site.tensor.dtype}: only floating-point weights can be pruned")
    return found


def magnitudes(site: Site) -> Tensor:
    """:math:`|w|`, in float32 at least."""
    weight = site.tensor.detach().abs()
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def alive_magnitudes(site: Site) -> Tensor:
    """``magnitudes``, 0 where a mask in force has removed the weight."""
    return magnitudes(site) if site.mask is None else magnitudes(site) * site.mask


def lamp_scores(weight: Tensor) -> Tensor:
    r"""LAMP scores :math:`w_u^2 / \sum_{|w_v| \ge |w_u|} w_v^2` of one layer, float64, of the weight's shape.

    Equal magnitudes count in the order of the flat index, the earlier one as the smaller; zeros score 0.
    """
    ascending, order = _ascending(weight.detach().abs().flatten())
    ascending = ascending.double()
    squares = ascending.div_(ascending[-1].clamp_min(torch.finfo(torch.float64).tiny)).square_()
    # float64: over millions of entries the scores of the smallest are far below float32's resolution of the sum
    above = squares.flip(0).cumsum(0).flip(0).clamp_min_(torch.finfo(torch.float64).tiny)
    return torch.empty_like(squares).scatter_(0, order, squares.div_(above)).view(weight.shape)


def _ascending(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values >= 0 in order and their indices; equal ones in the order of the indices."""
    if values.device.type != "cpu" or values.dtype != torch.float32 or len(values) >= 2**32:
        return values.sort(stable=True)
    # The bits of floats >= 0 sort as integers do: with the index below them one sort of integers, far faster, gives both.
    keys = values.numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    order = torch.from_numpy((keys & np.uint64(2**32 - 1)).view(np.int64))
    return torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.float32)), order


def check_finite(what: str, values: Tensor) -> None:
    """Raises ValueError where a value is NaN or infinite."""
    bounds = torch.aminmax(values.abs() if values.is_complex() else values)
    if not all(math.isfinite(bound) for bound in torch.stack(bounds).tolist()):
        raise ValueError(f"{what} holds NaN or infinity: it cannot be ranked")


def remove_smallest(scores: Sequence[Tensor], alive: Sequence[Tensor | None], removed: int) -> list[Tensor]:
    """Masks of what is kept once exactly ``removed`` entries of all tensors together are gone, the lowest scores first.

    What is not alive goes first and counts; ties go in the order of the tensors, then of the flat index.

    Args:
        scores: real tensors without NaN.
        alive: per tensor, a bool mask of what may be kept, or None for all.
        removed: at least the number of entries not alive, at most all.
    """
    scores = [score if mask is None else score.masked_fill(~mask, -torch.inf) for score, mask in zip(scores, alive, strict=True)]
    if removed == 0:
        return [torch.ones(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    dtype = scores[0].dtype
    for score in scores[1:]:
        dtype = torch.promote_types(dtype, score.dtype)
    scores = [score.to(dtype) for score in scores]
    tau = _kth_smallest(scores, removed)
    keep = [(score > tau).contiguous() for score in scores]
    ties = sum(score.numel() for score in scores) - removed - sum(int(torch.count_nonzero(mask)) for mask in keep)
    for score, mask in zip(reversed(scores), reversed(keep), strict=True):
        if ties == 0:
            break
        last = (score == tau).flatten().nonzero().flatten()[-ties:]
        mask.view(-1)[last] = True
        ties -= len(last)
    return keep


def apportion(quotas: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Shares ``total`` weights out in proportion to ``quotas``, none above its cap: the method of Webster and Sainte-Laguë.

    One by one the weights go to the layer with the highest quota / (kept + 1/2), so that the counts of a smaller total are
    never above those of a larger one: masks at successive sparsities nest, as they would not under largest remainders.

    Args:
        quotas: > 0.
        caps: the most that each may get.
        total: at most the sum of the caps.
    """
    q, cap = np.asarray(quotas, dtype=np.float64), np.asarray(caps, dtype=np.int64)
    at = lambda scale: np.minimum(cap, np.floor(scale * q + 0.5)).astype(np.int64)  # noqa: E731
    low, high = 0.0, float(((cap + 1) / q).max())
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if at(middle).sum() <= total else (low, middle)
    kept = at(low)
    tied = (at(high) > kept).nonzero()[0]  # low and high are neighbours: what lies between them is one tie
    kept[tied[: total - int(kept.sum())]] += 1
    return [int(count) for count in kept]


def needed(
    pruner: str, data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
) -> tuple[Iterable[Any], Callable[..., Tensor]]:
    """Returns both, or raises a TypeError that says which of them ``pruner.fit`` was not given."""
    if data is None or loss_fn is None:
        missing = " and ".join(word for word, value in (("data", data), ("loss_fn", loss_fn)) if value is None)
        raise TypeError(f"{pruner}.fit needs {missing}: batches (inputs, targets) and loss_fn(outputs, targets)")
    return data, loss_fn


def labelled(data: Iterable[Any], device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    """The inputs and targets of each batch that holds any, on ``device``; raises a TypeError where a batch is no such pair."""
    refuse_samples(data)
    for batch in data:
        if not (isinstance(batch, tuple | list) and len(batch) >= 2):
            raise TypeError(f"data must give batches (inputs, targets), got {type(batch).__name__}")
        if batch[1].numel():
            yield to_device(batch[0], device), batch[1].to(device)


def refuse_samples(data: Any) -> None:
    """Raises a TypeError for a data set, whose items are samples and would each be taken for a batch."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(f"data must give batches, and a {type(data).__name__} gives samples: put it in a DataLoader")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For the block torch draws under ``seed``, on the CPU and on every GPU in use; then their random states are as they were."""
    # torch.manual_seed would seed GPUs that nothing runs on yet as well, and their states cannot be kept.
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


class PlanPruner(ABC):
    """A pruner that looks at a model and returns a plan; the model stays bit for bit as it was.

    A subclass says what weights are worth (``_scores``) and, if it does not rank them all together, how the removal is shared
    out (``_select``).

    Args:
        sparsity: share of the prunable weights to remove, in [0, 1). A model that carries masks counts all its weights, those
            already removed included; they are never revived.
        targets: which weights count, see ``prunable``.
        ignore: which of them stay dense, see ``prunable``.
        granularity: what is removed at once; "weight" is the only one.
        schedule: over which optimizer steps ``gradual`` spreads the removal: "oneshot", or ("cubic" | "geometric" | "linear",
            t0, t1, every). ``fit`` always plans for ``sparsity`` itself.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        self.sparsity = _check_sparsity(sparsity)
        self.targets = targets
        self.ignore = ignore
        if granularity != "weight":
            raise ValueError(f"granularity must be 'weight', got {granularity!r}")
        self.granularity = granularity
        self.schedule = schedule
        Schedule.of(schedule)

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> PruningPlan:
        """Plans which weights go: exactly ``round(sparsity * N)`` of the N prunable ones.

        Args:
            model: the model; left as it was (parameters, buffers, gradients, modes, hooks, random state).
            data: batches (inputs, targets), for methods that measure.
            example_inputs: what the model takes; kept in the plan for ``macs`` and "shrink".
            loss_fn: ``loss_fn(outputs, targets) -> scalar``, for methods that differentiate.

        Returns:
            The plan; it covers every prunable tensor, also those of which nothing goes.

        Raises:
            ValueError: there is nothing to prune, more than ``sparsity`` is already pruned, or a weight is NaN or infinite.
        """
        tensors = self._tensors(model)
        removed = self._count(tensors)
        for site in tensors:
            check_finite(repr(site.name), site.tensor.detach())
        scores = self._scores(model, tensors, data, loss_fn)
        masks = self._select(tensors, scores, removed)
        return PruningPlan(
            {site.name: mask for site, mask in zip(tensors, masks, strict=True)}, model=model, example_inputs=example_inputs
        )

    def at(self, sparsity: float) -> PlanPruner:
        """Returns the same pruner with another target."""
        other = copy.copy(self)
        other.sparsity = _check_sparsity(sparsity)
        return other

    def gradual(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> GradualPruning:
        """Returns the hook that prunes ``model`` by the schedule while it is trained; arguments as for ``fit``."""
        return GradualPruning(self, model, data=data, example_inputs=example_inputs, loss_fn=loss_fn)

    def _tensors(self, model: nn.Module) -> list[Site]:
        """What counts, in the model's order."""
        return prunable(model, self.targets, self.ignore)

    @abstractmethod
    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        """What each weight is worth: tensors of the weights' shapes, without NaN."""

    def _select(self, tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
        """Masks of what is kept; unless overridden, one ranking over all tensors."""
        return remove_smallest(scores, [site.mask for site in tensors], removed)

    def _count(self, tensors: Sequence[Site]) -> int:
        total, gone = _sizes(tensors)
        removed = round(self.sparsity * total)
        if removed < gone:
            raise ValueError(
                f"sparsity {self.sparsity:g} asks for {removed} removed weights, "
                f"but {gone} of {total} are already pruned (sparsity {gone / total:g})"
            )
        return removed

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sparsity={self.sparsity:g})"


@dataclass(frozen=True)
class Schedule:
    """Which sparsity at which optimizer step.

    Args:
        kind: "cubic", "geometric" or "linear", see ``sparsity_at``.
        t0: step of the first pruning.
        t1: step from which the target is reached; the last pruning.
        every: optimizer steps between prunings.
    """

    kind: Kind
    t0: int
    t1: int
    every: int

    @classmethod
    def of(cls, spec: ScheduleSpec) -> Schedule:
        """Reads "oneshot" or a tuple (kind, t0, t1, every).

        Raises:
            ValueError: it is neither, or not 0 <= t0 < t1, or every < 1.
        """
        if spec == "oneshot":
            return cls("linear", 0, 0, 1)
        if not (isinstance(spec, tuple) and len(spec) == 4 and spec[0] in ("linear", "geometric", "cubic")):
            raise ValueError(f"schedule must be 'oneshot' or ('cubic' | 'geometric' | 'linear', t0, t1, every), got {spec!r}")
        kind, t0, t1, every = spec
        if not all(isinstance(t, int) for t in (t0, t1, every)) or not 0 <= t0 < t1 or every < 1:
            raise ValueError(f"schedule needs integers 0 <= t0 < t1 and every >= 1, got {spec!r}")
        return cls(cast(Kind, kind), t0, t1, every)

    def due(self, step: int) -> bool:
        """Whether to prune after this many optimizer steps."""
        return step == self.t1 or (self.t0 <= step < self.t1 and (step - self.t0) % self.every == 0)

    def at(self, step: int, final: float, start: float = 0.0) -> float:
        """The sparsity after this many optimizer steps."""
        passed = 1.0 if step >= self.t1 else max(0.0, (step - self.t0) / (self.t1 - self.t0))
        return sparsity_at(self.kind, passed, final, start)


def sparsity_at(kind: Kind, passed: float, final: float, start: float = 0.0) -> float:
    r"""The sparsity of a schedule from ``start`` :math:`=S_0` to ``final`` :math:`=S_f` once a share x of it has passed.

    "cubic" (Zhu and Gupta 2018, arXiv 1710.01878, eq. 1): :math:`S_f + (S_0 - S_f)(1 - x)^3`, fast while the network is
    redundant, flat at the end. "geometric": the density falls by the same factor in equal times,
    :math:`1 - (1 - S_0) ((1 - S_f)/(1 - S_0))^x`; in R rounds to :math:`1 - (1 - r)^R` every round removes the share r of the
    weights still there. "linear": :math:`S_0 + (S_f - S_0) x`.
    """
    if kind == "cubic":
        return final + (start - final) * (1 - passed) ** 3
    if kind == "geometric":
        return final if passed == 1 else 1 - (1 - start) * ((1 - final) / (1 - start)) ** passed
    if kind == "linear":
        return final + (start - final) * (1 - passed)
    raise ValueError(f"kind must be 'cubic', 'geometric' or 'linear', got {kind!r}")


def successive_sparsities(final: float, rounds: int, *, kind: Kind = "geometric", start: float = 0.0) -> list[float]:
    """The sparsities after each of ``rounds`` equal parts of a schedule; the last one is ``final``.

    Raises:
        ValueError: ``rounds`` < 1, or not 0 <= start <= final < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if not 0 <= start <= final < 1:
        raise ValueError(f"sparsities must satisfy 0 <= start <= final < 1, got start={start}, final={final}")
    return [sparsity_at(kind, i / rounds, final, start) for i in range(1, rounds + 1)]


class GradualPruning:
    """Prunes a model while it is trained: call it with the number of optimizer steps taken, after each of them.

    Where the schedule says so, it plans anew at the sparsity due, starting from what is already gone, and applies the plan's
    mask in place. ``train.fit(model, ..., after_step=pruner.gradual(model))`` does it all.

    Args:
        pruner: any plan pruner with a schedule; the sparsity rises from the model's own to the pruner's.
        model: the model that is trained; with ``t0 = 0`` (and for "oneshot") pruned once at this point.
        data: as for ``fit``.
        example_inputs: as for ``fit``.
        loss_fn: as for ``fit``.

    The attribute ``plan`` is the last plan applied; None before the first.
    """

    def __init__(
        self,
        pruner: PlanPruner,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        self.pruner, self.model, self.schedule = pruner, model, Schedule.of(pruner.schedule)
        self.plan: PruningPlan | None = None
        self._given: dict[str, Any] = {"data": data, "example_inputs": example_inputs, "loss_fn": loss_fn}
        tensors = pruner._tensors(model)
        pruner._count(tensors)  # says now, not at t0, that the target is below what is already pruned
        total, gone = _sizes(tensors)
        self.start = gone / total
        self(0)

    def __call__(self, step: int) -> None:
        """Prunes if the schedule has something due after ``step`` optimizer steps."""
        if self.schedule.due(step):
            self.plan = self.pruner.at(self.schedule.at(step, self.pruner.sparsity, self.start)).fit(self.model, **self._given)
            self.plan.apply(self.model)


def prune_gradually(
    model: nn.Module,
    pruner: PlanPruner,
    sparsities: Iterable[float],
    train_between: Callable[[nn.Module], Any],
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Inputs | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> PruningPlan:
    """Iterative pruning: for each sparsity in turn plan, mask the model in place, and train.

    Args:
        model: the model, changed in place.
        pruner: any plan pruner; its own sparsity and schedule are not used.
        sparsities: never falling, see ``successive_sparsities``.
        train_between: trains the masked model, called after each pruning, the last one included.
        data: as for ``fit``.
        example_inputs: as for ``fit``.
        loss_fn: as for ``fit``.

    Returns:
        The last plan, which covers all that was removed.

    Raises:
        ValueError: there is no sparsity, or one is below what is already pruned.
    """
    plan = None
    for sparsity in sparsities:
        plan = pruner.at(sparsity).fit(model, data=data, example_inputs=example_inputs, loss_fn=loss_fn)
        plan.apply(model)
        train_between(model)
    if plan is None:
        raise ValueError("sparsities must not be empty")
    return plan


def _check_sparsity(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return float(sparsity)


def _sizes(tensors: Sequence[Site]) -> tuple[int, int]:
    """Weights in all, and those that masks already remove."""
    gone = sum(site.mask.numel() - int(torch.count_nonzero(site.mask)) for site in tensors if site.mask is not None)
    return sum(site.tensor.numel() for site in tensors), gone


def _kth_smallest(values: Sequence[Tensor], k: int) -> Tensor:
    pool = torch.cat([value.flatten().to(values[0].device) for value in values])
    if pool.device.type == "cpu":  # introselect in place: linear time, and no second copy as torch.kthvalue makes
        array = pool.numpy()
        array.partition(k - 1)
        return torch.tensor(array[k - 1])
    return pool.sort().values[k - 1].cpu()  # a radix sort there, faster than torch.kthvalue


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def _refuse_unknown(model: nn.Module, ignore: Sequence[str | int], count: int) -> None:
    names = {name for site in sites(model).values() for name in site.names} | {name for name, _ in model.named_modules() if name}
    for entry in ignore:
        if isinstance(entry, int):
            if not -count <= entry < count:
                raise ValueError(f"ignore: there is no position {entry} among {count} prunable tensors")
        elif not any(fnmatchcase(name, entry) for name in names):
            raise unknown("module or parameter in ignore", entry, names)


def _refuse_computed(model: nn.Module, types: tuple[type[nn.Module], ...], ignore: Sequence[str]) -> None:
    """A weight that is computed from other tensors is no parameter: it would be left out of the count without a word."""
    for path, module in model.named_modules():
        if not isinstance(module, types):
            continue
        computed = [name for name in getattr(module, "parametrizations", {}) if _WEIGHT.fullmatch(name)]
        plain = vars(module).get("weight")
        if isinstance(plain, Tensor) and "weight_mask" not in module._buffers:
            computed.append("weight")
        for attribute in computed:
            name = f"{path}.{attribute}" if path else attribute
            if not any(_matches([name], pattern) for pattern in ignore):
                raise ValueError(
                    f"{name!r} is computed from other tensors (parametrization, weight norm, spectral norm): "
                    "remove that first, or ignore it"
                )

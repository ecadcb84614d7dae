r"""Activate-while-Pruning (AP): part of what a pruner may remove goes to weights that keep ReLU units silent.

Behind a ReLU inputs are >= 0, so that a negative weight can only lower what its unit computes; and a unit that is silent on most
inputs passes no gradient, so that its weights stand still. AP works beside any plan pruner: of what a cycle of training removes,
the pruner (the host) takes the larger part by its own score and AP a small part, the negative weights that have moved least since
the cycle began. Reach for it with iterative pruning of ReLU networks by the lottery-ticket procedure (train, prune, rewind).

Liu, Ghosh, Motani, "AP: Selective Activation for De-sparsifying Pruned Networks", TMLR 2023, arXiv 2212.06145, and the authors'
script for ResNet-20. Not taken over from it: it prunes the scales of batch norms too, ranks some layers twice where there are
biases, removes one weight too many, and lets AP take weights of the first layer, whose inputs have both signs.

Known not to work: with weight decay, which moves every weight, "standing still" means little more than "small". On small
perceptrons no gain over the host alone shows, and below 5 % density AP does harm. With a norm between layer and ReLU the
argument about signs needs a positive scale; for GELU or SiLU there is none.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from weightroom.errors import check_range, unknown
from weightroom.metrics import copy_model
from weightroom.prune.base import PlanPruner, _sizes, refuse_samples, remove_smallest, seeded
from weightroom.prune.plan import Inputs, PruningPlan, Site, call, evaluating, sites, to_device

__all__ = ["ActivateWhilePruning", "ActivationPlan"]

#: Weights that the sample looks at, and that a CPU looks at in one go.
_SAMPLE, _CHUNK = 2**16, 2**16


class ActivationPlan(PruningPlan):
    """A plan that knows which of its two steps took what. Only the plan itself is saved: ``PruningPlan.load`` reads it.

    Args:
        plan: all that goes, what was gone before included.
        before: parameter name -> mask of what was there before; None for all.
        ap: parameter name -> flat indices of what AP took.
    """

    def __init__(self, plan: PruningPlan, before: Mapping[str, Tensor | None], ap: Mapping[str, Tensor]) -> None:
        super().__init__(plan.masks, channels=plan.channels, deltas=plan.deltas, example_inputs=plan.example_inputs)
        self._model, self._before, self._ap = plan._model, dict(before), dict(ap)

    @property
    def log(self) -> dict[str, dict[str, Tensor]]:
        """What each step took: "host" and "ap" -> parameter name -> bool tensor of the parameter's shape, True where taken."""
        host, ap = {}, {}
        for name, mask in self.masks.items():
            before = self._before.get(name)
            gone = ~mask if before is None else before & ~mask
            ap[name] = torch.zeros(mask.shape, dtype=torch.bool, device=mask.device)
            if name in self._ap:
                ap[name].view(-1)[self._ap[name]] = True
            host[name] = gone & ~ap[name]
        return {"host": host, "ap": ap}


class ActivateWhilePruning:
    r"""A plan pruner and AP, together removing as much as the pruner alone would.

    Over a cycle of training that takes the weights from :math:`w^{start}` to :math:`w^{end}`, with N prunable weights:

    1. the host, its sparsity lowered in proportion, removes :math:`\mathrm{round}(pN) - \mathrm{round}(qN)` weights by its own
       score, give or take what it rounds where it shares out by module;
    2. AP removes the other :math:`\mathrm{round}(qN)`: of the weights that are left with :math:`w^{end} < 0` in layers fed by a
       ReLU, those with the smallest :math:`|w^{end} - w^{start}|` of the whole network, ties by layer, then by flat index.

    Where there are fewer such weights AP takes them all, with a warning, and the host the rest.

    A layer is fed by a ReLU where all it is given is non-negative whatever the network's input: rectifiers, sigmoids, and what
    pooling, dropout, reshaping, concatenation and sums make of them. It is read off the model's graph (``torch.fx``), or, for models
    that cannot be traced throughout, from a pass over ``data`` or ``example_inputs``; in a pass a layer that is given non-negative
    values counts, though they may be so for these inputs only, unless it is the first or given the inputs themselves. Only linear
    layers and convolutions count. In a model without a layer fed by a ReLU all of them but the first are taken, with a warning.

    Args:
        base: the host; its sparsity p is a share of all prunable weights, as is ``rate``. Of a host with shares by module pN is what
            it removes with these.
        rate: q, in [0, p]; 0 leaves the host as it is, bit for bit. The paper's cycles have q = p / 10.
        criterion: which candidates go first: those of least "movement", or "random" ones, to compare with.
        sign: "negative", or "positive", to compare with.
        when: in which cycles AP takes its part: "every" (AP-Pro), the "last" one of ``iterate`` (AP-Lite), or the numbers of
            cycles, from 0; a cycle begins with ``snapshot``. In the others the host takes all.
        skip_first: leave layers alone that no ReLU feeds, as the first one; False for all layers, as in the authors' script, which at
            extreme sparsity does less harm: the negative weights of a few layers run out.
        seed: for the "random" criterion.

    Raises:
        TypeError: ``base`` is not a plan pruner.
        ValueError: an argument is out of its range.

    Example::

        ap = ActivateWhilePruning(GlobalMagnitudePruner(0.2), rate=0.02)
        ap.snapshot(model)        # the cycle begins
        train(model)
        ap.fit(model).apply(model)

        plan = ap.iterate(model, successive_sparsities(0.95, 14), train)    # or all cycles, with rewinding
        train(model)
    """

    def __init__(
        self,
        base: PlanPruner,
        rate: float = 0.02,
        *,
        criterion: Literal["movement", "random"] = "movement",
        sign: Literal["negative", "positive"] = "negative",
        when: Literal["every", "last"] | Iterable[int] = "every",
        skip_first: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(base, PlanPruner):
            raise TypeError(f"base must be a plan pruner (GlobalMagnitudePruner(0.2), say), got {type(base).__name__}")
        check_range("rate", rate, low=0.0, high=base.sparsity)
        for name, value, accepted in (("criterion", criterion, ("movement", "random")), ("sign", sign, ("negative", "positive"))):
            if value not in accepted:
                raise unknown(name, str(value), accepted)
        self.base, self.rate, self.criterion, self.sign = base, rate, criterion, sign
        self.when, self.skip_first, self.seed = _check_when(when), skip_first, seed
        self.cycle = -1
        self._start: dict[str, tuple[Tensor, int]] | None = None
        self._warned: set[str] = set()

    @property
    def sparsity(self) -> float:
        """The host's sparsity: what both steps remove together."""
        return self.base.sparsity

    def at(self, sparsity: float, rate: float | None = None) -> ActivateWhilePruning:
        """Returns the same with another sparsity of the host and, if given, another rate; the snapshot is shared."""
        other = copy.copy(self)
        other.base = self.base.at(sparsity)
        other.rate = self.rate if rate is None else rate
        check_range("rate", other.rate, low=0.0, high=sparsity)
        return other

    def snapshot(self, model: nn.Module) -> dict[str, Tensor]:
        """Notes the weights with which a cycle of training begins, and that it begins.

        Returns:
            The weights, by parameter name.
        """
        tensors = self.base._tensors(model)
        self._start = {site.name: (site.tensor.detach().clone(), _alive(site)) for site in tensors}
        self.cycle += 1
        return {name: weight for name, (weight, _) in self._start.items()}

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        w_start: Mapping[str, Tensor] | None = None,
    ) -> ActivationPlan:
        """Plans both steps at the end of a cycle.

        Args:
            model: the trained model; left as it was.
            data: batches (inputs, targets), for hosts that measure; see also above.
            example_inputs: what the model takes; kept in the plan.
            loss_fn: ``loss_fn(outputs, targets) -> scalar``, for hosts that differentiate.
            w_start: the weights at the start of the cycle by parameter name (a state dict will do); those of ``snapshot`` when None.

        Returns:
            The plan. Its ``log`` says which step took what.

        Raises:
            TypeError: ``data`` is a mapping, and as the host's ``fit``.
            RuntimeError: there is no snapshot, or the model has been pruned since.
            ValueError: the cycle removes fewer weights than the rate asks AP to take, the snapshot or ``w_start`` does not fit the
                model, torch.fx cannot trace the model and there are no inputs, the host does not remove what it says, and as the
                host's ``fit``.
        """
        if isinstance(data, Mapping):
            raise TypeError(
                "data must be batches (inputs, targets), got a mapping: weights at the start go by keyword, w_start=..."
            )
        given: dict[str, Any] = {"data": data, "example_inputs": example_inputs, "loss_fn": loss_fn}
        tensors = self.base._tensors(model)
        total, gone = _sizes(tensors)
        removed = self.base._count(tensors)
        quota = round(self.rate * total) if isinstance(self.when, str) or self.cycle in self.when else 0
        if quota > removed - gone:
            raise ValueError(
                f"rate {self.rate:g} asks AP to remove {quota} of {total} weights, but from sparsity {gone / total:g} to "
                f"{self.sparsity:g} only {removed - gone} go: lower the rate, see at()"
            )
        before = {site.name: site.mask for site in tensors}
        if not quota:
            return ActivationPlan(self.base.fit(model, **given), before, {})
        start = self._weights_at_start(tensors, w_start)
        again = given
        if isinstance(data, Iterator):  # which can be read once, and the host may be fitted twice
            given["data"], kept = itertools.tee(data)
            again = {**given, "data": kept}
        plan = self.base.at(self.sparsity * (removed - quota) / removed).fit(model, **given)
        quota = self._rest(plan, removed, quota)
        with seeded(self.seed):  # a model may draw while it is traced, and a loader draws
            fed = self._eligible(model, tensors, data, example_inputs)
        generator = torch.Generator().manual_seed(self.seed)
        layers = {
            site.name: self._layer(site, weight, plan.masks[site.name], generator)
            for site, weight, ok in zip(tensors, start, fed, strict=True)
            if ok and not site.tensor.is_complex()
        }
        took = dict(zip(layers, _first(list(layers.values()), quota), strict=True))
        for name, index in took.items():
            mask = plan.masks[name]
            plan.masks[name] = mask.reshape(-1).index_fill_(0, index, False).view(mask.shape)  # its own: nobody else holds it
        if sum(map(len, took.values())) < quota:
            self._warn(f"AP finds fewer {self.sign} weights than its rate asks for and takes them all; the host removes the rest")
            plan = plan.merge(self.base.fit(plan.apply(copy_model(model)), **again))
        return ActivationPlan(plan, before, took)

    def iterate(
        self,
        model: nn.Module,
        sparsities: Iterable[float],
        train: Callable[[nn.Module], Any],
        *,
        rewind: bool = True,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> ActivationPlan:
        """The whole procedure, in place: for each sparsity in turn train, prune, and rewind.

        In each cycle AP takes the same part of what the cycle removes, ``rate / base.sparsity``; p and q themselves are not used.

        Args:
            model: changed in place. At the end it is pruned and rewound, and still to be trained.
            sparsities: rising, the share of all prunable weights that is gone after each cycle, or what else the host's ``at`` takes;
                see ``successive_sparsities``.
            train: trains the masked model; called once in each cycle, first on the model as it is given.
            rewind: set all parameters and buffers back to their values at the beginning after each pruning, as the paper does;
                False goes on from the trained weights.
            data: as for ``fit``.
            example_inputs: as for ``fit``.
            loss_fn: as for ``fit``.

        Returns:
            The last plan, which covers all that is gone; its log is that of the last cycle.

        Raises:
            ValueError: there is no sparsity, or one is below what is already pruned.
        """
        steps = list(sparsities)
        if not steps:
            raise ValueError("sparsities must not be empty")
        beginning = {name: value.detach().clone() for name, value in _state(model).items()} if rewind else {}
        share = self.rate / self.sparsity if self.sparsity else 0.0
        self.cycle = -1
        for i, sparsity in enumerate(steps):
            self.snapshot(model)
            train(model)
            tensors = self.base._tensors(model)
            total, gone = _sizes(tensors)
            active = self.when != "last" or i == len(steps) - 1
            rate = share * active * (self.base.at(sparsity)._count(tensors) - gone) / total
            plan = self.at(sparsity, rate).fit(model, data, example_inputs, loss_fn)
            plan.apply(model)
            if rewind:
                _rewind(model, beginning)
                plan.apply(model)
        return plan

    def _rest(self, plan: PruningPlan, removed: int, quota: int) -> int:
        """What is left for AP of ``removed``: ``quota``, up to what a host rounds that shares out by module."""
        layers = plan.layers().values()
        rest = removed - sum(layer.removed for layer in layers)
        if rest < 0 or abs(rest - quota) > len(layers):
            raise ValueError(
                f"{self.base!r} removed {removed - rest} weights where {removed - quota} were its part: AP cannot share with it"
            )
        return rest

    def _weights_at_start(self, tensors: Sequence[Site], w_start: Mapping[str, Tensor] | None) -> list[Tensor]:
        noted = self._start if w_start is None else {}
        if noted is None:
            raise RuntimeError("call snapshot() at the start of the cycle")
        w_start = {name: weight for name, (weight, _) in noted.items()} if w_start is None else w_start
        found = []
        for site in tensors:
            weight = next((w_start[key] for name in site.names for key in (name, f"{name}_orig") if key in w_start), None)
            if weight is None or weight.shape != site.tensor.shape:
                was = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
                raise ValueError(
                    f"the snapshot does not fit the model: {site.name!r} {was} there and has shape {tuple(site.tensor.shape)} here"
                )
            found.append(weight.to(site.tensor.device))
        if any(noted[site.name][1] != _alive(site) for site in tensors if site.name in noted):
            raise RuntimeError("call snapshot() at the start of the cycle: the model has been pruned since the last one")
        return found

    def _layer(self, site: Site, w_start: Tensor, keep: Tensor, generator: torch.Generator) -> _Layer:
        score, origin = site.tensor.detach(), w_start
        if self.criterion == "random":
            score = torch.rand(score.shape, generator=generator, dtype=torch.float64).to(score.device)
            origin = torch.zeros((), dtype=score.dtype, device=score.device).expand(score.shape)
        # On the CPU numpy's comparisons and nonzero, on parts that stay in the cache, take a fraction of torch's time.
        flat = lambda t: _precise(t).reshape(-1).numpy() if t.device.type == "cpu" else _precise(t).reshape(-1)  # noqa: E731
        sign = -1 if self.sign == "negative" else 1
        return _Layer(flat(site.tensor.detach()), flat(score), flat(origin), flat(keep), sign)

    def _eligible(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, example_inputs: Inputs | None
    ) -> list[bool]:
        if not self.skip_first:
            return [True] * len(tensors)
        users = [[module for _, module, _ in site.places] for site in tensors]
        mixers = {module for modules in users for module in modules if isinstance(module, nn.Linear | _ConvNd)}
        fed = _fed_in_graph(model)
        if not mixers <= set(fed):
            inputs = example_inputs if data is None else _first_inputs(data, example_inputs)
            if inputs is None:
                raise ValueError(
                    "torch.fx cannot trace this model, or not into all its parts, to see which layers a ReLU feeds: give example_inputs or "
                    "data, or skip_first=False"
                )
            fed = _fed_in_pass(model, to_device(inputs, tensors[0].tensor.device))
        found = [all(fed.get(module, False) for module in modules) for modules in users]
        if any(found):
            return found
        self._warn("no layer is fed by a ReLU (GELU, SiLU?): that a negative weight can only silence a unit does not apply here")
        return [i > 0 and all(module in mixers for module in modules) for i, modules in enumerate(users)]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    def __repr__(self) -> str:
        return f"ActivateWhilePruning({self.base!r}, rate={self.rate:g})"


def _check_when(when: Literal["every", "last"] | Iterable[int]) -> Literal["every", "last"] | frozenset[int]:
    if isinstance(when, str):
        if when not in ("every", "last"):
            raise unknown("when", when, ("every", "last", "numbers of cycles"))
        return when
    cycles = frozenset(when)
    if not all(isinstance(cycle, int) and cycle >= 0 for cycle in cycles):
        raise ValueError(f"when must be 'every', 'last' or numbers of cycles >= 0, got {sorted(cycles, key=str)}")
    return cycles


def _first_inputs(data: Iterable[Any], otherwise: Inputs | None) -> Inputs | None:
    """Those of the first batch; ``otherwise`` where there is none, or where taking it would use it up."""
    refuse_samples(data)
    if isinstance(data, Tensor):
        return data
    iterator: Any = iter(data)
    batch = None if iterator is data else next(iterator, None)
    if batch is None:
        return otherwise
    return batch[0] if isinstance(batch, tuple | list) else batch


def _alive(site: Site) -> int:
    return site.tensor.numel() if site.mask is None else int(torch.count_nonzero(site.mask))


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True)
class _Layer:
    """One layer's weights as AP sees them, all flat: their scores are |score - origin|; ``sign`` is -1 where negative ones may go."""

    w_end: Any
    score: Any
    origin: Any
    keep: Any
    sign: int

    def part(self, part: slice, limit: float = math.inf) -> tuple[Any, Any]:
        """Indices (within the part) and scores of what is alive, of the sign, and of a score <= limit."""
        w, scores = self.w_end[part], abs(self.score[part] - self.origin[part])  # |w^end - w^start|
        chosen = scores <= limit
        chosen &= self.keep[part]
        chosen &= w < 0 if self.sign < 0 else w > 0
        index = chosen.nonzero()
        index = index[0] if isinstance(index, tuple) else index.flatten()
        return index, scores[index]

    def below(self, limit: float) -> tuple[Tensor, Tensor]:
        """The same of all weights."""
        starts = range(0, len(self.w_end), _CHUNK if isinstance(self.w_end, np.ndarray) else len(self.w_end))
        parts = [self.part(slice(at, at + starts.step), limit) for at in starts]
        index, scores = [index + at for at, (index, _) in zip(starts, parts, strict=True)], [scores for _, scores in parts]
        if isinstance(self.w_end, np.ndarray):
            return torch.from_numpy(np.concatenate(index)), torch.from_numpy(np.concatenate(scores))
        return torch.cat(index), torch.cat(scores)


def _first(layers: Sequence[_Layer], quota: int) -> list[Tensor]:
    """The ``quota`` candidates of least score, all of them where there are fewer: flat indices by layer; ties by layer, then by index.

    A sample says which score they will not be above, so that most weights are looked at once and never sorted.
    """
    if not layers:
        return []
    stride = max(1, sum(len(layer.w_end) for layer in layers) // _SAMPLE)
    sample = torch.cat([torch.as_tensor(layer.part(slice(None, None, stride))[1]).cpu() for layer in layers])
    rank = math.ceil(1.1 * quota / stride) + 16
    limit = float(sample.kthvalue(rank).values) if rank <= len(sample) else math.inf
    found = [layer.below(limit) for layer in layers]
    if sum(len(index) for index, _ in found) < quota and limit < math.inf:
        found = [layer.below(math.inf) for layer in layers]
    quota = min(quota, sum(len(index) for index, _ in found))
    stay = remove_smallest([scores for _, scores in found], [None] * len(found), quota)
    return [index[~mask] for (index, _), mask in zip(found, stay, strict=True)]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by names that a mask does not change."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not name.endswith("_mask")}
    return {name: site.tensor for name, site in sites(model).items()} | buffers


@torch.no_grad()
def _rewind(model: nn.Module, beginning: Mapping[str, Tensor]) -> None:
    for name, value in _state(model).items():
        value.copy_(beginning[name])


#: Modules whose output is non-negative, and those that keep an input so.
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
_KEEPERS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.ChannelShuffle,
)  # fmt: skip
#: The same for functions and methods, by name; "size" and "shape" are numbers, which have no sign to lose.
_RECTIFY = {"relu", "relu_", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp", "size", "shape"}
_KEEP = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "dropout", "dropout2d",
    "dropout3d", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "mean",
    "sum", "amax", "cat", "stack", "chunk", "split", "getitem", "expand", "clone", "pixel_shuffle",
}  # fmt: skip
_COMBINE = {"add", "add_", "iadd", "mul", "mul_", "imul", "truediv", "div"}


def _fed_in_graph(model: nn.Module) -> dict[nn.Module, bool]:
    """For every linear layer and convolution in the model's graph: whether it is fed non-negative values only; {} without a graph."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # a model may fail to trace in any way it likes
        return {}
    finally:  # what a forward pass keeps on its module would be a proxy
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
    modules = dict(model.named_modules())
    sure: dict[fx.Node, bool] = {}
    fed: dict[nn.Module, bool] = {}
    for node in graph.nodes:
        given = all(sure[argument] for argument in node.all_input_nodes)
        if node.op == "call_module":
            module = modules[node.target]
            if isinstance(module, nn.Linear | _ConvNd):
                fed[module] = given and fed.get(module, True)
            elif isinstance(module, nn.MultiheadAttention):
                fed[module.out_proj] = False  # never called itself
            sure[node] = isinstance(module, _RECTIFIERS) or (given and isinstance(module, _KEEPERS))
        elif node.op in ("call_function", "call_method"):
            name = str(node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target))
            signed = any(isinstance(a, int | float) and a < 0 for a in (*node.args, *node.kwargs.values()))
            sure[node] = name in _RECTIFY or (given and (name in _KEEP or (name in _COMBINE and not signed)))
            if name.endswith("_"):
                for changed in _changed(node, modules):
                    sure[changed] = sure[changed] and sure[node]
        else:
            sure[node] = False
    return fed


def _changed(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[fx.Node]:
    """What a node changes in place: its first argument, and all that this may be a view of."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
        if node.op == "call_module" and not isinstance(modules[str(node.target)], _RECTIFIERS + _KEEPERS):
            return


def _fed_in_pass(model: nn.Module, inputs: Inputs) -> dict[nn.Module, bool]:
    """The same from one pass over ``inputs``; the first layer called, and those that read the inputs as they are, count as not."""
    raw = {t.untyped_storage().data_ptr() for t in _flat(inputs)}
    fed: dict[nn.Module, bool] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(_flat([*args, *kwargs.values()]))
        first = not fed or given.untyped_storage().data_ptr() in raw
        fed[module] = not first and bool((given >= 0).all()) and fed.get(module, True)

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return fed


def _flat(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | list | tuple):
        for part in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _flat(part)

r"""Permutations of hidden units: which axes of which parameters move together, and moving them.

The hidden units of a network have no order: with one permutation :math:`P_l` per hidden layer (and :math:`P_0 = P_L = I`),

.. math:: W_l \to P_l W_l P_{l-1}^\top, \qquad b_l \to P_l b_l

leaves the function as it was. Scale, shift and running statistics of a norm move with the units that it follows, the two ends of
a residual connection share one permutation, and a flattening makes of one channel a block of columns.

A permutation is a tensor of indices: ``perm[name][i] = j`` says that unit i of the first model is matched with unit j of the
second, and is applied as ``w.index_select(axis, perm)``. (As a matrix, P has its ones at (i, perm[i]).)

Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023, arXiv 2209.04836.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from weightroom.errors import UsageError
from weightroom.metrics import copy_model, device_of

__all__ = ["PermutationSpec", "apply_permutation", "identity", "moved"]

State = Mapping[str, Tensor]
Perm = Mapping[str, Any]


@dataclass(init=False)
class PermutationSpec:
    """Which axes of a model's state are moved by which permutation.

    Args:
        perm_to_axes: name of a permutation -> the axes that it moves, as (key of the state dict, axis) pairs.
        axes_to_perm: the same, told from the other side: key of the state dict -> for each axis the name of the permutation that
            moves it, or None. Give one of the two. Keys that are not named are not moved.

    A permutation has as many units as its axes are long. Where it also moves a convolution, an axis of a vector or matrix may be
    a multiple of that: the flattened images of the channels, in torch's order.

    Raises:
        ValueError: none or both of the two are given, or one of them is not of the form above.

    Example::

        spec = PermutationSpec(axes_to_perm={"0.weight": ("P", None), "0.bias": ("P",), "2.weight": (None, "P")})
    """

    perm_to_axes: dict[str, list[tuple[str, int]]]

    def __init__(
        self,
        perm_to_axes: Mapping[str, Sequence[tuple[str, int]]] | None = None,
        *,
        axes_to_perm: Mapping[str, Sequence[str | None]] | None = None,
    ) -> None:
        if (perm_to_axes is None) == (axes_to_perm is None):
            raise UsageError("give either perm_to_axes or axes_to_perm")
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        try:
            for perm, axes in (perm_to_axes or {}).items():
                found[perm] = [(_of(str, key), _of(int, axis)) for key, axis in axes]
            for key, perms in (axes_to_perm or {}).items():
                for axis, name in enumerate(_of(tuple | list, perms)):
                    if name is not None:
                        found[_of(str, name)].append((key, axis))
        except (TypeError, ValueError):
            name, form = ("axes_to_perm", "key -> (permutation or None for each axis)")
            if axes_to_perm is None:
                name, form = ("perm_to_axes", "permutation -> [(key, axis), ...]")
            given = str(perm_to_axes if axes_to_perm is None else axes_to_perm)[:200]
            raise UsageError(f"{name} must map {form}, got {given}") from None
        self.perm_to_axes = dict(found)

    @cached_property
    def axes_to_perm(self) -> dict[str, tuple[str | None, ...]]:
        """Key of the state dict -> the permutation of each axis or None, up to the last axis that is moved."""
        moves: dict[str, dict[int, str]] = defaultdict(dict)
        for perm, axes in self.perm_to_axes.items():
            for key, axis in axes:
                moves[key][axis] = perm
        return {key: tuple(axes.get(i) for i in range(max(axes) + 1)) for key, axes in moves.items()}

    def sizes(self, state: State) -> dict[str, int]:
        """Returns the number of units of each permutation in a state.

        Raises:
            ValueError: the state lacks a key or an axis of the spec, or an axis has another length than the others of its
                permutation.
        """
        found = {}
        for perm, axes in self.perm_to_axes.items():
            for key, axis in axes:
                if key not in state:
                    raise UsageError(f"the spec names {key!r}, which the state does not have")
                if not 0 <= axis < state[key].ndim:
                    raise UsageError(f"the spec names axis {axis} of {key!r}, which has shape {tuple(state[key].shape)}")
            units = found[perm] = min(state[key].shape[axis] for key, axis in axes)
            convolved = any(state[key].ndim > 2 for key, _ in axes)
            for key, axis in axes:
                length = state[key].shape[axis]
                flattened = convolved and state[key].ndim <= 2 and length % units == 0
                if length != units and not flattened:
                    raise UsageError(f"axis {axis} of {key!r} has length {length}, but permutation {perm!r} has {units} units")
        return found

    @classmethod
    def trace(cls, model: nn.Module, example_input: Any) -> PermutationSpec:
        """Returns the spec of a model, found by running it symbolically (``torch.fx``) and on an example, as a copy in eval mode.

        It follows units through linear layers, convolutions and transposed ones, embeddings, norms, activations, pooling,
        reshaping, reductions and elementwise sums and products: perceptrons, VGGs, residual networks. Units that reach the output
        are not permuted. A tensor under several keys is moved under all of them. What is found is tried on the example, with
        other weights of which none is zero.

        Args:
            model: any module; it is left as it was.
            example_input: an input, or a tuple of inputs, with a first dimension for the batch.

        Raises:
            NotImplementedError: the model cannot be traced, or its forward pass branches on its input; it does with hidden units
                what is not in the list, such as a grouped convolution or a concatenation of channels; or a permutation changes
                its outputs. The message names the module or function where that is known.
        """
        model = _disturbed(copy_model(model).eval())
        name, device = type(model).__name__, device_of(model)
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        expected = _run(model, inputs, device)
        try:
            graph = _run(lambda: fx.symbolic_trace(model), (), device)
            found = _run(fx.Interpreter(graph).run, inputs, device)
            _run(ShapeProp(graph).propagate, inputs, device)
        except Exception as error:
            reason, *_ = str(error).split("\n")
            raise _by_hand(f"{name} cannot be traced by torch.fx ({reason})") from error
        if not _equal(found, expected, model):
            raise _by_hand(f"{name} is not what torch.fx traces: its forward pass has a branch that depends on its input")
        spec, unknown = cls(_Tracer(model, graph).run()), f"not all that {name} does with hidden units is known"
        try:
            sizes = spec.sizes(model.state_dict())
        except UsageError as error:
            raise _by_hand(f"{unknown} ({error})") from error
        moving = {key: value for key, value in model.state_dict().items() if key in spec.axes_to_perm}
        model.load_state_dict(apply_permutation(spec, _cycles(sizes), moving), strict=False)
        if not _equal(_run(model, inputs, device), expected, model):
            raise _by_hand(f"{unknown}: a permutation of those that were found changes the outputs")
        return spec


def identity(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The permutations that move nothing, for permutations of those sizes."""
    return {name: torch.arange(n) for name, n in sizes.items()}


def checked(sizes: Mapping[str, int], perm: Perm) -> dict[str, Tensor]:
    """Returns a copy of ``perm`` as index tensors on the CPU; a ``ValueError`` says what is wrong with it."""
    if sizes.keys() != perm.keys():
        odd = min(sizes.keys() ^ perm.keys())
        raise UsageError(f"permutation {odd!r} is {'missing' if odd in sizes else 'not in the spec'}: it has {list(sizes)}")
    found = {}
    for name, n in sizes.items():
        given = torch.as_tensor(perm[name]).detach().cpu()
        found[name] = given.to(torch.int64, copy=True)
        if given.is_floating_point() or not torch.equal(found[name].sort().values, torch.arange(n)):
            raise UsageError(f"permutation {name!r} must hold each of 0..{n - 1} once, got {given.tolist()[:20]}")
    return found


def apply_permutation(spec: PermutationSpec, perm: Perm, state: State) -> dict[str, Tensor]:
    """Returns a state with its hidden units permuted; the network computes what it did.

    Args:
        spec: what moves together.
        perm: name -> indices, a permutation of 0..n-1 for every name of the spec.
        state: a state dict, or the parameters alone.

    Returns:
        A new state with the same keys; no tensor is shared with ``state``.

    Raises:
        ValueError: the state does not fit the spec, or a permutation is missing, of another length, or not a bijection.
    """
    perm = checked(spec.sizes(state), perm)
    return {key: moved(spec, perm, key, value).clone() for key, value in state.items()}


def moved(spec: PermutationSpec, perm: Mapping[str, Tensor], key: str, value: Tensor, but: int | None = None) -> Tensor:
    """One tensor of a state with its axes permuted, all but the axis ``but``."""
    for axis, name in enumerate(spec.axes_to_perm.get(key, ())):
        if name is not None and axis != but:
            value = _take(value, perm[name], axis)
    return value


def _take(value: Tensor, perm: Tensor, axis: int) -> Tensor:
    block = value.shape[axis] // len(perm)
    if block > 1:  # a flattened channel is a block of columns
        perm = (perm[:, None] * block + torch.arange(block)).flatten()
    return value.index_select(axis, perm.to(value.device))


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


# ---- trying a spec


@torch.no_grad()
def _disturbed(model: nn.Module) -> nn.Module:
    """Other weights, in place: those that are all zero or all one would hide what happens to them."""
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point():
            noise = torch.rand(p.shape, generator=g).to(p)
            p.copy_(torch.where(p == 0, 0.2 * noise - 0.1, p * (0.5 + noise)))
    return model


def _run(call: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> Any:
    """The inputs and the random state stay as they were, so that a random model gives the same each time."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return call(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))


def _cycles(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random permutations in which no unit stays."""
    g = torch.Generator().manual_seed(0)
    orders = {name: torch.randperm(n, generator=g) for name, n in sizes.items()}
    return {name: order.roll(1)[order.argsort()] for name, order in orders.items()}


def _equal(found: Any, expected: Any, model: nn.Module) -> bool:
    """Whether all tensors in outputs are the same up to half of their digits: rounding never takes more."""
    a, b = list(_tensors(found)), list(_tensors(expected))
    eps = max([torch.finfo(t.dtype).eps for t in (*b, *model.parameters()) if t.is_floating_point()], default=0.0)
    if any(t.is_cuda for t in b):
        eps = max(eps, torch.finfo(torch.float16).eps)  # TF32 has as many digits
    if [t.shape for t in a] != [t.shape for t in b]:
        return False
    pairs = [[t.to("cpu", torch.float64).nan_to_num(0, 0, 0) for t in pair] for pair in zip(a, b, strict=True)]
    return all((one - other).norm() <= math.sqrt(eps) * other.norm() for one, other in pairs)


def _tensors(outputs: Any) -> Iterable[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list | Mapping):
        for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(part)


# ---- tracing


class _Units(NamedTuple):
    """Hidden units in a tensor: which, along which axis, and how many entries in a row belong to one."""

    group: int
    axis: int
    block: int = 1


_FIXED = 0
_ANY_AXIS = {"torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear"}
_SPATIAL = {"torch.nn.modules.pooling", "torch.nn.modules.padding", "torch.nn.modules.upsampling"}
_MIXING = (nn.GLU, nn.MultiheadAttention, nn.PReLU, nn.Bilinear, nn.Softmax2d)

_UNITWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "softplus", "softsign", "hardtanh",
    "hardswish", "hardsigmoid", "logsigmoid", "softmax", "log_softmax", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "feature_dropout", "contiguous", "clone", "detach", "float", "double", "half", "to", "abs", "neg", "exp", "square", "sqrt", "pow",
    "clamp", "clip", "add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul",
}  # fmt: skip
_POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)} | {
    "interpolate",
    "pad",
}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "logsumexp"}
_RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}


class _Tracer:
    """Follows hidden units through a graph; groups of units that must move together are united."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.parents, self.names = [_FIXED], [""]
        self.ties: list[tuple[int, str, int]] = []
        self.units: dict[fx.Node, _Units | None] = {}
        self.keys: dict[int, list[str]] = defaultdict(list)
        for key, value in model.state_dict(keep_vars=True).items():
            self.keys[id(value)].append(key)

    def run(self) -> dict[str, list[tuple[str, int]]]:
        for node in self.graph.graph.nodes:
            self.units[node] = self.visit(node) if "tensor_meta" in node.meta else None
        users: dict[tuple[str, int], int] = {}
        for group, key, axis in self.ties:  # what several layers use moves with all of them
            self.unite(group, users.setdefault((key, axis), group))
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for group, key, axis in self.ties:
            root = self.find(group)
            if root != _FIXED and (key, axis) not in found[self.names[root]]:
                found[self.names[root]].append((key, axis))
        return dict(found)

    def visit(self, node: fx.Node) -> _Units | None:
        given = [self.units[n] for n in node.all_input_nodes]
        if node.op == "output":
            for n in node.all_input_nodes:
                self.fix(self.units[n])
            return None
        if node.op == "call_module":
            return self.layer(node, given[0], self.graph.get_submodule(str(node.target)))
        if all(units is None for units in given):
            return None
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        if name in _UNITWISE:
            return self.elementwise(node)
        if name in _POOLS:
            return self.spatial(node, given[0], f"the function {name!r}")
        if name in _REDUCTIONS:
            return self.reduce(node, given[0])
        if name in _RESHAPES:
            return self.reshape(node, given[0])
        raise _refused(f"the function {name!r} (node {node.name})")

    def layer(self, node: fx.Node, units: _Units | None, module: nn.Module) -> _Units | None:
        what = f"module {node.target!r} ({type(module).__name__})"
        kind = type(module).__module__
        if isinstance(module, nn.Linear | _ConvNd | nn.Embedding):
            if getattr(module, "groups", 1) != 1:
                raise _refused(f"{what}, a grouped convolution")
            if isinstance(module, _ConvNd) and len(self.shape(node)) < module.weight.ndim:
                raise _refused(f"{what}, which reads a sample without a batch dimension (give the example one)")
            transposed = isinstance(module, _ConvTransposeNd | nn.Embedding)
            axis = 1 if isinstance(module, _ConvNd) else len(self.shape(node)) - 1
            if units is not None and units.axis != axis:
                raise _refused(f"{what}, which does not read the hidden units as its inputs")
            group = _FIXED if units is None else units.group
            self.tie(what, group, module.weight, 0 if transposed else 1)
            new = self.group(str(node.target))
            self.tie(what, new, module.weight, 1 if transposed else 0)
            self.tie(what, new, getattr(module, "bias", None), 0)
            return _Units(new, axis)
        if units is None:
            for tensor in module.parameters(recurse=False):
                self.tie(what, _FIXED, tensor, 0)
            return None
        if isinstance(module, _BatchNorm | _InstanceNorm) or (
            isinstance(module, nn.GroupNorm) and module.num_groups in (1, module.num_channels)
        ):
            if units.axis != 1:
                raise _refused(f"{what}, which does not normalise along the hidden units' axis")
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.tie(what, units.group, getattr(module, name, None), 0)
            return units
        if isinstance(module, nn.LayerNorm):
            axis = units.axis - len(self.shape(node)) + len(module.normalized_shape)
            if axis >= 0:
                self.tie(what, units.group, module.weight, axis)
                self.tie(what, units.group, module.bias, axis)
            return units
        if isinstance(module, nn.PReLU) and (module.num_parameters == 1 or units.axis == 1):
            if module.num_parameters > 1:
                self.tie(what, units.group, module.weight, 0)
            return units
        if isinstance(module, nn.Flatten):
            return self.reshape(node, units)
        if kind in _ANY_AXIS and not isinstance(module, _MIXING):
            return units
        if kind in _SPATIAL:
            return self.spatial(node, units, what)
        raise _refused(what)

    def elementwise(self, node: fx.Node) -> _Units | None:
        """Aligns operands from the right, as broadcasting does; units that meet are united, with what is no unit they are fixed."""
        ndim = len(self.shape(node))
        operands = [(n, self.units[n], ndim - len(self.shape(n))) for n in node.all_input_nodes if "tensor_meta" in n.meta]
        moving = [
            _Units(u.group, u.axis + shift, u.block)
            for n, u, shift in operands
            if u is not None and self.shape(n)[u.axis] == self.shape(node)[u.axis + shift]
        ]
        if not moving:  # a single unit, for many
            return None
        first, *others = moving
        for other in others:
            if other[1:] != first[1:]:
                raise _refused(f"the sum or product {node.name!r} of hidden units along different axes")
            self.unite(first.group, other.group)
        for n, units, shift in operands:
            if units is None and first.axis >= shift and self.shape(n)[first.axis - shift] > 1:
                self.fix(first)
        return first

    def spatial(self, node: fx.Node, units: _Units | None, what: str) -> _Units | None:
        if units is not None:
            before, after = self.shape(node.all_input_nodes[0]), self.shape(node)
            if units.axis != 1 or len(after) < 3 or before[1] != after[1]:
                raise _refused(f"{what} across hidden units")
        return units

    def reduce(self, node: fx.Node, units: _Units | None) -> _Units | None:
        if units is None:
            return None
        ndim = len(self.shape(node.all_input_nodes[0]))
        dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        reduced = range(ndim) if dims is None else [d % ndim for d in (dims if isinstance(dims, Iterable) else (dims,))]
        if units.axis in reduced:
            return None
        return units if keep else units._replace(axis=units.axis - sum(d < units.axis for d in reduced))

    def reshape(self, node: fx.Node, units: _Units | None) -> _Units | None:
        if units is None:
            return None
        before, after, i = self.shape(node.all_input_nodes[0]), self.shape(node), units.axis
        tail = len(before) - i
        if len(after) >= tail and before[i:] == after[len(after) - tail :]:
            return units._replace(axis=len(after) - tail)
        if before[:i] == after[:i] and i < len(after):
            for j in range(i + 1, len(before) + 1):
                if after[i] == math.prod(before[i:j]):
                    return units._replace(block=units.block * after[i] // before[i])
        raise _refused(f"the reshaping {node.name!r} from {before} to {after}")

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape)

    def group(self, name: str) -> int:
        self.parents.append(len(self.parents))
        self.names.append(f"P_{name}")
        return len(self.parents) - 1

    def find(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def unite(self, *groups: int) -> None:
        roots = sorted(self.find(group) for group in groups)
        for root in roots:
            self.parents[root] = roots[0]

    def fix(self, units: _Units | None) -> None:
        if units is not None:
            self.unite(_FIXED, units.group)

    def tie(self, what: str, group: int, tensor: Tensor | None, axis: int) -> None:
        if tensor is None:
            return
        if id(tensor) not in self.keys:
            raise _refused(f"{what}, whose weight is computed from other tensors")
        self.ties += [(group, key, axis) for key in self.keys[id(tensor)]]


def _refused(what: str) -> NotImplementedError:
    return _by_hand(f"no permutation is known for {what}")


def _by_hand(why: str) -> NotImplementedError:
    return NotImplementedError(f"{why}: describe the model by PermutationSpec(axes_to_perm=...)")

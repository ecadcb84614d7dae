"""The widths of a network: which numbers of channels its architecture has, what depends on them, and building it with others.

A width is a number of channels that several layers share: one gives it, others normalise it, add to it or take it. They are
read off a chain of modules in ``nn.Sequential``, off a model's ``width_config``, or off torch-pruning's dependency graph; the
layout that they make says how many weights and FLOPs the network has at any widths. A ``WidthPlan`` builds it at those chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weightroom.metrics import copy_model, evaluating
from weightroom.prune.base import prunable
from weightroom.prune.plan import Inputs, Site, call, sites
from weightroom.prune.shrink import ChannelGraph, _tensors, depthwise, reset

__all__ = ["Array", "Layout", "WidthPlan", "layout_of", "needed", "uses_of", "uses_of_site", "weight_name"]

Array = np.ndarray

_RESIZABLE = (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
#: What autograd calls operations that fix a width where they stand: heads of attention are counted in the code.
_FIXING = ("ScaledDotProduct", "Softmax", "Bmm")
#: What torch-pruning calls those whose sizes stand in the code.
_FIXED = ("_OutputOp", "_SplitOp", "_UnbindOp", "_SliceOp", "_CustomizedOp")


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
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise ValueError(f"the model does not run at the widths of the plan: its code fixes a width ({error})") from error
        if before != after:
            raise ValueError(f"the widths of the plan change the shape of the output from {before} to {after}")


@dataclass
class Layout:
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
        """What every layer takes and gives at the widths ``w``."""
        return self.In @ w + self.in0, self.Out @ w + self.out0

    def weights(self, w: Array) -> Array:
        """The weights of every layer, bias aside."""
        taken, given = self.channels(w)
        return self.dense * taken * given + self.lone * given

    def cost(self, kind: str, w: Array) -> float:
        """How many parameters ("all"), prunable "weights" or "flops" the network has."""
        parts = self.weights(w)
        if kind == "flops":
            parts = 2 * cast(Array, self.uses) * parts
        elif kind == "all":
            parts = parts + self.extra * self.channels(w)[1]
        return float(parts.sum()) + self.fixed[kind]

    def slope(self, kind: str, w: Array) -> Array:
        """The derivative of ``cost`` by every width."""
        taken, given = self.channels(w)
        scale = 2 * cast(Array, self.uses) if kind == "flops" else np.ones(len(self.names))
        alone = self.lone + self.extra if kind == "all" else self.lone
        return (scale * self.dense * given) @ self.In + (scale * (self.dense * taken + alone)) @ self.Out

    def plan(self, w: Array, densities: dict[str, float] | None, inputs: Inputs | None) -> WidthPlan:
        """The plan of the widths ``w``; ``densities`` are those of its layers when None."""
        as_dict = lambda w: {  # noqa: E731
            name: (round(i), round(o)) for name, i, o in zip(self.names, *self.channels(w), strict=True)
        }
        before, after = as_dict(self.sizes), as_dict(w)
        if densities is None:
            now, full = self.weights(w), self.weights(self.sizes)
            densities = {weight_name(n): float(a / b) for n, a, b in zip(self.names, now, full, strict=True) if b}
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


def layout_of(model: nn.Module, inputs: Inputs | None, need_flops: bool) -> Layout:
    """The layout of a model; ``inputs`` are needed where it must be traced, or FLOPs counted.

    Raises:
        ValueError: the model carries masks.
        TypeError: ``inputs`` are needed and missing.
        RuntimeError: torch-pruning cannot trace the model, see ``PruningPlan.apply``.
        MissingExtraError: torch-pruning is needed and not installed.
    """
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
        widths = _traced(model, needed(inputs, f"{type(model).__name__} is no chain in nn.Sequential: tracing it"))
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
    counted = uses_of(model, inputs) if inputs is not None and (countable or need_flops) else None
    uses = None if counted is None else np.array([counted.get(m, 0) for m in layers.values()], dtype=float)
    layout = Layout(
        list(layers), sizes, np.array(steps, dtype=int), np.array([w.held for w in widths], dtype=bool),
        np.array([w.added for w in widths], dtype=bool), In, taken - In @ sizes, Out, given - Out @ sizes, dense, lone, extra,
        uses, {"all": 0.0, "weights": 0.0, "flops": 0.0}, config,
    )  # fmt: skip
    layout.fixed["all"] = sum(site.tensor.numel() for site in known.values()) - layout.cost("all", sizes)
    layout.fixed["weights"] = sum(site.tensor.numel() for site in weights) - layout.cost("weights", sizes)
    if counted is not None:
        total = sum(2 * site.tensor.numel() * uses_of_site(site, counted) for site in weights)
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
        through = not isinstance(module, nn.Linear | _ConvNd) or depthwise(module)
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
    graph = ChannelGraph(copy_model(model), inputs)
    widths: list[_Width] = []
    visited: set[nn.Module] = set()
    for module in graph.names:
        if module in visited or module not in graph or not isinstance(module, nn.Linear | _ConvNd) or depthwise(module):
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
                if m_in > n_in and isinstance(module, nn.Linear | _ConvNd) and not depthwise(module):
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
    if depthwise(module):
        return 0.0, kernel, bias
    return kernel / _groups(module), 0.0, bias


def weight_name(layer: str) -> str:
    """The name of a layer's weight."""
    return f"{layer}.weight" if layer else "weight"


def _groups(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, _ConvNd) and not depthwise(module) else 1


def _resize(module: nn.Module, n_in: int, n_out: int) -> None:
    """Gives a layer room for other numbers of channels; what is in it is undefined until it is reset."""
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (n_out, n_in)
        module.in_features, module.out_features = n_in, n_out
    elif isinstance(module, _ConvNd):
        if depthwise(module):
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


def needed(example_input: Inputs | None, what: str) -> Inputs:
    """The example input, or the error that ``what`` needs one."""
    if example_input is None:
        raise TypeError(f"{what} needs example_input: a batch that the model takes")
    return example_input


def uses_of(model: nn.Module, inputs: Inputs) -> dict[nn.Module, int]:
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


def uses_of_site(site: Site, uses: Mapping[nn.Module, int]) -> int:
    """How often a tensor is used, given the uses of every layer."""
    for _, module, _ in site.places:
        if not isinstance(module, nn.Linear | _ConvNd):
            raise ValueError(
                f"the FLOPs of {site.name!r} ({type(module).__name__}) cannot be counted: only linear and convolution"
            )
    return sum(uses.get(module, 0) for _, module, _ in site.places)

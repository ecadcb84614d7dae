"""Cutting whole channels out of a model, on torch-pruning's dependency graph.

A channel of one layer hangs together with channels of others: what normalises it, what reads it, what is added to it. The
graph knows these groups; this module decides which of their channels may go.

The graph may be wrong: it takes a flip, a roll or a channel shuffle for something that leaves every channel in its place. So
each cut is checked. In passes on random inputs, in which what every mixing layer gives is replaced by random numbers, every
layer of the smaller model must be given just what it was given before, without the channels that are gone. Layers that agree
on that one by one compute the same together, whatever their weights and whatever the input.
"""

from __future__ import annotations

import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import prune as torch_prune

from weightroom.errors import MissingExtraError
from weightroom.metrics import copy_model, evaluating
from weightroom.metrics.evaluate import _mask_hooks
from weightroom.prune.plan import Inputs, _refresh_output_projection, call, sites

__all__ = ["ChannelGraph", "depthwise", "reset", "shrink"]

#: Factors of the random numbers of a check: the ordinary, and what opens a gate or passes a threshold far out.
_SCALES = (1.0, 1.0, 100.0)
_MIXERS = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)


#: (layer's name, whether of its outputs) -> channels that are left, as they were numbered before the cuts.
_Left = dict[tuple[str, bool], Tensor]
_Noise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Member:
    """A layer or operation of a group: its channel ``indices[i]`` hangs together with the root's channel ``roots[i]``."""

    module: nn.Module
    out: bool
    indices: list[int]
    roots: list[int]

    @property
    def produces(self) -> bool:
        """Whether the channel's values come from weights of this member."""
        return self.out and isinstance(self.module, nn.Linear | _ConvNd) and not depthwise(self.module)

    @property
    def reads(self) -> bool:
        """Whether this member mixes the channel with others."""
        return not self.out and isinstance(self.module, nn.Linear | _ConvNd)


class ChannelGraph:
    """torch-pruning's view of one model: groups of channels that hang together."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        try:
            import torch_pruning
        except ImportError:
            raise MissingExtraError("torch-pruning", "prune", "mode='shrink' or 'rebuild'") from None
        self.names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        # torch-pruning knows a norm that is not torch's own by its parameters.
        self.names |= {p: name for name, m in model.named_modules() if _normalises(m) for p in m.parameters(recurse=False)}
        self.shared = {module for site in sites(model).values() if len(site.places) > 1 for _, module, _ in site.places}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        forward = lambda model, inputs: [t for t in _tensors(call(model, inputs)) if t.grad_fn is not None]  # noqa: E731
        self.graph = torch_pruning.DependencyGraph()
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            try:
                self.graph.build_dependency(model, inputs, forward_fn=forward, verbose=False)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1].name
                raise RuntimeError(
                    f"torch-pruning cannot trace this model ({type(error).__name__} in its {where}: {error})"
                ) from error

    def __contains__(self, module: nn.Module) -> bool:
        return module in self.graph.module2node

    def group(self, module: nn.Module, indices: Iterable[int]) -> Any:
        """torch-pruning's group of what hangs on output channels of ``module``."""
        return self.graph.get_pruning_group(module, self.graph.get_pruner_of_module(module).prune_out_channels, list(indices))

    def width(self, module: nn.Module, *, out: bool) -> int:
        """How many channels a layer gives, or takes."""
        return int(self.graph.get_out_channels(module) if out else self.graph.get_in_channels(module))

    def members(self, group: Any) -> list[_Member]:
        """Its layers and operations."""
        return [
            _Member(item.dep.target.module, self.graph.is_out_channel_pruning_fn(item.dep.handler), item.idxs, item.root_idxs)
            for item in group
        ]


def shrink(model: nn.Module, channels: Mapping[str, Tensor], inputs: Inputs) -> nn.Module:
    """Returns ``model`` without the named output channels and without those that are dead; the model given is used up.

    Args:
        model: a model of our own; masks in it are made permanent.
        channels: module name -> output channels to cut out, whatever they compute.
        inputs: what the model takes.

    Raises:
        ValueError: a named channel cannot be cut out, or is reordered or mixed with others on its way to the layers that read it
            (by anything but a norm).
        RuntimeError: torch-pruning cannot trace the model.
        MissingExtraError: torch-pruning is not installed.
    """
    kept = _make_permanent(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    modes = {name: module.training for name, module in model.named_modules()}
    if any(len(index) for index in channels.values()):
        _cut_named(model, channels, inputs, kept)
    model = _without_dead(model, inputs, kept)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
    for name, module in model.named_modules():
        module.training = modes[name]
    return model


def reset(model: nn.Module) -> None:
    """Draws every weight anew, by each module's own ``reset_parameters``.

    Raises:
        ValueError: a module holds parameters and cannot reset them.
    """
    resets = []
    for name, module in model.named_modules():
        function = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if function is not None:
            resets.append(function)
        elif any(parameter is not None for parameter in module._parameters.values()):
            raise ValueError(
                f"mode='rebuild' needs reset_parameters() on {name or 'the model'!r} ({type(module).__name__}): "
                "it holds parameters of its own"
            )
    for function in reversed(resets):  # children first: a parent may set what its children hold
        function()


def _cut_named(model: nn.Module, channels: Mapping[str, Tensor], inputs: Inputs, kept: dict[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    names = ", ".join(map(repr, channels))
    whole, weights = copy_model(model), dict(kept)
    graph = ChannelGraph(model, inputs)
    # Names that hang together (a convolution and its norm, two summands) mean one cut: collect by the first layer that produces.
    cuts: dict[nn.Module, set[int]] = defaultdict(set)
    for name, index in channels.items():
        if not len(index):
            continue
        if modules[name] not in graph:
            raise ValueError(f"channels of {name!r} cannot be cut out: the layer takes no part in the output")
        members = graph.members(graph.group(modules[name], index.tolist()))
        if reason := _obstacle(graph, members):
            raise ValueError(f"channels of {name!r} cannot be cut out: {reason}")
        home: dict[int, tuple[nn.Module, int]] = {}
        for member in members:
            if member.produces:
                for own, root in zip(member.indices, member.roots, strict=True):
                    if root not in home or graph.names[member.module] < graph.names[home[root][0]]:
                        home[root] = (member.module, own)
        for module, own in home.values():
            cuts[module].add(own)
    left: _Left = {}
    try:
        for module, own_indices in cuts.items():
            if not _cut(graph, module, sorted(own_indices), kept, left):
                raise ValueError(f"channels of {graph.names[module]!r} cannot be cut out: a layer would be left without any")
    except IndexError as error:
        raise ValueError(f"the channels of {names} cannot be cut out: torch-pruning miscounts channels ({error})") from error
    try:
        after = _outputs(model, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"the model does not run without the channels of {names}: {error}") from error
    if [t.shape for t in _outputs(whole, inputs)] != [t.shape for t in after]:
        raise ValueError(f"the channels of {names} cannot be cut out: they are outputs of the model")
    if not _agree(whole, model, inputs, weights, left):
        raise ValueError(
            f"the channels of {names} cannot be cut out: the model reorders them or mixes them with others before a layer reads them"
        )


def _without_dead(model: nn.Module, inputs: Inputs, kept: dict[str, Tensor]) -> nn.Module:
    """Cuts dead channels until none is left: without one, a channel that it alone fed may be dead too."""
    refused: set[str] = set()
    while True:
        alive = sum(int(torch.count_nonzero(mask)) for mask in kept.values())
        dead = {
            name: index for name, index in _dead(ChannelGraph(model, inputs), model, inputs, kept).items() if name not in refused
        }
        if not dead and alive == sum(int(torch.count_nonzero(mask)) for mask in kept.values()):
            return model
        # All at once; where the rest does not stay as it was, one layer at a time, and those that hurt stay.
        for attempt in ([dead] if len(dead) > 1 else []) + [{name: index} for name, index in dead.items()]:
            smaller, masks, left = copy_model(model), dict(kept), _Left()
            graph, modules = ChannelGraph(smaller, inputs), dict(smaller.named_modules())
            try:
                done = all(_cut(graph, modules[name], index, masks, left) for name, index in attempt.items())
            except IndexError:
                done = False
            if done and _agree(model, smaller, inputs, kept, left):
                model = smaller
                kept.clear()
                kept.update(masks)
                break
            if len(attempt) == 1:
                refused |= set(attempt)


def _dead(graph: ChannelGraph, model: nn.Module, inputs: Inputs, kept: dict[str, Tensor]) -> dict[str, list[int]]:
    """Channels that are zero whatever the input: nothing but masked weights makes them, and whoever reads them reads zero.

    With all weights masked a channel is a constant; norms and activations in between keep it one. What else may come in (the
    input itself, other channels) is random in the passes that show what the readers read. A weight that reads a dead channel
    is struck out of ``kept``, so that death spreads to the next layer even where the channel itself cannot go.
    """
    zero = _zero_inputs(model, inputs, kept)
    found: dict[str, list[int]] = {}
    visited: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in visited or module not in graph or not isinstance(module, nn.Linear | _ConvNd) or depthwise(module):
            continue
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        members = graph.members(graph.group(module, range(width)))
        visited |= {member.module for member in members if member.produces}
        if _obstacle(graph, members) or not all(_keeps_constants(member) for member in members):
            continue
        candidates = set(range(width))
        for member in members:
            if member.produces:
                alive = kept[graph.names[member.module]].movedim(_axis(member.module, out=True), 0).flatten(1).any(1).tolist()
            elif member.reads:
                alive = [not z for z in zero.get(graph.names[member.module], [False] * (1 + max(member.indices)))]
            else:
                continue
            pairs = zip(member.indices, member.roots, strict=True)
            candidates -= {root for own, root in pairs if own >= len(alive) or alive[own]}
        for member in members:
            if member.reads and candidates:
                where = [own for own, root in zip(member.indices, member.roots, strict=True) if root in candidates]
                reader = graph.names[member.module]
                index = torch.tensor(where, dtype=torch.int64, device=kept[reader].device)
                kept[reader] = kept[reader].index_fill(_axis(member.module, out=False), index, False)
        if len(candidates) == width:
            candidates.remove(0)
        if candidates:
            found[name] = sorted(candidates)
    return found


def _obstacle(graph: ChannelGraph, members: list[_Member]) -> str:
    """Why the channels of a group must stay as they are; empty where they may go."""
    for member in members:
        if isinstance(member.module, _ConvNd) and member.module.groups > 1 and not depthwise(member.module):
            return f"{graph.names[member.module]!r} is a convolution in {member.module.groups} groups"
        if member.module in graph.shared:
            return f"{graph.names[member.module]!r} shares a parameter with another layer"
    if not any(isinstance(member.module, _MIXERS) and not member.out for member in members):
        return "they are outputs of the model"
    if any(type(member.module).__name__ == "_OutputOp" for member in members):
        return "they are outputs of the model"
    return ""


def _keeps_constants(member: _Member) -> bool:
    """Whether a channel that was constant is so after this member, and does not touch the other channels."""
    if isinstance(member.module, nn.Linear | _ConvNd | _BatchNorm | nn.PReLU):
        return True
    return type(member.module).__module__ == "torch_pruning.ops" and type(member.module).__name__ != "_CustomizedOp"


def _cut(graph: ChannelGraph, module: nn.Module, index: list[int], kept: dict[str, Tensor], left: _Left) -> bool:
    """Cuts channels of ``module`` and all that hangs on them, also out of the masks; False where a layer would be left empty.

    Notes in ``left`` which channels every layer still takes and gives.
    """
    group = graph.group(module, index)
    if not graph.graph.check_pruning_group(group):
        return False
    for member in graph.members(group):
        name = graph.names.get(member.module)
        if name is None:
            continue
        one_sided = isinstance(member.module, nn.Linear | _ConvNd | nn.RNNBase) and not depthwise(member.module)
        for out in [member.out] if one_sided else [True, False]:
            stay = torch.ones(graph.width(member.module, out=out), dtype=torch.bool)
            stay[member.indices] = False
            left[name, out] = left[name, out][stay] if (name, out) in left else stay.nonzero().flatten()
        if isinstance(member.module, nn.Linear | _ConvNd) and name in kept:
            axis = _axis(member.module, out=member.out)
            kept[name] = kept[name].index_select(axis, stay.nonzero().flatten().to(kept[name].device))
    group.prune()
    return True


def _axis(module: nn.Module, *, out: bool) -> int:
    """The axis of a layer's weight that runs over its output or input channels."""
    if depthwise(module):
        return 0
    return int(out == isinstance(module, _ConvTransposeNd))


def depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution of every channel by itself."""
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels == module.out_channels


def _normalises(module: nn.Module) -> bool:
    """Whether it is a norm, of torch or not, whose statistics run over channels."""
    named = "norm" in type(module).__name__.lower() and not isinstance(module, _NormBase)
    return named and next(module.children(), None) is None


def _make_permanent(model: nn.Module) -> dict[str, Tensor]:
    """Turns masks into zeros of plain weights; returns, for every layer by name, which of its weights are kept."""
    kept = {}
    for site in sites(model).values():
        for name, _, attribute in site.places:
            if attribute == "weight":
                kept[name] = torch.ones_like(site.tensor, dtype=torch.bool) if site.mask is None else site.mask
    for module in model.modules():
        for hook in _mask_hooks(module):
            torch_prune.remove(module, hook._tensor_name)
        for key, function in list(module._forward_pre_hooks.items()):
            if function is _refresh_output_projection:
                del module._forward_pre_hooks[key]
    return kept


def _zero_inputs(model: nn.Module, inputs: Inputs, kept: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """For every layer that mixes channels, by name: which of its input channels are zero whatever the input; {} if unknown."""
    modules = dict(model.named_modules())
    zero: dict[str, Tensor] = {}
    try:
        passes = list(_random_passes(model, inputs, kept))
    except RuntimeError:
        return {}
    for seen in passes:
        for name, tensors in seen.given.items():
            module = modules[name]
            if not isinstance(module, nn.Linear | _ConvNd):
                continue
            for given in tensors:
                quiet = ~given.movedim(_channel_axis(module, given), 0).flatten(1).any(1)
                zero[name] = quiet & zero[name] if name in zero else quiet
    return {name: quiet.tolist() for name, quiet in zero.items()}


def _channel_axis(module: nn.Module, values: Tensor) -> int:
    return values.ndim - 1 - len(module.kernel_size) if isinstance(module, _ConvNd) else values.ndim - 1


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return _tensors(call(model, inputs))


# --- the check of a cut ------------------------------------------------------------------------------------------------


@dataclass
class _Pass:
    """A forward pass: what every layer that mixes channels was given and what it gave, call by call, and the model's outputs."""

    inputs: Inputs
    given: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    gave: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: list[Tensor] = field(default_factory=list)


def _pass(model: nn.Module, inputs: Inputs, replace: Callable[[str, nn.Module, int, Tensor], Tensor]) -> _Pass:
    """Runs the model with ``replace(layer's name, layer, number of the call, output)`` for what mixing layers and norms give."""
    seen = _Pass(inputs)

    def hook(name: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            seen.given[name] += [t.clone() for t in given]  # what follows may work in place
            new = replace(name, module, len(seen.gave[name]), output[0] if isinstance(output, tuple) else output)
            seen.gave[name].append(new)
            return (new.clone(), *output[1:]) if isinstance(output, tuple) else new.clone()

        return note

    hooks = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if (isinstance(module, _MIXERS) and not depthwise(module)) or _normalises(module)
    ]
    try:
        seen.outputs = _outputs(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _random_passes(model: nn.Module, inputs: Inputs, kept: Mapping[str, Tensor]) -> Iterator[_Pass]:
    """Passes in which all is random but channels whose weights are all masked: these are what they are.

    The input is not random in the first, nor where the model refuses that.

    Raises:
        RuntimeError: the model does not run so.
    """
    generator = torch.Generator().manual_seed(0)
    for i, scale in enumerate(_SCALES):

        def noise(like: Tensor, scale: float = scale) -> Tensor:
            return scale * torch.randn(like.shape, generator=generator).to(like)

        def replace(name: str, module: nn.Module, number: int, output: Tensor, noise: _Noise = noise) -> Tensor:
            if not isinstance(module, nn.Linear | _ConvNd):
                return noise(output)
            alive = kept[name].movedim(_axis(module, out=True), 0).flatten(1).any(1)
            behind = output.ndim - 1 - _channel_axis(module, output)
            return torch.where(alive.view(-1, *[1] * behind), noise(output), output)

        for given in [_map(noise, inputs)] * (i > 0) + [inputs]:
            try:
                seen = _pass(model, given, replace)
                break
            except Exception as error:
                failure = error
        else:
            raise RuntimeError(f"the model does not run on random numbers: {failure}") from failure
        yield seen


def _agree(model: nn.Module, smaller: nn.Module, inputs: Inputs, kept: Mapping[str, Tensor], left: _Left) -> bool:
    """Whether every layer of the smaller model is given the channels that are left to it as they were, in the same order."""
    try:
        for before in _random_passes(model, inputs, kept):

            def replay(name: str, module: nn.Module, number: int, output: Tensor, before: _Pass = before) -> Tensor:
                return _select(before.gave[name][number], output, left.get((name, True)))

            after = _pass(smaller, before.inputs, replay)
            pairs = list(zip(before.outputs, after.outputs, strict=True))
            for name, given in before.given.items():
                index = left.get((name, False))
                pairs += [(_select(old, new, index), new) for old, new in zip(given, after.given[name], strict=True)]
            if not all(_same(old, new) for old, new in pairs):
                return False
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


def _select(old: Tensor, new: Tensor, index: Tensor | None) -> Tensor:
    """The channels ``index`` of ``old``, on the axis on which it is longer than ``new``."""
    axes = [axis for axis in range(min(old.ndim, new.ndim)) if old.shape[axis] != new.shape[axis]]
    return old.index_select(axes[0], index.to(old.device)) if axes and index is not None else old


def _same(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if old.shape != new.shape or not old.is_floating_point():
        return old.shape == new.shape
    rounding = min(64 * torch.finfo(old.dtype).eps, 0.02)
    highest = float(old.abs().nan_to_num(0.0, 0.0).amax()) if old.numel() else 0.0
    return torch.allclose(new, old, rtol=rounding, atol=rounding * highest, equal_nan=True)


def _map(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The inputs with ``function`` of every floating-point tensor in them."""
    if isinstance(inputs, Tensor):
        return function(inputs) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: _map(function, value) for name, value in inputs.items()}
    return [_map(function, value) for value in inputs] if isinstance(inputs, list | tuple) else inputs


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, list | tuple) else []

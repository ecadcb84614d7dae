"""Cutting whole channels out of a model, on torch-pruning's dependency graph.

A channel of one layer hangs together with channels of others: what normalises it, what reads it, what is added to it. The
graph knows these groups; this module decides which of their channels may go, and keeps a cut that nobody named only where
the model's output has not changed.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import prune as torch_prune

from weightroom.errors import MissingExtraError
from weightroom.metrics import copy_model
from weightroom.prune.plan import Inputs, _mask_hooks, _refresh_output_projection, call, evaluating, sites

__all__ = ["reset", "shrink"]


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
        return self.out and isinstance(self.module, nn.Linear | _ConvNd) and not _depthwise(self.module)

    @property
    def reads(self) -> bool:
        """Whether this member mixes the channel with others."""
        return not self.out and isinstance(self.module, nn.Linear | _ConvNd)


class _Graph:
    """torch-pruning's view of one model: groups of channels that hang together."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        try:
            import torch_pruning
        except ImportError:
            raise MissingExtraError("torch-pruning", "prune", "mode='shrink' or 'rebuild'") from None
        self.names = {module: name for name, module in model.named_modules()}
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
                raise RuntimeError(f"torch-pruning cannot trace this model ({type(error).__name__}: {error})") from error

    def __contains__(self, module: nn.Module) -> bool:
        return module in self.graph.module2node

    def group(self, module: nn.Module, indices: Iterable[int]) -> Any:
        return self.graph.get_pruning_group(module, self.graph.get_pruner_of_module(module).prune_out_channels, list(indices))

    def members(self, group: Any) -> list[_Member]:
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
        ValueError: a named channel cannot be cut out.
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
    before = _outputs(model, inputs)
    graph = _Graph(model, inputs)
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
    for module, own_indices in cuts.items():
        if not _cut(graph, module, sorted(own_indices), kept):
            raise ValueError(f"channels of {graph.names[module]!r} cannot be cut out: a layer would be left without any")
    try:
        after = _outputs(model, inputs)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the model does not run without the channels of {', '.join(map(repr, channels))}: {error}") from error
    if [t.shape for t in before] != [t.shape for t in after]:
        raise ValueError(f"the channels of {', '.join(map(repr, channels))} cannot be cut out: they are outputs of the model")


def _without_dead(model: nn.Module, inputs: Inputs, kept: dict[str, Tensor]) -> nn.Module:
    """Cuts dead channels until none is left: without one, a channel that it alone fed may be dead too."""
    before = _outputs(model, inputs)
    refused: set[str] = set()
    while True:
        alive = sum(int(torch.count_nonzero(mask)) for mask in kept.values())
        dead = {name: index for name, index in _dead(_Graph(model, inputs), model, inputs, kept).items() if name not in refused}
        if not dead and alive == sum(int(torch.count_nonzero(mask)) for mask in kept.values()):
            return model
        # All at once; where that does not leave the output as it was, one layer at a time, and those that hurt stay.
        for attempt in ([dead] if len(dead) > 1 else []) + [{name: index} for name, index in dead.items()]:
            smaller, masks = copy_model(model), dict(kept)
            graph, modules = _Graph(smaller, inputs), dict(smaller.named_modules())
            done = [_cut(graph, modules[name], index, masks) for name, index in attempt.items()]
            if all(done) and _same(before, smaller, inputs):
                model = smaller
                kept.clear()
                kept.update(masks)
                break
            if len(attempt) == 1:
                refused |= set(attempt)


def _dead(graph: _Graph, model: nn.Module, inputs: Inputs, kept: dict[str, Tensor]) -> dict[str, list[int]]:
    """Channels that are zero whatever the input: nothing but masked weights makes them, and whoever reads them reads zero.

    With all weights masked a channel is a constant; norms and activations in between keep it one, so that what one batch
    shows at the readers holds for every batch. A weight that reads a dead channel is struck out of ``kept``, so that death
    spreads to the next layer even where the channel itself cannot go.
    """
    zero = _zero_inputs(model, inputs)
    found: dict[str, list[int]] = {}
    visited: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in visited or module not in graph or not isinstance(module, nn.Linear | _ConvNd) or _depthwise(module):
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
                alive = [not z for z in zero.get(member.module, [False] * (1 + max(member.indices)))]
            else:
                continue
            candidates -= {root for own, root in zip(member.indices, member.roots, strict=True) if alive[own]}
        for member in members:
            if member.reads and candidates:
                where = [own for own, root in zip(member.indices, member.roots, strict=True) if root in candidates]
                reader = graph.names[member.module]
                index = torch.tensor(where, device=kept[reader].device)
                kept[reader] = kept[reader].index_fill(_axis(member.module, out=False), index, False)
        if len(candidates) == width:
            candidates.remove(0)
        if candidates:
            found[name] = sorted(candidates)
    return found


def _obstacle(graph: _Graph, members: list[_Member]) -> str:
    """Why the channels of a group must stay as they are; empty where they may go."""
    for member in members:
        if isinstance(member.module, _ConvNd) and member.module.groups > 1 and not _depthwise(member.module):
            return f"{graph.names[member.module]!r} is a convolution in {member.module.groups} groups"
        if member.module in graph.shared:
            return f"{graph.names[member.module]!r} shares a parameter with another layer"
    mixers = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)
    if not any(isinstance(member.module, mixers) and not member.out for member in members):
        return "they are outputs of the model"
    if any(type(member.module).__name__ == "_OutputOp" for member in members):
        return "they are outputs of the model"
    return ""


def _keeps_constants(member: _Member) -> bool:
    """Whether a channel that was constant is so after this member, and does not touch the other channels."""
    if isinstance(member.module, nn.Linear | _ConvNd | _BatchNorm | nn.PReLU):
        return True
    return type(member.module).__module__ == "torch_pruning.ops" and type(member.module).__name__ != "_CustomizedOp"


def _cut(graph: _Graph, module: nn.Module, index: list[int], kept: dict[str, Tensor]) -> bool:
    """Cuts channels of ``module`` and all that hangs on them, also out of the masks; False where a layer would be left empty."""
    group = graph.group(module, index)
    if not graph.graph.check_pruning_group(group):
        return False
    for member in graph.members(group):
        name = graph.names.get(member.module)
        if isinstance(member.module, nn.Linear | _ConvNd) and name in kept:
            axis = _axis(member.module, out=member.out)
            stay = torch.ones(kept[name].shape[axis], dtype=torch.bool)
            stay[member.indices] = False
            kept[name] = kept[name].index_select(axis, stay.nonzero().flatten().to(kept[name].device))
    group.prune()
    return True


def _axis(module: nn.Module, *, out: bool) -> int:
    """The axis of a layer's weight that runs over its output or input channels."""
    if _depthwise(module):
        return 0
    return int(out == isinstance(module, _ConvTransposeNd))


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels == module.out_channels


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


def _zero_inputs(model: nn.Module, inputs: Inputs) -> dict[nn.Module, list[bool]]:
    """For every layer that mixes channels: which of its input channels are zero throughout."""
    zero: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = cast(Tensor, [*args, *kwargs.values()][0])
        axis = -1 if isinstance(module, nn.Linear) else given.ndim - 1 - len(cast(_ConvNd, module).kernel_size)
        quiet = ~given.movedim(axis, 0).flatten(1).any(1)
        zero[module] = quiet & zero[module] if module in zero else quiet

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)]
    try:
        _outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: quiet.tolist() for module, quiet in zero.items()}


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return _tensors(call(model, inputs))


def _same(before: list[Tensor], model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model still says what it said, up to the rounding of sums that have lost zero terms."""
    try:
        after = _outputs(model, inputs)
    except (RuntimeError, ValueError):
        return False
    return len(after) == len(before) and all(
        new.shape == old.shape and bool((new - old).abs().amax() <= torch.finfo(old.dtype).eps ** 0.5 * old.abs().amax())
        for old, new in zip(before, after, strict=True)
        if old.is_floating_point() and old.numel()
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, list | tuple) else []

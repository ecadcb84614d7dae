"""Convolution, batch norm and activation: finding such blocks in a model's graph, and which of them feeds which."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from weightroom.metrics import evaluating

__all__ = ["Match", "find_blocks", "listed", "mask_source", "now", "owners_of", "tied", "traced"]

#: Activations that map 0 to 0: a masked channel stays zero behind them.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Softsign,
)  # fmt: skip
_ACTIVATION_NAMES = {"relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh"}
#: What lets a zero channel be zero and moves no channel.
_PASSING = (
    *_ACTIVATIONS, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity,
)  # fmt: skip
_PASSING_NAMES = {*_ACTIVATION_NAMES, "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout"}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class _Function(nn.Module):
    """An activation that the model calls as a function."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)


@dataclass(frozen=True)
class Match:
    """A block in the graph: nodes from the convolution to the last, its input, and what is added before the activation."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    bn_name: str | None
    act: nn.Module | None
    nodes: list[fx.Node]
    x: fx.Node
    skip: fx.Node | None


def traced(plain: nn.Module) -> fx.Graph:
    """The model's graph, which must be the same in training and in evaluation; raises a ValueError where there is none."""
    advice = "name the blocks as triples (convolution, norm, activation) in blocks="
    with evaluating(plain):
        try:
            evaluated = fx.Tracer().trace(plain)
            plain.train()
            trained = fx.Tracer().trace(plain)
        except Exception as error:
            raise ValueError(f"torch.fx cannot trace the model ({type(error).__name__}: {error}); {advice}") from error
    if str(evaluated) != str(trained):
        raise ValueError(f"the model's forward is another in training than in evaluation, which torch.fx cannot follow; {advice}")
    return evaluated


def find_blocks(graph: fx.Graph, modules: dict[str, nn.Module], residual: str) -> tuple[dict[str, Match], list[str]]:
    """Blocks by the names of their convolutions, and what became of every other convolution."""
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = owners_of(modules)
    found: dict[str, Match] = {}
    seen: list[str] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        module = _module(node, modules)
        if not isinstance(module, nn.Conv2d):
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                seen.append(f"{node.target} ({type(module).__name__})")
            continue
        name = str(node.target)
        x = node.args[0] if node.args else node.kwargs["input"]
        nodes, bn, bn_name, act, skip = [node], None, None, None, None
        after = _sole_user(node)
        if after is not None and isinstance(norm := _module(after, modules), nn.BatchNorm2d):
            bn, bn_name = norm, str(after.target)
            nodes.append(after)
            after = _sole_user(after)
        if uses[name] > 1 or (bn_name is not None and uses[bn_name] > 1):
            seen.append(f"{name} (used more than once)")
            continue
        if tied(owners, module, bn):
            seen.append(f"{name} (shares its weights with another layer)")
            continue
        readers = list(nodes[-1].users)
        if after is not None and (act := _activation(after, modules)) is not None:
            nodes.append(after)
        elif readers and all(isinstance(_module(r, modules), nn.Conv2d) or _addend(r, nodes[-1]) is not None for r in readers):
            sums = [reader for reader in readers if _module(reader, modules) is None]
            if sums and set(module.kernel_size) == {1} and len(x.users) > 1:
                seen.append(f"{name} (a projection shortcut)")
                continue
            if residual == "after" and after is not None and after in sums and after not in taken:
                taken.add(after)
                skip = _addend(after, nodes[-1])
                nodes.append(after)
                after = _sole_user(after)
                if after is not None and (act := _activation(after, modules)) is not None:
                    nodes.append(after)
        else:
            what = ", ".join(getattr(reader.target, "__name__", str(reader.target)) for reader in readers)
            seen.append(f"{name} (Conv2d followed by {what})")
            continue
        found[name] = Match(module, bn, bn_name, act, nodes, x, skip)
    return found, seen


def owners_of(modules: Mapping[str, nn.Module]) -> Counter[int]:
    """How many modules have each parameter, by its id."""
    return Counter(id(parameter) for module in modules.values() for parameter in module.parameters(recurse=False))


def tied(owners: Counter[int], *layers: nn.Module | None) -> bool:
    """Whether one of the layers shares a parameter with another module."""
    return any(owners[id(p)] > 1 for layer in layers if layer is not None for p in layer.parameters(recurse=False))


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    if isinstance(module := _module(node, modules), _ACTIVATIONS):
        return module
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _ACTIVATION_NAMES:
        return _Function(cast(Callable[..., Tensor], node.target), node.args[1:], dict(node.kwargs))
    if node.op == "call_method" and node.target in _ACTIVATION_NAMES:
        return _Function(getattr(torch.Tensor, str(node.target)), node.args[1:], dict(node.kwargs))
    return None


def _addend(node: fx.Node, branch: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``branch``; None where it is no addition of two tensors."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is branch else node.args[0]
    return other if isinstance(other, fx.Node) and other is not branch else None


def mask_source(node: fx.Node, ends: Mapping[fx.Node, str], plain: nn.Module) -> str | None:
    """The block whose mask ``node`` carries; None where the channels of ``node`` are dense."""
    modules = dict(plain.named_modules())
    while not any(_overwrites(user, node) for user in node.users):
        if node in ends:
            return ends[node]
        passing = isinstance(_module(node, modules), _PASSING) or (
            node.op in ("call_function", "call_method") and getattr(node.target, "__name__", node.target) in _PASSING_NAMES
        )
        if not passing or not node.args:
            return None
        node = cast(fx.Node, node.args[0])
    return None


def _overwrites(user: fx.Node, node: fx.Node) -> bool:
    in_place = user.target in (operator.iadd, operator.isub, operator.imul) or (
        user.op == "call_method" and str(user.target).endswith("_")
    )
    return in_place and user.args[0] is node


def now(node: fx.Node) -> fx.Node:
    """The node that a block has put in this one's place, if any."""
    return node.meta.get("became", node)


def listed(found: Mapping[str, Any], seen: Sequence[str]) -> str:
    """What was found and what was seen beside it, for a message."""
    return f"gated: {', '.join(found) or 'none'}; seen beside: {', '.join(seen) or 'no convolution or linear layer'}"

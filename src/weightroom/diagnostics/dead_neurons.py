r"""Dead-neuron rate: how many units of a ReLU network are silent, on some inputs or on all of them.

For an input x, :math:`\mathrm{DNR}(x)` is the share of ReLU units whose output is 0. Its mean over a data set, the total rate,
has two parts: units that are 0 on every input (static) and those that are 0 on some (dynamic). Reach for it to see whether
training or pruning kills units, which the accuracy may hide for long.

Liu, Ghosh, Motani, "AP: Selective Activation for De-sparsifying Pruned Networks", TMLR 2023, arXiv 2212.06145, which uses the
dynamic rate; the formula here puts its words in symbols. The static rate depends on the data: more inputs can only lower it, so
compare networks on the same ones. GELU, SiLU and the like are hardly ever exactly 0: that rate means nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from weightroom.errors import unknown
from weightroom.metrics import device_of, evaluating
from weightroom.train import Batches

__all__ = ["DeadNeuronReport", "LayerDeadNeurons", "dead_neuron_rate"]

#: The functions that do what a module does.
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], ...]] = {
    nn.ReLU: (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    nn.ReLU6: (F.relu6,),
}
_BATCH = 256


@dataclass(frozen=True)
class LayerDeadNeurons:
    """The rates of one layer.

    Args:
        units: how many units it has.
        static: share of them that are 0 on every input.
        dynamic: mean share that are 0 on an input, without the static ones.
        total: the sum of the two: mean share that are 0 on an input.
    """

    units: int
    static: float
    dynamic: float
    total: float


@dataclass(frozen=True)
class DeadNeuronReport:
    """The rates of a network; all are shares of its units, in [0, 1].

    Args:
        static: share of the units that are 0 on every input.
        dynamic: mean share that are 0 on an input, without the static ones.
        total: the sum of the two: mean share that are 0 on an input.
        per_layer: the same for each layer in the order of the first pass. A layer called more than once has an entry for each
            call ("act", "act#2"), a functional ReLU that of its module ("block1.relu").
    """

    static: float
    dynamic: float
    total: float
    per_layer: Mapping[str, LayerDeadNeurons]


def dead_neuron_rate(
    model: nn.Module,
    data: Tensor | Dataset | Iterable[Any],
    *,
    unit: Literal["element", "channel"] = "element",
    layers: Sequence[type[nn.Module]] = (nn.ReLU, nn.ReLU6),
    all_layers: bool = False,
    channel_dim: int = 1,
) -> DeadNeuronReport:
    r"""Measures how many units are silent, in eval mode.

    With z(x) the outputs of all U units, over n inputs:

    .. math::
        \text{total} = \frac1n \sum_x \frac1U \#\{u : z_u(x) = 0\}, \qquad
        \text{static} = \frac1U \#\{u : z_u(x) = 0 \ \forall x\}, \qquad
        \text{dynamic} = \text{total} - \text{static}

    ``F.relu``, ``torch.relu`` and ``x.relu()`` count like their modules, at each call; ``clamp(min=0)`` does not.

    Args:
        model: any module that runs eagerly; left as it was.
        data: what it is shown: inputs in one tensor, a data set of inputs or (input, ...), or batches of either, moved to the
            model's device.
        unit: "element" is every scalar of a feature map; a "channel" is 0 where all its positions are.
        layers: the module types whose outputs count, and with ``nn.ReLU`` and ``nn.ReLU6`` their functions.
        all_layers: count the outputs of every module without children too, whatever it is: where in a pruned network does a zero
            come from? A linear layer's output is 0 where no weight and no bias is left.
        channel_dim: where an output's channels are, for ``unit="channel"``; -1 for (batch, token, channel).

    Returns:
        The rates of the network and of each layer.

    Raises:
        ValueError: there is no input; a part of the model is scripted or traced, which hides its calls; no layer of the types was
            called; an output holds NaN or its first axis is not the batch; or a layer's shape changes from batch to batch (use
            "channel").
        TypeError: a batch holds no tensor.
    """
    if unit not in ("element", "channel"):
        raise unknown("unit", str(unit), ("element", "channel"))
    watch = _Watch(model, tuple(layers), all_layers, channel_dim if unit == "channel" else None)
    device = device_of(model)
    try:
        watch.register()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), watch:  # a loader draws from the global state
            for inputs in _inputs(data):
                watch.begin(len(inputs))
                model(inputs.to(device))
    finally:
        watch.remove()
    return watch.report()


def _inputs(data: Tensor | Dataset | Iterable[Any]) -> Iterator[Tensor]:
    batches: Any = Batches(data, _BATCH, shuffle=False) if isinstance(data, Dataset) else data
    for batch in batches.split(_BATCH) if isinstance(batches, Tensor) else batches:
        inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"data must give batches of inputs (tensors) or tuples that start with them, got {type(batch).__name__}"
            )
        if len(inputs):
            yield inputs


class _Tally:
    """What one call of one layer has said so far."""

    def __init__(self, zero: Tensor) -> None:
        self.inputs, self.zeros, self.silent = 0, torch.zeros((), dtype=torch.int64, device=zero.device), torch.ones_like(zero[0])
        self.nan = torch.zeros((), dtype=torch.bool, device=zero.device)

    def add(self, zero: Tensor, nan: Tensor) -> None:
        self.inputs += len(zero)
        self.nan |= nan
        self.zeros += torch.count_nonzero(zero)
        self.silent &= zero.all(0)


class _Watch(TorchFunctionMode):
    """Sees the outputs of modules by hooks, and functional ReLUs by intercepting the call."""

    def __init__(self, model: nn.Module, layers: tuple[type[nn.Module], ...], all_layers: bool, channel_dim: int | None) -> None:
        super().__init__()
        self.layers, self.all_layers, self.channel_dim = layers, all_layers, channel_dim
        self.functions = {f for kind, functions in _FUNCTIONS.items() if issubclass(kind, layers) for f in functions}
        self.names = {module: name for name, module in model.named_modules()}
        self.hooks: list[RemovableHandle] = []
        self.stack: list[nn.Module] = []
        self.rows, self.calls, self.tallies = 0, Counter[str](), dict[str, _Tally]()

    def register(self) -> None:
        for module, name in self.names.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"{name or 'the model'!r} is scripted or traced, which hides its calls: give the eager module")
            self.hooks.append(module.register_forward_pre_hook(self._enter))
            self.hooks.append(module.register_forward_hook(self._leave))

    def begin(self, rows: int) -> None:
        """A pass over so many inputs is about to start."""
        self.rows = rows
        self.calls.clear()
        self.stack.clear()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.functions and not any(map(self._counts, self.stack)):
            owner = self.names[self.stack[-1]] if self.stack else ""
            self._record(f"{owner}.{func.__name__.rstrip('_')}".lstrip("."), output)
        return output

    def _counts(self, module: nn.Module) -> bool:
        return isinstance(module, self.layers) or (self.all_layers and not any(True for _ in module.children()))

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        if self._counts(module) and not any(map(self._counts, self.stack)):
            self._record(self.names[module], output[0] if isinstance(output, tuple | list) else output)

    def _record(self, name: str, output: Tensor) -> None:
        self.calls[name] += 1
        if self.calls[name] > 1:
            name = f"{name}#{self.calls[name]}"
        if output.ndim == 0 or len(output) != self.rows:
            raise ValueError(
                f"the output of {name!r} has shape {tuple(output.shape)}: its first axis must be the {self.rows} inputs"
            )
        zero = output == 0
        if self.channel_dim is not None and zero.ndim > 1:
            zero = zero.movedim(self.channel_dim, 1).flatten(2).all(2) if zero.ndim > 2 else zero
        tally = self.tallies.setdefault(name, _Tally(zero))
        if tally.silent.shape != zero.shape[1:]:
            raise ValueError(
                f"the output of {name!r} has shape {tuple(output.shape[1:])} in one batch and {tuple(tally.silent.shape)} in another: "
                "its units cannot be followed, use unit='channel'"
            )
        tally.add(zero, output.isnan().any())

    def report(self) -> DeadNeuronReport:
        if not self.rows:
            raise ValueError("data holds no inputs")
        if not self.tallies:
            raise ValueError(
                f"no layer of type {', '.join(kind.__name__ for kind in self.layers)} was called, as a module or as a function: GELU and "
                "other activations have no dead units, clamp(min=0) is not counted, and a compiled model hides its calls"
            )
        per_layer, sums = {}, [0, 0, 0]
        for name, tally in self.tallies.items():
            if tally.nan:
                raise ValueError(f"the output of {name!r} holds NaN, which is neither silent nor alive: did the model diverge?")
            units, n, zeros, silent = tally.silent.numel(), tally.inputs, int(tally.zeros), int(torch.count_nonzero(tally.silent))
            per_layer[name] = LayerDeadNeurons(units, *_rates(units * n, silent * n, zeros))
            sums = [a + b for a, b in zip(sums, (units * n, silent * n, zeros), strict=True)]
        return DeadNeuronReport(*_rates(*sums), per_layer)


def _rates(pairs: int, silent: int, zeros: int) -> tuple[float, float, float]:
    """Static, dynamic and total rate, from counts of (unit, input) pairs."""
    static, dynamic = silent / pairs, (zeros - silent) / pairs
    return static, dynamic, static + dynamic

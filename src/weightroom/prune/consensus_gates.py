"""Consensus sub-network: binary gates that look at the input while training and agree on one smaller network by its end.

Reach for it to get a smaller residual network out of a single training. Every residual block, or every channel inside one, gets a
gate; a regulariser is zero only where all inputs of a batch agree on each gate, another steers the size. Gates that agree are no
longer needed: closed ones are cut out, open ones dropped, and what is left is the plain network that was trained.

Zhi et al., "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training", arXiv 2302.10798. There is no
public code and the full text was not at hand: the gate, the polarisation term and the plain mean size term are what is known of
the paper; the size term with a target, the layout of the gate and its start, the warm-up and the recalibration of batch norm are
this part's own.

Known not to work: gates without the polarisation term, whose frozen network is another one than the network that was trained; a
polarisation weight far above the size weight without a warm-up, which freezes the gates as they start; few gates and a size far
from a sum of their costs; channels in front of a layer or group norm, which cannot be cut without changing the norm (they get no
gates). On small tasks a random sub-network of the same size trains as well.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.flop_counter import FlopCounterMode

from weightroom.errors import UsageError, check_range, unknown
from weightroom.metrics import copy_model, device_of
from weightroom.prune.base import prunable
from weightroom.prune.plan import Inputs, PruningPlan, call, evaluating, like, sites, to_device
from weightroom.prune.wrapped import TrainTimePruner, WrappedModel
from weightroom.train import reestimate_batchnorm

__all__ = ["ConsensusGatePruner", "GateReport", "PolarizationLoss"]

#: Where every gate starts: open, and inside the zone where the straight-through gradient passes.
_START = 0.7
#: A gate between these shares of open samples has not been decided.
_UNDECIDED = (0.02, 0.98)


class PolarizationLoss(nn.Module):
    r"""How far the samples of a batch are from agreeing on each gate.

    .. math:: L_{pol} = \frac{1}{|G|} \sum_l \bar g_l (1 - \bar g_l), \qquad \bar g_l = \frac{1}{B} \sum_b g_l(x_b)

    For binary gates a summand is the (population) variance of the gate over the batch: 0 where all agree, 1/4 for an even split.

    Args:
        reduction: over the gates: "mean", "sum", or "none" for one value per gate.

    Shapes: gates (B, G) in [0, 1], floating point -> a scalar, or (G,).

    Raises:
        ValueError: the reduction is unknown, or gates are not of two axes.
    """

    def __init__(self, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise unknown("reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction

    def forward(self, gates: Tensor) -> Tensor:
        """Gates (B, G) -> the loss."""
        if gates.ndim != 2:
            raise ValueError(f"gates must be of shape (batch, gates), got {tuple(gates.shape)}")
        mean = gates.mean(0)
        loss = mean * (1 - mean)
        return loss if self.reduction == "none" else loss.mean() if self.reduction == "mean" else loss.sum()


@dataclass(frozen=True, eq=False)
class GateReport:
    """What the gates do on a data set.

    Args:
        gbar: share of samples for which each gate is open, (G,), float64 on the CPU; a gate counts as open above 1/2.
        undecided: share of the gates that are open for more than 2 % and less than 98 % of the samples.
        kept: share of the gates that are open.
        cost: share of the gated cost that the open gates stand for; what ``keep`` asks for.
        units: a name for each gate: the block's, or "conv2[3]" for what layer conv2 reads as its channel 3.
    """

    gbar: Tensor
    undecided: float
    kept: float
    cost: float
    units: tuple[str, ...] = ()


class ConsensusGatePruner(TrainTimePruner):
    r"""Layer or channel pruning by gates that learn to agree, in one training.

    A gate is :math:`z = W_2\,\mathrm{relu}(W_1 s + b_1) + b_2` on the pooled input s of its block, :math:`g = 1[z > 1/2]`; its
    gradient is that of min(max(z, 0), 1). The training loss is

    .. math:: L + \lambda_{pol} \frac{1}{|G|} \sum_l \bar g_l (1 - \bar g_l)
        + \lambda_{size} \Bigl( \frac{\sum_l c_l \bar g_l}{\sum_l c_l} - t \Bigr)^2

    where :math:`\bar g_l` is the share of the batch for which gate l is open and :math:`c_l` what it costs.

    Example::

        pruner = ConsensusGatePruner(keep=0.5)
        wrapped = pruner.wrap(model, images[:1])
        train.fit(wrapped, data, optimizer=torch.optim.Adam(wrapped.param_groups()), epochs=20,
                  step=lambda net, batch: loss(net(batch[0]), batch[1]) + wrapped.aux_loss(),
                  after_step=lambda n: wrapped.advance(n / total))
        small, plan = pruner.derive(wrapped, loader)

    Args:
        keep: t, the share of the gated cost to keep, in (0, 1]. Stem, head and blocks without gates come on top.
        unit: what a gate opens: "block", a whole residual branch, x + g F(x); or "channel", a channel inside a branch, as the
            layer that reads it sees it: x + conv2(g * act(norm(conv1(x)))).
        cost: what a gate's unit costs: "macs" (of one forward pass of the example inputs), "params", or "count", 1 each.
        gate: "ste", as above; "gumbel", :math:`1[z + \text{noise} > 0]` with the gradient of a binary Gumbel softmax of temperature 1,
            without noise in eval mode; "static", a learned z for each gate that does not look at the input.
        lambda_pol: weight of the polarisation, >= 0.
        lambda_size: weight of the size term, >= 0.
        pol_warmup: share of the training, in [0, 1], over which ``lambda_pol`` rises linearly from 0; see ``WrappedModel.advance``.
        hidden: width of a gate's hidden layer.
        blocks: "auto" for every block found, or names of modules: those blocks, or all blocks within those modules.
        size: "target", as above; "mean" for the plain mean of the gates, whose weight sets the size only indirectly.

    Blocks are found by tracing (``torch.fx``) each module's forward for a sum of its input, or of a value, and a chain of layers
    that starts from that same value; where a named block cannot be traced, by the names conv1, bn1 (or norm1), conv2, ...
    Blocks with a projection or a change of shape have no identity shortcut and get no gate; nor do blocks that run more than
    once in a forward pass. A gate looks at the input of the branch's first layer: the block's input, or that after an activation
    in front of the first layer.

    Raises:
        ValueError: an argument is out of its range; the message names it.
        TypeError: a number is none.
    """

    def __init__(
        self,
        keep: float = 0.5,
        *,
        unit: Literal["block", "channel"] = "block",
        cost: Literal["macs", "params", "count"] = "macs",
        gate: Literal["ste", "gumbel", "static"] = "ste",
        lambda_pol: float = 2.0,
        lambda_size: float = 5.0,
        pol_warmup: float = 0.3,
        hidden: int = 16,
        blocks: Literal["auto"] | Sequence[str] = "auto",
        size: Literal["target", "mean"] = "target",
    ) -> None:
        check_range("keep", keep, low=0.0, high=1.0, open_low=True)
        for name, given, accepted in (
            ("unit", unit, ("block", "channel")),
            ("cost", cost, ("macs", "params", "count")),
            ("gate", gate, ("ste", "gumbel", "static")),
            ("size", size, ("target", "mean")),
        ):
            if given not in accepted:
                raise unknown(name, given, accepted)
        check_range("lambda_pol", lambda_pol, low=0.0, high=math.inf, open_high=True)
        check_range("lambda_size", lambda_size, low=0.0, high=math.inf, open_high=True)
        check_range("pol_warmup", pol_warmup, low=0.0, high=1.0)
        if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
            raise ValueError(f"hidden must be an integer >= 1, got {hidden!r}")
        if blocks != "auto" and (isinstance(blocks, str) or not len(blocks)):
            raise ValueError(f"blocks must be 'auto' or a list of names of modules, got {blocks!r}")
        self.keep, self.unit, self.cost, self.gate, self.size = keep, unit, cost, gate, size
        self.lambda_pol, self.lambda_size, self.pol_warmup = lambda_pol, lambda_size, pol_warmup
        self.hidden, self.blocks = hidden, blocks

    def wrap(self, model: nn.Module, example_inputs: Inputs) -> GatedModel:
        """Returns a copy of the model with gates; the model given, devices and the global random state stay as they were.

        The gates' initial weights are drawn from the global random state.

        Args:
            model: any module with residual blocks.
            example_inputs: what the model takes, on its device: a tensor, a tuple of arguments or a dict of keywords. The copy is
                traced, and run once, in eval mode; it has the modes of the model again when it is returned.

        Raises:
            ValueError: the model has no block that can be gated, a name in ``blocks`` stands for none, or the model has gates.
        """
        if any(_gate_hooks(hooks) for hooks in _hooks(model)):
            raise ValueError(f"model is already wrapped: {type(model).__name__} has gates")
        copied = copy_model(model)
        gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with torch.random.fork_rng(devices=gpus), evaluating(copied):
            blocks = _find_blocks(copied, self.unit == "channel", self.blocks)
            blocks, widths, macs = _measure(copied, blocks, example_inputs, self.unit == "channel")
        if not blocks:
            what = "channels inside a residual block" if self.unit == "channel" else "residual blocks"
            where = "" if self.blocks == "auto" else f" in {list(self.blocks)}"
            raise ValueError(
                f"{type(model).__name__} has no {what} that can be gated{where}: "
                "looked for a branch of layers added to its own input"
            )
        with torch.random.fork_rng(devices=gpus):
            return GatedModel(self, copied, blocks, widths, macs, example_inputs)

    @torch.no_grad()
    def derive(self, wrapped: WrappedModel, loader: Iterable[Any]) -> tuple[nn.Module, PruningPlan]:
        """Returns the network that the gates agree on: a plain module without any gate, and the plan of what is gone.

        A gate that is open for at most half of the samples is closed. A closed block becomes an identity, or what its module
        does after the sum; where the block is no module of its own, its layers become stubs whose output is zero. Closed channels
        are cut out (torch-pruning); a block without any open channel is closed, and with it goes the constant that the biases and
        norms behind those channels still put out: a warning says how large it is. An activation in place at the start of a closed
        branch stays, as it changes what the shortcut reads. At the end the running statistics of batch norms are estimated anew.

        The plan has a mask for every prunable weight and for every other parameter of the gated branches: ``plan.sparsity()`` is
        the share of them that is gone. ``plan.apply(model, "mask")`` on a model with the trained weights computes what the
        derived network does, except that its batch norms have the statistics from training, and that a branch ending in a batch
        norm without weight and bias (``affine=False``) puts out a constant rather than zero.

        Args:
            wrapped: what ``wrap`` returned, trained.
            loader: batches of the training data, the first entry of each the input (a tensor, tuple or dict); read twice where
                there are batch norms.

        Raises:
            ValueError: ``loader`` gives no batch, or none when it is read again, or a channel cannot be cut out.
            TypeError: ``wrapped`` is not what ``wrap`` returns.
            MissingExtraError: channels go and torch-pruning is not installed.
        """
        if not isinstance(wrapped, GatedModel):
            raise TypeError(f"derive needs what wrap() returned, got {type(wrapped).__name__}")
        report = wrapped.report(loader)
        if report.undecided > 0.05:
            warnings.warn(
                f"{report.undecided:.0%} of the gates are undecided: the derived network will differ from the one that was trained",
                stacklevel=3,
            )
        inputs = like(wrapped.example_inputs, _first(wrapped.model))
        closed, channels = _verdict(wrapped, report.gbar > 0.5)
        plan = _plan(wrapped, closed, channels, inputs)
        plain = _without_gates(wrapped.model)
        if self.unit == "channel" and closed:
            constant = _constant(wrapped, plain, closed, report.gbar > 0.5, inputs)
            if constant > 0:
                warnings.warn(
                    f"{len(closed)} blocks go, as all their channels are closed; with them goes a constant of up to {constant:.3g} "
                    "that their biases and norms put out",
                    stacklevel=3,
                )
        for block in closed:
            _remove(plain, block)
        cuts = {cut.producer: index for cut, index in channels if len(index)}
        if cuts:
            plain = PruningPlan({}, channels=cuts).apply(plain, "shrink", example_inputs=inputs)
        try:
            return reestimate_batchnorm(plain, loader), plan
        except UsageError as error:  # report() has found batches
            raise UsageError("loader must be re-iterable: it gave no batch when read again") from error

    def __repr__(self) -> str:
        return f"ConsensusGatePruner(keep={self.keep:g}, unit={self.unit!r}, cost={self.cost!r}, gate={self.gate!r})"


class GatedModel(WrappedModel):
    """A model with gates, see ``ConsensusGatePruner``.

    ``model`` is the copy of the model (its own class, gates attached as hooks), ``gates`` the gates, ``gated_cost`` what all their
    units cost together.
    """

    #: What a gate costs as a share of all, (G,).
    share: Tensor

    def __init__(
        self,
        pruner: ConsensusGatePruner,
        model: nn.Module,
        blocks: list[_Block],
        widths: dict[str, tuple[int, int]],
        macs: dict[str, int],
        example_inputs: Inputs,
    ) -> None:
        super().__init__()
        self.pruner, self.model, self.blocks, self.example_inputs = pruner, model, tuple(blocks), example_inputs
        self.progress = 1.0
        self._trains = False  # whether the last forward pass was one of training
        self._polarization = PolarizationLoss()
        self.gates = nn.ModuleList()
        names: list[str] = []
        costs: list[float] = []
        first = _first(model)
        for block in blocks:
            entry, channel_axis = block.branch[0], widths[block.branch[0]]
            for cut in block.cuts if pruner.unit == "channel" else (None,):
                units = 1 if cut is None else cut.width
                gate = _Gate(channel_axis, units, pruner.gate, pruner.hidden, 1 if cut is None else cut.axis)
                gate.to(first.device, first.dtype)
                self.gates.append(gate)
                model.get_submodule(entry).register_forward_pre_hook(gate.look)
                if cut is None:
                    model.get_submodule(block.branch[-1]).register_forward_hook(gate.scale_output)
                    names.append(block.name)
                else:
                    model.get_submodule(cut.consumer).register_forward_pre_hook(gate.scale_input)
                    names += [f"{cut.consumer}[{i}]" for i in range(units)]
                costs += [_cost(model, block.branch if cut is None else cut.layers, pruner.cost, macs) / units] * units
        self.units = tuple(names)
        if not sum(costs) > 0:
            raise ValueError(f"the gated blocks have no {pruner.cost} to count: give cost='count'")
        if pruner.cost == "count":
            costs = [1.0] * len(costs)
        self.gated_cost = sum(costs)
        self._shares = [cost / self.gated_cost for cost in costs]
        self.register_buffer("share", self._share_like(first), persistent=False)
        self.training = self._polarization.training = model.training
        self.gates.train(model.training)

    def _share_like(self, tensor: Tensor) -> Tensor:
        """In the precision of a tensor, but in float32 at least: half precision cannot tell the shares of many gates from 0."""
        return torch.tensor(self._shares, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)

    def _apply(self, fn: Any, recurse: bool = True) -> GatedModel:
        super()._apply(fn, recurse)
        self.share = self._share_like(self.share)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes; each gate's decision for each sample remains in ``gates[i].value``."""
        self._trains = self.training
        for gate in self.gates:
            cast(_Gate, gate).value = None
        return self.model(*args, **kwargs)

    def aux_loss(self) -> Tensor:
        """The weighted polarisation and size terms of the last forward pass, a scalar; 0 in eval mode and for a single sample.

        Gates of blocks that the pass has skipped (stochastic depth) take no part.

        Raises:
            RuntimeError: the last forward pass was not in training mode, or there was none.
        """
        if not self.training:
            return self.share.new_zeros(())
        decided = [cast(_Gate, gate).value for gate in self.gates]
        values = [value for value in decided if value is not None]
        if not self._trains or not values:
            raise RuntimeError("aux_loss needs a forward pass in training mode before it")
        share = self.share
        if len(values) < len(decided):
            parts = share.split([cast(int, gate.units) for gate in self.gates])
            share = torch.cat([part for part, value in zip(parts, decided, strict=True) if value is not None])
            share = share / share.sum()
        gates = torch.cat(values, 1).to(share.dtype)
        if len(gates) < 2:
            return self.share.new_zeros(())
        warmup = self.pruner.pol_warmup
        ramp = min(1.0, self.progress / warmup) if warmup else 1.0
        mean = gates.mean(0)
        size = mean.mean() if self.pruner.size == "mean" else (share @ mean - self.pruner.keep).square()
        return ramp * self.pruner.lambda_pol * self._polarization(gates) + self.pruner.lambda_size * size

    def param_groups(self) -> list[dict[str, Any]]:
        """The model's parameters, then the gates', without weight decay, which would close gates whatever the size asked for."""
        return [
            {"params": list(self.model.parameters())},
            {"params": list(self.gates.parameters()), "weight_decay": 0.0},
        ]

    def advance(self, progress: float) -> None:
        """Says how much of the training has passed, in [0, 1]; as long as it is not called, the polarisation has its full weight."""
        check_range("progress", progress, low=0.0, high=1.0)
        self.progress = float(progress)

    @torch.no_grad()
    def report(self, loader: Iterable[Any]) -> GateReport:
        """What the gates do on the data of ``loader``, in eval mode; ``aux_loss`` needs another forward pass after it.

        Args:
            loader: batches, the first entry of each the input; moved to the model's device.

        Raises:
            ValueError: ``loader`` gives no batch.
        """
        device, samples = device_of(self), 0
        exact = torch.float32 if device.type == "mps" else torch.float64  # counts: half precision ends at 256
        total = torch.zeros(len(self.units), dtype=exact, device=device)
        with evaluating(self):
            for batch in loader:
                call(self, to_device(batch[0] if isinstance(batch, list | tuple) else batch, device))
                gates = torch.cat([cast(Tensor, gate.value) for gate in self.gates], 1)
                total += gates.sum(0, dtype=exact)
                samples += len(gates)
        if not samples:
            raise ValueError("loader gave no batch")
        gbar = (total / samples).cpu().double()
        low, high = _UNDECIDED
        undecided, opened = ((gbar > low) & (gbar < high)).double(), (gbar > 0.5).double()
        cost = torch.tensor(self._shares, dtype=torch.float64) @ opened
        return GateReport(gbar, float(undecided.mean()), float(opened.mean()), float(cost), self.units)

    def gate_report(self, loader: Iterable[Any]) -> GateReport:
        """The same as ``report``."""
        return self.report(loader)


class _StraightThrough(torch.autograd.Function):
    """g = 1[z > 1/2]; dg/dz = 1 on (0, 1), else 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0.5).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * ((z > 0) & (z < 1))


class _Opened(torch.autograd.Function):
    """value * x, the value broadcast over the trailing axes of x; its gradient without a product of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, value)
        return x * value.view(*value.shape, *[1] * (x.ndim - value.ndim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, value = ctx.saved_tensors
        axes = value.ndim
        inner = torch.linalg.vecdot(grad.flatten(axes), x.flatten(axes)) if x.ndim > axes else grad * x
        return grad * value.view(*value.shape, *[1] * (x.ndim - axes)), inner


class _Gate(nn.Module):
    """The gates of a block, or of the channels that one layer reads.

    Args:
        entry: channels of the block's input and their axis.
        units: number of gates.
        kind: "ste", "gumbel" or "static".
        hidden: width of the hidden layer.
        axis: of the gated channels in what the layer reads.
    """

    def __init__(self, entry: tuple[int, int], units: int, kind: str, hidden: int, axis: int) -> None:
        super().__init__()
        self.kind, self.units, self.axis, (width, self.entry_axis) = kind, units, axis, entry
        self.value: Tensor | None = None
        if kind == "static":
            self.logits = nn.Parameter(torch.full((units,), _START))
        else:
            last = nn.Linear(hidden, units)
            nn.init.zeros_(last.weight)  # so that the start does not depend on the scale of the input
            nn.init.constant_(last.bias, _START)
            self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the branch's first layer: decides for each sample, (B, units)."""
        x: Tensor = args[0]
        if self.kind == "static":
            self.value = _StraightThrough.apply(self.logits).expand(len(x), -1)
            return
        z = self.net(_pool(x, self.entry_axis))
        if self.kind == "ste":
            self.value = _StraightThrough.apply(z)
            return
        noise = torch.empty_like(z).exponential_().log_() - torch.empty_like(z).exponential_().log_() if self.training else 0.0
        soft = torch.sigmoid(z + noise)  # the difference of two Gumbel variables is logistic; temperature 1
        self.value = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())

    def scale_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Forward hook of the branch's last layer: g F(x)."""
        return _Opened.apply(output, cast(Tensor, self.value).squeeze(1).to(output.dtype))

    def scale_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the layer that reads the channels: g * act(norm(conv1(x)))."""
        x: Tensor = args[0]
        value = cast(Tensor, self.value).to(x.dtype)
        if self.axis == -1 and x.ndim > 2:
            return (x * value.view(len(value), *[1] * (x.ndim - 2), self.units), *args[1:])
        return (_Opened.apply(x, value), *args[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "value": None}  # part of the last pass's graph: neither copied nor pickled


def _pool(x: Tensor, axis: int) -> Tensor:
    """The mean over everything but samples and channels."""
    rest = [i for i in range(1, x.ndim) if i != axis % x.ndim]
    return x.mean(rest) if rest else x.clone()  # the branch may change x in place


# What is gated: found in the traced forward of each module.


@dataclass(frozen=True)
class _Cut:
    """Channels inside a branch: made by ``producer``, carried by the layers ``between``, read by ``consumer`` along ``axis``."""

    producer: str
    between: tuple[str, ...]
    consumer: str
    width: int
    axis: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.producer, *self.between, self.consumer)


@dataclass(frozen=True)
class _Block:
    """A branch that is added to its own input.

    Args:
        name: of the module that is this block and nothing else; else of the branch's first layer.
        branch: names of the branch's layers, in order; once measured, without those that run elsewhere too.
        after: what is left of that module without the branch: "" for an identity, "relu", or the name of the layer that follows
            the sum; None where the block is no module of its own.
        cuts: channels inside that can be gated.
    """

    name: str
    branch: tuple[str, ...]
    after: str | None
    cuts: tuple[_Cut, ...]


_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ACTIVATION = _RELU | {
    F.gelu, F.silu, F.mish, F.elu, F.selu, F.leaky_relu, F.hardswish, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid, "tanh", "sigmoid",
}  # fmt: skip
_LINEAR = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, "contiguous", "permute"}
_POOLS = (
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample,
)  # fmt: skip
_MIXING_ACTIVATIONS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


class _Tracer(fx.Tracer):
    """Sees through no submodule ("own"), through sequences ("sequences"), or through all that are not torch's own ("all")."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.through = through

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.through == "own":
            return True
        return (
            not isinstance(m, nn.Sequential) if self.through == "sequences" else super().is_leaf_module(m, module_qualified_name)
        )


def _trace(module: nn.Module, through: Sequence[str]) -> fx.Graph | None:
    """The graph of a module's forward, optional arguments left out; None where it cannot be traced."""
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    for how in through:
        try:
            return _Tracer(how).trace(module, concrete_args=optional or None)
        except Exception:  # whatever a forward does with what is no tensor
            continue
    return None


def _find_blocks(model: nn.Module, channels: bool, wanted: str | Sequence[str]) -> list[_Block]:
    """Every block in the traced modules, or those that ``wanted`` names."""
    found: dict[str, _Block] = {}
    failed: list[str] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not any(True for _ in module.children()):
            continue
        graph = _trace(module, ("all", "sequences") if channels else ("own",))
        if graph is None:
            failed.append(path)
            continue
        for block in _blocks_in(graph, model, path):
            found[block.branch[-1]] = block  # the innermost module that holds the block knows whether it is nothing else
    # The long skip of a U-net has whole blocks in its branch: the inner ones are the blocks.
    inner = {layer for block in found.values() for layer in block.branch}
    found = {
        end: block
        for end, block in found.items()
        if not any(other.startswith(f"{layer}.") for layer in block.branch for other in inner)
    }
    if wanted == "auto":
        return list(found.values())
    chosen: dict[str, _Block] = {}
    for name in wanted:
        if name not in modules:
            raise unknown("module in blocks:", name, [n for n in modules if n])
        inside = [b for b in found.values() if name in ("", b.name) or all(layer.startswith(f"{name}.") for layer in b.branch)]
        if not inside and name in failed:
            inside = _by_names(model, name)
        if not inside:
            raise ValueError(f"blocks: {name!r} ({type(modules[name]).__name__}) is no residual block and holds none")
        chosen |= {block.branch[-1]: block for block in inside}
    return list(chosen.values())


def _by_names(model: nn.Module, name: str) -> list[_Block]:
    """The block of a module whose layers are called conv1, bn1, conv2, ..., and which has no projection."""
    children = dict(model.get_submodule(name).named_children())
    projection = next((children[word] for word in ("downsample", "shortcut") if word in children), nn.Identity())
    layers = []
    for i in (1, 2, 3):
        conv = [word for word in (f"conv{i}",) if word in children]
        norm = [word for word in (f"bn{i}", f"norm{i}") if word in children]
        layers += conv + norm if conv and norm else []
    if len(layers) < 4 or not _is_identity(projection):
        return []
    branch = tuple(f"{name}.{layer}" for layer in layers)
    return [_Block(name, branch, None, _cuts(model, [(layer, model.get_submodule(layer)) for layer in branch]))]


def _blocks_in(graph: fx.Graph, model: nn.Module, path: str) -> Iterator[_Block]:
    absolute = lambda node: f"{path}.{node.target}" if path else str(node.target)  # noqa: E731
    for add in graph.nodes:
        if add.op not in ("call_function", "call_method") or add.target not in _ADD or len(add.args) != 2 or add.kwargs:
            continue
        for branch_end, shortcut in (add.args, add.args[::-1]):
            if not (isinstance(branch_end, fx.Node) and isinstance(shortcut, fx.Node)):
                continue
            x = _source(shortcut, model, absolute)
            nodes = _chain(branch_end, x)
            layers = [node for node in nodes if node.op == "call_module"]
            tail = nodes[nodes.index(layers[-1]) + 1 :] if layers else []
            if not layers or any(node.target not in _LINEAR for node in tail):
                continue
            functions = takewhile(lambda node: node.op != "call_module", nodes)
            in_place = any(_in_place(node) for node in functions)  # the shortcut reads what they leave: they have to stay
            after = _after(graph, add, x, absolute) if path and not in_place else None
            names = tuple(absolute(node) for node in layers)
            parts = [
                (absolute(n), model.get_submodule(absolute(n))) if n.op == "call_module" else (None, n.target) for n in nodes
            ]
            yield _Block(names[0] if after is None else path, names, after, _cuts(model, parts))
            break


def _source(node: fx.Node, model: nn.Module, absolute: Any) -> fx.Node:
    """The value itself, before identities."""
    while node.op == "call_module" and len(node.all_input_nodes) == 1 and _is_identity(model.get_submodule(absolute(node))):
        node = node.all_input_nodes[0]
    return node


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Sequential) and all(map(_is_identity, module)))


def _chain(end: fx.Node, start: fx.Node) -> list[fx.Node]:
    """The layers and elementwise functions that lead from one value to another and nowhere else; empty where there is more."""
    nodes: list[fx.Node] = []
    node = end
    while node is not start:
        if node.op == "call_module":
            plain = len(node.args) == 1 and not node.kwargs
        else:
            plain = node.op in ("call_function", "call_method") and node.target in _ACTIVATION | _LINEAR
        if not plain or len(node.all_input_nodes) != 1 or len(node.users) != 1:
            return []
        nodes.append(node)
        node = node.all_input_nodes[0]
    return nodes[::-1]


def _in_place(node: fx.Node) -> bool:
    """Whether a function changes its argument."""
    given = (node.kwargs.get("inplace"), *node.args)
    return node.target in {F.relu_, torch.relu_, "relu_"} or any(value is True for value in given)


def _after(graph: fx.Graph, add: fx.Node, x: fx.Node, absolute: Any) -> str | None:
    """What a module does beyond the block, if it takes the block's input and returns what comes right after the sum."""
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if inputs != [x] or not isinstance(output, fx.Node) or len(add.users) != 1:
        return None
    if output is add:
        return ""
    if output.all_input_nodes != [add] or len(output.users) != 1:
        return None
    if output.op == "call_module":
        return absolute(output)
    return "relu" if output.op in ("call_function", "call_method") and output.target in _RELU else None


def _cuts(model: nn.Module, parts: Sequence[tuple[str | None, Any]]) -> tuple[_Cut, ...]:
    """The channels between two layers that mix channels, where all in between treats each channel on its own."""
    shared = {m for site in sites(model).values() if len(site.places) > 1 for _, m, _ in site.places}
    mixing = [i for i, (_, part) in enumerate(parts) if isinstance(part, nn.Linear | _ConvNd) and not _depthwise(part)]
    cuts = []
    for i, j in pairwise(mixing):
        (producer, first), (consumer, last), between = parts[i], parts[j], parts[i + 1 : j]
        width, linear = _out(first), isinstance(first, nn.Linear)
        layers = [first, last, *(part for name, part in between if name)]
        if (
            isinstance(last, nn.Linear) == linear
            and width == (last.in_features if isinstance(last, nn.Linear) else last.in_channels)
            and all(getattr(layer, "groups", 1) == 1 for layer in (first, last))
            and all(
                part in _ACTIVATION | _LINEAR - {"permute"} if name is None else _per_channel(part, width)
                for name, part in between
            )
            and not shared & set(layers)
        ):
            names = tuple(name for name, _ in between if name)
            cuts.append(_Cut(cast(str, producer), names, cast(str, consumer), width, -1 if linear else 1))
    return tuple(cuts)


def _out(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else cast(_ConvNd, layer).out_channels


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def _per_channel(layer: nn.Module, width: int) -> bool:
    """Whether a layer keeps ``width`` channels apart."""
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        return layer.num_features == width
    if isinstance(layer, _ConvNd):
        return _depthwise(layer)
    if isinstance(layer, (nn.Identity, _DropoutNd, *_POOLS)):
        return True
    return type(layer).__module__ == "torch.nn.modules.activation" and not isinstance(layer, _MIXING_ACTIVATIONS)


def _measure(
    model: nn.Module, blocks: list[_Block], example_inputs: Inputs, channels: bool
) -> tuple[list[_Block], dict[str, tuple[int, int]], dict[str, int]]:
    """Runs a model in eval mode: which blocks can be gated, width and channel axis of what each reads, and every layer's MACs."""
    shapes: dict[str, list[tuple[torch.Size | None, torch.Size | None]]] = {}
    names = {layer for block in blocks for layer in block.branch}

    def shape(value: Any) -> torch.Size | None:
        return value.shape if isinstance(value, Tensor) else None

    def hook(name: str) -> Any:
        return lambda module, args, output: shapes.setdefault(name, []).append((shape(args[0]) if args else None, shape(output)))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    root = type(model).__name__
    macs = {name.removeprefix(f"{root}."): sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    kept, widths = [], {}
    for block in blocks:
        first, last = block.branch[0], block.branch[-1]
        once = all(
            len(shapes.get(layer, ())) == 1
            or (layer in shapes and layer not in (first, last) and not _holds_parameters(model, layer))
            for layer in block.branch
        )
        if not once or (channels and not block.cuts):
            continue
        before, behind = shapes[first][0][0], shapes[last][0][1]
        # A branch of another shape is broadcast, one of other rows (windows of an image) has no gate per sample.
        if before is None or behind is None or before.numel() != behind.numel() or before[0] != behind[0] or len(before) < 2:
            continue
        axis = _channel_axis(model, block, len(before))
        widths[first] = (before[axis], axis)
        kept.append(replace(block, branch=tuple(layer for layer in block.branch if len(shapes[layer]) == 1)))
    return kept, widths, macs


def _holds_parameters(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).parameters())


def _channel_axis(model: nn.Module, block: _Block, ndim: int) -> int:
    """1 or -1, as the first layer of the branch that knows has it."""
    for name in block.branch:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                return -1
            if isinstance(module, _ConvNd | _BatchNorm | _InstanceNorm | nn.GroupNorm):
                return 1
    return 1 if ndim > 3 else -1


def _cost(model: nn.Module, layers: Sequence[str], kind: str, macs: dict[str, int]) -> float:
    if kind == "count":
        return 1.0
    if kind == "macs":
        return float(sum(macs.get(layer, 0) for layer in layers))
    return float(sum(p.numel() for layer in layers for p in model.get_submodule(layer).parameters()))


# What is derived.


def _verdict(wrapped: GatedModel, opened: Tensor) -> tuple[list[_Block], list[tuple[_Cut, Tensor]]]:
    """The blocks that go, and which channels go of the others."""
    parts = iter(opened.cpu().split([cast(int, gate.units) for gate in wrapped.gates]))
    closed, channels = [], []
    for block in wrapped.blocks:
        if wrapped.pruner.unit == "block":
            gone = not bool(next(parts))
        else:
            mine = [(cut, next(parts)) for cut in block.cuts]
            gone = not all(bool(part.any()) for _, part in mine)
            channels += [] if gone else [(cut, (~part).nonzero().flatten()) for cut, part in mine]
        closed += [block] if gone else []
    return closed, channels


def _constant(wrapped: GatedModel, plain: nn.Module, closed: list[_Block], opened: Tensor, inputs: Inputs) -> float:
    """The largest value that closed blocks' branches put out with their channels closed; ``plain`` is the model without gates."""
    cuts = [cut for block in wrapped.blocks for cut in block.cuts]
    gates = dict(zip(cuts, opened.split([cut.width for cut in cuts]), strict=True))
    largest = 0.0

    def close(cut: _Cut, x: Tensor) -> Tensor:
        return (x.movedim(cut.axis, -1) * gates[cut].to(x)).movedim(-1, cut.axis)

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    handles = [plain.get_submodule(block.branch[-1]).register_forward_hook(note) for block in closed]
    for cut in (cut for block in closed for cut in block.cuts):
        hook = lambda module, args, cut=cut: (close(cut, args[0]), *args[1:])  # noqa: E731
        handles.append(plain.get_submodule(cut.consumer).register_forward_pre_hook(hook))
    with evaluating(plain):
        call(plain, inputs)
    for handle in handles:
        handle.remove()
    return largest


def _plan(wrapped: GatedModel, closed: list[_Block], channels: list[tuple[_Cut, Tensor]], example_inputs: Inputs) -> PruningPlan:
    """Masks of every prunable weight and of what else is in the gated branches."""
    model = wrapped.model
    within = lambda blocks: {  # noqa: E731
        m for block in blocks for layer in block.branch for m in model.get_submodule(layer).modules()
    }
    branches, gone = within(wrapped.blocks), within(closed)
    covered = {site.name for site in prunable(model)}
    masks = {
        site.name: torch.full(site.tensor.shape, not all(m in gone for _, m, _ in site.places), device=site.tensor.device)
        for site in sites(model).values()
        if site.name in covered or any(m in branches for _, m, _ in site.places)
    }
    names = {(id(m), attribute): site.name for site in sites(model).values() for _, m, attribute in site.places}

    def strike(layer: str, attribute: str, index: Tensor, axis: int) -> None:
        name = names.get((id(model.get_submodule(layer)), attribute))
        if name is not None and masks[name].shape[axis] > 1:  # one slope of PReLU for all channels stays
            masks[name].index_fill_(axis, index.to(masks[name].device), False)

    for cut, index in channels:
        if not len(index):
            continue
        transposed = isinstance(model.get_submodule(cut.producer), nn.modules.conv._ConvTransposeNd)
        strike(cut.producer, "weight", index, int(transposed))
        strike(cut.producer, "bias", index, 0)
        for layer in cut.between:
            strike(layer, "weight", index, 0)
            strike(layer, "bias", index, 0)
        transposed = isinstance(model.get_submodule(cut.consumer), nn.modules.conv._ConvTransposeNd)
        strike(cut.consumer, "weight", index, int(not transposed))
    cuts = {cut.producer: index for cut, index in channels if len(index)}
    return PruningPlan(masks, channels=cuts, model=model, example_inputs=example_inputs)


def _without_gates(model: nn.Module) -> nn.Module:
    """A copy of the gated model, its hooks gone."""
    plain = copy_model(model)
    for hooks in _hooks(plain):
        for key in _gate_hooks(hooks):
            del hooks[key]
    return plain


def _hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    for module in model.modules():
        yield from (module._forward_hooks, module._forward_pre_hooks)


def _gate_hooks(hooks: dict[int, Any]) -> list[int]:
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Gate)]


def _first(model: nn.Module) -> Tensor:
    """The parameter that says of what device and precision the model is."""
    return next(p for p in model.parameters() if p.is_floating_point())


class _Zero(nn.Module):
    """A branch that is gone: zeros in the shape of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _remove(model: nn.Module, block: _Block) -> None:
    """Takes a block's branch out of the model, but for an activation in place at its start: the shortcut reads what it leaves."""
    start = model.get_submodule(block.branch[0])
    while isinstance(start, nn.Sequential) and len(start):
        start = start[0]
    in_place = [start] if getattr(start, "inplace", False) else []
    if block.after is not None:
        rest = nn.Identity() if not block.after else nn.ReLU() if block.after == "relu" else model.get_submodule(block.after)
        rest.training = training = model.get_submodule(block.name).training
        if in_place:
            rest = nn.Sequential(*in_place, rest)
            rest.training = training
        model.set_submodule(block.name, rest)
        return
    for layer in block.branch:
        model.set_submodule(layer, _Zero() if layer == block.branch[-1] else nn.Identity())
    # No other activation in place may see the block's input.
    model.set_submodule(block.branch[0], nn.Sequential(*in_place, _Zero()))

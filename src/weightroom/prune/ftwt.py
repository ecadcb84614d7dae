r"""Fire Together Wire Together: tiny gates that predict, sample by sample, which filters of a convolution are worth computing.

In front of every block (convolution, batch norm, activation) a gate looks at the block's input :math:`I` and predicts a mask over
the output's channels. What it should predict comes for free: the unmasked output :math:`O` is ranked by its channels' maxima, and
the smallest set of channels that holds a share ``r`` of their sum is to be kept. Learning the masks is then plain binary
classification beside the task's loss, and ``r`` sets the budget.

Reach for it when a convolutional network serves one sample at a time and may spend less on easy ones, or to study conditional
computation. Do not reach for it to serve batches: every sample has its own mask, so that a batch computes all filters and
multiplies by zero; what a batch can gain is what no sample ever chooses (``DynamicMaskPruner.derive``). Gates miss their targets:
where most channels should be on they lean to "on" and spend more than ``DynamicModel.estimate_reduction`` promises, where few
should be they lean to "off" and may leave a late layer a channel or two, which the accuracy does not survive. Random masks are easy
to beat at equal cost; one fixed choice of channels, fine-tuned as long, may well be as good.

Elkerdawy et al., "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction", CVPR 2022,
arXiv 2110.08232, section 3. Where paper and released code differ: the gate pools by the maximum, as the paper has it, and
``pool="avg"`` gives the code's average. Multiply-accumulates are those that remain: the code also counts the channels that a skip
connection has filled again as absent, and none at all for a depthwise convolution with one channel off (``macs("reference")``). A
target always keeps the largest channel, where the code may keep none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from weightroom.errors import check_range, unknown
from weightroom.metrics import copy_model, device_of
from weightroom.prune.conv_blocks import find_blocks, listed, mask_source, now, owners_of, tied, traced
from weightroom.prune.plan import Inputs, PruningPlan, call, evaluating, like, to_device
from weightroom.prune.wrapped import TrainTimePruner, WrappedModel

__all__ = ["DynamicConvBlock", "DynamicMaskPruner", "DynamicModel", "MaskPredictor", "MaskReport", "mass_targets"]

Count = Literal["exact", "reference", "dense"]
Execute = Literal["mask", "gather"]

#: Below this a share of the mass, or a channel's maximum, counts as nothing; also the slack of the cumulative sum.
_NOTHING = 1e-5


def mass_targets(out: Tensor, r: float) -> Tensor:
    r"""The channels that hold a share ``r`` of the mass: what a gate should predict.

    With :math:`a_c = \max |O_c|` over space and :math:`q = a / \sum_c a`, sorted in descending order, channels stay while their
    cumulative sum is at most ``r``; the one that crosses ``r`` goes. Channels with :math:`q \le 10^{-5}` go whatever ``r`` is, the
    largest always stays.

    Args:
        out: outputs of a block after its activation and before any mask, (B, C, ...).
        r: share of the mass, in (0, 1]; at 1 exactly the channels that fire stay, below 0 all do.

    Returns:
        (B, C), 1 where the channel stays, in the dtype of ``out`` (float32 at least).

    Raises:
        ValueError: ``r`` is 0 or above 1, or ``out`` has fewer than two axes.
    """
    heat = _heat(out)
    if r < 0:
        return torch.ones_like(heat)
    check_range("r", r, low=0.0, high=1.0, open_low=True)
    return _by_mass(heat, r)


@torch.no_grad()
def _heat(out: Tensor) -> Tensor:
    """The maximum of each channel's magnitude, (B, C)."""
    if out.ndim < 2:
        raise ValueError(f"out must be of shape (B, C, ...), got {tuple(out.shape)}")
    flat = out.unsqueeze(2) if out.ndim == 2 else out.flatten(2)
    heat = torch.maximum(flat.amax(2), -flat.amin(2))  # max |O|; abs() would write it out
    return heat.float() if heat.dtype in (torch.float16, torch.bfloat16) else heat


def _by_mass(heat: Tensor, r: float) -> Tensor:
    ordered, index = heat.sort(dim=1, descending=True, stable=True)
    cumulative = ordered.cumsum(1)
    total = cumulative[:, -1:].clamp_min(torch.finfo(heat.dtype).tiny)  # the same in whatever order the channels come
    keep = heat / total > _NOTHING
    if r < 1:
        keep &= torch.zeros_like(keep).scatter_(1, index, cumulative / total - r <= _NOTHING)
    return _with_largest(keep, heat)


def _by_ratio(heat: Tensor, pruned: float) -> Tensor:
    smallest = heat.argsort(dim=1, stable=True)[:, : math.floor(pruned * heat.shape[1] + 1e-9)]
    return _with_largest((heat > _NOTHING).scatter_(1, smallest, False), heat)


def _with_largest(keep: Tensor, heat: Tensor) -> Tensor:
    return keep.scatter_(1, heat.argmax(1, keepdim=True), True).to(heat.dtype)


class MaskPredictor(nn.Module):
    r"""A gate: logits :math:`P = A\,\mathrm{softmax}(\mathrm{pool}(I)) + b`, one for each output channel.

    Args:
        c_in: channels of the block's input.
        c_out: channels of its output.
        pool: "max" as in the paper, "avg" as in the released code.
        softmax: normalise the pooled channels.
        embedding: about how many numbers the gate should see, >= 1: pools to d x d with ``d = round(sqrt(embedding / c_in))``,
            1 at least; None for d = 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        pool: Literal["max", "avg"] = "max",
        softmax: bool = True,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("max", "avg"):
            raise unknown("pool", pool, ("max", "avg"))
        if embedding is not None:
            check_range("embedding", embedding, low=1)
        self.pool = pool
        self.softmax = softmax
        self.size = 1 if embedding is None else max(1, round(math.sqrt(embedding / c_in)))
        self.linear = nn.Linear(self.size**2 * c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, C_in, H, W) -> logits (B, C_out)."""
        if self.size == 1:
            e = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        else:
            pool = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
            e = pool(x, self.size).flatten(1)
        return self.linear(e.softmax(1) if self.softmax else e)


@dataclass(frozen=True)
class _Pass:
    """What a block remembers of its last forward pass."""

    logits: Tensor  # P, (B, C_out); with its graph
    mask: Tensor  # M, (B, C_out)
    heat: Tensor | None  # a, (B, C_out); not known where filters were skipped
    given: Tensor | None  # the mask that the input carries, (B, C_in); None: dense
    pixels: int  # H' W'
    training: bool


class DynamicConvBlock(nn.Module):
    r"""Convolution, batch norm and activation behind a gate: :math:`O \odot M` with :math:`M = 1[\sigma(P) > 1/2]`.

    The mask is the predicted one in training and in evaluation. No gradient of what follows reaches the gate; it learns from
    ``mask_loss`` alone.

    Args:
        conv: a 2-D convolution of any stride, dilation and groups.
        bn: its batch norm, or None.
        act: what comes after, or None; it must map 0 to 0, channel by channel alike. It may work in place.
        mass: for target "mass" the share ``r`` of the mass that the targets keep, in (0, 1]; for target "ratio" the share of the
            channels that they remove, in [0, 1).
        mode: "decoupled": the gate sees the input without its graph; "joint": ``mask_loss`` also shapes what made the input.
        target: how the targets are made, see ``mass``.
        pool, softmax, embedding: of the ``MaskPredictor``.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None = None,
        act: nn.Module | None = None,
        *,
        mass: float = 0.9,
        mode: Literal["decoupled", "joint"] = "decoupled",
        target: Literal["mass", "ratio"] = "mass",
        pool: Literal["max", "avg"] = "max",
        softmax: bool = True,
        embedding: int | None = None,
    ) -> None:
        super().__init__()
        _check_targets(mass, mode, target)
        self.conv, self.bn, self.act = conv, bn, act
        self.mass, self.mode, self.target = mass, mode, target
        self.gate = MaskPredictor(conv.in_channels, conv.out_channels, pool=pool, softmax=softmax, embedding=embedding)
        self.gate.to(conv.weight)
        self.gate.train(conv.training)
        self.training = conv.training
        #: "gather" skips filters in eval mode, "mask" computes all and multiplies.
        self.execute: Execute = "mask"
        #: Let every channel pass.
        self.open = False
        self._source: tuple[DynamicConvBlock, ...] = ()  # the block whose mask the input carries; a tuple, to be no submodule
        self._before: tuple[DynamicConvBlock, ...] = ()  # the block that runs before this one
        self._last: _Pass | None = None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Input (B, C_in, H, W) -> masked output (B, C_out, H', W'); ``skip`` is added before the activation."""
        logits = self.gate(x.detach() if self.mode == "decoupled" else x)
        with torch.no_grad():
            mask = (torch.ones_like(logits) if self.open else logits.sigmoid() > 0.5).to(x.dtype)
        given = self._source[0].last.mask if self._source else None
        if self.execute == "gather" and not self.training and self._can_skip():
            out, heat = self._gather(x, skip, mask, given), None
        else:
            out = self.conv(x)
            out = self._finish(out if self.bn is None else self.bn(out), skip)
            heat = _heat(out)
            chosen = mask[:, :, None, None].to(out.dtype)
            out = out * chosen if out.requires_grad else out.mul_(chosen)
        self._last = _Pass(logits, mask, heat, given, out.shape[2] * out.shape[3], self.training)
        return out

    @property
    def last(self) -> _Pass:
        """What the last forward pass has left."""
        if self._last is None:
            raise RuntimeError("there is no forward pass yet: call the model first")
        return self._last

    @property
    def heat(self) -> Tensor:
        """The maxima :math:`a` of the last pass's output before the mask, (B, C_out)."""
        if self.last.heat is None:
            raise RuntimeError(
                "the last forward pass skipped filters (execute='gather'): what they would have given is not known"
            )
        return self.last.heat

    def targets(self) -> Tensor:
        """What the gate should have predicted in the last forward pass, (B, C_out)."""
        return _by_mass(self.heat, self.mass) if self.target == "mass" else _by_ratio(self.heat, self.mass)

    def mask_loss(self) -> Tensor:
        r""":math:`\sum_c \mathrm{mean}_b\, \mathrm{BCE}(P_{bc}, g_{bc})` of the last forward pass, a scalar."""
        logits = self.last.logits
        targets = self.targets().to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)

    def mask_accuracy(self) -> Tensor:
        """Share of the channels that the last forward pass masked as their targets say, a scalar."""
        return (self.last.mask == self.targets().to(self.last.mask.dtype)).double().mean()

    def macs(self, count: Count = "exact") -> Tensor:
        """Multiply-accumulates of the convolution in the last forward pass, (B,) in float64; see ``DynamicModel.macs``."""
        before = self._before[0].last.mask if self._before else None
        return self._macs(self.last.mask, self.last.given, before, count)

    def _macs(self, mask: Tensor, given: Tensor | None, before: Tensor | None, count: Count) -> Tensor:
        groups, c_in = self.conv.groups, self.conv.in_channels
        one = self.last.pixels * math.prod(self.conv.kernel_size)
        filters = mask.double().unflatten(1, (groups, -1)).sum(2)  # (B, groups)
        if count == "exact":
            inputs = torch.ones(len(mask), c_in, device=mask.device) if given is None else given
            return one * (filters * inputs.double().unflatten(1, (groups, -1)).sum(2)).sum(1)
        if count == "reference":
            known = (
                torch.full((len(mask),), float(c_in), device=mask.device).double() if before is None else before.double().sum(1)
            )
            return one * filters.sum(1) * (known // groups)
        if count == "dense":
            return torch.full((len(mask),), float(one * self.conv.weight.shape[1] * mask.shape[1]), device=mask.device).double()
        raise unknown("count", count, ("exact", "reference", "dense"))

    def _finish(self, out: Tensor, skip: Tensor | None) -> Tensor:
        out = out if skip is None else out + skip
        return out if self.act is None else self.act(out)

    def _can_skip(self) -> bool:
        """Filters are skipped by reading the layers' weights, which is right only where these need no call to be up to date."""
        hooked = any(m is not None and (m._forward_pre_hooks or m._forward_hooks) for m in (self.conv, self.bn))
        return not hooked and (self.bn is None or self.bn.running_mean is not None)

    def _gather(self, x: Tensor, skip: Tensor | None, mask: Tensor, given: Tensor | None) -> Tensor:
        """The masked output, of active filters and active inputs only; samples with equal masks together."""
        shape = len(x), self.conv.out_channels, *self._size(x)
        if len(x) == 1:
            active, part = self._part(x, skip, mask[0], None if given is None else given[0])
            return part.new_zeros(shape).index_copy_(1, active, part)
        key = mask if given is None else torch.cat([mask, given.to(mask.dtype)], 1)
        kinds, which = key.unique(dim=0, return_inverse=True)
        out = None
        for kind in range(len(kinds)):
            rows = (which == kind).nonzero().flatten()
            of = lambda tensor: None if tensor is None else tensor[rows]  # noqa: B023, E731
            active, part = self._part(x[rows], of(skip), mask[rows[0]], None if given is None else given[rows[0]])
            out = part.new_zeros(shape) if out is None else out
            out[rows[:, None], active] = part
        return x.new_zeros(shape) if out is None else out

    def _part(self, x: Tensor, skip: Tensor | None, mask: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """The active channels of samples that share one mask, and what the block makes of them."""
        active = mask.nonzero().flatten()
        out = self._convolve(x, active, given)
        if (bn := self.bn) is not None and len(active):
            of = lambda tensor: None if tensor is None else tensor.index_select(0, active)  # noqa: E731
            out = F.batch_norm(out, of(bn.running_mean), of(bn.running_var), of(bn.weight), of(bn.bias), False, 0.0, bn.eps)
        return active, self._finish(out, None if skip is None else skip.index_select(1, active))

    def _convolve(self, x: Tensor, active: Tensor, given: Tensor | None) -> Tensor:
        """The convolution's ``active`` outputs; inputs that are not ``given`` are zero."""
        conv, groups = self.conv, self.conv.groups
        width, count = conv.in_channels // groups, conv.out_channels // groups  # of a group
        size = self._size(x)
        padding: Any = conv.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        bias = None if conv.bias is None else conv.bias.index_select(0, active)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
            return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, groups)

        inputs = None if given is None else given.nonzero().flatten()
        if groups == 1 and len(active) and (inputs is None or len(inputs)):
            weight = conv.weight.index_select(0, active)
            if inputs is not None and len(inputs) < width:
                x, weight = x.index_select(1, inputs), weight.index_select(1, inputs)
            return convolve(x, weight, bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype  # what F.conv2d gives
        out = x.new_zeros(len(x), len(active), *size, dtype=dtype)
        if groups > 1 and width == 1:
            live = torch.ones_like(active, dtype=torch.bool) if given is None else given.index_select(0, active // count) != 0
            if filters := int(live.sum()):
                chosen = active[live]
                out[:, live] = convolve(x.index_select(1, chosen // count), conv.weight.index_select(0, chosen), groups=filters)
        elif groups > 1:
            for group in range(groups):
                of_group = active // count == group
                first = group * width
                within = (
                    torch.arange(width, device=x.device) if given is None else given[first : first + width].nonzero().flatten()
                )
                if len(within) and bool(of_group.any()):
                    weight = conv.weight.index_select(0, active[of_group]).index_select(1, within)
                    out[:, of_group] = convolve(x.index_select(1, within + first), weight)
        return out if bias is None else out + bias[:, None, None].to(dtype)

    def _size(self, x: Tensor) -> tuple[int, ...]:
        conv = self.conv
        if conv.padding == "same":
            return tuple(x.shape[2:])
        padding = cast(tuple[int, ...], (0, 0) if conv.padding == "valid" else conv.padding)
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # its graph cannot be copied


@dataclass(frozen=True)
class MaskReport:
    """What the gates do on some data, in eval mode.

    Args:
        frequency: name of the convolution -> share of the samples that choose each channel, (C_out,).
        mask_accuracy: share of the channels that are masked as their targets say, the mean over layers; None where the model
            skips filters ("gather") and targets are not known.
        macs: multiply-accumulates of the convolutions for a sample, the mean.
        dense_macs: the same without masks.
    """

    frequency: dict[str, Tensor]
    mask_accuracy: float | None
    macs: float
    dense_macs: float

    @property
    def macs_cut(self) -> float:
        """Share of the convolutions' multiply-accumulates that is saved."""
        return 1 - self.macs / self.dense_macs


class DynamicModel(WrappedModel):
    """A model whose convolutions are gated; made by ``DynamicMaskPruner.wrap``.

    It takes and returns what the model does. A training step is ``loss_fn(model(x), y) + model.aux_loss()``.
    """

    def __init__(
        self,
        network: nn.Module,
        places: Mapping[str, str],
        plain: nn.Module,
        norms: Mapping[str, str | None],
        example_inputs: Inputs,
        loss_weight: float,
        cooldown: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.training = plain.training
        self.loss_weight, self.cooldown = loss_weight, cooldown
        self._plain = (plain,)  # shares its layers with the network; a tuple, to be no submodule
        self._places, self._norms = dict(places), dict(norms)
        self._example_inputs = example_inputs
        self._cool = False
        self._trained: list[bool] = []  # which of the gates' parameters were, before the cooldown
        self._frequency: dict[str, Tensor] = {}
        blocks = list(self.blocks.values())
        for before, block in pairwise(blocks):
            block._before = (before,)
        self._ungated, self._others = self._count_rest()
        self.advance(0.0)

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """As the model's own, with its signature: exporters ask for it."""
        return self.network.forward

    @property
    def blocks(self) -> dict[str, DynamicConvBlock]:
        """The gated blocks by the names of their convolutions, in the order in which they run."""
        return {name: cast(DynamicConvBlock, self.network.get_submodule(place)) for name, place in self._places.items()}

    @property
    def execute(self) -> Execute:
        """How masks are put into effect in eval mode.

        "mask" computes every filter and multiplies. "gather" computes only active filters, on active inputs where these carry a
        mask that is known; a batch is split into samples of equal masks, which is one by one where all differ: made for a batch
        of one, slow for others. A block is always computed whole where its batch norm has no running statistics, or where its
        convolution or batch norm has hooks, as the masks of ``torch.nn.utils.prune`` are.
        """
        return next(iter(self.blocks.values())).execute

    @execute.setter
    def execute(self, how: Execute) -> None:
        if how not in ("mask", "gather"):
            raise unknown("execute", how, ("mask", "gather"))
        for block in self.blocks.values():
            block.execute = how

    def aux_loss(self) -> Tensor:
        r"""The mask loss of the last forward pass, :math:`\lambda \frac{1}{L} \sum_l \sum_c \mathrm{mean}_b\, \mathrm{BCE}(P, g)`.

        0 in eval mode and after the cooldown.

        Raises:
            RuntimeError: there was no forward pass, or in training mode the last one was in eval mode.
        """
        blocks = self.blocks.values()
        last = [block.last for block in blocks]
        if not self.training or self._cool:
            return last[0].logits.new_zeros(())
        if any(block.training and not block.last.training for block in blocks):
            raise RuntimeError("aux_loss needs a forward pass in training mode before it")
        return self.loss_weight * torch.stack([block.mask_loss() for block in blocks]).mean()

    def mask_accuracy(self) -> Tensor:
        """Share of the channels that the last forward pass masked as their targets say, the mean over layers, a scalar.

        Raises:
            RuntimeError: there was no forward pass, or it skipped filters.
        """
        return torch.stack([block.mask_accuracy() for block in self.blocks.values()]).mean()

    def macs(self, count: Count = "exact", *, gates: bool = False, others: bool = False) -> Tensor:
        """Multiply-accumulates of the convolutions for each sample of the last forward pass, (B,) in float64.

        Args:
            count: "exact": active filters times the inputs that are not known to be zero, in each group; what a skip connection
                has filled is dense. "reference": as the paper's code, active filters times (active filters of the block that ran
                before // groups). "dense": without masks.
            gates: count the gates too.
            others: count everything else too (linear layers). This and convolutions without a gate are dense, and counted at the
                size of the example inputs.

        Raises:
            RuntimeError: there was no forward pass.
        """
        total = torch.stack([block.macs(count) for block in self.blocks.values()]).sum(0) + self._ungated
        if gates:
            total = total + sum(
                p.numel() for block in self.blocks.values() for p in block.gate.parameters() if p.ndim == 2
            )  # fmt: skip
        return total + self._others if others else total

    def param_groups(self, lr: float | None = None, mask_lr: float | None = None) -> list[dict[str, Any]]:
        """The model's own parameters, then the gates', which have no weight decay; the paper has SGD with rates 0.01 and 0.1.

        Args:
            lr: learning rate of the model; the optimizer's own when None.
            mask_lr: learning rate of the gates; the optimizer's own when None.
        """
        gates = self._gate_parameters()
        known = {id(p) for p in gates}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if id(p) not in known]},
            {"params": gates, "weight_decay": 0.0},
        ]
        for group, rate in zip(groups, (lr, mask_lr), strict=True):
            if rate is not None:
                group["lr"] = rate
        return groups

    def advance(self, progress: float) -> None:
        """From ``progress >= cooldown`` on the mask loss is 0 and the gates are frozen, bit for bit: they have no gradient at all.

        Should ``progress`` fall again, those of them that were trained before are trained on. The state dict does not hold the
        progress: call this again after loading a checkpoint.

        Args:
            progress: the share of the training that has passed, in [0, 1].

        Raises:
            ValueError: ``progress`` is out of its range.
        """
        check_range("progress", progress, low=0.0, high=1.0)
        if (cool := progress >= self.cooldown) == self._cool:
            return
        self._cool = cool
        gates = self._gate_parameters()
        if cool:
            self._trained = [parameter.requires_grad for parameter in gates]
        for parameter, trained in zip(gates, self._trained, strict=True):
            parameter.requires_grad_(trained and not cool)
            if cool:
                parameter.grad = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Every channel passes for the block: the model is the plain one."""
        for block in self.blocks.values():
            block.open = True
        try:
            yield
        finally:
            for block in self.blocks.values():
                block.open = False

    @torch.no_grad()
    def estimate_reduction(self, loader: Iterable[Any]) -> float:
        """The share of the convolutions' multiply-accumulates that would be saved if every gate hit its targets.

        The targets are those of the model without masks: an estimate before training. Gates that have been trained save less
        where most channels should be on, and more where few should.

        Args:
            loader: batches whose first entry is the input.
        """
        spent = dense = 0.0
        execute, self.execute = self.execute, "mask"
        try:
            with self.opened():
                for _ in self._passes(loader):
                    targets = {id(block): block.targets() for block in self.blocks.values()}
                    for block in self.blocks.values():
                        given = targets[id(block._source[0])] if block._source else None
                        spent += float(block._macs(targets[id(block)], given, None, "exact").sum())
                    total = self.macs("dense")
                    spent += self._ungated * len(total)
                    dense += float(total.sum())
        finally:
            self.execute = execute
        return 1 - spent / dense

    @torch.no_grad()
    def report(self, loader: Iterable[Any]) -> MaskReport:
        """What the gates do on the data of ``loader`` (batches whose first entry is the input), in eval mode.

        The frequencies are also kept, for ``static_plan``.
        """
        chosen: dict[str, Tensor] = {}
        samples, right, spent, dense = 0, 0.0, 0.0, 0.0
        for size in self._passes(loader):
            for name, block in self.blocks.items():
                count = block.last.mask.double().sum(0)
                chosen[name] = chosen[name] + count if name in chosen else count
            if self.execute == "mask":
                right += size * float(self.mask_accuracy())
            samples += size
            spent += float(self.macs().sum())
            dense += float(self.macs("dense").sum())
        self._frequency = {name: count / samples for name, count in chosen.items()}
        accuracy = right / samples if self.execute == "mask" else None
        return MaskReport(dict(self._frequency), accuracy, spent / samples, dense / samples)

    def static_plan(self, threshold: float = 0.01, loader: Iterable[Any] | None = None) -> PruningPlan:
        """The plan, for the plain model, that removes channels almost never chosen, with their norms.

        Args:
            threshold: a channel goes if the share of the samples that choose it is at most this, in [0, 1); the most frequent
                channel of a layer stays.
            loader: what to count on, see ``report``; the data of the last ``report`` when None.

        Raises:
            ValueError: ``threshold`` is out of its range.
            RuntimeError: there is neither a loader nor a report.
        """
        check_range("threshold", threshold, low=0.0, high=1.0, open_high=True)
        if loader is not None:
            self.report(loader)
        if not self._frequency:
            raise RuntimeError(
                "static_plan needs to know how often channels are chosen: call report(loader) first, or give a loader"
            )
        channels: dict[str, Tensor] = {}
        for name, frequency in self._frequency.items():
            rare = frequency <= threshold
            rare[frequency.argmax()] = False
            for layer in (name, self._norms[name]):
                if layer is not None:
                    channels[layer] = rare.nonzero().flatten()
        plain = self._plain[0]
        affine = {
            name: index for name, index in channels.items() if getattr(plain.get_submodule(name), "weight", None) is not None
        }
        masks = PruningPlan.from_channels(plain, affine).masks
        # Masks alone: where a skip connection fills a channel again, only the filter may go and not the channel.
        return PruningPlan(masks, model=plain, example_inputs=like(self._example_inputs, next(self.parameters())))

    def plain(self) -> nn.Module:
        """A copy of the model without gates, with the weights and buffers as they are now."""
        plain = copy_model(self._plain[0]).to(device_of(self))
        known = dict(plain.named_buffers())
        # Layers are shared with the network, buffers of containers are its own.
        for name, buffer in self.network.named_buffers():
            if name in known:
                path, _, attribute = name.rpartition(".")
                setattr(plain.get_submodule(path), attribute, buffer.detach().clone())
        return plain

    def _gate_parameters(self) -> list[nn.Parameter]:
        return [parameter for block in self.blocks.values() for parameter in block.gate.parameters()]

    def _passes(self, loader: Iterable[Any]) -> Iterator[int]:
        """Runs every batch in eval mode and yields its size."""
        device, any_batch = device_of(self), False
        with evaluating(self):
            for batch in loader:
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                call(self, to_device(inputs, device))
                any_batch = True
                yield len(next(iter(self.blocks.values())).last.mask)
        if not any_batch:
            raise ValueError("loader gave no batch")

    @torch.no_grad()
    def _count_rest(self) -> tuple[int, int]:
        """Multiply-accumulates for a sample: of the convolutions without a gate, and of all that is no convolution."""
        plain, counter = self._plain[0], FlopCounterMode(display=False)
        with evaluating(plain), counter:
            expected = call(plain, self._example_inputs)
        with evaluating(self), self.opened():
            found = call(self, self._example_inputs)
            gated = self._gated_macs()
            size = len(next(iter(self.blocks.values())).last.mask)
        if isinstance(expected, Tensor) and not torch.allclose(
            expected, found, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        ):
            raise ValueError(
                "with all gates open the wrapped model is not the model: is a norm or activation named in blocks= also used "
                "elsewhere, or does an operation in place change the input of a block?"
            )
        for block in self.blocks.values():
            block._last = None
        flops = counter.get_flop_counts()["Global"]
        convolutions = sum(count for op, count in flops.items() if "convolution" in str(op)) // 2 // size
        return convolutions - gated, counter.get_total_flops() // 2 // size - convolutions

    def _gated_macs(self) -> int:
        return int(sum(float(block.macs("dense")[0]) for block in self.blocks.values()))


class DynamicMaskPruner(TrainTimePruner):
    """FTWT: masks that are predicted for every sample.

    ``wrap`` returns the dynamic model, which is the method's result. Train it from trained weights, the gates with a rate of
    their own: ``SGD(model.param_groups(lr=0.01, mask_lr=0.1), momentum=0.9, weight_decay=5e-4)``, and call
    ``model.advance(share of the training that has passed)`` after each step; without that there is no cooldown.

    Args:
        mass: for target "mass" the share ``r`` of the mass that the targets keep, in (0, 1]: the budget. For target "ratio" the
            share of each layer's channels that they remove, in [0, 1), as in the paper's code.
        mode: "decoupled": the mask loss trains the gates alone; "joint": also the weights before them.
        target: "mass" lets the number of channels vary with the sample and layer; "ratio" fixes it.
        pool: how a gate pools its input: "max" as in the paper, "avg" as in the released code.
        softmax: whether a gate normalises what it has pooled.
        embedding: about how many numbers a gate should see; see ``MaskPredictor``.
        blocks: what is gated. "auto": every convolution followed by [batch norm and] an activation, another convolution or an
            addition, found by torch.fx; not the pointwise convolution of a projection shortcut. A list of names of convolutions:
            these of them. For models that torch.fx cannot trace, a list of triples (convolution, batch norm or None, activation
            or None) of names; modules so named must be used there only, and inputs then count as dense.
        loss_weight: the weight of the mask loss, >= 0.
        cooldown: the share of training after which the mask loss is 0 and the gates are frozen, in [0, 1]; with 0 they are frozen
            from the start.
        residual: whether a convolution followed by an addition is masked "before" it (what the skip connection brings passes) or
            "after" it and the activation that follows.
        execute: how the masks are put into effect in eval mode; see ``DynamicModel.execute``.
        seed: decides the gates' initial weights.

    Raises:
        ValueError: an argument is out of its range.
    """

    #: The wrapped model itself is what is evaluated.
    dynamic = True

    def __init__(
        self,
        mass: float = 0.9,
        *,
        mode: Literal["decoupled", "joint"] = "decoupled",
        target: Literal["mass", "ratio"] = "mass",
        pool: Literal["max", "avg"] = "max",
        softmax: bool = True,
        embedding: int | None = None,
        blocks: Literal["auto"] | Sequence[str | tuple[str, str | None, str | None]] = "auto",
        loss_weight: float = 1.0,
        cooldown: float = 0.5,
        residual: Literal["before", "after"] = "before",
        execute: Execute = "mask",
        seed: int = 0,
    ) -> None:
        _check_targets(mass, mode, target)
        for name, given, accepted in (
            ("pool", pool, ("max", "avg")),
            ("residual", residual, ("before", "after")),
            ("execute", execute, ("mask", "gather")),
        ):
            if given not in accepted:
                raise unknown(name, given, accepted)
        if embedding is not None:
            check_range("embedding", embedding, low=1)
        check_range("loss_weight", loss_weight, low=0.0)
        check_range("cooldown", cooldown, low=0.0, high=1.0)
        if isinstance(blocks, str) and blocks != "auto":
            raise ValueError(f"blocks must be 'auto' or a list, got {blocks!r}")
        self.mass, self.mode, self.target = mass, mode, target
        self.pool, self.softmax, self.embedding = pool, softmax, embedding
        self.blocks, self.residual, self.execute = blocks, residual, execute
        self.loss_weight, self.cooldown, self.seed = loss_weight, cooldown, seed

    def wrap(self, model: nn.Module, example_inputs: Inputs) -> DynamicModel:
        """Returns the model with gates; the model given and the global random state stay as they were.

        Args:
            model: usually trained.
            example_inputs: what the model takes: a tensor, a sequence of arguments or a mapping of keywords.

        Raises:
            ValueError: there is no block to gate (the message lists what was seen), a name in ``blocks`` does not fit, or the
                model cannot be traced or is already wrapped.
        """
        if any(isinstance(module, DynamicConvBlock) for module in model.modules()):
            raise ValueError("model is already wrapped")
        plain = copy_model(model)
        inputs = to_device(example_inputs, device_of(model))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            triples = [] if isinstance(self.blocks, str) else [entry for entry in self.blocks if not isinstance(entry, str)]
            network, places, norms = self._replace(plain, triples) if triples else self._trace(plain)
            wrapped = DynamicModel(network, places, plain, norms, inputs, self.loss_weight, self.cooldown)
        wrapped.execute = self.execute
        return wrapped

    def derive(self, wrapped: WrappedModel, loader: Iterable[Any]) -> tuple[nn.Module, PruningPlan]:
        """Returns the plain, static network of the channels that some sample of ``loader`` chooses, and the plan that leads to it.

        It computes those channels for every sample, which the dynamic model does not: its outputs are others, and it saves only
        what no sample needs. What FTWT is about is the dynamic model itself.

        Even where all samples choose alike the two may differ, for the plan removes filters and the gate masks what comes behind
        them: a channel never chosen keeps what a batch norm without weight and bias makes of a zero, and with
        ``residual="after"`` what the skip connection brings.

        Args:
            wrapped: made by ``wrap``, trained.
            loader: batches whose first entry is the input.

        Raises:
            TypeError: ``wrapped`` is no ``DynamicModel``.
            MissingExtraError: torch-pruning is not installed.
        """
        if not isinstance(wrapped, DynamicModel):
            raise TypeError(f"wrapped must be a DynamicModel, got {type(wrapped).__name__}")
        plan = wrapped.static_plan(0.0, loader)
        return plan.apply(wrapped.plain(), mode="shrink"), plan

    def _block(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, act: nn.Module | None) -> DynamicConvBlock:
        return DynamicConvBlock(
            conv, bn, act, mass=self.mass, mode=self.mode, target=self.target, pool=self.pool, softmax=self.softmax,
            embedding=self.embedding,
        )  # fmt: skip

    def _trace(self, plain: nn.Module) -> tuple[nn.Module, dict[str, str], dict[str, str | None]]:
        graph = traced(plain)
        found, seen = find_blocks(graph, dict(plain.named_modules()), self.residual)
        if self.blocks != "auto":
            names = cast(Sequence[str], self.blocks)
            for name in names:
                if name not in found:
                    raise ValueError(f"blocks: {name!r} cannot be gated; {listed(found, seen)}")
            found = {name: match for name, match in found.items() if name in names}
        if not found:
            raise ValueError(f"the model has no block to gate; {listed(found, seen)}")
        for node in graph.nodes:
            if isinstance(node.type, str):  # a postponed annotation, which the generated code cannot resolve when it is unpickled
                node.type = None
        network = fx.GraphModule(plain, graph)
        ends = {match.nodes[-1]: name for name, match in found.items()}
        sources = {name: mask_source(match.x, ends, plain) for name, match in found.items()}
        blocks: dict[str, DynamicConvBlock] = {}
        places: dict[str, str] = {}
        for i, (name, match) in enumerate(found.items()):
            blocks[name] = self._block(match.conv, match.bn, match.act)
            places[name] = f"gated_{i}"
            network.add_submodule(places[name], blocks[name])
            if (source := sources[name]) is not None:
                blocks[name]._source = (blocks[source],)
            last = match.nodes[-1]
            with graph.inserting_after(last):
                node = graph.call_module(places[name], (now(match.x), *([] if match.skip is None else [now(match.skip)])))
            last.replace_all_uses_with(node)
            last.meta["became"] = node
            for old in reversed(match.nodes):
                graph.erase_node(old)
        network.delete_all_unused_submodules()
        network.recompile()
        return network, places, {name: match.bn_name for name, match in found.items()}

    def _replace(self, plain: nn.Module, triples: Sequence[Any]) -> tuple[nn.Module, dict[str, str], dict[str, str | None]]:
        if len(triples) != len(self.blocks):
            raise ValueError("blocks must be names of convolutions, or triples (convolution, norm, activation), not both")
        # The same layers in containers of their own: the plain model keeps its shape.
        leaves = [module for module in plain.modules() if not list(module.children())]
        shared = [*leaves, *plain.parameters(), *plain.buffers()]
        network = deepcopy(plain, {id(thing): thing for thing in shared})
        modules, norms = dict(plain.named_modules()), {}
        owners = owners_of(modules)
        for triple in triples:
            if not isinstance(triple, tuple | list) or len(triple) != 3:
                raise ValueError(f"blocks: a triple (convolution, norm or None, activation or None) is needed, got {triple!r}")
            for name, kind in zip(triple, (nn.Conv2d, nn.BatchNorm2d, nn.Module), strict=True):
                if name is None and kind is not nn.Conv2d:
                    continue
                if not isinstance(modules.get(name), kind):
                    what = type(modules[name]).__name__ if name in modules else "nothing"
                    raise ValueError(f"blocks: {name!r} must be a {kind.__name__} of the model, it is {what}")
            conv, bn, act = triple
            of: Callable[[str | None], Any] = lambda name: None if name is None else modules[name]  # noqa: E731
            if tied(owners, of(conv), of(bn)):
                raise ValueError(f"blocks: {conv!r} cannot be gated, it or its norm shares its weights with another layer")
            block = self._block(of(conv), of(bn), of(act))
            for name, new in ((bn, nn.Identity()), (act, nn.Identity()), (conv, block)):
                if name is not None:
                    parent, _, attribute = name.rpartition(".")
                    setattr(network.get_submodule(parent), attribute, new)
            norms[conv] = bn
        return network, {name: name for name in norms}, norms


def _check_targets(mass: float, mode: str, target: str) -> None:
    if target not in ("mass", "ratio"):
        raise unknown("target", target, ("mass", "ratio"))
    if mode not in ("decoupled", "joint"):
        raise unknown("mode", mode, ("decoupled", "joint"))
    check_range("mass", mass, low=0.0, high=1.0, open_low=target == "mass", open_high=target == "ratio")

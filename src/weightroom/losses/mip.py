r"""Maximum-intensity projections as a loss: a gap in a thin structure costs more in a projection than in the volume.

Reach for :class:`SPOCKMIPLoss` when vessels, airways or neurites are segmented in patches and come out in pieces; it adds to the
focal Tversky loss of the voxels that of their projections along one axis or all. :class:`MIPLoss` is the second term alone, over
any overlap loss.

Radhakrishna et al., "SPOCKMIP: Segmentation of Vessels in MRAs with Enhanced Continuity using Maximum Intensity Projection as
Loss", arXiv 2407.08655 (2024); the focal Tversky loss is that of Abraham and Khan, ISBI 2019, arXiv 1810.07842.

Known not to work, or to differ:

- A projection rewards whatever covers it. Early in training that buys recall with precision, so the Dice score may fall.
- The authors' code projects the label of the *whole volume* and cuts the patch's window out of that image. It then shows vessels
  above and below the patch, which the patch cannot contain and which push towards over-segmentation. Here the label patch is
  projected; ``mip_target=`` takes other projections.
- That code also projects predictions along other axes than labels, because it moves the depth axis in between; here both are
  projected along the same axis, as the paper says.
- Summed over three axes, the term weighs three times as much as along one: ``axis_reduction="mean"`` takes that back.
- With the voxel term over the whole batch at once (the paper's way), the loss of a sample depends on the others;
  ``per_sample=True`` separates them.
- The smoothing constant makes the loss of an almost empty patch depend on the patch's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FocalTverskyLoss", "MIPLoss", "SPOCKMIPLoss", "focal_tversky_loss", "maximum_intensity_projections"]

Reduction = Literal["mean", "sum", "none"]
Axes = str | tuple[int, ...]

_AXES: dict[str, int] = {"x": 0, "y": 1, "z": 2}
_SLACK = 1e-3  # by which a probability may be out of [0, 1]
_EPS = 1e-7  # below it the power is continued by a straight line, whose slope is finite


def maximum_intensity_projections(volume: Tensor, axes: Axes = "multi") -> tuple[Tensor, ...]:
    """Returns the projections of a volume, one for each axis.

    Args:
        volume: shape (B, C, \\*spatial).
        axes: "x", "y", "z" (the first, second and third spatial dimension of the tensor), "multi" (all of them), or a tuple of
            spatial dimensions, counted from 0.

    Returns:
        Tensors of shape (B, C, \\*spatial without the axis). A gradient is shared evenly among the voxels that attain the
        maximum.

    Raises:
        ValueError: an axis is unknown or outside the spatial dimensions.
    """
    _check_axes(axes)
    dims = _dims(axes, volume.ndim - 2)
    if volume.requires_grad and torch.is_grad_enabled():
        return _Project.apply(volume, dims)
    return tuple(volume.amax(dim) for dim in dims)


def focal_tversky_loss(
    pred: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.7,
    gamma: float = 0.75,
    smooth: float = 1.0,
    per_sample: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Functional form of :class:`FocalTverskyLoss`; ``pred`` holds probabilities."""
    return FocalTverskyLoss(alpha, gamma, smooth, per_sample=per_sample, reduction=reduction)(pred, target)


class FocalTverskyLoss(nn.Module):
    r"""One minus the Tversky index, raised to a power.

    .. math:: L = (1 - TI)^\gamma, \quad TI = \frac{TP + s}{TP + \alpha\, FN + (1 - \alpha)\, FP + s},

    with :math:`TP = \sum PY`, :math:`FN = \sum Y(1 - P)`, :math:`FP = \sum (1 - Y)P`, for each channel; the mean over channels is
    taken. Below :math:`1 - TI = 10^{-7}` the power goes on as a straight line, so that the gradient stays finite at P = Y (the
    published formula gives NaN there).

    Args:
        alpha: weight of the voxels missed, in [0, 1]; 1 - alpha is that of the voxels falsely found. More favours recall.
        gamma: exponent > 0 (the exponent itself, not its inverse).
        smooth: s >= 0, added above and below.
        sigmoid: take logits instead of probabilities.
        per_sample: average the losses of the samples. False takes the overlap over the whole batch at once when ``reduction`` is
            "mean", as the paper does; the other reductions are by sample in either case.
        reduction: "mean", "sum" (over samples) or "none".

    Shape:
        - pred: (B, C, \*), floating point, any number of further dimensions.
        - target: the shape of ``pred``, any real dtype, values in [0, 1]; soft labels are allowed.
        - output: scalar, or (B,) for "none"; float32 for inputs of 16 bits.

    Raises:
        ValueError: an argument is out of its range, the shapes differ, or ``target`` or the probabilities are outside [0, 1]
            (this last is looked at on the CPU only, where it costs no synchronisation).
        TypeError: ``pred`` is not floating point.
    """

    def __init__(
        self,
        alpha: float = 0.7,
        gamma: float = 0.75,
        smooth: float = 1.0,
        sigmoid: bool = False,
        per_sample: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be > 0 and finite, got {gamma}")
        if not 0 <= smooth < math.inf:
            raise ValueError(f"smooth must be >= 0 and finite, got {smooth}")
        self.alpha, self.gamma, self.smooth = alpha, gamma, smooth
        self.sigmoid, self.per_sample, self.reduction = sigmoid, per_sample, _check_reduction(reduction)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, see the class."""
        _check_pair(pred, target)
        if not self.sigmoid:
            _check_probabilities(pred)
        _check_range("target", target)
        return self._value(pred, target)

    def _value(self, pred: Tensor, target: Tensor) -> Tensor:
        sums = self._sums(pred, target, pooled=self.reduction == "mean" and not self.per_sample)
        return _reduce(self._focal(sums).mean(1), self.reduction)

    def _sums(self, pred: Tensor, target: Tensor, pooled: bool = False) -> Tensor:
        """Sums of P Y, P and Y for each sample and channel, shape (3, B, C), or over the whole batch, (3, 1, C)."""
        P = _widen(pred).sigmoid() if self.sigmoid else _widen(pred)
        sums = _Overlap.apply(P.reshape(*P.shape[:2], -1), target.to(P.dtype).reshape(*P.shape[:2], -1))
        return sums.sum(1, keepdim=True) if pooled else sums

    def _focal(self, sums: Tensor) -> Tensor:
        """(1 - TI)^gamma for sums of P Y, P and Y in the first dimension."""
        TP, predicted, labelled = sums.unbind(0)
        missed = self.alpha * (labelled - TP) + (1 - self.alpha) * (predicted - TP)  # alpha FN + (1 - alpha) FP
        rest = missed / (TP + missed + self.smooth).clamp_min(_EPS)  # 1 - TI
        return rest.clamp_min(_EPS).pow(self.gamma) * (rest / _EPS).clamp(0, 1)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"alpha={self.alpha}, gamma={self.gamma}, smooth={self.smooth}, sigmoid={self.sigmoid}, "
            f"per_sample={self.per_sample}, reduction={self.reduction!r}"
        )


class MIPLoss(nn.Module):
    r"""An overlap loss between the maximum-intensity projections of prediction and label.

    .. math:: L = \frac1B \sum_b \sum_{a \in \text{axes}} \mathrm{base}\big(\max_a P_b,\ \max_a Y_b\big)

    The sum over axes is the paper's: three axes weigh three times as much as one.

    Args:
        base: loss of a projection, :class:`FocalTverskyLoss` with its defaults when None. A ``FocalTverskyLoss`` is applied
            sample by sample whatever its own ``per_sample`` and ``reduction``. Any other module is called as
            ``base(pred, target)`` with projections of shape (B, C, \*) and must return one value, or values whose first
            dimension is B (of which the mean over the others is taken).
        axes: "x", "y", "z" (the first, second and third spatial dimension of the tensor), "multi" (all of them), or a tuple of
            spatial dimensions, counted from 0.
        reduction: over samples: "mean", "sum" or "none".
        axis_reduction: over axes: "sum" or "mean".

    Shape:
        - pred: (B, C, \*spatial), probabilities (logits when ``base`` takes logits: the maximum does not mind).
        - target: the shape of ``pred``, values in [0, 1].
        - mip_target: projections to compare with in place of the target's own, one tensor for each axis in the order of ``axes``
          (a tensor alone for one axis), each of shape (B, C, \*spatial without the axis).
        - output: scalar, or (B,) for "none".

    Raises:
        ValueError: an argument is unknown, shapes differ, an axis is outside the spatial dimensions, target values are outside
            [0, 1] (looked at on the CPU only), or ``base`` returns a value that cannot be reduced as asked.
        TypeError: ``pred`` is not floating point.
    """

    def __init__(
        self,
        base: nn.Module | None = None,
        axes: Axes = "z",
        reduction: Reduction = "mean",
        axis_reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        if axis_reduction not in ("sum", "mean"):
            raise ValueError(f"axis_reduction must be 'sum' or 'mean', got {axis_reduction!r}")
        self.base = FocalTverskyLoss() if base is None else base
        self.axes, self.reduction, self.axis_reduction = _check_axes(axes), _check_reduction(reduction), axis_reduction

    def forward(self, pred: Tensor, target: Tensor, mip_target: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Returns the loss, see the class."""
        _check_pair(pred, target)
        if isinstance(self.base, FocalTverskyLoss) and not self.base.sigmoid:
            _check_probabilities(pred)
        if mip_target is None:
            _check_range("target", target)
        return self._value(pred, self._targets(target, mip_target))

    def _targets(self, target: Tensor, given: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        dims = _dims(self.axes, target.ndim - 2)
        if given is None:
            return maximum_intensity_projections(target, self.axes)
        tensors = (given,) if isinstance(given, Tensor) else tuple(given)
        if len(tensors) != len(dims):
            raise ValueError(
                f"mip_target must have one tensor for each of the {len(dims)} axes of {self.axes!r}, got {len(tensors)}"
            )
        for dim, tensor in zip(dims, tensors, strict=True):
            shape = target.shape[:dim] + target.shape[dim + 1 :]
            if tensor.shape != shape:
                raise ValueError(f"mip_target of axis {dim - 2} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
            _check_range("mip_target", tensor)
        return tensors

    def _value(self, pred: Tensor, targets: Sequence[Tensor]) -> Tensor:
        pairs = list(zip(maximum_intensity_projections(pred, self.axes), targets, strict=True))
        if isinstance(self.base, FocalTverskyLoss):
            values = self.base._focal(torch.stack([self.base._sums(p, y) for p, y in pairs], dim=-1)).mean(1)
        else:
            values = torch.stack([self._call_base(p, y) for p, y in pairs], dim=-1)
        return _reduce(values.sum(-1) if self.axis_reduction == "sum" else values.mean(-1), self.reduction)

    def _call_base(self, pred: Tensor, target: Tensor) -> Tensor:
        pred = _widen(pred)
        value = self.base(pred, target.to(pred.dtype))
        if value.ndim and value.shape[0] == len(pred):
            return value.flatten(1).mean(1) if value.ndim > 1 else value
        if value.numel() == 1 and self.reduction == "mean":
            return value.reshape(1)
        raise ValueError(
            f"base returned a value of shape {tuple(value.shape)} for {len(pred)} samples, "
            f"which cannot give reduction={self.reduction!r}: make it with reduction='none'"
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"axes={self.axes!r}, reduction={self.reduction!r}, axis_reduction={self.axis_reduction!r}"


class SPOCKMIPLoss(nn.Module):
    r"""Focal Tversky loss of the voxels plus that of their projections, with deep supervision.

    .. math:: L = \sum_k s_k \Big( w_{vox}\, \mathrm{FTL}(P_k, Y) + w_{mip}\, \mathrm{MIP}(P_k, Y) \Big)

    Args:
        voxel_weight: weight of the voxel term, >= 0.
        mip_weight: weight of the projection term, >= 0.
        axes: what to project along, see :class:`MIPLoss`.
        scales: :math:`s_k`, the weights >= 0 of the outputs of a network with deep supervision, the finest first; a tensor alone
            has the first.
        activation: "sigmoid" for logits, "none" for probabilities.
        alpha: weight of the voxels missed in both terms, see :class:`FocalTverskyLoss`.
        gamma: exponent in both terms.
        smooth: smoothing in both terms.
        per_sample: see :class:`FocalTverskyLoss`; concerns the voxel term, the projection term is always by sample.
        axis_reduction: "sum" (the paper's) or "mean" over axes.
        reduction: over samples: "mean", "sum" or "none".

    Shape:
        - pred: (B, C, \*spatial), or a sequence of up to ``len(scales)`` such tensors; coarser ones are brought to the target's
          size by nearest-neighbour interpolation.
        - target: (B, C, \*spatial), values in [0, 1].
        - mip_target: see :class:`MIPLoss`.
        - output: scalar, or (B,) for "none".

    Raises:
        ValueError: an argument is out of its range, shapes do not fit, there are more outputs than scales, or target values are
            outside [0, 1] (looked at on the CPU only).
        TypeError: ``pred`` is not a floating-point tensor or a sequence of them.
    """

    def __init__(
        self,
        voxel_weight: float = 0.7,
        mip_weight: float = 0.3,
        axes: Axes = "multi",
        scales: Sequence[float] = (1.0, 0.66, 0.34),
        activation: Literal["sigmoid", "none"] = "sigmoid",
        *,
        alpha: float = 0.7,
        gamma: float = 0.75,
        smooth: float = 1.0,
        per_sample: bool = False,
        axis_reduction: Literal["sum", "mean"] = "sum",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        for name, weight in (
            ("voxel_weight", voxel_weight),
            ("mip_weight", mip_weight),
            *((f"scales[{i}]", s) for i, s in enumerate(scales)),
        ):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
        if not scales:
            raise ValueError("scales must have at least one weight, got none")
        if activation not in ("sigmoid", "none"):
            raise ValueError(f"activation must be 'sigmoid' or 'none', got {activation!r}")
        self.voxel_weight, self.mip_weight, self.scales, self.activation = voxel_weight, mip_weight, tuple(scales), activation
        self.voxel = FocalTverskyLoss(alpha, gamma, smooth, per_sample=per_sample, reduction=reduction)
        self.mip = MIPLoss(FocalTverskyLoss(alpha, gamma, smooth), axes, reduction, axis_reduction)

    @property
    def reduction(self) -> Reduction:
        """The reduction over samples."""
        return self.mip.reduction

    def forward(
        self, pred: Tensor | Sequence[Tensor], target: Tensor, mip_target: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor:
        """Returns the loss, see the class."""
        probabilities = self._probabilities(pred, target)
        if self.activation == "none":
            for P in probabilities:
                _check_probabilities(P)
        _check_range("target", target)
        projected = self.mip._targets(target, mip_target) if self.mip_weight else ()
        total = torch.zeros((), device=target.device)
        for scale, P in zip(self.scales, probabilities, strict=False):
            if self.voxel_weight:
                total = total + scale * self.voxel_weight * self.voxel._value(P, target)
            if self.mip_weight:
                total = total + scale * self.mip_weight * self.mip._value(P, projected)
        return total

    def _probabilities(self, pred: Tensor | Sequence[Tensor], target: Tensor) -> list[Tensor]:
        outputs = [pred] if isinstance(pred, Tensor) else pred
        if not isinstance(outputs, list | tuple) or not all(isinstance(o, Tensor) and o.is_floating_point() for o in outputs):
            given = pred.dtype if isinstance(pred, Tensor) else type(pred).__name__
            raise TypeError(f"pred must be a tensor of floating point, or a list or tuple of such tensors, got {given}")
        if not 1 <= len(outputs) <= len(self.scales):
            raise ValueError(f"pred must have 1 to {len(self.scales)} outputs, one for each of scales, got {len(outputs)}")
        probabilities = []
        for output in outputs:
            # A point-wise function and nearest-neighbour interpolation commute; the coarse grid has fewer points.
            P = _widen(output).sigmoid() if self.activation == "sigmoid" else output
            if output is not outputs[0] and output.ndim == target.ndim > 2 and output.shape != target.shape:
                P = F.interpolate(P, size=target.shape[2:], mode="nearest")
            _check_pair(P, target)
            probabilities.append(P)
        return probabilities

    def extra_repr(self) -> str:
        """The arguments that are not those of the terms."""
        weights = f"voxel_weight={self.voxel_weight}, mip_weight={self.mip_weight}, scales={self.scales}"
        return f"{weights}, activation={self.activation!r}"


class _Overlap(torch.autograd.Function):
    """Sums of P Y, P and Y over the last dimension; backward is a single pass: dL/dP = Y dL/dTP + dL/d(sum P)."""

    @staticmethod
    def forward(P: Tensor, Y: Tensor) -> Tensor:
        return torch.stack(((P * Y).sum(-1), P.sum(-1), Y.sum(-1)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        P, Y = ctx.saved_tensors
        both, first, second = grad.unsqueeze(-1).unbind(0)
        return (
            (Y * both).add_(first) if ctx.needs_input_grad[0] else None,
            (P * both).add_(second) if ctx.needs_input_grad[1] else None,
        )


class _Project(torch.autograd.Function):
    """``amax`` along each of several dimensions, with one gradient for all; ties share evenly, as in ``torch.amax``.

    Torch's own backward makes masks of booleans and integers for each axis; masks of floats are several times faster on the CPU.
    """

    @staticmethod
    def forward(volume: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(volume.amax(dim) for dim in dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, ...]], output: tuple[Tensor, ...]) -> None:
        ctx.dims = inputs[1]
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        volume, *maxima = (t.detach() for t in ctx.saved_tensors)
        mask = total = None
        for dim, top, grad in zip(ctx.dims, maxima, grads, strict=True):
            if mask is None or torch.is_grad_enabled():  # a second derivative will ask for each mask
                mask = torch.empty_like(volume)
            torch.eq(volume, top.unsqueeze(dim), out=mask)
            share = (grad / mask.sum(dim)).unsqueeze(dim)
            total = mask * share if total is None else total.addcmul_(mask, share)
        return total, None


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def _dims(axes: Axes, spatial_dims: int) -> tuple[int, ...]:
    chosen = tuple(range(spatial_dims)) if axes == "multi" else (_AXES[axes],) if isinstance(axes, str) else axes
    if not chosen or max(chosen) >= spatial_dims:
        raise ValueError(f"axes {axes!r} are outside the {max(spatial_dims, 0)} spatial dimensions of the input")
    return tuple(axis + 2 for axis in chosen)


def _check_axes(axes: Axes) -> Axes:
    if isinstance(axes, str):
        if axes not in (*_AXES, "multi"):
            raise ValueError(f"axes must be 'x', 'y', 'z', 'multi' or a tuple of spatial dimensions, got {axes!r}")
        return axes
    chosen = tuple(axes)
    if not chosen or len(set(chosen)) != len(chosen) or not all(isinstance(a, int) and a >= 0 for a in chosen):
        raise ValueError(f"axes must be different spatial dimensions >= 0, at least one, got {axes!r}")
    return chosen


def _check_reduction(reduction: Reduction) -> Reduction:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def _check_pair(pred: Tensor, target: Tensor) -> None:
    if not pred.is_floating_point():
        raise TypeError(f"pred must be floating point, got {pred.dtype}")
    if pred.shape != target.shape:
        raise ValueError(f"pred and target must have the same shape, got {tuple(pred.shape)} and {tuple(target.shape)}")
    if pred.ndim < 2 or pred.numel() == 0:
        raise ValueError(f"pred must have shape (B, C, *) without a dimension of size 0, got {tuple(pred.shape)}")


def _check_probabilities(pred: Tensor) -> None:
    """Logits taken for probabilities would give a loss of 0 without a gradient."""
    if pred.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = torch.aminmax(pred.detach())
        if low < -_SLACK or high > 1 + _SLACK:
            raise ValueError(
                f"pred must hold probabilities in [0, 1], got values from {low.item():g} to {high.item():g}: "
                "take the sigmoid of logits, or say sigmoid=True"
            )


def _check_range(name: str, target: Tensor) -> None:
    if target.dtype == torch.bool or target.device.type != "cpu" or target.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(target.detach())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must have values in [0, 1], got values from {low.item():g} to {high.item():g}")

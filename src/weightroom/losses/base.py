"""What the classification losses share: the calling convention of ``nn.CrossEntropyLoss``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from weightroom.errors import UsageError, unknown

__all__ = [
    "ClassificationLoss", "Reduction", "check_index", "classify", "differences",
    "eager", "prepare", "reduce", "seen",
]  # fmt: skip

Reduction = Literal["none", "mean", "sum"]
PerSample = Callable[[Tensor, Tensor], Tensor]


class ClassificationLoss(nn.Module):
    """Base of losses of logits and class indices, called like ``nn.CrossEntropyLoss``.

    A subclass sets its own hyper-parameters, names them in ``shown`` and defines ``per_sample``.

    Args:
        reduction: "none", "mean" (weighted, over what is not ignored) or "sum".
        weight: a weight for each class, shape (K,); a buffer.
        ignore_index: target value that contributes neither loss nor gradient.

    Shapes:
        input: (N, K), (N, K, d1, ...) or (K,), logits; half precision is computed, and returned, in float32.
        target: (N,), (N, d1, ...) or (), int64 in [0, K) or ``ignore_index``.
        output: scalar, or the target's shape for reduction "none".

    Raises:
        TypeError: ``input`` is not floating or ``target`` not int64.
        ValueError: shapes do not fit, K < 2, a target is out of range (checked on the CPU), or an unknown reduction.
    """

    #: Hyper-parameters that ``repr`` shows.
    shown: ClassVar[tuple[str, ...]] = ()
    weight: Tensor | None

    def __init__(self, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        _check_reduction(reduction)
        if weight is not None and (not isinstance(weight, Tensor) or weight.ndim != 1):
            raise UsageError(f"weight must be a tensor of shape (K,), got {seen(weight)}")
        self.register_buffer("weight", weight)
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss."""
        return classify(
            self.per_sample, input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )  # fmt: skip

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each sample, shape (N, ...), of logits (N, K, ...) and labels (N, 1, ...), all in range."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        values = [f"{name}={getattr(self, name)!r}" for name in (*self.shown, "reduction")]
        if self.weight is not None:
            values.append(f"weight=({len(self.weight)} classes)")
        if self.ignore_index != -100:
            values.append(f"ignore_index={self.ignore_index}")
        return ", ".join(values)


def classify(
    per_sample: PerSample, input: Tensor, target: Tensor, *, weight: Tensor | None, ignore_index: int, reduction: Reduction
) -> Tensor:
    """Checks the arguments, applies ``per_sample(logits, labels)`` and reduces as ``F.cross_entropy`` does."""
    logits, labels, valid = prepare(input, target, weight, ignore_index)
    return reduce(per_sample(logits, labels), labels, valid, weight, reduction)


def prepare(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the losses compute with.

    Returns:
        Logits (N, K, ...) in float32 or more; labels (N, 1, ...), 0 for what is ignored; a mask of the rest, shaped like target.

    Raises:
        TypeError: ``input`` is not floating or ``target`` not int64.
        ValueError: shapes do not fit, fewer than 2 classes, or a target is out of range.
    """
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(f"input must be a floating tensor of logits, got {seen(input)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target must hold class indices (int64), got {seen(target)}")
    if input.ndim == 0:
        raise UsageError("input must have shape (N, K, ...) or (K,), got a scalar")
    if target.shape != (input.shape[:1] + input.shape[2:] if input.ndim > 1 else ()):
        raise UsageError(
            f"target must have the shape of input without the classes, (N, ...) for (N, K, ...), "
            f"got {tuple(target.shape)} for an input of {tuple(input.shape)}"
        )
    valid = target != ignore_index
    labels = target.masked_fill(~valid, 0)
    if input.ndim == 1:
        input, labels = input.unsqueeze(0), labels.unsqueeze(0)
    n_classes = input.shape[1]
    if n_classes < 2:
        raise UsageError(f"input must have at least 2 classes in dimension 1, got {n_classes}")
    if weight is not None and weight.shape != (n_classes,):
        raise UsageError(f"weight must have shape ({n_classes},), one per class of input, got {tuple(weight.shape)}")
    check_index("target", labels, n_classes)
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input, labels.unsqueeze(1), valid


def reduce(loss: Tensor, labels: Tensor, valid: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduces losses (N, ...) as ``F.cross_entropy`` does (the mean of nothing is NaN); "none" gives the shape of ``valid``."""
    _check_reduction(reduction)
    loss = loss.reshape(valid.shape).masked_fill(~valid, 0.0)
    if weight is not None:
        weights = weight.to(loss.dtype)[labels].reshape(valid.shape) * valid
        loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (valid if weight is None else weights).sum()


def differences(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    r"""Returns :math:`q_k = c\,[k \neq y] + f_k - f_y`, so that :math:`q_y = 0`; shapes as in ``per_sample``."""
    return (logits - logits.gather(1, labels) + margin).scatter(1, labels, 0.0)


def eager() -> bool:
    """Whether tensors have values that Python can see: neither compiled nor under a transform of ``torch.func``."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def check_index(name: str, index: Tensor, high: int) -> None:
    """Checks that int64 values lie in [0, high). On the CPU alone: elsewhere it would stall the device, which checks itself.

    Raises:
        ValueError: the least or the greatest does not.
    """
    if index.device.type == "cpu" and index.numel() and eager():
        least, most = (int(x) for x in torch.aminmax(index))
        if least < 0 or most >= high:
            raise UsageError(f"{name} must lie in [0, {high}), got values from {least} to {most}")


def seen(value: object) -> str:
    """Says what was given, for an error."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise unknown("reduction", str(reduction), get_args(Reduction))

"""What the objectives of a teacher and a student share.

An objective is called as ``objective(model, x, y) -> scalar``: it asks the teacher, which never learns, about the same batch. A loss
compares the student's logits with the teacher's and knows neither model.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.errors import UsageError, check_range, unknown
from weightroom.metrics import evaluating

__all__ = ["DistillationLoss", "KDObjective", "Reduction", "TeacherObjective", "check_logits", "check_pair", "seen"]

Reduction = Literal["batchmean", "sum", "none"]


class DistillationLoss(nn.Module):
    """Base of losses that compare a student's logits with a teacher's; a subclass defines ``per_sample``.

    Args:
        T: temperature > 0 that divides the logits; the loss is multiplied by its square.
        reduction: "batchmean" (mean over samples of the sum over classes), "sum", or "none" for one value per sample.

    Shapes:
        student, teacher: (N, K), logits; no gradient reaches the teacher's. Half precision is computed, and returned, in float32.
        output: scalar, or (N,) for reduction "none".

    Raises:
        TypeError: ``T`` is no number, or logits are no floating tensor.
        ValueError: ``T`` is not > 0, the reduction unknown, or the shapes differ (the message names both numbers of classes).
    """

    #: Whether it is called as ``loss(student, teacher, target)``.
    needs_target: ClassVar[bool] = False
    #: Hyper-parameters that ``repr`` shows.
    shown: ClassVar[tuple[str, ...]] = ("T",)

    def __init__(self, T: float, reduction: Reduction = "batchmean") -> None:
        super().__init__()
        check_range("T", T, low=0.0, high=float("inf"), open_low=True, open_high=True)
        if reduction not in get_args(Reduction):
            raise unknown("reduction", str(reduction), get_args(Reduction))
        self.T = float(T)
        self.reduction: Reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss."""
        return self.reduce(self.per_sample(*check_pair(student, teacher)))

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the loss of each sample, (N,), without the factor T^2; logits (N, K) in float32 or more."""
        raise NotImplementedError

    def reduce(self, divergence: Tensor) -> Tensor:
        """Multiplies the samples' losses (N,) by T^2 and reduces them."""
        loss = self.T**2 * divergence
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.mean()

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self.shown, "reduction"))


class TeacherObjective(nn.Module):
    """Base of training objectives that need a teacher: ``objective(model, x, y) -> scalar``. A subclass defines ``terms``.

    The teacher is asked in eval mode and without gradients; afterwards every module of it is in the mode it was in. Its parameters
    keep their ``requires_grad``. It must be on the device of the inputs (``objective.to(device)`` moves it).

    Args:
        teacher: maps inputs to logits (N, K).

    Raises:
        TypeError: ``teacher`` is no module.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be an nn.Module, got {type(teacher).__name__}")
        self.teacher = teacher

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch: inputs ``x`` of N samples, and ``y`` as ``F.cross_entropy`` takes it."""
        labels, teacher = self.terms(model, x, y)
        return labels + teacher

    def terms(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weighted loss on the labels and the weighted loss on the teacher's logits, two scalars."""
        raise NotImplementedError

    def ask(self, x: Tensor) -> Tensor:
        """Returns the teacher's logits."""
        with torch.no_grad(), evaluating(self.teacher):
            return self.teacher(x)


class KDObjective(TeacherObjective):
    """Distillation on the head that classifies: ``ce`` * cross entropy + ``kd`` * loss(student's logits, teacher's logits).

    Args:
        teacher: maps inputs to logits (N, K); see :class:`TeacherObjective`.
        loss: a loss of this room, or any function of the two logits; one with ``needs_target = True`` gets the labels too.
        ce: weight >= 0 of the cross entropy; at 0 the labels are not looked at.
        kd: weight >= 0 of ``loss``; at 0 the teacher is not asked.

    ``KDObjective(teacher, SoftmaxKDLoss(4.0), ce=0.1, kd=0.9)`` is what Hinton, Vinyals, Dean (2014, arXiv 1503.02531) propose.

    Raises:
        TypeError: ``teacher`` is no module, ``loss`` not callable, a weight no number, or the model's outputs are no logits.
        ValueError: a weight is negative, or the student's and the teacher's logits differ in shape.
    """

    def __init__(self, teacher: nn.Module, loss: nn.Module, *, ce: float = 1.0, kd: float = 1.0) -> None:
        super().__init__(teacher)
        if not callable(loss):
            raise TypeError(f"loss must be callable as loss(student, teacher), got {type(loss).__name__}")
        for name, weight in (("ce", ce), ("kd", kd)):
            check_range(name, weight, low=0.0, high=float("inf"), open_high=True)
        self.loss = loss
        self.ce, self.kd = float(ce), float(kd)

    def terms(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``ce`` * cross entropy and ``kd`` * loss."""
        student = check_logits("the model's output", model(x))
        nothing = student.new_zeros(())
        labels = self.ce * F.cross_entropy(student, y) if self.ce else nothing
        if not self.kd:
            return labels, nothing
        target = (y,) if getattr(self.loss, "needs_target", False) else ()
        return labels, self.kd * self.loss(student, self.ask(x), *target)

    def extra_repr(self) -> str:
        """The weights."""
        return f"ce={self.ce}, kd={self.kd}"


def check_logits(name: str, value: Tensor) -> Tensor:
    """Returns logits (N, K) in float32 or more.

    Raises:
        TypeError: ``value`` is no floating tensor.
        ValueError: it has not two dimensions.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor of logits, got {seen(value)}")
    if value.ndim != 2:
        raise UsageError(f"{name} must have shape (N, K), got {tuple(value.shape)}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def check_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both logits in one dtype, float32 or more; the teacher's without a gradient.

    Raises:
        TypeError: one of them is no floating tensor.
        ValueError: they are not (N, K), or differ in shape.
    """
    student, teacher = check_logits("student", student), check_logits("teacher", teacher)
    (n, k), (n_teacher, k_teacher) = student.shape, teacher.shape
    if k != k_teacher:
        raise UsageError(f"student and teacher must have the same classes: the student has K = {k}, the teacher K = {k_teacher}")
    if n != n_teacher:
        raise UsageError(f"student and teacher must have the same samples: the student has N = {n}, the teacher N = {n_teacher}")
    return student, teacher.detach().to(student.dtype)


def seen(value: object) -> str:
    """Says what was given, for an error."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__

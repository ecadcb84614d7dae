r"""Dual-head knowledge distillation: the logit-level loss gets a head of its own.

A loss that compares logits class by class transfers their level, which softmax distillation loses, but beside cross entropy on one
linear classifier it makes the student worse. Here a second head, for training only, takes the logit-level loss: the backbone gets
both gradients, the head that classifies gets that of cross entropy alone.

Reach for it to compress a classifier whose teacher's logits say more than its softmax does.

Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", KDD 2025,
arXiv 2411.08937.

Known not to work, or to differ:

- Two heads repair what a heavy logit-level loss does to the only one; compare with a lower weight on one head, and with plain
  distillation whose weight is tuned as well, before paying for a second.
- Gradient alignment over all parameters, as the authors' code does it, is incomplete: :math:`|g_1|` counts the head too, so part of
  the conflict stays in the backbone, and the head's own gradient grows by the factor :math:`1 - g_1 \cdot g_2 / |g_1|^2`.
  ``scope="shared"`` projects where both gradients are, and nowhere else.
- The auxiliary head is as wide as there are classes; "nonlinear" has dropout and batch norm and cannot train on a batch of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.distill.base import TeacherObjective, check_logits, seen
from weightroom.distill.losses import BinaryKLNormLoss
from weightroom.errors import UsageError, check_range, unknown

__all__ = ["DHKDObjective", "DualHead", "DualOutput"]

Aux = Literal["linear", "nonlinear"]
Scope = Literal["all", "shared"]
Gradients = Sequence[Tensor | None]

_DROPOUT = 0.1


class DualOutput(NamedTuple):
    """What a :class:`DualHead` returns in training mode.

    Args:
        logits: of the student's own head.
        aux_logits: of the auxiliary head, (N, K).
    """

    logits: Tensor
    aux_logits: Tensor


class DualHead(nn.Module):
    """A student with a second head on the same features, for training only.

    In training mode it returns ``DualOutput(logits, aux_logits)``, in eval mode the student's logits alone. The student is not
    copied and not changed in form: training this module trains it.

    Args:
        student: any module that runs its head once in a forward pass.
        head: path of its classifier, as ``named_modules`` spells it: a linear layer, or a 1x1 convolution, whose input features
            are then averaged over positions. None is the linear layer registered last.
        aux: "linear"; "nonlinear" (linear, dropout 0.1, batch norm, ReLU, linear), the authors' choice for a teacher of another
            architecture; or a module that maps features (N, d) to logits (N, K).
        hidden: width of the nonlinear head.

    The new head has the device, dtype and mode of the student's; its weights are drawn from torch's global random state.

    Raises:
        TypeError: ``student`` is no module.
        ValueError: there is no such head (the message lists the linear layers there are), it is of another kind, ``aux`` is
            unknown, ``hidden`` < 1; in a forward pass: the head did not run exactly once.
    """

    def __init__(self, student: nn.Module, head: str | None = "fc", aux: Aux | nn.Module = "linear", hidden: int = 200) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        check_range("hidden", hidden, low=1, high=math.inf, open_high=True)
        self.student = student
        self.head = _find(student, head)
        layer = cast(nn.Linear, student.get_submodule(self.head))
        n_classes, n_features = layer.weight.shape[:2]
        self.aux = aux if isinstance(aux, nn.Module) else _make(aux, n_features, n_classes, int(hidden)).to(layer.weight)
        self.aux.train(layer.training)
        self.training = student.training

    def forward(self, *args: Any, **kwargs: Any) -> DualOutput | Tensor:
        """Takes what the student takes; returns both heads' logits in training mode, else the student's."""
        if not self.training:
            return self.student(*args, **kwargs)
        caught: list[Tensor] = []
        head = self.student.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            logits = self.student(*args, **kwargs)
        finally:
            hook.remove()
        if len(caught) != 1:
            raise UsageError(f"head {self.head!r} must run once in a forward pass, it ran {len(caught)} times")
        features = caught[0] if isinstance(head, nn.Linear) else caught[0].flatten(2).mean(2)
        return DualOutput(logits, self.aux(features))

    def export(self) -> nn.Module:
        """Returns the student, without the second head."""
        return self.student

    def extra_repr(self) -> str:
        """The path of the student's head."""
        return f"head={self.head!r}"


class DHKDObjective(TeacherObjective):
    r"""Cross entropy on the student's head, a logit-level loss on the auxiliary one.

    .. math:: \gamma\, \mathrm{CE}(a, y) + \alpha\, \mathrm{BinaryKLNorm}_T(c, t)

    with a, c the logits of a :class:`DualHead` in training mode and t the teacher's::

        student = DualHead(student, head="fc")
        objective = DHKDObjective(teacher)
        train.fit(student, data, step=lambda model, batch: objective(model, *batch), ...)
        student = student.export()

    With ``align`` the gradient :math:`g_2` of the second term gives up what opposes the gradient :math:`g_1` of the first: if
    :math:`g_1 \cdot g_2 < 0`, it becomes :math:`g_2 - (g_1 \cdot g_2) / |g_1|^2\, g_1`. Differentiating the scalar returned aligns
    them: its ``backward()`` makes two backward passes and adds :math:`g_1 + g_2` to ``.grad`` of the model's parameters, so that
    any training loop can use it. There is no gradient with respect to anything else, and no second derivative.

    Args:
        teacher: maps inputs to logits (N, K); run in eval mode without gradients, see ``TeacherObjective``.
        alpha: weight >= 0 of the logit-level loss; 1 for CIFAR-100, 0.1 for ImageNet in the authors' code.
        gamma: weight >= 0 of the cross entropy.
        T: temperature > 0.
        align: align the two gradients.
        scope: "all" takes :math:`g_1 \cdot g_2` and :math:`|g_1|` over all parameters, a missing gradient being zero, as the
            authors' code does; "shared" takes both over the parameters that have both gradients, and changes only those.
        early_stop_epoch: from this epoch on, counted from 0 as :meth:`set_epoch` is, only the cross entropy is left.
        loss: of the auxiliary logits and the teacher's; ``BinaryKLNormLoss(T)`` when None.

    Raises:
        TypeError: ``teacher`` is no module, or a weight no number.
        ValueError: a weight is negative, T <= 0, ``scope`` unknown, ``early_stop_epoch`` < 0; when called: the model returns no
            auxiliary logits, or student and teacher differ in classes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        alpha: float = 1.0,
        gamma: float = 1.0,
        T: float = 2.0,
        align: bool = False,
        scope: Scope = "all",
        *,
        early_stop_epoch: int | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(teacher)
        for name, weight in (("alpha", alpha), ("gamma", gamma)):
            check_range(name, weight, low=0.0, high=math.inf, open_high=True)
        if scope not in get_args(Scope):
            raise unknown("scope", str(scope), get_args(Scope))
        if early_stop_epoch is not None:
            check_range("early_stop_epoch", early_stop_epoch, low=0)
        self.alpha, self.gamma = float(alpha), float(gamma)
        self.loss = BinaryKLNormLoss(T) if loss is None else loss
        self.align = align
        self.scope: Scope = scope
        self.early_stop_epoch = early_stop_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, from 0; it matters with ``early_stop_epoch`` alone."""
        self.epoch = epoch

    def terms(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gamma * CE(a, y) and alpha * loss(c, t); the second is zero, and costs nothing, once it is stopped."""
        output = model(x)
        if not isinstance(output, DualOutput):
            raise UsageError(
                f"the model must return a DualOutput, got {seen(output)}: wrap the student in DualHead, and put it in training mode"
            )
        logits = check_logits("the student's logits", output.logits)
        labels = self.gamma * F.cross_entropy(logits, y)
        if self.alpha == 0 or (self.early_stop_epoch is not None and self.epoch >= self.early_stop_epoch):
            return labels, logits.new_zeros(())
        return labels, self.alpha * self.loss(output.aux_logits, self.ask(x))

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch: inputs ``x`` of N samples, and ``y`` as ``F.cross_entropy`` takes it."""
        labels, teacher = self.terms(model, x, y)
        total = labels + teacher
        if not (self.align and torch.is_grad_enabled() and labels.requires_grad and teacher.requires_grad):
            return total
        params = [p for p in model.parameters() if p.requires_grad]
        return cast(Tensor, _Aligned.apply((labels, teacher, params, self.scope), total.detach(), *params))

    def backward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Adds the gradients of a batch, aligned with ``align``, to ``.grad`` of the model's parameters; returns the loss, detached.

        The caller's optimizer then steps: ``optimizer.zero_grad(); objective.backward(model, x, y); optimizer.step()``.
        """
        loss = self(model, x, y)
        loss.backward()
        return loss.detach()

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"alpha={self.alpha}, gamma={self.gamma}, align={self.align}, scope={self.scope!r}"


def _aligned(g1: Gradients, g2: Gradients, scope: Scope) -> list[Tensor | None]:
    """Returns g1 + g2, less what of g2 opposes g1."""
    both = [(a, b) for a, b in zip(g1, g2, strict=True) if a is not None and b is not None]
    first = [a for a, _ in both] if scope == "shared" else [a for a in g1 if a is not None]
    if not both:
        return [b if a is None else a for a, b in zip(g1, g2, strict=True)]
    dot = cast(Tensor, sum((a * b).sum() for a, b in both))
    square = cast(Tensor, sum(a.square().sum() for a in first))
    more = 1 - dot.clamp_max(0) / square.clamp_min(torch.finfo(square.dtype).tiny)  # g1 + g2 - (g1.g2 / |g1|^2) g1

    def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None:
            return b
        if b is None:
            return more * a if scope == "all" else a
        return torch.addcmul(b, a, more)

    return [total(a, b) for a, b in zip(g1, g2, strict=True)]


class _Aligned(torch.autograd.Function):
    """The sum of two losses whose gradients are aligned when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, given: tuple[Tensor, Tensor, list[nn.Parameter], Scope], total: Tensor, *params: Tensor) -> Tensor:
        ctx.given = given
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        labels, teacher, params, scope = ctx.given
        g1 = torch.autograd.grad(labels, params, slope.to(labels.dtype), retain_graph=True, allow_unused=True)
        g2 = torch.autograd.grad(teacher, params, slope.to(teacher.dtype), allow_unused=True)
        return None, None, *_aligned(g1, g2, scope)


def _is_head(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.groups == 1 and all(size == 1 for size in layer.kernel_size)
    return isinstance(layer, nn.Linear)


def _find(student: nn.Module, head: str | None) -> str:
    layers = dict(student.named_modules())
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    there = f"; its linear layers: {', '.join(repr(name) for name in linear) or 'none'}"
    if head is None:
        if not linear:
            raise UsageError(f"student {type(student).__name__} has no linear layer: say which 1x1 convolution is its head")
        return linear[-1]
    if head not in layers:
        raise UsageError(f"head {head!r} is no submodule of {type(student).__name__}{there}")
    if not _is_head(layers[head]):
        raise UsageError(f"head {head!r} must be a Linear or a 1x1 convolution, got {type(layers[head]).__name__}{there}")
    return head


def _make(aux: str, n_features: int, n_classes: int, hidden: int) -> nn.Module:
    if aux == "linear":
        return nn.Linear(n_features, n_classes)
    if aux == "nonlinear":
        return nn.Sequential(
            nn.Linear(n_features, hidden), nn.Dropout(_DROPOUT), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_classes)
        )
    raise unknown("aux", str(aux), get_args(Aux))

"""Robust accuracy: which inputs a classifier still gets right after an attack, by attacks that no training here has used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.errors import UsageError, check_range, unknown

__all__ = ["robust_correct", "tail_robust_accuracy"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def robust_correct(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 30,
    restarts: int = 2,
    step_size: float | None = None,
    bounds: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
    attacks: Sequence[Attack] = (),
    batch_size: int = 512,
    seed: int = 0,
) -> Tensor:
    """Returns which inputs are classified rightly as they are and at every place that the attacks look at.

    Two attacks climb the cross entropy and the margin of the best wrong logit over the label's, by projected gradient steps from
    random places in the ball, ``restarts`` times each. An input counts as right only if it is so at every step of all of them.

    Args:
        model: ``model(x)`` gives logits (N, K); it is in eval mode for the call, and then as it was.
        x: inputs (N, ...), floating, within ``bounds``.
        y: labels (N,), int64.
        eps: size of a perturbation, >= 0.
        norm: "linf" (largest change of an input's entries) or "l2" (Euclidean length over all of them).
        steps: of each attack, >= 1.
        restarts: of each attack, >= 1.
        step_size: > 0; ``2.5 * eps / steps`` when None.
        bounds: least and greatest value of an input, numbers or tensors that broadcast to ``x``; None for no bounds.
        attacks: further attacks ``(model, x, y) -> x_adv``, on the inputs still right (AutoAttack, say:
            ``lambda model, x, y: AutoAttack(model, eps=eps).run_standard_evaluation(x, y)``).
        batch_size: inputs at a time.
        seed: of the random places; the global random state is left alone.

    Returns:
        A bool tensor (N,); its mean is the robust accuracy.

    Raises:
        TypeError: ``x`` is not a floating tensor, or an argument is no number.
        ValueError: an argument is out of range, or one of ``attacks`` leaves the ball or the bounds.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if y.shape != x.shape[:1]:
        raise UsageError(f"y must have shape ({len(x)},), one label per input, got {tuple(y.shape)}")
    check_range("eps", eps, low=0.0, high=math.inf, open_high=True)
    if norm not in ("linf", "l2"):
        raise unknown("norm", norm, ("linf", "l2"))
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        check_range(name, value, low=1)
    if step_size is not None:
        check_range("step_size", step_size, low=0.0, open_low=True)
    low, high = (torch.as_tensor(b).to(x).expand_as(x) for b in ((-math.inf, math.inf) if bounds is None else bounds))
    if bool((low > high).any()):
        raise UsageError(f"bounds must be (least, greatest), got {bounds!r}")
    if bool(((x < low) | (x > high)).any()):
        raise UsageError("x must lie within bounds: give those of your inputs (bounds=None for none)")
    generator = torch.Generator(x.device).manual_seed(seed)
    step = 2.5 * eps / steps if step_size is None else step_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        survived = []
        for inputs, labels, *box in zip(*(t.detach().split(batch_size) for t in (x, y, low, high)), strict=True):
            ball = _Ball(inputs, eps, norm, *box)
            right = _right(model, inputs, labels)
            for objective in (_cross_entropy, _margin) * restarts:
                at = right.nonzero().squeeze(1)
                start = ball.anywhere(generator)[at]
                right[at] = _climb(model, objective, start, labels[at], ball.of(at), steps, step)
            for i, attack in enumerate(attacks):
                at = right.nonzero().squeeze(1)
                moved = attack(model, inputs[at], labels[at]).detach()
                if not ball.of(at).holds(moved):
                    raise UsageError(f"attacks[{i}] must stay within eps = {eps:g} and bounds, but left them")
                right[at] = _right(model, moved, labels[at])
            survived.append(right)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(survived)


@dataclass(frozen=True)
class _Ball:
    """Around each of some inputs, the part of it that lies in a box."""

    x: Tensor
    eps: float
    norm: str
    low: Tensor
    high: Tensor

    def of(self, at: Tensor) -> _Ball:
        return _Ball(self.x[at], self.eps, self.norm, self.low[at], self.high[at])

    def anywhere(self, generator: torch.Generator) -> Tensor:
        if self.norm == "linf":
            uniform = torch.rand(self.x.shape, generator=generator, device=self.x.device, dtype=self.x.dtype)
            return self.project(self.x + self.eps * (2 * uniform - 1))
        normal = torch.randn(self.x.shape, generator=generator, device=self.x.device, dtype=self.x.dtype)
        return self.project(self.x + self.eps * self.direction(normal))

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.norm == "linf" else gradient / _length(gradient)

    def project(self, moved: Tensor) -> Tensor:
        change = moved - self.x
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / _length(change)).clamp_max(1.0)
        return (self.x + change).clamp(self.low, self.high)

    def holds(self, moved: Tensor) -> bool:
        if moved.shape != self.x.shape:
            return False
        slack = 1e-3 * self.eps + 1e-6
        inside = (moved >= self.low - 1e-6) & (moved <= self.high + 1e-6)
        change = moved - self.x
        size = change.abs() if self.norm == "linf" else _length(change)
        return bool(inside.all() & (size <= self.eps + slack).all())


def _climb(
    model: nn.Module, objective: Callable[[Tensor, Tensor], Tensor], moved: Tensor, y: Tensor, ball: _Ball, steps: int, step: float
) -> Tensor:  # fmt: skip
    """Whether each input stays right from its start to the last step."""
    right = torch.ones_like(y, dtype=torch.bool)
    for _ in range(steps):
        with torch.enable_grad():
            moved = moved.detach().requires_grad_()
            logits = model(moved)
            (gradient,) = torch.autograd.grad(objective(logits, y).sum(), moved)
        right &= _says(logits.detach(), y)
        moved = ball.project(moved.detach() + step * ball.direction(gradient))
    return right & _right(model, moved, y)


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return _says(model(x), y)


def _says(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y) & logits.isfinite().all(1)  # the argmax of NaN is class 0


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    label = y.unsqueeze(1)
    return logits.scatter(1, label, -math.inf).amax(1) - logits.gather(1, label).squeeze(1)


def _length(change: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(change.flatten(1), dim=1).clamp_min(torch.finfo(change.dtype).tiny)
    return length.reshape(-1, *[1] * (change.ndim - 1))


def tail_robust_accuracy(
    correct: Tensor, y: Tensor, fraction: float = 0.3, *, cross_fitted: bool = False, seed: int = 0
) -> float:
    """Returns the accuracy of the classes that fare worst, each class counting alike.

    Args:
        correct: which samples are right (under an attack, say), bool or 0 / 1, shape (N,).
        y: labels, int64, shape (N,).
        fraction: share of the classes in ``y`` that are taken, in (0, 1], rounded up.
        cross_fitted: choose the classes on one half of each class's samples and measure them on the other, both ways, and return
            the mean: classes that are chosen and measured on the same samples look worse than they are. A class of one sample
            then takes no part.
        seed: of the halves.

    Raises:
        ValueError: the shapes differ, there is no sample, or ``fraction`` is out of range; no class has two samples to halve.

    Sow et al., "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024: RA-Tail-30. The halves are not theirs.
    """
    correct, y = torch.as_tensor(correct), torch.as_tensor(y)
    if correct.ndim != 1 or correct.shape != y.shape or not len(y):
        raise UsageError(f"correct and y must both have shape (N,), N >= 1, got {tuple(correct.shape)} and {tuple(y.shape)}")
    check_range("fraction", fraction, low=0.0, high=1.0, open_low=True)
    correct, y = correct.detach().double().cpu(), y.detach().cpu()
    if not cross_fitted:
        accuracy = _per_class(correct, y)
        return float(accuracy.sort().values[: _share(fraction, len(accuracy))].mean())
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[y[order].argsort(stable=True)]
    classes, counts = y.unique(return_counts=True)
    rank = torch.arange(len(y)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    enough = classes[counts > 1]
    if not len(enough):
        raise UsageError("cross_fitted needs a class with at least two samples")
    halves = [order[(rank % 2 == side) & torch.isin(y[order], enough)] for side in (0, 1)]
    first, second = (_per_class(correct[i], y[i]) for i in halves)
    worst = _share(fraction, len(enough))
    return float(torch.stack([b[a.argsort(stable=True)[:worst]].mean() for a, b in ((first, second), (second, first))]).mean())


def _share(fraction: float, n: int) -> int:
    return math.ceil(fraction * n - 1e-9)  # 0.07 * 100 is a little more than 7


def _per_class(correct: Tensor, y: Tensor) -> Tensor:
    _, inverse, counts = y.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=correct.dtype).index_add_(0, inverse, correct) / counts

r"""Comp-sum losses: cross entropy and its relatives, indexed by :math:`\tau`, and what they guarantee.

With h the logits, y the label and p = softmax(h / rho), the loss is

.. math::
    \ell_\tau(h, y) = \Phi^\tau\Big(\sum_{y' \neq y} e^{(h_{y'} - h_y) / \rho}\Big) = \frac{1 - p_y^{\tau - 1}}{\tau - 1}, \qquad
    \Phi^\tau(u) = \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau}, \quad \Phi^1(u) = \log(1 + u),

the sum-exponential loss 1 / p_y - 1 at :math:`\tau = 0`, cross entropy at 1, generalised cross entropy in between 1 and 2 and
the mean absolute error 1 - p_y at 2. Reach for :math:`\tau` a little above 1 where some labels are wrong, and for
``h_consistency_bound`` to turn a loss that is so far from the best into a bound on the excess of errors.

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023, arXiv 2304.07288.

Known not to work:

- :math:`\tau < 1` grows like :math:`p_y^{\tau - 1}`, and so does its gradient: one confident error outweighs the batch, and training
  at a usual learning rate can diverge. In float32 the loss overflows where log p_y < -88; ``clip`` prevents that.
- :math:`\tau \ge 2` hardly learns what is not yet half right (the gradient has a factor :math:`p_y^{\tau - 1}`), least of all with
  many classes.
- The losses have different scales: tune the learning rate for each.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from weightroom.errors import UsageError, check_range
from weightroom.losses.base import ClassificationLoss, Reduction, eager, prepare, reduce, seen

__all__ = ["CompSumLoss", "best_conditional_risk", "comp_sum_loss", "h_consistency_bound"]

_NEAR_ONE = 1e-6  # so near to 1 that tau is taken to be 1
_HALVINGS = 60  # of [0, 1], to invert T


def comp_sum_loss(
    input: Tensor,
    target: Tensor,
    tau: float = 1.0,
    rho: float = 1.0,
    *,
    clip: float | None = -60.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Functional form of :class:`CompSumLoss`."""
    _check(tau, rho, clip, label_smoothing)
    if isinstance(target, Tensor) and target.is_floating_point():
        return _expected(input, target, tau, rho, clip, weight, reduction, label_smoothing)
    logits, labels, valid = prepare(input, target, weight, ignore_index)
    if not label_smoothing:
        return reduce(_at_label(logits, labels, tau, rho, clip), labels, valid, weight, reduction)
    losses = _every(logits, None, tau, rho, clip)
    loss, every = losses.gather(1, labels).squeeze(1), _weighted(losses, weight).mean(1)
    given, uniform = reduce(loss, labels, valid, weight, "none"), reduce(every, labels, valid, None, "none")
    smooth = torch.lerp(given, uniform, label_smoothing)
    if reduction == "mean":
        return smooth.sum() / reduce(torch.ones_like(loss), labels, valid, weight, "sum")
    return reduce(smooth, labels, valid, None, reduction)


class CompSumLoss(ClassificationLoss):
    r"""Comp-sum loss :math:`(1 - p_y^{\tau - 1}) / (\tau - 1)` with p = softmax(input / rho); -log p_y for :math:`\tau = 1`.

    Args:
        tau: >= 0. 0: sum-exponential, 1: cross entropy, 1 + q: generalised cross entropy, 2: mean absolute error.
        rho: > 0, divides the logits; the margin scale of the adversarial losses.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.
        label_smoothing: in [0, 1], moves so much of each target to all classes alike.
        clip: < 0; where ``tau`` < 1, log p_y counts as this if it is less, so that the loss stays finite and such a sample has
            no gradient. None for none: the loss may then be infinite.

    Shapes and dtypes are those of ``nn.CrossEntropyLoss``: input (N, K, ...) and target either class indices (N, ...), int64, or
    probabilities (N, K, ...), floating, for which the loss is :math:`\sum_k t_k \ell_\tau(h, k)`. With ``tau`` = 1 the value is
    that of ``nn.CrossEntropyLoss`` of input / rho.

    Raises:
        TypeError: a hyper-parameter is no number, or ``input`` is not floating.
        ValueError: a hyper-parameter is out of range, or as in :class:`LDRKLLoss`.
    """

    #: The target may hold probabilities instead of class indices.
    takes_probabilities: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("tau", "rho", "label_smoothing", "clip")

    def __init__(
        self, tau: float = 1.0, rho: float = 1.0, reduction: Reduction = "mean", weight: Tensor | None = None,
        ignore_index: int = -100, label_smoothing: float = 0.0, clip: float | None = -60.0,
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        _check(tau, rho, clip, label_smoothing)
        self.tau, self.rho, self.label_smoothing = float(tau), float(rho), float(label_smoothing)
        self.clip = clip

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss."""
        return comp_sum_loss(
            input, target, self.tau, self.rho, clip=self.clip, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
        )  # fmt: skip


def best_conditional_risk(p: Tensor, tau: float) -> Tensor:
    r"""Returns the least expected loss :math:`\min_h \sum_y p_y \ell_\tau(h, y)` over all logits, for labels drawn from p.

    For :math:`\tau < 2` it is :math:`(1 - (\sum_y p_y^{1/(2-\tau)})^{2-\tau}) / (\tau - 1)` (the entropy of p for
    :math:`\tau = 1`), attained at logits whose softmax is proportional to :math:`p^{1/(2-\tau)}`; beyond,
    :math:`(1 - \max_y p_y) / (\tau - 1)`, approached as all of the softmax goes to the likeliest label.

    Args:
        p: probabilities, shape (..., K), that sum to 1.
        tau: >= 0.

    Returns:
        Shape (...).

    Raises:
        ValueError: ``tau`` is out of range, or ``p`` has negative entries or sums that are not 1.
    """
    check_range("tau", tau, low=0.0, high=math.inf, open_high=True)
    given = torch.as_tensor(p)
    p = given.double() if given.is_floating_point() and given.device.type != "mps" else given  # digits cancel near tau = 1
    if (
        not p.is_floating_point()
        or p.ndim == 0
        or bool((p < 0).any())
        or not torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-4)
    ):
        raise UsageError("p must hold probabilities, >= 0 with sum 1 over the last dimension")
    if abs(tau - 1) < _NEAR_ONE:
        risk = torch.special.entr(p).sum(-1)
    elif tau >= 2:
        risk = (1 - p.amax(-1)) / (tau - 1)
    else:
        risk = -torch.expm1((2 - tau) * torch.logsumexp(p.log() / (2 - tau), -1)) / (tau - 1)
    return risk.to(given.dtype)


def h_consistency_bound(surrogate_excess: float | Tensor, tau: float, n_classes: int) -> Tensor:
    r"""Returns :math:`\Gamma_\tau(s)`: how far the rate of errors can be from the best when the loss is s from its best.

    It holds for the family of all functions, at a single input as well as on average (there "the best" is that of the family):
    zero-one regret <= :math:`\Gamma_\tau`\ (regret of the loss), with :math:`\Gamma_\tau` the inverse of

    .. math::
        T(b) = \begin{cases}
        \frac{2^{1-\tau}}{1-\tau} (1 - M^{2-\tau}), & \tau < 1 \\
        \frac12 \left((1+b) \log(1+b) + (1-b) \log(1-b)\right), & \tau = 1 \\
        \frac{1}{(\tau-1)\, n^{\tau-1}} (M^{2-\tau} - 1), & 1 < \tau < 2 \\
        \frac{b}{(\tau-1)\, n^{\tau-1}}, & \tau \ge 2
        \end{cases}
        \qquad M = \tfrac12 \left((1+b)^{1/(2-\tau)} + (1-b)^{1/(2-\tau)}\right).

    Args:
        surrogate_excess: s >= 0, a number or a tensor: mean loss minus the least possible (see ``best_conditional_risk``).
        tau: >= 0, of the loss; ``rho`` = 1.
        n_classes: n >= 2.

    Returns:
        The bound in [0, 1], float64, of the shape of ``surrogate_excess``.

    Raises:
        ValueError: an argument is out of range.
    """
    check_range("tau", tau, low=0.0, high=math.inf, open_high=True)
    check_range("n_classes", n_classes, low=2)
    if n_classes != int(n_classes):
        raise UsageError(f"n_classes must be an integer, got {n_classes}")
    s = torch.as_tensor(surrogate_excess, dtype=torch.float64)
    if not bool((s >= 0).all()):
        raise UsageError(
            f"surrogate_excess must be >= 0, got {s.min():g}" if s.ndim else f"surrogate_excess must be >= 0, got {s:g}"
        )
    if tau >= 2:
        return ((tau - 1) * n_classes ** (tau - 1) * s).clamp_max(1.0)
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(_HALVINGS):  # T increases: halve [low, high] with T(low) <= s
        middle = (low + high) / 2
        below = _transform(middle, tau, n_classes) <= s
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # T(b) >= c b^2; the root is the better of the two only where b^2 drowns in rounding.
    c = 2**tau * (2 - tau) if tau < 1 - _NEAR_ONE else 2.0 * n_classes ** max(tau - 1, 0.0)
    return torch.minimum(high, (c * s).sqrt())


def _transform(b: Tensor, tau: float, n: int) -> Tensor:
    if abs(tau - 1) < _NEAR_ONE:
        return -(torch.special.entr(1 + b) + torch.special.entr(1 - b)) / 2
    a = 1 / (2 - tau)
    log_M = torch.logaddexp(a * torch.log1p(b), a * torch.log1p(-b)) - math.log(2)  # powers of 1 + b overflow near tau = 2
    rise = torch.expm1((2 - tau) * log_M)  # M^(2 - tau) - 1
    return -(2 ** (1 - tau)) / (1 - tau) * rise if tau < 1 else rise / ((tau - 1) * n ** (tau - 1))


def _phi(log_p: Tensor, tau: float, clip: float | None) -> Tensor:
    """Phi^tau(1/p - 1) = (1 - p^(tau-1)) / (tau-1), from log p: no power of a probability that has become 0."""
    if abs(tau - 1) < _NEAR_ONE:
        return -log_p
    if tau < 1 and clip is not None:
        log_p = log_p.clamp_min(clip)
    return -torch.expm1((tau - 1) * log_p) / (tau - 1)


def _at_label(logits: Tensor, labels: Tensor, tau: float, rho: float, clip: float | None) -> Tensor:
    if abs(tau - 1) < _NEAR_ONE:
        return F.cross_entropy(_scaled(logits, rho), labels.squeeze(1), reduction="none")
    if eager():
        return _Fused.apply(logits, labels, tau, rho, clip)
    return _plain(logits, labels, tau, rho, clip)


def _plain(logits: Tensor, labels: Tensor, tau: float, rho: float, clip: float | None) -> Tensor:
    return _phi(_scaled(logits, rho).log_softmax(1).gather(1, labels), tau, clip).squeeze(1)


class _Fused(torch.autograd.Function):
    """l_tau(h, y) and its gradient p_y^(tau-1) (p - onehot(y)) / rho, with the (N, K) buffer of p kept in between."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tau: float, rho: float, clip: float | None) -> Tensor:
        z = _scaled(logits, rho)
        p = z.softmax(1)
        log_p = z.gather(1, labels) - z.amax(1, keepdim=True) + p.amax(1, keepdim=True).log()  # p_y itself may be 0
        ctx.save_for_backward(logits, labels, p, log_p)
        ctx.hyper = tau, rho, clip
        return _phi(log_p, tau, clip).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, p, log_p = ctx.saved_tensors
        tau, rho, clip = ctx.hyper
        if torch.is_grad_enabled():  # create_graph=True: through the plain form, which can be differentiated again
            loss = _plain(logits, labels, tau, rho, clip)
            return (*torch.autograd.grad(loss, logits, grad, create_graph=True), None, None, None, None)
        slope = torch.exp((tau - 1) * log_p) / rho
        if tau < 1 and clip is not None:
            slope = slope.masked_fill(log_p < clip, 0.0)
        slope = slope * grad.unsqueeze(1)
        return (p * slope).scatter_add_(1, labels, -slope), None, None, None, None


def _scaled(logits: Tensor, rho: float) -> Tensor:
    return logits if rho == 1 else logits / rho


def _every(logits: Tensor, weight: Tensor | None, tau: float, rho: float, clip: float | None) -> Tensor:
    """w_k l_tau(h, k) for every class k."""
    return _weighted(_phi(_scaled(logits, rho).log_softmax(1), tau, clip), weight)


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses if weight is None else losses * weight.to(losses.dtype).reshape(-1, *[1] * (losses.ndim - 2))


def _expected(
    input: Tensor, target: Tensor, tau: float, rho: float, clip: float | None, weight: Tensor | None, reduction: Reduction,
    label_smoothing: float,
) -> Tensor:  # fmt: skip
    """sum_k t_k w_k l_tau(h, k) for probabilities t; the mean is that over samples, as in ``F.cross_entropy``."""
    if not isinstance(input, Tensor) or input.ndim == 0 or target.shape != input.shape:
        raise UsageError(
            f"target must have the shape of input where it holds probabilities, got {seen(target)} for {seen(input)}"
        )
    nowhere = torch.zeros_like(input.select(min(1, input.ndim - 1), 0), dtype=torch.int64)
    logits, labels, valid = prepare(input, nowhere, weight, -1)
    t = (1 - label_smoothing) * target.to(logits.dtype).reshape(logits.shape) + label_smoothing / logits.shape[1]
    return reduce((t * _every(logits, weight, tau, rho, clip)).sum(1), labels, valid, None, reduction)


def _check(tau: float, rho: float, clip: float | None, label_smoothing: float) -> None:
    check_range("tau", tau, low=0.0, high=math.inf, open_high=True)
    check_range("rho", rho, low=0.0, high=math.inf, open_low=True, open_high=True)
    check_range("label_smoothing", label_smoothing, low=0.0, high=1.0)
    if clip is not None:
        check_range("clip", clip, high=0.0, open_high=True)

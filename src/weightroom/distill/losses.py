r"""Losses that compare a student's logits with a teacher's: a Bernoulli for each class, the softmax, and its two parts.

The softmax says nothing of the level of the logits: adding a constant to all of them changes nothing. :class:`BinaryKLLoss` and
:class:`BinaryKLNormLoss` compare them class by class, level included. Reach for these on a head of their own
(:class:`~weightroom.distill.DualHead`), for the softmax losses on the head that classifies.

- BinaryKL and BinaryKL-Norm: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation", KDD 2025, arXiv 2411.08937.
- Softmax: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2014, arXiv 1503.02531.
- Decoupled (DKD): Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, eq. (7).
- Standardised logits: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.

Known not to work, or to differ:

- The Bernoulli losses are summed over classes: beside cross entropy on one head they easily outweigh it, and weights that suit a
  mean over classes are K times too large here.
- The authors' code of BinaryKL clamps the sigmoids at 1e-8, so that the gradient is gone beyond a difference of 18 T; here it is not.
- BinaryKL's gradient fades where both sigmoids are saturated on the same side; BinaryKL-Norm's does not.
- DKD's authors raise its weight linearly over the first 20 epochs; the weight is the objective's matter, not the loss's.
- The standard deviation of standardised logits divides by K - 1, as in the authors' code. Flat logits, as a head of zeros gives
  them, have no standard form and get no gradient.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from weightroom.distill.base import DistillationLoss, Reduction, check_pair, seen
from weightroom.errors import UsageError, check_range

__all__ = ["BinaryKLLoss", "BinaryKLNormLoss", "DKDLoss", "SoftmaxKDLoss"]

_EPS = 1e-7  # added to the standard deviation, as in the authors' code


class BinaryKLLoss(DistillationLoss):
    r"""One Bernoulli for each class.

    .. math:: T^2 \frac1N \sum_{n,k} \mathrm{KL}\big(B(\sigma(t_{nk}/T)) \,\|\, B(\sigma(s_{nk}/T))\big), \qquad
        \frac{\partial}{\partial s_{nk}} = \frac{T}{N} \big(\sigma(s_{nk}/T) - \sigma(t_{nk}/T)\big)

    Arguments, shapes and errors are those of every loss of this room.

    Args:
        T: temperature > 0.
        reduction: "batchmean" (mean over samples of the sum over classes), "sum", or "none" for one value per sample.

    Raises:
        TypeError: ``T`` is no number, or logits are no floating tensor.
        ValueError: ``T`` is not > 0, the reduction unknown, or the shapes are not (N, K) both.
    """

    def __init__(self, T: float = 2.0, reduction: Reduction = "batchmean") -> None:
        super().__init__(T, reduction)

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the divergence of each sample, without the factor T^2."""
        return _bernoulli_kl(teacher / self.T, student / self.T).sum(1)


class BinaryKLNormLoss(DistillationLoss):
    r"""One Bernoulli for each class, of the difference of the logits alone.

    .. math:: T^2 \frac1N \sum_{n,k} \mathrm{KL}\big(B(\tfrac12) \,\|\, B(\sigma(d_{nk}))\big)
        = T^2 \frac1N \sum_{n,k} \log\cosh\frac{d_{nk}}2, \qquad d = \frac{s - t}T, \qquad
        \frac{\partial}{\partial s_{nk}} = \frac{T}{N} \big(\sigma(d_{nk}) - \tfrac12\big)

    It is quadratic near zero, :math:`(s - t)^2 / 8`, and linear far from it, like a smooth Huber loss: every class is
    equally fast, whatever the level of its logit, and the gradient never exceeds T/(2N).

    Args:
        T: temperature > 0.
        reduction: "batchmean" (mean over samples of the sum over classes), "sum", or "none" for one value per sample.

    Raises:
        TypeError: ``T`` is no number, or logits are no floating tensor.
        ValueError: ``T`` is not > 0, the reduction unknown, or the shapes are not (N, K) both.
    """

    def __init__(self, T: float = 2.0, reduction: Reduction = "batchmean") -> None:
        super().__init__(T, reduction)

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the divergence of each sample, without the factor T^2."""
        return _log_cosh((student - teacher) / (2 * self.T)).sum(1)


class SoftmaxKDLoss(DistillationLoss):
    r"""The softmax with a temperature: :math:`T^2 \frac1N \sum_n \mathrm{KL}(\mathrm{softmax}(t_n/T) \,\|\, \mathrm{softmax}(s_n/T))`.

    Args:
        T: temperature > 0.
        reduction: "batchmean" (mean over samples of the sum over classes), "sum", or "none" for one value per sample.
        standardize: first bring the logits of each sample to mean 0 and standard deviation 1 over the classes, so that the
            student need not match the teacher's scale; wants a weight ten times that of plain KD, and T = 2, in the paper.

    Raises:
        TypeError: ``T`` is no number, or logits are no floating tensor.
        ValueError: ``T`` is not > 0, the reduction unknown, the shapes are not (N, K) both, or K < 2 with ``standardize``.
    """

    shown: ClassVar[tuple[str, ...]] = ("T", "standardize")

    def __init__(self, T: float = 4.0, reduction: Reduction = "batchmean", *, standardize: bool = False) -> None:
        super().__init__(T, reduction)
        self.standardize = bool(standardize)

    def per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the divergence of each sample, without the factor T^2."""
        if self.standardize:
            student, teacher = _standard(student), _standard(teacher)
        return _softmax_kl(teacher / self.T, student / self.T)


class DKDLoss(DistillationLoss):
    r"""KD taken apart: target against all others (TCKD), and the others among themselves (NCKD).

    .. math:: T^2 \frac1N \sum_n \alpha\, \mathrm{KL}\big(B(p^t_y) \,\|\, B(p^s_y)\big)
        + \beta\, \mathrm{KL}\big(\hat p^t \,\|\, \hat p^s\big), \qquad p = \mathrm{softmax}(\cdot / T),
        \quad \hat p = \text{p without class y, renormalised}

    Plain KD is :math:`\alpha = 1` and :math:`\beta = 1 - p^t_y`: the surer the teacher, the less of the others gets through.

    Args:
        alpha: weight >= 0 of TCKD.
        beta: weight >= 0 of NCKD; the paper takes 1 to 10, 8 for ResNet-32x4 to ResNet-8x4.
        T: temperature > 0.
        reduction: "batchmean" (mean over samples), "sum", or "none" for one value per sample.

    Call it as ``loss(student, teacher, target)`` with class indices (N,), int64.

    Raises:
        TypeError: a hyper-parameter is no number, logits are no floating tensor, or ``target`` is not int64.
        ValueError: a hyper-parameter is out of range, the shapes do not fit, or K < 2.
    """

    needs_target: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta", "T")

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0, reduction: Reduction = "batchmean") -> None:
        super().__init__(T, reduction)
        for name, weight in (("alpha", alpha), ("beta", beta)):
            check_range(name, weight, low=0.0, high=math.inf, open_high=True)
        self.alpha, self.beta = float(alpha), float(beta)

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the loss."""
        s, t = check_pair(student, teacher)
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            raise TypeError(f"target must hold class indices (int64), got {seen(target)}")
        if target.shape != s.shape[:1]:
            raise UsageError(f"target must have shape {tuple(s.shape[:1])}, one class per sample, got {tuple(target.shape)}")
        if s.shape[1] < 2:
            raise UsageError(f"student must have K >= 2 classes, got {s.shape[1]}")
        y = target.unsqueeze(1)
        others = torch.arange(s.shape[1] - 1, device=s.device).expand(len(s), -1)
        others = others + (others >= y)  # all classes but y
        s, t = s / self.T, t / self.T
        s_others, t_others = s.gather(1, others), t.gather(1, others)
        s_target, t_target = (z.gather(1, y) - o.logsumexp(1, keepdim=True) for z, o in ((s, s_others), (t, t_others)))
        tckd = _bernoulli_kl(t_target, s_target).squeeze(1)  # p_y = sigma(z_y - log sum_{k != y} exp z_k)
        nckd = _softmax_kl(t_others, s_others)
        return self.reduce(self.alpha * tckd + self.beta * nckd)  # eq. (7)


def _bernoulli_kl(t: Tensor, s: Tensor) -> Tensor:
    """KL(B(sigma(t)) || B(sigma(s))), element by element."""
    p = torch.sigmoid(t)
    return p * (F.logsigmoid(t) - F.logsigmoid(s)) + torch.sigmoid(-t) * (F.logsigmoid(-t) - F.logsigmoid(-s))


def _log_cosh(z: Tensor) -> Tensor:
    """Log of cosh to full precision: through sinh near zero, where the other form cancels."""
    far = z.abs()
    return torch.where(
        far < 1, torch.log1p(2 * torch.sinh(z.clamp(-1, 1) / 2).square()), far + torch.log1p(torch.exp(-2 * far)) - math.log(2)
    )


def _softmax_kl(t: Tensor, s: Tensor) -> Tensor:
    """KL(softmax(t) || softmax(s)) of each row."""
    return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)


def _standard(logits: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1; flat ones are 0, without a gradient, which would be 1e7 there."""
    if logits.shape[1] < 2:
        raise UsageError(f"standardize needs K >= 2 classes, got {logits.shape[1]}")
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (std + _EPS).masked_fill(std == 0, math.inf)

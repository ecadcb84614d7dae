r"""Losses for noisy labels: the rivals that a new one is compared with, under one convention and in one registry.

Reach for one when labels are wrong and nobody knows which. Most are bounded or symmetric: the sum of the loss over all labels is
a constant, so that uniform noise does not move its minimum (Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for
Deep Neural Networks", AAAI 2017, arXiv 1712.09482). The price is the same for all: what ignores wrong labels also ignores hard
ones, so that a symmetric loss alone (``MAELoss``, ``RLLLoss``) underfits when there are many classes. Scales differ: tune the
learning rate for each.

Every loss is called like ``nn.CrossEntropyLoss`` with class indices. With p = softmax(f), p_y the probability of the label and
K classes:

========================  ==================================================================================================
``MAELoss``               1 - p_y, half the L1 distance; symmetric
``GCELoss``               (1 - p_y^q) / q; Zhang, Sabuncu, NeurIPS 2018, arXiv 1805.07836, eq. (6)
``SCELoss``               alpha CE + beta RCE, RCE = -A (1 - p_y); Wang et al., ICCV 2019, arXiv 1908.06112, eq. (7)
``NCERCELoss``            alpha NCE + beta RCE, NCE = log p_y / sum_k log p_k; Ma et al., ICML 2020, arXiv 2006.13554
``NCEAGCELoss``           alpha NCE + beta ((a+1)^q - (a+p_y)^q) / q; Zhou et al., ICML 2021, arXiv 2106.03110
``NCEAULLoss``            alpha NCE + beta ((a-p_y)^q - (a-1)^q) / q; Zhou et al., the same
``JSLoss``                Jensen-Shannon divergence of label and p; Englesson, Azizpour, NeurIPS 2021, arXiv 2105.04522
``RLLLoss``               log(1+1/alpha) - log(alpha+p_y) + mean_{k != y} log(alpha+p_k); Patel, Sastry, PAKDD 2021, 2107.09957
``CrammerSingerLoss``     max_k (c [k != y] + f_k - f_y); Crammer, Singer, JMLR 2001
``WestonWatkinsLoss``     sum_{k != y} max(0, c + f_k - f_y); Weston, Watkins, ESANN 1999
``FocalLoss``             -(1 - p_y)^gamma log p_y; Lin et al., ICCV 2017, arXiv 1708.02002: a baseline, not made for noise
========================  ==================================================================================================

``registry`` maps a short name to each class. Where a published implementation clamps probabilities, the exact value is computed
from the log-softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from weightroom.errors import check_range
from weightroom.losses.base import ClassificationLoss, Reduction, differences

__all__ = [
    "CrammerSingerLoss",
    "FocalLoss",
    "GCELoss",
    "JSLoss",
    "MAELoss",
    "NCEAGCELoss",
    "NCEAULLoss",
    "NCERCELoss",
    "RLLLoss",
    "SCELoss",
    "WestonWatkinsLoss",
    "registry",
]


class MAELoss(ClassificationLoss):
    """Mean absolute error between label and probabilities, halved: 1 - p_y. Symmetric; slow to learn with many classes.

    Args:
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.
    """

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns 1 - p_y of each sample."""
        return _off_label(_log_p(logits, labels))


class GCELoss(ClassificationLoss):
    """Generalised cross entropy (1 - p_y^q) / q, between cross entropy (q -> 0) and ``MAELoss`` (q = 1).

    Args:
        q: in (0, 1].
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``q`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("q",)

    def __init__(
        self, q: float = 0.7, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("q", q, low=0.0, high=1.0, open_low=True)
        self.q = float(q)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns (1 - p_y^q) / q of each sample."""
        return -torch.expm1(self.q * _log_p(logits, labels)) / self.q


class SCELoss(ClassificationLoss):
    """Symmetric cross entropy, alpha CE + beta RCE: the reverse term swaps label and probabilities, with A in place of log 0.

    Args:
        alpha: weight of cross entropy, >= 0.
        beta: weight of reverse cross entropy -A (1 - p_y), >= 0.
        A: stands for log 0, < 0.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: a hyper-parameter is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta", "A")

    def __init__(
        self, alpha: float = 0.1, beta: float = 1.0, A: float = -4.0, reduction: Reduction = "mean", weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        _check_mixture(alpha, beta)
        check_range("A", A, high=0.0, low=-math.inf, open_low=True, open_high=True)
        self.alpha, self.beta, self.A = float(alpha), float(beta), float(A)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns alpha CE + beta RCE of each sample."""
        log_p = _log_p(logits, labels)
        return -self.alpha * log_p - self.beta * self.A * _off_label(log_p)


class _NormalizedCE(ClassificationLoss):
    """alpha NCE + beta times a passive loss of p_y alone."""

    def __init__(self, alpha: float, beta: float, reduction: Reduction, weight: Tensor | None, ignore_index: int) -> None:
        super().__init__(reduction, weight, ignore_index)
        _check_mixture(alpha, beta)
        self.alpha, self.beta = float(alpha), float(beta)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns alpha NCE + beta times the passive loss of each sample."""
        log_p = logits.log_softmax(1)
        log_p_y = log_p.gather(1, labels).squeeze(1)
        return self.alpha * log_p_y / log_p.sum(1) + self.beta * self.passive(log_p_y)

    def passive(self, log_p: Tensor) -> Tensor:
        raise NotImplementedError


class NCERCELoss(_NormalizedCE):
    """Normalised cross entropy (active) and reverse cross entropy (passive), both symmetric.

    Args:
        alpha: weight of log p_y / sum_k log p_k, >= 0.
        beta: weight of -A (1 - p_y), >= 0.
        A: stands for log 0, < 0; log 1e-4 as in the authors' code.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: a hyper-parameter is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta", "A")

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, A: float = math.log(1e-4), reduction: Reduction = "mean",
        weight: Tensor | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(alpha, beta, reduction, weight, ignore_index)
        check_range("A", A, high=0.0, low=-math.inf, open_low=True, open_high=True)
        self.A = float(A)

    def passive(self, log_p: Tensor) -> Tensor:
        """Returns RCE = -A (1 - p_y)."""
        return -self.A * _off_label(log_p)


class NCEAGCELoss(_NormalizedCE):
    """Normalised cross entropy and asymmetric generalised cross entropy ((a+1)^q - (a+p_y)^q) / q.

    Args:
        alpha: weight of log p_y / sum_k log p_k, >= 0.
        beta: weight of the asymmetric loss, >= 0.
        a: > 0.
        q: > 0; asymmetric where q >= 1, or where a is large enough.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: a hyper-parameter is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta", "a", "q")

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, a: float = 3.0, q: float = 1.5, reduction: Reduction = "mean",
        weight: Tensor | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(alpha, beta, reduction, weight, ignore_index)
        _check_asymmetric(a, q, least=0.0)
        self.a, self.q = float(a), float(q)

    def passive(self, log_p: Tensor) -> Tensor:
        """Returns AGCE."""
        return ((self.a + 1) ** self.q - (self.a + log_p.exp()) ** self.q) / self.q


class NCEAULLoss(_NormalizedCE):
    """Normalised cross entropy and asymmetric unhinged loss ((a-p_y)^q - (a-1)^q) / q.

    Args:
        alpha: weight of log p_y / sum_k log p_k, >= 0.
        beta: weight of the asymmetric loss, >= 0.
        a: > 1.
        q: > 0; asymmetric where q <= 1, or where a is large enough.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: a hyper-parameter is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("alpha", "beta", "a", "q")

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, a: float = 6.0, q: float = 1.5, reduction: Reduction = "mean",
        weight: Tensor | None = None, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(alpha, beta, reduction, weight, ignore_index)
        _check_asymmetric(a, q, least=1.0)
        self.a, self.q = float(a), float(q)

    def passive(self, log_p: Tensor) -> Tensor:
        """Returns AUL."""
        return ((self.a - log_p.exp()) ** self.q - (self.a - 1) ** self.q) / self.q


class JSLoss(ClassificationLoss):
    r"""Jensen-Shannon divergence of label and probabilities, between cross entropy (pi -> 0) and ``MAELoss`` (pi -> 1).

    With m = pi e_y + (1 - pi) p: :math:`(\pi\,\mathrm{KL}(e_y \| m) + (1-\pi)\,\mathrm{KL}(p \| m)) / (-(1-\pi)\log(1-\pi))`.

    Args:
        pi: weight of the label, in (0, 1).
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``pi`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("pi",)

    def __init__(
        self, pi: float = 0.5, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("pi", pi, low=0.0, high=1.0, open_low=True, open_high=True)
        self.pi = float(pi)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the scaled divergence of each sample, which depends on p_y alone."""
        log_p, rest = _log_p(logits, labels), math.log1p(-self.pi)
        p, log_m = log_p.exp(), torch.log1p(-(1 - self.pi) * _off_label(log_p))  # m_y = 1 - (1 - pi) (1 - p_y)
        label, output = -log_m, p * (log_p - log_m) - _off_label(log_p) * rest  # KL(e_y || m), KL(p || m)
        return (self.pi * label + (1 - self.pi) * output) / (-(1 - self.pi) * rest)


class RLLLoss(ClassificationLoss):
    """Robust log loss: log(1 + 1/alpha) - log(alpha + p_y) + mean over k != y of log(alpha + p_k). Symmetric.

    Args:
        alpha: > 0; the smaller, the nearer to cross entropy.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``alpha`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("alpha",)

    def __init__(
        self, alpha: float = 0.1, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("alpha", alpha, low=0.0, high=math.inf, open_low=True, open_high=True)
        self.alpha = float(alpha)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the robust log loss of each sample."""
        log = torch.log(self.alpha + logits.softmax(1))
        label = log.gather(1, labels).squeeze(1)
        return math.log1p(1 / self.alpha) - label + (log.sum(1) - label) / (logits.shape[1] - 1)


class CrammerSingerLoss(ClassificationLoss):
    """Multi-class hinge of the worst rival: max_k (c [k != y] + f_k - f_y), at least 0 (that of k = y); LDR-KL with lambda = 0.

    Args:
        margin: c >= 0.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``margin`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("margin",)

    def __init__(
        self, margin: float = 1.0, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("margin", margin, low=0.0, high=math.inf, open_high=True)
        self.margin = float(margin)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the worst difference of each sample."""
        return differences(logits, labels, self.margin).amax(1)


class WestonWatkinsLoss(ClassificationLoss):
    """Multi-class hinge of all rivals: sum over k != y of max(0, c + f_k - f_y), that is K times ``F.multi_margin_loss``.

    Args:
        margin: c >= 0.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``margin`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("margin",)

    def __init__(
        self, margin: float = 1.0, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("margin", margin, low=0.0, high=math.inf, open_high=True)
        self.margin = float(margin)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum of the positive differences of each sample."""
        return differences(logits, labels, self.margin).relu().sum(1)


class FocalLoss(ClassificationLoss):
    """Cross entropy that turns away from what is already learnt: -(1 - p_y)^gamma log p_y.

    A baseline: it turns towards hard samples, wrong labels among them.

    Args:
        gamma: >= 0; 0 is cross entropy.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Raises:
        ValueError: ``gamma`` is out of range, or as in ``nn.CrossEntropyLoss``.
    """

    shown: ClassVar[tuple[str, ...]] = ("gamma",)

    def __init__(
        self, gamma: float = 2.0, reduction: Reduction = "mean", weight: Tensor | None = None, ignore_index: int = -100
    ) -> None:  # fmt: skip
        super().__init__(reduction, weight, ignore_index)
        check_range("gamma", gamma, low=0.0, high=math.inf, open_high=True)
        self.gamma = float(gamma)

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the focal loss of each sample."""
        log_p = _log_p(logits, labels)
        off = _off_label(log_p).clamp_min(torch.finfo(log_p.dtype).tiny)  # a power below 1 has no slope at 0
        return -(off**self.gamma) * log_p


#: Short name -> class.
registry: Mapping[str, type[ClassificationLoss]] = MappingProxyType(
    {
        "mae": MAELoss,
        "gce": GCELoss,
        "sce": SCELoss,
        "nce+rce": NCERCELoss,
        "nce+agce": NCEAGCELoss,
        "nce+aul": NCEAULLoss,
        "js": JSLoss,
        "rll": RLLLoss,
        "crammer-singer": CrammerSingerLoss,
        "weston-watkins": WestonWatkinsLoss,
        "focal": FocalLoss,
    }
)


def _log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, labels).squeeze(1)


def _off_label(log_p: Tensor) -> Tensor:
    return -torch.expm1(log_p)  # 1 - p_y


def _check_mixture(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_range(name, value, low=0.0, high=math.inf, open_high=True)


def _check_asymmetric(a: float, q: float, least: float) -> None:
    check_range("a", a, low=least, high=math.inf, open_low=True, open_high=True)
    check_range("q", q, low=0.0, high=math.inf, open_low=True, open_high=True)

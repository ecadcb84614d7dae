r"""LDR-KL and ALDR-KL: the worst case over weights on the labels.

An adversary re-weights the K classes to make the differences of scores look bad, at a price of :math:`\lambda` per unit of KL
divergence from uniform weights. So :math:`\lambda` is a temperature between the Crammer-Singer hinge (0), cross entropy (1) and a
symmetric, linear loss (infinity) that tolerates label noise. ALDR-KL gives every training sample a :math:`\lambda` of its own.

Reach for them to train a classifier on labels that are wrong at random.

Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
ICML 2023, arXiv 2112.14869.

Known not to work, or to differ:

- With weight decay strong enough to keep the network from learning wrong labels by heart, cross entropy needs no replacement.
- The softplus saturates: a class whose logits have become very negative gets no gradient back, and at a high learning rate with
  label noise whole classes are lost. Lower the rate, or take "abs-mean".
- With few classes the adaptive :math:`\lambda_i` hardly moves (K = 10, :math:`\lambda_0` = 10: by less than two percent), so that
  ALDR-KL is LDR-KL. One may not expect it to be better.
- Over raw logits a large :math:`\lambda` makes the loss linear: its gradient does not fade as a sample is learnt and the logits
  grow without bound. Normalise, and tune the learning rate for each loss.
- The authors' code divides by the mean of the softplus in LDR-KL, but by the mean absolute logit in ALDR-KL, CIFAR-100 excepted.
  Here ``normalize`` says which, "softplus-mean" for both by default; "abs-mean" has unbounded gradients near zero logits, so a
  zero-initialised last layer does not go with it.
- The definition weighs by q, the code computes :math:`\lambda_i` from the scores without the margin: ``margin_in_weights``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from weightroom.errors import UsageError, check_range, unknown
from weightroom.losses.base import (
    ClassificationLoss,
    Reduction,
    check_index,
    classify,
    differences,
    eager,
    prepare,
    reduce,
    seen,
)

__all__ = ["ALDRKLLoss", "LDRKLLoss", "aldr_kl", "ldr_kl"]

Normalize = Literal["softplus-mean", "abs-mean"] | None

_LN2 = math.log(2.0)
_SMOOTH = 1e-5  # added to the weights before the logarithm, as in the authors' code
_FLOOR = {"softplus-mean": 1e-20, "abs-mean": 1e-4}  # least mean to divide by
_LEAST, _MOST = 1e-15, 1e30  # below and above, lambda is 0 and infinite to any precision
_FUSED_MOST = 100.0  # above it the fused value, lambda times a small difference, loses too many digits in float32


def ldr_kl(
    input: Tensor,
    target: Tensor,
    lam: float = 10.0,
    margin: float = 0.1,
    normalize: Normalize = "softplus-mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Functional form of :class:`LDRKLLoss`."""
    _check(lam, margin, normalize)
    return classify(
        lambda logits, labels: _psi(logits, labels, float(lam), margin, normalize),
        input, target, weight=weight, ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


class LDRKLLoss(ClassificationLoss):
    r"""Label-distributionally robust loss with the KL divergence.

    .. math::
        \psi_\lambda(f, y) = \max_{p \in \Delta_K} \sum_k p_k q_k - \lambda\, \mathrm{KL}(p \,\|\, 1/K)
        = \lambda \log \frac1K \sum_k e^{q_k / \lambda}, \qquad q_k = c\,[k \neq y] + g_k - g_y,

    where :math:`g` are the normalised logits. It decreases in :math:`\lambda`, from :math:`\max_k q_k` at 0 to the mean of q at
    infinity, both of which are computed as such. ``LDRKLLoss(1.0, 0.0, None)`` is cross entropy minus log K.

    Args:
        lam: :math:`\lambda` in [0, inf].
        margin: c >= 0.
        normalize: "softplus-mean" (:math:`g = s / \bar s` with s = softplus(f)), "abs-mean" (:math:`g = f / \overline{|f|}`,
            which does not change with the scale of f) or None (g = f). The largest logit stays the largest.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.

    Shapes and dtypes are those of ``nn.CrossEntropyLoss`` with class indices: input (N, K, ...) and target (N, ...), int64.

    Raises:
        TypeError: ``lam`` or ``margin`` is no number, ``input`` is not floating, ``target`` not int64.
        ValueError: ``lam`` or ``margin`` is negative, ``normalize`` unknown, shapes do not fit, K < 2, or a target out of range.
    """

    shown: ClassVar[tuple[str, ...]] = ("lam", "margin", "normalize")

    def __init__(
        self,
        lam: float = 10.0,
        margin: float = 0.1,
        normalize: Normalize = "softplus-mean",
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, weight, ignore_index)
        _check(lam, margin, normalize)
        self.lam = float(lam)
        self.margin = float(margin)
        self.normalize: Normalize = normalize

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns psi of each sample."""
        return _psi(logits, labels, self.lam, self.margin, self.normalize)


def aldr_kl(
    input: Tensor,
    target: Tensor,
    lam: Tensor,
    lam0: float = 10.0,
    alpha: float = 2.0,
    margin: float = 0.1,
    normalize: Normalize = "softplus-mean",
    *,
    margin_in_weights: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    r"""Functional form of a training step of :class:`ALDRKLLoss`, which says what the arguments mean.

    Args:
        input: logits, shape (N, K, ...).
        target: class indices, shape (N, ...), int64.
        lam: :math:`\lambda_i` of the samples of this batch after their last visit (``lam0`` before the first), shape (N,).
        lam0: > 0.
        alpha: > 1.
        margin: >= 0.
        normalize: "softplus-mean", "abs-mean" or None.
        margin_in_weights: compute the weights p from q instead of g.
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out.
        reduction: "none", "mean" or "sum".

    Returns:
        The loss, and the new :math:`\lambda_i`, shape (N,), without a gradient.
    """
    _check(lam0, margin, normalize, alpha)
    logits, labels, valid = prepare(input, target, weight, ignore_index)
    if lam.shape != target.shape[:1]:
        raise UsageError(f"lam must have shape {tuple(target.shape[:1])}, one for each sample, got {tuple(lam.shape)}")
    n_classes, log_k = logits.shape[1], math.log(logits.shape[1])
    with torch.no_grad():
        s, m = _scale(logits, normalize)
        old = lam.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - 1))
        z = s / (m * old)
        if margin_in_weights:
            z.scatter_(1, labels, z.gather(1, labels) - margin / old)
        p = (z.softmax(1) + _SMOOTH) / (1 + n_classes * _SMOOTH)
        kl = (log_k - torch.special.entr(p).sum(1, keepdim=True)).clamp(0, log_k)  # KL(p || 1/K)
        dims, here = tuple(range(1, logits.ndim)), valid.reshape(labels.shape)
        count = here.sum(dims, keepdim=True)
        kl = (kl * here).sum(dims, keepdim=True) / count
        new = torch.where(count > 0, lam0 * (1 - kl / (alpha * log_k)), old)
    psi = _psi(logits, labels, new, margin, normalize, scaled=(s, m), most=lam0)
    penalty = alpha * log_k / (2 * lam0) * (new - lam0).square().squeeze(1)
    return reduce(psi - penalty, labels, valid, weight, reduction), new.reshape(lam.shape)


class ALDRKLLoss(ClassificationLoss):
    r"""LDR-KL whose :math:`\lambda` adapts to each training sample: the loss of a step is

    .. math::
        \psi_{\lambda_i}(f, y) - \frac{\alpha \log K}{2 \lambda_0} (\lambda_i - \lambda_0)^2, \qquad
        \lambda_i \leftarrow \lambda_0 \Big(1 - \frac{\mathrm{KL}(p_i \,\|\, 1/K)}{\alpha \log K}\Big), \qquad
        p_i = \mathrm{softmax}(g / \lambda_i^{\text{last visit}}),

    one alternation towards the fixed point per visit, with :math:`\lambda_i` in :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`
    and no gradient through it. In eval mode it is ``LDRKLLoss(lam0)``, reads no index and writes nothing.

    Args:
        n_samples: size of the training set.
        lam0: :math:`\lambda_0` in (0, inf), the start of every :math:`\lambda_i`.
        alpha: > 1; how little :math:`\lambda_i` moves.
        margin: c >= 0.
        normalize: "softplus-mean", "abs-mean" (what the authors' code does here) or None, see :class:`LDRKLLoss`.
        margin_in_weights: compute :math:`p_i` from q, as the definition says, instead of g, as the authors' code does.
        reduction: "none", "mean" or "sum".
        weight: a weight for each class, shape (K,).
        ignore_index: target value to leave out; it moves no :math:`\lambda_i`.

    Call it as ``loss(input, target, index)`` with the samples' places in the data set, int64, shape (N,): what a shuffling loader
    yields must carry them. Samples with many positions, as in segmentation, have one :math:`\lambda_i`, from the mean KL of their
    positions. Of an index that is twice in a batch the last one is kept (on a GPU: one of them). The buffer ``lam`` of shape
    (n_samples,) is saved in the ``state_dict``; processes that train together have one each.

    Raises:
        TypeError: a hyper-parameter is no number, ``input`` is not floating, ``target`` or ``index`` not int64.
        ValueError: a hyper-parameter is out of range, ``index`` is missing in training mode, of the wrong shape or outside
            [0, n_samples) (checked on the CPU), or as in :class:`LDRKLLoss`.
    """

    #: The training loop must hand over the samples' data-set indices.
    needs_index: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("n_samples", "lam0", "alpha", "margin", "normalize", "margin_in_weights")
    lam: Tensor

    def __init__(
        self,
        n_samples: int,
        lam0: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalize = "softplus-mean",
        margin_in_weights: bool = False,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(reduction, weight, ignore_index)
        check_range("n_samples", n_samples, low=1, high=math.inf, open_high=True)
        if n_samples != int(n_samples):
            raise UsageError(f"n_samples must be an integer, got {n_samples}")
        _check(lam0, margin, normalize, alpha)
        self.n_samples = int(n_samples)
        self.lam0 = float(lam0)
        self.alpha = float(alpha)
        self.margin = float(margin)
        self.normalize: Normalize = normalize
        self.margin_in_weights = margin_in_weights
        self.register_buffer("lam", torch.full((self.n_samples,), self.lam0))

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """Returns the loss; in training mode also moves the samples' ``lam``."""
        options: dict[str, Any] = {"weight": self.weight, "ignore_index": self.ignore_index, "reduction": self.reduction}
        if not self.training:
            return ldr_kl(input, target, self.lam0, self.margin, self.normalize, **options)
        if index is None:
            raise UsageError("index is missing: in training mode ALDRKLLoss needs the samples' places in the data set")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be an int64 tensor, got {seen(index)}")
        if isinstance(target, Tensor) and index.shape != target.shape[:1]:
            raise UsageError(f"index must have shape {tuple(target.shape[:1])}, one for each sample, got {tuple(index.shape)}")
        check_index("index", index, self.n_samples)
        loss, new = aldr_kl(
            input, target, self.lam[index], self.lam0, self.alpha, self.margin, self.normalize,
            margin_in_weights=self.margin_in_weights, **options,
        )  # fmt: skip
        with torch.no_grad():
            self.lam[index] = new.to(self.lam.dtype)
        return loss


def _check(lam: float, margin: float, normalize: Normalize, alpha: float | None = None) -> None:
    if alpha is None:
        check_range("lam", lam, low=0.0)
    else:
        check_range("lam0", lam, low=0.0, high=math.inf, open_low=True, open_high=True)
        check_range("alpha", alpha, low=1.0, high=math.inf, open_low=True, open_high=True)
    check_range("margin", margin, low=0.0, high=math.inf, open_high=True)
    if normalize is not None and normalize not in _FLOOR:
        raise unknown("normalize", str(normalize), [*_FLOOR, "None"])


def _scale(logits: Tensor, normalize: Normalize) -> tuple[Tensor, Tensor]:
    """Returns s and m, of which g = s / m is the normalised output."""
    if normalize is None:
        return logits, torch.ones_like(logits[:, :1])
    s = F.softplus(logits) if normalize == "softplus-mean" else logits
    size = s if normalize == "softplus-mean" else s.abs()
    return s, size.mean(1, keepdim=True).clamp_min(_FLOOR[normalize])


def _psi(
    logits: Tensor,
    labels: Tensor,
    lam: float | Tensor,
    margin: float,
    normalize: Normalize,
    *,
    scaled: tuple[Tensor, Tensor] | None = None,
    most: float | None = None,
) -> Tensor:
    """Returns psi of each sample; ``lam`` is a number, or a tensor (N, 1, ...) of values up to ``most``."""
    if eager() and _LEAST < (lam if most is None else most) <= _FUSED_MOST:
        if scaled is None:
            with torch.no_grad():
                scaled = _scale(logits, normalize)
        return _FusedPsi.apply(logits, *scaled, labels, lam, margin, normalize)
    return _plain_psi(logits, labels, lam, margin, normalize)


def _plain_psi(logits: Tensor, labels: Tensor, lam: float | Tensor, margin: float, normalize: Normalize) -> Tensor:
    s, m = _scale(logits, normalize)
    q = differences(s / m, labels, margin)
    if isinstance(lam, float) and lam <= _LEAST:
        return q.amax(1)
    if isinstance(lam, float) and lam >= _MOST:
        return q.mean(1)
    z = q / lam
    top = z.detach().amax(1, keepdim=True)
    below = torch.expm1(z - top).mean(1, keepdim=True)  # mean_k exp(z_k - top) - 1, to full precision where all z are alike
    log_mean = torch.where(below > -0.5, below.log1p(), torch.logsumexp(z - top, 1, keepdim=True) - math.log(q.shape[1]))
    return (lam * (top + log_mean)).squeeze(1)


class _FusedPsi(torch.autograd.Function):
    r"""psi and its gradient in few passes over the (N, K) buffer.

    With z = g / (lam ln 2), less c / (lam ln 2) at the label, p = softmax(q / lam) is proportional to 2^z, and
    psi = lam ln 2 (log2 mean_k 2^{z_k} - z_y). The gradient in g is p - onehot(y); through g = s / m it is, in s,
    (p - onehot(y) - r) / m with r = (1/K) sum_k (p_k - [k = y]) g_k (times sign(f) for "abs-mean", where m = mean |f|).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, s: Tensor, m: Tensor, labels: Tensor, lam: float | Tensor, margin: float, normalize: Normalize
    ) -> Tensor:  # fmt: skip
        n_classes, unit = logits.shape[1], lam * _LN2
        per_unit = 1 / (m * unit)
        z = s.mul_(per_unit) if normalize == "softplus-mean" else s * per_unit  # the softplus is a buffer of our own
        z_y = z.gather(1, labels) - margin / unit
        z.scatter_(1, labels, z_y)
        top = z.amax(1, keepdim=True)
        e = torch.exp2(z.sub_(top))
        total = e.sum(1, keepdim=True)
        gap = top - z_y
        psi = unit * (gap + torch.log2(total / n_classes))
        if not ctx.needs_input_grad[0]:
            return psi.squeeze(1)
        if normalize is not None:
            p_y = e.gather(1, labels) / total
            r = (unit * (z.mul_(e).sum(1, keepdim=True) / total + gap) - margin * (1 - p_y)) / n_classes
            r *= (m > _FLOOR[normalize]) * total
        d = e.scatter_add_(1, labels, -total)  # from here on the gradient times m and the total, in the buffer of e
        if normalize == "softplus-mean":
            d.sub_(r)
            torch.ops.aten.softplus_backward.grad_input(d, logits, 1, 20, grad_input=d)
        elif normalize == "abs-mean":
            d.addcmul_(logits.sign(), r, value=-1)
        ctx.save_for_backward(logits, labels, d, m * total)
        ctx.lam, ctx.margin, ctx.normalize = lam, margin, normalize
        return psi.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, d, size = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: through the plain form, which can be differentiated again
            psi = _plain_psi(logits, labels, ctx.lam, ctx.margin, ctx.normalize)
            return (*torch.autograd.grad(psi, logits, grad, create_graph=True), *_NO_GRAD)
        return d * (grad.unsqueeze(1) / size), *_NO_GRAD


_NO_GRAD = (None,) * 6

r"""KL distributionally robust reduction: hard examples weigh more, by as much as a worst case says.

Instead of the mean of the losses of a batch, take the worst weighted mean that a reweighting of the data can bring about, when
moving away from equal weights costs its Kullback-Leibler divergence times a temperature r:

.. math::
    \max_{w \in \Delta} \sum_i w_i l_i - r \sum_i w_i \log(n w_i) = r \log \frac1n \sum_i e^{l_i / r},
    \qquad w_i = \frac{e^{l_i / r}}{\sum_j e^{l_j / r}}.

A large r gives the mean, a small one the single worst example. Reach for it with any loss that has a value per sample
(``reduction="none"``) where rare or hard groups matter more than the average.

The mean of exp(l / r) is over the data, not over a batch: weights from a batch alone ("batch") are biased where the batch is
small. "ema" keeps a running estimate u of it, the inner function of a compositional gradient.

Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, arXiv 2308.00311: the weights in
closed form (section 3) and the running estimate of the compositional method (section 4).

Known not to work: with wrong labels the weight goes to them. Where losses rise quickly u lags behind, the weights sum to more
than one (up to 1 / ema), and the step is longer than that of a mean; after such a batch u is large and all weights are next to
nothing for some 1 / ema batches and more. Training can break so for good: see ``max_weight``, or take a larger r.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightroom.errors import check_range, unknown

__all__ = ["KLDROReduction"]

Mode = Literal["ema", "batch", "none"]


class KLDROReduction(nn.Module):
    r"""Reduces losses per sample to a scalar whose gradient weighs sample i by exp(l_i / r).

    In training mode the value is :math:`\sum_i w_i l_i` with constant weights, so that the gradient with respect to the losses is
    w. In eval mode it is :math:`r \log \frac1N \sum_i e^{l_i / r}`, and nothing is remembered.

    Args:
        r: temperature > 0, in the unit of the losses.
        ema: share in (0, 1] of the batch in the running estimate ``u <- (1 - ema) u + ema mean(exp(l / r))``; u is the first
            batch's at first, and 1 is the same as mode "batch".
        mode: "ema": :math:`w_i = e^{l_i / r} / (N u)`; "batch": the softmax of l / r; "none": 1 / N, the plain mean.
        max_weight: the most that N w_i may be, > 0; None for no limit.

    Shapes:
        losses: (N,), floating; half precision is computed in float32.

    Raises:
        ValueError: an argument is out of range, or the losses are not of one dimension, or there are none.
        RuntimeError: a loss is NaN or infinite. It is looked for on the CPU; elsewhere, where looking would wait for the
            device, such a batch leaves ``log_u`` as it is.

    The buffer ``log_u`` (scalar, NaN until the first batch in training mode) is part of ``state_dict``.
    """

    log_u: Tensor

    def __init__(self, r: float = 1.0, ema: float = 0.1, mode: Mode = "ema", *, max_weight: float | None = None) -> None:
        super().__init__()
        check_range("r", r, low=0.0, open_low=True, open_high=True)
        check_range("ema", ema, low=0.0, high=1.0, open_low=True)
        if mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
        if max_weight is not None:
            check_range("max_weight", max_weight, low=0.0, open_low=True)
        self.r, self.ema, self.mode, self.max_weight = r, ema, mode, max_weight
        self.register_buffer("log_u", torch.tensor(math.nan))
        self._weights: Tensor | None = None

    def forward(self, losses: Tensor) -> Tensor:
        """Reduces ``losses`` (N,) to a scalar."""
        if losses.ndim != 1 or not len(losses):
            raise ValueError(f"losses must have shape (N,), one for each sample, got {tuple(losses.shape)}: say reduction='none'")
        if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
            raise RuntimeError("losses must be finite, got NaN or infinity")
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        if self.mode == "none":
            self._weights = torch.full_like(losses, 1 / len(losses)).detach()
            return losses.mean()
        if self.log_u.device != losses.device:
            self.log_u = self.log_u.to(losses.device)
        peak = losses.detach().amax()
        relative = (losses - peak) / self.r
        log_m = torch.log1p(torch.expm1(relative).mean())  # m = mean_B exp(l_i / r), all relative to the largest
        if not self.training:
            return peak + self.r * log_m
        self._weights = self._weigh(relative.detach(), log_m.detach(), peak / self.r)
        return (self._weights * losses).sum()

    def _apply(self, fn: Any, recurse: bool = True) -> KLDROReduction:
        """Keeps ``log_u`` in float32 or wider when the module is cast to half precision."""
        log_u = self.log_u
        super()._apply(fn, recurse)
        if self.log_u.dtype in (torch.float16, torch.bfloat16):
            self.log_u = log_u.to(self.log_u.device)
        return self

    def weights(self) -> Tensor:
        """Returns the weights w (N,) of the last batch in training mode; they sum to one in modes "batch" and "none".

        Raises:
            RuntimeError: there was no batch yet.
        """
        if self._weights is None:
            raise RuntimeError("there are no weights before the first batch in training mode")
        return self._weights

    def _weigh(self, relative: Tensor, log_m: Tensor, peak: Tensor) -> Tensor:
        log_u = log_m
        if self.mode == "ema":
            before = self.log_u.to(peak) - peak
            if self.ema < 1:
                running = torch.logaddexp(math.log1p(-self.ema) + before, math.log(self.ema) + log_m)  # u <- (1 - eta) u + eta m
                log_u = torch.where(torch.isnan(before), log_m, running)
            self.log_u.copy_(torch.where(torch.isfinite(log_u + peak), log_u + peak, self.log_u.to(peak)))
        weights = torch.exp(relative - log_u)  # N w_i = exp(l_i / r) / u
        if self.max_weight is not None:
            weights = weights.clamp_max(self.max_weight)
        return weights / len(weights)

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        limit = "" if self.max_weight is None else f", max_weight={self.max_weight:g}"
        return f"r={self.r:g}, ema={self.ema:g}, mode={self.mode!r}{limit}"

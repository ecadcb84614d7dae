"""SNIP: pruning at initialisation by connection sensitivity.

Each weight is scored by how fast the loss of one mini-batch changes as the weight is scaled away from 1 to 0, and the least
sensitive ones of the whole network go, before any training. A baseline of every study on pruning at initialisation; it works
on trained networks too, where magnitude is as good and needs no data.

Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, arXiv 1810.02340, eq. (5).

Known not to work: beyond about 99 % whole layers vanish, as with any one-shot global score; and it hardly matters which
weights are kept within a layer (shuffling a mask within its layers costs little), only how many per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightroom.metrics import copy_model
from weightroom.prune.base import PRUNABLE, PlanPruner, ScheduleSpec, check_finite, labelled, needed, seeded
from weightroom.prune.plan import Site, call, sites

__all__ = ["SNIPPruner"]


class SNIPPruner(PlanPruner):
    r"""Ranks the whole network by :math:`|w \, \partial L / \partial w|`.

    With a multiplier c = 1 on each weight, :math:`\partial L / \partial c = w \, \partial L / \partial w` (eq. 5); the paper
    divides by the sum over the network, which changes no rank.

    The pass runs in the mode that the model is in: in training mode batch norms use the batch's own statistics, as in the
    paper, and dropout draws under ``seed``. The model's buffers stay as they were in either mode.

    Args:
        sparsity: see ``PlanPruner``.
        batches: how many batches of the data to use, 1 in the paper; None for all. Their gradients are averaged, each batch
            weighted by its size, before the absolute value is taken.
        seed: of torch's random state during the pass, which is restored afterwards; it decides what a shuffling loader gives.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``.

    Raises:
        TypeError: ``fit`` gets no ``data`` or no ``loss_fn``, or data that does not give batches (inputs, targets).
        ValueError: an argument is out of range; there is no batch; the loss is not finite; no weight has a gradient.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        batches: int | None = 1,
        seed: int = 0,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be >= 1 or None, got {batches}")
        self.batches, self.seed = batches, seed

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        data, loss_fn = needed("SNIPPruner", data, loss_fn)
        gradients = _mean_gradients(model, [site.name for site in tensors], data, loss_fn, self.batches, self.seed)
        scores = []
        for site, gradient in zip(tensors, gradients, strict=True):
            score = (site.tensor.detach() * gradient).abs()  # eq. (5)
            check_finite(f"the sensitivity of {site.name!r}", score)
            scores.append(score.float() if score.dtype in (torch.float16, torch.bfloat16) else score)
        if not any(bool(score.any()) for score in scores):
            raise ValueError("the loss has no gradient in any prunable weight: connection sensitivity cannot rank them")
        return scores


def _mean_gradients(
    model: nn.Module, names: Sequence[str], data: Iterable[Any], loss_fn: Callable[..., Tensor], batches: int | None, seed: int
) -> list[Tensor]:
    """Gradients of the mean loss over the first ``batches`` batches, taken on a copy of the model."""
    copy = copy_model(model)
    known = sites(copy)
    weights: list[Tensor] = [known[name].tensor.requires_grad_() for name in names]
    device = weights[0].device
    sums, samples = [torch.zeros_like(weight) for weight in weights], 0
    with seeded(seed), torch.enable_grad():
        for i, (inputs, targets) in enumerate(labelled(data, device)):
            loss = loss_fn(call(copy, inputs), targets)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of batch {i} is {float(loss.detach())}")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(sums, gradients, alpha=len(targets))
            samples += len(targets)
            if batches is not None and i + 1 == batches:
                break
    if not samples:
        raise ValueError("data holds no batch")
    torch._foreach_div_(sums, samples)
    return sums

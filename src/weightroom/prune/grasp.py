r"""GraSP: pruning at initialisation so that the gradient keeps flowing.

Each weight is scored by what its removal does to the norm of the gradient, to first order; those whose removal would lower it
most are kept, before any training. A baseline of every study on pruning at initialisation.

Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, arXiv 2002.07376, eq. (8)
and algorithm 1.

Known not to work: on a trained network, whose gradient is noise. Below about 90 % sparsity magnitude pruning after training and
SNIP are better, and as with SNIP it hardly matters which weights are kept within a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightroom.errors import check_range
from weightroom.metrics import copy_model
from weightroom.prune.base import PRUNABLE, PlanPruner, ScheduleSpec, check_finite, labelled, needed, seeded
from weightroom.prune.plan import Site, call, sites

__all__ = ["GraSPPruner"]


class GraSPPruner(PlanPruner):
    r"""Ranks the whole network by :math:`\theta \odot H g`, g the gradient and H the Hessian of the loss, and keeps the largest.

    Removing the weight :math:`\theta_q` changes :math:`g^\top g` by :math:`-2 \theta_q (H g)_q` to first order (eq. 8): what is
    removed first is what raises the norm of the gradient when it goes.

    The passes run in the mode that the model is in; its buffers stay as they were. They need a loss that can be differentiated
    twice.

    Args:
        sparsity: see ``PlanPruner``.
        batches: how many batches of the data to use, 1 in the paper (ten images of each class); None for all.
        temperature: > 0, divides the model's outputs; the authors' code has 200, which keeps a softmax from saturating.
        seed: of torch's random state during the passes, which is restored afterwards.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``.

    Raises:
        TypeError: ``fit`` gets no ``data`` or no ``loss_fn``, or data that does not give batches (inputs, targets).
        ValueError: an argument is out of range; there is no batch; the loss is not finite; no weight has a score.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        batches: int | None = 1,
        temperature: float = 200.0,
        seed: int = 0,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be >= 1 or None, got {batches}")
        check_range("temperature", temperature, low=0.0, open_low=True, open_high=True)
        self.batches, self.temperature, self.seed = batches, temperature, seed

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        data, loss_fn = needed("GraSPPruner", data, loss_fn)
        products = self._hessian_times_gradient(model, [site.name for site in tensors], data, loss_fn)
        scores = []
        for site, Hg in zip(tensors, products, strict=True):
            score = site.tensor.detach() * Hg  # eq. (8) with the sign turned: the largest are kept
            score = score.real if score.is_complex() else score
            check_finite(f"the score of {site.name!r}", score)
            scores.append(score.float() if score.dtype in (torch.float16, torch.bfloat16) else score)
        if not any(bool(score.any()) for score in scores):
            raise ValueError("the loss has no curvature in any prunable weight: gradient flow cannot rank them")
        return scores

    def _hessian_times_gradient(
        self, model: nn.Module, names: Sequence[str], data: Iterable[Any], loss_fn: Callable[..., Tensor]
    ) -> list[Tensor]:
        """H g of the mean loss over the batches, on a copy of the model: one pass for g, another for H times it."""
        copy = copy_model(model)
        known = sites(copy)
        weights: list[Tensor] = [known[name].tensor.requires_grad_() for name in names]
        device = weights[0].device
        with seeded(self.seed):
            batches = list(itertools.islice(labelled(data, device), self.batches))
        if not batches:
            raise ValueError("data holds no batch")
        samples = sum(len(targets) for _, targets in batches)

        def gradients(inputs: Any, targets: Tensor, again: bool) -> tuple[Tensor, ...]:
            loss = loss_fn(call(copy, inputs) / self.temperature, targets) * (len(targets) / samples)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss is {float(loss.detach())}")
            return torch.autograd.grad(loss, weights, create_graph=again, allow_unused=True, materialize_grads=True)

        g, Hg = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            with seeded(self.seed):
                for inputs, targets in batches:
                    torch._foreach_add_(g, gradients(inputs, targets, False))
            with seeded(self.seed):  # the same dropout masks in both passes
                for inputs, targets in batches:
                    inner = sum((a * b).sum() for a, b in zip(gradients(inputs, targets, True), g, strict=True))
                    if isinstance(inner, Tensor) and inner.requires_grad:
                        torch._foreach_add_(Hg, torch.autograd.grad(inner, weights, allow_unused=True, materialize_grads=True))
        return Hg

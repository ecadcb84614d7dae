r"""M-FAC pruning: the optimal brain surgeon with an empirical Fisher matrix, for networks of any size.

A weight is worth what the loss gains when it goes and all others make up for it, by a quadratic model whose Hessian is the
damped Fisher matrix of m gradients. The weights that stay are corrected, so that accuracy right after the cut is far above that
of magnitude pruning at high sparsity; a few rounds of cutting, each with new gradients, matter as much as the correction.

Reach for it to prune a trained network in one go with a little data and no fine-tuning, or gradually with ``gradual``. Where the
network is fine-tuned for long afterwards, most of the lead over magnitude is gone.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021, arXiv
2107.03356, section 3.1 and the authors' pruning script: the defaults are the script's. Its loop over gradients ends one early and
leaves the last row zero; here all m rows are gradients.

Known not to work: one cut from dense to a high sparsity. The updates of single weights are summed as if the others that go did
not exist, which holds only while few go at a time; so keep ``recomputations``. The network should be near a minimum: the
quadratic model has no linear term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightroom.curvature import EmpiricalFisherInverse
from weightroom.curvature.fisher import check_block_size
from weightroom.errors import check_range
from weightroom.metrics import copy_model
from weightroom.prune.base import (
    PRUNABLE,
    PlanPruner,
    ScheduleSpec,
    check_finite,
    labelled,
    needed,
    prunable,
    remove_smallest,
    seeded,
    successive_sparsities,
)
from weightroom.prune.plan import Inputs, PruningPlan, Site, call, sites

__all__ = ["MFACPruner"]


class MFACPruner(PlanPruner):
    r"""Removes the weights of least saliency in R rounds and corrects the others; all layers are ranked together.

    In each round, over the vector w of the weights that are still there, Q being the n of least :math:`\rho`:

    .. math::
        \rho_k = \frac{w_k^2}{2 [F^{-1}]_{kk}}, \qquad
        t_k = -\frac{w_k}{[F^{-1}]_{kk}} \text{ for } k \in Q, \text{ else } 0, \qquad
        w \leftarrow w + F^{-1} t, \qquad w_Q \leftarrow 0

    where F is the Fisher matrix of m gradients, each of the mean loss of one batch, taken anew in each round, in eval mode. The
    density falls by the same factor in every round. The corrections are the plan's ``deltas``.

    Args:
        sparsity: see ``PlanPruner``.
        window: m >= 1, gradients per round. Where the data has fewer batches they are gone through again.
        damping: :math:`\lambda` > 0.
        block_size: F is cut to diagonal blocks of so many consecutive weights; None or -1 for one block. 1 is a diagonal F, and
            nothing is corrected.
        recomputations: R >= 1, rounds.
        seed: of torch's random state meanwhile, which is restored afterwards; it decides what a shuffling loader gives.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``; each of its prunings takes all R rounds.

    ``fit`` needs ``data``, batches (inputs, targets) of the size that one gradient should see (32 in the paper), and
    ``loss_fn``, a mean over the batch. It costs R m forward and backward passes and memory for m gradients, in float64 for the
    larger of m and the width of a block.

    Raises:
        TypeError: ``fit`` gets no ``data`` or no ``loss_fn``, or data that does not give batches (inputs, targets).
        ValueError: an argument is out of range; more is pruned already than asked for; there is no batch; the loss or a
            gradient is not finite.
    """

    def __init__(
        self,
        sparsity: float,
        window: int = 64,
        damping: float = 1e-5,
        block_size: int | None = 128,
        recomputations: int = 16,
        *,
        seed: int = 0,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        for name, value in (("window", window), ("recomputations", recomputations)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_range("damping", damping, low=0.0, open_low=True, open_high=True)
        check_block_size(block_size)
        self.window, self.damping, self.block_size, self.recomputations = window, damping, block_size, recomputations
        self.seed = seed

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> PruningPlan:
        """Plans which weights go and how the others change; see ``PlanPruner.fit``.

        An iterator of batches is kept and gone through again if it ends early.
        """
        tensors = prunable(model, self.targets, self.ignore)
        removed = self._count(tensors)
        for site in tensors:
            check_finite(repr(site.name), site.tensor.detach())
        data, loss_fn = needed("MFACPruner", data, loss_fn)
        copy = _evaluated(model)
        known = sites(copy)
        weights = [known[site.name].tensor.requires_grad_() for site in tensors]
        device = weights[0].device
        masks = [torch.ones_like(site.tensor, dtype=torch.bool) if site.mask is None else site.mask for site in tensors]
        alive = torch.cat([mask.reshape(-1) for mask in masks]).nonzero().flatten()
        with seeded(self.seed), torch.enable_grad():
            batches = _endless(data, device)
            for kept in self._rounds(sum(w.numel() for w in weights), len(alive), removed):
                G = _gradients(copy, weights, alive, batches, loss_fn, self.window)
                alive = self._cut(weights, alive, G, len(alive) - kept)
        keep = torch.zeros(sum(w.numel() for w in weights), dtype=torch.bool, device=device).index_fill_(0, alive, True)
        kept_masks = keep.split([w.numel() for w in weights])
        deltas = {site.name: w.detach() - site.tensor.detach() for site, w in zip(tensors, weights, strict=True)}
        return PruningPlan(
            {site.name: mask.view(site.tensor.shape) for site, mask in zip(tensors, kept_masks, strict=True)},
            deltas={name: delta for name, delta in deltas.items() if bool(delta.any())},
            model=model,
            example_inputs=example_inputs,
        )

    def prune(
        self,
        model: nn.Module,
        sparsity: float,
        loss_fn: Callable[..., Tensor],
        data: Iterable[Any],
        parameters: Iterable[str | nn.Parameter] | None = None,
    ) -> PruningPlan:
        """Plans for ``sparsity`` and prunes ``model`` in place, under the names of ``torch.nn.utils.prune``.

        Args:
            model: changed in place.
            sparsity: takes the place of the pruner's own.
            loss_fn: see ``fit``.
            data: see ``fit``.
            parameters: which to prune, by name or as they are; those of ``targets`` when None.

        Returns:
            The plan, already applied.

        Raises:
            ValueError: a parameter is not the model's, and as ``fit``.
        """
        pruner = self.at(sparsity)
        if parameters is not None:
            known = {id(site.tensor): site.name for site in sites(model).values()}
            names = [p if isinstance(p, str) else known.get(id(p)) for p in parameters]
            if None in names:
                raise ValueError("parameters: one of them is not a parameter of the model")
            pruner.targets = [name for name in names if name is not None]
        plan = pruner.fit(model, data, loss_fn=loss_fn)
        plan.apply(model)
        return plan

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        raise NotImplementedError("M-FAC scores weights anew in each round: see fit")

    def _rounds(self, total: int, alive: int, removed: int) -> Iterator[int]:
        """How many weights are kept after each round; rounds in which nothing goes are left out."""
        start = min(1 - alive / total, self.sparsity)
        for sparsity in successive_sparsities(self.sparsity, self.recomputations, start=start):
            kept = total - (removed if sparsity == self.sparsity else min(round(sparsity * total), removed))
            if kept < alive:
                yield kept
                alive = kept

    @torch.no_grad()
    def _cut(self, weights: Sequence[Tensor], alive: Tensor, G: Tensor, n: int) -> Tensor:
        """Removes n of the weights that are alive and corrects the others; returns the indices of what is left."""
        inverse = EmpiricalFisherInverse(G, self.damping, self.block_size)
        flat = torch.cat([w.reshape(-1).to(G.device, torch.float64) for w in weights])
        w, diagonal = flat[alive], inverse.diag().to(torch.float64)
        rho = w.square() / (2 * diagonal)
        stays = remove_smallest([rho], [None], n)[0]
        t = torch.where(stays, 0.0, -w / diagonal)
        flat[alive] = torch.where(stays, w + inverse.mul(t), 0.0)
        for weight, values in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.copy_(values.view(weight.shape))
        return alive[stays]


def _evaluated(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, whose recurrent layers can be differentiated there (cuDNN does that in training only)."""
    copy = copy_model(model).eval()
    for module in copy.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
            module.training = True
    return copy


def _endless(data: Iterable[Any], device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches over and over; those of an iterator, which can be read once, are kept."""
    once = isinstance(data, Iterator)
    kept: list[tuple[Inputs, Tensor]] = []
    for batch in labelled(data, device):
        kept += [batch] if once else []
        yield batch
    while True:
        again = None
        for again in kept if once else labelled(data, device):
            yield again
        if again is None:
            raise ValueError("data holds no batch")


def _gradients(
    model: nn.Module, weights: Sequence[Tensor], alive: Tensor, batches: Iterator[Any], loss_fn: Callable[..., Tensor], m: int
) -> Tensor:
    """G, (m, number alive): the gradients of the mean loss of m batches in the weights that are alive."""
    device, dtype = weights[0].device, torch.float32
    for w in weights:
        dtype = torch.promote_types(dtype, w.dtype)
    G = torch.empty((m, len(alive)), dtype=dtype, device=device)
    for i, row in enumerate(G):
        inputs, targets = next(batches)
        loss = loss_fn(call(model, inputs), targets)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss of batch {i} is {float(loss.detach())}")
        grads = torch.autograd.grad(loss, list(weights), allow_unused=True, materialize_grads=True)
        row.copy_(torch.cat([g.reshape(-1).to(device, dtype) for g in grads])[alive])
    return G

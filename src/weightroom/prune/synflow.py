r"""SynFlow: pruning at initialisation without data, so that flow through the network is kept.

Each weight is scored by the sum over all paths through it of the products of absolute weights, and the network is cut in a
hundred small steps, scored anew after each. Reach for it where SNIP and GraSP empty whole layers, or where there are no data
yet. A baseline of every study on pruning at initialisation.

Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020,
arXiv 2006.05467, algorithm 1.

Known not to work: well before the extremes magnitude pruning after training is better, and which weights are kept within a
layer hardly matters (``shuffle_masks``). In one step instead of many it collapses layers as other scores do. Where the network
is not piecewise linear the score is no sum over paths: queries and keys of attention have next to none (all tokens of an
all-ones input are alike) and go first, so name them in ``ignore``; gates of recurrent layers saturate. The authors' code takes
absolute values of biases and runs batch norms with their statistics, so that it is data-free only before training, works in
float32, which overflows on deep networks, and its ``shuffle`` changes nothing; here biases are zero, norms are the identity,
and all is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from weightroom.metrics import copy_model
from weightroom.prune.base import (
    PRUNABLE,
    PlanPruner,
    ScheduleSpec,
    check_finite,
    prunable,
    remove_smallest,
    successive_sparsities,
)
from weightroom.prune.plan import Inputs, PruningPlan, Site, call, sites
from weightroom.prune.shrink import _tensors

__all__ = ["SynFlowPruner"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class SynFlowPruner(PlanPruner):
    r"""Ranks the whole network by :math:`\theta \odot \partial R / \partial \theta`, round after round.

    .. math:: R = 1^\top \big( \textstyle\prod_l |\theta_l \odot M_l| \big) 1

    R is what the network says, summed, to an all-ones input with absolute weights, biases 0 and norms left out. In a network
    of ReLUs without biases the scores of every layer add up to R. After round r of n the share :math:`d^{r/n}` of what
    is there at the start is left, d the share at the end.

    Args:
        sparsity: see ``PlanPruner``.
        rounds: n >= 1, 100 in the paper.
        targets: see ``PlanPruner``.
        ignore: see ``PlanPruner``.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``; each of its prunings takes all rounds.

    ``fit`` reads nothing of ``data`` and ``example_inputs`` but the shapes of one sample (integers stay as they are: they may
    be indices); ``loss_fn`` is not used. Kept sets of different sparsities need not nest.

    Raises:
        TypeError: ``fit`` gets neither ``example_inputs`` nor ``data``.
        ValueError: an argument is out of range; a score overflows; no weight has a score.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        rounds: int = 100,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise ValueError(f"rounds must be an integer >= 1, got {rounds!r}")
        self.rounds = rounds

    def fit(
        self,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        example_inputs: Inputs | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> PruningPlan:
        """Plans which weights go; see ``PlanPruner.fit``."""
        tensors = prunable(model, self.targets, self.ignore)
        removed = self._count(tensors)
        for site in tensors:
            check_finite(repr(site.name), site.tensor.detach())
        inputs = _shapes_from(data) if example_inputs is None else example_inputs
        flow = _Flow(model, tensors, inputs)
        total = sum(site.tensor.numel() for site in tensors)
        masks = [torch.ones_like(site.tensor, dtype=torch.bool) if site.mask is None else site.mask for site in tensors]
        start = gone = total - sum(int(torch.count_nonzero(mask)) for mask in masks)
        for sparsity in successive_sparsities(self.sparsity, self.rounds, start=min(start / total, self.sparsity)):
            target = min(max(round(sparsity * total), gone), removed)
            if target > gone:
                scores = flow.scores(masks)
                if gone == start and not any(bool(score.any()) for score in scores):
                    raise ValueError("no synaptic flow reaches the output: it cannot rank the weights")
                masks = remove_smallest(scores, masks, target)
                gone = target
        return PruningPlan(
            {site.name: mask for site, mask in zip(tensors, masks, strict=True)}, model=model, example_inputs=example_inputs
        )

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        raise NotImplementedError("SynFlow scores weights anew in each round: see fit")


class _Flow:
    """A copy of the model with absolute weights, biases 0 and norms left out, and the ones that go through it."""

    def __init__(self, model: nn.Module, tensors: Sequence[Site], inputs: Inputs) -> None:
        self.model = copy_model(model).double().eval().requires_grad_(False)
        known = sites(self.model)
        with torch.no_grad():
            for site in known.values():
                bias = all("bias" in attribute for _, _, attribute in site.places)
                site.tensor.copy_(torch.zeros_like(site.tensor) if bias else site.tensor.abs())
        for module in self.model.modules():
            if isinstance(module, _NORMS):
                module.register_forward_hook(lambda module, args, output: args[0])
        self.names = [site.name for site in tensors]
        self.weights: list[Tensor] = [known[name].tensor.requires_grad_() for name in self.names]
        self.inputs = _ones(inputs, _batch(inputs), self.weights[0].device)

    def scores(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The scores with the weights outside ``masks`` gone for good."""
        with torch.no_grad():
            for weight, mask in zip(self.weights, masks, strict=True):
                weight.mul_(mask)
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN has no backward pass of a RNN in eval mode
            R: Any = sum(out.abs().sum() if out.is_complex() else out.sum() for out in _tensors(call(self.model, self.inputs)))
            gradients = torch.autograd.grad(R, self.weights, allow_unused=True, materialize_grads=True)
        scores = [(weight.detach() * gradient).abs() for weight, gradient in zip(self.weights, gradients, strict=True)]
        for name, score in zip(self.names, scores, strict=True):
            check_finite(f"the synaptic flow through {name!r}", score)
        return scores


def _shapes_from(data: Iterable[Any] | None) -> Inputs:
    batch = None if data is None else next(iter(data), None)
    if batch is None:
        raise TypeError("SynFlow needs the shape of one input: give example_inputs, or data with a batch (inputs, targets)")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _batch(inputs: Any) -> int | None:
    """The samples of the first tensor that has a batch axis."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, list | tuple) else [inputs]
    for part in parts:
        if isinstance(part, Tensor) and part.ndim > 1:
            return len(part)
        if isinstance(part, Mapping | list | tuple) and (size := _batch(part)) is not None:
            return size
    return None


def _ones(inputs: Any, batch: int | None, device: torch.device) -> Any:
    """One sample of ones in float64 in place of each floating-point tensor."""
    if isinstance(inputs, Tensor):
        one = inputs[:1] if inputs.ndim > 1 and len(inputs) == batch else inputs
        return torch.ones(one.shape, dtype=torch.float64, device=device) if one.is_floating_point() else one.to(device)
    if isinstance(inputs, Mapping):
        return {name: _ones(value, batch, device) for name, value in inputs.items()}
    return [_ones(value, batch, device) for value in inputs] if isinstance(inputs, list | tuple) else inputs

r"""SAM: step from w with the gradient of the worst point nearby.

Any optimizer of torch is given the gradient at :math:`w + \epsilon` instead of that at w, where :math:`\epsilon` is the step of
length :math:`\rho` that raises the loss most, to first order. The weights end where the loss stays low around them.

.. math:: \epsilon = \rho\, \frac{T_w^2\, g}{\|T_w\, g\|_2}, \qquad g = \nabla f(w), \qquad
          T_w = 1 \text{ (SAM)},\quad |w| \text{ (adaptive)}

Reach for it where two passes per step are affordable: for a little accuracy, more under label noise, or as the temperature of a
network that will be pruned (``weightroom.diagnostics``): a larger :math:`\rho` is a higher temperature.

Known not to work, or to mind: a step costs twice the passes of the base optimizer, so compare at equal passes, and holds one more
copy of the weights. Batch norm sees every batch twice, the second time at weights that are then left; re-estimate its statistics,
or let the closure freeze them in its second call, where that matters. ``adaptive`` needs a :math:`\rho` about ten times as large.
The worst direction of a large batch is gentler than that of its parts, which is what the authors perturb by. The scaling of
gradients for float16 must be undone in the closure.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv 2010.01412, eq. (2); adaptive: Kwon, Kim, Park, Choi, "ASAM", ICML 2021, arXiv 2102.11600.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT

from weightroom.errors import check_range
from weightroom.optim.base import check_dense

__all__ = ["SAM"]

#: Added to the norm of the gradient, as the authors do.
TINY = 1e-12


class SAM(Optimizer):
    """Sharpness-aware minimisation around another optimizer.

    Args:
        params: parameters or groups, as for any torch optimizer; a group may have its own ``rho`` and ``adaptive``, and whatever
            groups of ``base`` may have.
        base: the optimizer that takes the step: a class, or what makes one of param groups and ``base_kwargs``.
        rho: length of the perturbation, >= 0, of all groups' weights together where they share it; 0 is ``base`` itself.
        adaptive: perturb each weight in proportion to its size (ASAM).
        **base_kwargs: of ``base`` (``lr``, ``momentum``, ...).

    ``step(closure)`` calls the closure twice, at the weights and at the perturbed ones; each time it clears the gradients,
    computes the loss, and calls ``backward``. It returns the loss at the weights and leaves the gradients of the second call.
    State and param groups are those of ``base``, so that ``state_dict`` holds its momentum and schedulers reach it. A state dict
    of ``base`` alone can be loaded too: each group then keeps its ``rho`` and ``adaptive``.

    Raises:
        ValueError: ``rho`` is out of range, or ``step`` gets no closure.
        RuntimeError: a gradient is sparse.

    Example::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)
    """

    needs_closure: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        base: Callable[..., Optimizer] = SGD,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        check_range("rho", rho, low=0.0, open_high=True)
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        self.base = base(self.param_groups, **base_kwargs)
        self.defaults |= self.base.defaults
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self._kept: dict[Tensor, Tensor] = {}  # room for the weights while they are perturbed; new memory is slow on a CPU

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to this optimizer and to its base, which share their groups."""
        if isinstance(param_group, dict):
            check_range("rho", param_group.get("rho", self.defaults["rho"]), low=0.0, open_high=True)
        super().add_param_group(param_group)
        if hasattr(self, "base"):
            self.base.add_param_group(self.param_groups.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group, present in zip(state["param_groups"], getattr(self, "param_groups", ()), strict=False):
            group.setdefault("rho", present["rho"])
            group.setdefault("adaptive", present["adaptive"])
        super().__setstate__(state)
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._kept = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: clears the gradients, computes the loss of the batch, calls ``backward`` and returns the loss.

        Returns:
            The loss at the weights before the step.
        """
        if closure is None:
            raise ValueError("SAM.step needs a closure: it computes the gradient a second time, at the perturbed weights")
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved, kept = self._perturb()
        if moved:
            try:
                closure()
            finally:
                torch._foreach_copy_(moved, kept)
        self.base.step()
        return loss

    def _perturb(self) -> tuple[list[Tensor], list[Tensor]]:
        """Moves the weights by epsilon and uses their gradients up; returns what was moved and copies of what it was."""
        groups = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in weights]
            check_dense(grads, "SAM")
            if weights:
                groups.append((group, weights, grads))
        moved = [p for group, weights, _ in groups if group["rho"] > 0 for p in weights]
        if not moved:
            return [], []
        kept = [self._room(p) for p in moved]
        torch._foreach_copy_(kept, moved)
        norms: list[Tensor] = []
        for group, weights, grads in groups:
            if group["adaptive"]:
                scales = torch._foreach_abs(weights)
                torch._foreach_mul_(grads, scales)  # T_w g
            norms += torch._foreach_norm(grads, 2, dtype=_widest(grads))
            if group["adaptive"]:
                torch._foreach_mul_(grads, scales)  # T_w^2 g
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, _widest(norms)) for n in norms]))
        for group, weights, grads in groups:
            rho = -group["rho"] if group.get("maximize") else group["rho"]
            if rho:
                for device in {g.device for g in grads}:
                    torch._foreach_mul_([g for g in grads if g.device == device], (rho / (norm + TINY)).to(device))
                torch._foreach_add_(weights, grads)  # w + epsilon
        self.zero_grad()
        return moved, kept

    def _room(self, p: Tensor) -> Tensor:
        kept = self._kept.get(p)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (p.shape, p.dtype, p.device):
            kept = self._kept[p] = torch.empty_like(p)
        return kept


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)

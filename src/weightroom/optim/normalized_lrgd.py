r"""Normalized LR+GD: full-batch gradient descent on the logistic loss, divided by the mean wrongness, with very large steps.

For two linearly separable classes gradient descent on the logistic loss (LR+GD) separates at any step size; divided by it, the
iterates tend to those of a batch perceptron as it grows. Dividing each step by the mean of the :math:`\sigma(-m_i)` lowers the
bound on the steps from :math:`n R^2 / \mu^2` to :math:`R^2 / \mu^2` (R the longest row, mu the margin).

Reach for it to train a linear layer on features until it separates, above all where one class is rare, on whatever device
they are; ``weightroom.estimators.NormalizedLogisticGD`` is the same for arrays, and knows when to stop.

Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes", AAAI 2025,
arXiv 2412.08424. Its theory is for linear models without an intercept, started from 0, separable data and the full batch.
Networks, other starts and minibatches are an extension outside the paper.

Known not to work: data that cannot be separated (it never settles, at any constant step size); balanced classes (not reliably
faster than LR+GD); deep networks at learning rates that are good for linear models. Nothing is left of calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightroom.errors import UsageError, check_range, unknown
from weightroom.optim.base import check_dense

__all__ = ["NormalizedLRGD"]

Limit = Literal["none", "batch", "online"]


def _weights(m: Tensor, normalize: bool, limit: Limit) -> Tensor:
    r"""The w of a step :math:`\theta \leftarrow \theta + \gamma \sum_i w_i \nabla m_i`, shape (n,), given the margins m."""
    if limit == "none":
        return F.logsigmoid(-m).softmax(0) if normalize else torch.sigmoid(-m) / len(m)  # s_i / sum_j s_j or s_i / n
    wrong = (~(m > 0)).to(m.dtype)  # S_t
    if limit == "online":
        return wrong * (wrong.cumsum(0) == 1)  # one row of S_t, the first
    return wrong / (wrong.sum().clamp_min(1) if normalize else len(m))


class NormalizedLRGD(Optimizer):
    r"""Steps on margins: Normalized LR+GD, LR+GD, and the perceptrons that they tend to.

    .. math:: \theta \leftarrow \theta + \gamma \sum_i w_i \nabla m_i(\theta), \qquad m_i = y_i h_\theta(a_i), \quad y_i = \pm 1.

    ========  =========  ============================================================================================
    limit     normalize  weights, with :math:`s_i = \sigma(-m_i)` and :math:`S_t` the rows with :math:`m_i \le 0`
    ========  =========  ============================================================================================
    "none"    True       Normalized LR+GD: :math:`s_i / \sum_j s_j`
    "none"    False      LR+GD: :math:`s_i / n`
    "batch"   True       Normalized Batch Perceptron: :math:`1 / |S_t|` on :math:`S_t`
    "batch"   False      Batch Perceptron: :math:`1 / n` on :math:`S_t`, half of it in a group's first step
    "online"  either     Perceptron: 1 on the first row of :math:`S_t`
    ========  =========  ============================================================================================

    Args:
        params: parameters, or groups of them with ``lr`` of their own, as for any torch optimizer.
        lr: step size :math:`\gamma` > 0; the paper's results are nearly flat from 1 to 100. The paper's perceptrons have 1.
        normalize: see the table; the same in all groups.
        limit: see the table; the same in all groups.

    ``step`` takes a closure that returns the margins of the whole batch, shape (n,), and neither calls ``backward`` nor clears
    gradients: ``.grad`` is not used. It returns the mean logistic loss before the step. The limits stand still once all margins
    are > 0; the others go on, so stop there. A closure of this kind does not go with ``DistributedDataParallel`` or a
    ``GradScaler``, which watch ``backward``.

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range or unknown, differs between groups where it may not, ``step``
            gets no closure, or what it returns are no margins.
        TypeError: ``lr`` is no number.
        RuntimeError: from ``step``: a gradient is sparse.

    Example::

        optimizer = NormalizedLRGD(model.parameters(), lr=10.0)
        for _ in range(1000):
            loss = optimizer.step(lambda: y * model(a).squeeze(1))  # y in {-1, 1}
    """

    def __init__(self, params: ParamsT, lr: float = 10.0, normalize: bool = True, limit: Limit = "none") -> None:
        if limit not in get_args(Limit):
            raise unknown("limit", limit, get_args(Limit))
        super().__init__(params, {"lr": lr, "normalize": normalize, "limit": limit, "started": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with a learning rate of its own where it gives one."""
        if isinstance(param_group, dict):
            given = {**self.defaults, **param_group}
            check_range("lr", given["lr"], low=0.0, open_low=True, open_high=True)
            for name in ("normalize", "limit"):
                if given[name] != self.defaults[name]:
                    raise UsageError(f"{name} must be the same in all groups, {self.defaults[name]!r}, got {given[name]!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: returns the margins of the full batch, shape (n,), attached to their graph.

        Returns:
            The mean logistic loss of these margins, a detached scalar.
        """
        if closure is None:
            raise UsageError("NormalizedLRGD.step needs a closure that returns the margins y * h(a), shape (n,)")
        with torch.enable_grad():
            margins = closure()
        if not isinstance(margins, Tensor) or not margins.is_floating_point() or margins.ndim != 1 or not len(margins):
            got = f"{margins.dtype} of shape {tuple(margins.shape)}" if isinstance(margins, Tensor) else type(margins).__name__
            raise UsageError(f"the closure of NormalizedLRGD.step must return margins, floating, shape (n,), n >= 1, got {got}")
        m = margins.detach().to(torch.promote_types(margins.dtype, torch.float32))
        if margins.requires_grad:
            self._ascend(margins, m)
        return F.softplus(-m).mean()

    def _ascend(self, margins: Tensor, m: Tensor) -> None:
        normalize, limit = self.param_groups[0]["normalize"], self.param_groups[0]["limit"]
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            return
        w = _weights(m, normalize, limit).to(margins.dtype)
        found = dict(zip(params, torch.autograd.grad(margins, params, w, allow_unused=True), strict=True))
        check_dense((g for g in found.values() if g is not None), "NormalizedLRGD")
        for group in self.param_groups:
            moved = [p for p in group["params"] if found.get(p) is not None]
            if not moved:
                continue
            half = limit == "batch" and not normalize and not group["started"]  # sigma(0) = 1/2 at theta = 0
            torch._foreach_add_(moved, [found[p] for p in moved], alpha=group["lr"] * (0.5 if half else 1.0))
            group["started"] = True

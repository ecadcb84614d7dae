r"""DONE: adversarial training that weighs the examples by how hard their attack is, as a worst case over the data would.

Two worst cases, one inside the other. An attack looks for the perturbation of each input at which the loss is greatest; then the
examples are weighed by exp(loss / r), which is the worst reweighting of the data that a Kullback-Leibler penalty with temperature
r allows. Reach for it when the robustness of weak or rare classes matters, on imbalanced data above all.

.. math::
    \min_\theta\ r \log \frac1n \sum_i e^{l_i(\theta) / r}, \qquad l_i(\theta) = \ell(\theta, x_i + \delta_i^*(\theta), y_i)

Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, arXiv 2308.00311: the compositional
bilevel problem and its log-barrier form (section 3), compositional implicit differentiation (section 4).

Known not to work, or to differ:

- Clean accuracy is not improved. On balanced data the gain is small; reweighting by class frequency or by the margin of the
  prediction (MAIL) does as well or better on imbalanced data. With wrong labels the weight goes to them.
- With a running mean (``ema`` < 1) and r of the order of the losses a single example can get a hundred times a mean's weight, and
  training can break for good: give ``max_weight``, a larger r, or ``ema=1``.
- The implicit part of the gradient is small, and costs two more passes: "first_order" is the default.
- The attack takes sign steps, as PGD does. What the names DONE-GD and DONE-ADAM of the paper's tables stand for could not be settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.adversarial.base import AdversarialObjective, AttackMode, Bounds, Norm, Start, classify
from weightroom.errors import UsageError, check_range, unknown
from weightroom.losses import KLDROReduction

__all__ = ["DONE"]

Hypergradient = Literal["first_order", "implicit"]

#: How far the barrier keeps a perturbation from the faces of its box, as a share of the box's side.
_INSIDE = 1e-3


class DONE(AdversarialObjective):
    r"""Doubly robust instance-reweighted adversarial training.

    The attack maximises, over the box :math:`C_i = \{\|\delta\|_\infty \le \epsilon,\ x_i + \delta \text{ within bounds}\}` with
    faces lb and ub,

    .. math::
        \ell(\theta, x_i + \delta, y_i) - \tfrac\lambda2 |\delta|^2 + c \sum_k [\log(ub_k - \delta_k) + \log(\delta_k - lb_k)].

    Args:
        r: temperature of the weights > 0: a large one is plain adversarial training, a small one the worst example.
        ema: share in (0, 1] of the batch in the running mean of exp(l / r), see :class:`weightroom.losses.KLDROReduction`; 1
            takes the weights from the batch alone.
        eps: size of a perturbation, >= 0.
        norm: "linf" or "l2"; the barrier is that of the box, so it needs "linf".
        steps: of the attack, >= 1.
        step_size: of the attack, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input; None for no bounds.
        hypergradient: "first_order" takes the attacked inputs for constants (Danskin: exact without ``lam`` and ``barrier``);
            "implicit" adds how the solution of the attack moves with the weights.
        lam: :math:`\lambda` >= 0, weight of the perturbation's squared length; 0 for "first_order", 1 for "implicit" when None.
        barrier: c >= 0, weight of the log barrier; 0 for "first_order", 0.05 for "implicit" when None.
        loss_curvature: keep the second derivative of the loss in the Hessian of "implicit" (ten conjugate-gradient steps,
            each another pass). Without it the Hessian is diagonal; for networks of ReLUs little is lost. It needs ``lam``
            and ``barrier`` large enough that the attack has one solution.
        max_weight: the most that an example may weigh, in units of the plain mean's; None for no limit.
        attack_mode: mode of the model during the attack, "eval" or "train".

    The running mean is a buffer, part of ``state_dict``. See :class:`AdversarialObjective` for the calling convention and the
    errors.

    Raises:
        ValueError: an argument is out of range; "implicit" with neither ``lam`` nor ``barrier``; a barrier with norm "l2".
        RuntimeError: a loss is NaN or infinite (looked for on the CPU).
    """

    start: ClassVar[Start] = "uniform"
    shown: ClassVar[tuple[str, ...]] = ("hypergradient", "lam", "barrier", "loss_curvature")

    def __init__(
        self, r: float = 1.0, ema: float = 0.1, eps: float = 8 / 255, norm: Norm = "linf", steps: int = 10,
        step_size: float | None = None, bounds: Bounds = (0.0, 1.0), hypergradient: Hypergradient = "first_order",
        lam: float | None = None, barrier: float | None = None, *, loss_curvature: bool = False, max_weight: float | None = None,
        attack_mode: AttackMode = "eval",
    ) -> None:  # fmt: skip
        super().__init__(eps=eps, norm=norm, steps=steps, step_size=step_size, bounds=bounds, attack_mode=attack_mode)
        if hypergradient not in get_args(Hypergradient):
            raise unknown("hypergradient", hypergradient, get_args(Hypergradient))
        implicit = hypergradient == "implicit"
        self.hypergradient: Hypergradient = hypergradient
        self.lam = (1.0 if implicit else 0.0) if lam is None else lam
        self.barrier = (0.05 if implicit and norm == "linf" else 0.0) if barrier is None else barrier
        self.loss_curvature = loss_curvature
        for name, value in (("lam", self.lam), ("barrier", self.barrier)):
            check_range(name, value, low=0.0, open_high=True)
        if implicit and self.lam == 0 and self.barrier == 0:
            raise UsageError(
                "hypergradient='implicit' needs lam > 0 or barrier > 0: without them the attack has no smooth solution"
            )
        if self.barrier and norm != "linf":
            raise UsageError(f"barrier belongs to norm='linf', got norm={norm!r}")
        self.reduction = KLDROReduction(r, ema, max_weight=max_weight)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the weighted sum of the losses at the attacked inputs; its gradient is the hypergradient."""
        attacked = self.attack(model, x, y)
        if self.hypergradient == "first_order" or self.eps == 0:
            return self.reduction(F.cross_entropy(model(attacked), y, reduction="none"))
        attacked.requires_grad_()
        losses = F.cross_entropy(model(attacked), y, reduction="none")
        (g,) = torch.autograd.grad(losses.sum(), attacked, create_graph=True)  # grad_delta l
        v = self._solve(g, attacked, x)  #                                        v = H^-1 grad_delta l, held fixed
        moves = (g * v).flatten(1).sum(1)  #                                      d/dtheta <grad_delta l, v> is what is missing
        return self.reduction(losses + moves - moves.detach())

    def attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns perturbed inputs, within ``eps`` of ``x`` and within ``bounds``; with a barrier strictly so."""
        attacked = super().attack(model, x, y)
        return x.detach() + self._inside(attacked - x, x) if self.barrier and self.eps else attacked

    def target(self, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the regularised loss of each perturbed input."""
        if not self.lam and not self.barrier:
            return lambda moved: F.cross_entropy(classify(model, moved, y), y, reduction="none")
        low, high = self._faces(x)

        def value(moved: Tensor) -> Tensor:
            delta = moved - x
            if self.barrier and self.eps:
                delta = delta + (self._inside(delta, x) - delta).detach()
            each = -self.lam / 2 * delta.square()
            if self.barrier and self.eps:
                each = each + self.barrier * ((high - delta).log() + (delta - low).log())
            return F.cross_entropy(classify(model, x + delta, y), y, reduction="none") + each.flatten(1).sum(1)

        return value

    def _solve(self, g: Tensor, attacked: Tensor, x: Tensor) -> Tensor:
        """H^-1 g with H the Hessian of what the attack minimises."""
        diagonal = torch.full_like(x, self.lam)
        if self.barrier:
            low, high = self._faces(x)
            delta = attacked.detach() - x
            diagonal += self.barrier * ((high - delta).square().reciprocal() + (delta - low).square().reciprocal())
        if not self.loss_curvature:
            return g.detach() / diagonal

        def apply(v: Tensor) -> Tensor:
            (curved,) = torch.autograd.grad((g * v).sum(), attacked, retain_graph=True)
            return diagonal * v - curved

        return _conjugate_gradients(apply, g.detach())

    def _faces(self, x: Tensor) -> tuple[Any, Any]:
        """The least and the greatest perturbation of each entry."""
        if self.bounds is None:
            return torch.full_like(x, -self.eps), torch.full_like(x, self.eps)
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in self.bounds)
        return (low - x).clamp_min(-self.eps), (high - x).clamp_max(self.eps)

    def _inside(self, delta: Tensor, x: Tensor) -> Tensor:
        low, high = self._faces(x)
        margin = _INSIDE * (high - low)
        return torch.clamp(delta, low + margin, high - margin)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, steps: int = 10) -> Tensor:
    """Solves apply(v) = b for each sample, ``apply`` symmetric and positive."""
    dot = lambda a, b: (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    tiny = torch.finfo(b.dtype).tiny
    v, residual = torch.zeros_like(b), b
    direction, length = residual, dot(residual, residual)
    for _ in range(min(steps, math.prod(b.shape[1:]))):
        image = apply(direction)
        step = length / dot(direction, image).clamp_min(tiny)
        v, residual = v + step * direction, residual - step * image
        before, length = length, dot(residual, residual)
        direction = residual + length / before.clamp_min(tiny) * direction
    return v

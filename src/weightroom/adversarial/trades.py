r"""Adversarial training as everybody compares with it: PGD-AT trains on attacked inputs, TRADES asks for stable outputs.

Reach for them when a classifier must withstand small changes of its inputs that were made to mislead it. PGD-AT minimises the
loss where the attack finds it greatest; TRADES adds to the loss at the clean inputs ``beta`` times how far an attack can move the
output, so that ``beta`` trades accuracy for robustness.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083, eq. (2.1).
Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, arXiv 1901.08573, eq. (5) and
algorithm 1; code: yaodongyu/TRADES.

Known not to work, or to differ:

- Both multiply the cost of a training step by about ``steps`` + 1, and both cost accuracy on clean inputs.
- Robust accuracy under the attack of the training overstates: evaluate with others.
- The code of TRADES passes the clean inputs through the model twice per step, so that batch norm counts them twice; here once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.adversarial.base import AdversarialObjective, AttackMode, Bounds, Norm, Start, classify
from weightroom.errors import check_range

__all__ = ["PGDAT", "TRADES"]


class PGDAT(AdversarialObjective):
    r"""Cross entropy at the attacked inputs.

    .. math:: \ell(f(x'), y), \qquad x' \approx \arg\max_{\|x' - x\| \le \epsilon} \ell(f(x'), y)

    The attack starts anywhere in the ball.

    Args:
        eps: size of a perturbation, >= 0.
        norm: "linf" or "l2".
        steps: of the attack, >= 1.
        step_size: of the attack, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input; None for no bounds.
        attack_mode: mode of the model during the attack, "eval" or "train".

    See :class:`AdversarialObjective` for the calling convention and the errors.
    """

    start: ClassVar[Start] = "uniform"

    def __init__(
        self, eps: float = 8 / 255, norm: Norm = "linf", steps: int = 10, step_size: float | None = None,
        bounds: Bounds = (0.0, 1.0), attack_mode: AttackMode = "eval",
    ) -> None:  # fmt: skip
        super().__init__(eps=eps, norm=norm, steps=steps, step_size=step_size, bounds=bounds, attack_mode=attack_mode)

    def target(self, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the cross entropy of each perturbed input."""
        return lambda moved: F.cross_entropy(classify(model, moved, y), y, reduction="none")

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross entropy at the attacked inputs."""
        return F.cross_entropy(model(self.attack(model, x, y)), y)


class TRADES(AdversarialObjective):
    r"""Cross entropy at the clean inputs, and how far an attack can move the output.

    .. math:: \ell(f(x), y) + \beta \max_{\|x' - x\| \le \epsilon} \mathrm{KL}(p(x) \,\|\, p(x')), \qquad p = \mathrm{softmax}(f)

    The attack maximises the divergence, from ``x`` with a little noise; the gradient flows through both outputs.

    Args:
        beta: weight of the divergence, >= 0; the paper has 1 and 6.
        eps: size of a perturbation, >= 0.
        norm: "linf" or "l2".
        steps: of the attack, >= 1.
        step_size: of the attack, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input; None for no bounds.
        attack_mode: mode of the model during the attack, "eval" or "train".

    See :class:`AdversarialObjective` for the calling convention and the errors.
    """

    shown: ClassVar[tuple[str, ...]] = ("beta",)

    def __init__(
        self, beta: float = 6.0, eps: float = 8 / 255, norm: Norm = "linf", steps: int = 10, step_size: float | None = None,
        bounds: Bounds = (0.0, 1.0), attack_mode: AttackMode = "eval",
    ) -> None:  # fmt: skip
        super().__init__(eps=eps, norm=norm, steps=steps, step_size=step_size, bounds=bounds, attack_mode=attack_mode)
        check_range("beta", beta, low=0.0, high=math.inf, open_high=True)
        self.beta = float(beta)

    def target(self, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the divergence of each perturbed output from the clean one."""
        clean = classify(model, x, y).detach().log_softmax(1)
        return lambda moved: _kl(clean, model(moved).log_softmax(1))

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross entropy plus ``beta`` times the mean divergence."""
        moved = self.attack(model, x, y)
        clean, attacked = model(x), model(moved)
        divergence = _kl(clean.log_softmax(1), attacked.log_softmax(1))
        return F.cross_entropy(clean, y) + self.beta * divergence.mean()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)

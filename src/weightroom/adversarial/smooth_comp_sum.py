r"""Smooth adversarial comp-sum loss (ADV-COMP-SUM): fit the labels, and let no attack move the differences of the logits.

Reach for it where TRADES or PGD training is in use: the cost of a step is the same. The first term is a comp-sum loss at the clean
inputs, the second how far an attack can move the vector of the logits' differences to the label's,
:math:`\Delta(x) = (h(x)_y - h(x)_{y'})_{y'}`; together they bound an adversarial comp-sum loss from above where
:math:`\nu \ge \sqrt{n - 1} / \rho` for n classes. Training takes a smaller :math:`\nu`.

Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023, arXiv 2304.07288, whose
algorithm adds weight decay, here the optimizer's matter. There is no code of the authors.

Known not to work, or to differ:

- Too large a :math:`\nu` for the :math:`\rho` at hand drives training to a constant output, the best way to move nothing: with
  :math:`\rho = \nu = 1` a network on small images of digits ended there or not far from it, and which depended on the start.
  Watch the accuracy, and choose both on a validation part.
- The penalty grows with :math:`\sqrt{n - 1}`: carry :math:`\nu / \sqrt{n - 1}`, not :math:`\nu`, to another number of classes.
- The paper says little of the attack. Here it climbs the penalty itself, from x with a little noise (at x it has no gradient), with
  the network in eval mode, as TRADES does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from weightroom.adversarial.base import AdversarialObjective, AttackMode, Bounds, Norm, classify
from weightroom.errors import check_range
from weightroom.losses.comp_sum import comp_sum_loss

__all__ = ["SmoothAdversarialCompSum"]

_SMOOTH = 1e-12  # under the root, which has no slope at 0


class SmoothAdversarialCompSum(AdversarialObjective):
    r"""Comp-sum loss at the clean inputs, and a penalty on what an attack can do to the differences of logits.

    .. math::
        \Phi^\tau\Big(\sum_{y' \neq y} e^{-\Delta_{y'}(x) / \rho}\Big)
        + \nu \max_{\|x' - x\| \le \epsilon} \|\Delta(x') - \Delta(x)\|_2, \qquad \Delta_{y'}(x) = h(x)_y - h(x)_{y'}

    The gradient flows through both :math:`\Delta(x')` and :math:`\Delta(x)`.

    Args:
        tau: >= 0, of the comp-sum loss, see :class:`weightroom.losses.CompSumLoss`; 1 is cross entropy.
        rho: > 0, the margin: divides the logits in the first term.
        nu: >= 0, weight of the penalty.
        eps: size of a perturbation, >= 0.
        norm: "linf" or "l2".
        steps: of the attack, >= 1.
        step_size: of the attack, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input; None for no bounds.
        clip: of the comp-sum loss for ``tau`` < 1: log p_y counts as this if it is less, p being the softmax of the logits
            divided by ``rho``, so that a small ``rho`` reaches it early; such a sample has no gradient of the first term.
        attack_mode: mode of the model during the attack, "eval" or "train".

    See :class:`AdversarialObjective` for the calling convention and the errors.
    """

    shown: ClassVar[tuple[str, ...]] = ("tau", "rho", "nu")

    def __init__(
        self, tau: float = 1.0, rho: float = 0.25, nu: float = 1.0, eps: float = 8 / 255, norm: Norm = "linf", steps: int = 10,
        step_size: float | None = None, bounds: Bounds = (0.0, 1.0), attack_mode: AttackMode = "eval", *, clip: float | None = -60.0,
    ) -> None:  # fmt: skip
        super().__init__(eps=eps, norm=norm, steps=steps, step_size=step_size, bounds=bounds, attack_mode=attack_mode)
        check_range("tau", tau, low=0.0, high=math.inf, open_high=True)
        check_range("rho", rho, low=0.0, high=math.inf, open_low=True, open_high=True)
        check_range("nu", nu, low=0.0, high=math.inf, open_high=True)
        if clip is not None:
            check_range("clip", clip, high=0.0, open_high=True)
        self.tau, self.rho, self.nu, self.clip = float(tau), float(rho), float(nu), clip

    def target(self, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the squared length of the change of differences at each perturbed input: its steps are those of the length."""
        clean = classify(model, x, y).detach()
        return lambda moved: _squared_change(clean, model(moved), y)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean of the two terms."""
        moved = self.attack(model, x, y)
        clean, attacked = model(x), model(moved)
        change = (_squared_change(clean, attacked, y) + _SMOOTH).sqrt()
        return comp_sum_loss(clean, y, self.tau, self.rho, clip=self.clip) + self.nu * change.mean()


def _squared_change(clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
    """||D(x') - D(x)||_2^2 with D(x')_k - D(x)_k = d_y - d_k, d = h(x') - h(x)."""
    d = attacked - clean
    if d.dtype in (torch.float16, torch.bfloat16):
        d = d.float()
    return (d.gather(1, y.unsqueeze(1)) - d).square().sum(1)

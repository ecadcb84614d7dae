r"""M-FAC: steps preconditioned by the empirical Fisher matrix of the last m gradients.

The gradients of the last m steps are kept, and each step is the newest one times the inverse of

.. math:: F = \lambda I + \tfrac1m G^\top G,

one matrix over all parameters together, never formed: the work is two passes over the m x d numbers of G and a Cholesky
factorisation of an m x m matrix.

Reach for it to fine-tune where Adam is the habit and memory is plenty (the paper: BERT-tiny and -mini), or to train sparse
networks (``sparse``), whose few weights make long windows cheap. One learning rate, 1e-3, is said to do for most.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021, arXiv
2107.03356, section 3.2 (the dynamic algorithm). The paper gets the product from a recursion and an LU factorisation without
pivoting; here it is solved with Cholesky in float64: the same numbers, more stable, on any device.

Known not to work: memory is m times that of the weights (10 M weights and m = 512: 20 GB). It damps what it has seen and leaves
alone what it has not: the step is g / (lambda + |g|^2 / m) for a gradient unlike all others, so that its size grows with m; a
shorter window needs a larger learning rate, and where gradients become small, steps become huge (up to g / lambda). Small networks
that Adam or SGD train in a few epochs gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightroom.errors import UsageError, check_range
from weightroom.optim.base import check_dense

__all__ = ["MFAC"]

#: Options that hold for all groups: one Fisher matrix spans the whole model.
SHARED = ("window", "damping", "sparse")
#: Numbers of G that are taken to float64 at once: what fits a cache of the CPU; elsewhere what keeps a device busy.
PIECE, PIECE_ELSEWHERE = 2**17, 2**26


class SparseGradientError(UsageError, RuntimeError):
    """A gradient is sparse: a ``RuntimeError`` as for torch's optimizers, and a ``ValueError``."""


class MFAC(Optimizer):
    r"""SGD on :math:`u = F^{-1} g`, with F from the last m gradients, the newest among them.

    .. math::
        g &= \nabla f(p) + \omega p, & u &= (\lambda I + \tfrac1m G^\top G)^{-1} g, &
        v &\leftarrow \beta v + (1 - \beta) u, & p &\leftarrow p - \eta v

    G starts as zeros and its oldest row gives way to g at each step; the divisor is m from the first step on. The state is kept
    under the first parameter: ``grads`` (G, m x d, float32 at least), ``gram`` (:math:`G G^\top`, float64), ``step`` (the row
    replaced next is ``step`` mod m), and where they are used ``momentum_buffer`` (v) and ``kept`` (of ``sparse``).

    Args:
        params: parameters, or groups of them, as for any torch optimizer; one Fisher matrix spans all groups. Groups may differ
            in ``lr``, ``momentum`` and ``weight_decay``.
        lr: :math:`\eta` >= 0. Steps grow with the window: a short one needs more.
        momentum: :math:`\beta` in [0, 1), an average of the preconditioned steps.
        weight_decay: :math:`\omega` >= 0, added to the gradient, so that the Fisher matrix sees it too.
        window: m >= 1, gradients kept; memory is m times that of the weights.
        damping: :math:`\lambda` > 0.
        sparse: leave weights that are exactly 0 at construction out of everything; they stay 0. Parameters of one dimension
            (biases, norms), which often start at 0, are all kept.

    A parameter without a gradient counts as one whose gradient is zero, without decay; like any other it moves with what the
    window still holds of it, unless it is frozen (``requires_grad`` False). A step without any gradient does nothing. The state of a
    model that grows by ``add_param_group`` is padded with zeros. Each step waits for the device once, to see whether g is finite.

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range, a parameter is complex, a group asks for a window,
            damping or sparsity of its own.
        SparseGradientError: (a ``RuntimeError`` and a ``ValueError``) from ``step``: a gradient is sparse.
        FloatingPointError: from ``step``: a gradient is not finite, or too large for the damping; parameters and state are
            then as they were.

    Example::

        optimizer = MFAC(model.parameters(), lr=1e-3, window=512)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        window: int = 512,
        damping: float = 1e-5,
        sparse: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "window": window, "damping": damping, "sparse": sparse,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, whose past gradients count as zeros."""
        if isinstance(param_group, dict):
            shared = self.param_groups[0] if self.param_groups else self.defaults
            _check({**self.defaults, **param_group})
            for name in SHARED:
                if param_group.setdefault(name, shared[name]) != shared[name]:
                    raise UsageError(f"{name} must be the same in all groups: got {param_group[name]!r} beside {shared[name]!r}")
        before = sum(p.numel() for p in self._params())
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(p.is_complex() for p in group["params"]):
            self.param_groups.pop()
            raise UsageError("MFAC does not support complex parameters: give their real and imaginary parts")
        if not group["params"]:
            return
        state, more = self._state(), sum(p.numel() for p in group["params"])
        if group["sparse"]:
            live = [(p != 0) if p.ndim > 1 else torch.ones_like(p, dtype=torch.bool) for p in group["params"]]
            new = torch.cat([mask.reshape(-1).to(self._device) for mask in live]).nonzero().flatten() + before
            state["kept"] = torch.cat([state["kept"], new]) if "kept" in state else new
            more = len(new)
        if "grads" in state:
            state["grads"] = F.pad(state["grads"], (0, more))
        if "momentum_buffer" in state:
            state["momentum_buffer"] = F.pad(state["momentum_buffer"], (0, sum(p.numel() for p in group["params"])))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any torch optimizer, except that the state keeps its own dtypes."""
        super().load_state_dict(state_dict)
        first = next(index for group in state_dict["param_groups"] for index in group["params"])
        saved = state_dict["state"].get(first, {})
        for name, value in saved.items():
            self._state()[name] = value.to(self._device, copy=True) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            SparseGradientError: a gradient is sparse.
            FloatingPointError: a gradient is not finite; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for p in self._params()):
            return loss
        g = self._gradient()
        u = self._precondition(g)
        state = self._state()
        if "kept" in state:
            u = u.new_zeros(sum(p.numel() for p in self._params())).index_copy_(0, state["kept"], u)
        if "momentum_buffer" not in state and any(group["momentum"] for group in self.param_groups):
            state["momentum_buffer"] = torch.zeros_like(u)
        sizes = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        steps = u.split(sizes)
        if "momentum_buffer" in state:
            for group, u, v in zip(self.param_groups, steps, state["momentum_buffer"].split(sizes), strict=True):
                v.lerp_(u, 1 - group["momentum"])  #                          v = beta v + (1 - beta) u
            steps = state["momentum_buffer"].split(sizes)
        for group, v in zip(self.param_groups, steps, strict=True):
            parts = zip(group["params"], v.split([p.numel() for p in group["params"]]), strict=True)
            moved = [(p, part.view(p.shape).to(p)) for p, part in parts if p.grad is not None or p.requires_grad]
            if moved:
                torch._foreach_add_(*map(list, zip(*moved, strict=True)), alpha=-group["lr"])
        return loss

    def _precondition(self, g: Tensor) -> Tensor:
        r"""Puts g into the window and returns F^-1 g.

        In :math:`u = (g - G^\top c) / \lambda`, :math:`c = (K + m \lambda I)^{-1} G g`, g is the row i of G: :math:`G g = K e_i`
        and :math:`e_i - c = m \lambda (K + m \lambda I)^{-1} e_i`. So :math:`u = m G^\top z` with :math:`(K + m \lambda I) z = e_i`,
        in which nothing cancels.
        """
        state, m, damping = self._state(), self.param_groups[0]["window"], self.param_groups[0]["damping"]
        if "grads" not in state:
            state["grads"] = g.new_zeros((m, len(g)))
            state["gram"] = g.new_zeros((m, m), dtype=torch.float64)
            state["step"] = 0
        G, K, i = state["grads"], state["gram"].clone(), state["step"] % m
        Gg, gg = _products(G, g)
        K[i] = Gg
        K[:, i] = Gg
        K[i, i] = gg
        A = K.clone()
        A.diagonal().add_(m * damping)
        L, info = torch.linalg.cholesky_ex(A)
        if not bool(torch.isfinite(gg) & (info == 0)):
            what = "too large for the damping" if bool(torch.isfinite(gg)) else "not finite"
            raise FloatingPointError(f"MFAC: the gradient of step {state['step'] + 1} is {what}; nothing was changed")
        G[i] = g
        state["gram"] = K
        state["step"] += 1
        e = torch.zeros_like(K[:, :1])
        e[i] = m
        return G.mT @ torch.cholesky_solve(e, L).flatten().to(G.dtype)  # u = m G^T z

    def _gradient(self) -> Tensor:
        """All gradients as one vector, with decay, without what ``sparse`` leaves out."""
        flat: list[Tensor] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [cast(Tensor, p.grad) for p in params]
            try:
                check_dense(grads, "MFAC")
            except RuntimeError as error:
                raise SparseGradientError(str(error)) from None
            if group["weight_decay"] and grads:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            given = dict(zip(params, grads, strict=True))
            flat += [given[p] if p in given else torch.zeros_like(p) for p in group["params"]]
        dtype = torch.float32
        for g in flat:
            dtype = torch.promote_types(dtype, g.dtype)
        g = torch.cat([g.reshape(-1).to(self._device, dtype) for g in flat])
        return g[self._state()["kept"]] if "kept" in self._state() else g

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _state(self) -> dict[str, Any]:
        return self.state[self._params()[0]]

    @property
    def _device(self) -> torch.device:
        return self._params()[0].device


def _products(G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """G g and g . g in float64, for which G is taken to float64 piece by piece."""
    piece = max(1, (PIECE if G.device.type == "cpu" else PIECE_ELSEWHERE) // len(G))
    Gg, gg = g.new_zeros(len(G), dtype=torch.float64), g.new_zeros((), dtype=torch.float64)
    for columns, part in zip(G.split(piece, 1), g.split(piece), strict=True):
        x = part.to(torch.float64)
        Gg.addmv_(columns.to(torch.float64), x)
        gg += x @ x
    return Gg, gg


def _check(group: Mapping[str, Any]) -> None:
    check_range("lr", group["lr"], low=0.0, open_high=True)
    check_range("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
    check_range("weight_decay", group["weight_decay"], low=0.0, open_high=True)
    check_range("damping", group["damping"], low=0.0, open_low=True, open_high=True)
    if not isinstance(group["window"], int) or isinstance(group["window"], bool):
        raise TypeError(f"window must be an integer, got {group['window']!r}")
    check_range("window", group["window"], low=1)

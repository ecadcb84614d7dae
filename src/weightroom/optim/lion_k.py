r"""Lion-K: momentum, a convex function of your choice, and weight decay that means a constraint.

Lion steps by the sign of a momentum and decays the weights. It thereby minimises the loss over the box
:math:`|x_i| \le 1/\lambda`, :math:`\lambda` the weight decay. With the gradient of another convex :math:`K` instead of the sign,
the same step solves

.. math:: \min_x f(x) + \tfrac1\lambda K^*(\lambda x), \qquad K^* \text{ the convex conjugate of } K.

::

    kappa       K(v)                               u = grad K(v)                         added to the loss
    l1 (Lion)   |v|_1                              sign(v)                               |x_i| <= 1/lambda
    lp (p)      |v|_p, 1 < p < inf                 sign(v) (|v_i| / |v|_p)^(p-1)         |x|_q <= 1/lambda, 1/p + 1/q = 1
    l2          |v|_2                              v / |v|_2                             |x|_2 <= 1/lambda
    linf        max |v_i|                          sign at the first largest, else 0     |x|_1 <= 1/lambda
    huber (e)   v_i^2 / 2e, from e on |v_i| - e/2  clip(v, -e, e) / e                    the box and (e lambda / 2) |x|_2^2
    trunc (e)   sum of max(|v_i| - e, 0)           sign(v) where |v_i| > e, else 0       the box and e |x|_1
    square      |v|_2^2 / 2                        v                                     (lambda / 2) |x|_2^2: momentum SGD

Reach for it to choose weight decay by the size of weights it allows, for weights that are bounded (quantisation, low
precision) or sparse (``trunc``, ``linf``) without projections, or for half of AdamW's optimizer state.

Known not to work: with a constant learning rate the iterates hover in a band of that width and never settle, so decay it to
zero. A bound that is too tight costs accuracy. The gradient of a norm has the same size however large the tensor (``l2``,
``lp``; ``linf`` moves one weight per step and tensor): learning rates do not carry over from Lion. Decay on biases and norm
layers bounds them as well. Weights that ``trunc`` leaves alone shrink geometrically and are never exactly 0. In pure bfloat16
steps below the rounding of a weight are lost, and with them the bound: keep the weights in float32. A NaN in a gradient stays in
the momentum, and as sign(NaN) is 0 in torch, Lion goes on in silence.

Chen, Liu, Liang, Liu, "Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts", ICLR 2024, arXiv 2310.05898:
the Lion-K iteration and its ODE, the Lyapunov function, and the table of K. Lion: Chen et al., "Symbolic Discovery of
Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675. The former's momentum has the opposite sign; the iterates are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightroom.errors import UsageError, check_range, unknown
from weightroom.optim.base import check_dense

__all__ = ["LionK", "lionk_objective"]

Tensors = list[Tensor]

#: Weights per piece on the CPU: a step reads each piece from memory once and does the rest of its passes in the cache.
PIECE = 2**19


class Kappa:
    """A convex function K with K(0) = 0: its value, its gradient and its conjugate."""

    #: Whether an entry of the gradient depends on other entries.
    coupled: ClassVar[bool] = False

    def K(self, v: Tensor) -> Tensor:
        """K(v), a scalar."""
        raise NotImplementedError

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        """Replaces each v by grad K(v); ``joint`` takes all of them for one vector."""
        raise NotImplementedError

    def use(self, y: Tensor) -> Tensor:
        """How much of its bound each entry uses: K*(y) is finite where the largest is at most 1."""
        return y.abs()

    def smooth(self, y: Tensor) -> Tensor:
        """K*(y) where it is finite."""
        return y.new_zeros(())

    def K_conj(self, y: Tensor) -> Tensor:
        """The conjugate K*(y), a scalar, infinite outside its domain."""
        return torch.where(self.use(y).amax() <= 1, self.smooth(y), math.inf)


class L1(Kappa):
    """The l1 norm; Lion."""

    def K(self, v: Tensor) -> Tensor:
        return v.abs().sum()

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        torch._foreach_sign_(v)


@dataclass(frozen=True)
class Lp(Kappa):
    """The norm of order p, 1 < p < inf."""

    p: float
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("kappa_args: p", self.p, low=1.0, open_low=True, open_high=True)

    def K(self, v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, self.p)

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        wide = reduce(torch.promote_types, {t.dtype for t in v}, torch.float32)
        tiny = torch.finfo(torch.float32).tiny
        for order in (math.inf, self.p):  # v / max|v| first, so that no power of v under- or overflows
            norms = list(torch._foreach_norm(v, order, dtype=wide))
            if joint:
                total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), order)
                norms = [total.to(n.device) for n in norms]
            torch._foreach_clamp_min_(norms, tiny)
            torch._foreach_div_(v, norms)
        if self.p != 2:  # sign(v) (|v| / norm)^(p-1)
            signs = torch._foreach_sign(v)
            torch._foreach_abs_(v)
            torch._foreach_pow_(v, self.p - 1)
            torch._foreach_mul_(v, signs)

    def use(self, y: Tensor) -> Tensor:
        return torch.linalg.vector_norm(y, self.p / (self.p - 1)).expand_as(y)  # 1/p + 1/q = 1


class Linf(Kappa):
    """The largest absolute entry."""

    coupled: ClassVar[bool] = True

    def K(self, v: Tensor) -> Tensor:
        return v.abs().amax()

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        flat = [t.reshape(-1) for t in v]
        at = [t.abs().argmax(keepdim=True) for t in flat]
        largest = [t.gather(0, i) for t, i in zip(flat, at, strict=True)]
        signs = torch._foreach_sign(largest)
        if joint:
            first = torch.cat([t.abs().to(largest[0]) for t in largest]).argmax()
            signs = tuple(s * (first.to(s.device) == k) for k, s in enumerate(signs))
        for t, f, i, s in zip(v, flat, at, signs, strict=True):
            t.copy_(torch.zeros_like(f).scatter_(0, i, s).view_as(t))

    def use(self, y: Tensor) -> Tensor:
        return y.abs().sum().expand_as(y)


@dataclass(frozen=True)
class Huber(Kappa):
    """The Huber function of width e > 0."""

    e: float

    def __post_init__(self) -> None:
        check_range("kappa_args: e", self.e, low=0.0, open_low=True, open_high=True)

    def K(self, v: Tensor) -> Tensor:
        a = v.abs()
        return torch.where(a < self.e, v.square() / (2 * self.e), a - self.e / 2).sum()

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        torch._foreach_clamp_min_(v, -self.e)
        torch._foreach_clamp_max_(v, self.e)
        torch._foreach_div_(v, self.e)

    def smooth(self, y: Tensor) -> Tensor:
        return self.e / 2 * y.square().sum()


@dataclass(frozen=True)
class Trunc(Kappa):
    """The l1 norm of what exceeds e >= 0."""

    e: float

    def __post_init__(self) -> None:
        check_range("kappa_args: e", self.e, low=0.0, open_high=True)

    def K(self, v: Tensor) -> Tensor:
        return (v.abs() - self.e).clamp_min(0).sum()

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        inner = torch._foreach_clamp_min(v, -self.e)
        torch._foreach_clamp_max_(inner, self.e)
        torch._foreach_sub_(v, inner)
        torch._foreach_sign_(v)

    def smooth(self, y: Tensor) -> Tensor:
        return self.e * y.abs().sum()


class Square(Kappa):
    """Half the squared l2 norm; no constraint."""

    def K(self, v: Tensor) -> Tensor:
        return v.square().sum() / 2

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        pass

    def use(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def smooth(self, y: Tensor) -> Tensor:
        return y.square().sum() / 2


@dataclass(frozen=True)
class Custom(Kappa):
    """A user's function v -> grad K(v)."""

    gradient: Callable[[Tensor], Tensor]
    coupled: ClassVar[bool] = True

    def gradient_(self, v: Tensors, joint: bool = False) -> None:
        for t in v:
            t.copy_(self.gradient(t))

    def use(self, y: Tensor) -> Tensor:
        return torch.where(torch.isfinite(self.smooth(y)), 0.0, math.inf).expand_as(y)

    def smooth(self, y: Tensor) -> Tensor:
        conj = getattr(self.gradient, "K_conj", None)
        if conj is None:
            raise UsageError("a report on a callable kappa needs its conjugate: give it an attribute K_conj(y)")
        return torch.as_tensor(conj(y))


_KAPPAS: dict[str, tuple[Callable[..., Kappa], tuple[str, ...]]] = {
    "l1": (L1, ()), "lp": (Lp, ("p",)), "l2": (partial(Lp, p=2.0), ()), "linf": (Linf, ()),
    "huber": (Huber, ("e",)), "trunc": (Trunc, ("e",)), "square": (Square, ()),
}  # fmt: skip


def make_kappa(kappa: str | Callable[[Tensor], Tensor], args: Mapping[str, float] | None = None) -> Kappa:
    """Returns the K of that name and arguments, or the user's own."""
    args = args or {}
    if isinstance(kappa, str):
        if kappa not in _KAPPAS:
            raise unknown("kappa", kappa, _KAPPAS)
        make, needs = _KAPPAS[kappa]
    elif callable(kappa):
        make, needs = partial(Custom, kappa), ()
    else:
        raise TypeError(f"kappa must be a name or a function v -> grad K(v), got {type(kappa).__name__}")
    if set(args) != set(needs):
        raise UsageError(f"kappa_args of kappa={kappa!r} must be {{{', '.join(f'{n!r}: ...' for n in needs)}}}, got {dict(args)}")
    return make(**args)


def _update(
    x: Tensors, g: Tensors, m: Tensors, kappa: Kappa, *, joint: bool, lr: float, betas: tuple[float, float],
    weight_decay: float, maximize: bool, decoupled: bool,
) -> None:  # fmt: skip
    beta1, beta2 = betas
    if maximize:
        g = list(torch._foreach_neg(g))
    if weight_decay and not decoupled:
        g = list(torch._foreach_add(g, x, alpha=weight_decay))
    u = list(torch._foreach_lerp(m, g, 1 - beta1))  # n_t = beta1 m_t + (1 - beta1) g_t
    kappa.gradient_(u, joint)  #                      u_t = grad K(n_t)
    if weight_decay and decoupled:
        torch._foreach_add_(u, x, alpha=weight_decay)
    torch._foreach_add_(x, u, alpha=-lr)  #           x_{t+1} = x_t - eta (u_t + lambda x_t)
    torch._foreach_lerp_(m, g, 1 - beta2)  #          m_{t+1} = beta2 m_t + (1 - beta2) g_t


class LionK(Optimizer):
    r"""Lion with any convex K: weight decay is a constraint or a penalty that you choose.

    .. math::
        n_t &= \beta_1 m_t + (1 - \beta_1) g_t, & x_{t+1} &= x_t - \eta (\nabla K(n_t) + \lambda x_t), &
        m_{t+1} &= \beta_2 m_t + (1 - \beta_2) g_t,

    which minimises :math:`f(x) + \tfrac1\lambda K^*(\lambda x)` as :math:`\eta \to 0` (no constraint where
    :math:`\lambda = 0`). The state is one buffer per parameter, ``exp_avg``. Groups may differ in every argument.

    Args:
        params: parameters, or groups of them, as for any torch optimizer. The real and imaginary parts of complex parameters
            are separate weights.
        lr: step size :math:`\eta` > 0. For Lion 3 to 10 times less than AdamW's.
        betas: :math:`\beta_1` (in the step) and :math:`\beta_2` (of the momentum), each in [0, 1).
        weight_decay: :math:`\lambda` >= 0; the box of Lion is :math:`|x_i| \le 1/\lambda`, whatever the learning rate.
            For Lion 3 to 10 times AdamW's.
        kappa: "l1" (Lion), "l2", "lp", "linf", "huber", "trunc" or "square" (see the module's table), or a function
            ``v -> grad K(v)`` that leaves v as it is; for ``lionk_objective`` it has an attribute ``K_conj``.
        kappa_args: arguments of ``kappa``: ``{"p": 3}`` for "lp", ``{"e": 0.1}`` for "huber" and "trunc".
        scope: whether the norms "l2", "lp" and "linf" are taken of each tensor or of all tensors of the "group" together.
        foreach: True updates all tensors in one call per operation, False one after the other. None does the first on
            accelerators; on the CPU it works in pieces that fit the cache, which is faster than both and needs no memory
            beyond the state.
        maximize: ascend instead.
        decoupled: False adds :math:`\lambda x` to the gradient, as ``torch.optim.Adam`` does: an ordinary L2 penalty on the
            loss, and no constraint.

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range, unknown, or in conflict with another.
        TypeError: an argument is not of the kind named above.
        RuntimeError: from ``step``: a gradient is sparse.

    Example::

        LionK(model.parameters(), lr=1e-3, weight_decay=5.0)                                        # |w| <= 0.2
        LionK(model.parameters(), lr=1e-3, weight_decay=5.0, kappa="trunc", kappa_args={"e": 1e-3})  # and sparse

    A callable ``kappa`` is not saved in ``state_dict``: load it into an optimizer that was made with that callable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        kappa: str | Callable[[Tensor], Tensor] = "l1",
        kappa_args: Mapping[str, float] | None = None,
        scope: Literal["tensor", "group"] = "tensor",
        foreach: bool | None = None,
        maximize: bool = False,
        decoupled: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "kappa": kappa, "kappa_args": kappa_args, "scope": scope,
            "foreach": foreach, "maximize": maximize, "decoupled": decoupled,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with options of its own where it gives them."""
        if isinstance(param_group, dict):
            if "kappa" in param_group:
                param_group.setdefault("kappa_args", None)
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer; a callable ``kappa`` is left out."""
        state = super().state_dict()
        for group in state["param_groups"]:
            if callable(group["kappa"]):
                group["kappa"] = None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any torch optimizer; where ``kappa`` was a callable, this optimizer's own stays."""
        own = [group["kappa"] for group in self.param_groups]
        for saved, kappa in zip(state_dict["param_groups"], own, strict=False):
            if saved["kappa"] is None and not callable(kappa):
                raise UsageError("saved with a callable kappa: load it into a LionK that was made with that callable")
        super().load_state_dict(state_dict)
        for group, kappa in zip(self.param_groups, own, strict=True):
            if group["kappa"] is None:
                group["kappa"] = kappa

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            grads = [cast(Tensor, p.grad) for p in params]
            check_dense(grads, "LionK (Lion-K)")
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            lists = [_as_real(ts) for ts in (params, grads, [self.state[p]["exp_avg"] for p in params])]
            kappa = make_kappa(group["kappa"], group["kappa_args"])
            joint = kappa.coupled and group["scope"] == "group"
            options = {name: group[name] for name in ("lr", "betas", "weight_decay", "maximize", "decoupled")}
            for x, g, m in [lists] if joint else _pieces(lists, group["foreach"], split=not kappa.coupled):
                _update(x, g, m, kappa, joint=joint, **options)
        return loss


def _check(group: Mapping[str, Any]) -> None:
    check_range("lr", group["lr"], low=0.0, open_low=True, open_high=True)
    if len(group["betas"]) != 2:
        raise UsageError(f"betas must be two numbers, got {group['betas']}")
    for i, beta in enumerate(group["betas"]):
        check_range(f"betas[{i}]", beta, low=0.0, high=1.0, open_high=True)
    check_range("weight_decay", group["weight_decay"], low=0.0, open_high=True)
    if group["decoupled"] and (product := group["lr"] * group["weight_decay"]) > 1:
        raise UsageError(f"lr * weight_decay must be <= 1, got {product:g}: the constraint phase would oscillate")
    if group["scope"] not in ("tensor", "group"):
        raise unknown("scope", str(group["scope"]), ("tensor", "group"))
    kappa = make_kappa(group["kappa"], group["kappa_args"])
    if group["scope"] == "group" and isinstance(kappa, Custom):
        raise UsageError("scope='group' is for the norms l2, lp and linf; a callable kappa gets one tensor at a time")


def _as_real(tensors: Tensors) -> Tensors:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _pieces(lists: list[Tensors], foreach: bool | None, split: bool) -> Iterator[list[Tensors]]:
    """Parameters, gradients and momenta, cut to what is updated together."""
    if foreach is False:
        yield from ([[t] for t in triple] for triple in zip(*lists, strict=True))
        return
    for (device, _), (same, _) in Optimizer._group_tensors_by_device_and_dtype(cast(Any, lists)).items():
        if foreach is None and device is not None and device.type == "cpu":
            yield from _cache_sized(cast("list[Tensors]", same), split)
        else:
            yield cast("list[Tensors]", same)


def _cache_sized(lists: list[Tensors], split: bool) -> Iterator[list[Tensors]]:
    """Large tensors in pieces of ``PIECE`` weights (with ``split``), small ones together until there are as many."""
    together: list[Tensors] = [[], [], []]
    size = 0
    for triple in zip(*lists, strict=True):
        if split and triple[0].numel() > PIECE and all(t.is_contiguous() for t in triple):
            yield from ([[t] for t in piece] for piece in zip(*(t.view(-1).split(PIECE) for t in triple), strict=True))
            continue
        for ts, t in zip(together, triple, strict=True):
            ts.append(t)
        size += triple[0].numel()
        if size >= PIECE:
            yield together
            together, size = [[], [], []], 0
    if size:
        yield together


@torch.no_grad()
def lionk_objective(
    params: Iterable[Tensor],
    lam: float,
    kappa: str | Callable[[Tensor], Tensor],
    kappa_args: Mapping[str, float] | None = None,
    scope: Literal["tensor", "group"] = "tensor",
) -> dict[str, float]:
    r"""How far weights use the constraint that weight decay means, and what the penalty beside it amounts to.

    Args:
        params: the weights, tensors of any shape, all with decay :math:`\lambda` (one group of an optimizer).
        lam: :math:`\lambda` >= 0, the decoupled weight decay (not multiplied by the learning rate); 0 means no constraint.
        kappa: as of ``LionK``; a callable needs the attribute ``K_conj``.
        kappa_args: as of ``LionK``.
        scope: as of ``LionK``.

    Returns:
        - ``penalty``: the finite part of :math:`\tfrac1\lambda K^*(\lambda x)` (0 for the norms), to be added to the loss;
        - ``use``: the largest share of its bound that a weight (or a norm) uses: :math:`\lambda \max |x|` for the box;
        - ``violation``: what of ``use`` exceeds 1;
        - ``at_bound``: share of the weights within 1 percent of their bound, or beyond (for a norm: in such tensors).

        For a callable only inside (``use`` 0) or outside (infinite) is known.

    Raises:
        UsageError: (a ``ValueError``) no weights, ``lam`` < 0, ``kappa`` unknown or without what the report needs.

    Example::

        for group in optimizer.param_groups:
            report = lionk_objective(group["params"], group["weight_decay"], group["kappa"], group["kappa_args"], group["scope"])
    """
    check_range("lam", lam, low=0.0, open_high=True)
    convex = make_kappa(kappa, kappa_args)
    ys = [t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) * lam for t in _as_real(list(params)) if t.numel()]
    if not ys:
        raise UsageError("params has no weights")
    if lam == 0:
        return {"penalty": 0.0, "use": 0.0, "violation": 0.0, "at_bound": 0.0}
    if scope == "group":
        ys = [torch.cat([y.to(ys[0]) for y in ys])]
    use = [convex.use(y) for y in ys]
    most = max(float(u.amax()) for u in use)
    return {
        "penalty": sum(float(convex.smooth(y)) for y in ys) / lam,
        "use": most,
        "violation": max(most - 1.0, 0.0),
        "at_bound": sum(int((u >= 0.99).sum()) for u in use) / sum(y.numel() for y in ys),
    }

r"""CV-SW: the sliced Wasserstein distance, estimated with control variates.

The sliced Wasserstein distance averages a one-dimensional transport cost over random directions; with few of them (L = 10)
the estimate and its gradient are noisy. Subtracting a quantity whose average is known, and that goes up and down with the
cost, takes most of the noise away for the price of two means. Reach for it wherever a sliced Wasserstein distance is a
training loss: point clouds, generators, domain adaptation, embeddings.

Nguyen and Ho, "Sliced Wasserstein Estimation with Control Variates", ICLR 2024, arXiv 2305.00402, section 3. The names
in the code are the paper's; where the released code settles what the text leaves open, the part follows the code.

Known not to work: with (nearly) equal means the lower control variate is (nearly) zero and nothing is gained; where the
measures differ mainly in covariance only the upper one helps, and only there is it the better choice. The estimate is not a
metric for finite L, and as :math:`\gamma` comes from the same directions it is biased by O(1/L), some per cent at L = 10, unless
``pilot`` is used. It may be negative (with ``coefficient="regression"`` and L <= 5 it is now and then), and the root of a value
near 0 has a huge gradient: train with ``squared=True``. With a few hundred points on a CPU the extra operations take as long
as twice the directions. The guard against dividing by 0 is absolute, as in the released code: data of spread below about 1e-6
get the plain estimate, so bring data to an ordinary scale first.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

from weightroom.transport.base import require, sample_directions, transport_cost_1d

__all__ = ["SlicedWassersteinLoss", "sliced_wasserstein"]

ControlVariate = Literal["lower", "upper"] | None
Coefficient = Literal["paper", "regression"]
Reduction = Literal["mean", "sum", "none"]


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor | None = None,
    y_weight: Tensor | None = None,
    projections: Tensor | None = None,
    *,
    n_projections: int = 10,
    p: float = 2.0,
    control_variate: ControlVariate = "lower",
    coefficient: Coefficient = "paper",
    squared: bool = False,
    detach_coefficient: bool = False,
    pilot: int = 0,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sliced Wasserstein distance between point sets, from a few random directions.

    With :math:`w_l = W_p^p(\theta_l\sharp\mu, \theta_l\sharp\nu)` and a control variate :math:`C` of known mean :math:`B`,

    .. math:: Z = \frac1L \sum_l w_l - \gamma \Bigl(\frac1L \sum_l C(\theta_l) - B\Bigr), \qquad
        \gamma \approx \mathrm{Cov}(w, C) / \mathrm{Var}(C),

    and the distance is :math:`Z^{1/p}`.

    Args:
        x: support of :math:`\mu`, (n, d) or a batch (B, n, d), floating point.
        y: support of :math:`\nu`, (m, d) or (B, m, d); ``m`` may differ from ``n``. A set without a batch is shared by the
            batch of the other.
        x_weight: weights of the points, (n,) or (B, n), >= 0; they are divided by their sum. Equal weights when None.
        y_weight: the same for ``y``, (m,) or (B, m).
        projections: unit directions (L, d), shared over the batch; drawn when None.
        n_projections: L, how many directions to draw, >= 1.
        p: order, >= 1. The control variates bound :math:`W_2^2`; for other orders they are as valid but follow the cost
            less closely.
        control_variate: "lower" (squared difference of the projected means), "upper" (that plus both projected variances), or
            None for the plain Monte Carlo estimate.
        coefficient: "paper" divides by the mean square of C about its known mean B, "regression" by that about its sample
            mean. The latter is the intercept of a least-squares line: it corrects in full when the directions are
            unbalanced, where the paper's shrinks, and its variance is mostly several times lower. The former moves the
            estimate by half a standard deviation of the costs at most.
        squared: return Z, the p-th power of the distance, which may be negative, instead of its root.
        detach_coefficient: let no gradient through :math:`\gamma`.
        pilot: K further directions, from which alone :math:`\gamma` is estimated; Z is then unbiased. 0: the same
            directions for both.
        reduction: over the batch; "none" returns (B,).
        generator: draws the directions, then those of the pilot. It may live on another device than the points.

    Returns:
        Scalar, or (B,) for a batch with ``reduction="none"``; float32 for half-precision points, which are computed in float32.

    Raises:
        ValueError: an argument is out of range or does not fit the others. NaN or inf in a set, unusable weights and
            directions that are not of unit length raise on the CPU; on other devices, where finding out would hold up the
            computation, the distance is NaN instead.
        TypeError: a set is not a floating-point tensor.
    """
    _check_options(n_projections, p, control_variate, coefficient, pilot, reduction)
    x, y = _check_sets(x, y)
    x_weight, y_weight = _check_weight("x_weight", x_weight, "x", x), _check_weight("y_weight", y_weight, "y", y)

    def draw(n: int) -> Tensor:
        return sample_directions(n, x.shape[-1], generator=generator, dtype=x.dtype, device=x.device)

    theta = draw(n_projections) if projections is None else _check_projections(projections, x)
    K = pilot if control_variate else 0
    if K:
        theta = torch.cat([theta, draw(K)])
    # Autocast would project in half precision, where points less than an ulp apart change places.
    kind = x.device.type
    half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if half else nullcontext():
        z = _estimate(x, y, x_weight, y_weight, theta, len(theta) - K, p, control_variate, coefficient, detach_coefficient)
    return _reduce(z if squared else _root(z, p), reduction)


class SlicedWassersteinLoss(nn.Module):
    """Sliced Wasserstein distance as a loss, see ``sliced_wasserstein`` for its arguments.

    Call it as ``loss(x, y, x_weight=None, y_weight=None, projections=None)``. Fresh directions are drawn at every call.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        n_projections: int = 10,
        p: float = 2.0,
        control_variate: ControlVariate = "lower",
        coefficient: Coefficient = "paper",
        squared: bool = False,
        detach_coefficient: bool = False,
        pilot: int = 0,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_options(n_projections, p, control_variate, coefficient, pilot, reduction)
        self.n_projections = n_projections
        self.p = p
        self.control_variate = control_variate
        self.coefficient = coefficient
        self.squared = squared
        self.detach_coefficient = detach_coefficient
        self.pilot = pilot
        self.reduction = reduction
        self.generator = generator
        self._clamped: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_weight: Tensor | None = None,
        y_weight: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> Tensor:
        """Returns the distance, (n, d) and (m, d) -> scalar; batches are reduced."""
        z = sliced_wasserstein(
            x, y, x_weight, y_weight, projections, n_projections=self.n_projections, p=self.p,
            control_variate=self.control_variate, coefficient=self.coefficient, squared=True,
            detach_coefficient=self.detach_coefficient, pilot=self.pilot, reduction="none", generator=self.generator,
        )  # fmt: skip
        self._clamped = None if self.squared else (z.detach() < torch.finfo(z.dtype).tiny).sum()
        return _reduce(z if self.squared else _root(z, self.p), self.reduction)

    @property
    def last_clamped(self) -> int:
        """How many estimates of the last call were too small to have a root and were clamped; 0 with ``squared``.

        They pass no gradient. Reading this waits for the device.
        """
        return 0 if self._clamped is None else int(self._clamped)

    def extra_repr(self) -> str:
        """The arguments, for ``print(loss)``."""
        names = "n_projections", "p", "control_variate", "coefficient", "squared", "detach_coefficient", "pilot", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _estimate(
    x: Tensor,
    y: Tensor,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    theta: Tensor,
    L: int,
    p: float,
    control_variate: ControlVariate,
    coefficient: Coefficient,
    detach_coefficient: bool,
) -> Tensor:
    """Z of every pair of sets; the directions after the first L are the pilot's."""
    px, py = theta @ x.mT, theta @ y.mT  # (..., L, n), (..., L, m)
    # w_l = W_p^p(theta_l # mu, theta_l # nu)
    w = transport_cost_1d(px, py, p, _per_direction(x_weight), _per_direction(y_weight))
    if control_variate is None:
        return w.mean(-1)
    delta = _mean(x, x_weight) - _mean(y, y_weight)  # m1 - m2
    C = (delta @ theta.mT).square()  # C_low(theta) = (theta . delta)^2
    B = delta.square().mean(-1, keepdim=True)  # B_low = |delta|^2 / d
    if control_variate == "upper":
        C = C + _variance(px, x_weight) + _variance(py, y_weight)  # C_up = C_low + theta^T S1 theta + theta^T S2 theta
        B = B + _variance(x.mT, x_weight).mean(-1, keepdim=True)  # B_up = B_low + (tr S1 + tr S2) / d
        B = B + _variance(y.mT, y_weight).mean(-1, keepdim=True)
    C = C - B
    gamma = _gamma(w[..., L:], C[..., L:], coefficient) if len(theta) > L else _gamma(w, C, coefficient)
    if detach_coefficient:
        gamma = gamma.detach()
    return w[..., :L].mean(-1) - gamma * C[..., :L].mean(-1)  # Z = SW - gamma (mean C - B)


def _gamma(w: Tensor, C: Tensor, coefficient: Coefficient) -> Tensor:
    """Cov(w, C) / Var(C), estimated; C comes less its known mean B."""
    L = w.shape[-1]
    about = C if coefficient == "paper" else C - C.mean(-1, keepdim=True)
    covariance = torch.linalg.vecdot(w - w.mean(-1, keepdim=True), about) / L  # centring C changes no value, but at Var(C) = 0
    # terms of 1e24 would have to cancel in the gradient
    return covariance / (torch.linalg.vecdot(about, about) / L + 1e-24)


def _per_direction(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.unsqueeze(-2)


def _mean(points: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the points of (..., n, d)."""
    return points.mean(-2) if weight is None else (weight.unsqueeze(-2) @ points).squeeze(-2)


def _variance(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Variance, with divisor n, along each row of (..., L, n)."""
    if weight is None:
        return (rows - rows.mean(-1, keepdim=True)).square().mean(-1)
    weight = weight.unsqueeze(-2)
    return (weight * (rows - (weight * rows).sum(-1, keepdim=True)).square()).sum(-1)


def _root(z: Tensor, p: float) -> Tensor:
    """Z^(1/p), where Z is at least the least normal number: below it there is no root with a finite gradient."""
    return z.clamp_min(torch.finfo(z.dtype).tiny) ** (1 / p)


def _reduce(distance: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return distance
    return distance.mean() if reduction == "mean" else distance.sum()


def _check_options(n_projections: int, p: float, control_variate: object, coefficient: str, pilot: int, reduction: str) -> None:
    for name, count, low in (("n_projections", n_projections, 1), ("pilot", pilot, 0)):
        if not isinstance(count, Integral) or count < low:
            raise ValueError(f"{name} must be an integer >= {low}, got {count!r}")
    if not (1 <= p < math.inf):
        raise ValueError(f"p must be a finite number >= 1, got {p!r}")
    choices: tuple[tuple[str, object, tuple[str | None, ...]], ...] = (
        ("control_variate", control_variate, ("lower", "upper", None)),
        ("coefficient", coefficient, ("paper", "regression")),
        ("reduction", reduction, ("mean", "sum", "none")),
    )
    for name, given, accepted in choices:
        if given not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {given!r}")


def _check_sets(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sets in the precision to compute in."""
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor) or not points.is_floating_point():
            given = points.dtype if isinstance(points, Tensor) else type(points).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {given}")
        if points.ndim not in (2, 3):
            raise ValueError(f"{name} must have shape (n, d) or (B, n, d), got {tuple(points.shape)}")
        if points.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(points.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must have the same dimension d, got {x.shape[-1]} and {y.shape[-1]}")
    if x.ndim == y.ndim == 3 and len(x) != len(y):
        raise ValueError(f"x and y must have the same batch size, got {len(x)} and {len(y)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _check_finite("x", x, dtype), _check_finite("y", y, dtype)


def _check_finite(name: str, points: Tensor, dtype: torch.dtype) -> Tensor:
    return require(points.to(dtype), points.detach().isfinite().all(), lambda: f"{name} must be finite, but contains NaN or inf")


def _check_weight(name: str, weight: Tensor | None, of: str, points: Tensor) -> Tensor | None:
    """The weights, with sum 1."""
    if weight is None:
        return None
    if weight.shape not in (points.shape[-2:-1], points.shape[:-1]):
        n = points.shape[-2]
        accepted = f"({n},)" if points.ndim == 2 else f"({n},) or {tuple(points.shape[:-1])}"
        raise ValueError(f"{name} must have shape {accepted} for {of} of {tuple(points.shape)}, got {tuple(weight.shape)}")
    masses = weight.to(points.dtype)
    total = masses.sum(-1, keepdim=True)
    ok = ((masses >= 0) & masses.isfinite()).all() & (total > 0).all()
    return require(masses, ok, lambda: f"{name} must be finite, >= 0 and have a sum > 0, got {masses.detach()}") / total


def _check_projections(projections: Tensor, points: Tensor) -> Tensor:
    d = points.shape[-1]
    if projections.ndim != 2 or projections.shape[1] != d or len(projections) == 0:
        raise ValueError(f"projections must have shape (L, {d}) for points of dimension {d}, got {tuple(projections.shape)}")
    projections = projections.to(points.dtype)
    off = (torch.linalg.vector_norm(projections.detach(), dim=1) - 1).abs().max()
    return require(projections, off <= 1e-4, lambda: f"projections must have length 1 within 1e-4, got one {off:.2g} off")

r"""Exact Euclidean projections, for solvers that end every step with one.

Each ``project_...`` returns a function of one point or of several, ``project(y) -> y`` or ``project(x, y) -> (x, y)``; several points
are projected together, as one long vector. A point is a tensor of any shape, or a dict of tensors, in which case the vector is its
entries one after the other. ``svm_margin_projection`` is called directly.

::

    project_none                 the whole space
    project_box(low, high)       low <= u <= high                       clamp
    project_affine(A, b)         A u = b                                u - A^+ (A u - b), the pseudo-inverse once
    project_halfspaces(A, b)     A u <= b                               dual non-negative least squares; on the CPU, dense
    svm_margin_projection        xi_i >= 1 - y_i (w.z_i + b)            semismooth Newton, O(n d min(n, d)) a step, some five steps

Scale the rows of A to unit norm where a solver takes steps along them; the sets stay the same. ``project_halfspaces`` is an active-set
method: some hundreds of rows, not ten thousand.

Halfspaces: Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (least distance programming). The SVM set is the
constraint of the experiments in Yao et al., ICLR 2024, arXiv 2401.16164.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightroom.errors import UsageError

__all__ = ["Layout", "Point", "project_affine", "project_box", "project_halfspaces", "project_none", "svm_margin_projection"]

#: A tensor of any shape, or a dict of tensors.
Point = Tensor | Mapping[str, Tensor]

#: Newton steps of ``svm_margin_projection`` at the most; it needs about five.
NEWTON_STEPS = 100


class Layout:
    """How a point lies in one flat vector."""

    def __init__(self, point: Any, name: str = "point") -> None:
        self.keys = tuple(point) if isinstance(point, Mapping) else None
        tensors = list(point.values()) if isinstance(point, Mapping) else [point]
        if not tensors or not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors):
            raise TypeError(f"{name} must be a floating-point tensor or a dict of them, got {_describe(point)}")
        if len({(t.dtype, t.device) for t in tensors}) > 1:
            raise UsageError(f"{name} must have one dtype and one device in all its tensors, got {_describe(point)}")
        self.shapes = [t.shape for t in tensors]
        self.sizes = [t.numel() for t in tensors]
        self.size = sum(self.sizes)
        self.plain = self.keys is None and len(self.shapes[0]) == 1

    def flat(self, point: Any) -> Tensor:
        """The point as one vector, (size,)."""
        if self.plain:
            return point
        if self.keys is None:
            return point.reshape(-1)
        return torch.cat([point[key].reshape(-1) for key in self.keys])

    def point(self, flat: Tensor) -> Any:
        """The vector in the shape of the point; differentiable."""
        if self.plain:
            return flat
        if self.keys is None:
            return flat.view(self.shapes[0])
        parts = flat.split(self.sizes)
        return {key: part.view(shape) for key, part, shape in zip(self.keys, parts, self.shapes, strict=True)}


def _describe(point: Any) -> str:
    if isinstance(point, Mapping):
        return f"{{{', '.join(f'{key!r}: {_describe(value)}' for key, value in point.items())}}}"
    return f"{point.dtype} on {point.device}" if isinstance(point, Tensor) else type(point).__name__


def _on_points(project: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A projection of vectors as one of points."""

    def call(*points: Any) -> Any:
        if all(isinstance(point, Tensor) and point.ndim == 1 for point in points):
            if len(points) == 1:
                return project(points[0])
            return torch.split_with_sizes(project(torch.cat(points)), [point.numel() for point in points])
        layouts = [Layout(point) for point in points]
        u = project(torch.cat([layout.flat(point) for layout, point in zip(layouts, points, strict=True)]))
        flats = u.split([layout.size for layout in layouts])
        parts = tuple(layout.point(flat) for layout, flat in zip(layouts, flats, strict=True))
        return parts[0] if len(points) == 1 else parts

    return call


def project_none(*points: Any) -> Any:
    """Returns one point, or the tuple of several, as it is: the projection onto the whole space."""
    return points[0] if len(points) == 1 else points


def project_box(low: float | Tensor, high: float | Tensor) -> Callable[..., Any]:
    """Returns the projection onto low <= u <= high.

    Args:
        low: a number, or a vector (n,) with n the size of all projected points together; -inf for none.
        high: likewise; inf for none.

    Raises:
        UsageError: (a ``ValueError``) a lower bound is above its upper bound, or one is NaN.
    """
    lows, highs = torch.as_tensor(low), torch.as_tensor(high)
    if not bool((lows <= highs).all()):
        raise UsageError(f"low must be <= high in every entry, got {low} and {high}")

    def project(u: Tensor) -> Tensor:
        if lows.ndim == highs.ndim == 0:
            return u.clamp(float(lows), float(highs))
        return torch.minimum(torch.maximum(u, lows.to(u)), highs.to(u))

    return _on_points(project)


def _system(A: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor]:
    if not isinstance(A, Tensor) or A.ndim != 2 or not A.is_floating_point():
        given = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise UsageError(f"A must be a floating-point matrix (rows, n), got {given}")
    right = torch.as_tensor(b, dtype=A.dtype, device=A.device).detach()
    if right.ndim > 1 or (right.ndim == 1 and len(right) != len(A)):
        raise UsageError(f"b must be a number or have one entry for each of the {len(A)} rows of A, got {tuple(right.shape)}")
    return A.detach(), right.expand(len(A)).contiguous()


def project_affine(A: Tensor, b: Tensor | float = 0.0) -> Callable[..., Any]:
    """Returns the projection onto A u = b.

    Args:
        A: (rows, n); rows may depend on one another.
        b: (rows,) or a number.

    Raises:
        UsageError: (a ``ValueError``) the shapes do not fit, or no u solves A u = b.
    """
    A, b = _system(A, b)
    inverse = torch.linalg.pinv(A)
    if not torch.allclose(A @ (inverse @ b), b, rtol=1e-6, atol=1e-8):
        raise UsageError("A u = b has no solution: b is not in the range of A")

    def project(u: Tensor) -> Tensor:
        return torch.addmv(u, inverse, torch.addmv(b, A, u, beta=-1), alpha=-1)  # u - A^+ (A u - b)

    return _on_points(project)


def project_halfspaces(A: Tensor, b: Tensor | float = 0.0) -> Callable[..., Any]:
    """Returns the projection onto A u <= b, found on the CPU in float64.

    Args:
        A: (rows, n).
        b: (rows,) or a number.

    Raises:
        UsageError: (a ``ValueError``) the shapes do not fit, or (from the projection) no u satisfies A u <= b.
    """
    from scipy.optimize import nnls

    A, b = _system(A, b)
    rows, bounds = A.double().cpu().numpy(), b.double().cpu().numpy()
    norms = np.linalg.norm(rows, axis=1)
    if np.any(bounds[norms == 0] < 0):
        raise UsageError("no u satisfies A u <= b: a row of A is 0 and its b negative")
    rows, bounds = rows[norms > 0] / norms[norms > 0, None], bounds[norms > 0] / norms[norms > 0]

    def project(u: Tensor) -> Tensor:
        start = u.detach().double().cpu().numpy()
        excess = rows @ start - bounds
        scale = excess.max(initial=0.0)
        if not scale > 0 or not np.isfinite(excess).all():
            return u  # inside, or NaN, which is the caller's to report
        # least distance: min |s| with -rows s >= excess / scale, through the non-negative least squares of [-rows^T; excess^T / scale]
        E = np.vstack([-rows.T, excess / scale])
        target = np.append(np.zeros(len(start)), 1.0)
        mu, _ = nnls(E, target, maxiter=30 * max(E.shape))
        step = np.linalg.lstsq(rows[mu > 0], excess[mu > 0], rcond=None)[0]  # onto the boundaries that mu found
        if (excess - rows @ step).max() > 1e-6 * scale:
            raise UsageError("no u satisfies A u <= b")
        return u - torch.from_numpy(step).to(u)

    return _on_points(project)


def svm_margin_projection(w: Tensor, b: Tensor, xi: Tensor, Z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Projects the weights, bias and slacks of a linear SVM onto :math:`\xi_i \ge 1 - y_i (w \cdot z_i + b)`.

    With :math:`u = (w, b)` and the rows :math:`A_i = y_i (z_i, 1)` it minimises
    :math:`\tfrac12 |u - u_0|^2 + \tfrac12 \sum_i \max(0, 1 - A_i u - \xi_{0,i})^2` by Newton's method, and
    :math:`\xi = \max(\xi_0, 1 - A u)`.

    Args:
        w: (d,).
        b: a scalar tensor, or (1,).
        xi: (n,).
        Z: samples, (n, d), of the dtype and device of ``w``.
        y: labels -1 or 1, (n,).

    Returns:
        The projected w, b and xi, shaped as they came.

    Raises:
        UsageError: (a ``ValueError``) the shapes do not fit together.
    """
    n, d = Z.shape if Z.ndim == 2 else (-1, -1)
    if w.shape != (d,) or xi.shape != (n,) or y.shape != (n,) or b.numel() != 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("w", w), ("b", b), ("xi", xi), ("Z", Z), ("y", y)))
        raise UsageError(f"w must be (d,), b a scalar, xi (n,), Z (n, d) and y (n,), got {shapes}")
    y = y.to(Z)
    A = torch.cat([y[:, None] * Z, y[:, None]], dim=1)
    u0 = torch.cat([w, b.reshape(1)])
    u, short = u0, 1 - xi - A @ u0

    def value(u: Tensor, short: Tensor) -> Tensor:
        return ((u - u0).square().sum() + short.clamp_min(0).square().sum()) / 2

    for _ in range(NEWTON_STEPS):
        active = short > 0
        gradient = u - u0 - A[active].T @ short[active]
        step = _solve(A[active], gradient)
        along, now, slope, t = A @ step, value(u, short), gradient @ step, 1.0
        slack = 10 * torch.finfo(u.dtype).eps * now
        while t > 1e-8 and not value(u - t * step, short + t * along) <= now - 1e-4 * t * slope + slack:
            t /= 2
        u = u - t * step
        short = 1 - xi - A @ u
        if t <= 1e-8 or (t == 1 and bool(((short > 0) == active).all())):  # with the right set one step is exact
            break
    return u[:-1], u[-1].reshape(b.shape), torch.maximum(xi, xi + short)


def _solve(rows: Tensor, v: Tensor) -> Tensor:
    """(I + rows^T rows)^-1 v, through the smaller of the two Gram matrices."""
    if len(rows) < len(v):
        gram = rows @ rows.T
        return v - rows.T @ torch.cholesky_solve((rows @ v)[:, None], _cholesky(gram))[:, 0]
    return torch.cholesky_solve(v[:, None], _cholesky(rows.T @ rows))[:, 0]


def _cholesky(gram: Tensor) -> Tensor:
    gram.diagonal().add_(1)
    return torch.linalg.cholesky_ex(gram)[0]

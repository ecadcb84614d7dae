r"""LV-HBA: bilevel optimisation with constraints that couple both levels, by gradients alone.

.. math:: \min_{x, y} F(x, y) \quad \text{s.t.} \quad y \in \arg\min_{y \in Y} \{ f(x, y) : g(x, y) \le 0 \}

With :math:`Z = [0, r]^p` (:math:`[-r, r]^p` for equalities) and the proximal Lagrangian value function

.. math::
    v(x, y, z) = \min_{\theta \in Y} \max_{\lambda \in Z} f(x, \theta) + \lambda \cdot g(x, \theta)
        + \frac{|\theta - y|^2}{2 \gamma_1} - \frac{|\lambda - z|^2}{2 \gamma_2},

:math:`v(x, y, z) \le f(x, y)` at every feasible y, and equality says that y solves the lower level and z is its multiplier. LV-HBA
descends on :math:`F / c_k + f - v`, :math:`c_k = c (k + 1)^p`, over :math:`C = \{(x, y) : g(x, y) \le 0\}`, and tracks the saddle point
:math:`(\theta, \lambda)` by one step each: no Hessians, no inner loop, one projection onto C per iteration. Without g, v is the Moreau
envelope of f(x, .).

Reach for it to choose hyper-parameters of constrained models (SVMs), to weight samples by a clean validation set, or as a reference
solver where the solution of the lower level is not unique. For some hundred variables and a lower level with an invertible KKT
matrix, implicit gradients by dense linear algebra take far fewer steps.

Known not to work: rows of g that are far from unit norm (step 1 is unstable beyond ``eta`` :math:`= \min(1/\gamma_1, 1/\gamma_2) /
|J_y g|^2`, and the sign is slow growth, not NaN; a warning says so for affine g): divide each row by its norm. The error falls as
:math:`1 / c_k`, that is, slower than :math:`k^{-1/2}`: two digits are cheap, four are not. y solves the lower level only in the limit:
look at ``result.gap`` (f - v), and report what ``resolve_lower`` returns at the final x, since y also carries the upper level's gradient
and may look better than any solution of the lower level is. f must be convex in y, g convex (or affine, for equalities), and
:math:`\gamma_1` below :math:`1/(2\rho)` where f is only :math:`\rho`-weakly convex jointly. The projection onto C must be exact.

Yao, Yu, Zeng, Zhang, "Constrained Bi-Level Optimization: Proximal Lagrangian Value function Approach and Hessian-free Algorithm",
ICLR 2024, arXiv 2401.16164: the value function, the algorithm LV-HBA and its rates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightroom.errors import UsageError, check_range
from weightroom.optim.projections import Layout, Point, project_none

__all__ = ["BilevelProblem", "LVHBAResult", "ValueFunction", "lv_hba", "resolve_lower", "value_function"]

#: Iterations between looks for NaN: each look waits for the device.
CHECK_EVERY = 100
#: Rows of the Jacobian of g whose norms are looked at, evenly spaced.
ROWS = 256
#: How far from stationary the minimisation behind v may end; the error of v is of the order of its square.
VALUE_TOL = 1e-9
#: How far from feasible the projection of the start may be.
FEASIBLE = 1e-6


@dataclass(eq=False)
class BilevelProblem:
    """Minimise upper(x, y) where y minimises lower(x, .) over Y under constraint(x, y) <= 0.

    Args:
        upper: F, ``(x, y) -> scalar tensor``, of torch operations.
        lower: f, likewise; convex in y.
        constraint: g, ``(x, y) -> (p,)``; convex, or affine where ``equality``. None for none.
        project_joint: ``(x, y) -> (x, y)``, exactly onto C, the points of X x Y with g <= 0 (or g = 0); needed where there is
            a constraint, else None leaves x and y free.
        project_y: ``y -> y``, exactly onto Y; None for the whole space.
        equality: the constraint is g = 0.

    x and y are tensors or dicts of tensors. Once solved the problem remembers the shape of y, for ``resolve_lower``.

    Raises:
        UsageError: (a ``ValueError``) a constraint without ``project_joint``, or ``equality`` without a constraint.
        TypeError: an argument that should be callable is not.
    """

    upper: Callable[[Any, Any], Tensor]
    lower: Callable[[Any, Any], Tensor]
    constraint: Callable[[Any, Any], Tensor] | None = None
    project_joint: Callable[[Any, Any], tuple[Any, Any]] | None = None
    project_y: Callable[[Any], Any] | None = None
    equality: bool = False
    _y: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("upper", "lower", "constraint", "project_joint", "project_y"):
            given = getattr(self, name)
            if not callable(given) and (given is not None or name in ("upper", "lower")):
                raise TypeError(f"{name} must be callable, got {type(given).__name__}")
        if self.constraint is not None and self.project_joint is None:
            raise UsageError("project_joint is needed where there is a constraint: the exact projection (x, y) -> (x, y) onto it")
        if self.constraint is None and self.equality:
            raise UsageError("equality=True needs a constraint")


class ValueFunction(NamedTuple):
    """The value v(x, y, z) and the saddle point it is taken at."""

    value: float
    theta: Any
    lam: Tensor


@dataclass(eq=False)
class LVHBAResult:
    """What LV-HBA ends with.

    Args:
        x: upper variables, on C together with ``y``.
        y: lower variables. They solve the lower level only as far as ``gap`` says.
        theta: the tracked minimiser of the value function; not the answer.
        lam: the tracked multiplier, (p,).
        z: its proximal centre, (p,).
        history: "step" -> iterations (1, ...), and at each of them "upper" F, "lower" f, "gap" (f - v with the tracked saddle point
            for the exact one: an estimate that may be negative) and "violation" (the largest of g, or \\|g\\|, at x and y).
    """

    x: Any
    y: Any
    theta: Any
    lam: Tensor
    z: Tensor
    history: dict[str, list[float]]
    _problem: BilevelProblem = field(repr=False)
    _gammas_r: tuple[float, float, float] = field(repr=False)

    @cached_property
    def gap(self) -> float:
        """f(x, y) - v(x, y, z), with v found by minimisation, when first asked for: 0 where y solves the lower level."""
        gamma1, gamma2, r = self._gammas_r
        with torch.no_grad():
            lower = float(self._problem.lower(self.x, self.y))
        return lower - value_function(self._problem, self.x, self.y, self.z, gamma1=gamma1, gamma2=gamma2, r=r).value


class _Flat:
    """The problem as functions of flat vectors; g is empty where there is none."""

    def __init__(self, problem: BilevelProblem, x: Any, y: Any) -> None:
        self.X, self.Y, self.problem = Layout(x, "x0"), Layout(y, "y0"), problem
        zero = torch.zeros_like(self.Y.flat(y).detach())
        if self.X.flat(x).dtype != zero.dtype or self.X.flat(x).device != zero.device:
            raise UsageError("x0 and y0 must have the same dtype and device")
        self.none, problem._y = zero[:0], self.Y.point(zero)

    def F(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.upper(self.X.point(x), self.Y.point(y))

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return self.problem.lower(self.X.point(x), self.Y.point(y))

    def g(self, x: Tensor, y: Tensor) -> Tensor:
        if self.problem.constraint is None:
            return self.none
        return self.problem.constraint(self.X.point(x), self.Y.point(y)).reshape(-1)

    def P_Y(self, y: Tensor) -> Tensor:
        return y if self.problem.project_y is None else self.Y.flat(self.problem.project_y(self.Y.point(y))).detach()

    def P_C(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (self.problem.project_joint or project_none)(self.X.point(x), self.Y.point(y))
        return self.X.flat(x).detach(), self.Y.flat(y).detach()

    def low(self, r: float) -> float:
        return -r if self.problem.equality else 0.0

    def violation(self, g: Tensor) -> Tensor:
        return torch.cat([g.abs() if self.problem.equality else g, g.new_zeros(1)]).max()


@torch.no_grad()
def lv_hba(
    problem: BilevelProblem,
    x0: Point,
    y0: Point,
    *,
    steps: int,
    alpha: float = 0.05,
    beta: float = 0.1,
    eta: float = 0.3,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    c: float = 1.0,
    p: float = 0.49,
    r: float = 1000.0,
    callback: Callable[[int, LVHBAResult], object] | None = None,
    record_every: int = 100,
    trace: bool = False,
    theta0: Point | None = None,
    lam0: Tensor | None = None,
    z0: Tensor | None = None,
) -> LVHBAResult:
    r"""Solves a constrained bilevel problem by the single-loop, Hessian-free algorithm LV-HBA.

    The default step sizes are for rows of g of unit norm and an f of curvature about 1.

    Args:
        problem: the functions and projections.
        x0: start of the upper variables, projected together with ``y0``; a floating-point tensor or a dict of tensors. Everything is
            computed in its dtype (take float64) and on its device.
        y0: start of the lower variables, of the same dtype.
        steps: iterations K >= 1.
        alpha: step size > 0 of x and y.
        beta: step size > 0 of z.
        eta: step size > 0 of theta and lambda.
        gamma1: proximal parameter > 0 of theta.
        gamma2: proximal parameter > 0 of lambda.
        c: > 0, the first weight :math:`c_0` of f - v against F.
        p: in [0, 0.5), how fast :math:`c_k = c (k + 1)^p` grows.
        r: bound > 0 on each multiplier.
        callback: called after each iteration with its number (1, ...) and the result so far; True from it ends the run.
        record_every: iterations between records in ``history``; the last is recorded too.
        trace: record the gradients of the functions once and replay them, some three times faster where variables are few enough
            that torch's overhead dominates. For functions that do the same operations on every call: no minibatches, no branches.
        theta0: start of theta, projected onto Y; y when None.
        lam0: start of lambda, (p,), clipped to Z; 0 when None.
        z0: start of z, likewise.

    Returns:
        The final variables and the history; ``result.gap`` is f - v by an honest inner solve.

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range, or ``project_joint`` returns a point with a constraint violated
            by more than 1e-6 at the start or after the first iteration.
        TypeError: an argument is not of the kind named above.
        RuntimeError: an iterate became NaN or infinite; the message says between which iterations.

    Warns:
        UserWarning: g is affine and one of its rows has a norm outside [0.1, 10].

    Example::

        problem = BilevelProblem(upper, lower, constraint, project_joint=project_affine(A), equality=True)
        result = lv_hba(problem, x0, y0, steps=10_000)
        result.gap, resolve_lower(problem, result.x)
    """
    for name, value in {"alpha": alpha, "beta": beta, "eta": eta, "gamma1": gamma1, "gamma2": gamma2, "c": c, "r": r}.items():
        check_range(name, value, low=0.0, open_low=True, open_high=True)
    check_range("p", p, low=0.0, high=0.5, open_high=True)
    for name, count in {"steps": steps, "record_every": record_every}.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(f"{name} must be an integer >= 1, got {count!r}")

    q = _Flat(problem, x0, y0)
    low = q.low(r)
    x, y = q.P_C(q.X.flat(x0).detach(), q.Y.flat(y0).detach())
    _check_feasible(q, x, y, "at the start")
    _check_rows(q, x, y)
    theta = y if theta0 is None else q.P_Y(q.Y.flat(theta0).detach())
    lam, z = (_multiplier(name, given, q.g(x, y), low, r) for name, given in (("lam0", lam0), ("z0", z0)))

    def saddle(x: Tensor, y: Tensor, theta: Tensor, lam: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Step 1, without the projection onto Y: descent in theta, ascent in lambda, both from the old ones."""
        th = theta.detach().requires_grad_()
        with torch.enable_grad():
            f, g = q.f(x, th), q.g(x, th)
        (d_theta,) = _gradients((th,), (f, one), (g, lam))  #                grad_theta f + J_theta g^T lambda
        theta = theta.lerp(y, eta / gamma1).sub_(d_theta, alpha=eta)  #      theta - eta (d_theta + (theta - y) / gamma1)
        lam = lam.lerp(z, eta / gamma2).add_(g.detach(), alpha=eta)  #       lambda + eta (g - (lambda - z) / gamma2)
        return theta, lam.clamp_(low, r)

    def descend(x: Tensor, y: Tensor, theta: Tensor, lam: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step 2, without the projection onto C, and step 3, all from the new theta and lambda."""
        xs, ys = x.detach().requires_grad_(), y.detach().requires_grad_()
        with torch.enable_grad():
            F, f, f_theta, g_theta = q.F(xs, ys), q.f(xs, ys), q.f(xs, theta), q.g(xs, theta)
        d_x, d_y = _gradients((xs, ys), (F, weight), (f, one), (f_theta, -one), (g_theta, -lam))  # of F/c_k + f - v
        x = x.sub(d_x, alpha=alpha)
        y = y.lerp(theta, -alpha / gamma1).sub_(d_y, alpha=alpha)  #         y - alpha (d_y - (y - theta) / gamma1)
        return x, y, z.lerp(lam, beta / gamma2).clamp_(low, r)  #            z + beta (lambda - z) / gamma2

    def state() -> LVHBAResult:
        return LVHBAResult(q.X.point(x), q.Y.point(y), q.Y.point(theta), lam, z, history, problem, (gamma1, gamma2, r))

    history: dict[str, list[float]] = {name: [] for name in ("step", "upper", "lower", "gap", "violation")}
    one = x.new_ones(())
    first, second = saddle, descend
    if trace:
        first, second = _trace(saddle, x, y, theta, lam, z), _trace(descend, x, y, theta, lam, z, one)
    for k in range(steps):
        c_k = c * (k + 1) ** p
        theta, lam = first(x, y, theta, lam, z)
        theta = q.P_Y(theta)
        x, y, z = second(x, y, theta, lam, z, one / c_k)
        x, y = q.P_C(x, y)

        if k == 0 or (k + 1) % CHECK_EVERY == 0 or k + 1 == steps:
            _check_finite(k, x, y, lam)
        if k == 0:
            _check_feasible(q, x, y, "after the first iteration")
        stop = callback is not None and callback(k + 1, state()) is True
        if stop or (k + 1) % record_every == 0 or k + 1 == steps:
            _record(history, k + 1, q, x, y, theta, lam, z, gamma1, gamma2)
        if stop:
            break
    return state()


def value_function(
    problem: BilevelProblem,
    x: Point,
    y: Point,
    z: Tensor | None = None,
    *,
    gamma1: float = 1.0,
    gamma2: float = 1.0,
    r: float = 1000.0,
) -> ValueFunction:
    """Computes the proximal Lagrangian value function v(x, y, z) by minimisation.

    Its gradient is, at the saddle point, that of f(x, theta) + lam . g(x, theta) in x, (y - theta) / gamma1 in y and
    (lam - z) / gamma2 in z.

    Args:
        problem: the functions and the projection onto Y.
        x: upper variables.
        y: proximal centre of theta.
        z: proximal centre of lambda, (p,), clipped to Z; 0 when None.
        gamma1: proximal parameter > 0 of theta.
        gamma2: proximal parameter > 0 of lambda.
        r: bound > 0 on each multiplier.

    Returns:
        The value, and the saddle point (theta, lam).

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range.
        RuntimeError: a function is NaN or infinite.
    """
    for name, value in {"gamma1": gamma1, "gamma2": gamma2, "r": r}.items():
        check_range(name, value, low=0.0, open_low=True)
    q = _Flat(problem, x, y)
    xs, ys = q.X.flat(x).detach(), q.Y.flat(y).detach()
    low = q.low(r)
    point = _saddle(q, xs, ys, _multiplier("z", z, q.g(xs, ys), low, r), gamma1, gamma2, low, r, VALUE_TOL)
    return ValueFunction(point.value, q.Y.point(point.theta), point.lam)


def resolve_lower(problem: BilevelProblem, x: Point, y0: Point | None = None, *, tol: float = 1e-7, max_rounds: int = 200) -> Any:
    """Solves the lower level at a fixed x: what a bilevel solver's x is really worth.

    Proximal method of multipliers, (y, z) <- the saddle point of v(x, y, z) with growing gamma, until the KKT conditions hold. For
    smooth convex lower levels. Where the solution is not unique, the one found depends on the start.

    Args:
        problem: the functions and the projection onto Y.
        x: upper variables.
        y0: start, and with it the shape of y; 0 in the shape that ``lv_hba`` (or ``value_function``) last saw for this problem
            when None.
        tol: how far the KKT conditions may be from holding (largest entry).
        max_rounds: rounds at the most.

    Returns:
        y, in the shape of ``y0``.

    Raises:
        UsageError: (a ``ValueError``) the shape of y is not known.
        RuntimeError: a function is NaN or infinite.

    Warns:
        RuntimeWarning: the conditions do not hold to ``tol`` in the end.
    """
    check_range("tol", tol, low=0.0, open_low=True)
    if y0 is None:
        if problem._y is None:
            raise UsageError("the shape of y is not known: give y0, or solve the problem with lv_hba first")
        y0 = problem._y
    q = _Flat(problem, x, y0)
    xs, y = q.X.flat(x).detach(), q.P_Y(q.Y.flat(y0).detach())
    z, gamma1, gamma2, low = torch.zeros_like(q.g(xs, y)), 1.0, 1.0, q.low(math.inf)
    residual = math.inf
    for _ in range(max_rounds):
        point = _saddle(q, xs, y, z, gamma1, gamma2, low, math.inf, tol / 4)
        moved = torch.cat([(point.theta - y) / gamma1, (point.lam - z) / gamma2]).abs().max()  # 0 iff (y, z) was a KKT point
        y, z, gamma1, gamma2 = point.theta, point.lam, min(10 * gamma1, 1e4), min(3 * gamma2, 100.0)
        residual = float(moved) + point.residual
        if residual <= tol:
            return q.Y.point(y)
    warnings.warn(f"the lower level is solved to {residual:.1e} only, tol is {tol:g}", RuntimeWarning, stacklevel=2)
    return q.Y.point(y)


class _Saddle(NamedTuple):
    value: float
    theta: Tensor
    lam: Tensor
    residual: float


def _saddle(
    q: _Flat, x: Tensor, y: Tensor, z: Tensor, gamma1: float, gamma2: float, low: float, high: float, tol: float
) -> _Saddle:
    """The saddle point of v: lambda has a closed form for each theta, and what is left is smooth and strongly convex in theta."""

    def maximiser(g: Tensor) -> Tensor:
        return (z + gamma2 * g).clamp(low, high)

    def phi(th: Tensor) -> Tensor:
        g = q.g(x, th)
        lam = maximiser(g)
        return q.f(x, th) + lam @ g + (th - y).square().sum() / (2 * gamma1) - (lam - z).square().sum() / (2 * gamma2)

    minimise = _newton if q.problem.project_y is None else partial(_fista, project=q.P_Y, lipschitz=1 / gamma1)
    with torch.enable_grad():
        theta = minimise(phi, y, tol)
        (gradient,) = torch.autograd.grad(phi(at := theta.clone().requires_grad_()), at)
    residual = float((q.P_Y(theta - gradient) - theta).abs().max())
    with torch.no_grad():
        return _Saddle(float(phi(theta)), theta, maximiser(q.g(x, theta)), residual)


def _newton(phi: Callable[[Tensor], Tensor], theta: Tensor, tol: float) -> Tensor:
    """Newton's method with conjugate gradients: of second order, and for smooth, strongly convex functions only."""
    for _ in range(100):
        th = theta.detach().requires_grad_()
        value = phi(th)
        (gradient,) = torch.autograd.grad(value, th, create_graph=True)
        g = gradient.detach()
        if not math.isfinite(now := value.item()):
            raise RuntimeError(f"the lower level is {now} where v(x, y, z) is computed")
        if not math.isfinite(left := float(g.abs().max())):
            raise RuntimeError(f"the gradient of the lower level is {left} where v(x, y, z) is computed")
        if left <= tol:
            break
        step = _conjugate_gradients(lambda v: torch.autograd.grad(gradient, th, v, retain_graph=True)[0], g)  # noqa: B023
        slope, t = float(g @ step), 1.0
        slack = 10 * torch.finfo(theta.dtype).eps * abs(now)
        with torch.no_grad():
            while t > 1e-8 and not phi(theta - t * step) <= now - 1e-4 * t * slope + slack:
                t /= 2
        if t <= 1e-8:
            break
        theta = theta - t * step
    return theta.detach()


def _conjugate_gradients(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solves matvec(x) = b, positive definite, as accurately as Newton's method can use."""
    x, r = torch.zeros_like(b), b
    d, rr = r, r @ r
    stop = rr * torch.minimum(rr, rr.new_tensor(1e-4)).clamp_min(1e-16)
    for _ in range(4 * len(b)):
        if rr <= stop:
            break
        h = matvec(d)
        step = rr / (d @ h)
        x, r = x + step * d, r - step * h
        new = r @ r
        d, rr = r + new / rr * d, new
    return x


def _fista(
    phi: Callable[[Tensor], Tensor], theta: Tensor, tol: float, *, project: Callable[[Tensor], Tensor], lipschitz: float
) -> Tensor:
    """Accelerated projected gradient. Step size and restarts look at gradients alone, which stay exact where values are rounded."""

    def gradient_at(theta: Tensor) -> Tensor:
        th = theta.detach().requires_grad_()
        return torch.autograd.grad(phi(th), th)[0]

    u, t = theta, 1.0
    for _ in range(20_000):
        gradient = gradient_at(u)
        if not math.isfinite(left := float((project(u - gradient) - u).abs().max())):
            raise RuntimeError(f"the gradient of the lower level is {left} where v(x, y, z) is computed")
        if left <= tol:
            return u
        while True:
            new = project(u - gradient / lipschitz)
            d = new - u
            if (gradient_at(new) - gradient) @ d <= lipschitz / 2 * d @ d or lipschitz > 1e16:
                break
            lipschitz *= 2
        t_new = 1.0 if d @ (new - theta) < 0 else (1 + math.sqrt(1 + 4 * t * t)) / 2
        theta, u, t = new, new + (t - 1) / t_new * (new - theta), t_new
    return theta


def _gradients(at: tuple[Tensor, ...], *terms: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the weighted sum of terms, 0 where none depends on a variable."""
    terms = tuple(term for term in terms if term[0].requires_grad)
    if not terms:
        return tuple(torch.zeros_like(variable) for variable in at)
    outputs, weights = zip(*terms, strict=True)
    return torch.autograd.grad(outputs, at, weights, materialize_grads=True)


def _trace(step: Callable[..., Any], *example: Tensor) -> Callable[..., Any]:
    """The operations of ``step``, forwards and backwards, without the functions and the graph that they came from."""
    from torch.fx.experimental.proxy_tensor import make_fx

    example = tuple(t.clone() for t in example)  # arguments that are one tensor would become one argument
    try:
        graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
    except Exception as error:
        raise UsageError(f"trace=True needs functions of torch operations that never look at a value: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(torch.jit.trace(graph, example, check_trace=False).eval()).forward


def _multiplier(name: str, given: Any, g: Tensor, low: float, high: float) -> Tensor:
    if given is None:
        return torch.zeros_like(g)
    start = torch.as_tensor(given, dtype=g.dtype, device=g.device).detach().reshape(-1)
    if start.shape != g.shape:
        raise UsageError(f"{name} must have one entry for each of the {len(g)} constraints, got {len(start)}")
    return start.clamp(low, high)


def _check_feasible(q: _Flat, x: Tensor, y: Tensor, when: str) -> None:
    violation = float(q.violation(q.g(x, y)))
    if not violation <= FEASIBLE:
        raise UsageError(
            f"project_joint must return points that satisfy the constraint to {FEASIBLE:g}: "
            f"{when} it is violated by {violation:.2g}"
        )


def _check_rows(q: _Flat, x: Tensor, y: Tensor) -> None:
    """Warns of badly scaled rows, if g is affine: g(u + d) + g(u - d) = 2 g(u)."""
    u = torch.cat([x, y])
    d = torch.linspace(0.5, 1.5, len(u)).to(u)

    def g(u: Tensor) -> Tensor:
        return q.g(u[: len(x)], u[len(x) :])

    middle, sides = g(u), g(u + d) + g(u - d)
    if not torch.allclose(sides, 2 * middle, rtol=1e-6, atol=1e-6 * (1 + float(q.violation(sides.abs())))) or not len(middle):
        return
    with torch.enable_grad():
        rows = g(u.requires_grad_())
        picked = rows[:: -(-len(rows) // ROWS)]
        norms = torch.stack([torch.autograd.grad(row, u, retain_graph=True)[0].norm() for row in picked])
    least, most = float(norms.min()), float(norms.max())
    if least < 0.1 or most > 10:
        warnings.warn(
            f"scale constraints: the rows of the constraint have norms from {least:.3g} to {most:.3g}; divide each by its norm",
            UserWarning,
            stacklevel=4,
        )


def _check_finite(k: int, *iterates: Tensor) -> None:
    if not math.isfinite(sum(float(t.sum()) for t in iterates)):
        first = k // CHECK_EVERY * CHECK_EVERY + 1
        raise RuntimeError(
            f"an iterate became NaN or infinite between iterations {first} and {k + 1}: "
            "scale the rows of the constraint to unit norm, or take smaller eta and alpha"
        )


def _record(
    history: dict[str, list[float]], step: int, q: _Flat, x: Tensor, y: Tensor, theta: Tensor, lam: Tensor, z: Tensor,
    gamma1: float, gamma2: float,
) -> None:  # fmt: skip
    lower = q.f(x, y)
    tracked = (
        q.f(x, theta) + lam @ q.g(x, theta) + (theta - y).square().sum() / (2 * gamma1) - (lam - z).square().sum() / (2 * gamma2)
    )
    values: tuple[Any, ...] = (step, q.F(x, y), lower, lower - tracked, q.violation(q.g(x, y)))
    for name, value in zip(history, values, strict=True):
        history[name].append(float(value))

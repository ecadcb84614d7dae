"""LV-HBA against solutions by hand, other solvers and finite differences."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from weightroom.optim import (
    BilevelProblem,
    lv_hba,
    project_affine,
    project_box,
    project_halfspaces,
    resolve_lower,
    svm_margin_projection,
    value_function,
)

F64 = torch.float64


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def llc(n, scaled=True, **more):
    """Merely convex lower level; solution x = -0.3, y1 = 0.7, y2 = -0.4, multiplier -1 (of the raw row of ones)."""
    s = 1 / math.sqrt(3 * n) if scaled else 1.0
    return BilevelProblem(
        upper=lambda x, y: ((x - y[n:]).square().sum() + (y[:n] - 1).square().sum()) / 2,
        lower=lambda x, y: y[:n] @ y[:n] / 2 - x @ y[:n] + y[n:].sum(),
        constraint=lambda x, y: (s * (x.sum() + y.sum())).reshape(1),
        project_joint=project_affine(torch.full((1, 3 * n), s, dtype=F64)),
        equality=True,
        **more,
    )


def start(n, value=10.0):
    return torch.full((n,), value, dtype=F64), torch.full((2 * n,), value, dtype=F64)


def error(x):
    return float((x + 0.3).norm() / (0.3 * math.sqrt(len(x))))


def qp(seed, p=2, equality=False, project_y=None):
    """Quadratic f, affine g with unit rows in (x, y), 3 + 4 variables."""
    root, mix, center = normal(seed, 4, 4), normal(seed + 1, 4, 3), normal(seed + 2, 4)
    H = root @ root.T / 4 + 0.1 * torch.eye(4, dtype=F64)
    G = torch.nn.functional.normalize(normal(seed + 3, p, 7), dim=1)
    h = normal(seed + 4, p) if equality else normal(seed + 4, p).abs()
    return BilevelProblem(
        upper=lambda x, y: (x - 1).square().sum() + (y + 1).square().sum(),
        lower=lambda x, y: y @ H @ y / 2 + y @ (mix @ x - center) + (x**4).sum(),
        constraint=lambda x, y: G[:, :3] @ x + G[:, 3:] @ y - h,
        project_joint=(project_affine if equality else project_halfspaces)(G, h),
        project_y=project_y,
        equality=equality,
    )


def slsqp(problem, x, n=4, box=None):
    """The lower level by another solver."""
    ineq = lambda y: -problem.constraint(x, torch.from_numpy(y)).numpy()  # noqa: E731

    def jac(y):
        t = torch.from_numpy(y).requires_grad_()
        return -torch.autograd.functional.jacobian(lambda t: problem.constraint(x, t), t).numpy()

    def value(y):
        t = torch.from_numpy(y).requires_grad_()
        v = problem.lower(x, t)
        return v.item(), torch.autograd.grad(v, t)[0].numpy()

    constraint = {"type": "eq" if problem.equality else "ineq", "fun": ineq, "jac": jac}
    bounds = None if box is None else [(-box, box)] * n
    options = {"ftol": 1e-15, "maxiter": 500}
    return torch.from_numpy(
        minimize(value, np.zeros(n), jac=True, method="SLSQP", constraints=constraint, bounds=bounds, options=options).x
    )


# ---- the solution


def test_llc_converges_to_its_solution():
    n, errors = 10, {}
    result = lv_hba(llc(n), *start(n), steps=20_000, trace=True, callback=lambda k, s: errors.__setitem__(k, error(s.x)))
    assert errors[20_000] < 0.01
    assert result.lam.item() == pytest.approx(-math.sqrt(3 * n), rel=0.01)
    assert (result.y[:n] - 0.7).abs().max() < 0.01
    assert (result.y[n:] + 0.4).abs().max() < 0.01
    # the error is proportional to 1 / c_k
    scaled = {k: errors[k] * k**0.49 for k in (10_000, 20_000)}
    assert scaled[10_000] == pytest.approx(scaled[20_000], rel=0.1)
    assert scaled[20_000] == pytest.approx(0.78, rel=0.02)


def test_first_steps_are_those_of_the_formulas():
    n, alpha, beta, eta, g1, g2, c, p, r = 3, 0.04, 0.2, 0.1, 2.0, 3.0, 0.5, 0.3, 0.6
    s = 1 / math.sqrt(3 * n)
    ones = np.ones(n)

    def project(x, y):
        w = np.concatenate([x, y])
        w -= w.mean()
        return w[:n], w[n:]

    x, y = project(np.arange(n) + 1.0, 3.0 - np.arange(2 * n))
    theta, lam, z = np.linspace(0, 1, 2 * n), 0.4, -0.3
    for k in range(5):
        gradient = np.concatenate([theta[:n] - x, ones])
        new = theta - eta * (gradient + s * lam + (theta - y) / g1)
        lam = np.clip(lam + eta * (s * (x.sum() + theta.sum()) - (lam - z) / g2), -r, r)
        theta = new
        c_k = c * (k + 1) ** p
        d_x = (x - y[n:]) / c_k - y[:n] + theta[:n] - s * lam
        d_y = np.concatenate([y[:n] - 1, y[n:] - x]) / c_k + np.concatenate([y[:n] - x, ones]) - (y - theta) / g1
        x, y = project(x - alpha * d_x, y - alpha * d_y)
        z = np.clip(z + beta * (lam - z) / g2, -r, r)
    for trace in (False, True):
        result = lv_hba(
            llc(n), torch.arange(n) + torch.ones(n, dtype=F64), 3.0 - torch.arange(2 * n, dtype=F64), steps=5, alpha=alpha,
            beta=beta, eta=eta, gamma1=g1, gamma2=g2, c=c, p=p, r=r, theta0=torch.linspace(0, 1, 2 * n, dtype=F64),
            lam0=[0.4], z0=[-0.3], trace=trace,
        )  # fmt: skip
        for ours, expected in ((result.x, x), (result.y, y), (result.theta, theta), (result.lam, [lam]), (result.z, [z])):
            np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_without_scaled_rows_the_authors_constants_diverge_and_a_warning_says_so():
    # the six numbers of the authors' toy script, which is deterministic
    errors = {}
    x0, y0 = torch.full((100,), -20.0, dtype=F64), torch.full((200,), 10.0, dtype=F64)
    settings = dict(steps=1500, alpha=0.008, beta=0.02, eta=0.01, gamma1=10, gamma2=10, c=0.025, p=0.3)  # noqa: C408
    more = dict(lam0=torch.ones(1), z0=-torch.ones(1), callback=lambda k, s: errors.__setitem__(k, error(s.x)))  # noqa: C408
    with pytest.warns(UserWarning, match=r"scale constraints: .* from 17.3 to 17.3"):
        lv_hba(llc(100, scaled=False), x0, y0, **settings, **more)
    found = [errors[k] for k in (1, 10, 100, 500, 1000, 1500)]
    np.testing.assert_allclose(found, [30.1681511, 1.9974463, 15.1393282, 132.9009554, 123.8510675, 118.6497852], rtol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lv_hba(llc(100), x0, y0, **settings, **more)
    assert errors[1500] < 0.46  # and falling as 1 / c_k, which is 0.22 by then


@pytest.mark.parametrize("equality", [False, True])
def test_coupled_qp_approaches_the_best_of_a_search(equality):
    problem = qp(0, p=2, equality=equality)
    x0, y0 = torch.zeros(3, dtype=F64), torch.zeros(4, dtype=F64)
    result = lv_hba(problem, x0, y0, steps=10_000, alpha=0.02, trace=True)

    def value(x):
        x = torch.from_numpy(x)
        return float(problem.upper(x, slsqp(problem, x)))

    best = minimize(value, result.x.numpy(), method="Nelder-Mead", options={"maxiter": 80, "fatol": 1e-5}).fun
    assert value(result.x.numpy()) <= best + 0.05 * abs(best)
    assert 0 <= result.gap < 0.02
    torch.testing.assert_close(resolve_lower(problem, result.x), result.y, atol=0.3, rtol=0)


# ---- the value function


@given(seed=st.integers(0, 1000), equality=st.booleans(), boxed=st.booleans(), gamma1=st.floats(0.1, 3), gamma2=st.floats(0.1, 3))
@settings(max_examples=6, deadline=None)
def test_value_function_is_the_saddle_value(seed, equality, boxed, gamma1, gamma2):
    problem = qp(seed, equality=equality, project_y=project_box(-0.5, 0.5) if boxed else None)
    x, y, r = normal(seed + 9, 3), normal(seed + 10, 4), 0.8
    z = (0.3 * normal(seed + 11, 2)).clamp(-r if equality else 0.0, r)
    v = value_function(problem, x, y, z, gamma1=gamma1, gamma2=gamma2, r=r)
    low = -r if equality else 0.0

    def inner(theta, lam):
        value = problem.lower(x, theta) + lam @ problem.constraint(x, theta)
        return value + (theta - y).square().sum() / (2 * gamma1) - (lam - z).square().sum() / (2 * gamma2)

    assert v.value == pytest.approx(float(inner(v.theta, v.lam)), abs=1e-9)
    assert v.lam.clamp(low, r).equal(v.lam)
    project = project_box(-0.5, 0.5) if boxed else lambda t: t
    torch.testing.assert_close(project(v.theta), v.theta)
    for k in range(20):  # no other theta is lower, no other lambda higher
        d = 0.3 * normal(k, 6)
        assert inner(project(v.theta + d[:4]), v.lam) >= v.value - 1e-8
        assert inner(v.theta, (v.lam + d[4:]).clamp(low, r)) <= v.value + 1e-8


@given(seed=st.integers(0, 1000), equality=st.booleans())
@settings(max_examples=6, deadline=None)
def test_value_is_at_most_f_and_equal_at_the_solution_with_its_multiplier(seed, equality):
    problem = qp(seed, equality=equality)
    x = 0.3 * normal(seed + 9, 3)
    solution = resolve_lower(problem, x, torch.zeros(4, dtype=F64))
    f = lambda y: float(problem.lower(x, y))  # noqa: E731
    # the multiplier: a fixed point of z -> lam
    z = torch.zeros(2, dtype=F64)
    for _ in range(30):
        z = value_function(problem, x, solution, z, gamma2=100.0).lam
    assert value_function(problem, x, solution, z).value == pytest.approx(f(solution), abs=1e-6)
    assert problem.constraint(x, solution).max() < 1e-6
    for k in range(5):  # feasible, and not the solution
        g = problem.constraint(x, torch.zeros(4, dtype=F64))
        J = torch.autograd.functional.jacobian(lambda y: problem.constraint(x, y), torch.zeros(4, dtype=F64))
        y = (project_affine if equality else project_halfspaces)(J, -g)(2 * normal(k, 4))
        for centre in (z, torch.zeros(2, dtype=F64)):
            assert value_function(problem, x, y, centre).value < f(y) + 1e-9
    elsewhere = value_function(problem, x, solution, z + 1)  # the solution with another multiplier
    assert elsewhere.value < f(solution) - 1e-4


@pytest.mark.parametrize("equality", [False, True])
@pytest.mark.parametrize("project_y", [None, project_box(-0.5, 0.5)])
def test_gradients_of_the_value_by_danskin(equality, project_y):
    problem, g1, g2 = qp(3, equality=equality, project_y=project_y), 0.7, 1.3
    point = {"x": normal(1, 3), "y": normal(2, 4), "z": normal(3, 2).abs() + 0.2}
    value = lambda at: value_function(problem, at["x"], at["y"], at["z"], gamma1=g1, gamma2=g2)  # noqa: E731
    v = value(point)
    xs = point["x"].clone().requires_grad_()
    (d_x,) = torch.autograd.grad(problem.lower(xs, v.theta) + v.lam @ problem.constraint(xs, v.theta), xs)
    formulas = {"x": d_x, "y": (point["y"] - v.theta) / g1, "z": (v.lam - point["z"]) / g2}
    h = 1e-5
    for name, gradient in formulas.items():
        for i in range(len(gradient)):
            e = torch.zeros_like(gradient)
            e[i] = h
            up, down = value({**point, name: point[name] + e}).value, value({**point, name: point[name] - e}).value
            assert (up - down) / (2 * h) == pytest.approx(float(gradient[i]), abs=1e-6)


@given(seed=st.integers(0, 1000), gamma=st.floats(0.05, 20))
@settings(max_examples=20, deadline=None)
def test_without_constraint_it_is_the_moreau_envelope(seed, gamma):
    root, b = normal(seed, 4, 4), normal(seed + 1, 4)
    H = root @ root.T
    problem = BilevelProblem(upper=lambda x, y: y.sum(), lower=lambda x, y: y @ H @ y / 2 - y @ (b + x))
    x, y = normal(seed + 2, 4), normal(seed + 3, 4)
    v = value_function(problem, x, y, gamma1=gamma)
    theta = torch.linalg.solve(H + torch.eye(4, dtype=F64) / gamma, b + x + y / gamma)
    torch.testing.assert_close(v.theta, theta, rtol=1e-6, atol=1e-6)
    envelope = problem.lower(x, theta) + (theta - y).square().sum() / (2 * gamma)
    assert v.value == pytest.approx(float(envelope), abs=1e-9)
    assert v.lam.shape == (0,)


@pytest.mark.parametrize("n", [1, 2, 4, 30])
def test_lower_levels_of_one_curvature_are_solved_exactly(n):
    problem = BilevelProblem(lambda x, y: x.square().sum(), lambda x, y: (y - x).square().sum() / 2)
    x, y = torch.full((n,), 1.5, dtype=F64), torch.zeros(n, dtype=F64)
    v = value_function(problem, x, y)
    torch.testing.assert_close(v.theta, torch.full((n,), 0.75, dtype=F64))
    assert v.value == pytest.approx(n * 1.5**2 / 4)
    torch.testing.assert_close(resolve_lower(problem, x, y), x)


def test_nan_in_the_first_iteration_is_not_blamed_on_the_projection():
    row = torch.ones(1, 4, dtype=F64) / 2
    problem = BilevelProblem(
        lambda x, y: (x * math.nan).sum(), lambda x, y: y.square().sum(), lambda x, y: (x.sum() + y.sum()).reshape(1) / 2,
        project_joint=project_affine(row), equality=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="iteration"):
        lv_hba(problem, torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), steps=5)


def test_without_constraint_the_solver_works_too():
    # y*(x) = x, so F = |x - 2|^2 / 2 + |y|^2 / 2 is least at x = 1
    problem = BilevelProblem(
        upper=lambda x, y: ((x - 2).square().sum() + y.square().sum()) / 2, lower=lambda x, y: (x - y).square().sum() / 2
    )
    result = lv_hba(problem, torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64), steps=5000, trace=True)
    assert (result.x - 1).abs().max() < 0.02
    assert result.gap == pytest.approx(0.25 * float((result.y - result.x).square().sum()), rel=1e-6)  # min over y: half of it
    assert result.gap > 0
    assert result.lam.shape == result.z.shape == (0,)


# ---- the lower level again


@given(seed=st.integers(0, 1000), equality=st.booleans(), boxed=st.booleans())
@settings(max_examples=6, deadline=None)
def test_resolved_lower_level_is_that_of_another_solver(seed, equality, boxed):
    problem = qp(seed, p=1 if equality else 3, equality=equality, project_y=project_box(-2.0, 2.0) if boxed else None)
    x = 0.2 * normal(seed + 9, 3)
    ours, other = resolve_lower(problem, x, torch.ones(4, dtype=F64)), slsqp(problem, x, box=2.0 if boxed else None)
    torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)
    assert float(problem.lower(x, ours)) <= float(problem.lower(x, other)) + 1e-6


def test_resolve_a_lower_level_with_many_solutions():
    n, problem = 50, llc(50)
    x = normal(0, n)
    y = resolve_lower(problem, x, torch.zeros(2 * n, dtype=F64))
    torch.testing.assert_close(y[:n], x + 1, atol=1e-6, rtol=0)
    assert problem.constraint(x, y).abs() < 1e-6


def svm_problem(n=30, d=3):
    Z = normal(0, n, d)
    y = torch.where(Z[:, 0] + 0.5 * normal(1, n) > 0, 1.0, -1.0).double()

    def project(x, v):
        w, b, xi = svm_margin_projection(v["w"], v["b"], v["xi"], Z, y)
        return x.clamp(-5, 5), {"w": w, "b": b, "xi": xi}

    problem = BilevelProblem(
        upper=lambda x, v: torch.nn.functional.softplus(-y * (Z @ v["w"] + v["b"])).mean(),
        lower=lambda x, v: (v["w"].square().sum() + (x.exp() * v["xi"].square()).sum()) / 2,
        constraint=lambda x, v: 1 - v["xi"] - y * (Z @ v["w"] + v["b"]),
        project_joint=project,
    )
    v0 = {"w": torch.ones(d, dtype=F64), "b": torch.zeros((), dtype=F64), "xi": torch.ones(n, dtype=F64)}
    return problem, torch.zeros(n, dtype=F64), v0, Z, y


@pytest.mark.parametrize("trace", [False, True])
def test_dicts_of_tensors_and_an_svm(trace):
    problem, x0, v0, Z, y = svm_problem()
    seen = []

    def callback(k, state):
        seen.append(float(problem.constraint(state.x, state.y).max()))
        assert state.lam.min() >= 0
        assert state.z.min() >= 0

    result = lv_hba(problem, x0, v0, steps=150, eta=0.02, callback=callback, trace=trace)
    assert max(seen) <= 1e-9
    assert {k: t.shape for k, t in result.y.items()} == {k: t.shape for k, t in v0.items()}
    assert (result.x != x0).any()
    solved = resolve_lower(problem, result.x)  # the dict's shape is remembered
    # the primal problem without slacks
    A = torch.cat([y[:, None] * Z, y[:, None]], dim=1).numpy()
    weights = result.x.exp().numpy()
    primal = lambda u: u[:-1] @ u[:-1] / 2 + weights @ np.maximum(0, 1 - A @ u) ** 2 / 2  # noqa: E731
    best = minimize(primal, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(np.append(solved["w"].numpy(), solved["b"]), best.x, atol=1e-5)


def test_resolve_needs_the_shape_of_y():
    problem = qp(0)
    x = torch.zeros(3, dtype=F64)
    with pytest.raises(ValueError, match="shape of y is not known"):
        resolve_lower(problem, x)
    lv_hba(problem, x, torch.zeros(4, dtype=F64), steps=1)
    assert resolve_lower(problem, x).shape == (4,)


def test_resolve_warns_when_it_does_not_converge():
    with pytest.warns(RuntimeWarning, match="solved to .* only"):
        resolve_lower(qp(0), normal(0, 3), torch.zeros(4, dtype=F64), max_rounds=1)


# ---- the run


@given(seed=st.integers(0, 1000), equality=st.booleans())
@settings(max_examples=6, deadline=None)
def test_iterates_stay_in_their_sets(seed, equality):
    problem, r = qp(seed, p=2, equality=equality, project_y=project_box(-3.0, 3.0)), 0.2

    def callback(k, state):
        g = problem.constraint(state.x, state.y)
        assert (g.abs() if equality else g).max() <= 1e-9
        for multiplier in (state.lam, state.z):
            assert multiplier.clamp(-r if equality else 0.0, r).equal(multiplier)
        assert state.theta.abs().max() <= 3

    lam0 = torch.full((2,), -9.0)
    result = lv_hba(problem, 3 * normal(1, 3), 3 * normal(2, 4), steps=40, r=r, callback=callback, lam0=lam0, z0=-lam0)
    assert max(result.history["violation"]) <= 1e-9


def test_history_and_callback():
    calls = []
    result = lv_hba(llc(4), *start(4), steps=25, record_every=10, callback=lambda k, s: calls.append((k, len(s.history["step"]))))
    assert result.history["step"] == [10, 20, 25]
    assert calls == [(k, (k - 1) // 10) for k in range(1, 26)]
    problem = llc(4)
    assert result.history["upper"][-1] == pytest.approx(float(problem.upper(result.x, result.y)))
    assert result.history["lower"][-1] == pytest.approx(float(problem.lower(result.x, result.y)))
    stopped = lv_hba(llc(4), *start(4), steps=25, callback=lambda k, s: k == 7)
    assert stopped.history["step"] == [7]
    assert stopped.x.equal(lv_hba(llc(4), *start(4), steps=7).x)


def test_tracked_gap_approaches_the_real_one():
    result = lv_hba(llc(5), *start(5), steps=5000, trace=True)
    assert result.history["gap"][-1] == pytest.approx(result.gap, rel=1e-3)
    assert result.gap > 0


def test_z_moves_towards_the_multiplier_and_nothing_given_is_changed():
    x0, y0 = start(4)
    lam0, z0, theta0 = torch.ones(1, dtype=F64), torch.ones(1, dtype=F64), y0.clone()
    problem, kept = llc(4), []
    result = lv_hba(
        problem, x0, y0, steps=50, lam0=lam0, z0=z0, theta0=theta0, callback=lambda k, s: kept.append((s.x, s.y, s.theta))
    )
    assert (x0 == 10).all()
    assert (y0 == 10).all()
    assert (theta0 == 10).all()
    assert lam0.item() == z0.item() == 1
    assert result.z.item() < 0
    assert not any(t.requires_grad for t in (x0, y0, theta0, result.x, result.y, result.theta, result.lam, result.z))
    assert not any(t.requires_grad for ts in kept for t in ts)
    assert len({t[0].sum().item() for t in kept}) == 50  # states of the callback are not overwritten


def test_frozen_variables_by_a_projection_that_returns_them():
    frozen = torch.zeros(4, dtype=F64)
    A = torch.full((1, 8), 1 / math.sqrt(12), dtype=F64)
    base = llc(4)
    problem = BilevelProblem(
        base.upper, base.lower, base.constraint, project_joint=lambda x, y: (frozen, project_affine(A)(y)), equality=True
    )
    result = lv_hba(problem, *start(4), steps=30)
    assert result.x.equal(frozen)
    assert not frozen.requires_grad


def test_functions_that_ignore_a_variable():
    problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: y.square().sum())
    result = lv_hba(problem, torch.ones(2, dtype=F64), torch.ones(3, dtype=F64), steps=3)
    assert result.x.equal(torch.ones(2, dtype=F64))
    matrix = lv_hba(problem, torch.ones(2, 2, dtype=F64), torch.ones(3, 1, dtype=F64), steps=3)
    assert matrix.y.shape == (3, 1)
    assert matrix.y.view(-1).equal(result.y)


def test_float32_stays():
    problem = BilevelProblem(lambda x, y: (x.sum() - y).square().sum(), lambda x, y: (y - x).square().sum())
    assert lv_hba(problem, torch.ones(2), torch.ones(2), steps=2).y.dtype == torch.float32


def test_trace_refuses_functions_that_look_at_values():
    branch = lambda x, y: y.square().sum() if y.sum() > 0 else y.sum()  # noqa: E731
    problem = BilevelProblem(branch, lambda x, y: y.square().sum())
    x = torch.ones(2, dtype=F64)
    lv_hba(problem, x, x, steps=2)
    with pytest.raises(ValueError, match="trace=True needs"):
        lv_hba(problem, x, x, steps=2, trace=True)


def test_nan_names_the_iterations():
    calls = [0]

    def upper(x, y):
        calls[0] += 1
        return (x.sum() + y.sum()) * (math.nan if calls[0] == 251 else 1.0)

    problem = BilevelProblem(upper, lambda x, y: (x - y).square().sum())
    x = torch.ones(2, dtype=F64)
    with pytest.raises(RuntimeError, match="between iterations 201 and 300"):
        lv_hba(problem, x, x, steps=1000, record_every=10_000)
    calls[0] = 240
    with pytest.raises(RuntimeError, match="between iterations 1 and 20"):
        lv_hba(problem, x, x, steps=20, record_every=10_000)
    with pytest.raises(RuntimeError, match="lower level is nan"):
        value_function(BilevelProblem(upper, lambda x, y: y.sum() * math.nan), x, x)


def test_infeasible_projections_are_found_at_step_zero():
    base = llc(4)
    for project, when in ((lambda x, y: (x, y), "at the start"), (lambda x, y: (x, y + 1e-4), "at the start")):
        problem = BilevelProblem(base.upper, base.lower, base.constraint, project_joint=project, equality=True)
        with pytest.raises(ValueError, match=f"project_joint .* {when}"):
            lv_hba(problem, *start(4), steps=5)
    problem = BilevelProblem(base.upper, base.lower, base.constraint, project_joint=lambda x, y: (x, y), equality=True)
    with pytest.raises(ValueError, match="after the first iteration"):
        lv_hba(problem, *start(4, 0.0), steps=5)


def test_scale_warning_is_for_affine_constraints_alone():
    def solve(constraint, project):
        problem = BilevelProblem(lambda x, y: y.sum(), lambda x, y: (x - y).square().sum(), constraint, project)
        lv_hba(problem, torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64), steps=1)

    def ball(x, y):
        return x, y / y.norm().clamp_min(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(lambda x, y: (y.square().sum() - 1).reshape(1), ball)  # its gradient at the start is 0
        solve(lambda x, y: (y.sum() - 9).reshape(1), lambda x, y: (x, y))
    row = torch.full((1, 4), 0.01, dtype=F64)
    with pytest.warns(UserWarning, match="scale constraints"):
        solve(lambda x, y: 0.01 * (x.sum() + y.sum()).reshape(1), project_halfspaces(row))


@pytest.mark.parametrize(
    "argument, value",
    [
        *((name, 0.0) for name in ("alpha", "beta", "eta", "gamma1", "gamma2", "c", "r")),
        ("alpha", -1.0), ("eta", math.nan), ("p", 0.5), ("p", -0.1), ("steps", 0), ("steps", 1.5), ("record_every", 0),
        ("lam0", torch.zeros(3)), ("z0", torch.zeros(2)),
    ],
)  # fmt: skip
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=argument):
        lv_hba(llc(4), *start(4), **{"steps": 1, argument: value})


def test_bad_problems():
    f = lambda x, y: y.sum()  # noqa: E731
    with pytest.raises(ValueError, match="project_joint is needed"):
        BilevelProblem(f, f, f)
    with pytest.raises(ValueError, match="needs a constraint"):
        BilevelProblem(f, f, equality=True)
    with pytest.raises(TypeError, match="lower must be callable"):
        BilevelProblem(f, None)
    with pytest.raises(TypeError, match="x0 must be a floating-point tensor"):
        lv_hba(BilevelProblem(f, f), torch.ones(2, dtype=torch.long), torch.ones(2), steps=1)
    with pytest.raises(TypeError, match="y0 must be a floating-point tensor"):
        lv_hba(BilevelProblem(f, f), torch.ones(2), [1.0], steps=1)
    with pytest.raises(ValueError, match="same dtype"):
        lv_hba(BilevelProblem(f, f), torch.ones(2), torch.ones(2, dtype=F64), steps=1)
    with pytest.raises(ValueError, match="gamma1"):
        value_function(BilevelProblem(f, f), torch.ones(2), torch.ones(2), gamma1=0)
    with pytest.raises(ValueError, match="tol"):
        resolve_lower(BilevelProblem(f, f), torch.ones(2), torch.ones(2), tol=0)

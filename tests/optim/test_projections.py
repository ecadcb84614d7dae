"""The projections: exact, idempotent, non-expansive, on tensors and dicts, one point or two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightroom.optim import project_affine, project_box, project_halfspaces, project_none, svm_margin_projection


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed, n):
    return torch.where(normal(seed, n) > 0, 1.0, -1.0).double()


def halfspaces(seed, rows, n):
    A = normal(seed, rows, n)
    return A, A @ normal(seed + 1, n) + normal(seed + 2, rows).abs()  # some point satisfies A u <= b


def svm(seed, n, d):
    """Projection of the vector (w, b, xi) and its set as A u <= b."""
    Z, y = normal(seed, n, d), labels(seed + 1, n)
    A = -torch.cat([y[:, None] * Z, y[:, None], torch.eye(n, dtype=torch.float64)], dim=1)

    def project(u):
        return torch.cat([t.reshape(-1) for t in svm_margin_projection(u[:d], u[d], u[d + 1 :], Z, y)])

    return project, A, -torch.ones(n, dtype=torch.float64)


def sets(seed):
    A, b = normal(seed, 3, 8), normal(seed + 1, 3)
    return {
        "none": project_none,
        "box": project_box(-0.5, 0.7),
        "box of vectors": project_box(-normal(seed, 8).abs(), normal(seed + 1, 8).abs()),
        "affine": project_affine(A, b),
        "affine, dependent rows": project_affine(torch.cat([A, 2 * A]), torch.cat([b, 2 * b])),
        "halfspaces": project_halfspaces(*halfspaces(seed, 6, 8)),
        "svm": svm(seed, 4, 3)[0],
    }


@pytest.mark.parametrize("name", sets(0))
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-2, 1.0, 100.0]))
@settings(max_examples=20, deadline=None)
def test_idempotent_and_non_expansive(name, seed, scale):
    project = sets(seed)[name]
    a, b = scale * normal(seed + 5, 8), scale * normal(seed + 6, 8)
    pa, pb = project(a), project(b)
    torch.testing.assert_close(project(pa), pa, rtol=1e-9, atol=1e-9)
    assert (pa - pb).norm() <= (a - b).norm() + 1e-9
    # the obtuse angle of a projection onto a convex set: (a - Pa) . (Pb - Pa) <= 0
    assert (a - pa) @ (pb - pa) <= 1e-8 * (1 + a.norm() * (pb - pa).norm())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_results_lie_in_their_sets(seed):
    u = 10 * normal(seed, 8)
    A, b = normal(seed + 1, 3, 8), normal(seed + 2, 3)
    assert (A @ project_affine(A, b)(u) - b).abs().max() < 1e-10
    A, b = halfspaces(seed, 12, 8)
    assert (A @ project_halfspaces(A, b)(u) - b).max() < 1e-10
    assert project_box(-1.0, 2.0)(u).clamp(-1, 2).equal(project_box(-1.0, 2.0)(u))
    project, A, b = svm(seed, 4, 3)
    assert (A @ project(u) - b).max() < 1e-12


@pytest.mark.parametrize("n, d", [(3, 5), (40, 4), (60, 20)])  # fewer and more samples than features: both Gram matrices
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_svm_projection_is_that_of_a_quadratic_program(n, d, scale):
    project, A, b = svm(n, n, d)
    u = scale * normal(7, d + 1 + n)
    torch.testing.assert_close(project(u), project_halfspaces(A, b)(u), rtol=0, atol=1e-8 * max(1.0, scale))
    # and satisfies its optimality conditions: u - Pu = A^T mu, mu >= 0 on active rows alone
    p = project(u)
    mu = p[d + 1 :] - u[d + 1 :]
    torch.testing.assert_close(u - p, A.T @ mu, rtol=0, atol=1e-9 * max(1.0, scale))
    assert mu.min() >= 0
    assert (mu * (b - A @ p)).abs().max() < 1e-9 * max(1.0, scale) ** 2


def test_svm_projection_keeps_shapes_and_leaves_feasible_points_alone():
    Z, y = normal(0, 5, 2), labels(1, 5)
    for b in (torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)):
        w, new_b, xi = svm_margin_projection(normal(2, 2), b, torch.full((5,), 100.0, dtype=torch.float64), Z, y.long())
        assert w.equal(normal(2, 2))
        assert new_b.equal(b)
        assert (xi == 100).all()


def test_a_halfspace_by_hand():
    project = project_halfspaces(torch.tensor([[3.0, 4.0]]), 5.0)
    torch.testing.assert_close(project(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))  # from 25 to 5 along (3, 4)/5
    inside = torch.tensor([0.1, 0.2])
    assert project(inside) is inside


def test_halfspaces_that_nearly_oppose_meet_far_away():
    A = torch.tensor([[1.0, 1e-3], [-1.0, 1e-3]], dtype=torch.float64)
    b = torch.tensor([-1.0, -1.0], dtype=torch.float64)  # y <= -1000
    torch.testing.assert_close(
        project_halfspaces(A, b)(torch.zeros(2).double()), torch.tensor([0.0, -1000.0]).double(), atol=1e-6, rtol=0
    )


def test_two_points_are_projected_together():
    A, b = normal(0, 2, 5), normal(1, 2)
    for project in (project_affine(A, b), project_halfspaces(A, b), project_box(-0.1, torch.arange(5.0).double())):
        x, y = project(normal(2, 2), normal(3, 3))
        whole = project(torch.cat([normal(2, 2), normal(3, 3)]))
        assert torch.cat([x, y]).equal(whole)
        mixed = project(normal(2, 2), {"a": normal(3, 3)[:2].view(2, 1), "b": normal(3, 3)[2]})
        assert mixed[1]["a"].shape == (2, 1)
        assert mixed[1]["b"].shape == ()
        torch.testing.assert_close(torch.cat([mixed[0], mixed[1]["a"].view(-1), mixed[1]["b"].view(1)]), whole)
    assert project_none(x, y) == (x, y)
    assert project_none(x) is x


def test_dtype_stays():
    for project in (project_halfspaces(torch.ones(1, 3).double()), project_box(torch.zeros(3).double(), 1.0)):
        assert project(torch.ones(3)).dtype == torch.float32


def test_nan_passes_through():
    u = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    assert project_halfspaces(torch.ones(1, 2).double(), 0.0)(u).isnan().any()
    w, _, _ = svm_margin_projection(u, u[1], u, torch.ones(2, 2).double(), torch.ones(2))
    assert w.isnan().any()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: project_box(1.0, 0.0), "low must be <= high"),
        (lambda: project_box(math.nan, 0.0), "low must be <= high"),
        (lambda: project_affine(torch.ones(3)), "A must be a floating-point matrix"),
        (lambda: project_affine(torch.ones(1, 3, dtype=torch.long)), "A must be a floating-point matrix"),
        (lambda: project_affine(torch.ones(2, 3), torch.ones(3)), "b must be a number or have one entry"),
        (lambda: project_affine(torch.ones(2, 3), torch.tensor([0.0, 1.0])), "has no solution"),
        (lambda: project_halfspaces(torch.zeros(1, 2), -1.0), "no u satisfies"),
        (lambda: project_halfspaces(torch.tensor([[1.0], [-1.0]]), -1.0)(torch.zeros(1)), "no u satisfies"),
        (lambda: svm_margin_projection(*map(torch.ones, (2, 1, 3)), torch.ones(4, 2), torch.ones(4)), r"got w \(2,\), b \(1,\)"),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_points_must_be_floating_point():
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        project_box(0.0, 1.0)(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="one dtype"):
        project_box(0.0, 1.0)({"a": torch.ones(1), "b": torch.ones(1).double()})

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightroom.adversarial import DONE, PGDAT
from weightroom.losses import KLDROReduction


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)


def batch(n=12, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 2, 3, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


class Scalar(nn.Module):
    """Binary logistic regression with one weight: logits (0, theta x)."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x):
        z = self.theta * x[:, 0]
        return torch.stack([torch.zeros_like(z), z], 1)


def solution(theta, x, y, lam, c, eps, low=0.0, high=1.0):
    """The perturbation that the attack looks for, by bisection on its derivative (it is unique where lam is large enough)."""
    lb, ub = max(-eps, low - x), min(eps, high - x)
    sign = 1.0 if y == 0 else -1.0  # l = softplus(sign theta (x + delta))

    def slope(d):
        barrier = c * (-1 / (ub - d) + 1 / (d - lb)) if c else 0.0
        return sign * theta / (1 + math.exp(-sign * theta * (x + d))) - lam * d + barrier

    a, b = lb + 1e-12, ub - 1e-12
    for _ in range(200):
        m = (a + b) / 2
        a, b = (m, b) if slope(m) > 0 else (a, m)
    return (a + b) / 2


@pytest.mark.parametrize(("lam", "c", "eps"), [(1.0, 0.05, 0.4), (1.0, 0.0, 3.0), (0.6, 0.2, 0.3)])
@pytest.mark.parametrize("y", [0, 1])
def test_the_implicit_gradient_is_the_derivative_of_the_loss_at_the_solution(lam, c, eps, y, monkeypatch):
    theta, x = 1.3, 0.5
    bounds = None if eps > 1 else (0.0, 1.0)
    low, high = (-9.0, 9.0) if bounds is None else bounds
    sign = 1.0 if y == 0 else -1.0
    value = lambda t: math.log1p(math.exp(sign * t * (x + solution(t, x, y, lam, c, eps, low, high))))  # noqa: E731
    h = 1e-4
    expected = (value(theta + h) - value(theta - h)) / (2 * h)

    model, inputs, labels = Scalar(theta), torch.tensor([[x]], dtype=torch.float64), torch.tensor([y])
    objective = DONE(eps=eps, bounds=bounds, hypergradient="implicit", lam=lam, barrier=c, loss_curvature=True)
    monkeypatch.setattr(objective, "attack", lambda *_: inputs + solution(theta, x, y, lam, c, eps, low, high))
    objective(model, inputs, labels).backward()
    assert float(model.theta.grad) == pytest.approx(expected, abs=1e-4)
    model.theta.grad = None
    objective.loss_curvature = False  # a diagonal without the curvature of the loss: nearer than the first order
    objective(model, inputs, labels).backward()
    diagonal = float(model.theta.grad)
    model.theta.grad = None
    objective.hypergradient = "first_order"
    objective(model, inputs, labels).backward()
    assert abs(diagonal - expected) < abs(float(model.theta.grad) - expected)


def test_the_implicit_gradient_of_a_network_agrees_with_finite_differences_of_its_own_formula():
    # d/dtheta <grad_delta l, v> with v fixed is (grad l(delta + h v) - grad l(delta - h v)) / 2h.
    model, (x, y) = net(torch.float64), batch(dtype=torch.float64)
    objective = DONE(r=1e6, eps=0.1, hypergradient="implicit", steps=3).double()
    torch.manual_seed(1)
    attacked = objective.attack(model, x, y)
    torch.manual_seed(1)
    objective(model, x, y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    attacked.requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(attacked), y, reduction="sum"), attacked)
    v, h = objective._solve(g, attacked, x), 1e-5
    model.zero_grad()
    pair = [F.cross_entropy(model(attacked.detach() + s * h * v), y) for s in (1, -1)]
    (F.cross_entropy(model(attacked.detach()), y) + (pair[0] - pair[1]) / (2 * h)).backward()
    for p, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


def test_conjugate_gradients_solve_with_the_full_hessian():
    model, (x, y) = net(torch.float64), batch(4, dtype=torch.float64)
    objective = DONE(eps=0.1, hypergradient="implicit", lam=20.0, barrier=0.0, loss_curvature=True)
    attacked = (x + 0.01).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(attacked), y, reduction="sum"), attacked, create_graph=True)
    v = objective._solve(g, attacked, x)
    for i in range(4):
        f = lambda d, i=i: F.cross_entropy(model(d.reshape(1, 1, 2, 3)), y[i : i + 1])  # noqa: E731
        hessian = 20 * torch.eye(6, dtype=torch.float64) - torch.autograd.functional.hessian(f, attacked[i].detach().flatten())
        torch.testing.assert_close(v[i].flatten(), torch.linalg.solve(hessian, g[i].detach().flatten()), rtol=1e-6, atol=1e-9)


def test_the_barrier_keeps_the_attack_strictly_inside_its_box():
    model, (x, y) = net(), batch(64)
    x[:8] = 0.0
    x[8:16] = 1.0
    for barrier in (1e-6, 0.05, 5.0):
        attacked = DONE(eps=0.2, hypergradient="implicit", barrier=barrier, steps=7).attack(model, x, y)
        low, high = (x - 0.2).clamp_min(0), (x + 0.2).clamp_max(1)
        assert (attacked > low).all()
        assert (attacked < high).all()
    centre = (low + high) / 2  # a strong barrier holds it in the middle of the box
    many = DONE(eps=0.2, hypergradient="implicit", lam=0.0, barrier=50.0, steps=60, step_size=0.005).attack(model, x, y)
    assert (many - centre).abs().max() < 0.01


def test_a_strong_penalty_on_the_length_shrinks_the_attack():
    model, (x, y) = net(), batch()
    sizes = [
        float((DONE(eps=0.3, lam=lam, steps=40, step_size=0.01).attack(model, x, y) - x).abs().mean())
        for lam in (0.0, 5.0, 500.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.02


def test_without_an_attack_it_is_the_robust_reduction_of_the_clean_losses():
    model, (x, y) = net(), batch()
    losses = F.cross_entropy(model(x), y, reduction="none")
    expected = KLDROReduction(0.4)(losses)
    for mode in ("first_order", "implicit"):
        assert torch.equal(DONE(r=0.4, eps=0.0, hypergradient=mode)(model, x, y), expected)


def test_a_large_temperature_is_adversarial_training():
    model, (x, y) = net(), batch()
    torch.manual_seed(5)
    ours = DONE(r=1e7, eps=0.1)(model, x, y)
    torch.manual_seed(5)
    theirs = PGDAT(eps=0.1)(model, x, y)
    torch.testing.assert_close(ours, theirs)


def test_the_value_is_the_same_in_both_modes_and_only_the_gradient_differs():
    model, (x, y) = net(), batch()
    values, gradients = [], []
    for mode in ("first_order", "implicit"):
        torch.manual_seed(0)
        model.zero_grad()
        loss = DONE(eps=0.1, hypergradient=mode, lam=1.0, barrier=0.05)(model, x, y)
        loss.backward()
        values.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*values)
    assert (gradients[0] - gradients[1]).norm() > 1e-4 * gradients[0].norm()


def test_the_running_mean_goes_with_the_state():
    model, (x, y) = net(), batch()
    objective = DONE(r=0.5, eps=0.1)
    objective(model, x, y)
    fresh = DONE(r=0.5, eps=0.1)
    fresh.load_state_dict(objective.state_dict())
    assert torch.equal(fresh.reduction.log_u, objective.reduction.log_u)
    assert not torch.isnan(fresh.reduction.log_u)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0.0}, "r must be"),
        ({"ema": 0.0}, "ema must be"),
        ({"hypergradient": "exact"}, "hypergradient"),
        ({"lam": -1.0}, "lam must be"),
        ({"barrier": -0.1}, "barrier must be"),
        ({"hypergradient": "implicit", "lam": 0.0, "barrier": 0.0}, "needs lam > 0 or barrier > 0"),
        ({"barrier": 0.1, "norm": "l2"}, "barrier belongs to norm='linf'"),
        ({"max_weight": -1.0}, "max_weight must be"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DONE(**arguments)


def test_a_loss_that_is_not_finite_is_refused():
    model, (x, y) = net(), batch()
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="losses must be finite"):
        DONE(eps=0.0)(model, x, y)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.adversarial import SmoothAdversarialCompSum
from weightroom.losses import comp_sum_loss

K = 4


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, K)).double()


def batch(n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(n, 6, generator=generator, dtype=torch.float64), torch.randint(K, (n,), generator=generator)


def seeded(call):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return call()


def differences(h: Tensor, y: Tensor) -> Tensor:
    """D with entries h_y - h_k, for each k."""
    return h.gather(1, y[:, None]) - h


class Shifted(nn.Module):
    """A model that adds a number to all its logits wherever the input is not that of the clean batch."""

    def __init__(self, model: nn.Module, clean: Tensor, shift: float) -> None:
        super().__init__()
        self.model, self.clean, self.shift = model, clean, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + (0.0 if torch.equal(x, self.clean) else self.shift)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_loss_and_gradient_are_those_of_the_definition(tau):
    model, (x, y) = net(), batch()
    objective = SmoothAdversarialCompSum(tau, 0.5, 0.7, 0.1, steps=4)
    loss = seeded(lambda: objective(model, x, y))
    moved = seeded(lambda: objective.attack(model, x, y))
    change = differences(model(moved), y) - differences(model(x), y)  # not detached: the gradient flows through both
    wanted = comp_sum_loss(model(x), y, tau, 0.5) + 0.7 * change.norm(dim=1).mean()
    torch.testing.assert_close(loss, wanted)
    ours, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)


def test_without_room_it_is_the_clean_loss():
    model, (x, y) = net(), batch()
    for tau, rho in ((1.0, 1.0), (1.5, 0.25)):
        loss = SmoothAdversarialCompSum(tau, rho, nu=1.0, eps=0.0)(model, x, y)
        torch.testing.assert_close(loss, comp_sum_loss(model(x), y, tau, rho), atol=2e-6, rtol=0)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        assert all(g.isfinite().all() for g in gradient)
    loss = SmoothAdversarialCompSum(1.0, 1.0, 1.0, 0.0)(model, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y), atol=2e-6, rtol=0)


def test_one_number_added_to_all_logits_of_the_attacked_inputs_does_not_matter():
    model, (x, y) = net(), batch()
    objective = SmoothAdversarialCompSum(eps=0.1)
    plain, shifted = (seeded(lambda m=m: objective(m, x, y)) for m in (model, Shifted(model, x, 5.0)))
    torch.testing.assert_close(plain, shifted)


def test_more_nu_never_lowers_the_loss():
    model, (x, y) = net(), batch()
    losses = [
        seeded(lambda nu=nu: SmoothAdversarialCompSum(1.0, 0.5, nu, 0.1)(model, x, y)).item() for nu in (0.0, 0.3, 1.0, 4.0)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[1]
    penalties = [(loss - losses[0]) / nu for loss, nu in zip(losses[1:], (0.3, 1.0, 4.0), strict=True)]
    assert max(penalties) - min(penalties) < 1e-9


def test_sup_of_a_linear_model_is_eps_times_the_largest_singular_value():
    W = torch.randn(K, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(6, K, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(W)
    x, y = batch()
    objective = SmoothAdversarialCompSum(1.0, 1.0, 1.0, 0.1, "l2", steps=200, bounds=None)
    moved = objective.attack(model, x, y)
    found = (differences(model(moved), y) - differences(model(x), y)).norm(dim=1)
    wanted = 0.1 * torch.stack([torch.linalg.matrix_norm(W[k] - W, 2) for k in y])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_attack_climbs_the_norm_and_not_the_cross_entropy():
    model, (x, y) = net(), batch(40)
    objective = SmoothAdversarialCompSum(eps=0.1)
    value = objective.target(model, x, y)
    moved = objective.attack(model, x, y)
    random = x + 0.1 * (2 * torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) - 1)
    assert (value(moved) > value(random)).all()
    assert (value(x) == 0).all()
    lower = F.cross_entropy(model(moved), y, reduction="none") < F.cross_entropy(model(x), y, reduction="none")
    assert lower.any()  # it moves towards the label where that moves the differences more


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("rho", [0.25, 1.0])
def test_it_bounds_the_adversarial_margin_loss_from_above(tau, rho):
    # Phi^tau of the sum of margin losses min(1, max(0, 1 - D / rho)) at any perturbed input, for nu >= sqrt(K - 1) / rho.
    model, (x, y) = net(), batch(40)
    with torch.no_grad():
        model[2].weight *= 5

    def phi(u: Tensor) -> Tensor:
        return torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)

    def margin_loss(moved: Tensor) -> Tensor:
        ramp = (1 - differences(model(moved), y) / rho).clamp(0, 1)
        return phi(ramp.sum(1) - 1)  # the label's own term is 1

    nu = math.sqrt(K - 1) / rho
    for n in range(20):
        noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(n))
        moved = x + 0.1 * (2 * noise - 1)
        change = (differences(model(moved), y) - differences(model(x), y)).norm(dim=1)
        bound = comp_sum_loss(model(x), y, tau, rho, reduction="none") + nu * change
        assert (margin_loss(moved) <= bound + 1e-9).all()


def test_half_precision_outputs_have_finite_gradients():
    model, (x, y) = net().bfloat16(), batch()
    loss = SmoothAdversarialCompSum(eps=0.0)(model, x.bfloat16(), y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model = net().half()
    SmoothAdversarialCompSum(eps=0.0)(model, x.half(), y).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_wrong_hyper_parameters_are_named():
    for name, wrong in (("tau", -1.0), ("rho", 0.0), ("nu", -0.1), ("nu", math.inf), ("tau", math.nan)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            SmoothAdversarialCompSum(**{name: wrong})
    with pytest.raises(ValueError, match=r"^clip must be"):
        SmoothAdversarialCompSum(clip=0.5)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.adversarial import PGDAT, TRADES, pgd


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def batch(n: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(n, 6, generator=generator, dtype=torch.float64), torch.randint(4, (n,), generator=generator)


def seeded(call):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return call()


# ---- projected gradient ascent ----


def climbing(w: Tensor):
    return lambda moved: (moved * w).sum(1)


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_linear_function_is_greatest_at_the_corner_of_the_cube(start, keep):
    x, _ = batch()
    w = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = pgd(climbing(w), x, eps=0.1, start=start, keep=keep)
    torch.testing.assert_close(found, x + 0.1 * w.sign())


@pytest.mark.parametrize("start", ["gaussian", "uniform"])
def test_a_linear_function_is_greatest_at_the_end_of_its_gradient_in_the_sphere(start):
    x, _ = batch()
    w = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = pgd(climbing(w), x, eps=0.1, norm="l2", start=start, steps=60, bounds=None)
    torch.testing.assert_close(found, x + 0.1 * w / w.norm(), atol=1e-4, rtol=0)


def test_bounds_cut_the_ball():
    x = torch.tensor([[0.0, 0.05, 1.0]])
    assert torch.equal(pgd(lambda m: m.sum(1), x, eps=0.1), torch.tensor([[0.1, 0.05 + 0.1, 1.0]]))
    low, high = torch.tensor([-1.0, 0.0, 0.9]), torch.tensor([2.0, 0.1, 1.5])
    torch.testing.assert_close(pgd(lambda m: m.sum(1), x, eps=0.2, bounds=(low, high)), torch.tensor([[0.2, 0.1, 1.2]]))
    torch.testing.assert_close(pgd(lambda m: -m.sum(1), x, eps=0.2, bounds=(low, high)), torch.tensor([[-0.2, 0.0, 0.9]]))


def test_step_size_is_a_quarter_of_eps_unless_given():
    x = torch.full((3, 2), 0.5)
    seen: list[Tensor] = []

    def watch(moved: Tensor) -> Tensor:
        seen.append(moved.detach().clone())
        return moved.sum(1)

    pgd(watch, x, eps=0.2, steps=3)
    torch.testing.assert_close(seen[2] - seen[1], torch.full((3, 2), 0.05))
    seen.clear()
    pgd(watch, x, eps=0.2, steps=3, step_size=0.01)
    torch.testing.assert_close(seen[2] - seen[1], torch.full((3, 2), 0.01))


def test_best_is_kept_for_each_input_alone():
    # Steps that are too long overshoot the peak at x + 0.03: the last place is worse than one on the way.
    x = torch.full((4, 1), 0.5, dtype=torch.float64)
    peak = x[:, 0] + torch.tensor([0.03, -0.03, 0.05, 0.1], dtype=torch.float64)
    value = lambda moved: -(moved[:, 0] - peak).abs()  # noqa: E731
    last, best = (
        seeded(lambda keep=keep: pgd(value, x, eps=0.1, step_size=0.08, steps=5, keep=keep)) for keep in ("last", "best")
    )
    assert (value(best) >= value(last)).all()
    assert (value(best) > value(last)).any()
    start = x + seeded(lambda: 0.001 * torch.randn_like(x))
    assert torch.equal(seeded(lambda: pgd(lambda moved: 0 * moved[:, 0], x, eps=0.1, keep="best")), start)


@pytest.mark.parametrize(("norm", "power"), [("linf", 1), ("l2", 6)])
def test_uniform_start_fills_the_ball(norm, power):
    x = torch.full((4000, 6), 0.5, dtype=torch.float64)
    seen: list[Tensor] = []

    def watch(moved: Tensor) -> Tensor:
        seen.append(moved.detach() - x)
        return moved.sum(1)

    seeded(lambda: pgd(watch, x, eps=0.3, norm=norm, steps=1, start="uniform", bounds=None))
    start = seen[0]
    size = start.abs().flatten() if norm == "linf" else start.norm(dim=1)
    share = (size / 0.3) ** power  # of the volume within this size: uniform in [0, 1]
    assert abs(share.mean() - 0.5) < 0.02
    assert abs((share < 0.1).double().mean() - 0.1) < 0.02
    assert start.mean(0).abs().max() < 0.02


def test_objective_is_only_asked_about_inputs_that_are_allowed():
    x = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).round()

    def guard(moved: Tensor) -> Tensor:
        assert moved.min() >= 0
        assert moved.max() <= 1
        assert (moved - x).abs().max() <= 0.0005 * (1 + 1e-3)
        return moved.square().sum(1)

    pgd(guard, x, eps=0.0005, steps=4, keep="best")


def test_wrong_arguments_of_pgd_are_named():
    x, _ = batch()
    climb = climbing(torch.ones(6, dtype=torch.float64))
    for wrong, message in (
        ({"eps": -1.0}, "^eps must be"), ({"steps": 0}, "^steps must be"), ({"step_size": 0.0}, "^step_size must be"),
        ({"norm": "l1"}, "unknown norm 'l1'"), ({"start": "zero"}, "unknown start 'zero'"), ({"keep": "first"}, "unknown keep 'first'"),
        ({"bounds": (1.0, 0.0)}, "bounds must be"), ({"bounds": (0.4, 0.5)}, "x must lie within bounds"),
        ({"bounds": (torch.zeros(5), 1.0)}, "bounds must broadcast to x"), ({"bounds": (torch.zeros(2, 10, 6), 1.0)}, "bounds must broadcast"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pgd(climb, x, **{"eps": 0.1, **wrong})
    with pytest.raises(ValueError, match=r"objective must return one value per input, shape \(10,\), got \(\)"):
        pgd(lambda moved: moved.sum(), x, eps=0.1)
    with pytest.raises(TypeError, match="x must be a floating tensor, got list"):
        pgd(climb, [0.5], eps=0.1)


# ---- PGD-AT and TRADES ----


def trades_by_hand(model: nn.Module, x: Tensor, y: Tensor, beta: float, eps: float, steps: int, step: float) -> Tensor:
    """The procedure of the paper's algorithm 1, written down independently."""
    attacked = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        attacked.requires_grad_()
        kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(model(attacked), 1), F.softmax(model(x), 1))
        attacked = attacked.detach() + step * torch.autograd.grad(kl, attacked)[0].sign()
        attacked = torch.min(torch.max(attacked, x - eps), x + eps).clamp(0, 1)
    kl = nn.KLDivLoss(reduction="sum")(F.log_softmax(model(attacked), 1), F.softmax(model(x), 1)) / len(x)
    return F.cross_entropy(model(x), y) + beta * kl


def madry_by_hand(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step: float) -> Tensor:
    attacked = (x + torch.rand_like(x) * 2 * eps - eps).clamp(0, 1)
    for _ in range(steps):
        attacked.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(attacked), y), attacked)
        attacked = torch.min(torch.max(attacked.detach() + step * gradient.sign(), x - eps), x + eps).clamp(0, 1)
    return F.cross_entropy(model(attacked), y)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_is_that_of_the_paper(beta):
    model, (x, y) = net(), batch()
    ours = seeded(lambda: TRADES(beta=beta, eps=0.15, steps=7, step_size=0.04)(model, x, y))
    theirs = seeded(lambda: trades_by_hand(model, x, y, beta, 0.15, 7, 0.04))
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


def test_pgd_training_is_that_of_the_paper():
    model, (x, y) = net(), batch()
    ours = seeded(lambda: PGDAT(eps=0.15, steps=7, step_size=0.04)(model, x, y))
    theirs = seeded(lambda: madry_by_hand(model, x, y, 0.15, 7, 0.04))
    torch.testing.assert_close(ours, theirs)


def test_without_room_both_are_cross_entropy():
    model, (x, y) = net(), batch()
    clean = F.cross_entropy(model(x), y)
    torch.testing.assert_close(PGDAT(eps=0.0)(model, x, y), clean)
    torch.testing.assert_close(TRADES(eps=0.0)(model, x, y), clean)
    torch.testing.assert_close(TRADES(beta=0.0, eps=0.1)(model, x, y), clean)


def test_trades_is_linear_in_beta():
    model, (x, y) = net(), batch()
    zero, one, six = (seeded(lambda beta=beta: TRADES(beta, 0.1)(model, x, y)) for beta in (0.0, 1.0, 6.0))
    torch.testing.assert_close(six - zero, 6 * (one - zero))
    assert one > zero


def test_attacks_do_what_they_are_for():
    model, (x, y) = net(), batch(50)
    objective = PGDAT(eps=0.2)
    attacked = F.cross_entropy(model(objective.attack(model, x, y)), y, reduction="none")
    assert (attacked > F.cross_entropy(model(x), y, reduction="none")).all()


def test_confident_outputs_stay_finite():
    model, (x, y) = net(), batch()
    with torch.no_grad():
        model[2].weight *= 1e4
    loss = TRADES(eps=0.1)(model, x, y)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_wrong_beta_is_named():
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^beta must be"):
            TRADES(beta=wrong)

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightroom.losses import CompSumLoss, GCELoss, MAELoss, best_conditional_risk, comp_sum_loss, h_consistency_bound

TAUS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
taus = pytest.mark.parametrize("tau", TAUS)
K = 6


def draw(*shape: int, n: int = 12, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, K, *shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(K, (n, *shape), generator=generator)


def by_definition(h: Tensor, y: Tensor, tau: float, rho: float = 1.0) -> Tensor:
    """Phi^tau of the sum over y' != y of exp(-(h_y - h_y') / rho)."""
    u = torch.exp((h - h.gather(1, y[:, None])) / rho).sum(1) - 1
    return torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


# ---- the loss ----


@taus
@pytest.mark.parametrize("rho", [1.0, 0.3, 4.0])
def test_value_and_gradient_are_those_of_the_definition(tau, rho):
    h, y = draw()
    leaf = h.clone().requires_grad_()
    loss = comp_sum_loss(leaf, y, tau, rho, reduction="none")
    torch.testing.assert_close(loss, by_definition(h, y, tau, rho))
    p = (h / rho).softmax(1)
    slope = p.gather(1, y[:, None]) ** (tau - 1) * (p - F.one_hot(y, K)) / rho
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], slope)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_tau_1_is_cross_entropy(reduction, smoothing, weighted):
    h, y = draw(2, 3)
    y[0, 0] = -100
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 1.5], dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    torch.testing.assert_close(CompSumLoss(1.0, **options)(h, y), F.cross_entropy(h, y, **options))
    t = torch.rand(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    torch.testing.assert_close(CompSumLoss(1.0, **options)(h, t), F.cross_entropy(h, t, **options))
    one = h[0, :, 0, 0], t[0, :, 0, 0]
    torch.testing.assert_close(CompSumLoss(1.0, **options)(*one), F.cross_entropy(*one, **options))


def test_tau_1_is_cross_entropy_to_the_bit():
    h, y = draw()
    assert torch.equal(comp_sum_loss(h.float(), y, reduction="none"), F.cross_entropy(h.float(), y, reduction="none"))


def test_relatives_under_other_names():
    h, y = draw()
    p_y = h.softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(comp_sum_loss(h, y, 0.0, reduction="none"), 1 / p_y - 1)
    torch.testing.assert_close(comp_sum_loss(h, y, 2.0, reduction="none"), 1 - p_y)
    torch.testing.assert_close(CompSumLoss(2.0)(h, y), MAELoss()(h, y))
    torch.testing.assert_close(CompSumLoss(1.7)(h, y), GCELoss(0.7)(h, y))


@pytest.mark.parametrize("tau", [1 - 1e-8, 1 + 1e-8, 1 - 5e-7, 1 + 5e-7, 1 - 2e-6, 1 + 2e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_continuous_at_tau_1(tau, dtype):
    h, y = draw()
    near = comp_sum_loss(h.to(dtype), y, tau, reduction="none")
    torch.testing.assert_close(near, F.cross_entropy(h.to(dtype), y, reduction="none"), atol=1e-4, rtol=1e-5)
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert abs(best_conditional_risk(p, tau) - best_conditional_risk(p, 1.0)) < 1e-5
    assert abs(h_consistency_bound(0.1, tau, 5) - h_consistency_bound(0.1, 1.0, 5)) < 1e-5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), scale=st.floats(0, 20), low=st.floats(0, 3), high=st.floats(0, 3))
def test_decreases_in_tau_and_is_never_negative(seed, scale, low, high):
    h, y = draw(scale=scale, seed=seed)
    low, high = min(low, high), max(low, high)
    lower, higher = (comp_sum_loss(h, y, tau, reduction="none", clip=None) for tau in (low, high))
    assert (higher >= 0).all()
    assert (lower >= higher - 1e-9 * lower).all()


def test_two_classes_give_softplus():
    h = 4 * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    margin = h.gather(1, y[:, None]) - h.gather(1, 1 - y[:, None])
    torch.testing.assert_close(comp_sum_loss(h, y, reduction="none"), F.softplus(-margin).squeeze(1))


@taus
def test_probabilities_weigh_the_losses_of_the_labels(tau):
    h, y = draw(2)
    loss = CompSumLoss(tau, reduction="none")
    every = torch.stack([loss(h, torch.full_like(y, k)) for k in range(K)], 1)
    t = torch.rand(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
    torch.testing.assert_close(loss(h, t), (t * every).sum(1))
    torch.testing.assert_close(loss(h, F.one_hot(y, K).movedim(-1, 1).double()), loss(h, y))
    smooth = CompSumLoss(tau, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(smooth(h, y), 0.7 * loss(h, y) + 0.3 * every.mean(1))
    torch.testing.assert_close(smooth(h, t), 0.7 * loss(h, t) + 0.3 * every.mean(1))
    assert torch.autograd.gradcheck(CompSumLoss(tau, label_smoothing=0.3), (h.requires_grad_(), t))


def test_smoothing_leaves_out_what_is_ignored():
    h, y = draw()
    kept = y != 2
    for reduction in ("mean", "sum"):
        loss = CompSumLoss(1.5, ignore_index=2, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(loss(h, y), loss(h[kept], y[kept]))


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_clip_bounds_the_loss_and_ends_the_gradient(tau):
    h = torch.tensor([[0.0, 59.0, 0.0], [0.0, 61.0, 0.0], [0.0, 200.0, 0.0], [0.0, 1e4, 0.0]], requires_grad=True)
    y = torch.zeros(4, dtype=torch.int64)
    loss = comp_sum_loss(h, y, tau, reduction="none")
    assert loss.isfinite().all()
    most = math.expm1(60 * (1 - tau)) / (1 - tau)
    torch.testing.assert_close(loss[1:], torch.full((3,), most), rtol=1e-4, atol=0)
    assert loss[0] < 0.9 * most
    (slope,) = torch.autograd.grad(loss.sum(), h)
    assert slope[0, 0] < 0
    assert (slope[1:] == 0).all()
    torch.testing.assert_close(slope, torch.autograd.grad(comp_sum_loss(h, y, tau, reduction="sum"), h, create_graph=True)[0])
    assert comp_sum_loss(h, y, tau, clip=-10.0, reduction="none").max() < math.exp(10) / (1 - tau)
    assert comp_sum_loss(h, y, 0.0, clip=None, reduction="none")[-1] == math.inf


def test_clip_is_for_tau_below_1_alone():
    h, y = torch.tensor([[0.0, 200.0]]), torch.tensor([0])
    assert comp_sum_loss(h, y) == 200
    assert comp_sum_loss(h, y, 1.5) == comp_sum_loss(h, y, 1.5, clip=None) == 2


def test_wrong_hyper_parameters_are_named():
    h, y = draw()
    for wrong, name in (
        ({"tau": -0.1}, "tau"), ({"tau": math.nan}, "tau"), ({"tau": math.inf}, "tau"), ({"rho": 0.0}, "rho"), ({"rho": -1.0}, "rho"),
        ({"label_smoothing": 1.1}, "label_smoothing"), ({"clip": 0.0}, "clip"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be"):
            CompSumLoss(**wrong)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            comp_sum_loss(h, y, **wrong)
    with pytest.raises(TypeError, match="tau must be a real number"):
        CompSumLoss("1")
    with pytest.raises(ValueError, match=r"target must have the shape of input where it holds probabilities, got .*\(12, 5\)"):
        comp_sum_loss(h, h[:, 1:].softmax(1))
    with pytest.raises(ValueError, match="target must have the shape of input"):
        comp_sum_loss(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(TypeError, match="input must be a floating tensor"):
        comp_sum_loss(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least 2 classes"):
        comp_sum_loss(h[:, :1], h[:, :1])
    with pytest.raises(ValueError, match=r"weight must have shape \(6,\)"):
        comp_sum_loss(h, h.softmax(1), weight=torch.ones(5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@taus
def test_gpu_gives_what_the_cpu_gives(tau):
    h, y = draw(2)
    results = []
    for device in ("cpu", "cuda"):
        leaf = h.float().to(device).requires_grad_()
        loss = CompSumLoss(tau, weight=torch.arange(1.0, K + 1)).to(device)(leaf, y.to(device))
        results.append([t.cpu() for t in (loss.detach(), torch.autograd.grad(loss, leaf)[0])])
    torch.testing.assert_close(*results)


# ---- what it guarantees ----


def distributions(n: int, seed: int, classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.5 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)


def risk(p: Tensor, h: Tensor, tau: float) -> Tensor:
    """Expected loss of logits h where labels are drawn from p."""
    return comp_sum_loss(h, p, tau, reduction="none", clip=None)


@taus
def test_best_risk_is_the_least_that_a_search_finds(tau):
    p = distributions(5, seed=0)
    h = (3 * p.log() if tau >= 2 else torch.zeros_like(p)).requires_grad_()  # beyond 2, every class is a local minimum
    search = torch.optim.LBFGS([h], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        total = risk(p, h, tau).sum()
        total.backward()
        return total

    search.step(closure)
    torch.testing.assert_close(risk(p, h.detach(), tau), best_conditional_risk(p, tau), atol=1e-4 if tau >= 2 else 1e-8, rtol=0)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.9])
def test_best_risk_is_attained_where_it_is_said(tau):
    p = distributions(200, seed=2)
    torch.testing.assert_close(risk(p, p.log() / (2 - tau), tau), best_conditional_risk(p, tau))


def test_best_risk_of_labels_that_are_certain_is_zero():
    for tau in TAUS:
        torch.testing.assert_close(
            best_conditional_risk(torch.eye(3, dtype=torch.float64), tau), torch.zeros(3, dtype=torch.float64)
        )


@taus
def test_errors_are_bounded_by_the_excess_of_the_loss(tau):
    generator = torch.Generator().manual_seed(3)
    for classes in (2, 3, 10):
        p = distributions(4000, seed=classes, classes=classes)
        # from anywhere to close by, with the second likeliest class on top as often as not
        near = p.log() / max(2 - tau, 0.3)
        h = near + torch.rand(len(p), 1, generator=generator) * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        second = p.topk(2).indices[:, 1]
        h[::2] = h[::2].scatter(1, second[::2, None], h[::2].amax(1, keepdim=True) + 1e-9)
        regret = p.amax(1) - p.gather(1, h.argmax(1, keepdim=True)).squeeze(1)
        excess = (risk(p, h, tau) - best_conditional_risk(p, tau)).clamp_min(0)
        bound = h_consistency_bound(excess, tau, classes)
        assert (regret > 0).double().mean() > 0.4
        assert (regret <= bound + 1e-7).all()
        assert regret.mean() <= h_consistency_bound(excess.mean(), tau, classes)


def test_bound_of_two_classes_is_tight():
    # The wrong class on top by a hair: logits are equal, the excess is T(b) for labels with probabilities (1 +- b) / 2.
    b = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    p = torch.stack([(1 + b) / 2, (1 - b) / 2], 1)
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
        excess = risk(p, torch.zeros_like(p), tau) - best_conditional_risk(p, tau)
        torch.testing.assert_close(h_consistency_bound(excess, tau, 2), b, atol=1e-6, rtol=0)


@taus
def test_bound_grows_from_0_to_1_and_is_below_its_simple_form(tau):
    s = torch.logspace(-18, 1, 60, dtype=torch.float64)
    for n in (2, 10, 1000):
        bound = h_consistency_bound(s, tau, n)
        assert bound.dtype == torch.float64
        assert (bound.diff() >= 0).all()
        assert h_consistency_bound(0.0, tau, n) == 0
        assert h_consistency_bound(1e9, tau, n) == 1
        assert h_consistency_bound(1e9, tau, n).shape == ()
        if tau < 2:
            simple = (2**tau * (2 - tau) * s).sqrt() if tau < 1 else (2 * n ** (tau - 1) * s).sqrt()
        else:
            simple = (tau - 1) * n ** (tau - 1) * s
        assert (bound <= simple * (1 + 1e-12)).all()
        assert (bound[:20] >= 0.3 * simple[:20].clamp_max(1)).all()


def test_wrong_arguments_of_the_guarantees_are_named():
    p = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="tau must be"):
        best_conditional_risk(p, -1.0)
    for wrong in (torch.tensor([0.5, 0.6]), torch.tensor([1.5, -0.5]), torch.tensor([0, 1]), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="p must hold probabilities"):
            best_conditional_risk(wrong, 1.0)
    with pytest.raises(ValueError, match="tau must be"):
        h_consistency_bound(0.1, -1.0, 3)
    with pytest.raises(ValueError, match="n_classes must be >= 2"):
        h_consistency_bound(0.1, 1.0, 1)
    for wrong in (-0.1, torch.tensor([0.1, -0.1]), math.nan):
        with pytest.raises(ValueError, match="surrogate_excess must be >= 0"):
            h_consistency_bound(wrong, 1.0, 3)


@pytest.mark.parametrize("tau", [1.99, 1.999, 1.9999, 2 - 1e-6, 2 - 1e-9])
def test_the_bound_is_one_close_to_two(tau):
    # p = (.9, .1) and logits that prefer the second class by a hair: the zero-one regret is .8.
    p = torch.tensor([0.9, 0.1], dtype=torch.float64)
    logits = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    losses = torch.stack([comp_sum_loss(logits[None], torch.tensor([k]), tau) for k in (0, 1)])
    excess = (p * losses).sum() - best_conditional_risk(p, tau)
    assert float(h_consistency_bound(excess, tau, 2)) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("tau", [1.00001, 1.0001, 0.9999, 1.3])
def test_the_best_risk_of_float32_probabilities_keeps_its_digits(tau):
    p = torch.tensor([0.7, 0.2, 0.1])
    single, double = best_conditional_risk(p, tau), best_conditional_risk(p.double(), tau)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(double), abs=2e-6)


def test_the_number_of_classes_is_an_integer():
    with pytest.raises(ValueError, match="n_classes must be an integer"):
        h_consistency_bound(0.1, 1.0, 2.5)

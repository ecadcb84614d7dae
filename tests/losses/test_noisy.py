from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightroom import losses
from weightroom.losses import noisy

N, K = 24, 6


def draw(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, K, generator=generator, dtype=torch.float64), torch.randint(K, (N,), generator=generator)


def label_of(p: Tensor, y: Tensor) -> Tensor:
    return p.gather(1, y[:, None])[:, 0]


def over_labels(loss: torch.nn.Module, f: Tensor) -> Tensor:
    return sum(loss(f, torch.full((len(f),), y)) for y in range(f.shape[1]))


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(1)


def test_registry_has_every_rival():
    assert set(noisy.registry.values()) == {getattr(noisy, name) for name in noisy.__all__ if name.endswith("Loss")}
    assert len(set(noisy.registry.values())) == len(noisy.registry)
    assert all(getattr(losses, cls.__name__) is cls for cls in noisy.registry.values())
    assert noisy.registry["gce"]().q == 0.7
    with pytest.raises(TypeError):
        noisy.registry["mine"] = losses.GCELoss


def test_formulas():
    f, y = draw()
    p = f.softmax(1)
    p_y, e = label_of(p, y), F.one_hot(y, K).double()
    ce, nce = -p_y.log(), p_y.log() / p.log().sum(1)
    none = {"reduction": "none"}
    others = (p + 0.2).log() * (1 - e)
    cases = {
        losses.MAELoss(**none): (e - p).abs().sum(1) / 2,
        losses.GCELoss(0.4, **none): (1 - p_y**0.4) / 0.4,
        losses.SCELoss(0.3, 0.7, -5.0, **none): 0.3 * ce + 0.7 * 5.0 * (1 - p_y),
        losses.NCERCELoss(2.0, 0.5, **none): 2 * nce - 0.5 * (p * e.clamp(min=1e-4).log()).sum(1),
        losses.NCEAGCELoss(2.0, 0.5, 1.8, 3.0, **none): 2 * nce + 0.5 * (2.8**3 - (1.8 + p_y) ** 3) / 3,
        losses.NCEAULLoss(2.0, 0.5, 1.5, 0.9, **none): 2 * nce + 0.5 * ((1.5 - p_y) ** 0.9 - 0.5**0.9) / 0.9,
        losses.RLLLoss(0.2, **none): math.log(1.2 / 0.2) - (p_y + 0.2).log() + others.sum(1) / (K - 1),
        losses.CrammerSingerLoss(0.5, **none): (f - label_of(f, y)[:, None] + 0.5 * (1 - e)).amax(1),
        losses.WestonWatkinsLoss(0.5, **none): K * F.multi_margin_loss(f, y, margin=0.5, reduction="none"),
        losses.FocalLoss(1.5, **none): (1 - p_y) ** 1.5 * ce,
    }
    for loss, wanted in cases.items():
        torch.testing.assert_close(loss(f, y), wanted, msg=repr(loss))


@pytest.mark.parametrize("pi", [0.1, 0.5, 0.9])
def test_js_is_the_divergence_of_label_and_output(pi):
    f, y = draw()
    p, e = f.softmax(1), F.one_hot(y, K).double()
    m = pi * e + (1 - pi) * p
    wanted = (pi * kl(e, m) + (1 - pi) * kl(p, m)) / (-(1 - pi) * math.log(1 - pi))
    torch.testing.assert_close(losses.JSLoss(pi, reduction="none")(f, y), wanted)


def test_limits():
    f, y = draw()
    ce, mae = F.cross_entropy(f, y), losses.MAELoss()(f, y)
    torch.testing.assert_close(losses.GCELoss(1.0)(f, y), mae)
    torch.testing.assert_close(losses.GCELoss(1e-9)(f, y), ce)
    torch.testing.assert_close(losses.JSLoss(1e-9)(f, y), ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.JSLoss(1 - 1e-12)(f, y), mae, rtol=0.05, atol=0)
    torch.testing.assert_close(losses.FocalLoss(0.0)(f, y), ce)
    torch.testing.assert_close(losses.SCELoss(1.0, 0.0)(f, y), ce)
    torch.testing.assert_close(losses.SCELoss(0.0, 1.0, -1.0)(f, y), mae)
    torch.testing.assert_close(losses.NCEAGCELoss(0.0, 1.0, 5.0, 1.0)(f, y), mae)
    torch.testing.assert_close(losses.NCEAULLoss(0.0, 1.0, 5.0, 1.0)(f, y), mae)


def test_mae_teaches_something():
    # A sum of label minus probability without the absolute value would be 0 whatever the logits.
    f, y = draw()
    f.requires_grad_()
    loss = losses.MAELoss()(f, y)
    loss.backward()
    assert loss > 0.1
    assert (f.grad.gather(1, y[:, None]) < 0).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_symmetric_losses(seed, scale):
    f, _ = draw(seed, scale)
    for loss, constant in [
        (losses.MAELoss(reduction="none"), K - 1),
        (losses.NCERCELoss(1.0, 0.0, reduction="none"), 1.0),
        (losses.NCERCELoss(2.0, 0.5, -4.0, reduction="none"), 2.0 + 0.5 * 4.0 * (K - 1)),
        (losses.RLLLoss(0.1, reduction="none"), K * math.log(11.0)),
    ]:
        torch.testing.assert_close(over_labels(loss, f), torch.full((N,), float(constant), dtype=f.dtype), msg=repr(loss))


def test_the_others_are_not_symmetric():
    f, _ = draw()
    for name in ("gce", "sce", "js", "crammer-singer", "weston-watkins", "focal"):
        assert over_labels(noisy.registry[name](reduction="none"), f).std() > 1e-3


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 9999), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_every_rival_is_zero_when_right_and_never_negative(seed, scale):
    f, y = draw(seed, scale)
    sure = 100.0 * F.one_hot(y, K).double()
    for cls in noisy.registry.values():
        loss = cls(reduction="none")
        assert (loss(f, y) >= 0).all(), cls
        torch.testing.assert_close(loss(sure, y), torch.zeros(N, dtype=f.dtype), atol=1e-6, rtol=0, msg=cls.__name__)


def test_bounded_losses_stay_in_their_bounds():
    f, y = torch.full((1, K), 0.0), torch.tensor([0])
    f[0, 1] = 1e4
    for loss, bound in [
        (losses.MAELoss(), 1.0),
        (losses.GCELoss(0.5), 2.0),
        (losses.JSLoss(0.5), 2.0),
        (losses.NCERCELoss(1.0, 1.0, -4.0), 1.0 / (K - 1) + 4.0),
        (losses.RLLLoss(0.1), math.log(11.0) * (1 + 1 / (K - 1))),
    ]:
        torch.testing.assert_close(loss(f, y), torch.tensor(bound), msg=repr(loss))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: losses.GCELoss(0.0), "q must be > 0 and <= 1"),
        (lambda: losses.GCELoss(1.1), "q must be > 0 and <= 1"),
        (lambda: losses.SCELoss(alpha=-1.0), "alpha must be >= 0"),
        (lambda: losses.SCELoss(beta=-1.0), "beta must be >= 0"),
        (lambda: losses.SCELoss(A=0.0), "A must be > -inf and < 0"),
        (lambda: losses.NCERCELoss(alpha=-1.0), "alpha must be >= 0"),
        (lambda: losses.NCERCELoss(A=1.0), "A must be > -inf and < 0"),
        (lambda: losses.NCEAGCELoss(beta=-1.0), "beta must be >= 0"),
        (lambda: losses.NCEAGCELoss(a=0.0), "a must be > 0"),
        (lambda: losses.NCEAGCELoss(q=0.0), "q must be > 0"),
        (lambda: losses.NCEAULLoss(a=1.0), "a must be > 1"),
        (lambda: losses.NCEAULLoss(q=-1.0), "q must be > 0"),
        (lambda: losses.JSLoss(0.0), "pi must be > 0 and < 1"),
        (lambda: losses.JSLoss(1.0), "pi must be > 0 and < 1"),
        (lambda: losses.RLLLoss(0.0), "alpha must be > 0"),
        (lambda: losses.CrammerSingerLoss(-1.0), "margin must be >= 0"),
        (lambda: losses.WestonWatkinsLoss(-1.0), "margin must be >= 0"),
        (lambda: losses.FocalLoss(-1.0), "gamma must be >= 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_hyper_parameter_that_is_no_number():
    with pytest.raises(TypeError, match="q must be a real number, got str"):
        losses.GCELoss("0.7")


def test_focal_loss_below_one_has_a_slope_at_certainty():
    f, y = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([0])
    losses.FocalLoss(0.5)(f, y).backward()
    assert f.grad.isfinite().all()

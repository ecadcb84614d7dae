from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightroom.losses import KLDROReduction

some = st.lists(st.floats(-5, 5), min_size=1, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.float64))
temperatures = st.floats(0.05, 20)


def worst_case(losses: torch.Tensor, w: torch.Tensor, r: float) -> torch.Tensor:
    return (w * losses).sum() - r * torch.special.xlogy(w, len(w) * w).sum()


@given(losses=some, r=temperatures)
@settings(deadline=None)
def test_the_weights_attain_the_value_of_the_worst_case(losses, r):
    reduce = KLDROReduction(r, mode="batch")
    reduce(losses)
    w = reduce.weights()
    value = reduce.eval()(losses)
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(worst_case(losses, w, r)) == pytest.approx(float(value), abs=1e-10)
    assert float(value) == pytest.approx(r * math.log(torch.exp(losses / r).mean()), abs=1e-9)
    other = torch.softmax(torch.randn(len(w), generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0)
    assert float(worst_case(losses, other, r)) <= float(value) + 1e-10


@given(losses=some, r=temperatures, mode=st.sampled_from(["batch", "ema", "none"]))
@settings(max_examples=30, deadline=None)
def test_the_gradient_is_the_weights(losses, r, mode):
    losses = losses.clone().requires_grad_()
    reduce = KLDROReduction(r, mode=mode)
    value = reduce(losses)
    value.backward()
    torch.testing.assert_close(losses.grad, reduce.weights())
    torch.testing.assert_close(value, (reduce.weights() * losses).sum())
    envelope = losses.detach().clone().requires_grad_()
    if mode != "none":  # the same gradient as the value of the worst case, whose weights depend on the losses
        KLDROReduction(r).eval()(envelope).backward()
        torch.testing.assert_close(losses.grad, envelope.grad)


def test_a_large_temperature_is_the_mean_and_a_small_one_the_maximum():
    losses = torch.tensor([0.3, 2.0, 1.0, 7.0])
    for mode in ("batch", "ema"):
        mean = KLDROReduction(1e6, mode=mode)
        assert float(mean(losses)) == pytest.approx(float(losses.mean()), abs=1e-4)
        torch.testing.assert_close(mean.weights(), torch.full((4,), 0.25), atol=1e-5, rtol=0)
        assert float(mean.eval()(losses)) == pytest.approx(float(losses.mean()), abs=1e-4)
        worst = KLDROReduction(1e-3, mode=mode)
        large = torch.tensor([1e4, 1e4 - 1, 0.0], requires_grad=True)
        value = worst(large)
        value.backward()
        assert torch.equal(worst.weights(), torch.tensor([1.0, 0.0, 0.0]))
        assert torch.equal(large.grad, torch.tensor([1.0, 0.0, 0.0]))
        assert float(worst.eval()(large.detach())) == pytest.approx(1e4, rel=1e-6)


@given(losses=some, r=st.floats(0.2, 5), shift=st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_a_constant_added_to_all_losses_changes_no_weight_and_scales_u(losses, r, shift):
    plain, moved = KLDROReduction(r).double(), KLDROReduction(r).double()
    plain(losses), moved(losses + shift)
    torch.testing.assert_close(plain.weights(), moved.weights())
    assert float(moved.log_u - plain.log_u) == pytest.approx(shift / r, abs=1e-9)


def test_the_running_mean_is_that_of_the_exponentials():
    eta, r = 0.3, 0.7
    reduce = KLDROReduction(r, eta).double()
    u = None
    for seed in range(4):
        losses = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
        reduce(losses)
        m = float(torch.exp(losses / r).mean())
        u = m if u is None else (1 - eta) * u + eta * m
        assert float(reduce.log_u.exp()) == pytest.approx(u, rel=1e-12)
        torch.testing.assert_close(reduce.weights(), torch.exp(losses / r) / (6 * u))


def test_the_whole_batch_at_once_is_the_softmax():
    losses = [torch.rand(5) * 4, torch.rand(5)]
    ema, batch = KLDROReduction(0.5, 1.0), KLDROReduction(0.5, mode="batch")
    for part in losses:
        assert torch.equal(ema(part), batch(part))
        torch.testing.assert_close(batch.weights(), torch.softmax(part / 0.5, 0))
    assert torch.isnan(batch.log_u)


@pytest.mark.parametrize("mode", ["ema", "batch", "none"])
def test_equal_losses_weigh_alike(mode):
    reduce = KLDROReduction(0.3, mode=mode)
    for _ in range(3):
        assert float(reduce(torch.full((8,), 2.5))) == pytest.approx(2.5)
        torch.testing.assert_close(8 * reduce.weights(), torch.ones(8))


def test_small_batches_are_less_biased_with_the_running_mean():
    # The expected gradient of batches of 2 should be that of the whole data: weights exp(l / r) / mean exp(l / r).
    g = torch.Generator().manual_seed(0)
    losses = torch.randn(400, generator=g, dtype=torch.float64)
    exact = torch.softmax(losses, 0)
    found = {}
    for mode in ("ema", "batch"):
        reduce, total = KLDROReduction(1.0, 0.05, mode).double(), torch.zeros(400, dtype=torch.float64)
        for _ in range(40):
            for index in torch.randperm(400, generator=g).split(2):
                reduce(losses[index])
                total[index] += reduce.weights() / (40 * 200)
        found[mode] = float((total / total.sum() - exact).abs().sum())
    assert found["ema"] < 0.1 < 3 * found["ema"] < found["batch"]


def test_a_limit_on_the_weights():
    reduce = KLDROReduction(0.01, 0.1, max_weight=3.0)
    reduce(torch.zeros(4))
    reduce(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    assert float(4 * reduce.weights().max()) == 3.0


def test_eval_remembers_nothing_and_the_state_goes_along():
    reduce = KLDROReduction(0.5)
    reduce.eval()(torch.rand(4))
    assert torch.isnan(reduce.log_u)
    with pytest.raises(RuntimeError, match="before the first batch"):
        reduce.weights()
    reduce.train()(torch.rand(4))
    fresh = KLDROReduction(0.5)
    fresh.load_state_dict(reduce.state_dict())
    next_losses = torch.rand(4)
    assert torch.equal(fresh(next_losses), copy.deepcopy(reduce)(next_losses))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    reduce = KLDROReduction(1e-2)
    value = reduce(torch.tensor([60.0, 59.0, 0.0], dtype=dtype))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(60.0)


def test_what_is_wrong_is_named():
    for arguments, message in (
        ({"r": 0.0}, "r must be"), ({"r": -1.0}, "r must be"), ({"r": math.nan}, "r must be"), ({"ema": 0.0}, "ema must be"),
        ({"ema": 1.1}, "ema must be"), ({"mode": "mean"}, "mode"), ({"max_weight": 0.0}, "max_weight must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            KLDROReduction(**arguments)
    reduce = KLDROReduction()
    for losses in (torch.tensor(1.0), torch.ones(2, 3), torch.ones(0)):
        with pytest.raises(ValueError, match=r"losses must have shape \(N,\)"):
            reduce(losses)
    for bad in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="losses must be finite"):
            reduce(torch.tensor([1.0, bad]))
    assert torch.isnan(reduce.log_u)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_cast_to_half_precision_keeps_its_running_mean(dtype):
    reduce = KLDROReduction(1e-3).to(dtype)
    assert reduce.log_u.dtype == torch.float32
    reduce(torch.tensor([100.0, 3.0], dtype=dtype))
    for _ in range(3):
        value = reduce(torch.tensor([100.0, 100.0], dtype=dtype))
    assert torch.isfinite(reduce.log_u)
    assert float(value) > 0
    assert reduce.double().log_u.dtype == torch.float64

"""The values and gradients of the losses on logits are those of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from weightroom.distill import BinaryKLLoss, BinaryKLNormLoss, DKDLoss, SoftmaxKDLoss

TEMPERATURES = [0.5, 2.0, 4.0]
temperatures = pytest.mark.parametrize("T", TEMPERATURES)
quick = settings(max_examples=40, deadline=None, derandomize=True)
logits_of = st.lists(st.floats(-60, 60), min_size=3, max_size=3)


def draw(n: int = 6, k: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.arange(n) % k


def slope(loss, student: Tensor, *rest: Tensor) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest), leaf)[0]


# ---- one Bernoulli per class ----


@temperatures
def test_binary_kl_is_that_of_bernoullis(T):
    s, t, _ = draw()
    wanted = T**2 * kl_divergence(Bernoulli(logits=t / T), Bernoulli(logits=s / T)).sum() / len(s)
    torch.testing.assert_close(BinaryKLLoss(T)(s, t), wanted)
    torch.testing.assert_close(slope(BinaryKLLoss(T), s, t), T / len(s) * (torch.sigmoid(s / T) - torch.sigmoid(t / T)))


@temperatures
def test_binary_kl_norm_is_that_of_bernoullis(T):
    s, t, _ = draw()
    d = (s - t) / T
    wanted = T**2 * kl_divergence(Bernoulli(torch.full_like(d, 0.5)), Bernoulli(logits=d)).sum() / len(s)
    torch.testing.assert_close(BinaryKLNormLoss(T)(s, t), wanted)
    by_logs = T**2 * (-math.log(2) - (torch.nn.functional.logsigmoid(d) + torch.nn.functional.logsigmoid(-d)) / 2).sum() / len(s)
    torch.testing.assert_close(BinaryKLNormLoss(T)(s, t), by_logs)
    torch.testing.assert_close(slope(BinaryKLNormLoss(T), s, t), T / len(s) * (torch.sigmoid(d) - 0.5))


@pytest.mark.parametrize("make", [BinaryKLLoss, BinaryKLNormLoss])
@quick
@given(s=logits_of, t=logits_of)
def test_bernoullis_are_never_negative_and_zero_only_at_the_teacher(make, s, t):
    student, teacher = torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    value = make()(student, teacher)
    assert value > -1e-12
    assert make()(student, student) == 0
    if (student - teacher).abs().max() > 1e-3 and make is BinaryKLNormLoss:
        assert value > 0


def test_binary_kl_is_positive_away_from_the_teacher():
    teacher = torch.linspace(-8, 8, 33).double()[:, None]
    for step in (1e-3, -1e-3, 1.0, -1.0):
        assert (BinaryKLLoss(reduction="none")(teacher + step, teacher) > 0).all()


@quick
@given(s=logits_of, t=logits_of, shift=st.floats(-50, 50))
def test_norm_depends_on_the_size_of_the_difference_alone(s, t, shift):
    student, teacher = torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    loss = BinaryKLNormLoss()
    wanted = loss(student, teacher)
    torch.testing.assert_close(loss(teacher, student), wanted)
    torch.testing.assert_close(loss(student + shift, teacher + shift), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norm_tends_to_an_eighth_of_the_squared_difference(dtype):
    s, t, _ = draw(dtype=dtype)
    torch.testing.assert_close(BinaryKLNormLoss(T=1e3)(s, t), (s - t).square().sum() / 8 / len(s), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_do_not_vanish_far_from_the_teacher(dtype, sign):
    # The code that clamps sigmoids at 1e-8 gives 0 here.
    T, n = 2.0, 4
    t = torch.zeros(n, 3, dtype=dtype)
    s = t + sign * T * 1e3
    for loss in (BinaryKLLoss(T), BinaryKLNormLoss(T)):
        assert loss(s, t).isfinite()
        torch.testing.assert_close(slope(loss, s, t), torch.full_like(t, sign * T / (2 * n)))


def test_norm_is_exact_near_the_teacher_in_float32():
    t = torch.zeros(1, 1)
    for d in (1e-4, 1e-2, 0.5, 1.99, 2.01, 10.0):
        exact = BinaryKLNormLoss(1.0)(t.double() + d, t.double())
        assert float(BinaryKLNormLoss(1.0)(t + d, t)) == pytest.approx(float(exact), rel=1e-6)
        assert float(exact) == pytest.approx(math.log(math.cosh(d / 2)), rel=1e-7)


def test_level_matters_to_bernoullis_and_not_to_the_softmax():
    s, t, y = draw()
    for loss in (BinaryKLLoss(), BinaryKLNormLoss()):
        assert (loss(s + 1, t) - loss(s, t)).abs() > 1e-2
    for loss in (SoftmaxKDLoss(), SoftmaxKDLoss(standardize=True)):
        torch.testing.assert_close(loss(s + 1, t), loss(s, t))
    torch.testing.assert_close(DKDLoss()(s + 1, t, y), DKDLoss()(s, t, y))


@pytest.mark.parametrize("make", [BinaryKLLoss, BinaryKLNormLoss])
def test_classes_are_summed_and_samples_averaged(make):
    s, t, _ = draw()
    once = make()(s, t)
    torch.testing.assert_close(make()(s.repeat(1, 3), t.repeat(1, 3)), 3 * once)
    torch.testing.assert_close(make()(s.repeat(3, 1), t.repeat(3, 1)), once)


# ---- the softmax ----


@temperatures
def test_softmax_kd_is_that_of_categoricals(T):
    s, t, _ = draw()
    wanted = T**2 * kl_divergence(Categorical(logits=t / T), Categorical(logits=s / T)).mean()
    torch.testing.assert_close(SoftmaxKDLoss(T)(s, t), wanted)
    torch.testing.assert_close(slope(SoftmaxKDLoss(T), s, t), T / len(s) * ((s / T).softmax(1) - (t / T).softmax(1)))


@quick
@given(scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_standardised_logits_need_not_match_scale_or_level(scale, shift):
    s, t, _ = draw()
    loss = SoftmaxKDLoss(2.0, standardize=True)
    torch.testing.assert_close(loss(scale * s + shift, t), loss(s, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(s, scale * t + shift), loss(s, t), rtol=1e-5, atol=1e-6)
    assert loss(scale * t + shift, t) < 1e-6


def test_standardised_logits_are_plain_kd_of_z_scores():
    s, t, _ = draw()
    z = lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)  # noqa: E731
    torch.testing.assert_close(SoftmaxKDLoss(2.0, standardize=True)(s, t), SoftmaxKDLoss(2.0)(z(s), z(t)), rtol=1e-6, atol=0)
    flat = torch.zeros_like(s)
    assert (slope(SoftmaxKDLoss(standardize=True), flat, t) == 0).all()
    with pytest.raises(ValueError, match="standardize needs K >= 2 classes, got 1"):
        SoftmaxKDLoss(standardize=True)(s[:, :1], t[:, :1])


# ---- decoupled ----


@temperatures
def test_dkd_is_its_definition(T):
    s, t, y = draw()
    wanted = torch.zeros(())
    for a, b, label in zip((s / T).softmax(1), (t / T).softmax(1), y, strict=True):
        keep = torch.arange(len(a)) != label
        target = kl_divergence(Bernoulli(b[label]), Bernoulli(a[label]))
        others = kl_divergence(Categorical(probs=b[keep]), Categorical(probs=a[keep]))
        wanted = wanted + T**2 * (1.5 * target + 8 * others) / len(s)
    torch.testing.assert_close(DKDLoss(1.5, 8.0, T)(s, t, y), wanted)


def test_dkd_with_the_teachers_doubt_as_beta_is_kd():
    # KD = TCKD + (1 - p_y) NCKD, eq. (6) of the paper.
    s, t, y = draw()
    each = lambda alpha, beta: DKDLoss(alpha, beta, 4.0, "none")(s, t, y)  # noqa: E731
    doubt = 1 - (t / 4).softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(each(1.0, 0.0) + doubt * each(0.0, 1.0), SoftmaxKDLoss(4.0, "none")(s, t))


def test_dkd_of_two_classes_has_no_others():
    s, t, y = draw(k=2)
    assert DKDLoss(0.0, 8.0)(s, t, y) == 0
    torch.testing.assert_close(DKDLoss(1.0, 8.0)(s, t, y), SoftmaxKDLoss(4.0)(s, t))


def test_dkd_says_what_it_needs():
    s, t, y = draw()
    loss = DKDLoss()
    with pytest.raises(TypeError, match=r"target must hold class indices \(int64\), got torch.float64"):
        loss(s, t, s)
    with pytest.raises(TypeError, match="target must hold class indices"):
        loss(s, t, y.tolist())
    with pytest.raises(ValueError, match=r"target must have shape \(6,\), one class per sample, got \(5,\)"):
        loss(s, t, y[:-1])
    with pytest.raises(ValueError, match="student must have K >= 2 classes, got 1"):
        loss(s[:, :1], t[:, :1], torch.zeros_like(y))
    with pytest.raises(ValueError, match="beta must be >= 0"):
        DKDLoss(beta=-1.0)
    with pytest.raises(TypeError, match="alpha must be a real number"):
        DKDLoss("1")


def test_defaults_are_those_of_the_papers():
    assert (BinaryKLLoss().T, BinaryKLNormLoss().T, SoftmaxKDLoss().T) == (2.0, 2.0, 4.0)
    assert (DKDLoss().alpha, DKDLoss().beta, DKDLoss().T) == (1.0, 8.0, 4.0)
    assert repr(DKDLoss()) == "DKDLoss(alpha=1.0, beta=8.0, T=4.0, reduction='batchmean')"
    assert repr(SoftmaxKDLoss(standardize=True)) == "SoftmaxKDLoss(T=4.0, standardize=True, reduction='batchmean')"

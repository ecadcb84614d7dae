from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightroom.losses import NormalizedLogisticLoss, normalized_logistic_loss

LOSS = NormalizedLogisticLoss()


def draw(n: int = 12, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and signs."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, generator=generator, dtype=torch.float64)
    return z.to(dtype), 2 * torch.randint(2, (n,), generator=generator) - 1


def field(z: Tensor, y: Tensor) -> Tensor:
    """-y_i p_i, by its definition."""
    s = torch.sigmoid(-y * z)
    return -y * s / s.sum()


def gradient(z: Tensor, y: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(LOSS(z, y), z)[0]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), scale=st.floats(0.0, 20.0))
@settings(max_examples=50, deadline=None)
def test_value_is_the_logistic_loss_and_gradient_the_field(seed, n, scale):
    z, y = draw(n, scale, seed)
    torch.testing.assert_close(LOSS(z, y), F.binary_cross_entropy_with_logits(z, (y > 0).double()))
    torch.testing.assert_close(gradient(z, y), field(z, y))


def test_gradient_is_that_of_the_value_over_the_mean_wrongness():
    z, y = draw()
    z.requires_grad_()
    (plain,) = torch.autograd.grad(F.softplus(-y * z).mean(), z)
    torch.testing.assert_close(gradient(z.detach(), y), plain.detach() / torch.sigmoid(-y * z).mean())
    assert gradient(z.detach(), y).abs().sum().item() == pytest.approx(1.0)


def test_second_derivatives_are_those_of_the_field():
    z, y = draw(5)
    z.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: LOSS(z, y), z)
    (slope,) = torch.autograd.grad(LOSS(z, y), z, create_graph=True)
    weights = torch.arange(5.0, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weights * f).sum(), z)[0] for f in (slope, field(z, y)))
    torch.testing.assert_close(ours, theirs)


def test_gradients_scale_with_what_comes_from_above():
    z, y = draw()
    z.requires_grad_()
    (thrice,) = torch.autograd.grad(3 * LOSS(z, y), z)
    torch.testing.assert_close(thrice, 3 * field(z.detach(), y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_large_margins_leave_gradients_finite(size, dtype):
    z, y = draw(dtype=dtype)
    for logits in (size * y.to(dtype), -size * y.to(dtype), size * y * z.abs(), size * z):
        g = gradient(logits.to(dtype), y)
        assert torch.isfinite(g).all()
        assert g.abs().sum().item() == pytest.approx(1.0)


def test_a_linear_model_steps_as_normalized_lr_gd():
    generator = torch.Generator().manual_seed(0)
    a, (_, y) = torch.randn(12, 4, generator=generator, dtype=torch.float64), draw()
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=10.0)
    mine = torch.zeros(4, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        LOSS(a @ theta, y).backward()
        optimizer.step()
        mine = mine - 10.0 * a.T @ field(a @ mine, y)
        torch.testing.assert_close(theta.detach(), mine)


@pytest.mark.parametrize("encode", [lambda y: (y + 1) / 2, lambda y: y > 0, lambda y: (y > 0).long(), lambda y: y.float()])
def test_labels_in_every_encoding_mean_the_same(encode):
    z, y = draw()
    assert LOSS(z, encode(y)) == LOSS(z, y)
    assert torch.equal(gradient(z, encode(y)), gradient(z, y))


@pytest.mark.parametrize("only", [1, -1])
def test_one_class_alone_is_that_class(only):
    z, y = draw()
    y = torch.full_like(y, only)
    torch.testing.assert_close(LOSS(z, y), F.softplus(-only * z).mean())
    torch.testing.assert_close(LOSS(z, (y > 0).long()), F.softplus(-only * z).mean())


def test_columns_are_taken_as_they_are():
    z, y = draw()
    column = z[:, None].clone().requires_grad_()
    for target in (y, y[:, None]):
        (g,) = torch.autograd.grad(LOSS(column, target), column)
        assert torch.equal(g, gradient(z, y)[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z, y = draw(dtype=dtype)
    value = LOSS(z, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, LOSS(z.float(), y))
    assert gradient(z, y).dtype == dtype


def test_transforms_and_copies():
    z, y = draw()
    torch.testing.assert_close(torch.func.grad(LOSS)(z, y), gradient(z, y))
    batch = torch.stack([z, 2 * z])
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda z: LOSS(z, y)))(batch)[1], gradient(2 * z, y))
    for twin in (copy.deepcopy(LOSS), pickle.loads(pickle.dumps(LOSS))):
        assert twin(z, y) == LOSS(z, y) == normalized_logistic_loss(z, y)
    assert not LOSS.state_dict()
    assert not list(LOSS.parameters())


def test_the_arguments_are_left_alone():
    z, y = draw()
    before = z.clone(), y.clone()
    gradient(z, y)
    assert torch.equal(z, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize(
    "input, target, error, match",
    [
        ([0.0, 1.0], torch.zeros(2), TypeError, "input must be a floating tensor of logits, got list"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), TypeError, "input must be a floating tensor"),
        (torch.zeros(2), [0, 1], TypeError, "target must be a tensor of labels, got list"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), TypeError, "target must be a tensor of labels"),
        (torch.tensor(0.0), torch.tensor(0.0), ValueError, r"input must have shape \(n,\) or \(n, 1\)"),
        (torch.zeros(2, 2), torch.zeros(2), ValueError, r"input must have shape .* got \(2, 2\)"),
        (torch.zeros(2, 1, 1), torch.zeros(2), ValueError, "input must have shape"),
        (torch.zeros(2), torch.zeros(3), ValueError, r"target must have the shape of input or \(n,\), got \(3,\)"),
        (torch.zeros(2), torch.zeros(2, 1), ValueError, "target must have the shape of input"),
        (torch.zeros(2), torch.tensor([0, 2]), ValueError, r"target must have values in \{0, 1\} or \{-1, 1\}, got 0, 2"),
        (torch.zeros(3), torch.tensor([-1, 0, 1]), ValueError, "got -1, 0, 1"),
        (torch.zeros(2), torch.tensor([0.5, 1.0]), ValueError, "got 0.5, 1"),
        (torch.zeros(2), torch.tensor([math.nan, 1.0]), ValueError, "target must have values"),
    ],
)
def test_what_is_refused(input, target, error, match):
    with pytest.raises(error, match=match):
        LOSS(input, target)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightroom.transport import SlicedWassersteinLoss, sliced_wasserstein
from weightroom.transport.base import sample_directions, transport_cost_1d

CONTROLS = ["lower", "upper"]
COEFFICIENTS = ["paper", "regression"]
seeds = st.integers(0, 2**16)
few = settings(max_examples=25, deadline=None, derandomize=True)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Points about ``shift``, spread unequally along the axes."""
    g = rng(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) * (torch.rand(d, generator=g, dtype=torch.float64) + 0.2) + shift


def directions(L: int, d: int, seed: int = 0) -> Tensor:
    return sample_directions(L, d, generator=rng(seed), dtype=torch.float64)


def costs(x: Tensor, y: Tensor, theta: Tensor, **options: object) -> Tensor:
    """w_l of every direction."""
    return torch.stack(
        [sliced_wasserstein(x, y, projections=t[None], control_variate=None, squared=True, **options) for t in theta]
    )


def bounds(x: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """C_low and C_up of every direction, from covariance matrices."""
    delta = x.mean(0) - y.mean(0)
    S = torch.cov(x.T, correction=0) + torch.cov(y.T, correction=0)
    low = (theta @ delta) ** 2
    return low, low + torch.einsum("ld,de,le->l", theta, S.reshape(x.shape[1], -1), theta)


def estimate(x: Tensor, y: Tensor, theta: Tensor, control: str, coefficient: str, pilot: Tensor | None = None) -> Tensor:
    """Z, term by term."""
    d, k = x.shape[1], CONTROLS.index(control)
    delta = x.mean(0) - y.mean(0)
    B = delta @ delta / d
    if control == "upper":
        B = B + (x.var(0, correction=0).sum() + y.var(0, correction=0).sum()) / d
    C, w = bounds(x, y, theta)[k], costs(x, y, theta)
    C_, w_ = (C, w) if pilot is None else (bounds(x, y, pilot)[k], costs(x, y, pilot))
    centre = B if coefficient == "paper" else C_.mean()
    gamma = ((w_ - w_.mean()) * (C_ - B)).mean() / (((C_ - centre) ** 2).mean() + 1e-24)
    return w.mean() - gamma * (C.mean() - B)


# --- the kernel on the line


@few
@given(seed=seeds, n=st.integers(1, 7), m=st.integers(1, 7), p=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_integer_weights_are_repeated_points(seed: int, n: int, m: int, p: float):
    g = rng(seed)
    x, y = torch.randn(2, 3, n, generator=g, dtype=torch.float64), torch.randn(2, 3, m, generator=g, dtype=torch.float64)
    a, b = torch.randint(0, 4, (n,), generator=g), torch.randint(0, 4, (m,), generator=g)
    a[0], b[-1] = 1, 2
    repeated = transport_cost_1d(x.repeat_interleave(a, -1), y.repeat_interleave(b, -1), p)
    torch.testing.assert_close(transport_cost_1d(x, y, p, a.double(), b.double()), repeated)
    torch.testing.assert_close(transport_cost_1d(x, y.repeat_interleave(b, -1), p, a.double()), repeated)
    torch.testing.assert_close(transport_cost_1d(y.repeat_interleave(b, -1), x, p, None, a.double()), repeated)


def test_unequal_numbers_by_hand():
    # {0, 1} against {0, 0, 3}: F^-1 = 0 | 1 from 1/2, G^-1 = 0 | 3 from 2/3; cost 1/6 * 1 + 1/3 * 4.
    x, y = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    assert transport_cost_1d(x, y).item() == pytest.approx(1.5)
    assert transport_cost_1d(x, y, 1.0).item() == pytest.approx(1 / 6 + 2 / 3)


def test_equal_weights_given_and_not_given_agree():
    x, y = cloud(6, 3, 0), cloud(9, 3, 1, 0.5)
    theta = directions(8, 3)
    even = sliced_wasserstein(x, y, torch.full((6,), 2.0), torch.ones(9), theta, control_variate="upper")
    torch.testing.assert_close(even, sliced_wasserstein(x, y, projections=theta, control_variate="upper"))


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_integer_weights_are_repeated_points_in_the_distance_too(control: str | None):
    x, y, theta = cloud(5, 3, 0), cloud(4, 3, 1, 0.5), directions(8, 3)
    a, b = torch.tensor([1, 0, 3, 2, 1]), torch.tensor([2, 1, 1, 5])
    weighted = sliced_wasserstein(x, y, a, b, theta, control_variate=control)
    repeated = sliced_wasserstein(
        x.repeat_interleave(a, 0), y.repeat_interleave(b, 0), projections=theta, control_variate=control
    )
    torch.testing.assert_close(weighted, repeated)


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_weights_of_a_batch(control: str | None):
    x, y, theta = torch.stack([cloud(5, 3, s) for s in range(3)]), cloud(4, 3, 9, 1.0), directions(8, 3)
    a, b = torch.rand(3, 5, generator=rng(0)), torch.rand(4, generator=rng(1))
    options = {"projections": theta, "control_variate": control, "reduction": "none"}
    single = torch.stack([sliced_wasserstein(x[i], y, a[i], b, **options) for i in range(3)])
    torch.testing.assert_close(sliced_wasserstein(x, y, a, b, **options), single)
    shared = torch.stack([sliced_wasserstein(x[i], y, a[0], None, **options) for i in range(3)])
    torch.testing.assert_close(sliced_wasserstein(x, y, a[0], None, **options), shared)


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_the_gradient_reaches_the_weights(control: str | None):
    x, y, theta = cloud(5, 3, 0).requires_grad_(), cloud(4, 3, 1, 0.5).requires_grad_(), directions(6, 3)
    a = (torch.rand(5, generator=rng(2), dtype=torch.float64) + 0.2).requires_grad_()
    b = (torch.rand(4, generator=rng(3), dtype=torch.float64) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *given: sliced_wasserstein(*given, theta, control_variate=control, squared=True), (x, y, a, b)
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("n, m, weighted", [(20, 20, False), (20, 13, False), (20, 20, True), (7, 20, True)])
def test_without_control_variate_it_is_pots_distance(n: int, m: int, weighted: bool, p: float):
    ot = pytest.importorskip("ot")
    x, y, theta = cloud(n, 3, 0).requires_grad_(), cloud(m, 3, 1, 0.5), directions(15, 3)
    a = b = None
    if weighted:
        a, b = (torch.rand(k, generator=rng(k), dtype=torch.float64) for k in (n, m))
        a, b = a / a.sum(), b / b.sum()
    ours = sliced_wasserstein(x, y, a, b, theta, p=p, control_variate=None)
    theirs = ot.sliced_wasserstein_distance(x, y, a, b, projections=theta.T, p=p)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*torch.autograd.grad(ours, x), *torch.autograd.grad(theirs, x))


# --- the directions


def test_directions_are_uniform_on_the_sphere():
    theta = directions(20_000, 3)
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(20_000).double())
    torch.testing.assert_close(theta.T @ theta / 20_000, torch.eye(3).double() / 3, atol=0.01, rtol=0)
    torch.testing.assert_close(theta.mean(0), torch.zeros(3).double(), atol=0.02, rtol=0)
    assert set(directions(50, 1).flatten().tolist()) == {-1.0, 1.0}


# --- the estimate


@few
@given(
    seed=seeds, n=st.integers(1, 12), m=st.integers(1, 12), d=st.integers(1, 6), L=st.integers(1, 12),
    control=st.sampled_from(CONTROLS), coefficient=st.sampled_from(COEFFICIENTS),
)  # fmt: skip
def test_the_estimate_term_by_term(seed: int, n: int, m: int, d: int, L: int, control: str, coefficient: str):
    x, y, theta = cloud(n, d, seed), cloud(m, d, seed + 1, 0.7), directions(L, d, seed)
    ours = sliced_wasserstein(x, y, projections=theta, control_variate=control, coefficient=coefficient, squared=True)
    torch.testing.assert_close(ours, estimate(x, y, theta, control, coefficient), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_the_pilot_alone_decides_the_coefficient(control: str, coefficient: str):
    x, y = cloud(9, 4, 0), cloud(8, 4, 1, 0.5)
    ours = sliced_wasserstein(
        x, y, n_projections=6, pilot=5, control_variate=control, coefficient=coefficient, squared=True, generator=rng(3)
    )
    g = rng(3)
    theta, pilot = (sample_directions(k, 4, generator=g, dtype=torch.float64) for k in (6, 5))
    torch.testing.assert_close(ours, estimate(x, y, theta, control, coefficient, pilot))
    given_ = sliced_wasserstein(
        x, y, projections=theta, pilot=5, control_variate=control, coefficient=coefficient, squared=True, generator=rng(4)
    )
    pilot = sample_directions(5, 4, generator=rng(4), dtype=torch.float64)
    torch.testing.assert_close(given_, estimate(x, y, theta, control, coefficient, pilot))


def test_the_plain_estimate_needs_no_pilot():
    x, y = cloud(9, 4, 0), cloud(8, 4, 1, 0.5)
    with_, without = (sliced_wasserstein(x, y, control_variate=None, pilot=k, generator=rng(0)) for k in (5, 0))
    assert torch.equal(with_, without)


def test_a_pilot_takes_the_bias_away():
    # Mean over all samples of two of six directions whose C have mean B: if a pilot fixes gamma, the correction averages out.
    x, y = cloud(9, 2, 0), cloud(9, 2, 1, 1.0)
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 6
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))

    def mean(pilot: int) -> Tensor:
        options = {"control_variate": "upper", "squared": True, "pilot": pilot}
        return torch.stack([sliced_wasserstein(x, y, projections=circle[i], generator=rng(0), **options) for i in pairs]).mean()

    truth = costs(x, y, circle).mean()
    torch.testing.assert_close(mean(pilot=3), truth)
    assert abs(mean(pilot=0) - truth) > 1e-3


@few
@given(seed=seeds, n=st.integers(1, 9), m=st.integers(1, 9), d=st.integers(1, 5))
def test_the_control_variates_are_bounds(seed: int, n: int, m: int, d: int):
    x, y, theta = cloud(n, d, seed), cloud(m, d, seed + 1, 0.5), directions(6, d, seed)
    low, up = bounds(x, y, theta)
    w = costs(x, y, theta)
    assert (low <= w + 1e-12).all()
    assert (w <= up + 1e-12).all()


@few
@given(seed=seeds, L=st.integers(2, 12), d=st.integers(2, 6))
def test_regression_is_exact_for_a_shift(seed: int, L: int, d: int):
    # w_l = (theta . t)^2 = C_low, whatever the directions.
    x, t = cloud(9, d, seed), torch.linspace(-1.0, 2.0, d, dtype=torch.float64)
    z = sliced_wasserstein(x, x + t, projections=directions(L, d, seed), coefficient="regression", squared=True)
    torch.testing.assert_close(z, t.square().sum() / d, rtol=1e-6, atol=0)


@few
@given(seed=seeds, L=st.integers(2, 12), d=st.integers(2, 6))
def test_regression_is_exact_for_a_point_mass(seed: int, L: int, d: int):
    # A single point pairs with every other: w_l = C_up. This holds with divisor n only.
    x, y = torch.ones(7, d, dtype=torch.float64) * 0.3, cloud(7, d, seed, 0.5)
    z = sliced_wasserstein(
        x, y, projections=directions(L, d, seed), control_variate="upper", coefficient="regression", squared=True
    )
    torch.testing.assert_close(z, (x - y).square().sum(1).mean() / d, rtol=1e-6, atol=0)


def test_the_papers_coefficient_is_not_exact_for_a_shift():
    x, t = cloud(9, 3, 0), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    z = sliced_wasserstein(x, x + t, projections=directions(4, 3), squared=True)
    assert abs(z - 2.0) > 1e-3


@few
@given(seed=seeds, L=st.integers(1, 8), control=st.sampled_from(CONTROLS), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_papers_coefficient_moves_the_estimate_by_half_a_deviation_at_most(seed: int, L: int, control: str, scale: float):
    x, y, theta = scale * cloud(6, 3, seed), scale * cloud(5, 3, seed + 1, 0.5), directions(L, 3, seed)
    w = costs(x, y, theta)
    z = sliced_wasserstein(x, y, projections=theta, control_variate=control, squared=True)
    assert abs(z - w.mean()) <= w.std(correction=0) / 2 + 1e-12


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("case", ["one direction", "one dimension", "equal means"])
def test_where_there_is_nothing_to_correct_it_is_the_plain_estimate(control: str, coefficient: str, case: str):
    if case == "equal means" and control == "upper":
        pytest.skip("the upper one does not vanish there")
    x, y, theta = cloud(8, 3, 0), cloud(8, 3, 1, 1.0), directions(5, 3)
    if case == "one direction":
        theta = theta[:1]
    elif case == "one dimension":
        x, y, theta = x[:, :1], y[:, :1], torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    else:
        x, y = x - x.mean(0), y - y.mean(0)
    z = sliced_wasserstein(x, y, projections=theta, control_variate=control, coefficient=coefficient, squared=True)
    torch.testing.assert_close(z, costs(x, y, theta).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("control", [None, *CONTROLS])
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("squared", [True, False])
def test_equal_sets_are_at_distance_zero_with_a_finite_gradient(control: str | None, coefficient: str, squared: bool):
    x = cloud(8, 3, 0).requires_grad_()
    loss = SlicedWassersteinLoss(control_variate=control, coefficient=coefficient, squared=squared, generator=rng(0))
    value = loss(x, x.detach().flip(0))
    value.backward()
    assert abs(value.item()) < (1e-12 if squared else 1e-150)
    assert x.grad.abs().max() < 1e-12
    assert loss.last_clamped == (0 if squared else 1)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_balanced_directions_need_no_correction(control: str, coefficient: str):
    angles = torch.arange(64, dtype=torch.float64) * math.pi / 64
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    x, y = cloud(12, 2, 0), cloud(9, 2, 1, 0.7)
    z = sliced_wasserstein(x, y, projections=circle, control_variate=control, coefficient=coefficient, squared=True)
    torch.testing.assert_close(z, costs(x, y, circle).mean(), rtol=1e-12, atol=0)


@few
@given(
    seed=seeds, scale=st.floats(0.01, 100), control=st.sampled_from([None, *CONTROLS]), coefficient=st.sampled_from(COEFFICIENTS)
)
def test_scaling_and_symmetry(seed: int, scale: float, control: str | None, coefficient: str):
    x, y = cloud(8, 3, seed), cloud(6, 3, seed + 1, 0.7)
    options = {"projections": directions(6, 3, seed), "control_variate": control, "coefficient": coefficient, "squared": True}
    z = sliced_wasserstein(x, y, **options)
    torch.testing.assert_close(sliced_wasserstein(scale * x, scale * y, **options), scale**2 * z, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(sliced_wasserstein(y, x, **options), z)


def test_squared_is_the_power_of_the_distance():
    x, y, theta = cloud(8, 3, 0), cloud(6, 3, 1, 1.0), directions(6, 3)
    for p in (1.0, 2.0, 3.0):
        power = sliced_wasserstein(x, y, projections=theta, p=p, squared=True)
        torch.testing.assert_close(sliced_wasserstein(x, y, projections=theta, p=p) ** p, power)


@pytest.mark.parametrize("pilot", [0, 4])
def test_a_detached_coefficient_passes_no_gradient(pilot: int):
    x, y = cloud(8, 3, 0).requires_grad_(), cloud(6, 3, 1, 1.0)
    theta = directions(6, 3)
    through, cut = (
        sliced_wasserstein(x, y, projections=theta, squared=True, detach_coefficient=detach, pilot=pilot, generator=rng(0))
        for detach in (False, True)
    )
    torch.testing.assert_close(through, cut)
    low, w = bounds(x, y, theta)[0], costs(x, y, theta)
    B = (x.mean(0) - y.mean(0)).square().mean()
    gamma = ((w.mean() - cut) / (low.mean() - B)).detach()
    (expected,) = torch.autograd.grad(w.mean() - gamma * (low.mean() - B), x, retain_graph=True)
    (without,) = torch.autograd.grad(cut, x)
    torch.testing.assert_close(without, expected)
    assert not torch.allclose(torch.autograd.grad(through, x)[0], expected)


def negative_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two pairs of sets and two directions for which the regression of the first pair lies below 0 at B."""
    for seed in range(200):
        x, y, theta = cloud(4, 3, seed), cloud(4, 3, seed + 1, 0.3), directions(2, 3, seed)
        if sliced_wasserstein(x, y, projections=theta, coefficient="regression", squared=True) < 0:
            return torch.stack([x, x]), torch.stack([y, x + 1.0]), theta
    raise AssertionError("no such sets")


def test_an_estimate_below_zero_is_clamped_and_counted():
    x, y, theta = negative_batch()
    x.requires_grad_()
    loss = SlicedWassersteinLoss(coefficient="regression", reduction="none")
    assert loss.last_clamped == 0
    value = loss(x, y, projections=theta)
    assert loss.last_clamped == 1
    assert 0 < value[0] < 1e-100
    assert value[1].item() == pytest.approx(1.0)
    value.sum().backward()
    assert x.grad[0].abs().max() == 0
    assert x.grad[1].abs().max() > 0
    loss(x[1:], y[1:], projections=theta)
    assert loss.last_clamped == 0
    assert isinstance(loss.last_clamped, int)


def test_squared_gives_what_is_below_zero_as_it_is():
    x, y, theta = negative_batch()
    loss = SlicedWassersteinLoss(coefficient="regression", reduction="none", squared=True)
    assert loss(x, y, projections=theta)[0] < 0
    assert loss.last_clamped == 0


@pytest.mark.parametrize("squared", [True, False])
def test_module_and_function_agree(squared: bool):
    x, y = torch.stack([cloud(8, 3, s) for s in range(2)]).requires_grad_(), torch.stack([cloud(6, 3, s, 1.0) for s in range(2)])
    a, b = torch.rand(2, 8, generator=rng(0)), torch.rand(6, generator=rng(1))
    options = {
        "n_projections": 7, "p": 1.5, "control_variate": "upper", "coefficient": "regression", "squared": squared,
        "detach_coefficient": True, "pilot": 3, "reduction": "sum",
    }  # fmt: skip
    module = SlicedWassersteinLoss(**options, generator=rng(5))
    value, expected = module(x, y, a, b), sliced_wasserstein(x, y, a, b, **options, generator=rng(5))
    assert torch.equal(value, expected)
    assert torch.equal(*torch.autograd.grad(value, x), *torch.autograd.grad(expected, x))
    assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())


def test_module_and_function_have_the_same_defaults():
    x, y = cloud(8, 3, 0), cloud(6, 3, 1, 1.0)
    plain = SlicedWassersteinLoss()
    torch.manual_seed(0)
    value = plain(x, y)
    torch.manual_seed(0)
    assert torch.equal(value, sliced_wasserstein(x, y))


def test_it_lowers_the_variance_of_the_estimate_and_of_its_gradient():
    x, y = cloud(40, 8, 0).requires_grad_(), cloud(40, 8, 1, 0.8)
    spread = {}
    for control in (None, "lower", "upper"):
        loss = SlicedWassersteinLoss(control_variate=control, squared=True, generator=rng(0))
        values = [loss(x, y) for _ in range(100)]
        grads = torch.stack([torch.autograd.grad(z, x)[0] for z in values])
        spread[control] = torch.stack(values).var().item(), grads.var(0).sum().item()
    for control in CONTROLS:
        assert spread[control][0] < 0.5 * spread[None][0]
        assert spread[control][1] < spread[None][1]


# --- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"control_variate": "middle"}, "control_variate must be one of 'lower', 'upper', None, got 'middle'"),
        ({"coefficient": "best"}, "coefficient must be one of 'paper', 'regression', got 'best'"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"p": 0.5}, "p must be a finite number >= 1, got 0.5"),
        ({"p": math.inf}, "p must be a finite number >= 1"),
        ({"p": math.nan}, "p must be a finite number >= 1"),
        ({"n_projections": 0}, "n_projections must be an integer >= 1, got 0"),
        ({"n_projections": 2.5}, "n_projections must be an integer >= 1, got 2.5"),
        ({"pilot": -1}, "pilot must be an integer >= 0, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SlicedWassersteinLoss(**options)
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2), **options)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.tensor([1.0, -0.1, 1.0]), "x_weight must be finite, >= 0 and have a sum > 0, got"),
        (torch.zeros(3), "x_weight must be finite"),
        (torch.tensor([1.0, torch.nan, 1.0]), "x_weight must be finite"),
        (torch.tensor([1.0, torch.inf, 1.0]), "x_weight must be finite"),
        (torch.ones(4), r"x_weight must have shape \(3,\) for x of \(3, 2\), got \(4,\)"),
        (torch.ones(2, 3), r"x_weight must have shape \(3,\) for x of \(3, 2\), got \(2, 3\)"),
    ],
)
def test_weights_that_cannot_be_used(weight: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2), weight)
    with pytest.raises(ValueError, match=message.replace("x_weight", "y_weight").replace("for x", "for y")):
        sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2), None, weight)


def test_one_row_of_weights_without_mass_is_enough():
    weight = torch.ones(2, 3)
    weight[1] = 0
    with pytest.raises(ValueError, match="have a sum > 0"):
        sliced_wasserstein(torch.zeros(2, 3, 2), torch.ones(3, 2), weight)


@pytest.mark.parametrize(
    "projections, message",
    [
        (torch.ones(4, 3), r"projections must have shape \(L, 2\) for points of dimension 2, got \(4, 3\)"),
        (torch.ones(2), "projections must have shape"),
        (torch.ones(0, 2), "projections must have shape"),
        (torch.tensor([[1.0, 0.0], [0.6, 0.81]]), "projections must have length 1 within 1e-4, got one 0.008"),
        (torch.tensor([[torch.nan, 0.0]]), "projections must have length 1"),
    ],
)
def test_projections_that_are_no_directions(projections: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2), projections=projections)


def test_projections_within_the_tolerance_pass():
    value = sliced_wasserstein(torch.zeros(3, 2), torch.ones(3, 2), projections=torch.tensor([[1.00005, 0.0]]))
    assert value == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("control_variate", ["lower", "upper"])
@pytest.mark.parametrize("coefficient", ["paper", "regression"])
@pytest.mark.parametrize("copies", [1, 3])
def test_where_all_directions_are_one_the_gradient_is_that_of_the_plain_estimate(control_variate, coefficient, copies):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 3, generator=generator, dtype=torch.float64) + 1
    theta = torch.nn.functional.normalize(torch.randn(1, 3, generator=generator, dtype=torch.float64), dim=1).expand(copies, 3)
    plain = torch.autograd.grad(sliced_wasserstein(x, y, projections=theta, control_variate=None, squared=True), x)[0]
    z = sliced_wasserstein(x, y, projections=theta, control_variate=control_variate, coefficient=coefficient, squared=True)
    torch.testing.assert_close(torch.autograd.grad(z, x)[0], plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_what_cannot_be_used_gives_nan():
    x, y = torch.zeros(3, 2, device="cuda"), torch.ones(3, 2, device="cuda")
    assert sliced_wasserstein(x, y, torch.tensor([1.0, -0.1, 1.0], device="cuda")).isnan()
    assert sliced_wasserstein(x, y, torch.zeros(3, device="cuda")).isnan()
    assert sliced_wasserstein(x, y, projections=torch.ones(1, 2, device="cuda")).isnan()

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.optim import NormalizedLRGD

METHODS = {
    "normalized": {},
    "lr+gd": {"normalize": False},
    "batch": {"normalize": False, "limit": "batch"},
    "normalized batch": {"limit": "batch"},
    "online": {"limit": "online"},
}
methods = pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)


def draw(n: int = 12, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return a, torch.where(a[:, 0] + 0.3 * a[:, 1] > 0, 1.0, -1.0).double()


def weights(m: Tensor, normalize: bool = True, limit: str = "none", first: bool = False) -> Tensor:
    """The table of the class, by its definitions."""
    s, S = torch.sigmoid(-m), (m <= 0).double()
    if limit == "online":
        return F.one_hot((m <= 0).long().argmax(), len(m)).double()
    if limit == "batch":
        return S / S.sum() if normalize else S / len(m) / (2 if first else 1)
    return s / s.sum() if normalize else s / len(m)


def theta(d: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.zeros(d, dtype=torch.float64))


@methods
def test_steps_are_those_of_the_table(how):
    a, y = draw()
    z, x = y[:, None] * a, theta()
    optimizer = NormalizedLRGD([x], lr=3.0, **how)
    mine = torch.zeros(3, dtype=torch.float64)
    for t in range(8):
        m = z @ mine
        if (m > 0).all():
            break
        loss = optimizer.step(lambda: z @ x)
        assert loss.item() == pytest.approx(F.softplus(-m).mean().item())
        mine = mine + 3.0 * z.T @ weights(m, **how, first=t == 0)
        torch.testing.assert_close(x.detach(), mine, rtol=1e-12, atol=1e-12)
    assert t > 0


def test_worst_case_of_theorem_5_1():
    z = torch.tensor([[0.5, 1.0]], dtype=torch.float64).repeat(1000, 1)
    z[0, 1] = -1.0
    for lr, normalize, expected in ((100.0, True, 2), (10.0, True, 2), (1.0, True, 16), (0.1, True, 157), (100.0, False, 308)):
        x = theta(2)
        optimizer = NormalizedLRGD([x], lr, normalize)
        steps = 0
        while not (z @ x > 0).all():
            optimizer.step(lambda x=x: z @ x)
            steps += 1
        assert steps == expected


@methods
def test_the_limits_stand_still_once_all_is_separated(how):
    z, x = torch.ones(4, 1, dtype=torch.float64), theta(1)
    optimizer = NormalizedLRGD([x], lr=1.0, **how)
    optimizer.step(lambda: z @ x)
    before = x.item()
    assert before > 0
    optimizer.step(lambda: z @ x)
    assert (x.item() == before) == ("limit" in how)


def test_huge_margins_leave_a_normalized_step_of_full_length():
    z, x = torch.eye(2, dtype=torch.float64), nn.Parameter(torch.full((2,), 1e6, dtype=torch.float64))
    optimizer = NormalizedLRGD([x], lr=10.0)
    optimizer.step(lambda: z @ x)
    torch.testing.assert_close(x.detach(), torch.full((2,), 1e6 + 5.0, dtype=torch.float64))


def test_the_first_half_step_is_remembered():
    z = torch.tensor([[0.5, 1.0]], dtype=torch.float64).repeat(20, 1)
    z[0, 1] = -1.0  # wrong after the first step
    x = theta(2)
    optimizer = NormalizedLRGD([x], lr=1.0, normalize=False, limit="batch")
    optimizer.step(lambda: z @ x)
    twin = nn.Parameter(x.detach().clone())
    its = NormalizedLRGD([twin], lr=1.0, normalize=False, limit="batch")
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = nn.Parameter(x.detach().clone())
    NormalizedLRGD([fresh], lr=1.0, normalize=False, limit="batch").step(lambda: z @ fresh)
    optimizer.step(lambda: z @ x)
    its.step(lambda: z @ twin)
    assert torch.equal(twin, x)
    assert not torch.equal(fresh, x)


@methods
def test_networks_are_stepped_along_the_weighted_margins(how):
    a, y = draw()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    margins = lambda: y * net(a).squeeze(1)  # noqa: E731
    before = [p.detach().clone() for p in net.parameters()]
    m = margins()
    slopes = torch.autograd.grad(m, list(net.parameters()), weights(m.detach(), **how, first=True))
    optimizer = NormalizedLRGD(net.parameters(), lr=0.5, **how)
    optimizer.step(margins)
    for p, old, g in zip(net.parameters(), before, slopes, strict=True):
        torch.testing.assert_close(p.detach(), old + 0.5 * g, rtol=1e-10, atol=1e-12)


def test_groups_step_by_their_own_learning_rate_on_the_same_weights():
    a, y = draw()
    w, b = theta(), theta(1)
    optimizer = NormalizedLRGD([{"params": [w]}, {"params": [b], "lr": 0.1}], lr=2.0)
    optimizer.step(lambda: y * (a @ w + b))
    torch.testing.assert_close(w.detach(), 2.0 * (y[:, None] * a).mean(0))
    torch.testing.assert_close(b.detach(), 0.1 * y.mean().reshape(1))


def test_gradients_of_others_are_not_touched_and_the_loss_is_detached():
    a, y = draw()
    x = theta()
    x.grad = torch.ones_like(x)
    loss = NormalizedLRGD([x]).step(lambda: y * (a @ x))
    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@methods
def test_margins_of_low_precision(how, dtype):
    a, y = (t.to(dtype) for t in draw())
    x = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = NormalizedLRGD([x], lr=1.0, **how)
    for _ in range(3):
        optimizer.step(lambda: y * (a @ x))
    assert x.dtype == dtype
    assert torch.isfinite(x).all()
    assert x.any()


def test_nothing_to_step_is_no_error():
    x, frozen = theta(), nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = NormalizedLRGD([x])
    assert optimizer.step(lambda: torch.zeros(4)).item() == pytest.approx(math.log(2))
    other = theta()
    optimizer.step(lambda: other.sum().reshape(1))
    assert not x.any()
    NormalizedLRGD([frozen]).step(lambda: other.sum().reshape(1))
    assert torch.equal(frozen, torch.ones(3))


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"lr": 0.0}, ValueError, "lr must be > 0"),
        ({"lr": -1.0}, ValueError, "lr must be > 0"),
        ({"lr": math.nan}, ValueError, "lr must be > 0"),
        ({"lr": math.inf}, ValueError, "lr must be > 0"),
        ({"lr": "10"}, TypeError, "lr must be a real number"),
        ({"limit": "bach"}, ValueError, "unknown limit 'bach': did you mean 'batch'"),
    ],
)
def test_arguments_out_of_range_are_named(given, error, match):
    with pytest.raises(error, match=match):
        NormalizedLRGD([theta()], **given)


@pytest.mark.parametrize("other", [{"normalize": False}, {"limit": "batch"}, {"lr": 0.0}])
def test_groups_may_differ_in_the_learning_rate_alone(other):
    optimizer = NormalizedLRGD([theta()])
    with pytest.raises(ValueError, match=f"{next(iter(other))} must be"):
        optimizer.add_param_group({"params": [theta()], **other})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [theta()], "lr": 1.0})


@pytest.mark.parametrize(
    "closure, match",
    [
        (None, "needs a closure that returns the margins"),
        (lambda: torch.tensor(1.0), r"must return margins, floating, shape \(n,\).* got torch.float32 of shape \(\)"),
        (lambda: torch.zeros(3, 1), r"shape \(3, 1\)"),
        (lambda: torch.zeros(0), r"n >= 1, got torch.float32 of shape \(0,\)"),
        (lambda: torch.zeros(3, dtype=torch.int64), "got torch.int64"),
        (lambda: 1.0, "got float"),
    ],
)
def test_closures_that_return_no_margins_are_refused(closure, match):
    with pytest.raises(ValueError, match=match):
        NormalizedLRGD([theta()]).step(closure)

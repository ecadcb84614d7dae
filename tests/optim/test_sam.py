"""SAM against its definition; what every optimizer must do is in the room's common test."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from weightroom import train
from weightroom.optim import SAM


def closure_of(optimizer, loss, seen=None):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if seen is not None:
            seen.append(value.item())
        return value

    return closure


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    return net, torch.randn(20, 4, dtype=dtype), torch.randint(3, (20,))


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@given(w=st.floats(-10, 10).filter(lambda w: abs(w) > 1e-3), rho=st.floats(0, 2), lr=st.floats(1e-3, 0.5))
@settings(max_examples=30, deadline=None)
def test_step_on_a_parabola(w, rho, lr):
    x = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = SAM([x], torch.optim.SGD, rho, lr=lr)
    optimizer.step(closure_of(optimizer, lambda: x.square() / 2))
    assert x.item() == pytest.approx(w - lr * (w + rho * math.copysign(1, w)), rel=1e-9, abs=1e-9)


@given(w=st.floats(0.1, 5), rho=st.floats(0.01, 1), lr=st.floats(1e-3, 0.5))
@settings(max_examples=20, deadline=None)
def test_adaptive_step_on_a_parabola(w, rho, lr):
    # |w| g = w^2, w^2 g = w^3: epsilon = rho w^3 / w^2
    x = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer = SAM([x], torch.optim.SGD, rho, True, lr=lr)
    optimizer.step(closure_of(optimizer, lambda: x.square() / 2))
    assert x.item() == pytest.approx(w - lr * (w + rho * w), rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_second_gradient_is_that_of_the_definition(adaptive):
    model, x, y = problem()
    rho, loss = 0.3, lambda net: F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss(model), list(model.parameters()))
    scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in model.parameters()]
    norm = torch.cat([(s * g).reshape(-1) for s, g in zip(scales, grads, strict=True)]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, s, g in zip(moved.parameters(), scales, grads, strict=True):
            p.add_(s.square() * g * rho / norm)
    expected = [
        p - 0.1 * g for p, g in zip(model.parameters(), torch.autograd.grad(loss(moved), list(moved.parameters())), strict=True)
    ]
    optimizer = SAM(model.parameters(), rho=rho, adaptive=adaptive, lr=0.1)
    seen = []
    first = loss(model).item()
    assert optimizer.step(closure_of(optimizer, lambda: loss(model), seen)).item() == first
    assert seen == pytest.approx([first, loss(moved).item()])
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("base", "args"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-2})])
def test_without_radius_it_is_its_base_to_the_bit(base, args):
    model, x, y = problem(dtype=torch.float32)
    model.insert(1, nn.Dropout(0.5))
    twin = copy.deepcopy(model)
    optimizer, plain = SAM(model.parameters(), base, rho=0.0, **args), base(twin.parameters(), **args)
    for net, its in ((model, optimizer), (twin, plain)):
        torch.manual_seed(1)
        for _ in range(5):
            its.step(closure_of(its, lambda net=net: F.cross_entropy(net(x), y)))
    assert torch.equal(flat(model), flat(twin))


def test_one_radius_for_all_groups_together():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    optimizer = SAM([{"params": [a]}, {"params": [b], "rho": 0.0}], rho=0.5, lr=1.0)
    at = []

    def loss():
        at.append((a.item(), b.item()))
        return (a.square() + b.square()).sum() / 2

    optimizer.step(closure_of(optimizer, loss))
    # |g| = 5, so a moves by 0.5 * 3 / 5; b has no radius, but its gradient counts
    assert at == [(3.0, 4.0), (pytest.approx(3.3), 4.0)]
    assert a.item() == pytest.approx(3.0 - 3.3)
    assert b.item() == 0.0


def test_maximising_perturbs_downwards():
    x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = SAM([x], rho=0.5, lr=0.1, maximize=True)
    optimizer.step(closure_of(optimizer, lambda: -x.square() / 2))
    assert x.item() == pytest.approx(2.0 - 0.1 * 2.5)


def test_gradients_that_the_closure_does_not_clear_are_not_added_up():
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = SAM([x], rho=0.5, lr=0.1)

    def closure():
        loss = x.square() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert x.grad.item() == pytest.approx(1.5)


def test_a_failing_second_pass_leaves_the_weights():
    model, x, y = problem()
    before = flat(model)
    optimizer = SAM(model.parameters(), rho=1.0)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_state_dict_holds_the_momentum_of_the_base_and_nothing_more():
    model, x, y = problem()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(x), y)))
    state = optimizer.state_dict()["state"]
    assert {key for entry in state.values() for key in entry} == {"momentum_buffer"}
    assert optimizer.param_groups is optimizer.base.param_groups
    other = SAM(model.parameters(), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.base.param_groups is other.param_groups
    assert other.base.param_groups[0]["momentum"] == 0.9
    assert torch.equal(other.base.state[model[0].weight]["momentum_buffer"], optimizer.state[model[0].weight]["momentum_buffer"])


def test_a_state_dict_of_the_base_alone_can_be_loaded():
    model, x, y = problem()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "rho": 0.3, "adaptive": True}]
    plain = torch.optim.SGD([{"params": list(model[i].parameters())} for i in (0, 2)], lr=0.2, momentum=0.9)
    plain.step(closure_of(plain, lambda: F.cross_entropy(model(x), y)))
    optimizer = SAM(groups, rho=0.1, lr=1.0)
    optimizer.load_state_dict(plain.state_dict())
    assert [(g["rho"], g["adaptive"], g["lr"]) for g in optimizer.param_groups] == [(0.1, False, 0.2), (0.3, True, 0.2)]
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], plain.state[model[0].weight]["momentum_buffer"])
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(x), y)))
    assert optimizer.base.param_groups is optimizer.param_groups


def test_added_groups_get_the_defaults_of_both():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM([a], rho=0.1, lr=0.2, momentum=0.9)
    optimizer.add_param_group({"params": [b], "rho": 0.3})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 2
    group = optimizer.param_groups[1]
    assert (group["rho"], group["adaptive"], group["lr"], group["momentum"]) == (0.3, False, 0.2, 0.9)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1.0})
    assert len(optimizer.param_groups) == 2


def test_weights_may_change_their_dtype_between_steps():
    model, x, y = problem(dtype=torch.bfloat16)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.0)
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(x), y)))
    model.double()
    with torch.no_grad():
        model[0].weight.add_(1e-6)
    before = flat(model)
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(x.double()), y)))
    assert torch.equal(flat(model), before)


def test_errors():
    p = nn.Parameter(torch.ones(2))
    for rho in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rho"):
            SAM([p], rho=rho)
    with pytest.raises(ValueError, match="closure"):
        SAM([p]).step()


def test_the_training_loop_hands_it_the_closure():
    model, x, y = problem(dtype=torch.float32)
    done = train.fit(
        model, TensorDataset(x, y), loss=F.cross_entropy, optimizer=lambda p: SAM(p, rho=0.05, lr=0.1), epochs=3, batch_size=10
    )
    assert (done.steps, done.forwards, done.backwards) == (6, 12, 12)
    assert done.losses[-1] < done.losses[0]

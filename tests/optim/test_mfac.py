from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightroom.optim.mfac as room
from weightroom.curvature import EmpiricalFisherInverse
from weightroom.optim import MFAC


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vector(d: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.ones(d, dtype=dtype))


def moves(optimizer: MFAC, p: nn.Parameter, gradients: Tensor) -> Tensor:
    """How far each gradient moves the parameter, divided by -lr."""
    steps = []
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.reshape(p.shape).clone()
        optimizer.step()
        steps.append((before - p.detach()) / optimizer.param_groups[0]["lr"])
    return torch.stack(steps)


@pytest.mark.parametrize("m, d", [(1, 5), (4, 9), (4, 3), (7, 7)])
@pytest.mark.parametrize("damping", [1e-5, 0.1])
def test_each_step_is_the_product_with_the_last_m_gradients(m, d, damping):
    G, p = rows(3 * m + 2, d), vector(d)
    us = moves(MFAC([p], lr=1.0, window=m, damping=damping), p, G)
    for i, (g, u) in enumerate(zip(G, us, strict=True)):
        window = torch.cat([torch.zeros(m, d, dtype=torch.float64), G[: i + 1]])[-m:]
        torch.testing.assert_close(u, EmpiricalFisherInverse(window, damping).mul(g), rtol=1e-7, atol=1e-8)


def test_the_first_step_by_hand():
    g, p = rows(1, 6)[0], vector(6)
    u = moves(MFAC([p], lr=1.0, window=5, damping=0.01), p, g[None])[0]
    torch.testing.assert_close(u, g / (0.01 + g.square().sum() / 5), rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 1000), m=st.integers(1, 6), d=st.integers(1, 8), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=30)
def test_the_step_ascends_nowhere_and_is_bounded(seed, m, d, scale):
    G, p = scale * rows(10, d, seed), vector(d)
    for g, u in zip(G, moves(MFAC([p], lr=1.0, window=m), p, G), strict=True):
        assert g @ u >= 0
        assert g @ u < m * (1 + 1e-9)


def test_a_large_damping_is_sgd():
    G, p = rows(8, 5), vector(5)
    us = moves(MFAC([p], lr=1e12, window=4, damping=1e12), p, G)
    torch.testing.assert_close(1e12 * us, G, rtol=1e-3, atol=1e-3)


def test_a_zero_gradient_gives_a_zero_step_and_is_inserted():
    G, p = rows(3, 4), vector(4)
    optimizer = MFAC([p], window=2)
    moves(optimizer, p, G)
    before = p.detach().clone()
    moves(optimizer, p, torch.zeros(1, 4, dtype=torch.float64))
    assert torch.equal(p, before)
    state = optimizer.state[p]
    assert not state["grads"][1].any()
    assert state["step"] == 4


def test_momentum_averages_the_preconditioned_steps():
    G, p, q = rows(6, 4), vector(4), vector(4)
    us = moves(MFAC([p], lr=1.0, window=3, damping=0.1), p, G)
    vs = moves(MFAC([q], lr=1.0, window=3, damping=0.1, momentum=0.9), q, G)
    v = torch.zeros(4, dtype=torch.float64)
    for u, seen in zip(us, vs, strict=True):
        v = 0.9 * v + 0.1 * u
        torch.testing.assert_close(seen, v, rtol=1e-9, atol=1e-12)


def test_weight_decay_goes_into_the_window():
    g, p = rows(1, 4)[0], vector(4)
    optimizer = MFAC([p], window=3, weight_decay=0.5, damping=0.1)
    moves(optimizer, p, g[None])
    torch.testing.assert_close(optimizer.state[p]["grads"][0], g + 0.5, rtol=1e-12, atol=0)


def test_one_fisher_spans_all_groups_which_keep_their_rates_momenta_and_decays():
    G = rows(5, 7)
    whole, a, b = vector(7), vector(3), vector(4)
    us = moves(MFAC([whole], lr=1.0, window=3, damping=0.1), whole, G)
    groups = [{"params": [a], "lr": 1e-1}, {"params": [b], "lr": 1e-2, "momentum": 0.5}]
    optimizer = MFAC(groups, window=3, damping=0.1)
    v = torch.zeros(4, dtype=torch.float64)
    for g, u in zip(G, us, strict=True):
        before = (a.detach().clone(), b.detach().clone())
        a.grad, b.grad = g[:3].clone(), g[3:].clone()
        optimizer.step()
        v = 0.5 * v + 0.5 * u[3:]
        torch.testing.assert_close(before[0] - a, 1e-1 * u[:3], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(before[1] - b, 1e-2 * v, rtol=1e-7, atol=1e-10)
    decayed = MFAC([{"params": [a], "weight_decay": 0.5}, {"params": [b]}], window=3)
    decayed.step()
    expected = torch.cat([a.grad + 0.5 * (before[0] - 1e-1 * us[-1][:3]), b.grad])
    torch.testing.assert_close(decayed.state[a]["grads"][0], expected, rtol=1e-6, atol=1e-8)


def test_an_added_group_has_zeros_for_a_past():
    G, a, b = rows(6, 5), vector(3), vector(2)
    optimizer = MFAC([a], lr=1.0, window=4, damping=0.1, momentum=0.5)
    moves(optimizer, a, G[:3, :3])
    optimizer.add_param_group({"params": [b]})
    assert optimizer.state[a]["grads"].shape == (4, 5)
    a.grad, b.grad = G[3, :3].clone(), G[3, 3:].clone()
    before = b.detach().clone()
    optimizer.step()
    window = G[:4].clone()
    window[:3, 3:] = 0
    u = EmpiricalFisherInverse(window, 0.1).mul(G[3])
    torch.testing.assert_close(before - b, 0.5 * u[3:], rtol=1e-7, atol=1e-10)


def test_missing_gradients_are_zeros():
    G = rows(6, 5)
    weights = []
    for fill in (True, False):
        a, b = vector(3), vector(2)
        optimizer = MFAC([a, b], window=3, damping=0.1)
        for i, g in enumerate(G):
            a.grad = g[:3].clone()
            b.grad = None if i % 2 else g[3:].clone()
            if b.grad is None and fill:
                b.grad = torch.zeros_like(b)
            optimizer.step()
        weights.append(torch.cat([a, b]).detach())
    assert torch.equal(*weights)


def test_a_layer_frozen_on_the_way_stays_where_it_is():
    G, a, b = rows(4, 5), vector(3), vector(2)
    optimizer = MFAC([a, b], window=3, weight_decay=0.1)
    for i, g in enumerate(G):
        a.grad, b.grad = g[:3].clone(), None if i >= 2 else g[3:].clone()
        b.requires_grad_(i < 2)
        before = b.detach().clone()
        optimizer.step()
        assert torch.equal(b, before) == (i >= 2)


def test_a_step_without_any_gradient_does_nothing():
    p = vector(3)
    optimizer = MFAC([p], window=2)
    moves(optimizer, p, rows(2, 3))
    before = copy.deepcopy(optimizer.state_dict())
    p.grad = None
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
    assert torch.equal(optimizer.state[p]["grads"], before["state"][0]["grads"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    G, p = rows(4, 3), vector(3)
    optimizer = MFAC([p], window=3, momentum=0.5)
    moves(optimizer, p, G)
    before, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    p.grad = torch.tensor([0.0, bad, 1.0], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="MFAC: the gradient of step 5 is not finite"):
        optimizer.step()
    assert torch.equal(p, weights)
    state = optimizer.state_dict()["state"][0]
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before["state"][0][k])) for k, v in state.items())
    fresh = MFAC([q := vector(3)])
    q.grad = p.grad
    with pytest.raises(FloatingPointError, match="step 1 "):
        fresh.step()


def test_a_gradient_too_large_for_the_damping_is_named():
    p = vector(3)
    optimizer = MFAC([p], window=3, damping=1e-20)
    with pytest.raises(FloatingPointError, match="too large for the damping"):
        moves(optimizer, p, torch.full((3, 3), 1e8, dtype=torch.float64))


@pytest.mark.parametrize("through", ["memory", "file"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_comes_back_bit_for_bit_in_its_own_dtypes(through, sparse, dtype):
    p = nn.Parameter(torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=dtype))
    optimizer = MFAC([p], window=3, momentum=0.9, sparse=sparse)
    moves(optimizer, p, rows(5, 4, dtype=dtype))
    state = optimizer.state_dict()
    if through == "file":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    twin = nn.Parameter(p.detach().clone())
    fresh = MFAC([twin], window=8, sparse=sparse)
    fresh.load_state_dict(state)
    mine, its = optimizer.state[p], fresh.state[twin]
    assert set(its) == set(mine) == {"grads", "gram", "step", "momentum_buffer"} | ({"kept"} if sparse else set())
    for name, value in mine.items():
        assert type(its[name]) is type(value)
        if isinstance(value, Tensor):
            assert its[name].dtype == value.dtype
            assert torch.equal(its[name], value)
            assert its[name].data_ptr() != value.data_ptr()
    assert its["gram"].dtype == torch.float64
    assert its["grads"].dtype == torch.float32
    assert torch.equal(moves(fresh, twin, rows(4, 4, 1, dtype)), moves(optimizer, p, rows(4, 4, 1, dtype)))


def test_an_optimizer_made_otherwise_grows_by_the_loaded_window():
    p, q, r = vector(3), vector(3), vector(2)
    optimizer = MFAC([p], window=3)
    moves(optimizer, p, rows(2, 3))
    fresh = MFAC([q], window=8)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.add_param_group({"params": [r]})
    assert fresh.param_groups[1]["window"] == 3
    moves(fresh, q, rows(1, 3))


def test_zeros_stay_zero_in_sparse_mode_and_the_rest_is_stepped_as_if_alone():
    start = torch.tensor([[0.0, 1.0, 0.0, -2.0, 3.0]], dtype=torch.float64)
    p, dense = nn.Parameter(start.clone()), nn.Parameter(start[start != 0].clone())
    G = rows(6, 5)
    sparse = MFAC([p], lr=1e-2, window=4, momentum=0.5, weight_decay=0.1, sparse=True)
    moves(sparse, p, G)
    moves(MFAC([dense], lr=1e-2, window=4, momentum=0.5, weight_decay=0.1), dense, G[:, start[0] != 0])
    assert torch.equal(p[start == 0], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(p[start != 0], dense, rtol=1e-12, atol=0)
    assert sparse.state[p]["grads"].shape == (4, 3)
    q = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    sparse.add_param_group({"params": [q]})
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    sparse.step()
    assert sparse.state[p]["kept"].tolist() == [1, 3, 4, 5]
    assert q[0, 0] != 1
    assert q[0, 1] == 0


def test_parameters_of_several_dtypes_share_one_window():
    a, b = vector(2, torch.float32), vector(3, torch.bfloat16)
    optimizer = MFAC([a, b], lr=0.1, window=3, damping=0.1)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert optimizer.state[a]["grads"].dtype == torch.float32
    assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
    assert (a < 1).all()
    assert (b < 1).all()


def test_float32_gradients_keep_a_gram_matrix_that_float32_would_lose(monkeypatch):
    # Nearly equal rows of norm 1e4: K is known to 1e-1 in float32, and m lambda is 4e-5.
    base = 1e4 * rows(1, 300, dtype=torch.float32)
    G = base / base.norm() * 1e4 + 1e-2 * rows(6, 300, 1, torch.float32)
    for piece in (room.PIECE, 64):
        monkeypatch.setattr(room, "PIECE", piece)
        p = vector(300, torch.float32)
        optimizer = MFAC([p], lr=1e-9, window=4)
        for g in G:
            p.grad = g.reshape(p.shape).clone()
            optimizer.step()
        state = optimizer.state[p]
        order = [4, 5, 2, 3]
        expected = G[order].double() @ G[order].double().T
        assert torch.equal(state["grads"], G[order])
        torch.testing.assert_close(state["gram"], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"damping": 0.0}, ValueError, "damping must be > 0"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"window": 0}, ValueError, "window must be >= 1"),
        ({"window": 2.5}, TypeError, "window must be an integer"),
        ({"lr": -1e-3}, ValueError, "lr must be >= 0"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        MFAC([vector(2)], **arguments)


def test_groups_cannot_have_a_window_damping_or_sparsity_of_their_own():
    for name, value in {"window": 3, "damping": 0.1, "sparse": True}.items():
        with pytest.raises(ValueError, match=f"{name} must be the same in all groups"):
            MFAC([{"params": [vector(2)]}, {"params": [vector(2)], name: value}])


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match="MFAC does not support complex"):
        MFAC([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    optimizer = MFAC([p := vector(2)])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="MFAC does not support sparse gradients"):
            MFAC(table.parameters()).step()
    moves(optimizer, p, rows(1, 2))


def test_a_momentum_that_a_scheduler_brings():
    p = vector(3)
    optimizer = MFAC([p], window=3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)
    p.grad = torch.ones_like(p)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert torch.isfinite(p).all()
    assert "momentum_buffer" in optimizer.state[p]


def test_an_empty_first_group_is_taken_as_torch_takes_it():
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([{"params": []}, {"params": [p]}], damping=1e-2)
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p < 1).all()
    fresh = MFAC([{"params": []}, {"params": [p]}], damping=1e-2)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state[p]["step"] == 1


def test_sparse_keeps_biases_that_start_at_zero():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight[0, 0] = 0.0
    optimizer = MFAC(layer.parameters(), sparse=True, damping=1e-2)
    layer(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert layer.weight[0, 0] == 0
    assert (layer.bias != 0).all()


def test_arguments_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="damping must be"):
        MFAC([nn.Parameter(torch.ones(1))], damping=float("nan"))

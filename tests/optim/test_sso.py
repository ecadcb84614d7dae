"""SSO: the surrogate and its bound, exact steps, the rules for eta, what is counted, and errors."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightroom import train
from weightroom.optim import SSO
from weightroom.optim.sso import _shrink, _Surrogate

LBFGS = partial(
    torch.optim.LBFGS,
    lr=1,
    max_iter=300,
    tolerance_grad=1e-13,
    tolerance_change=1e-16,
    line_search_fn="strong_wolfe",
    history_size=20,
)


def bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction="sum")


def half_square(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum()


def ce(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def table(n: int = 30, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, (x @ torch.linspace(1, -1, d, dtype=torch.float64)[:, None] + torch.randn(n, 1, generator=g).double() > 0).double()


def zeros(d: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.zeros(d, 1, dtype=torch.float64))


def relu_net(inputs: int = 4, outputs: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs)).double()


# ---- one step, exactly


@settings(max_examples=25, deadline=None)
@given(eta=st.floats(1e-2, 1e2), a=st.floats(1e-3, 1.0), seed=st.integers(0, 100))
def test_one_plain_inner_step_is_sgd(eta, a, seed):
    x, y = table(seed=seed)
    ours, theirs = relu_net(seed=seed), relu_net(seed=seed)
    optimizer = SSO(ours.parameters(), eta=eta, inner_steps=1, inner=lambda p: torch.optim.SGD(p, lr=a))
    returned = optimizer.step(lambda: ours(x), lambda z: bce(z, y))
    loss = F.binary_cross_entropy_with_logits(theirs(x), y)
    loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=a).step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(returned, loss.detach())
    assert not returned.requires_grad


def test_exact_inner_solves_least_squares_in_one_step():
    x, _ = table()
    y = torch.randn(30, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = zeros()
    SSO([w], eta=1.0, inner_steps=1, inner=LBFGS).step(lambda: x @ w, lambda z: half_square(z, y))
    torch.testing.assert_close(w.detach(), torch.linalg.lstsq(x, y).solution, rtol=1e-8, atol=1e-9)


def test_exact_inner_of_logistic_regression_is_bohning_and_lindsays_step():
    x, y = table()
    w, theta, losses = zeros(), torch.zeros(4, 1, dtype=torch.float64), []
    optimizer = SSO([w], smoothness="bce", inner_steps=1, inner=LBFGS)
    for _ in range(8):
        losses.append(float(optimizer.step(lambda: x @ w, lambda z: bce(z, y))))
        theta = theta - 4 * torch.linalg.solve(x.T @ x, x.T @ (torch.sigmoid(x @ theta) - y))
        torch.testing.assert_close(w.detach(), theta, rtol=1e-7, atol=1e-8)
    assert all(b < a for a, b in pairwise(losses))


def test_exact_iterates_do_not_see_the_parametrisation():
    x, y = table()
    M = torch.diag(torch.tensor([1.0, 30.0, 0.1, 1.0], dtype=torch.float64)) + 0.3
    straight, turned = zeros(), zeros()
    one, other = (SSO([w], eta=2.0, inner_steps=3, inner=LBFGS) for w in (straight, turned))
    for _ in range(4):
        one.step(lambda: x @ straight, lambda z: bce(z, y))
        other.step(lambda: x @ (M @ turned), lambda z: bce(z, y))
        torch.testing.assert_close(x @ straight.detach(), x @ (M @ turned.detach()), rtol=1e-5, atol=1e-6)
    assert (straight - turned).abs().max() > 0.1


# ---- the bound


CASES = {
    "bce": (lambda p: p.reshape(30, 1), bce, 4.0),
    "ce": (lambda p: p.reshape(10, 3), ce, 2.0),
    "mse": (lambda p: p.reshape(30, 1), lambda z, y: (z - y).square().sum(), 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_the_surrogate_is_above_the_loss_everywhere_and_touches_it(name):
    shape, loss, eta = CASES[name]
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (10,), generator=g) if name == "ce" else (torch.rand(30, 1, generator=g) > 0.5).double()
    p = nn.Parameter(torch.randn(30, generator=g, dtype=torch.float64))
    z = shape(p.detach()).clone().requires_grad_()
    n = len(z)
    at_z = loss(z, y)
    (G,) = torch.autograd.grad(at_z, z)

    def gap(eta: float, points: Tensor) -> Tensor:
        q = _Surrogate(lambda: shape(p), z, z.detach(), G, eta, {"forward_evals": 0})
        gaps = []
        for point in points:
            p.data.copy_(point)
            gaps.append(at_z.item() / n + float(q.move()) - float(loss(shape(p.detach()), y)) / n)
        return torch.tensor(gaps)

    centre = z.detach().reshape(-1)
    far = centre + torch.randn(1000, 30, generator=g, dtype=torch.float64) * torch.logspace(-3, 1.5, 1000)[:, None]
    assert SSO([p], smoothness=name).param_groups[0]["lr"] == eta
    assert (gap(eta, far) >= -1e-12).all()
    # Where G_i is near 0 (z_i the wrong way round would be a cliff), the loss rises faster than a flatter parabola says.
    assert (gap(4 * eta, far) < 0).any()
    assert gap(eta, centre[None]).abs().max() < 1e-14
    q = _Surrogate(lambda: shape(p), z, z.detach(), G, eta, {"forward_evals": 0})
    p.data.copy_(centre)
    q.move()
    torch.testing.assert_close(q.gradient([p])[1][0], torch.autograd.grad(loss(shape(p), y) / n, p)[0])
    p.data.add_(0.3)
    by_hand = lambda: ((G * (shape(p) - z.detach())).sum() + (shape(p) - z.detach()).square().sum() / (2 * eta)) / n  # noqa: E731
    torch.testing.assert_close(q.move(), by_hand().detach())
    torch.testing.assert_close(q.gradient([p])[1][0], torch.autograd.grad(by_hand(), p)[0])


@pytest.mark.parametrize("inner_steps", [1, 10, 100])
@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_full_batch_loss_never_rises(kind, inner_steps):
    x, y = table()
    model = relu_net() if kind == "relu" else nn.Linear(4, 1).double()
    optimizer = SSO(model.parameters(), smoothness="bce", inner_steps=inner_steps)
    losses = [float(optimizer.step(lambda: model(x), lambda z: bce(z, y))) for _ in range(15)]
    assert all(b <= a + 1e-12 for a, b in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.counters["surrogate_decrease"] <= losses[0]


def test_many_inner_steps_come_to_the_exact_minimiser():
    x, y = table()
    x = x * torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=torch.float64)
    exact, armijo = zeros(), zeros()
    SSO([exact], smoothness="bce", inner_steps=1, inner=LBFGS).step(lambda: x @ exact, lambda z: bce(z, y))
    SSO([armijo], smoothness="bce", inner_steps=1000).step(lambda: x @ armijo, lambda z: bce(z, y))
    torch.testing.assert_close(armijo, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [1e-3, 1e-2, 1e-1])
def test_the_step_goes_to_zero_with_eta(eta):
    x, y = table()
    w = zeros()
    optimizer = SSO([w], eta=eta, inner_steps=20)
    optimizer.step(lambda: x @ w, lambda z: bce(z, y))
    moved = float((x @ w.detach()).norm())
    G = torch.full_like(y, 0.5) - y
    assert 0 < moved <= 2.1 * eta * float(G.norm())  # the minimiser is at most eta |G| away, an overshoot twice that


# ---- the line search on the surrogate


def test_armijo_accepts_what_trying_each_step_accepts():
    x, y = table()
    G = torch.full_like(y, 0.5) - y

    def q(w: Tensor) -> float:
        d = x @ w
        return float((G * d).sum() + d.square().sum() / 8) / 30

    w, value, a, expected, trials = torch.zeros(4, 1, dtype=torch.float64), 0.0, 10.0, [], 0
    for _ in range(6):
        grad = x.T @ (G + x @ w / 4) / 30
        while q(w - a * grad) > value - 0.3 * a * float(grad.square().sum()):
            a *= 0.8
            trials += 1
        w, value = w - a * grad, q(w - a * grad)
        expected.append(w)
        a *= 3
    for m, end in enumerate(expected, 1):
        ours = zeros()
        optimizer = SSO([ours], eta=4.0, inner_steps=m, c=0.3, backtrack=0.8, expand=3.0)
        optimizer.step(lambda ours=ours: x @ ours, lambda z: bce(z, y))
        torch.testing.assert_close(ours.detach(), end, rtol=1e-10, atol=1e-12)
    assert optimizer.counters["surrogate_decrease"] == pytest.approx(-value)
    assert optimizer.counters["backtracks"] < trials


def test_shrink_skips_what_the_parabola_rules_out():
    # q(s) = q - s + k s^2 is low enough for s <= (1 - c) / k.
    for k in (0.95, 1.3, 2.0, 7.0):
        share = _shrink(rise=k - 1, promised=1.0, c=0.1, backtrack=0.9)
        assert share <= 0.9 / k < share / 0.9
    assert _shrink(-0.05, 1.0, 0.1, 0.9) == 0.9
    assert 0.09 < _shrink(1e9, 1.0, 0.1, 0.9) < 0.1
    assert _shrink(math.inf, 1.0, 0.1, 0.9) == _shrink(math.nan, 1.0, 0.1, 0.9) == _shrink(1e9, 1.0, 0.1, 0.9)
    assert _shrink(1e9, 1.0, 0.1, 0.01) == 0.01


def test_a_search_that_finds_nothing_leaves_the_parameters():
    w = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = SSO([w], eta=1.0, inner_steps=5)
    optimizer.step(lambda: (w - 1.0) + 1e12 * (w - 1.0).detach().abs(), lambda z: z.sum())  # any move raises q
    assert w.item() == 1.0
    assert optimizer.counters["inner_steps"] == 0
    assert 1 <= optimizer.counters["backtracks"] <= 100
    assert optimizer.counters["surrogate_decrease"] == 0


def test_a_stationary_point_is_left_alone():
    x, _ = table()
    w = zeros()
    optimizer = SSO([w], eta=1.0)
    optimizer.step(lambda: x @ w, lambda z: half_square(z, torch.zeros_like(z)))
    assert not w.any()
    assert optimizer.counters["inner_steps"] == 0
    assert optimizer.counters["backtracks"] == 0
    tolerant = SSO([w], eta=1.0, grad_tol=10.0)
    tolerant.step(lambda: x @ w, lambda z: half_square(z, torch.ones_like(z)))
    assert not w.any()


def test_the_first_trial_is_the_same_on_each_surrogate():
    x, y = table()
    w = zeros()
    optimizer = SSO([w], eta=4.0, inner_steps=1, init_step=1e-3)
    for _ in range(3):
        before = w.detach().clone()
        grad = x.T @ (torch.sigmoid(x @ before) - y) / 30
        optimizer.step(lambda: x @ w, lambda z: bce(z, y))
        torch.testing.assert_close(w.detach(), before - 1e-3 * grad)


def test_overflow_in_a_trial_is_a_failed_trial():
    w = nn.Parameter(torch.tensor([[1.5]]))
    optimizer = SSO([w], eta=1.0, init_step=1e4)
    start = optimizer.step(lambda: w.square().exp(), lambda z: z.sum())
    assert torch.isfinite(w).all()
    assert w.detach().square().exp().sum() < start


# ---- eta


def etas(rule: str, steps: int = 4, scale=lambda t: 1.0, **more: object) -> list[float]:
    """The eta_t used, read off one exact step of z = theta: theta - eta_t G, with G = 1."""
    w = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = SSO([w], eta=0.5, eta_rule=rule, inner_steps=1, inner=LBFGS, **more)
    found = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = 0.5 * scale(t)
        before = w.detach().clone()
        optimizer.step(lambda: w * 1.0, lambda z: z.sum())
        found.append(float((before - w.detach()).mean()))
    return found


def test_rules_for_eta():
    assert etas("constant") == pytest.approx([0.5] * 4)
    assert etas("sqrt") == pytest.approx([0.5 / math.sqrt(t) for t in (1, 2, 3, 4)])
    assert etas("exp", total_steps=5) == pytest.approx([0.5 * 5 ** (-t / 5) for t in (1, 2, 3, 4)])
    assert etas("adagrad") == pytest.approx([0.5 / math.sqrt(2 * t) for t in (1, 2, 3, 4)])
    assert etas("constant", scale=lambda t: 1 / (t + 1)) == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])
    assert etas("linesearch") == pytest.approx([1, 2, 4, 8])  # a linear loss: each first trial is accepted
    assert etas("linesearch", expand=3.0) == pytest.approx([1.5, 4.5, 13.5, 40.5])
    assert etas("linesearch", scale=lambda t: 1 / (t + 1)) == pytest.approx([1, 1, 4 / 3, 2])
    assert etas("linesearch", steps=3, expand=1e5) == pytest.approx([1e4] * 3)


@pytest.mark.parametrize("curvature", [0.05, 1.0, 40.0])
def test_linesearch_for_eta_finds_one_over_l(curvature):
    x, _ = table()
    w = zeros()
    optimizer = SSO([w], eta=1.0, eta_rule="linesearch")
    for t in range(12):
        loss = float(optimizer.step(lambda: x @ w, lambda z: curvature / 2 * (z - 3).square().sum()))
        assert optimizer.counters["loss_evals"] >= t + 1
    found = optimizer._rule["found"]
    assert 0.899 / curvature <= found <= 1.0001 / curvature
    assert optimizer.counters["oracle_calls"] == 12
    assert loss < curvature / 2 * 9


def test_linesearch_is_clamped_from_below():
    w = zeros()
    x, _ = table()
    optimizer = SSO([w], eta=1.0, eta_rule="linesearch")
    for _ in range(3):
        optimizer.step(lambda: x @ w, lambda z: 1e7 * (z - 3).square().sum())
    assert optimizer._rule["found"] == 1e-4


def test_eta_of_zero_stands_still_but_asks():
    x, y = table()
    w = zeros()
    optimizer = SSO([w], eta=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    loss = optimizer.step(lambda: x @ w, lambda z: bce(z, y))
    assert loss == pytest.approx(math.log(2))
    assert not w.any()
    adagrad = SSO([w], eta=1.0, eta_rule="adagrad")
    adagrad.step(lambda: x @ w, lambda z: (None, torch.zeros_like(z)))
    assert not w.any()


def test_smoothness_is_one_over_eta():
    for smoothness, eta in {"bce": 4.0, "ce": 2.0, "mse": 0.5, 8.0: 0.125}.items():
        assert SSO([zeros()], smoothness=smoothness).param_groups[0]["lr"] == eta


# ---- the two functions


@pytest.mark.parametrize("inner_steps", [1, 7, 50])
@pytest.mark.parametrize("inner", ["armijo", LBFGS, partial(torch.optim.Adam, lr=0.01)])
def test_the_oracle_is_asked_once_and_everything_is_counted(inner_steps, inner):
    x, y = table()
    w, calls, forwards = zeros(), [], []

    def forward() -> Tensor:
        forwards.append(1)
        return x @ w

    def oracle(z: Tensor) -> Tensor:
        calls.append(z.detach().clone())
        return bce(z, y)

    optimizer = SSO([w], smoothness="bce", inner_steps=inner_steps, inner=inner)
    for t in range(3):
        at = (x @ w).detach()
        optimizer.step(forward, oracle)
        assert len(calls) == t + 1
        assert torch.equal(calls[-1], at)
    counters = optimizer.counters
    assert set(counters) == {"oracle_calls", "loss_evals", "inner_steps", "forward_evals", "backtracks", "surrogate_decrease"}
    assert counters["oracle_calls"] == 3
    assert counters["loss_evals"] == 0
    assert counters["forward_evals"] == len(forwards)
    assert counters["surrogate_decrease"] > 0
    if inner == "armijo":
        assert counters["forward_evals"] - 3 * 2 - counters["inner_steps"] - counters["backtracks"] in (0, 1, 2, 3)  # 1 may stop
        assert counters["inner_steps"] <= 3 * inner_steps
    else:
        assert counters["inner_steps"] == 3 * inner_steps


@pytest.mark.parametrize("form", ["per sample", "pair", "pair without loss", "pair with a float", "pair with a graph"])
def test_forms_of_the_oracle(form):
    x, y = table()

    def oracle(z: Tensor) -> object:
        loss, G = bce(z, y), torch.sigmoid(z) - y
        return {
            "per sample": F.binary_cross_entropy_with_logits(z, y, reduction="none"),
            "pair": (loss.detach(), G.detach()),
            "pair without loss": (None, G.detach()),
            "pair with a float": (loss.item(), G.detach()),
            "pair with a graph": (loss, G),
        }[form]

    w, plain = zeros(), zeros()
    expected = SSO([plain], smoothness="bce").step(lambda: x @ plain, lambda z: bce(z, y))
    returned = SSO([w], smoothness="bce").step(lambda: x @ w, oracle)
    torch.testing.assert_close(w, plain)
    if form == "pair without loss":
        assert returned is None
    else:
        assert returned.item() == pytest.approx(expected.item())
        assert not returned.requires_grad


def test_outputs_may_be_the_parameters_themselves_and_of_any_shape():
    for shape in ((), (3,), (2, 3, 2)):
        w = nn.Parameter(torch.full(shape, 2.0, dtype=torch.float64))
        SSO([w], eta=1.0, inner_steps=200).step(lambda w=w: w, lambda z: 0.5 * (z - 1).square().sum())
        torch.testing.assert_close(w.detach(), torch.ones_like(w), rtol=0, atol=1e-5)


def test_linesearch_takes_a_pair_and_needs_a_loss():
    x, y = table()
    w, plain = zeros(), zeros()
    make = partial(SSO, eta=1.0, eta_rule="linesearch")
    make([plain]).step(lambda: x @ plain, lambda z: bce(z, y))
    optimizer = make([w])
    optimizer.step(lambda: x @ w, lambda z: (bce(z, y), torch.sigmoid(z) - y))
    torch.testing.assert_close(w, plain)
    assert optimizer.counters["loss_evals"] > 0
    with pytest.raises(ValueError, match=r"linesearch.*gives the loss"):
        make([w]).step(lambda: x @ w, lambda z: (None, torch.sigmoid(z) - y))


@pytest.mark.parametrize("inner", ["armijo", partial(torch.optim.SGD, lr=0.1)])
def test_gradients_and_everything_else_of_the_user_stay(inner):
    x, y = table()
    model = relu_net()
    frozen = model[0].bias.requires_grad_(False)
    before = frozen.clone()
    kept = torch.ones_like(model[2].weight)
    model[2].weight.grad = kept
    state = torch.get_rng_state()
    SSO(model.parameters(), smoothness="bce", inner=inner).step(lambda: model(x), lambda z: bce(z, y))
    assert model[2].weight.grad is kept
    assert bool((kept == 1).all())
    assert model[0].weight.grad is None
    assert torch.equal(frozen, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_minibatches_with_train_fit():
    x, y = table(100)
    data = torch.utils.data.TensorDataset(x.float(), y.float())
    results = []
    for _ in range(2):
        model = relu_net().float()
        optimizer = SSO(model.parameters(), smoothness="bce")
        done = train.fit(model, data, loss=nn.BCEWithLogitsLoss(), optimizer=optimizer, epochs=5, batch_size=32, seed=3)
        assert done.losses[-1] < 0.9 * done.losses[0]
        assert optimizer.counters["oracle_calls"] == done.steps == 20
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*results)


def test_counters_and_schedule_are_saved():
    x, y = table()
    w = zeros()
    optimizer = SSO([w], eta=1.0, eta_rule="adagrad")
    for _ in range(3):
        optimizer.step(lambda: x @ w, lambda z: bce(z, y))
    state = copy.deepcopy(optimizer.state_dict())
    fresh = SSO([w], eta=7.0, eta_rule="adagrad")
    fresh.load_state_dict(state)
    assert fresh.counters == optimizer.counters == state["counters"]
    assert fresh._rule == optimizer._rule
    assert fresh.param_groups[0]["lr"] == 1.0
    fresh.step(lambda: x @ w, lambda z: bce(z, y))
    assert state["counters"]["oracle_calls"] == optimizer.counters["oracle_calls"] == 3
    assert copy.deepcopy(fresh).counters == fresh.counters


def test_batchnorm_in_training_mode_is_let_through():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1)).double()
    x, y = table()
    optimizer = SSO(model.parameters(), smoothness="bce")
    losses = [float(optimizer.step(lambda: model(x), lambda z: bce(z, y))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model[1].num_batches_tracked == optimizer.counters["forward_evals"]


# ---- errors


def test_a_plain_closure_is_refused():
    optimizer = SSO([zeros()], eta=1.0)
    for arguments in ((), (lambda: torch.tensor(0.0),)):
        with pytest.raises(TypeError, match=r"step\(forward, oracle\).*oracle\(z\)"):
            optimizer.step(*arguments)


def test_dropout_is_refused():
    x, y = table()
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    optimizer, calls = SSO(model.parameters(), smoothness="bce"), []
    oracle = lambda z: calls.append(1) or bce(z, y)  # noqa: E731
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="surrogate requires deterministic forward"):
        optimizer.step(lambda: model(x), oracle)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    model.eval()
    optimizer.step(lambda: model(x), oracle)
    model.train()
    with pytest.raises(RuntimeError, match="deterministic"):  # also when it was right at first
        optimizer.step(lambda: model(x), oracle)


def test_a_rounding_is_not_noise():
    w, flip = zeros(), [1.0]

    def forward() -> Tensor:
        flip[0] = -flip[0]
        return w + 1.0 + flip[0] * 1e-16

    SSO([w], eta=1.0).step(forward, lambda z: z.square().sum())
    assert w.abs().max() > 0


def test_what_the_oracle_returns_is_checked():
    x, _ = table()
    w = zeros()
    optimizer = SSO([w], eta=1.0)
    with pytest.raises(ValueError, match=r"\(30, 1\).*\(30,\)"):
        optimizer.step(lambda: x @ w, lambda z: (None, z.detach()[:, 0]))
    for bad in (math.nan, math.inf):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match="G is not finite"):
                optimizer.step(lambda: x @ w, lambda z, bad=bad: (None, torch.full_like(z, bad)))
    for wrong in (3.0, None, (1.0,), (None, 2.0)):
        with pytest.raises(TypeError, match="oracle must return"):
            optimizer.step(lambda: x @ w, lambda z, wrong=wrong: wrong)
    assert not w.any()


def test_what_forward_returns_is_checked():
    w = zeros()
    optimizer = SSO([w], eta=1.0)
    for wrong, found in (
        (np.zeros(3), "ndarray"),
        (torch.ones(3, dtype=torch.int64), "int64"),
        (torch.ones(2, dtype=torch.cfloat), "complex"),
    ):
        with pytest.raises(TypeError, match=f"forward must return a floating-point tensor.*{found}"):
            optimizer.step(lambda wrong=wrong: wrong, lambda z: z.sum())
    with pytest.raises(ValueError, match=r"at least one sample.*\(0, 1\)"):
        optimizer.step(lambda: torch.zeros(0, 1), lambda z: z.sum())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "eta or smoothness, got neither"),
        ({"eta": 1.0, "smoothness": "ce"}, "not both"),
        ({"eta": 0.0}, "eta must be > 0"),
        ({"eta": -1.0}, "eta must be > 0"),
        ({"eta": math.nan}, "eta .*nan"),
        ({"eta": math.inf}, "eta .*inf"),
        ({"smoothness": 0.0}, "smoothness must be > 0"),
        ({"smoothness": "hinge"}, "unknown smoothness 'hinge'.*bce, ce, mse"),
        ({"inner_steps": 0}, "inner_steps must be >= 1"),
        ({"inner": "adam"}, "unknown inner 'adam'.*armijo"),
        ({"eta_rule": "cosine"}, "unknown eta_rule 'cosine'.*adagrad, constant, exp, linesearch, sqrt"),
        ({"eta_rule": "exp"}, "needs total_steps"),
        ({"total_steps": 0}, "total_steps must be >= 1"),
        ({"c": 0.0}, "c must be > 0"),
        ({"c": 1.0}, "c must be > 0 and < 1"),
        ({"backtrack": 1.0}, "backtrack must be > 0 and < 1"),
        ({"expand": 0.9}, "expand must be >= 1"),
        ({"init_step": 0.0}, "init_step must be > 0"),
        ({"grad_tol": -1.0}, "grad_tol must be >= 0"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    if kwargs and not {"eta", "smoothness"} & set(kwargs):
        kwargs = {"eta": 1.0, **kwargs}
    with pytest.raises(ValueError, match=match):
        SSO([zeros()], **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{"eta": "fast"}, {"smoothness": True}, {"inner_steps": 1.5}, {"inner_steps": True}, {"inner": 3}, {"total_steps": 2.0}],
)
def test_arguments_of_the_wrong_kind(kwargs):
    with pytest.raises(TypeError, match=f"{next(iter(kwargs))} must be"):
        SSO([zeros()], **{"eta": 1.0, **kwargs} if "smoothness" not in kwargs else kwargs)


def test_a_factory_that_makes_no_optimizer():
    w = zeros()
    with pytest.raises(TypeError, match="inner must return a torch optimizer, got list"):
        SSO([w], eta=1.0, inner=lambda p: p).step(lambda: w * 1, lambda z: z.sum())


def test_groups_must_agree_on_eta():
    first, second = zeros(), zeros()
    with pytest.raises(ValueError, match=r"all groups must have one 'lr'.*\[1.0, 0.5\]"):
        SSO([{"params": [first]}, {"params": [second], "lr": 0.5}], eta=1.0)
    optimizer = SSO([first], eta=1.0)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.add_param_group({"params": [second]})
    assert optimizer.param_groups[1]["lr"] == 0.25
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match="all groups must have one 'lr'"):
        optimizer.step(lambda: first + second, lambda z: z.sum())


def test_positional_arguments_are_as_documented():
    optimizer = SSO([zeros()], None, "ce", 3, "armijo", "exp", 0.2, 0.8, 1.5, 5.0, 1e-5, 9)
    assert (optimizer.inner_steps, optimizer.inner, optimizer.eta_rule, optimizer.c, optimizer.backtrack) == (
        3,
        "armijo",
        "exp",
        0.2,
        0.8,
    )
    assert (optimizer.expand, optimizer.init_step, optimizer.grad_tol, optimizer.total_steps) == (1.5, 5.0, 1e-5, 9)
    assert SSO.needs_oracle


def test_a_closure_by_name_is_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"SSO\.step needs two functions"):
        SSO([nn.Parameter(torch.zeros(1))], eta=1.0).step(closure=lambda: None)


def test_a_failing_forward_leaves_the_parameters_where_they_were():
    theta, calls = nn.Parameter(torch.zeros(2, dtype=torch.float64)), []

    def forward():
        calls.append(0)
        if len(calls) == 3:
            raise OSError("the simulator is gone")
        return theta[:, None] * 1.0

    with pytest.raises(OSError, match="simulator"):
        SSO([theta], eta=1.0).step(forward, lambda z: ((z - 1) ** 2).sum())
    assert torch.equal(theta, torch.zeros(2, dtype=torch.float64))


def test_gradients_of_the_model_that_are_not_finite_are_said():
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="not finite"):
        SSO([theta], eta=1.0).step(lambda: theta.abs().sqrt()[:, None], lambda z: 0.5 * ((z - 1) ** 2).sum())

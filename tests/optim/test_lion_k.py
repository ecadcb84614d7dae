"""Lion-K: the step, each K, the constraint it means, the Lyapunov function, and the report."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from weightroom.optim import LionK, lion_k, lionk_objective
from weightroom.optim.lion_k import make_kappa

KAPPAS = {
    "l1": None, "lp": {"p": 3.0}, "l2": None, "linf": None, "huber": {"e": 0.3}, "trunc": {"e": 0.2}, "square": None,
}  # fmt: skip
NORMS = {"l1": 1.0, "lp": 3.0, "l2": 2.0, "linf": math.inf}
DUAL = {"l1": math.inf, "lp": 1.5, "l2": 2.0, "linf": 1.0}
each_kappa = pytest.mark.parametrize(("name", "args"), KAPPAS.items(), ids=KAPPAS)

vectors = st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=1, max_size=9).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
quick = settings(max_examples=40, deadline=None)


def param(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def gradient(name: str, v: Tensor, args: dict[str, float] | None = None) -> Tensor:
    v = v.clone()
    make_kappa(name, args).gradient_([v])
    return v


def step(x: nn.Parameter, g: Tensor, optimizer: LionK) -> Tensor:
    x.grad = g.clone()
    optimizer.step()
    return x.detach().clone()


# ---- the step


@each_kappa
def test_the_recursion_is_the_papers(name, args):
    g = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(3, 4, generator=g, dtype=torch.float64))
    lr, lam, (b1, b2) = 0.05, 0.7, (0.8, 0.95)
    optimizer = LionK([x], lr, (b1, b2), lam, name, args)
    want, m = x.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(6):
        grad = torch.randn(3, 4, generator=g, dtype=torch.float64)
        n = b1 * m + (1 - b1) * grad
        want = want - lr * (gradient(name, n, args) + lam * want)
        m = b2 * m + (1 - b2) * grad
        torch.testing.assert_close(step(x, grad, optimizer), want)
    torch.testing.assert_close(optimizer.state[x]["exp_avg"], m)
    assert list(optimizer.state[x]) == ["exp_avg"]


@each_kappa
def test_first_step_starts_from_zero_momentum(name, args):
    x = param(0.5, -1.0, 2.0)
    g = torch.tensor([3.0, -0.2, 0.7], dtype=torch.float64)
    x0 = x.detach().clone()
    got = step(x, g, LionK([x], 0.1, (0.9, 0.99), 0.5, name, args))
    torch.testing.assert_close(got, x0 - 0.1 * (gradient(name, 0.1 * g, args) + 0.5 * x0))


def test_first_lion_step_has_the_length_of_the_learning_rate():
    for size in (1e-6, 1.0, 1e6):
        x = param(0.0, 0.0, 0.0)
        assert step(x, size * torch.tensor([1.0, -2.0, 0.0]).double(), LionK([x], lr=0.1)).tolist() == [-0.1, 0.1, 0.0]


@quick
@given(scale=st.floats(1e-3, 1e3), name=st.sampled_from(sorted(KAPPAS)))
def test_only_norms_are_invariant_to_the_scale_of_the_loss(scale, name):
    assume(not 0.5 < scale < 2)
    g = [torch.tensor(v, dtype=torch.float64) for v in ([0.3, -2.0, 1.1], [0.4, 0.5, -0.9], [-1.3, 0.2, 0.05])]
    ends = []
    for c in (1.0, scale):
        x = param(1.0, -1.0, 0.5)
        optimizer = LionK([x], 0.1, weight_decay=0.3, kappa=name, kappa_args=KAPPAS[name])
        for grad in g:
            step(x, c * grad, optimizer)
        ends.append(x.detach().clone())
    same = torch.allclose(*ends, rtol=1e-9, atol=1e-12)
    assert same if name in NORMS else (not same or name == "trunc")


def test_trunc_is_not_invariant_to_the_scale_of_the_loss():
    ends = []
    for c in (1.0, 0.1):
        x = param(0.0)
        ends.append(step(x, torch.tensor([c * 10.0]).double(), LionK([x], 0.1, kappa="trunc", kappa_args={"e": 0.5})).item())
    assert ends == [-0.1, 0.0]


def test_square_is_momentum_sgd():
    b, lr, lam = 0.9, 0.1, 0.2
    x, y = param(1.0, -2.0), param(1.0, -2.0)
    ours = LionK([x], lr, (b, b), lam, "square")
    torchs = torch.optim.SGD([y], lr, momentum=b, dampening=b)
    m, z = torch.zeros(2, dtype=torch.float64), x.detach().clone()
    for t in range(5):
        g = torch.tensor([math.sin(t + 1), math.cos(t)], dtype=torch.float64)
        m = b * m + (1 - b) * g
        z = z - lr * (m + lam * z)
        torch.testing.assert_close(step(x, g, ours), z)
    # SGD's buffer starts with the whole first gradient; with that set right it takes the same steps.
    x, ours = param(1.0, -2.0), None
    ours = LionK([x], lr, (b, b), 0.0, "square")
    for t in range(5):
        g = torch.tensor([math.sin(t + 1), math.cos(t)], dtype=torch.float64)
        y.grad = g
        if t == 0:
            torchs.state[y]["momentum_buffer"] = torch.zeros(2, dtype=torch.float64)
        torchs.step()
        torch.testing.assert_close(step(x, g, ours), y.detach())


def test_coupled_decay_is_an_l2_penalty_on_the_loss():
    x, y = param(1.0, -2.0, 0.1), param(1.0, -2.0, 0.1)
    coupled, plain = LionK([x], 0.05, weight_decay=0.7, decoupled=False), LionK([y], 0.05)
    for t in range(5):
        g = torch.tensor([0.5, -0.1 * t, 0.03], dtype=torch.float64)
        step(y, g + 0.7 * y.detach(), plain)
        torch.testing.assert_close(step(x, g, coupled), y.detach())


def test_coupled_decay_sets_no_bound():
    x = param(0.0)
    optimizer = LionK([x], 0.1, weight_decay=2.0, decoupled=False)
    for _ in range(20):
        step(x, torch.tensor([-100.0]).double(), optimizer)
    assert x.item() > 1.5


@each_kappa
def test_gradient_sees_what_the_mix_is_not_what_the_momentum_will_be(name, args):
    x = param(0.0, 0.0)
    optimizer = LionK([x], 1.0, (0.5, 0.0), 0.0, name, args)
    step(x, torch.tensor([4.0, 0.0]).double(), optimizer)  # m_1 = g with beta2 = 0, whatever beta1 is
    assert optimizer.state[x]["exp_avg"].tolist() == [4.0, 0.0]
    before = x.detach().clone()
    after = step(x, torch.tensor([0.0, 1.0]).double(), optimizer)
    torch.testing.assert_close(before - after, gradient(name, torch.tensor([2.0, 0.5]).double(), args))


# ---- each K


@each_kappa
@quick
@given(v=vectors)
def test_gradient_is_the_derivative_of_k(name, args, v):
    kappa, h = make_kappa(name, args), 1e-6
    kinks = {"l1": [0.0], "linf": [], "trunc": [0.2], "huber": []}.get(name, [])
    assume(all(((v.abs() - k).abs() > 1e-3).all() for k in kinks) and v.abs().max() > 1e-2)
    if name == "linf" and v.numel() > 1:
        top = v.abs().topk(2).values
        assume(top[0] - top[1] > 1e-3)
    basis = torch.eye(v.numel(), dtype=torch.float64)
    numeric = torch.stack([(kappa.K(v + h * e) - kappa.K(v - h * e)) / (2 * h) for e in basis])
    torch.testing.assert_close(gradient(name, v, args), numeric, rtol=1e-4, atol=1e-4)


@quick
@given(v=vectors, name=st.sampled_from(sorted(NORMS)))
def test_gradient_of_a_norm_is_a_unit_vector_of_the_dual_norm(v, name):
    assume(v.abs().max() > 1e-6)
    u = gradient(name, v, KAPPAS[name])
    norm = torch.linalg.vector_norm(v, NORMS[name])
    torch.testing.assert_close(u @ v, norm)  # Euler
    torch.testing.assert_close(torch.linalg.vector_norm(u, DUAL[name]).item(), 1.0)


@each_kappa
@quick
@given(v=vectors, w=vectors)
def test_fenchel_young(name, args, v, w):
    """K(v) + K*(y) >= <v, y>, with equality at y = grad K(v)."""
    kappa = make_kappa(name, args)
    u = gradient(name, v, args) * (1 - 1e-12)
    torch.testing.assert_close(kappa.K(v) + kappa.K_conj(u), v @ u, rtol=1e-9, atol=1e-9)
    if v.shape == w.shape:
        assert kappa.K(v) + kappa.K_conj(w) >= v @ w - 1e-9


@each_kappa
def test_zero_gives_a_zero_gradient(name, args):
    assert gradient(name, torch.zeros(2, 3), args).tolist() == [[0.0] * 3] * 2
    assert make_kappa(name, args).K(torch.zeros(3)) == 0


@quick
@given(v=vectors)
def test_limits_of_the_families(v):
    l1, l2 = v.sign(), v / torch.linalg.vector_norm(v).clamp_min(1e-300)
    assert torch.equal(gradient("l1", v), l1)
    assert torch.equal(gradient("trunc", v, {"e": 0.0}), l1)
    assert torch.equal(gradient("trunc", v, {"e": 0.5}), l1 * (v.abs() > 0.5))
    assume((v.abs() > 1e-6).all())
    torch.testing.assert_close(gradient("huber", v, {"e": 1e-9}), l1)
    torch.testing.assert_close(gradient("lp", v, {"p": 2.0}), l2)
    torch.testing.assert_close(gradient("l2", v), l2)
    torch.testing.assert_close(gradient("lp", v, {"p": 1 + 1e-9}), l1, rtol=1e-6, atol=1e-6)


def test_huber_is_linear_inside_and_a_sign_outside():
    got = gradient("huber", torch.tensor([-3.0, -0.1, 0.0, 0.2, 0.4]), {"e": 0.4})
    torch.testing.assert_close(got, torch.tensor([-1.0, -0.25, 0.0, 0.5, 1.0]))


def test_linf_takes_the_first_of_equals():
    assert gradient("linf", torch.tensor([[1.0, -2.0], [2.0, 0.0]])).tolist() == [[0.0, -1.0], [0.0, 0.0]]
    assert gradient("linf", torch.tensor([[1.0, -2.0], [2.0, 0.0]]).t()).tolist() == [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("p", [1.01, 2.0, 3.0, 40.0])
def test_norms_neither_under_nor_overflow(size, p):
    v = torch.tensor([1.0, -2.0, 0.5, 0.0])
    u = gradient("lp", size * v, {"p": p})
    want = v.double().sign() * v.double().abs() ** (p - 1) / torch.linalg.vector_norm(v.double(), p) ** (p - 1)
    torch.testing.assert_close(u.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_low_precision_are_taken_in_float32(dtype):
    v = torch.full((4096,), 0.01, dtype=dtype)  # summed in bfloat16, equal squares stop growing at 256 terms
    torch.testing.assert_close(gradient("l2", v), torch.full_like(v, 1 / 64), rtol=0.02, atol=0)


def test_group_scope_takes_one_norm_of_all():
    g = [torch.tensor([3.0, 0.0]).double(), torch.tensor([[0.0], [-4.0]]).double()]
    for name, want in {"l2": [[-0.6, 0.0], [[0.0], [0.8]]], "linf": [[0.0, 0.0], [[0.0], [1.0]]]}.items():
        params = [nn.Parameter(torch.zeros_like(t)) for t in g]
        optimizer = LionK(params, lr=1.0, kappa=name, scope="group")
        for p, t in zip(params, g, strict=True):
            p.grad = t
        optimizer.step()
        for p, w in zip(params, want, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(w).double())


def test_group_scope_is_tensor_scope_of_the_concatenation():
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3)]
    for name in ("l2", "lp", "linf", "l1", "huber"):
        parts, whole = [nn.Parameter(torch.zeros(7).double()) for _ in range(3)], nn.Parameter(torch.zeros(21).double())
        split = LionK(parts, 0.1, kappa=name, kappa_args=KAPPAS[name], scope="group")
        joined = LionK([whole], 0.1, kappa=name, kappa_args=KAPPAS[name])
        for k in range(3):
            for p, t in zip(parts, grads, strict=True):
                p.grad = (k + 1) * t
            whole.grad = (k + 1) * torch.cat(grads)
            split.step()
            joined.step()
        torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole.detach())


def test_group_scope_with_mixed_dtypes():
    params = [nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for p in params:
        p.grad = torch.ones_like(p)
    LionK(params, lr=1.0, kappa="l2", scope="group").step()
    for p in params:
        torch.testing.assert_close(p.detach().double(), torch.full((2,), -(6**-0.5)).double(), rtol=1e-2, atol=0)


# ---- the constraint


@quick
@given(
    start=st.lists(st.floats(-1, 1), min_size=5, max_size=5),
    lam=st.floats(0.1, 5),
    eta=st.floats(1e-3, 1),
    seed=st.integers(0, 99),
)
def test_box_is_never_left(start, lam, eta, seed):
    eta /= lam
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64) / lam)
    optimizer = LionK([x], eta, weight_decay=lam)
    g = torch.Generator().manual_seed(seed)
    for _ in range(10):
        step(x, torch.randn(5, generator=g, dtype=torch.float64), optimizer)
        assert x.abs().max() <= (1 + 1e-12) / lam


@quick
@given(lam=st.floats(0.1, 5), eta=st.floats(1e-3, 1), out=st.floats(1.01, 10), seed=st.integers(0, 99))
def test_excess_over_the_box_contracts(lam, eta, out, seed):
    eta /= lam
    x = param(out / lam, -out / lam, 0.0)
    optimizer = LionK([x], eta, weight_decay=lam)
    g = torch.Generator().manual_seed(seed)
    for _ in range(10):
        before = (x.detach().abs() - 1 / lam).clamp_min(0)
        step(x, torch.randn(3, generator=g, dtype=torch.float64), optimizer)
        after = (x.detach().abs() - 1 / lam).clamp_min(0)
        assert (after <= (1 - eta * lam) * before + 1e-12 / lam).all()


@pytest.mark.parametrize("name", ["lp", "l2", "linf", "huber", "trunc"])
def test_other_sets_are_never_left(name):
    lam, g = 2.0, torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(6, generator=g, dtype=torch.float64))
    with torch.no_grad():
        x.mul_(1 / lionk_objective([x], lam, name, KAPPAS[name])["use"])
    optimizer = LionK([x], 0.2, weight_decay=lam, kappa=name, kappa_args=KAPPAS[name])
    for _ in range(30):
        step(x, torch.randn(6, generator=g, dtype=torch.float64), optimizer)
        assert lionk_objective([x], lam, name, KAPPAS[name])["violation"] < 1e-12


def solution(name: str, A: np.ndarray, b: np.ndarray, lam: float) -> np.ndarray:
    """Minimises |Ax - b|^2 / 2n + K*(lam x) / lam by scipy; box and ridge only."""
    n, d = A.shape
    ridge = {"l1": 0.0, "huber": KAPPAS["huber"]["e"] * lam, "square": lam}[name]
    bound = math.inf if name == "square" else 1 / lam
    rows, right = np.vstack([A / n**0.5, ridge**0.5 * np.eye(d)]), np.concatenate([b / n**0.5, np.zeros(d)])
    return lsq_linear(rows, right, (-bound, bound), method="bvls", tol=1e-14).x


def least_squares(name: str, lam: float) -> tuple[Tensor, Tensor, Tensor, np.ndarray, np.ndarray]:
    """Where 2000 steps with a decaying learning rate end, and the problem: x, Q, c with f = x.Qx/2 - c.x, and A, b."""
    rng = np.random.default_rng(47)
    A = rng.standard_normal((30, 8))
    b = A @ (3 * rng.standard_normal(8)) + rng.standard_normal(30)
    Q, c = torch.from_numpy(A.T @ A / 30), torch.from_numpy(A.T @ b / 30)
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = LionK([x], lr=0.2, weight_decay=lam, kappa=name, kappa_args=KAPPAS[name])
    for t in range(2000):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - t / 2000)
        step(x, Q @ x.detach() - c, optimizer)
    return x.detach(), Q, c, A, b


@pytest.mark.parametrize("name", ["l1", "huber", "square"])
def test_solves_the_constrained_problem(name):
    x, Q, c, A, b = least_squares(name, lam=0.5)
    want = torch.from_numpy(solution(name, A, b, 0.5))
    assert name == "square" or ((want.abs() > 1.99).any() and (want.abs() < 1.99).any())
    torch.testing.assert_close(x, want, rtol=0, atol=2e-3)
    F = lambda x: x @ Q @ x / 2 - c @ x + lionk_objective([x], 0.5, name, KAPPAS[name])["penalty"]  # noqa: E731
    assert abs(F(x) - F(want)) < 1e-6


@pytest.mark.parametrize("name", ["l2", "lp", "huber", "square"])
def test_stops_where_the_step_balances_the_decay(name):
    x, Q, c, *_ = least_squares(name, lam=0.5)
    torch.testing.assert_close(x, -gradient(name, Q @ x - c, KAPPAS[name]) / 0.5, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("eps", "gamma", "lam"), [(0.5, 1.0, 0.5), (0.1, 3.0, 1.0), (0.9, 1.0, 0.2)])
@each_kappa
def test_lyapunov_function_never_increases(name, args, eps, gamma, lam):
    r"""Small steps follow the ODE m' = -gamma (grad f + m), x' = grad K(m - eps gamma (grad f + m)) - lam x (alpha = gamma).

    H = gamma f(x) + gamma/lam K*(lam x) + (1 - eps gamma)/(1 + eps lam) (K*(lam x) + K(m) - lam m.x), m the paper's.
    """
    h, d, g = 1e-3, 6, torch.Generator().manual_seed(0)
    R = torch.randn(12, d, generator=g, dtype=torch.float64)
    Q, c = R.T @ R / 12, torch.randn(d, generator=g, dtype=torch.float64)
    kappa = make_kappa(name, args)
    x = nn.Parameter(torch.randn(d, generator=g, dtype=torch.float64))
    with torch.no_grad():
        x.mul_(0.9 / max(kappa.use(lam * x).max().item(), 0.9))
    optimizer = LionK([x], h, (1 - eps * gamma, 1 - h * gamma), lam, name, args)
    m, H, f = torch.zeros(d, dtype=torch.float64), [], []
    for _ in range(400):
        y, paper_m = lam * x.detach(), -m
        f.append((x @ Q @ x / 2 - c @ x).item())
        conj = kappa.smooth(y)
        bracket = conj + kappa.K(paper_m) - paper_m @ y
        H.append((gamma * f[-1] + gamma / lam * conj + (1 - eps * gamma) / (1 + eps * lam) * bracket).item())
        step(x, Q @ x.detach() - c, optimizer)
        m = optimizer.state[x]["exp_avg"]
        assert bracket >= -1e-9
        assert kappa.use(y).max() <= 1 + 1e-9
    rise = np.diff(H).max()
    assert rise <= 10 * h**2, rise  # what the discretisation of a sign may add
    assert H[0] - H[-1] > 0.1


def test_the_loss_alone_is_no_lyapunov_function():
    """Guards the test above: momentum makes f rise where H does not."""
    x = param(1.0, 1.0)
    optimizer = LionK([x], 1e-2, (0.99, 0.99), 0.1, "square")
    values = []
    for _ in range(1500):
        values.append((x[0] ** 2 + 10 * x[1] ** 2).item())
        step(x, torch.stack([2 * x[0], 20 * x[1]]).detach(), optimizer)
    assert np.diff(values).max() > 1e-3


# ---- as an optimizer


@pytest.mark.parametrize("name", ["l1", "huber", "trunc", "l2", "square"])
def test_pieces_of_large_tensors_change_nothing(name, monkeypatch):
    monkeypatch.setattr(lion_k, "PIECE", 64)
    shapes = [(40, 9), (3,), (64,), (65,), (2, 3), (128,), (5,)]
    ends = []
    for foreach in (None, True, False):
        g = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]
        params.append(nn.Parameter(torch.randn(70, 2, generator=g, dtype=torch.float64).t()))
        optimizer = LionK(params, 0.1, weight_decay=0.5, kappa=name, kappa_args=KAPPAS[name], foreach=foreach)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_pieces_hold_every_weight_once(monkeypatch):
    monkeypatch.setattr(lion_k, "PIECE", 10)
    tensors = [torch.arange(float(n)) + 1000 * n for n in (3, 25, 4, 6, 10, 0, 1)]
    for split in (True, False):
        pieces = [x for x, _, _ in lion_k._cache_sized([tensors, tensors, tensors], split)]
        assert sorted(torch.cat([t for x in pieces for t in x]).tolist()) == sorted(torch.cat(tensors).tolist())
        assert all(x for x in pieces)
        assert (max(t.numel() for x in pieces for t in x) <= 10) == split


def test_complex_weights_are_pairs_of_weights():
    z = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
    x = nn.Parameter(torch.view_as_real(z.detach().clone()))
    for p in (z, x):
        optimizer = LionK([p], 0.1, weight_decay=0.5, kappa="huber", kappa_args={"e": 0.05})
        for k in range(3):
            g = torch.tensor([0.5 - 1j, k + 0.1j], dtype=torch.complex128)
            step(p, g if p is z else torch.view_as_real(g), optimizer)
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach())


def test_groups_choose_their_own_k():
    a, b = param(0.0, 0.0), param(0.0, 0.0)
    optimizer = LionK([{"params": [a]}, {"params": [b], "kappa": "l2"}], 1.0, kappa="huber", kappa_args={"e": 0.1})
    for p in (a, b):
        p.grad = torch.tensor([3.0, 4.0]).double()
    optimizer.step()
    assert a.tolist() == [-1.0, -1.0]
    torch.testing.assert_close(b.detach(), torch.tensor([-0.6, -0.8]).double())


class Doubled:
    """grad of K(v) = |v|_2^2."""

    def __call__(self, v: Tensor) -> Tensor:
        return 2 * v

    def K_conj(self, y: Tensor) -> Tensor:
        return y.square().sum() / 4


def test_callable_k():
    x = param(0.0, 0.0)
    assert step(x, torch.tensor([1.0, -3.0]).double(), LionK([x], 1.0, (0.0, 0.9), kappa=Doubled())).tolist() == [-2.0, 6.0]


def test_state_dict_leaves_a_callable_out_and_takes_the_loaders():
    x = param(1.0, 2.0)
    optimizer = LionK([x], 0.1, kappa=Doubled(), weight_decay=0.3)
    step(x, torch.tensor([1.0, -3.0]).double(), optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = nn.Parameter(x.detach().clone())
    other = LionK([twin], 0.7, kappa=Doubled())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.param_groups[0]["lr"] == 0.1
    g = torch.tensor([0.3, 0.1]).double()
    assert torch.equal(step(x, g, optimizer), step(twin, g, other))
    with pytest.raises(ValueError, match="callable kappa"):
        LionK([param(1.0, 2.0)]).load_state_dict(optimizer.state_dict())
    assert callable(optimizer.param_groups[0]["kappa"])


def test_state_dict_carries_k():
    x = param(1.0, 2.0)
    other = LionK([x], kappa="l2")
    other.load_state_dict(LionK([x], kappa="huber", kappa_args={"e": 0.5}).state_dict())
    assert other.param_groups[0]["kappa"] == "huber"
    assert other.param_groups[0]["kappa_args"] == {"e": 0.5}


def test_state_is_one_buffer_of_the_parameters_dtype():
    model = nn.Linear(4, 3).bfloat16()
    optimizer = LionK(model.parameters())
    model(torch.ones(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    assert all(list(s) == ["exp_avg"] and s["exp_avg"].dtype == torch.bfloat16 for s in optimizer.state.values())
    assert copy.deepcopy(optimizer.state_dict())["state"][0]["exp_avg"].shape == (3, 4)


# ---- errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": 0.0}, r"lr must be > 0.*got 0"),
        ({"lr": -1.0}, r"lr must be > 0"),
        ({"lr": math.nan}, r"lr .*nan"),
        ({"lr": math.inf}, r"lr .*inf"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be >= 0 and < 1"),
        ({"betas": (0.9,)}, "betas must be two"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"lr": 0.3, "weight_decay": 4.0}, r"lr \* weight_decay must be <= 1, got 1.2: the constraint phase would oscillate"),
        ({"kappa": "l3"}, "unknown kappa 'l3'.*huber, l1, l2, linf, lp, square, trunc"),
        ({"kappa": "huber"}, r"kappa_args of kappa='huber' must be \{'e': ...\}, got \{\}"),
        ({"kappa": "lp", "kappa_args": {"e": 3}}, r"must be \{'p': ...\}"),
        ({"kappa": "l1", "kappa_args": {"e": 3}}, r"must be \{\}, got \{'e': 3\}"),
        ({"kappa": "huber", "kappa_args": {"e": 0}}, "kappa_args: e must be > 0"),
        ({"kappa": "huber", "kappa_args": {"e": -1}}, "kappa_args: e must be > 0"),
        ({"kappa": "trunc", "kappa_args": {"e": -1}}, "kappa_args: e must be >= 0"),
        ({"kappa": "lp", "kappa_args": {"p": 1}}, "kappa_args: p must be > 1"),
        ({"kappa": "lp", "kappa_args": {"p": math.inf}}, "kappa_args: p must be > 1 and < inf"),
        ({"scope": "layer"}, "unknown scope 'layer'.*group, tensor"),
        ({"kappa": torch.sign, "scope": "group"}, "scope='group'"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LionK([param(1.0)], **kwargs)
    optimizer = LionK([param(1.0)])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [param(2.0)], **kwargs})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "kwargs", [{"lr": "fast"}, {"lr": True}, {"lr": torch.tensor(0.1)}, {"kappa": 3}, {"weight_decay": None}]
)
def test_arguments_of_the_wrong_kind(kwargs):
    with pytest.raises(TypeError, match=f"{next(iter(kwargs))} must be"):
        LionK([param(1.0)], **kwargs)


def test_accepted_limits():
    LionK([param(1.0)], lr=0.25, weight_decay=4.0)
    LionK([param(1.0)], lr=1.0, weight_decay=4.0, decoupled=False)
    LionK([param(1.0)], betas=(0.0, 0.0), kappa="trunc", kappa_args={"e": 0})
    last = LionK([param(1.0)], lr=np.float32(0.1), kappa="lp", kappa_args={"p": 3})
    assert last.param_groups[0]["kappa_args"] == {"p": 3}


def test_defaults_are_lions():
    group = LionK([param(1.0)]).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["kappa"]) == (1e-4, (0.9, 0.99), 0.0, "l1")


# ---- the report


def test_report_of_the_box():
    x = torch.tensor([[0.199, -0.1], [0.1985, 0.0]], dtype=torch.float64)
    report = lionk_objective([x], 5.0, "l1")
    assert report == {"penalty": 0.0, "use": pytest.approx(0.995), "violation": 0.0, "at_bound": 0.5}
    assert lionk_objective([2 * x], 5.0, "l1")["violation"] == pytest.approx(0.99)


@each_kappa
def test_report_of_each_k(name, args):
    x, lam = [torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.1]]).double()], 2.0
    report = lionk_objective(x, lam, name, args)
    q = {"huber": math.inf, "trunc": math.inf, **DUAL}.get(name)
    penalty = {"huber": 0.3 * lam / 2 * 0.14, "trunc": 0.2 * 0.6, "square": lam / 2 * 0.14}.get(name, 0.0)
    assert report["penalty"] == pytest.approx(penalty)
    use = 0.0 if q is None else lam * torch.linalg.vector_norm(x[0], q).item()
    assert report["use"] == pytest.approx(use)
    assert report["violation"] == pytest.approx(max(use - 1, 0))
    together = lionk_objective(x, lam, name, args, scope="group")
    assert together["use"] == pytest.approx(
        0.0 if q is None else lam * torch.linalg.vector_norm(torch.tensor([0.3, -0.2, 0.1]), q).item()
    )
    assert together["penalty"] == pytest.approx(penalty)


def test_report_counts_weights_of_full_tensors_for_a_norm():
    assert lionk_objective([torch.tensor([0.3, 0.4]), torch.zeros(6)], 2.0, "l2")["at_bound"] == 0.25


def test_report_without_decay_and_with_low_precision_and_complex():
    assert lionk_objective([torch.ones(2)], 0.0, "l1") == {"penalty": 0.0, "use": 0.0, "violation": 0.0, "at_bound": 0.0}
    assert lionk_objective([torch.full((1000,), 0.1).bfloat16()], 1.0, "linf")["use"] == pytest.approx(100, rel=1e-2)
    assert lionk_objective([torch.tensor([3 + 4j])], 1.0, "l2")["use"] == pytest.approx(5)
    assert lionk_objective(nn.Linear(3, 2).parameters(), 1.0, "l1")["use"] <= 1


def test_report_of_a_callable():
    assert lionk_objective([torch.tensor([3.0])], 2.0, Doubled()) == {
        "penalty": 4.5,
        "use": 0.0,
        "violation": 0.0,
        "at_bound": 0.0,
    }

    def sign(v: Tensor) -> Tensor:
        return v.sign()

    with pytest.raises(ValueError, match="K_conj"):
        lionk_objective([torch.ones(1)], 1.0, sign)
    sign.K_conj = lambda y: 0.0 if y.abs().max() <= 1 else math.inf
    assert lionk_objective([torch.tensor([0.4])], 2.0, sign)["use"] == 0.0
    assert lionk_objective([torch.tensor([0.6])], 2.0, sign)["violation"] == math.inf


def test_report_errors():
    with pytest.raises(ValueError, match="lam must be >= 0"):
        lionk_objective([torch.ones(1)], -1.0, "l1")
    with pytest.raises(ValueError, match="params has no weights"):
        lionk_objective([], 1.0, "l1")
    with pytest.raises(ValueError, match="unknown kappa"):
        lionk_objective([torch.ones(1)], 1.0, "l7")

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weightroom.curvature.fisher as fisher
from weightroom.curvature import EmpiricalFisherInverse


def gradients(m: int, d: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(G: Tensor, damping: float, block_size: int | None = None) -> Tensor:
    m, d = G.shape
    F = damping * torch.eye(d, dtype=torch.float64) + G.T @ G / m
    B = d if block_size in (None, -1) else block_size
    block = torch.arange(d) // B
    return F * (block[:, None] == block)


def recursion(G: Tensor, damping: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's static algorithm, row by row: F^-1 x and the diagonal of F^-1."""
    m = len(G)
    vs: list[Tensor] = []
    dens: list[Tensor] = []
    for g in G:
        v = g / damping
        for w, den in zip(vs, dens, strict=True):
            v = v - w * (w @ g) / den
        vs.append(v)
        dens.append(m + g @ v)
    product, diagonal = x / damping, torch.full_like(x, 1 / damping)
    for v, den in zip(vs, dens, strict=True):
        product, diagonal = product - v * (v @ x) / den, diagonal - v.square() / den
    return product, diagonal


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


sizes = pytest.mark.parametrize("m, d", [(1, 1), (1, 7), (6, 20), (6, 6), (30, 8), (3, 1)])
blocks = pytest.mark.parametrize("block_size", [None, -1, 1, 4, 5, 100])


@sizes
@blocks
@pytest.mark.parametrize("damping", [1e-5, 0.1, 10.0])
def test_products_diagonal_and_entries_are_those_of_the_dense_inverse(m, d, block_size, damping):
    G = gradients(m, d)
    F = dense(G, damping, block_size)
    inverse = EmpiricalFisherInverse(G, damping, block_size)
    X = gradients(3, d, seed=1)
    assert relative(inverse.mul(X), torch.linalg.solve(F, X.T).T) < 1e-9
    assert torch.allclose(inverse.mul(X[1]), inverse.mul(X)[1], rtol=1e-12, atol=0)
    expected = torch.linalg.inv(F)
    torch.testing.assert_close(inverse.diag(), expected.diagonal(), rtol=1e-8, atol=0)
    for i, j in ((0, 0), (0, d - 1), (d // 2, d // 3), (-1, 0)):
        assert inverse.entry(i, j) == pytest.approx(float(expected[i, j]), rel=1e-7, abs=1e-9 / damping)
        assert torch.equal(inverse.entry(i, j), inverse.entry(j, i))


@sizes
def test_it_is_what_the_papers_recursion_gives(m, d):
    G, x = gradients(m, d), gradients(1, d, seed=1)[0]
    product, diagonal = recursion(G, 0.01, x)
    inverse = EmpiricalFisherInverse(G, 0.01)
    assert relative(inverse.mul(x), product) < 1e-9
    assert relative(inverse.diag(), diagonal) < 1e-9


def test_many_blocks_are_worked_on_in_pieces(monkeypatch):
    G, x = gradients(4, 59), gradients(2, 59, seed=1)
    for block_size in (2, 7):
        whole = EmpiricalFisherInverse(G, 0.1, block_size)
        monkeypatch.setattr(fisher, "PIECE", 100)
        pieces = EmpiricalFisherInverse(G, 0.1, block_size)
        assert len(pieces._factors) > len(whole._factors)
        torch.testing.assert_close(pieces.mul(x), whole.mul(x), rtol=1e-12, atol=1e-14)
        assert torch.equal(pieces.diag(), whole.diag())
        assert pieces.entry(57, 56) == whole.entry(57, 56)
        monkeypatch.undo()


@given(seed=st.integers(0, 1000), m=st.integers(1, 12), d=st.integers(1, 12), block=st.sampled_from([None, 1, 3]))
@settings(deadline=None, max_examples=40)
def test_the_order_of_gradients_does_not_matter(seed, m, d, block):
    G, x = gradients(m, d, seed), gradients(1, d, seed + 1)[0]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    one, other = (EmpiricalFisherInverse(g, 1e-2, block) for g in (G, G[order]))
    assert relative(other.mul(x), one.mul(x)) < 1e-9
    assert relative(other.diag(), one.diag()) < 1e-9


@given(seed=st.integers(0, 1000), m=st.integers(1, 12), d=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_a_gradient_of_the_window_meets_less_than_m(seed, m, d):
    G = gradients(m, d, seed, scale=30.0)
    products = EmpiricalFisherInverse(G, 1e-3).mul(G)
    quadratic = (G * products).sum(1)
    assert (quadratic >= 0).all()
    assert (quadratic < m).all()


@pytest.mark.parametrize("m, d", [(5, 9), (9, 5)])
@pytest.mark.parametrize("damping", [1e-5, 0.3])
def test_zero_gradients_leave_x_over_lambda_exactly(m, d, damping):
    x = gradients(2, d)
    inverse = EmpiricalFisherInverse(torch.zeros(m, d, dtype=torch.float64), damping)
    assert torch.equal(inverse.mul(x), x / damping)
    assert torch.equal(inverse.mul(x.float()), x.float() / damping)
    assert torch.equal(inverse.diag(), torch.full((d,), 1.0, dtype=torch.float64) / damping)


def test_zero_rows_count_in_the_divisor():
    g = gradients(1, 6)
    padded = torch.cat([g, torch.zeros(3, 6, dtype=torch.float64)])
    expected = g[0] / (0.1 + g.square().sum() / 4)
    torch.testing.assert_close(EmpiricalFisherInverse(padded, 0.1).mul(g[0]), expected, rtol=1e-12, atol=0)


def test_blocks_of_one_are_a_diagonal_fisher():
    G = gradients(7, 10)
    inverse = EmpiricalFisherInverse(G, 0.01, 1)
    expected = 1 / (0.01 + G.square().mean(0))
    torch.testing.assert_close(inverse.diag(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inverse.mul(G), G * expected, rtol=1e-12, atol=0)
    assert inverse.entry(2, 3) == 0


def test_float32_gradients_are_worked_on_in_float64():
    # Large gradients and the paper's damping: in float32, x / lambda minus the correction keeps no correct digit.
    G = gradients(12, 40, scale=30.0).float()
    F = dense(G.double(), 1e-5)
    inverse = EmpiricalFisherInverse(G)
    x = G[3]
    assert inverse.mul(x).dtype == inverse.diag().dtype == inverse.entry(0, 1).dtype == torch.float32
    assert relative(inverse.mul(x).double(), torch.linalg.solve(F, x.double())) < 1e-4
    torch.testing.assert_close(inverse.diag(), torch.linalg.inv(F).diagonal().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_float32_comes_out(dtype):
    G = gradients(4, 6).to(dtype)
    inverse = EmpiricalFisherInverse(G)
    assert inverse.diag().dtype == inverse.mul(G).dtype == torch.float32
    assert torch.isfinite(inverse.mul(G)).all()
    assert inverse.mul(torch.ones(6, dtype=torch.int64)).dtype == torch.float32


def test_what_is_given_is_neither_changed_nor_kept():
    G = gradients(4, 6).requires_grad_()
    before, x = G.detach().clone(), gradients(1, 6)
    inverse = EmpiricalFisherInverse(G, 0.1)
    first = inverse.mul(x)
    assert torch.equal(G, before)
    with torch.no_grad():
        G.zero_()
    assert torch.equal(inverse.mul(x), first)
    assert not first.requires_grad
    assert inverse.mul(torch.zeros(0, 6)).shape == (0, 6)


def test_gradients_need_not_be_contiguous():
    G = gradients(6, 9)
    turned = G.T.contiguous().T
    assert torch.equal(EmpiricalFisherInverse(turned, 0.1, 4).diag(), EmpiricalFisherInverse(G, 0.1, 4).diag())


@pytest.mark.parametrize("damping", [0.0, -1e-5, float("nan"), float("inf")])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match="damping must be > 0"):
        EmpiricalFisherInverse(gradients(2, 3), damping)


@pytest.mark.parametrize("block_size", [0, -2, 1.5])
def test_blocks_must_have_a_width(block_size):
    with pytest.raises(ValueError, match="block_size must be an integer >= 1, or None or -1"):
        EmpiricalFisherInverse(gradients(2, 3), block_size=block_size)


@pytest.mark.parametrize(
    "grads, words",
    [
        (torch.zeros(3), r"shape \(m, d\) with m, d >= 1, got \(3,\)"),
        (torch.zeros(0, 3), r"got \(0, 3\)"),
        (torch.zeros(3, 0), r"got \(3, 0\)"),
        (torch.zeros(2, 3, dtype=torch.complex64), "real floating point, got torch.complex64"),
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 3).to_sparse(), "dense tensor"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[1.0, float("inf")], [0.0, 0.0]]), "NaN or infinity"),
    ],
)
def test_gradients_that_cannot_be_used_are_refused(grads, words):
    with pytest.raises(ValueError, match=words):
        EmpiricalFisherInverse(grads)


def test_a_damping_lost_in_rounding_is_refused():
    with pytest.raises(ValueError, match="damping 1e-30 is lost"):
        EmpiricalFisherInverse(torch.ones(3, 5), 1e-30)


def test_a_diagonal_lost_in_rounding_is_raised_with_a_warning():
    G = torch.zeros(1, 3, dtype=torch.float64)
    G[0, 0] = 1e9
    with pytest.warns(UserWarning, match="raise the damping"):
        diagonal = EmpiricalFisherInverse(G).diag()
    assert (diagonal > 0).all()


def test_shapes_that_do_not_fit_are_named():
    inverse = EmpiricalFisherInverse(gradients(2, 3))
    for x in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(1, 1, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"\(3,\) or \(k, 3\) to go with grads of shape \(2, 3\), got") as error:
            inverse.mul(x)
        assert str(tuple(x.shape)) in str(error.value)
    with pytest.raises(ValueError, match="x must be real"):
        inverse.mul(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(IndexError, match=r"j must be in -3\.\.2, got 3"):
        inverse.entry(0, 3)

from __future__ import annotations

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel

from weightroom.kernels import SelfDistilledKernelRidge, distillation_shrinkage, optimal_alpha

X11 = np.arange(11)[:, None] / 10
Y11 = np.array(
    [0.38476636, 1.23339677, 1.33232242, 0.69201595, -0.29756146, -0.24189292, -0.79644858, -0.96164802, -0.49672510, -0.34690660, 0.55895127]
)  # fmt: skip
GRID = np.arange(101)[:, None] / 100


def noisy_sine(n=30, seed=0, outputs=None):
    rng = np.random.default_rng(seed)
    X = rng.random((n, 1))
    y = np.sin(2 * np.pi * X[:, 0]) + 0.5 * rng.standard_normal(n)
    return X, y if outputs is None else y[:, None] * np.arange(1, outputs + 1) + rng.standard_normal((n, outputs))


# ---- the authors' numbers


@pytest.mark.parametrize(
    "alpha, steps, limit",
    [
        (0.0, [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
        (0.25, [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
        (0.35, [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
    ],
)
def test_the_toy_example_of_the_authors(alpha, steps, limit):
    def error(model, step=None):
        return np.mean((model.predict(GRID, step) - np.sin(2 * np.pi * GRID[:, 0])) ** 2)

    model = SelfDistilledKernelRidge(gamma=80, lam=0.2, alpha=alpha, steps=6).fit(X11, Y11)
    np.testing.assert_allclose([error(model, step) for step in range(1, 7)], steps, rtol=0, atol=1e-5)
    assert error(model.set_params(steps=math.inf).fit(X11, Y11)) == pytest.approx(limit, abs=1e-5)


# ---- the recursion, its closed form and its limit


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1), lam=st.floats(0.05, 10), steps=st.integers(1, 8))
def test_the_steps_are_the_recursion_and_its_eigen_form(seed, alpha, lam, steps):
    X, y = noisy_sine(15, seed)
    model = SelfDistilledKernelRidge(gamma=20, lam=lam, alpha=alpha, steps=steps).fit(X, y)
    K = rbf_kernel(X, gamma=20)
    M, previous = np.linalg.inv(K + lam * np.eye(15)), y
    d, V = eigh(K)
    d = d.clip(0)
    a, b_inf = d / (d + lam), alpha * d / (alpha * d + lam)
    b = distillation_shrinkage(d, lam, alpha, steps)
    assert b.shape == (steps, 15)
    x = np.linspace(0, 1, 20)[:, None]
    for tau in range(1, steps + 1):
        np.testing.assert_allclose(b[tau - 1], b_inf + ((1 - alpha) * a) ** tau * (1 - b_inf), rtol=0, atol=1e-12)
        target = alpha * y + (1 - alpha) * previous
        previous = K @ M @ target
        np.testing.assert_allclose(model.predict(X, tau), V @ (b[tau - 1] * (V.T @ y)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.predict(X, tau), previous, rtol=0, atol=1e-10)
        np.testing.assert_allclose(model.predict(x, tau), rbf_kernel(x, X, gamma=20) @ M @ target, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(model.predict(x), model.predict(x, steps))


def test_a_weight_for_each_step():
    X, y = noisy_sine()
    alphas = [0.9, 0.1, 0.6, 0.0]
    model = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=alphas, steps=4).fit(X, y)
    np.testing.assert_array_equal(model.alphas_, alphas)
    d, V = eigh(rbf_kernel(X, gamma=20))
    for tau, b in enumerate(distillation_shrinkage(d, 0.2, alphas, 4), 1):
        np.testing.assert_allclose(model.predict(X, tau), V @ (b * (V.T @ y)), atol=1e-12)
    other = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=(0.2, *alphas[1:]), steps=4).fit(X, y)
    np.testing.assert_allclose(other.dual_coefs_, model.dual_coefs_, rtol=0, atol=1e-13)  # the first has no effect
    last = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=np.array([0.9, 0.1, 0.6, 0.5]), steps=4).fit(X, y)
    assert np.abs(last.dual_coefs_[3] - model.dual_coefs_[3]).max() > 1e-3


@pytest.mark.parametrize("steps", [math.inf, "limit", np.inf])
@pytest.mark.parametrize("alpha", [0.05, 0.35, 1.0])
def test_the_limit_is_ridge_with_an_amplified_penalty(steps, alpha):
    X, y = noisy_sine(outputs=2)
    limit = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=alpha, steps=steps).fit(X, y)
    ridge = KernelRidge(kernel="rbf", gamma=20, alpha=0.2 / alpha).fit(X, y)
    np.testing.assert_allclose(limit.predict(GRID), ridge.predict(GRID), rtol=0, atol=1e-10)
    assert limit.dual_coefs_.shape == (1, 30, 2)
    np.testing.assert_array_equal(limit.predict(GRID, math.inf), limit.predict(GRID, "limit"))


def test_many_steps_reach_the_limit():
    X, y = noisy_sine()
    model = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=0.35, steps=200).fit(X, y)
    limit = SelfDistilledKernelRidge(gamma=20, lam=0.2, alpha=0.35, steps="limit").fit(X, y)
    np.testing.assert_allclose(model.predict(GRID), limit.predict(GRID), rtol=0, atol=1e-8)
    d = model.eigvals_
    np.testing.assert_allclose(
        distillation_shrinkage(d, 0.2, 0.35, 200)[-1:], distillation_shrinkage(d, 0.2, 0.35, math.inf), rtol=0, atol=1e-12
    )
    assert distillation_shrinkage(d, 0.2, 0.35, "limit").shape == (1, 30)


def test_without_labels_the_limit_is_zero():
    X, y = noisy_sine()
    assert not SelfDistilledKernelRidge(alpha=0.0, steps=math.inf).fit(X, y).predict(GRID).any()
    assert not distillation_shrinkage([0.0, 1.0], 1.0, 0.0, math.inf).any()


def test_the_first_step_is_kernel_ridge_whatever_alpha():
    X, y = noisy_sine()
    ridge = KernelRidge(kernel="rbf", gamma=20, alpha=0.3).fit(X, y).predict(GRID)
    for alpha in (0.0, 0.7, "validate", [0.1, 0.2, 0.3]):
        model = SelfDistilledKernelRidge(gamma=20, lam=0.3, alpha=alpha).fit(X, y)
        np.testing.assert_allclose(model.predict(GRID, step=1), ridge, rtol=0, atol=1e-10)


def test_with_labels_alone_every_step_is_the_first():
    model = SelfDistilledKernelRidge(gamma=20, lam=0.3, alpha=1.0, steps=5).fit(*noisy_sine())
    np.testing.assert_allclose(model.dual_coefs_, np.broadcast_to(model.dual_coefs_[0], (5, 30)), rtol=0, atol=1e-14)


@given(alpha=st.floats(0, 1, exclude_max=True), lam=st.floats(1e-3, 1e3))
def test_shrinkage_grows_with_every_step(alpha, lam):
    d = np.logspace(-3, 2, 30)
    b = np.vstack([np.ones(30), distillation_shrinkage(d, lam, alpha, 10)])
    assert ((b[1:] > 0) & (b[1:] < 1)).all()
    assert (np.diff(b, axis=0) <= 1e-15).all()


@given(lam=st.floats(1e-3, 1e3))
def test_without_labels_small_eigenvalues_fade_faster(lam):
    b = distillation_shrinkage([0.01, 1.0], lam, 0.0, 10)
    ratio = b[:, 0] / b[:, 1]
    assert (np.diff(ratio) < 0).all()


def test_with_labels_the_ratio_need_not_fall_at_every_step():
    b = distillation_shrinkage([0.03, 10.0], 1.0, 0.2, 6)
    ratio = b[:, 0] / b[:, 1]
    assert ratio[0] > ratio[1]
    assert (np.diff(ratio) > 0).any()


# ---- what a kernel ridge should do


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_scaling_and_permuting(scale, seed):
    X, y = noisy_sine(12, seed)
    fit = lambda X, y: SelfDistilledKernelRidge(gamma=20, lam=0.1, alpha=0.3, steps=4).fit(X, y).predict(GRID)  # noqa: E731
    np.testing.assert_allclose(fit(X, scale * y), scale * fit(X, y), rtol=1e-9, atol=1e-12 * scale)
    order = np.random.default_rng(seed).permutation(12)
    np.testing.assert_allclose(fit(X[order], y[order]), fit(X, y), rtol=0, atol=1e-11)


def test_duplicate_rows_are_fine():
    X, y = noisy_sine(10)
    model = SelfDistilledKernelRidge(gamma=20, lam=1e-6, alpha=0.0, steps=3).fit(np.repeat(X, 3, 0), np.repeat(y, 3))
    assert np.abs(model.predict(X) - y).max() < 0.05
    assert model.eigvals_.min() == pytest.approx(0, abs=1e-12)


def test_outputs_are_independent_of_one_another():
    X, Y = noisy_sine(outputs=3)
    model = SelfDistilledKernelRidge(gamma=20, lam=0.1, steps=4).fit(X, Y)
    assert model.dual_coefs_.shape == (4, 30, 3)
    for k in range(3):
        alone = SelfDistilledKernelRidge(gamma=20, lam=0.1, steps=4).fit(X, Y[:, k])
        np.testing.assert_allclose(model.predict(GRID)[:, k], alone.predict(GRID), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "kernel, params",
    [
        ("linear", {}),
        ("poly", {"degree": 2, "gamma": 0.5, "coef0": 2.0}),
        ("laplacian", {"gamma": 3.0}),
        ("rbf", {"gamma": None}),
    ],
)
def test_kernels_are_those_of_scikit_learn(kernel, params):
    rng = np.random.default_rng(0)
    X, y, x = rng.standard_normal((20, 3)), rng.standard_normal(20), rng.standard_normal((5, 3))
    ridge = KernelRidge(kernel=kernel, alpha=0.5, **params).fit(X, y)
    ours = SelfDistilledKernelRidge(kernel=kernel, lam=0.5, **params).fit(X, y)
    np.testing.assert_allclose(ours.predict(x, 1), ridge.predict(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.3, "validate"])
def test_a_precomputed_kernel_and_a_function_are_as_the_kernel_itself(alpha):
    X, y = noisy_sine()
    args = {"lam": 0.2, "alpha": alpha, "random_state": 0}
    plain = SelfDistilledKernelRidge(gamma=20, **args).fit(X, y)
    K, k = rbf_kernel(X, gamma=20), rbf_kernel(GRID, X, gamma=20)
    before = K.copy()
    precomputed = SelfDistilledKernelRidge(kernel="precomputed", **args).fit(K, y)
    np.testing.assert_array_equal(K, before)
    np.testing.assert_allclose(precomputed.predict(k), plain.predict(GRID), rtol=0, atol=1e-12)
    np.testing.assert_allclose(precomputed.eigvals_, plain.eigvals_, rtol=0, atol=1e-12)
    gauss = lambda a, b, width: np.exp(-width * ((a - b) ** 2).sum())  # noqa: E731
    function = SelfDistilledKernelRidge(kernel=gauss, kernel_params={"width": 20}, **args).fit(X, y)
    np.testing.assert_allclose(function.predict(GRID), plain.predict(GRID), rtol=0, atol=1e-12)


def test_sparse_and_single_precision_inputs():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 4)) * (rng.random((20, 4)) < 0.5), rng.standard_normal(20)
    for alpha in (0.35, "validate"):
        fit = lambda X, alpha=alpha: SelfDistilledKernelRidge(alpha=alpha, random_state=0).fit(X, y)  # noqa: E731
        np.testing.assert_allclose(fit(csr_matrix(X)).predict(csr_matrix(X)), fit(X).predict(X), rtol=0, atol=1e-12)
        single = fit(X.astype(np.float32)).predict(X.astype(np.float32))
        assert single.dtype == np.float64
        np.testing.assert_allclose(single, fit(X).predict(X), rtol=0, atol=1e-5)


def test_eigenvalues_are_those_of_the_last_fit():
    X, y = noisy_sine()
    model = SelfDistilledKernelRidge(gamma=20)
    with pytest.raises(NotFittedError):
        _ = model.eigvals_
    assert not hasattr(model, "eigvals_")
    for data in (X, X[:20]):
        model.fit(data, y[: len(data)])
        np.testing.assert_allclose(model.eigvals_, np.linalg.eigvalsh(rbf_kernel(data, gamma=20)), rtol=0, atol=1e-12)


def test_data_are_left_and_pickling_and_cloning_work():
    X, y = noisy_sine()
    before = X.copy(), y.copy()
    model = SelfDistilledKernelRidge(gamma=20, alpha="validate", random_state=0).fit(X, y)
    assert all(np.array_equal(a, b) for a, b in zip((X, y), before, strict=True))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(GRID), model.predict(GRID))
    assert not hasattr(clone(model), "dual_coefs_")


@pytest.mark.parametrize("alpha", [0.35, "validate"])
def test_scikit_learns_own_checks(alpha):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(SelfDistilledKernelRidge(alpha=alpha))


# ---- the weight of the labels


def test_optimal_alpha_is_the_minimum():
    rng = np.random.default_rng(0)
    p1, p0, y = rng.standard_normal((3, 20, 2))
    alpha = optimal_alpha(p1, p0, y, clip=False)
    assert type(alpha) is float
    error = lambda a: ((a * p1 + (1 - a) * p0 - y) ** 2).mean()  # noqa: E731
    assert error(alpha) < min(error(alpha - 0.01), error(alpha + 0.01))
    assert optimal_alpha(p1, p0, p0) == 0
    assert optimal_alpha(p1, p0, p1) == pytest.approx(1, abs=1e-15)
    assert optimal_alpha(p1, p0, 3 * p1 - 2 * p0) == 1
    assert optimal_alpha(p1, p0, 3 * p1 - 2 * p0, clip=False) == pytest.approx(3)
    assert optimal_alpha(p1, p0, 2 * p0 - p1) == 0
    assert optimal_alpha(p1, p0, 2 * p0 - p1, clip=False) == pytest.approx(-1)
    assert optimal_alpha([1, 2], [0, 0], [1, 1]) == pytest.approx(0.6)


@given(seed=st.integers(0, 10**6))
def test_optimal_alpha_of_tensors_is_that_of_arrays(seed):
    arrays = np.random.default_rng(seed).standard_normal((3, 7))
    tensors = torch.from_numpy(arrays)
    for clip in (True, False):
        result = optimal_alpha(*tensors, clip)
        assert isinstance(result, torch.Tensor)
        assert result.shape == ()
        assert float(result) == pytest.approx(optimal_alpha(*arrays, clip), rel=1e-12)
    assert optimal_alpha(*tensors.float()).dtype == torch.float32


def test_equal_predictions_give_one_with_a_warning():
    p = np.ones(3)
    with pytest.warns(UserWarning, match="p_label equals p_distill"):
        assert optimal_alpha(p, p, np.zeros(3)) == 1.0
    with pytest.warns(UserWarning, match="p_label equals p_distill"):
        assert torch.equal(optimal_alpha(torch.ones(3), torch.ones(3), torch.zeros(3)), torch.tensor(1.0))


@pytest.mark.parametrize(
    "args, error, match",
    [
        ((np.ones(3), np.ones(4), np.ones(3)), ValueError, r"same shape, got \(3,\), \(4,\) and \(3,\)"),
        ((np.ones((3, 1)), np.ones((3, 1)), np.ones(3)), ValueError, "same shape"),
        ((np.ones(0), np.ones(0), np.ones(0)), ValueError, "validation data are empty"),
        ((torch.ones(3), np.ones(3), np.ones(3)), TypeError, "mixture"),
    ],
)
def test_optimal_alpha_refuses(args, error, match):
    with pytest.raises(error, match=match):
        optimal_alpha(*args)


def test_validated_weights_minimise_the_validation_error_of_their_step():
    X, y = noisy_sine(40, seed=3)
    X_val, y_val = noisy_sine(20, seed=4)
    model = SelfDistilledKernelRidge(gamma=20, lam=0.02, alpha="validate", steps=5, clip_alpha=False).fit(X, y, X_val, y_val)
    np.testing.assert_array_equal(model.alphas_, model.raw_alphas_)
    assert model.alphas_[0] == 1

    def error(alphas, step):
        other = SelfDistilledKernelRidge(gamma=20, lam=0.02, alpha=alphas, steps=5, allow_outside=True).fit(X, y)
        return ((other.predict(X_val, step) - y_val) ** 2).mean()

    for step in range(2, 6):
        moved = [model.alphas_ + sign * 0.01 * np.eye(5)[step - 1] for sign in (-1, 1)]
        assert error(model.alphas_, step) < min(error(alphas, step) for alphas in moved)


def test_clipping_is_reported():
    X, y = noisy_sine(40, seed=3)
    X_val, y_val = noisy_sine(20, seed=4)
    args = {"gamma": 20, "lam": 5.0, "alpha": "validate", "steps": 3}
    clipped = SelfDistilledKernelRidge(**args).fit(X, y, X_val, y_val)
    assert clipped.raw_alphas_[1] > 1  # far too large a penalty: the best weight undoes the shrinkage
    np.testing.assert_array_equal(clipped.alphas_, clipped.raw_alphas_.clip(0, 1))
    raw = SelfDistilledKernelRidge(**args, clip_alpha=False).fit(X, y, X_val, y_val)
    assert raw.alphas_[1] == raw.raw_alphas_[1] == clipped.raw_alphas_[1]
    error = lambda model: ((model.predict(X_val) - y_val) ** 2).mean()  # noqa: E731
    assert error(raw) < error(clipped)
    fixed = SelfDistilledKernelRidge(gamma=20, alpha=-0.5, allow_outside=True).fit(X, y)
    np.testing.assert_array_equal(fixed.alphas_, [-0.5] * 3)


def test_holding_out_finds_the_weights_and_then_fits_all():
    X, y = noisy_sine(40)
    model = SelfDistilledKernelRidge(gamma=20, lam=0.3, alpha="validate", validation_fraction=0.25, random_state=5).fit(X, y)
    order = np.random.RandomState(5).permutation(40)
    part, held = order[10:], order[:10]
    chosen = SelfDistilledKernelRidge(gamma=20, lam=0.3, alpha="validate").fit(X[part], y[part], X[held], y[held])
    np.testing.assert_allclose(model.raw_alphas_, chosen.raw_alphas_, rtol=0, atol=1e-12)
    whole = SelfDistilledKernelRidge(gamma=20, lam=0.3, alpha=model.alphas_).fit(X, y)
    np.testing.assert_allclose(model.predict(GRID), whole.predict(GRID), rtol=0, atol=1e-12)
    again = clone(model).fit(X, y)
    np.testing.assert_array_equal(again.dual_coefs_, model.dual_coefs_)
    assert not np.array_equal(clone(model).set_params(random_state=6).fit(X, y).raw_alphas_, model.raw_alphas_)


# ---- what is refused


@pytest.mark.parametrize(
    "args, error, match",
    [
        ({"lam": 0.0}, ValueError, "lam must be > 0"),
        ({"lam": -1.0}, ValueError, "lam must be > 0"),
        ({"lam": math.nan}, ValueError, "lam must be > 0"),
        ({"lam": math.inf}, ValueError, "lam must be > 0 and < inf"),
        ({"lam": "1"}, TypeError, "lam must be a real number"),
        ({"alpha": -0.1}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"alpha": 1.1}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"alpha": [0.1, 0.2, 1.2]}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"alpha": math.nan, "allow_outside": True}, ValueError, "alpha must be"),
        ({"alpha": [0.1, 0.2]}, ValueError, "one value for each of the 3 steps, got 2"),
        ({"alpha": "best"}, ValueError, "unknown alpha 'best'"),
        ({"alpha": None}, TypeError, "alpha must be a number or a sequence"),
        ({"alpha": "validate", "steps": math.inf}, ValueError, "steps='limit' needs one alpha"),
        ({"alpha": [0.1], "steps": "limit"}, ValueError, "steps='limit' needs one alpha"),
        ({"alpha": 1.5, "steps": math.inf, "allow_outside": True}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
        ({"steps": 2.5}, ValueError, "steps must be an integer >= 1"),
        ({"steps": True}, ValueError, "steps must be an integer >= 1"),
        ({"steps": "all"}, ValueError, "steps must be an integer >= 1, math.inf or 'limit'"),
        ({"kernel": "rfb"}, ValueError, "unknown kernel 'rfb': did you mean 'rbf'"),
        ({"kernel": "precomputed"}, ValueError, "Precomputed"),
        ({"alpha": "validate", "validation_fraction": 0.0}, ValueError, "validation_fraction must be > 0"),
        ({"alpha": "validate", "validation_fraction": 1.0}, ValueError, "validation_fraction must be > 0 and < 1"),
        ({"alpha": "validate", "validation_fraction": 0.01}, ValueError, "validation data are empty"),
        ({"alpha": "validate", "validation_fraction": 0.999}, ValueError, "training data are empty"),
        ({"kernel": lambda a, b: -(a @ b)}, ValueError, "not positive definite"),
    ],
)
def test_arguments_that_are_refused(args, error, match):
    X, y = noisy_sine()
    model = SelfDistilledKernelRidge(**args)  # nothing is checked before fit
    with pytest.raises(error, match=match):
        model.fit(X + 10, y)
    assert not hasattr(model, "dual_coefs_")


def test_validation_data_that_are_refused():
    X, y = noisy_sine()
    model = SelfDistilledKernelRidge(alpha="validate")
    for X_val, y_val, match in [
        (X, None, "X_val and y_val together"),
        (None, y, "X_val and y_val together"),
        (X[:0], y[:0], "validation data are empty"),
        (X[:3], y[:2], "same shape"),
        (np.ones((3, 2)), y[:3], "2 features"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.fit(X, y, X_val, y_val)


def test_steps_that_are_not_there():
    X, y = noisy_sine()
    model = SelfDistilledKernelRidge()
    with pytest.raises(NotFittedError):
        model.predict(X)
    model.fit(X, y)
    for step in (0, 4, -1, 1.0, math.inf, "limit"):
        with pytest.raises(ValueError, match="step must be"):
            model.predict(X, step)
    limit = SelfDistilledKernelRidge(steps=math.inf).fit(X, y)
    with pytest.raises(ValueError, match="step must be None or 'limit'"):
        limit.predict(X, 1)
    model.set_params(steps=math.inf)  # does not change what was fitted
    assert model.predict(X, 3).shape == (30,)


@pytest.mark.parametrize(
    "args, match",
    [
        (([1.0], 0.0, 0.5, 3), "lam must be > 0"),
        (([1.0], 1.0, [0.5], 3), "one value for each of the 3 steps"),
        (([1.0], 1.0, 0.5, 0), "steps must be an integer >= 1"),
        (([1.0], 1.0, 2.0, math.inf), "alpha must be >= 0 and <= 1"),
    ],
)
def test_shrinkage_refuses(args, match):
    with pytest.raises(ValueError, match=match):
        distillation_shrinkage(*args)


def test_the_best_alpha_of_half_precision_predictions():
    generator = torch.Generator().manual_seed(0)
    p1, p0, y = (40 * torch.rand(300, 100, generator=generator) for _ in range(3))
    half = optimal_alpha(p1.half(), p0.half(), y.half())
    assert half.dtype == torch.float16
    assert float(half) == pytest.approx(float(optimal_alpha(p1, p0, y)), abs=1e-2)

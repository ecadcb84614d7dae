from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import nnls
from scipy.special import expit, log_expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.multiclass import OneVsRestClassifier

from weightroom.estimators import NormalizedLogisticGD
from weightroom.estimators.normalized_lrgd import step_weights
from weightroom.optim import NormalizedLRGD

Floats = NDArray[np.float64]

METHODS = {
    "normalized": {"normalize": True},
    "lr+gd": {"normalize": False},
    "batch": {"normalize": False, "limit": "batch"},
    "normalized batch": {"normalize": True, "limit": "batch"},
    "online": {"limit": "online"},
}
methods = pytest.mark.parametrize("how", METHODS.values(), ids=METHODS)


def fit(X, y, gamma: float = 10.0, *, fit_intercept: bool = False, **given) -> NormalizedLogisticGD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return NormalizedLogisticGD(gamma, fit_intercept=fit_intercept, **given).fit(X, y)


def theta(X, y, t: int, gamma: float = 10.0, **given) -> Floats:
    """The iterate after t steps."""
    model = fit(X, y, gamma, max_iter=t, **given)
    assert model.n_iter_ == t
    return model.coef_[0]


def worst_case(n: int) -> tuple[Floats, Floats]:
    X, y = np.tile([-0.5, -1.0], (n, 1)), -np.ones(n)
    X[0, 0], y[0] = 0.5, 1.0
    return X, y


def separable(seed: int, n: int = 40, d: int = 5, gap: float = 0.2, share: float = 0.5) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    w, X, y = rng.standard_normal(d), rng.standard_normal((n, d)), np.where(rng.random(n) < share, 1.0, -1.0)
    y[:2] = 1.0, -1.0
    w /= np.linalg.norm(w)
    return X + np.outer(y * (gap + np.abs(rng.standard_normal(n))) - X @ w, w), y


def by_hand(Z: Floats, gamma: float, *, normalize: bool = True, limit: str = "none", steps: int) -> list[Floats]:
    """The five methods as the paper writes them, on the rows z_i."""
    thetas = [np.zeros(Z.shape[1])]
    for t in range(steps):
        m = Z @ thetas[-1]
        s, S = expit(-m), m <= 0
        if limit == "online":
            step = Z[np.flatnonzero(S)[0]]
        elif limit == "batch" and normalize:
            step = Z[S].mean(0)
        elif limit == "batch":
            step = Z.sum(0) / (2 * len(Z)) if t == 0 else Z[S].sum(0) / len(Z)
        else:
            step = gamma * (s @ Z) / len(Z) / (s.mean() if normalize else 1.0)
        thetas.append(thetas[-1] + step)
    return thetas


def margin(Z: Floats) -> float:
    """mu = max over |theta| = 1 of min z_i theta, exactly: the least v with Zv >= 1 has length 1 / mu (Lawson and Hanson's LDP)."""
    E, f = np.vstack([Z.T, np.ones(len(Z))]), np.append(np.zeros(Z.shape[1]), 1.0)
    r = E @ nnls(E, f)[0] - f
    v = -r[:-1] / r[-1]
    assert (Z @ v).min() == pytest.approx(1.0, abs=1e-8)
    return float(1 / np.linalg.norm(v))


# ---- the paper's numbers ----


@pytest.mark.parametrize(
    "gamma, normalize, iterations", [(100, True, 2), (10, True, 2), (1, True, 16), (0.1, True, 157), (100, False, 308)]
)
def test_worst_case_row_of_table_1(gamma, normalize, iterations):
    model = fit(*worst_case(1000), gamma, normalize=normalize)
    assert (model.n_iter_, model.separated_) == (iterations, True)


@pytest.mark.parametrize("n, iterations", [(100, 31), (5000, 1540)])
def test_lr_gd_on_the_worst_case_needs_iterations_in_proportion_to_n(n, iterations):
    assert fit(*worst_case(n), 100.0, normalize=False).n_iter_ == iterations


def test_example_of_theorem_4_1():
    X, y = np.array([[1.0, -1.0], [-1.0, -4.0]]), np.array([1, -1])
    for gamma in (0.1, 1.0, 1e3):
        assert theta(X, y, 1, gamma, normalize=False) == pytest.approx([gamma * 0.5, gamma * 0.75], rel=1e-12)
    model = fit(X, y, 1e3, normalize=False, record=True)
    assert model.coef_[0] / 1e3 == pytest.approx([1.0, 0.25], abs=1e-6)
    assert (model.n_iter_, model.separated_) == (2, True)
    assert model.history_["loss"][1] > 100


# ---- the five methods ----


@methods
def test_iterates_are_those_of_the_paper(how):
    X, y = separable(0, gap=0.02)
    total = fit(X, y, 3.0, **how).n_iter_
    assert total > 3
    for t, expected in enumerate(by_hand(y[:, None] * X, 3.0, steps=total, **how)[1:], start=1):
        assert theta(X, y, t, 3.0, **how) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert (y * (X @ expected)).min() > 0


@methods
def test_iterates_are_those_of_the_optimizer(how):
    X, y = separable(1, n=60, d=3, gap=0.05, share=0.05)
    gamma = 7.0 if "limit" not in how else 1.0
    layer = torch.nn.Linear(3, 1, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = NormalizedLRGD(layer.parameters(), lr=gamma, **how)
    a, signs = torch.from_numpy(X), torch.from_numpy(y)
    total = fit(X, y, gamma, fit_intercept=True, **how).n_iter_
    assert total > 3
    for t in range(1, total + 1):
        loss = optimizer.step(lambda: signs * layer(a).squeeze(1))
        ours = fit(X, y, gamma, fit_intercept=True, max_iter=t, record=True, **how)
        assert layer.weight.detach().numpy() == pytest.approx(ours.coef_, rel=1e-9, abs=1e-12)
        assert layer.bias.detach().numpy() == pytest.approx(ours.intercept_, rel=1e-9, abs=1e-12)
        assert loss.item() == pytest.approx(ours.history_["loss"][t - 1], rel=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_large_steps_tend_to_the_batch_perceptrons(seed, normalize):
    X, y = separable(seed, n=200, d=10, gap=0.01)
    limit = by_hand(y[:, None] * X, 1.0, normalize=normalize, limit="batch", steps=20)
    for t in range(1, 21):
        if fit(X, y, normalize=normalize, limit="batch", max_iter=t).n_iter_ < t:
            assert t > 3
            break
        assert theta(X, y, t, 1e8, normalize=normalize) / 1e8 == pytest.approx(limit[t], rel=1e-6)


@given(seed=st.integers(0, 10**6), gamma=st.floats(1e-2, 1e3))
@settings(max_examples=30, deadline=None)
def test_a_normalized_step_is_a_convex_combination_of_rows(seed, gamma):
    X, y = separable(seed, gap=0.02)
    R, before = np.linalg.norm(X, axis=1).max(), np.zeros(X.shape[1])
    assert theta(X, y, 1, gamma) == pytest.approx(gamma * (y[:, None] * X).mean(0), rel=1e-10)
    for t in range(1, min(6, fit(X, y, gamma).n_iter_)):
        now = theta(X, y, t, gamma)
        assert np.linalg.norm(now - before) <= gamma * R * (1 + 1e-9)
        before = now


@pytest.mark.parametrize("name", ["normalized", "lr+gd", "batch", "normalized batch"])
def test_repeating_every_row_changes_nothing(name):
    X, y = separable(2, gap=0.02)
    one, four = (fit(np.repeat(X, k, 0), np.repeat(y, k), **METHODS[name]) for k in (1, 4))
    assert four.n_iter_ == one.n_iter_ > 1
    assert four.coef_ == pytest.approx(one.coef_, rel=1e-9)


@given(seed=st.integers(0, 10**6), c=st.sampled_from([0.125, 0.5, 4.0]), normalize=st.booleans())
@settings(max_examples=30, deadline=None)
def test_scaling_the_data_and_the_step_leaves_every_margin(seed, c, normalize):
    X, y = separable(seed)
    one, scaled = fit(X, y, 2.0, normalize=normalize), fit(c * X, y, 2.0 / c**2, normalize=normalize)
    assert scaled.n_iter_ == one.n_iter_
    assert scaled.coef_ == pytest.approx(one.coef_ / c, rel=1e-9)


def test_iterations_keep_to_the_bounds():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(5, 80)), int(rng.integers(2, 8))
        X, y = separable(seed, n, d, gap=float(rng.uniform(0.01, 0.5)))
        Z = y[:, None] * X
        mu, R = margin(Z), float(np.linalg.norm(Z, axis=1).max())
        gamma = float(10 ** rng.uniform(-1, 2))
        bounds = {
            "normalized": R**2 / mu**2 + 2 * math.log(2 * n - 1) / (gamma * mu**2),  # Theorem 6.1
            "normalized batch": R**2 / mu**2,
            "online": R**2 / mu**2,
            "batch": n * R**2 / mu**2,
        }
        for name, bound in bounds.items():
            model = fit(X, y, gamma, max_iter=100_000, **METHODS[name])
            assert model.separated_
            assert model.n_iter_ <= bound + 1e-6


# ---- the weights of a step ----


@pytest.mark.parametrize("scale", [1.0, 700.0, 1e6])
@pytest.mark.parametrize("side", [1.0, -1.0, 0.0])
def test_weights_stay_finite_and_sum_to_one(scale, side):
    m = np.random.default_rng(0).standard_normal(50)
    m = scale * (side * np.abs(m) if side else m)
    with np.errstate(over="ignore", under="ignore"):
        p = step_weights(m, m.min(), True, "none")
        s = step_weights(m, m.min(), False, "none")
    assert p == pytest.approx(softmax(log_expit(-m)), rel=1e-9, abs=1e-300)
    assert p.sum() == pytest.approx(1.0)
    assert s == pytest.approx(expit(-m) / 50, rel=1e-9, abs=1e-300)


def test_zero_margins_count_as_wrong():
    m = np.array([1.0, 0.0, -2.0, 0.5])
    assert step_weights(m, -2.0, True, "batch").tolist() == [0, 0.5, 0.5, 0]
    assert step_weights(m, -2.0, False, "batch").tolist() == [0, 0.25, 0.25, 0]
    assert step_weights(m, -2.0, False, "batch", first=True).tolist() == [0, 0.125, 0.125, 0]
    assert step_weights(m, -2.0, True, "batch", first=True).tolist() == [0, 0.5, 0.5, 0]
    assert step_weights(m, -2.0, True, "online").tolist() == [0, 1, 0, 0]
    assert step_weights(m, -2.0, True, "online", tol=1.0).tolist() == [1, 0, 0, 0]


# ---- the estimator ----


def test_an_intercept_is_a_feature_that_is_always_one():
    X, y = separable(3, gap=0.05)
    X = X + 0.3
    ours = fit(X, y, fit_intercept=True)
    theirs = fit(np.column_stack([X, np.ones(len(X))]), y)
    assert ours.n_iter_ == theirs.n_iter_
    assert np.append(ours.coef_, ours.intercept_) == pytest.approx(theirs.coef_[0], rel=1e-12)
    assert fit(X, y).intercept_.tolist() == [0.0]


@methods
def test_sparse_rows_fit_alike(how):
    X, y = separable(4)
    X[np.abs(X) < 0.3] = 0.0
    for intercept in (False, True):
        dense, csr = (fit(form(X), y, fit_intercept=intercept, max_iter=200, **how) for form in (np.asarray, sparse.csr_array))
        assert csr.coef_ == pytest.approx(dense.coef_, rel=1e-9)
        assert csr.intercept_ == pytest.approx(dense.intercept_, rel=1e-9, abs=1e-12)
        assert (csr.predict(sparse.csr_array(X)) == dense.predict(X)).all()


def test_history_is_recorded_on_request_alone():
    X, y = separable(5, gap=0.02)
    model = NormalizedLogisticGD(record=True, fit_intercept=False).fit(X, y)
    assert {key: len(values) for key, values in model.history_.items()} == dict.fromkeys(
        ("loss", "misclassified", "min_margin"), model.n_iter_ + 1
    )
    assert (model.history_["misclassified"][0], model.history_["misclassified"][-1]) == (len(y), 0)
    assert model.history_["loss"][0] == pytest.approx(math.log(2))
    margins = y * (X @ model.coef_[0])
    assert model.history_["min_margin"][-1] == pytest.approx(margins.min())
    assert model.history_["loss"][-1] == pytest.approx(np.logaddexp(0, -margins).mean())
    assert (model.history_["misclassified"][:-1] > 0).all()
    assert not hasattr(model.set_params(record=False).fit(X, y), "history_")


def test_margins_may_have_to_be_larger_than_zero():
    X, y = separable(6)
    for how in METHODS.values():
        model = fit(X, y, tol_margin=2.0, max_iter=100_000, **how)
        assert model.separated_
        assert (y * (X @ model.coef_[0])).min() > 2.0
    assert fit(X, y, 1.0, tol_margin=1000.0, max_iter=5).n_iter_ == 5  # far beyond where sigma underflows: no 0/0


@methods
def test_a_warm_start_goes_on_where_the_last_fit_ended(how):
    X, y = separable(7, gap=0.01)
    total = fit(X, y, fit_intercept=True, **how).n_iter_
    assert total > 3
    straight = fit(X, y, fit_intercept=True, **how)
    model = fit(X, y, fit_intercept=True, max_iter=2, warm_start=True, **how)
    model.set_params(max_iter=10_000).fit(X, y)
    assert model.n_iter_ == total - 2
    assert model.coef_ == pytest.approx(straight.coef_, rel=1e-12)
    assert model.intercept_ == pytest.approx(straight.intercept_, rel=1e-12)
    assert model.fit(X, y).n_iter_ == 0  # nothing left to do
    with pytest.raises(ValueError, match="warm_start needs the features and labels of the last fit"):
        model.fit(X, y + 5)
    model = fit(X, y, warm_start=True)
    model.n_features_in_ = 3
    with pytest.raises(ValueError, match=r"5 and .*got 3"):
        model.fit(X[:, :3], y)


def test_without_warm_start_nothing_is_kept():
    X, y = separable(7)
    model = fit(X, y)
    assert model.fit(X, y).n_iter_ == fit(X, y).n_iter_ > 0


def test_not_separated_is_said_with_the_number_of_rows():
    X, y = np.array([[1.0], [2.0], [-1.0], [-2.0]]), np.array([1, 0, 0, 1])
    model = NormalizedLogisticGD(max_iter=50)
    with pytest.warns(ConvergenceWarning, match=r"max_iter=50 iterations: \d of 4 rows are still misclassified") as caught:
        model.fit(X, y)
    assert caught[0].filename == __file__
    wrong = (np.where(y == 1, 1, -1) * model.decision_function(X) <= 0).sum()
    assert f" {wrong} of 4" in str(caught[0].message)
    assert (model.n_iter_, model.separated_) == (50, False)


def test_a_separating_fit_is_silent_and_labels_may_be_anything():
    X, y = separable(8)
    labels = np.where(y > 0, "yes", "no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = NormalizedLogisticGD().fit(X, labels)
    assert model.classes_.tolist() == ["no", "yes"]
    assert (model.predict(X) == labels).all()
    assert ((model.decision_function(X) > 0) == (y > 0)).all()
    assert model.coef_.shape == (1, 5)
    assert model.intercept_.shape == (1,)


def test_scores_are_no_probabilities():
    assert not hasattr(NormalizedLogisticGD(), "predict_proba")


def test_more_classes_go_through_one_vs_rest():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 20)
    X = 5 * np.eye(3)[y] + 0.3 * rng.standard_normal((60, 3))
    assert (OneVsRestClassifier(NormalizedLogisticGD()).fit(X, y).predict(X) == y).all()
    with pytest.raises(ValueError, match="OneVsRestClassifier"):
        NormalizedLogisticGD().fit(X, y)


def test_the_scale_of_the_features_is_left_alone():
    X, y = separable(9, gap=0.05)
    skewed = X * np.array([100.0, 1, 1, 1, 1])
    assert theta(skewed, y, 1) == pytest.approx(10 * (y[:, None] * skewed).mean(0))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"gamma": 0.0}, ValueError, "gamma must be > 0"),
        ({"gamma": -1.0}, ValueError, "gamma must be > 0"),
        ({"gamma": math.nan}, ValueError, "gamma must be > 0"),
        ({"gamma": math.inf}, ValueError, "gamma must be > 0"),
        ({"gamma": "10"}, TypeError, "gamma must be a real number"),
        ({"max_iter": 0}, ValueError, "max_iter must be >= 1"),
        ({"max_iter": 2.5}, ValueError, "max_iter must be an integer"),
        ({"tol_margin": -0.1}, ValueError, "tol_margin must be >= 0"),
        ({"limit": "offline"}, ValueError, "unknown limit 'offline': did you mean 'online'"),
        ({"limit": None}, ValueError, "unknown limit 'None'"),
    ],
)
def test_arguments_out_of_range_are_named(change, error, match):
    X, y = separable(0)
    with pytest.raises(error, match=match):
        NormalizedLogisticGD(**change).fit(X, y)


@pytest.mark.parametrize(
    "X, y, match",
    [
        ([[0.0], [math.nan]], [0, 1], "Input X contains NaN"),
        ([[0.0], [math.inf]], [0, 1], "Input X contains infinity"),
        ([[0.0], [1.0]], [1, 1], "y must have labels of two kinds, got one class, 1"),
        ([[0.0], [1.0], [2.0]], [0, 1, 2], "Only binary classification .* y has 3 classes"),
        ([[0.0], [1.0]], [0.5, 1.5], "Unknown label type"),
        ([[0.0], [1.0]], [0, math.nan], "Input y contains NaN"),
        ([[0.0], [1.0]], [0], "inconsistent numbers of samples"),
    ],
)
def test_data_that_are_refused(X, y, match):
    with pytest.raises(ValueError, match=match):
        NormalizedLogisticGD().fit(X, y)

"""What every estimator of the room keeps: scikit-learn's conventions, and lifelines' where it is about survival."""

from __future__ import annotations

import inspect
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from weightroom import estimators


@dataclass(frozen=True)
class Member:
    """One estimator of the room.

    Args:
        make: makes it unfitted; the same data give the same fit every time.
        kind: decides what it is fitted to and which tests it gets.
        change: parameters that may be set, each to a value that differs from its own.
        exact: "survival" only: given the distinct times, makes the estimator that equals the Kaplan-Meier curve at these times.
    """

    make: Callable[[], Any]
    kind: Literal["survival", "classifier", "regressor"]
    change: Mapping[str, Any] = field(default_factory=dict)
    exact: Callable[[np.ndarray], Any] | None = None


def _dp(**given: Any) -> Callable[[], Any]:
    return lambda: estimators.DPKaplanMeier(epsilon=1.0, random_state=0, **{"horizon": 20.0, **given})


MEMBERS = {
    "DPKaplanMeier": Member(
        _dp(),
        "survival",
        {"epsilon": 2.0, "tie": "end", "edges": [0.0, 1.0, 20.0]},
        lambda times: estimators.DPKaplanMeier(math.inf, edges=[0.0, *times], tie="end"),
    ),
    "DPKaplanMeier, curve": Member(
        _dp(mechanism="curve"),
        "survival",
        {"bins": 3},
        lambda times: estimators.DPKaplanMeier(math.inf, edges=[0.0, *times], mechanism="curve"),
    ),
    "DPKaplanMeier, truncated": Member(
        _dp(mechanism="curve", min_at_risk=5, candidate_times=[10.0], delta=0.1), "survival", {"delta": 0.2}
    ),
    "DPKaplanMeier, index-scaled": Member(_dp(mechanism="index_scaled"), "survival", {"noise": "laplace"}),
    "DPKaplanMeier, gaussian": Member(_dp(noise="gaussian", delta=1e-5), "survival", {"neighbors": "replace"}),
    "NormalizedLogisticGD": Member(
        lambda: estimators.NormalizedLogisticGD(max_iter=200),
        "classifier",
        {"gamma": 2.0, "normalize": False, "limit": "batch", "fit_intercept": False, "max_iter": 7, "tol_margin": 0.5},
    ),
    "NormalizedLogisticGD, perceptron": Member(
        lambda: estimators.NormalizedLogisticGD(limit="online", max_iter=200), "classifier", {"warm_start": True}
    ),
}
SURVIVAL = [name for name, member in MEMBERS.items() if member.kind == "survival"]
PREDICTORS = [name for name, member in MEMBERS.items() if member.kind != "survival"]
every = pytest.mark.parametrize("name", MEMBERS)
survival = pytest.mark.parametrize("name", SURVIVAL)


def survival_data(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(1, 30, n).astype(float), rng.integers(0, 2, n)


def data(member: Member) -> tuple[np.ndarray, np.ndarray]:
    if member.kind == "survival":
        return survival_data()
    rng = np.random.default_rng(1)
    X = rng.normal(size=(60, 3))
    return X, (X[:, 0] > 0).astype(int) if member.kind == "classifier" else X[:, 0]


def fit(estimator: Any, *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimator.fit(*given)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    return np.array_equal(a, b, equal_nan=True) if isinstance(a, (np.ndarray, float)) else a == b


def fitted_attributes(estimator: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(estimator).items() if k.endswith("_") and not k.startswith("_")}


def test_every_public_estimator_has_a_row():
    public = {
        name
        for name in estimators.__all__
        if inspect.isclass(getattr(estimators, name)) and hasattr(getattr(estimators, name), "fit")
    }
    assert public == {type(member.make()).__name__ for member in MEMBERS.values()}


@every
def test_the_constructor_stores_its_arguments_untouched_and_nothing_else(name):
    estimator = MEMBERS[name].make()
    signature = inspect.signature(type(estimator).__init__).parameters
    assert set(vars(estimator)) == set(signature) - {"self"}
    marker = object()  # nothing is checked or converted before fit
    made = type(estimator)(**{key: marker for key in signature if key != "self"})
    assert all(value is marker for value in vars(made).values())


@every
def test_parameters_go_in_and_out(name):
    member = MEMBERS[name]
    estimator = member.make()
    assert isinstance(estimator, BaseEstimator)
    for key, value in member.change.items():
        assert estimator.get_params()[key] != value
        assert estimator.set_params(**{key: value}) is estimator
        assert estimator.get_params()[key] == value
    copy = clone(estimator)
    assert copy is not estimator
    assert copy.get_params() == estimator.get_params()
    with pytest.raises(ValueError, match="no_such_parameter"):
        estimator.set_params(no_such_parameter=1)


@every
def test_set_parameters_decide_the_next_fit(name):
    member = MEMBERS[name]
    for key, value in member.change.items():
        estimator = member.make().set_params(**{key: value})
        made = type(estimator)(**estimator.get_params())
        assert same_fit(fit(estimator, *data(member)), fit(made, *data(member)))


def same_fit(a: Any, b: Any) -> bool:
    a, b = fitted_attributes(a), fitted_attributes(b)
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


@every
def test_repr_names_class_and_changed_parameters(name):
    member = MEMBERS[name]
    for key, value in member.change.items():
        text = repr(member.make().set_params(**{key: value}))
        assert text.startswith(type(member.make()).__name__)
        assert f"{key}={value!r}" in text.replace("\n", "").replace(" " * 14, " ").replace("  ", "")


@every
def test_fit_returns_self_and_leaves_the_parameters(name):
    member = MEMBERS[name]
    estimator = member.make()
    before = dict(estimator.get_params())
    assert fit(estimator, *data(member)) is estimator
    assert estimator.get_params() == before
    assert fitted_attributes(estimator)


@every
def test_nothing_is_fitted_before_fit(name):
    estimator = MEMBERS[name].make()
    assert not fitted_attributes(estimator)
    public = [key for key in dir(type(estimator)) if key.endswith("_") and not key.startswith("_")]
    assert not [key for key in public if hasattr(estimator, key)]
    with pytest.raises(NotFittedError):
        estimator.predict(data(MEMBERS[name])[0])


@every
def test_pickle_round_trip_before_and_after_fit(name):
    member = MEMBERS[name]
    estimator = member.make()
    assert pickle.loads(pickle.dumps(estimator)).get_params() == estimator.get_params()
    back = pickle.loads(pickle.dumps(fit(estimator, *data(member))))
    assert same_fit(back, estimator)
    assert np.array_equal(back.predict(data(member)[0]), estimator.predict(data(member)[0]))


@every
def test_a_clone_of_a_fitted_estimator_is_not_fitted(name):
    member = MEMBERS[name]
    assert not fitted_attributes(clone(fit(member.make(), *data(member))))


@every
def test_the_data_are_left_as_they_are(name):
    member = MEMBERS[name]
    given = data(member)
    before = [x.copy() for x in given]
    fit(member.make(), *given)
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))


@survival
@pytest.mark.parametrize(
    "form",
    [list, tuple, np.asarray, lambda x: pd.Series(x, index=np.arange(len(x))[::-1] + 7), lambda x: np.asarray(x, dtype="f4")],
)
def test_survival_inputs_in_every_form_fit_the_same(name, form):
    t, e = survival_data()
    reference = fit(MEMBERS[name].make(), t, e)
    assert same_fit(fit(MEMBERS[name].make(), form(t), form(e)), reference)
    assert same_fit(fit(MEMBERS[name].make(), form(t), e.astype(bool)), reference)


@survival
def test_survival_events_default_to_all_observed(name):
    t, _ = survival_data()
    assert same_fit(fit(MEMBERS[name].make(), t), fit(MEMBERS[name].make(), t, np.ones(len(t))))


@survival
@pytest.mark.parametrize(
    "durations, events, match",
    [
        ([1.0, 2.0], [1], "same length, got 2 and 1"),
        ([], [], "empty"),
        ([1.0, math.nan], [1, 0], "durations must be finite and >= 0"),
        ([1.0, math.inf], [1, 0], "durations must be finite and >= 0"),
        ([1.0, -1.0], [1, 0], "durations must be finite and >= 0"),
        ([1.0, 2.0], [1, 2], "event_observed must be 1"),
        ([1.0, 2.0], [1, math.nan], "event_observed must be 1"),
        ([[1.0], [2.0]], [1, 0], r"durations must have one dimension, got shape \(2, 1\)"),
        ([1.0, 2.0], [[1], [0]], r"event_observed must have one dimension, got shape \(2, 1\)"),
        (3.0, 1, "durations must have one dimension"),
    ],
)
def test_survival_inputs_that_are_refused(name, durations, events, match):
    estimator = MEMBERS[name].make()
    with pytest.raises(ValueError, match=match):
        fit(estimator, durations, events)
    assert not fitted_attributes(estimator)


@survival
def test_survival_function_is_a_curve(name):
    km = fit(MEMBERS[name].make(), *survival_data())
    frame = km.survival_function_
    assert isinstance(frame, pd.DataFrame)
    assert frame.shape == (len(km.timeline), 1)
    assert frame.index.name == "timeline"
    assert np.array_equal(frame.index, km.timeline)
    S = frame.iloc[:, 0].to_numpy()
    assert km.timeline[0] == 0.0
    assert S[0] == 1.0
    assert ((S >= 0) & (S <= 1)).all()
    assert (np.diff(S) <= 0).all()


@survival
def test_predict_is_a_right_continuous_step_function(name):
    km = fit(MEMBERS[name].make(), *survival_data())
    S = km.survival_function_.iloc[:, 0].to_numpy()
    assert np.array_equal(km.predict(km.timeline), S)
    assert np.array_equal(km.predict(km.timeline[1:] - 1e-9), S[:-1])
    assert np.array_equal(km.predict(km.timeline + 1e-9), S)
    value = km.predict(km.timeline[-1])
    assert isinstance(value, float)
    assert value == S[-1]


@pytest.mark.parametrize("name", [name for name in SURVIVAL if MEMBERS[name].exact is not None])
def test_conventions_are_those_of_lifelines(name):
    peer = pytest.importorskip("lifelines").KaplanMeierFitter()
    t, e = survival_data()
    peer.fit(t, e)
    ours = fit(MEMBERS[name].exact(np.unique(t)), t, e)
    assert np.allclose(ours.timeline, peer.timeline, rtol=0, atol=0)
    assert ours.survival_function_.index.name == peer.survival_function_.index.name
    assert np.allclose(ours.survival_function_, peer.survival_function_, rtol=0, atol=1e-12)
    assert ours.median_survival_time_ == peer.median_survival_time_
    times = [25.5, 0.0, 3.0, 3.2, 1e6, -1.0]  # unsorted, between, beyond, before
    pd.testing.assert_series_equal(ours.predict(times), peer.predict(times), check_names=False)
    assert ours.predict(3.2) == pytest.approx(peer.predict(3.2), abs=1e-12)
    assert isinstance(ours.predict(3.2), type(float(peer.predict(3.2))))
    never = fit(MEMBERS[name].exact(np.unique(t)), t, np.zeros(len(t)))
    assert never.median_survival_time_ == type(peer)().fit(t, np.zeros(len(t))).median_survival_time_ == math.inf


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_pass_scikit_learns_own_checks(name):
    from sklearn.utils.estimator_checks import check_estimator

    check_estimator(MEMBERS[name].make())

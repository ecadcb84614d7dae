from __future__ import annotations

import itertools
import math
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightroom.estimators import DPKaplanMeier, audit_epsilon
from weightroom.estimators.dp_kaplan_meier import (
    _Coins,
    _count,
    _greenwood,
    _kaplan_meier,
    _life_table,
    _Noise,
    _rho,
    _survival,
    _Test,
    _units,
)

ONE = _Coins.ONE


def cohort(n=228, seed=0):
    rng = np.random.default_rng(seed)
    t, c = rng.weibull(1.3, n) * 400, rng.uniform(0, 1200, n)
    return np.minimum(t, c), t <= c


def fit(km, *data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return km.fit(*data)


def coins(seed=0):
    return _Coins(np.random.default_rng(seed).bytes)


records = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40).map(
    lambda rows: (np.array([t for t, _ in rows], dtype=float), np.array([e for _, e in rows]))
)

# The estimate without noise --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(records)
def test_one_bin_per_time_and_no_noise_is_the_kaplan_meier_curve(data):
    lifelines = pytest.importorskip("lifelines")
    t, e = data
    peer = lifelines.KaplanMeierFitter().fit(t, e)
    times = np.unique(t[t > 0])
    if not times.size:
        times = np.array([1.0])
    for mechanism in ("histogram", "curve") if t.min() > 0 else ("curve",):  # a time of 0 has no bin of its own
        km = fit(DPKaplanMeier(math.inf, edges=[0, *times], tie="end", mechanism=mechanism), t, e)
        assert np.allclose(km.predict(times), peer.predict(times), rtol=0, atol=1e-12)


def test_life_table_by_hand():
    # bins (0,2] (2,4]; t = 0 goes to the first, 4 to the second, 5 beyond.
    t, e = np.array([0.0, 1, 2, 2.5, 4, 4, 5]), np.array([1, 0, 1, 1, 1, 0, 1], dtype=bool)
    cells = _count(t, e, np.array([0.0, 2, 4]))
    assert cells.tolist() == [2, 2, 1, 1, 1]
    assert _life_table(cells)[2].tolist() == [7, 4]
    assert np.allclose(_survival(cells, "end"), [5 / 7, 5 / 7 * 2 / 4])
    assert np.allclose(_survival(cells, "actuarial"), [1 - 2 / 6.5, (1 - 2 / 6.5) * (1 - 2 / 3.5)])
    km = fit(DPKaplanMeier(math.inf, horizon=4, bins=2), t, e)
    assert list(km.noisy_table_.columns) == ["events", "censored", "at_risk"]
    assert km.noisy_table_.to_numpy().tolist() == [[2, 1, 7], [2, 1, 4]]
    assert km.noisy_table_.index.tolist() == [2, 4]
    assert km.noisy_overflow_ == 1
    assert km.timeline.tolist() == [0, 2, 4]
    assert math.isnan(km.predict(math.nan))
    assert fit(DPKaplanMeier(math.inf, edges=[0, 1, 2], tie="end"), [1, 2]).median_survival_time_ == 1  # S = 1/2 is enough


def test_no_at_risk_and_all_negative_cells_give_one_not_nan():
    for tie in ("actuarial", "end"):
        assert (_survival(np.full(21, -3.0), tie) == 1).all()
        assert (_survival(np.zeros(21), tie) == 1).all()
        assert _survival(np.array([3.0, 1.0, 0.0, 0.0, 0.0]), tie).tolist() == [0.25, 0.0]
    assert _survival(np.array([3.0, 4.0, 0.0]), "actuarial").tolist() == [1 - 3 / 5]
    assert _survival(np.array([-1.0, 4.0, 0.0]), "actuarial").tolist() == [1.0]


def test_all_negative_release_through_fit(monkeypatch):
    monkeypatch.setattr(_Noise, "add", lambda self, values, coins: values * 0 - 7)
    km = fit(DPKaplanMeier(1.0, 900), *cohort())
    assert (km.survival_function_ == 1).all(axis=None)
    assert (km.noisy_table_["events"] == -7).all()
    assert (km.noisy_table_["at_risk"] == 0).all()
    assert np.isfinite(km.confidence_interval_).all(axis=None)
    assert km.median_survival_time_ == math.inf


def test_kaplan_meier_with_ties_by_hand():
    t, e = np.array([1.0, 1, 2, 2, 3]), np.array([1, 0, 1, 1, 0], dtype=bool)
    assert np.allclose(_kaplan_meier(t, e, np.array([0.5, 1, 1.5, 2, 9])), [1, 4 / 5, 4 / 5, 4 / 5 * 1 / 3, 4 / 15])


@pytest.mark.parametrize("tie, by_binning", [("actuarial", 0.01), ("end", 0.03)])
def test_error_falls_to_that_of_the_binning(tie, by_binning):
    t, e = cohort()
    edges = np.linspace(0, 900, 11)[1:]
    true = _kaplan_meier(t, e, edges)

    def rmse(epsilon, copies=1):
        km = DPKaplanMeier(epsilon, 900, tie=tie, random_state=0)
        S = km._plan().release(np.tile(t, copies), np.tile(e, copies), 100, km._coins())[1]
        return math.sqrt(((S - true) ** 2).mean())

    floor = rmse(math.inf)
    assert floor < by_binning
    assert rmse(0.1) > rmse(1.0) > rmse(10.0) >= floor
    assert rmse(50.0) == pytest.approx(floor, abs=1e-9)
    assert rmse(1.0, copies=100) == pytest.approx(floor, abs=2e-4)


@settings(max_examples=30, deadline=None)
@given(records, st.sampled_from(["histogram", "curve", "index_scaled"]), st.integers(0, 2**32 - 1))
def test_order_of_the_records_changes_nothing(data, mechanism, seed):
    order = np.random.default_rng(seed).permutation(len(data[0]))
    make = lambda: DPKaplanMeier(1.0, 10, mechanism=mechanism, random_state=seed)  # noqa: E731
    a, b = fit(make(), *data), fit(make(), *(x[order] for x in data))
    assert a.survival_function_.equals(b.survival_function_)
    assert a.noisy_table_.equals(b.noisy_table_)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"noise": "laplace"},
        {"mechanism": "curve"},
        {"mechanism": "index_scaled"},
        {"noise": "gaussian", "delta": 1e-3, "epsilon": 0.1},
    ],
)
def test_thousand_noisy_curves_are_curves(given):
    km = DPKaplanMeier(**{"epsilon": 0.01, "horizon": 900, "random_state": 0, **given})
    S = km._plan().release(*cohort(40), 1000, km._coins())[1]
    assert S.shape == (1000, 10)
    assert not np.isnan(S).any()
    assert ((S >= 0) & (S <= 1)).all()
    assert (np.diff(S, axis=1) <= 0).all()
    assert len(np.unique(S, axis=0)) > 10


# Sensitivity -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(records, st.tuples(st.integers(0, 12), st.booleans()))
def test_one_record_changes_one_cell_and_a_replaced_one_at_most_two(data, record):
    (t, e), (u, f), edges = data, record, np.linspace(0, 10, 6)
    more = _count(np.append(t, u), np.append(e, f), edges) - _count(t, e, edges)
    assert sorted(more) == [0] * 10 + [1]
    swapped = _count(np.append(t[1:], u), np.append(e[1:], f), edges) - _count(t, e, edges)
    assert np.abs(swapped).sum() in (0, 2)
    # and so in the release, given the same noise
    a, b = (fit(DPKaplanMeier(1.0, 10, 5, random_state=3), *x) for x in ((t, e), (np.append(t, u), np.append(e, f))))
    cells = [np.append(km.noisy_table_[["events", "censored"]], km.noisy_overflow_) for km in (a, b)]
    assert sorted(cells[1] - cells[0]) == [0] * 10 + [1]


def exact_curve(rows: tuple[tuple[int, bool], ...], at: int) -> Fraction:
    S = Fraction(1)
    for u in range(1, at + 1):
        n, d = sum(t >= u for t, _ in rows), sum(t == u and e for t, e in rows)
        S *= 1 - Fraction(d, n) if n else 1
    return S


def test_local_sensitivity_is_one_over_one_plus_k_exactly():
    # All data sets of n <= 5 with ties and censoring, in rationals; only what happens by t = 3 matters.
    kinds = [(u, e) for u in (1, 2, 3) for e in (True, False)] + [(4, False)]
    at, worst = 3, {"add_remove": Counter(), "replace": Counter()}
    curves = {
        rows: (exact_curve(rows, at), sum(t > at for t, _ in rows))
        for n in range(7)
        for rows in itertools.combinations_with_replacement(kinds, n)
    }
    for base in (rows for rows in curves if len(rows) <= 5):
        grown = [curves[tuple(sorted([*base, kind], key=kinds.index))] for kind in kinds]
        pairs = {"add_remove": [(curves[base], g) for g in grown], "replace": itertools.combinations(grown, 2)}
        for unit, each in pairs.items():
            for (S, k), (S2, k2) in each:
                worst[unit][min(k, k2)] = max(worst[unit][min(k, k2)], abs(S - S2))
    for unit in worst:
        for k in range(5):
            assert worst[unit][k] == Fraction(1, 1 + k), (unit, k)  # never above, and attained


@settings(max_examples=100, deadline=None)
@given(records, st.tuples(st.integers(0, 12), st.booleans()), st.integers(0, 12))
def test_local_sensitivity_on_random_data(data, record, at):
    (t, e), (u, f) = data, record
    sets = [(t, e), (np.append(t, u), np.append(e, f)), (np.append(t[1:], u), np.append(e[1:], f))]
    S = [_kaplan_meier(*d, np.array([at]))[0] for d in sets if len(d[0])]
    beyond = [(d[0] > at).sum() for d in sets]
    for i in (1, 2):
        assert abs(S[0] - S[i]) <= 1 / (1 + min(beyond[0], beyond[i])) + 1e-12


def test_one_record_can_move_the_whole_curve_by_one():
    t, e = np.array([0.1] * 9 + [0.5]), np.zeros(10, dtype=bool)
    edges = np.linspace(0, 10, 11)[1:]
    last = e.copy()
    last[-1] = True
    assert (_kaplan_meier(t, e, edges) - _kaplan_meier(t, last, edges)).tolist() == [1.0] * 10


# Noise -----------------------------------------------------------------------------------------------------------------


def test_words_that_would_bias_are_drawn_again():
    script = iter([2**64 - 1, 5])  # 2^64 = 1 mod 3: the last word would make 0 more likely
    scripted = _Coins(lambda size: int(next(script)).to_bytes(size, "little"))
    assert scripted.below(3, 1).tolist() == [2]
    even = _Coins(lambda size: (2**64 - 1).to_bytes(size, "little"))
    assert even.below(2**40, 1).tolist() == [2**40 - 1]


def chi_square(observed: np.ndarray, probability: np.ndarray) -> float:
    """p-value; cells with few expected are pooled."""
    from scipy.stats import chisquare

    n, keep = observed.sum(), probability * observed.sum() >= 10
    return chisquare(
        np.append(observed[keep], n - observed[keep].sum()), np.append(probability[keep], 1 - probability[keep].sum()) * n
    ).pvalue


def test_exponential_coins_and_runs():
    for numerator, denominator in ((0, 7), (1, 3), (2**39, 2**40), (7, 7)):
        p = coins(1).exp(np.full(200_000, numerator, dtype=np.uint64), denominator).mean()
        assert p == pytest.approx(math.exp(-numerator / denominator), abs=0.005)
    v = np.bincount(coins(2).runs(100_000), minlength=60)
    assert chi_square(v, math.exp(-1) ** np.arange(len(v)) * (1 - math.exp(-1))) > 1e-3


@pytest.mark.parametrize("rate", [0.05, 0.7, 1.0, 4.0])
def test_discrete_laplace_has_its_distribution(rate):
    x = coins(3).laplace(np.full(100_000, int(rate * ONE)))
    k, q = np.arange(-400, 401), math.exp(-rate)
    assert chi_square(np.bincount(x + 400, minlength=801), (1 - q) / (1 + q) * q ** np.abs(k)) > 1e-3


def test_discrete_laplace_agrees_with_opendp():
    dp = pytest.importorskip("opendp.prelude")
    from scipy.stats import chi2_contingency

    dp.enable_features("contrib")
    peer = dp.m.make_laplace(dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l1_distance(T=dp.i64), scale=1 / 0.7)
    theirs = np.clip(peer([0] * 30_000), -12, 12) + 12
    ours = np.clip(coins(4).laplace(np.full(30_000, int(0.7 * ONE))), -12, 12) + 12
    table = np.stack([np.bincount(x, minlength=25) for x in (ours, theirs)])
    assert chi2_contingency(table[:, table.sum(0) > 10]).pvalue > 1e-6


@pytest.mark.parametrize("square", [0.05, 0.5, 1.0, 30.0, 1e4])
def test_discrete_gaussian_has_its_distribution(square):
    numerator, denominator = _Noise.gaussian(1.0, square).square
    assert square <= numerator / denominator <= square * 1.001 + 2e-6
    x = coins(5).gaussian(numerator, denominator, 60_000)
    k = np.arange(-2000, 2001)
    mass = np.exp(-(k**2) / (2 * square))
    assert chi_square(np.bincount(x + 2000, minlength=4001), mass / mass.sum()) > 1e-3


@pytest.mark.parametrize("neighbors, changed", [("add_remove", 1), ("replace", 2)])
@pytest.mark.parametrize("noise", ["discrete_laplace", "laplace", "gaussian"])
def test_variance_of_the_released_cells(noise, neighbors, changed):
    km = DPKaplanMeier(0.8, 900, 5, noise=noise, neighbors=neighbors, delta=1e-3, random_state=6)
    plan, (t, e) = km._plan(), cohort()
    noisy = plan.release(t, e, 20_000, km._coins())[0]
    q = math.exp(-0.8 / changed)
    expected = {
        "laplace": 2 * (changed / 0.8) ** 2,
        "discrete_laplace": 2 * q / (1 - q) ** 2,
        "gaussian": changed / (2 * (math.sqrt(math.log(1e3) + 0.8) - math.sqrt(math.log(1e3))) ** 2),
    }[noise]
    off = noisy - _count(t, e, plan.edges)
    assert off.var() == pytest.approx(expected, rel=0.02)
    assert off.var(axis=0) == pytest.approx(expected, rel=0.08)
    assert off.mean(axis=0) == pytest.approx(0, abs=5 * math.sqrt(expected / 20_000))
    assert np.abs(np.corrcoef(off.T) - np.eye(11)).max() < 0.05  # cells and runs are independent
    assert plan.noise.variance == pytest.approx(expected, rel=1e-3)
    assert (noise != "laplace") == (noisy == np.rint(noisy)).all()
    assert (noisy / plan.noise.step == np.rint(noisy / plan.noise.step)).all()  # no low bits to read


@pytest.mark.parametrize("noise", ["discrete_laplace", "laplace", "gaussian"])
def test_a_released_curve_lies_on_a_grid_far_finer_than_its_noise(noise):
    plan = DPKaplanMeier(2.0, 900, 5, mechanism="curve", noise=noise, delta=1e-3)._plan()
    noisy = plan.release(*cohort(), 50, coins(11))[0]
    assert plan.noise.step <= math.sqrt(plan.noise.variance) / 500
    assert (noisy / plan.noise.step == np.rint(noisy / plan.noise.step)).all()


def test_rounding_to_the_grid_may_add_a_step_to_the_sensitivity():
    step = 2.0**-10  # S and S' three steps apart, and the rounding error of S: four grid points apart
    assert np.rint(3.5 + 1e-9) - np.rint(0.5 - 1e-9) == _units(3 * step, step) == 4
    assert _units(1 / 31, step) == 35


def test_variances_along_the_index_scaled_curve():
    km = DPKaplanMeier(2.0, 900, 8, mechanism="index_scaled", random_state=7)
    noisy = km._plan().release(*cohort(), 20_000, km._coins())[0]
    assert noisy.var(axis=0) * (2.0 * np.arange(1, 9)) ** 2 / 2 == pytest.approx(np.ones(8), rel=0.08)


def test_index_scaled_clips_smooths_and_never_rises(monkeypatch):
    answers = np.array([[1.4, 0.6, 0.9, -0.2, 0.3]])
    monkeypatch.setattr(_Noise, "add", lambda self, values, coins: answers)
    S = DPKaplanMeier(1.0, 900, 5, mechanism="index_scaled")._plan().release(*cohort(), 1, coins())[1]
    # clipped to [0, 1] and to the value before: 1, .6, .6, 0, 0; then averages of three with the ends repeated
    assert S[0] == pytest.approx([2.6 / 3, 2.2 / 3, 1.2 / 3, 0.2, 0.0])


@pytest.mark.parametrize("mechanism", ["histogram", "curve"])
@pytest.mark.parametrize("m", [1, 2])
def test_few_bins(mechanism, m):
    km = fit(DPKaplanMeier(5.0, 900, m, mechanism=mechanism), *cohort())
    assert km.survival_function_.shape == (m + 1, 1)


# Budgets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 1 / 3, 7.3])
@pytest.mark.parametrize("neighbors, changed", [("add_remove", 1), ("replace", 2)])
def test_noise_never_spends_more_than_epsilon(epsilon, neighbors, changed):
    for noise in ("discrete_laplace", "laplace"):
        plan = DPKaplanMeier(epsilon, 900, 7, noise=noise, neighbors=neighbors)._plan()
        spent = Fraction(plan.noise.rates[0], ONE) / Fraction(plan.noise.step) * changed
        assert 0.999 * epsilon < spent <= Fraction(epsilon)
        plan = DPKaplanMeier(epsilon, 900, 7, noise=noise, neighbors=neighbors, mechanism="curve")._plan()
        spent = 7 * Fraction(plan.noise.rates[0], ONE) * _units(1.0, plan.noise.step)
        assert 0.999 * epsilon < spent <= Fraction(epsilon)


@pytest.mark.parametrize("m", [1, 10, 20])
def test_index_scaled_owns_up_to_its_epsilon(m):
    km = DPKaplanMeier(0.5, 900, m, mechanism="index_scaled")
    with pytest.warns(UserWarning, match=r"NOT 0\.5-differentially private"):
        km.fit(*cohort())
    total = 0.5 * m * (m + 1) / 2
    assert km.privacy_.epsilon == total
    assert not km.privacy_.proven
    assert f"epsilon = {total:g} " in str(km.privacy_)
    plan = km._plan()
    spent = sum(Fraction(rate, ONE) for rate in plan.noise.rates) * _units(1.0, plan.noise.step)  # sum of Delta / b
    assert 0.999 * total < spent <= Fraction(total)


def test_gaussian_accounting():
    rho = _rho(1.0, 1e-6)
    assert rho + 2 * math.sqrt(rho * math.log(1e6)) == pytest.approx(1.0, rel=1e-12)
    for mechanism, squared in (("histogram", 1), ("curve", 6)):
        plan = DPKaplanMeier(1.0, 900, 6, mechanism=mechanism, noise="gaussian", delta=1e-6)._plan()
        numerator, denominator = plan.noise.square
        units = 1 if mechanism == "histogram" else _units(1.0, plan.noise.step)
        spent = squared * units**2 * denominator / (2 * numerator)
        assert 0.999 * rho < spent <= rho * (1 + 1e-12)
        assert (plan.privacy.epsilon, plan.privacy.delta, plan.privacy.proven) == (1.0, 1e-6, True)


def test_privacy_says_what_it_is():
    km = fit(DPKaplanMeier(0.5, 900, neighbors="replace"), *cohort())
    assert (km.privacy_.epsilon, km.privacy_.delta, km.privacy_.mechanism, km.privacy_.proven) == (0.5, 0.0, "histogram", True)
    assert "replaced" in km.privacy_.unit
    assert km.privacy_.statement.startswith("0.5-differentially private")
    assert "added or removed" in fit(DPKaplanMeier(0.5, 900), *cohort()).privacy_.unit
    assert "random_state" not in km.privacy_.statement
    assert "random_state" in fit(DPKaplanMeier(0.5, 900, random_state=0), *cohort()).privacy_.statement
    with pytest.warns(UserWarning, match="no privacy"):
        assert not DPKaplanMeier(math.inf, 900).fit(*cohort()).privacy_.proven


# The truncated release -------------------------------------------------------------------------------------------------


def truncated(**given):
    return DPKaplanMeier(
        **{
            "epsilon": 2.0,
            "horizon": 900,
            "mechanism": "curve",
            "min_at_risk": 30,
            "candidate_times": [300, 600],
            "delta": 1e-5,
            "random_state": 0,
            **given,
        }
    )


def test_truncated_release_accounts_for_test_and_values():
    for noise, share in (("laplace", 1), ("gaussian", 2)):
        plan = truncated(noise=noise)._plan()
        assert plan.edges.tolist() == np.linspace(0, 900, 11)[:7].tolist()  # nothing beyond 600 can be published
        assert plan.test.noise.step == 1.0
        test = 2 * Fraction(plan.test.noise.rates[0], ONE)
        assert 0.999 * 0.5 < test <= 0.5
        assert plan.test.delta == pytest.approx(1e-5 / share / 2)
        units = _units(1 / 31, plan.noise.step)
        if noise == "laplace":
            values = 6 * Fraction(plan.noise.rates[0], ONE) * units
            assert 0.999 * 1.5 < values <= 1.5
        else:
            values = 6 * units**2 * plan.noise.square[1] / (2 * plan.noise.square[0])
            assert 0.99 * _rho(1.5, 5e-6) < values <= _rho(1.5, 5e-6)
        assert (plan.privacy.epsilon, plan.privacy.delta, plan.privacy.proven) == (2.0, 1e-5, True)


@pytest.mark.parametrize("rate", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-9])
def test_margin_of_the_test_is_the_least_that_keeps_delta(rate, delta):
    margin = _Test(np.array([1.0]), _Noise.laplace(1.0, [Fraction(rate)]), 10, delta).margin
    tail = lambda x: math.exp(-rate * x) / (1 + math.exp(-rate))  # noqa: E731
    assert tail(margin) <= delta * (1 + 1e-9)
    assert margin == 1 or tail(margin - 1) >= delta * (1 - 1e-9)


def test_test_is_wrong_no_more_than_delta_and_right_when_many_are_at_risk():
    test = _Test(np.array([10.0, 20.0]), _Noise.laplace(1.0, [Fraction(1, 2)]), 5, 0.05)
    few = np.array([5.0] * 3 + [30.0] * 5)  # five beyond 10 and beyond 20: as many as k0, so neither may pass
    assert (test.last(few, 20_000, coins(8)) > -np.inf).mean() == pytest.approx(2 * 0.05, abs=0.05)
    assert (test.last(few, 20_000, coins(8)) > -np.inf).mean() <= 2 * 0.05
    many = np.array([15.0] * 500 + [30.0] * 2)
    assert (test.last(many, 100, coins(9)) == 10.0).all()
    assert (test.last(np.full(500, 30.0), 100, coins(9)) == 20.0).all()
    assert (test.last(np.full(500, 20.0), 100, coins(9)) == 10.0).all()  # at 20 is not beyond 20


def test_truncated_curve_ends_where_the_test_says():
    km = fit(truncated(epsilon=20.0), *cohort(2000))
    assert km.timeline[-1] == 540  # the last edge not after 600
    assert len(km.noisy_table_) == 6
    t, e = cohort(2000)
    assert np.abs(km.predict(km.timeline) - _kaplan_meier(t, e, km.timeline)).max() < 0.3
    assert km.predict(800) == km.predict(540)
    assert fit(truncated(epsilon=20.0, candidate_times=[540]), t, e).timeline[-1] == 540
    early = fit(truncated(epsilon=20.0), np.minimum(t, 500), e)
    assert early.timeline[-1] == 270  # nobody beyond 600, many beyond 300
    wider = np.abs(
        fit(truncated(epsilon=20.0, min_at_risk=1), t, e).noisy_table_["survival"] - _kaplan_meier(t, e, km.timeline[1:])
    ).max()
    assert wider > np.abs(km.noisy_table_["survival"] - _kaplan_meier(t, e, km.timeline[1:])).max()


def test_truncated_release_that_publishes_nothing():
    km = truncated(random_state=None)
    with pytest.warns(UserWarning, match="too few at risk"):
        km.fit(*cohort(20))
    assert km.survival_function_.to_numpy().tolist() == [[1.0]]
    assert km.noisy_table_.empty
    assert km.predict([0, 500]).tolist() == [1.0, 1.0]


# Bands -----------------------------------------------------------------------------------------------------------------


def test_band_without_noise_is_that_of_lifelines():
    lifelines = pytest.importorskip("lifelines")
    t, e = cohort()
    t = np.ceil(t / 30)
    peer = lifelines.KaplanMeierFitter().fit(t, e)
    times = np.unique(t)
    km = fit(DPKaplanMeier(math.inf, edges=[0, *times], tie="end"), t, e)
    inner = (km.survival_function_.to_numpy()[:, 0] > 0) & (km.survival_function_.to_numpy()[:, 0] < 1)
    assert inner.sum() > 10
    for alpha in (0.05, 0.2):
        theirs = type(peer)(alpha=alpha).fit(t, e).confidence_interval_
        ours = km.confidence_band(alpha)
        assert np.allclose(ours[inner], theirs[inner], rtol=0, atol=1e-10)
        assert ours.columns.tolist() == [f"approximate_lower_{1 - alpha:g}", f"approximate_upper_{1 - alpha:g}"]
    assert km.confidence_interval_.equals(km.confidence_band())


@pytest.mark.parametrize("tie", ["actuarial", "end"])
def test_band_adds_the_noise_of_every_cell(tie):
    cells = np.array([20.0, 15, 10, 5, 8, 12, 40])
    S, z = _survival(cells, tie), 1.959963984540054

    def variance(noise):
        low, _high = _greenwood(cells, S, noise, tie, 0.05)
        return ((np.log(-np.log(low)) - np.log(-np.log(S))) / z * np.log(S)) ** 2

    h = 1e-5
    gradient = np.stack(
        [(np.log(_survival(cells + h * row, tie)) - np.log(_survival(cells - h * row, tie))) / (2 * h) for row in np.eye(7)]
    )
    assert variance(3.0) - variance(0.0) == pytest.approx(3.0 * (gradient**2).sum(0), rel=1e-5)


@pytest.mark.parametrize("method", ["greenwood", "bootstrap"])
def test_band_covers_about_as_often_as_it_says(method):
    covered = []
    for seed in range(60):
        km = fit(DPKaplanMeier(1.0, 800, random_state=seed), *cohort(seed=seed))
        band = km.confidence_band(0.1, method, draws=200, random_state=seed).to_numpy()[1:]
        true = np.exp(-((km.timeline[1:] / 400) ** 1.3))
        covered.append((band[:, 0] <= true) & (true <= band[:, 1]))
        assert (band[:, 0] <= band[:, 1]).all()
        assert ((band >= 0) & (band <= 1)).all()
    assert 0.8 < np.mean(covered) < 0.97


def test_bands_widen_with_less_budget():
    def width(epsilon, method):
        km = fit(DPKaplanMeier(epsilon, 900, random_state=0), *cohort())
        return km.confidence_band(method=method, random_state=0).diff(axis=1).iloc[1:, 1].mean()

    for method in ("greenwood", "bootstrap"):
        assert width(0.3, method) > width(1.0, method) > width(math.inf, method) > 0


# Audit -----------------------------------------------------------------------------------------------------------------

LATE = (np.r_[np.full(49, 0.5), 19.5], np.r_[np.zeros(49), 1])  # all but one censored before that one has its event
LATE2 = (LATE[0], np.zeros(50))


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_audit_does_not_refute_the_histogram(epsilon):
    km = DPKaplanMeier(epsilon, 20, 20, neighbors="replace", random_state=10)
    bound = audit_epsilon(km, LATE, LATE2, n=5000)
    assert 0.2 * epsilon < bound <= epsilon


def test_audit_refutes_the_index_scaled_curve():
    for epsilon in (0.5, 1.0):
        km = DPKaplanMeier(epsilon, 20, 20, mechanism="index_scaled", neighbors="replace", random_state=10)
        assert audit_epsilon(km, LATE, LATE2, n=5000) > 3 * epsilon


def test_audit_of_a_function_finds_most_of_a_known_epsilon():
    rng = np.random.default_rng(0)
    for epsilon in (0.5, 2.0):
        bound = audit_epsilon(lambda x, e=epsilon: x + rng.laplace(0, 1 / e), 0.0, 1.0, n=20_000)
        assert 0.8 * epsilon < bound <= epsilon
        assert audit_epsilon(lambda x, e=epsilon: [0.0, x + rng.laplace(0, 1 / e)], 1.0, 0.0, n=20_000) > 0.8 * epsilon
    assert audit_epsilon(lambda x: x + rng.normal(), 0.0, 0.0, n=2000) < 0.3
    # no noise: the most that n runs can show is (alpha/2 at each end)
    n = 1000
    limit = math.log(0.025 ** (1 / n) / (1 - 0.025 ** (1 / n)))
    assert audit_epsilon(float, 0.0, 1.0, n=n) == pytest.approx(limit, rel=1e-9)
    assert audit_epsilon(float, 0.0, 1.0, n=n, delta=0.5) == pytest.approx(limit + math.log(0.5), abs=0.01)
    assert audit_epsilon(float, 0.0, 1.0, n=n, alpha=0.01) < limit


def test_audit_is_rarely_too_high():
    # Randomised response at epsilon = 1, where the best event has exactly that ratio.
    rng, p = np.random.default_rng(1), math.e / (1 + math.e)
    bounds = [audit_epsilon(lambda x: float((rng.random() < p) == x), True, False, n=400, alpha=0.1) for _ in range(200)]
    assert np.mean(np.array(bounds) > 1.0) <= 0.1
    assert np.median(bounds) > 0.6


def test_audit_sees_what_a_truncated_release_leaves_out():
    km = truncated(epsilon=5.0, candidate_times=[600], random_state=0)
    t, e = cohort(300)
    assert audit_epsilon(km, (t, e), (t[1:], e[1:]), n=500) <= 5.0
    assert audit_epsilon(float, math.nan, 0.0, n=500) > 3.0  # not published is not the same as a value of 0


@pytest.mark.parametrize(
    "given, match",
    [
        ({"n": 0}, "n must be"),
        ({"alpha": 1.0}, "alpha must be"),
        ({"delta": 1.0}, "delta must be"),
        ({"delta": -0.1}, "delta must be"),
    ],
)
def test_audit_refuses(given, match):
    with pytest.raises(ValueError, match=match):
        audit_epsilon(float, 0.0, 1.0, **given)


# Arguments, seeds, warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, match",
    [
        ({"horizon": None}, "^horizon must be given and must not be computed from the data$"),
        ({"horizon": 0}, "horizon must be a finite number > 0, got 0"),
        ({"horizon": math.inf}, "horizon must be a finite"),
        ({"horizon": math.nan}, "horizon must be a finite"),
        ({"bins": 0}, "bins must be an integer >= 1, got 0"),
        ({"bins": 2.5}, "bins must be an integer"),
        ({"epsilon": 0}, "epsilon must be > 0, got 0"),
        ({"epsilon": -1.0}, "epsilon must be > 0"),
        ({"epsilon": math.nan}, "epsilon must be > 0, got nan"),
        ({"epsilon": 1e-13}, "epsilon is too small for exact noise"),
        ({"epsilon": 1e-4, "noise": "gaussian", "delta": 1e-6}, "epsilon is too small for gaussian noise"),
        ({"noise": "gaussian"}, "need delta in"),
        ({"noise": "gaussian", "delta": 0.0}, "delta must be in"),
        ({"noise": "gaussian", "delta": 1.0}, "delta must be in"),
        ({"delta": math.nan}, "delta must be in"),
        ({"noise": "laplac"}, "unknown noise 'laplac': did you mean 'laplace'"),
        ({"mechanism": "tree"}, "unknown mechanism 'tree'"),
        ({"neighbors": "swap"}, "unknown neighbors"),
        ({"tie": "start"}, "unknown tie"),
        ({"mechanism": "index_scaled", "noise": "gaussian", "delta": 0.1}, "index_scaled"),
        ({"edges": [1.0, 2.0], "horizon": None}, "edges must be 0 = b_0"),
        ({"edges": [0.0, 2.0, 2.0], "horizon": None}, "edges must be 0 = b_0"),
        ({"edges": [0.0, math.inf], "horizon": None}, "edges must be 0 = b_0"),
        ({"edges": [0.0], "horizon": None}, "edges must be 0 = b_0"),
        ({"edges": [0.0, math.nan, 2.0], "horizon": None}, "edges must be 0 = b_0"),
        ({"edges": [0.0, 5.0]}, "horizon and edges disagree"),
        ({"min_at_risk": 5, "delta": 0.1}, "are for mechanism='curve', got 'histogram'"),
        ({"candidate_times": [5.0]}, "are for mechanism='curve'"),
        ({"mechanism": "curve", "candidate_times": [5.0]}, "give both or neither"),
        ({"mechanism": "curve", "min_at_risk": 5, "candidate_times": [5.0]}, "min_at_risk need delta"),
        ({"mechanism": "curve", "min_at_risk": 0, "candidate_times": [5.0], "delta": 0.1}, "min_at_risk must be >= 1"),
        ({"mechanism": "curve", "min_at_risk": 5, "delta": 0.1}, "candidate_times must be public times between 1 and 10"),
        ({"mechanism": "curve", "min_at_risk": 5, "candidate_times": [0.5], "delta": 0.1}, "candidate_times must be"),
        ({"mechanism": "curve", "min_at_risk": 5, "candidate_times": [11.0], "delta": 0.1}, "candidate_times must be"),
    ],
)
def test_arguments_that_are_refused(given, match):
    km = DPKaplanMeier(**{"epsilon": 1.0, "horizon": 10.0, **given})
    with pytest.raises(ValueError, match=match):
        km.fit([1.0, 2.0], [1, 0])


@pytest.mark.parametrize("name", ["entry", "weights"])
def test_entry_and_weights_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        DPKaplanMeier(1.0, 10).fit([1.0, 2.0], [1, 0], **{name: [0, 1]})


def test_bands_that_are_refused():
    km = fit(DPKaplanMeier(1.0, 900), *cohort())
    for arguments, match in (
        ((0.0,), "alpha must be"),
        ((1.0,), "alpha must be"),
        ((0.05, "wald"), "unknown method 'wald'"),
        ((0.05, "bootstrap", 0), "draws must be"),
    ):
        with pytest.raises(ValueError, match=match):
            km.confidence_band(*arguments)
    for mechanism in ("curve", "index_scaled"):
        other = fit(DPKaplanMeier(1.0, 900, mechanism=mechanism), *cohort())
        assert not hasattr(other, "confidence_interval_")
        assert math.isnan(other.noisy_overflow_)
        with pytest.raises(ValueError, match="needs mechanism='histogram'"):
            other.confidence_band()


def test_horizon_and_matching_edges_agree():
    t, e = cohort()
    a = fit(DPKaplanMeier(math.inf, 900, 3), t, e)
    b = fit(DPKaplanMeier(math.inf, 900, edges=[0, 300, 600, 900]), t, e)
    assert a.survival_function_.equals(b.survival_function_)


def test_default_randomness_is_fresh_and_a_seed_repeats():
    t, e = cohort()
    cells = lambda state: fit(DPKaplanMeier(0.1, 900, 20, random_state=state), t, e).noisy_table_["events"].tolist()  # noqa: E731
    assert cells(None) != cells(None)
    assert cells(3) == cells(3) == cells(np.random.default_rng(3))
    assert cells(3) != cells(4)
    assert cells(np.random.RandomState(3)) == cells(np.random.RandomState(3))
    running = np.random.default_rng(3)
    assert cells(running) != cells(running)


def test_default_randomness_is_the_operating_systems(monkeypatch):
    asked = []
    monkeypatch.setattr("secrets.token_bytes", lambda size: asked.append(size) or np.random.default_rng(len(asked)).bytes(size))
    fit(DPKaplanMeier(1.0, 900), *cohort())
    assert sum(asked) >= 8 * 21


def test_warnings_for_seeds_and_second_fits():
    t, e = cohort()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        km = DPKaplanMeier(1.0, 900).fit(t, e)
    with pytest.warns(UserWarning, match="budgets of all fits add up"):
        km.fit(t, e)
    seeded = DPKaplanMeier(1.0, 900, random_state=0)
    with pytest.warns(UserWarning, match="a known seed voids privacy") as caught:
        seeded.fit(t, e)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="add up") as caught:
        seeded.fit(t, e)
    assert len(caught) == 1  # the seed: once


def test_the_records_are_not_kept():
    t, e = cohort(5000)
    for mechanism in ("histogram", "curve", "index_scaled"):
        km = fit(DPKaplanMeier(1.0, 900, mechanism=mechanism), t, e)
        assert len(pickle.dumps(km)) < 8 * 1024


def test_importing_the_room_is_cheap():
    code = """
import sys
import weightroom.estimators as room
heavy = lambda *names: print([name for name in names if name in sys.modules])
heavy("pandas", "sklearn", "lifelines", "opendp")
room.DPKaplanMeier
heavy("lifelines", "opendp")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from weightroom.study.stats import Sample, decide, interval, looks, overall, spending

ALPHA = 0.05


def better(values, **more):
    return Sample(list(values), 0.0, math.inf, strict=True, **more)


def test_the_interval_is_students():
    x = [0.1, 0.4, 0.2, 0.5]
    expected = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert interval(x, 0.95) == pytest.approx((expected.low, expected.high))


def test_one_value_has_an_infinite_interval():
    assert interval([1.0], 0.95) == (-math.inf, math.inf)


@pytest.mark.parametrize(("shift", "verdict"), [(1.0, "holds"), (-1.0, "fails"), (0.0, "inconclusive")])
def test_inside_outside_across(shift, verdict):
    decision = decide([better(np.array([-0.2, 0.1, 0.2, -0.1, 0.05]) + shift)], ALPHA, [5])[0]
    assert decision.verdict == verdict
    assert decision.n == 5


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12, unique=True), st.floats(-2, 2), st.floats(0.1, 3))
def test_the_p_value_agrees_with_the_interval(values, low, width):
    sample = Sample(values, low, low + width)
    decision = decide([sample], ALPHA, [len(values)])[0]
    a, b = interval(values, 1 - ALPHA)
    if math.isclose(a, low, abs_tol=1e-9) or math.isclose(b, low + width, abs_tol=1e-9):
        return
    inside, outside = low <= a and b <= low + width, b < low or a > low + width
    assert (decision.verdict == "holds") == inside
    assert (decision.verdict == "fails") == outside


def test_holm_is_stricter_than_one_test_and_laxer_than_bonferroni():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(8)
    base = (base - base.mean()) / base.std(ddof=1) / math.sqrt(8)
    at = lambda p: better(base + scipy_stats.t.isf(p / 2, 7) / 8)  # noqa: E731
    alone = decide([at(0.04)], ALPHA, [8])[0]
    assert alone.p == pytest.approx(0.04, rel=1e-6)
    assert alone.verdict == "holds"
    both = decide([at(0.04), at(0.02)], ALPHA, [8])
    assert [d.verdict for d in both] == ["holds", "holds"]  # 0.02 <= 0.05 / 2, then 0.04 <= 0.05 / 1
    assert [d.level for d in both] == pytest.approx([0.95, 0.975])
    blocked = decide([at(0.04), at(0.03)], ALPHA, [8])
    assert [d.verdict for d in blocked] == ["inconclusive", "inconclusive"]  # 0.03 > 0.05 / 2


def test_looks_and_spending():
    assert looks(5, None) == [5]
    assert looks(5, 5) == [5]
    assert looks(5, 20) == [5, 10, 15, 20]
    assert looks(3, 8) == [3, 5, 7, 8]
    assert sum(spending([3, 5, 7, 8], ALPHA)) == pytest.approx(ALPHA)
    assert spending([4, 8], ALPHA)[0] == pytest.approx(ALPHA / 4)


def test_the_first_decision_stands():
    values = [1.0, 1.1, 0.9, 1.05, *[-9.0, 9.0, -9.0, 9.0]]
    assert decide([better(values)], ALPHA, [4, 8])[0].n == 4


def test_looks_that_were_not_reached_are_not_taken():
    decision = decide([better([0.5, -0.4, 0.3, 0.1])], ALPHA, [4, 8])[0]
    assert (decision.verdict, decision.n) == ("inconclusive", 4)


def test_a_failed_trial_leaves_it_undecided():
    decision = decide([better([1, 1.1, 0.9, 1.0], missing=1)], ALPHA, [5])[0]
    assert decision.verdict == "inconclusive"
    assert "1 of 5 trials" in decision.reason


def test_two_values_decide_nothing():
    assert decide([better([1.0, 1.001])], ALPHA, [2])[0].verdict == "inconclusive"


def test_equal_differences_are_certain_only_where_the_arms_do_not_vary():
    assert decide([better([1.0] * 4, exact=True)], ALPHA, [4])[0].verdict == "holds"
    assert decide([better([1.0] * 4)], ALPHA, [4])[0].verdict == "inconclusive"
    assert decide([better([1.0] * 6)], ALPHA, [6])[0].verdict == "holds"  # 2 ** -5 < 0.05


def test_no_difference_is_not_better_but_it_is_not_worse():
    same = [0.0] * 8
    assert decide([Sample(same, 0, math.inf, strict=True)], ALPHA, [8])[0].verdict == "fails"
    assert decide([Sample(same, 0, math.inf)], ALPHA, [8])[0].verdict == "holds"


def test_every_needs_every_trial():
    assert decide([Sample([0.1, 0.2, 0.3], 0, 1, every=True)], ALPHA, [3])[0].verdict == "holds"
    assert decide([Sample([0.1, 0.2, 1.3], 0, 1, every=True)], ALPHA, [3])[0].verdict == "fails"
    assert decide([Sample([], 0, 1, every=True)], ALPHA, [3])[0].verdict == "inconclusive"


def test_overall():
    assert overall(["holds", "holds"]) == "holds"
    assert overall(["holds", "inconclusive"]) == "inconclusive"
    assert overall(["inconclusive", "fails"]) == "fails"
    assert overall([]) == "inconclusive"


def _error_rate(draw, expectations, at, studies, seed):
    """The share of studies without any effect in which at least one expectation was decided, either way."""
    rng = np.random.default_rng(seed)
    wrong = 0
    for _ in range(studies):
        samples = [better(draw(rng, at[-1])) for _ in range(expectations)]
        wrong += any(d.verdict != "inconclusive" for d in decide(samples, ALPHA, at))
    return wrong / studies


def normal(rng, n):
    return rng.standard_normal(n)


def bounded(rng, n):
    return rng.random(n) - rng.random(n)


def skewed(rng, n):
    return rng.exponential(size=n) - rng.exponential(size=n)


def in_steps(rng, n):
    return (rng.binomial(540, 0.97, n) - rng.binomial(540, 0.97, n)) / 540


@pytest.mark.parametrize("draw", [normal, bounded, skewed, in_steps])
@pytest.mark.parametrize(("expectations", "at"), [(1, [8]), (4, [5]), (1, looks(4, 8)), (3, looks(5, 20))])
def test_aa_studies_are_rarely_decided(draw, expectations, at):
    studies = 1500
    limit = scipy_stats.binom.ppf(0.999, studies, ALPHA) / studies
    assert _error_rate(draw, expectations, at, studies, seed=1) <= limit


def test_without_spending_the_same_looks_would_be_dishonest(monkeypatch):
    """The calibration above can fail: with the whole error rate at every look it does."""
    monkeypatch.setattr("weightroom.study.stats.spending", lambda at, alpha: [alpha] * len(at))
    assert _error_rate(normal, 1, looks(5, 20), 1500, seed=1) > 0.07


@pytest.mark.parametrize("at", [[8], looks(4, 8)])
def test_power_at_one_and_a_half_standard_deviations_with_eight_seeds(at):
    rng = np.random.default_rng(2)
    found = sum(decide([better(rng.standard_normal(8) + 1.5)], ALPHA, at)[0].verdict == "holds" for _ in range(1000))
    assert found / 1000 >= 0.80

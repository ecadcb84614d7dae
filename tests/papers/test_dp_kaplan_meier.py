"""The studies of the private Kaplan-Meier curve return what they declare, and their data are what their notes say."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest

from weightroom.estimators.dp_kaplan_meier import _kaplan_meier
from weightroom.papers import dp_kaplan_meier as paper
from weightroom.study import Arm, Scale, Trial

pytest.importorskip("lifelines")
ACCURACY, AUDIT, COHORTS = paper.study(Scale.SMOKE)


def run(study, name, setting, seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings[setting], params=arm.defaults)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = arm.run(trial)
    assert set(result) <= set(study.metrics)
    assert study.metric in result
    assert all(isinstance(v, float) and math.isfinite(v) for v in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", ACCURACY.arms)
def test_accuracy_study(name):
    result, spent = run(ACCURACY, name, "10")
    assert result == run(ACCURACY, name, "10")[0]
    noisy = not any(word in name for word in ("only", "no noise", "no data"))
    assert ("fall" in result) == ("epsilon" in spent) == noisy
    if noisy:
        assert result != run(ACCURACY, name, "10", seed=1)[0]
        assert spent["epsilon"] == pytest.approx(
            10 * {"index-scaled": 210, "index-scaled, 10 points": 55, "equal noise, same real budget": 210}.get(name, 1)
        )


def test_fall_is_the_difference_to_a_tenth_of_the_budget():
    ten, one = run(ACCURACY, "histogram, 20 bins", "10")[0], run(ACCURACY, "histogram, 20 bins", "1")[0]
    assert ten["fall"] == pytest.approx(one["rmse"] - ten["rmse"])


def test_arms_of_a_seed_share_their_noise():
    binned = [run(ACCURACY, f"histogram, {m} bins", "1")[0]["rmse_own_times"] for m in (10, 20)]
    floor = [run(ACCURACY, f"binning only, {m} bins", "1")[0] for m in (10, 20)]
    assert all(low["rmse_own_times"] < own for low, own in zip(floor, binned, strict=True))
    assert floor[1]["rmse"] < floor[0]["rmse"]  # at the same ten times more bins are closer


def test_audit_study():
    assert run(AUDIT, "index-scaled", "1")[0]["audited"] > 1
    assert run(AUDIT, "no noise", "1")[0]["audited_on_lung"] > 1
    for name in ("histogram", "curve, honest budget", "index-scaled, budget divided"):
        assert run(AUDIT, name, "1")[0]["audited"] <= 1
    assert run(AUDIT, "no noise", "1")[0]["exposure_rise"] == 0.0


def test_audited_pairs_differ_in_one_record():
    for (t, e), (t2, e2) in (paper._late(), paper._lung_but_one()):
        assert np.array_equal(t, t2)
        assert np.abs(e - e2).sum() == 1
        where = int(np.argmax(e != e2))
        assert (e[where], e2[where]) == (1, 0)
    t, e = paper._late()[0]
    assert (len(t), t[-1], e.sum()) == (50, 19.5, 1)


@pytest.mark.parametrize("name, n, events", [("lung", 228, 165), ("rossi", 432, 114), ("gbsg2", 686, 299), ("500", 500, None)])
def test_cohorts(name, n, events):
    t, e = paper._cohort(name)
    assert len(t) == len(e) == n
    assert events is None or e.sum() == events
    times = np.linspace(0, t.max(), 7)
    assert paper._truth((t, e))(times) == pytest.approx(_kaplan_meier(t, e == 1, times), abs=1e-12)


def test_cohorts_study():
    assert run(COHORTS, "histogram", "rossi, 432")[0]["rmse"] > run(COHORTS, "binning only", "rossi, 432")[0]["rmse"]
    assert run(COHORTS, "histogram, epsilon 0.1", "simulated, 10,000")[0]["rmse"] < 0.02


def test_without_lifelines_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines", None)
    for call in (lambda: paper._cohort("lung"), lambda: paper._truth(paper._cohort("20"))):
        with pytest.raises(ImportError, match=r"weightroom\[survival\]"):
            call()


@pytest.mark.parametrize("scale", Scale)
def test_every_claim_names_what_exists_at_every_scale(scale):
    assert len(paper.study(scale)) == 3

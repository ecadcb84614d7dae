"""Differentially private Kaplan-Meier curve (Veeraragavan, Karimireddy and Nygard, 2024)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightroom.errors import MissingExtraError
from weightroom.estimators import DPKaplanMeier, audit_epsilon
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Trial

__all__ = ["PAPER", "study"]

PAPER = Paper(
    key="dp-kaplan-meier",
    number=51,
    family="privacy",
    parts=(DPKaplanMeier, audit_epsilon),
    title="A Differentially Private Kaplan-Meier Estimator for Privacy-Preserving Survival Analysis",
    authors="Narasimha Raghavan Veeraragavan, Sai Praneeth Karimireddy, Jan Franz Nygård",
    year=2024,
    venue="arXiv",
    arxiv="2412.05164",
    summary="Publishes a survival curve with Laplace noise that shrinks with the time index, clipped and smoothed.",
    claim="On the NCCTG lung cohort the curve is within an RMSE of 0.04 of the true one at epsilon = 10, more accurate with more "
    "budget, and safer against membership inference from epsilon = 6 on.",
    limits="Only the abstract could be followed: schedule, clipping and window are a reconstruction. Its accuracy at epsilon "
    "= 10 is reproduced, but not at that budget: one record can move the whole curve by 1, so noise of scale "
    "1/(epsilon i) at 20 points really spends 210 epsilon, and an audit finds more than 6 at a nominal 1, on data "
    "where all but one leave early. On the lung cohort's own records the same audit finds next to nothing, which is "
    "why attacks on such data do not show it. Equal noise of the same real budget is more accurate than noise that "
    "shrinks, since the running minimum keeps the lowest of the loud early values; at a nominal 1 the curve is "
    "farther off than a straight line drawn without data. That a larger epsilon exposes a member less contradicts "
    "differential privacy and does not hold. Noise on the counts of a public grid, proven at epsilon = 1, is as "
    "accurate as the paper's curve at 10; it is what the part does by default. It needs some fifty records per "
    "1/epsilon, one record per person, and a horizon and a grid that are not chosen from the data; left truncation "
    "and weights are not supported.",
)

Cohort = tuple[NDArray[np.float64], NDArray[np.float64]]


def _cohort(name: str) -> Cohort:
    """Durations and events: lung, rossi or gbsg2 of lifelines, or so many simulated records."""
    if name.isdigit():
        rng, n = np.random.default_rng(51), int(name)
        death, end = 400 * rng.weibull(1.3, n), rng.uniform(200, 1500, n)
        return np.ceil(np.minimum(death, end)), (death <= end).astype(float)
    try:
        from lifelines import datasets
    except ImportError:
        raise MissingExtraError("lifelines", "survival", f"the {name} cohort") from None
    columns = {"lung": ("time", "status"), "rossi": ("week", "arrest"), "gbsg2": ("time", "cens")}[name]
    table = getattr(datasets, f"load_{name}")()
    return table[columns[0]].to_numpy(float), table[columns[1]].to_numpy(float)


def _truth(cohort: Cohort) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """The Kaplan-Meier curve itself, as a function of time."""
    try:
        from lifelines import KaplanMeierFitter
    except ImportError:
        raise MissingExtraError("lifelines", "survival", "the curve without noise") from None
    km = KaplanMeierFitter().fit(*cohort)
    return lambda times: np.asarray(km.predict(times), dtype=float)


def _rmse(cohort: Cohort, horizon: float, seeds: Iterable[int], epsilon: float, **given: Any) -> tuple[float, float, float]:
    """RMSE at ten common times and at the arm's own edges, means over the seeds, and the epsilon that one curve really cost."""
    truth, common, errors = _truth(cohort), np.linspace(0, horizon, 11)[1:], []
    for seed in seeds:
        km = DPKaplanMeier(epsilon, horizon, random_state=seed, **given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # seeds, and what index-scaled says of itself
            km.fit(*cohort)
        errors.append(
            [np.mean((np.asarray(km.predict(times)) - truth(times)) ** 2) ** 0.5 for times in (common, km.timeline[1:])]
        )
    at_common, at_own = np.mean(errors, axis=0)
    return float(at_common), float(at_own), km.privacy_.epsilon


def _accuracy(trial: Trial, *, budget: float = 1.0, **given: Any) -> dict[str, float]:
    """``budget`` times the setting is the epsilon that the estimator is given."""
    cohort, epsilon = _cohort("lung"), budget * trial.setting
    seeds = [1000 * trial.seed + i for i in range(trial.scale.pick(2, 10, 20))]
    common, own, spent = _rmse(cohort, 900.0, seeds, epsilon, **given)
    if math.isinf(epsilon):
        return {"rmse": common, "rmse_own_times": own}
    trial.spend(epsilon=spent)
    return {"rmse": common, "rmse_own_times": own, "fall": _rmse(cohort, 900.0, seeds, epsilon / 10, **given)[0] - common}


def _line(trial: Trial) -> dict[str, float]:
    times = np.linspace(0, 900, 11)[1:]
    error = float(np.mean((1 - times / 900 - _truth(_cohort("lung"))(times)) ** 2) ** 0.5)
    return {"rmse": error, "rmse_own_times": error}


def _late() -> tuple[Cohort, Cohort]:
    """The data that make the sensitivity: 49 censored early, then one who dies, or is censored, at the end."""
    t, e = np.append(np.full(49, 0.5), 19.5), np.zeros(50)
    return (t, np.append(e[1:], 1.0)), (t, e)


def _lung_but_one() -> tuple[Cohort, Cohort]:
    """The lung cohort, and the same with its last death within 900 days taken for a censoring."""
    t, e = _cohort("lung")
    changed = e.copy()
    changed[np.argmax(np.where((e == 1) & (t <= 900), t, 0.0))] = 0.0
    return (t, e), (t, changed)


def _audit(trial: Trial, *, budget: float = 1.0, **given: Any) -> dict[str, float]:
    n, epsilon = trial.scale.pick(300, 8000, 20_000), budget * trial.setting

    def bound(pair: tuple[Cohort, Cohort], horizon: float, epsilon: float) -> float:
        km = DPKaplanMeier(epsilon, horizon, 20, neighbors="replace", random_state=trial.seed, **given)
        return audit_epsilon(km, *pair, n=n)

    lung = bound(_lung_but_one(), 900.0, epsilon)
    return {
        "audited": bound(_late(), 20.0, epsilon) / trial.setting,
        "audited_on_lung": lung / trial.setting,
        "exposure_rise": lung - bound(_lung_but_one(), 900.0, epsilon / 6),
    }


def _cohorts(trial: Trial, *, epsilon: float, **given: Any) -> dict[str, float]:
    name, horizon = trial.setting
    seeds = [1000 * trial.seed + i for i in range(trial.scale.pick(1, 5, 10))]
    common, own, _ = _rmse(_cohort(name), horizon, seeds, epsilon, bins=20, **given)
    return {"rmse": common, "rmse_own_times": own}


_BUDGETS = {"0.5": 0.5, "1": 1.0, "2": 2.0, "5": 5.0, "10": 10.0}
_AUDITED = {"0.5": 0.5, "1": 1.0, "2": 2.0, "6": 6.0}
_HISTOGRAM: dict[str, Any] = {"mechanism": "histogram"}
_CURVE: dict[str, Any] = {"mechanism": "curve", "bins": 20}
_INDEX: dict[str, Any] = {"mechanism": "index_scaled", "bins": 20}
_REAL = 20 * 21 / 2  # what index-scaled noise at 20 points really spends, in nominal epsilons


def study(scale: Scale) -> list[Study]:
    """How accurate the mechanisms are, whether they keep their budget, and both at other sizes of cohort.

    ``rmse`` is taken at ten times that all arms share, ``rmse_own_times`` at the edges of each arm's own grid. ``fall`` is how
    much lower the RMSE is than with a tenth of the budget. ``audited`` is a lower bound (95 %) on the epsilon that a mechanism
    really has, in units of the nominal one: above 1 it is refuted. ``exposure_rise`` is how much larger that bound is, on the
    lung cohort, than with a sixth of the budget.
    """

    def arm(run: Any, **given: Any) -> Arm:
        return Arm(partial(run, **given), cites=(PAPER,) if given.get("mechanism") == "index_scaled" else ())

    accuracy = Study(
        name="dp-kaplan-meier: accuracy",
        paper=PAPER,
        scale=scale,
        metric="rmse",
        direction="min",
        metrics={"rmse_own_times": "min", "fall": "max"},
        baseline="index-scaled",
        settings=scale.pick({"1": 1.0, "10": 10.0}, _BUDGETS, _BUDGETS),
        arms={
            "index-scaled": arm(_accuracy, **_INDEX),
            "index-scaled, 10 points": arm(_accuracy, mechanism="index_scaled", bins=10),
            "index-scaled, no noise": arm(_accuracy, budget=math.inf, **_INDEX),
            "equal noise, same real budget": arm(_accuracy, budget=_REAL, **_CURVE),
            "curve, honest budget": arm(_accuracy, **_CURVE),
            "histogram, 10 bins": arm(_accuracy, bins=10),
            "histogram, 20 bins": arm(_accuracy, bins=20),
            "histogram, 20 bins, gaussian": arm(_accuracy, bins=20, noise="gaussian", delta=1e-5),
            "binning only, 10 bins": arm(_accuracy, budget=math.inf, bins=10),
            "binning only, 20 bins": arm(_accuracy, budget=math.inf, bins=20),
            "straight line, no data": Arm(_line),
        },
        expect=[
            Claim(
                "At epsilon = 10 its RMSE is as low as 0.04", Expect("index-scaled", "rmse_own_times", on="10").within(high=0.04)
            ),
            Claim("From epsilon = 1 to 10 its RMSE falls", Expect("index-scaled", "fall", on="10").within(low=0.0)),
            Claim(
                "At epsilon = 1 it says more than a straight line drawn without data",
                Expect("index-scaled", on="1").better_than("straight line, no data"),
            ),
            Claim(
                "Noise that shrinks with the time index is better than equal noise of the same real budget",
                Expect("index-scaled", on="1").better_than("equal noise, same real budget"),
            ),
            Claim(
                "A histogram, proven at epsilon = 1, is as accurate as the paper's 0.04 at 10",
                Expect("histogram, 20 bins", "rmse_own_times", on="1").within(high=0.04),
            ),
            Claim("At epsilon = 1 the histogram is better", Expect("histogram, 20 bins", on="1").better_than("index-scaled")),
            Claim("At epsilon = 10 the histogram is better", Expect("histogram, 20 bins", on="10").better_than("index-scaled")),
            Claim("The histogram's RMSE falls, too", Expect("histogram, 20 bins", "fall", on="10").within(low=0.0)),
            Claim(
                "At epsilon = 10 all that the histogram loses is the binning",
                Expect("histogram, 20 bins", on="10").equal_to("binning only, 20 bins", within=0.002),
            ),
            Claim(
                "Noise on the curve, honestly accounted, says less at epsilon = 10 than a straight line",
                Expect("curve, honest budget", on="10").worse_than("straight line, no data"),
            ),
        ],
        seeds=scale.pick(3, 20, 20),
        notes={
            "data": "NCCTG lung, 228 records, 165 deaths; horizon 900 days; 20 points or bins where no number is given",
            "settings": "the nominal epsilon, add or remove one record",
            "reconstruction": "scale 1/(epsilon i) at point i, clipping to [0, 1] and to the value before, means of three",
        },
    )
    audit = Study(
        name="dp-kaplan-meier: audit",
        paper=PAPER,
        scale=scale,
        metric="audited",
        direction="min",
        metrics={"audited_on_lung": "min", "exposure_rise": "min"},
        baseline="histogram",
        settings=scale.pick({"1": 1.0, "6": 6.0}, _AUDITED, _AUDITED),
        arms={
            "histogram": arm(_audit, **_HISTOGRAM),
            "curve, honest budget": arm(_audit, mechanism="curve"),
            "index-scaled": arm(_audit, mechanism="index_scaled"),
            "index-scaled, budget divided": arm(_audit, budget=1 / _REAL, mechanism="index_scaled"),
            "no noise": arm(_audit, budget=math.inf, **_HISTOGRAM),
        },
        expect=[
            Claim("Index-scaled noise keeps its nominal epsilon = 1", Expect("index-scaled", on="1").within(high=1.0)),
            Claim(
                "On the lung cohort itself the audit does not refute it",
                Expect("index-scaled", "audited_on_lung", on="1").within(high=1.0),
            ),
            Claim(
                "At epsilon = 6 it exposes a member less than at 1",
                Expect("index-scaled", "exposure_rise", on="6").within(high=0.0),
            ),
            Claim("The histogram is not refuted at epsilon = 1", Expect("histogram", on="1").within(high=1.0)),
            Claim("The histogram is not refuted at epsilon = 6", Expect("histogram", on="6").within(high=1.0)),
            Claim("The honest curve is not refuted", Expect("curve, honest budget", on="1").within(high=1.0)),
            Claim(
                "With the budget divided index-scaled noise is not refuted",
                Expect("index-scaled, budget divided", on="1").within(high=1.0),
            ),
            Claim("The audit refutes a release without noise", Expect("no noise", on="1").within(low=1.0)),
        ],
        seeds=scale.pick(3, 5, 5),
        notes={
            "data": "audited: 49 records censored at 0.5 and one at 19.5 of 20, dead or censored; "
            "on lung: its last death within 900 days, or a censoring in its place",
            "settings": "the nominal epsilon, replace one record; 20 points or bins",
        },
    )
    sizes = Study(
        name="dp-kaplan-meier: cohorts",
        paper=PAPER,
        scale=scale,
        metric="rmse",
        direction="min",
        metrics={"rmse_own_times": "min"},
        baseline="index-scaled",
        settings={
            "lung, 228": ("lung", 900.0),
            "rossi, 432": ("rossi", 52.0),
            "gbsg2, 686": ("gbsg2", 2400.0),
            "simulated, 10,000": ("10000", 1000.0),
            **scale.pick({}, {}, {"simulated, 100,000": ("100000", 1000.0)}),
        },
        arms={
            "index-scaled": arm(_cohorts, epsilon=1.0, mechanism="index_scaled"),
            "histogram": arm(_cohorts, epsilon=1.0),
            "histogram, epsilon 0.1": arm(_cohorts, epsilon=0.1),
            "binning only": arm(_cohorts, epsilon=math.inf),
        },
        expect=[
            *(
                Claim(f"On {name} the histogram at epsilon = 1 is better", Expect("histogram", on=on).better_than("index-scaled"))
                for name, on in (("rossi", "rossi, 432"), ("gbsg2", "gbsg2, 686"), ("10,000 records", "simulated, 10,000"))
            ),
            Claim(
                "At 10,000 records epsilon = 0.1 costs 0.01 at most",
                Expect("histogram, epsilon 0.1", on="simulated, 10,000").not_worse_than("binning only", by=0.01),
            ),
        ],
        seeds=scale.pick(2, 10, 20),
        notes={
            "settings": "cohort and its number of records; horizons 900 days, 52 weeks, 2400 and 1000 days; 20 points or bins"
        },
    )
    return [accuracy, audit, sizes]

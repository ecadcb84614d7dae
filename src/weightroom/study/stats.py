r"""Verdicts: intervals of means, several expectations at once, seeds added until it is clear.

**One question.** Every expectation asks whether a mean :math:`\mu` lies in a region [low, high] (see ``expect``): the mean of
an arm's metric, or the mean of the improvements paired by seed. With n values of mean m and standard error s / sqrt(n), the
two-sided Student interval of level 1 - a is :math:`m \pm t_{1-a/2,\,n-1}\, s/\sqrt n` (Student 1908). Inside the region: holds;
outside: fails; else inconclusive. So an expectation is decided at every a above its p-value
:math:`p = 2\,P(T_{n-1} > g / (s/\sqrt n))`, where g is the distance of m to the nearest border of the region. For a region
[-d, d] this is the equivalence test of Schuirmann (1987), a little conservative, since it uses the two-sided interval.

**Several expectations** of one study share the error rate by Holm's step-down procedure (Holm 1979): the smallest of k
p-values is compared with a/k, the next with a/(k-1), and so on until the first that is not decided. The interval that is shown
is that of the level at which an expectation was (or was not) decided.

**More seeds.** When a study may go on from ``seeds`` to ``max_seeds``, it is looked at a few times (``looks``), and look j may
spend :math:`a_j = a\,(f_j^2 - f_{j-1}^2)`, f the share of ``max_seeds`` seen: the power family of spending functions
(Kim and DeMets 1987) with exponent 2. The a_j sum to a, so by the union bound the chance of a wrong decision at any look is at
most a, exactly and whatever the dependence between looks; an expectation keeps the first decision it gets.

**What is assumed.** The means are normal enough for Student's interval; with few seeds and metrics that are very skewed this is
approximate. When all n differences are the same although the arms vary with the seed (metrics on small test sets come in steps),
Student's interval has no width; then p is that of the sign-flip test, :math:`2^{1-n}`. Only where each arm is the same for every
seed (a count of parameters, say) is one difference taken for certain. Trials that failed leave their expectation undecided:
dropping them quietly would favour an arm that crashes where it is bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.special import stdtr, stdtrit

__all__ = ["Sample", "Verdict", "decide", "interval", "looks", "overall", "spending"]

Answer = Literal["holds", "fails", "inconclusive"]

#: The fewest values that decide anything.
LEAST = 3


@dataclass(frozen=True)
class Verdict:
    """What became of one expectation.

    Args:
        statement: the claim, in words.
        verdict: "holds", "fails" or "inconclusive".
        difference: mean paired improvement of ``arm`` over ``other`` (positive is better), or the arm's own mean value where
            there is no ``other``; NaN without values.
        interval: of the difference at ``level``.
        n: seeds that it rests on.
        level: confidence level of the interval after sharing the error rate.
        p: p-value of the decision (two-sided), NaN where none is defined.
        reason: why, in words.
        region: where the mean must lie.
        arm: the arm it is about.
        other: the arm it is compared with.
        metric: the metric that decides.
        setting: the study's setting.
        tuned: decided on tuned trials.
        study: the study's name.
    """

    statement: str
    verdict: Answer
    difference: float
    interval: tuple[float, float]
    n: int
    level: float
    p: float
    reason: str
    region: tuple[float, float]
    arm: str
    other: str | None = None
    metric: str = ""
    setting: str = ""
    tuned: bool = False
    study: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values; infinities and NaN become None."""
        plain = lambda v: v if not isinstance(v, float) or math.isfinite(v) else None  # noqa: E731
        return {k: [plain(x) for x in v] if isinstance(v, tuple) else plain(v) for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Sample:
    """The values that an expectation is decided on.

    Args:
        values: one per seed, in the order in which seeds are added.
        low: lower border of the region.
        high: upper border of the region.
        strict: the borders do not belong to the region.
        every: each value must lie in the region (no inference), instead of their mean.
        exact: what the values were computed from does not vary with the seed.
        missing: trials that the values lack because they failed or were not run.
    """

    values: Sequence[float]
    low: float
    high: float
    strict: bool = False
    every: bool = False
    exact: bool = False
    missing: int = 0


@dataclass(frozen=True)
class Decision:
    """The statistical part of a verdict."""

    verdict: Answer
    mean: float
    interval: tuple[float, float]
    n: int
    level: float
    p: float
    reason: str


def interval(values: Sequence[float] | np.ndarray, level: float) -> tuple[float, float]:
    """Student's two-sided interval of the mean; infinite with fewer than two values."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return -math.inf, math.inf
    half = stdtrit(len(x) - 1, (1 + level) / 2) * _error(x)
    return float(x.mean() - half), float(x.mean() + half)


def looks(seeds: int, max_seeds: int | None) -> list[int]:
    """After how many seeds a study is looked at: at ``seeds``, then each time about a quarter of ``max_seeds`` has been added."""
    if max_seeds is None or max_seeds <= seeds:
        return [seeds]
    stride = max(1, math.ceil(max_seeds / 4))
    return [*range(seeds, max_seeds, stride), max_seeds]


def spending(at: Sequence[int], alpha: float) -> list[float]:
    """The error that each look may spend; sums to ``alpha``."""
    share = [0.0, *(n / at[-1] for n in at)]
    return [alpha * (b**2 - a**2) for a, b in pairwise(share)]


def decide(samples: Sequence[Sample], alpha: float, at: Sequence[int]) -> list[Decision]:
    """Decides every expectation of a study.

    Args:
        samples: one per expectation.
        alpha: error rate that they share.
        at: the looks; those beyond the values at hand are not taken.

    Returns:
        A decision per sample: the first that was reached, or an inconclusive one at the last look.
    """
    decided: dict[int, Decision] = {}
    latest: dict[int, Decision] = {}
    for n, spend in zip(at, spending(at, alpha), strict=True):
        if n > at[0] and all(len(s.values) + s.missing < n for s in samples):
            break
        for i, decision in _look(samples, n, spend).items():
            latest[i] = decision
            if decision.verdict != "inconclusive":
                decided.setdefault(i, decision)
    return [decided.get(i, latest[i]) for i in range(len(samples))]


def overall(verdicts: Sequence[str]) -> Answer:
    """One word for several verdicts: fails if one fails, holds if all hold, else inconclusive."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts and all(v == "holds" for v in verdicts) else "inconclusive"


def _look(samples: Sequence[Sample], n: int, alpha: float) -> dict[int, Decision]:
    out = {i: _every(sample) for i, sample in enumerate(samples) if sample.every}
    tested = sorted(
        ((_p(s, n), i) for i, s in enumerate(samples) if not s.every), key=lambda pair: (math.isnan(pair[0]), pair[0])
    )
    k = len(tested)
    first_open = next((rank for rank, (p, _) in enumerate(tested) if not p <= alpha / (k - rank)), k)  # Holm 1979
    for rank, (p, i) in enumerate(tested):
        out[i] = _mean(samples[i], n, p, alpha / (k - min(rank, first_open)), undecided=rank >= first_open)
    return out


def _mean(sample: Sample, n: int, p: float, alpha: float, *, undecided: bool) -> Decision:
    x = np.asarray(sample.values[:n], dtype=float)
    mean = float(x.mean()) if len(x) else math.nan
    bounds = interval(x, 1 - alpha)
    inside = sample.low < mean < sample.high or (not sample.strict and mean in (sample.low, sample.high))
    span = f"the {100 * (1 - alpha):.4g} % interval [{bounds[0]:.4g}, {bounds[1]:.4g}]"
    region = _say(sample.low, sample.high)
    if sample.missing:
        verdict: Answer = "inconclusive"
        reason = f"{sample.missing} of {sample.missing + len(sample.values)} trials that it needs failed or were not run"
    elif len(x) < LEAST:
        verdict, reason = "inconclusive", f"{len(x)} value{'s' * (len(x) != 1)}; at least {LEAST} are needed"
    elif undecided:
        verdict, reason = "inconclusive", f"{span} crosses a border of {region}"
        if bounds[0] == bounds[1]:
            reason = f"all {len(x)} differences happen to be {mean:.4g}: too few to rule out chance (p = {p:.2g})"
        elif not any(bounds[0] <= border <= bounds[1] for border in (sample.low, sample.high)):
            reason = (
                f"another expectation of this study with a smaller p-value is not decided, so this one may not be (Holm); {span}"
            )
    elif inside:
        verdict, reason = "holds", f"{span} lies inside {region}"
    else:
        verdict, reason = "fails", f"{span} lies outside {region}"
    return Decision(verdict, mean, bounds, len(x), 1 - alpha, p, reason)


def _every(sample: Sample) -> Decision:
    x = np.asarray(sample.values, dtype=float)
    region = _say(sample.low, sample.high)
    if not len(x):
        return Decision("inconclusive", math.nan, (-math.inf, math.inf), 0, 1.0, math.nan, "no values")
    spread = (float(x.min()), float(x.max()))
    out = int(((x < sample.low) | (x > sample.high)).sum())
    if out:
        verdict: Answer = "fails"
        reason = f"{out} of {len(x)} trials lie outside {region}: values from {spread[0]:.4g} to {spread[1]:.4g}"
    elif sample.missing:
        verdict, reason = (
            "inconclusive",
            f"{sample.missing} of {sample.missing + len(x)} trials that it needs failed or were not run",
        )
    else:
        verdict, reason = "holds", f"all {len(x)} trials lie inside {region}: values from {spread[0]:.4g} to {spread[1]:.4g}"
    return Decision(verdict, float(x.mean()), spread, len(x), 1.0, math.nan, reason)


def _p(sample: Sample, n: int) -> float:
    x = np.asarray(sample.values[:n], dtype=float)
    if len(x) < LEAST:
        return math.nan
    error = _error(x)
    if error == 0:
        return 0.0 if sample.exact else 2.0 ** (1 - len(x))
    distance = min(abs(x.mean() - border) for border in (sample.low, sample.high))
    return float(2 * stdtr(len(x) - 1, -distance / error))


def _error(x: np.ndarray) -> float:
    return 0.0 if np.ptp(x) == 0 else float(x.std(ddof=1) / math.sqrt(len(x)))


def _say(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "(-inf, inf)"
    if math.isinf(high):
        return f"(> {low:.4g})"
    if math.isinf(low):
        return f"(< {high:.4g})"
    return f"[{low:.4g}, {high:.4g}]"

r"""Differentially private Kaplan-Meier curve.

Reach for it to publish a survival curve of people who must not be recognised in it: a registry's survival by stage, a trial's
arm, a site's curve for a pooled analysis. The default, ``mechanism="histogram"``, counts events and censorings on a public
grid, adds exact discrete noise to the counts once, and computes everything else (curve, median, band) from the noisy counts:
:math:`\varepsilon`-differential privacy for the whole curve, whatever the number of bins. At :math:`\varepsilon = 1` and some
two hundred records it is off by about 0.02. Do not reach for it with fewer than some fifty records per :math:`1/\varepsilon`.

Veeraragavan, Karimireddy and Nygard, "A Differentially Private Kaplan-Meier Estimator for Privacy-Preserving Survival
Analysis", arXiv 2412.05164. Their recipe adds Laplace noise to the curve itself, with a scale that shrinks with the time index,
then clips and smooths. It is here as ``mechanism="index_scaled"``, reconstructed from the abstract, for comparison alone:

- It is **not** private at its nominal budget. One record can move :math:`S(t)` by 1 at every t (all others censored before t),
  so m points with scales :math:`1/(\varepsilon i)` cost :math:`\varepsilon m(m+1)/2`: 210 at m = 20 and a nominal 1.
- Influence grows, not shrinks, as fewer remain at risk: :math:`|S_D(t) - S_{D'}(t)| \le 1/(1+k)` with k the least number, in
  either data set, of records beyond t. Removing a record that has not failed by t multiplies S by a product that telescopes to
  at least :math:`k/(k+1)`; removing one that failed at u by at most :math:`n_u/(n_u-1)`, which moves it by at most
  :math:`1/n_u`. Replacing a survivor by one that fails at u moves it by at most
  :math:`\frac{1}{n_u+1}[(r_u+1)Q' - r_uQ] \le Q'/(k+1)`, with r the survivors of u and Q, Q' the rest of the product without
  and with the record, :math:`Q/Q' \ge \frac{r_u+1}{r_u}\frac{k}{k+1}`; every other replacement moves it less.

``mechanism="curve"`` is that idea with honest accounting (useless without a floor on the number at risk, as it should be). What
no mechanism here protects: a person with several records (multiply epsilon), a horizon, grid or epsilon chosen by looking at
the data, data that make ``fit`` raise, and the timing of ``fit``.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from weightroom.errors import UsageError, unknown

__all__ = ["DPKaplanMeier", "Privacy", "audit_epsilon"]

Floats = NDArray[np.float64]

LABEL = "DP_KM_estimate"
UNITS = {"add_remove": "one record added or removed", "replace": "one record replaced, the number of records public"}
TEST_SHARE = Fraction(1, 4)  # of epsilon, for the test of the truncated release


@dataclass(frozen=True)
class Privacy:
    """What a release guarantees.

    Args:
        epsilon: the budget that the release really has, by the accounting in ``statement``; infinite for none.
        delta: probability that the guarantee may fail; 0 for pure differential privacy.
        unit: what two neighbouring data sets differ by.
        mechanism: "histogram", "curve" or "index_scaled".
        proven: whether the release is differentially private at the budget that was asked for.
        statement: the guarantee in words.
    """

    epsilon: float
    delta: float
    unit: str
    mechanism: str
    proven: bool
    statement: str

    def __str__(self) -> str:
        return self.statement


class DPKaplanMeier(BaseEstimator):
    r"""Kaplan-Meier estimator whose fitted attributes are differentially private.

    Every attribute is computed from the noisy release; the records are not kept.

    Args:
        epsilon: privacy budget of one ``fit``, > 0; ``math.inf`` adds no noise (to see what the binning alone costs).
        horizon: H > 0, the last time of the curve. Public: never computed from the data.
        bins: number m of equal bins on [0, H].
        edges: the bin edges 0 = b_0 < ... < b_m = H instead of ``horizon`` and ``bins``; public, too.
        mechanism: "histogram" (noise on the 2m + 1 counts of events, censorings and records beyond H), "curve" (noise on
            S(b_1), ..., S(b_m), which share the budget) or "index_scaled" (the paper's recipe; **not** private at ``epsilon``).
        neighbors: "add_remove" or "replace" (one record; the number of records is then public).
        noise: "discrete_laplace" (integers), "laplace" (the same on a grid of at most 1/65536 of its scale) or "gaussian"
            (discrete, accounted in zero-concentrated differential privacy). All are drawn exactly, from integers. On the curve,
            which has no integers, the first two are the same.
        delta: in (0, 1); needed by Gaussian noise and by ``min_at_risk``, otherwise without effect.
        tie: where in a bin its censorings fall: half before the events ("actuarial") or all after them ("end").
        random_state: None for the operating system's secure randomness. An int, ``Generator`` or ``RandomState`` makes a run
            repeatable, for studies and tests: whoever knows the seed can subtract the noise.
        min_at_risk: :math:`k_0 \ge 1`, with ``mechanism="curve"``: publish only up to a time with, but for probability ``delta``,
            more than :math:`k_0` records beyond it, where one record moves the curve by at most :math:`1/(1+k_0)`. A quarter of
            ``epsilon`` finds that time.
        candidate_times: the public times, in [b_1, H], that may be that time; they share the quarter.

    Attributes:
        survival_function_: DataFrame of S, one column, indexed by ``timeline``; non-increasing, in [0, 1].
        timeline: array (m + 1,) of b_0, ..., b_m; with ``min_at_risk`` it ends earlier, at worst after b_0 = 0.
        median_survival_time_: first edge at which S <= 1/2; infinite when there is none.
        confidence_interval_: the 95 % band of ``confidence_band()``; not there for the other mechanisms.
        privacy_: the guarantee, see ``Privacy``.
        noisy_table_: DataFrame indexed by b_1, ..., b_m: ``events`` and ``censored`` as released (they may be negative) and
            ``at_risk``, from the counts clipped at 0. For the other mechanisms one column, ``survival``, as released.
        noisy_overflow_: the noisy count of records beyond the horizon; nan for the other mechanisms.

    Raises:
        ValueError: by ``fit``: an argument is missing, unknown or out of its range, or the records are not as ``fit`` says.

    Warns:
        UserWarning: by ``fit``: a seed was given; the object was fitted before (budgets add up); the mechanism is "index_scaled"
            (with its true epsilon); nothing could be published under ``min_at_risk``.

    Example::

        km = DPKaplanMeier(epsilon=1.0, horizon=900, bins=20).fit(durations, event_observed)
        km.survival_function_, km.median_survival_time_, km.privacy_.statement
    """

    def __init__(
        self,
        epsilon: float,
        horizon: float | None = None,
        bins: int = 10,
        edges: ArrayLike | None = None,
        mechanism: Literal["histogram", "curve", "index_scaled"] = "histogram",
        neighbors: Literal["add_remove", "replace"] = "add_remove",
        noise: Literal["discrete_laplace", "laplace", "gaussian"] = "discrete_laplace",
        delta: float | None = None,
        tie: Literal["actuarial", "end"] = "actuarial",
        random_state: int | np.random.Generator | np.random.RandomState | None = None,
        min_at_risk: int | None = None,
        candidate_times: Sequence[float] | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.horizon = horizon
        self.bins = bins
        self.edges = edges
        self.mechanism = mechanism
        self.neighbors = neighbors
        self.noise = noise
        self.delta = delta
        self.tie = tie
        self.random_state = random_state
        self.min_at_risk = min_at_risk
        self.candidate_times = candidate_times

    def fit(
        self, durations: ArrayLike, event_observed: ArrayLike | None = None, *, entry: Any = None, weights: Any = None
    ) -> DPKaplanMeier:
        """Spends ``epsilon`` on the records and keeps what it bought.

        Args:
            durations: (n,) times >= 0, n >= 1; those beyond the horizon count as at risk throughout.
            event_observed: (n,) 1 or True for an event, 0 or False for a censoring; all events when None.
            entry: not supported: a late entry changes more than one count.
            weights: not supported: a weight is how much one record may change the counts.

        Returns:
            The estimator itself.
        """
        for name, given in (("entry", entry), ("weights", weights)):
            if given is not None:
                raise UsageError(f"{name} is not supported: one record must change one count, by 1; give one row per record")
        plan = self._plan()
        t, e = _records(durations, event_observed)
        if hasattr(self, "privacy_"):
            warnings.warn("fitted again: on the same records the budgets of all fits add up", stacklevel=2)
        elif self.random_state is not None:
            warnings.warn("a known seed voids privacy: leave random_state out for a release", stacklevel=2)
        if not plan.privacy.proven:
            warnings.warn(plan.privacy.statement, stacklevel=2)
        noisy, curves = plan.release(t, e, 1, self._coins())
        cells, S = noisy[0], curves[0]
        self._noise, self._tie, m = plan.noise, plan.tie, len(plan.edges) - 1
        self.privacy_ = plan.privacy
        self.noisy_overflow_ = float(cells[-1]) if self.mechanism == "histogram" else math.nan
        index = pd.Index(plan.edges[1:], name="timeline")
        if self.mechanism == "histogram":
            columns = {"events": cells[:m], "censored": cells[m:-1], "at_risk": _life_table(cells)[2]}
            self.noisy_table_ = pd.DataFrame(columns, index=index)
        else:
            self.noisy_table_ = pd.DataFrame({"survival": cells}, index=index).dropna()
        shown = ~np.isnan(S)
        if not shown.any():
            warnings.warn("too few at risk at every candidate time: nothing but S(0) = 1 is published", stacklevel=2)
        self.timeline = np.concatenate([[0.0], plan.edges[1:][shown]])
        self.survival_function_ = self._frame({LABEL: np.concatenate([[1.0], S[shown]])})
        if self.mechanism == "histogram":
            self.confidence_interval_ = self.confidence_band()
        below = np.flatnonzero(self.survival_function_[LABEL].to_numpy() <= 0.5)
        self.median_survival_time_ = float(self.timeline[below[0]]) if below.size else math.inf
        return self

    def predict(self, times: float | ArrayLike) -> float | pd.Series:
        """Returns S at ``times``, as a step function: the value at the last edge not after each time.

        Args:
            times: a time or an array of them; beyond the last edge S keeps its last value, before 0 it is nan.

        Returns:
            A float for a single time, else a Series indexed by ``times``.
        """
        check_is_fitted(self)
        at = np.asarray(times, dtype=float)
        i = np.searchsorted(self.timeline, at, side="right")
        S = np.concatenate([[math.nan], self.survival_function_[LABEL]])[np.where(np.isnan(at), 0, i)]
        return float(S) if at.ndim == 0 else pd.Series(S.ravel(), index=at.ravel(), name=LABEL)

    def confidence_band(
        self,
        alpha: float = 0.05,
        method: Literal["greenwood", "bootstrap"] = "greenwood",
        draws: int = 1000,
        random_state: int | np.random.Generator | None = None,
    ) -> pd.DataFrame:
        """Returns an approximate pointwise band for the population's curve; costs no budget.

        Both count the sampling of the records and the noise that was added to their counts, neither the binning. Asked for 0.95
        on 228 simulated records in 10 bins, both covered 0.92 to 0.97 at epsilon = 1; at 0.3 Greenwood's covered 0.95 to 0.99
        and the bootstrap, which starts from counts clipped at 0, 0.87 to 0.96.

        Args:
            alpha: one minus the coverage.
            method: "greenwood" is Greenwood's variance of the noisy counts plus the noise's own, to first order, on the log-log
                scale; "bootstrap" draws counts around the noisy ones, adds fresh noise and computes the curve again.
            draws: bootstrap draws.
            random_state: of the bootstrap.

        Returns:
            DataFrame indexed by ``timeline`` with columns ``approximate_lower_<coverage>`` and ``approximate_upper_<coverage>``.

        Raises:
            ValueError: ``alpha``, ``method`` or ``draws`` is out of its range, or the mechanism is not "histogram": a noisy
                curve does not tell how many records made it.
        """
        check_is_fitted(self)
        if "events" not in self.noisy_table_:
            raise UsageError(f"a confidence band needs mechanism='histogram', this was fitted with {self.privacy_.mechanism!r}")
        if not 0 < alpha < 1:
            raise UsageError(f"alpha must be in (0, 1), got {alpha}")
        if method not in ("bootstrap", "greenwood"):
            raise unknown("method", str(method), ("bootstrap", "greenwood"))
        if draws < 1:
            raise UsageError(f"draws must be >= 1, got {draws}")
        cells = np.concatenate([*self.noisy_table_[["events", "censored"]].to_numpy().T, [self.noisy_overflow_]])
        S = self.survival_function_[LABEL].to_numpy()[1:]
        if method == "greenwood":
            low, high = _greenwood(cells, S, self._noise.variance, self._tie, alpha)
        else:
            rng = np.random.default_rng(random_state)
            resampled = rng.poisson(cells.clip(0), (draws, cells.size)).astype(float)
            curves = _survival(self._noise.add(resampled, _Coins(rng.bytes)), self._tie)
            low, high = np.quantile(curves, [alpha / 2, 1 - alpha / 2], axis=0)
        names = [f"approximate_{side}_{1 - alpha:g}" for side in ("lower", "upper")]
        return self._frame({name: np.concatenate([[1.0], bound]) for name, bound in zip(names, (low, high), strict=True)})

    def _frame(self, columns: dict[str, Floats]) -> pd.DataFrame:
        return pd.DataFrame(columns, index=pd.Index(self.timeline, name="timeline"))

    def _coins(self) -> _Coins:
        seed = self.random_state
        if seed is None:
            return _Coins(secrets.token_bytes)
        return _Coins(seed.bytes if isinstance(seed, np.random.RandomState) else np.random.default_rng(seed).bytes)

    def _plan(self) -> _Plan:
        """Checks the arguments and sets the noise for them."""
        for name, given, accepted in (
            ("mechanism", self.mechanism, ("histogram", "curve", "index_scaled")),
            ("neighbors", self.neighbors, tuple(UNITS)),
            ("noise", self.noise, ("discrete_laplace", "laplace", "gaussian")),
            ("tie", self.tie, ("actuarial", "end")),
        ):
            if given not in accepted:
                raise unknown(name, str(given), accepted)
        if not self.epsilon > 0:
            raise UsageError(f"epsilon must be > 0, got {self.epsilon}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise UsageError(f"delta must be in (0, 1), got {self.delta}")
        if self.delta is None and (self.noise == "gaussian" or self.min_at_risk is not None):
            raise UsageError("gaussian noise and min_at_risk need delta in (0, 1), got None")
        edges = _edges(self.horizon, self.bins, self.edges)
        if self.mechanism != "curve" and (self.min_at_risk is not None or self.candidate_times is not None):
            raise UsageError(f"min_at_risk and candidate_times are for mechanism='curve', got {self.mechanism!r}")
        plans = {"histogram": self._plan_histogram, "curve": self._plan_curve, "index_scaled": self._plan_index_scaled}
        plan = plans[self.mechanism](edges)
        return replace(plan, noise=_Noise()) if math.isinf(self.epsilon) else plan

    def _plan_histogram(self, edges: Floats) -> _Plan:
        cells = {"add_remove": 1, "replace": 2}[self.neighbors]  # that one record changes, each by 1: Delta_1 = Delta_2^2 = cells
        how = f"{2 * len(edges) - 1} disjoint counts, of which {UNITS[self.neighbors]} changes {cells}, each by 1"
        if self.noise == "gaussian":
            noise = _Noise.gaussian(1.0, cells / (2 * _rho(self.epsilon, self.delta)))
        else:
            step = 1.0 if self.noise == "discrete_laplace" else _step(cells / self.epsilon, 2**16)
            noise = _Noise.laplace(step, [_fraction(self.epsilon) * Fraction(step) / cells])
        return _Plan(edges, noise, self._privacy(how), self.tie)

    def _plan_curve(self, edges: Floats) -> _Plan:
        if self.min_at_risk is None:
            if self.candidate_times is not None:
                raise UsageError("candidate_times without min_at_risk: give both or neither")
            m = len(edges) - 1
            how = f"{m} values of S, each of sensitivity 1, which is reached when all others are censored early"
            return _Plan(edges, self._curve_noise(m, 1.0, _fraction(self.epsilon), self.delta), self._privacy(how))
        k0, times = self.min_at_risk, np.unique([] if self.candidate_times is None else self.candidate_times)
        if k0 < 1:
            raise UsageError(f"min_at_risk must be >= 1, got {k0}")
        if not times.size or not (times >= edges[1]).all() or not (times <= edges[-1]).all():
            raise UsageError(
                f"candidate_times must be public times between {edges[1]:g} and {edges[-1]:g}, got {self.candidate_times}"
            )
        edges = edges[edges <= times[-1]]
        m, epsilon_1 = len(edges) - 1, TEST_SHARE * _fraction(self.epsilon)
        delta = float(self.delta or 0) / (2 if self.noise == "gaussian" else 1)
        test = _Test(times, _Noise.laplace(1.0, [epsilon_1 / times.size]), k0, delta / times.size)
        noise = self._curve_noise(m, 1 / (1 + k0), _fraction(self.epsilon) - epsilon_1, delta)
        how = f"a test of {times.size} numbers at risk, then up to {m} values of S, each of sensitivity 1/{1 + k0}"
        return _Plan(edges, noise, self._privacy(how, float(self.delta or 0)), test=test)

    def _plan_index_scaled(self, edges: Floats) -> _Plan:
        if self.noise == "gaussian":
            raise UsageError("mechanism='index_scaled' is a recipe for Laplace noise, got noise='gaussian'")
        m = len(edges) - 1
        step = _step(1 / (self.epsilon * m), 2**16)
        epsilon, units = _fraction(self.epsilon), _units(1.0, step)
        noise = _Noise.laplace(step, [epsilon * (i + 1) / units for i in range(m)])  # b_i = 1/(epsilon (i+1))
        total = self.epsilon * m * (m + 1) / 2  # sum_i Delta_i / b_i with Delta_i = 1
        statement = (
            f"NOT {self.epsilon:g}-differentially private: noise of scale 1/({self.epsilon:g} i) on the i-th of {m} values of S, "
            f"each of sensitivity 1, composes to epsilon = {total:g} ({UNITS[self.neighbors]}), "
            "and to no guarantee at all if the grid was made from the data"
        )
        return _Plan(edges, noise, Privacy(total, 0.0, UNITS[self.neighbors], "index_scaled", False, statement), smooth=True)

    def _curve_noise(self, m: int, sensitivity: float, epsilon: Fraction, delta: float | None) -> _Noise:
        if self.noise == "gaussian":
            rho = _rho(float(epsilon), delta)
            step = _step(sensitivity * math.sqrt(m / (2 * rho)), 2**9)
            return _Noise.gaussian(step, m * _units(sensitivity, step) ** 2 / (2 * rho))
        step = _step(m * sensitivity / float(epsilon), 2**16)
        return _Noise.laplace(step, [epsilon / (m * _units(sensitivity, step))])  # b = m Delta / epsilon

    def _privacy(self, how: str, delta: float = 0.0) -> Privacy:
        unit = UNITS[self.neighbors]
        if math.isinf(self.epsilon):
            return Privacy(math.inf, 0.0, unit, self.mechanism, False, "no noise, no privacy: epsilon is infinite")
        delta = float(self.delta or 0) if self.noise == "gaussian" else delta
        name = f"({self.epsilon:g}, {delta:g})" if delta else f"{self.epsilon:g}"
        statement = f"{name}-differentially private for the whole curve ({unit}): {how}; all after the noise is post-processing"
        if self.random_state is not None:
            statement += "; void for whoever knows the random_state"
        return Privacy(float(self.epsilon), delta, unit, self.mechanism, True, statement)


def audit_epsilon(
    mechanism: DPKaplanMeier | Callable[[Any], float | ArrayLike],
    D: Any,
    D2: Any,
    n: int = 20_000,
    *,
    delta: float = 0.0,
    alpha: float = 0.05,
) -> float:
    r"""Returns a lower bound on the epsilon that a mechanism really has, from its outcomes on two neighbouring data sets.

    For every event A, :math:`\varepsilon \ge \ln((P[M(D) \in A] - \delta) / P[M(D') \in A])`. The events are thresholds on one
    coordinate of the outcome; the best one is chosen on n/2 runs of their own, and n more runs of each data set bound its two
    probabilities (Clopper-Pearson). A bound above the nominal epsilon refutes it; one below it proves nothing.

    Args:
        mechanism: an unfitted ``DPKaplanMeier`` (its outcome is the curve at the edges), or a function that takes a data set and
            returns a number or a vector, with fresh noise at every call.
        D: a data set, as the function takes it; (durations, event_observed) for an estimator.
        D2: its neighbour.
        n: runs per data set that decide.
        delta: the delta of the guarantee that is audited.
        alpha: probability that the bound is too high.

    Returns:
        The bound, >= 0; no more than about ln(n / ln(2 / alpha)) can be seen in n runs.

    Raises:
        ValueError: ``n`` is below 1, or ``alpha`` or ``delta`` is out of its range.
    """
    if n < 1:
        raise UsageError(f"n must be >= 1, got {n}")
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must be in (0, 1), got {alpha}")
    if not 0 <= delta < 1:
        raise UsageError(f"delta must be in [0, 1), got {delta}")
    first = max(n // 2, 1)
    if isinstance(mechanism, DPKaplanMeier):
        plan, coins = mechanism._plan(), mechanism._coins()
        X, Y = (plan.release(*_records(*data), first + n, coins)[1] for data in (D, D2))
    else:
        X, Y = (np.array([mechanism(data) for _ in range(first + n)], dtype=float).reshape(first + n, -1) for data in (D, D2))
    X, Y = np.nan_to_num(X, nan=-1.0), np.nan_to_num(Y, nan=-1.0)  # nan: a value that was not published

    def bounds(column: int, thresholds: Floats, rows: slice) -> Floats:
        """The bound of each of four events, (4, thresholds)."""
        x, y = np.sort(X[rows, column]), np.sort(Y[rows, column])
        a, b = np.searchsorted(x, thresholds, side="right"), np.searchsorted(y, thresholds, side="right")
        size = len(x)
        hits = [(a, b), (b, a), (size - a, size - b), (size - b, size - a)]
        return np.stack([_log_ratio(p, q, size, delta, alpha) for p, q in hits])

    best, event, where = -math.inf, 0, (0, 0.0)
    for column in range(X.shape[1]):
        pooled = np.unique(np.concatenate([X[:first, column], Y[:first, column]]))
        thresholds = pooled[np.unique(np.linspace(0, pooled.size - 1, 256).astype(int))]
        scores = bounds(column, thresholds, slice(first))
        if scores.max() > best:
            best, plateau = scores.max(), np.flatnonzero(scores == scores.max())
            event, i = divmod(int(plateau[plateau.size // 2]), thresholds.size)
            where = column, thresholds[i]
    column, threshold = where
    return max(0.0, float(bounds(column, np.array([threshold]), slice(first, None))[event, 0]))


def _log_ratio(hits: NDArray[np.int_], misses: NDArray[np.int_], n: int, delta: float, alpha: float) -> Floats:
    """Clopper-Pearson: ln((lower - delta) / upper), each end at alpha / 2."""
    from scipy.special import betaincinv

    lower = np.where(hits > 0, betaincinv(np.maximum(hits, 1), n - hits + 1, alpha / 2), 0.0) - delta
    upper = np.where(misses < n, betaincinv(misses + 1, np.maximum(n - misses, 1), 1 - alpha / 2), 1.0)
    return np.log(np.maximum(lower, 1e-300) / upper)


# The release -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How one release is made; depends on public values alone."""

    edges: Floats
    noise: _Noise
    privacy: Privacy
    tie: str = ""
    test: _Test | None = None
    smooth: bool = False

    def release(self, t: Floats, e: NDArray[np.bool_], size: int, coins: _Coins) -> tuple[Floats, Floats]:
        """Returns ``size`` noisy answers (size, 2m + 1 or m) and the curves at b_1, ..., b_m made of them (size, m)."""
        if self.privacy.mechanism == "histogram":
            cells = np.broadcast_to(_count(t, e, self.edges), (size, 2 * len(self.edges) - 1))
            noisy = self.noise.add(cells, coins)
            return noisy, _survival(noisy, self.tie)
        m = len(self.edges) - 1
        noisy = self.noise.add(np.broadcast_to(_kaplan_meier(t, e, self.edges[1:]), (size, m)), coins)
        if self.test is not None:
            noisy[self.edges[1:] > self.test.last(t, size, coins)[:, None]] = np.nan
        S = np.minimum.accumulate(noisy.clip(0, 1), axis=1)
        if self.smooth:  # moving average of width 3
            padded = np.pad(S, ((0, 0), (1, 1)), mode="edge")
            S = np.minimum.accumulate((padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3, axis=1)
        return noisy, S


@dataclass(frozen=True)
class _Test:
    """Finds the last candidate time with more than ``k0`` records beyond it; wrong about one with probability ``delta``."""

    times: Floats
    noise: _Noise
    k0: int
    delta: float

    def last(self, t: Floats, size: int, coins: _Coins) -> Floats:
        """Returns the time of each of ``size`` runs; -inf for none."""
        beyond = len(t) - np.searchsorted(np.sort(t), self.times, side="right").astype(float)
        noisy = self.noise.add(np.broadcast_to(beyond, (size, self.times.size)), coins)
        return np.where(noisy >= self.k0 + self.margin, self.times, -np.inf).max(axis=1)

    @property
    def margin(self) -> int:
        """The least x with P[noise >= x] = q^x / (1 + q) <= delta."""
        assert self.noise.rates is not None
        rate = self.noise.rates[0] / _Coins.ONE
        return math.floor(-math.log(self.delta * (1 + math.exp(-rate))) / rate) + 1


def _records(durations: ArrayLike, event_observed: ArrayLike | None) -> tuple[Floats, NDArray[np.bool_]]:
    t = np.asarray(durations, dtype=float)
    e = np.ones(t.shape) if event_observed is None else np.asarray(event_observed, dtype=float)
    for name, values in (("durations", t), ("event_observed", e)):
        if values.ndim != 1:
            raise UsageError(f"{name} must have one dimension, got shape {values.shape}")
    if len(t) != len(e):
        raise UsageError(f"durations and event_observed must have the same length, got {len(t)} and {len(e)}")
    if not len(t):
        raise UsageError("durations is empty: at least one record is needed")
    if not (t.min() >= 0 and t.max() < math.inf):
        raise UsageError("durations must be finite and >= 0")
    events = e == 1
    if not (events | (e == 0)).all():
        raise UsageError("event_observed must be 1 or True (event) or 0 or False (censored)")
    return t, events


def _edges(horizon: float | None, bins: int, edges: ArrayLike | None) -> Floats:
    if edges is None:
        if horizon is None:
            raise UsageError("horizon must be given and must not be computed from the data")
        if not 0 < horizon < math.inf:
            raise UsageError(f"horizon must be a finite number > 0, got {horizon}")
        if not isinstance(bins, (int, np.integer)) or bins < 1:
            raise UsageError(f"bins must be an integer >= 1, got {bins!r}")
        return np.linspace(0.0, horizon, int(bins) + 1)
    given = np.array(edges, dtype=float)
    if given.ndim != 1 or given.size < 2 or given[0] != 0 or not (np.diff(given) > 0).all() or not math.isfinite(given[-1]):
        raise UsageError("edges must be 0 = b_0 < b_1 < ... < b_m, finite, and must not be computed from the data")
    if horizon is not None and horizon != given[-1]:
        raise UsageError(f"horizon and edges disagree: {horizon} and a last edge of {given[-1]}; give one of them")
    return given


def _count(t: Floats, e: NDArray[np.bool_], edges: Floats) -> Floats:
    """The 2m + 1 cells: d_i and c_i on (b_{i-1}, b_i], then the number beyond b_m."""
    m = len(edges) - 1
    bin_ = np.searchsorted(edges[1:], t, side="left")
    counts = np.bincount(bin_ + (m + 1) * ~e, minlength=2 * (m + 1)).astype(float)
    return np.concatenate([counts[:m], counts[m + 1 : -1], [counts[m] + counts[-1]]])


def _life_table(cells: Floats) -> tuple[Floats, Floats, Floats]:
    """d_i, c_i and n_i = sum_{k >= i} (d_k + c_k) + o of cells (..., 2m + 1), clipped at 0."""
    m = cells.shape[-1] // 2
    cells = cells.clip(0)
    d, c, o = cells[..., :m], cells[..., m:-1], cells[..., -1:]
    return d, c, (d + c)[..., ::-1].cumsum(-1)[..., ::-1] + o


def _survival(cells: Floats, tie: str) -> Floats:
    """S_i = prod_{k <= i} (1 - h_k) with h = d / (n - c/2), or d / n, of cells (..., 2m + 1)."""
    d, c, n = _life_table(cells)
    exposed = n - c / 2 if tie == "actuarial" else n
    h = np.divide(d, exposed, out=np.zeros_like(d), where=exposed > 0)  # in [0, 1]: n >= d + c
    return (1 - h).cumprod(-1)


def _kaplan_meier(t: Floats, e: NDArray[np.bool_], times: Floats) -> Floats:
    """S(t) = prod_{u <= t} (1 - d_u / n_u) at ``times``; not private."""
    distinct, which = np.unique(t, return_inverse=True)
    d, exits = np.bincount(which, weights=e), np.bincount(which)
    S = (1 - d / exits[::-1].cumsum()[::-1]).cumprod()
    return np.concatenate([[1.0], S])[np.searchsorted(distinct, times, side="right")]


def _greenwood(cells: Floats, S: Floats, noise: float, tie: str, alpha: float) -> tuple[Floats, Floats]:
    """Bounds S^exp(+-z sd), sd that of ln(-ln S) by the delta method: Greenwood's variance and the noise in every cell."""
    from scipy.special import ndtri

    d, c, n = _life_table(cells)
    half = 0.5 if tie == "actuarial" else 0.0
    exposed = n - half * c
    left = np.maximum(exposed - d, 1.0)
    a = d / (np.maximum(exposed, 1.0) * left)  # Greenwood's term, and the derivative of ln(1 - h) by the number exposed
    upto = np.tri(len(S))  # [i, j]: j <= i
    shared = np.minimum.outer(np.arange(len(S)), np.arange(len(S)))
    A = a.cumsum()[shared]  # sum of a_k over k <= min(i, j)
    gradients = np.concatenate([A - upto / left, A - half * upto * a, a.cumsum()[:, None]], axis=1)  # of ln S_i by d_j, c_j, o
    variance = a.cumsum() + noise * (gradients**2).sum(1)
    inner = (S > 0) & (S < 1)
    log = np.log(np.where(inner, S, 0.5))
    spread = np.exp(ndtri(1 - alpha / 2) * np.sqrt(variance) / -log)
    bounds = np.exp(log * spread), np.exp(log / spread)
    plain = ndtri(1 - alpha / 2) * np.sqrt(variance)  # where S is 0 or 1 there is no log-log scale
    return np.where(inner, bounds[0], np.clip(S - plain, 0, 1)), np.where(inner, bounds[1], np.clip(S + plain, 0, 1))


# Budgets and noise -----------------------------------------------------------------------------------------------------


def _rho(epsilon: float, delta: float | None) -> float:
    """The rho of zCDP with epsilon = rho + 2 sqrt(rho ln(1/delta))."""
    log = math.log(1 / (delta or 1))
    return math.inf if math.isinf(epsilon) else (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2


def _fraction(epsilon: float) -> Fraction:
    return Fraction(float(epsilon)) if math.isfinite(epsilon) else Fraction(2**200)


def _step(scale: float, fine: int) -> float:
    """A power of two, at most 1 and at most ``scale / fine``."""
    return 1.0 if scale == 0 else min(1.0, 2.0 ** math.floor(math.log2(scale / fine)))


def _units(sensitivity: float, step: float) -> int:
    """The sensitivity of a value rounded to multiples of ``step``, in steps; one more than that for the rounding of S itself."""
    return math.ceil(sensitivity / step) + 1


@dataclass(frozen=True)
class _Noise:
    """Noise on multiples of ``step``: P(k steps) ~ exp(-|k| rate / 2^40), or ~ exp(-k^2 denominator / (2 numerator)), or none."""

    step: float = 0.0
    rates: tuple[int, ...] | None = None
    square: tuple[int, int] | None = None

    @classmethod
    def laplace(cls, step: float, rates: Sequence[Fraction]) -> _Noise:
        """Discrete Laplace noise with one rate per step for all values or one for each, rounded down."""
        whole = tuple(min(int(rate * _Coins.ONE), 2**62) for rate in rates)
        if min(whole) < 1:
            raise UsageError(
                f"epsilon is too small for exact noise: it leaves {float(min(rates)):.3g} per unit, at least 2^-40 is needed"
            )
        return cls(step, rates=whole)

    @classmethod
    def gaussian(cls, step: float, square: float) -> _Noise:
        """Discrete Gaussian noise of variance ``square`` in steps, rounded up."""
        if square > 2**22:
            raise UsageError(
                f"epsilon is too small for gaussian noise: its deviation would be {math.sqrt(square):.3g}, 2048 at most"
            )
        denominator = 2 ** max(0, 20 - math.floor(math.log2(max(square, 1.0))))
        return cls(step, square=(math.floor(square * denominator) + 1, denominator))

    def add(self, values: Floats, coins: _Coins) -> Floats:
        """Returns ``values`` (runs, k), rounded to steps, plus noise."""
        if not self.step:
            return values.copy()
        if self.square is not None:
            noise = coins.gaussian(*self.square, values.size).reshape(values.shape)
        else:
            noise = coins.laplace(np.broadcast_to(np.array(self.rates), values.shape))
        return np.asarray((np.rint(values / self.step) + noise) * self.step, dtype=np.float64)

    @property
    def variance(self) -> float:
        """Of the noise in one value (the first, where they differ)."""
        if self.square is not None:
            return self.square[0] / self.square[1] * self.step**2
        if self.rates is None:
            return 0.0
        q = math.exp(-self.rates[0] / _Coins.ONE)
        return 2 * q / (1 - q) ** 2 * self.step**2


class _Coins:
    """Exact draws from random bytes: integers only, no logarithm and no floating point.

    Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010, algorithms
    1 to 3, over whole arrays: draws that a scalar loop would make one at a time are made for all that still need one.
    """

    ONE = 2**40  # rates are multiples of 1/ONE

    def __init__(self, source: Callable[[int], bytes]) -> None:
        self.source = source

    def words(self, size: int) -> NDArray[np.uint64]:
        """Uniform 64-bit words."""
        return np.frombuffer(self.source(8 * size), dtype="<u8")

    def below(self, high: int, size: int) -> NDArray[np.uint64]:
        """Uniform on {0, ..., high - 1}, 1 <= high < 2^64."""
        words, last = self.words(size), np.uint64(2**64 - 1 - 2**64 % high)
        while (biased := np.flatnonzero(words > last)).size:
            words = words.copy()
            words[biased] = self.words(biased.size)
        return words % np.uint64(high)

    def exp(self, numerators: NDArray[np.uint64], denominator: int) -> NDArray[np.bool_]:
        """True with probability exp(-numerator / denominator), 0 <= numerator <= denominator (algorithm 1)."""
        odd, alive, k = np.ones(len(numerators), dtype=bool), np.arange(len(numerators)), 1
        while alive.size:  # the least k at which a coin of probability numerator / (denominator k) fails is odd
            alive = alive[self.below(denominator * k, alive.size) < numerators[alive]]
            odd[alive] ^= True
            k += 1
        return odd

    def runs(self, size: int) -> NDArray[np.int64]:
        """P(V >= v) = exp(-v): the lengths of the runs of heads in one sequence of exp(-1) coins."""
        tails, length = np.empty(0, dtype=np.int64), 0
        while tails.size < size:
            coins = self.exp(np.ones(int(1.7 * (size - tails.size)) + 32, dtype=np.uint64), 1)
            tails = np.concatenate([tails, length + np.flatnonzero(~coins)])
            length += coins.size
        return np.diff(tails[:size], prepend=-1) - 1

    def geometric(self, size: int) -> NDArray[np.int64]:
        """P(X >= x) = exp(-x / ONE): X = U + ONE V, U uniform and kept with probability exp(-U / ONE) (algorithm 2)."""
        kept = np.empty(0, dtype=np.uint64)
        while kept.size < size:
            u = self.below(self.ONE, int(1.7 * (size - kept.size)) + 32)
            kept = np.concatenate([kept, u[self.exp(u, self.ONE)]])
        return kept[:size].astype(np.int64) + self.ONE * self.runs(size)

    def laplace(self, rates: NDArray[np.int64]) -> NDArray[np.int64]:
        """P(k) ~ exp(-|k| rate / ONE): the difference of two geometrics X // rate."""
        x = self.geometric(2 * rates.size).reshape(2, *rates.shape) // rates
        return x[0] - x[1]

    def gaussian(self, numerator: int, denominator: int, size: int) -> NDArray[np.int64]:
        """P(k) ~ exp(-k^2 / (2 s)), s = numerator / denominator, from Laplace noise of scale t near sqrt(s) (algorithm 3)."""
        t = 2 ** max(0, round(math.log2(numerator / denominator) / 2))
        below = 2 * numerator * denominator * t * t
        kept = np.empty(0, dtype=np.int64)
        while kept.size < size:
            y = self.laplace(np.full(2 * (size - kept.size) + 32, self.ONE // t))
            above = (np.abs(y) * (t * denominator) - numerator) ** 2  # exponent (|y| - s/t)^2 / (2 s) = above / below
            kept = np.concatenate(
                [kept, y[(self.runs(y.size) >= above // below) & self.exp((above % below).astype(np.uint64), below)]]
            )
        return kept[:size]

"""What a study gave: one table of trials, the summary per arm, the verdicts, the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from weightroom.errors import UsageError, unknown
from weightroom.study.core import COSTS, Arm, Study
from weightroom.study.expect import Claim
from weightroom.study.stats import Sample, Verdict, decide, interval, looks, overall
from weightroom.study.store import Outcome, TrialKey

__all__ = ["Entry", "Results", "check_report"]


def check_report(path: str | Path) -> Path:
    """Returns the path of a report after making its folder and seeing that it can be written.

    Raises:
        UsageError: it does not end in ``.html``, or cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"report must be a path that ends in .html, got {str(path)!r}")
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"report {path} cannot be written ({error.strerror}): choose another path") from error
    if new:
        path.unlink()
    return path


#: Level of the intervals in tables, each on its own (verdicts share their error rate).
LEVEL = 0.95


@dataclass(frozen=True)
class Entry:
    """A trial's place in a study: ``variant`` is "common", "tuned" or "search"."""

    variant: str
    key: TrialKey


@dataclass
class Results:
    """The results of a study.

    Args:
        study: what was run.
        entries: every trial, in the order of the plan.
        outcomes: fingerprint -> outcome of those that have ended.
        chosen: (arm, setting) -> hyper-parameters that tuning chose.
        folder: of the store.
        environment: versions, machine, how it was run.
    """

    study: Study
    entries: Sequence[Entry]
    outcomes: Mapping[str, Outcome]
    chosen: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    folder: Path = Path("runs")
    environment: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per trial.

        Columns: study, arm, setting, seed, variant, split, scale, status, reason, fingerprint, one for each hyper-parameter
        (``param.<name>``), each metric, and each cost.
        """
        rows = []
        for entry in self.entries:
            key, outcome = entry.key, self.outcomes.get(entry.key.fingerprint)
            row: dict[str, Any] = {
                "study": key.study, "arm": key.arm, "setting": key.setting, "seed": key.seed, "variant": entry.variant, "split": key.split,
                "scale": key.scale, "status": outcome.status if outcome else "missing", "reason": outcome.reason if outcome else "",
                "fingerprint": key.fingerprint, **{f"param.{name}": value for name, value in key.params.items()},
            }  # fmt: skip
            row |= {**outcome.metrics, **outcome.costs} if outcome else {}
            rows.append(row)
        return pd.DataFrame(rows).reindex(columns=self._columns(rows))

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return int((self.frame.status == "failed").sum())

    @property
    def missing(self) -> int:
        """Trials that have not been run (after an interruption)."""
        return int((self.frame.status == "missing").sum())

    @property
    def tuned(self) -> bool:
        """Whether the study has tuned trials."""
        return self.study.tune > 0

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One verdict per claim of the study."""
        claims = self.study.claims
        if not claims:
            return []
        seeds = self._seeds()
        at = looks(len(cast(Sequence[int], self.study.seeds)), self.study.max_seeds)
        decisions = decide([self._sample(claim, seeds) for claim in claims], self.study.alpha, at)
        return [
            Verdict(
                statement=claim.says, verdict=d.verdict, difference=d.mean, interval=d.interval, n=d.n, level=d.level, p=d.p, reason=d.reason,
                region=(claim.expect.low, claim.expect.high), arm=claim.expect.arm, other=claim.expect.other,
                metric=claim.expect.metric or self.study.metric, setting=self.study.setting_of(claim.expect), tuned=claim.expect.tuned,
                study=self.study.name,
            )
            for claim, d in zip(claims, decisions, strict=True)
        ]  # fmt: skip

    @property
    def verdict(self) -> str:
        """One word for all claims: fails if one fails, holds if all hold, else inconclusive."""
        return overall([v.verdict for v in self.verdicts])

    def values(self, arm: str, metric: str | None = None, setting: str | None = None, variant: str = "common") -> pd.Series:
        """The values of a metric or cost, indexed by seed, of the trials that are done."""
        metric = self.study.metric if metric is None else metric
        setting = next(iter(self.study.settings)) if setting is None else setting
        if arm not in self.study.arms:
            raise unknown("arm", arm, self.study.arms)
        if setting not in self.study.settings:
            raise unknown("setting", setting, self.study.settings)
        if metric not in self.frame and metric not in {*self.study.metrics, *COSTS}:
            raise unknown("metric", metric, {*self.study.metrics, *COSTS})
        rows = self._done.get((variant, arm, setting))
        return pd.Series(dtype=float) if rows is None or metric not in rows else rows[metric].dropna()

    def table(self, setting: str | None = None, metric: str | None = None, variant: str = "common") -> pd.DataFrame:
        """The arms under one setting, best first.

        Columns: rank, arm, mean, low, high (the interval of the mean), difference, difference_low, difference_high (paired to the
        baseline; positive is better), n, failed, and the mean of every cost that was measured.
        """
        metric = self.study.metric if metric is None else metric
        direction = self.direction(metric)
        baseline = self.values(str(self.study.baseline), metric, setting, variant)
        costs = [cost for cost in COSTS if cost in self.frame and cost != metric]
        rows = []
        for arm in self.study.arms:
            values = self.values(arm, metric, setting, variant)
            low, high = interval(values.to_numpy(), LEVEL)
            paired = (direction * (values - baseline)).dropna() if arm != self.study.baseline else pd.Series(dtype=float)
            bounds = interval(paired.to_numpy(), LEVEL)
            group = self._groups.get((variant, arm, next(iter(self.study.settings)) if setting is None else setting))
            rows.append(
                {
                    "arm": arm, "mean": _mean(values), "low": low, "high": high, "difference": _mean(paired), "difference_low": bounds[0],
                    "difference_high": bounds[1], "n": len(values), "failed": 0 if group is None else int((group.status == "failed").sum()),
                    **{cost: _mean(self.values(arm, cost, setting, variant)) for cost in costs},
                }
            )  # fmt: skip
        table = pd.DataFrame(rows).sort_values(
            "mean", ascending=direction < 0, kind="stable", na_position="last", ignore_index=True
        )
        table.insert(0, "rank", [i + 1 if not math.isnan(mean) else None for i, mean in enumerate(table["mean"])])
        return table

    def direction(self, metric: str) -> int:
        """+1 where a metric is better when higher, -1 where lower (as every cost is)."""
        return 1 if self.study.metrics.get(metric, "min") == "max" else -1

    def report(self, path: str | Path) -> Path:
        """Writes one self-contained HTML file, with the trials as CSV and Parquet beside it.

        Args:
            path: of the HTML file; its folder is made when it is not there.

        Raises:
            UsageError: the path does not end in ``.html``, or cannot be written.
        """
        from weightroom.study.report import write

        path = check_report(path)
        write(self, path)
        return path

    @cached_property
    def _groups(self) -> dict[tuple[str, str, str], pd.DataFrame]:
        return dict(list(self.frame.groupby(["variant", "arm", "setting"], sort=False)))  # type: ignore[arg-type]

    @cached_property
    def _done(self) -> dict[tuple[str, str, str], pd.DataFrame]:
        return {key: group.loc[group.status == "done"].set_index("seed") for key, group in self._groups.items()}

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        columns = dict.fromkeys(
            column for row in rows for column in row if column not in self.study.metrics and column not in COSTS
        )
        costs = [cost for cost in COSTS if any(cost in row for row in rows)]
        return [*columns, *self.study.metrics, *(cost for cost in costs if cost not in self.study.metrics)]

    def _seeds(self) -> list[int]:
        return list(dict.fromkeys(e.key.seed for e in self.entries if e.variant == "common"))

    def _sample(self, claim: Claim, seeds: list[int]) -> Sample:
        expect, variant = claim.expect, "tuned" if claim.expect.tuned else "common"
        metric, setting = expect.metric or self.study.metric, self.study.setting_of(expect)
        own = self.values(expect.arm, metric, setting, variant).reindex(seeds)
        exact = own.dropna().nunique() == 1
        values = own
        if expect.other is not None:
            other = self.values(expect.other, metric, setting, variant).reindex(seeds)
            values = self.direction(metric) * (own - other)
            exact = exact and other.dropna().nunique() == 1
        present = values.dropna()
        return Sample(
            present.tolist(), expect.low, expect.high, strict=expect.strict, every=expect.kind == "always",
            exact=exact or expect.other is None, missing=len(values) - len(present),
        )  # fmt: skip

    def parameters(self, arm: str, setting: str) -> dict[str, Any]:
        """The hyper-parameters of an arm's tuned trials."""
        fallback = self.study.arms[arm]
        return dict(self.chosen.get((arm, setting), fallback.defaults if isinstance(fallback, Arm) else {}))


def _mean(values: pd.Series) -> float:
    return float(np.mean(values)) if len(values) else math.nan

"""What a person sees while a study runs: a live table on stderr."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from weightroom.study.store import Outcome, TrialKey

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from weightroom.study.core import Study

__all__ = ["Progress", "open_progress"]


class Progress:
    """Counts trials; shows nothing."""

    def plan(self, keys: Sequence[TrialKey], known: Mapping[str, Outcome]) -> None:
        """A stage begins: all its trials, and the outcomes that the store has already."""

    def done(self, key: TrialKey, outcome: Outcome) -> None:
        """A trial has ended."""

    def tick(self) -> None:
        """Some time has passed."""


class _Table(Progress):
    def __init__(self, study: Study, live: Live) -> None:
        self.study, self.live = study, live
        self.planned: dict[str, TrialKey] = {}
        self.values: dict[tuple[str, str], list[float]] = {}
        self.counts: dict[str, list[int]] = {}
        self.stage, self.start, self.finished, self.fresh = "", time.monotonic(), 0, 0

    def plan(self, keys: Sequence[TrialKey], known: Mapping[str, Outcome]) -> None:
        self.stage = "tuning on the validation split" if keys and keys[0].split == "val" else "deciding"
        self.planned = {key.fingerprint: key for key in keys}
        self.values, self.counts, self.finished, self.fresh = {}, {name: [0, 0, 0] for name in self.study.arms}, 0, 0
        for key in keys:
            self.counts[key.arm][2] += 1
        self.start = time.monotonic()
        for fingerprint, outcome in known.items():
            self._count(self.planned[fingerprint], outcome)
        self.tick()

    def done(self, key: TrialKey, outcome: Outcome) -> None:
        self.fresh += 1
        self._count(key, outcome)
        self.tick()

    def tick(self) -> None:
        self.live.update(self._render())

    def _count(self, key: TrialKey, outcome: Outcome) -> None:
        self.finished += 1
        self.counts[key.arm][0 if outcome.status == "done" else 1] += 1
        if outcome.status == "done":
            self.values.setdefault((key.arm, key.setting), []).append(outcome.metrics[self.study.metric])

    def _render(self) -> RenderableType:
        from rich.table import Table

        total, spent = len(self.planned), time.monotonic() - self.start
        left = (
            f", about {_span(spent / self.fresh * (total - self.finished))} left" if self.fresh and self.finished < total else ""
        )
        settings = list(self.study.settings)
        shown = settings[-4:]
        more = f" (the last 4 of {len(settings)} settings)" if len(settings) > 4 else ""
        table = Table(
            title=f"{self.study.name}: {self.stage}, {self.finished} of {total} trials, {_span(spent)}{left}{more}", title_justify="left"
        )  # fmt: skip
        table.add_column("arm")
        table.add_column("trials", justify="right")
        for setting in shown:
            table.add_column(f"{self.study.metric} {setting}".strip(), justify="right")
        for arm, (good, bad, planned) in self.counts.items():
            means = [self.values.get((arm, setting), []) for setting in shown]
            cells = [f"{statistics.fmean(v):.4g}" if v else "" for v in means]
            table.add_row(arm, f"{good + bad}/{planned}" + (f" [red]{bad} failed[/]" if bad else ""), *cells)
        return table


@contextlib.contextmanager
def open_progress(study: Study, show: bool) -> Iterator[Progress]:
    """Shows a live table on stderr while the context is open, or nothing."""
    if not show:
        yield Progress()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        yield _Table(study, live)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

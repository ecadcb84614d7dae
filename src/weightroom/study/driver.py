"""The driver of a study: plans trials, runs what the store lacks, looks, goes on."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from weightroom.errors import UsageError
from weightroom.metrics import check_device
from weightroom.study.core import Arm, Study
from weightroom.study.engine import Engine, open_engine
from weightroom.study.fingerprint import fingerprint, versions
from weightroom.study.progress import Progress, open_progress
from weightroom.study.results import Entry, Results
from weightroom.study.stats import looks
from weightroom.study.store import Store, TrialKey
from weightroom.study.tuning import TUNING_SEED, propose
from weightroom.study.worker import Job, Parcel

__all__ = ["run_study"]

#: Seconds between two heartbeats of a driver.
BEAT = 15.0
#: Seconds between two looks at trials that another driver has claimed.
POLL = 0.5


def run_study(
    study: Study,
    store: str | Path,
    *,
    engine: str,
    workers: int | None,
    device: str,
    time_limit: float | None,
    memory_limit: int | None,
    retry_failed: bool,
    progress: bool | None,
) -> Results:
    """See ``Study.run``."""
    if memory_limit is not None and memory_limit < 1:
        raise UsageError(f"memory_limit must be > 0 bytes, got {memory_limit}")
    device = check_device(device)
    memory_limit = memory_limit if memory_limit is not None else _fair_memory(workers, device)
    with ExitStack() as stack:
        opened = stack.enter_context(Store(store))
        shown = stack.enter_context(open_progress(study, sys.stderr.isatty() if progress is None else progress))
        driver = _Driver(study, opened, shown, stack, engine, workers, device, time_limit, memory_limit, retry_failed)
        stack.callback(opened.release)
        return driver.run()


class _Driver:
    def __init__(
        self, study: Study, store: Store, progress: Progress, stack: ExitStack, engine: str, workers: int | None, device: str,
        time_limit: float | None, memory_limit: int | None, retry_failed: bool,
    ) -> None:  # fmt: skip
        self.study, self.store, self.progress, self.stack = study, store, progress, stack
        self.engine_name, self.workers, self.device, self.time_limit = engine, workers, device, time_limit
        self.memory_limit, self.retry_failed = memory_limit, retry_failed
        self.arms: dict[str, Arm] = dict(study.arms)  # type: ignore[arg-type]
        self.engine: Engine | None = None
        memo: dict[int, tuple[Any, bytes]] = {}
        self.digests = {name: fingerprint(arm.run, memo=memo) for name, arm in self.arms.items()}
        self.setting_digests = {name: fingerprint(value, memo=memo) for name, value in study.settings.items()}
        self.retried: set[str] = set()
        self.start = time.time()

    def run(self) -> Results:
        search: list[Entry] = []
        chosen: dict[tuple[str, str], dict[str, Any]] = {}
        if self.study.tune:
            search = [Entry("search", key) for key in self._search()]
            self._execute([e.key for e in search])
            chosen = self._choose(search)
        start: tuple[int, ...] = self.study.seeds  # type: ignore[assignment]
        for count in looks(len(start), self.study.max_seeds if self.study.claims else None):
            entries = self._decisive(_extend(start, count), chosen)
            self._execute([e.key for e in entries])
            results = self._results([*entries, *search], chosen)
            if all(v.verdict != "inconclusive" for v in results.verdicts):
                break
        return results

    def key(self, arm: str, setting: str, seed: int, split: str, params: Mapping[str, Any]) -> TrialKey:
        study = self.study
        decides = (
            study.name, arm, self.digests[arm], setting, self.setting_digests[setting], seed, split, dict(params), study.scale.value,
            self.device.partition(":")[0], versions(),
        )  # fmt: skip
        return TrialKey(study.name, arm, setting, seed, split, study.scale.value, dict(params), fingerprint(decides))

    def _decisive(self, seeds: Sequence[int], chosen: Mapping[tuple[str, str], dict[str, Any]]) -> list[Entry]:
        entries = []
        for seed in seeds:
            for setting in self.study.settings:
                for name, arm in self.arms.items():
                    entries.append(Entry("common", self.key(name, setting, seed, "test", arm.defaults)))
                    if self.study.tune:
                        entries.append(
                            Entry("tuned", self.key(name, setting, seed, "test", chosen.get((name, setting), dict(arm.defaults))))
                        )
        return entries

    def _search(self) -> list[TrialKey]:
        return [
            self.key(name, setting, TUNING_SEED, "val", params)
            for setting in self.study.settings
            for name, arm in self.arms.items()
            if arm.space
            for params in propose(arm.space, arm.defaults, self.study.tune)
        ]

    def _choose(self, search: Sequence[Entry]) -> dict[tuple[str, str], dict[str, Any]]:
        outcomes = self.store.outcomes(e.key.fingerprint for e in search)
        better = max if self.study.direction == "max" else min
        groups: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
        for entry in search:
            outcome = outcomes.get(entry.key.fingerprint)
            if outcome is not None and outcome.status == "done":
                group = groups.setdefault((entry.key.arm, entry.key.setting), [])
                group.append((outcome.metrics[self.study.metric], dict(entry.key.params)))
        return {where: better(group, key=lambda pair: pair[0])[1] for where, group in groups.items()}

    def _execute(self, keys: Sequence[TrialKey]) -> None:
        """Runs every trial that has no outcome yet; returns when all have one."""
        keys = list({key.fingerprint: key for key in keys}.values())
        known = self.store.status(key.fingerprint for key in keys)
        if self.retry_failed:
            again = {f for f, status in known.items() if status == "failed"} - self.retried
            self.store.forget_failed(again)
            self.retried |= again
            known = {f: status for f, status in known.items() if f not in again}
        self.progress.plan(keys, self.store.outcomes(f for f, s in known.items() if s != "running"))
        queue = [key for key in keys if known.get(key.fingerprint) not in ("done", "failed")]
        running: dict[str, TrialKey] = {}
        theirs: list[TrialKey] = []
        beat = time.monotonic()
        while queue or running or theirs:
            if not queue and not running:
                time.sleep(POLL)
                queue, theirs = theirs, []
            while queue and (self.engine is None or len(running) < self.engine.workers + 1):
                key = queue.pop(0)
                claim = self.store.claim(key, versions())
                if claim == "mine":
                    running[key.fingerprint] = key
                    self._engine().submit(Job(key.fingerprint, key.arm, key.setting, key.seed, key.split, key.params))
                elif claim == "theirs":
                    theirs.append(key)
                else:
                    self.progress.done(key, self.store.outcomes([key.fingerprint])[key.fingerprint])
            for job, outcome in self._engine().ready(1.0) if running else ():
                self.store.finish(job.fingerprint, outcome)
                self.progress.done(running.pop(job.fingerprint), outcome)
            if time.monotonic() - beat > BEAT:
                self.store.beat()
                beat = time.monotonic()
            self.progress.tick()

    def _engine(self) -> Engine:
        if self.engine is None:
            parcel = Parcel(
                self.arms, self.study.settings, tuple(self.study.metrics), self.study.metric, self.study.scale, self.device,
                self.store.folder.resolve(), self.memory_limit,
            )  # fmt: skip
            self.engine = self.stack.enter_context(
                open_engine(self.engine_name, parcel, workers=self.workers, time_limit=self.time_limit)
            )
        return self.engine

    def _results(self, entries: Sequence[Entry], chosen: Mapping[tuple[str, str], dict[str, Any]]) -> Results:
        return Results(
            self.study, entries, self.store.outcomes(e.key.fingerprint for e in entries), chosen, self.store.folder,
            {**versions(), "machine": platform.platform(), "cores": os.cpu_count(), "device": self.device, "engine": self.engine_name,
             "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "seconds": round(time.time() - self.start, 1)},
        )  # fmt: skip


def _extend(seeds: Sequence[int], count: int) -> list[int]:
    more = (seed for seed in range(TUNING_SEED) if seed not in seeds)
    return [*seeds, *(next(more) for _ in range(count - len(seeds)))]


def _fair_memory(workers: int | None, device: str) -> int | None:
    """What a trial may take by default: its share of the memory that is free now, so that none starves the driver."""
    if device != "cpu":
        return None
    return int(0.9 * psutil.virtual_memory().available / (workers or os.cpu_count() or 1))

"""The store: one SQLite file, one row per trial, safe to interrupt anywhere and to share between drivers.

A driver claims a trial by its row (status "running") before it starts it, and writes the outcome into the same row. A claim
whose driver is gone (its process has ended, or, on another machine, its heartbeat has stopped) is free for the next.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import pandas as pd
import psutil

from weightroom.errors import StoreError

__all__ = ["FILE", "Outcome", "Store", "TrialKey"]

FILE = "weightroom.sqlite"
#: Grows with every change of the tables.
SCHEMA = 1
#: Seconds without a heartbeat after which a driver on another machine counts as gone.
STALE = 120.0

_TABLES = """
CREATE TABLE trials (
    fingerprint TEXT PRIMARY KEY, study TEXT NOT NULL, arm TEXT NOT NULL, setting TEXT NOT NULL, seed INTEGER NOT NULL,
    split TEXT NOT NULL, scale TEXT NOT NULL, params TEXT NOT NULL, versions TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('running', 'done', 'failed')),
    metrics TEXT NOT NULL DEFAULT '{}', costs TEXT NOT NULL DEFAULT '{}', reason TEXT NOT NULL DEFAULT '',
    trace TEXT NOT NULL DEFAULT '', owner TEXT NOT NULL DEFAULT '', heartbeat REAL, started REAL, finished REAL
) WITHOUT ROWID;
CREATE INDEX by_study ON trials (study, arm, setting, seed);
CREATE TABLE curves (fingerprint TEXT PRIMARY KEY, points TEXT NOT NULL) WITHOUT ROWID;
"""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class TrialKey:
    """What a trial is, and the fingerprint of all that decides its outcome."""

    study: str
    arm: str
    setting: str
    seed: int
    split: str
    scale: str
    params: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    status: Literal["done", "failed"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    trace: str = ""
    curves: list[tuple[str, float, float]] = field(default_factory=list)


def _translated(method: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except sqlite3.Error as error:
            raise _explain(error, args[0].path) from error  # type: ignore[attr-defined]

    return call


class Store:
    """The trials of a folder.

    Args:
        folder: made when it is not there.
        create: whether it may be made; without, a missing store is an error, and it is only read.
        patience: seconds to wait for a lock that somebody else holds.

    Raises:
        StoreError: the store is missing, read-only, locked, damaged or newer than this version of weightroom.
    """

    def __init__(self, folder: str | Path, *, create: bool = True, patience: float = 5.0) -> None:
        if not str(folder).strip():
            raise StoreError("store must name a folder, got an empty string")
        self.folder = Path(folder)
        self.path = self.folder / FILE
        if not create and not self.path.exists():
            raise StoreError(f"there is no store in {self.folder}: run a comparison with --store {self.folder} first")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"store {self.folder} cannot be made ({error.strerror}): choose another folder with --store"
            ) from error
        self.owner = f"{platform.node()}:{os.getpid()}:{psutil.Process().create_time():.2f}"
        self._open(patience) if create else self._open_to_read(patience)

    @_translated
    def _open(self, patience: float) -> None:
        _check_whole(self.path)
        self.db = sqlite3.connect(self.path, timeout=patience, isolation_level=None)
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        self._check_version(version)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = NORMAL")
        if version < SCHEMA:
            with self._transaction():
                if self.db.execute("PRAGMA user_version").fetchone()[0] < SCHEMA:
                    for statement in _TABLES.split(";"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA user_version = {SCHEMA}")

    @_translated
    def _open_to_read(self, patience: float) -> None:
        """Opens a store that is not to be changed, also where it cannot be (a read-only disk)."""
        _check_whole(self.path)
        uri = self.path.resolve().as_uri()
        try:
            self.db = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=patience, isolation_level=None)
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            self.db.execute("SELECT 1 FROM trials LIMIT 1")
        except sqlite3.OperationalError:
            self.db = sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
        self._check_version(version)

    def _check_version(self, version: int) -> None:
        if version > SCHEMA:
            raise StoreError(
                f"store {self.path} was written by a newer weightroom (format {version}, this one reads up to {SCHEMA}): "
                "upgrade weightroom, or choose another folder with --store"
            )

    def close(self) -> None:
        """Closes the file."""
        self.db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @_translated
    def claim(self, key: TrialKey, versions: Mapping[str, str]) -> Literal["mine", "done", "failed", "theirs"]:
        """Claims a trial, unless its outcome is known or another living driver has it."""
        with self._transaction():
            row = self.db.execute(
                "SELECT status, owner, heartbeat FROM trials WHERE fingerprint = ?", (key.fingerprint,)
            ).fetchone()
            if row is not None and row[0] != "running":
                return row[0]
            if row is not None and row[1] != self.owner and _alive(row[1], row[2]):
                return "theirs"
            now = time.time()
            self.db.execute(
                "INSERT OR REPLACE INTO trials (fingerprint, study, arm, setting, seed, split, scale, params, versions, status, owner,"
                " heartbeat, started) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?)",
                (key.fingerprint, key.study, key.arm, key.setting, key.seed, key.split, key.scale, json.dumps(dict(key.params), default=str),
                 json.dumps(dict(versions)), self.owner, now, now),
            )  # fmt: skip
            return "mine"

    @_translated
    def finish(self, fingerprint: str, outcome: Outcome) -> None:
        """Writes the outcome of a claimed trial; a trial that another driver has finished meanwhile is left alone."""
        with self._transaction():
            changed = self.db.execute(
                "UPDATE trials SET status = ?, metrics = ?, costs = ?, reason = ?, trace = ?, finished = ?"
                " WHERE fingerprint = ? AND status = 'running' AND owner = ?",
                (outcome.status, json.dumps(dict(outcome.metrics)), json.dumps(dict(outcome.costs)), outcome.reason, outcome.trace,
                 time.time(), fingerprint, self.owner),
            ).rowcount  # fmt: skip
            if changed and outcome.curves:
                self.db.execute("INSERT OR REPLACE INTO curves VALUES (?, ?)", (fingerprint, json.dumps(outcome.curves)))

    @_translated
    def release(self) -> None:
        """Gives back the claims of this driver."""
        self.db.execute("DELETE FROM trials WHERE status = 'running' AND owner = ?", (self.owner,))

    @_translated
    def beat(self) -> None:
        """Says that this driver is alive."""
        self.db.execute("UPDATE trials SET heartbeat = ? WHERE status = 'running' AND owner = ?", (time.time(), self.owner))

    @_translated
    def forget_failed(self, fingerprints: Iterable[str]) -> None:
        """Removes failed trials, so that they run once more."""
        self.db.executemany("DELETE FROM trials WHERE status = 'failed' AND fingerprint = ?", [(f,) for f in fingerprints])

    @_translated
    def status(self, fingerprints: Iterable[str]) -> dict[str, str]:
        """Fingerprint -> status, for those that are known."""
        return dict(self._select("fingerprint, status", fingerprints))

    @_translated
    def outcomes(self, fingerprints: Iterable[str]) -> dict[str, Outcome]:
        """Fingerprint -> outcome, for those that are finished."""
        rows = self._select("fingerprint, status, metrics, costs, reason, trace", fingerprints)
        return {f: Outcome(s, json.loads(m), json.loads(c), r, t) for f, s, m, c, r, t in rows if s != "running"}

    @_translated
    def curves(self, fingerprints: Iterable[str]) -> dict[str, list[tuple[str, float, float]]]:
        """Fingerprint -> (name, step, value) of all points that the trial logged."""
        return {
            f: [tuple(p) for p in json.loads(points)] for f, points in self._select("fingerprint, points", fingerprints, "curves")
        }

    @_translated
    def frame(self, study: str | None = None) -> pd.DataFrame:
        """All trials as a table, one row each: what it is, its status, its metrics and costs in columns of their own."""
        columns = ["fingerprint", "study", "arm", "setting", "seed", "split", "scale", "params", "status", "reason", "finished"]
        where, values = ("WHERE study = ?", (study,)) if study is not None else ("", ())
        rows = self.db.execute(
            f"SELECT {', '.join(columns)}, metrics, costs FROM trials {where} ORDER BY study, arm, setting, seed", values
        )
        table = pd.DataFrame(rows.fetchall(), columns=[*columns, "metrics", "costs"])
        numbers = [pd.DataFrame(json.loads(f"[{','.join(table.pop(name))}]"), index=table.index) for name in ("metrics", "costs")]
        return pd.concat([table, *numbers], axis=1)

    @_translated
    def summary(self) -> pd.DataFrame:
        """One row per study and arm: trials done, failed, running, and when the last one ended."""
        rows = self.db.execute(
            "SELECT study, arm, SUM(status = 'done'), SUM(status = 'failed'), SUM(status = 'running'), MAX(finished)"
            " FROM trials GROUP BY study, arm ORDER BY study, arm"
        )
        return pd.DataFrame(rows.fetchall(), columns=["study", "arm", "done", "failed", "running", "last"])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def _select(self, columns: str, fingerprints: Iterable[str], table: str = "trials") -> Iterable[tuple[Any, ...]]:
        wanted = json.dumps(list(fingerprints))
        return self.db.execute(
            f"SELECT {columns} FROM {table} WHERE fingerprint IN (SELECT value FROM json_each(?))", (wanted,)
        ).fetchall()


def _alive(owner: str, heartbeat: float | None) -> bool:
    node, pid, created = owner.rsplit(":", 2)
    if node != platform.node():
        return heartbeat is not None and time.time() - heartbeat < STALE
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(created)) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _check_whole(path: Path) -> None:
    """A file that is shorter than its own header says has lost its end; SQLite would notice only at the lost page."""
    wal = path.with_name(path.name + "-wal")
    if not path.exists() or (wal.exists() and wal.stat().st_size):
        return
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise StoreError(
            f"store {path} cannot be read ({error.strerror}): mend its permissions or choose another folder with --store"
        ) from error
    if not head:
        return
    size = int.from_bytes(head[16:18], "big")
    pages = int.from_bytes(head[28:32], "big")
    whole = (
        head[:16] == b"SQLite format 3\0" and len(head) == 100 and path.stat().st_size >= pages * (65536 if size == 1 else size)
    )
    if not whole:
        raise StoreError(_DAMAGED.format(path=path))


_DAMAGED = (
    "store {path} is damaged (truncated, or not a weightroom store): restore it from a copy, or move it away and start anew"
)


def _explain(error: sqlite3.Error, path: Path) -> StoreError:
    text = str(error)
    if "readonly" in text or "read-only" in text or ("unable to open" in text and not os.access(path.parent, os.W_OK)):
        return StoreError(f"store {path} is read-only: make it writable, or choose another folder with --store")
    if "locked" in text:
        return StoreError(
            f"store {path} is locked by another program: wait until it is done, or choose another folder with --store"
        )
    if "full" in text or "disk I/O" in text:
        return StoreError(
            f"store {path} cannot be written, the disk is full or broken ({text}): free some space and run again; what was finished is kept"
        )
    if "unable to open" in text:
        return StoreError(f"store {path} cannot be opened: check the permissions of its folder, or choose another with --store")
    if isinstance(error, sqlite3.DatabaseError) and (
        "malformed" in text or "not a database" in text or "no such table" in text or "already exists" in text
    ):
        return StoreError(_DAMAGED.format(path=path))
    return StoreError(f"store {path}: {text}")

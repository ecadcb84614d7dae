"""What happens inside a worker: one trial, from its parcel to its outcome."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import torch

from weightroom.errors import StoreError, WeightroomError
from weightroom.study.cache import writing
from weightroom.study.core import COSTS, Arm, Scale, Trial
from weightroom.study.store import Outcome

__all__ = ["Job", "Parcel", "prepare", "run_job", "run_trial"]


@dataclass(frozen=True)
class Parcel:
    """All that the trials of a study share, sent to a worker once."""

    arms: Mapping[str, Arm]
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    metric: str
    scale: Scale
    device: str
    folder: Path
    memory_limit: int | None = None


@dataclass(frozen=True)
class Job:
    """One trial of a parcel."""

    fingerprint: str
    arm: str
    setting: str
    seed: int
    split: str
    params: Mapping[str, Any] = field(default_factory=dict)


def prepare(driver: int) -> None:
    """Makes a worker process: one thread, deaf to Ctrl-C (the driver hears it), silent on stdout, gone when its driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(driver, psutil.Process(driver).create_time()), daemon=True).start()


def run_job(parcel: str, job: Job) -> Outcome:
    """Runs one trial of the parcel that lies at a path."""
    return run_trial(_unpack(parcel), job)


def run_trial(parcel: Parcel, job: Job) -> Outcome:
    """Runs one trial and returns what became of it; nothing that the arm does wrong is raised.

    Raises:
        StoreError: the folder of the store cannot be written, which is no fault of the trial.
    """
    torch.manual_seed(job.seed)
    np.random.seed(job.seed % 2**32)  # noqa: NPY002  (arms of users may draw from the global state)
    random.seed(job.seed)
    folder = parcel.folder / "trials" / job.fingerprint
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    trial = Trial(
        seed=job.seed, scale=parcel.scale, setting=parcel.settings[job.setting], params=job.params, split="val" if job.split == "val" else "test",
        device=parcel.device, folder=folder, shared=parcel.folder / "cache",
    )  # fmt: skip
    memory = _Memory(parcel.device)
    start = time.perf_counter()
    try:
        with _limited(parcel.memory_limit):
            returned = parcel.arms[job.arm].run(trial)
        metrics = _checked(returned, parcel)
        costs = {**trial.spent, "seconds": time.perf_counter() - start, "peak_memory": memory.peak()}
        return Outcome("done", metrics, costs, curves=trial.curves)
    except StoreError:
        raise
    except (SystemExit, KeyboardInterrupt) as error:
        called = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else "raised KeyboardInterrupt"
        return Outcome("failed", reason=called, trace=traceback.format_exc(), curves=trial.curves)
    except MemoryError:
        return Outcome("failed", reason=_out_of_memory(parcel), trace=traceback.format_exc(), curves=trial.curves)
    except Exception as error:
        if "can't allocate memory" in str(error) or isinstance(error, torch.cuda.OutOfMemoryError):
            return Outcome("failed", reason=_out_of_memory(parcel), trace=traceback.format_exc(), curves=trial.curves)
        return Outcome("failed", reason=_reason(error), trace=traceback.format_exc(), curves=trial.curves)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


class BadMetricsError(WeightroomError):
    """An arm returned something that is not a mapping of declared metrics to finite numbers."""


def _checked(returned: Any, parcel: Parcel) -> dict[str, float]:
    declared = f"declared: {', '.join(parcel.metrics)}"
    if not isinstance(returned, Mapping):
        raise BadMetricsError(f"returned {type(returned).__name__} instead of a dict of metrics ({declared})")
    if parcel.metric not in returned:
        raise BadMetricsError(f"returned no metric {parcel.metric!r}, which decides the study ({declared})")
    metrics = {}
    for name, value in returned.items():
        if name in COSTS and name not in parcel.metrics:
            raise BadMetricsError(f"returned the cost {name!r} as a metric: say trial.spend({name}=...) instead")
        if name not in parcel.metrics:
            raise BadMetricsError(f"returned metric {name!r}, which the study does not declare ({declared})")
        if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise BadMetricsError(f"metric {name!r} must be a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise BadMetricsError(f"metric {name!r} is {float(value)}")
        metrics[name] = float(value)
    return metrics


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    said = text[0] if text else "no message"
    if isinstance(error, BadMetricsError):
        return said
    frames = traceback.extract_tb(error.__traceback__)
    where = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    place = f" ({Path(where.filename).name}:{where.lineno})"
    return (said if isinstance(error, WeightroomError) else f"{type(error).__name__}: {said}") + place


def _out_of_memory(parcel: Parcel) -> str:
    limit = "" if parcel.memory_limit is None else f" (limit {parcel.memory_limit / 2**30:.3g} GiB)"
    return f"ran out of memory{limit}"


@functools.lru_cache(maxsize=2)
def _unpack(path: str) -> Parcel:
    with Path(path).open("rb") as file:
        return cloudpickle.load(file)


@contextlib.contextmanager
def _limited(limit: int | None) -> Any:
    """Bounds the private memory of this process to what it has now and ``limit`` more, where the system can (Linux)."""
    if limit is None or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    now = (
        int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")))
        * 1024
    )
    resource.setrlimit(resource.RLIMIT_DATA, (now + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


class _Memory:
    """Peak memory of this process above what it had, in bytes: of the CUDA device there, else resident memory (Linux can reset it)."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self.start = self._peak_resident()

    def peak(self) -> float:
        return float(max(0, (torch.cuda.max_memory_allocated() if self.cuda else self._peak_resident()) - self.start))

    @staticmethod
    def _peak_resident() -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _leave_with(driver: int, created: float) -> None:
    while True:
        time.sleep(1.0)
        try:
            gone = abs(psutil.Process(driver).create_time() - created) > 0.05
        except psutil.Error:
            gone = True
        if gone:
            os._exit(1)

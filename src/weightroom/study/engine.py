"""Engines: where trials run. Each takes jobs and yields outcomes as they come; none knows the store."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import cloudpickle
import pebble
import psutil

from weightroom.errors import MissingExtraError, StoreError, UsageError, unknown
from weightroom.study.store import Outcome
from weightroom.study.worker import Job, Parcel, prepare, run_job

__all__ = ["ENGINES", "Engine", "open_engine"]

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Runs jobs of one parcel."""

    workers: int

    def submit(self, job: Job) -> None:
        """Starts a job, or queues it."""

    def ready(self, timeout: float) -> list[tuple[Job, Outcome]]:
        """Returns the jobs that have ended, waiting up to ``timeout`` seconds for the first."""


@contextlib.contextmanager
def open_engine(name: str, parcel: Parcel, *, workers: int | None, time_limit: float | None) -> Iterator[Engine]:
    """Opens an engine; leaving the context ends every worker.

    Raises:
        UsageError: an unknown engine, ``workers`` < 1, or ``time_limit`` <= 0.
        MissingExtraError: Ray is not installed.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be >= 1, got {workers}")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"time_limit must be > 0 seconds, got {time_limit:g}")
    with (_local if name == "local" else _ray)(parcel, workers, time_limit) as engine:
        yield engine


def failed(reason: str) -> Outcome:
    """The outcome of a trial whose worker could not say what happened."""
    return Outcome("failed", reason=reason)


class _Local:
    def __init__(self, pool: pebble.ProcessPool, parcel: str, workers: int, time_limit: float | None) -> None:
        self.pool, self.parcel, self.workers, self.time_limit = pool, parcel, workers, time_limit
        self.pending: dict[concurrent.futures.Future[Outcome], Job] = {}

    def submit(self, job: Job) -> None:
        self.pending[self.pool.schedule(run_job, args=(self.parcel, job), timeout=self.time_limit)] = job

    def ready(self, timeout: float) -> list[tuple[Job, Outcome]]:
        done, _ = concurrent.futures.wait(self.pending, timeout, concurrent.futures.FIRST_COMPLETED)
        return [(self.pending.pop(future), self._outcome(future)) for future in done]

    def _outcome(self, future: concurrent.futures.Future[Outcome]) -> Outcome:
        try:
            return future.result()
        except concurrent.futures.TimeoutError:
            return failed(f"took longer than the time limit of {self.time_limit:g} s")
        except pebble.ProcessExpired as error:
            return failed(_died(error.exitcode))
        except StoreError:
            raise
        except Exception as error:
            return failed(f"its outcome could not be returned ({type(error).__name__}: {error})")


class _Process(ForkServerProcess):
    """A process that does not run the user's script again: parcels carry by value what the script defines."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


@contextlib.contextmanager
def _local(parcel: Parcel, workers: int | None, time_limit: float | None) -> Iterator[Engine]:
    workers = workers or len(psutil.Process().cpu_affinity() if sys.platform == "linux" else [*range(os.cpu_count() or 1)])
    context = _Context()
    context.set_forkserver_preload(["weightroom.study.worker"])
    with tempfile.TemporaryDirectory(prefix="weightroom-") as folder:
        path = Path(folder) / "parcel"
        path.write_bytes(cloudpickle.dumps(parcel))
        pool = pebble.ProcessPool(max_workers=workers, initializer=prepare, initargs=(os.getpid(),), context=context)
        try:
            yield _Local(pool, str(path), workers, time_limit)
        finally:
            pool.stop()
            pool.join()


class _Ray:
    def __init__(self, ray: Any, parcel: Parcel, workers: int, time_limit: float | None) -> None:
        self.ray, self.workers, self.time_limit = ray, workers, time_limit
        self.parcel = ray.put(cloudpickle.dumps(parcel))
        gpus = 1 if parcel.device.startswith("cuda") else 0
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=0)(_run_pickled)
        self.pending: dict[Any, Job] = {}

    def submit(self, job: Job) -> None:
        self.pending[self.remote.remote(self.parcel, job, self.time_limit)] = job

    def ready(self, timeout: float) -> list[tuple[Job, Outcome]]:
        if not self.pending:
            return []
        done, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=timeout)
        return [(self.pending.pop(ref), self._outcome(ref)) for ref in done]

    def _outcome(self, ref: Any) -> Outcome:
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.WorkerCrashedError:
            return failed("its worker process died")
        except self.ray.exceptions.OutOfMemoryError:
            return failed("ran out of memory")
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StoreError):
                raise error.cause from None
            return failed(f"Ray could not run it: {error.cause}")
        except self.ray.exceptions.RayError as error:
            return failed(f"Ray could not run it: {str(error).strip().splitlines()[0]}")


@contextlib.contextmanager
def _ray(parcel: Parcel, workers: int | None, time_limit: float | None) -> Iterator[Engine]:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray", "the ray engine") from None
    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield _Ray(ray, parcel, workers or int(ray.cluster_resources().get("CPU", 1)), time_limit)
    finally:
        if own:
            ray.shutdown()


def _run_pickled(parcel: bytes, job: Job, time_limit: float | None) -> Outcome:
    """A Ray task: the same worker function, with an alarm for the time limit."""
    from weightroom.study.worker import run_trial

    def late(*_: object) -> None:
        raise TimeoutError(f"took longer than the time limit of {time_limit:g} s")

    if time_limit is not None:
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, time_limit)
    try:
        return run_trial(cloudpickle.loads(parcel), job)
    finally:
        if time_limit is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        what = {"SIGSEGV": "a segmentation fault in native code", "SIGKILL": "killed, most likely for using too much memory"}.get(
            name, ""
        )
        return f"its worker process died of {name}" + (f" ({what})" if what else "")
    return f"its worker process ended by itself with exit code {code}"

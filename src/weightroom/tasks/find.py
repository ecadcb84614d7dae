"""A task by its built-in name, or from the user's Python file."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import torch

from weightroom.errors import TaskError, WeightroomError, unknown
from weightroom.study import Task

__all__ = ["BUILT_IN", "load"]

#: Name -> function of ``weightroom.tasks`` that makes it.
BUILT_IN = {
    "digits": "digits", "wine": "wine", "breast-cancer": "breast_cancer", "diabetes": "diabetes", "mnist": "mnist", "cifar10": "cifar10",
    "vessels": "vessels", "retina": "retina",
}  # fmt: skip


def load(task: str | Path | Task | Callable[[], Task], *, download: bool = False) -> Task:
    """Returns a task.

    Args:
        task: a task, a function that returns one, a built-in name ("digits"), or a Python file: ``mine.py`` (with a function or
            value called ``task``, or exactly one of either) or ``mine.py:name``.
        download: allow a built-in task to download its data.

    Raises:
        UsageError: no built-in task of that name.
        TaskError: the file is missing, has an error, or does not give a task.
    """
    if isinstance(task, Task):
        return task
    if callable(task):
        return _made(task, getattr(task, "__name__", "task"))
    name = str(task)
    if name in BUILT_IN:
        from weightroom import tasks

        make = getattr(tasks, BUILT_IN[name])
        return make(download=True) if download and "download" in inspect.signature(make).parameters else make()
    file, _, attribute = name.partition(":")
    if not file.endswith(".py"):
        raise unknown("task", name, BUILT_IN)
    return _from_file(Path(file), attribute)


def _from_file(path: Path, attribute: str) -> Task:
    if not path.is_file():
        raise TaskError(f"task file {path} does not exist")
    module = _run(path)
    if attribute:
        if not hasattr(module, attribute):
            raise TaskError(f"{path} has no {attribute!r}: it has {', '.join(_own(module)) or 'no function or task of its own'}")
        return _made(getattr(module, attribute), f"{path}:{attribute}")
    candidates = _own(module)
    if hasattr(module, "task"):
        return _made(module.task, f"{path}:task")
    tasks = [name for name in candidates if isinstance(getattr(module, name), Task)] or [
        name for name in candidates if _returns_task(getattr(module, name))
    ]
    chosen = tasks or candidates
    if len(chosen) != 1:
        raise TaskError(
            f"{path} must define a function task() that returns a wr.Task; or name one of {', '.join(candidates) or '(none found)'} as {path}:NAME"
        )
    return _made(getattr(module, chosen[0]), f"{path}:{chosen[0]}")


def _run(path: Path) -> ModuleType:
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"task_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    before = set(sys.modules)
    try:
        with _sheltered():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise TaskError(f"{path}, line {error.lineno}: syntax error ({error.msg})") from error
    except ImportError as error:
        raise TaskError(f"{path} cannot import what it needs: {error}") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"{path} failed while it was read: {_short(error)}") from error
    finally:
        sys.path.pop(0)
    cloudpickle.register_pickle_by_value(module)
    for other in set(sys.modules) - before:
        file = getattr(sys.modules[other], "__file__", None)
        if file is not None and Path(file).parent == path.resolve().parent:
            cloudpickle.register_pickle_by_value(sys.modules[other])
    return module


def _made(task: Any, where: str) -> Task:
    if isinstance(task, Task):
        return task
    if not callable(task) or isinstance(task, type):
        raise TaskError(f"{where} must be a wr.Task or a function that returns one, got {type(task).__name__}")
    try:
        with _sheltered():
            made = task()
    except WeightroomError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{where} failed: {_short(error)}") from error
    if not isinstance(made, Task):
        raise TaskError(f"{where} must return a wr.Task, got {type(made).__name__}")
    return made


def _own(module: ModuleType) -> list[str]:
    mine = lambda v: isinstance(v, Task) or (inspect.isfunction(v) and v.__module__ == module.__name__ and not _needs(v))  # noqa: E731
    return [name for name, value in vars(module).items() if not name.startswith("_") and mine(value)]


def _needs(function: Callable[..., Any]) -> bool:
    """Whether a function cannot be called without arguments: a metric beside the task, say."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.default is p.empty and p.kind in kinds for p in inspect.signature(function).parameters.values())


@contextlib.contextmanager
def _sheltered() -> Iterator[None]:
    """The user's code draws the same random numbers at every run, so that a store knows the task again, and prints to stderr."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _returns_task(value: Any) -> bool:
    returned = getattr(value, "__annotations__", {}).get("return")
    return returned is Task or (isinstance(returned, str) and returned.rpartition(".")[2] == "Task")


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    hint = f"; relative paths start from {Path.cwd()}" if isinstance(error, FileNotFoundError) else ""
    return f"{type(error).__name__}: {text[0]}{hint}" if text else type(error).__name__

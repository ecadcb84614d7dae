"""What can go wrong on the user's side, said in a line or two.

Every error here is meant to be read by a person: it names what was given, what is accepted and what to do. The command
line prints the message alone; the traceback appears only with ``--debug``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

__all__ = [
    "MissingDataError",
    "MissingExtraError",
    "StoreError",
    "TaskError",
    "UsageError",
    "WeightroomError",
    "check_range",
    "unknown",
]

#: Names that an error lists at the most.
SHOWN = 16


class WeightroomError(Exception):
    """Base of the errors that weightroom raises for its user."""


class UsageError(WeightroomError, ValueError):
    """An argument is wrong: out of range, unknown, or in conflict with another."""


class TaskError(WeightroomError):
    """A task cannot be loaded or does not fit together (model, data, loss, metrics)."""


class MissingDataError(TaskError):
    """Real data that is asked for is not there."""


class StoreError(WeightroomError):
    """The store of trials cannot be opened, read or written."""


class MissingExtraError(WeightroomError, ImportError):
    """A part needs a package that an extra brings.

    Args:
        package: the package that is missing.
        extra: the extra of weightroom that installs it.
        what: what needs it.
    """

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'weightroom[{extra}]'")


def unknown(kind: str, given: object, accepted: Iterable[object]) -> UsageError:
    """Returns the error for a name that does not exist, with the nearest that does.

    Args:
        kind: what the name stands for ("arm", "metric", ...).
        given: the name that was given.
        accepted: every name that would have been accepted.
    """
    names, given = sorted(str(name) for name in accepted), str(given)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return UsageError(f"unknown {kind} {given!r}: {hint}accepted: {', '.join(names[:SHOWN]) or 'none'}{more}")


def check_range(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> None:
    """Checks that a hyper-parameter is a number in a range.

    Args:
        name: of the argument, for the message.
        value: what was given.
        low: least value accepted.
        high: greatest value accepted.
        open_low: ``low`` itself is not accepted.
        open_high: ``high`` itself is not accepted.

    Raises:
        TypeError: ``value`` is not a real number.
        UsageError: (a ``ValueError``) it is out of the range, or NaN.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    given = float(value)
    if not (low < given if open_low else low <= given) or not (given < high if open_high else given <= high):
        least, most = f"{'>' if open_low else '>='} {low:g}", f"{'<' if open_high else '<='} {high:g}"
        raise UsageError(f"{name} must be {least} and {most}, got {given:g}")

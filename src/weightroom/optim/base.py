"""What the optimizers share: checks of arguments and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from weightroom.errors import UsageError

__all__ = ["check_dense", "check_range"]


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


def check_dense(grads: Iterable[Tensor], optimizer: str) -> None:
    """Checks that no gradient is sparse.

    Args:
        grads: gradients of the parameters to be stepped.
        optimizer: its name, for the message.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    if any(g.layout != torch.strided for g in grads):
        raise RuntimeError(f"{optimizer} does not support sparse gradients: make the layer with sparse=False")

"""What a study expects: a region in which a mean, or a mean paired difference, must lie.

Every expectation a machine can decide here is the same question: does the interval of a mean lie inside a region (holds),
outside it (fails), or across its border (inconclusive)? ``better_than`` takes the mean paired improvement and the region
(by, inf); ``not_worse_than`` (-by, inf); ``worse_than`` (-inf, -by); ``equal_to`` [-within, within]; ``within`` takes the mean
of an arm's own metric. ``always`` is the exception: a property of every single trial, with no sampling error to speak of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from weightroom.errors import UsageError

__all__ = ["Claim", "Expect"]


@dataclass(frozen=True)
class Expect:
    """An expectation about one arm, alone or against another.

    Args:
        arm: the arm that the expectation is about.
        metric: the metric that decides; the study's own when None.
        on: the setting of the study; the only one, or the first, when None.
        tuned: decide on the tuned trials instead of those at the common setting.

    Follow it with one of the methods, each of which returns a complete expectation::

        Expect("lion").better_than("adamw", by=0.01)
        Expect("lion", metric="max_weight").within(0.0, 0.2)

    "Better" follows the metric's direction; every margin is given in the metric's own unit and is >= 0.
    """

    arm: str
    metric: str | None = None
    on: str | None = None
    tuned: bool = False
    other: str | None = None
    low: float = -math.inf
    high: float = math.inf
    strict: bool = False
    kind: Literal["", "difference", "value", "always"] = ""
    text: str = ""

    def better_than(self, other: str, by: float = 0.0) -> Expect:
        """The mean paired improvement over ``other`` is more than ``by``."""
        more = f" by more than {_margin('by', by):g}" if by else ""
        return self._against(other, by, math.inf, f"{self.arm} is better than {other}{more}", strict=True)

    def not_worse_than(self, other: str, by: float = 0.0) -> Expect:
        """The mean paired improvement over ``other`` is more than ``-by``."""
        more = f" by {_margin('by', by):g} or more" if by else ""
        return self._against(other, -by, math.inf, f"{self.arm} is not worse than {other}{more}")

    def worse_than(self, other: str, by: float = 0.0) -> Expect:
        """The mean paired improvement over ``other`` is less than ``-by``."""
        more = f" by more than {_margin('by', by):g}" if by else ""
        return self._against(other, -math.inf, -by, f"{self.arm} is worse than {other}{more}", strict=True)

    def equal_to(self, other: str, within: float) -> Expect:
        """The mean paired difference to ``other`` lies in [-within, within] (equivalence)."""
        if _margin("within", within) == 0:
            raise UsageError("within must be > 0: no sample can show that two means are exactly equal")
        return self._against(other, -within, within, f"{self.arm} equals {other} within {within:g}")

    def within(self, low: float = -math.inf, high: float = math.inf) -> Expect:
        """The mean of the arm's metric lies in [low, high]."""
        return self._own("value", low, high, f"{self.arm} lies in [{low:g}, {high:g}]")

    def always(self, low: float = -math.inf, high: float = math.inf) -> Expect:
        """The arm's metric lies in [low, high] in every trial: one trial outside it and the expectation fails."""
        return self._own("always", low, high, f"{self.arm} lies in [{low:g}, {high:g}] in every trial")

    def __str__(self) -> str:
        return self.text or f"an unfinished expectation about {self.arm}"

    def _against(self, other: str, low: float, high: float, text: str, *, strict: bool = False) -> Expect:
        return replace(self, other=other, low=low, high=high, strict=strict, kind="difference", text=text)

    def _own(self, kind: Literal["value", "always"], low: float, high: float, text: str) -> Expect:
        if not low <= high:
            raise UsageError(f"low must be <= high, got [{low:g}, {high:g}]")
        return replace(self, low=low, high=high, kind=kind, text=text)


@dataclass(frozen=True)
class Claim:
    """A sentence that a reader understands and an expectation that a machine can decide."""

    says: str
    expect: Expect

    def __post_init__(self) -> None:
        if not self.expect.kind:
            raise UsageError(
                f"the expectation of claim {self.says!r} is unfinished: add .better_than(...), .within(...) or another"
            )


def _margin(name: str, value: float) -> float:
    if not value >= 0:
        raise UsageError(f"{name} must be >= 0, got {value:g}")
    return value

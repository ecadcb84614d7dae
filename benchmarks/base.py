"""How a benchmark is taken: ours and the peer in turn, medians, one ratio.

A file ``benchmarks/bench_<name>.py`` has one function ``races() -> Iterator[Race]`` that yields ``race(...)`` for each pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Race", "measure", "race"]


@dataclass(frozen=True)
class Race:
    """One comparison: ``ratio`` is ours / peer in seconds (or in the unit given), ``target`` the most it may be (None: shown only)."""

    name: str
    peer: str
    ours_s: float
    peer_s: float
    target: float | None
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """Ours divided by the peer's."""
        return self.ours_s / self.peer_s

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.ratio <= self.target


def measure(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Returns the seconds of one call, averaged over as many as fill ``seconds``."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        if (spent := time.perf_counter() - start) >= seconds:
            return spent / calls


def race(
    name: str,
    ours: Callable[[], object],
    peer_name: str,
    peer: Callable[[], object],
    *,
    target: float | None = None,
    rounds: int = 11,
) -> Race:
    """Times both in turn, ``rounds`` times, after one call of each to warm up; returns the medians."""
    ours()
    peer()
    pairs = [(measure(ours), measure(peer)) for _ in range(rounds)]
    return Race(name, peer_name, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), target)

"""The study: task, arm, trial, engine, store, verdict, report. It knows no method and no training loop."""

from weightroom.lazy import attach

__all__ = ["COSTS", "Arm", "Claim", "Expect", "Recipe", "Results", "Scale", "Store", "Study", "Task", "Trial", "Verdict"]

_HOME = {
    "COSTS": "core", "Arm": "core", "Scale": "core", "Study": "core", "Trial": "core", "Claim": "expect", "Expect": "expect",
    "Recipe": "task", "Task": "task", "Results": "results", "Store": "store", "Verdict": "stats",
}  # fmt: skip
__getattr__, __dir__ = attach(__name__, {name: f"{__name__}.{home}" for name, home in _HOME.items()})

"""weightroom: published training methods as parts to use, compare and check.

import weightroom as wr
from weightroom.optim import LionK

results = wr.compare("prune", task="digits", sparsity=(0.8, 0.9, 0.95))
print(results.table())
wr.check("lion-k").verdicts
"""

from typing import TYPE_CHECKING

from weightroom.lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weightroom.api import Check, check, cite
    from weightroom.compare.base import Method
    from weightroom.study import Arm, Claim, Expect, Recipe, Results, Scale, Study, Task, Trial, Verdict

_PACKAGES = (
    "adversarial", "compare", "curvature", "data", "diagnostics", "distill", "estimators", "kernels", "losses",
    "metrics", "nets", "optim", "papers", "prune", "study", "tasks", "train", "transport", "weights",
)  # fmt: skip
_STUDY = ("Arm", "Claim", "Expect", "Recipe", "Results", "Scale", "Study", "Task", "Trial", "Verdict")

__all__ = [
    "Arm", "Check", "Claim", "Expect", "Method", "Recipe", "Results", "Scale", "Study", "Task", "Trial", "Verdict", "__version__", "check", "cite",
    "compare", "papers", "tasks",
]  # fmt: skip

__getattr__, __dir__ = attach(
    __name__,
    {name: f"{__name__}.{name}" for name in _PACKAGES}
    | dict.fromkeys(_STUDY, f"{__name__}.study")
    | dict.fromkeys(("Check", "check", "cite"), f"{__name__}.api")
    | {"Method": f"{__name__}.compare.base"},
)

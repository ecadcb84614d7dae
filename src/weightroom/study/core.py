"""Study, arm and trial: what is compared, and the one thing that is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from weightroom.errors import UsageError, unknown
from weightroom.study.expect import Claim, Expect

if TYPE_CHECKING:
    from weightroom.study.results import Results

__all__ = ["COSTS", "Arm", "Direction", "Scale", "Study", "Trial"]

T = TypeVar("T")
Direction = Literal["max", "min"]
Run = Callable[["Trial"], Mapping[str, float]]

#: What a trial may report as spent, beside its metrics; all are better when lower.
COSTS: dict[str, str] = {
    "seconds": "wall-clock seconds of the trial",
    "train_seconds": "seconds spent training",
    "peak_memory": "bytes of memory above the start of the trial",
    "parameters": "parameters left (nonzero)",
    "flops": "multiply-accumulates of one forward pass of one sample, counted twice",
    "latency": "seconds of one forward pass of one batch (of 64), median",
    "latency_1": "seconds of one forward pass of one sample, median",
    "onnx_latency": "the same of one batch in ONNX Runtime on the CPU",
    "onnx_latency_1": "the same of one sample in ONNX Runtime on the CPU",
    "forwards": "forward passes",
    "backwards": "backward passes",
    "steps": "optimizer steps",
    "oracle_calls": "evaluations of the function being optimised",
    "trainings": "whole trainings",
    "epsilon": "privacy budget spent",
}


class Scale(str, Enum):
    """How large a study runs: seconds, minutes, tens of minutes on real data, or as in the paper."""

    SMOKE = "smoke"
    SMALL = "small"
    REAL = "real"
    FULL = "full"

    def pick(self, smoke: T, small: T, full: T, real: T | None = None) -> T:
        """Returns the argument of this scale; ``real`` is as ``small`` when it is not given."""
        return {"smoke": smoke, "small": small, "full": full, "real": small if real is None else real}[self.value]

    @classmethod
    def of(cls, name: str | Scale) -> Scale:
        """Returns the scale of that name."""
        try:
            return cls(name)
        except ValueError:
            raise unknown("scale", str(name), [s.value for s in cls]) from None


@dataclass
class Trial:
    """One run of one arm: what it is given, and where it says what it did.

    Args:
        seed: decides initial weights, batches and everything random; the same seed means the same of all these in every arm.
        scale: how large to run.
        setting: the value of the study's setting (a task, a sparsity, ...); None when the study has none.
        params: the arm's hyper-parameters: its defaults, or what tuning chose.
        split: "val" while tuning, else "test": evaluate on this split.
        device: a torch device name.
        folder: for artifacts of this trial; empty at the start.
        shared: folder that all trials of a store share, see ``cached``.
    """

    seed: int
    scale: Scale = Scale.SMOKE
    setting: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    split: Literal["test", "val"] = "test"
    device: str = "cpu"
    folder: Path = Path()
    shared: Path | None = None
    curves: list[tuple[str, float, float]] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)

    def log(self, step: float, **values: float) -> None:
        """Records points of curves: ``trial.log(epoch, loss=0.3, accuracy=0.9)``."""
        self.curves.extend((name, float(step), float(value)) for name, value in values.items())

    def spend(self, **costs: float) -> None:
        """Adds to what this trial has cost; the names are those of ``COSTS``."""
        for name, value in costs.items():
            if name not in COSTS:
                raise unknown("cost", name, COSTS)
            self.spent[name] = self.spent.get(name, 0.0) + float(value)

    def cached(self, name: str, make: Callable[[], dict[str, Any]], **decides: Any) -> dict[str, Any]:
        """Returns a dict of tensors that several arms start from (a trained dense network, say), made once per store.

        Args:
            name: what it is.
            make: makes it; must depend on nothing but ``decides``.
            **decides: everything that decides its value (task, seed, scale, ...); hashed into its address. What ``make``
                itself runs is hashed too.
        """
        from weightroom.study.cache import cached

        return cached(self.shared, name, make, decides)


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Args:
        run: function ``Trial -> dict of metrics``.
        defaults: the hyper-parameters of the common setting, handed over as ``trial.params``.
        space: hyper-parameter -> choices for tuning: a list of values, or ``(low, high)``, ``(low, high, "log")``,
            ``(low, high, "int")``.
        cites: parts or papers (or BibTeX) that the report should cite for this arm.
    """

    run: Run
    defaults: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)
    cites: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.run):
            raise UsageError(f"an arm needs a function Trial -> metrics, got {type(self.run).__name__}")


@dataclass
class Study:
    """Arms, the metric that decides, and what is expected of them.

    Args:
        name: its name in the store.
        arms: name -> ``Arm`` or plain function ``Trial -> metrics``.
        metric: the metric that decides.
        direction: "max" or "min".
        metrics: further metrics that arms may return -> direction; a metric that is not declared makes a trial fail.
        baseline: the arm that the others are compared with in the table; the first when None.
        settings: name -> value: every arm runs under each (tasks, noise levels, sparsities); numbers as names make a curve.
        expect: claims, or bare expectations.
        seeds: how many seeds (0, 1, ...), or the seeds themselves.
        max_seeds: go on beyond ``seeds`` until every expectation is decided, up to so many (see ``stats``).
        tune: trials per arm on the validation split before those that decide; 0 for none.
        scale: how large the arms run.
        alpha: error rate that all expectations of the study share.
        paper: the paper whose claim this is.
        notes: facts for the report (name -> text).
    """

    name: str
    arms: Mapping[str, Arm | Run]
    metric: str
    direction: Direction = "max"
    metrics: Mapping[str, Direction] = field(default_factory=dict)
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: {"": None})
    expect: Sequence[Claim | Expect] = ()
    seeds: int | Sequence[int] = 5
    max_seeds: int | None = None
    tune: int = 0
    scale: Scale = Scale.SMALL
    alpha: float = 0.05
    paper: Any = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scale = Scale.of(self.scale)
        for name in ("arms", "metrics", "settings"):
            if not isinstance(getattr(self, name), Mapping):
                raise UsageError(f"{name} must be a mapping of names, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.metric, str):
            raise UsageError(f"metric must be a name, got {self.metric!r}")
        if not self.arms:
            raise UsageError(f"study {self.name!r} has no arms")
        self.arms = {name: arm if isinstance(arm, Arm) else Arm(arm) for name, arm in self.arms.items()}
        if isinstance(self.seeds, int) and not isinstance(self.seeds, bool):
            if self.seeds < 1:
                raise UsageError(f"seeds must be >= 1, got {self.seeds}")
            self.seeds = tuple(range(self.seeds))
        if (
            not isinstance(self.seeds, Sequence | range)
            or isinstance(self.seeds, str)
            or not all(isinstance(s, int) for s in self.seeds)
        ):
            raise UsageError(f"seeds must be an integer >= 1 or a sequence of integers, got {self.seeds!r}")
        self.seeds = tuple(self.seeds)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"seeds must be different integers >= 0, got {self.seeds}")
        if self.max_seeds is not None and self.max_seeds < len(self.seeds):
            raise UsageError(f"max_seeds must be >= seeds, got {self.max_seeds} < {len(self.seeds)}")
        if not isinstance(self.tune, int) or self.tune < 0:
            raise UsageError(f"tune must be an integer >= 0, got {self.tune!r}")
        if not 0 < self.alpha < 1:
            raise UsageError(f"alpha must be in (0, 1), got {self.alpha}")
        for name, direction in {self.metric: self.direction, **self.metrics}.items():
            if direction not in ("max", "min"):
                raise unknown(f"direction of metric {name!r}:", str(direction), ("max", "min"))
        self.metrics = {self.metric: self.direction, **{k: v for k, v in self.metrics.items() if k != self.metric}}
        self.settings = {str(name): value for name, value in self.settings.items()}
        if not self.settings:
            raise UsageError(f"study {self.name!r} has an empty mapping of settings; leave it out for a single one")
        if self.baseline is None:
            self.baseline = next(iter(self.arms))
        elif self.baseline not in self.arms:
            raise unknown("baseline arm", self.baseline, self.arms)
        for claim in self.claims:
            self._check(claim.expect)

    @property
    def claims(self) -> list[Claim]:
        """The expectations, each with its sentence."""
        return [c if isinstance(c, Claim) else Claim(str(c), c) for c in self.expect]

    def setting_of(self, expect: Expect) -> str:
        """The name of the setting that an expectation is about."""
        return next(iter(self.settings)) if expect.on is None else expect.on

    def _check(self, expect: Expect) -> None:
        for arm in (expect.arm, expect.other):
            if arm is not None and arm not in self.arms:
                raise unknown("arm in an expectation", arm, self.arms)
        if expect.on is not None and expect.on not in self.settings:
            raise unknown("setting in an expectation", expect.on, self.settings)
        if expect.metric is not None and expect.metric not in {*self.metrics, *COSTS}:
            raise unknown("metric in an expectation", expect.metric, {*self.metrics, *COSTS})
        if expect.tuned and not self.tune:
            raise UsageError(f"the expectation {expect} is about tuned trials, but tune is 0")

    def run(
        self,
        store: str | Path = "runs",
        *,
        engine: str = "local",
        workers: int | None = None,
        device: str = "cpu",
        time_limit: float | None = None,
        memory_limit: int | None = None,
        retry_failed: bool = False,
        progress: bool | None = None,
    ) -> Results:
        """Runs what the store does not hold yet and returns everything.

        Args:
            store: folder of the store; made when it is not there.
            engine: "local" (worker processes) or "ray" (an extra).
            workers: trials at once; one per core when None.
            device: where arms compute, "cpu", "cuda", "cuda:1", "mps" or "auto".
            time_limit: seconds a trial may take before it is recorded as failed.
            memory_limit: bytes a trial may take beyond what a worker starts with (CPU, Linux).
            retry_failed: run failed trials once more; by default their record stands.
            progress: show progress on stderr; only on a terminal when None.

        Returns:
            The results: ``.frame``, ``.verdicts``, ``.table()``, ``.report(path)``.

        Raises:
            StoreError: the store cannot be opened or written.
            KeyboardInterrupt: after Ctrl-C; what was finished is in the store, the rest goes on with the next run.
        """
        from weightroom.study.driver import run_study

        return run_study(
            self, store, engine=engine, workers=workers, device=device, time_limit=time_limit,
            memory_limit=memory_limit, retry_failed=retry_failed, progress=progress,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The study's configuration, as plain values for reports."""
        arms = {
            name: {"defaults": dict(arm.defaults), "space": dict(arm.space)}
            for name, arm in self.arms.items()
            if isinstance(arm, Arm)
        }
        return json.loads(
            json.dumps(
                {
                    "name": self.name, "arms": arms, "metric": self.metric, "metrics": dict(self.metrics), "baseline": self.baseline,
                    "settings": list(self.settings), "seeds": list(self.seeds) if not isinstance(self.seeds, int) else self.seeds,
                    "max_seeds": self.max_seeds, "tune": self.tune, "scale": self.scale.value, "alpha": self.alpha,
                    "notes": dict(self.notes),
                },
                default=str,
            )
        )  # fmt: skip

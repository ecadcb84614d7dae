"""What ``import weightroom as wr`` offers as functions: compare, check, papers, cite, verdicts."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from torch import nn

from weightroom import papers as papers_package
from weightroom import tasks as tasks_package
from weightroom.compare import FAMILIES
from weightroom.compare.base import Family, Method, Options
from weightroom.data import data_root
from weightroom.errors import MissingDataError, UsageError, unknown
from weightroom.metrics import check_device
from weightroom.papers.base import Paper
from weightroom.study import Results, Scale, Study, Task, Verdict
from weightroom.study.results import check_report
from weightroom.study.stats import overall

__all__ = ["Check", "check", "cite", "compare", "family", "paper", "papers", "recorded", "study_of", "tasks"]

#: Recorded verdicts, one file per scale, beside the package's sources.
RECORDS = Path(__file__).parent / "verdicts"


def compare(
    name: str,
    task: str | Path | Task | Callable[[], Task] = "digits",
    *,
    arms: Sequence[str] | None = None,
    methods: Mapping[str, Method] | None = None,
    sparsity: Sequence[float] = (),
    eps: Sequence[float] = (),
    metric: str | None = None,
    epochs: int | None = None,
    seeds: int | Sequence[int] = 5,
    tune: int = 0,
    scale: str | Scale = "small",
    label_noise: float = 0.0,
    imbalance: float = 1.0,
    samples: int | None = None,
    download: bool = False,
    onnx: bool = False,
    export: str | Path | None = None,
    report: str | Path | None = None,
    store: str | Path = "runs",
    **how: Any,
) -> Results:
    """Compares the methods of a family on one task: same seeds, splits, initial weights and batches for all.

    Args:
        name: the family: "prune", "loss", "optimizer", "adapt", "distill", "robust", "patch" or "merge".
        task: a ``Task``, a function that returns one, a built-in name, or a Python file (see ``weightroom.tasks.load``).
        arms: names of the arms to run, all when None; the baseline always runs.
        methods: arms of your own, name -> ``Method``, beside those that are there.
        sparsity: operating points of "prune", shares of weights to remove in [0, 1).
        eps: sizes of the perturbation of "robust", in the unit of the inputs, in the largest norm.
        metric: the metric that decides, of the task or of the family; the usual one when None.
        epochs: instead of the recipe's.
        seeds: how many, or which.
        tune: trials per arm on the validation split; then the table shows the common setting and the tuned result.
        scale: "smoke" trains two epochs; the others as the recipe says.
        label_noise: share of training labels to replace at random (see ``Task.spoil``).
        imbalance: ratio of the largest to the smallest class in training.
        samples: keep so many training samples.
        download: allow a built-in task to download its data.
        onnx: measure the latency of "prune" in ONNX Runtime too; some seconds for each trial.
        export: folder for the best model of each operating point of "prune", as safetensors and ONNX.
        report: path of an HTML report to write.
        store: folder of the store.
        **how: engine, workers, device, time_limit, memory_limit, retry_failed, progress (see ``Study.run``).

    Returns:
        The results: ``.table()``, ``.frame``, ``.report(path)``.

    Raises:
        UsageError: something is unknown or out of range.
        TaskError: the task cannot be loaded or does not fit together.
    """
    _check_how(how)
    arms = [arms] if isinstance(arms, str) else arms
    sparsity, eps = ((v,) if isinstance(v, int | float) else v for v in (sparsity, eps))
    study = study_of(
        name, task, arms=arms, methods=methods, sparsity=sparsity, eps=eps, metric=metric, epochs=epochs, seeds=seeds, tune=tune, scale=scale,
        label_noise=label_noise, imbalance=imbalance, samples=samples, download=download, device=how.get("device", "cpu"), onnx=onnx,
        export=export is not None,
    )  # fmt: skip
    if report is not None:
        check_report(report)
    results = study.run(store, **how)
    results.environment = {**results.environment, "command": _command()}
    if report is not None:
        results.report(report)
    if export is not None:
        family(name).export(results, Path(export))  # type: ignore[misc]
    return results


def study_of(
    name: str, task: str | Path | Task | Callable[[], Task], *, arms: Sequence[str] | None, methods: Mapping[str, Method] | None,
    sparsity: Sequence[float], eps: Sequence[float], metric: str | None, epochs: int | None, seeds: int | Sequence[int], tune: int,
    scale: str | Scale, label_noise: float, imbalance: float, samples: int | None, download: bool, device: str, onnx: bool = False,
    export: bool = False,
) -> Study:  # fmt: skip
    """Returns the study behind ``compare``, not yet run."""
    kind = family(name)
    for option, given_value, owner in (("sparsity", sparsity, "prune"), ("eps", eps, "robust")):
        if given_value and name != owner:
            raise UsageError(f"{option} belongs to the family {owner!r}, not to {name!r}")
    for option, asked in (("onnx", onnx), ("export", export)):
        if asked and kind.export is None:
            raise UsageError(f"{option} belongs to the family 'prune', not to {name!r}")
    if epochs is not None and epochs < 1:
        raise UsageError(f"epochs must be >= 1, got {epochs}")
    given = _methods(kind, methods or {})
    if arms is not None:
        for arm in arms:
            if arm not in given:
                raise unknown("arm", arm, given)
        given = {arm: method for arm, method in given.items() if arm in arms or arm == kind.baseline}
    loaded = tasks_package.load(task, download=download).spoil(label_noise=label_noise, imbalance=imbalance, samples=samples)
    loaded.check(check_device(device))
    directions = {**loaded.directions, **kind.metrics}
    if metric is not None and metric not in directions:
        raise unknown("metric", metric, directions)
    reasons = {name: method.unfit(loaded) for name, method in given.items() if method.unfit is not None}
    unfit = {name: reason for name, reason in reasons.items() if reason}
    for arm, reason in unfit.items():
        if arms is not None and arm in arms:
            raise UsageError(f"arm {arm!r} does not go with task {loaded.name!r}: {reason}")
    given = {arm: method for arm, method in given.items() if arm not in unfit}
    runs, settings = kind.arms(loaded, given, Options(tuple(sparsity), tuple(eps), epochs, onnx, export))
    decides = metric or kind.metric or loaded.metric
    return Study(
        name=f"compare {name}: {loaded.name}", arms=runs, metric=decides, direction=directions[decides],
        metrics=directions, baseline=kind.baseline if kind.baseline in runs else None, settings=settings,
        seeds=seeds, tune=tune, scale=Scale.of(scale), notes={"task": loaded.name, "recipe": str(loaded.recipe), "family": kind.summary},
    )  # fmt: skip


def family(name: str) -> Family:
    """Returns a family of methods by its name."""
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return importlib.import_module(f"weightroom.compare.{name}").FAMILY


@dataclass
class Check:
    """A paper's claim, run again.

    Args:
        paper: the paper.
        scale: how large it was run.
        results: one per study of the paper.
    """

    paper: Paper
    scale: Scale
    results: list[Results]

    @property
    def verdicts(self) -> list[Verdict]:
        """One verdict per claim."""
        return [verdict for results in self.results for verdict in results.verdicts]

    @property
    def verdict(self) -> str:
        """One word for all claims: fails if one fails, holds if all hold, else inconclusive."""
        return overall([v.verdict for v in self.verdicts])

    @property
    def frame(self) -> pd.DataFrame:
        """One row per trial of all studies."""
        return pd.concat([results.frame for results in self.results], ignore_index=True)

    @property
    def failed(self) -> int:
        """Trials that failed."""
        return sum(results.failed for results in self.results)

    def report(self, path: str | Path) -> Path:
        """Writes one HTML page for all studies, see ``Results.report``."""
        from weightroom.study.report import write_many

        path = check_report(path)
        write_many(self.results, path, title=self.paper.title)
        return path

    def as_dict(self) -> dict[str, Any]:
        """Key, scale, verdict, expectations and trials as plain values."""
        return {
            "key": self.paper.key, "scale": self.scale.value, "verdict": self.verdict,
            "expectations": [v.as_dict() for v in self.verdicts],
            "trials": json.loads(self.frame.to_json(orient="records")),
            "environment": dict(self.results[0].environment),
        }  # fmt: skip


def check(
    key: str,
    *,
    scale: str | Scale = "small",
    seeds: int | None = None,
    tune: int | None = None,
    report: str | Path | None = None,
    store: str | Path = "runs",
    **how: Any,
) -> Check:
    """Runs a paper's study and says what became of each claim.

    Args:
        key: the paper's key, see ``papers``.
        scale: "smoke", "small", "real" or "full".
        seeds: other than the study's own number; then no more are added.
        tune: other than the study's own number of tuning trials.
        report: path of an HTML report to write.
        store: folder of the store.
        **how: engine, workers, device, time_limit, memory_limit, retry_failed, progress (see ``Study.run``).

    Raises:
        UsageError: no paper of that key, no such scale.
        MissingDataError: scale "real", and ``WEIGHTROOM_DATA`` does not hold what the paper's study reads.
    """
    _check_how(how)
    chosen, scale = paper(key), Scale.of(scale)
    if scale is Scale.REAL:
        _check_data(chosen)
    if report is not None:
        check_report(report)
    made = _module(key).study(scale)
    results = []
    for study in made if isinstance(made, list) else [made]:
        study.paper = chosen
        if seeds is not None:
            study = replace(study, seeds=seeds, max_seeds=None)
        if tune is not None and study.tune:
            study = replace(study, tune=tune)
        one = study.run(store, **how)
        one.environment = {**one.environment, "command": _command()}
        results.append(one)
    done = Check(chosen, scale, results)
    if report is not None:
        done.report(report)
    return done


def _check_data(paper: Paper) -> None:
    root = data_root()
    missing = [name for name in paper.real if root is None or not (root / name).is_dir()]
    if missing:
        state = "it is not set" if root is None else f"it is {root}, which has no folder of that name"
        raise MissingDataError(
            f"the data of {paper.key} at scale real is not there: WEIGHTROOM_DATA must name a folder that holds "
            f"{', '.join(missing)}; {state}"
        )


@functools.cache
def _modules() -> dict[str, ModuleType]:
    names = (m.name for m in pkgutil.iter_modules(papers_package.__path__) if m.name != "base")
    found = [importlib.import_module(f"{papers_package.__name__}.{name}") for name in names]
    return {module.PAPER.key: module for module in sorted(found, key=lambda m: m.PAPER.key)}


def _module(key: str) -> ModuleType:
    if key not in _modules():
        raise unknown("paper", key, _modules())
    return _modules()[key]


def papers() -> list[Paper]:
    """Returns every paper's card, by key."""
    return [module.PAPER for module in _modules().values()]


def paper(key: str) -> Paper:
    """Returns one paper's card."""
    return _module(key).PAPER


def tasks() -> dict[str, str]:
    """Returns the built-in tasks: name -> what it is."""
    functions = {name: getattr(tasks_package, function) for name, function in tasks_package.BUILT_IN.items()}
    return {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in functions.items()}


def cite(what: Any) -> str:
    """Returns BibTeX for a paper's key, an import path, a part, or a model built from parts.

    Args:
        what: "lion-k", "weightroom.optim.LionK", the class or function itself, an instance, or an ``nn.Module`` that contains
            some.

    Raises:
        UsageError: nothing of weightroom is in it.
    """
    if isinstance(what, str):
        if what in _modules():
            return paper(what).bibtex
        if "." not in what:
            raise unknown("paper or import path", what, [*_modules(), *(name for p in papers() for name in p.names())])
        what = _imported(what)
    things = [what, type(what)]
    if isinstance(what, nn.Module):
        things += [type(module) for module in what.modules()]
    found = [p for p in papers() if any(part is thing for part in p.parts for thing in things)]
    if not found:
        raise UsageError(f"{what!r} is not part of weightroom and contains nothing that is: there is no paper to cite")
    return "\n\n".join(p.bibtex for p in found)


def recorded(scale: str | Scale = "small") -> dict[str, Any]:
    """Returns the recorded verdicts of a scale: paper's key -> what was recorded; empty where nothing was."""
    path = RECORDS / f"{Scale.of(scale).value}.json"
    return json.loads(path.read_text())["papers"] if path.exists() else {}


def _methods(kind: Family, own: Mapping[str, Method]) -> dict[str, Method]:
    brought = {
        name: replace(method, cites=(*method.cites, p)) for p in papers() for name, method in p.methods_of(kind.name).items()
    }
    return {**kind.baselines, **brought, **own}


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError):
        raise unknown("import path", path, [name for p in papers() for name in p.names()]) from None


def _check_how(how: Mapping[str, Any]) -> None:
    accepted = [name for name, p in inspect.signature(Study.run).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in how:
        if name not in accepted:
            raise unknown("argument", name, accepted)


def _command() -> str | None:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    return shlex.join(["weightroom", *sys.argv[1:]]) if program == "weightroom" else None

"""The report: one HTML file that needs nothing else, with the trials as CSV and Parquet beside it.

Python decides what is shown and builds every figure, as the JSON that plotly.js draws; ``report.js`` only picks the figure of
the metric, setting and hyper-parameters that the reader has selected and gives it the colours of the theme. ``report.html`` is
the page, ``report.css`` its looks. A content security policy, with the hashes of the two scripts, keeps the page from loading or
running anything else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from weightroom.errors import StoreError
from weightroom.study.core import COSTS, Arm
from weightroom.study.results import LEVEL, Results
from weightroom.study.stats import Verdict, interval, overall
from weightroom.study.store import FILE, Store

__all__ = ["write", "write_many"]

#: Colours (``--arm-0`` ... in report.css, the first for the baseline), symbols and dashes; 7 and 5 are coprime: 35 arms differ.
COLOURS = 7
SYMBOLS = {
    "circle": "M9 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "square": "M9 2h8v8H9z", "diamond": "M13 1l5 5-5 5-5-5z",
    "triangle-up": "M13 1l5 9H8z", "triangle-down": "M13 11l5-9H8z",
}  # fmt: skip
DASHES = {"solid": "none", "dash": "5 3", "dot": "2 2"}
#: Costs in the order in which the page offers them for the x axis.
ON_X = (
    "parameters",
    "flops",
    "latency",
    "latency_1",
    "onnx_latency",
    "onnx_latency_1",
    "train_seconds",
    "seconds",
    "peak_memory",
)
#: Points of a training curve at the most.
POINTS = 200
#: Costs whose name is not what to call them.
NAMES = {"seconds": "time", "train_seconds": "training time", "flops": "FLOPs"}
#: Unit name -> size, ascending, for each cost; a column has one unit, so that its numbers can be compared.
_TIME = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}
_COUNT = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_UNITS = {
    "seconds": _TIME,
    "train_seconds": _TIME,
    "latency": _TIME,
    "latency_1": _TIME,
    "onnx_latency": _TIME,
    "onnx_latency_1": _TIME,
    "peak_memory": _BYTES,
}
#: What trials are for.
STAGES = {"common": "common setting", "tuned": "tuned", "search": "tuning"}
#: Of the verdicts, so that colour is never alone.
MARKS = {"holds": "✓", "fails": "✗", "inconclusive": "?"}

Row = Mapping[str, Any]
Figure = dict[str, Any]


def write(results: Results, path: Path) -> None:
    """Writes the report of one study.

    Args:
        results: of the study.
        path: of the HTML file; the trials go beside it, with the endings ``.csv`` and ``.parquet``.

    Raises:
        OSError: a file cannot be written.
    """
    write_many([results], path)


def write_many(results: Sequence[Results], path: Path, title: str | None = None) -> None:
    """Writes one report of several studies, those of a paper, say.

    Args:
        results: one per study.
        path: of the HTML file; the trials of all studies go beside it, with the endings ``.csv`` and ``.parquet``.
        title: of the page; the study's name, the paper's title, or a count when None.

    Raises:
        OSError: a file cannot be written.
    """
    path = Path(path)
    frame = pd.concat([r.frame for r in results], ignore_index=True)
    frame.to_csv(path.with_suffix(".csv"), index=False)
    _plain(frame).to_parquet(path.with_suffix(".parquet"), index=False)
    with np.errstate(all="ignore"):
        page = _page(results, path, title)
    path.write_text(page, encoding="utf-8", newline="\n")


def _page(results: Sequence[Results], path: Path, title: str | None) -> str:
    arms = dict.fromkeys(arm for r in results for arm in (str(r.study.baseline), *r.study.arms))
    styles = {arm: i for i, arm in enumerate(arms)}
    studies = [_Shown(r, styles) for r in results]
    words = [v.verdict for r in results for v in r.verdicts]
    papers = list({id(r.study.paper): r.study.paper for r in results if r.study.paper is not None}.values())
    if title is None:
        several = papers[0].title if len(papers) == 1 else f"{len(results)} studies"
        title = results[0].study.name if len(results) == 1 else several
    scripts = {"plotly": get_plotlyjs(), "script": _resource("report.js")}
    figures = json.dumps([s.figures for s in studies], allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_resource("report.html")).render(
        title=title, studies=studies, papers=papers, marks=MARKS, stages=STAGES, costs=COSTS, level=f"{100 * LEVEL:g} %",
        overall=overall(words), answer=_answer(words) if words else "",
        tables={ending: quote(path.with_suffix(f".{ending}").name) for ending in ("csv", "parquet")},
        bibtex="\n\n".join(dict.fromkeys(entry for s in studies for entry in s.bibtex)),
        policy=" ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts.values()),
        figures=Markup(figures), style=Markup(_resource("report.css")), **{name: Markup(text) for name, text in scripts.items()},
    )  # fmt: skip


@dataclass
class _Shown:
    """One study as the page shows it.

    Whatever depends on what the reader selects exists once per choice: the dimensions are variant ("common", "tuned"), metric,
    setting, cost and curve, and a choice is known by its index along each.
    """

    results: Results
    styles: Mapping[str, int]

    @cached_property
    def dims(self) -> dict[str, list[str]]:
        """Dimension -> its choices."""
        r = self.results
        measured = [m for m in r.study.metrics if m in r.frame and r.frame[m].notna().any()]
        costs = sorted((c for c in COSTS if c in r.frame and r.frame[c].notna().any()), key=lambda c: (*ON_X, *COSTS).index(c))
        return {
            "variant": ["common", "tuned"] if r.tuned else ["common"], "metric": list(dict.fromkeys([r.study.metric, *measured])),
            "setting": list(r.study.settings), "cost": costs, "curve": list(self.curves),
        }  # fmt: skip

    @cached_property
    def points(self) -> tuple[list[float], str] | None:
        """Where the settings lie on an axis and what that axis is called; None when their names are not numbers."""
        return _operating_points(list(self.results.study.settings))

    @cached_property
    def tables(self) -> dict[tuple[str, str, str], dict[str, Row]]:
        """(variant, metric, setting) -> arm -> its row in the table, best first."""
        keys = product(*(self.dims[d] for d in ("variant", "metric", "setting")))
        return {(v, m, s): {row["arm"]: row for row in self.results.table(s, m, v).to_dict("records")} for v, m, s in keys}  # type: ignore[misc]

    @property
    def selectable(self) -> list[str]:
        """Dimensions with more than one choice."""
        return [dim for dim, choices in self.dims.items() if len(choices) > 1]

    def called(self, cost: str) -> str:
        """A cost in words."""
        return NAMES.get(cost, cost.replace("_", " "))

    # What is said in words

    @cached_property
    def answer(self) -> str:
        """One line: what became of the claims, or which arm is best."""
        words = [v.verdict for v in self.results.verdicts]
        return _answer(words) if words else self.best

    @cached_property
    def best(self) -> str:
        """Which arm has the best mean of the deciding metric."""
        r = self.results
        metric, settings = r.study.metric, self.dims["setting"]
        ranked = {s: [row for row in self.tables["common", metric, s].values() if math.isfinite(row["mean"])] for s in settings}
        tops = {s: rows[0] for s, rows in ranked.items() if rows}
        if not tops:
            return f"No result: none of {_count(len(r.entries), 'trial')} has finished."
        wins = Counter(top["arm"] for top in tops.values()).most_common(1)[0]
        setting, top = next(iter(tops.items()))
        value = _with_interval(top["mean"], top["low"], top["high"], _decimals([top["mean"]]))
        if len(r.study.arms) == 1 and len(tops) == 1:
            return f"{top['arm']}: {metric} {value}."
        if len(tops) == 1:
            return f"{top['arm']} has the best mean {metric}: {value}{self._against_baseline(top)}."
        where = "every setting" if wins[1] == len(settings) else f"{wins[1]} of {len(settings)} settings"
        return f"{wins[0]} has the best mean {metric} in {where}; at {setting}, {top['arm']} reaches {value}."

    def _against_baseline(self, top: Row) -> str:
        if top["arm"] == self.results.study.baseline or not math.isfinite(top["difference"]):
            return ""
        spec = _decimals([top["mean"]])
        clear = "" if top["difference_low"] > 0 else ", not clearly better"
        more = _with_interval(top["difference"], top["difference_low"], top["difference_high"], spec, sign=True)
        return f"; {more} against {self.results.study.baseline}{clear}"

    @cached_property
    def notices(self) -> list[str]:
        """What a reader must know before trusting the page."""
        r = self.results
        out = []
        if r.failed or r.missing:
            parts = [f"{count} {what}" for count, what in ((r.failed, "failed"), (r.missing, "not run")) if count]
            out.append(f"Of {_count(len(r.entries), 'trial')}, {' and '.join(parts)}; see “Trials without a result” below.")
        if len(self.seeds) == 1:
            out.append("One seed only: there are no intervals, and differences may be chance.")
        if self.curves_error:
            out.append(f"The training curves could not be read: {self.curves_error}")
        return out

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that decide."""
        return list(dict.fromkeys(e.key.seed for e in self.results.entries if e.variant == "common"))

    @cached_property
    def facts(self) -> list[str]:
        """The study in a few words, for the line below the answer."""
        r, study = self.results, self.results.study
        better = "higher" if r.direction(study.metric) > 0 else "lower"
        out = [f"{study.metric}, {better} is better", _count(len(study.arms), "arm"), _count(len(self.seeds), "seed")]
        out += [_count(len(study.settings), "setting")] if len(study.settings) > 1 else []
        out += [f"{study.tune} tuning trials per arm"] if study.tune else []
        return [*out, f"scale {study.scale.value}", *([str(r.environment["date"])[:10]] if "date" in r.environment else [])]

    @cached_property
    def legend(self) -> list[dict[str, Any]]:
        """Arms with their style."""
        return [{"name": arm, "index": i, "swatch": self.swatch(arm)} for i, arm in enumerate(self.results.study.arms)]

    def swatch(self, arm: str) -> Markup:
        """The line and symbol of an arm."""
        i = self.styles[arm]
        shape, dash = SYMBOLS[_cycle(SYMBOLS, i)], DASHES[_cycle(DASHES, i // COLOURS)]
        return Markup(
            f'<svg class="swatch arm-{i % COLOURS}" viewBox="0 0 26 12" aria-hidden="true">'
            f'<path d="M0 6h26" stroke-dasharray="{dash}"/><path d="{shape}"/></svg>'
        )

    @cached_property
    def rankings(self) -> list[dict[str, Any]]:
        """One ranking table per choice."""
        out = []
        for (variant, metric, setting), table in self.tables.items():
            rows = table.values()
            costs = [(cost, *_unit(cost, every)) for cost in COSTS if (every := _column(rows, cost))]
            specs = {cost: _decimals([x / size for x in _column(rows, cost)], 3) for cost, size, _ in costs}
            mean = _decimals(_column(rows, "mean"))
            gap = _decimals(_column(rows, "difference", "difference_low", "difference_high"), 3)
            shown = [
                {
                    "arm": row["arm"], "rank": "" if math.isnan(row["mean"]) else f"{row['rank']:.0f}", "n": row["n"],
                    "failed": row["failed"], "mean": _number(row["mean"], mean),
                    "interval": _bounds(row["low"], row["high"], mean),
                    "difference": _number(row["difference"], gap, sign=True),
                    "difference_interval": _bounds(row["difference_low"], row["difference_high"], gap, sign=True),
                    "costs": [_number(row[cost] / size, specs[cost]) for cost, size, _ in costs],
                }
                for row in rows
            ]  # fmt: skip
            heads = [(cost, self.called(cost), unit) for cost, _, unit in costs]
            where = {"variant": variant, "metric": metric, "setting": setting}
            out.append({**where, "when": self._when(**where), "rows": shown, "costs": heads})
        return out

    @cached_property
    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts, ready to be read."""
        out = []
        for v in self.results.verdicts:
            spec = _decimals([v.difference, *v.interval], 3)
            signed = v.other is not None
            where = [v.metric, *([v.setting] if v.setting else []), *(["tuned"] if v.tuned else [])]
            out.append({
                "says": v.statement, "verdict": v.verdict, "about": f"{v.arm} against {v.other}" if signed else v.arm,
                "where": ", ".join(where), "difference": _number(v.difference, spec, sign=signed), "n": v.n, "reason": v.reason,
                "interval": _bounds(*v.interval, spec, sign=signed), "level": f"{100 * v.level:.4g} %", "picture": _picture(v),
                "p": "–" if math.isnan(v.p) else f"{v.p:.2g}" if v.p >= 1e-4 else "< 0.0001",
            })  # fmt: skip
        return out

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """Trials without a result: those that share arm, setting and reason in one row."""
        frame = self.results.frame
        lost = frame[frame.status.isin(["failed", "missing"])]
        out = []
        for (variant, arm, _, reason), group in lost.groupby(["variant", "arm", "status", "reason"], sort=False):
            settings, seeds = list(dict.fromkeys(group.setting)), sorted(set(group.seed))
            out.append({
                "arm": arm, "stage": STAGES[str(variant)], "trials": len(group), "reason": reason or "not run",
                "settings": ", ".join(settings) if len(settings) <= 3 else f"{len(settings)} of {len(self.dims['setting'])}",
                "seeds": _listed(seeds) if variant != "search" else "",
            })  # fmt: skip
        return out

    @cached_property
    def tuning(self) -> list[dict[str, Any]]:
        """What each arm was given to tune and what it chose, per metric and setting."""
        r = self.results
        if not r.tuned:
            return []
        searched = r.frame[r.frame.variant == "search"]
        out = []
        for metric, setting in product(self.dims["metric"], self.dims["setting"]):
            tables = [self.tables[variant, metric, setting] for variant in ("common", "tuned")]
            spec = _decimals([x for t in tables for x in _column(t.values(), "mean")])
            rows = []
            for name, arm in r.study.arms.items():
                tried = searched[(searched.arm == name) & (searched.setting == setting)]
                results = [_with_interval(t[name]["mean"], t[name]["low"], t[name]["high"], spec) for t in tables]
                space = arm.space if isinstance(arm, Arm) else {}
                rows.append({
                    "arm": name, "tried": len(tried), "failed": int((tried.status == "failed").sum()), "results": results,
                    "space": {k: _space(v) for k, v in space.items()},
                    "chosen": {k: _value(v) for k, v in r.parameters(name, setting).items()},
                })  # fmt: skip
            out.append({"when": self._when(metric=metric, setting=setting), "metric": metric, "setting": setting, "rows": rows})
        return out

    @cached_property
    def configuration(self) -> dict[str, str]:
        """How the study was set up."""
        study = self.results.study
        metrics = [f"{name} ({'higher' if way == 'max' else 'lower'} is better)" for name, way in study.metrics.items()]
        tuning = f"{study.tune} trials per arm on the validation split" if study.tune else "none: every arm at its common setting"
        out = {
            "Deciding metric": metrics[0], "Further metrics": ", ".join(metrics[1:]), "Baseline": str(study.baseline),
            "Settings": ", ".join(study.settings), "Seeds": _listed(self.seeds), "Most seeds": str(study.max_seeds or ""),
            "Scale": study.scale.value, "Tuning": tuning,
            "Error rate": f"{study.alpha:g}, shared by all claims" if study.claims else "",
        }  # fmt: skip
        return {name: text for name, text in out.items() if text}

    @cached_property
    def arms(self) -> list[dict[str, Any]]:
        """The arms' hyper-parameters."""
        pairs = [(name, arm) for name, arm in self.results.study.arms.items() if isinstance(arm, Arm)]
        return [{"arm": name, "defaults": {k: _value(v) for k, v in arm.defaults.items()}} for name, arm in pairs]

    @cached_property
    def described(self) -> str:
        """The configuration as JSON."""
        return json.dumps(self.results.study.describe(), indent=2, ensure_ascii=False)

    @cached_property
    def environment(self) -> dict[str, str]:
        """Versions and machine."""
        return {str(name): _value(value) for name, value in self.results.environment.items() if name != "command"}

    @cached_property
    def command(self) -> str:
        """What to say to run it again."""
        r = self.results
        if r.environment.get("command"):
            return str(r.environment["command"])
        where, key = str(r.folder), getattr(r.study.paper, "key", None)
        if key is None:
            return f"# study is the Study {r.study.name!r}; what the store holds does not run again\nstudy.run({where!r})"
        return (
            f"from weightroom.papers.{str(key).replace('-', '_')} import study\nfrom weightroom.study import Scale\n\n"
            f"made = study(Scale({r.study.scale.value!r}))\n"
            f"for one in made if isinstance(made, list) else [made]:\n    print(one.run({where!r}).verdicts)"
        )

    @cached_property
    def statistics(self) -> str:
        """Three sentences on the intervals and verdicts."""
        study, fewest = self.results.study, len(tuple(self.results.study.seeds))  # type: ignore[arg-type]
        first = (
            f"Every mean has its {100 * LEVEL:g} % Student interval over seeds (Student, Biometrika 1908), and every difference "
            "is taken seed by seed before it is averaged, signed so that positive is better."
        )
        second = (
            "A claim holds when its whole interval lies inside the claimed region, fails when it lies outside, and is "
            "inconclusive otherwise (for equivalence: Schuirmann, J. Pharmacokinet. Biopharm. 1987), where the claims of a study "
            f"share an error rate of {study.alpha:g} (Holm, Scand. J. Statist. 1979) and a trial that failed leaves its claims "
            "undecided."
        )
        third = (
            f"The number of seeds, {fewest}, was fixed beforehand; with few seeds and skewed metrics the intervals are "
            "approximate."
        )
        if study.claims and study.max_seeds and study.max_seeds > fewest:
            third = (
                f"Seeds were added from {fewest} up to {study.max_seeds} until every claim was decided, and each look spends its "
                "share of the error rate (Kim and DeMets, Biometrika 1987), so that looking often does not raise it."
            )
        return " ".join([first, second, third])

    @cached_property
    def bibtex(self) -> list[str]:
        """BibTeX of the paper and of what the arms use."""
        study = self.results.study
        cites = [study.paper, *(cite for arm in study.arms.values() if isinstance(arm, Arm) for cite in arm.cites)]
        entries = [cite if isinstance(cite, str) else getattr(cite, "bibtex", None) for cite in cites if cite is not None]
        return list(dict.fromkeys(entry.strip() for entry in entries if entry))

    # What is drawn

    @cached_property
    def plots(self) -> list[dict[str, Any]]:
        """The figures of the page: name, the dimensions that choose among its versions, heading and caption."""
        study, dims, level = self.results.study, self.dims, f"{100 * LEVEL:g} %"
        named = ["variant", "metric", "setting"]
        several, single = len(dims["setting"]) > 1, len(study.arms) == 1
        line = "Lines are means, bands" if self.points else "Marks are means, lines"
        spaced = f" {self.points[1]}." if self.points and self.points[1] else ""
        along = " Each line runs through the settings." if self.points else ""
        out = [
            ("across", several, ["variant", "metric"], "Across settings", f"{line} their {level} intervals.{spaced}"),
            ("arms", True, named, "Arm by arm", f"Marks are means with {level} intervals, small dots single seeds. Best first."),
            ("differences", not single, named, f"Against {study.baseline}",
             "Paired by seed, right is better. Filled marks: the interval excludes zero."),
            ("costs", dims["cost"], ["variant", "metric", "cost", *([] if self.points else ["setting"])], "Gain and cost",
             f"Means, with {level} intervals of the metric.{along}"),
            ("tuned", self.results.tuned, ["metric", "setting"], "Common setting and tuned",
             f"Open: the common setting. Filled: after tuning. Both with {level} intervals."),
            ("curves", dims["curve"], ["variant", "setting", "curve"], "Training curves",
             f"Means over seeds with {level} bands."),
        ]  # fmt: skip
        shown = [
            {"name": n, "by": by, "head": head, "caption": text, "wide": n == "across"}
            for n, there, by, head, text in out
            if there
        ]
        if len([plot for plot in shown if not plot["wide"]]) % 2:
            shown[-1]["wide"] = True
        return shown

    @cached_property
    def figures(self) -> dict[str, dict[str, Figure | None]]:
        """Plot -> "i,j,..." (the indices of a choice) -> figure."""
        draw: dict[str, Callable[..., Figure | None]] = {
            "across": self._across, "arms": self._arms, "differences": self._differences, "costs": self._costs,
            "tuned": self._tuned, "curves": self._curves,
        }  # fmt: skip
        out: dict[str, dict[str, Figure | None]] = {}
        for name, by in ((plot["name"], plot["by"]) for plot in self.plots):
            for choice in product(*(enumerate(self.dims[dim]) for dim in by)):
                out.setdefault(name, {})[",".join(str(i) for i, _ in choice)] = draw[name](*(value for _, value in choice))
        return out

    def _across(self, variant: str, metric: str) -> Figure | None:
        settings, arms = self.dims["setting"], list(self.results.study.arms)
        tables = [self.tables[variant, metric, s] for s in settings]
        every = [row for table in tables for row in table.values()]
        spec, traces = _decimals(_column(every, "mean")), []
        for i, arm in enumerate(arms):
            rows = [(k, table[arm]) for k, table in enumerate(tables) if math.isfinite(table[arm]["mean"])]
            hover = [self._hover(arm, row, metric, spec, setting=settings[k]) for k, row in rows]
            means = [row["mean"] for _, row in rows]
            if self.points:
                x = [self.points[0][k] for k, _ in rows]
                traces += self._band(arm, [(at, row["low"], row["high"]) for at, (_, row) in zip(x, rows, strict=True)])
                traces.append(self._trace(arm, "line", x, means, hover))
            else:
                shift = (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
                y, bars = [k + shift for k, _ in rows], _bars([row for _, row in rows])
                traces.append(self._trace(arm, "line", means, y, hover, mode="markers", error_x=bars))
        axis = self._gain(metric, every)
        alt = f"{metric} of {_count(len(arms), 'arm')} across {_count(len(settings), 'setting')}"
        if self.points:
            ticks = {"title": {"text": "setting"}, "tickvals": self.points[0], "ticktext": [_label(s, 12) for s in settings]}
            return _figure(traces, alt, 440, xaxis=ticks, yaxis=axis)
        height = 90 + len(settings) * min(26 + 7 * len(arms), 1400 // len(settings))
        return _figure(traces, alt, height, xaxis=axis, rows=list(settings))

    def _arms(self, variant: str, metric: str, setting: str) -> Figure | None:
        table = self.tables[variant, metric, setting]
        spec, traces, notes, said = _decimals(_column(table.values(), "mean")), [], [], []
        for i, (arm, row) in enumerate(table.items()):
            if not math.isfinite(row["mean"]):
                why = "not finite" if row["n"] else f"no result, {row['failed']} failed" if row["failed"] else "no result"
                notes.append(_note(i, why))
                continue
            said.append(f"{arm} {_number(row['mean'], spec)}")
            traces.append(self._dots(arm, self.results.values(arm, metric, setting, variant), i, spec))
            hover = [self._hover(arm, row, metric, spec)]
            traces.append(self._trace(arm, "mean", [row["mean"]], [i], hover, error_x=_bars([row])))
        axis = self._gain(metric, table.values())
        alt = f"{metric}, best first: {', '.join(said)}"
        return _figure(traces, alt, 90 + 34 * len(table), xaxis=axis, rows=list(table), annotations=notes)

    def _differences(self, variant: str, metric: str, setting: str) -> Figure | None:
        table, base = self.tables[variant, metric, setting], str(self.results.study.baseline)
        baseline = self.results.values(base, metric, setting, variant)
        spec, traces, notes, said = _decimals(_column(table.values(), "difference"), 3), [], [], []
        for i, (arm, whole) in enumerate(table.items()):
            row = {"mean": whole["difference"], "low": whole["difference_low"], "high": whole["difference_high"]}
            if arm == base or not math.isfinite(row["mean"]):
                notes.append(_note(i, "baseline" if arm == base else "no pair of results"))
                continue
            paired = (self.results.direction(metric) * (self.results.values(arm, metric, setting, variant) - baseline)).dropna()
            said.append(f"{arm} {_number(row['mean'], spec, sign=True)}")
            kind = "mean" if math.isfinite(row["low"]) and (row["low"] > 0 or row["high"] < 0) else "open"
            hover = self._hover(f"{arm} against {base}", {**row, "n": len(paired)}, f"improvement in {metric}", spec, sign=True)
            traces += [
                self._dots(arm, paired, i, spec, sign=True),
                self._trace(arm, kind, [row["mean"]], [i], [hover], error_x=_bars([row])),
            ]
        shown = [0.0, *_column(table.values(), "difference_low", "difference_high"), *(x for trace in traces for x in trace["x"])]
        pad = 0.05 * (max(shown) - min(shown)) or 1.0
        title = {"text": f"improvement in {_label(metric)} →"}
        axis = {"title": title, "range": [min(shown) - pad, max(shown) + pad], "zeroline": True}
        alt = f"improvement over {base} in {metric}: {', '.join(said)}"
        return _figure(traces, alt, 90 + 34 * len(table), xaxis=axis, rows=list(table), annotations=notes)

    def _costs(self, variant: str, metric: str, cost: str, setting: str | None = None) -> Figure | None:
        settings = self.dims["setting"] if setting is None else [setting]
        every = [(s, row) for s in settings for row in self.tables[variant, metric, s].values() if cost in row]
        every = [(s, row) for s, row in every if math.isfinite(row["mean"]) and math.isfinite(row[cost])]
        rows = [row for _, row in every]
        size, unit = _unit(cost, _column(rows, cost))
        spec, cost_spec = _decimals(_column(rows, "mean")), _decimals([row[cost] / size for row in rows], 3)
        name, traces = self.called(cost), []
        for arm in self.results.study.arms:
            own = [(s, row) for s, row in every if row["arm"] == arm]
            hover = [
                f"{self._hover(arm, row, metric, spec, setting=s)}<br>{name} {_number(row[cost] / size, cost_spec)} {unit}"
                for s, row in own
            ]
            x, y = [row[cost] / size for _, row in own], [row["mean"] for _, row in own]
            traces.append(self._trace(arm, "line", x, y, hover, error_y=_bars([row for _, row in own])))
        title = f"{name} ({unit})" if unit else name
        xaxis = _axis(title, [row[cost] / size for row in rows], ratio=10)
        alt = f"{metric} against {name} of {_count(len(traces), 'arm')}"
        return _figure(traces, alt, 400, xaxis=xaxis, yaxis=self._gain(metric, rows))

    def _tuned(self, metric: str, setting: str) -> Figure | None:
        common, tuned = (self.tables[variant, metric, setting] for variant in ("common", "tuned"))
        every = [*common.values(), *tuned.values()]
        spec, traces = _decimals(_column(every, "mean")), []
        for i, arm in enumerate(tuned):
            for word, kind, row, shift in (("common setting", "open", common[arm], -0.16), ("tuned", "mean", tuned[arm], 0.16)):
                if math.isfinite(row["mean"]):
                    hover = self._hover(f"{arm}, {word}", row, metric, spec)
                    traces.append(self._trace(arm, kind, [row["mean"]], [i + shift], [hover], error_x=_bars([row])))
        axis = self._gain(metric, every)
        alt = f"{metric} of {_count(len(tuned), 'arm')} at the common setting and tuned"
        return _figure(traces, alt, 90 + 40 * len(tuned), xaxis=axis, rows=list(tuned))

    def _curves(self, variant: str, setting: str, curve: str) -> Figure | None:
        summaries = {arm: _summary(self.curves[curve].get((variant, arm, setting), [])) for arm in self.results.study.arms}
        means = [row["mean"] for summary in summaries.values() for row in summary]
        spec, traces = _decimals(means), []
        for arm, summary in summaries.items():
            steps = [row["step"] for row in summary]
            hover = [self._hover(f"{arm}, step {row['step']:g}", row, curve, spec) for row in summary]
            traces += self._band(arm, [(row["step"], row["low"], row["high"]) for row in summary])
            mode = "lines" if len(steps) > 1 else "markers"
            traces.append(self._trace(arm, "line", steps, [row["mean"] for row in summary], hover, mode=mode))
        alt = f"{curve} over training steps for {_count(len(traces), 'arm')}"
        return _figure(traces, alt, 400, xaxis={"title": {"text": "step"}}, yaxis=_axis(_label(curve), means))

    @cached_property
    def curves(self) -> dict[str, dict[tuple[str, str, str], list[list[tuple[float, float]]]]]:
        """Curve -> (variant, arm, setting) -> the points of each seed."""
        out: dict[str, dict[tuple[str, str, str], list[list[tuple[float, float]]]]] = {}
        for entry in self.results.entries:
            outcome = self.results.outcomes.get(entry.key.fingerprint)
            if entry.variant == "search" or outcome is None or outcome.status != "done":
                continue
            logged: dict[str, list[tuple[float, float]]] = {}
            for name, step, value in self._logged[0].get(entry.key.fingerprint, ()):
                if math.isfinite(step) and math.isfinite(value):
                    logged.setdefault(name, []).append((step, value))
            for name, points in logged.items():
                out.setdefault(name, {}).setdefault((entry.variant, entry.key.arm, entry.key.setting), []).append(sorted(points))
        return out

    @property
    def curves_error(self) -> str:
        """Why the curves could not be read."""
        return self._logged[1]

    @cached_property
    def _logged(self) -> tuple[dict[str, list[tuple[str, float, float]]], str]:
        if not (Path(self.results.folder) / FILE).exists():
            return {}, ""
        try:
            with Store(self.results.folder, create=False) as store:
                return store.curves(e.key.fingerprint for e in self.results.entries), ""
        except StoreError as error:
            return {}, str(error)

    def _trace(self, arm: str, kind: str, x: Sequence[float], y: Sequence[float], hover: Sequence[str], **more: Any) -> Figure:
        """What an arm looks like; the colour is the theme's and is put in by the page."""
        i = self.styles[arm]
        symbol = _cycle(SYMBOLS, i) if kind == "line" else "circle"
        look: Figure = {"mode": "markers", "marker": {"symbol": f"{symbol}-open" if kind == "open" else symbol, "size": 10}}
        if kind == "line":
            look |= {"mode": "lines+markers", "line": {"width": 2, "dash": _cycle(DASHES, i // COLOURS)}}
            look["marker"]["size"] = 9
        return self._scatter(arm, kind, x=x, y=y, hovertext=hover, hoverinfo="text", **{**look, **more})

    def _dots(self, arm: str, values: pd.Series, row: int, spec: str, *, sign: bool = False) -> Figure:
        values = values[np.isfinite(values)]
        hover = [f"{_label(f'{arm}, seed {seed}')}<br>{_number(v, spec, sign=sign)}" for seed, v in values.items()]
        where = {"x": values.tolist(), "y": [row + 0.26] * len(values)}
        return self._scatter(arm, "dots", mode="markers", marker={"size": 6}, hovertext=hover, hoverinfo="text", **where)

    def _band(self, arm: str, points: Sequence[tuple[float, float, float]]) -> list[Figure]:
        points = [p for p in points if math.isfinite(p[1]) and math.isfinite(p[2])]
        if len(points) < 2:
            return []
        x, low, high = ([p[k] for p in points] for k in range(3))
        around = {"x": [*x, *reversed(x)], "y": [*high, *reversed(low)]}
        return [self._scatter(arm, "band", mode="lines", line={"width": 0}, fill="toself", hoverinfo="skip", **around)]

    def _scatter(self, arm: str, kind: str, **given: Any) -> Figure:
        meta = {"arm": list(self.results.study.arms).index(arm), "colour": self.styles[arm] % COLOURS, "kind": kind}
        return {"type": "scatter", "name": _label(arm), "meta": meta, **given}

    def _hover(self, arm: str, row: Row, metric: str, spec: str, *, setting: str = "", sign: bool = False) -> str:
        at = f"{arm} at {setting}" if setting else arm
        value = _with_interval(row["mean"], row["low"], row["high"], spec, sign=sign)
        return f"{_label(at)}<br>{_label(metric)} {value}<br>n = {row['n']}"

    def _gain(self, metric: str, rows: Iterable[Row]) -> Figure:
        rows, better = list(rows), "higher" if self.results.direction(metric) > 0 else "lower"
        return _axis(f"{_label(metric)} ({better} is better)", _column(rows, "mean"), _column(rows, "low"))

    def _when(self, **choice: str) -> str:
        return " ".join(f"{dim}={self.dims[dim].index(value)}" for dim, value in choice.items())


def _answer(words: Sequence[str]) -> str:
    """What became of one or more claims, in a sentence."""
    said = {"holds": ("holds", "hold"), "fails": ("fails", "fail"), "inconclusive": ("is inconclusive", "are inconclusive")}
    if len(words) == 1:
        return f"The claim {said[words[0]][0]}."
    if len(set(words)) == 1:
        return f"All {len(words)} claims {said[words[0]][1]}."
    counts = Counter(words)
    parts = [f"{counts[word]} {said[word][1].removeprefix('are ')}" for word in MARKS if counts[word]]
    return f"{len(words)} claims: {', '.join(parts)}."


def _figure(traces: Sequence[Figure], alt: str, height: int, *, rows: Sequence[str] = (), **layout: Any) -> Figure | None:
    """A figure without what the page adds (fonts, colours); None when there is nothing to draw.

    With ``rows`` the y axis has one row per name, the first on top; ``meta`` holds shorter names for narrow screens.
    """
    drawn = [trace for trace in traces if trace["x"]]
    if not drawn:
        return None
    if rows:
        ticks = {"tickvals": list(range(len(rows))), "ticktext": [_label(name, 28) for name in rows]}
        layout["yaxis"] = {**ticks, "range": [len(rows) - 0.4, -0.6], "showgrid": False}
    for axis in ("xaxis", "yaxis"):
        layout[axis] = {"automargin": True, **layout[axis]}
    meta = {"alt": alt, "narrow": [_label(name, 15) for name in rows]}
    margin = {"l": 8, "r": 16, "t": 8, "b": 8}
    return {"data": drawn, "layout": {"showlegend": False, "meta": meta, "margin": margin, "height": height, **layout}}


def _note(row: int, text: str) -> Figure:
    return {"y": row, "text": _label(text), "showarrow": False, "xref": "paper", "x": 0.02, "xanchor": "left"}


def _bars(rows: Sequence[Row]) -> Figure:
    """Error bars from mean to low and high; none where there is no interval."""
    up, down = ([abs(row[side] - row["mean"]) for row in rows] for side in ("high", "low"))
    clean = [[x if math.isfinite(x) else 0.0 for x in side] for side in (up, down)]
    return {"type": "data", "symmetric": False, "array": clean[0], "arrayminus": clean[1], "thickness": 2, "width": 0}


def _summary(runs: Sequence[Sequence[tuple[float, float]]]) -> list[Row]:
    """Mean and interval over seeds at every step; a seed counts where it has logged: between its first and its last step."""
    if not runs:
        return []
    steps = np.unique([step for run in runs for step, _ in run])
    if len(steps) > POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, POINTS).round().astype(int)]
    values = np.array([np.interp(steps, *zip(*run, strict=True), left=math.nan, right=math.nan) for run in runs])  # type: ignore[call-overload]
    out: list[Row] = []
    for step, column in zip(steps, values.T, strict=True):
        column = column[np.isfinite(column)]
        if len(column):
            low, high = interval(column, LEVEL)
            out.append({"step": float(step), "mean": float(column.mean()), "low": low, "high": high, "n": len(column)})
    return out


def _operating_points(names: Sequence[str]) -> tuple[list[float], str] | None:
    """Where names that are numbers ("0.8", "32x", "90 %", "width 64") lie on an axis, and a word on how it is spaced."""
    found = [re.fullmatch(r"(|.*[\s=:])([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)([x×%]?|\s.*)", name) for name in names]
    matches = [m for m in found if m]
    if len(names) < 2 or len(matches) < len(names) or len({(m[1], m[3]) for m in matches}) > 1:
        return None
    values = np.array([float(m[2]) for m in matches])
    if len(set(values)) < len(values):
        return None
    top = 100.0 if matches[0][3].strip() == "%" else 1.0
    scales = [("", values)]
    if values.min() > 0:
        scales.append(("The axis is logarithmic", np.log2(values)))
    if values.min() >= 0 and values.max() < top:
        scales.append((f"The axis is logarithmic in {top:g} − x", -np.log2(1 - values / top)))
    rough = [np.ptp(np.log(np.diff(np.sort(at)))) for _, at in scales]
    best = min(range(len(scales)), key=lambda i: rough[i] if i else rough[i] - math.log(3))  # evenly spaced, if that helps much
    return scales[best][1].tolist(), scales[best][0]


def _picture(v: Verdict) -> Markup:
    """A small drawing: the region where the claim holds, and the interval."""
    if not math.isfinite(v.difference):
        return Markup("")
    shown = [x for x in (*v.region, *v.interval, v.difference) if math.isfinite(x)]
    pad = 0.15 * (max(shown) - min(shown)) or abs(max(shown)) or 1.0
    start, end = min(shown) - pad, max(shown) + pad
    left, right, low, high, mean = (
        round(180 * (min(max(x, start), end) - start) / (end - start), 1) for x in (*v.region, *v.interval, v.difference)
    )
    borders = "".join(f'<path class="border" d="M{x} 0v28"/>' for x in (left, right) if 0 < x < 180)
    said = f"mean {v.difference:.4g}, interval {_bounds(*v.interval, '.4g')}, claimed region {_bounds(*v.region, '.4g')}"
    return Markup(
        f'<svg class="picture {v.verdict}" viewBox="0 0 180 28" role="img" aria-label="{said}">'
        f'<rect x="{left}" width="{max(right - left, 1)}" height="28"/>{borders}'
        f'<path class="bar" d="M{low} 14H{high}"/><circle cx="{mean}" cy="14" r="5"/></svg>'
    )


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame that Parquet can hold: a column of mixed values becomes text."""
    for name in frame:
        column = frame[name]
        if column.dtype == object and not all(isinstance(value, str) for value in column.dropna()):
            frame = frame.assign(**{str(name): column.map(str, na_action="ignore")})
    return frame


def _label(text: str, most: int = 80) -> str:
    """User text for plotly, which reads a little HTML and TeX; shortened in the middle, since names often differ at the end."""
    end = most // 2 - 1
    short = text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"
    return html.escape(short, quote=False).replace("$", "&#36;")


def _column(rows: Iterable[Row], *names: str) -> list[float]:
    """The finite values of some columns."""
    return [row[name] for row in rows for name in names if name in row and math.isfinite(row[name])]


def _axis(title: str, values: Sequence[float], lows: Sequence[float] = (), ratio: float = 50.0) -> Figure:
    """An axis; logarithmic where all is positive and the values span more than a ratio, with ticks at 1, 2 and 5."""
    axis: Figure = {"title": {"text": title}}
    if values and min([*values, *lows]) > 0 and max(values) / min(values) > ratio:
        first, last = math.floor(math.log10(min([*values, *lows]))), math.ceil(math.log10(max(values)))
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        ticks = [step * 10.0**e for e in range(first, last + 1) for step in steps]
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return axis


def _decimals(values: Iterable[float], significant: int = 4) -> str:
    """One format for numbers that stand in a column or side by side."""
    top = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if top and not 1e-4 <= top < 1e9:
        return f".{significant - 1}e"
    return f",.{max(0, significant - 1 - (math.floor(math.log10(top)) if top else 0))}f"


def _number(value: float, spec: str, *, sign: bool = False) -> str:
    if math.isnan(value):
        return "–"
    text = format(value, ("+" if sign else "") + spec) if math.isfinite(value) else ("∞" if value > 0 else "-∞")
    return text.replace("-", "−")


def _bounds(low: float, high: float, spec: str, *, sign: bool = False) -> str:
    if not (math.isfinite(low) or math.isfinite(high)):
        return "–"
    return f"[{_number(low, spec, sign=sign)}, {_number(high, spec, sign=sign)}]"


def _with_interval(mean: float, low: float, high: float, spec: str, *, sign: bool = False) -> str:
    between = f" {_bounds(low, high, spec, sign=sign)}" if math.isfinite(low) and math.isfinite(high) else ""
    return _number(mean, spec, sign=sign) + between


def _unit(cost: str, values: Iterable[float]) -> tuple[float, str]:
    """The unit in which the largest value is at least 1."""
    units = _UNITS.get(cost, _COUNT)
    top = max((v for v in values if math.isfinite(v)), default=0.0)
    name = [n for i, (n, size) in enumerate(units.items()) if i == 0 or top >= size][-1]
    return units[name], name


def _listed(values: Iterable[int]) -> str:
    """Integers with runs shortened: "0–4, 7"."""
    runs: list[list[int]] = []
    for v in values:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return ", ".join(f"{a}–{b}" if b > a else f"{a}" for a, b in runs)


def _cycle(names: Iterable[str], i: int) -> str:
    names = list(names)
    return names[i % len(names)]


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _space(choices: Any) -> str:
    if isinstance(choices, tuple):
        low, high, *how = choices
        return f"{_value(low)} … {_value(high)}{f' ({how[0]})' if how else ''}"
    return ", ".join(map(_value, choices)) if isinstance(choices, list) else str(choices)


def _resource(name: str) -> str:
    return files("weightroom.study").joinpath(name).read_text(encoding="utf-8")

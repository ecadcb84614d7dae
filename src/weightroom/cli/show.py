"""How results look in a terminal, and as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from weightroom.api import Check
    from weightroom.papers.base import Paper
    from weightroom.study import Results

__all__ = ["card", "card_json", "cards", "compare_json", "comparison", "failures", "frame", "pairs", "recorded", "verdicts"]

#: Columns from which the costs stand beside the metric instead of below.
WIDE = 120
_MARK = {"holds": "[green]holds[/]", "fails": "[red]fails[/]", "inconclusive": "[yellow]inconclusive[/]"}


def console() -> Console:
    """A console on stdout, wide enough for tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def comparison(results: Results, costs: Sequence[str]) -> None:
    """Prints a ranking per setting (and variant, where the arms were tuned), then what went wrong."""
    out, study = console(), results.study
    for variant in ("common", "tuned") if results.tuned else ("common",):
        for setting in study.settings:
            table = results.table(setting, variant=variant)
            title = " · ".join(
                part for part in (study.name, setting and f"at {setting}", results.tuned and f"{variant} setting") if part
            )
            shown = Table(title=escape(title), title_justify="left", caption_justify="left")
            shown.add_column("", justify="right")
            shown.add_column("arm", overflow="fold", min_width=10)
            shown.add_column(f"{study.metric} [95 %]", justify="right", overflow="fold", min_width=18)
            shown.add_column(f"better than {study.baseline} by [95 %]", justify="right", overflow="fold", min_width=20)
            shown.add_column("n", justify="right")
            present = [cost for cost in costs if cost in table]
            narrow = out.width < WIDE
            for cost in () if narrow else present:
                shown.add_column(cost.replace("_", " "), justify="right")
            for row in table.to_dict("records"):
                fail = f" [red]({row['failed']} failed)[/]" if row["failed"] else ""
                shown.add_row(
                    "" if _missing(row["rank"]) else str(int(row["rank"])), escape(row["arm"]) + fail, _spread(row["mean"], row["low"], row["high"]),
                    _spread(row["difference"], row["difference_low"], row["difference_high"], sign=True), str(row["n"]),
                    *(cost_text(cost, row[cost]) for cost in (() if narrow else present)),
                )  # fmt: skip
            out.print(shown)
            if narrow and present:
                spent = Table("arm", *(cost.replace("_", " ") for cost in present), title="cost", title_justify="left")
                for row in table.to_dict("records"):
                    spent.add_row(escape(row["arm"]), *(cost_text(cost, row[cost]) for cost in present))
                out.print(spent)
            if variant == "tuned":
                for arm in study.arms:
                    params = ", ".join(f"{k} = {_short(v)}" for k, v in results.parameters(arm, setting).items())
                    out.print(f"  {escape(arm)}: {escape(params) or 'nothing to choose'}", style="dim")
    failures([results])


def verdicts(done: Check) -> None:
    """Prints each claim of a paper with its verdict."""
    out = console()
    out.print(f"[bold]{escape(done.paper.title)}[/] ({done.paper.key}), scale {done.scale.value}")
    table = Table("claim", "verdict", "difference or value", "n", "why")
    for v in done.verdicts:
        table.add_row(escape(v.statement), _MARK[v.verdict], _spread(v.difference, *v.interval), str(v.n), escape(v.reason))
    out.print(table)
    out.print(f"all claims together: {_MARK[done.verdict]}")
    failures(done.results)


def cards(found: Sequence[Mapping[str, Any]]) -> None:
    """Prints the list of papers."""
    table = Table("key", "family", "title", "year", "verdicts at small scale")
    for card in found:
        counts = ", ".join(f"{count} {_MARK[word]}" for word, count in card["verdicts"].items() if count) or "not recorded"
        table.add_row(card["key"], card["family"], escape(card["title"]), str(card["year"]), counts)
    console().print(table)


def card(paper: Paper, found: Mapping[str, Any]) -> None:
    """Prints one paper's card."""
    out = console()
    out.print(
        f"[bold]{escape(paper.title)}[/]\n{escape(paper.authors)}, {paper.venue} {paper.year}"
        + (f", arXiv {paper.arxiv}" if paper.arxiv else "")
        + (f"\nthe authors' code: {paper.code} (GitHub)" if paper.code else "")
    )
    for head, text in (("What it does", paper.summary), ("What it claims", paper.claim), ("Limits", paper.limits)):
        out.print(f"\n[bold]{head}[/]\n{escape(text)}")
    out.print("\n[bold]Parts[/]\n" + "\n".join(paper.names()))
    record = found.get(paper.key)
    out.print("\n[bold]What was found[/]")
    if record is None:
        out.print(f"nothing is recorded yet: weightroom check {paper.key}")
    else:
        for e in record["expectations"]:
            out.print(f"{_MARK[e['verdict']]}: {escape(e['statement'])} ({escape(e['reason'])}; n = {e['n']})")
    out.print(f"\nrun it again: weightroom check {paper.key}; cite it: weightroom cite {paper.key}", style="dim")


def card_json(paper: Paper, found: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
    """One paper as plain values."""
    record = found.get(paper.key)
    words = [e["verdict"] for e in record["expectations"]] if record else []
    short = {
        "key": paper.key, "number": paper.number, "title": paper.title, "arxiv": paper.arxiv, "family": paper.family, "parts": paper.names(),
        "verdict": record["verdict"] if record else None, "verdicts": {word: words.count(word) for word in _MARK}, "year": paper.year,
        "authors": paper.authors, "venue": paper.venue, "summary": paper.summary,
    }  # fmt: skip
    return short | ({"claim": paper.claim, "limits": paper.limits, "bibtex": paper.bibtex, "recorded": record} if whole else {})


def compare_json(results: Results) -> dict[str, Any]:
    """A comparison as plain values."""
    variants = ("common", "tuned") if results.tuned else ("common",)
    return {
        "study": results.study.describe(), "failed": results.failed,
        "tables": [
            {"setting": setting, "variant": variant, "rows": json.loads(results.table(setting, variant=variant).to_json(orient="records"))}
            for variant in variants for setting in results.study.settings
        ],
        "chosen": [{"arm": arm, "setting": setting, "params": dict(params)} for (arm, setting), params in results.chosen.items()],
        "trials": json.loads(results.frame.to_json(orient="records")), "environment": dict(results.environment),
    }  # fmt: skip


def recorded(found: Mapping[str, Any], scale: str) -> None:
    """Prints recorded verdicts."""
    if not found:
        console().print(f"no verdicts are recorded at scale {scale}")
        return
    table = Table(
        "paper", "claim", "verdict", "difference or value", "n", title=f"recorded at scale {scale}", title_justify="left"
    )
    for key, record in found.items():
        for e in record["expectations"]:
            low, high = (math.nan if x is None else x for x in e["interval"])
            table.add_row(
                key,
                escape(e["statement"]),
                _MARK[e["verdict"]],
                _spread(math.nan if e["difference"] is None else e["difference"], low, high),
                str(e["n"]),
            )
    console().print(table)


def pairs(values: Mapping[str, str]) -> None:
    """Prints names and what they are."""
    table = Table("name", "what it is")
    for name, text in values.items():
        table.add_row(name, escape(text))
    console().print(table)


def frame(table: pd.DataFrame) -> None:
    """Prints a data frame."""
    shown = Table(*table.columns)
    for row in table.itertuples(index=False):
        shown.add_row(
            *(
                "" if _missing(v) else escape(pd.Timestamp(v, unit="s").strftime("%Y-%m-%d %H:%M") if name == "last" else str(v))
                for name, v in zip(table.columns, row, strict=True)
            )
        )
    console().print(shown)


def cost_text(cost: str, value: float) -> str:
    """A cost with a unit a person reads."""
    if _missing(value):
        return ""
    if cost.endswith("seconds"):
        return f"{value:.3g} s"
    if "latency" in cost:
        return f"{1e3 * value:.3g} ms"
    if cost == "peak_memory":
        return f"{value / 2**20:.0f} MiB"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:g}"


def failures(all_results: Sequence[Results]) -> None:
    """Says on stderr which trials failed, and why."""
    for results in all_results:
        bad = results.frame[results.frame.status == "failed"]
        if not len(bad):
            continue
        out = Console(stderr=True)
        out.print(
            f"[red]{len(bad)} of {len(results.frame)} trials failed[/] ({escape(results.study.name)}); --retry-failed runs them once more"
        )
        for (arm, reason), group in bad.groupby(["arm", "reason"]):
            out.print(f"  {escape(arm)} ({len(group)}): {escape(reason)}")


def _spread(mean: float, low: float, high: float, *, sign: bool = False) -> str:
    if _missing(mean):
        return ""
    plus = "+" if sign else ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{mean:{plus}.4g}"
    digits = max(0, min(6, 2 - math.floor(math.log10(high - low)))) if high > low else 4
    return (
        f"{mean:{plus}.{digits}f} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]" if abs(mean) < 1e5 else f"{mean:{plus}.4g}"
    )


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""Recording the verdicts of all papers, and the pages that are made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightroom import api
from weightroom.papers.base import Paper
from weightroom.study import Scale

__all__ = ["claims_page", "readme_table", "record", "update_docs"]

BEGIN, END = "<!-- verdicts: begin (made by `make verdicts`) -->", "<!-- verdicts: end -->"
_SIGN = {"holds": "✓ holds", "fails": "✗ fails", "inconclusive": "? inconclusive"}


def record(keys: Sequence[str], scale: str, **how: Any) -> int:
    """Checks the papers (all without ``keys``) and writes what was found; returns the number of failed trials.

    Each paper is written as soon as it is done, so that an interruption loses nothing that was finished.
    """
    path = api.RECORDS / f"{Scale.of(scale).value}.json"
    failed = 0
    for key in keys or [p.key for p in api.papers()]:
        print(f"checking {key}", file=sys.stderr)
        done = api.check(key, scale=scale, **how)
        failed += done.failed
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"scale": scale, "papers": {}}
        whole = done.as_dict()
        whole["seeds"] = sorted({trial["seed"] for trial in whole["trials"] if trial["variant"] == "common"})
        whole["n_trials"] = len(whole.pop("trials"))
        whole["environment"]["command"] = f"weightroom verdicts --record --scale {Scale.of(scale).value} {key}"
        whole["failed_trials"] = done.failed
        found["papers"][key] = whole
        found["papers"] = dict(sorted(found["papers"].items()))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return failed


def readme_table() -> str:
    """Returns the README's table, as Markdown: a line per paper, with the number of its claims that hold, fail or stay open."""
    found = api.recorded("small")
    lines = [
        "| paper | parts | what it claims | claims that hold | fail | inconclusive |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for paper in api.papers():
        words = [e["verdict"] for e in found.get(paper.key, {"expectations": []})["expectations"]]
        counts = " | ".join(str(words.count(word)) for word in _SIGN) if words else "not recorded | |"
        parts = ", ".join(f"`{name.removeprefix('weightroom.')}`" for name in paper.names()[:2]) + (
            ", ..." if len(paper.parts) > 2 else ""
        )
        lines.append(f"| {_link(paper)} | {parts} | {_cell(paper.claim)} | {counts} |")
    return "\n".join(lines)


def claims_page() -> str:
    """Returns a page with every claim and its verdict, as Markdown."""
    lines = [
        "# Every claim and its verdict, at small scale", "",
        "Made by `make verdicts`. A difference is the mean improvement over the other arm, paired by seed, in the metric's own unit;",
        "positive is better. Where a claim is about one arm alone, its mean value is shown. Intervals share an error rate of 5 % in each",
        "study; where a claim is about every single trial, the range of the values is shown instead.",
    ]  # fmt: skip
    for paper in api.papers():
        record = api.recorded("small").get(paper.key)
        lines += ["", f"## {paper.key}: {paper.title}", "", f"{_link(paper)}. {paper.limits}", ""]
        if record is None:
            lines.append("Not recorded yet.")
            continue
        environment = record["environment"]
        lines += [
            f"{record['n_trials']} trials, torch {environment['torch']}, Python {environment['python']}, {environment['date'][:10]}.", "",
            "| claim | verdict | difference or value | n |", "| --- | --- | --- | --- |",
        ]  # fmt: skip
        for e in record["expectations"]:
            low, high = e["interval"]
            spread = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
            value = "" if e["difference"] is None else f"{e['difference']:.3g}{spread}"
            where = f" (at {e['setting']})" if e["setting"] and e["setting"] not in e["statement"] else ""
            lines.append(f"| {_cell(e['statement'] + where)} | {_SIGN[e['verdict']]} | {value} | {e['n']} |")
    return "\n".join(lines) + "\n"


def update_docs(root: Path) -> None:
    """Puts the table between its marks in the README, and writes the page of all claims, ``docs/verdicts.md``."""
    readme = root / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}")
    (root / "docs" / "verdicts.md").write_text(claims_page())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _link(paper: Paper) -> str:
    return f"[{paper.key}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.key


if __name__ == "__main__":
    update_docs(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

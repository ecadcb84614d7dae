"""Recording the verdicts of all papers, and the pages that are made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightroom import api
from weightroom.errors import MissingDataError, UsageError
from weightroom.papers.base import Paper
from weightroom.study import Scale

__all__ = ["claims_page", "readme_table", "record", "update_docs"]

BEGIN, END = "<!-- verdicts: begin (made by `make verdicts`) -->", "<!-- verdicts: end -->"
_SIGN = {"holds": "✓ holds", "fails": "✗ fails", "inconclusive": "? inconclusive"}


def record(keys: Sequence[str], scale: str, **how: Any) -> int:
    """Checks the papers (all without ``keys``) and writes what was found; returns the number of failed trials.

    Each paper is written as soon as it is done, so that an interruption loses nothing that was finished. At scale "real" only
    papers that have a study of their own there can be recorded, and those whose data is absent are skipped, which is said.

    Raises:
        UsageError: a paper of ``keys`` has no study of its own at scale "real".
    """
    path = api.RECORDS / f"{Scale.of(scale).value}.json"
    failed = 0
    for key in _recordable(keys, Scale.of(scale)):
        print(f"checking {key}", file=sys.stderr)
        try:
            done = api.check(key, scale=scale, **how)
        except MissingDataError as error:
            print(f"skipped {key}: {error}", file=sys.stderr)
            continue
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


def _recordable(keys: Sequence[str], scale: Scale) -> list[str]:
    if scale is not Scale.REAL:
        return list(keys) or [p.key for p in api.papers()]
    own = [p.key for p in api.papers() if p.real]
    for key in keys:
        if not api.paper(key).real:
            raise UsageError(
                f"{key} has no study of its own at scale real, there it is as small; these have one: {', '.join(own)}"
            )
    return list(keys) or own


def readme_table() -> str:
    """Returns the README's tables, as Markdown: a line per paper, with the number of its claims that hold, fail or stay open.

    A second table follows where verdicts are recorded at scale "real".
    """
    real = api.recorded("real")
    lines = _counts(api.papers(), api.recorded("small"))
    if real:
        lines += ["", "On real images (`weightroom check KEY --scale real`, with `WEIGHTROOM_DATA` set):", ""]
        lines += _counts([p for p in api.papers() if p.key in real], real)
    return "\n".join(lines)


def _counts(papers: Sequence[Paper], found: Mapping[str, Any]) -> list[str]:
    lines = [
        "| paper | parts | what it claims | claims that hold | fail | inconclusive |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for paper in papers:
        words = [e["verdict"] for e in found.get(paper.key, {"expectations": []})["expectations"]]
        counts = " | ".join(str(words.count(word)) for word in _SIGN) if words else "not recorded | |"
        parts = ", ".join(f"`{name.removeprefix('weightroom.')}`" for name in paper.names()[:2]) + (
            ", ..." if len(paper.parts) > 2 else ""
        )
        lines.append(f"| {_link(paper)} | {parts} | {_cell(paper.claim)} | {counts} |")
    return lines


def claims_page() -> str:
    """Returns a page with every claim and its verdict, as Markdown; those at scale "real" follow where they are recorded."""
    small, real = api.recorded("small"), api.recorded("real")
    lines = [
        "# Every claim and its verdict, at small scale", "",
        "Made by `make verdicts`. A difference is the mean improvement over the other arm, paired by seed, in the metric's own unit;",
        "positive is better. Where a claim is about one arm alone, its mean value is shown. Intervals share an error rate of 5 % in each",
        "study; where a claim is about every single trial, the range of the values is shown instead.",
    ]  # fmt: skip
    for paper in api.papers():
        lines += ["", f"## {paper.key}: {paper.title}", "", f"{_link(paper)}. {paper.limits}", ""]
        lines += _verdicts(small[paper.key]) if paper.key in small else ["Not recorded yet."]
    if real:
        lines += [
            "", "# Every claim and its verdict, at real scale", "",
            "The same claims on real images, with a small network and tens of minutes on two cores for each paper; read in the same way.",
            "Made by `make verdicts-real`, with `WEIGHTROOM_DATA` set.",
        ]  # fmt: skip
    for paper in api.papers():
        if paper.key in real:
            lines += ["", f"## {paper.key}, at real scale", "", *_verdicts(real[paper.key])]
    return "\n".join(lines) + "\n"


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    environment = record["environment"]
    lines = [
        f"{record['n_trials']} trials, torch {environment['torch']}, Python {environment['python']}, {environment['date'][:10]}.", "",
        "| claim | verdict | difference or value | n |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for e in record["expectations"]:
        low, high = e["interval"]
        spread = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
        value = "" if e["difference"] is None else f"{e['difference']:.3g}{spread}"
        where = f" (at {e['setting']})" if e["setting"] and e["setting"] not in e["statement"] else ""
        lines.append(f"| {_cell(e['statement'] + where)} | {_SIGN[e['verdict']]} | {value} | {e['n']} |")
    return lines


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

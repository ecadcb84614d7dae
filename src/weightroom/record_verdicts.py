"""Recording the verdicts of all papers, and the table of the README that is made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightroom import api
from weightroom.study import Scale

__all__ = ["readme_table", "record", "update_readme"]

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
        whole["failed_trials"] = done.failed
        found["papers"][key] = whole
        found["papers"] = dict(sorted(found["papers"].items()))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return failed


def readme_table() -> str:
    """Returns the README's table of methods and verdicts, as Markdown."""
    found = api.recorded("small")
    lines = ["| paper | parts | claim | verdict | difference or value | n |", "| --- | --- | --- | --- | --- | --- |"]
    for paper in api.papers():
        head = f"[{paper.key}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.key
        parts = ", ".join(f"`{name.removeprefix('weightroom.')}`" for name in paper.names()[:2]) + (
            ", ..." if len(paper.parts) > 2 else ""
        )
        for e in found.get(paper.key, {"expectations": []})["expectations"]:
            low, high = e["interval"]
            spread = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
            value = "" if e["difference"] is None else f"{e['difference']:.3g}{spread}"
            lines.append(f"| {head} | {parts} | {e['statement']} | {_SIGN[e['verdict']]} | {value} | {e['n']} |")
            head, parts = "", ""
    return "\n".join(lines)


def update_readme(path: Path) -> None:
    """Puts the table between its marks in a README."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}")


if __name__ == "__main__":
    update_readme(Path(sys.argv[1] if len(sys.argv) > 1 else "README.md"))

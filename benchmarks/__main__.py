"""Runs the benchmarks and prints a table; writes ``out/bench.json``."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import benchmarks


def main(names: list[str]) -> int:
    """Runs the benchmarks whose name contains one of ``names`` (all without any); returns the number that miss their target."""
    files = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name.startswith("bench_"))
    chosen = [f for f in files if not names or any(n in f for n in names)]
    if not chosen:
        print(
            f"no benchmark is called like {names}: there are {', '.join(f.removeprefix('bench_') for f in files)}",
            file=sys.stderr,
        )
        return 2
    table = Table(
        "benchmark",
        "ours",
        "peer",
        "peer's name",
        "ratio",
        "target",
        title=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
    )
    races = []
    for file in chosen:
        for race in importlib.import_module(f"benchmarks.{file}").races():
            races.append({**asdict(race), "ratio": race.ratio, "met": race.met})
            print(f"{race.name}: {race.ratio:.2f}", file=sys.stderr)
            mark = {True: "[green]", False: "[red]", None: ""}[race.met]
            target = "" if race.target is None else f"<= {race.target:g}"
            table.add_row(
                race.name,
                f"{race.ours_s:.4g} {race.unit}",
                f"{race.peer_s:.4g} {race.unit}",
                race.peer,
                f"{mark}{race.ratio:.2f}",
                target,
            )
    Console(width=160).print(table)
    out = Path("out/bench.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        json.dumps(
            {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "races": races},
            indent=1,
        )
    )
    return sum(race["met"] is False for race in races)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

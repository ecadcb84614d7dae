"""Commands, and how they end: 0 done, 1 some trials failed, 2 misuse, 130 interrupted.

Results go to stdout (with ``--json`` as JSON and nothing else), everything else to stderr.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

import weightroom
from weightroom.errors import UsageError, WeightroomError, unknown

if TYPE_CHECKING:
    from weightroom.study import Results

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        code = cli.main(arguments, prog_name="weightroom", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except (WeightroomError, click.ClickException) as error:
        if debug:
            traceback.print_exc()
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"weightroom: {text}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("weightroom: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(
            f"weightroom: {type(error).__name__}: {error} (an error of weightroom itself; --debug shows where)", file=sys.stderr
        )
        return 70


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


class _Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            raise UsageError(
                f"--{param.name if param else 'value'} takes numbers with commas between them, like 0.8,0.9, got {value!r}"
            ) from None


class _Names(click.ParamType):
    """Names with commas between them; a comma inside a name cannot be said here, so an arm is also found without its commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(";" if ";" in value else ","))


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable on stdout, everything else on stderr.")
_STORE = click.option("--store", default="runs", show_default=True, metavar="DIR", help="Folder of the store.")
_RUN = _options(
    click.option("--seeds", type=int, default=None, help="How many seeds decide."),
    click.option(
        "--tune", type=int, default=None, metavar="K", help="Trials per arm on the validation split before those that decide."
    ),
    click.option("--scale", default="small", show_default=True, metavar="SCALE", help="smoke, small, real or full."),
    click.option("--report", metavar="FILE.html", help="Write a self-contained report (CSV and Parquet beside it)."),
    _STORE,
    click.option("--engine", default="local", show_default=True, help="local, or ray for a cluster."),
    click.option("--workers", type=int, default=None, help="Trials at once; one per core by default."),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps or auto."),
    click.option(
        "--time-limit", type=float, default=None, metavar="SECONDS", help="A trial that takes longer is recorded as failed."
    ),
    click.option("--memory-limit", type=float, default=None, metavar="GIB", help="Memory a trial may take (CPU, Linux)."),
    click.option("--retry-failed", is_flag=True, help="Run failed trials once more; else their record stands."),
    _JSON,
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(weightroom.__version__, prog_name="weightroom")
def cli() -> None:
    """Published training methods, compared on your own model and data, their claims checked."""


@cli.command()
@click.argument("family")
@click.option(
    "--task", default="digits", show_default=True, help="A built-in task (see `weightroom tasks`), mine.py or mine.py:function."
)
@click.option(
    "--arms",
    type=_Names(),
    default=None,
    help="Only these arms, with commas (or semicolons) between them; the baseline always runs.",
)
@click.option(
    "--sparsity", type=_Numbers(), default=(), metavar="S,...", help="Operating points of 'prune': shares of weights to remove."
)
@click.option(
    "--eps",
    type=_Numbers(),
    default=(),
    metavar="E,...",
    help="Sizes of the perturbation of 'robust', in the unit of the inputs.",
)
@click.option("--metric", default=None, help="The metric that decides, of the task or of the family.")
@click.option("--epochs", type=int, default=None, help="Instead of the task's recipe.")
@click.option("--label-noise", type=float, default=0.0, metavar="P", help="Replace this share of the training labels.")
@click.option("--imbalance", type=float, default=1.0, metavar="R", help="Ratio of the largest to the smallest class in training.")
@click.option("--samples", type=int, default=None, metavar="N", help="Keep so many training samples.")
@click.option("--download", is_flag=True, help="Allow a built-in task to download its data.")
@click.option("--onnx", is_flag=True, help="Measure the latency of 'prune' in ONNX Runtime too.")
@click.option(
    "--export",
    type=click.Path(file_okay=False),
    default=None,
    metavar="DIR",
    help="Write the best model of each operating point of 'prune' here, as safetensors and ONNX.",
)
@_RUN
def compare(
    family: str,
    seeds: int | None,
    tune: int | None,
    memory_limit: float | None,
    as_json: bool,
    debug: bool,
    report: str | None,
    **given: Any,
) -> int:
    """Compares the methods of FAMILY (prune, loss, optimizer, adapt, distill, robust, patch, merge) on one task."""
    from weightroom import api
    from weightroom.cli import show

    with contextlib.redirect_stdout(sys.stderr):
        results = api.compare(
            family, given.pop("task"), seeds=5 if seeds is None else seeds, tune=tune or 0, memory_limit=_bytes(memory_limit), report=report, **given
        )  # fmt: skip
    if as_json:
        _print_json(show.compare_json(results))
        show.failures([results])
    else:
        show.comparison(results, api.family(family).costs)
    return _code([results], report)


@cli.command()
@click.argument("key")
@_RUN
def check(key: str, as_json: bool, debug: bool, memory_limit: float | None, report: str | None, **given: Any) -> int:
    """Runs the study of the paper KEY again and says which of its claims hold."""
    from weightroom import api
    from weightroom.cli import show

    with contextlib.redirect_stdout(sys.stderr):
        done = api.check(key, memory_limit=_bytes(memory_limit), report=report, **given)
    if as_json:
        _print_json(done.as_dict())
        show.failures(done.results)
    else:
        show.verdicts(done)
    return _code(done.results, report)


@cli.command()
@_JSON
def papers(as_json: bool) -> None:
    """Lists the papers, with the recorded verdict of each."""
    from weightroom import api
    from weightroom.cli import show

    cards = [show.card_json(p, api.recorded()) for p in api.papers()]
    if as_json:
        _print_json(cards)
    else:
        show.cards(cards)


@cli.command(name="show")
@click.argument("key")
@_JSON
def show_paper(key: str, as_json: bool) -> None:
    """Explains one paper: what it does, what it claims, what was found."""
    from weightroom import api
    from weightroom.cli import show

    paper = api.paper(key)
    if as_json:
        _print_json(show.card_json(paper, api.recorded(), whole=True))
    else:
        show.card(paper, api.recorded())


@cli.command()
@click.argument("what")
@_JSON
def cite(what: str, as_json: bool) -> None:
    """Prints BibTeX for a paper's key or an import path like weightroom.optim.LionK."""
    from weightroom import api

    text = api.cite(what)
    if as_json:
        _print_json({"bibtex": text})
    else:
        print(text)


@cli.command()
@_JSON
def tasks(as_json: bool) -> None:
    """Lists the built-in tasks."""
    from weightroom import api
    from weightroom.cli import show

    if as_json:
        _print_json(api.tasks())
    else:
        show.pairs(api.tasks())


@cli.command()
@click.argument("keys", nargs=-1)
@click.option("--record", is_flag=True, help="Run the studies (all without KEYS) and record their verdicts.")
@_RUN
def verdicts(
    keys: tuple[str, ...], record: bool, as_json: bool, debug: bool, memory_limit: float | None, report: str | None, **given: Any
) -> int:
    """Shows the recorded verdicts of all papers, or runs and records them."""
    from weightroom import api, record_verdicts
    from weightroom.cli import show

    scale = given.pop("scale")
    if report is not None:
        raise UsageError("--report belongs to one paper: weightroom check KEY --report FILE.html")
    failed = 0
    for key in keys:
        api.paper(key)
    if record:
        failed = record_verdicts.record(keys, scale, memory_limit=_bytes(memory_limit), **given)
    found = api.recorded(scale)
    found = {key: value for key, value in found.items() if not keys or key in keys}
    if as_json:
        _print_json(found)
    else:
        show.recorded(found, scale)
    return 1 if failed else 0


@cli.command()
@_STORE
@_JSON
def runs(store: str, as_json: bool) -> None:
    """Lists what a store holds: trials done, failed and running, per study and arm."""
    from weightroom.cli import show
    from weightroom.study import Store

    with Store(store, create=False) as opened:
        table = opened.summary()
    if as_json:
        _print_json(json.loads(table.to_json(orient="records")))
    else:
        show.frame(table)


def _code(results: Sequence[Results], report: str | None) -> int:
    if report is not None:
        print(f"report: {report}", file=sys.stderr)
    return 1 if any(r.failed for r in results) else 0


def _bytes(gib: float | None) -> int | None:
    if gib is not None and not gib > 0:
        raise UsageError(f"--memory-limit must be > 0 GiB, got {gib:g}")
    return None if gib is None else int(gib * 2**30)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))

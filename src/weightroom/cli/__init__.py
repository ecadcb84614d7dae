"""The command line: ``weightroom compare | check | papers | show | cite | tasks | verdicts | runs``."""

from weightroom.cli.main import main

__all__ = ["main"]

"""The only place that prints, so that output can be found, flushed and silenced in one spot."""

import sys


def say(text: str = "") -> None:
    """Print to standard output and flush: SLURM and pipes show it at once."""
    print(text, flush=True)  # noqa: T201


def complain(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201

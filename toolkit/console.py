"""The only place that prints, so that output can be found, flushed and silenced in one spot."""

import sys

from toolkit.redact import redact


def say(text: str = "") -> None:
    """Print to standard output and flush: SLURM and pipes show it at once."""
    print(redact(text), flush=True)  # noqa: T201


def complain(text: str) -> None:
    """Print to standard error."""
    print(redact(text), file=sys.stderr, flush=True)  # noqa: T201

"""The only place that prints, so that output can be found, flushed and silenced in one spot."""

import sys
from contextlib import suppress
from typing import TextIO

from toolkit.redact import redact


def say(text: str = "") -> None:
    """Print to standard output and flush: SLURM and pipes show it at once."""
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Print to standard error."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    # a terminal that was closed, or a `tee` that got the Ctrl-C too, must not keep a run from saving
    with suppress(OSError, ValueError):
        print(redact(text), file=stream, flush=True)

"""The only place that prints, so that output can be found, flushed and silenced in one spot."""

import errno
import os
import sys
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
    try:
        print(_printable(redact(text), stream), file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            _silence(stream)
    except ValueError:  # closed
        pass


def _printable(text: str, stream: TextIO) -> str:
    """Show what the stream cannot encode, of a path or a text, by its number, as standard error does."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _silence(stream: TextIO) -> None:
    """Send what nobody will read nowhere: Python would end by 120 for the text that it still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)

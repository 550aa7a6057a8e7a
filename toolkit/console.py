"""The only place that prints, so that output can be found, flushed and silenced in one spot."""

import errno
import os
import stat
import sys
from contextlib import suppress
from typing import TextIO

from toolkit.redact import redact

NOT_THERE = (OSError, ValueError, AttributeError)
"""What a stream raises that is closed, is None as in a daemon, or has no file behind it."""


def say(text: str = "") -> None:
    """Print to standard output and flush: SLURM and pipes show it at once."""
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Print to standard error."""
    _print(text, sys.stderr)


def flush() -> None:
    """Let out what libraries have printed, if anybody reads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(*NOT_THERE):
            stream.flush()


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:
        return
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
    stream = getattr(stream, "rich_proxied_file", stream)  # while a bar is shown
    encoding, errors = getattr(stream, "encoding", None) or "utf-8", getattr(stream, "errors", None)
    try:
        text.encode(encoding, errors or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _silence(stream: TextIO) -> None:
    """Send what nobody will read nowhere: Python would end by 120 for the text that it still holds."""
    with suppress(*NOT_THERE):
        number = stream.fileno()
        if not stat.S_ISREG(os.fstat(number).st_mode):  # a disk may answer again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)

"""Where a rank is: what a message names when one is lost, and where tests inject faults.

TOOLKIT_FAULT=kind@phase:rank:step[,...] makes a rank fail when it enters a phase of a step, once:

    kill@backward:1:7     SIGKILL         stop@forward:0:3    SIGSTOP       term@evaluate:1:6  SIGTERM
    raise@optimizer:*:2   RuntimeError    oom@forward:1:4     out of memory
    full@save:1:10        disk full       readonly@save:0:10  read-only file system
"""

import errno
import os
import signal
import time
from collections.abc import Callable

import torch

from toolkit.errors import ConfigError

PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "optimizer",
    "log",
    "evaluate",
    "save",
    "before_rename",
    "after_rename",
    "prune",
    "finish",
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
ERRORS = {
    "raise": lambda: RuntimeError("injected"),
    "oom": lambda: torch.OutOfMemoryError("injected"),
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "readonly": lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)),
}


class Phases:
    """The phase and step that this rank is in."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = "start"
        self.step = 0
        self.since = time.monotonic()
        self.on_enter: Callable[[], None] = _nothing
        """Called in every phase, several times a step: has to be quick."""
        self.faults = _faults(os.environ.get("TOOLKIT_FAULT", ""), rank)

    def __str__(self) -> str:
        """Name phase and step."""
        return f"{self.name} of step {self.step}"

    def enter(self, name: str, step: int | None = None) -> None:
        """Note that a phase begins, in the same step unless another is given (counted from 1)."""
        self.name, self.since = name, time.monotonic()
        if step is not None:
            self.step = step
        self.on_enter()
        if self.faults:
            self._fail()

    def faults_left(self) -> str:
        """Return what did not happen yet, as the variable says it."""
        left = self.faults.items()
        return ",".join(f"{kind}@{phase}:{self.rank}:{step}" for (phase, step), kind in left)

    def _fail(self) -> None:
        kind = self.faults.pop((self.name, self.step), None)
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind is not None:
            raise ERRORS[kind]()


def _nothing() -> None:
    """Do nothing."""


def _faults(text: str, rank: int) -> dict[tuple[str, int], str]:
    """Read the variable; {(phase, step): kind} for this rank."""
    faults = {}
    for item in filter(None, text.split(",")):
        kind, _, place = item.partition("@")
        phase, _, numbers = place.partition(":")
        who, _, step = numbers.partition(":")
        if kind not in {*SIGNALS, *ERRORS} or phase not in PHASES or not step.isdigit():
            raise ConfigError([f"TOOLKIT_FAULT got {item!r}, allowed is kind@phase:rank:step"])
        if who in ("*", str(rank)):
            faults[phase, int(step)] = kind
    return faults

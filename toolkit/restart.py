"""Starting this process again in its place: same process id, so its launcher notices nothing.

For ranks that cannot meet again after a failure, since they do not know which collectives the others
have run. They leave together, and meet as new processes that go on from the last checkpoint. What
belonged to the failure, memory most of all, is gone for certain.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import psutil

from toolkit import scheduler
from toolkit.console import flush
from toolkit.stop import SIGNALS, Stop

COUNT = "TORCHELASTIC_RESTART_COUNT"
STRIDE = 1000
"""Torchrun's own restarts count by one, from 0."""
MEETING_SECONDS = 3.0
"""Until when every rank has heard of it: each looks once a second."""

CHILDREN_SECONDS = 1.0


class Restart:
    """How this process was started; made before anything changes the environment."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.command = [sys.executable, *sys.orig_argv[1:]]
        self.environment = dict(os.environ)

    def at(self, moment: float, faults: str, last_words: Callable[[], None]) -> NoReturn:
        """Replace this process by a new one of the same command.

        Args:
            moment: when, as `time.time()` counts; for all ranks the same, so that none sees
                another one gone and calls that a failure.
            faults: what is left to inject.
            last_words: done while waiting; what is not done by then is cut off.
        """
        threading.Thread(target=last_words, daemon=True).start()
        time.sleep(min(max(0.0, moment - time.time()), MEETING_SECONDS))
        environment = self.environment | {COUNT: str(attempt() + STRIDE), "TOOLKIT_FAULT": faults}
        flush()
        _leave_nothing()
        self._pass_on_requests()  # last: a request may come while processes are ended
        os.execve(sys.executable, self.command, environment)

    def _pass_on_requests(self) -> None:
        """Hold signals back until the new process listens, and repeat one that has come."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if self.stop.requested:
            number = signal.SIGUSR2 if self.stop.by_scheduler else signal.SIGTERM
            signal.pthread_kill(threading.get_ident(), number)


def _leave_nothing() -> None:
    """End what is left of W&B, which would wait for our end, and close what libraries left open.

    Other threads are at work: a process or a file may be gone by the time we come to it.
    """
    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, CHILDREN_SECONDS)
    for name in os.listdir("/dev/fd"):
        if int(name) > 2:
            with suppress(OSError):
                os.set_inheritable(int(name), False)


def attempt() -> int:
    """Return which of the starts under this launcher this is; all ranks have the same."""
    return int(os.environ.get(COUNT) or 0)


def is_in_place() -> bool:
    """Tell whether this process is one that started itself again."""
    return attempt() >= STRIDE


def is_restarted() -> bool:
    """Tell whether this very start, by its launcher or by SLURM, has begun before."""
    # a W&B agent's job that begins again starts other runs
    is_job_of_one_run = "WANDB_SWEEP_ID" not in os.environ
    return attempt() > 0 or (is_job_of_one_run and scheduler.restarts() > 0)

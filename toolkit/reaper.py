"""Run a command, and wait for what it leaves behind. For the steps of a SLURM job.

    python -m toolkit.reaper COMMAND [ARGUMENT ...]

When a step's first process ends, SLURM kills what is left of the step. But a launcher of one process,
or a W&B agent, dies of the SIGTERM of a preemption at once, while the trainer is still saving. So
this process is the first; orphans become its children (Linux), and it ends when they have.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
ORPHAN_SECONDS = 120.0
"""How long to wait for orphans; a daemon of some library might stay for ever."""


def main(command: list[str]) -> int:
    """Run a command to its end, and its orphans to theirs; return its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    # SLURM sends signals to all processes of a step, so they need no passing on
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    code = subprocess.call(command)
    deadline = time.monotonic() + ORPHAN_SECONDS
    with suppress(ChildProcessError):  # nobody is left
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Being asked to stop: by a signal, by a file, or by the death of the launcher.

A request is only noted; the ranks agree on it at the next step boundary and save. While data is
prepared, when there is nothing to save and no other rank to agree with, it raises `Preempted`; while
the ranks wait for each other to come, it ends the process.
A second request by signal leaves at once.
"""

import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from toolkit import scheduler
from toolkit.errors import Preempted

GONE = getattr(signal, "SIGRTMIN", signal.SIGHUP)
"""What we, and the kernel when the launcher dies, send to this process: a user may have told it to
ignore SIGHUP (`nohup`). Elsewhere than on Linux there is no signal to spare."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP, GONE)
ECHO_SECONDS = 0.5
"""Ctrl-C reaches us twice: from the terminal, and from the launcher that got it too."""
POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
SHUTDOWN_SECONDS = 30.0
"""What torchrun waits between a signal and SIGKILL, unless told otherwise."""


class Stop:
    """Notes requests to stop, for as long as it is entered."""

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0
        """When, by the monotonic clock."""
        self.deadline = math.inf
        """When the launcher will kill us, by the same clock, as far as we know."""
        self.file: Path | None = None
        """A file whose appearance is a request too; it is removed when it is noted. So is the one
        that TOOLKIT_STOP_FILE names: a batch script does not always know the run folder."""
        self._raises = False
        self._was_handled = False
        """A handler has run; `requested`, which a thread sets, may come a moment later."""
        self._last_words: Callable[[], None] | None = None
        self._by_file = False
        self._signal = 0

    def __enter__(self) -> "Stop":
        # Python runs its handlers between two lines of the main thread, which may be waiting in a
        # collective for ever; the wake-up file is written at once, and a thread reads it
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.settimeout(POLL_SECONDS)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if not is_ignored(number)
        }
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `Restart` held them back for us
        if _has_launcher():
            _ask_for_hangup_with_parent()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let a request raise `Preempted` in the block."""
        self._raises = True
        try:
            if self._was_handled:
                raise Preempted
            yield
        finally:
            self._raises = False

    @contextmanager
    def leaving(self, last_words: Callable[[], None]) -> Iterator[None]:
        """End this process upon a request in the block, which waits where no handler gets to run.

        Args:
            last_words: called before that.
        """
        self._last_words = last_words
        try:
            if self.requested:
                self._leave()
            yield
        finally:
            self._last_words = None

    def _leave(self) -> None:
        if self._last_words:
            self._last_words()
            os._exit(Preempted.exit_code)

    @property
    def by_scheduler(self) -> bool:
        """Whether the request came by a file or by SIGUSR2, as the templates for SLURM make it, or by
        SLURM itself, which is asked: it may take a moment."""
        by_template = self._by_file or self._signal == signal.SIGUSR2
        return self.requested and (by_template or scheduler.takes_the_place())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._was_handled = True
        if self._raises:
            raise Preempted

    def _listen(self) -> None:
        while True:
            try:
                heard = self._reader.recv(1)
            except TimeoutError:
                self._look_for_file()
                continue
            if not heard:
                return
            self._note(heard[0])

    def _look_for_file(self) -> None:
        is_main = os.environ.get("RANK", "0") == "0"
        named = os.environ.get("TOOLKIT_STOP_FILE") if is_main else None
        files = [self.file, Path(named) if named else None]
        for file in [file for file in files if file]:
            with suppress(OSError):  # a shared file system may fail for a while; look again
                if not self.requested:
                    file.unlink()
                    self._by_file = True
                    os.kill(os.getpid(), GONE)  # wakes the main thread too

    def _note(self, number: int) -> None:
        if number not in SIGNALS:
            return
        now = time.monotonic()
        # these come by themselves when the terminal or the launcher goes: they never mean "at once"
        comes_by_itself = number in (signal.SIGHUP, GONE)
        if self.requested and not comes_by_itself and now - self.since > ECHO_SECONDS:
            with suppress(OSError):  # a `tee` that got the first Ctrl-C, too, is gone
                os.write(2, b"second signal: leaving at once; the last checkpoint is whole\n")
            os._exit(128 + number)
        if not self.requested:
            self._signal, self.since, self.requested = number, now, True
            self.deadline = math.inf if self._by_file else now + _shutdown_seconds()
            self._leave()


def _shutdown_seconds() -> float:
    """Return how long torchrun lets us live after a signal; it reads the same variables."""
    for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        with suppress(ValueError):
            return float(os.environ.get(name, ""))
    return SHUTDOWN_SECONDS


def _has_launcher() -> bool:
    """Tell whether accelerate or torchrun started us, and not a shell that may go before we do."""
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ))


def is_ignored(number: int) -> bool:
    """Tell whether SIGHUP is not to stop anything: so `nohup` starts a program."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def _ask_for_hangup_with_parent() -> None:
    """Let the kernel send a signal when the launcher dies: with one process it forwards none.

    Elsewhere than on Linux there is no such service, and the trainer would live on.
    """
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, GONE)

"""Nobody waits for ever for a rank that is dead or hangs.

Each rank notes its phase in a small file, and every second that it lives. One that has been in the
same phase for too long - waiting for another, or hanging itself - finds out who is to blame, records
it and leaves; the launcher then ends the rest. Collectives have timeouts of their own, but those
name nobody, and under NCCL they abort the process without a word.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from toolkit.engine.phases import Phases
from toolkit.stop import Stop

BEAT_SECONDS = 1.0
SPARE_SECONDS = 10.0
"""How long before the launcher's SIGKILL a rank that cannot go on says why."""
SAVING = ("save", "before_rename", "after_rename", "prune")
"""Phases that may take long on a slow disk, and are the point of being asked to stop."""


RECORD_BYTES = 256


class Watchdog:
    """Writes this rank's signs of life and reads the others'."""

    def __init__(
        self,
        folder: Path,
        world_size: int,
        phases: Phases,
        stop: Stop,
        timeout: float,
        on_lost: Callable[[str], None],
        on_beat: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.world_size = world_size
        self.phases = phases
        self.stop = stop
        self.timeout = timeout
        self.on_lost = on_lost
        self.on_beat = on_beat
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.beats = 0
        self.file = -1
        self.silent: dict[int, dict[str, Any]] = {}
        """Ranks that have stopped beating, as far as `find_lost` saw."""
        self._ended = threading.Event()

    def start(self) -> None:
        """Start beating; there is nothing to watch for in a single process."""
        if self.world_size == 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.phases.rank}.json"
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.phases.on_enter = self.note
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end(self) -> None:
        """Stop beating."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beats += 1
            self.note()
            self.on_beat()  # first: a slow disk may take longer than the others wait
            with suppress(OSError):
                os.fsync(self.file)  # for the other machines
            if self._overdue():
                self._give_up()

    def note(self) -> None:
        """Write down where this rank is: some microseconds, for the kernel keeps it if we die."""
        facts = {
            "beats": self.beats,
            "host": self.host,
            "pid": self.pid,
            "phase": str(self.phases),
            "seconds": round(self.stuck_seconds(), 1),
        }
        with suppress(OSError):  # a full disk is no reason to stop training
            os.pwrite(self.file, json.dumps(facts).ljust(RECORD_BYTES).encode(), 0)

    def stuck_seconds(self) -> float:
        """Return how long this rank has been in its phase."""
        return time.monotonic() - self.phases.since

    def _overdue(self) -> bool:
        if self.stuck_seconds() > self.timeout:
            return True
        left = self.stop.deadline - time.monotonic()
        return left < SPARE_SECONDS < self.stuck_seconds() and self.phases.name not in SAVING

    def _give_up(self) -> None:
        seconds = self.stuck_seconds()
        try:
            self.on_lost(f"nothing has moved for {seconds:.0f} s. {self.find_lost()}")
            for facts in self.silent.values():
                self._kill_twin(facts)
        finally:
            os._exit(1)

    def _kill_twin(self, facts: dict[str, Any]) -> None:
        """Kill a stopped rank of ours on this machine: the launcher would wait for it for 30 s."""
        with suppress(OSError):
            same_command = _command(facts["pid"]) == _command(self.pid)
            if facts["host"] == self.host and same_command:
                os.kill(facts["pid"], signal.SIGKILL)

    def find_lost(self) -> str:
        """Say what each rank is doing, the silent ones first. Takes a few seconds."""
        before = self._read()
        time.sleep(2.5 * BEAT_SECONDS)
        after = self._read()
        others = [rank for rank in range(self.world_size) if rank != self.phases.rank]
        self.silent = {
            rank: after[rank]
            for rank in others
            if rank in after and after[rank]["beats"] == before.get(rank, {}).get("beats")
        }
        others.sort(key=lambda rank: rank not in self.silent)
        lines = [_line(rank, after.get(rank), rank in self.silent) for rank in others]
        mine = f"rank {self.phases.rank} (this one) is in phase {self.phases}"
        return "\n  ".join(["What the ranks are doing:", *lines, mine])

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world_size):
            with suppress(OSError, ValueError):
                found[rank] = json.loads((self.folder / f"{rank}.json").read_text())
        return found


def _line(rank: int, facts: dict[str, Any] | None, lost: bool) -> str:
    if facts is None:
        return f"rank {rank} has given no sign of life"
    where = f"phase {facts['phase']}"
    who = f"rank {rank} (process {facts['pid']} on {facts['host']})"
    if lost:
        return f"{who} is DEAD OR STOPPED; it was in {where}"
    return f"{who} is alive, in {where} for {facts['seconds']:.0f} s"


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()

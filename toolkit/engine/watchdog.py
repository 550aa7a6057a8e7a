"""Nobody waits for ever for a rank that is dead or hangs.

Each rank writes a sign of life every second, with its phase. One that has been in the same phase
for too long - waiting for another, or hanging itself - finds out who is to blame, records it and
leaves; the launcher then ends the rest. Collectives have timeouts of their own, but those name
nobody, and under NCCL they abort the process without a word.
"""

import json
import os
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
GRACE_SECONDS = 20.0
"""Once asked to stop, how long a phase may last: the launcher kills 30 s after it asked."""


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
    ) -> None:
        self.folder = folder
        self.world_size = world_size
        self.phases = phases
        self.stop = stop
        self.timeout = timeout
        self.on_lost = on_lost
        self.beats = 0
        self._ended = threading.Event()

    def start(self) -> None:
        """Start beating; there is nothing to watch for in a single process."""
        if self.world_size > 1:
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def end(self) -> None:
        """Stop beating."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()
            if self._overdue():
                self.on_lost(
                    f"nothing has moved for {self.stuck_seconds():.0f} s. {self.find_lost()}"
                )
                os._exit(1)

    def stuck_seconds(self) -> float:
        """Return how long this rank has been in its phase."""
        return time.monotonic() - self.phases.since

    def _overdue(self) -> bool:
        if self.stuck_seconds() > self.timeout:
            return True
        asked = self.stop.requested and time.monotonic() - self.stop.since > GRACE_SECONDS
        return asked and self.stuck_seconds() > GRACE_SECONDS

    def beat(self) -> None:
        """Write a sign of life. Not being able to is no reason to stop training."""
        self.beats += 1
        facts = {
            "beats": self.beats,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.phases.name,
            "step": self.phases.step,
            "seconds": round(self.stuck_seconds(), 1),
        }
        path = self.folder / f"{self.phases.rank}.json"
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(facts))
            aside.replace(path)

    def find_lost(self) -> str:
        """Say what each rank is doing, the silent ones first. Takes a few seconds."""
        before = self._read()
        time.sleep(2.5 * BEAT_SECONDS)
        after = self._read()
        silent: list[str] = []
        alive: list[str] = []
        for rank in range(self.world_size):
            if rank == self.phases.rank:
                continue
            beats = [facts.get(rank, {}).get("beats") for facts in (before, after)]
            lost = beats[0] == beats[1]
            (silent if lost else alive).append(_line(rank, after.get(rank), lost))
        mine = f"rank {self.phases.rank} (this one) is in phase {self.phases}"
        return "\n  ".join(["What the ranks are doing:", *silent, *alive, mine])

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world_size):
            with suppress(OSError, ValueError):
                found[rank] = json.loads((self.folder / f"{rank}.json").read_text())
        return found


def _line(rank: int, facts: dict[str, Any] | None, lost: bool) -> str:
    if facts is None:
        return f"rank {rank} has given no sign of life"
    where = f"phase {facts['phase']} of step {facts['step']}"
    who = f"rank {rank} (process {facts['pid']} on {facts['host']})"
    if lost:
        return f"{who} is DEAD OR STOPPED; its last sign of life came from {where}"
    return f"{who} is alive, in {where} for {facts['seconds']:.0f} s"

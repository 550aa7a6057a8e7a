"""How a run stands, read from the files it leaves."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.record.journal import RunFolder

Kind = Literal["waiting", "running", "lost", "preempted", "completed", "stopped", "failed"]
TAIL_BYTES = 65536


@dataclass(frozen=True)
class State:
    """How a run stands."""

    kind: Kind
    """lost: it says that it runs, and no process does; stopped: on purpose, by early termination."""
    status: str | None = None
    """What `status.json` says."""
    message: str = ""
    """Why it failed."""
    log: str | None = None
    """What the run printed, if whoever started it said where."""
    step: int = 0
    num_steps: int | None = None
    seconds_left: float | None = None
    f1: float | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether a start would do something, and the run has not failed."""
        return self.kind in ("waiting", "lost", "preempted")

    def is_to_do(self, retry_failed: bool) -> bool:
        """Tell whether a sweep should start the run."""
        return self.is_open or (retry_failed and self.kind in ("failed", "stopped"))

    def describe(self) -> str:
        """Say in a few words what there is to know."""
        if self.kind == "completed":
            return "F1 n/a" if self.f1 is None else f"F1 {self.f1:.4f}"
        if self.kind == "failed":
            place = f"  (log {self.log})" if self.log else ""
            return f"{self.status}: {self.message.splitlines()[0] if self.message else ''}{place}"
        if not self.num_steps:
            return ""
        eta = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"step {self.step} of {self.num_steps}{eta if self.kind == 'running' else ''}"


def read_state(path: Path) -> State:
    """Return how the run of this folder stands."""
    facts = _json(path / "status.json")
    status = facts.get("status")
    if status is None:
        return State("waiting")
    if status == "completed":
        f1 = _json(path / "summary.json").get("test", {}).get("f1", {}).get("value")
        return State("completed", status, f1=f1)
    num_steps = _json(path / "run.json").get("num_steps")
    step, rate = _progress(path / "metrics.jsonl")
    if status in ("running", "preempted"):
        alive = status == "running" and RunFolder(path).in_use()
        kind: Kind = "running" if alive else "lost" if status == "running" else "preempted"
        left = (num_steps - step) / rate if num_steps and rate else None
        return State(kind, status, step=step, num_steps=num_steps, seconds_left=left)
    if status == "stopped":
        return State("stopped", status, step=step, num_steps=num_steps)
    message, log = str(facts.get("message", "")), facts.get("log")
    return State("failed", status, message, log, step, num_steps)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _progress(path: Path) -> tuple[int, float | None]:
    """Return the last step in the journal, and steps per second between its last lines."""
    rows = [row for row in _tail(path) if row.get("kind") == "train"]
    if not rows:
        return 0, None
    first, last = rows[0], rows[-1]
    seconds = last["time"] - first["time"]
    steps = last["step"] - first["step"]
    return last["step"], steps / seconds if seconds > 0 and steps > 0 else None


def _tail(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the first is cut off, the last may be in the making
            continue
    return found


def duration(seconds: float) -> str:
    """Render a time for people."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"

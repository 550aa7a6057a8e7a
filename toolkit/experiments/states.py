"""How a run stands, read from the files it leaves."""

import json
import os
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from toolkit.files import facts_in
from toolkit.record.checkpoints import newest_step
from toolkit.record.journal import RunFolder

Kind = Literal["waiting", "running", "lost", "preempted", "completed", "stopped", "failed"]
ALL_KINDS: dict[Kind, str] = {
    "running": "under way",
    "waiting": "never started, or stopped before its first step",
    "preempted": "saved when it was asked to stop; goes on when started again",
    "lost": "its processes are gone without a word (killed? out of memory?); goes on, too",
    "failed": "ended by an error of its own, which its log shows",
    "stopped": "ended on purpose: early termination, or its search gave it up",
    "completed": "has a result",
}
"""What each kind means, in the order of a list."""
TAIL_BYTES = 65536
REASON_CHARACTERS = 140


@dataclass(frozen=True)
class State:
    """How a run stands."""

    kind: Kind
    status: dict[str, Any] = field(default_factory=dict)
    """`status.json`; it names the log, if whoever started the run said where it prints to."""
    run: dict[str, Any] = field(default_factory=dict)
    """`run.json` of the last start that came to its first step."""
    summary: dict[str, Any] = field(default_factory=dict)
    """`summary.json`."""
    step: int = 0
    seconds_left: float | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether a start would do something, and the run has not failed."""
        return self.kind in ("waiting", "lost", "preempted")

    def is_to_do(self, retry_failed: bool) -> bool:
        """Tell whether a sweep should start the run."""
        return self.is_open or (retry_failed and self.kind in ("failed", "stopped"))

    @property
    def log(self) -> str | None:
        """Where the run prints to."""
        return self.status.get("log")

    @property
    def steps_of_start(self) -> int:
        """Steps that the last start took."""
        if not self.status.get("start") or self.run.get("start") != self.status["start"]:
            return 0  # it did not come to its first step
        return max(0, self.step + 1 - self.run["first_step"])

    def describe(self) -> str:
        """Say in a few words what there is to know."""
        if self.kind == "waiting":
            return ""
        if self.kind == "completed":
            return self._result()
        reason = self._reason() if self.kind in ("failed", "stopped") else ""
        left = f"{duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        where = f"on {self.run['host']}" if self.kind == "running" and "host" in self.run else ""
        log = f"(log {self.log})" if self.log and self.kind in ("failed", "lost") else ""
        parts = [reason, self._place(), left if self.kind == "running" else "", where]
        return "  ".join(filter(None, [", ".join(filter(None, parts)), log]))

    def _place(self) -> str:
        num_steps = self.run.get("num_steps")
        return f"step {self.step} of {num_steps}" if num_steps else ""

    def _result(self) -> str:
        f1 = self.summary.get("test", {}).get("f1", {})
        if f1.get("value") is None:
            return "F1 n/a"
        seconds = self.summary.get("train_seconds")
        took = f", {duration(seconds)}" if seconds is not None else ""
        return f"F1 {f1['value']:.4f} ({f1['low']:.3f} to {f1['high']:.3f}){took}"

    def _reason(self) -> str:
        """Return the status and the first line that says something, shortened."""
        lines = str(self.status.get("message", "")).splitlines()
        problems = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
        text = (problems or lines or [""])[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        if len(text) > REASON_CHARACTERS:
            text = text[: REASON_CHARACTERS - 4] + " ..."
        return f"{self.status.get('status')}: {text}{more}"


def read_state(path: Path) -> State:
    """Return how the run of this folder stands."""
    status = facts_in(path / "status.json")
    match status.get("status"):
        case None:
            return State("waiting")
        case "completed":
            return State("completed", status, summary=facts_in(path / "summary.json"))
        case "running":
            kind: Kind = "running" if RunFolder(path).in_use() else "lost"
        case "preempted":
            kind = "preempted"
        case "stopped":
            kind = "stopped"
        case _:
            kind = "failed"
    run = facts_in(path / "run.json")
    step, rate = _progress(path / "metrics.jsonl")
    if kind != "running":  # what was saved last is seldom a step that is logged
        step = max(step, newest_step(path / "checkpoints"))
    num_steps = run.get("num_steps")
    left = (num_steps - step) / rate if num_steps and rate else None
    return State(kind, status, run, step=step, seconds_left=left)


def _progress(path: Path) -> tuple[int, float | None]:
    """Return the last step in the journal, and steps per second.

    The median of the latest lines': a run that was interrupted may have waited for hours between two.
    """
    rows = [row for row in _tail(path) if row.get("kind") == "train"]
    if not rows:
        return 0, None
    rates = [
        (after["step"] - before["step"]) / (after["time"] - before["time"])
        for before, after in pairwise(rows)
        if after["time"] > before["time"] and after["step"] > before["step"]
    ]
    return rows[-1]["step"], statistics.median(rates) if rates else None


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

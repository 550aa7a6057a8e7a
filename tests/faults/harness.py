"""Start runs under the real launcher, hurt them, and compare what they leave.

`TOOLKIT_FAULT` (see `toolkit.engine.phases`) makes a rank fail at an exact place; signals and kills
at random times come from here.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from tests.programs import TRAIN, launcher


@dataclass
class Subject:
    """One run folder, started again and again."""

    runs: Path
    """Output folder of its own: processes are recognised by it."""
    flags: list[str]
    config: str = "cpu2"
    processes: int = 2
    starts: int = 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        [folder] = [p for p in self.runs.iterdir() if p.is_dir() and ".old-" not in p.name]
        return folder

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    def start(self, fault: str = "", *extra: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start the launcher in a session of its own."""
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *launcher(self.processes, self.config), str(TRAIN)]
        command += [*self.flags, f"--output_dir={self.runs}", *extra]
        self.starts += 1
        settings = {"ACCELERATE_USE_CPU": "true", "TOOLKIT_FAULT": fault, "WANDB_MODE": "offline"}
        with (self.runs / f"start-{self.starts}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd="/",
                env=os.environ | settings | environment,
                start_new_session=True,
            )

    def end(self, process: "subprocess.Popen[bytes]", seconds: float = 120) -> int:
        """Wait for the launcher; return its exit code."""
        try:
            return process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, fault: str = "", *extra: str, **environment: str) -> int:
        """Start and wait."""
        return self.end(self.start(fault, *extra, **environment), 400)

    def said(self) -> str:
        """What the last start printed."""
        return (self.runs / f"start-{self.starts}.log").read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """The trainers of this run that live, by rank; the launcher is not among them."""
        found = {}
        for process in psutil.process_iter(["cmdline", "ppid", "status"]):
            line = process.info["cmdline"] or []
            if f"--output_dir={self.runs}" in line and "accelerate.commands.launch" not in line:
                found[process.pid] = process
        # a trainer that starts another program is two of the same for a moment
        first = [process for process in found.values() if process.info["ppid"] not in found]
        return sorted(first, key=_rank)

    def stopped_ranks(self) -> list[int]:
        """The ranks that a fault has stopped."""
        trainers = self.workers()
        return [r for r, p in enumerate(trainers) if p.info["status"] == psutil.STATUS_STOPPED]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Poll until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{self.said()}"
            time.sleep(0.02)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait for all trainers to end: none may be left behind."""
        self.wait_for(lambda: not self.workers(), seconds)

    def steps(self, kind: str = "train") -> list[int]:
        """The steps that have a line in the journal."""
        path = self.folder / "metrics.jsonl"
        return [row["step"] for row in _rows(path) if row["kind"] == kind] if path.exists() else []

    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        found = self.runs.glob("*/checkpoints/step-*")
        return max((int(path.name.split("-")[1]) for path in found), default=0)

    def journal_time(self) -> int:
        """When the journal was last written, 0 if there is none."""
        times = [path.stat().st_mtime_ns for path in self.runs.glob("*/metrics.jsonl")]
        return max(times, default=0)

    def has_logged(self, step: int) -> bool:
        """Tell whether a step is in the journal."""
        try:
            return step in self.steps()
        except (ValueError, OSError):
            return False

    def result(self) -> dict[str, Any]:
        """All that has to be equal, bit for bit, whatever happened on the way."""
        return result_of(self.folder)


def result_of(folder: Path) -> dict[str, Any]:
    """Return what has to be equal of a run's folder: state, best model, journal, test metrics."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    state: dict[str, bytes] = {}
    for part in sorted(newest.glob("*.safetensors")):
        state |= {key: tensor.numpy().tobytes() for key, tensor in load_file(part).items()}
    best = load_file(folder / "best" / "model.safetensors")
    return {
        "step": newest.name,
        "state": state,
        "best": {key: tensor.numpy().tobytes() for key, tensor in best.items()},
        "journal": [_without_times(row) for row in _rows(folder / "metrics.jsonl")],
        "test": json.loads((folder / "summary.json").read_text())["test"],
    }


def _rank(process: psutil.Process) -> int:
    try:
        return int(process.environ().get("RANK", "0"))
    except psutil.Error:
        return -1


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "time" and "_per_s" not in key}

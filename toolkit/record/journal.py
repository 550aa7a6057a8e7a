"""The run folder: the record of a run, whatever becomes of W&B.

runs/<run_id>/
    config.yaml          the resolved configuration; `--config` on it runs the same again
    run.json             provenance: commit, versions, hardware, data, world size
    metrics.jsonl        one line for each logged step or evaluation
    best/                the best model: a link to best-step-<step>/
    predictions.parquet  row id, label, score on the test set
    summary.json         final metrics: all that a sweep reads
    status.json          running, completed, or why not
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.files import publish_folder, sync, write_json, write_text

OUR_FILES = {"status.json", "run.json", "config.yaml"}
"""What tells a run folder from a folder of the user's."""


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def status(self) -> str | None:
        """The recorded status, or None if there is no run yet."""
        try:
            return json.loads((self.path / "status.json").read_text())["status"]
        except (OSError, ValueError, KeyError):
            return None

    def summary(self) -> dict[str, Any]:
        """Return what a completed run left."""
        return json.loads((self.path / "summary.json").read_text())

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder as its only writer, with what an earlier run left moved aside.

        Raises:
            ConfigError: when another process holds it, or it is no run folder.
        """
        with self._lock():
            self._move_aside()
            self.path.mkdir()
            yield

    def record_failure(self, status: str, message: str) -> None:
        """Record an end before the first step, unless a result or another process is there."""
        with suppress(ConfigError), self._lock():
            if self.status != "completed" and self._is_ours():
                self.set_status(status, message=message)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:  # is an OSError too
            hint = "wait for it, or choose another --run_id"
            raise ConfigError([f"another process is writing {self.path}; {hint}"]) from error
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); name another with --output_dir"
            raise ConfigError([f"output_dir {self.path.parent} {reason}"]) from error
        try:
            yield
        finally:
            lock.release()

    def _is_ours(self) -> bool:
        """Tell whether the folder is absent, empty or a run's."""
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        return not names or bool(names & OUR_FILES)

    def _move_aside(self) -> None:
        """Keep an earlier run under another name, unless it ended before it had anything to keep."""
        if not self.path.exists():
            return
        if not self._is_ours():
            hint = "choose another --run_id or --output_dir"
            raise ConfigError([f"{self.path} exists and is not a run folder; {hint}"])
        if {path.name for path in self.path.iterdir()} <= OUR_FILES:
            shutil.rmtree(self.path)
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        say(f"An earlier run of this id is kept as {aside}")

    def begin(self, config_yaml: str, provenance: dict[str, Any]) -> None:
        """Write what is known before the first step."""
        write_text(self.path / "config.yaml", config_yaml)
        write_json(self.path / "run.json", provenance)
        self.set_status("running")

    def set_status(self, status: str, **detail: Any) -> None:
        """Record how the run stands; the launcher hides exit codes, so scripts read this."""
        self.path.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.path / "status.json", {"status": status, "time": stamp} | detail)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, on disk before this returns."""
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def best_model(self, step: int) -> Iterator[Path]:
        """Yield a folder to save the best model in; `best` then points to it, in one step."""
        target = self.path / f"best-step-{step:06d}"
        with publish_folder(target) as aside:
            yield aside
        link = self.path / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.path / "best")
        sync(self.path)
        for other in self.path.glob("best-step-*"):
            if other != target:
                shutil.rmtree(other)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, then the status: who sees "completed" finds a summary."""
        write_json(self.path / "summary.json", summary)
        self.set_status("completed")

"""The run folder: the record of a run, whatever becomes of W&B.

runs/<run_id>/
    config.yaml          the resolved configuration; `--config` on it runs the same again
    run.json             provenance: commit, versions, hardware, data, world size
    metrics.jsonl        one line for each logged step or evaluation
    checkpoints/         the newest states to go on from, see `toolkit.record.checkpoints`
    best/                the best model: a link to best-step-<step>/
    predictions.parquet  row id, label, score on the test set
    summary.json         final metrics: all that a sweep reads
    status.json          running, completed, preempted (start it again), or why not
    STOP                 made by a user: save and stop
"""

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from toolkit.console import complain, say
from toolkit.errors import CheckpointError, ConfigError
from toolkit.files import (
    facts_in,
    lock_file,
    lock_path,
    publish_folder,
    sync,
    write_json,
    write_text,
)
from toolkit.record.checkpoints import clear_unfinished, set_newer_aside, steps_in
from toolkit.redact import redact_values

EMPTY_RUN = {"run.json", "config.yaml", "STOP", "status.json"}
"""All that a run has which ended before it had anything to keep. The last one, written first and deleted
last, tells a run folder from one of the user's, who may keep a `config.yaml`."""
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
GLANCE_SECONDS = 1.0
"""Who asks whether a folder is in use has its lock for a moment, which is no reason to give up."""
SILENCE_SECONDS = 60.0
"""A run whose ranks have said nothing for so long is dead; they speak once a second."""


class RunFolder:
    """One run's folder. Only the main process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.stop_file = path / "STOP"
        self.split = 1
        """Into how many parts to cut micro-batches: those of the start before did not fit."""
        self.start = ""
        """Name of this start; a rank that outlives its own may not write into the next one's."""
        self.pending: list[str] = []
        """Lines of the journal that a full disk did not take."""

    @property
    def ranks(self) -> Path:
        """Where the ranks of this start tell each other that they live."""
        return self.path / ".ranks" / self.start

    @property
    def status(self) -> str | None:
        """The recorded status, or None if there is no run yet."""
        return self._read_status().get("status")

    def _read_status(self) -> dict[str, Any]:
        return facts_in(self.path / "status.json")

    def in_use(self) -> bool:
        """Tell whether another process is writing here."""
        try:
            # a shared lock needs no right to write, so other users may ask, too
            with open(lock_path(self.path), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:  # hidden from us, or on a file system without locks
            return self._has_signs_of_life()
        return False

    def _has_signs_of_life(self) -> bool:
        beats = [0.0]
        for path in (self.path / ".ranks").rglob("*"):
            with suppress(OSError):  # ranks replace their files all the time
                beats.append(path.stat().st_mtime)
        return time.time() - max(beats) < SILENCE_SECONDS

    def job(self) -> str | None:
        """Return the SLURM job that the last start was in, if there was a start, and a job."""
        return facts_in(self.path / "run.json").get("slurm_job")

    def summary(self) -> dict[str, Any]:
        """Return what a completed run left."""
        return json.loads((self.path / "summary.json").read_text())

    @contextmanager
    def claim(self, wait_seconds: float = 0) -> Iterator[None]:
        """Hold the folder as its only writer.

        Raises:
            ConfigError: when another process keeps it, or it is no run folder.
        """
        with self._lock(wait_seconds):
            if self.path.is_symlink() or not self._is_ours():
                hint = "choose another --run_id or --output_dir"
                raise ConfigError([f"{self.path} exists and is not a run folder; {hint}"])
            yield

    def open(self, point: Path | None, *, is_own: bool = False, anew: bool = False) -> None:
        """Make a claimed folder ready to write: a new one, or what a checkpoint goes on from.

        Args:
            point: the checkpoint, or None to begin at the first step.
            is_own: the folder holds nothing but what this very start has written: without a
                checkpoint, lines that are about to be written again.
            anew: the user wants nothing of earlier starts, which may have run out of memory.
        """
        self.split = 1 if anew else int(self._read_status().get("split", 1))
        self.start = uuid.uuid4().hex[:8]
        if point is None and is_own:
            self.rewind(0, None)
        elif point is None:
            self._move_aside()
            self.set_status("running", split=self.split)
        elif point.resolve().parent == self.checkpoints.resolve():
            set_newer_aside(self.checkpoints, point)
            clear_unfinished(self.checkpoints)
        else:
            self._copy_record(point.parent.parent, is_own=is_own)
        self.clear_signs_of_life()
        self.set_status("running", split=self.split)

    def has_gone_on_from(self, resume: str) -> bool:
        """Tell whether an earlier start was told the same path, and has saved since.

        The same command has to go on from where it was, and not from that path for ever.
        """
        try:
            before = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return False
        is_path = resume not in ("auto", "strict", "none")
        return is_path and before.get("resume") == resume and bool(steps_in(self.checkpoints))

    def _copy_record(self, other: Path, *, is_own: bool) -> None:
        """Take over what another folder's run has left besides its checkpoint."""
        if self.path.resolve() in (other.resolve(), *other.resolve().parents):
            raise CheckpointError(
                f"what to resume lies in the run folder {self.path}, and not in its checkpoints/: "
                "copy it elsewhere, with metrics.jsonl, or choose another --run_id"
            )
        if not (other / "metrics.jsonl").exists():
            raise CheckpointError(f"{other} has no metrics.jsonl: is it the whole run folder?")
        if not is_own:
            self._move_aside()
        self.set_status("running", split=self.split)  # marks the folder as a run's
        for best in other.glob("best-step-*"):
            shutil.copytree(best, self.path / best.name, dirs_exist_ok=True)
        shutil.copyfile(other / "metrics.jsonl", self.path / "metrics.jsonl")

    def clear_signs_of_life(self) -> None:
        """Remove what the ranks tell each other while they run."""
        shutil.rmtree(self.path / ".ranks", ignore_errors=True)

    def length(self) -> int:
        """Return the bytes of `metrics.jsonl`, which a checkpoint notes."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def rewind(self, length: int, best_step: int | None) -> None:
        """Take the record back to a checkpoint's time: later lines are written again.

        Raises:
            CheckpointError: when what was there at that time is not there any more.
        """
        if self.length() < length:
            raise CheckpointError(
                f"{self.path / 'metrics.jsonl'} has {self.length()} bytes and had {length} when the "
                "checkpoint was written: lines are lost. --resume none starts anew"
            )
        if length:
            os.truncate(self.path / "metrics.jsonl", length)
        else:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        if best_step is None:
            (self.path / "best").unlink(missing_ok=True)
        else:
            self._point_to_best(f"best-step-{best_step:06d}")

    def record_failure(self, status: str, message: str) -> None:
        """Record an end before the first step, unless a result or another process is there."""
        with suppress(ConfigError), self._lock():
            if self.status != "completed" and self._is_ours():
                self.set_status(status, message=message, split=self._read_status().get("split", 1))

    def record_restart(self, moment: float, **detail: Any) -> float:
        """Let all ranks of this start begin again together; return when, `moment` or a rank's before.

        The status stays "running": if nobody gets that far, the run is one whose processes are gone.
        """
        if self.restarts_at is None:
            self.record_crash("running", restarts_at=moment, **detail)
        return self.restarts_at or moment

    @property
    def restarts_at(self) -> float | None:
        """When this start is to begin again, if a rank has said so."""
        now = self._read_status()
        return now.get("restarts_at") if now.get("start") == self.start else None

    def record_crash(self, status: str, **detail: Any) -> None:
        """Record an end that not all ranks agreed on: the first to notice knows best.

        If the disk is full there is nothing more to do: the message has been printed too.
        """
        now = self._read_status()
        if now.get("status") == "running" and now.get("start") == self.start:
            with suppress(OSError):
                self.set_status(status, **detail)

    @contextmanager
    def _lock(self, wait_seconds: float = 0) -> Iterator[None]:
        lock = lock_file(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _acquire(lock, wait_seconds)
        except Timeout as error:  # is an OSError too
            hint = "wait for it, or choose another --run_id"
            raise ConfigError([f"another process is writing {self.path}; {hint}"]) from error
        except OSError as error:
            without = error.errno in NO_LOCKS  # some mounts of Lustre and NFS
            reason = (
                "is on a file system without locks (flock)"
                if without
                else f"cannot be written ({error.strerror})"
            )
            hint = "name another with --output_dir"
            raise ConfigError([f"output_dir {self.path.parent} {reason}; {hint}"]) from error
        try:
            yield
        finally:
            lock.release()

    def _is_ours(self) -> bool:
        """Tell whether the folder is absent, empty or a run's."""
        if self.path.exists() and not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        begun = any(name.startswith(".status.json.tmp-") for name in names)
        return not names or begun or "status.json" in names

    def _move_aside(self) -> None:
        """Keep an earlier run under another name, unless it ended before it had anything to keep."""
        if not self.path.exists():
            return
        if {path.name for path in self.path.iterdir()} <= EMPTY_RUN:
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == "status.json"):
                path.unlink()
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        say(f"An earlier run of this id is kept as {aside}")

    def begin(self, config_yaml: str, provenance: dict[str, Any]) -> None:
        """Write what is known before the first step."""
        write_text(self.path / "config.yaml", config_yaml)
        write_json(self.path / "run.json", redact_values(provenance | {"start": self.start}))

    def set_status(self, status: str, **detail: Any) -> None:
        """Record how the run stands; the launcher hides exit codes, so scripts read this."""
        self.path.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        facts = {"status": status, "time": stamp, "start": self.start}
        if "TOOLKIT_LOG" in os.environ:  # whoever started us tells where our output goes
            facts["log"] = os.environ["TOOLKIT_LOG"]
        write_json(self.path / "status.json", redact_values(facts | detail))

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, on disk before this returns, if there is room."""
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values)
        self.pending.append(line + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self.pending) == 1:
                complain(
                    f"WARNING: metrics.jsonl cannot be written: {error}. Its lines are kept back"
                )

    def flush(self) -> None:
        """Write the lines that are kept back; no checkpoint goes without them."""
        if not self.pending:
            return
        before = self.length()
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(self.pending)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path / "metrics.jsonl", before)
            raise
        self.pending.clear()

    @contextmanager
    def best_model(self, step: int) -> Iterator[Path]:
        """Yield a folder to save the best model in; `best` then points to it, in one step."""
        target = self.path / f"best-step-{step:06d}"
        if target.exists():  # of steps that are done again after a crash
            shutil.rmtree(target)
        with publish_folder(target) as aside:
            yield aside
        self._point_to_best(target.name)

    def _point_to_best(self, name: str) -> None:
        if not (self.path / name).is_dir():
            raise CheckpointError(
                f"the best model so far, {self.path / name}, is not there any more"
            )
        link = self.path / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.path / "best")
        sync(self.path)

    def prune_best(self, steps: set[int]) -> None:
        """Delete the best models that no checkpoint goes on from."""
        keep = {f"best-step-{step:06d}" for step in steps}
        for path in self.path.glob("best-step-*"):
            if path.name not in keep:
                shutil.rmtree(path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, then the status: who sees "completed" finds a summary."""
        self.flush()
        write_json(self.path / "summary.json", redact_values(summary))
        self.set_status("completed")
        self.clear_signs_of_life()


def _acquire(lock: FileLock, wait_seconds: float) -> None:
    try:
        lock.acquire(timeout=GLANCE_SECONDS)
    except Timeout:
        if not wait_seconds:
            raise
        say(f"Another process has {lock.lock_file}; waiting {wait_seconds:.0f} s for it to end ...")
        lock.acquire(timeout=wait_seconds)

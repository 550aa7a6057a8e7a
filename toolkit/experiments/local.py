"""Run a sweep on this machine: what is missing, one after another or some at a time."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import Run
from toolkit.machine import usable_cores
from toolkit.stop import ECHO_SECONDS, is_ignored

Thing = TypeVar("Thing")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class Runner:
    """Starts runs and passes on requests to stop."""

    def __init__(self) -> None:
        self.stopping = False
        self._alive: dict[str, tuple[Run, subprocess.Popen[bytes]]] = {}

    @contextmanager
    def under_way(self, run: Run, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a run, for a block that waits for its end; a request to stop reaches it meanwhile."""
        process = start(run, **environment)
        self._alive[run.run_id] = run, process
        if self.stopping:  # asked in between
            ask_to_stop(run)
        yield process
        del self._alive[run.run_id]
        withdraw(run)

    def stop(self) -> None:
        """Let the runs that are under way save and end, and start no other."""
        self.stopping = True
        for run, _ in list(self._alive.values()):
            ask_to_stop(run)

    def terminate(self) -> None:
        """End what does not listen."""
        for _, process in list(self._alive.values()):
            process.terminate()


class LocalRunner(Runner):
    """Starts the runs of a grid, some at a time."""

    def __init__(self, runs: list[Run], jobs: int) -> None:
        super().__init__()
        self.runs = runs
        self.jobs = jobs
        self._places = places(usable_cores(), gpus(), jobs)
        self._lock = threading.Lock()

    def run(self, retry_failed: bool) -> bool:
        """Run what is not complete; return whether all runs of the sweep are complete now."""
        states = [(run, read_state(run.folder)) for run in self.runs]
        todo = [run for run, state in states if state.is_to_do(retry_failed)]
        kinds = Counter(state.kind for _, state in states if not state.is_to_do(retry_failed))
        rest = "".join(f", {count} {kind}" for kind, count in kinds.items() if kind != "completed")
        hint = " (--retry_failed)" if {"failed", "stopped"} & kinds.keys() else ""
        say(f"{len(states)} runs: {kinds['completed']} completed, {len(todo)} to do{rest}{hint}")
        with forwarding(self), ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self._run_one, todo))
        return all(read_state(run.folder).kind == "completed" for run in self.runs)

    def _run_one(self, run: Run) -> None:
        if self.stopping:
            return
        if read_state(run.folder).kind in ("running", "completed"):
            say(f"[{run.index}] {run.run_id}  was started elsewhere meanwhile")
            return
        say(f"[{run.index}] {run.run_id}  {run.label}")
        with self._lock:
            place = self._places.pop()
        try:
            self._run_at(run, place)
        except OSError as error:
            say(f"[{run.index}] {run.run_id}  could not be started: {error}")
        finally:
            with self._lock:
                self._places.append(place)

    def _run_at(self, run: Run, place: "Place") -> None:
        started = time.monotonic()
        with self.under_way(run, **place.environment()) as process:
            if hasattr(os, "sched_setaffinity"):  # macOS has none
                with suppress(ProcessLookupError):  # it may have failed at once
                    # a trainer takes all cores it may use
                    os.sched_setaffinity(process.pid, place.cores)
            code = process.wait()
        self._report(run, code, time.monotonic() - started)

    def _report(self, run: Run, code: int, seconds: float) -> None:
        state = read_state(run.folder)
        text = f"[{run.index}] {run.run_id}  {state.kind} after {seconds:.0f} s  {state.describe()}"
        log = str(log_file(run))  # a launcher that died at once has left an earlier start's state
        if state.kind != "completed":
            text += f"  (exit code {code})" if log in text else f"  (exit code {code}, log {log})"
        say(text)


def start(run: Run, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a run in a session of its own: a Ctrl-C reaches it once, through us.

    Raises:
        ConfigError: when there is no such program.
    """
    log = log_file(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    # the launcher that was installed with this Python, whether its environment is activated or not
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {"PATH": path, "TOOLKIT_LOG": str(log)}
    settings |= {"TOOLKIT_STOP_FILE": str(_stop_file(run).absolute())}
    try:
        with log.open("ab") as file:
            return subprocess.Popen(
                run.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | settings | environment,
            )
    except FileNotFoundError as error:
        raise ConfigError([f"the sweep's command starts {run.command[0]!r}: {error}"]) from error


def ask_to_stop(run: Run) -> None:
    """Ask a run to save and end; not by a signal, which a launcher of one process does not pass on."""
    _stop_file(run).touch()


def withdraw(run: Run) -> None:
    """Take back what `ask_to_stop` asked, once the run has ended."""
    _stop_file(run).unlink(missing_ok=True)


def _stop_file(run: Run) -> Path:
    """Return the file that asks a run of this process to stop; another's may have the same run."""
    return log_file(run).with_suffix(f".{socket.gethostname()}-{os.getpid()}.stop")


def log_file(run: Run) -> Path:
    """Return where what a run prints goes."""
    return run.folder.parent / "logs" / f"{run.run_id}.log"


@dataclass(frozen=True)
class Place:
    """Where one of several runs at the same time goes."""

    cores: list[int]
    gpus: list[str]
    """As CUDA_VISIBLE_DEVICES names them; empty: there are none."""

    def environment(self) -> dict[str, str]:
        """Return the variables that keep a run to its GPUs."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}


def places(cores: list[int], gpus: list[str], jobs: int) -> list[Place]:
    """Deal cores and GPUs among jobs that run at the same time; more jobs than those share them."""
    return [Place(_share(cores, job, jobs), _share(gpus, job, jobs)) for job in range(jobs)]


def _share(things: list[Thing], job: int, jobs: int) -> list[Thing]:
    return things[job::jobs] or things[job % len(things) :][:1] if things else []


def gpus() -> list[str]:
    """Return the GPUs that runs may use, by the driver's own program: torch is not imported here."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    if listed.returncode:
        return []
    parts = re.findall(r"UUID: (MIG-[^)\s]+)", listed.stdout)  # a GPU cut into parts has only those
    return parts or [str(number) for number in range(len(re.findall("(?m)^GPU ", listed.stdout)))]


@contextmanager
def forwarding(runner: Runner) -> Iterator[None]:
    """Let a signal stop the runner; a second one does not wait for what does not listen."""

    since = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if runner.stopping:
            if time.monotonic() - since > ECHO_SECONDS:
                runner.terminate()
            return
        since = time.monotonic()
        say("Stopping: the runs under way save and end; the same command goes on from there.")
        runner.stop()

    old = {number: signal.signal(number, stop) for number in SIGNALS if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

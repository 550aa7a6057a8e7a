"""Sweeps on SLURM: submit what is missing as an array, and queue a run again that was interrupted.

The templates in `slurm/` do the work on the cluster; this asks `sbatch`, `squeue` and `scontrol`.
"""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit.console import complain
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiments.arguments import Request, split_flags
from toolkit.experiments.states import State, read_state
from toolkit.experiments.sweep import DEFAULT_COMMAND, ROOT, Run, find, load, run_at
from toolkit.files import write_text

TEMPLATE = ROOT / "slurm" / "sweep.sbatch"
SUBMITTED = ".submitted"
"""Folder beside the run folders with the sweeps as they were submitted."""
QUEUE_FORMAT = "--format=%K|%i|%T|%r|%N|%Z|%o"
"""Task, job, state, reason, nodes, working directory, command."""
ASK_AGAIN_SECONDS = (2, 10)
"""How long to wait before SLURM's controller, which may be away for a moment, is asked once more."""
OWN_OPTIONS = {
    "--array": "--throttle",
    "-a": "--throttle",
    "--output": "",
    "-o": "",
    "--test-only": "",
}


class SlurmError(ToolkitError):
    """SLURM is not there, or refused."""


@dataclass(frozen=True)
class Task:
    """A run's place in the queue."""

    job: str
    state: str
    reason: str
    nodes: str

    def describe(self) -> str:
        """Say where it stands: `job 17_3, PENDING (Priority)`."""
        what = f"on {self.nodes}, not begun yet" if self.nodes else f"({self.reason})"
        return f"job {self.job}, {self.state} {what}"


def missing(listed: list[Run], queued: Collection[Path], retry_failed: bool) -> list[Run]:
    """Return the runs that are neither complete, nor running, nor in the queue."""
    return [
        run
        for run in listed
        if read_state(run.folder).is_to_do(retry_failed) and run.folder.resolve() not in queued
    ]


def submit(request: Request, todo: list[Run], throttle: int | None) -> str:
    """Submit these runs of a sweep as an array; return the job's id.

    Raises:
        ConfigError: when options of sbatch are given that are set here.
        SlurmError: when sbatch refuses.
    """
    _refuse_own_options(request.others)
    folder = todo[0].folder.parent.absolute()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    file = freeze(request, folder)
    array = ranges(run.index for run in todo) + (f"%{throttle}" if throttle else "")
    command = [
        *("sbatch", "--parsable", f"--array={array}", f"--job-name={request.file.stem}"),
        *(f"--output={folder}/logs/%x_%A_%a.out", *request.others),
        *(str(TEMPLATE), str(file)),
    ]
    return _ask(command, TOOLKIT_ROOT=str(ROOT)).split(";")[0].strip()


def _refuse_own_options(options: list[str]) -> None:
    by_hand = f"sbatch {TEMPLATE.relative_to(ROOT)} takes it by hand"
    problems = []
    for word in options:
        name = word.partition("=")[0]
        for own, instead in OWN_OPTIONS.items():
            if _stands_for(name, own):
                hint = f"; see {instead}" if instead else ""
                problems.append(
                    f"{name} is not for `sweep submit`, which decides that itself{hint}; {by_hand}"
                )
    if problems:
        raise ConfigError(problems)


def _stands_for(name: str, option: str) -> bool:
    """Tell whether sbatch takes a name for this option: `-a0-9` for -a, `--arr` for --array."""
    if option.startswith("--"):
        return option.startswith(name) and len(name) > len("--a")
    return name.startswith(option)


def freeze(request: Request, folder: Path) -> Path:
    """Write down the sweep, its flags and the files that they name, in a folder of its own.

    Tasks read it when they start, which may be days later: an edit must not change them.
    """
    content = yaml.safe_load(request.file.read_text(encoding="utf-8"))
    # behind the whole command, where `make_run` has them too: what comes later wins. The place is made
    # absolute: tasks may start in another folder (sbatch --chdir)
    place = f"--output_dir={folder}"
    content["command"] = [*content.get("command", DEFAULT_COMMAND), *request.extra, place]
    content["command"] = list(_freeze_flags(map(str, content["command"]), folder))
    config = content["parameters"].get("config", {})
    if "value" in config:
        config["value"] = _freeze_file(config["value"], folder)
    if "values" in config:
        config["values"] = [_freeze_file(value, folder) for value in config["values"]]
    return _keep(request.file.name, yaml.safe_dump(content, sort_keys=False), folder / SUBMITTED)


def _freeze_flags(command: Iterable[str], folder: Path) -> Iterator[str]:
    before = ""
    for word in command:
        name, _, value = word.partition("=")
        if before == "--config":
            yield _freeze_file(word, folder)
        elif name == "--config" and value:
            yield f"--config={_freeze_file(value, folder)}"
        else:
            yield word
        before = word


def _freeze_file(named: str, folder: Path) -> str:
    file = Path(find(named)).expanduser()
    return str(_keep(file.name, file.read_text(encoding="utf-8"), folder / SUBMITTED / "configs"))


def _keep(name: str, text: str, folder: Path) -> Path:
    """Write a file whose name stays, in a folder that tells it from any other text."""
    path = folder / hashlib.sha256(text.encode()).hexdigest()[:8] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def ranges(indexes: Iterable[int]) -> str:
    """Render numbers as sbatch wants them: 0-3,7."""
    parts: list[list[int]] = []
    for index in sorted(indexes):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def queue() -> dict[Path, Task]:
    """Return the run folders of the tasks in this user's queue, submitted by `submit` or by hand.

    Empty where there is no SLURM: then nothing can be waiting in it.

    Raises:
        SlurmError: when SLURM does not answer.
    """
    if not shutil.which("squeue"):
        return {}
    found: dict[Path, Task] = {}
    for line in _ask(["squeue", "--me", "--noheader", "--array", QUEUE_FORMAT]).splitlines():
        number, job, state, reason, nodes, place, command = [*line.split("|", 6), *[""] * 6][:7]
        script, _, arguments = command.partition(f"{TEMPLATE.name} ")
        is_ours = Path(place, script, "supervise.sh").is_file()  # of any copy of this repository
        if number.isdigit() and arguments and is_ours:
            task = Task(job, state, reason, nodes)
            found |= dict.fromkeys(_folders(place, arguments, int(number)), task)
    return found


def _folders(place: str, arguments: str, index: int) -> list[Path]:
    """Return the run folder of an array's task, from its arguments as SLURM shows them; [] if unclear.

    SLURM joins words with spaces; a flag that has some itself cannot be told from two.
    """
    named, dashes, flags = arguments.partition(" --")
    extra, others = split_flags(f"--{flags}".split() if dashes else [])
    try:
        if others:
            raise ConfigError([f"{word} is no setting of a run" for word in others])
        run = run_at(load(Path(place, named)), index, extra)
        return [Path(place, run.folder).resolve()]
    except ConfigError as error:
        complain(f"warning: a task in the queue is not understood, {arguments!r}: {error}")
        return []


def why_not_again(state: State | None, asked: bool, restarts: int, most: int) -> str | None:
    """Return why a job should not queue again; None if it should.

    A run that failed, diverged or is complete would only do so again; one that was stopped by hand,
    and not by the scheduler, was meant to stop. Without a state, a W&B agent's job, asking decides.
    """
    if state is not None and not state.is_open:
        return f"its run is {state.kind}"
    if not asked:
        return "the scheduler did not ask it to stop"
    if restarts >= most:
        return f"it was queued again {restarts} times, the most that MAX_REQUEUES allows"
    return None


def requeue() -> None:
    """Queue this job, or exactly this task of an array, again.

    Raises:
        SlurmError: when scontrol refuses.
    """
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    command = ["scontrol", "requeue", f"{job}_{task}" if job else os.environ["SLURM_JOB_ID"]]
    for seconds in ASK_AGAIN_SECONDS:
        try:
            _ask(command)
            return
        except SlurmError as error:
            complain(f"warning: {error}; asked again in {seconds} s")
            time.sleep(seconds)
    _ask(command)


def _ask(command: list[str], **environment: str) -> str:
    """Run a program of SLURM's and return what it prints."""
    settings = os.environ | environment
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not there: is this a login node of a cluster?"
        ) from error
    if done.returncode:
        hint = ""
        if "Invalid job array" in done.stderr:
            hint = "; `scontrol show config` names the largest MaxArraySize: split the sweep file"
        raise SlurmError(f"{' '.join(command)} failed: {done.stderr.strip()}{hint}")
    return done.stdout

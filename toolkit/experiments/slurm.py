"""Sweeps on SLURM: submit what is missing as an array, and queue a run again that was interrupted.

The templates in `slurm/` do the work on the cluster; this asks `sbatch`, `squeue` and `scontrol`.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from toolkit.console import complain
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiments.arguments import Request, split_flags
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import DEFAULT_COMMAND, ROOT, Run, find, load, runs
from toolkit.files import write_text

TEMPLATE = ROOT / "slurm" / "sweep.sbatch"
SUBMITTED = ".submitted"
"""Folder beside the run folders with the sweeps as they were submitted."""
QUEUE_FORMAT = "--format=%K|%Z|%o"
"""Task, working directory, command."""


class SlurmError(ToolkitError):
    """SLURM is not there, or refused."""


def missing(listed: list[Run], queued: set[Path], retry_failed: bool) -> list[Run]:
    """Return the runs that are neither complete, nor running, nor in the queue."""
    return [
        run
        for run in listed
        if read_state(run.folder).is_to_do(retry_failed) and run.folder.resolve() not in queued
    ]


def submit(request: Request, todo: list[Run], throttle: int | None) -> str:
    """Submit these runs of a sweep as an array; return the job's id.

    Raises:
        SlurmError: when sbatch refuses.
    """
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


def freeze(request: Request, folder: Path) -> Path:
    """Write down the sweep, its flags and the files that they name, in a folder of its own.

    Tasks read it when they start, which may be days later: an edit must not change them.
    """
    content = yaml.safe_load(request.file.read_text(encoding="utf-8"))
    # behind the whole command, where `make_run` has them too: what comes later wins
    content["command"] = [*content.get("command", DEFAULT_COMMAND), *request.extra]
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
    file = Path(find(named))
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


def queue() -> set[Path]:
    """Return the run folders of the tasks in this user's queue, submitted by `submit` or by hand.

    Empty where there is no SLURM: then nothing can be waiting in it.

    Raises:
        SlurmError: when SLURM does not answer.
    """
    if not shutil.which("squeue"):
        return set()
    tasks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line in _ask(["squeue", "--me", "--noheader", "--array", QUEUE_FORMAT]).splitlines():
        task, _, rest = line.partition("|")
        place, _, command = rest.partition("|")
        if task.isdigit() and f"{TEMPLATE.name} " in command:
            tasks[place, command].append(int(task))
    return {path for job, indexes in tasks.items() for path in _folders(*job, indexes)}


def _folders(place: str, command: str, indexes: list[int]) -> list[Path]:
    """Return the run folders of an array's tasks, from its command as SLURM shows it.

    SLURM joins words with spaces; a flag that has some itself cannot be told from two.
    """
    named, dashes, flags = command.partition(f"{TEMPLATE.name} ")[2].partition(" --")
    extra, others = split_flags(f"--{flags}".split() if dashes else [])
    try:
        if others:
            raise ConfigError([f"{word} is no setting of a run" for word in others])
        listed = runs(load(Path(place, named)), extra)
        return [Path(place, listed[index].folder).resolve() for index in indexes]
    except (ConfigError, IndexError) as error:
        complain(f"warning: tasks in the queue that are not understood, {command!r}: {error}")
        return []


def wants_requeue(folder: Path | None, asked: bool, restarts: int, max_requeues: int) -> bool:
    """Tell whether a job should queue again: its run was interrupted by the scheduler.

    A run that failed, diverged or is complete would only do so again; one that was stopped by hand,
    and not by the scheduler, was meant to stop. Without a folder, a W&B agent's job, asking decides.
    """
    if restarts >= max_requeues:
        return False
    return asked and (folder is None or read_state(folder).is_open)


def was_preempted() -> bool:
    """Tell whether SLURM wants this job's place for another one.

    It asks with SIGTERM only, and queues a job again that is still there when its grace time is
    over. One that has saved and ended in time would be done for good.
    """
    command = ["scontrol", "--oneliner", "show", "job", os.environ.get("SLURM_JOB_ID", "")]
    found = re.search(r"\bPreemptTime=(\S+)", _ask(command))
    return found is not None and found[1] not in ("None", "Unknown")


def requeue() -> None:
    """Queue this job, or exactly this task of an array, again.

    Raises:
        SlurmError: when scontrol refuses.
    """
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    _ask(["scontrol", "requeue", f"{job}_{task}" if job else os.environ["SLURM_JOB_ID"]])


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
        raise SlurmError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout

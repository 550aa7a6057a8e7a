"""Sweeps on SLURM: submit what is missing as an array, and queue a run again that was interrupted.

The templates in `slurm/` do the work on the cluster; this asks `sbatch`, `squeue` and `scontrol`.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Container, Iterable
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.experiments.arguments import split_flags
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import ROOT, Run

TEMPLATE = ROOT / "slurm" / "sweep.sbatch"


class SlurmError(ToolkitError):
    """SLURM is not there, or refused."""


def missing(runs: list[Run], queued: Container[int], retry_failed: bool) -> list[Run]:
    """Return the runs that are neither complete, nor running, nor in the queue."""
    found = []
    for run in runs:
        state = read_state(run.folder)
        open_ = state.is_open or (retry_failed and state.kind == "failed")
        if open_ and run.index not in queued:
            found.append(run)
    return found


def submit(
    file: Path, runs: list[Run], extra: list[str], options: list[str], throttle: int | None
) -> str:
    """Submit these runs of a sweep as an array; return the job's id.

    Raises:
        SlurmError: when sbatch refuses.
    """
    logs = runs[0].folder.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = sbatch_command(file, [run.index for run in runs], extra, options, throttle, logs)
    return _ask(command).split(";")[0].strip()


def sbatch_command(
    file: Path,
    indexes: list[int],
    extra: list[str],
    options: list[str],
    throttle: int | None,
    logs: Path,
) -> list[str]:
    """Return the command line of a submission. Nothing secret is in it: that is inherited."""
    array = ranges(indexes) + (f"%{throttle}" if throttle else "")
    return [
        *("sbatch", "--parsable", f"--array={array}", f"--job-name={file.stem}"),
        *(f"--output={logs.absolute()}/%x_%A_%a.out", *options),
        *(str(TEMPLATE), str(file), *extra),
    ]


def ranges(indexes: Iterable[int]) -> str:
    """Render numbers as sbatch wants them: 0-3,7."""
    parts: list[list[int]] = []
    for index in sorted(indexes):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def queue(file: Path, extra: list[str]) -> set[int]:
    """Return the tasks of a sweep in this user's queue, submitted by `submit` or by hand.

    Empty where there is no SLURM: then nothing can be waiting in it.

    Raises:
        SlurmError: when SLURM does not answer.
    """
    if not shutil.which("squeue"):
        return set()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%K|%Z|%o"]
    found = set()
    for line in _ask(command).splitlines():
        task, _, rest = line.partition("|")
        folder, _, asked = rest.partition("|")
        if task.isdigit() and is_submission(asked, Path(folder), file, extra):
            found.add(int(task))
    return found


def is_submission(command: str, folder: Path, file: Path, extra: list[str]) -> bool:
    """Tell whether a job's command, as SLURM shows it, is the array of this sweep with these flags.

    SLURM joins the words with spaces, so one that has spaces itself can only be compared joined.
    """
    script, _, words = command.partition(f"{TEMPLATE.name} ")
    named, _, flags = words.partition(" --")
    same_file = Path(folder, named).resolve() == file.resolve()
    asked = split_flags(f"--{flags}".split() if flags else [])
    ours = split_flags(" ".join(extra).split())
    return bool(script) and same_file and [sorted(x) for x in asked] == [sorted(x) for x in ours]


def wants_requeue(folder: Path | None, asked: bool, restarts: int, max_requeues: int) -> bool:
    """Tell whether a job should queue again: its run was interrupted, or needs smaller batches.

    A run that failed, diverged or is complete would only do so again; one that was stopped by hand,
    and not by the scheduler, was meant to stop. Without a folder, a W&B agent's job, asking decides.
    """
    if restarts >= max_requeues:
        return False
    if folder is None:
        return asked
    state = read_state(folder)
    return (asked and state.is_open) or state.wants_smaller_batches


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


def _ask(command: list[str]) -> str:
    """Run a program of SLURM's and return what it prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not there: is this a login node of a cluster?"
        ) from error
    if done.returncode:
        raise SlurmError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout

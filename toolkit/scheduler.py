"""What SLURM says of the job that this process is in. Knows nothing of runs and sweeps."""

import os
import shutil
import subprocess

ANSWER_SECONDS = 10


def job_facts() -> dict[str, str]:
    """Return what `scontrol show job` says of this job; {} outside of one, or if it does not answer."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if not job or not shutil.which("scontrol"):
        return {}
    if array:  # its last task has the array's own id, which would name all tasks
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    pairs = (word.partition("=") for word in done.stdout.split())
    return {name: value for name, equals, value in pairs if equals}


def was_preempted() -> bool:
    """Tell whether SLURM wants this job's place for another one.

    It asks with SIGTERM only, and queues a job again that is still there when its grace time is
    over. One that has saved and ended in time would be done for good.
    """
    return _is_preempted(job_facts())


def takes_the_place() -> bool:
    """Tell whether a SIGTERM means that SLURM ends this job and begins it again.

    A cancelled job gets the same signal, and is in the same state as one that is queued again
    (COMPLETING); only the count of starts tells them apart (SLURM 22.05).
    """
    facts = job_facts()
    return _is_preempted(facts) or int(facts.get("Restarts", 0)) > restarts()


def _is_preempted(facts: dict[str, str]) -> bool:
    return facts.get("PreemptTime", "None") not in ("None", "Unknown")


def restarts() -> int:
    """Return how often this job has been queued again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)

"""The commands that have to do with SLURM: submit an array, and what its tasks ask for."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from toolkit import scheduler
from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.experiments import slurm
from toolkit.experiments.arguments import note_what_is_ignored, parser, read, refuse_overwrite
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import ROOT, Sweep, find, run_at

PROGRAM = ROOT / "toolkit" / "train.py"

TOO_SHORT = (
    "Is its time long enough? It is asked to stop 5 minutes before the end (--signal of the template), "
    "so --time has to be more than that and a start"
)


def submit(argv: list[str]) -> int:
    """Submit what is missing to SLURM, as one array; options of sbatch are passed on to it."""
    made = parser("submit", submit.__doc__)
    made.add_argument("--throttle", type=int, help="tasks at the same time")
    made.add_argument("--retry_failed", action="store_true", help="failed and stopped runs, too")
    asked = read(made, argv, with_others=True)
    refuse_overwrite(asked)
    _hold_against_template(asked.sweep)
    runs = asked.runs()
    todo = slurm.missing(runs, slurm.queue(), asked.options.retry_failed)
    command = shlex.join([str(asked.file), *asked.extra])
    note_what_is_ignored(asked)
    if not todo:
        say(f"Nothing is missing: each of the {len(runs)} runs is complete, running or queued, or")
        say(f"has failed or was stopped: python -m toolkit sweep status {command}")
        return 0
    job = slurm.submit(asked, todo, asked.options.throttle)
    say(f"Submitted {len(todo)} of {len(runs)} runs as array {job}")
    say(f"How it stands: python -m toolkit sweep status {command}")
    return 0


def _hold_against_template(sweep: Sweep) -> None:
    """Refuse what the array would not start, and name what it starts otherwise than `sweep run` does."""
    if Path(find(sweep.program)).resolve() != PROGRAM:
        raise ConfigError(
            [f"{sweep.path}: program got {sweep.program}, an array starts {PROGRAM} alone"]
        )
    usual = {f"{name}.yaml" for name in ("cpu", "gpu", "ddp")}
    files = [word for word in sweep.command if word.endswith((".yaml", ".yml"))]
    others = [word for word in files if Path(word).name not in usual]
    if others and not os.environ.get("LAUNCH"):
        file = shlex.quote(str(Path(find(others[0])).resolve()))
        say(
            f"An array takes the launch config that fits its nodes, not {others[0]} of the command."
        )
        say(f"For that one, submit it with LAUNCH={file} in the environment.")


def task(argv: list[str]) -> int:
    """Print a run's folder and flags, each ended by a zero byte: for sweep.sbatch."""
    made = parser("task", task.__doc__)
    made.add_argument("index", type=int, help="which run, from 0")
    asked = read(made, argv)
    run = run_at(asked.sweep, asked.options.index, asked.extra)
    sys.stdout.write("".join(f"{text}\0" for text in (str(run.folder), *run.flags)))
    return 0


def requeue(argv: list[str]) -> int:
    """Queue this job again if its run was interrupted; 1 if not. For the templates in slurm/."""
    made = argparse.ArgumentParser("toolkit sweep requeue", description=requeue.__doc__)
    made.add_argument("folder", type=Path, nargs="?", help="run folder; absent: any run's")
    made.add_argument("--asked", action="store_true", help="the scheduler had asked it to stop")
    made.add_argument("--max_requeues", type=int, default=20, help="give up after so many")
    options = made.parse_args(argv)
    restarts = scheduler.restarts()
    asked = options.asked or scheduler.was_preempted()
    state = read_state(options.folder) if options.folder else None
    if reason := slurm.why_not_again(state, asked, restarts, options.max_requeues):
        if asked or (state and state.is_open):
            say(f"Not queued again: {reason}")
        return 1
    if state and not state.steps_of_start:
        say(f"This start took no step. {TOO_SHORT}")
    say(f"Interrupted: to be queued again ({restarts + 1} of at most {options.max_requeues} times)")
    slurm.requeue()
    return 0

"""Run a sweep here or on SLURM, see how it stands, and what came out.

    python -m toolkit sweep plan    FILE [flags]       its runs, their ids, what they will cost
    python -m toolkit sweep run     FILE [flags]       here: what is missing, --jobs N at a time
    python -m toolkit sweep submit  FILE [flags]       on SLURM: what is missing, as an array
    python -m toolkit sweep status  FILE [flags]       waiting, running, completed, failed ...
    python -m toolkit sweep results FILE or DIR        the table, the comparison, the best models
    python -m toolkit sweep sync    FILE or DIR        send offline runs to Weights & Biases

Flags that are settings of a run (--dataset, --output_dir ...) hold for every run of the sweep; give
the same ones to every command, because they are part of the runs' ids.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from toolkit.config import FIELDS
from toolkit.console import complain, say
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiments import slurm
from toolkit.experiments import sweep as sweeps
from toolkit.experiments.sweep import Run


def main(argv: list[str]) -> int:
    """Run a sub-command; return the exit code."""
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        wrong = argv and argv[0] not in ("-h", "--help")
        if wrong:
            complain(f"error: no sweep command {argv[0]!r}, allowed are {', '.join(COMMANDS)}\n")
        (complain if wrong else say)(str(__doc__))
        return 2 if wrong else 0
    try:
        return COMMANDS[argv[0]](argv[1:])
    except (ToolkitError, OSError) as error:
        complain(f"error: {error}")
        return getattr(error, "exit_code", 1)


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Make the parser of a sub-command."""
    made = argparse.ArgumentParser(f"toolkit sweep {command}", description=doc, allow_abbrev=False)
    made.add_argument("file", type=Path, help="sweep file in W&B's format")
    return made


def split_flags(unknown: list[str]) -> tuple[list[str], list[str]]:
    """Tell settings of a run from the rest; each setting comes back as one `--name=value`."""
    ours: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(unknown):
        token, position = unknown[position], position + 1
        name = token[2:].partition("=")[0].replace("-", "_")
        if not token.startswith("--") or name.partition(".")[0] not in FIELDS:
            rest.append(token)
            continue
        is_pair = "=" not in token and position < len(unknown)
        if is_pair and not unknown[position].startswith("--"):
            token, position = f"{token}={unknown[position]}", position + 1
        ours.append(token)
    return ours, rest


def read(made: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[Run]]:
    """Parse a sub-command's arguments and list the sweep's runs.

    Raises:
        ConfigError: when a flag is unknown, or the sweep is wrong.
    """
    options, unknown = made.parse_known_args(argv)
    extra, rest = split_flags(unknown)
    if rest:
        raise ConfigError([f"{token} is unknown to {made.prog}" for token in rest])
    return options, sweeps.runs(sweeps.load(options.file), extra)


def _runs_at(place: Path, argv: list[str]) -> tuple[Path, list[Path]]:
    """Return the folder of the run folders, and those of a sweep file or all that are there."""
    if place.is_dir():
        if argv[1:]:
            raise ConfigError([f"{token} only goes with a sweep file" for token in argv[1:]])
        return place, [path.parent for path in sorted(place.glob("*/status.json"))]
    _, runs = read(parser("results", None), argv)
    return runs[0].folder.parent, [run.folder for run in runs]


def plan(argv: list[str]) -> int:
    """List the runs and what they will cost; start nothing."""
    from toolkit.experiments.plan import costs
    from toolkit.experiments.states import duration

    made = parser("plan", plan.__doc__)
    made.add_argument("--rate", type=float, help="reviews/s; else as completed runs reached")
    options, runs = read(made, argv)
    found = costs(runs, options.rate)
    width = max(len(run.label) for run in runs)
    for run, cost in zip(runs, found, strict=True):
        steps = "? steps" if cost.steps is None else f"{cost.steps} steps"
        time = "" if cost.seconds is None else f"  {duration(cost.seconds)} ({cost.source})"
        say(f"{run.index:>4}  {run.run_id:<14}  {run.label:<{width}}  {steps}{time}")
    known = [cost.seconds for cost in found if cost.seconds is not None]
    total = f", {duration(sum(known))} in all" if len(known) == len(runs) else ""
    say(f"{len(runs)} runs{total}; run folders in {runs[0].folder.parent}")
    if any(cost.steps is None for cost in found):
        say("Steps are known once the data are prepared: python -m toolkit prepare ...")
    if len(known) < len(runs):
        say("Their time is known once a run is complete, or with --rate REVIEWS_PER_SECOND")
    return 0


def run(argv: list[str]) -> int:
    """Run what is missing on this machine."""
    from toolkit.experiments.local import LocalRunner

    made = parser("run", run.__doc__)
    made.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    made.add_argument("--retry_failed", action="store_true", help="start failed runs again")
    made.add_argument("--search", choices=["optuna"], help="let Optuna choose among the values")
    made.add_argument("--trials", type=int, help="of a search; default: the file's run_cap, or 20")
    made.add_argument("--sampler", choices=["tpe", "random"], default="tpe", help="of a search")
    if made.parse_known_args(argv)[0].search:
        return _search(made, argv)
    options, runs = read(made, argv)
    if options.jobs < 1:
        raise ConfigError([f"--jobs got {options.jobs}, allowed is 1 or more"])
    runner = LocalRunner(runs, options.jobs)
    complete = runner.run(options.retry_failed)
    if runner.stopping:
        return 75
    _show_results(runs[0].folder.parent, [run.folder for run in runs])
    return 0 if complete else 1


def _search(made: argparse.ArgumentParser, argv: list[str]) -> int:
    from toolkit.experiments.search import Search

    options, unknown = made.parse_known_args(argv)
    extra, rest = split_flags(unknown)
    if rest:
        raise ConfigError([f"{token} is unknown to {made.prog}" for token in rest])
    sweep = sweeps.load(options.file)
    search = Search(sweep, extra, options.sampler, seed=None)
    complete = search.run(options.trials or sweep.run_cap or 20)
    say(search.best())
    return 0 if complete else 75


def submit(argv: list[str]) -> int:
    """Submit what is missing to SLURM, as one array; options of sbatch are passed on to it."""
    made = parser("submit", submit.__doc__)
    made.add_argument("--throttle", type=int, help="tasks at the same time")
    made.add_argument("--retry_failed", action="store_true", help="submit failed runs again")
    options, unknown = made.parse_known_args(argv)
    extra, sbatch_options = split_flags(unknown)
    runs = sweeps.runs(sweeps.load(options.file), extra)
    todo = slurm.missing(runs, runs[0].folder.parent, options.retry_failed)
    if not todo:
        say(f"Nothing is missing: all {len(runs)} runs are complete, failed, running or queued")
        return 0
    job = slurm.submit(options.file, todo, extra, sbatch_options, options.throttle)
    say(f"Submitted {len(todo)} of {len(runs)} runs as array {job}")
    say(f"How it stands: python -m toolkit sweep status {' '.join([str(options.file), *extra])}")
    return 0


def sync(argv: list[str]) -> int:
    """Send what offline runs have kept to Weights & Biases; needs a key and the network."""
    made = argparse.ArgumentParser("toolkit sweep sync", description=sync.__doc__)
    made.add_argument("place", type=Path, help="sweep file, or folder of run folders")
    options, _ = made.parse_known_args(argv)
    _, folders = _runs_at(options.place, argv)
    kept = [path for folder in folders for path in sorted(folder.glob("wandb/offline-run-*"))]
    if not kept:
        say("No offline runs there.")
        return 0
    return subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, kept)]).returncode


def task(argv: list[str]) -> int:
    """Print a run's folder and flags, each ended by a zero byte: for sweep.sbatch."""
    made = parser("task", task.__doc__)
    made.add_argument("index", type=int, help="which run, from 0")
    options, runs = read(made, argv)
    if not 0 <= options.index < len(runs):
        raise ConfigError([f"run {options.index} of {len(runs)}: allowed are 0 to {len(runs) - 1}"])
    run = runs[options.index]
    sys.stdout.write("".join(f"{text}\0" for text in (str(run.folder), *run.flags)))
    return 0


def requeue(argv: list[str]) -> int:
    """Queue this job again if its run was interrupted; 1 if not. For the templates in slurm/."""
    made = argparse.ArgumentParser("toolkit sweep requeue", description=requeue.__doc__)
    made.add_argument("folder", type=Path, nargs="?", help="run folder; absent: any run's")
    made.add_argument("--asked", action="store_true", help="the scheduler had asked it to stop")
    made.add_argument("--max_requeues", type=int, default=20, help="give up after so many")
    options = made.parse_args(argv)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    asked = options.asked or slurm.was_preempted()
    if not slurm.wants_requeue(options.folder, asked, restarts, options.max_requeues):
        return 1
    say(f"Interrupted: queued again ({restarts + 1} of at most {options.max_requeues} times)")
    slurm.requeue()
    return 0


def status(argv: list[str]) -> int:
    """Show how every run stands."""
    from toolkit.experiments.states import read_state

    _, runs = read(parser("status", status.__doc__), argv)
    queued = slurm.queue(runs[0].folder.parent)
    width = max(len(each.label) for each in runs)
    in_queue = {index for tasks in queued.values() for index in tasks}
    counts: Counter[str] = Counter()
    for each in runs:
        state = read_state(each.folder)
        kind = "queued" if state.is_open and each.index in in_queue else state.kind
        counts[kind] += 1
        place = f"{each.index:>4}  {each.run_id:<14}  {kind:<9}  {each.label:<{width}}"
        say(f"{place}  {state.describe()}".rstrip())
    say(f"{len(runs)} runs: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 0


def results(argv: list[str]) -> int:
    """Write and show the table of all completed runs."""
    made = argparse.ArgumentParser("toolkit sweep results", description=results.__doc__)
    made.add_argument("place", type=Path, help="sweep file, or folder of run folders")
    options, _ = made.parse_known_args(argv)
    return 0 if _show_results(*_runs_at(options.place, argv)) else 1


def _show_results(folder: Path, folders: list[Path]) -> bool:
    """Write and show the table of these runs; return whether there is any."""
    from toolkit.experiments import results as tables

    found = [summary for summary in tables.summaries(folder) if summary["folder"] in folders]
    say(f"{len(found)} of {len(folders)} runs are complete")
    if not found:
        complain(f"error: no completed run in {folder}")
        return False
    settings = tables.settings(found)
    tables.show(tables.rows(settings), settings)
    for path in tables.write_all(folder, settings):
        say(f"written: {path}")
    return True


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": plan,
    "run": run,
    "submit": submit,
    "status": status,
    "results": results,
    "sync": sync,
    "task": task,
    "requeue": requeue,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

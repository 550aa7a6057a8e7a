"""Run a sweep here or on SLURM, see how it stands, and what came out.

    python -m toolkit sweep plan    FILE [flags]       its runs, their ids, what they will cost
    python -m toolkit sweep run     FILE [flags]       here: what is missing, --jobs N at a time
    python -m toolkit sweep submit  FILE [flags]       on SLURM: what is missing, as an array
    python -m toolkit sweep status  FILE or DIR        waiting, running, completed, failed ...
    python -m toolkit sweep results FILE or DIR        the table, the comparison, the best models
    python -m toolkit sweep sync    FILE or DIR        send offline runs to Weights & Biases

Flags that are settings of a run (--dataset, --output_dir ...) hold for every run of the sweep; give
the same ones to every command, because they are part of the runs' ids.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from toolkit.console import complain, say
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiments import batch
from toolkit.experiments.arguments import (
    Request,
    note_what_is_ignored,
    parser,
    read,
    refuse_overwrite,
)
from toolkit.experiments.status import list_runs, status
from toolkit.network import why_unreachable
from toolkit.record.tracking import has_wandb_key, wandb_url


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


def plan(argv: list[str]) -> int:
    """List the runs and what they will cost; start nothing."""
    from toolkit.experiments.plan import costs
    from toolkit.experiments.states import duration

    made = parser("plan", plan.__doc__)
    made.add_argument("--rate", type=float, help="reviews/s; else as completed runs reached")
    asked = read(made, argv)
    if asked.options.rate is not None and not asked.options.rate > 0:
        raise ConfigError([f"--rate got {asked.options.rate:g}, allowed is more than 0"])
    runs = asked.runs()
    found = costs(runs, asked.options.rate)
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
    made.add_argument("--retry_failed", action="store_true", help="failed and stopped runs, too")
    made.add_argument("--search", choices=["optuna"], help="let Optuna choose among the values")
    made.add_argument("--trials", type=int, help="of a search; default: the file's run_cap, or 20")
    made.add_argument("--sampler", choices=["tpe", "random"], default="tpe", help="of a search")
    asked = read(made, argv)
    if asked.options.search:
        return _search(asked)
    refuse_overwrite(asked)
    jobs, runs = asked.options.jobs, asked.runs()
    if jobs < 1:
        raise ConfigError([f"--jobs got {jobs}, allowed is 1 or more"])
    note_what_is_ignored(asked)
    runner = LocalRunner(runs, jobs)
    complete = runner.run(asked.options.retry_failed)
    if runner.stopping:
        return 75
    _show_results(runs[0].folder.parent, [run.folder for run in runs])
    return 0 if complete else 1


def _search(asked: Request) -> int:
    from toolkit.experiments.search import Search

    options = asked.options
    problems = []
    if options.jobs != 1:
        problems.append("--jobs is not for a search: start the command several times instead")
    if options.retry_failed:
        problems.append("--retry_failed is not for a search: it proposes other values")
    if options.trials is not None and options.trials < 1:
        problems.append(f"--trials got {options.trials}, allowed is 1 or more")
    if problems:
        raise ConfigError(problems)
    search = Search(asked.sweep, asked.extra, options.sampler, seed=None)
    complete = search.run(options.trials or asked.sweep.run_cap or 20)
    say(search.best())
    return 75 if search.stopping else 0 if complete else 1


def sync(argv: list[str]) -> int:
    """Send what offline runs have kept to Weights & Biases; needs a key and the network."""
    folders = [each.folder for each in list_runs("sync", sync.__doc__, argv).runs]
    kept = [path for folder in folders for path in sorted(folder.glob("wandb/offline-run-*"))]
    if not kept:
        say("No offline runs there.")
        return 0
    # wandb itself would ask for a key, and try for hours to reach the server
    problems = [] if has_wandb_key() else ["no key: `wandb login`, or set WANDB_API_KEY"]
    problems += [reason] if (reason := why_unreachable(wandb_url())) else []
    if problems:
        raise ConfigError([f"W&B: {problem}" for problem in problems])
    environment = {name: text for name, text in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, kept)]
    return subprocess.run(command, env=environment).returncode


def results(argv: list[str]) -> int:
    """Write and show the table of all completed runs."""
    listing = list_runs("results", results.__doc__, argv)
    return 0 if _show_results(listing.folder, [each.folder for each in listing.runs]) else 1


def _show_results(folder: Path, folders: list[Path]) -> bool:
    """Write and show the table of these runs; return whether there is any."""
    from toolkit.experiments import tables
    from toolkit.experiments.results import settings, summaries

    wanted = {path.absolute() for path in folders}
    runs = [s for s in summaries(folder) if s["folder"].absolute() in wanted]
    say(f"{len(runs)} of {len(folders)} runs are complete")
    found = settings(runs)
    if not found:
        complain(f"error: no completed run in {folder}")
        return False
    tables.show(found)
    for path in tables.write_all(folder, found):
        say(f"written: {path}")
    return True


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": plan,
    "run": run,
    "submit": batch.submit,
    "status": status,
    "results": results,
    "sync": sync,
    "task": batch.task,
    "requeue": batch.requeue,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

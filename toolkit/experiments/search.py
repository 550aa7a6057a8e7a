"""Search beyond a grid, without a server: Optuna proposes runs, which are then like any others.

The trials lie in a journal file beside the run folders, which is safe on shared file systems: to
search with several machines, start the same command on each. What early termination stops is
judged by validation metrics; the test set is scored, and never looked at here.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.experiments import local
from toolkit.experiments import sweep as sweeps
from toolkit.experiments.states import read_state
from toolkit.experiments.sweep import Run, Sweep
from toolkit.files import lock
from toolkit.record.journal import RunFolder

POLL_SECONDS = 0.5
STOPS = {"min_iter": 1, "eta": 3}
"""Settings of early termination, and what they are by default."""
FAILED = "failed"
"""Attribute of a trial whose run failed by itself: it counts, unlike one whose worker was killed."""


class Search(local.Runner):
    """One worker of a search."""

    def __init__(self, sweep: Sweep, extra: list[str], sampler: str, seed: int | None) -> None:
        super().__init__()
        self.sweep = sweep
        self.extra = extra
        if problems := [*sweeps.overridden(sweep, extra), *_problems(sweep)]:
            raise ConfigError(problems)
        self.folder = sweeps.runs_folder(sweep, extra)
        self.name = f"search-{sweep.path.stem}-{_fingerprint(sweep, extra)}"
        self.study = _open_study(sweep, self.folder / f".{self.name}.journal", sampler, seed)

    def run(self, trials: int) -> bool:
        """Run trials until all workers together have so many; return whether none has failed."""
        with local.forwarding(self):
            while not self.stopping:
                with self._next_trial(trials) as trial:
                    if trial is None:
                        break
                    self._run_one(trial)
        return not self.stopping and not any(map(_has_failed, self.study.trials))

    @contextmanager
    def _next_trial(self, trials: int) -> Iterator[Any]:
        """Yield a trial that is this worker's as long as it lives; None if there are enough."""
        with ExitStack() as stack:
            trial = None
            with lock(self.folder / self.name):
                self._give_back_lost_trials()
                if sum(map(_counts, self.study.trials)) < trials:
                    trial = self.study.ask()
                    stack.enter_context(self._mine(trial.number))
            yield trial

    def _mine(self, number: int) -> FileLock:
        """Return the lock that the worker of a trial holds; the kernel frees it if that dies."""
        return FileLock(self.folder / f".{self.name}-{number}.lock", blocking=False)

    def _give_back_lost_trials(self) -> None:
        """Let trials whose worker was killed be done again: their runs go on where they were."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            with suppress(Timeout), self._mine(trial.number):
                self.study.tell(trial.number, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params)

    def _run_one(self, trial: Any) -> None:
        from optuna.trial import TrialState

        cell = {name: suggest(trial, name, p) for name, p in self.sweep.parameters.items()}
        try:
            run = sweeps.make_run(self.sweep, trial.number, cell, self.extra)
        except ConfigError as error:  # some values do not go together
            say(f"[{trial.number}] {cell} is no run: {error}")
            trial.set_user_attr(FAILED, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr("run_id", run.run_id)
        say(f"[{trial.number}] {run.run_id}  {run.label}")
        pruned = self._watch(trial, run)
        if not self.stopping:  # else the next start gives the trial back
            self._tell(trial, run, pruned)

    def _tell(self, trial: Any, run: Run, pruned: bool) -> None:
        """Tell Optuna and the user how a trial ended."""
        from optuna.trial import TrialState

        values = [value for _, value in self._values(run)]
        best = (max if self.sweep.maximize else min)(values, default=None)
        state = read_state(run.folder)
        # the request may have come too late: completed, diverged, out of disk
        pruned = pruned and state.kind == "preempted"
        if pruned:
            RunFolder(run.folder).set_status("stopped", message="its metric was not promising")
            self.study.tell(trial, state=TrialState.PRUNED)
        elif best is None or state.kind != "completed":
            trial.set_user_attr(FAILED, state.describe())
            self.study.tell(trial, state=TrialState.FAIL)
            if state.kind == "completed":
                raise ConfigError([self._unknown_metric(run)])
        else:
            self.study.tell(trial, best)
        outcome = "stopped early" if pruned else f"{state.kind} {state.describe()}"
        say(f"[{trial.number}] {run.run_id}  {outcome}  {self.sweep.metric} {best}")

    def _watch(self, trial: Any, run: Run) -> bool:
        """Run a trial; tell Optuna what it reaches; return whether it was stopped for that."""
        while read_state(run.folder).kind == "running" and not self.stopping:
            time.sleep(POLL_SECONDS)  # another worker drew the same values: its result is ours too
        if self.stopping:
            return False
        reported, pruned = 0, False
        with self.under_way(run) as process:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                for step, value in self._values(run)[reported:]:
                    reported += 1
                    trial.report(value, step)
                    if not pruned and trial.should_prune():
                        pruned = True
                        local.ask_to_stop(run)
        if not self.stopping and read_state(run.folder).kind == "running":
            return self._watch(trial, run)  # both had started it, and the other worker was first
        return pruned and not self.stopping

    def _values(self, run: Run) -> list[tuple[int, float]]:
        """Return the metric at each evaluation so far, by its number."""
        path = run.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        found = [row[self.sweep.metric] for row in rows if row.get(self.sweep.metric) is not None]
        return [*enumerate(found, start=1)]

    def _unknown_metric(self, run: Run) -> str:
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        known = {name for line in lines for name in json.loads(line) if name.startswith("eval/")}
        return (
            f"{self.sweep.path}: metric.name got {self.sweep.metric!r}, which {run.run_id} never "
            f"logged; allowed are {', '.join(sorted(known))}"
        )

    def best(self) -> str:
        """Say what was found."""
        from optuna.trial import TrialState

        if not self.study.get_trials(states=(TrialState.COMPLETE,)):
            return "No trial is complete."
        trial = self.study.best_trial
        count = len(self.study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
        return (
            f"Best of {count} by {self.sweep.metric}: {trial.value:.4f}, "
            f"{trial.user_attrs['run_id']} {trial.params}"
        )


def _counts(trial: Any) -> bool:
    """Tell whether a trial is under way or over: not if it was lost, because it is done again."""
    from optuna.trial import TrialState

    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    return trial.state in states or _has_failed(trial)


def _has_failed(trial: Any) -> bool:
    return FAILED in trial.user_attrs


def _fingerprint(sweep: Sweep, extra: list[str]) -> str:
    """Tell searches apart whose results cannot stand beside each other; how long they are may grow."""
    asked = [sweep.program, sweep.command, sweep.parameters, sweep.metric, sweep.maximize]
    text = json.dumps([*asked, sweep.early_terminate, sorted(extra)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _problems(sweep: Sweep) -> Iterator[str]:
    """Name what W&B would understand, and a search here does not do."""
    if not sweep.metric.startswith("eval/"):
        yield (
            f"{sweep.path}: metric.name got {sweep.metric!r}, allowed is a figure of validation, "
            "eval/...: what is chosen by the test set has no test any more"
        )
    others = sorted(set(sweep.early_terminate or {}) - {"type", *STOPS})
    if others:
        yield f"{sweep.path}: early_terminate.{', '.join(others)}: --search has {', '.join(STOPS)} alone"


def _open_study(sweep: Sweep, journal: Path, sampler: str, seed: int | None) -> Any:
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError as error:
        hint = "bash launch/install.sh search"
        raise ConfigError([f"--search optuna needs Optuna ({error}): {hint}"]) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal)))
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    stops = sweep.early_terminate or {}
    pruner = optuna.pruners.HyperbandPruner(
        min_resource=stops.get("min_iter", STOPS["min_iter"]),
        reduction_factor=stops.get("eta", STOPS["eta"]),
    )
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name=sweep.path.stem,
        direction="maximize" if sweep.maximize else "minimize",
        sampler=samplers[sampler](),
        pruner=pruner if stops else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def suggest(trial: Any, name: str, parameter: dict[str, Any]) -> Any:
    """Choose a parameter's value, from what W&B's format says of it.

    Raises:
        ConfigError: for a distribution that Optuna does not have.
    """
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return trial.suggest_categorical(name, parameter["values"])
    if "min" not in parameter or "max" not in parameter:
        raise ConfigError([f"parameters.{name} got {parameter!r}: search needs values or min, max"])
    low, high = parameter["min"], parameter["max"]
    whole = isinstance(low, int) and isinstance(high, int)
    match parameter.get("distribution", "int_uniform" if whole else "uniform"):
        case "int_uniform":
            return trial.suggest_int(name, low, high)
        case "uniform":
            return trial.suggest_float(name, low, high)
        case "q_uniform" if whole and isinstance(parameter.get("q", 1), int):
            return trial.suggest_int(name, low, high, step=parameter.get("q", 1))
        case "q_uniform":
            return trial.suggest_float(name, low, high, step=parameter.get("q", 1))
        case "log_uniform_values":
            return trial.suggest_float(name, low, high, log=True)
        case "log_uniform":  # W&B gives the exponents
            return trial.suggest_float(name, math.exp(low), math.exp(high), log=True)
        case other:
            allowed = "int_uniform, uniform, q_uniform, log_uniform_values, log_uniform"
            raise ConfigError([f"parameters.{name}.distribution got {other!r}, allowed: {allowed}"])

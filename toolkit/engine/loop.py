"""The training loop.

A step is one optimizer update. What it computes is a function of (data, seed, step): rows, order,
dropout and rate; ranks and micro-batches only share the work. So weights, AdamW's moments and
`Progress` are all that it takes to go on, on any number of ranks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from toolkit.engine.optim import rate_factor
from toolkit.engine.step import Report, Wants, train_step
from toolkit.engine.totals import Progress, Totals
from toolkit.engine.trainer import Trainer
from toolkit.errors import DivergedError, Preempted


@dataclass(frozen=True)
class Hooks:
    """What the loop asks and reports to; every rank calls them at the same steps."""

    wants: Callable[[], Wants]
    """Asked once in each step; what one rank wants, all do."""
    on_step: Callable[[int], None]
    """A step is done (counted from 1)."""
    on_log: Callable[[int, dict[str, Any]], None]
    """New training figures."""
    on_eval: Callable[[int], None]
    """Time to evaluate. Raises `Preempted` to leave it to the next start."""
    on_save: Callable[[Progress], None]
    """Time for a checkpoint."""


def train(trainer: Trainer, hooks: Hooks, progress: Progress) -> Totals:
    """Run the steps that are left and return the sums over all of them.

    Raises:
        Preempted: when a rank wanted to stop; the last checkpoint holds all that was done.
        DivergedError: after more than `max_skipped` steps that could not be taken.
    """
    trainer.model.train()
    report: Report | None = None
    while True:
        if progress.eval_due:
            evaluate_and_save(hooks, progress)
        if progress.step == trainer.stream.num_steps:
            return progress.overall
        report = train_step(trainer, progress, hooks.wants(), report)
        _refuse_divergence(trainer, progress)
        if progress.step % trainer.spec.log_every == 0 or progress.step == trainer.stream.num_steps:
            trainer.runtime.phases.enter("log")
            hooks.on_log(progress.step, _figures(trainer, progress, report.sums.norm))
            progress.overall.add(progress.recent)
            progress.recent = Totals()
        hooks.on_step(progress.step)
        progress.eval_due = trainer.evaluation_is_due(progress.step)
        if report.sums.stop:
            hooks.on_save(progress)
            raise Preempted(progress.step)
        if report.sums.save and not progress.eval_due:
            hooks.on_save(progress)
            # the time of a step that is begun already starts after that
            report = replace(report, ended=time.monotonic())


def evaluate_and_save(hooks: Hooks, progress: Progress) -> None:
    """Do the evaluation that is due; if it is interrupted, the next start does it."""
    try:
        hooks.on_eval(progress.step)
    except Preempted:
        hooks.on_save(progress)
        raise Preempted(progress.step) from None
    progress.eval_due = False
    hooks.on_save(progress)


def _refuse_divergence(trainer: Trainer, progress: Progress) -> None:
    allowed = trainer.spec.max_skipped
    if progress.recent.skipped + progress.overall.skipped > allowed:
        raise DivergedError(f"{allowed + 1} steps had a loss or gradient that is not finite")


def _figures(trainer: Trainer, progress: Progress, norm: float) -> dict[str, Any]:
    totals = progress.recent
    factor = rate_factor(progress.step - 1, trainer.stream.num_steps, trainer.optim)
    return {
        "train/loss": totals.loss_sum / totals.rows if totals.rows else None,
        "train/lr": factor * trainer.optim.lr,
        "train/grad_norm_preclip": norm if math.isfinite(norm) else None,
        "train/reviews_per_s": totals.reviews_per_s,
        "train/tokens_per_s": totals.tokens_per_s,
        "train/padding": totals.padding,
        "train/skipped_steps": totals.skipped,
    }

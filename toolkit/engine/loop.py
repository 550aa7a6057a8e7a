"""The training loop.

A step is one optimizer update. What it computes is a function of (data, seed, step): rows, order,
dropout and rate; ranks and micro-batches only share the work. So weights, AdamW's moments and
`Progress` are all that it takes to go on, on any number of ranks.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.console import say
from toolkit.data.batches import NO_ROWS, Batch, make_batch
from toolkit.data.cache import TokenSplit
from toolkit.data.hashing import hash64, key64
from toolkit.data.steps import Deal, Stream, deal
from toolkit.engine.optim import OptimSpec, rate_factor, set_rates
from toolkit.engine.runtime import Runtime
from toolkit.errors import DivergedError, Preempted


@dataclass(frozen=True)
class LoopSpec:
    """What a user said about the loop. The fields are those of `RunConfig`."""

    grad_accum: int = 1
    max_tokens: int | None = None
    max_skipped: int = 10
    eval_every: int | None = None
    log_every: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Trainer:
    """All that the loop works on; built once, never reassigned."""

    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: TokenSplit
    stream: Stream
    padded: bool
    spec: LoopSpec
    optim: OptimSpec


@dataclass
class Totals:
    """Sums over steps and ranks; every mean in a log is one division of these."""

    rows: float = 0.0
    loss_sum: float = 0.0
    tokens: float = 0.0
    computed_tokens: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    """Time in the steps themselves; of one that was begun ahead, from the end of the one before."""


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps that are done."""
    eval_due: bool = False
    """The evaluation that belongs to the last step is not done yet."""
    split: int = 1
    """Every micro-batch is cut into so many, because it did not fit into memory whole."""
    overall: Totals = field(default_factory=Totals)
    recent: Totals = field(default_factory=Totals)
    """Sums since the last line in the log; not yet part of `overall`."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Make it of what `dataclasses.asdict` made of it."""
        totals = {name: Totals(**values[name]) for name in ("overall", "recent")}
        return cls(**(values | totals))


@dataclass(frozen=True)
class Wants:
    """What a rank, or all of them together, want besides training."""

    stop: bool = False
    save: bool = False


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


@dataclass(frozen=True)
class Sums:
    """What all ranks know of a step together; float64 on the device until it is read."""

    loss_sum: float
    tokens: float
    computed_tokens: float
    out_of_memory: float
    stop: float
    save: float
    """The last three count ranks."""
    norm: float
    """The gradient's before clipping, no sum; not finite if the step was left out."""


@dataclass(frozen=True)
class Begun:
    """A step whose gradient the device is to compute, as this rank knows it; the update is to come."""

    loss_sum: Tensor
    """On the device; of the rows of this rank, like the next two."""
    tokens: int
    computed_tokens: int
    out_of_memory: bool
    micro_batches: int


@dataclass(frozen=True)
class Report:
    """A step that is done."""

    sums: Sums
    begun: Begun | None
    """The next step, if it is begun."""
    ended: float
    """When, by the monotonic clock."""


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
            _add(progress.overall, progress.recent)
            progress.recent = Totals()
        hooks.on_step(progress.step)
        progress.eval_due = _evaluation_is_due(trainer, progress.step)
        if report.sums.stop:
            hooks.on_save(progress)
            raise Preempted(progress.step)
        if report.sums.save and not progress.eval_due:
            hooks.on_save(progress)


def evaluate_and_save(hooks: Hooks, progress: Progress) -> None:
    """Do the evaluation that is due; if it is interrupted, the next start does it."""
    try:
        hooks.on_eval(progress.step)
    except Preempted:
        hooks.on_save(progress)
        raise Preempted(progress.step) from None
    progress.eval_due = False
    hooks.on_save(progress)


def train_step(
    trainer: Trainer, progress: Progress, wants: Wants, last: Report | None = None
) -> Report:
    """Take the next step, on all ranks, in smaller micro-batches if it does not fit into memory.

    A GPU is given the next step's gradient to compute before the host waits to read what came out
    of this one, so that it is never without work. The next update waits: this step may have to be
    done again.

    Args:
        trainer: what to work on.
        progress: is moved on by one step.
        wants: of this rank.
        last: of the step before; without it the gradient of a begun step would be added twice.

    Raises:
        OutOfMemoryError: when single reviews do not fit.
    """
    runtime, step = trainer.runtime, progress.step
    begun = last.begun if last else None
    following: Begun | None = None
    started = last.ended if last and begun else time.monotonic()
    while True:
        begun = begun or begin_step(trainer, step, progress.split)
        runtime.phases.enter("optimizer", step + 1)
        set_rates(trainer.optimizer, rate_factor(step, trainer.stream.num_steps, trainer.optim))
        norm = runtime.step()
        read = _fetch_sums(runtime, begun, wants, norm)
        if runtime.begins_ahead and not _evaluation_is_due(trainer, step + 1):
            following = begin_step(trainer, step + 1, progress.split)
            runtime.phases.enter("optimizer", step + 1)  # back to where the host waits
        sums = Sums(*read())
        if not sums.out_of_memory:
            break
        if following:
            runtime.forget_gradient()
        _cut_smaller(trainer, progress, begun.micro_batches)
        begun = None
    ended = time.monotonic()
    _count(progress.recent, sums, len(trainer.stream.slots(step)), ended - started)
    progress.step += 1
    return Report(sums, following, ended)


def begin_step(trainer: Trainer, step: int, split: int = 1) -> Begun:
    """Hand the gradient of a step to the device."""
    trainer.runtime.phases.enter("data", step + 1)
    trainer.runtime.seed_step(trainer.spec.seed, step)
    batches = micro_batches(trainer, step, split)
    return add_gradients(trainer, batches, len(trainer.stream.slots(step)))


def _fetch_sums(
    runtime: Runtime, begun: Begun, wants: Wants, norm: Tensor
) -> Callable[[], list[float]]:
    """Sum over the ranks, in one message; return what waits for the fields of `Sums`."""
    of_rank = begun.tokens, begun.computed_tokens, begun.out_of_memory, wants.stop, wants.save
    on_device = runtime.sums(begun.loss_sum, *of_rank)
    return runtime.fetch(torch.cat([on_device, norm.double().reshape(1)]))


def _count(totals: Totals, sums: Sums, rows: int, seconds: float) -> None:
    if math.isfinite(sums.norm):
        totals.rows += rows
        totals.loss_sum += sums.loss_sum
    else:
        totals.skipped += 1
    totals.tokens += sums.tokens
    totals.computed_tokens += sums.computed_tokens
    totals.seconds += seconds


def add_gradients(trainer: Trainer, batches: Sequence[Batch], rows: int) -> Begun:
    """Compute the gradient of a step.

    A rank that runs out of memory keeps the others company, with stand-ins whose gradient is NaN,
    until all have learnt of it: so no rank waits in vain, and none takes the step.
    """
    runtime = trainer.runtime
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    failed = False
    for number, batch in enumerate(batches):
        with runtime.micro_step(last=number == len(batches) - 1):
            if not failed:
                failed = not _add_gradient(trainer, batch, rows, loss_sum)
            if failed:
                runtime.spoil(lambda model: stand_in_loss(trainer, model))
    tokens = sum(batch.tokens for batch in batches)
    computed_tokens = sum(batch.computed_tokens for batch in batches)
    return Begun(loss_sum, tokens, computed_tokens, failed, len(batches))


def _add_gradient(trainer: Trainer, batch: Batch, rows: int, loss_total: Tensor) -> bool:
    """Add one micro-batch's gradient and loss; return False if it does not fit into memory."""
    runtime = trainer.runtime
    try:
        runtime.phases.enter("forward")
        loss_sum = summed_loss(trainer, batch)
        runtime.phases.enter("backward")
        runtime.backward(loss_sum, rows)
    except torch.OutOfMemoryError:
        if not runtime.can_rejoin():
            raise
        return False
    loss_total += loss_sum.detach()
    return True


def _cut_smaller(trainer: Trainer, progress: Progress, micro_batches: int) -> None:
    """Halve the micro-batches from this step on, whose rows stay the same."""
    runtime = trainer.runtime
    rows = len(trainer.stream.slots(progress.step))
    if micro_batches * runtime.world_size >= rows:
        raise torch.OutOfMemoryError(
            f"out of memory in step {progress.step + 1} with single reviews"
        )
    progress.split *= 2
    runtime.free_memory()
    if runtime.is_main:
        say(
            f"Out of memory in step {progress.step + 1}: it is done again with its rows in "
            f"{progress.split} times as many micro-batches, and so are the steps to come."
        )


def micro_batches(trainer: Trainer, step: int, split: int = 1) -> list[Batch]:
    """Return this rank's share of a step, every micro-batch cut into `split`."""
    return deal_slots(trainer, trainer.stream.slots(step), split)


def deal_slots(trainer: Trainer, slots: np.ndarray, split: int = 1) -> list[Batch]:
    """Return this rank's share of the rows in these slots."""
    rows = trainer.stream.rows(slots)
    dealt = deal_rows(trainer, rows, trainer.runtime.world_size, split)
    keys = hash64(key64("dropout", trainer.spec.seed), slots)
    return [_batch(trainer, rows[places], keys[places]) for places in dealt[trainer.runtime.rank]]


def deal_rows(trainer: Trainer, rows: np.ndarray, world_size: int, split: int = 1) -> Deal:
    """Deal rows to so many ranks, every micro-batch cut into `split`."""
    spec = trainer.spec
    return deal(
        trainer.train.lengths(rows),
        world_size,
        grad_accum=spec.grad_accum * split,
        max_tokens=spec.max_tokens and spec.max_tokens // split,
        padded=trainer.padded,
    )


def _batch(trainer: Trainer, rows: np.ndarray, keys: np.ndarray | None = None) -> Batch:
    return make_batch(trainer.train, rows, keys, padded=trainer.padded)


def stand_in_loss(trainer: Trainer, model: nn.Module) -> Tensor:
    """Return some loss that every parameter has a gradient of, without any row of the data."""
    return model(**trainer.runtime.inputs(_batch(trainer, NO_ROWS))).logits.float().sum()


def summed_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over a micro-batch's rows; 0 for a stand-in, which has none."""
    runtime = trainer.runtime
    logits_SC = trainer.model(**runtime.inputs(batch)).logits.float()
    return functional.cross_entropy(
        logits_SC[: len(batch.rows)], runtime.labels(batch), reduction="sum"
    )


def _refuse_divergence(trainer: Trainer, progress: Progress) -> None:
    allowed = trainer.spec.max_skipped
    if progress.recent.skipped + progress.overall.skipped > allowed:
        raise DivergedError(f"{allowed + 1} steps had a loss or gradient that is not finite")


def _evaluation_is_due(trainer: Trainer, done: int) -> bool:
    """Tell whether one follows these steps, as it does at the end of training."""
    every = trainer.spec.eval_every
    return trainer.stream.ends_epoch(done - 1) or bool(every and done % every == 0)


def _figures(trainer: Trainer, progress: Progress, norm: float) -> dict[str, Any]:
    totals = progress.recent
    factor = rate_factor(progress.step - 1, trainer.stream.num_steps, trainer.optim)
    return {
        "train/loss": totals.loss_sum / totals.rows if totals.rows else None,
        "train/lr": factor * trainer.optim.lr,
        "train/grad_norm_preclip": norm if math.isfinite(norm) else None,
        "train/reviews_per_s": totals.rows / totals.seconds,
        "train/tokens_per_s": totals.tokens / totals.seconds,
        "train/padding": 1 - totals.tokens / max(1.0, totals.computed_tokens),
        "train/skipped_steps": totals.skipped,
    }


def _add(total: Totals, part: Totals) -> None:
    for name in asdict(part):
        setattr(total, name, getattr(total, name) + getattr(part, name))

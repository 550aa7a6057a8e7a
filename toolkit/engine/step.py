"""One optimizer step: gradient, update, and what all ranks know of it together."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.console import say
from toolkit.data.batches import Batch
from toolkit.engine.optim import rate_factor, set_rates
from toolkit.engine.runtime import Runtime
from toolkit.engine.totals import Progress, Totals
from toolkit.engine.trainer import Trainer, micro_batches, stand_in_loss, summed_loss


@dataclass(frozen=True)
class Wants:
    """What a rank, or all of them together, want besides training."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Sums:
    """What all ranks know of a step together, as read from the device."""

    loss_sum: float
    tokens: float
    computed_tokens: float
    out_of_memory: float
    stop: float
    save: float
    """Ranks that want it; like the two above, a count of ranks."""
    norm: float
    """The gradient's before clipping, no sum; not finite if the step was left out."""


@dataclass(frozen=True)
class Begun:
    """A step whose gradient is launched and not applied yet; the figures are this rank's."""

    loss_sum: Tensor
    """On the device."""
    tokens: int
    computed_tokens: int
    out_of_memory: bool
    num_micro_batches: int


@dataclass(frozen=True)
class Report:
    """A step that is done."""

    sums: Sums
    begun: Begun | None
    """The next step, if it is begun."""
    ended: float
    """When, by the monotonic clock."""


def train_step(
    trainer: Trainer, progress: Progress, wants: Wants, last: Report | None = None
) -> Report:
    """Take the next step, on all ranks, in smaller micro-batches if it does not fit into memory.

    Args:
        trainer: what to work on.
        progress: is moved on by one step.
        wants: of this rank.
        last: of the step before, whenever there was one: the gradient that it has begun is in place
            already, and would be added twice.

    Raises:
        OutOfMemoryError: when single reviews do not fit.
    """
    step = progress.step
    if last and last.begun:
        begun, started = last.begun, last.ended
    else:
        started = time.monotonic()
        begun = begin_step(trainer, step, progress.split)
    sums, following = _update(trainer, progress, begun, wants)
    while sums.out_of_memory:
        _cut_smaller(trainer, progress, begun.num_micro_batches)
        begun = begin_step(trainer, step, progress.split)
        sums, following = _update(trainer, progress, begun, wants)
    ended = time.monotonic()
    _count(progress.recent, sums, len(trainer.stream.slots(step)), ended - started)
    progress.step += 1
    return Report(sums, following, ended)


def _update(
    trainer: Trainer, progress: Progress, begun: Begun, wants: Wants
) -> tuple[Sums, Begun | None]:
    """Apply a step's gradient, unless a rank ran out of memory; return the next step, if it is begun.

    A GPU is given the next step's gradient to compute before the host waits to read what came out
    of this one, so that it is never without work. The next update waits: this step may have to be
    done again.
    """
    runtime, step = trainer.runtime, progress.step
    runtime.phases.enter("optimizer", step + 1)
    set_rates(trainer.optimizer, rate_factor(step, trainer.stream.num_steps, trainer.optim))
    norm = runtime.step()
    read_sums = _fetch_sums(runtime, begun, wants, norm)
    following: Begun | None = None
    if runtime.begins_ahead and not trainer.evaluation_is_due(step + 1):
        following = begin_step(trainer, step + 1, progress.split)
        runtime.phases.enter("optimizer", step + 1)  # back to where the host waits
    sums = read_sums()
    if sums.out_of_memory and following:
        runtime.forget_gradient()  # which would be in the way of this step's
        following = None
    return sums, following


def begin_step(trainer: Trainer, step: int, split: int = 1) -> Begun:
    """Hand the gradient of a step to the device."""
    trainer.runtime.phases.enter("data", step + 1)
    trainer.runtime.seed_step(trainer.spec.seed, step)
    batches = micro_batches(trainer, step, split)
    return add_gradients(trainer, batches, len(trainer.stream.slots(step)))


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


def _fetch_sums(runtime: Runtime, begun: Begun, wants: Wants, norm: Tensor) -> Callable[[], Sums]:
    """Sum over the ranks, in one message; return what waits for it. In the order of `Sums`."""
    of_rank = begun.tokens, begun.computed_tokens, begun.out_of_memory, wants.stop, wants.save
    on_device = runtime.sums(begun.loss_sum, *of_rank)
    read = runtime.fetch(torch.cat([on_device, norm.double().reshape(1)]))
    return lambda: Sums(*read())


def _count(totals: Totals, sums: Sums, rows: int, seconds: float) -> None:
    if math.isfinite(sums.norm):
        totals.rows += rows
        totals.loss_sum += sums.loss_sum
    else:
        totals.skipped += 1
    totals.tokens += sums.tokens
    totals.computed_tokens += sums.computed_tokens
    totals.seconds += seconds


def _cut_smaller(trainer: Trainer, progress: Progress, num_micro_batches: int) -> None:
    """Halve the micro-batches from this step on, whose rows stay the same."""
    runtime = trainer.runtime
    rows = len(trainer.stream.slots(progress.step))
    if num_micro_batches * runtime.world_size >= rows:
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

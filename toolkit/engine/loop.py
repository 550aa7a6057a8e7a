"""The training loop.

A step is one optimizer update. What it computes is a function of (data, seed, step): rows, order,
dropout and rate; ranks and micro-batches only share the work.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.data.batches import Batch, make_batch
from toolkit.data.cache import TokenSplit
from toolkit.data.hashing import hash64, key64
from toolkit.data.steps import Stream, deal
from toolkit.engine.optim import OptimSpec, rate_factor, set_rates
from toolkit.engine.runtime import Runtime
from toolkit.errors import DivergedError


@dataclass(frozen=True)
class LoopSpec:
    """What a user said about the loop. The fields are those of `RunConfig`."""

    grad_accum: int = 1
    max_tokens: int | None = None
    max_grad_norm: float = 1.0
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


@dataclass(frozen=True)
class Hooks:
    """What the loop reports to; every rank calls them at the same steps."""

    on_step: Callable[[int], None]
    """A step is done (counted from 1)."""
    on_log: Callable[[int, dict[str, Any]], None]
    """New training figures."""
    on_eval: Callable[[int], None]
    """Time to evaluate."""


@dataclass
class Totals:
    """Sums over steps and ranks; every mean in a log is one division of these."""

    rows: float = 0.0
    loss_sum: float = 0.0
    tokens: float = 0.0
    computed_tokens: float = 0.0
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    paused: float = 0.0
    """Seconds in evaluation, which are not training time."""

    def seconds(self) -> float:
        """Return the training time since the start."""
        return time.monotonic() - self.started - self.paused


def train(trainer: Trainer, hooks: Hooks, first_step: int = 0) -> Totals:
    """Run the steps from `first_step` to the end and return the sums over all of them.

    Raises:
        DivergedError: after more than `max_skipped` steps that could not be taken.
    """
    stream, spec = trainer.stream, trainer.spec
    overall, recent = Totals(), Totals()
    trainer.model.train()
    for step in range(first_step, stream.num_steps):
        done = step + 1
        norm = train_step(trainer, step, recent)
        if recent.skipped + overall.skipped > spec.max_skipped:
            raise DivergedError(
                f"{spec.max_skipped + 1} steps had a loss or gradient that is not finite"
            )
        if done % spec.log_every == 0 or done == stream.num_steps:
            factor = rate_factor(step, stream.num_steps, trainer.optim)
            hooks.on_log(done, _figures(recent, norm, factor * trainer.optim.lr))
            _add(overall, recent)
            recent = Totals()
        hooks.on_step(done)
        if stream.ends_epoch(step) or (spec.eval_every and done % spec.eval_every == 0):
            before = time.monotonic()
            hooks.on_eval(done)
            for totals in (overall, recent):
                totals.paused += time.monotonic() - before
    return overall


def train_step(trainer: Trainer, step: int, totals: Totals) -> float:
    """Compute one step's gradient over all ranks and apply it, or skip it where it is not finite.

    Returns:
        The gradient's norm before clipping.
    """
    runtime, model, optimizer = trainer.runtime, trainer.model, trainer.optimizer
    set_rates(optimizer, rate_factor(step, trainer.stream.num_steps, trainer.optim))
    slots = trainer.stream.slots(step)
    sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    batches = micro_batches(trainer, slots)
    for number, batch in enumerate(batches):
        with runtime.micro_step(model, last=number == len(batches) - 1):
            loss_sum = summed_loss(runtime, model, batch)
            runtime.backward(loss_sum, len(slots))
        sums[0] += loss_sum.detach()
    sums[1] = sum(batch.tokens for batch in batches)
    sums[2] = sum(batch.computed_tokens for batch in batches)
    # a host sync, with the norm below the only ones of a step: they decide whether to take it
    loss_total, tokens, computed_tokens = runtime.sum(sums).tolist()
    norm = runtime.clip(model, trainer.spec.max_grad_norm)
    # both figures are the same on all ranks, so all take the same decision
    if math.isfinite(loss_total) and math.isfinite(norm):
        optimizer.step()
        totals.rows += len(slots)
        totals.loss_sum += loss_total
    else:
        totals.skipped += 1
    optimizer.zero_grad()
    totals.tokens += tokens
    totals.computed_tokens += computed_tokens
    return norm


def micro_batches(trainer: Trainer, slots: np.ndarray) -> list[Batch]:
    """Return this rank's share of the step that owns these slots."""
    rows = trainer.stream.rows(slots)
    dealt = deal(
        trainer.train.lengths(rows),
        trainer.runtime.world_size,
        grad_accum=trainer.spec.grad_accum,
        max_tokens=trainer.spec.max_tokens,
        padded=trainer.padded,
    )
    keys = hash64(key64("dropout", trainer.spec.seed), slots)
    return [
        make_batch(trainer.train, rows[places], padded=trainer.padded, slot_keys=keys[places])
        for places in dealt[trainer.runtime.rank]
    ]


def summed_loss(runtime: Runtime, model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over a micro-batch's rows; 0 for a stand-in, which has none."""
    logits_SC = model(**runtime.inputs(batch)).logits.float()
    return functional.cross_entropy(
        logits_SC[: len(batch.rows)], runtime.labels(batch), reduction="sum"
    )


def _figures(totals: Totals, norm: float, rate: float) -> dict[str, Any]:
    seconds = totals.seconds()
    return {
        "train/loss": totals.loss_sum / totals.rows if totals.rows else None,
        "train/lr": rate,
        "train/grad_norm_preclip": norm if math.isfinite(norm) else None,
        "train/reviews_per_s": totals.rows / seconds,
        "train/tokens_per_s": totals.tokens / seconds,
        "train/padding": 1 - totals.tokens / max(1.0, totals.computed_tokens),
        "train/skipped_steps": totals.skipped,
    }


def _add(total: Totals, part: Totals) -> None:
    for name in ("rows", "loss_sum", "tokens", "computed_tokens", "skipped"):
        setattr(total, name, getattr(total, name) + getattr(part, name))

"""What training works on: a model, rows, settings; a rank's share of a step's rows, and its loss."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.data.batches import NO_ROWS, Batch, make_batch
from toolkit.data.cache import TokenSplit
from toolkit.data.hashing import hash64, key64
from toolkit.data.steps import Deal, Stream, deal
from toolkit.engine.optim import OptimSpec
from toolkit.engine.runtime import Runtime


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
    """All that the loop works on; variants are made with `dataclasses.replace`."""

    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: TokenSplit
    stream: Stream
    padded: bool
    spec: LoopSpec
    optim: OptimSpec

    def evaluation_is_due(self, done: int) -> bool:
        """Tell whether one follows these steps, as it does at the end of training."""
        every = self.spec.eval_every
        return self.stream.ends_epoch(done - 1) or bool(every and done % every == 0)


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


def summed_loss(trainer: Trainer, batch: Batch) -> Tensor:
    """Return the cross-entropy summed over a micro-batch's rows; 0 for a stand-in, which has none."""
    runtime = trainer.runtime
    logits_SC = trainer.model(**runtime.inputs(batch)).logits.float()
    return functional.cross_entropy(
        logits_SC[: len(batch.rows)], runtime.labels(batch), reduction="sum"
    )


def stand_in_loss(trainer: Trainer, model: nn.Module) -> Tensor:
    """Return some loss that every parameter has a gradient of, without any row of the data."""
    return model(**trainer.runtime.inputs(_batch(trainer, NO_ROWS))).logits.float().sum()

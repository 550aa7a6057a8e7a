"""One exact pass over a split, on any number of ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from toolkit.data.batches import evaluation_batches
from toolkit.data.cache import TokenSplit
from toolkit.engine.runtime import Runtime
from toolkit.errors import DivergedError, Preempted
from toolkit.record.metrics import Confusion


@dataclass(frozen=True)
class Evaluation:
    """What a pass over N rows found."""

    counts: Confusion
    loss: float | None
    """Mean cross-entropy; None without rows."""
    scores: np.ndarray
    """(N,) float32 probability of class 1, in the order of the split."""
    seconds: float


@torch.no_grad()
def evaluate(
    runtime: Runtime,
    model: nn.Module,
    split: TokenSplit,
    *,
    max_tokens: int,
    padded: bool,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score every row of a split exactly once; all ranks get the whole result.

    Raises:
        Preempted: when `wants_stop` is true on a rank.
        RuntimeError: when a row was counted more or less than once.
        DivergedError: when a score is not finite.
    """
    started, was_training = time.monotonic(), model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    scores = torch.zeros(len(split), device=runtime.device)
    seen = torch.zeros(len(split), dtype=torch.int64, device=runtime.device)
    for batch in evaluation_batches(
        split, runtime.rank, runtime.world_size, max_tokens=max_tokens, padded=padded
    ):
        runtime.phases.enter("evaluate")
        if runtime.any(wants_stop()):  # several ranks wait here for each other
            model.train(was_training)
            raise Preempted
        logits_RC = model(**runtime.inputs(batch)).logits[: len(batch.rows)].float()
        loss_sum += functional.cross_entropy(logits_RC, runtime.labels(batch), reduction="sum")
        rows_R = runtime.tensor(batch.rows)
        scores[rows_R] = logits_RC.softmax(dim=-1)[:, 1]
        seen.index_add_(0, rows_R, torch.ones_like(rows_R))
    model.train(was_training)
    loss_sum = runtime.sum(loss_sum)
    scores, seen = runtime.sum(scores).cpu(), runtime.sum(seen).cpu()
    if not bool((seen == 1).all()):
        raise RuntimeError(f"evaluation saw {int((seen != 1).sum())} rows more or less than once")
    if not bool(torch.isfinite(scores).all()):
        raise DivergedError("the model gives scores that are not finite")
    loss = loss_sum.item() / len(split) if len(split) else None
    counts = _confusion(split.labels, scores.numpy())
    seconds = time.monotonic() - started
    return Evaluation(counts, loss, scores.numpy(), seconds)


def _confusion(labels: np.ndarray, scores: np.ndarray) -> Confusion:
    predicted, actual = scores > 0.5, labels == 1
    return Confusion(
        tp=int((predicted & actual).sum()),
        fp=int((predicted & ~actual).sum()),
        fn=int((~predicted & actual).sum()),
        tn=int((~predicted & ~actual).sum()),
    )

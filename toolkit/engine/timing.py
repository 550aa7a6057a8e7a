"""How long does a step take? A few of a run's own steps, timed once they have settled."""

import statistics
import time
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from toolkit.engine.memory import forget_peak, peak_bytes
from toolkit.engine.step import Wants, train_step
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import Trainer, micro_batches

TIMED_STEPS = 10
WARM_STEPS = 4
"""ZeRO-3 settles later than others do."""
MET = 2
"""Times that all sizes of a compiled step were met before it counts: run, captured, then replayed."""
MOST_STEPS = 400
"""Of a compiled run, to find so many that count."""

Size = tuple[int, int]
"""What kernels are made for and graphs captured for: tokens and sequences of a micro-batch."""


class Times(NamedTuple):
    """What each of some steps took."""

    seconds: list[float]
    tokens: list[float]
    """Padding included, of all ranks."""
    split: int
    """Into how many times as many micro-batches they were cut in the end."""


class Steps(NamedTuple):
    """What some steps took together."""

    tokens: float
    """Their mean, padding included."""
    seconds: float
    """Their median."""
    peak: float
    """Bytes of memory."""
    split: int = 1
    """Into how many times as many micro-batches they were cut, because memory ran out."""


def run_steps(trainer: Trainer, batch_size: int, compiled: bool) -> Steps:
    """Time steps of so many rows."""
    counts = [step >= WARM_STEPS for step in range(WARM_STEPS + TIMED_STEPS)]
    if compiled:
        counts = first_settled(_few_steps(trainer, batch_size, MOST_STEPS))
    smaller = _few_steps(trainer, batch_size, len(counts))  # none is begun behind the last
    forget_peak(trainer.runtime.device)
    times = time_steps(smaller, counts)
    peak = peak_bytes(trainer.runtime.device)
    mean, median = statistics.mean(times.tokens), statistics.median(times.seconds)
    return Steps(mean, median, peak, times.split)


def time_steps(trainer: Trainer, counts: list[bool]) -> Times:
    """Take so many steps from the first one on; those that do not count settle the others."""
    trainer.model.train()
    progress, report = Progress(), None
    seconds, tokens = [], []
    for counted in counts:
        before, started = progress.recent.computed_tokens, time.perf_counter()
        report = train_step(trainer, progress, Wants(), report)
        if counted:
            seconds.append(time.perf_counter() - started)
            tokens.append(progress.recent.computed_tokens - before)
    return Times(seconds, tokens, progress.split)


def _few_steps(trainer: Trainer, batch_size: int, steps: int) -> Trainer:
    """Return the same with so many steps of so many rows, however few rows there are."""
    stream = replace(
        trainer.stream, batch_size=batch_size, epochs=batch_size * steps, max_steps=steps
    )
    return replace(trainer, stream=stream)


def sizes_of(trainer: Trainer, steps: int) -> list[list[Size]]:
    """Return the sizes of this rank's micro-batches in the first steps."""
    return [
        [
            (batch.computed_tokens, 0 if batch.bounds is None else len(batch.bounds))
            for batch in micro_batches(trainer, step)
        ]
        for step in range(steps)
    ]


def settled(sizes: list[list[Size]]) -> list[bool]:
    """Tell which steps count: their sizes were met before, and those of the next, which a GPU begins."""
    met, found = Counter[Size](), []
    for now, following in pairwise([*sizes, []]):
        found.append(bool(following) and all(met[size] >= MET for size in (*now, *following)))
        met.update(now)
    return found


def first_settled(trainer: Trainer) -> list[bool]:
    """Return which of the steps count, until enough do; all that come after a while, if too few do.

    The same on all ranks: a step waits for the one that has a size to capture.
    """
    runtime = trainer.runtime
    here = settled(sizes_of(trainer, trainer.stream.num_steps))
    ranks = runtime.sum(torch.tensor(here, dtype=torch.float32, device=runtime.device))
    counts = (ranks == runtime.world_size).tolist()
    for step, so_far in enumerate(accumulate(counts)):
        if so_far == TIMED_STEPS:
            return [*counts[: step + 1], False]  # none is begun behind the last
    return [step >= WARM_STEPS for step in range(len(counts))]

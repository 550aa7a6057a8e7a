"""Which rows an optimizer step sees, and who computes which: pure integers, no state.

Training reads an endless stream of rows, one shuffled epoch after another. A slot is a place in
that stream. Step `s` owns the slots `[s * B, (s + 1) * B)`; the number of ranks and micro-batches
only decides how a step's rows are dealt out. So resuming is "start at step s", on any world size.
"""

import functools
import heapq
from dataclasses import dataclass

import numpy as np

from toolkit.data.hashing import key64, shuffled

Deal = list[list[np.ndarray]]
"""[rank][micro_batch] -> places within the step's rows."""
MIN_UNIT, MAX_UNIT = 16, 2048
"""Of tokens. Matrix units want multiples of the first. Without the second 100,000 tokens would be filled
up to a multiple of 4,096: twice the filling, for few sizes less, as steps of a large batch are alike."""


@dataclass(frozen=True)
class Stream:
    """The rows of a whole run."""

    num_rows: int
    """Rows of the training set."""
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None

    @property
    def num_slots(self) -> int:
        """Rows that the run consumes, repetitions counted."""
        slots = round(self.epochs * self.num_rows)
        return min(slots, self.max_steps * self.batch_size) if self.max_steps else slots

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; only the last one may have fewer than `batch_size` rows."""
        return -(-self.num_slots // self.batch_size)

    def slots(self, step: int) -> np.ndarray:
        """Return the slots of a step (counted from 0)."""
        start = step * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.num_slots))

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """Return the row of the training set in each slot."""
        epochs, places = np.divmod(slots, self.num_rows)
        rows = np.empty_like(slots)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = epoch_order(self.seed, int(epoch), self.num_rows)[places[here]]
        return rows

    def ends_epoch(self, step: int) -> bool:
        """Tell whether a step consumes the last row of an epoch, or of the run."""
        slots = self.slots(step)
        crosses = (slots[-1] + 1) // self.num_rows > slots[0] // self.num_rows
        return bool(crosses) or step == self.num_steps - 1


@functools.lru_cache(maxsize=2)  # most steps span two epochs at most; 29 MB each for 3.6 M rows
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the permutation of one epoch."""
    return shuffled(key64("epoch", seed, epoch), num_rows)


def deal(
    lengths: np.ndarray,
    world_size: int,
    *,
    grad_accum: int = 1,
    max_tokens: int | None = None,
    padded: bool = False,
) -> Deal:
    """Deal a step's rows to ranks and micro-batches, so that ranks carry equal tokens.

    Args:
        lengths: (R,) tokens of each row.
        world_size: number of ranks.
        grad_accum: micro-batches for each rank; fewer if there are not enough rows.
        max_tokens: use as many more micro-batches as keep each within this many tokens, or those of the
            longest row.
        padded: a micro-batch costs rows x longest row, instead of the sum of its lengths, filled up.

    Returns:
        For each rank the same number of micro-batches, at least one; a micro-batch may be empty.
    """
    deal_into = _deal_padded if padded else _deal_packed
    at_most = -(-len(lengths) // world_size)
    count = max(1, min(grad_accum, at_most))
    if max_tokens is None:
        return deal_into(lengths, world_size, count)
    budget = max(max_tokens, cost(lengths.max(keepdims=True), padded=padded))  # no row can be cut
    count = max(count, -(-int(lengths.sum()) // (world_size * budget)))
    while _largest(lengths, dealt := deal_into(lengths, world_size, count), padded) > budget:
        count += 1
    return dealt


def _deal_packed(lengths: np.ndarray, world_size: int, num_micro_batches: int) -> Deal:
    """Balance tokens over ranks, then over each rank's micro-batches."""
    return [
        [mine[part] for part in balance(lengths[mine], num_micro_batches)]
        for mine in balance(lengths, world_size)
    ]


def _deal_padded(lengths: np.ndarray, world_size: int, num_micro_batches: int) -> Deal:
    """Cut the rows, sorted by length, into runs of equal padded size, and deal those to ranks.

    Neighbours in length share a micro-batch, so there is little padding; runs of long rows have few of
    them.
    """
    order = np.argsort(-lengths, kind="stable")
    runs = _equal_runs(lengths[order], world_size * num_micro_batches)
    batches = [order[start:stop] for start, stop in runs]
    # runs are alike in cost: deal them like cards, back and forth
    ranks: Deal = [[] for _ in range(world_size)]
    for number, batch in enumerate(batches):
        place, turn = number % world_size, number // world_size
        ranks[place if turn % 2 == 0 else world_size - 1 - place].append(batch)
    return ranks


def _equal_runs(falling: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Cut falling lengths into `count` runs, some perhaps empty, with the smallest largest cost."""
    longest = int(falling[0])
    low, high = longest, longest * len(falling)
    while low < high:  # the smallest budget that `count` runs can keep
        budget = (low + high) // 2
        if len(runs_within(falling, budget, padded=True)) <= count:
            high = budget
        else:
            low = budget + 1
    runs = runs_within(falling, low, padded=True)
    return runs + [(len(falling), len(falling))] * (count - len(runs))


def runs_within(falling: np.ndarray, budget: int, *, padded: bool) -> list[tuple[int, int]]:
    """Cut rows, sorted by falling length, into runs that cost at most `budget` (or are one row)."""
    totals = np.append(0, np.cumsum(falling))
    largest_pack = budget - budget % unit(budget)
    runs, start = [], 0
    while start < len(falling):
        if padded:  # the first row of a run is its longest and sets the padded length of the rest
            stop = start + budget // int(falling[start])
        else:
            stop = int(np.searchsorted(totals, totals[start] + largest_pack, side="right")) - 1
        stop = min(len(falling), max(start + 1, stop))
        runs.append((start, stop))
        start = stop
    return runs


def balance(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split rows into parts of nearly equal tokens: longest first, each to the lightest part.

    Graham (1969): Bounds on Multiprocessing Timing Anomalies. Ties go to the part with fewer rows.
    """
    heap = [(0, 0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        tokens, rows, part = heap[0]
        chosen[part].append(row)
        heapq.heapreplace(heap, (tokens + int(lengths[row]), rows + 1, part))
    return [np.array(sorted(rows), dtype=np.int64) for rows in chosen]


def cost(lengths: np.ndarray, *, padded: bool) -> int:
    """Return the tokens that a micro-batch computes, padding or filling included."""
    if not len(lengths):
        return 0
    return int(lengths.max()) * len(lengths) if padded else filled(int(lengths.sum()))


def filled(tokens: int) -> int:
    """Return the next of the few sizes of a pack.

    There are sixteen between one power of two and the next, fewer below 256 tokens, more above 65,536.
    Every size costs something to meet: a captured CUDA graph, or on a CPU the kernels that oneDNN makes
    for it and keeps (torch 2.13: 400 MB for 100 sizes of MiniLM's products, and a sixth of the time).
    """
    return -(-tokens // unit(tokens)) * unit(tokens)


def unit(tokens: int) -> int:
    """Return what such a size is a multiple of: the power of two below a sixteenth, within limits."""
    sixteenth = min(MAX_UNIT, max(MIN_UNIT, tokens // 16))
    return 1 << (sixteenth.bit_length() - 1)


def _largest(lengths: np.ndarray, dealt: Deal, padded: bool) -> int:
    return max(cost(lengths[rows], padded=padded) for batches in dealt for rows in batches)

"""Token arrays -> micro-batches, packed into one row of tokens or padded to a rectangle.

Shapes: T tokens of a packed micro-batch, S sequences in it, L longest of them, R rows with a label.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.data.cache import TokenSplit
from toolkit.data.hashing import hash64
from toolkit.data.steps import filled, runs_within, unit

NO_ROWS = np.zeros(0, dtype=np.int64)
STAND_IN = np.arange(2)
"""The tokens of a micro-batch of no rows: every rank has to run the same collectives. No label.

Two, because the embedding of the padding token, which may be one of them, has no gradient.
"""


@dataclass(frozen=True)
class Batch:
    """One micro-batch as numpy arrays."""

    input_ids: np.ndarray
    """(1, T) packed or (S, L) padded, int64."""
    position_ids: np.ndarray
    """Place of each token in its sequence; same shape."""
    dropout_keys: np.ndarray
    """int32, same shape: what dropout at this token depends on."""
    bounds: np.ndarray | None
    """(S + 1,) int32: packed sequence s is tokens bounds[s]:bounds[s + 1]. None if padded."""
    attention_mask: np.ndarray | None
    """(S, L) 1 on tokens, 0 on padding. None if packed."""
    labels: np.ndarray
    """(R,) int64, of the first R sequences; the rest are filling, or a stand-in."""
    rows: np.ndarray
    """(R,) rows of the split."""
    tokens: int
    """Tokens of the R rows."""
    longest: int
    """Tokens that no sequence of the split exceeds, nor any filling: not this batch's own longest."""

    @property
    def computed_tokens(self) -> int:
        """Tokens, filling and padding that go through the encoder."""
        return self.input_ids.size


def make_batch(
    split: TokenSplit,
    rows: np.ndarray,
    slot_keys: np.ndarray | None = None,
    *,
    padded: bool,
) -> Batch:
    """Gather rows into one micro-batch.

    Args:
        split: where the tokens are.
        rows: (R,) rows of the split; may be empty.
        slot_keys: (R,) uint64, what dropout on each row depends on; None when there is no dropout.
        padded: make a rectangle instead of one packed row.
    """
    labels = split.labels[rows].astype(np.int64)
    if len(rows):
        sequences = [split.tokens[split.offsets[row] : split.offsets[row + 1]] for row in rows]
    else:
        sequences, slot_keys = [STAND_IN], None
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    tokens = np.concatenate(sequences).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    keys = _token_keys(slot_keys, lengths, positions)
    counted = len(tokens) if len(rows) else 0
    longest = max(split.longest, len(STAND_IN))
    arrays = tokens, positions, keys
    laid_out = _pad(lengths, *arrays) if padded else _pack(lengths, *arrays, longest)
    return Batch(**laid_out, labels=labels, rows=rows, tokens=counted, longest=longest)


def _token_keys(
    slot_keys: np.ndarray | None, lengths: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Return an int32 for each token that depends on its slot and its place in the review alone."""
    if slot_keys is None:
        return np.zeros(len(positions), np.int32)
    mixed = hash64(np.uint64(0), np.repeat(slot_keys, lengths) + positions.astype(np.uint64))
    return (mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _pad(
    lengths: np.ndarray, tokens: np.ndarray, positions: np.ndarray, keys: np.ndarray
) -> dict[str, Any]:
    mask_SL = np.arange(lengths.max()) < lengths[:, None]
    return {
        "input_ids": _rectangle(mask_SL, tokens),
        "position_ids": _rectangle(mask_SL, positions),
        "dropout_keys": _rectangle(mask_SL, keys),
        "bounds": None,
        "attention_mask": mask_SL.astype(np.int64),
    }


def _rectangle(mask_SL: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    rectangle = np.zeros(mask_SL.shape, values_T.dtype)
    rectangle[mask_SL] = values_T
    return rectangle


def _pack(
    lengths: np.ndarray, tokens: np.ndarray, positions: np.ndarray, keys: np.ndarray, longest: int
) -> dict[str, Any]:
    """Lay sequences one after the other, and fill up to one of few sizes.

    The filling, 2 % on average, becomes sequences of at most `longest` tokens: kernels rely on that.
    Empty ones, which cost next to nothing, then round the number of bounds up to one of few sizes.
    """
    used, total = len(tokens), filled(len(tokens))
    ends = np.cumsum(lengths)
    cuts = np.minimum(np.arange(used + longest, total + longest, longest), total)
    slots = _few(len(lengths) + -(-unit(used) // longest))
    bounds = np.full(slots + 1, total, np.int32)
    bounds[: 1 + len(ends) + len(cuts)] = np.concatenate([[0], ends, cuts])
    rest = (0, total - used)
    return {
        "input_ids": np.pad(tokens, rest)[None],
        "position_ids": np.pad(positions, rest)[None],
        "dropout_keys": np.pad(keys, rest)[None],
        "bounds": bounds,
        "attention_mask": None,
    }


def _few(sequences: int) -> int:
    """Round up to 2^k or 1.25 x 2^k, in multiples of 8: 8, 16, 24, 32, 40, 64, 80 ...

    A batch of 2^k reviews, with its filling, fits the second. Matrix units want the multiples: the last
    layer has a row for each sequence.
    """
    power = max(8, 1 << (sequences.bit_length() - 1))
    sizes = power, power + max(8, power // 4), 2 * power
    return next(size for size in sizes if size >= sequences)


def evaluation_batches(
    split: TokenSplit,
    rank: int,
    world_size: int,
    *,
    max_tokens: int,
    padded: bool,
) -> Iterator[Batch]:
    """Yield a rank's share of one pass over a split, each row on exactly one rank.

    All ranks yield the same number of batches, the last perhaps empty, so that collectives inside
    the model (ZeRO-3) stay in step. Rows are sorted by length, so padding is small.
    """
    lengths = split.lengths(np.arange(len(split)))
    order = np.argsort(-lengths, kind="stable")
    groups = [
        order[start:stop] for start, stop in runs_within(lengths[order], max_tokens, padded=padded)
    ]
    groups += [order[:0]] * (-len(groups) % world_size)
    for group in groups[rank::world_size]:
        yield make_batch(split, group, padded=padded)

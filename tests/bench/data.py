"""How fast does the data path make batches on one core, and how evenly are ranks loaded?

    python -m tests.bench.data --rows 3600000

No model: token arrays of Amazon Polarity's lengths, memory-mapped as in training. `reviews/s` is from the
row numbers of a step to finished micro-batches of one rank that gets all; `first step` includes the
epoch's permutation. `largest/mean` is over ranks, the tokens that they compute in one step, padding
included: the mean over steps, since all ranks wait for the largest one in each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from toolkit.console import say
from toolkit.data.batches import make_batch
from toolkit.data.cache import TokenSplit
from toolkit.data.hashing import hash64
from toolkit.data.steps import Stream, cost, deal

MIN_TOKENS, MEDIAN_TOKENS, SPREAD, MAX_TOKENS = 18, 93, 0.52, 256
"""A log-normal that has, cut at both ends, a mean of 104 tokens, as Amazon Polarity's reviews do."""
VOCABULARY = 30_522
"""BERT's."""
SECONDS = 2.0
BALANCE_STEPS = 200
BATCHES, RANKS = (16, 32, 256), (2, 8, 32, 64)


def make_split(folder: Path, rows: int) -> TokenSplit:
    """Write random tokens of this many rows, and map them as training does."""
    dice = np.random.default_rng(0)
    drawn = dice.lognormal(np.log(MEDIAN_TOKENS), SPREAD, rows).astype(np.int64)
    offsets = np.append(0, np.cumsum(np.clip(drawn, MIN_TOKENS, MAX_TOKENS)))
    path = folder / "tokens.bin"
    dice.integers(0, VOCABULARY, offsets[-1], np.uint16).tofile(path)
    tokens = np.memmap(path, np.uint16, mode="r")
    return TokenSplit(tokens, offsets, np.zeros(rows, np.uint8), np.arange(rows))


def feed(split: TokenSplit, batch_size: int, *, padded: bool) -> tuple[float, float]:
    """Return seconds to the first step's batches, and then reviews/s."""
    stream = Stream(len(split), batch_size, epochs=1, seed=0)
    began, first, step = time.perf_counter(), 0.0, 0
    settled = began
    while time.perf_counter() - settled < SECONDS and step < stream.num_steps - 1:
        slots = stream.slots(step)
        rows = stream.rows(slots)
        for part in deal(split.lengths(rows), 1, grad_accum=2, padded=padded)[0]:
            keys = hash64(np.uint64(1), slots[part].astype(np.uint64))
            make_batch(split, rows[part], padded=padded, slot_keys=keys)
        if step == 0:
            settled = time.perf_counter()
            first = settled - began
        step += 1
    return first, (step - 1) * batch_size / (time.perf_counter() - settled)


def imbalance(split: TokenSplit, batch_size: int, ranks: int, *, padded: bool) -> float:
    """Return the largest rank's computed tokens over the mean rank's, mean over steps."""
    stream = Stream(len(split), batch_size, epochs=1, seed=0)
    ratios = []
    for step in range(min(BALANCE_STEPS, stream.num_steps - 1)):
        lengths = split.lengths(stream.rows(stream.slots(step)))
        dealt = deal(lengths, ranks, padded=padded)
        loads = [sum(cost(lengths[part], padded=padded) for part in mine) for mine in dealt]
        ratios.append(max(loads) / statistics.mean(loads))
    return statistics.mean(ratios)


def main(argv: list[str]) -> int:
    """Measure, print and write one JSON."""
    made = argparse.ArgumentParser("python -m tests.bench.data", description=__doc__)
    made.add_argument("--rows", type=int, default=3_600_000)
    made.add_argument("--out", type=Path, help="JSON with all figures")
    options = made.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(Path(folder), options.rows)
        for padded in (False, True):
            for batch_size in BATCHES:
                first, rate = feed(split, batch_size, padded=padded)
                loads = {
                    ranks: round(imbalance(split, batch_size, ranks, padded=padded), 4)
                    for ranks in RANKS
                    if ranks * 2 <= batch_size
                }
                shape = "padded" if padded else "packed"
                row = {"batch": batch_size, "shape": shape, "reviews_per_s": round(rate)}
                found.append(row | {"first_step_s": round(first, 3), "largest_over_mean": loads})
                say(json.dumps(found[-1]))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

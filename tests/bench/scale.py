"""What would 1 to 64 GPUs do? The model of tests/bench/SCALE.md, with inputs that can be changed.

    python -m tests.bench.scale --tflops 400 --gb_per_s 400 25

A step takes as long as its most loaded rank computes, and as long as what of the gradients' all-reduce
does not fit behind the backward pass. Nothing here is measured but the balance, which is simulated.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from tests.bench.data import imbalance, make_split
from toolkit.console import say
from toolkit.engine.estimate import communication_bytes, token_flops

LAYERS, WIDTH, INNER = 12, 768, 3072
PARAMETERS = 110_000_000
"""bert-base: 440 MB of fp32 gradients."""
BACKWARD = 2 / 3
"""Share of a step's operations; its buckets leave while it runs."""
RANKS = (1, 2, 4, 8, 16, 32, 64)
ROWS = 100_000


def step_seconds(compute: float, balance: float, transfer: float) -> float:
    """Return how long a step takes.

    Args:
        compute: seconds that the mean rank computes.
        balance: the most loaded rank's tokens over the mean rank's.
        transfer: seconds of the all-reduce.
    """
    return compute * balance + max(0.0, transfer - BACKWARD * compute)


def row(batch_size: int, ranks: int, gb_per_s: float, alone: float, balance: float) -> str:
    """Render one line; `alone` is the reviews/s of one rank."""
    transfer = communication_bytes("replicas", PARAMETERS, ranks) / gb_per_s / 1e9
    rate = batch_size / step_seconds(batch_size / ranks / alone, balance, transfer)
    cells = (batch_size, ranks, f"{balance:.3f}", f"{gb_per_s:g}", f"{rate:,.0f}")
    return "| " + " | ".join(map(str, cells)) + f" | {rate / (alone * ranks):.0%} |"


def main(argv: list[str]) -> int:
    """Print a line for each batch size, number of ranks and bandwidth."""
    made = argparse.ArgumentParser("python -m tests.bench.scale", description=__doc__)
    made.add_argument("--batch_size", type=int, nargs="+", default=[256, 2048])
    made.add_argument("--tflops", type=float, default=400.0, help="reached by one GPU")
    made.add_argument("--gb_per_s", type=float, nargs="+", default=[400.0, 25.0], help="per rank")
    options = made.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(Path(folder), ROWS)
        flops = token_flops(LAYERS, WIDTH, INNER, split.offsets) * split.offsets[-1] / ROWS
        alone = options.tflops * 1e12 / flops
        say("| batch | ranks | largest / mean | GB/s | reviews/s | of n times one |")
        say("|---:|---:|---:|---:|---:|---:|")
        for batch_size, ranks in itertools.product(options.batch_size, RANKS):
            balance = imbalance(split, batch_size, ranks, padded=False)
            for speed in options.gb_per_s:
                say(row(batch_size, ranks, speed, alone, balance))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What would 1 to 64 GPUs do? The model of tests/bench/SCALE.md, with inputs that can be changed.

    python -m tests.bench.scale --tflops 335 --fixed_ms 6.2 --hidden 0 --gb_per_s 400 25

A step takes as long as its most loaded rank computes, and as long as what of the gradients' all-reduce
does not fit behind the backward pass. Measured is one GPU's rate; the balance is simulated.
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
RANKS = (1, 2, 4, 8, 16, 32, 64)
ROWS = 100_000


def step_seconds(compute: float, transfer: float, hidden: float) -> float:
    """Return how long a step takes.

    Args:
        compute: seconds that the most loaded rank computes.
        transfer: seconds of the all-reduce.
        hidden: share of `compute` behind which gradients travel.
    """
    return compute + max(0.0, transfer - hidden * compute)


def row(
    options: argparse.Namespace, alone: float, batch_size: int, ranks: int, balance: float
) -> str:
    """Render one line; `alone` is the reviews/s of one rank that has no end of them."""
    cells = [batch_size, ranks, f"{balance:.3f}"]
    fixed = options.fixed_ms / 1e3
    one = batch_size / (fixed + batch_size / alone)
    for speed in options.gb_per_s:
        transfer = communication_bytes("replicas", PARAMETERS, ranks, micro_batches=1) / speed / 1e9
        compute = fixed + batch_size / ranks / alone * balance
        rate = batch_size / step_seconds(compute, transfer, options.hidden)
        cells += [f"{rate:,.0f}", f"{rate / (one * ranks):.0%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str]) -> int:
    """Print a line for each batch size, number of ranks and bandwidth."""
    made = argparse.ArgumentParser("python -m tests.bench.scale", description=__doc__)
    made.add_argument("--batch_size", type=int, nargs="+", default=[256, 2048])
    made.add_argument("--tflops", type=float, default=335.0, help="of one GPU, of whole layers")
    made.add_argument("--fixed_ms", type=float, default=6.2, help="of a step, however few reviews")
    made.add_argument("--hidden", type=float, default=0.0, help="share of a step; 0.67 if eager")
    made.add_argument("--gb_per_s", type=float, nargs="+", default=[400.0, 25.0], help="per rank")
    options = made.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(Path(folder), ROWS)
        flops = token_flops(LAYERS, WIDTH, INNER, split.offsets) * split.offsets[-1] / ROWS
        alone = options.tflops * 1e12 / flops
        speeds = "".join(
            f" reviews/s at {speed:g} GB/s | of n times one |" for speed in options.gb_per_s
        )
        say(f"| batch | ranks | largest / mean |{speeds}")
        say("|---:" * (3 + 2 * len(options.gb_per_s)) + "|")
        for batch_size, ranks in itertools.product(options.batch_size, RANKS):
            balance = imbalance(split, batch_size, ranks, padded=False)
            say(row(options, alone, batch_size, ranks, balance))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What does it cost to share a step between two gloo processes on this machine's cores?

    python -m tests.bench.processes --repeats 2 --batch_sizes 16 64 256 --rows 1536
    python -m tests.bench.processes --repeats 3 --batch_sizes 64 --launches cpu2 zero1 zero2 zero3

The same runs as in `tests.bench`, in turns. Ratios are of reviews/s in steps of the second epoch, over
one process with all threads. ZeRO's steps settle late: give it rows.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.__main__ import flags_of, prepare_encoder, shared_parser, write_reviews
from tests.bench.report import order, spread
from tests.programs import TRAIN, launcher, run_for_peak
from toolkit.console import say

LAUNCHES = ("cpu2", "zero1", "zero2", "zero2_offload", "zero3")
"""Files in launch/."""


def rate(launch: str, options: argparse.Namespace) -> float:
    """Train under a launch config; return reviews/s in the steps of the second of two epochs."""
    processes = 1 if launch == "cpu" else 2
    flags = [*flags_of(options), f"--cpu_threads={options.threads // processes}"]
    run_for_peak(*launcher(processes, launch), TRAIN, *flags)
    journal = options.folder / "runs" / "ours" / "metrics.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    first_epoch = options.rows // options.batch_size
    rates = [
        line["train/reviews_per_s"]
        for line in lines
        if line["kind"] == "train" and line["step"] > first_epoch
    ]
    return len(rates) / sum(1 / rate for rate in rates)


def main() -> None:
    """Measure and print JSON."""
    parser = shared_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--launches", nargs="+", default=["cpu2"], choices=LAUNCHES)
    parser.set_defaults(test_rows=16)
    options = parser.parse_args()
    if options.launches == ["cpu2"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # it would turn DeepSpeed off
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        prepare_encoder(options)
        write_reviews(options)
        for batch_size in options.batch_sizes:
            options.batch_size = batch_size
            names = ["cpu", *options.launches]
            turns = [
                {name: rate(name, options) for name in order(names, number)}
                for number in range(options.repeats)
            ]
            shown: dict[str, Any] = {"batch_size": batch_size}
            shown["cpu"] = spread([turn["cpu"] for turn in turns])
            for name in options.launches:
                shown[name] = spread([turn[name] / turn["cpu"] for turn in turns])
            say(json.dumps(shown))


if __name__ == "__main__":
    main()

"""Are two gloo processes on two cores as fast as one process with two threads?

    python -m tests.bench.processes --repeats 5 --batch_sizes 16 64

The same runs as in `tests.bench`, in turns. `ratio` is reviews/s in steps of two processes over those
of one.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from tests.bench.__main__ import flags_of, prepare_encoder, shared_parser
from tests.bench.overhead import spread
from tests.bench.reviews import write_hub_folder
from tests.programs import TRAIN, launcher, run_for_peak
from toolkit.config import RunConfig, cache_dir
from toolkit.console import say


def rate(processes: int, options: argparse.Namespace) -> float:
    """Train; return reviews/s in the steps after the first quarter."""
    flags = [*flags_of(options), f"--cpu_threads={options.threads // processes}"]
    run_for_peak(*launcher(processes), TRAIN, *flags)
    journal = options.folder / "runs" / "ours" / "metrics.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rates = [row["train/reviews_per_s"] for row in rows if row["kind"] == "train"]
    settled = rates[len(rates) // 4 :]
    return len(settled) / sum(1 / rate for rate in settled)


def main() -> None:
    """Measure and print JSON."""
    parser = shared_parser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        prepare_encoder(options)
        write_hub_folder(cache_dir(RunConfig()), options.folder / "hub", options.rows + 2, 16)
        for batch_size in options.batch_sizes:
            options.batch_size = batch_size
            turns = [(rate(1, options), rate(2, options)) for _ in range(options.repeats)]
            shown = {
                "batch_size": batch_size,
                "one": spread([one for one, _ in turns]),
                "two": spread([two for _, two in turns]),
                "ratio": spread([two / one for one, two in turns]),
            }
            say(json.dumps(shown))


if __name__ == "__main__":
    main()

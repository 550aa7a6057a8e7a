"""All that the goals ask of one GPU, in one command; what is asked for most comes first.

    python -m tests.bench.gpu                  all; it has not run whole on a GPU
    python -m tests.bench.gpu steps scores     some of it

steps    of 1,024, 256 and 32 reviews, and the Trainer's of 32 (no data set, no hub)
scores   passes over rows to be scored, and the Trainer's
tests    of the CUDA path
plan     what `toolkit plan` foresees, against runs
peers    whole runs, of 32 beside every peer (bench-gpu-32.json) and of 1,024 (bench-gpu-1024.json)

The model has BERT-base's shape and random weights, so no hub is needed. Compiling takes a minute for each
contender that does, `plan` about two minutes for a size (an H100).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.bench import __main__ as bench
from tests.bench import plan as bench_plan
from tests.bench.encoder import write_whole_encoder
from tests.programs import ROOT
from toolkit.config import RunConfig, cache_dir
from toolkit.console import say

AMAZON_POLARITY = 3_600_000
STEPS = (
    ("ours_compiled", "1024", "256"),
    ("ours_compiled", "32"),
    ("trainer_best", "32"),
    ("ours", "256", "32"),
    ("trainer_compiled", "32"),
)
"""What is most likely to fail, a peer's compilation, comes last."""
SCORES = (
    ("ours_compiled",),
    ("trainer_best", "--eval_batch", "128", "256", "512"),
    ("trainer_best_in_bf16", "--eval_batch", "256"),
    ("trainer_compiled", "--eval_batch", "256"),
    ("ours",),
)
TESTS = ["--test_rows=51200", "--eval_batch=256"]
"""So many that a start of workers is a small part; and the Trainer's fastest batch of three."""
FEW = ["--batch_size=32", "--rows=12800", *TESTS, "--out=bench-gpu-32.json"]
MANY = ["--batch_size=1024", "--rows=131072", *TESTS, "--out=bench-gpu-1024.json", "--repeats=3"]


def steps() -> None:
    """Time steps, each contender in a process of its own."""
    for contender in STEPS:
        _run("tests.bench.steps", *contender)


def scores() -> None:
    """Time passes over rows to be scored."""
    for contender in SCORES:
        _run("tests.bench.scoring", *contender)


def tests() -> None:
    """Test the CUDA path, kernels included."""
    _run("pytest", "tests/test_cuda.py", "tests/test_kernels.py")


def plan() -> None:
    """Hold `toolkit plan` against runs."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = write_whole_encoder(Path(folder) / "encoder", cache_dir(RunConfig()))
        bench_plan.main([32, 256], [f"--encoder={encoder}"])


def peers() -> None:
    """Run whole trainings beside the peers, and of many reviews a step."""
    bench.main([f"--encoder={bench.SHAPE_ONLY}", *FEW])
    bench.main([f"--encoder={bench.SHAPE_ONLY}", *MANY, "--only", "ours_compiled"])
    figures = json.loads(Path("bench-gpu-1024.json").read_text())["contenders"]["ours_compiled"]
    rate = figures["reviews_per_s"]["median"]
    say(f"\n{rate:,.0f} reviews/s: {AMAZON_POLARITY / rate / 60:.1f} minutes for an epoch of 3.6 M")


PARTS: dict[str, Callable[[], None]] = {
    "steps": steps,
    "scores": scores,
    "tests": tests,
    "plan": plan,
    "peers": peers,
}


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def _succeeds(part: Callable[[], None]) -> bool:
    try:
        part()
    except Exception as error:  # whatever it is: device time is dear, and other parts do without it
        say(getattr(error, "stderr", None) or f"{type(error).__name__}: {error}")
        return False
    return True


def main(arguments: list[str] | None = None) -> None:
    """Run the parts one after the other, also if one fails; then the exit code is 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; else all")
    wanted = parser.parse_args(arguments).parts or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"got {', '.join(unknown)}, allowed are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; on a CPU type: python -m tests.bench")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    failed = [name for name in wanted if not _succeeds(PARTS[name])]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""All that the goals ask of one GPU, in one command: right first, then fast.

    python -m tests.bench.gpu        alone; not yet run on a GPU, so nobody knows how long it takes

Tests of the CUDA path; a batch of 32 beside every peer (bench-gpu-32.json); a batch of 1,024, whose
reviews/s say how long an epoch of 3.6 M takes (bench-gpu-1024.json); what `toolkit plan` foresees of
MiniLM. The first two are of BERT-base's shape with random weights, so no hub is needed.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.bench import __main__ as bench
from tests.bench import plan
from tests.programs import ROOT
from toolkit.console import say

AMAZON_POLARITY = 3_600_000
FEW = ["--batch_size=32", "--rows=12800", "--out=bench-gpu-32.json"]
MANY = ["--batch_size=1024", "--rows=131072", "--out=bench-gpu-1024.json", "--repeats=3"]


def main() -> None:
    """Run them one after the other; stop at the first that fails."""
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; on a CPU type: python -m tests.bench --rows 192")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    subprocess.run([sys.executable, "-m", "pytest", "tests/test_cuda.py"], cwd=ROOT, check=True)
    bench.main([f"--encoder={bench.SHAPE_ONLY}", *FEW])
    bench.main([f"--encoder={bench.SHAPE_ONLY}", *MANY, "--only", "ours_compiled"])
    figures = json.loads(Path("bench-gpu-1024.json").read_text())["contenders"]["ours_compiled"]
    rate = figures["reviews_per_s"]["median"]
    say(f"\n{rate:,.0f} reviews/s: {AMAZON_POLARITY / rate / 60:.1f} minutes for an epoch of 3.6 M")
    plan.main([32, 256])


if __name__ == "__main__":
    main()

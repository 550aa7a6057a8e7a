"""Does `toolkit plan` foresee what a run takes? Predicted over measured, for memory and for a step.

    python -m tests.bench.plan [BATCH_SIZE ...]       nine minutes each; alone, for it takes times

Each run is done before the plan is made and again after it, and the plan is held against both: where the
two ratios differ, the machine does; or a compiler, which needs more memory than the run that has it
compile DeepSpeed's communication, when that first starts on a machine.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.programs import ROOT, TRAIN, launcher, run_for_peak, run_python
from toolkit.config import parse
from toolkit.console import say
from toolkit.plan import CUDA_BYTES, GIB
from toolkit.prepare import prepare_data

ON_GPU = torch.cuda.is_available()
LAUNCHES = ("gpu",) if ON_GPU else ("cpu", "cpu2", "zero1", "zero2", "zero2_offload", "zero3")
ROW = r"^(\w+)\.yaml +\d+ +([\d.]+) +\w+ +([\d.]+) ms"


def planned(flags: list[str]) -> dict[str, tuple[float, float]]:
    """Return bytes of a rank and seconds of a step for each launch file."""
    alone = ["--num_processes=1"] if ON_GPU else []
    command = "-m", "toolkit", "plan", *flags, *alone
    done = run_python(*command, seconds=1800, PYTHONPATH=str(ROOT))
    done.check_returncode()
    found = re.findall(ROW, done.stdout, re.MULTILINE)
    context = CUDA_BYTES if ON_GPU else 0  # torch, which says what a run took, does not count it
    return {name: (float(gib) * GIB - context, float(step) / 1e3) for name, gib, step in found}


def taken(launch: str, batch_size: int, flags: list[str]) -> tuple[float, float]:
    """Train; return the same of the run: peak of the largest process or GPU, mean after warming up."""
    with tempfile.TemporaryDirectory() as folder:
        place = [f"--output_dir={folder}", "--run_id=run", "--track=none", "--log_every=10"]
        processes = 1 if launch in ("cpu", "gpu") else 2
        peak, _ = run_for_peak(*launcher(processes, launch), TRAIN, *flags, *place)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        if ON_GPU:
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            peak = summary["peak_memory_mib"] * 2**20
    rates = [json.loads(line).get("train/reviews_per_s") for line in lines]
    seconds = [batch_size / rate for rate in rates if rate][1:]
    return peak, sum(seconds) / len(seconds)


def main(batch_sizes: list[int], more: Sequence[str] = ()) -> None:
    """Print the ratios; `more` are flags of all runs."""
    prepare_data(parse([*more]))  # else the first run does, and its memory is not the training's
    say("batch  launch         memory        step    (predicted / measured, first and second run)")
    for batch_size in batch_sizes:
        flags = [f"--batch_size={batch_size}", "--max_steps=40", *more]
        first = {name: taken(name, batch_size, flags) for name in LAUNCHES}
        plan = planned(flags)
        for name in LAUNCHES:
            pairs = zip(first[name], taken(name, batch_size, flags), strict=True)
            memory, step = (
                "  ".join(f"{foreseen / real:.2f}" for real in both)
                for foreseen, both in zip(plan[name], pairs, strict=True)
            )
            say(f"{batch_size:>5}  {name:<13}  {memory}  {step}")


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [16, 64, 256])

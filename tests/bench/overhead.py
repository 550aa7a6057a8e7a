"""What do logging, W&B and checkpoints cost a run, also when W&B's server misbehaves?

    python -m tests.bench.overhead --repeats 5

Runs of MiniLM on `snippets` take turns: without W&B, with a server on loopback that answers, is slow,
fails or hangs. `outside` is the share of the time between the first and the last log line that is
not spent in steps; `beside` is what W&B's own processes take of all cores in that time, in clock ticks
of 10 ms; `rate` is reviews/s in steps, over that of the run without W&B of the same turn. It holds W&B's
threads in the training process, too, and is as noisy as the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.bench.report import order, spread
from tests.programs import TRAIN
from tests.wandb_server import serving
from toolkit.console import say
from toolkit.machine import usable_cores

SHARES = ("outside", "beside")
CASES = ("none", "answers", "slow", "fail", "hang")
BATCH, STEPS, SETTLED = 16, 130, 20
"""From the second log line on: W&B's client takes 50 ms for its first row, once a run."""
SAVE_SECONDS = 300
LOOK_SECONDS = 1.0

Used = list[tuple[float, float]]
"""When we looked, and the CPU seconds of W&B's processes until then."""


def measure(case: str, folder: Path, *extra: str) -> dict[str, float]:
    """Train once; return the shares of time outside and beside steps, and the rate in them."""
    flags = [f"--output_dir={folder}", f"--run_id={case}", f"--max_steps={STEPS}", "--overwrite"]
    flags += [f"--track={'none' if case in ('none', 'save') else 'wandb'}", f"--batch_size={BATCH}"]
    with serving() as (server, url):
        server.misbehaviour = None if case in ("none", "answers", "save") else case
        wandb = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "x" * 40}
        command = [sys.executable, TRAIN, *flags, *extra]
        environment = os.environ | wandb | {"ACCELERATE_USE_CPU": "true"}
        with (folder / "log").open("w+") as log:
            used = watch(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if not used:
                raise RuntimeError((folder / "log").read_text())
    return figures(folder / case / "metrics.jsonl", used)


def watch(program: subprocess.Popen[bytes]) -> Used:
    """Note what the processes that a program starts use, until it ends; [] if it fails."""
    used: Used = []
    of_each: dict[int, float] = {}  # of those that have ended, too
    with program:
        try:
            while program.poll() is None:
                for child in psutil.Process(program.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        of_each[child.pid] = sum(child.cpu_times()[:2])  # user, system
                used.append((time.time(), sum(of_each.values())))
                time.sleep(LOOK_SECONDS)
        finally:
            program.kill()
    return used if program.returncode == 0 else []


def figures(journal: Path, used: Used) -> dict[str, float]:
    """Compute them from a run's journal, from step SETTLED on."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train" and row["step"] >= SETTLED]
    started, ended = rows[0]["time"], rows[-1]["time"]
    gone = ended - started
    reviews = BATCH * (rows[-1]["step"] - rows[0]["step"])
    every = BATCH * (rows[1]["step"] - rows[0]["step"])
    in_steps = sum(every / row["train/reviews_per_s"] for row in rows[1:])
    looks = [look for look in used if started <= look[0] <= ended]
    passed, theirs = (last - first for first, last in zip(looks[0], looks[-1], strict=True))
    return {
        "outside": 1 - in_steps / gone,
        "beside": theirs / passed / len(usable_cores()),
        "rate": reviews / in_steps,
        "seconds": gone - in_steps,
    }


def checkpoint_seconds(folder: Path) -> float:
    """Return what one checkpoint takes, from a run that writes one after every step."""
    found = measure("save", folder, "--save_minutes=0", "--log_every=1")
    return found["seconds"] / (STEPS - SETTLED)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    turns: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        measure("none", Path(scratch))  # warm caches
        for turn in range(repeats):
            turns.append({case: measure(case, Path(scratch)) for case in order([*CASES], turn)})
            say(json.dumps(turns[-1]))
        one_save = checkpoint_seconds(Path(scratch))
    shown: dict[str, Any] = {"checkpoint_seconds": one_save, "share": one_save / SAVE_SECONDS}
    for case in CASES:
        shares = {name: spread([turn[case][name] for turn in turns]) for name in SHARES}
        rates = [turn[case]["rate"] / turn["none"]["rate"] for turn in turns]
        shown[case] = shares | {"rate": spread(rates)}
    say(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()

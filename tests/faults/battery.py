"""The long battery: kill runs in every phase and at random, damage every checkpoint, count.

    python -m tests.faults.battery --kills 60 --out figures.json

Half an hour on two cores. `tests/bench/FIGURES.md` quotes its figures.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.harness import Subject
from tests.faults.mutations import mutations
from tests.tiny import make_data, make_encoder
from toolkit.console import say
from toolkit.engine import phases
from toolkit.record.checkpoints import DamagedError, verify

PHASES = [phase for phase in phases.PHASES if phase not in ("start", "finish")]
MAIN_ONLY = ("log", "before_rename", "after_rename", "prune")
"""The main process alone passes through these, or alone leaves something there."""
LAUNCHES = [
    ("cpu", 1),
    ("cpu2", 2),
    ("cpu2", 3),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero2_offload", 2),
]
HEADS = ("v1", "v2", "v3")
EVALUATED_STEP = 27
"""27 steps of 16 reviews are 4 epochs of 108."""


class Battery:
    """Where runs of the battery live, and how they are made."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.dice = random.Random(seed)
        self.launches = [
            (config, processes, HEADS[(seed + number) % len(HEADS)])
            for number, (config, processes) in enumerate(LAUNCHES)
        ]
        (folder / "encoder").mkdir()
        (folder / "data").mkdir()
        self.flags = [
            f"--encoder={make_encoder(folder / 'encoder')}",
            f"--dataset={make_data(folder / 'data')}",
            f"--cache_dir={folder / 'cache'}",
            *("--track=none", "--max_length=32", "--batch_size=16", "--lr=0.003", "--log_every=1"),
            *("--cpu_threads=1", "--dropout=0.2"),
        ]
        self.count = 0

    def subject(self, launch: tuple[str, int, str], *extra: str) -> Subject:
        """Make a run in a folder of its own."""
        config, processes, head = launch
        self.count += 1
        flags = [*self.flags, f"--head={head}", *extra]
        return Subject(self.folder / f"runs-{self.count}", flags, config, processes)

    def kill_in_each_phase(self, launch: tuple[str, int, str]) -> dict[str, Any]:
        """Start a run ten times, killed in another phase each time, then let it end."""
        extra = ("--epochs=8", "--save_minutes=0")
        reference, subject = self.subject(launch, *extra), self.subject(launch, *extra)
        assert reference.run() == 0, reference.said()
        kills = 0
        for number, phase in enumerate(PHASES):
            step = EVALUATED_STEP if phase == "evaluate" else 3 + 5 * number
            rank = 0 if phase in MAIN_ONLY else self.dice.randrange(launch[1])
            kills += subject.run(f"kill@{phase}:{rank}:{step}") != 0
            assert step - 1 <= subject.newest_step() <= step, subject.said()
        assert kills == len(PHASES), subject.said()
        return self.finish(subject, reference, kills, launch)

    def kill_at_random(self, launch: tuple[str, int, str], kills: int) -> dict[str, Any]:
        """Kill one rank, all ranks, the launcher or everything, at random times."""
        epochs = 60 if launch[0] == "zero3" else 200  # its steps take longer
        extra = (f"--epochs={epochs}", "--save_minutes=0.01", "--eval_every=50")
        reference, subject = self.subject(launch, *extra), self.subject(launch, *extra)
        assert reference.run() == 0, reference.said()
        done, lost = 0, []
        while done < kills:
            process = self.start_moving(subject)
            time.sleep(self.dice.uniform(0, 1.5))
            if process.poll() is not None:
                break
            self.hurt(subject, process.pid)
            subject.end(process, 60)
            subject.wait_until_gone(40)
            done += 1
            lost.append(max(subject.steps() or [0]) - subject.newest_step())
        return self.finish(subject, reference, done, launch) | {"steps_lost": lost}

    def start_moving(self, subject: Subject) -> "subprocess.Popen[bytes]":
        """Start a run and wait until all its ranks live and its journal grows, or it has ended."""
        before = subject.journal_time()
        process = subject.start()

        def moves() -> bool:
            return subject.journal_time() != before and len(subject.workers()) == subject.processes

        subject.wait_for(lambda: process.poll() is not None or moves())
        return process

    def hurt(self, subject: Subject, launcher: int) -> None:
        """Send SIGKILL to a random choice of processes."""
        workers = [worker.pid for worker in subject.workers()]
        whom = self.dice.choice(("rank", "ranks", "launcher", "everything"))
        victims = {
            "rank": workers and [self.dice.choice(workers)],
            "ranks": workers,
            "launcher": [launcher],
            "everything": [launcher, *workers],
        }[whom] or [launcher]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def finish(
        self, subject: Subject, reference: Subject, kills: int, launch: tuple[str, int, str]
    ) -> dict[str, Any]:
        """Let the run end and compare."""
        code = subject.run()
        equal = code == 0 and subject.result() == reference.result()
        result = {
            "launch": f"{launch[0]} x {launch[1]}, head {launch[2]}",
            "kills": kills,
            "bit_equal": equal,
            "processes_left": len(subject.workers()),
        }
        say(json.dumps(result))
        if equal:
            shutil.rmtree(subject.runs)
            shutil.rmtree(reference.runs)
        return result

    def damage(self, flips: int) -> dict[str, Any]:
        """Damage a real checkpoint in every way; count what verifies nevertheless."""
        subject = self.subject(("cpu", 1, "v2"), "--max_steps=6", "--save_minutes=0")
        assert subject.run() == 0, subject.said()
        other, good = sorted((subject.folder / "checkpoints").glob("step-*"))[-2:]
        missed = Counter()
        total = 0
        for kind, mutate in mutations(good, other, flips):
            copy = self.folder / "copy" / good.name
            shutil.copytree(good, copy)
            mutate(copy)
            try:
                verify(copy)
                missed[kind] += 1
            except DamagedError:
                pass
            shutil.rmtree(copy)
            total += 1
        return {"mutations": total, "undetected": dict(missed)}


def damage_plain_accelerate(folder: Path, flips: int) -> dict[str, Any]:
    """Put `accelerator.save_state/load_state` through the same: what does it load without a word?"""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 2))
    model, optimizer = accelerator.prepare(layers, torch.optim.AdamW(layers.parameters()))
    places = []
    for step in range(2):
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
        places.append(folder / "plain" / f"step-{step}")
        accelerator.save_state(places[-1])
    other, good = places
    outcomes: Counter[str] = Counter()
    for _kind, mutate in mutations(good, other, flips):
        copy = folder / "plain-copy"
        shutil.copytree(good, copy)
        mutate(copy)
        try:
            accelerator.load_state(copy)
            outcomes["loaded without an error"] += 1
        except Exception:  # whatever the libraries raise: it was noticed
            outcomes["noticed"] += 1
        shutil.rmtree(copy)
    return {"mutations": sum(outcomes.values())} | dict(outcomes)


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="kills at random times")
    parser.add_argument("--seed", type=int, default=0, help="other times, ranks and heads")
    parser.add_argument("--only", nargs="*", help="launch configs, such as zero3")
    parser.add_argument("--flips", type=int, default=200, help="flipped bits in each file")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        battery = Battery(Path(place), options.seed)
        figures: dict[str, Any] = {
            "damage": battery.damage(options.flips),
            "damage_plain_accelerate": damage_plain_accelerate(Path(place), options.flips),
        }
        say(json.dumps(figures))
        launches = [x for x in battery.launches if not options.only or x[0] in options.only]
        figures["phases"] = [battery.kill_in_each_phase(launch) for launch in launches]
        share = -(-options.kills // len(launches))
        figures["random"] = [battery.kill_at_random(launch, share) for launch in launches]
    runs = figures["phases"] + figures["random"]
    figures["total"] = {
        "kills": sum(run["kills"] for run in runs),
        "runs": len(runs),
        "bit_equal": sum(run["bit_equal"] for run in runs),
        "processes_left": sum(run["processes_left"] for run in runs),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    text = json.dumps(figures, indent=2)
    say(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

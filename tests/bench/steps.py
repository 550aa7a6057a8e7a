"""How long is one step? One process, no launcher, no data set: a model, and random tokens.

    python -m tests.bench.steps ours_compiled 1024                        one line of JSON, on a GPU two
    python -m tests.bench.steps ours 16 --encoder FOLDER                  not of BERT-base's shape

Rows have the lengths of Amazon Polarity. Of ours those steps count whose sizes were met twice before (a
size is run, then captured, then replayed), and `step_ms` is their median; a peer's is the mean of its
second epoch.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from torch.autograd import DeviceType

from tests.bench.data import make_split
from tests.bench.encoder import write_encoder
from tests.bench.peers import PEERS
from toolkit.config import RunConfig
from toolkit.console import say
from toolkit.data.batches import Batch
from toolkit.data.cache import TokenCache, TokenSplit
from toolkit.engine.loop import Progress, Trainer, Wants, micro_batches, train_step
from toolkit.engine.memory import peak_bytes
from toolkit.engine.runtime import Runtime
from toolkit.model.classifier import ClassifierSpec, build_classifier
from toolkit.run import make_trainer

OURS = ("ours", "ours_compiled")
CONTENDERS = (*OURS, *PEERS)
MET = 2
"""How often a size is met before its steps count."""
PROFILED = 5
TEST_ROWS = 64


@dataclass(frozen=True)
class Times:
    """What steps took."""

    seconds: list[float]
    """Of each that counts."""
    tokens: list[int]
    """The same, filling included."""
    left_out: int
    """Steps with a size that was new."""


def build(name: str, batch_size: int, encoder: Path, split: TokenSplit) -> Trainer:
    """Join a model and rows as `toolkit train --head v1` does."""
    config = replace(RunConfig(), head="v1", batch_size=batch_size, compile=name == "ours_compiled")
    runtime = Runtime(config.precision, config.cpu_threads)
    model, _ = build_classifier(ClassifierSpec(head="v1"), encoder, ("neg", "pos"))
    trainer = make_trainer(config, TokenCache(Path(), {}, {"train": split}), runtime, model)
    trainer.model.train()
    return trainer


def sizes(batches: list[Batch]) -> list[tuple[int, int]]:
    """Return what kernels are made for and graphs captured for: tokens and sequences."""
    return [
        (batch.computed_tokens, 0 if batch.bounds is None else len(batch.bounds))
        for batch in batches
    ]


def without_more(trainer: Trainer, steps: int) -> Trainer:
    """End after these steps, or a GPU would begin another one behind them."""
    return replace(trainer, stream=replace(trainer.stream, max_steps=steps))


def time_steps(trainer: Trainer, steps: int) -> Times:
    """Take steps from the first one on."""
    trainer = without_more(trainer, steps)
    progress, met = Progress(), Counter[tuple[int, int]]()
    dealt = [sizes(micro_batches(trainer, step)) for step in range(steps)]
    seconds, tokens, report = [], [], None
    for now, following in pairwise([*dealt, []]):
        counts = all(met[size] >= MET for size in (*now, *following))  # a GPU begins the next, too
        met.update(now)
        started = time.perf_counter()
        report = train_step(trainer, progress, Wants(), report)
        if counts:
            seconds.append(time.perf_counter() - started)
            tokens.append(sum(size for size, _ in now))
    return Times(seconds, tokens, steps - len(seconds))


def busy_seconds(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Return for how long of a step the GPU computes, under the profiler, and the step's tokens."""
    kinds = torch.profiler.ProfilerActivity
    trainer = without_more(trainer, steps)
    progress, report = Progress(), None
    with torch.profiler.profile(activities=[kinds.CUDA]) as profile:
        for _ in range(steps):
            report = train_step(trainer, progress, Wants(), report)
    on_gpu = (event for event in profile.events() if event.device_type == DeviceType.CUDA)
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    return busy / steps, progress.recent.computed_tokens / steps


def measure_ours(name: str, batch_size: int, steps: int, encoder: Path, split: TokenSplit) -> None:
    """Print the figures of our steps."""
    trainer = build(name, batch_size, encoder, split)
    times = time_steps(trainer, steps)
    if not times.seconds:
        raise SystemExit(f"no size was met {MET} times before in {steps} steps: take more --steps")
    median = statistics.median(times.seconds)
    spread = {"lowest_ms": min(times.seconds) * 1e3, "highest_ms": max(times.seconds) * 1e3}
    spread["mean_ms"] = statistics.mean(times.seconds) * 1e3
    counted = {"steps": len(times.seconds), "left_out": times.left_out}
    counted["tokens"] = round(statistics.median(times.tokens))
    memory = peak_bytes(trainer.runtime.device) / 2**20
    _show(name, batch_size, median, **spread, **counted, peak_MiB=memory)
    if torch.cuda.is_available():
        busy, tokens = busy_seconds(trainer, PROFILED)
        say(json.dumps({"busy_ms": round(busy * 1e3, 3), "tokens": round(tokens)}))


def measure_peer(name: str, batch_size: int, steps: int, encoder: Path, split: TokenSplit) -> None:
    """Print a peer's figures."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as ours has
    arrays = split.offsets[: TEST_ROWS + 1], split.labels[:TEST_ROWS], split.row_ids[:TEST_ROWS]
    test = TokenSplit(split.tokens, *arrays)
    settings = {"batch_size": batch_size, "eval_batch": TEST_ROWS, "max_length": split.longest}
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(folder=Path(folder), lr=5e-5, seed=0, **settings)
        found = PEERS[name](encoder, split, test, options)
    _show(name, batch_size, found["seconds"] / steps, steps=steps, padding=found["padding"])


def _show(name: str, batch_size: int, seconds: float, **more: float) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rates = {"step_ms": seconds * 1e3, "reviews_per_s": batch_size / seconds}
    figures = {key: round(value, 3) for key, value in (rates | more).items()}
    say(
        json.dumps(
            {"contender": name, "batch_size": batch_size} | figures | {"device": device} | versions
        )
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure one contender at one batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--encoder", type=Path, help="folder of a BERT; else BERT-base's shape")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        encoder = options.encoder or write_encoder(Path(folder) / "encoder")
        split = make_split(Path(folder), options.batch_size * options.steps)
        measure = measure_ours if options.name in OURS else measure_peer
        measure(options.name, options.batch_size, options.steps, encoder, split)


if __name__ == "__main__":
    main()

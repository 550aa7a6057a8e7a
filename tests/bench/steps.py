"""How long is one step? One process, no launcher, no data set: a model, and random tokens.

    python -m tests.bench.steps ours_compiled 1024 256       a line of JSON for each size, on a GPU two
    python -m tests.bench.steps ours 16 --encoder FOLDER     not of BERT-base's shape

Rows have the lengths of Amazon Polarity. Of ours those steps count whose sizes were met twice before (a
size is run, then captured, then replayed), and `step_ms` is their median; a peer's is the mean of its
second epoch. Ours is compiled once for all batch sizes.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, supported_activities

from tests.bench.data import make_split
from tests.bench.encoder import write_encoder
from tests.bench.peers import PEERS
from toolkit.build import make_trainer
from toolkit.config import RunConfig
from toolkit.console import say
from toolkit.data.cache import TokenCache, TokenSplit
from toolkit.engine.memory import forget_peak, peak_bytes
from toolkit.engine.runtime import Runtime
from toolkit.engine.step import Wants, train_step
from toolkit.engine.timing import MET, settled, sizes_of, time_steps
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import Trainer
from toolkit.machine import usable_cores
from toolkit.model.classifier import ClassifierSpec, build_classifier

OURS = ("ours", "ours_compiled")
CONTENDERS = (*OURS, *PEERS)
PROFILED = 5
LONGEST = 8
"""Kernels that are named."""
TEST_ROWS = 64


def build(name: str, batch_size: int, encoder: Path, split: TokenSplit) -> Trainer:
    """Join a model and rows as `toolkit train --head v1` does."""
    config = replace(RunConfig(), head="v1", batch_size=batch_size, compile=name == "ours_compiled")
    runtime = Runtime(config.precision, config.cpu_threads)
    model, _ = build_classifier(ClassifierSpec(head="v1"), encoder, ("neg", "pos"))
    trainer = make_trainer(config, TokenCache(Path(), {}, {"train": split}), runtime, model)
    trainer.model.train()
    return trainer


def without_more(trainer: Trainer, steps: int) -> Trainer:
    """End after these steps, or a GPU would begin another one behind them."""
    return replace(trainer, stream=replace(trainer.stream, max_steps=steps))


def profiled(trainer: Trainer, activities: list[Any]) -> tuple[Any, Progress]:
    """Take a few steps under the profiler."""
    trainer = without_more(trainer, PROFILED)
    progress, report = Progress(), None
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            report = train_step(trainer, progress, Wants(), report)
    return profile, progress


def kernel_times(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Return ms of a step on the GPU by kernel, the longest first; and the step's tokens."""
    profile, progress = profiled(trainer, [ProfilerActivity.CUDA])
    found: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name] += event.self_device_time_total / 1e3 / PROFILED
    longest_first = dict(sorted(found.items(), key=lambda item: -item[1]))
    return longest_first, progress.recent.computed_tokens / PROFILED


def measure_ours(
    name: str,
    batch_sizes: list[int],
    steps: int,
    encoder: Path,
    split: TokenSplit,
    trace: Path | None = None,
) -> None:
    """Print the figures of our steps; write a trace of the last size, if asked."""
    trainer = build(name, batch_sizes[0], encoder, split)
    for batch_size in batch_sizes:
        trainer = replace(trainer, stream=replace(trainer.stream, batch_size=batch_size))
        measure_size(name, trainer, steps)
    if trace:
        profile, _ = profiled(trainer, list(supported_activities()))
        profile.export_chrome_trace(str(trace))


def measure_size(name: str, trainer: Trainer, steps: int) -> None:
    """Print the figures of steps of one batch size."""
    batch_size, device = trainer.stream.batch_size, trainer.runtime.device
    forget_peak(device)
    trainer = without_more(trainer, steps)
    times = time_steps(trainer, settled(sizes_of(trainer, steps)))
    if not times.seconds:
        raise SystemExit(f"no size was met {MET} times before in {steps} steps: take more --steps")
    median = statistics.median(times.seconds)
    spread = {"lowest_ms": min(times.seconds) * 1e3, "highest_ms": max(times.seconds) * 1e3}
    spread["mean_ms"] = statistics.mean(times.seconds) * 1e3
    counted = {"steps": len(times.seconds), "left_out": steps - len(times.seconds)}
    counted["tokens"] = round(statistics.median(times.tokens))
    _show(name, batch_size, median, **spread, **counted, peak_MiB=round(peak_bytes(device) / 2**20))
    if torch.cuda.is_available():
        kernels, tokens = kernel_times(trainer)
        longest = [(round(ms, 3), kernel[:100]) for kernel, ms in [*kernels.items()][:LONGEST]]
        busy = {"busy_ms": round(sum(kernels.values()), 3), "tokens": round(tokens)}
        say(json.dumps(busy | {"longest_ms": longest}))


def measure_peer(
    name: str, batch_sizes: list[int], steps: int, encoder: Path, split: TokenSplit
) -> None:
    """Print a peer's figures."""
    torch.set_num_threads(len(usable_cores()))  # as ours has
    test = first_rows(split, TEST_ROWS)
    for batch_size in batch_sizes:
        train = first_rows(split, batch_size * steps)
        settings = {"batch_size": batch_size, "eval_batch": TEST_ROWS, "max_length": split.longest}
        with tempfile.TemporaryDirectory() as folder:
            options = argparse.Namespace(folder=Path(folder), lr=5e-5, seed=0, **settings)
            found = PEERS[name](encoder, train, test, options)
        _show(name, batch_size, found["seconds"] / steps, steps=steps, padding=found["padding"])


def first_rows(split: TokenSplit, count: int) -> TokenSplit:
    """Return the beginning of a split."""
    cuts = split.offsets[: count + 1]
    return TokenSplit(split.tokens, cuts, split.labels[:count], split.row_ids[:count])


def _show(name: str, batch_size: int, seconds: float, **more: float) -> None:
    rates = {"step_ms": seconds * 1e3, "reviews_per_s": batch_size / seconds}
    figures = {key: round(value, 3) for key, value in (rates | more).items()}
    say(json.dumps({"contender": name, "batch_size": batch_size} | figures | machine()))


def machine() -> dict[str, str]:
    """Return what figures are of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure one contender at some batch sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("batch_sizes", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--encoder", type=Path, help="folder of a BERT; else BERT-base's shape")
    parser.add_argument("--trace", type=Path, help="of ours, steps of the last size: .json.gz")
    options = parser.parse_args(arguments)
    if options.trace and options.name not in OURS:
        parser.error(f"--trace is of ours; got {options.name}, allowed are {', '.join(OURS)}")
    with tempfile.TemporaryDirectory() as folder:
        encoder = options.encoder or write_encoder(Path(folder) / "encoder")
        split = make_split(Path(folder), max(options.batch_sizes) * options.steps)
        given = options.name, options.batch_sizes, options.steps, encoder, split
        if options.name in OURS:
            measure_ours(*given, options.trace)
        else:
            measure_peer(*given)


if __name__ == "__main__":
    main()

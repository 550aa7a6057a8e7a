"""Run under `accelerate launch` by test_distributed.py: train in many ways, save what came out.

    train_few_steps.py OUT_FOLDER EXPECTED_WORLD_SIZE FLAG...

One process start serves all cases, because starting costs more than they do.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from toolkit.config import RunConfig, parse, part
from toolkit.data.steps import Stream
from toolkit.engine.evaluate import evaluate
from toolkit.engine.loop import Hooks, train
from toolkit.engine.optim import OptimSpec, build_optimizer
from toolkit.engine.replicas import unwrap
from toolkit.engine.runtime import Runtime
from toolkit.engine.step import Wants, train_step
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import LoopSpec, Trainer, micro_batches, stand_in_loss
from toolkit.errors import DivergedError
from toolkit.model.classifier import ClassifierSpec, build_classifier
from toolkit.prepare import prepare_data

STEPS = 5
CASES = {
    "accum1": [],
    "accum4": ["--grad_accum=4"],
    "accum7": ["--grad_accum=7"],
    "max_tokens": ["--max_tokens=64"],
    "padded": ["--batching=padded"],
    "padded_accum3": ["--batching=padded", "--grad_accum=3"],
    "tiny_batch": ["--batch_size=2", "--grad_accum=3"],
    "begun_ahead": [],
}
EVALUATION_SIZES = (0, 1, 2, 3, 4, 23, 41)


def build(config: RunConfig, runtime: Runtime) -> Trainer:
    """Make a trainer as `toolkit.run` does; the other ranks begin with the main process's weights."""
    tokens, encoder = prepare_data(config)
    model, _ = build_classifier(part(ClassifierSpec, config), encoder, tokens.label_names)
    for parameter in model.parameters():
        parameter.data += runtime.rank
    optim = part(OptimSpec, config)
    runtime.precision = config.precision
    prepared, optimizer = runtime.prepare(
        model, build_optimizer(model, optim), max_norm=config.max_grad_norm
    )
    split = tokens.splits["train"]
    stream = part(Stream, config, num_rows=len(split))
    padded = config.batching == "padded"
    trainer = Trainer(
        runtime, prepared, optimizer, split, stream, padded, part(LoopSpec, config), optim
    )
    runtime.warm_up(lambda model: stand_in_loss(trainer, model))
    return trainer


def hooks(on_log: Callable[[int, dict], None] = lambda *_: None) -> Hooks:
    """Make hooks that do nothing but log."""
    nothing = lambda _: None  # noqa: E731
    return Hooks(Wants, nothing, on_log, nothing, nothing)


def first_gradient(trainer: Trainer) -> dict[str, np.ndarray]:
    """Take one step that applies nothing, and return the gradient that it would have applied."""
    caught: dict[str, np.ndarray] = {}

    def catch(*_: object) -> None:
        model, scale = unwrap(trainer.model), optimizer.grad_scale
        caught.update({name: (p.grad / scale).numpy() for name, p in model.named_parameters()})

    optimizer: Any = trainer.runtime.strategy.optimizer
    step, optimizer.step = optimizer.step, catch
    trainer.model.train()
    train_step(trainer, Progress(step=1), Wants())
    optimizer.step = step
    return caught


def run_case(config: RunConfig, runtime: Runtime, ahead: bool) -> dict[str, np.ndarray]:
    """Train STEPS steps; return gradient, weights, this rank's rows, rates and losses.

    Args:
        config: what to train.
        runtime: where.
        ahead: steps are begun ahead, as on GPUs, and the last rank runs out of memory in two.
    """
    trainer = build(config, runtime)
    result = {f"gradient/{name}": value for name, value in first_gradient(trainer).items()}
    rows = np.zeros((STEPS, len(trainer.train)))
    for step in range(STEPS):
        for batch in micro_batches(trainer, step):
            np.add.at(rows[step], batch.rows, 1)
    result["rows"] = runtime.sum(torch.from_numpy(rows)).numpy()
    rates: list[list[float]] = []
    losses: list[float] = []

    def log(_: int, values: dict) -> None:
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        assert values["train/lr"] == rates[-1][0]
        losses.append(values["train/loss"])

    if ahead and runtime.rank == runtime.world_size - 1:
        runtime.phases.faults = {("backward", 3): "oom", ("backward", 4): "oom"}
    with mock.patch.object(Runtime, "begins_ahead", ahead):
        train(trainer, hooks(log), Progress())
    assert not runtime.phases.faults
    result |= {"rates": np.array(rates), "losses": np.array(losses)}
    model = unwrap(trainer.model)
    return result | {f"weight/{n}": p.detach().numpy() for n, p in model.named_parameters()}


def clipped_norm(config: RunConfig, runtime: Runtime) -> float:
    """Return the norm of the gradient that a step applies."""
    gradient = first_gradient(build(config, runtime))
    return float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in gradient.values())))


def score(config: RunConfig, runtime: Runtime) -> dict[int, list[list[float]]]:
    """Evaluate splits of awkward sizes, packed and padded; return their scores."""
    trainer = build(config, runtime)
    found: dict[int, list[list[float]]] = {}
    for size in EVALUATION_SIZES:
        split = trainer.train
        rows = np.arange(size)
        offsets, labels, row_ids = (
            split.offsets[: size + 1],
            split.labels[rows],
            split.row_ids[rows],
        )
        part_ = type(split)(split.tokens, offsets, labels, row_ids)
        model = unwrap(trainer.model)
        passes = (
            evaluate(runtime, model, part_, max_tokens=64, padded=padded)
            for padded in (False, True)
        )
        found[size] = [result.scores.tolist() for result in passes]
    return found


def poison(config: RunConfig, runtime: Runtime) -> dict[str, object]:
    """Make the loss NaN on the last rank only, at steps 1 and 2, then at all; see what all ranks do."""
    trainer = build(config, runtime)
    model = unwrap(trainer.model)
    steps_poisoned, calls = {1, 2}, {"step": 0}
    backward = runtime.backward

    def poisoned(loss: torch.Tensor, rows: int) -> None:
        bad = runtime.rank == runtime.world_size - 1 and calls["step"] in steps_poisoned
        backward(loss * float("nan") if bad else loss, rows)

    runtime.backward = poisoned
    progress = Progress()
    trainer.model.train()
    for step in range(4):
        calls["step"] = step
        train_step(trainer, progress, Wants())
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    steps_poisoned.add(0)
    calls["step"] = 0
    try:
        train(trainer, hooks(), Progress())
        diverged = False
    except DivergedError:
        diverged = True
    runtime.backward = backward
    checksum = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
    same = float(runtime.sum(torch.tensor(checksum, dtype=torch.float64))) / runtime.world_size
    return {
        "skipped": progress.recent.skipped,
        "finite": finite and all(bool(torch.isfinite(p).all()) for p in model.parameters()),
        "diverged": diverged,
        "replicas_equal": abs(same - checksum) < 1e-9,
    }


def main() -> None:
    """Run all cases; the main process writes the results."""
    folder, world_size, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    flags += ["--precision=fp32", f"--max_steps={STEPS}", "--log_every=1", "--warmup_ratio=0.3"]
    runtime = Runtime("fp32", 1)
    assert runtime.world_size == world_size, f"{runtime.world_size} ranks, {world_size} expected"
    for name, extra in CASES.items():
        result = run_case(parse(flags + extra), runtime, name == "begun_ahead")
        if runtime.is_main:
            np.savez(folder / f"{name}-{world_size}.npz", **result)
    report = {
        "evaluated": score(parse(flags), runtime),
        "clipped_norm": clipped_norm(parse([*flags, "--max_grad_norm=0.01"]), runtime),
        "free_norm": clipped_norm(parse([*flags, "--max_grad_norm=inf"]), runtime),
        "poison": poison(parse([*flags, "--max_skipped=3"]), runtime),
    }
    if runtime.is_main:
        (folder / f"report-{world_size}.json").write_text(json.dumps(report))
    runtime.end()


if __name__ == "__main__":
    main()

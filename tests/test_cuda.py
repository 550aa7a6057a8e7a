"""What this machine's device computes, against the CPU in fp32. Without a GPU that device is the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.tiny import make_trainer
from toolkit.config import RunConfig, part
from toolkit.data.batches import Batch, make_batch
from toolkit.data.cache import TokenSplit
from toolkit.engine.runtime import Runtime
from toolkit.engine.step import Wants, _fetch_sums, begin_step, train_step
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import micro_batches
from toolkit.model.classifier import ClassifierSpec, build_classifier

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NAMES = ("neg", "pos")
ROWS = np.arange(3, 35)
LONG = 2_000_000_000
"""Clock cycles that a GPU sleeps: a second."""
KEYS = ROWS.astype(np.uint64) * np.uint64(977)


def compute(
    encoder: Path, batch: Batch, *, precision: str, on_cpu: bool = False, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and gradient of a step of two equal micro-batches, with dropout on."""
    with pytest.MonkeyPatch.context() as patch:
        if on_cpu:
            patch.setenv("ACCELERATE_USE_CPU", "true")
        config = replace(RunConfig(), precision=precision, dropout=0.3)
        runtime = Runtime(config.precision, 1)
    model, _ = build_classifier(part(ClassifierSpec, config), encoder, NAMES)
    if compiled:
        model.compile_encoder(on_gpu=runtime.device.type == "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    prepared, _ = runtime.prepare(model, optimizer, max_norm=1.0, compiled=compiled)
    prepared.train()
    for _ in range(4):  # a CUDA graph is captured in one of the first passes, and replayed then
        for last in (False, True):
            with runtime.micro_step(last=last):
                logits = prepared(**runtime.inputs(batch)).logits.float()[: len(batch.rows)]
                loss = functional.cross_entropy(logits, runtime.labels(batch), reduction="sum")
                runtime.backward(loss, 2 * len(batch.rows))
        gradient = torch.cat([p.grad.flatten().cpu() for p in prepared.parameters()])
        runtime.step()
    return logits.detach().cpu(), gradient


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("padded", "precision", "compiled", "tolerance"),
    [
        # fp32, as torch means it by default: no tf32. Without a GPU it would be compared with itself
        pytest.param(True, "fp32", False, 1e-3, marks=on_gpu),
        (False, "fp32", False, 1e-3),
        (True, "bf16", False, 3e-2),
        (False, "bf16", False, 3e-2),
        pytest.param(False, "bf16", True, 3e-2, marks=on_gpu),
    ],
)
def test_every_path_is_the_reference(
    padded: bool,
    precision: str,
    compiled: bool,
    tolerance: float,
    split: TokenSplit,
    tiny_encoder: Path,
    fresh_accelerate,
) -> None:
    """Logits and gradients; padded fp32 on the CPU is stock BERT, see test_classifier.py."""
    reference = make_batch(split, ROWS, KEYS, padded=True)
    expected = compute(tiny_encoder, reference, precision="fp32", on_cpu=True)
    fresh_accelerate()
    batch = make_batch(split, ROWS, KEYS, padded=padded)
    found = compute(tiny_encoder, batch, precision=precision, compiled=compiled)
    assert relative(found[0], expected[0]) < tolerance
    assert relative(found[1], expected[1]) < tolerance


@on_gpu
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_captured_steps_are_the_others(
    grad_accum: int, split: TokenSplit, tiny_encoder: Path, fresh_accelerate
) -> None:
    """Packs of several sizes, each of which is captured, replayed, and updates the weights."""
    found = []
    for compiled in (False, True):
        fresh_accelerate()
        settings = {"precision": "bf16", "batch_size": 24, "max_steps": 15, "lr": 1e-3}
        trainer = make_trainer(
            split, tiny_encoder, compile=compiled, grad_accum=grad_accum, epochs=9.0, **settings
        )
        sizes = [b.computed_tokens for s in range(15) for b in micro_batches(trainer, s)]
        assert 2 < len(set(sizes)) < 8
        progress, report = Progress(), None
        found.append([])
        for _ in range(15):
            report = train_step(trainer, progress, Wants(), report)
            found[-1].append((report.sums.loss_sum, report.sums.norm))
        assert progress.recent.skipped == 0
    assert np.array(found[1]) == pytest.approx(np.array(found[0]), rel=3e-2)


@on_gpu
def test_the_host_does_not_wait_within_a_step(split: TokenSplit, tiny_encoder: Path) -> None:
    """As in test_loop.py, where CUDA itself says so: from a step's update to the next one's gradient."""
    trainer = make_trainer(split, tiny_encoder, precision="bf16", grad_accum=2)
    report = train_step(trainer, Progress(), Wants())  # kernels are loaded
    assert report.begun is not None
    torch.cuda._sleep(LONG)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = trainer.runtime.step()
        read = _fetch_sums(trainer.runtime, report.begun, Wants(), norm)
        begin_step(trainer, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.current_stream()
    assert not stream.query(), "the host waited"
    torch.cuda._sleep(LONG)
    sums = read()
    assert not stream.query(), "the host waited for what was begun later, too"
    assert sums.loss_sum > 0
    assert sums.norm == norm.item() > 0

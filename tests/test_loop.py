"""One step: what it updates, what it deals ahead, and that the host does not wait in the middle of it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import use_kernels
from tests.tiny import make_trainer
from toolkit.config import RunConfig
from toolkit.engine import runtime
from toolkit.engine.lookups import Lookups, embeddings
from toolkit.engine.loop import (
    Progress,
    Wants,
    add_gradients,
    micro_batches,
    train_step,
)
from toolkit.engine.optim import build_optimizer, set_rates
from toolkit.engine.runtime import Runtime
from toolkit.run import training_tokens

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        assert func._schema.name not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_within_a_step(
    split, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first micro-batch to the update. (Padded, stock BERT looks at its mask once.)"""
    monkeypatch.setattr(runtime, "embeddings", lambda model: {})  # as on a GPU
    use_kernels(monkeypatch)
    trainer = make_trainer(split, tiny_encoder, grad_accum=2)
    batches = micro_batches(trainer, 0)
    assert len(batches) == 2
    with NoWaiting() as mode:
        sums = add_gradients(trainer, batches, 16, Wants())
        norm = trainer.runtime.step()
    assert mode.seen > 300
    assert sums.tolist()[1:] == [
        sum(batch.tokens for batch in batches),
        *sums.tolist()[2:3],
        0,
        0,
        0,
    ]
    assert norm.item() > 0
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        norm.item()


@pytest.mark.parametrize("max_norm", [0.05, 1e6, float("inf")])
def test_an_update_is_torchs(max_norm: float, split, tiny_encoder: Path) -> None:
    """Clipped within the update, as by `clip_grad_norm_` before it."""
    trainer = make_trainer(split, tiny_encoder, max_grad_norm=max_norm)
    model = trainer.runtime.unwrap(trainer.model)
    set_rates(trainer.optimizer, 1.0)  # warming up left them at 0
    add_gradients(trainer, micro_batches(trainer, 0), 16, Wants())
    theirs = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        other.grad = mine.grad.clone()
    optimizer = build_optimizer(theirs, trainer.optim)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    optimizer.step()
    assert trainer.runtime.step() == expected
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8)
        assert mine.grad is None or not mine.grad.any()
    assert trainer.runtime.updates() == 1


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_embedding_gradients_that_stay_are_those_of_one_step(
    grad_accum: int, split, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows added to a gradient that stays, against a gradient of all rows made anew, in steps 0 and 1."""
    found = []
    for sparse in (True, False):
        if not sparse:
            monkeypatch.setattr(runtime, "embeddings", lambda model: {})
        trainer = make_trainer(split, tiny_encoder, grad_accum=grad_accum)
        layers = embeddings(trainer.runtime.unwrap(trainer.model)).values()
        assert [layer.sparse for layer in layers] == [sparse] * 3
        train_step(trainer, Progress(), Wants())
        add_gradients(trainer, micro_batches(trainer, 1), 16, Wants())
        found.append([layer.weight.grad for layer in layers])
    for kept, anew in zip(*found, strict=True):
        assert kept.layout == torch.strided
        assert anew.any()
        torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-8)


def test_embeddings_that_are_not_only_looked_up() -> None:
    """A layer that shares the weight, or computes with it, has a gradient of all rows: none is lost."""
    model = torch.nn.Module()
    model.one, model.other = torch.nn.Embedding(5, 2), torch.nn.Embedding(5, 2)
    model.other.weight = model.one.weight
    lookups = Lookups(model, embeddings(model))
    [weight], [gradient] = lookups.weights, lookups.gradients
    for compute, rows in (
        (lambda: model.one(torch.tensor([1, 3, 1])).sum(), [0, 2, 0, 1, 0]),
        (lambda: (model.one(torch.tensor([1])) + model.other(torch.tensor([2]))).sum(), [0, 1, 1, 0, 0]),
        (lambda: (model.one(torch.tensor([4])) @ weight.T.detach()).sum() + weight.sum(), None),
    ):  # fmt: skip
        compute().backward()
        assert weight.grad is gradient
        if rows is None:
            assert gradient.all()
        else:
            assert gradient[:, 0].tolist() == rows
        weight.grad = None  # as an optimizer may
        lookups.clear()
        assert weight.grad is gradient
        assert not gradient.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_left_out(bad: float, split, tiny_encoder: Path) -> None:
    trainer = make_trainer(split, tiny_encoder)
    train_step(trainer, Progress(), Wants())
    before = {name: copy.deepcopy(state) for name, state in trainer.runtime.state()}
    add_gradients(trainer, micro_batches(trainer, 1), 16, Wants())
    next(trainer.model.parameters()).grad[0, 0] = bad
    assert not trainer.runtime.step().isfinite()
    assert trainer.runtime.updates() == 1
    for name, state in trainer.runtime.state():
        assert torch.equal(state.weight, before[name].weight)
        assert all(
            torch.equal(state.moments[key], before[name].moments[key]) for key in state.moments
        )


def test_a_step_deals_the_next(split, tiny_encoder: Path) -> None:
    """The same micro-batches as without, and none after the last step."""
    trainer = make_trainer(split, tiny_encoder, grad_accum=3)
    progress, ahead = Progress(), []
    for step in range(3):
        ahead = train_step(trainer, progress, Wants(), ahead).ahead
        expected = micro_batches(trainer, step + 1)
        assert len(ahead) == len(expected) == (3 if step < 2 else 0)
        for batch, same in zip(ahead, expected, strict=True):
            assert np.array_equal(batch.rows, same.rows)
            assert np.array_equal(batch.input_ids, same.input_ids)
            assert np.array_equal(batch.dropout_keys, same.dropout_keys)


@pytest.mark.parametrize("max_tokens", [None, 8192, 64])
def test_smaller_micro_batches_are_smaller(
    max_tokens: int | None, split, tiny_encoder: Path
) -> None:
    """What did not fit is cut at once, also where `max_tokens` would have allowed it."""
    trainer = make_trainer(split, tiny_encoder)
    trainer = replace(trainer, spec=replace(trainer.spec, max_tokens=max_tokens))
    whole = micro_batches(trainer, 0)
    cut = micro_batches(trainer, 0, 2)
    assert len(whole) >= (3 if max_tokens == 64 else 1)
    assert len(cut) >= 2 * len(whole)
    assert max(b.computed_tokens for b in cut) < max(b.computed_tokens for b in whole)


@pytest.mark.parametrize(
    ("said", "device", "expected"),
    [
        ({}, "cpu", 8192),
        ({}, "cuda", None),
        ({"max_tokens": 999}, "cpu", 999),
        ({"max_tokens": 999}, "cuda", 999),
        ({"grad_accum": 2}, "cpu", None),
    ],
)
def test_tokens_of_a_micro_batch(said: dict[str, int], device: str, expected: int | None) -> None:
    here = Runtime("fp32", 1)
    here.device = torch.device(device)
    assert training_tokens(replace(RunConfig(), **said), here) == expected


def test_nothing_is_compiled_for_a_stand_in(split, tiny_encoder: Path) -> None:
    """Compiling for its few tokens took half a minute on a GPU, and again for the first batch."""
    from torch._dynamo.utils import counters

    counters.clear()
    trainer = make_trainer(split, tiny_encoder, compile=True, precision="bf16")
    assert trainer.runtime.updates() == 0, "the optimizer is settled"
    assert not counters["frames"]

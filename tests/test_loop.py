"""One step: what it updates, what it deals ahead, and that the host does not wait in the middle of it."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import use_kernels
from tests.tiny import make_trainer
from toolkit.build import training_tokens
from toolkit.config import RunConfig
from toolkit.engine import loop, runtime, step, timing
from toolkit.engine.lookups import Lookups, embeddings
from toolkit.engine.loop import Hooks, train
from toolkit.engine.optim import build_optimizer, set_rates
from toolkit.engine.replicas import unwrap
from toolkit.engine.runtime import Runtime
from toolkit.engine.step import Wants, _fetch_sums, add_gradients, train_step
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import Trainer, micro_batches
from toolkit.errors import Preempted

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
        begun = add_gradients(trainer, batches, 16)
        norm = trainer.runtime.step()
        read = _fetch_sums(trainer.runtime, begun, Wants(), norm)
    assert mode.seen > 300
    sums = read()
    assert sums.tokens == sum(batch.tokens for batch in batches)
    assert (sums.out_of_memory, sums.stop, sums.save) == (0, 0, 0)
    assert sums.norm == norm.item() > 0
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        norm.item()


@pytest.mark.parametrize("max_norm", [0.05, 1e6, float("inf")])
def test_an_update_is_torchs(max_norm: float, split, tiny_encoder: Path) -> None:
    """Clipped within the update, as by `clip_grad_norm_` before it."""
    trainer = make_trainer(split, tiny_encoder, max_grad_norm=max_norm)
    model = unwrap(trainer.model)
    set_rates(trainer.optimizer, 1.0)  # warming up left them at 0
    add_gradients(trainer, micro_batches(trainer, 0), 16)
    theirs = copy.deepcopy(model)
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        other.grad = mine.grad.clone()
    optimizer = build_optimizer(theirs, trainer.optim)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    optimizer.step()
    torch.testing.assert_close(trainer.runtime.step(), expected, rtol=1e-5, atol=0)
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
        layers = embeddings(unwrap(trainer.model)).values()
        assert [layer.sparse for layer in layers] == [sparse] * 3
        train_step(trainer, Progress(), Wants())
        add_gradients(trainer, micro_batches(trainer, 1), 16)
        found.append([layer.weight.grad for layer in layers])
    for kept, anew in zip(*found, strict=True):
        assert kept.layout == torch.strided
        assert anew.any()
        torch.testing.assert_close(kept, anew, rtol=1e-5, atol=1e-8)


def test_an_embedding_that_no_rank_looked_up() -> None:
    model = torch.nn.ModuleList([torch.nn.Embedding(5, 2), torch.nn.Embedding(4, 3)])
    lookups = Lookups(model, embeddings(model))
    model[0](torch.tensor([1, 3])).sum().backward()
    lookups.average(lambda tensor: 2 * tensor, 2)  # two ranks with the same rows
    assert lookups.gradients[0][:, 0].tolist() == [0, 1, 0, 1, 0]
    assert not lookups.gradients[1].any()


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


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_norm_is_of_the_whole_gradient(grad_accum: int, split, tiny_encoder: Path) -> None:
    """Though of embeddings on a CPU the touched rows alone are read."""
    trainer = make_trainer(split, tiny_encoder, grad_accum=grad_accum)
    add_gradients(trainer, micro_batches(trainer, 0), 16)
    gradients = [parameter.grad.flatten() for parameter in trainer.model.parameters()]
    expected = torch.cat(gradients).norm()
    torch.testing.assert_close(trainer.runtime.step(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"]
)
def test_an_update_that_is_not_finite_is_left_out(
    bad: float, name: str, split, tiny_encoder: Path
) -> None:
    trainer = make_trainer(split, tiny_encoder)
    train_step(trainer, Progress(), Wants())
    before = {name: copy.deepcopy(state) for name, state in trainer.runtime.state()}
    [batch] = micro_batches(trainer, 1)
    add_gradients(trainer, [batch], 16)
    row = int(batch.input_ids[0, 0]) if "word" in name else 0  # one that the step looks up
    trainer.model.get_parameter(name).grad[row, 0] = bad
    assert not trainer.runtime.step().isfinite()
    assert trainer.runtime.updates() == 1
    for name, state in trainer.runtime.state():
        assert torch.equal(state.weight, before[name].weight)
        assert all(
            torch.equal(state.moments[key], before[name].moments[key]) for key in state.moments
        )


def note_calls(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that takes up what a runtime is asked to do, in turn."""
    calls: list[str] = []
    runtime = trainer.runtime

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            calls.append(name)
            return call(*arguments)

        return noting

    seed, fetch = runtime.seed_step, runtime.fetch
    monkeypatch.setattr(
        runtime, "seed_step", lambda *seeds: noted(f"begin {seeds[1]}", seed)(*seeds)
    )
    monkeypatch.setattr(runtime, "fetch", lambda numbers: noted("wait", fetch(numbers)))
    monkeypatch.setattr(runtime, "step", noted("update", runtime.step))
    return calls


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (False, "begin 0, update, wait, begin 1, update, wait, begin 2, update, wait"),
        (True, "begin 0, update, begin 1, wait, update, wait, begin 2, update, wait"),
    ],
)
def test_a_gpu_gets_the_next_step_before_the_host_waits(
    ahead: bool, expected: str, split, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not if an evaluation comes first, as behind the second step, or nothing does."""
    monkeypatch.setattr(Runtime, "begins_ahead", ahead)
    trainer = make_trainer(split, tiny_encoder, eval_every=2)
    calls = note_calls(trainer, monkeypatch)
    train(trainer, Course(trainer).hooks(), Progress())
    assert ", ".join(calls) == expected


def test_steps_that_are_timed_leave_none_begun(
    split, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient left over would be added to that of the next timed run."""
    monkeypatch.setattr(Runtime, "begins_ahead", True)
    trainer = make_trainer(split, tiny_encoder)
    calls = note_calls(trainer, monkeypatch)
    timing.run_steps(trainer, 3, compiled=False)
    begun = [call for call in calls if call.startswith("begin")]
    assert len(begun) == calls.count("update") == timing.WARM_STEPS + timing.TIMED_STEPS


class Course:
    """What a training run came to after each step, and what it was asked to do."""

    def __init__(self, trainer: Trainer, save_from: int = 99, stop_from: int = 99) -> None:
        self.trainer = trainer
        self.save_from, self.stop_from = save_from, stop_from
        self.states: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self.evaluated: list[int] = []
        self.saved: list[int] = []

    def hooks(self) -> Hooks:
        return Hooks(self.wants, self.on_step, self.on_log, self.evaluated.append, self.on_save)

    def wants(self) -> Wants:
        done = len(self.states)
        return Wants(done >= self.stop_from, done >= self.save_from and not self.saved)

    def on_step(self, step: int) -> None:
        assert self.trainer.runtime.phases.step == step, "what a message would name"
        self.states.append({name: copy.deepcopy(s) for name, s in self.trainer.runtime.state()})

    def on_log(self, _: int, values: dict[str, Any]) -> None:
        self.figures.append({n: v for n, v in values.items() if not n.endswith("_per_s")})

    def on_save(self, progress: Progress) -> None:
        if progress.step not in self.evaluated:
            self.saved.append(progress.step)


def run_course(split: Any, encoder: Path, ahead: bool, **wishes: int) -> Course:
    """Take 12 steps: an evaluation behind every sixth, one without memory, one that is not finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "begins_ahead", ahead)
        trainer = make_trainer(
            split, encoder, max_steps=12, epochs=9.0, eval_every=6, log_every=1, grad_accum=2
        )
        trainer.runtime.phases.faults = {("backward", 4): "oom"}
        course, backward = Course(trainer, **wishes), trainer.runtime.backward

        def poisoned(loss_sum: torch.Tensor, rows: int) -> None:
            backward(loss_sum * float("nan" if trainer.runtime.phases.step == 8 else 1), rows)

        patch.setattr(trainer.runtime, "backward", poisoned)
        with suppress(Preempted):
            train(trainer, course.hooks(), Progress())
    return course


def test_a_step_that_is_begun_ahead_is_the_same(split, tiny_encoder: Path) -> None:
    """Bit for bit: weights, moments and figures of every step, and nothing else is evaluated."""
    one, ahead = (run_course(split, tiny_encoder, flag) for flag in (False, True))
    assert len(one.states) == len(ahead.states) == 12
    assert ahead.figures == one.figures
    assert [figures["train/skipped_steps"] for figures in one.figures] == [0] * 7 + [1] + [0] * 4
    assert ahead.evaluated == one.evaluated
    for mine, other in zip(ahead.states, one.states, strict=True):
        for name, state in other.items():
            assert torch.equal(mine[name].weight, state.weight)
            assert all(torch.equal(mine[name].moments[k], state.moments[k]) for k in state.moments)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_wish_is_granted_with_the_next_step(ahead: bool, split, tiny_encoder: Path) -> None:
    """Though the step behind it may be begun already, and once."""
    assert run_course(split, tiny_encoder, ahead, save_from=2).saved == [3]
    stopped = run_course(split, tiny_encoder, ahead, stop_from=8)
    assert stopped.saved == [9]
    assert len(stopped.states) == 9


def test_time_in_which_a_begun_step_computes_counts(
    split, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes while the host logs: reviews/s would be too many without that time.

    A checkpoint takes far longer than what computes meanwhile, and is none of a step's.
    """
    clock = [0]

    def passing(seconds: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any) -> Any:
            clock[0] += seconds
            return call(*arguments)

        return later

    for module in (loop, step):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = make_trainer(split, tiny_encoder)
    fetch = trainer.runtime.fetch
    monkeypatch.setattr(trainer.runtime, "fetch", lambda numbers: passing(1, fetch(numbers)))
    hooks = replace(Course(trainer).hooks(), on_step=passing(10, lambda _: None))
    saving = replace(hooks, wants=lambda: Wants(save=True), on_save=passing(100, lambda _: None))
    for ahead, expected, with_saves in ((False, 3, 3), (True, 23, 3)):
        monkeypatch.setattr(Runtime, "begins_ahead", ahead)
        assert train(trainer, hooks, Progress()).seconds == expected
        assert train(trainer, saving, Progress()).seconds == with_saves


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

"""What the environment may and may not change about the seam to Accelerate."""

import sys

import pytest
import torch

from tests.programs import ROOT, run_python
from toolkit.engine.runtime import Runtime

PAGE_FAULTS = """
import resource, torch
from toolkit.engine.runtime import Runtime
Runtime("fp32", 1)
for number in range(12):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(5_000_000) for _ in range(4)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Of ten times 80 MB, which are 195,000 pages; one block of them may lie elsewhere than before."""


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
@pytest.mark.parametrize(
    ("limits", "faults"),
    [({}, range(20_000)), ({"MALLOC_TRIM_THRESHOLD_": "0"}, range(50_000, 10**6))],
)
def test_memory_of_tensors_is_kept_for_the_next_unless_told(
    limits: dict[str, str], faults: range
) -> None:
    done = run_python("-c", PAGE_FAULTS, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true", **limits)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) in faults


@pytest.mark.parametrize("said", ["True", "true", "1"])
def test_launch_on_cpu_holds_on_a_machine_with_gpus(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher writes "True" for `use_cpu: true`; people write "true"."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_num_threads()
    try:
        assert Runtime("fp32", before + 1).device.type == "cpu"
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_environment_cannot_divide_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    runtime = Runtime("fp32", 1)
    layer = torch.nn.Linear(1, 1, bias=False)
    model, _ = runtime.prepare(layer, torch.optim.AdamW(layer.parameters()), max_norm=1.0)
    runtime.backward(3 * model(torch.ones(1, 1)).sum(), rows=1)
    assert layer.weight.grad is not None
    assert layer.weight.grad.item() == 3


def test_threads_are_the_usable_cores_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        Runtime("fp32")
        assert torch.get_num_threads() == 2
        Runtime("fp32", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_draws_are_a_function_of_seed_step_and_rank() -> None:
    """A layer of somebody's head may draw; there is no generator state in a checkpoint."""
    runtime = Runtime("fp32", 1)
    draws = {}
    for seed, step, rank in [(0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)]:
        runtime.rank = rank
        runtime.seed_step(seed, step)
        torch.rand(3)
        runtime.seed_step(seed, step)
        draws[seed, step, rank] = tuple(torch.rand(3).tolist())
        runtime.seed_step(seed, step)
        assert draws[seed, step, rank] == tuple(torch.rand(3).tolist())
    assert len(set(draws.values())) == 4


def test_gradients_do_not_stay_where_a_graph_writes_again() -> None:
    """A captured CUDA graph hands out its own memory; only the first of several micro-batches copies."""
    for compiled, copies in ((True, [True, False, False]), (False, [False] * 3)):
        runtime = Runtime("fp32", 1)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        prepared, _ = runtime.prepare(model, optimizer, max_norm=1.0, compiled=compiled)
        found = []
        for last in (False, False, True):
            with runtime.micro_step(last=last):
                runtime.backward(prepared(torch.ones(2, 3)).sum(), 1)
                [inside] = [p.grad for p in model.parameters() if p.dim() == 2]
            found.append(model.weight.grad is not inside)
            assert torch.equal(model.weight.grad, inside)
        assert found == copies
        assert torch.equal(model.weight.grad, torch.full((1, 3), 6.0))

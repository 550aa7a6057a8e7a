"""The GPU's code where there is no GPU: the kernels interpreted, and all of a step compiled for one."""

import json
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import use_kernels
from tests.programs import ROOT, run_python
from toolkit.model import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""The interpreter multiplies the bits of bf16 numbers (Triton 3.8)."""
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
LENGTHS = [5, 64, 1, 130, 0, 65, 0]
LONGEST = 133


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)


def attend_plainly(query: Tensor, joint: Tensor, query_bounds: Tensor, bounds: Tensor) -> Tensor:
    """In float64, sequence by sequence."""
    results = []
    for number in range(len(bounds) - 1):
        mine = query[query_bounds[number] : query_bounds[number + 1]].double()
        key, value = joint[bounds[number] : bounds[number + 1], -2:].double().unbind(1)
        scores = torch.einsum("nhk,thk->hnt", mine, key) / mine.shape[-1] ** 0.5
        results.append(torch.einsum("hnt,thk->nhk", scores.softmax(-1), value))
    return torch.cat(results)


@pytest.mark.parametrize("units", [16, 24, 64])
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (LOW, 1e-2)])
def test_results_and_gradients(
    units: int, first_only: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Of several heads and blocks, odd widths and empty sequences; every place is written."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=DEVICE)
    singles = torch.arange(len(bounds), device=DEVICE)
    parts, rows = (2, len(LENGTHS)) if first_only else (3, sum(LENGTHS))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, units, dtype=dtype, device=DEVICE).requires_grad_()

    joint, query, gradient = draw(sum(LENGTHS), parts), draw(rows), draw(rows).detach()
    first = query if first_only else None
    torch.use_deterministic_algorithms(True)  # memory that nobody has written holds NaN then
    try:
        found = attention.attend(first, joint, bounds, LONGEST, units**-0.5)
        found.backward(gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    inputs = [joint, query] if first_only else [joint]
    ours: list[Any] = [found.detach(), *(x.grad for x in inputs)]
    asked, query_bounds = (query, singles) if first_only else (joint[:, 0], bounds)
    expected = attend_plainly(asked, joint, query_bounds, bounds)
    theirs = [expected.detach(), *torch.autograd.grad(expected, inputs, gradient.double())]
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        assert float((mine - exact).norm() / exact.norm()) < tolerance


def test_packs_need_what_triton_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `batching: auto` pads: a GPU from Ampere on, and a C compiler."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    uncached = attention._triton_compiles.__wrapped__
    monkeypatch.setattr(attention, "_triton_compiles", uncached)
    monkeypatch.setattr(attention, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert not attention.has_fast_packing(gpu, "bf16")
    monkeypatch.setenv("CC", "")  # Triton would start it
    monkeypatch.setattr(attention, "which", lambda name: name)
    assert not attention.has_fast_packing(gpu, "bf16")
    monkeypatch.setenv("CC", "mycc")
    assert attention.has_fast_packing(gpu, "bf16")
    assert not attention.has_fast_packing(gpu, "fp32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not attention.has_fast_packing(gpu, "bf16")


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """What compile_for_gpu.py says."""
    worker = ROOT / "tests" / "workers" / "compile_for_gpu.py"
    # where there is one, Inductor would write for it, and the kernels' stand-ins would not be asked
    done = run_python(worker, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_gpus_compiler_takes_all_of_a_step(built: dict[str, Any]) -> None:
    """The kernels, and what Inductor writes, to which a constant of dropout's hash once was too large."""
    names = [name for name, *_ in built["kernels"]]
    assert {(name, capability) for name, capability, *_ in built["kernels"]} >= {
        (name, capability)
        for name in ("attend_kernel", "gradients_kernel")
        for capability in (80, 90)
    }
    assert sum(name.startswith("triton_") for name in names) > 35
    assert sum("bitwise_xor" in name for name in names) >= 5, "each dropout of two layers"
    assert not [name for name, _, spilled, _ in built["kernels"] if spilled]


@pytest.mark.skipif(TORCH < (2, 13), reason="its Inductor cannot be told that a CPU is a GPU")
def test_no_batch_has_a_kernel_go_through_shared_memory_or_all_compiled_again(
    built: dict[str, Any],
) -> None:
    at_a_time = [rows for *_, rows in built["kernels"] if rows]
    assert len(at_a_time) >= 5, "LayerNorm's gradients, of two layers and the embeddings"
    assert set(at_a_time) == {1}, "several rows would go through shared memory"
    assert built["graphs"] == 2, "for two models, and not again for batches of another size"

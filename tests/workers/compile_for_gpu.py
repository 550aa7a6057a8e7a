"""Compile for GPUs what runs on one, where there is none: our kernels, and those that Inductor writes.

Prints JSON: how many graphs Dynamo compiled for models of two widths and batches of two sizes; and for
each kernel its name, the GPU's compute capability, the bytes that did not fit into registers and, if it
sums by row and by column, the rows it takes at a time. Started by test_kernels.py.
"""

import json
import multiprocessing
import re
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch._dynamo.utils import counters
from torch._inductor import async_compile, config, scheduler
from torch._inductor.codecache import PyCodeCache
from transformers import BertConfig, BertModel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from toolkit.data.batches import make_batch
from toolkit.data.cache import TokenSplit
from toolkit.engine.runtime import Runtime
from toolkit.model import attention, kernels
from toolkit.model.classifier import ClassifierSpec, build_classifier

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HEADS, UNITS = 12, 64
"""BERT-base's."""
FEATURES = 768, 384
"""BERT-base's, and MiniLM's."""
TOKENS = 8_400, 140
"""Inductor, left alone, would take several rows at a time as the first one is so large, with so few
processors, and compile again for the second: 5 * 2**20 numbers lie between them."""
PROCESSORS = 2
Result = tuple[str, int, int, int | None]


class NoGPU:
    """A driver that says for which GPU to compile, and can run nothing."""

    launcher_cls = staticmethod(lambda *_: None)

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it built for each device

    def get_current_stream(self, _: int) -> int:
        return 0


class Unrun:
    """In the place of a kernel that is to be called: makes zeros of what it would compute."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def run(self, *arguments: Any, **_: object) -> None:
        for name, value in zip(self.kernel.fn.arg_names, arguments, strict=False):
            if name.startswith(("out_ptr", "in_out_ptr")):
                value.zero_()


def compile_one(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> Result:
    names = kernel.arg_names
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    rows = constants["XBLOCK"] if "RSPLIT_SIZE" in constants else None
    return kernel.__name__, capability, spilled(built), rows


def spilled(built: Any) -> int:
    """Return the bytes that did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    [stack] = re.findall(r"STACK:(\d+)", told)
    return int(stack)


def compile_ours(capability: int) -> list[Result]:
    """Attend, forward and backward, with all that a launch does up to the GPU's own call."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **settings: Any) -> None:
        found.append(run(kernel, *arguments, warmup=True, **settings))

    joint = torch.zeros(300, 3, HEADS, UNITS, dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.tensor([0, 100, 300], dtype=torch.int32)
    driver.set_active(NoGPU(capability))
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
    ):
        attended, _ = kernels.attend(None, joint, bounds, bounds, 200, 200, UNITS**-0.5)
        attended.sum().backward()
    return [(built.metadata.name, capability, spilled(built), None) for built in found]


def inductors_kernels() -> list[Any]:
    """Let Inductor write a training step's kernels; its back end for GPUs writes for CPUs, too."""
    found: list[Any] = []

    def collect(_: object, name: str, source: str, *__: object, **___: object) -> Unrun:
        found.append(getattr(PyCodeCache.load(source), name))
        return Unrun(found[-1])

    async_compile.AsyncCompile.triton = collect
    config.cpu_backend = "triton"
    config.fx_graph_cache = False
    scheduler._is_gpu_triton_backend = lambda *nodes: True  # torch 2.13; 2.11 has no such place
    multiprocessing.cpu_count = lambda: PROCESSORS
    attention.has_kernel = lambda x: True
    kernels.attend.register_kernel("cpu")(kernels._empty)
    kernels._attend_backward.register_kernel("cpu")(kernels._empty_gradients)
    runtime = Runtime("bf16", 1)
    for features in FEATURES:
        take_steps(runtime, features)
    return found


def take_steps(runtime: Runtime, features: int) -> None:
    """Compile a model of two layers, and take all of a training step but its update."""
    with tempfile.TemporaryDirectory() as folder:
        widths = {"hidden_size": features, "intermediate_size": 4 * features}
        BertModel(BertConfig(num_hidden_layers=2, vocab_size=30, **widths)).save_pretrained(folder)
        model, _ = build_classifier(ClassifierSpec(), Path(folder), ("neg", "pos"))
    model.compile_encoder(on_gpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    prepared, _ = runtime.prepare(model, optimizer, max_norm=1.0, compiled=True)
    prepared.train()
    for tokens in TOKENS:
        ends = np.arange(0, tokens + 1, 7)
        rows = np.arange(len(ends) - 1)
        split = TokenSplit(np.arange(tokens) % 30, ends, rows % 2, rows)
        batch = make_batch(split, rows, rows.astype(np.uint64), padded=False)
        runtime.backward(prepared(**runtime.inputs(batch)).logits.sum(), len(rows))


def main() -> None:
    results = [result for capability in (80, 90) for result in compile_ours(capability)]
    for kernel in inductors_kernels():
        chosen = kernel.configs[0]
        constants = chosen.kwargs | kernel.triton_meta["constants"]
        types = kernel.triton_meta["signature"]
        results.append(compile_one(kernel.fn, types, constants, 90, num_warps=chosen.num_warps))
    print(json.dumps({"graphs": counters["stats"]["unique_graphs"], "kernels": results}))


if __name__ == "__main__":
    main()

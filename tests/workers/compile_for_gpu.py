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

from toolkit.data.batches import make_batch
from toolkit.data.cache import TokenSplit
from toolkit.engine.runtime import Runtime
from toolkit.model import attention, kernels
from toolkit.model.classifier import ClassifierSpec, build_classifier

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"lse": "*fp32", "num_queries": "i32", "scale": "fp32", "scaling": "fp32"}
WIDTHS = {"QUERY": 2304, "JOINT": 2304, "OUT": 768, "UNITS": 64, "HEADS": 12, "BLOCKS": 4}
"""BERT-base's, and four blocks for 256 tokens."""
FEATURES = 768, 384
"""BERT-base's, and MiniLM's."""
TOKENS = 8_400, 140
"""Inductor, left alone, would take several rows at a time as the first one is so large, with so few
processors, and compile again for the second: 5 * 2**20 numbers lie between them."""
PROCESSORS = 2
Result = tuple[str, int, int, int | None]


class NoGPU:
    """A driver that says for which GPU to compile, and can run nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    [stack] = re.findall(r"STACK:(\d+)", told)
    rows = constants["XBLOCK"] if "RSPLIT_SIZE" in constants else None
    return kernel.__name__, capability, int(stack), rows


def compile_ours(capability: int) -> list[Result]:
    """For heads of BERT's size in bf16."""
    results = []
    constants = WIDTHS | {name: kernels.TILES[name] for name in ("BLOCK", "STEP")}
    options = {name: kernels.TILES[name] for name in ("num_warps", "num_stages")}
    for kernel in (kernels.attend_kernel, kernels.gradients_kernel):
        types = {
            name: "constexpr"
            if name in constants
            else TYPES.get(name, "*i32" if name.endswith("bounds") else "*bf16")
            for name in kernel.arg_names
        }
        results.append(compile_one(kernel, types, constants, capability, **options))
    return results


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
    with patch("torch.cuda.is_available", return_value=True):
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
    driver.set_active(NoGPU())
    results = [result for capability in (80, 90) for result in compile_ours(capability)]
    for kernel in inductors_kernels():
        chosen = kernel.configs[0]
        constants = chosen.kwargs | kernel.triton_meta["constants"]
        types = kernel.triton_meta["signature"]
        results.append(compile_one(kernel.fn, types, constants, 90, num_warps=chosen.num_warps))
    print(json.dumps({"graphs": counters["stats"]["unique_graphs"], "kernels": results}))


if __name__ == "__main__":
    main()

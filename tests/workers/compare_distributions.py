"""Run under `accelerate launch` by test_zero.py: the same training, whatever holds the model.

compare_distributions.py OUT_FILE EXPECTED_WORLD_SIZE FLAG...
"""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from train_few_steps import build, hooks

from toolkit.config import RunConfig, parse
from toolkit.engine import runtime as distribution
from toolkit.engine.lookups import embeddings
from toolkit.engine.loop import train
from toolkit.engine.replicas import unwrap
from toolkit.engine.runtime import Runtime
from toolkit.engine.totals import Progress
from toolkit.engine.trainer import Trainer

CASES = {
    f"{head}-{precision}-{accum}": [f"--head={head}", f"--precision={precision}", f"--grad_accum={accum}"]
    for head in ("v1", "v2", "v3")
    for precision in ("fp32", "bf16")
    for accum in (1, 4)
} | {
    "clipped": ["--max_grad_norm=0.05", "--precision=fp32"],
    "free": ["--max_grad_norm=inf", "--precision=fp32"],
    "poisoned": ["--precision=fp32", "--grad_accum=2"],
    "out_of_memory_1": ["--max_grad_norm=inf", "--precision=fp32"],
    "out_of_memory_2": ["--max_grad_norm=inf", "--precision=fp32", "--grad_accum=2"],
}  # fmt: skip
STEPS = 4


def poison(runtime: Runtime) -> None:
    """Make the loss infinite on the last rank, in the second step."""
    plain, calls = runtime.backward, []

    def backward(loss: torch.Tensor, rows: int) -> None:
        calls.append(rows)
        bad = len(calls) == 3 and runtime.rank == runtime.world_size - 1
        plain(loss + float("inf") if bad else loss, rows)

    runtime.backward = backward


def exchange_in_small_pieces(runtime: Runtime, pieces: bool) -> None:
    """Let the tiny model's gradients go out in many messages, as a large model's do."""
    if runtime.is_zero:
        settings = runtime.accelerator.state.deepspeed_plugin.deepspeed_config
        settings["zero_optimization"]["reduce_bucket_size"] = 5000 if pieces else int(5e8)
        # else weights as small as these are on all ranks, and never gathered
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    else:
        assert runtime.accelerator.ddp_handler
        runtime.accelerator.ddp_handler.bucket_cap_mb = 0.02 if pieces else 25


def break_off(runtime: Runtime, trainer: Trainer) -> list[int]:
    """Let a backward pass break off in each step, on another rank, at another parameter."""
    parameters = list(unwrap(trainer.model).parameters())
    broken: list[int] = []
    for step in range(runtime.rank, STEPS, runtime.world_size):
        number = (len(parameters) - 1) * step // (STEPS - 1)  # the last of them is the first to go

        def fail(_: torch.Tensor, step: int = step) -> None:
            if runtime.phases.step == step + 1 and step not in broken:
                broken.append(step)
                raise torch.OutOfMemoryError("injected")

        parameters[number].register_hook(fail)
    return broken


def run_case(name: str, config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    out_of_memory = name.startswith("out_of_memory")
    exchange_in_small_pieces(runtime, out_of_memory)
    # DDP as it is on a GPU: it has the embeddings too, and a backward pass may break off in them
    distribution.embeddings = (lambda _: {}) if out_of_memory else embeddings
    trainer = build(config, runtime)
    broken = break_off(runtime, trainer) if out_of_memory else []
    initial = {name: weight.clone() for name, weight in runtime.whole_weights().items()}
    plain = runtime.backward
    if name == "poisoned":
        poison(runtime)
    rows: list[list[float]] = []
    progress = Progress()

    def log(_: int, values: dict[str, Any]) -> None:
        rates = {group["lr"] for group in trainer.optimizer.param_groups}
        rows.append(
            [values["train/loss"] or 0.0, values["train/grad_norm_preclip"] or -1.0, *rates]
        )
        progress.split = 1

    train(trainer, hooks(log), progress)
    runtime.backward = plain
    result = {f"initial/{key}": value.numpy() for key, value in initial.items()}
    for key, value in runtime.state():
        result[f"weight/{key}"] = value.weight.float().numpy()
        result |= {f"{moment}/{key}": tensor.numpy() for moment, tensor in value.moments.items()}
    result["log"] = np.array(rows)
    if out_of_memory and isinstance(trainer.model, DistributedDataParallel):
        assert len(trainer.model.reducer._get_zeros_like_grad_buckets()) > 3
    result["broken"] = runtime.sum(torch.tensor(len(broken))).numpy()
    result["updates"] = np.array(runtime.updates())
    result["skipped"] = np.array(progress.overall.skipped)
    result["plan"] = np.array(runtime.describe()["precision_plan"]["parameters"])
    return result


def can_rejoin(runtime: Runtime) -> bool:
    return not (runtime.is_zero and runtime.accelerator.state.deepspeed_plugin.zero_stage == 3)


def main() -> None:
    gc.freeze()  # else each time that memory runs out, all that was imported is gone through
    out, world_size, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    flags += [f"--max_steps={STEPS}", "--log_every=1", "--warmup_ratio=0.3"]
    runtime = Runtime("fp32", 1)
    assert runtime.world_size == world_size, f"{runtime.world_size} ranks, {world_size} expected"
    results: dict[str, Any] = {}
    for name, extra in CASES.items():
        if name.startswith("out_of_memory") and not can_rejoin(runtime):
            continue
        found = run_case(name, parse([*flags, *extra]), runtime)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    if runtime.is_main:
        np.savez(out, **results)
    runtime.end()


if __name__ == "__main__":
    main()

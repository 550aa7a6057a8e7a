"""Started by `doctor` under a launch config: do the ranks meet, and can they take a step together?"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as in train.py

import torch

from toolkit.engine.runtime import Runtime
from toolkit.ranks import answer, run


def main() -> None:
    """Sum the ranks' numbers, and take one optimizer step of a small layer."""
    runtime = Runtime("bf16", rank_timeout=60)
    take_step(runtime)
    total = runtime.sum(torch.tensor(float(runtime.rank))).item()
    if runtime.is_main:
        answer(runtime.describe() | {"sum_of_ranks": total})
    runtime.end()


def take_step(runtime: Runtime) -> None:
    """Let the ranks exchange a gradient; DeepSpeed builds for it what it has to build."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    runtime.prepare(layer, optimizer, max_norm=1.0)
    runtime.warm_up(lambda model: model(torch.ones(4, 8, device=runtime.device)).float().sum())


if __name__ == "__main__":
    run(main)

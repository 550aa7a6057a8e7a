"""What this machine can do at most: matrix products and memory, measured now.

python -m tests.bench.limits
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from toolkit.console import say
from toolkit.data.cache import TokenSplit
from toolkit.engine.estimate import token_flops
from toolkit.machine import usable_cores

SECONDS = 2.0


def measure(threads: int) -> dict[str, float]:
    """Return operations/s of fp32 and bf16 matrix products, and bytes/s of a copy."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 2048
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _best_seconds(lambda a=left, b=right: a @ b)
    source = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    found["bytes_per_s"] = 2 * 4 * source.numel() / _best_seconds(lambda: target.copy_(source))
    return found


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    best, end = float("inf"), time.monotonic() + SECONDS
    while time.monotonic() < end:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def flops_of(encoder: Path, split: TokenSplit, *, packed: bool) -> float:
    """Return the operations that a token of a split needs, forward and backward."""
    config = json.loads((encoder / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers = config["num_hidden_layers"]
    return token_flops(layers, width, inner, split.offsets, packed=packed)


if __name__ == "__main__":
    say(json.dumps(measure(len(usable_cores()))))

"""Rates against transformers' schedulers; parameter groups."""

import math

import pytest
import torch
from transformers import get_scheduler

from toolkit.engine.optim import OptimSpec, build_optimizer, rate_factor, set_rates


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.37])
@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_rates_are_those_of_transformers(
    schedule: str, warmup_ratio: float, num_steps: int
) -> None:
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, math.ceil(warmup_ratio * num_steps), num_steps)
    spec = OptimSpec(schedule=schedule, warmup_ratio=warmup_ratio)
    for step in range(num_steps):
        assert rate_factor(step, num_steps, spec) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        theirs.step()


def test_groups() -> None:
    model = torch.nn.Module()
    model.body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model.head = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimSpec(lr=0.1, head_lr=0.2, weight_decay=0.3))
    groups = {
        (group["peak_lr"], group["weight_decay"]): sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    }
    assert groups == {(0.1, 0.3): 4, (0.1, 0.0): 6, (0.2, 0.3): 4, (0.2, 0.0): 2}
    set_rates(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.05, 0.1]
    assert optimizer.defaults["fused"]

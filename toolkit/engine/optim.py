"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.engine.replicas import whole_shape


@dataclass(frozen=True)
class OptimSpec:
    """What a user said about optimisation. The fields are those of `RunConfig`."""

    lr: float = 5e-5
    head_lr: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    schedule: str = "linear"


def build_optimizer(model: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """Build fused AdamW with groups for encoder and head, decayed and not.

    Biases and LayerNorm are not decayed. Each group keeps its peak rate as `peak_lr`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = len(whole_shape(parameter)) >= 2
        groups.setdefault((name.startswith("head."), decays), []).append(parameter)
    head_lr = spec.head_lr or spec.lr
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": head_lr if is_head else spec.lr,
                "lr": head_lr if is_head else spec.lr,
                "weight_decay": spec.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ],
        fused=True,
    )


def rate_factor(step: int, num_steps: int, spec: OptimSpec) -> float:
    """Return the share of the peak rate at a step (counted from 0).

    The curves are those of `transformers.get_scheduler` with `num_warmup_steps` rounded up.
    """
    warmup = math.ceil(spec.warmup_ratio * num_steps)
    if step < warmup:
        return step / warmup
    if spec.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    if spec.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its rate for this step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

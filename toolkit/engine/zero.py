"""DeepSpeed ZeRO: optimizer state, gradients and parameters are cut into one shard for each rank.

DeepSpeed runs in fp32 with the computation under our own autocast, as DDP does, so that a launch
config changes who holds what and not the arithmetic. What it stores is read and written whole,
parameter by parameter, through its public `safe_get` and `safe_set` functions: a checkpoint is then
the same files for every distribution and number of ranks, and DeepSpeed's own ones, which are
pickles, are never needed. Read with DeepSpeed 0.19.8.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.engine.replicas import (
    MOMENTS,
    State,
    dtypes,
    frozen,
    moments,
    unwrap,
    watch_gradients,
)


class Zero:
    """Forward, backward and update of a model that DeepSpeed has cut up."""

    def __init__(self, accelerator: Any, model: Any, optimizer: Any, max_norm: float) -> None:
        self.model = model
        self.plain: nn.Module = unwrap(model)
        self.zero = self.model.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.stage: int = self.model.zero_optimization_stage()
        self.offloads: bool = self.model.zero_use_cpu_optimizer()
        self.rank = accelerator.process_index
        self.ready = watch_gradients(self.plain)

    @staticmethod
    def configure(settings: dict[str, Any], max_norm: float, parameters: int) -> None:
        """Fill in DeepSpeed's settings from ours; `launcher` has refused contradictions."""
        # what it gathers gradients in; its default, 500 million numbers, would alone be 2 GB
        settings["zero_optimization"].setdefault("reduce_bucket_size", parameters)
        settings |= {
            # nominal: the loop deals the rows and says itself which micro-batch is the last
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0 if math.isinf(max_norm) else max_norm,
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            # offloaded shards are updated by torch's fused AdamW too: no compiler, same rounding
            "zero_force_ds_cpu_optimizer": False,
        }
        # DeepSpeed calls by names that torch 2.13 is renaming, and each of them would say so
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

    def precision_plan(self) -> dict[str, str]:
        """Say in which precision what is kept, as found in the objects themselves."""
        shards = "a shard on each rank" + (", in CPU memory" if self.offloads else "")
        parameters = "a shard" if self.stage == 3 else "whole"
        return {
            "parameters": f"{dtypes(self.plain.parameters())}, {parameters} on each rank",
            "master_weights": f"{dtypes(self.optimizer.state)}, {shards}",
            "gradient_accumulation": _name(self.model.get_data_types()[1]),
            "gradient_reduction": _name(self.model.communication_data_type),
            "optimizer_state": f"{dtypes(moments(self.optimizer))}, {shards}",
        }

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Tell DeepSpeed whether this is the last micro-batch; only stage 1 leaves gradients be."""
        self.ready.clear()
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def can_rejoin(self) -> bool:
        """See `Runtime.can_rejoin`; stage 3 exchanges parameters in the forward pass already."""
        return self.stage < 3

    def spoil(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """See `Runtime.spoil`; stage 2 exchanges gradients while it is in the backward pass."""
        with frozen(self.ready):
            self.backward(math.nan * forward(self.model))

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient. Not through Accelerate, whose `backward` updates as well."""
        self.model.backward(loss)

    def step(self) -> Tensor:
        """Clip, update if the norm is finite, forget the gradient; return the norm before clipping.

        DeepSpeed itself leaves an fp32 update out, on all ranks, when the norm is not finite.
        """
        self.model.step()
        norm = math.inf if self.zero.overflow else self.model.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.model.device)

    def warmed_up(self) -> None:
        """Let stages 1 and 2 find the moments of every parameter group.

        DeepSpeed looks once, after it has updated the first group, when the rest have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state as link

        if self.stage < 3:
            shards = self.zero.single_partition_of_fp32_groups
            for parameters, shard in zip(self.zero.bit16_groups, shards, strict=True):
                link(parameters, shard, self.optimizer.state)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and whole weight; all ranks have to take part."""
        for name, parameter in self.plain.named_parameters():
            with _whole(parameter):
                yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, State]]:
        """Yield each parameter's name, weight and moments; all ranks have to take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self.plain.named_parameters():
            state = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            with _whole(parameter):
                yield name, State(parameter.detach().clone(), state)  # the shards go apart again

    def set_moments(self, name: str, values: dict[str, Tensor]) -> None:
        """Put back this rank's shard of one parameter's moments."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self.plain.get_parameter(name)
        for key, value in values.items():
            if self.stage == 3:
                safe_set_local_optimizer_state(parameter, self._shard(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)

    def _shard(self, parameter: Any, value: Tensor) -> Tensor:
        """Cut this rank's shard out of a tensor; the last one is filled up with zeros.

        DeepSpeed's own function for whole tensors forgets the filling and fails on such a shard.
        """
        size = parameter.ds_tensor.numel()
        mine = value.flatten()[self.rank * size : (self.rank + 1) * size]
        return functional.pad(mine, (0, size - mine.numel()))

    @staticmethod
    @torch.no_grad()
    def put(parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a parameter, cut up or not; all ranks have to take part."""
        with _whole(parameter, written=True):
            parameter.copy_(whole)


def _whole(parameter: Any, *, written: bool = False) -> AbstractContextManager[None]:
    """Gather a parameter's shards for a while, if it has any; `written` takes over what is in it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameter, modifier_rank=0 if written else None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The one seam to Accelerate: devices, ranks, precision, collectives.

Everything else is single-process code. Launch configs choose the distribution; nothing here asks
which one it is, except through Accelerate.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast,
    parse_flag_from_env,
)
from torch import Tensor, nn

from toolkit.data.batches import Batch


class Runtime:
    """This process's place among the others."""

    def __init__(self, precision: Literal["bf16", "fp32"], cpu_threads: int | None = None) -> None:
        on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
        if on_cpu:
            torch.set_num_threads(cpu_threads or _fair_threads())
        # cpu=True makes Accelerate choose gloo for several processes; traps 1.1
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            # the loop divides by itself; without this, ACCELERATE_GRADIENT_ACCUMULATION_STEPS would
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` says of the distribution."""
        cuda = self.device.type == "cuda"
        return {
            "world_size": self.world_size,
            "distributed_type": str(self.accelerator.distributed_type).split(".")[-1],
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "cpu_threads": torch.get_num_threads(),
        }

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Put model and optimizer on this process's device and join them with the other ranks'."""
        return self.accelerator.prepare(model, optimizer)

    def unwrap(self, model: nn.Module) -> Any:
        """Return the model without what distribution wrapped around it; autocast stays."""
        return self.accelerator.unwrap_model(model)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return a micro-batch as the model's arguments, on this process's device."""
        mask = batch.attention_mask
        return {
            "input_ids": self._tensor(batch.input_ids),
            "position_ids": self._tensor(batch.position_ids),
            "dropout_keys": self._tensor(batch.dropout_keys),
            "attention_mask": None if mask is None else self._tensor(mask),
            "bounds": None if batch.bounds is None else batch.bounds.tolist(),
        }

    def labels(self, batch: Batch) -> Tensor:
        """Return a micro-batch's labels (R,) on this process's device."""
        return self._tensor(batch.labels)

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @contextmanager
    def micro_step(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Let gradients be summed over the ranks in the last micro-batch of a step only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def backward(self, loss_sum: Tensor, rows: int) -> None:
        """Add the gradient of a micro-batch's summed loss, so that the step's total is a mean.

        Args:
            loss_sum: the loss summed over this micro-batch's rows.
            rows: number of rows of the whole step, over all ranks and micro-batches.
        """
        # DDP averages over ranks where we want the sum
        self.accelerator.backward(loss_sum * (self.world_size / rows))

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Clip the gradient and return its norm before that; NaN on all ranks if on any."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        assert norm is not None
        return float(norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks."""
        return self.accelerator.reduce(tensor.to(self.device), reduction="sum")

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every rank the main process's parameters."""
        if self.world_size > 1:
            for parameter in model.parameters():
                parameter.data.copy_(broadcast(parameter.data))

    def start_wandb(self, project: str, settings: dict[str, Any], config: dict[str, Any]) -> Any:
        """Start Accelerate's W&B tracker; on the main process only.

        Raises:
            Exception: whatever wandb raises, ImportError included.
        """
        import wandb

        quiet = wandb.Settings(init_timeout=15, console="off", quiet=True)
        tracker = WandBTracker(project, settings=quiet, **settings)
        tracker.start()
        tracker.store_init_configuration(config)
        tracker.run.define_metric("*", step_metric="global_step")
        return tracker

    def end(self) -> None:
        """Leave the process group; the caller must not hold the prepared model any more.

        DDP's reducer has to go before the group. If it is the last to hold a gloo group, it tears
        that down with the interpreter's lock held, for which a thread of the group may be waiting:
        the process then hangs at its very end (torch 2.13, about one run in 25).
        """
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def _fair_threads() -> int:
    """Share this machine's usable cores among its processes.

    The launcher sets OMP_NUM_THREADS to the *physical* cores it believes in, or to 1.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // processes)

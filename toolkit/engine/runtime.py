"""The one seam to Accelerate: devices, ranks, precision, collectives.

Everything else is single-process code. Launch configs choose the distribution; what is particular
to whole copies of the model (one process, DDP) is in `replicas`, to DeepSpeed's shards in `zero`.
"""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn

from toolkit.data.batches import Batch
from toolkit.data.hashing import key64
from toolkit.engine.lookups import Lookups, embeddings
from toolkit.engine.meeting import init_method
from toolkit.engine.memory import keep_freed_memory
from toolkit.engine.phases import Phases
from toolkit.engine.replicas import (
    MOMENTS,
    Replicas,
    State,
    set_updates,
    unwrap,
    updates,
    whole_shape,
)
from toolkit.engine.zero import Zero
from toolkit.machine import usable_cores

SPARE_SECONDS = 60
"""How much later than the watchdog, which can say more, the process group gives up by itself."""


class Runtime:
    """This process's place among the others."""

    def __init__(
        self,
        precision: Literal["bf16", "fp32"],
        cpu_threads: int | None = None,
        rank_timeout: float = 120,
    ) -> None:
        on_cpu = is_on_cpu()
        if on_cpu:
            torch.set_num_threads(cpu_threads or _fair_threads())
            keep_freed_memory()
        self.precision = precision
        self.accelerator = _accelerator(on_cpu, rank_timeout)
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not self.is_zero:
            raise RuntimeError("the launch config asks for DeepSpeed, and Accelerate turned it off")
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.phases = Phases(self.rank)

    @property
    def is_zero(self) -> bool:
        """Tell whether DeepSpeed distributes."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` says of the distribution, once the model is prepared."""
        cuda = self.device.type == "cuda"
        return {
            "world_size": self.world_size,
            "distributed_type": str(self.accelerator.distributed_type).split(".")[-1],
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "cpu_threads": torch.get_num_threads(),
            "precision_plan": self.strategy.precision_plan() | {"computation": self._computation()},
        }

    def _computation(self) -> str:
        return (
            "bf16 by autocast, LayerNorm's results too; head and loss fp32"
            if self.precision == "bf16"
            else "fp32"
        )

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float,
        compiled: bool = False,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Put model and optimizer on this process's device and join them with the other ranks'.

        Args:
            model: the model; it computes under autocast from now on, if that is the precision.
            optimizer: its optimizer.
            max_norm: clip the gradient's norm to this; infinity does not clip.
            compiled: the encoder is; then gradients may lie in the memory of a captured CUDA graph.
        """
        self._put_under_autocast(model)
        if self.is_zero:
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            count = sum(whole_shape(parameter).numel() for parameter in model.parameters())
            Zero.configure(settings, max_norm, count)
        assert not (compiled and self.is_zero), "DeepSpeed runs no compiled model"
        lookups = self._lookups(model, compiled)
        with warnings.catch_warnings():  # Accelerate 1.15 has no other name for it yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            prepared, prepared_optimizer = self.accelerator.prepare(model, optimizer)
        parts = self.accelerator, prepared, prepared_optimizer, max_norm
        self.strategy: Replicas | Zero = (
            Zero(*parts) if self.is_zero else Replicas(*parts, lookups, compiled)
        )
        return prepared, prepared_optimizer

    def prepare_to_score(self, model: nn.Module) -> nn.Module:
        """Put a whole model that is not trained any more on this process's device."""
        self._put_under_autocast(model)
        return model.to(self.device)

    def _put_under_autocast(self, model: nn.Module) -> None:
        # Not Accelerate's: under DeepSpeed that would mean bf16 parameters, another arithmetic than
        # DDP's, and DeepSpeed turns autocast from outside its engine off. So it is inside the model
        bf16 = self.precision == "bf16"
        model.forward = torch.autocast(self.device.type, torch.bfloat16, bf16)(model.forward)

    def _lookups(self, model: nn.Module, compiled: bool) -> Lookups:
        """Take over embeddings where that pays and no compiled graph has them in it."""
        pays = self.device.type == "cpu" and not self.is_zero and not compiled
        lookups = Lookups(model, embeddings(model) if pays else {})
        for weight in lookups.weights:  # DDP, which leaves them alone, would have done so
            Replicas.put(weight, self._whole_from_main(weight, weight.detach()))
        return lookups

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return a micro-batch as the model's arguments, on this process's device."""
        arrays = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "dropout_keys": batch.dropout_keys,
            "attention_mask": batch.attention_mask,
            "bounds": batch.bounds,
        }
        if self.device.type == "cuda":  # elsewhere it would only import Inductor, 0.9 s
            # what a captured CUDA graph put out in the micro-batch before is not needed any more
            torch.compiler.cudagraph_mark_step_begin()
        tensors = {name: self.tensor(x) for name, x in arrays.items() if x is not None}
        return tensors | {"longest": batch.longest}

    def labels(self, batch: Batch) -> Tensor:
        """Return a micro-batch's labels (R,) on this process's device."""
        return self.tensor(batch.labels)

    def tensor(self, array: np.ndarray) -> Tensor:
        """Copy an array to this process's device; the host does not wait."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # from pinned memory a copy does not hold up the host
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def seed_step(self, seed: int, step: int) -> None:
        """Make this rank's random draws in a step a function of (seed, step, rank).

        Our dropout draws nothing, but a layer in somebody's head may. So there is no generator
        state to save, and a resumed step draws what it would have drawn.
        """
        draws = int(key64("draws", seed, step, self.rank)) >> 1
        torch.default_generator.manual_seed(draws)  # `torch.manual_seed` takes 0.1 to 0.6 ms
        if self.device.type == "cuda":
            torch.cuda.manual_seed(draws)  # of the current device, which is this rank's

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Let gradients be summed over the ranks in the last micro-batch of a step only."""
        return self.strategy.micro_step(last)

    def backward(self, loss_sum: Tensor, rows: int) -> None:
        """Add the gradient of a micro-batch's summed loss, so that the step's total is a mean.

        Args:
            loss_sum: the loss summed over this micro-batch's rows. If it is not finite, no gradient
                of the step is, on any rank.
            rows: number of rows of the whole step, over all ranks and micro-batches.
        """
        # DDP and DeepSpeed average over ranks where we want the sum; 0 * infinity is NaN
        factor = (1 + 0 * loss_sum.detach()) * (self.world_size / rows)
        self.strategy.backward(loss_sum * factor)

    def can_rejoin(self) -> bool:
        """Tell whether this rank, out of memory, can still run the collectives the others are in."""
        return self.strategy.can_rejoin()

    def spoil(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """Take part in a micro-batch with a gradient that keeps all ranks from taking the step.

        Args:
            forward: computes, with the model it is given, a loss that all parameters play a part in.
        """
        self.strategy.spoil(forward)

    def free_memory(self) -> None:
        """Give back what a failed attempt left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def step(self) -> Tensor:
        """Clip and apply the gradient, unless it is not finite, and forget it.

        Returns:
            The gradient's norm before clipping, the same on all ranks; not finite if not applied. It is
            on the device, which may still be busy with it.
        """
        return self.strategy.step()

    @property
    def begins_ahead(self) -> bool:
        """Tell whether the device computes while the host goes on; DeepSpeed's step waits for it."""
        return self.device.type == "cuda" and not self.is_zero

    def forget_gradient(self) -> None:
        """Drop the gradient of a step that was begun ahead."""
        assert isinstance(self.strategy, Replicas), "nothing is begun ahead under DeepSpeed"
        self.strategy.forget_gradient()

    def fetch(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Begin to copy numbers from the device; return what waits for them, and for nothing later."""
        if self.device.type != "cuda":
            return numbers.tolist
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copy.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[float]:
            copied.synchronize()
            return copy.tolist()

        return wait

    def warm_up(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """Make the optimizer's state, and settle DDP's buckets, with a step that changes nothing.

        DDP deals parameters into other buckets after its first step, and with three ranks or more
        the order of a sum depends on the bucket. Without this, the first step of a resumed run
        would round differently from the same step of a run that was not interrupted.

        Args:
            forward: as for `spoil`.
        """
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = 0.0
        with self.micro_step(last=True):
            self.strategy.backward(0 * forward(self.strategy.model))
        self.strategy.step()
        self.strategy.warmed_up()
        set_updates(self.strategy.optimizer, 0)

    def state(self) -> Iterator[tuple[str, State]]:
        """Yield each parameter's name and whole state; all ranks have to run through it together."""
        return self.strategy.state()

    def updates(self) -> int:
        """Return how many updates AdamW has made, as its bias correction counts them."""
        return updates(self.strategy.optimizer)

    def load_moments(self, moments: dict[str, dict[str, Tensor]], count: int) -> None:
        """Put back AdamW's moments by parameter name, and its count of updates.

        Those of the main process are used; all ranks take part.
        """
        for name, parameter in self.strategy.plain.named_parameters():
            values = {
                key: self._whole_from_main(parameter, moments.get(name, {}).get(key))
                for key in MOMENTS
            }
            self.strategy.set_moments(name, values)
        set_updates(self.strategy.optimizer, count)

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Put whole weights by name into a model; the main process's count, all ranks take part.

        Before `prepare`, or for evaluation only: a sharded optimizer keeps its own copy.
        """
        for name, parameter in unwrap(model).named_parameters():
            whole = self._whole_from_main(parameter, weights.get(name))
            (Zero if self.is_zero else Replicas).put(parameter, whole)

    def _whole_from_main(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor:
        """Give all ranks the main process's tensor of a parameter's whole shape."""
        shape = whole_shape(parameter)
        if self.is_main:
            assert value is not None
            assert value.shape == shape, "the checkpoint is of another model"
            whole = value.to(self.device)
        else:
            whole = torch.empty(shape, device=self.device)
        return broadcast(whole) if self.world_size > 1 else whole

    def whole_weights(self) -> dict[str, Tensor]:
        """Return every weight at full size on the main process, {} elsewhere; all ranks take part.

        They may be the model's own, which the next step changes.
        """
        weights = self.strategy.weights()
        return {name: tensor.cpu() for name, tensor in weights if self.is_main}

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks."""
        return self.accelerator.reduce(tensor.to(self.device), reduction="sum")

    def sums(self, on_device: Tensor, *numbers: float) -> Tensor:
        """Sum a number of the device's and some of the host's over the ranks, in one message."""
        others = self.tensor(np.array(numbers, dtype=np.float64))
        return self.sum(torch.cat([on_device.reshape(1), others]))

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        return self.sum(torch.tensor(float(flag))).item() > 0

    def from_main(self, value: Any) -> Any:
        """Return the main process's value on all ranks."""
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on all of them."""
        return gather_object([value]) if self.world_size > 1 else [value]

    def start_wandb(self, arguments: dict[str, Any], config: dict[str, Any]) -> Any:
        """Start Accelerate's W&B tracker; on the main process only.

        Raises:
            Exception: whatever wandb raises, ImportError included.
        """
        others = {name: value for name, value in arguments.items() if name != "project"}
        tracker = WandBTracker(arguments["project"], **others)
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
        del self.strategy
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def is_on_cpu() -> bool:
    """Tell whether a process that starts here computes on the CPU."""
    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _accelerator(on_cpu: bool, rank_timeout: float) -> Accelerator:
    zero_on_cpu = on_cpu and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if zero_on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        os.environ.pop("ACCELERATE_USE_CPU", None)  # would turn DeepSpeed off without a word, too
        # it compiles its communication with the ninja that pip installed next to this Python
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return Accelerator(
        # cpu=True makes Accelerate choose gloo for several processes, and turns DeepSpeed off
        cpu=on_cpu and not zero_on_cpu,
        mixed_precision="no",  # `prepare` says why
        # the loop divides by itself; without this, ACCELERATE_GRADIENT_ACCUMULATION_STEPS would
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            # no layer of ours changes its buffers
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(
                backend="gloo" if zero_on_cpu else None,
                init_method=init_method(),
                timeout=timedelta(seconds=rank_timeout + SPARE_SECONDS),
            ),
        ],
    )


def _fair_threads() -> int:
    """Share this machine's usable cores among its processes.

    The launcher sets OMP_NUM_THREADS to the *physical* cores it believes in, or to 1.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(usable_cores()) // processes)

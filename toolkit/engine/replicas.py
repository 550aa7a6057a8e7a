"""Every rank holds the whole model and its optimizer: one process, or DDP."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.engine.lookups import Lookups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """One parameter as a checkpoint knows it: whole, fp32, whatever the distribution."""

    weight: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    """AdamW's, by their names in torch."""


def unwrap(model: nn.Module) -> Any:
    """Return a model without what distribution wrapped around it; autocast stays.

    Not Accelerate's (1.15), which imports DeepSpeed wherever it is installed: 0.3 s of each start.
    """
    return getattr(model, "module", model)  # DDP and DeepSpeed's engine call it so


class Replicas:
    """Forward, backward and update of a model that is whole on each rank."""

    def __init__(
        self,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        max_norm: float,
        lookups: Lookups,
        compiled: bool,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.plain: nn.Module = unwrap(model)
        self.parameters = list(self.plain.parameters())  # to look for them takes 0.4 ms
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer
        self.max_norm = max_norm
        self.ready = watch_gradients(self.plain)
        self.lookups = lookups
        self.dense = [p for p in self.parameters if all(p is not w for w in lookups.weights)]
        """Parameters whose whole gradient is read for the norm."""
        self.compiled = compiled

    def precision_plan(self) -> dict[str, str]:
        """Say in which precision what is kept, as found in the objects themselves."""
        kept = dtypes(self.parameters)  # a gradient has its parameter's
        alone = self.accelerator.num_processes == 1
        return {
            "parameters": f"{kept}, whole on each rank",
            "master_weights": "the parameters themselves",
            "gradient_accumulation": kept,
            "gradient_reduction": "none" if alone else kept,
            "optimizer_state": f"{dtypes(moments(self.optimizer))}, whole on each rank",
        }

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Leave gradients on this rank until the last micro-batch of a step."""
        self.ready.clear()
        first = self.compiled and all(parameter.grad is None for parameter in self.parameters)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield
        if first and not last:
            self._own_gradients()

    def _own_gradients(self) -> None:
        """Move gradients from the memory of a CUDA graph, which its next replay writes over."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def can_rejoin(self) -> bool:
        """See `Runtime.can_rejoin`."""
        return True

    def spoil(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """See `Runtime.spoil`.

        DDP sends gradients off in buckets during the backward pass, and the others wait for the
        buckets that are left. So a backward pass that broke off is finished: for the parameters
        that it did not come to, and without DDP's `forward`, which would begin another exchange.
        """
        with frozen(self.ready):
            self.backward(math.nan * forward(self.plain if self.ready else self.model))

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient."""
        self.accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip, update if the norm is finite, forget the gradient; return the norm before clipping.

        The host does not wait for the norm: the fused AdamW reads on the device what it is to divide
        gradients by, and whether to leave the update out (torch 2.13; meant for `GradScaler`).
        """
        if self.lookups.weights and self.accelerator.num_processes > 1:
            total = partial(self.accelerator.reduce, reduction="sum")
            self.lookups.average(total, self.accelerator.num_processes)
        gradients = [p.grad for p in self.dense if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients + self.lookups.touched_gradients())
        optimizer: Any = self.optimizer
        # 1e-6 as in torch's own clipping, and DeepSpeed's
        optimizer.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1)
        optimizer.found_inf = norm.isfinite().logical_not().float()
        optimizer.step()
        self.forget_gradient()
        return norm

    def forget_gradient(self) -> None:
        """Begin anew."""
        self.optimizer.zero_grad()
        self.lookups.clear()

    def warmed_up(self) -> None:
        """Nothing to do."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and whole weight."""
        for name, parameter in self.plain.named_parameters():
            yield name, parameter.detach()

    def state(self) -> Iterator[tuple[str, State]]:
        """Yield each parameter's name, weight and moments."""
        for name, parameter in self.plain.named_parameters():
            state = self.optimizer.state[parameter]
            yield name, State(parameter.detach(), {key: state[key] for key in MOMENTS})

    def set_moments(self, name: str, values: dict[str, Tensor]) -> None:
        """Put back one parameter's moments, whole."""
        state = self.optimizer.state[self.plain.get_parameter(name)]
        for key, value in values.items():
            state[key].copy_(value)

    @staticmethod
    @torch.no_grad()
    def put(parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a parameter."""
        parameter.copy_(whole)


def watch_gradients(model: nn.Module) -> set[Tensor]:
    """Return a set that takes up each parameter as soon as a backward pass has come to it."""
    ready: set[Tensor] = set()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(ready.add)
    return ready


@contextmanager
def frozen(parameters: set[Tensor]) -> Iterator[None]:
    """Keep these parameters out of a graph."""
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape; one that ZeRO-3 has cut up looks empty and keeps it elsewhere."""
    return getattr(parameter, "ds_shape", parameter.shape)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates an AdamW has made: the same for all of its tensors."""
    counts = {int(state["step"]) for state in optimizer.state.values()}
    assert len(counts) == 1, f"parameters with different numbers of updates: {counts}"
    return counts.pop()


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Make an AdamW believe that it has made so many updates."""
    for state in optimizer.state.values():
        state["step"].fill_(count)


def moments(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield an AdamW's moments."""
    return (state[key] for state in optimizer.state.values() for key in MOMENTS)


def dtypes(tensors: Iterable[Tensor]) -> str:
    """Return the names of the types that occur."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))

"""Embeddings on a CPU: a step looks up few of their rows; only these are cleared, measured and sent.

Otherwise each backward pass makes a gradient of the whole vocabulary, half of MiniLM's parameters: 47 MB
that are mapped and cleared page by page, and that DDP sends to the other ranks (tests/bench/NOTES.md).
AdamW goes over every row all the same: moments and weight decay ask for it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Lookups:
    """Gradients of embeddings that stay from step to step: zero, but for the rows that were touched."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Embedding]) -> None:
        """Take over these layers' gradients; DDP, which is built later, leaves them alone.

        A backward pass that breaks off in one of them cannot be finished as `Replicas.spoil` does, since
        DDP believes that it is over. No CPU runs out of memory that way: it has no such error.
        """
        self.weights = [model.get_parameter(f"{name}.weight") for name in layers]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.sizes = [len(weight) for weight in self.weights]
        self.touched = torch.zeros(sum(self.sizes))
        """(rows of all layers,), not 0 where there is a gradient."""
        for layer, touched in zip(layers.values(), self.touched.split(self.sizes), strict=True):
            layer.sparse = True  # what a backward pass makes is added to the dense gradient at once
            layer.weight.register_hook(partial(_note, touched))
        # torch 2.13 has no public name for it
        leave_alone = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        leave_alone(model, [f"{name}.weight" for name in layers])
        self.clear()

    def average(self, total: Callable[[Tensor], Tensor], world_size: int) -> None:
        """Average the gradients over the ranks; `total` sums a tensor over them."""
        self.touched.copy_(total(self.touched))
        rows = self._rows()
        mine = self._at(rows)
        means = total(torch.cat([part.flatten() for part in mine])) / world_size
        parts = means.split([part.numel() for part in mine])
        for gradient, places, part in zip(self.gradients, rows, parts, strict=True):
            gradient[places] = part.view(len(places), gradient.shape[1])  # perhaps no rows

    def touched_gradients(self) -> list[Tensor]:
        """Return copies of the rows that a step touched, of each layer; all others are zero."""
        return self._at(self._rows())

    def clear(self) -> None:
        """Clear the gradients, and give them back to the weights if an optimizer took them away."""
        for weight, gradient, rows in zip(self.weights, self.gradients, self._rows(), strict=True):
            gradient[rows] = 0
            weight.grad = gradient
        self.touched.zero_()

    def _at(self, rows: list[Tensor]) -> list[Tensor]:
        return [gradient[places] for gradient, places in zip(self.gradients, rows, strict=True)]

    def _rows(self) -> list[Tensor]:
        """Return the numbers of the touched rows of each layer."""
        return [part.nonzero().flatten() for part in self.touched.split(self.sizes)]


def embeddings(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return a model's embeddings by name; of those that share a weight, the first."""
    found: dict[Tensor, tuple[str, nn.Embedding]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found.setdefault(module.weight, (name, module))
    return dict(found.values())


def _note(touched: Tensor, gradient: Tensor) -> None:
    """Note which rows a backward pass has a gradient of."""
    if gradient.is_sparse:
        touched[gradient._indices()[0]] = 1
    else:  # the weight was used otherwise, too: in a head, say
        touched.fill_(1)

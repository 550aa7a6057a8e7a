"""Dropout whose mask belongs to the review, not to the micro-batch that it happens to be in.

`nn.Dropout` draws from one stream in the order of computation, so another number of ranks or
micro-batches, packing or padding, or a resumed run would drop other units. Here the mask is a hash
of (seed, slot of the review, place of the token, dropout layer, unit). So the gradient of a step is
the same for every split of its rows with dropout on, there is no generator state to save, and on CPU
it takes a quarter of the time, because hashing runs on all cores and vector units.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class DropoutKeys:
    """The keys of the micro-batch that is being computed, shared by layers that see the same tokens.

    `value` is int32 and, with a dimension more, broadcasts to the activations; or None, which means
    ordinary dropout (the model is used outside our training loop).
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None


class KeyedDropout(nn.Module):
    """Dropout with a mask that is a function of the keys."""

    def __init__(self, p: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.keys = keys

    def forward(self, x: Tensor) -> Tensor:
        """Zero each unit with probability p and scale the rest by 1 / (1 - p); x is (..., D)."""
        if not self.training or self.p == 0:
            return x
        if self.keys.value is None:
            return functional.dropout(x, self.p)
        kept = keep_mask(self.keys.value, x.shape[-1], self.p, self.layer)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Show p and the layer number."""
        return f"p={self.p}, layer={self.layer}"


def keep_mask(keys: Tensor, units: int, p: float, layer: int) -> Tensor:
    """Return an int32 mask (..., units) that is 1 with probability 1 - p, else 0.

    Multiply, xor-shift, multiply, from MurmurHash3's finaliser (Appleby, 2011), in wrapping int32
    arithmetic, because torch has no unsigned one. `&` undoes the sign that `>>` drags along.
    """
    layer_keys = keys ^ _int32((layer + 1) * 0x9E3779B9)
    # In int64: C++ may take it that a signed product never overflows. Of unit numbers, whose range it
    # knows, g++ did, and a compiled backward pass had another mask than its forward (torch 2.13). And of
    # `~`, or Inductor takes the product for an index, which Triton wants in int32 (torch 2.11)
    numbers = ~torch.arange(units, dtype=torch.int64, device=keys.device)  # -1, -2, ...
    bits = layer_keys.unsqueeze(-1) ^ (numbers * -0x85EBCA6B).to(torch.int32)
    bits *= _int32(0xCC9E2D51)
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _int32(0xC2B2AE35)
    # not booleans: a CPU takes as long to make and convert them as for all of the above (torch 2.13)
    return bits.ge_(_int32(round(p * 2**32) - 2**31))


def _int32(number: int) -> int:
    """Wrap an integer to the range of int32."""
    return (number + 2**31) % 2**32 - 2**31


def replace_dropout(module: nn.Module, keys: DropoutKeys, first_layer: int = 0) -> int:
    """Put `KeyedDropout` in the place of every `nn.Dropout`, numbered in order of definition.

    Returns:
        The next free layer number.
    """
    layer = first_layer
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, KeyedDropout(child.p, layer, keys))
                layer += 1
    return layer


def share_keys(module: nn.Module, keys: DropoutKeys) -> None:
    """Let the `KeyedDropout` of a module read other keys; their numbers stay."""
    for layer in module.modules():
        if isinstance(layer, KeyedDropout):
            layer.keys = keys

"""Self-attention of a micro-batch, packed or padded, behind one name.

`transformers` looks attention functions up by name. Ours runs packed tokens sequence by sequence,
without padding, and hands padded ones to its stock "sdpa": the reference.

Shapes: B rows (1 when packed), T tokens of a row, H heads, K units a head; `bounds` holds S + 1 places
that cut the packed tokens into S sequences.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "toolkit"


def register() -> None:
    """Make the attention function known to `transformers`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    attention_mask: Tensor | None,
    bounds: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence.

    Returns:
        (B, T, H, K) and, in the place of the weights, None.
    """
    if bounds is None:
        return sdpa_attention_forward(
            module, query_BHTK, key_BHTK, value_BHTK, attention_mask, **options
        )
    return _attend_packed(query_BHTK, key_BHTK, value_BHTK, bounds, **options)


def _attend_packed(
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    bounds: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    assert dropout == 0.0, "attention dropout has no packed back end; the classifier turns it off"
    inputs = [query_1HTK, key_1HTK, value_1HTK]
    on_cpu = query_1HTK.device.type == "cpu"
    if on_cpu and query_1HTK.requires_grad:
        # the CPU's backward pass in bf16 takes four times as long as in fp32 (torch 2.13, NOTES.md)
        inputs = [x.float() for x in inputs]
    # autocast would undo that, and there is nothing else here for it to do
    with torch.autocast(query_1HTK.device.type, enabled=False):
        outputs = [
            functional.scaled_dot_product_attention(query, key, value, scale=scaling)
            for query, key, value in zip(*(_cut(x, bounds) for x in inputs), strict=True)
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _cut(tensor_1HTK: Tensor, bounds: list[int]) -> tuple[Tensor, ...]:
    sizes = [stop - start for start, stop in pairwise(bounds)]
    return tensor_1HTK.split(sizes, dim=2)

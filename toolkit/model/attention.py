"""Self-attention of a micro-batch, packed or padded, behind one name.

`transformers` looks attention functions up by name. Ours keeps packed tokens within their sequence,
without padding, and hands padded ones to its stock "sdpa": the reference. Packed tokens take one
flash-attention kernel on a GPU, which needs bf16, and one call for each sequence elsewhere.

Shapes: B rows (1 when packed), T tokens of a row, H heads, K units a head; `bounds` (S + 1,) int32
cuts the packed tokens into S sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
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
    bounds: Tensor | None = None,
    longest: int = 0,
    one_query: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence.

    Args:
        module: the layer that asks.
        query_BHTK: queries; keys and values alike.
        key_BHTK: keys.
        value_BHTK: values.
        attention_mask: of padded rows.
        bounds: of packed ones; None means padded.
        longest: tokens that no packed sequence exceeds.
        one_query: each packed sequence has one query, not one for each token.
        dropout: of attention weights; packed back ends have none.
        scaling: of the products of queries and keys; None means 1 / sqrt(K).
        options: for the padded reference.

    Returns:
        (B, T, H, K), with `one_query` (1, S, H, K), zeros for empty sequences; and None in the place of
        the weights.
    """
    inputs = query_BHTK, key_BHTK, value_BHTK
    if bounds is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, *inputs, attention_mask, **options)
    assert dropout == 0.0, "attention dropout has no packed back end; the classifier turns it off"
    query_bounds, most = bounds, longest
    if one_query:
        query_bounds, most = torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device), 1
    if has_varlen(query_BHTK):
        # a view: the gradient of x[0] would be copied into zeros
        query_THK, key_THK, value_THK = (x.squeeze(0).transpose(0, 1) for x in inputs)
        cuts: Any = (query_bounds, bounds, most, longest)
        packed_THK: Any = varlen_attn(query_THK, key_THK, value_THK, *cuts, scale=scaling)
        return packed_THK.unsqueeze(0), None
    return _one_by_one(*inputs, query_bounds, bounds, scaling), None


def has_varlen(query: Tensor) -> bool:
    """Tell whether the kernel for sequences of several lengths takes this."""
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    return query.is_cuda and fits and query.shape[-1] <= 256 and _has_flash()


def has_fast_packing(device: torch.device, precision: str) -> bool:
    """Tell whether packed tokens are faster than padded ones."""
    return device.type == "cpu" or (device.type == "cuda" and precision == "bf16" and _has_flash())


@torch.compiler.assume_constant_result
def _has_flash() -> bool:
    """Tell whether the GPU (from Ampere on) and this build of torch have flash attention."""
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and torch.cuda.get_device_capability() >= (8, 0)


@torch.compiler.disable  # each batch has other lengths
def _one_by_one(
    query_1HNK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    query_bounds: Tensor,
    bounds: Tensor,
    scaling: float | None,
) -> Tensor:
    """Attend in one sequence after the other; return (1, N, H, K) for N queries."""
    # one token after the other, as in memory: splitting, and joining gradients, is then one copy
    inputs = [x.transpose(1, 2) for x in (query_1HNK, key_1HTK, value_1HTK)]
    if query_1HNK.device.type == "cpu" and query_1HNK.requires_grad:
        # the CPU's backward pass in bf16 takes four times as long as in fp32 (torch 2.13, NOTES.md)
        inputs = [x.float() for x in inputs]
    sizes = [x.diff().tolist() for x in (query_bounds, bounds, bounds)]
    pieces = zip(*(x.split(cut, dim=1) for x, cut in zip(inputs, sizes, strict=True)), strict=True)
    # autocast would undo that, and there is nothing else here for it to do
    with torch.autocast(query_1HNK.device.type, enabled=False):
        outputs = [_attend_whole(query, key, value, scaling) for query, key, value in pieces]
    return torch.cat(outputs, dim=1)


def _attend_whole(
    query_1NHK: Tensor, key_1LHK: Tensor, value_1LHK: Tensor, scaling: float | None
) -> Tensor:
    """Attend in one sequence; return (1, N, H, K)."""
    if not key_1LHK.shape[1]:  # an empty one is filling
        return torch.zeros_like(query_1NHK)
    query, key, value = (x.transpose(1, 2) for x in (query_1NHK, key_1LHK, value_1LHK))
    attended = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2)

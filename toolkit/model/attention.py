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
        dropout: of attention weights; packed back ends have none, and the classifier turns it off.
        scaling: of the products of queries and keys; None means 1 / sqrt(K).
        options: for the padded reference.

    Returns:
        (B, T, H, K) and, in the place of the weights, None.
    """
    inputs = query_BHTK, key_BHTK, value_BHTK
    if bounds is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, *inputs, attention_mask, **options)
    return _attend_packed(*inputs, (bounds, bounds), (longest, longest), scaling), None


def attend_from_first(
    query_1HSK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
) -> Tensor:
    """Attend from the first token of each packed sequence to all of its tokens.

    Args are those of `attend`, but for one query in the place of a sequence's; no attention dropout.

    Returns:
        (1, S, H, K), zeros for empty sequences.
    """
    # what a kernel makes of a query without keys must not matter, nor what it calls its gradient
    empty_S11 = (bounds.diff() == 0)[:, None, None]
    query_1HSK = query_1HSK.masked_fill(empty_S11.transpose(0, 1), 0)
    singles = torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)
    inputs = query_1HSK, key_1HTK, value_1HTK
    attended_1SHK = _attend_packed(*inputs, (singles, bounds), (1, longest), scaling)
    return attended_1SHK.masked_fill(empty_S11, 0)


def _attend_packed(
    query_1HNK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
) -> Tensor:
    """Attend within each sequence; `bounds` and `longest` are of N queries, and of T keys.

    Returns:
        (1, N, H, K).
    """
    if not has_varlen(query_1HNK):
        return _one_by_one(query_1HNK, key_1HTK, value_1HTK, bounds, scaling)
    # a view: the gradient of x[0] would be copied into zeros
    inputs: Any = [x.squeeze(0).transpose(0, 1) for x in (query_1HNK, key_1HTK, value_1HTK)]
    cuts: Any = *bounds, *longest
    attended_NHK: Any = varlen_attn(*inputs, *cuts, scale=scaling)
    return attended_NHK.unsqueeze(0)


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
    bounds: tuple[Tensor, Tensor],
    scaling: float | None,
) -> Tensor:
    """Attend in one sequence after the other; return (1, N, H, K)."""
    # one token after the other, as in memory: splitting, and joining gradients, is then one copy
    inputs = [x.transpose(1, 2) for x in (query_1HNK, key_1HTK, value_1HTK)]
    if query_1HNK.device.type == "cpu" and query_1HNK.requires_grad:
        # the CPU's backward pass in bf16 takes four times as long as in fp32 (torch 2.13, NOTES.md)
        inputs = [x.float() for x in inputs]
    of_queries, of_keys = (x.diff().tolist() for x in bounds)
    sizes = of_queries, of_keys, of_keys
    pieces = zip(*(x.split(cut, dim=1) for x, cut in zip(inputs, sizes, strict=True)), strict=True)
    # autocast would undo that, and there is nothing else here for it to do
    with torch.autocast(query_1HNK.device.type, enabled=False):
        outputs = [_attend_whole(query, key, value, scaling) for query, key, value in pieces]
    return torch.cat(outputs, dim=1).to(query_1HNK.dtype)


def _attend_whole(
    query_1NHK: Tensor, key_1LHK: Tensor, value_1LHK: Tensor, scaling: float | None
) -> Tensor:
    """Attend in one sequence; return (1, N, H, K)."""
    if not key_1LHK.shape[1]:  # an empty one is filling
        return torch.zeros_like(query_1NHK)
    query, key, value = (x.transpose(1, 2) for x in (query_1NHK, key_1LHK, value_1LHK))
    attended = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2)

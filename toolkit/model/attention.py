"""Self-attention within each sequence of a packed micro-batch; padded ones go through BERT's own.

A GPU has kernels for that (`toolkit.model.kernels`), which need bf16; a CPU takes matrix products where
all tokens are queries (`toolkit.model.products`). Else one sequence follows the other through torch's
attention.

Shapes: S rows of L tokens each, or T packed tokens in S sequences, N queries; D features, P parts
of a product, H heads, K units a head. `bounds` (S + 1,) int32 cuts the packed tokens into sequences.
"""

import functools
import os
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.bert.modeling_bert import BertSelfAttention

from toolkit.model import products


class PackedSelfAttention(BertSelfAttention):
    """BERT's self-attention, for packed tokens, too; without dropout of attention weights there."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        bounds: Tensor | None = None,
        longest: int = 0,
        first_1SD: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Attend within each sequence.

        Args:
            hidden_states: (S, L, D), or (1, T, D) when packed.
            attention_mask: of padded rows.
            rest: for the stock layer.
            bounds: of packed tokens; None means padded.
            longest: tokens that no packed sequence exceeds.
            first_1SD: the first token of each packed sequence, if only these are queries.
            options: for the stock layer.

        Returns:
            As the stock layer, or (1, N, D) and None in the place of the weights.
        """
        if bounds is None:
            return super().forward(hidden_states, attention_mask, *rest, **options)
        if first_1SD is None:
            first_SHK = None
            joint_TPHK = self._project(hidden_states, self.query, self.key, self.value)
        else:
            first_SHK = self.query(first_1SD)[0].unflatten(-1, (self.num_attention_heads, -1))
            joint_TPHK = self._project(hidden_states, self.key, self.value)
        attended_NHK = attend(first_SHK, joint_TPHK, bounds, longest, self.scaling)
        return attended_NHK.flatten(1).unsqueeze(0), None

    def _project(self, x_1TD: Tensor, *layers: nn.Linear) -> Tensor:
        """Apply layers as one product, which is faster than one each; return (T, P, H, K).

        The layers' weights are read, the layers not called: hooks on them see padded batches only.
        """
        # cast first: half of the bytes to copy, and ZeRO-3 keeps the joint weight as it is handed over
        weight = torch.cat([layer.weight.to(x_1TD.dtype) for layer in layers])
        bias = torch.cat([layer.bias.to(x_1TD.dtype) for layer in layers])
        shape = len(layers), self.num_attention_heads, self.attention_head_size
        return functional.linear(x_1TD.squeeze(0), weight, bias).unflatten(-1, shape)


def attend(
    first_SHK: Tensor | None, joint_TPHK: Tensor, bounds: Tensor, longest: int, scaling: float
) -> Tensor:
    """Attend within each packed sequence.

    Args:
        first_SHK: the query of each sequence's first token, if there are no others.
        joint_TPHK: keys and values, and before them the queries of all tokens, if there are these.
        bounds: of the sequences.
        longest: tokens that no sequence exceeds.
        scaling: of the products of queries and keys.

    Returns:
        (N, H, K), N being S or T; zeros for empty sequences.
    """
    assert longest > 0, (
        "what no sequence exceeds has to be said: a kernel's blocks are counted by it"
    )
    query_bounds, most = bounds, longest
    if first_SHK is not None:
        query_bounds, most = torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device), 1
    if has_kernel(joint_TPHK):
        from toolkit.model import kernels  # needs triton, which comes with torch for GPUs only

        inputs = first_SHK, joint_TPHK, query_bounds, bounds
        attended_NHK, _ = kernels.attend(*inputs, most, longest, scaling)
        return attended_NHK
    if first_SHK is None and joint_TPHK.device.type == "cpu":
        return products.attend(joint_TPHK, bounds, scaling)
    *queries, key, value = joint_TPHK.unbind(1)
    query = queries[0] if first_SHK is None else first_SHK
    return _one_by_one(query, key, value, query_bounds, bounds, scaling)


def has_kernel(x: Tensor) -> bool:
    """Tell whether there is a kernel for this."""
    return x.is_cuda and x.dtype == torch.bfloat16 and _gpu_has_kernels()


def has_fast_packing(device: torch.device, precision: str) -> bool:
    """Tell whether packed tokens are faster than padded ones."""
    return device.type == "cpu" or (
        device.type == "cuda" and precision == "bf16" and _gpu_has_kernels()
    )


@torch.compiler.assume_constant_result
def _gpu_has_kernels() -> bool:
    """Tell whether the GPU knows bf16 (from Ampere on), and Triton can compile for it here."""
    return torch.cuda.get_device_capability() >= (8, 0) and _triton_compiles()


@functools.cache  # every layer asks
def _triton_compiles() -> bool:
    return find_spec("triton") is not None and bool(c_compiler())


def c_compiler() -> str | None:
    """Return the compiler that Triton makes its way into the driver with: an empty CC, too (3.8)."""
    return os.environ.get("CC", which("gcc") or which("clang"))


@torch.compiler.disable  # each batch has other lengths
def _one_by_one(
    query_NHK: Tensor,
    key_THK: Tensor,
    value_THK: Tensor,
    query_bounds: Tensor,
    bounds: Tensor,
    scaling: float,
) -> Tensor:
    """Attend in one sequence after the other; return (N, H, K)."""
    inputs = [query_NHK, key_THK, value_THK]
    if key_THK.device.type == "cpu" and key_THK.requires_grad:
        # queries of first tokens; in bf16 the backward pass takes far longer than in fp32 (torch 2.13)
        inputs = [x.float() for x in inputs]
    of_queries, of_keys = query_bounds.diff().tolist(), bounds.diff().tolist()
    sizes = of_queries, of_keys, of_keys
    pieces = zip(*(x.split(cut) for x, cut in zip(inputs, sizes, strict=True)), strict=True)
    # autocast would undo that, and there is nothing else here for it to do
    with torch.autocast(key_THK.device.type, enabled=False):
        outputs = [_attend_whole(query, key, value, scaling) for query, key, value in pieces]
    return torch.cat(outputs).to(query_NHK.dtype)


def _attend_whole(query_NHK: Tensor, key_LHK: Tensor, value_LHK: Tensor, scaling: float) -> Tensor:
    """Attend in one sequence; return (N, H, K)."""
    if not len(key_LHK):  # an empty one is filling
        return torch.zeros_like(query_NHK)
    query, key, value = (x.transpose(0, 1)[None] for x in (query_NHK, key_LHK, value_LHK))
    attended_1HNK = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended_1HNK[0].transpose(0, 1)

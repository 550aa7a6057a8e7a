"""Attention and its gradient as matrix products, of all heads of a few packed sequences at a time.

On a CPU torch's own takes at least 1.5 times as long, forward and backward (torch 2.13,
tests/bench/NOTES.md). Weights are kept for the backward pass, one for each head and pair of tokens of a
review; torch's keeps fp32 copies of its inputs and works weights out again. Without a backward pass, on a
CPU with tiles for bf16, torch's is faster on the same groups. All is in the inputs' precision; within
products and softmax, sums are in fp32.

Shapes: T packed tokens, S sequences, N of a group, W tokens of its longest, filling included; P parts of
a product, H heads, K units a head, M = N x H.
"""

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

UNIT, UNIT_OF_BF16 = 8, 32
"""Tokens that widths are multiples of. In bf16 sizes have to be few: oneDNN makes kernels for each size
of a product, which take 2.5 ms once and 4 MB for good (torch 2.13)."""

GROUP_SEQUENCES, GROUP_TOKENS = 4, 512
"""A group has at most so many sequences, or as many as have so many tokens together, filling included, if
these are more."""


class Group:
    """Sequences of like length, which make one product."""

    def __init__(self, sequences: list[slice], width: int) -> None:
        """Group these of the pack.

        Args:
            sequences: N of them.
            width: W, which none exceeds.
        """
        self.sequences, self.width = sequences, width
        self.lengths = [sequence.stop - sequence.start for sequence in sequences]

    def gather(self, x_TPHK: Tensor) -> Tensor:
        """Return (P, M, W, K) of the sequences, zeros behind each."""
        _, parts, heads, units = x_TPHK.shape
        x_PNHWK = x_TPHK.new_zeros(parts, len(self.sequences), heads, self.width, units)
        for n, (sequence, length) in enumerate(zip(self.sequences, self.lengths, strict=True)):
            x_PNHWK[:, n, :, :length] = x_TPHK[sequence].permute(1, 2, 0, 3)
        return x_PNHWK.flatten(1, 2)

    def scatter(self, x_PMWK: Tensor, into_TPHK: Tensor) -> None:
        """Copy the sequences back to their places in the pack."""
        x_PNHWK = x_PMWK.unflatten(1, (len(self.sequences), -1))
        for n, (sequence, length) in enumerate(zip(self.sequences, self.lengths, strict=True)):
            into_TPHK[sequence] = x_PNHWK[:, n, :, :length].permute(2, 0, 1, 3)

    def hide_filling(self, scores_MWW: Tensor) -> None:
        """Give no weight to the tokens behind each sequence."""
        scores_NHWW = scores_MWW.unflatten(0, (len(self.sequences), -1))
        for n, length in enumerate(self.lengths):
            scores_NHWW[n, :, :, length:] = float("-inf")


def groups_of(bounds: Tensor, x_TPHK: Tensor) -> list[Group]:
    """Return all sequences that are not empty.

    Args:
        bounds: (S + 1,) cuts the packed tokens into sequences.
        x_TPHK: what will be grouped; its precision tells what widths are multiples of.
    """
    edges = bounds.tolist()
    assert (edges[0], edges[-1]) == (0, len(x_TPHK)), "each token has to belong to a sequence"
    unit = UNIT_OF_BF16 if x_TPHK.dtype == torch.bfloat16 else UNIT
    alike = defaultdict(list)
    for start, end in pairwise(edges):
        if start < end:
            alike[-(-(end - start) // unit) * unit].append(slice(start, end))
    groups = []
    for width, sequences in alike.items():
        most = max(GROUP_SEQUENCES, GROUP_TOKENS // width)
        groups += [Group(sequences[i : i + most], width) for i in range(0, len(sequences), most)]
    return groups


class Products(torch.autograd.Function):
    """Self-attention of packed tokens."""

    @staticmethod
    def forward(ctx: Any, joint_T3HK: Tensor, bounds: Tensor, scaling: float) -> Tensor:
        """Attend within each sequence; return (T, H, K).

        Args:
            ctx: autograd's.
            joint_T3HK: queries, keys and values.
            bounds: (S + 1,) cuts the packed tokens into sequences.
            scaling: of the products of queries and keys.
        """
        ctx.groups = groups_of(bounds, joint_T3HK)
        ctx.scaling, ctx.shape = scaling, joint_T3HK.shape
        attended_T1HK = torch.empty_like(joint_T3HK[:, :1])
        kept = []
        for group in ctx.groups:
            query, key, value = joint_3MWK = group.gather(joint_T3HK)
            # scaled before it is rounded
            scores_MWW = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scaling)
            group.hide_filling(scores_MWW)
            weight_MWW = scores_MWW.softmax(-1)
            group.scatter(torch.bmm(weight_MWW, value).unsqueeze(0), attended_T1HK)
            if ctx.needs_input_grad[0]:
                kept += [joint_3MWK, weight_MWW]
        ctx.save_for_backward(*kept)
        return attended_T1HK.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of `joint_T3HK`."""
        [of_attended_THK] = gradients
        of_joint_T3HK = of_attended_THK.new_empty(ctx.shape)
        kept = ctx.saved_tensors
        for group, joint_3MWK, weight_MWW in zip(ctx.groups, kept[::2], kept[1::2], strict=True):
            query, key, value = joint_3MWK
            # zeros for filling, so that it adds nothing to any gradient
            [of_attended] = group.gather(of_attended_THK.unsqueeze(1))
            of_weight = torch.bmm(of_attended, value.mT)
            # torch 2.13 has no public name for it
            of_scores = torch._softmax_backward_data(of_weight, weight_MWW, -1, weight_MWW.dtype)
            of_query, of_key, of_value = of_joint_3MWK = torch.empty_like(joint_3MWK)
            torch.bmm(of_scores, key, out=of_query)
            torch.bmm(of_scores.mT, query, out=of_key)
            torch.bmm(weight_MWW.mT, of_attended, out=of_value)
            of_joint_3MWK[:2] *= ctx.scaling
            group.scatter(of_joint_3MWK, of_joint_T3HK)
        return of_joint_T3HK, None, None


def without_weights(joint_T3HK: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """Attend as `Products.forward`, through torch's attention, which no backward pass should follow."""
    attended_T1HK = torch.empty_like(joint_T3HK[:, :1])
    for group in groups_of(bounds, joint_T3HK):
        query, key, value = group.gather(joint_T3HK).unflatten(1, (len(group.sequences), -1))
        exists_NW = torch.arange(group.width) < torch.tensor(group.lengths).unsqueeze(1)
        attended_NHWK = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=exists_NW[:, None, None], scale=scaling
        )
        group.scatter(attended_NHWK.flatten(0, 1).unsqueeze(0), attended_T1HK)
    return attended_T1HK.squeeze(1)


def has_tiles(x: Tensor) -> bool:
    """Tell whether this CPU has tiles (AMX) for products of this precision."""
    return x.dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False)


@torch.compiler.disable  # each batch has other lengths
def attend(joint_T3HK: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """Attend within each sequence, see `Products.forward`, in the inputs' precision."""
    # autocast would round fp32 inputs
    with torch.autocast(joint_T3HK.device.type, enabled=False):
        if has_tiles(joint_T3HK) and not joint_T3HK.requires_grad:
            return without_weights(joint_T3HK, bounds, scaling)
        return Products.apply(joint_T3HK, bounds, scaling)

"""Attention and its gradient as matrix products, all heads of one packed sequence at a time.

On a CPU torch's own takes longer with its backward pass: half as long again for reviews of 100 tokens in
bf16, three times as long for 512 (torch 2.13, tests/bench/NOTES.md). Weights are kept for the backward
pass, a number for each head and two tokens of a review; torch's keeps fp32 copies of its inputs and works
weights out again. Scores and their softmax are in fp32, all else is in the precision of the inputs.

Shapes: T packed tokens, S sequences, L tokens of one, W of the window around it; H heads, K units a head.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

UNIT = 16
"""Tokens: oneDNN makes a kernel for each size of a product in bf16, so sizes have to be few."""


class Window(NamedTuple):
    """A sequence, and the few more tokens around it that make its size one of few."""

    sequence: slice
    """Of the pack."""
    tokens: slice
    """Of the pack, too."""
    inside: slice
    """The sequence, of the window's tokens. All others have weights of zero."""


def windows(bounds: Tensor, tokens: int) -> list[Window]:
    """Return the windows of all sequences that are not empty.

    Args:
        bounds: (S + 1,) cuts the packed tokens into sequences.
        tokens: of the pack.
    """
    edges = bounds.tolist()
    assert (edges[0], edges[-1]) == (0, tokens), "each token has to belong to a sequence"
    found = []
    for start, end in pairwise(edges):
        if start == end:
            continue
        width = min(-(-(end - start) // UNIT) * UNIT, tokens)
        first = min(start, tokens - width)
        inside = slice(start - first, end - first)
        found.append(Window(slice(start, end), slice(first, first + width), inside))
    return found


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
        query, key, value = joint_T3HK.unbind(1)
        query, key = query.float() * scaling, key.float()
        attended_THK = joint_T3HK.new_empty(value.shape)
        ctx.windows, ctx.scaling = windows(bounds, len(joint_T3HK)), scaling
        weights = []
        for sequence, tokens, inside in ctx.windows:
            scores_HLL = torch.bmm(_heads(query[sequence]), _heads(key[sequence]).mT)
            window_HWK = _heads(value[tokens])
            width = window_HWK.shape[1]
            weight_HWW = window_HWK.new_zeros(len(window_HWK), width, width)
            weight_HWW[:, inside, inside] = scores_HLL.softmax(-1)
            attended_THK[sequence] = _heads(torch.bmm(weight_HWW, window_HWK))[inside]
            weights.append(weight_HWW)
        ctx.save_for_backward(joint_T3HK, *weights)
        return attended_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of `joint_T3HK`."""
        [of_attended_THK] = gradients
        joint_T3HK, *weights = ctx.saved_tensors
        of_joint = torch.empty_like(joint_T3HK)
        for (sequence, tokens, inside), weight_HWW in zip(ctx.windows, weights, strict=True):
            query, key, value = (_heads(part) for part in joint_T3HK[tokens].unbind(1))
            attended = _heads(of_attended_THK[tokens])
            of_value = torch.bmm(weight_HWW.mT, attended)
            of_weight = torch.bmm(attended, value.mT)
            # torch 2.13 has no public name for it
            of_scores = torch._softmax_backward_data(of_weight, weight_HWW, -1, weight_HWW.dtype)
            of_scores *= ctx.scaling
            of_query, of_key = torch.bmm(of_scores, key), torch.bmm(of_scores.mT, query)
            for part, whole in enumerate((of_query, of_key, of_value)):
                of_joint[sequence, part] = _heads(whole)[inside]
        return of_joint, None, None


def _heads(x: Tensor) -> Tensor:
    """Exchange tokens and heads."""
    return x.transpose(0, 1)


@torch.compiler.disable  # each batch has other lengths
def attend(joint_T3HK: Tensor, bounds: Tensor, scaling: float) -> Tensor:
    """Attend within each sequence, see `Products.forward`, in the inputs' precision."""
    # autocast would compute scores in bf16
    with torch.autocast(joint_T3HK.device.type, enabled=False):
        return Products.apply(joint_T3HK, bounds, scaling)

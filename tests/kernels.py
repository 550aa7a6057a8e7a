"""Attention over sequences of several lengths, in the place of the kernel that only GPUs have."""

from itertools import pairwise

import torch
from torch.nn.attention import varlen


def attend_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    **__: object,
) -> torch.Tensor:
    """What the kernel on a GPU computes, and what it expects, in a few lines."""
    for bounds, longest, tokens in ((cu_seq_q, max_q, query), (cu_seq_k, max_k, key)):
        assert bounds.dtype == torch.int32
        assert (int(bounds[0]), int(bounds[-1])) == (0, len(tokens)), "each is in a sequence"
        sizes = bounds.diff()
        assert int(sizes.min()) >= 0
        assert int(sizes.max()) <= longest
    out = torch.full_like(query, torch.nan)  # whatever there was, where a query has no keys
    for mine, theirs in sequences(cu_seq_q, cu_seq_k):
        scores = torch.einsum("thk,shk->hts", query[mine], key[theirs]) / query.shape[2] ** 0.5
        if scores.shape[2]:
            out[mine] = torch.einsum("hts,shk->thk", scores.softmax(-1), value[theirs])
    return out


def sequences(cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor) -> list[tuple[slice, slice]]:
    """Return where queries and keys of each sequence are."""
    return [
        (slice(*mine), slice(*theirs))
        for mine, theirs in zip(
            pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
        )
    ]


def kernel_of_ours() -> None:
    """Give torch's operator, which has a kernel for GPUs only, one for CPUs, forward and backward."""

    def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *_, **__):
        out = attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, *_, **__):
        scale = query.shape[-1] ** -0.5
        gradients = [torch.full_like(x, torch.nan) for x in (query, key, value)]
        for mine, theirs in sequences(cu_seq_q, cu_seq_k):
            q, k, v, g = query[mine], key[theirs], value[theirs], grad[mine]
            weights = (torch.einsum("thk,shk->hts", q, k) * scale).softmax(-1)
            inner = weights * torch.einsum("thk,shk->hts", g, v)
            inner = (inner - weights * inner.sum(-1, keepdim=True)) * scale
            if len(k):
                gradients[0][mine] = torch.einsum("hts,shk->thk", inner, k)
            gradients[1][theirs] = torch.einsum("hts,thk->shk", inner, q)
            gradients[2][theirs] = torch.einsum("hts,thk->shk", weights, g)
        return tuple(gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)

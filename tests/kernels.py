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
    *_: object,
    **__: object,
) -> torch.Tensor:
    """What the kernel on a GPU computes, and what it expects, in a few lines."""
    total, _, width = query.shape
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == total, "every token is in a sequence"
    out = torch.zeros_like(query)
    for start, stop in pairwise(bounds):
        assert 0 <= stop - start <= max_q
        scores = torch.einsum("thk,shk->hts", query[start:stop], key[start:stop]) / width**0.5
        out[start:stop] = torch.einsum("hts,shk->thk", scores.softmax(-1), value[start:stop])
    return out


def kernel_of_ours() -> None:
    """Give torch's operator, which has a kernel for GPUs only, one for CPUs, forward and backward."""

    def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *_, **__):
        out = attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q)
        return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, *_, **__):
        scale = query.shape[-1] ** -0.5
        gradients = [torch.zeros_like(x) for x in (query, key, value)]
        for start, stop in pairwise(cu_seq_q.tolist()):
            q, k, v, g = (x[start:stop] for x in (query, key, value, grad))
            weights = (torch.einsum("thk,shk->hts", q, k) * scale).softmax(-1)
            inner = weights * torch.einsum("thk,shk->hts", g, v)
            inner = (inner - weights * inner.sum(-1, keepdim=True)) * scale
            terms = (
                ("hts,shk->thk", inner, k),
                ("hts,thk->shk", inner, q),
                ("hts,thk->shk", weights, g),
            )
            for target, (equation, left, right) in zip(gradients, terms, strict=True):
                target[start:stop] = torch.einsum(equation, left, right)
        return tuple(gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)

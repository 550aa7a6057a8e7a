"""Attention within short sequences that lie one after the other, as kernels for a GPU.

Torch's own (`varlen_attn`: flash attention 2) is made for long sequences: its backward pass has an fp32
copy of the queries' gradient, which several blocks add to. Here a block of rows belongs to one program,
which adds up its gradients in registers: as queries, then as keys and values. That computes weights
twice, and leaves nothing to share: no copy, no atomic addition, and the same result in every run. With
reviews of a hundred tokens both passes take half of the time (tests/bench/NOTES.md).

The method is flash attention's (Dao et al., 2022; Dao, 2023): weights are computed block by block where
they are needed, and again in the backward pass, from the logarithm of each query's sum.

Shapes: N queries and T keys of S sequences, H heads, K units a head. `joint` (T, P, H, K) holds what one
product made of each token: keys and values (P = 2), and queries before them (P = 3; else `query` does).
In kernels names of one letter are blocks, (rows, K), and d is for the gradient of what follows; `lse`
is the logarithm (to base 2) of a query's sum in softmax, `delta` the sum over units of its result times
the gradient of that.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = {"BLOCK": 64, "STEP": 16, "num_warps": 4, "num_stages": 3}
"""Rows that a program owns, and that it meets at a time: the fastest of several dozen for reviews on an
H100, whose matrix unit takes 64 rows or more."""
LOG2_E = 1.4426950408889634


@triton.jit
def _tile(first, end, head, STRIDE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return offsets of a block of one head's rows, and which exist: (BLOCK, K to a power of 2)."""
    WIDTH: tl.constexpr = max(16, triton.next_power_of_2(UNITS))
    rows = first + tl.arange(0, BLOCK)
    units = tl.arange(0, WIDTH)
    places = rows.to(tl.int64)[:, None] * STRIDE + (head * UNITS + units)[None, :]
    return places, (rows < end)[:, None] & (units < UNITS)[None, :]


@triton.jit
def _load(
    pointer, first, end, head, STRIDE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr
):
    places, exist = _tile(first, end, head, STRIDE, UNITS, BLOCK)
    return tl.load(pointer + places, exist, 0.0)


@triton.jit
def _store(
    pointer, x, first, end, head, STRIDE: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr
):
    places, exist = _tile(first, end, head, STRIDE, UNITS, BLOCK)
    tl.store(pointer + places, x.to(pointer.dtype.element_ty), exist)


@triton.jit
def _product(a, b, total=None):
    """a @ b + total in fp32, of fp32 operands without tf32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _place(query_bounds, key_bounds, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the program's block and head, and the ends of its sequence's queries and of its keys."""
    # blocks of one sequence run side by side: they read the same rows
    program = tl.program_id(0)
    block, head, number = program % BLOCKS, program // BLOCKS % HEADS, program // (BLOCKS * HEADS)
    begin, end = tl.load(query_bounds + number), tl.load(query_bounds + number + 1)
    return block, head, begin, end, tl.load(key_bounds + number), tl.load(key_bounds + number + 1)


@triton.jit
def attend_kernel(
    query, key, value, out, lse, query_bounds, key_bounds, num_queries, scale,
    QUERY: tl.constexpr, JOINT: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute a block of queries' results, and the logarithm (to base 2) of the sums in their softmax."""
    block, head, begin, end, begin_key, end_key = _place(query_bounds, key_bounds, HEADS, BLOCKS)
    first = begin + block * BLOCK
    if first >= end:
        return
    q = _load(query, first, end, head, QUERY, UNITS, BLOCK)
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, q.shape[1]], tl.float32)
    for at in range(begin_key, end_key, STEP):
        k = _load(key, at, end_key, head, JOINT, UNITS, STEP)
        v = _load(value, at, end_key, head, JOINT, UNITS, STEP)
        exists = (at + tl.arange(0, STEP) < end_key)[None, :]
        scores = tl.where(exists, _product(q, tl.trans(k)) * scale, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        total = total * shrink + tl.sum(weights, 1)
        o = _product(weights.to(v.dtype), v, o * shrink[:, None])
        row_max = new_max
    total = tl.where(total == 0, 1.0, total)  # of a query without keys
    rows = first + tl.arange(0, BLOCK)
    tl.store(lse + head * num_queries + rows, row_max + tl.log2(total), rows < end)
    _store(out, o / total[:, None], first, end, head, OUT, UNITS, BLOCK)


@triton.jit
def gradients_kernel(
    query, key, value, out, lse, dout, dquery, dkey, dvalue, query_bounds, key_bounds,
    num_queries, scale, scaling,
    QUERY: tl.constexpr, JOINT: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of rows, as queries and as keys and values."""
    block, head, begin, end, begin_key, end_key = _place(query_bounds, key_bounds, HEADS, BLOCKS)
    first = begin + block * BLOCK
    if first < end:
        rows = first + tl.arange(0, BLOCK)
        q = _load(query, first, end, head, QUERY, UNITS, BLOCK)
        o = _load(out, first, end, head, OUT, UNITS, BLOCK)
        do = _load(dout, first, end, head, OUT, UNITS, BLOCK)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        row_lse = tl.load(lse + head * num_queries + rows, rows < end, 0.0)
        dq = tl.zeros([BLOCK, q.shape[1]], tl.float32)
        for at in range(begin_key, end_key, STEP):
            k = _load(key, at, end_key, head, JOINT, UNITS, STEP)
            v = _load(value, at, end_key, head, JOINT, UNITS, STEP)
            exists = (at + tl.arange(0, STEP) < end_key)[None, :]
            scores = tl.where(exists, _product(q, tl.trans(k)) * scale, float("-inf"))
            weights = tl.exp2(scores - row_lse[:, None])
            dscores = weights * (_product(do, tl.trans(v)) - delta[:, None])
            dq = _product(dscores.to(k.dtype), k, dq)
        _store(dquery, dq * scaling, first, end, head, QUERY, UNITS, BLOCK)

    first = begin_key + block * BLOCK
    if first < end_key:
        k = _load(key, first, end_key, head, JOINT, UNITS, BLOCK)
        v = _load(value, first, end_key, head, JOINT, UNITS, BLOCK)
        dk = tl.zeros([BLOCK, k.shape[1]], tl.float32)
        dv = tl.zeros([BLOCK, k.shape[1]], tl.float32)
        # rows behind the end are zeros in `do`, too, and add nothing; weights lie (keys, queries)
        for at in range(begin, end, STEP):
            rows = at + tl.arange(0, STEP)
            q = _load(query, at, end, head, QUERY, UNITS, STEP)
            o = _load(out, at, end, head, OUT, UNITS, STEP)
            do = _load(dout, at, end, head, OUT, UNITS, STEP)
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            row_lse = tl.load(lse + head * num_queries + rows, rows < end, 0.0)
            weights = tl.exp2(_product(k, tl.trans(q)) * scale - row_lse[None, :])
            dv = _product(weights.to(do.dtype), do, dv)
            dscores = weights * (_product(v, tl.trans(do)) - delta[None, :])
            dk = _product(dscores.to(q.dtype), q, dk)
        _store(dkey, dk * scaling, first, end_key, head, JOINT, UNITS, BLOCK)
        _store(dvalue, dv, first, end_key, head, JOINT, UNITS, BLOCK)


@torch.library.custom_op("toolkit::attend", mutates_args=())
def attend(
    query: Tensor | None,
    joint: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attend within each sequence.

    Args:
        query: (N, H, K), if queries are not in `joint`.
        joint: (T, P, H, K), keys, values and perhaps queries before them.
        query_bounds: (S + 1,) int32, cuts queries into sequences.
        key_bounds: cuts keys.
        longest_query: queries that no sequence exceeds.
        longest_key: keys that no sequence exceeds; for the backward pass.
        scaling: of the products of queries and keys.

    Returns:
        (N, H, K), zeros for queries without keys; and (H, N), logarithms of softmax's sums.
    """
    out, lse = _empty(query, joint)
    inputs = query, joint, query_bounds, key_bounds
    rows, scale = len(out), scaling * LOG2_E
    _launch(attend_kernel, longest_query, *inputs, out=out, lse=lse, num_queries=rows, scale=scale)
    return out, lse


@attend.register_fake
def _empty(query: Tensor | None, joint: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, units = joint.shape
    rows = tokens if query is None else query.shape[0]  # `len` would make it a constant
    return joint.new_empty(rows, heads, units), joint.new_empty(heads, rows, dtype=torch.float32)


@torch.library.custom_op("toolkit::attend_backward", mutates_args=())
def _attend_backward(
    query: Tensor | None,
    joint: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return gradients of `query`, empty if there is none, and of `joint`."""
    of_query, of_joint = _empty_gradients(query, joint)
    dquery, dkey, dvalue = _parts(None if query is None else of_query, of_joint)
    inputs = query, joint, query_bounds, key_bounds
    _launch(
        gradients_kernel,
        max(longest_query, longest_key),
        *inputs,
        out=out.contiguous(),
        lse=lse.contiguous(),
        dout=gradient.contiguous(),
        dquery=dquery,
        dkey=dkey,
        dvalue=dvalue,
        num_queries=len(out),
        scale=scaling * LOG2_E,
        scaling=scaling,
    )
    return of_query, of_joint


@_attend_backward.register_fake
def _empty_gradients(query: Tensor | None, joint: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return joint.new_empty(0) if query is None else torch.empty_like(query), torch.empty_like(joint)


def _launch(
    kernel: Any,
    longest: int,
    query: Tensor | None,
    joint: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    **rest: Tensor | float,
) -> None:
    """Start a program for each block, head and sequence; the kernel gets `rest` besides its inputs."""
    assert all(x.is_contiguous() for x in (query, joint) if x is not None), "`_tile` counts on it"
    _, parts, heads, units = joint.shape
    sequences = len(key_bounds) - 1
    blocks = triton.cdiv(longest, TILES["BLOCK"])
    row = heads * units
    layout = {
        "QUERY": parts * row if query is None else row,
        "JOINT": parts * row,
        "OUT": row,
        "UNITS": units,
        "HEADS": heads,
        "BLOCKS": blocks,
    }
    inputs = dict(zip(("query", "key", "value"), _parts(query, joint), strict=True))
    inputs |= {"query_bounds": query_bounds, "key_bounds": key_bounds}
    with torch.cuda.device_of(joint):
        kernel[(sequences * heads * blocks,)](**inputs, **rest, **layout, **TILES)


def _parts(query: Tensor | None, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as views."""
    *queries, key, value = joint.unbind(1)
    return queries[0] if query is None else query, key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output)


@partial(attend.register_autograd, setup_context=_keep)
def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query = ctx.saved_tensors[0]
    dquery, djoint = _attend_backward(*ctx.saved_tensors, gradient, *ctx.settings)
    return None if query is None else dquery, djoint, *[None] * 5

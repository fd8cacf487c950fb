"""Tiles of queries by keys: what the Triton kernels of attention share.

The query heads that share a key head are in the same tile of queries, so that a key is loaded once for all of them.
Positions are 32-bit and counted within a response; where a response begins is a 64-bit pointer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels import attention_checks
from vgpo_kernels.triton_kernels.common import INTERPRETED, slot_range, token_range

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SHOWN = tl.constexpr(1)  # label of the keys that attention_heatmap returns
LABELS = 2  # of keys that take part in it
MOST_KEYS = 2**30  # of which twice as many positions differ in what they see

# Triton's interpreter keeps bf16 as integers, and multiplies those.
WIDEN_PRODUCTS = tl.constexpr(INTERPRETED)


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """Matrix product in fp32."""
    if WIDEN_PRODUCTS:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def query_rows(
    positions,  # [B, T] or [N], or None: the last keys
    first,  # the tile's first query, counted from its response's first
    begin,  # flat index of that one
    query_count,  # of the response
    key_count,
    window,
    longer,  # by how much the window is longer than all keys
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile's rows: queries times the heads that share a key head.

    Returns, for each row, the index of its query in the response, the head within the group, whether there is such a
    query, and its position (-1: it sees no key).
    """
    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    inside = (row // GROUP < ROWS // GROUP) & (token < query_count)
    if positions is None:
        position = token + (key_count - query_count)
    else:
        given = tl.maximum(tl.load(positions + begin + token, mask=inside, other=-1), -1)
        # Behind the last key: the nearest position there that sees the same keys, which fits into 32 bits.
        oldest = tl.minimum(tl.maximum(given - longer - tl.maximum(window, 1) + 1, 0), key_count)
        behind = tl.where(window == 0, key_count, oldest + window) - 1
        position = tl.where(given < key_count, given, behind).to(tl.int32)
    return token, row % GROUP, inside, tl.where(inside, position, -1)


@triton.jit
def query_tile(
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    batch,
    queries,  # T or N
    keys,  # S or M
    window,  # 0: none
    longer,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COMPONENTS: tl.constexpr,
):
    """What a program knows of its tile of queries, before it goes over the keys of their response.

    Returns:
        The response, the flat indices of its first query and first key, and its number of keys; what
        :func:`query_rows` says of each row; the queries ``[ROWS, COMPONENTS]``; and where the response's keys (of this
        key head) and segments begin.

    """
    slot, key_head = tl.program_id(0), tl.program_id(1)
    response, first, end = slot_range(boundaries, slot, batch, queries, ROWS // GROUP)
    begin, _ = token_range(boundaries, response, queries)
    key_begin, key_end = token_range(key_boundaries, response, keys)
    key_count = (key_end - key_begin).to(tl.int32)
    token, member, inside, position = query_rows(
        positions,
        (first - begin).to(tl.int32),
        begin,
        (end - begin).to(tl.int32),
        key_count,
        window,
        longer,
        GROUP,
        ROWS,
    )
    q = of_response(q, boundaries, response, begin, q_batch_stride, q_token_stride)
    q += (key_head * GROUP).to(tl.int64) * q_head_stride
    k = of_response(k, key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += key_head.to(tl.int64) * k_head_stride
    query = load_rows(q, token, member, q_head_stride, q_token_stride, inside, SIZE, COMPONENTS)
    segments += key_begin
    return response, begin, key_begin, key_count, token, member, inside, position, query, k, segments


@triton.jit
def of_response(tensor, boundaries, response, begin, batch_stride, token_stride):
    """Where the elements of a response begin in q or k."""
    return tensor + (response.to(tl.int64) * batch_stride if boundaries is None else begin * token_stride)


@triton.jit
def of_head(tensor, boundaries, response, begin, head, heads, length):
    """Where the elements of a response and head begin in an array ``[B, H, L]``, packed ``[H, L]``."""
    if boundaries is None:
        start = tensor + (response.to(tl.int64) * heads + head) * length
    else:
        start = tensor + head.to(tl.int64) * length + begin
    return start


@triton.jit
def load_rows(tensor, token, member, head_stride, token_stride, inside, SIZE: tl.constexpr, COMPONENTS: tl.constexpr):
    """Load the rows of a tile, ``[ROWS, COMPONENTS]``, with zeros beyond their ``SIZE`` components."""
    component = tl.arange(0, COMPONENTS)
    row = tensor + token.to(tl.int64) * token_stride + member.to(tl.int64) * head_stride
    return tl.load(row[:, None] + component[None, :], mask=inside[:, None] & (component < SIZE)[None, :], other=0.0)


@triton.jit
def load_keys(k, key, token_stride, wanted, SIZE: tl.constexpr, COMPONENTS: tl.constexpr):
    """Load keys as columns, ``[COMPONENTS, KEYS]``.

    An ignored key may hold NaN, and a mask on the scores would not keep it out of a gradient. So it is not loaded.
    """
    component = tl.arange(0, COMPONENTS)
    column = k + key.to(tl.int64) * token_stride
    return tl.load(column[None, :] + component[:, None], mask=wanted[None, :] & (component < SIZE)[:, None], other=0.0)


@triton.jit
def of_mass(mass, boundaries, response, begin, head, heads, queries, num_segments):
    """Where the masses of a response and head begin in ``[B, H, T, G]``, packed ``[H, N, G]``."""
    return mass + (of_head(0, boundaries, response, begin, head, heads, queries)) * num_segments


@triton.jit
def visible_keys(counted, key, position, window):
    """Which keys each query sees, ``[ROWS, KEYS]``: counted ones up to its position, in the window if there is one."""
    distance = position[:, None] - key[None, :]
    return counted[None, :] & (distance >= 0) & ((window == 0) | (distance < window))


@triton.jit
def key_extent(position, window, key_count):
    """The keys [first, last) that some query of a tile may see."""
    last = tl.minimum(tl.max(position) + 1, key_count)
    oldest = tl.min(tl.where(position >= 0, position, 2147483647)) - window + 1
    return tl.where(window == 0, 0, tl.maximum(oldest, 0)), last


class Tile(NamedTuple):
    """Rows (queries and heads) by keys that a program holds at a time, and the warps that hold them."""

    rows: int
    keys: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """What every kernel needs to know of q and k.

    Attributes:
        tile: Rows by keys, with at least one query of every head of a group.
        batch: B.
        queries: T of a padded batch, N of a packed one.
        keys: S or M.
        heads: Hq.
        key_heads: Hk.
        window: The window, at most as long as all keys, and by how much it is longer.
        strides: Of a response, a head and a token, of q and then of k.
        constants: Keyword arguments of every kernel.

    """

    tile: Tile
    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    window: tuple[int, int]
    strides: tuple[int, ...]
    constants: dict[str, Any]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of a response, a head and a token; of a packed tensor the first is not used."""
    if tensor.dim() == 4:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return 0, tensor.stride(1), tensor.stride(0)


def plan(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, scale: float, window: int, tile: Tile) -> Launch:
    """Describe a launch over q and k."""
    packed = cu_seqlens_q is not None
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[-1]
    keys = k.shape[0 if packed else 2]
    if keys > MOST_KEYS:
        raise ValueError(f"k must have at most {MOST_KEYS} keys, got {keys}")
    attention_checks.attention_scale(scale, size)
    narrow = min(window, max(keys, 1))
    rows = max(tile.rows, triton.next_power_of_2(heads // key_heads))
    return Launch(
        tile._replace(rows=rows),
        q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        q.shape[0 if packed else 2],
        keys,
        heads,
        key_heads,
        (narrow, window - narrow),
        (*strides_of(q), *strides_of(k)),
        {
            "SIZE": size,
            "GROUP": heads // key_heads,
            "ROWS": rows,
            "KEYS": tile.keys,
            "COMPONENTS": max(triton.next_power_of_2(size), 16),
            # Products of fp32 inputs are fp32: tf32 would be hardly more precise than bf16 inputs.
            "PRECISION": "ieee" if q.dtype == torch.float32 else None,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )


def by_head(q: Tensor, tokens_of: Tensor) -> tuple[int, ...]:
    """Shape of one number per head of q and token of ``tokens_of``: ``[B, H, L]``, packed ``[H, L]``."""
    if q.dim() == 4:
        return q.shape[0], q.shape[1], tokens_of.shape[2]
    return q.shape[1], tokens_of.shape[0]

"""Attention by segment and by key in Triton: tiles of queries stream over the keys they see, as in flash attention.

The query heads that share a key head fill a tile of queries together, so that a key is loaded once for all of them and
never repeated. A tile's scores live in registers; what leaves is one number a query and segment, or one a key.

Gradients recompute the probabilities p from the saved log-sum-exp: a score's gradient is ``p (g - <p, g>)``, g being
the gradient of p. A first kernel walks over the keys of a tile of queries and gives q's gradient, with ``<p, g>``; a
second walks over the queries of a block of keys and gives k's. Neither adds to memory that another program writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.triton_kernels.common import (
    INTERPRETED,
    device_guard,
    num_slots,
    operator,
    slot_range,
    token_range,
    wrap_triton,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SHOWN = tl.constexpr(1)  # label of the keys that attention_heatmap returns
LABELS = 2  # of keys that take part in it

# Triton's interpreter keeps bf16 as integers, and multiplies those.
WIDEN_PRODUCTS = tl.constexpr(INTERPRETED)

# Segments whose sums a program of the forward pass holds; more of them take more programs.
SEGMENT_BLOCK = 16


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """Matrix product in fp32."""
    if WIDEN_PRODUCTS:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def query_rows(
    boundaries,  # cu_seqlens_q [B + 1] or None
    key_boundaries,  # cu_seqlens_k [B + 1] or None
    positions,  # [B, T] or [N], or None: the last keys
    response,
    first,  # flat index of the tile's first query
    end,  # of the query behind the last
    queries,  # T or N
    keys,  # S or M
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile's rows: queries times the heads that share a key head.

    Flat index of each row's query, that of its response's first query, the head within the group, whether the row is
    one, and the position of its query (-1: sees nothing).
    """
    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    inside = (row // GROUP < ROWS // GROUP) & (token < end)
    begin, behind = token_range(boundaries, response, queries)
    if positions is None:
        key_begin, key_end = token_range(key_boundaries, response, keys)
        position = token - behind + (key_end - key_begin)
    else:
        position = tl.load(positions + token, mask=inside, other=-1)
    position = tl.where(inside, position, -1).to(tl.int32)
    return token, begin, row % GROUP, inside, position


@triton.jit
def response_offset(boundaries, response, begin, batch_stride, token_stride):
    """Where the elements of a response begin in q or k."""
    return response.to(tl.int64) * batch_stride if boundaries is None else begin * token_stride


@triton.jit
def by_head(boundaries, response, begin, head, heads, length):
    """Index of a response's first token in arrays ``[B, H, L]``, packed ``[H, L]``."""
    if boundaries is None:
        index = (response.to(tl.int64) * heads + head) * length
    else:
        index = head.to(tl.int64) * length + begin
    return index


@triton.jit
def visible_keys(segment, key, position, window, num_segments):
    """Which keys each query sees, ``[queries, keys]``: counted ones up to its position, in the window if there is."""
    counted = (segment >= 0) & (segment < num_segments)
    distance = position[:, None] - key[None, :]
    return counted[None, :] & (distance >= 0) & ((window == 0) | (distance < window))


@triton.jit
def key_extent(position, window, key_count, KEYS: tl.constexpr):
    """The keys [first, last) that some query of a tile may see, the first a multiple of KEYS."""
    last = tl.minimum(tl.max(position) + 1, key_count)
    oldest = tl.min(tl.where(position >= 0, position, 2147483647)) - window + 1
    first = tl.where(window == 0, 0, tl.maximum(oldest, 0)) // KEYS * KEYS
    return first, last


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window"])
def mass_kernel(
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    mass,  # out: [B, Hq, T, G] or [Hq, N, G]
    lse,  # out: [B, Hq, T] or [Hq, N]
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    batch,
    queries,  # T or N
    keys,  # S or M
    num_segments,  # G
    scale,
    window,  # 0: none
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, key_head = tl.program_id(0), tl.program_id(1)
    first_segment = tl.program_id(2) * SEGMENTS
    response, first, end = slot_range(boundaries, slot, batch, queries, ROWS // GROUP)
    token, begin, member, inside, position = query_rows(
        boundaries, key_boundaries, positions, response, first, end, queries, keys, GROUP, ROWS
    )
    head = key_head * GROUP + member
    component = tl.arange(0, COMPONENTS)
    q += response_offset(boundaries, response, begin, q_batch_stride, q_token_stride)
    row = q + head.to(tl.int64) * q_head_stride + (token - begin) * q_token_stride
    query = tl.load(row[:, None] + component[None, :], mask=inside[:, None] & (component < SIZE)[None, :], other=0.0)

    key_begin, key_end = token_range(key_boundaries, response, keys)
    k += response_offset(key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += key_head.to(tl.int64) * k_head_stride
    column = tl.arange(0, SEGMENTS)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, SEGMENTS), tl.float32)
    start_key, last_key = key_extent(position, window, (key_end - key_begin).to(tl.int32), KEYS)
    for start in range(start_key, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        segment = tl.load(segments + key_begin + key, mask=key < last_key, other=-1)
        counted = (segment >= 0) & (segment < num_segments)
        # An ignored key may hold NaN, which a mask on the scores would let through: it is not even loaded.
        keys_tile = tl.load(
            k + key.to(tl.int64)[None, :] * k_token_stride + component[:, None],
            mask=counted[None, :] & (component < SIZE)[:, None],
            other=0.0,
        )
        score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
        score = tl.where(visible_keys(segment, key, position, window, num_segments), score, -float("inf"))
        raised = tl.maximum(largest, tl.max(score, 1))
        # A row that has seen no key yet has no largest score, and its sums are zero whatever they are scaled by.
        origin = tl.where(raised == -float("inf"), 0.0, raised)
        shrink = tl.exp2(largest - origin)
        part = tl.exp2(score - origin[:, None])
        total = total * shrink + tl.sum(part, 1)
        sums = sums * shrink[:, None]
        # Neighbouring keys mostly share a segment, and then this is one step.
        lowest = tl.maximum(tl.min(tl.where(counted, segment, 2147483647)), first_segment)
        highest = tl.minimum(tl.max(tl.where(counted, segment, -1)), first_segment + SEGMENTS - 1)
        for g in range(lowest, highest + 1):
            share = tl.sum(tl.where((segment == g)[None, :], part, 0.0), 1)
            sums += tl.where((column == g - first_segment)[None, :], share[:, None], 0.0)
        largest = raised

    index = by_head(boundaries, response, begin, head, tl.num_programs(1) * GROUP, queries) + (token - begin)
    # A row that sees no key has sums of zero: its masses stay zero, and its log-sum-exp -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    stored = inside[:, None] & (first_segment + column < num_segments)[None, :]
    tl.store(
        mass + index[:, None] * num_segments + first_segment + column[None, :],
        tl.div_rn(sums, divisor[:, None]),
        mask=stored,
    )
    if first_segment == 0:
        tl.store(lse + index, (largest + tl.log2(divisor)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "window"])
def heat_kernel(
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    labels,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N]
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    heat,  # out: [B, Hq, S] or [Hq, M]
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    batch,
    queries,  # T or N
    keys,  # S or M
    scale,
    window,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    response, first_key, key_end = slot_range(key_boundaries, slot, batch, keys, KEYS)
    key_begin, _ = token_range(key_boundaries, response, keys)
    key = (first_key - key_begin).to(tl.int32) + tl.arange(0, KEYS)
    inside_key = first_key + tl.arange(0, KEYS) < key_end
    label = tl.load(labels + first_key + tl.arange(0, KEYS), mask=inside_key, other=-1)
    shown = label == SHOWN
    component = tl.arange(0, COMPONENTS)
    k += response_offset(key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += (head // GROUP).to(tl.int64) * k_head_stride
    keys_tile = tl.load(
        k + key.to(tl.int64)[None, :] * k_token_stride + component[:, None],
        mask=shown[None, :] & (component < SIZE)[:, None],
        other=0.0,
    )
    begin, end = token_range(boundaries, response, queries)
    q += response_offset(boundaries, response, begin, q_batch_stride, q_token_stride)
    q += head.to(tl.int64) * q_head_stride
    heads = tl.num_programs(1)
    lse += by_head(boundaries, response, begin, head, heads, queries)
    received = tl.zeros((KEYS,), tl.float32)
    # Nothing is to be found out in a block without a key to show.
    for start in range(begin, tl.where(tl.max(shown.to(tl.int32)) > 0, end, begin), ROWS):
        token, _, _, inside, position = query_rows(
            boundaries, key_boundaries, positions, response, start, end, queries, keys, 1, ROWS
        )
        weight = tl.load(weights + token, mask=inside, other=0.0)
        position = tl.where(weight == 0.0, -1, position)
        if tl.max(position) >= tl.min(key):
            local = token - begin
            query = tl.load(
                q + local[:, None] * q_token_stride + component[None, :],
                mask=inside[:, None] & (component < SIZE)[None, :],
                other=0.0,
            )
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(label, key, position, window, 2) & shown[None, :]
            logarithm = tl.load(lse + local, mask=inside, other=0.0) * LOG2_E
            probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
            received += tl.sum(probability * weight[:, None], 0)
    index = by_head(key_boundaries, response, key_begin, head, heads, keys)
    tl.store(heat + index + key, received, mask=inside_key)


@triton.jit
def probability_slopes(
    grad,  # of mass [.., G], or of the heat map
    grad_index,  # of a row's numbers in it
    segment,
    key,
    weight,  # of a row's query in the heat map
    counted,
    num_segments,
    HEATMAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of a tile of probabilities, ``[ROWS, KEYS]``."""
    if HEATMAP:
        shown = segment == SHOWN
        own = tl.load(
            grad + grad_index[:, None] + key[None, :], mask=shown[None, :] & (grad_index >= 0)[:, None], other=0.0
        )
        slope = own * weight[:, None]
    else:
        slope = tl.zeros((ROWS, KEYS), tl.float32)
        lowest = tl.min(tl.where(counted, segment, 2147483647))
        highest = tl.max(tl.where(counted, segment, -1))
        for g in range(lowest, highest + 1):
            column = tl.load(grad + grad_index * num_segments + g, mask=grad_index >= 0, other=0.0)
            slope = tl.where((segment == g)[None, :], column[:, None], slope)
    return slope


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window"])
def query_gradient_kernel(
    grad,  # of mass [B, Hq, T, G], or of the heat map [B, Hq, S]; packed without B
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N], or None without HEATMAP
    mass,  # [B, Hq, T, G] or [Hq, N, G], or None with HEATMAP
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    means,  # out: <p, g> of each query and head, lse's shape
    grad_q,  # out: [B, Hq, T, d] or [N, Hq, d], strided as q's shape
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    grad_batch_stride,
    grad_head_stride,
    grad_token_stride,
    batch,
    queries,  # T or N
    keys,  # S or M
    num_segments,  # G
    scale,
    window,
    HEATMAP: tl.constexpr,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, key_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    response, first, end = slot_range(boundaries, slot, batch, queries, ROWS // GROUP)
    token, begin, member, inside, position = query_rows(
        boundaries, key_boundaries, positions, response, first, end, queries, keys, GROUP, ROWS
    )
    head = key_head * GROUP + member
    local = token - begin
    component = tl.arange(0, COMPONENTS)
    held = inside[:, None] & (component < SIZE)[None, :]
    q += response_offset(boundaries, response, begin, q_batch_stride, q_token_stride)
    row = q + head.to(tl.int64) * q_head_stride + local * q_token_stride
    query = tl.load(row[:, None] + component[None, :], mask=held, other=0.0)
    index = by_head(boundaries, response, begin, head, heads, queries) + local
    logarithm = tl.load(lse + index, mask=inside, other=0.0) * LOG2_E

    key_begin, key_end = token_range(key_boundaries, response, keys)
    k += response_offset(key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += key_head.to(tl.int64) * k_head_stride
    start_key, last_key = key_extent(position, window, (key_end - key_begin).to(tl.int32), KEYS)

    mean = tl.zeros((ROWS,), tl.float32)
    if HEATMAP:
        weight = tl.load(weights + token, mask=inside, other=0.0)
        grad_index = by_head(key_boundaries, response, key_begin, head, heads, keys)
        for start in range(start_key, last_key, KEYS):
            key = start + tl.arange(0, KEYS)
            segment = tl.load(segments + key_begin + key, mask=key < last_key, other=-1)
            shown = segment == SHOWN
            # Only keys that are shown have a gradient of their own.
            if tl.max(shown.to(tl.int32)) > 0:
                keys_tile = tl.load(
                    k + key.to(tl.int64)[None, :] * k_token_stride + component[:, None],
                    mask=shown[None, :] & (component < SIZE)[:, None],
                    other=0.0,
                )
                score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
                visible = visible_keys(segment, key, position, window, num_segments) & shown[None, :]
                probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
                slope = probability_slopes(
                    grad,
                    tl.where(inside, grad_index, -1),
                    segment,
                    key,
                    weight,
                    shown,
                    num_segments,
                    HEATMAP,
                    ROWS,
                    KEYS,
                )
                mean += tl.sum(probability * slope, 1)
    else:
        weight = mean
        grad_index = index
        for g in range(num_segments):
            share = tl.load(mass + index * num_segments + g, mask=inside, other=0.0)
            mean += share * tl.load(grad + index * num_segments + g, mask=inside, other=0.0)
    tl.store(means + index, mean, mask=inside)

    gradient = tl.zeros((ROWS, COMPONENTS), tl.float32)
    for start in range(start_key, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        segment = tl.load(segments + key_begin + key, mask=key < last_key, other=-1)
        counted = (segment >= 0) & (segment < num_segments)
        keys_tile = tl.load(
            k + key.to(tl.int64)[:, None] * k_token_stride + component[None, :],
            mask=counted[:, None] & (component < SIZE)[None, :],
            other=0.0,
        )
        score = product(query, tl.trans(keys_tile), PRECISION) * (scale * LOG2_E)
        visible = visible_keys(segment, key, position, window, num_segments)
        probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
        slope = probability_slopes(
            grad, tl.where(inside, grad_index, -1), segment, key, weight, counted, num_segments, HEATMAP, ROWS, KEYS
        )
        score_slope = probability * (slope - mean[:, None]) * scale
        gradient += product(score_slope.to(keys_tile.dtype), keys_tile, PRECISION)
    grad_q += response_offset(boundaries, response, begin, grad_batch_stride, grad_token_stride)
    row = grad_q + head.to(tl.int64) * grad_head_stride + local * grad_token_stride
    tl.store(row[:, None] + component[None, :], gradient.to(grad_q.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window"])
def key_gradient_kernel(
    grad,  # of mass [B, Hq, T, G], or of the heat map [B, Hq, S]; packed without B
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N], or None without HEATMAP
    means,  # from query_gradient_kernel
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    grad_k,  # out: [B, Hk, S, d] or [M, Hk, d]
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    grad_batch_stride,
    grad_head_stride,
    grad_token_stride,
    batch,
    queries,  # T or N
    keys,  # S or M
    num_segments,  # G
    scale,
    window,
    HEATMAP: tl.constexpr,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, key_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    response, first_key, key_end = slot_range(key_boundaries, slot, batch, keys, KEYS)
    key_begin, _ = token_range(key_boundaries, response, keys)
    flat_key = first_key + tl.arange(0, KEYS)
    key = (flat_key - key_begin).to(tl.int32)
    segment = tl.load(segments + flat_key, mask=flat_key < key_end, other=-1)
    counted = (segment >= 0) & (segment < num_segments)
    component = tl.arange(0, COMPONENTS)
    k += response_offset(key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += key_head.to(tl.int64) * k_head_stride
    keys_tile = tl.load(
        k + key.to(tl.int64)[None, :] * k_token_stride + component[:, None],
        mask=counted[None, :] & (component < SIZE)[:, None],
        other=0.0,
    )
    begin, end = token_range(boundaries, response, queries)
    q += response_offset(boundaries, response, begin, q_batch_stride, q_token_stride)

    gradient = tl.zeros((KEYS, COMPONENTS), tl.float32)
    for start in range(begin, tl.where(tl.max(counted.to(tl.int32)) > 0, end, begin), ROWS // GROUP):
        token, _, member, inside, position = query_rows(
            boundaries, key_boundaries, positions, response, start, end, queries, keys, GROUP, ROWS
        )
        if tl.max(position) >= tl.min(key):
            head = key_head * GROUP + member
            local = token - begin
            row = q + head.to(tl.int64) * q_head_stride + local * q_token_stride
            query = tl.load(
                row[:, None] + component[None, :], mask=inside[:, None] & (component < SIZE)[None, :], other=0.0
            )
            index = by_head(boundaries, response, begin, head, heads, queries) + local
            logarithm = tl.load(lse + index, mask=inside, other=0.0) * LOG2_E
            mean = tl.load(means + index, mask=inside, other=0.0)
            if HEATMAP:
                weight = tl.load(weights + token, mask=inside, other=0.0)
                grad_index = by_head(key_boundaries, response, key_begin, head, heads, keys)
            else:
                weight = mean
                grad_index = index
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(segment, key, position, window, num_segments)
            probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
            slope = probability_slopes(
                grad, tl.where(inside, grad_index, -1), segment, key, weight, counted, num_segments, HEATMAP, ROWS, KEYS
            )
            score_slope = probability * (slope - mean[:, None]) * scale
            gradient += product(tl.trans(score_slope.to(query.dtype)), query, PRECISION)
    grad_k += response_offset(key_boundaries, response, key_begin, grad_batch_stride, grad_token_stride)
    grad_k += key_head.to(tl.int64) * grad_head_stride
    tl.store(
        grad_k + key.to(tl.int64)[:, None] * grad_token_stride + component[None, :],
        gradient.to(grad_k.dtype.element_ty),
        mask=(flat_key < key_end)[:, None] & (component < SIZE)[None, :],
    )


class Tile(NamedTuple):
    """Rows (queries and heads) by keys that a program holds at a time, and the warps that hold them."""

    rows: int
    keys: int
    warps: int
    stages: int


def forward_tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the kernels that only multiply queries with keys."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 4, 2) if size > 128 else Tile(128, 64, 8, 3)


def backward_tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the kernels that hold a gradient as well."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    return Tile(64, 32, 8, 1) if size > 128 else Tile(64, 64, 8, 2)


class Launch(NamedTuple):
    """What every kernel is told about q and k.

    Attributes:
        tile: Rows by keys, with at least one query of every head of a group.
        batch: B.
        queries: T of a padded batch, N of a packed one.
        keys: S or M.
        heads: Hq.
        key_heads: Hk.
        strides: Of a response, a head and a token, of q and then of k.
        constants: Keyword arguments of every kernel.

    """

    tile: Tile
    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
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


def plan(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, tile: Tile) -> Launch:
    """Describe a launch over q and k."""
    packed = cu_seqlens_q is not None
    heads, key_heads, size = q.shape[1], k.shape[1], q.shape[-1]
    rows = max(tile.rows, triton.next_power_of_2(heads // key_heads))
    components = max(triton.next_power_of_2(size), 16)
    return Launch(
        tile._replace(rows=rows),
        q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        q.shape[0 if packed else 2],
        k.shape[0 if packed else 2],
        heads,
        key_heads,
        (*strides_of(q), *strides_of(k)),
        {
            "SIZE": size,
            "GROUP": heads // key_heads,
            "ROWS": rows,
            "KEYS": tile.keys,
            "COMPONENTS": components,
            # fp32 products in tf32 would be no better than bf16 inputs.
            "PRECISION": "ieee" if q.dtype == torch.float32 else None,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        },
    )


def per_head(q: Tensor, heads_of: Tensor) -> tuple[int, ...]:
    """Shape of one number a head of q and token of ``heads_of``: ``[B, H, L]``, packed ``[H, L]``."""
    if q.dim() == 4:
        return q.shape[0], q.shape[1], heads_of.shape[2]
    return q.shape[1], heads_of.shape[0]


@operator
def attention_mass(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Masses ``[B, Hq, T, G]`` and log-sum-exp ``[B, Hq, T]`` of every query and head, fp32; packed without B."""
    launch = plan(q, k, cu_seqlens_q, forward_tile(q.shape[-1], q.dtype))
    shape = per_head(q, q)
    mass = q.new_empty((*shape, num_segments), dtype=torch.float32)
    lse = q.new_empty(shape, dtype=torch.float32)
    slots = num_slots(launch.queries, launch.batch, cu_seqlens_q, launch.tile.rows // launch.group)
    segments = min(max(triton.next_power_of_2(num_segments), 2), SEGMENT_BLOCK)
    with device_guard(q):
        wrap_triton(mass_kernel)[(slots, launch.key_heads, triton.cdiv(num_segments, segments))](
            q,
            k,
            key_segments,
            query_positions,
            cu_seqlens_q,
            cu_seqlens_k,
            mass,
            lse,
            *launch.strides,
            launch.batch,
            launch.queries,
            launch.keys,
            num_segments,
            scale,
            window,
            SEGMENTS=segments,
            **launch.constants,
        )
    return mass, lse


@operator
def attention_heatmap(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    query_weights: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Weighted sum over queries of the attention of each shown key, fp32 ``[B, Hq, S]``; packed without B."""
    launch = plan(q, k, cu_seqlens_q, forward_tile(q.shape[-1], q.dtype))
    heat = q.new_empty(per_head(q, k), dtype=torch.float32)
    slots = num_slots(launch.keys, launch.batch, cu_seqlens_k, launch.tile.keys)
    with device_guard(q):
        wrap_triton(heat_kernel)[(slots, launch.heads)](
            q,
            k,
            key_segments,
            query_positions,
            query_weights,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            heat,
            *launch.strides,
            launch.batch,
            launch.queries,
            launch.keys,
            scale,
            window,
            **launch.constants,
        )
    return heat


@operator
def attention_mass_backward(
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mass: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by q and k, in their dtype."""
    layout = (key_segments, query_positions)
    return launch_backward(
        grad_mass, q, k, *layout, None, mass, lse, cu_seqlens_q, cu_seqlens_k, mass.shape[-1], scale, window
    )


@operator
def attention_heatmap_backward(
    grad_heat: Tensor,
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    query_weights: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by q and k, in their dtype."""
    layout = (key_segments, query_positions)
    return launch_backward(
        grad_heat, q, k, *layout, query_weights, None, lse, cu_seqlens_q, cu_seqlens_k, LABELS, scale, window
    )


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    query_weights: Tensor | None,
    mass: Tensor | None,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by q and k: of the masses, or with ``query_weights`` of the heat map."""
    launch = plan(q, k, cu_seqlens_q, backward_tile(q.shape[-1], q.dtype))
    grad_q, grad_k, means = q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(lse)
    group, rows, keys = launch.group, launch.tile.rows, launch.tile.keys
    heatmap = query_weights is not None
    counts = (launch.batch, launch.queries, launch.keys, num_segments, scale, window)
    with device_guard(q):
        wrap_triton(query_gradient_kernel)[
            (num_slots(launch.queries, launch.batch, cu_seqlens_q, rows // group), launch.key_heads)
        ](
            grad,
            q,
            k,
            key_segments,
            query_positions,
            query_weights,
            mass,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            means,
            grad_q,
            *launch.strides,
            *strides_of(grad_q),
            *counts,
            HEATMAP=heatmap,
            **launch.constants,
        )
        wrap_triton(key_gradient_kernel)[(num_slots(launch.keys, launch.batch, cu_seqlens_k, keys), launch.key_heads)](
            grad,
            q,
            k,
            key_segments,
            query_positions,
            query_weights,
            means,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            grad_k,
            *launch.strides,
            *strides_of(grad_k),
            *counts,
            HEATMAP=heatmap,
            **launch.constants,
        )
    return grad_q, grad_k

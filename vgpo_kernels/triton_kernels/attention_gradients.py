"""Gradients of attention by segment and by key in Triton, by recomputing the probabilities p from the log-sum-exp.

A score's gradient is ``p (g - <p, g>)``, g being the gradient of p. One kernel walks over the keys of a tile of queries
and gives q's gradient; another walks over the queries of a block of keys and gives k's. Neither adds to memory that
another program writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.triton_kernels.attention_tiles import (
    LOG2_E,
    SHOWN,
    Tile,
    key_extent,
    load_keys,
    load_rows,
    of_head,
    of_mass,
    of_response,
    plan,
    product,
    query_rows,
    query_tile,
    strides_of,
    visible_keys,
)
from vgpo_kernels.triton_kernels.common import device_guard, num_slots, slot_range, token_range, wrap_triton


def backward_tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the gradient kernels for a head size d, as large as registers hold."""
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    return Tile(64, 32, 8, 2) if size <= 128 else Tile(32, 32, 8, 1)


def query_gradient_tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the kernel for q's gradient. It also holds a tile of sums, so: half the rows and warps."""
    tile = backward_tile(size, dtype)
    return Tile(32, 32, 4, 2) if tile.rows > 32 else tile


@triton.jit
def probability_slopes(
    grad,  # of the masses [.., G] or of the heat map, from the response's first on
    index,  # of a row's numbers in it
    segment,
    key,
    counted,
    weight,  # of a row's query in the heat map
    inside,
    num_segments,
    HEATMAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients of a tile of probabilities, ``[ROWS, KEYS]``."""
    if HEATMAP:
        wanted = inside[:, None] & (counted & (segment == SHOWN))[None, :]
        slope = tl.load(grad + index[:, None] + key[None, :], mask=wanted, other=0.0) * weight[:, None]
    else:
        slope = tl.zeros((ROWS, KEYS), tl.float32)
        lowest = tl.min(tl.where(counted, segment, num_segments))
        highest = tl.max(tl.where(counted, segment, -1))
        for g in range(lowest, highest + 1):
            column = tl.load(grad + index * num_segments + g, mask=inside, other=0.0)
            slope = tl.where((segment == g)[None, :], column[:, None], slope)
    return slope


@triton.jit(do_not_specialize=["batch", "queries", "keys", "window"])
def mean_kernel(
    grad,  # of the heat map [B, Hq, S] or [Hq, M]
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    labels,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N]
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    means,  # out: <p, g> of each query and head, in lse's shape
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
    window,  # 0: none
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    response, begin, key_begin, key_count, token, member, inside, position, query, k, labels = query_tile(
        *(q, k, labels, positions, boundaries, key_boundaries, q_batch_stride, q_head_stride, q_token_stride),
        *(k_batch_stride, k_head_stride, k_token_stride, batch, queries, keys, SIZE, GROUP, ROWS, COMPONENTS),
    )
    head, heads = tl.program_id(1) * GROUP, tl.num_programs(1) * GROUP
    index = member.to(tl.int64) * queries + token
    logarithm = tl.load(of_head(lse, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    logarithm = logarithm * LOG2_E
    start_key, last_key = key_extent(position, window, key_count, KEYS)

    grad = of_head(grad, key_boundaries, response, key_begin, head, heads, keys)
    weight = tl.load(weights + begin + token, mask=inside, other=0.0)
    mean = tl.zeros((ROWS,), tl.float32)
    for start in range(start_key, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        shown = tl.load(labels + key, mask=key < last_key, other=-1) == SHOWN
        # Only keys that are shown have a gradient of their own.
        if tl.max(shown.to(tl.int32)) > 0:
            keys_tile = load_keys(k, key, k_token_stride, shown, SIZE, COMPONENTS)
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(shown, key, position, window)
            probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
            received = (member.to(tl.int64) * keys)[:, None] + key[None, :]
            slope = tl.load(grad + received, mask=inside[:, None] & shown[None, :], other=0.0)
            mean += tl.sum(probability * slope, 1)
    means = of_head(means, boundaries, response, begin, head, heads, queries)
    tl.store(means + index, mean * weight, mask=inside)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window"])
def query_gradient_kernel(
    grad,  # of the masses [B, Hq, T, G], or of the heat map [B, Hq, S]; packed without B
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N]; None without HEATMAP
    means,  # <p, g> of each query and head, in lse's shape
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    grad_q,  # out: q's shape
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
    window,  # 0: none
    HEATMAP: tl.constexpr,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    response, begin, key_begin, key_count, token, member, inside, position, query, k, segments = query_tile(
        *(q, k, segments, positions, boundaries, key_boundaries, q_batch_stride, q_head_stride, q_token_stride),
        *(k_batch_stride, k_head_stride, k_token_stride, batch, queries, keys, SIZE, GROUP, ROWS, COMPONENTS),
    )
    head, heads = tl.program_id(1) * GROUP, tl.num_programs(1) * GROUP
    index = member.to(tl.int64) * queries + token
    grad_q = of_response(grad_q, boundaries, response, begin, grad_batch_stride, grad_token_stride)
    grad_q += head.to(tl.int64) * grad_head_stride
    logarithm = tl.load(of_head(lse, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    logarithm = logarithm * LOG2_E
    start_key, last_key = key_extent(position, window, key_count, KEYS)

    mean = tl.load(of_head(means, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    if HEATMAP:
        grad = of_head(grad, key_boundaries, response, key_begin, head, heads, keys)
        grad_index = member.to(tl.int64) * keys
        weight = tl.load(weights + begin + token, mask=inside, other=0.0)
    else:
        grad = of_mass(grad, boundaries, response, begin, head, heads, queries, num_segments)
        grad_index = index
        weight = mean

    gradient = tl.zeros((ROWS, COMPONENTS), tl.float32)
    for start in range(start_key, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        segment = tl.load(segments + key, mask=key < last_key, other=-1)
        counted = (segment >= 0) & (segment < num_segments)
        keys_tile = load_keys(k, key, k_token_stride, counted, SIZE, COMPONENTS)
        score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
        visible = visible_keys(counted, key, position, window)
        probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
        slope = probability_slopes(
            grad, grad_index, segment, key, counted, weight, inside, num_segments, HEATMAP, ROWS, KEYS
        )
        score_slope = probability * (slope - mean[:, None])
        gradient += product(score_slope.to(keys_tile.dtype), tl.trans(keys_tile), PRECISION)
    component = tl.arange(0, COMPONENTS)
    row = grad_q + token.to(tl.int64) * grad_token_stride + member.to(tl.int64) * grad_head_stride
    tl.store(
        row[:, None] + component[None, :],
        (gradient * scale).to(grad_q.dtype.element_ty),
        mask=inside[:, None] & (component < SIZE)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window"])
def key_gradient_kernel(
    grad,  # of the masses [B, Hq, T, G], or of the heat map [B, Hq, S]; packed without B
    q,  # [B, Hq, T, d] or [N, Hq, d]
    k,  # [B, Hk, S, d] or [M, Hk, d]
    segments,  # [B, S] or [M]
    positions,  # [B, T] or [N], or None
    weights,  # [B, T] or [N]; None without HEATMAP
    means,  # <p, g> of each query and head, in lse's shape
    lse,  # [B, Hq, T] or [Hq, N]
    boundaries,  # [B + 1] or None
    key_boundaries,  # [B + 1] or None
    grad_k,  # out: k's shape
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
    window,  # 0: none
    HEATMAP: tl.constexpr,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, key_head = tl.program_id(0), tl.program_id(1)
    head, heads = key_head * GROUP, tl.num_programs(1) * GROUP
    response, first_key, _ = slot_range(key_boundaries, slot, batch, keys, KEYS)
    key_begin, key_end = token_range(key_boundaries, response, keys)
    begin, end = token_range(boundaries, response, queries)
    query_count, key_count = (end - begin).to(tl.int32), (key_end - key_begin).to(tl.int32)
    q = of_response(q, boundaries, response, begin, q_batch_stride, q_token_stride) + head.to(tl.int64) * q_head_stride
    k = of_response(k, key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += key_head.to(tl.int64) * k_head_stride
    grad_k = of_response(grad_k, key_boundaries, response, key_begin, grad_batch_stride, grad_token_stride)
    grad_k += key_head.to(tl.int64) * grad_head_stride
    lse = of_head(lse, boundaries, response, begin, head, heads, queries)
    means = of_head(means, boundaries, response, begin, head, heads, queries)
    if HEATMAP:
        grad = of_head(grad, key_boundaries, response, key_begin, head, heads, keys)
    else:
        grad = of_mass(grad, boundaries, response, begin, head, heads, queries, num_segments)

    key = (first_key - key_begin).to(tl.int32) + tl.arange(0, KEYS)
    segment = tl.load(segments + key_begin + key, mask=key < key_count, other=-1)
    counted = (segment >= 0) & (segment < num_segments)
    keys_tile = load_keys(k, key, k_token_stride, counted, SIZE, COMPONENTS)
    gradient = tl.zeros((KEYS, COMPONENTS), tl.float32)
    for start in range(0, tl.where(tl.max(counted.to(tl.int32)) > 0, query_count, 0), ROWS // GROUP):
        token, member, inside, position = query_rows(positions, start, begin, query_count, key_count, GROUP, ROWS)
        if tl.max(position) >= tl.min(key):
            query = load_rows(q, token, member, q_head_stride, q_token_stride, inside, SIZE, COMPONENTS)
            index = member.to(tl.int64) * queries + token
            logarithm = tl.load(lse + index, mask=inside, other=0.0) * LOG2_E
            mean = tl.load(means + index, mask=inside, other=0.0)
            if HEATMAP:
                grad_index = member.to(tl.int64) * keys
                weight = tl.load(weights + begin + token, mask=inside, other=0.0)
            else:
                grad_index = index
                weight = mean
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(counted, key, position, window)
            probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
            slope = probability_slopes(
                grad, grad_index, segment, key, counted, weight, inside, num_segments, HEATMAP, ROWS, KEYS
            )
            score_slope = probability * (slope - mean[:, None])
            gradient += product(tl.trans(score_slope.to(query.dtype)), query, PRECISION)
    component = tl.arange(0, COMPONENTS)
    row = grad_k + key.to(tl.int64) * grad_token_stride
    tl.store(
        row[:, None] + component[None, :],
        (gradient * scale).to(grad_k.dtype.element_ty),
        mask=(key < key_count)[:, None] & (component < SIZE)[None, :],
    )


def launch_means(
    grad_heat: Tensor,
    *,
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
    """Return <p, g> of each query and head, for the gradient g of its probabilities in a heat map; lse's shape."""
    launch = plan(q, k, cu_seqlens_q, backward_tile(q.shape[-1], q.dtype))
    means = torch.empty_like(lse)
    slots = num_slots(launch.queries, launch.batch, cu_seqlens_q, launch.tile.rows // launch.group)
    with device_guard(q):
        wrap_triton(mean_kernel)[(slots, launch.key_heads)](
            grad_heat,
            q,
            k,
            key_segments,
            query_positions,
            query_weights,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            means,
            *launch.strides,
            launch.batch,
            launch.queries,
            launch.keys,
            scale,
            window,
            **launch.constants,
        )
    return means


def launch_gradients(
    grad: Tensor,
    means: Tensor,
    num_segments: int,
    *,
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int,
    query_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients w.r.t. q and k: those of the masses, or with ``query_weights`` those of the heat map."""
    launch = plan(q, k, cu_seqlens_q, backward_tile(q.shape[-1], q.dtype))
    query_launch = plan(q, k, cu_seqlens_q, query_gradient_tile(q.shape[-1], q.dtype))
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    query_slots = num_slots(launch.queries, launch.batch, cu_seqlens_q, query_launch.tile.rows // launch.group)
    key_slots = num_slots(launch.keys, launch.batch, cu_seqlens_k, launch.tile.keys)
    heatmap = query_weights is not None
    counts = (launch.batch, launch.queries, launch.keys, num_segments, scale, window)
    with device_guard(q):
        wrap_triton(query_gradient_kernel)[(query_slots, launch.key_heads)](
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
            grad_q,
            *launch.strides,
            *strides_of(grad_q),
            *counts,
            HEATMAP=heatmap,
            **query_launch.constants,
        )
        wrap_triton(key_gradient_kernel)[(key_slots, launch.key_heads)](
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

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

from vgpo_kernels.reference.attention_mass import default_positions
from vgpo_kernels.reference.layout import responses_of
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
from vgpo_kernels.triton_kernels.common import device_guard, is_finite, num_slots, slot_range, token_range, wrap_triton


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
        g = lowest
        while g <= highest:
            column = tl.load(grad + index * num_segments + g, mask=inside, other=0.0)
            slope = tl.where((segment == g)[None, :], column[:, None], slope)
            # Neighbours mostly have one segment or two. Far apart, the ones between are not gone through.
            following = g + 1
            if following < highest:
                following = tl.min(tl.where(counted & (segment > g), segment, num_segments))
            g = following
    return slope


@triton.jit(do_not_specialize=["batch", "queries", "keys", "window", "longer"])
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
    longer,  # by how much it is longer than all keys
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    response, begin, key_begin, key_count, token, member, inside, position, query, k, labels = query_tile(
        *(q, k, labels, positions, boundaries, key_boundaries, q_batch_stride, q_head_stride, q_token_stride),
        *(k_batch_stride, k_head_stride, k_token_stride, batch, queries, keys, window, longer),
        *(SIZE, GROUP, ROWS, COMPONENTS),
    )
    head, heads = tl.program_id(1) * GROUP, tl.num_programs(1) * GROUP
    index = member.to(tl.int64) * queries + token
    logarithm = tl.load(of_head(lse, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    logarithm = logarithm * LOG2_E
    weight = tl.load(weights + begin + token, mask=inside, other=0.0)
    position = tl.where(weight == 0.0, -1, position)
    first_key, last_key = key_extent(position, window, key_count)

    grad = of_head(grad, key_boundaries, response, key_begin, head, heads, keys)
    mean = tl.zeros((ROWS,), tl.float32)
    for start in range(first_key // KEYS * KEYS, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        shown = tl.load(labels + key, mask=key < last_key, other=-1) == SHOWN
        # Only keys that are shown have a gradient of their own.
        if tl.max(shown.to(tl.int32)) > 0:
            keys_tile = load_keys(k, key, k_token_stride, shown, SIZE, COMPONENTS)
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(shown, key, position, window)
            received = (member.to(tl.int64) * keys)[:, None] + key[None, :]
            slope = tl.load(grad + received, mask=inside[:, None] & shown[None, :], other=0.0)
            mean += tl.sum(tl.where(visible, tl.exp2(score - logarithm[:, None]) * slope, 0.0), 1)
    means = of_head(means, boundaries, response, begin, head, heads, queries)
    tl.store(means + index, mean * weight, mask=inside)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window", "longer"])
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
    longer,  # by how much it is longer than all keys
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
        *(k_batch_stride, k_head_stride, k_token_stride, batch, queries, keys, window, longer),
        *(SIZE, GROUP, ROWS, COMPONENTS),
    )
    head, heads = tl.program_id(1) * GROUP, tl.num_programs(1) * GROUP
    index = member.to(tl.int64) * queries + token
    grad_q = of_response(grad_q, boundaries, response, begin, grad_batch_stride, grad_token_stride)
    grad_q += head.to(tl.int64) * grad_head_stride
    logarithm = tl.load(of_head(lse, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    logarithm = logarithm * LOG2_E

    mean = tl.load(of_head(means, boundaries, response, begin, head, heads, queries) + index, mask=inside, other=0.0)
    if HEATMAP:
        grad = of_head(grad, key_boundaries, response, key_begin, head, heads, keys)
        grad_index = member.to(tl.int64) * keys
        weight = tl.load(weights + begin + token, mask=inside, other=0.0)
        position = tl.where(weight == 0.0, -1, position)
    else:
        grad = of_mass(grad, boundaries, response, begin, head, heads, queries, num_segments)
        grad_index = index
        weight = mean

    first_key, last_key = key_extent(position, window, key_count)
    gradient = tl.zeros((ROWS, COMPONENTS), tl.float32)
    for start in range(first_key // KEYS * KEYS, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        # A key that no query of the tile sees may be NaN, and NaN times a slope of zero is NaN. So it is not loaded.
        segment = tl.load(segments + key, mask=(key >= first_key) & (key < last_key), other=-1)
        counted = (segment >= 0) & (segment < num_segments)
        keys_tile = load_keys(k, key, k_token_stride, counted, SIZE, COMPONENTS)
        score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
        visible = visible_keys(counted, key, position, window)
        slope = probability_slopes(
            grad, grad_index, segment, key, counted, weight, inside, num_segments, HEATMAP, ROWS, KEYS
        )
        score_slope = tl.where(visible, tl.exp2(score - logarithm[:, None]) * (slope - mean[:, None]), 0.0)
        gradient += product(score_slope.to(keys_tile.dtype), tl.trans(keys_tile), PRECISION)
    component = tl.arange(0, COMPONENTS)
    row = grad_q + token.to(tl.int64) * grad_token_stride + member.to(tl.int64) * grad_head_stride
    tl.store(
        row[:, None] + component[None, :],
        (gradient * scale).to(grad_q.dtype.element_ty),
        mask=inside[:, None] & (component < SIZE)[None, :],
    )


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window", "longer"])
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
    longer,  # by how much it is longer than all keys
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
        token, member, inside, position = query_rows(
            positions, start, begin, query_count, key_count, window, longer, GROUP, ROWS
        )
        if tl.max(position) >= tl.min(key):
            index = member.to(tl.int64) * queries + token
            logarithm = tl.load(lse + index, mask=inside, other=0.0) * LOG2_E
            # Without a visible key -inf, with a NaN NaN: then the slopes say all, and the query must not be read.
            wanted = inside & is_finite(logarithm)
            query = load_rows(q, token, member, q_head_stride, q_token_stride, wanted, SIZE, COMPONENTS)
            mean = tl.load(means + index, mask=inside, other=0.0)
            if HEATMAP:
                grad_index = member.to(tl.int64) * keys
                weight = tl.load(weights + begin + token, mask=inside, other=0.0)
                position = tl.where(weight == 0.0, -1, position)
            else:
                grad_index = index
                weight = mean
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            visible = visible_keys(counted, key, position, window)
            slope = probability_slopes(
                grad, grad_index, segment, key, counted, weight, inside, num_segments, HEATMAP, ROWS, KEYS
            )
            score_slope = tl.where(visible, tl.exp2(score - logarithm[:, None]) * (slope - mean[:, None]), 0.0)
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
    launch = plan(q, k, cu_seqlens_q, scale, window, backward_tile(q.shape[-1], q.dtype))
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
            *launch.window,
            **launch.constants,
        )
    return means


def without_unseen(
    key_segments: Tensor,  # [B, S] or [M]
    positions: Tensor,  # [B, T] or [N]
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    window: int,
) -> Tensor:
    """Return the segments, but -1 for keys that lie between the windows of all queries: then no kernel loads them."""
    count = key_segments.numel()
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch, length = key_segments.shape
        lengths = torch.full((batch, 1), length, device=positions.device)
        begin = torch.arange(batch, device=positions.device)[:, None] * length
    else:
        batch = cu_seqlens_q.shape[0] - 1
        response, _ = responses_of(positions.shape[0], batch, cu_seqlens_q, positions.device)
        response = response.clamp(max=batch - 1)  # boundaries that lie must not lead outside
        lengths, begin = cu_seqlens_k.diff()[response], cu_seqlens_k[response]
    positions = positions.clamp(min=-1)
    first = torch.minimum((positions - (window - 1)).clamp(min=0), lengths) + begin
    end = torch.minimum(positions, lengths - 1) + 1 + begin
    # One more query sees the keys from its first on, and one fewer those behind its last.
    edges = torch.zeros(count + 1, dtype=torch.int32, device=positions.device)
    for edge, change in ((first, 1), (end, -1)):
        index = edge.clamp(0, count).reshape(-1)
        edges.index_add_(0, index, torch.full_like(index, change, dtype=torch.int32))
    seen = edges[:-1].cumsum(0).view_as(key_segments) > 0
    return torch.where(seen, key_segments, -1)


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
    launch = plan(q, k, cu_seqlens_q, scale, window, backward_tile(q.shape[-1], q.dtype))
    if window and (query_positions is not None or query_weights is not None):
        # The default positions leave no gap between windows; given ones may, and queries of weight 0.
        boundaries = (cu_seqlens_q, cu_seqlens_k)
        positions = query_positions
        if positions is None:
            positions = default_positions(launch.queries, launch.keys, *boundaries, q.device).expand(
                lse[..., 0, :].shape
            )
        if query_weights is not None:
            positions = torch.where(query_weights == 0, -1, positions)
        key_segments = without_unseen(key_segments, positions, *boundaries, window)
    query_launch = plan(q, k, cu_seqlens_q, scale, window, query_gradient_tile(q.shape[-1], q.dtype))
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    query_slots = num_slots(launch.queries, launch.batch, cu_seqlens_q, query_launch.tile.rows // launch.group)
    key_slots = num_slots(launch.keys, launch.batch, cu_seqlens_k, launch.tile.keys)
    heatmap = query_weights is not None
    counts = (launch.batch, launch.queries, launch.keys, num_segments, scale, *launch.window)
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

"""Attention by segment and by key in Triton: a tile of queries goes over its keys in blocks, as in flash attention.

The scores of a tile stay in registers. Only one number per query and segment, or per key, is written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels import attention_checks
from vgpo_kernels.triton_kernels.attention_gradients import launch_gradients, launch_means
from vgpo_kernels.triton_kernels.attention_tiles import (
    LABELS,
    LN_2,
    LOG2_E,
    SHOWN,
    Tile,
    by_head,
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
    visible_keys,
)
from vgpo_kernels.triton_kernels.common import (
    device_guard,
    num_slots,
    operator,
    slot_range,
    token_range,
    wrap_triton,
)

# Segments whose sums a program of the forward pass holds; for more segments there are more programs.
SEGMENT_BLOCK = 16
MEAN_BLOCK = 1024


def forward_tile(size: int, dtype: torch.dtype) -> Tile:
    """Return the tile of the forward kernels for a head size d: as large as registers hold."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(128, 64, 8, 3) if size <= 128 else Tile(64, 64, 8, 2)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "num_segments", "window", "longer"])
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
    longer,  # by how much it is longer than all keys
    SEGMENTS: tl.constexpr,
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    response, begin, _, key_count, token, member, inside, position, query, k, segments = query_tile(
        *(q, k, segments, positions, boundaries, key_boundaries, q_batch_stride, q_head_stride, q_token_stride),
        *(k_batch_stride, k_head_stride, k_token_stride, batch, queries, keys, window, longer),
        *(SIZE, GROUP, ROWS, COMPONENTS),
    )
    head, heads = tl.program_id(1) * GROUP, tl.num_programs(1) * GROUP
    index = member.to(tl.int64) * queries + token
    first_segment = tl.program_id(2) * SEGMENTS
    column = tl.arange(0, SEGMENTS)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, SEGMENTS), tl.float32)
    first_key, last_key = key_extent(position, window, key_count)
    for start in range(first_key // KEYS * KEYS, last_key, KEYS):
        key = start + tl.arange(0, KEYS)
        segment = tl.load(segments + key, mask=key < last_key, other=-1)
        counted = (segment >= 0) & (segment < num_segments)
        keys_tile = load_keys(k, key, k_token_stride, counted, SIZE, COMPONENTS)
        score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
        score = tl.where(visible_keys(counted, key, position, window), score, -float("inf"))
        raised = tl.maximum(largest, tl.max(score, 1))
        # A row that has seen no key yet has no largest score. Its sums are zero, so any origin will do.
        origin = tl.where(raised == -float("inf"), 0.0, raised)
        shrink = tl.exp2(largest - origin)
        part = tl.exp2(score - origin[:, None])
        total = total * shrink + tl.sum(part, 1)
        sums = sums * shrink[:, None]
        # Neighbouring keys mostly have the same segment: then this is one step.
        lowest = tl.maximum(tl.min(tl.where(counted, segment, num_segments)), first_segment)
        highest = tl.minimum(tl.max(tl.where(counted, segment, -1)), first_segment + SEGMENTS - 1)
        for g in range(lowest, highest + 1):
            share = tl.sum(tl.where((segment == g)[None, :], part, 0.0), 1)
            sums += tl.where((column == g - first_segment)[None, :], share[:, None], 0.0)
        largest = raised

    # A row that sees no key has sums of zero: its masses stay zero, and its log-sum-exp -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    mass = of_mass(mass, boundaries, response, begin, head, heads, queries, num_segments)
    lse = of_head(lse, boundaries, response, begin, head, heads, queries)
    tl.store(
        mass + index[:, None] * num_segments + first_segment + column[None, :],
        tl.div_rn(sums, divisor[:, None]),
        mask=inside[:, None] & (first_segment + column < num_segments)[None, :],
    )
    if first_segment == 0:
        tl.store(lse + index, (largest + tl.log2(divisor)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "window", "longer"])
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
    window,  # 0: none
    longer,  # by how much it is longer than all keys
    SIZE: tl.constexpr,  # d
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COMPONENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    response, first_key, _ = slot_range(key_boundaries, slot, batch, keys, KEYS)
    key_begin, key_end = token_range(key_boundaries, response, keys)
    begin, end = token_range(boundaries, response, queries)
    query_count, key_count = (end - begin).to(tl.int32), (key_end - key_begin).to(tl.int32)
    q = of_response(q, boundaries, response, begin, q_batch_stride, q_token_stride) + head.to(tl.int64) * q_head_stride
    k = of_response(k, key_boundaries, response, key_begin, k_batch_stride, k_token_stride)
    k += (head // GROUP).to(tl.int64) * k_head_stride
    lse = of_head(lse, boundaries, response, begin, head, heads, queries)
    heat = of_head(heat, key_boundaries, response, key_begin, head, heads, keys)

    key = (first_key - key_begin).to(tl.int32) + tl.arange(0, KEYS)
    shown = tl.load(labels + key_begin + key, mask=key < key_count, other=-1) == SHOWN
    keys_tile = load_keys(k, key, k_token_stride, shown, SIZE, COMPONENTS)
    received = tl.zeros((KEYS,), tl.float32)
    # A block without a key to show has nothing to compute.
    for start in range(0, tl.where(tl.max(shown.to(tl.int32)) > 0, query_count, 0), ROWS):
        token, member, inside, position = query_rows(
            positions, start, begin, query_count, key_count, window, longer, 1, ROWS
        )
        weight = tl.load(weights + begin + token, mask=inside, other=0.0)
        position = tl.where(weight == 0.0, -1, position)
        if tl.max(position) >= tl.min(key):
            query = load_rows(q, token, member, q_head_stride, q_token_stride, inside, SIZE, COMPONENTS)
            score = product(query, keys_tile, PRECISION) * (scale * LOG2_E)
            logarithm = tl.load(lse + token, mask=inside, other=0.0) * LOG2_E
            visible = visible_keys(shown, key, position, window)
            probability = tl.exp2(tl.where(visible, score - logarithm[:, None], -float("inf")))
            received += tl.sum(probability * weight[:, None], 0)
    tl.store(heat + key, received, mask=key < key_count)


@triton.jit(do_not_specialize=["heads", "count"])
def head_mean_kernel(
    values,  # [.., heads, count]
    mean,  # out: [.., count]
    heads,
    count,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = values + tl.program_id(1).to(tl.int64) * heads * count + index
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(heads):
        total += tl.load(row, mask=index < count, other=0.0)
        row += count
    divisor = tl.full((BLOCK,), 1.0, tl.float32) * heads
    tl.store(mean + tl.program_id(1).to(tl.int64) * count + index, tl.div_rn(total, divisor), mask=index < count)


def mean_of_heads(values: Tensor, head_dim: int) -> Tensor:
    """Return the mean over heads, added in the same order for every layout."""
    shape = values.shape
    mean = values.new_empty((*shape[:head_dim], *shape[head_dim + 1 :]))
    heads = shape[head_dim]
    batch = 1 if values.dim() == -head_dim else shape[0]
    count = mean.numel() // max(batch, 1)
    wrap_triton(head_mean_kernel)[(triton.cdiv(count, MEAN_BLOCK), batch)](values, mean, heads, count, BLOCK=MEAN_BLOCK)
    return mean


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
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masses ``[B, T, G]``, by head ``[B, Hq, T, G]``, and log-sum-exp ``[B, Hq, T]``, fp32; packed without B."""
    launch = plan(q, k, cu_seqlens_q, scale, window, forward_tile(q.shape[-1], q.dtype))
    attention_checks.segment_count(num_segments)
    shape = by_head(q, q)
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
            *launch.window,
            SEGMENTS=segments,
            **launch.constants,
        )
        if per_head:
            return mass, lse.new_empty((0,)), lse
        return mean_of_heads(mass, -3), mass, lse


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
    per_head: bool,
) -> Tensor:
    """Weighted sum over queries of the attention of each shown key, fp32 ``[B, S]`` or by head; packed without B."""
    launch = plan(q, k, cu_seqlens_q, scale, window, forward_tile(q.shape[-1], q.dtype))
    heat = q.new_empty(by_head(q, k), dtype=torch.float32)
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
            *launch.window,
            **launch.constants,
        )
        return heat if per_head else mean_of_heads(heat, -2)


@operator
def attention_mass_backward(grad_mass: Tensor, head_mass: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. q and k, in their dtype."""
    attention_checks.segment_count(head_mass.shape[-1])
    # A mass of zero is a constant, whose gradient may be anything.
    means = (grad_mass * head_mass).masked_fill(head_mass == 0, 0.0).sum(-1)
    return launch_gradients(grad_mass, means, head_mass.shape[-1], **given)


@operator
def attention_heatmap_backward(grad_heat: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. q and k, in their dtype."""
    return launch_gradients(grad_heat, launch_means(grad_heat, **given), LABELS, **given)

"""Sums of visual rows in Triton, from which visual_focus.py makes prototypes, and the launches that make them.

visual_focus.py says how the work is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.triton_kernels.common import (
    architecture,
    device_guard,
    extent,
    first_slot,
    is_finite,
    num_slots,
    token_range,
    wrap_triton,
)

# Tokens that are added to a prototype at a time. Its bits depend on this number, so it is the same for every GPU.
PROTOTYPE_ROWS = 64
INDEX_BLOCK = 4096

# Rows between two running sums of late images. More take less memory (one fp64 row of D each), and let the blocks of
# tokens at the end of an image add more of its rows themselves.
SPAN = tl.constexpr(64)
# Late rows are added one after the other; so many of them are on their way from memory at a time.
IN_FLIGHT = tl.constexpr(8)
NOWHERE = tl.constexpr(2**31 - 1)  # a row behind every other
NORM_FLOOR = tl.constexpr(1e-8)


class Tile(NamedTuple):
    """Rows and columns of hidden states that a program holds at a time, and the warps that hold them."""

    rows: int
    columns: int
    warps: int


class TileShape(NamedTuple):
    """A row of the block-size table."""

    focus_elements: int
    focus_columns: int
    focus_warps: int
    prototype_columns: int
    prototype_warps: int


# Enough bytes in flight on a multiprocessor to cover the latency of its memory, without spilling registers.
TILES = {
    "sm80": TileShape(4096, 512, 8, 64, 8),
    "sm90": TileShape(4096, 512, 8, 64, 8),
    "sm100": TileShape(8192, 512, 8, 64, 8),
    "gfx9": TileShape(4096, 512, 4, 64, 4),
}


def prototype_tile(features: int) -> Tile:
    """Return the tile of the prototype kernel for D features."""
    shape = TILES[architecture()]
    columns = max(min(triton.next_power_of_2(features), shape.prototype_columns), 16)
    return Tile(PROTOTYPE_ROWS, columns, shape.prototype_warps)


def row_tile(features: int) -> Tile:
    """Return the tile of kernels that go over whole rows of D features."""
    shape = TILES[architecture()]
    columns = max(min(triton.next_power_of_2(features), shape.focus_columns), 16)
    return Tile(min(shape.focus_elements // columns, 64), columns, shape.focus_warps)


@triton.jit(do_not_specialize=["rows", "tokens"])
def visual_index_kernel(
    visual_mask,  # [B, S] or [N]
    boundaries,  # [B + 1] or None
    mask,  # response mask, [B, T] or [N]: visibility is causal; or None
    positions,  # out: rows of a response's visual tokens, counted from its first row, in its slice of [B * S] or [N]
    counts,  # out: [B], visual tokens of the (first) prototype
    ends,  # out: [B], visual tokens before the last scored token; or None
    span_counts,  # out: visual tokens of its response before a span; or None
    rows,  # S or N
    tokens,  # T or N
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, rows)
    # Within the response 32-bit positions suffice.
    visual_mask += begin
    positions += begin
    size = (end - begin).to(tl.int32)
    count = tl.zeros((), tl.int32)
    if mask is not None:
        mask += token_range(boundaries, response, tokens)[0]
        unscored = rows - tokens if boundaries is None else tl.zeros((), tl.int32)
        span_counts += first_slot(boundaries, response, rows, SPAN)
        fewest = tl.full((BLOCK,), NOWHERE, tl.int32)
        most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        row = start + tl.arange(0, BLOCK)
        visible = (tl.load(visual_mask + row, mask=row < size, other=0) != 0).to(tl.int32)
        before = count + tl.cumsum(visible, 0) - visible
        tl.store(positions + before, row, mask=visible != 0)
        count += tl.sum(visible)
        if mask is not None:
            scored = tl.load(mask + row - unscored, mask=(row >= unscored) & (row < size), other=0) != 0
            fewest = tl.minimum(fewest, tl.where(scored & (before > 0), before, NOWHERE))
            most = tl.maximum(most, tl.where(scored, before, 0))
            tl.store(span_counts + row // SPAN, before, mask=(row % SPAN == 0) & (row < size))
    if mask is not None:
        last = tl.max(most)
        tl.store(ends + response, last)
        count = tl.where(last > 0, tl.min(fewest), 0)
    tl.store(counts + response, count)


@triton.jit(do_not_specialize=["number", "rows"])
def inverse_norm_kernel(
    hidden,  # [B, S, D] or [N, D]
    visual_mask,  # [B, S] or [N]
    inverse_norms,  # out: [B * S] or [N], written under the mask
    number,  # of rows, B * S or N
    rows,  # S, packed N
    features,  # D
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    visible = tl.load(visual_mask + place, mask=place < number, other=0) != 0
    begin = (place // rows) * batch_stride + (place % rows) * row_stride
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.where(tl.max(visible.to(tl.int32)) > 0, features, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = visible[:, None] & (column < features)[None, :]
        state = tl.load(hidden + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        square += state * state
    square = tl.sum(square, 1)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), NORM_FLOOR))
    tl.store(inverse_norms + place, tl.where(is_finite(square), inverse, float("nan")), mask=visible)


@triton.jit(do_not_specialize=["rows"])
def prototype_kernel(
    hidden,  # [B, S, D] or [N, D]
    inverse_norms,  # of the visual rows, [B * S] or [N]; None: rows are summed as they are
    boundaries,  # [B + 1] or None
    positions,  # from visual_index_kernel
    counts,
    ends,  # None: there are no late images
    span_counts,
    prototype,  # out: [B, D]
    sums,  # out: sum of the visual rows before a span, fp64 [spans, D], of spans among late images; or None
    rows,  # S or N
    features,  # D
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slices = tl.cdiv(features, COLUMNS)
    response = tl.program_id(0) // slices
    column = (tl.program_id(0) % slices) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = token_range(boundaries, response, rows)
    hidden = first_row(hidden, boundaries, response, begin, batch_stride, row_stride)
    positions += begin
    if inverse_norms is not None:
        inverse_norms += begin
    count = tl.load(counts + response)
    lane = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # The indices of the next step are loaded one step ahead, so that each step waits for memory once and not twice.
    upcoming = tl.load(positions + lane, mask=lane < count, other=0)
    for start in range(0, count, ROWS):
        row = upcoming.to(tl.int64)
        ordinal = start + lane
        upcoming = tl.load(positions + ordinal + ROWS, mask=ordinal + ROWS < count, other=0)
        inside = (ordinal < count)[:, None] & (column < features)[None, :]
        state = tl.load(hidden + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if inverse_norms is not None:
            state *= tl.load(inverse_norms + row, mask=ordinal < count, other=0.0)[:, None]
        total += state
    total = tl.sum(total, 0)
    mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    tl.store(prototype + response.to(tl.int64) * features + column, mean, mask=column < features)

    if ends is not None:
        last = tl.load(ends + response)
        if last > count:
            size = (end - begin).to(tl.int32)
            slot = first_slot(boundaries, response, rows, SPAN)
            running = total.to(tl.float64)
            begin_span, end_span = late_spans(positions, count, last)
            for span in range(begin_span, end_span + 1):
                entry = (slot + span) * features + column
                tl.store(sums + entry, running, mask=column < tl.where(size > span * SPAN, features, 0))
                stop = tl.load(span_counts + slot + span + 1, mask=size > (span + 1) * SPAN, other=NOWHERE)
                stop = tl.minimum(stop, last)
                ends_here = stop + tl.zeros((COLUMNS,), tl.int32)
                for ordinal in range(count, stop, IN_FLIGHT):
                    running = add_visual_rows(
                        running,
                        hidden + column,
                        inverse_norms,
                        positions,
                        ordinal,
                        stop,
                        ends_here,
                        column < features,
                        row_stride,
                    )
                count = tl.maximum(count, stop)


@triton.jit
def add_visual_rows(total, hidden, inverse_norms, positions, ordinal, stop, limit, inside, row_stride):
    """Add the next visual rows to a sum, one after the other: of those before ``stop`` the ones before ``limit``."""
    rows = next_visual_rows(positions, ordinal, stop)
    values = load_rows(hidden, rows, ordinal, limit, inside, row_stride)
    for ahead in tl.static_range(IN_FLIGHT):
        state = values[ahead].to(tl.float32)
        if inverse_norms is not None:
            # A row that is not added has zeros, and may have a factor of NaN.
            factor = tl.load(inverse_norms + rows[ahead], mask=ordinal + ahead < stop, other=0.0)
            state = tl.where(ordinal + ahead < limit, state * factor, 0.0)
        total += state.to(tl.float64)
    return total


@triton.jit
def next_visual_rows(positions, ordinal, stop):
    rows = ()
    for ahead in tl.static_range(IN_FLIGHT):
        rows += (tl.load(positions + ordinal + ahead, mask=ordinal + ahead < stop, other=0).to(tl.int64),)  # type: ignore[assignment]
    return rows


@triton.jit
def load_rows(hidden, rows, ordinal, limit, inside, row_stride):
    values = ()
    for ahead in tl.static_range(IN_FLIGHT):
        taken = (ordinal + ahead < limit) & inside
        values += (tl.load(hidden + rows[ahead] * row_stride, mask=taken, other=0.0),)  # type: ignore[assignment]
    return values


@triton.jit
def first_row(hidden, boundaries, response, begin, batch_stride, row_stride):
    """Where the hidden states of a response begin."""
    if boundaries is None:
        hidden += response.to(tl.int64) * batch_stride
    else:
        hidden += begin * row_stride
    return hidden


@triton.jit
def late_spans(positions, count, last):
    """First and last of a response's spans whose running sum is kept, given its number of visual rows before.

    Blocks of tokens behind the last late row share the sum of the span after it.
    """
    return tl.load(positions + count) // SPAN, tl.load(positions + last - 1) // SPAN + 1


@triton.jit(do_not_specialize=["rows"])
def running_prototype_kernel(
    hidden,  # [B, S, D] or [N, D]
    inverse_norms,  # of the visual rows, [B * S] or [N]; None: rows are averaged as they are
    visual_mask,  # [B, S] or [N]
    boundaries,  # [B + 1] or None
    prototype,  # out: hidden's shape
    rows,  # S or N
    features,  # D
    batch_stride,
    row_stride,
    COLUMNS: tl.constexpr,
):
    slices = tl.cdiv(features, COLUMNS)
    response = tl.program_id(0) // slices
    column = (tl.program_id(0) % slices) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = token_range(boundaries, response, rows)
    hidden = first_row(hidden, boundaries, response, begin, batch_stride, row_stride)
    prototype += begin * features
    visual_mask += begin
    if inverse_norms is not None:
        inverse_norms += begin
    size = end - begin
    total = tl.zeros((COLUMNS,), tl.float64)
    count = tl.zeros((), tl.int32)
    for row in range(0, size, 4):
        # Four at a time, all loads before the first store: none of them waits for the one before.
        seen_0, value_0 = visual_row(hidden, inverse_norms, visual_mask, row, size, row_stride, column, features)
        seen_1, value_1 = visual_row(hidden, inverse_norms, visual_mask, row + 1, size, row_stride, column, features)
        seen_2, value_2 = visual_row(hidden, inverse_norms, visual_mask, row + 2, size, row_stride, column, features)
        seen_3, value_3 = visual_row(hidden, inverse_norms, visual_mask, row + 3, size, row_stride, column, features)
        total, count = store_mean(prototype, row, size, column, features, total, count, seen_0, value_0)
        total, count = store_mean(prototype, row + 1, size, column, features, total, count, seen_1, value_1)
        total, count = store_mean(prototype, row + 2, size, column, features, total, count, seen_2, value_2)
        total, count = store_mean(prototype, row + 3, size, column, features, total, count, seen_3, value_3)


@triton.jit
def visual_row(hidden, inverse_norms, visual_mask, row, size, row_stride, column, features):
    """Whether a row is visual, and its hidden states if it is."""
    seen = tl.load(visual_mask + row, mask=row < size, other=0) != 0
    inside = column < tl.where(seen, features, 0)
    state = tl.load(hidden + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    if inverse_norms is not None:
        state *= tl.load(inverse_norms + row, mask=seen, other=0.0)
    return seen, state


@triton.jit
def store_mean(prototype, row, size, column, features, total, count, seen, value):
    """Store the mean of the rows before this one, then add it."""
    mean = tl.div_rn(total.to(tl.float32), tl.maximum(count, 1).to(tl.float32))
    tl.store(prototype + row * features + column, mean, mask=column < tl.where(row < size, features, 0))
    return tl.where(seen, total + value.to(tl.float64), total), count + seen.to(tl.int32)


def hidden_strides(hidden: Tensor) -> tuple[int, int]:
    """Return the strides of a response and of a row, in elements."""
    return (hidden.stride(0) if hidden.dim() == 3 else 0), hidden.stride(-2)


def launch_inverse_norms(hidden: Tensor, visual_mask: Tensor) -> Tensor:
    """Return what makes unit vectors of the visual rows, fp32 ``[B * S]`` or ``[N]``; nothing off the mask."""
    number, features = visual_mask.numel(), hidden.shape[-1]
    inverse_norms = hidden.new_empty((number,), dtype=torch.float32)
    tile = row_tile(features)
    with device_guard(hidden):
        wrap_triton(inverse_norm_kernel)[(triton.cdiv(number, tile.rows),)](
            hidden,
            visual_mask,
            inverse_norms,
            number,
            hidden.shape[-2],
            features,
            *hidden_strides(hidden),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return inverse_norms


class Arrivals(NamedTuple):
    """What the focus kernel needs of images that may arrive among scored tokens.

    Attributes:
        positions: Rows of a response's visual tokens, counted from its first row, in its slice of int32 ``[B * S]`` or
            ``[N]``.
        ends: Visual tokens before the last scored token of each response, int32 ``[B]``.
        span_counts: Visual tokens of its response before each span of :data:`SPAN` rows, int32.
        sums: Their sum, fp64 ``[spans, D]``; written for spans among late images only.

    """

    positions: Tensor
    ends: Tensor
    span_counts: Tensor
    sums: Tensor


def launch_prototype(
    hidden: Tensor,
    visual_mask: Tensor,
    cu_seqlens: Tensor | None,
    response_mask: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Arrivals | None]:
    """Sum the visual tokens of each response; with a response mask those before its first scored token that sees any.

    Args:
        hidden: Hidden states.
        visual_mask: Their visual tokens.
        cu_seqlens: Boundaries of a packed batch.
        response_mask: Scored tokens where images may arrive among them.
        inverse_norms: What makes unit vectors of the visual tokens; ``None``: they are summed as they are.

    Returns:
        Prototypes ``[B, D]``, the number of visual tokens in each, int32 ``[B]``, and with a response mask what the
        prototypes of later tokens are made from.

    """
    batch, rows = extent(visual_mask, cu_seqlens)
    features = hidden.shape[-1]

    def integers(length: int) -> Tensor:
        return visual_mask.new_empty((length,), dtype=torch.int32)

    positions, counts = integers(visual_mask.numel()), integers(batch)
    prototype = hidden.new_empty((batch, features), dtype=torch.float32)
    arrivals = None
    if response_mask is not None:
        spans = num_slots(rows, batch, cu_seqlens, SPAN.value)
        sums = hidden.new_empty((spans, features), dtype=torch.float64)
        arrivals = Arrivals(positions, integers(batch), integers(spans), sums)
    _, ends, span_counts, sums = arrivals or (None, None, None, None)  # type: ignore[assignment]
    tile = prototype_tile(features)
    batch_stride, row_stride = hidden_strides(hidden)
    with device_guard(hidden):
        wrap_triton(visual_index_kernel)[(batch,)](
            visual_mask,
            cu_seqlens,
            response_mask,
            positions,
            counts,
            ends,
            span_counts,
            rows,
            rows if response_mask is None else response_mask.shape[-1],
            BLOCK=INDEX_BLOCK,
            num_warps=8,
        )
        wrap_triton(prototype_kernel)[(batch * triton.cdiv(features, tile.columns),)](
            hidden,
            inverse_norms,
            cu_seqlens,
            positions,
            counts,
            ends,
            span_counts,
            prototype,
            sums,
            rows,
            features,
            batch_stride,
            row_stride,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return prototype, counts, arrivals


def launch_running_prototype(
    hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None, inverse_norms: Tensor | None
) -> Tensor:
    """Return the mean of the visual tokens before each position, fp32 in hidden's shape."""
    batch, rows = extent(visual_mask, cu_seqlens)
    features = hidden.shape[-1]
    prototype = hidden.new_empty(hidden.shape, dtype=torch.float32)
    columns = prototype_tile(features).columns
    with device_guard(hidden):
        wrap_triton(running_prototype_kernel)[(batch * triton.cdiv(features, columns),)](
            hidden,
            inverse_norms,
            visual_mask,
            cu_seqlens,
            prototype,
            rows,
            features,
            *hidden_strides(hidden),
            COLUMNS=columns,
            num_warps=1,
        )
    return prototype

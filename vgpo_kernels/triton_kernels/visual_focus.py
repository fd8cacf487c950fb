"""Visual prototypes (two launches) and focus scores (one more) in Triton.

A prototype is the sum of its visual tokens in their order, whatever is between them. So a first launch lists where they
are, and the second sums them, with one program per slice of features. Because the features are split and not the
tokens, there are no partial sums and no third launch, and every visual row is still read once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.triton_kernels.common import (
    architecture,
    device_guard,
    extent,
    is_finite,
    num_slots,
    operator,
    slot_range,
    token_range,
    wrap_triton,
)

NORM_FLOOR = tl.constexpr(1e-8)

# Tokens that are added to a prototype at a time. Its bits depend on this number, so it is the same for every GPU.
PROTOTYPE_ROWS = 64
INDEX_BLOCK = 4096


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


def focus_tile(features: int) -> Tile:
    """Return the tile of the focus kernel for D features."""
    shape = TILES[architecture()]
    columns = max(min(triton.next_power_of_2(features), shape.focus_columns), 16)
    return Tile(min(shape.focus_elements // columns, 64), columns, shape.focus_warps)


def prototype_tile(features: int) -> Tile:
    """Return the tile of the prototype kernel for D features."""
    shape = TILES[architecture()]
    columns = max(min(triton.next_power_of_2(features), shape.prototype_columns), 16)
    return Tile(PROTOTYPE_ROWS, columns, shape.prototype_warps)


@triton.jit(do_not_specialize=["rows"])
def visual_index_kernel(
    visual_mask,  # [B, S] or [N]
    boundaries,  # [B + 1] or None
    positions,  # out: rows of a response's visual tokens, counted from its first row, in its slice of [B * S] or [N]
    counts,  # out: [B]
    rows,  # S or N
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, rows)
    # Within the response 32-bit positions suffice.
    visual_mask += begin
    positions += begin
    size = (end - begin).to(tl.int32)
    count = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        row = start + tl.arange(0, BLOCK)
        visible = (tl.load(visual_mask + row, mask=row < size, other=0) != 0).to(tl.int32)
        ordinal = count + tl.cumsum(visible, 0) - 1
        tl.store(positions + ordinal, row, mask=visible != 0)
        count += tl.sum(visible)
    tl.store(counts + response, count)


@triton.jit(do_not_specialize=["rows"])
def prototype_kernel(
    hidden,  # [B, S, D] or [N, D]
    boundaries,  # [B + 1] or None
    positions,  # from visual_index_kernel
    counts,
    prototype,  # out: [B, D]
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
    begin, _ = token_range(boundaries, response, rows)
    if boundaries is None:
        hidden += response.to(tl.int64) * batch_stride
    else:
        hidden += begin * row_stride
    positions += begin
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
        total += tl.load(hidden + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), tl.maximum(count, 1).to(tl.float32))
    tl.store(prototype + response.to(tl.int64) * features + column, mean, mask=column < features)


@triton.jit(do_not_specialize=["batch", "rows", "tokens", "num_prototypes"])
def focus_kernel(
    hidden,  # [B, S, D] or [N, D]
    mask,  # [B, T] or [N]
    boundaries,  # [B + 1] or None
    prototype,  # [P, D]
    prototype_index,  # [B] or None
    counts,  # [B], visual tokens of a response, or None
    cos,  # out: mask's shape
    images,  # out: whether a response has an image, int32 [B], or None
    minima,  # out: the smaller of 0 and a slot's smallest finite cosine, or None
    batch,
    rows,  # S or N
    tokens,  # T or N
    num_prototypes,  # P
    features,  # D
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0)
    response, begin, end = slot_range(boundaries, slot, batch, tokens, ROWS)
    first, _ = token_range(boundaries, response, tokens)
    token = begin + tl.arange(0, ROWS)

    if prototype_index is None:
        mean_row = response.to(tl.int64)
        seen = mean_row >= 0
    else:
        index = tl.load(prototype_index + response)
        seen = (index >= 0) & (num_prototypes > 0)
        mean_row = tl.minimum(tl.maximum(index, 0), tl.maximum(num_prototypes - 1, 0)).to(tl.int64)
    if counts is not None:
        seen = tl.load(counts + response) > 0
    prototype += mean_row * features

    # A padded token (b, t) is row (b, S - T + t); a packed token n is row n.
    if boundaries is None:
        hidden += response.to(tl.int64) * batch_stride
        row = token - first + (rows - tokens)
    else:
        row = token
    # Nothing is scored in a response without an image: its mask is not even read.
    scored = tl.load(mask + token, mask=token < tl.where(seen, end, 0), other=0) != 0

    # A block without anything to score reads nothing. The first of a response also looks at the prototype.
    needed = tl.max(scored.to(tl.int32)) > 0
    if images is not None:
        needed = needed | (seen & (begin == first))
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_square = tl.zeros((COLUMNS,), tl.float32)
    mean_nonzero = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, tl.where(needed, features, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < features
        mean = tl.load(prototype + column, mask=inside, other=0.0)
        state = tl.load(
            hidden + row[:, None] * row_stride + column[None, :], mask=scored[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        dot += state * mean[None, :]
        square += state * state
        mean_square += mean * mean
        mean_nonzero |= (mean != 0.0).to(tl.int32)
    norms = tl.sqrt_rn(tl.sum(square, 1)) * tl.sqrt_rn(tl.sum(mean_square, 0))
    cosine = tl.div_rn(tl.sum(dot, 1), tl.maximum(norms, NORM_FLOOR))
    cosine = tl.where(scored, cosine, 0.0)
    tl.store(cos + token, cosine, mask=token < end)
    if images is not None:
        tl.store(images + response, tl.max(mean_nonzero), mask=begin == first)
    if minima is not None:
        tl.store(minima + slot, tl.min(tl.where(is_finite(cosine), tl.minimum(cosine, 0.0), 0.0)))


def hidden_strides(hidden: Tensor) -> tuple[int, int]:
    """Return the strides of a response and of a row, in elements."""
    return (hidden.stride(0) if hidden.dim() == 3 else 0), hidden.stride(-2)


def launch_prototype(hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return prototypes ``[B, D]`` and the number of visual tokens of each response, int32 ``[B]``."""
    batch, rows = extent(visual_mask, cu_seqlens)
    features = hidden.shape[-1]
    positions = visual_mask.new_empty((visual_mask.numel(),), dtype=torch.int32)
    counts = visual_mask.new_empty((batch,), dtype=torch.int32)
    prototype = hidden.new_empty((batch, features), dtype=torch.float32)
    tile = prototype_tile(features)
    batch_stride, row_stride = hidden_strides(hidden)
    with device_guard(hidden):
        wrap_triton(visual_index_kernel)[(batch,)](
            visual_mask, cu_seqlens, positions, counts, rows, BLOCK=INDEX_BLOCK, num_warps=8
        )
        wrap_triton(prototype_kernel)[(batch * triton.cdiv(features, tile.columns),)](
            hidden,
            cu_seqlens,
            positions,
            counts,
            prototype,
            rows,
            features,
            batch_stride,
            row_stride,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return prototype, counts


class Focus(NamedTuple):
    """What a launch of the focus kernel wrote.

    Attributes:
        cos: Cosines, fp32, in the response mask's shape.
        images: Whether each response has an image, int32 ``[B]``: zero where it has none.
        minima: The smaller of 0 and the smallest finite cosine of each slot, or ``None`` if not asked for.

    """

    cos: Tensor
    images: Tensor
    minima: Tensor | None


def launch_focus(
    hidden: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    prototype: Tensor | None,
    prototype_index: Tensor | None,
    with_minima: bool = False,
) -> Focus:
    """Score every response token against the given prototype, or the mean of ``visual_mask``'s tokens."""
    batch, tokens = extent(response_mask, cu_seqlens)
    rows, features = hidden.shape[-2:]
    if prototype is None:
        assert visual_mask is not None
        means, counts = launch_prototype(hidden, visual_mask, cu_seqlens)
        images, index, out_images = counts, None, None
    else:
        # A response has an image iff its row is not zero, which the kernel sees as it reads it.
        means, counts, index = prototype, None, prototype_index
        images = out_images = response_mask.new_empty((batch,), dtype=torch.int32)
    tile = focus_tile(features)
    slots = num_slots(tokens, batch, cu_seqlens, tile.rows)
    cos = hidden.new_empty(response_mask.shape, dtype=torch.float32)
    minima = hidden.new_empty((slots,), dtype=torch.float32) if with_minima else None
    batch_stride, row_stride = hidden_strides(hidden)
    with device_guard(hidden):
        wrap_triton(focus_kernel)[(slots,)](
            hidden,
            response_mask,
            cu_seqlens,
            means,
            index,
            counts,
            cos,
            out_images,
            minima,
            batch,
            rows,
            tokens,
            means.shape[0],
            features,
            batch_stride,
            row_stride,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return Focus(cos, images, minima)


@operator
def visual_prototype(hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean hidden state of each response's visual tokens, fp32 ``[B, D]``; zeros where there are none."""
    prototype, _ = launch_prototype(hidden, visual_mask, cu_seqlens)
    return prototype


@operator
def visual_focus(**given: Any) -> Tensor:
    """Cosine between each response token's hidden state and its image's prototype, fp32; 0 off the mask."""
    return launch_focus(**given).cos

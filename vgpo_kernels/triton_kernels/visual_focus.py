"""Visual prototypes (two launches) and focus scores (one more) in Triton, whatever the visibility.

A prototype is the sum of its visual tokens in their order, whatever is between them. So a first launch lists where they
are, and the second sums them, with one program per slice of features. Because the features are split and not the
tokens, there are no partial sums and no third launch, and every visual row is still read once.

Images that arrive among the scored tokens (causal visibility) change the prototype from then on. Visual rows up to the
first scored token that sees any make its prototype as above, with the same bits. Rows after them are *late*: they are
added one by one, in fp64, so that a sum is a function of the rows before a token alone, wherever blocks begin. The
second launch keeps the running sum before every :data:`SPAN` rows; a block of tokens in the third starts from the one
before it and adds the few rows in between. So the host need not know how many images arrive, memory does not grow with
their number, and the work stays split over slices of features and blocks of tokens. Where nothing is late, neither
launch reads or writes more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.triton_kernels.common import (
    device_guard,
    extent,
    first_slot,
    is_finite,
    is_per_response,
    num_slots,
    operator,
    slot_range,
    token_range,
    wrap_triton,
)
from vgpo_kernels.triton_kernels.prototypes import (
    IN_FLIGHT,
    NORM_FLOOR,
    NOWHERE,
    SPAN,
    add_visual_rows,
    hidden_strides,
    late_spans,
    launch_inverse_norms,
    launch_prototype,
    launch_running_prototype,
    row_tile,
)

# The square of a smaller norm has lost bits, which matters beside a norm so large that the floor does not decide.
LEAST_NORM = tl.constexpr(2.0**-51)
LARGE_NORM = tl.constexpr(1e-8 * 2.0**51)


@triton.jit(do_not_specialize=["batch", "rows", "tokens", "num_prototypes"])
def focus_kernel(
    hidden,  # [B, S, D] or [N, D]
    inverse_norms,  # of the visual rows, [B * S] or [N], where late ones are added as unit vectors; or None
    mask,  # [B, T] or [N]
    boundaries,  # [B + 1] or None
    prototype,  # [P, D]
    prototype_index,  # [B] or mask's shape, or None
    counts,  # [B], visual tokens of a prototype; None: prototypes are given, and a row of zeros is no image
    positions,  # from visual_index_kernel, with those that follow; None: nothing is late
    ends,
    span_counts,
    sums,  # from prototype_kernel
    cos,  # out: mask's shape
    batch,
    rows,  # S or N
    tokens,  # T or N
    num_prototypes,  # P
    features,  # D
    batch_stride,
    row_stride,
    INDEX_PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,  # products with the prototype in place of cosines, over the norms of the rows alone
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWN_COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0)
    response, begin, end = slot_range(boundaries, slot, batch, tokens, ROWS)
    first, _ = token_range(boundaries, response, tokens)
    token = begin + tl.arange(0, ROWS)
    # A padded token (b, t) is row (b, S - T + t); a packed token n is row n.
    if boundaries is None:
        hidden += response.to(tl.int64) * batch_stride
        row = token - first + (rows - tokens)
    else:
        row = token
    scored = tl.load(mask + token, mask=token < end, other=0) != 0

    if INDEX_PER_TOKEN:
        index = tl.minimum(tl.load(prototype_index + token, mask=scored, other=-1), num_prototypes - 1)
        seeing = index >= 0
        entry = tl.maximum(index, 0).to(tl.int64) * features
        cosine, shown = own_cosines(
            hidden,
            None,
            row,
            seeing,
            prototype,
            entry,
            None,
            None,
            None,
            features,
            row_stride,
            UNIT,
            ROWS,
            OWN_COLUMNS,
        )
    else:
        index = response.to(tl.int64)
        if prototype_index is not None:
            index = tl.minimum(tl.load(prototype_index + response), num_prototypes - 1).to(tl.int64)
        shown = index >= 0
        if counts is not None:
            count = tl.load(counts + response)
            shown = count > 0
        seeing = scored & (token < tl.where(shown, end, 0))
        early = seeing
        if positions is not None:
            positions += token_range(boundaries, response, rows)[0]
            origin = tl.zeros((), tl.int64) if boundaries is None else first
            place = (row - origin).to(tl.int32)
            seeing = seeing & (place > tl.load(positions, mask=count > 0, other=0))
            last = tl.load(ends + response)
            first_late = tl.load(positions + count, mask=last > count, other=NOWHERE)
            early = seeing & (place <= first_late)
            late = seeing & (place > first_late)
        cosine, nonzero = shared_cosines(
            hidden, row, early, prototype + tl.maximum(index, 0) * features, features, row_stride, UNIT, ROWS, COLUMNS
        )
        if counts is None:
            shown = nonzero
        if positions is not None:
            slot_of_spans = first_slot(boundaries, response, rows, SPAN)
            if tl.max(late.to(tl.int32)) > 0:
                if inverse_norms is not None:
                    inverse_norms += token_range(boundaries, response, rows)[0]
                own = late_cosines(
                    hidden + origin * row_stride,
                    inverse_norms,
                    place,
                    late,
                    positions,
                    count,
                    last,
                    span_counts + slot_of_spans,
                    sums + slot_of_spans * features,
                    features,
                    row_stride,
                    UNIT,
                    ROWS,
                    OWN_COLUMNS,
                )
                cosine = tl.where(late, own, cosine)
    # In one condition the two would keep registers busy while rows are read.
    cosine = tl.where(shown, tl.where(seeing, cosine, float("nan")), float("nan"))
    cosine = tl.where(scored, cosine, 0.0)
    tl.store(cos + token, cosine, mask=token < end)


@triton.jit
def shared_cosines(
    hidden,
    row,
    wanted,
    prototype,
    features,
    row_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cosines of a block of rows with one prototype, and whether that is not zero; if none is wanted, reads nothing."""
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_square = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, tl.where(tl.max(wanted.to(tl.int32)) > 0, features, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < features
        mean = tl.load(prototype + column, mask=inside, other=0.0)
        state = tl.load(
            hidden + row[:, None] * row_stride + column[None, :], mask=wanted[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        dot += state * mean[None, :]
        square += state * state
        mean_square += mean * mean
    mean_square = tl.sum(mean_square, 0)
    # A prototype whose squares vanish may yet not be zero. Looked up where it matters, this takes no registers above.
    nonzero = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, tl.where(mean_square == 0.0, features, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        nonzero |= (tl.load(prototype + column, mask=column < features, other=0.0) != 0.0).to(tl.int32)
    cosine = cosine_of(tl.sum(dot, 1), tl.sum(square, 1), mean_square, UNIT)
    return cosine, (mean_square != 0.0) | (tl.max(nonzero) != 0)


@triton.jit
def late_cosines(
    hidden,  # first row of the response
    inverse_norms,  # that of its first row, or None
    row,  # rows of the block, counted from there
    late,
    positions,
    count,
    last,
    span_counts,
    sums,
    features,
    row_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cosines of the rows of a block that see late images: the running sum before the block, and what arrives in it."""
    begin_span, end_span = late_spans(positions, count, last)
    span = tl.minimum(tl.maximum(tl.min(row) // SPAN, begin_span), end_span)
    added = tl.minimum(tl.maximum(tl.load(span_counts + span), count), last)
    WINDOW: tl.constexpr = 128  # at least SPAN + ROWS
    ordinal = added + tl.arange(0, WINDOW)
    arrival = tl.load(positions + ordinal, mask=ordinal < last, other=NOWHERE)
    seen = added + tl.sum((arrival[None, :] < row[:, None]).to(tl.int32), 1)
    running = sums + span.to(tl.int64) * features
    cosine, _ = own_cosines(
        hidden,
        inverse_norms,
        row,
        late,
        running,
        None,
        positions,
        added,
        seen,
        features,
        row_stride,
        UNIT,
        ROWS,
        COLUMNS,
    )
    return cosine


@triton.jit
def own_cosines(
    hidden,
    inverse_norms,  # of arrivals, or None
    row,
    wanted,
    prototype,  # [P, D]; with arrivals: a running sum, fp64 [D]
    entry,  # where the prototype of each row begins, or None
    arrivals,  # rows of visual tokens, or None
    added,  # how many of them the running sum has
    seen,  # how many of them each row sees
    features,
    row_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cosines of a block of rows, each with its own prototype, and whether that is not zero.

    No result depends on what other rows are in the block.
    """
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_square = tl.zeros((ROWS, COLUMNS), tl.float32)
    if arrivals is not None:
        stop = tl.max(tl.where(wanted, seen, 0))
        share = 1.0 / tl.maximum(seen, 1).to(tl.float64)
    for start in range(0, tl.where(tl.max(wanted.to(tl.int32)) > 0, features, 0), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < features
        taken = wanted[:, None] & inside[None, :]
        if arrivals is None:
            mean = tl.load(prototype + entry[:, None] + column[None, :], mask=taken, other=0.0)
        else:
            # Every row loads what all of them add: to hand it over, rows would have to wait for each other.
            same = column[None, :] + tl.zeros((ROWS, 1), tl.int32)
            total = tl.load(prototype + same, mask=taken, other=0.0)
            for ordinal in range(added, stop, IN_FLIGHT):
                total = add_visual_rows(
                    total, hidden + same, inverse_norms, arrivals, ordinal, stop, seen[:, None], taken, row_stride
                )
            mean = (total * share[:, None]).to(tl.float32)
        state = tl.load(hidden + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=taken, other=0.0).to(
            tl.float32
        )
        dot += state * mean
        square += state * state
        mean_square += mean * mean
    mean_square = tl.sum(mean_square, 1)
    nonzero = tl.zeros((ROWS, COLUMNS), tl.int32)
    if arrivals is None:
        vanished = wanted & (mean_square == 0.0)
        for start in range(0, tl.where(tl.max(vanished.to(tl.int32)) > 0, features, 0), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = vanished[:, None] & (column < features)[None, :]
            mean = tl.load(prototype + entry[:, None] + column[None, :], mask=inside, other=0.0)
            nonzero |= (mean != 0.0).to(tl.int32)
    cosine = cosine_of(tl.sum(dot, 1), tl.sum(square, 1), mean_square, UNIT)
    return cosine, (mean_square != 0.0) | (tl.max(nonzero, 1) != 0)


@triton.jit
def cosine_of(dot, square, mean_square, UNIT: tl.constexpr):
    """Cosine from its sums; infinite where they are not finite, or a norm leaves fp32's range."""
    norm, mean_norm = tl.sqrt_rn(square), tl.sqrt_rn(mean_square)
    if UNIT:
        mean_norm = tl.full(mean_norm.shape, 1.0, tl.float32)
    norms = norm * mean_norm
    cosine = tl.div_rn(dot, tl.maximum(norms, NORM_FLOOR))
    lost = (tl.minimum(norm, mean_norm) < LEAST_NORM) & (tl.maximum(norm, mean_norm) > LARGE_NORM)
    known = is_finite(cosine) & is_finite(norms) & ~(lost & (dot != 0.0))
    return tl.where(known, cosine, float("inf"))


def launch_focus(
    hidden: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    prototype: Tensor | None,
    prototype_index: Tensor | None,
    causal: bool,
    unit: bool = False,
) -> Tensor:
    """Score every response token against the given prototype, or the mean of ``visual_mask``'s tokens.

    Returns:
        Cosines, fp32, in the response mask's shape.

    """
    batch, tokens = extent(response_mask, cu_seqlens)
    rows, features = hidden.shape[-2:]
    counts, arrivals, inverse_norms = None, None, None
    if prototype is None:
        assert visual_mask is not None
        scored = response_mask if causal else None
        inverse_norms = launch_inverse_norms(hidden, visual_mask) if unit else None
        prototype, counts, arrivals = launch_prototype(hidden, visual_mask, cu_seqlens, scored, inverse_norms)
    positions, ends, span_counts, sums = arrivals or (None, None, None, None)
    tile = row_tile(features)
    slots = num_slots(tokens, batch, cu_seqlens, tile.rows)
    cos = hidden.new_empty(response_mask.shape, dtype=torch.float32)
    batch_stride, row_stride = hidden_strides(hidden)
    with device_guard(hidden):
        wrap_triton(focus_kernel)[(slots,)](
            hidden,
            inverse_norms if causal else None,
            response_mask,
            cu_seqlens,
            prototype,
            prototype_index,
            counts,
            positions,
            ends,
            span_counts,
            sums,
            cos,
            batch,
            rows,
            tokens,
            prototype.shape[0],
            features,
            batch_stride,
            row_stride,
            INDEX_PER_TOKEN=prototype_index is not None and not is_per_response(prototype_index, batch),
            UNIT=unit,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            # A prototype for each token takes registers, and as many columns would spill them.
            OWN_COLUMNS=max(tile.columns // 2, 16),
            num_warps=tile.warps,
        )
    return cos


@operator
def visual_prototype(
    hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None, causal: bool, unit: bool
) -> Tensor:
    """Mean hidden state of each response's visual tokens, fp32 ``[B, D]``; zeros where there are none.

    Causal: of those before each position, in hidden's shape. Unit: of the states' unit vectors.
    """
    inverse_norms = launch_inverse_norms(hidden, visual_mask) if unit else None
    if not causal:
        return launch_prototype(hidden, visual_mask, cu_seqlens, inverse_norms=inverse_norms)[0]
    return launch_running_prototype(hidden, visual_mask, cu_seqlens, inverse_norms)


@operator
def visual_focus(**given: Any) -> Tensor:
    """Cosine between each response token's hidden state and its image's prototype, fp32; 0 off the mask."""
    return launch_focus(**given)

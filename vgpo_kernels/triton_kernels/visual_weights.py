"""From cosines to advantage factors in Triton: two launches, three where the offset is the batch's smallest cosine.

The first launch has one program per response, which loops over its tokens: gate threshold, compensated weights and
their statistics. The second has one program per block of tokens. It needs the statistics of every response of a group,
and Triton has no barrier across programs but the end of a launch. Group statistics are only B numbers, so each program
reduces them itself, which is faster than another launch.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.ops.visual_weights import FOCUS_METRICS
from vgpo_kernels.triton_kernels.common import (
    RANGE_FLOOR,
    UNIT_SCALE,
    WEIGHT_SCALE,
    clamp,
    device_guard,
    double_from_bits,
    exponential,
    extent,
    from_fixed,
    is_finite,
    mean_from_fixed,
    num_slots,
    operator,
    slot_range,
    to_fixed,
    token_range,
    warps_of,
    wrap_triton,
)

STEP_SLACK = tl.constexpr(1e-6)  # a position one rounding error below the step still counts

# Columns of the statistics of a response, fp32 [B, STATISTICS].
STATISTICS = tl.constexpr(16)
LOW = tl.constexpr(0)  # smallest w
RANGE = tl.constexpr(1)  # largest w less the smallest, plus the floor
MEAN = tl.constexpr(2)  # mean of min-max normalised w
SCORE = tl.constexpr(3)  # visual accumulation s
WEIGHTED = tl.constexpr(4)  # 1 where the response is weighted, else 0, as those that follow
COS_SUM = tl.constexpr(5)
GATE_COUNT = tl.constexpr(6)
LATE_EARLY = tl.constexpr(7)  # ratio of late to early focus
HAS_RATIO = tl.constexpr(8)
TOKENS = tl.constexpr(9)  # its valid tokens with a signal
NONFINITE = tl.constexpr(10)  # 1 where a cosine is not finite, other than by preceding the response's image
# The response's first token with a signal, counted from its first one; the bits of an int32, which no sum reads.
SIGNAL = tl.constexpr(11)

RESPONSE_BLOCK = 1024
RESPONSE_THREADS = 512  # one program per response makes few programs, so each should be wide
TOKEN_BLOCK = 1024
GROUP_BLOCK = tl.constexpr(128)


@triton.jit
def order_key(value):
    """An unsigned integer that orders as the float does; -0.0 and +0.0 share one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def focus_score(cos, offset, SCORE_KIND: tl.constexpr):
    """rho_t: (1 + cos) / 2, or cos - offset."""
    return (1.0 + cos) * 0.5 if SCORE_KIND == "affine" else cos - offset


@triton.jit
def compensation(
    ordinal,  # 0-based, among the `length` valid tokens of its response
    length,
    beta,
    start_ratio,
    exponent,
    step_ratio,
    SCHEDULE: tl.constexpr,
    POSITION: tl.constexpr,
):
    """c_t (Eq. 5)."""
    if POSITION == "one_based":
        position = tl.div_rn(ordinal.to(tl.float32) + 1.0, length.to(tl.float32))
    else:
        position = tl.div_rn(ordinal.to(tl.float32), length.to(tl.float32) - 1.0 + RANGE_FLOOR)
    if SCHEDULE == "step":
        strength = tl.where(position >= step_ratio - STEP_SLACK, 1.0, 0.0)
    else:
        strength = tl.div_rn(position - start_ratio, 1.0 - start_ratio + RANGE_FLOOR)
        if SCHEDULE == "exponential":
            strength = clamp(strength, 0.0, 1.0)
            power = exponential(exponent * tl.log(tl.maximum(strength, 1e-30)))
            strength = tl.where(strength > 0.0, power, 0.0)
    return tl.where(position < start_ratio, 0.0, beta * strength)


@triton.jit(do_not_specialize=["batch", "tokens"])
def lowest_cosine_kernel(
    cos,  # [B, T] or [N]
    mask,
    images,  # [B] or None
    boundaries,  # [B + 1] or None
    minima,  # out: the smaller of 0 and a slot's smallest finite cosine
    batch,
    tokens,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    response, begin, end = slot_range(boundaries, slot, batch, tokens, BLOCK)
    if images is not None:
        end = tl.where(tl.load(images + response) != 0, end, 0)
    token = begin + tl.arange(0, BLOCK)
    valid = tl.load(mask + token, mask=token < end, other=0) != 0
    value = tl.load(cos + token, mask=valid, other=0.0)
    tl.store(minima + slot, tl.min(tl.where(is_finite(value), tl.minimum(value, 0.0), 0.0)))


@triton.jit
def find_gate(cos, mask, size, length, unseen, head_bits, top_bits, BLOCK: tl.constexpr):
    """Gate of a response of ``size`` positions and ``length`` valid tokens, of which ``unseen`` saw no image (Eq. 6).

    Returns the position at which the tail begins, the key of its k-th largest cosine (found digit by digit, so that
    it is exact), and how many tokens reach it.
    """
    lane = tl.arange(0, BLOCK)
    first = tl.maximum((length.to(tl.float64) * double_from_bits(head_bits)).to(tl.int32), unseen)
    count = tl.zeros((), tl.int32)
    located = tl.zeros((BLOCK,), tl.int32) + size
    for start in range(0, size, BLOCK):
        token = start + lane
        valid = (tl.load(mask + token, mask=token < size, other=0) != 0).to(tl.int32)
        ordinal = count + tl.cumsum(valid, 0) - 1
        located = tl.where((valid != 0) & (ordinal >= first), tl.minimum(located, token), located)
        count += tl.sum(valid)
    tail_begin = tl.min(located)

    wanted = ((length - first).to(tl.float64) * double_from_bits(top_bits)).to(tl.int32)
    wanted = tl.maximum(wanted, 1)
    larger = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    threshold = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)  # the bits of the threshold that are found already
    digit = tl.arange(0, 256)
    for step in range(4):
        shift = tl.zeros((), tl.uint32) + (24 - 8 * step)
        histogram = tl.zeros((256,), tl.int32)
        for start in range(tail_begin, size, BLOCK):
            token = start + lane
            valid = tl.load(mask + token, mask=token < size, other=0) != 0
            key = order_key(tl.load(cos + token, mask=valid, other=0.0))
            valid = valid & ((key & known) == threshold)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=valid)
        at_least = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
        chosen = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32)) - 1, 0)
        above = tl.sum(tl.where(digit > chosen, histogram, 0))
        wanted -= above
        larger += above
        equal = tl.sum(tl.where(digit == chosen, histogram, 0))
        threshold |= chosen.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    return tail_begin, threshold, larger + equal


@triton.jit(do_not_specialize=["tokens", "num_minima", "head_bits", "top_bits"])
def response_kernel(
    cos,  # [B, T] or [N]
    mask,
    images,  # [B], 0 where a response has no image; or None
    boundaries,  # [B + 1] or None
    minima,  # [num_minima] or None
    w,  # out: cos's shape
    statistics,  # out: [B, STATISTICS]
    lengths,  # out: valid tokens of a response, int32 [B]
    tokens,  # T or N
    num_minima,
    head_bits,  # 1 - tail_ratio, the bits of a double
    top_bits,  # top_ratio, likewise
    beta,
    start_ratio,
    exponent,
    step_ratio,
    score_offset,
    SCORE_KIND: tl.constexpr,
    SCHEDULE: tl.constexpr,
    POSITION: tl.constexpr,
    ACCUMULATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, tokens)
    # Within the response 32-bit positions suffice.
    cos += begin
    mask += begin
    w += begin
    size = (end - begin).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    # How long the response is, where its signal begins, and whether its cosines are finite.
    valid_count = tl.zeros((BLOCK,), tl.int32)
    bad_count = tl.zeros((BLOCK,), tl.int32)
    numbers = tl.zeros((BLOCK,), tl.int32) + size
    for start in range(0, size, BLOCK):
        token = start + lane
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        value = tl.load(cos + token, mask=valid, other=0.0)
        number = valid & (value == value)
        valid_count += valid.to(tl.int32)
        bad_count += tl.where(is_finite(value), 0, 1)
        numbers = tl.minimum(numbers, tl.where(number, token, size))
    length = tl.sum(valid_count)
    signal = tl.min(numbers)
    # Tokens before the first number saw no image. There are hardly ever any.
    unseen_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, signal, BLOCK):
        token = start + lane
        unseen_count += (tl.load(mask + token, mask=token < signal, other=0) != 0).to(tl.int32)
    unseen = tl.sum(unseen_count)
    seen_half = tl.maximum((length + 1) // 2, unseen)
    finite = tl.sum(bad_count) == unseen
    pictured = length >= 0
    if images is not None:
        pictured = tl.load(images + response) != 0
    weighted = pictured & finite & (unseen < length)
    # A response that takes no part has no active tokens; its NaN must not reach arithmetic.
    active_size = tl.where(weighted, size, 0)
    seeing = tl.maximum(length - unseen, 1)  # tokens with a signal

    offset = score_offset
    if SCORE_KIND == "lowest":
        lowest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_minima, BLOCK):
            lowest = tl.minimum(lowest, tl.load(minima + start + lane, mask=start + lane < num_minima, other=0.0))
        offset = tl.min(lowest)

    tail_begin = size
    threshold = tl.zeros((), tl.uint32)
    open_count = tl.where(weighted, seeing, 0)
    if GATE:
        tail_begin, threshold, open_count = find_gate(
            cos, mask, active_size, length, unseen, head_bits, top_bits, BLOCK
        )

    # Compensated weights (Eq. 5), and what the normalisations and the metrics need of them.
    count = tl.zeros((), tl.int32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), -float("inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.int64)
    cos_sum = tl.zeros((BLOCK,), tl.float32)
    early_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        token = start + lane
        valid = tl.load(mask + token, mask=token < active_size, other=0) != 0
        active = valid & (token >= signal)
        value = tl.load(cos + token, mask=active, other=0.0)
        ordinal = count + tl.cumsum(valid.to(tl.int32), 0) - 1
        count += tl.sum(valid.to(tl.int32))
        focus = focus_score(value, offset, SCORE_KIND)
        compensated = compensation(ordinal, length, beta, start_ratio, exponent, step_ratio, SCHEDULE, POSITION)
        open_gate = active
        if GATE:
            open_gate = active & (token >= tail_begin) & (order_key(value) >= threshold)
        weight = tl.where(active, focus * (1.0 + tl.where(open_gate, compensated, 0.0)), 0.0)
        tl.store(w + token, weight, mask=token < size)
        low = tl.minimum(low, tl.where(active, weight, float("inf")))
        high = tl.maximum(high, tl.where(active, weight, -float("inf")))
        weight_sum += to_fixed(weight, WEIGHT_SCALE)
        cos_sum += value
        early_sum += tl.where(ordinal < seen_half, value, 0.0)
    lowest_weight = tl.where(weighted, tl.min(low), 0.0)
    spread = tl.where(weighted, tl.max(high) - lowest_weight, 0.0) + RANGE_FLOOR

    # The mean of the normalised weights (Eq. 7). The block before wrote what this one reads with other threads.
    tl.debug_barrier()
    unit_sum = tl.zeros((BLOCK,), tl.int64)
    for start in range(signal, active_size, BLOCK):
        token = start + lane
        active = tl.load(mask + token, mask=token < size, other=0) != 0
        weight = tl.load(w + token, mask=active, other=0.0)
        unit = tl.where(active, tl.div_rn(weight - lowest_weight, spread), 0.0)
        unit_sum += to_fixed(unit, UNIT_SCALE)
    unit_total = tl.sum(unit_sum)
    weight_total = tl.sum(weight_sum)
    if ACCUMULATION == "compensated":
        score = from_fixed(weight_total, WEIGHT_SCALE)
    elif ACCUMULATION == "normalized":
        score = from_fixed(unit_total, UNIT_SCALE)
    else:
        score = mean_from_fixed(weight_total, WEIGHT_SCALE, seeing)
    score = tl.where(weighted, score, float("nan"))

    # The score is affine in the cosine, so that the score of a mean is the mean of scores.
    cos_total = tl.sum(cos_sum)
    early_total = tl.sum(early_sum)
    early_count, late_count = seen_half - unseen, length - seen_half
    early = focus_score(tl.div_rn(early_total, tl.maximum(early_count, 1).to(tl.float32)), offset, SCORE_KIND)
    late_mean = tl.div_rn(cos_total - early_total, tl.maximum(late_count, 1).to(tl.float32))
    late = focus_score(late_mean, offset, SCORE_KIND)
    has_ratio = weighted & (early_count > 0) & (late_count > 0) & (early > 0.0)
    row = statistics + response.to(tl.int64) * STATISTICS
    tl.store(row + LOW, lowest_weight)
    tl.store(row + RANGE, spread)
    tl.store(row + MEAN, mean_from_fixed(unit_total, UNIT_SCALE, seeing))
    tl.store(row + SCORE, score)
    tl.store(row + WEIGHTED, tl.where(weighted, 1.0, 0.0))
    tl.store(row + COS_SUM, cos_total)
    tl.store(row + GATE_COUNT, open_count.to(tl.float32))
    tl.store(row + LATE_EARLY, tl.where(has_ratio, tl.div_rn(late, tl.where(has_ratio, early, 1.0)), 0.0))
    tl.store(row + HAS_RATIO, tl.where(has_ratio, 1.0, 0.0))
    tl.store(row + TOKENS, tl.where(weighted, seeing, 0).to(tl.float32))
    tl.store(row + NONFINITE, tl.where(finite, 0.0, tl.where(pictured, 1.0, 0.0)))
    tl.store(row + SIGNAL, signal.to(tl.float32, bitcast=True))
    tl.store(lengths + response, length)


@triton.jit
def group_weight(response, score, member, groups, batch, stride):
    """Phi of a response (Eq. 9-10): its score, min-max normalised within its group and centred.

    ``score`` and ``member`` (or ``None``) hold one entry per response, ``stride`` apart. Members are those whose entry
    is not 0 and whose score is finite.
    """
    group = tl.load(groups + response)
    low = tl.full((GROUP_BLOCK,), float("inf"), tl.float32)
    high = tl.full((GROUP_BLOCK,), -float("inf"), tl.float32)
    for start in range(0, batch, GROUP_BLOCK):
        values, joined = group_members(start, group, score, member, groups, batch, stride)
        low = tl.minimum(low, tl.where(joined, values, float("inf")))
        high = tl.maximum(high, tl.where(joined, values, -float("inf")))
    lowest = tl.min(low)
    spread = tl.max(high) - lowest + RANGE_FLOOR
    total = tl.zeros((GROUP_BLOCK,), tl.int64)
    size = tl.zeros((GROUP_BLOCK,), tl.int32)
    for start in range(0, batch, GROUP_BLOCK):
        values, joined = group_members(start, group, score, member, groups, batch, stride)
        total += to_fixed(tl.where(joined, tl.div_rn(values - lowest, spread), 0.0), UNIT_SCALE)
        size += joined.to(tl.int32)
    mean = mean_from_fixed(tl.sum(total), UNIT_SCALE, tl.maximum(tl.sum(size), 1))
    own = tl.load(score + response.to(tl.int64) * stride)
    joins = is_finite(own)
    if member is not None:
        joins = joins & (tl.load(member + response.to(tl.int64) * stride) != 0)
    return tl.where(joins, tl.div_rn(own - lowest, spread) - mean, 0.0)


@triton.jit
def group_members(start, group, score, member, groups, batch, stride):
    """Scores of a block of responses, and which of them belong to a group."""
    other = start + tl.arange(0, GROUP_BLOCK)
    inside = other < batch
    joined = inside & (tl.load(groups + other, mask=inside, other=0) == group)
    entry = other.to(tl.int64) * stride
    if member is not None:
        joined = joined & (tl.load(member + entry, mask=joined, other=0) != 0)
    values = tl.load(score + entry, mask=joined, other=0.0)
    return values, joined & is_finite(values)


@triton.jit
def token_factor(weight, phi, row, position, intra_low, intra_high, inter_low, inter_high, INTRA: tl.constexpr):
    """Factors and psi of a block of active tokens (Eq. 7-8, 11) from their weights; ``row`` of the statistics.

    ``position`` is a token's, counted from its response's first one.
    """
    psi = tl.zeros_like(weight)
    if INTRA:
        signal = tl.load(row + SIGNAL).to(tl.int32, bitcast=True)
        psi = tl.div_rn(weight - tl.load(row + LOW), tl.load(row + RANGE)) - tl.load(row + MEAN)
        psi = tl.where(position >= signal, psi, 0.0)
    return clamp(1.0 + psi, intra_low, intra_high) * clamp(1.0 + phi, inter_low, inter_high), psi


@triton.jit
def store_focus_metrics(statistics, groups, metrics, batch):
    """Sum the statistics of all responses, in their order, to FOCUS_METRICS."""
    BLOCK: tl.constexpr = 64
    OTHERS: tl.constexpr = 8
    field = tl.arange(0, STATISTICS)
    sums = tl.zeros((BLOCK, STATISTICS), tl.float64)
    found = tl.zeros((BLOCK,), tl.int32)
    several = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, batch, BLOCK):
        response = start + tl.arange(0, BLOCK)
        inside = (response < batch)[:, None] & (field >= WEIGHTED)[None, :]
        entry = response.to(tl.int64)[:, None] * STATISTICS + field[None, :]
        sums += tl.load(statistics + entry, mask=inside & (field <= NONFINITE)[None, :], other=0.0).to(tl.float64)
        # A group is counted at its first weighted response, and as one of several at its second.
        group, weighted = group_of(response, statistics, groups, batch)
        earlier = tl.zeros((BLOCK,), tl.int32)
        for other_start in range(0, tl.minimum(start + BLOCK, batch), OTHERS):
            other = other_start + tl.arange(0, OTHERS)
            other_group, counts = group_of(other, statistics, groups, batch)
            counts = counts[None, :] & (other[None, :] < response[:, None])
            earlier += tl.sum((counts & (other_group[None, :] == group[:, None])).to(tl.int32), 1)
        found += (weighted & (earlier == 0)).to(tl.int32)
        several += (weighted & (earlier == 1)).to(tl.int32)
    total = tl.sum(sums, 0)
    tokens = tl.maximum(field_of(total, field, TOKENS), 1.0)
    ratios = tl.maximum(field_of(total, field, HAS_RATIO), 1.0)
    tl.store(metrics, (field_of(total, field, COS_SUM) / tokens).to(tl.float32))
    tl.store(metrics + 1, (field_of(total, field, GATE_COUNT) / tokens).to(tl.float32))
    tl.store(metrics + 2, (field_of(total, field, LATE_EARLY) / ratios).to(tl.float32))
    tl.store(metrics + 3, field_of(total, field, WEIGHTED).to(tl.float32))
    tl.store(metrics + 4, field_of(total, field, NONFINITE).to(tl.float32))
    tl.store(metrics + 5, tl.sum(found).to(tl.float32))
    tl.store(metrics + 6, tl.sum(found - several).to(tl.float32))


@triton.jit
def group_of(response, statistics, groups, batch):
    """Groups of a block of responses, and which of them are weighted."""
    inside = response < batch
    weighted = tl.load(statistics + response.to(tl.int64) * STATISTICS + WEIGHTED, mask=inside, other=0.0) != 0.0
    return tl.load(groups + response, mask=inside, other=0), weighted


@triton.jit
def field_of(values, field, FIELD: tl.constexpr):
    return tl.sum(tl.where(field == FIELD, values, 0.0))


@triton.jit(do_not_specialize=["batch", "tokens"])
def factor_kernel(
    w,  # [B, T] or [N]
    mask,
    statistics,  # [B, STATISTICS]
    groups,  # [B]
    boundaries,  # [B + 1] or None
    factors,  # out: w's shape
    psi,  # out: w's shape
    phi,  # out: [B]
    score,  # out: [B]
    metrics,  # out: [7]
    batch,
    tokens,
    intra_low,
    intra_high,
    inter_low,
    inter_high,
    INTRA: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    response, begin, end = slot_range(boundaries, slot, batch, tokens, BLOCK)
    first, _ = token_range(boundaries, response, tokens)
    row = statistics + response.to(tl.int64) * STATISTICS
    weighted = tl.load(row + WEIGHTED) != 0.0
    trajectory = tl.zeros((), tl.float32)
    if INTER:
        trajectory = group_weight(response, statistics + SCORE, statistics + WEIGHTED, groups, batch, STATISTICS)

    token = begin + tl.arange(0, BLOCK)
    active = tl.load(mask + token, mask=token < tl.where(weighted, end, 0), other=0) != 0
    weight = tl.load(w + token, mask=active, other=0.0)
    factor, centred = token_factor(
        weight, trajectory, row, token - first, intra_low, intra_high, inter_low, inter_high, INTRA
    )
    tl.store(factors + token, tl.where(active, factor, 1.0), mask=token < end)
    tl.store(psi + token, tl.where(active, centred, 0.0), mask=token < end)
    if begin == first:
        tl.store(phi + response, trajectory)
        tl.store(score + response, tl.load(row + SCORE))
    if slot == 0:
        store_focus_metrics(statistics, groups, metrics, batch)


@triton.jit(do_not_specialize=["batch"])
def group_kernel(
    score,  # [B]
    groups,  # [B]
    has_visual,  # [B] or None
    phi,  # out: [B]
    batch,
):
    response = tl.program_id(0)
    tl.store(phi + response, group_weight(response, score, has_visual, groups, batch, 1))


def double_bits(value: float) -> int:
    """Return the bits of a double, for :func:`double_from_bits`."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def response_settings(config: VGPOConfig) -> dict[str, Any]:
    """Return a configuration as keyword arguments of ``response_kernel``."""
    lowest = config.score == "offset" and config.score_offset is None
    return {
        "head_bits": double_bits(1.0 - config.tail_ratio),
        "top_bits": double_bits(config.top_ratio),
        "beta": config.beta,
        "start_ratio": config.start_ratio,
        "exponent": config.exponent,
        "step_ratio": config.step_ratio,
        "score_offset": config.score_offset or 0.0,
        "SCORE_KIND": "lowest" if lowest else config.score,
        "SCHEDULE": config.schedule,
        "POSITION": config.position,
        "ACCUMULATION": config.accumulation,
        "GATE": config.gate,
    }


def factor_settings(config: VGPOConfig) -> dict[str, Any]:
    """Return the keyword arguments that tell kernels how to compute factors from psi and phi."""
    unclamped = (-float("inf"), float("inf"))
    intra_low, intra_high = config.intra_clamp or unclamped
    inter_low, inter_high = config.inter_clamp or unclamped
    return {
        "intra_low": intra_low,
        "intra_high": intra_high,
        "inter_low": inter_low,
        "inter_high": inter_high,
        "INTRA": config.intra,
        "INTER": config.inter,
    }


def needs_minima(config: VGPOConfig) -> bool:
    """Whether scores are offset by the smallest cosine of the batch."""
    return config.score == "offset" and config.score_offset is None


def launch_responses(
    cos: Tensor,
    response_mask: Tensor,
    images: Tensor | None,
    cu_seqlens: Tensor | None,
    minima: Tensor | None,
    config: VGPOConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w, the statistics of each response ``[B, STATISTICS]``, and its number of valid tokens, int32 ``[B]``."""
    batch, tokens = extent(response_mask, cu_seqlens)
    w = cos.new_empty(cos.shape)
    statistics = cos.new_empty((batch, STATISTICS.value))
    lengths = cos.new_empty((batch,), dtype=torch.int32)
    with device_guard(cos):
        wrap_triton(response_kernel)[(batch,)](
            cos,
            response_mask,
            images,
            cu_seqlens,
            minima,
            w,
            statistics,
            lengths,
            tokens,
            0 if minima is None else minima.shape[0],
            **response_settings(config),
            BLOCK=RESPONSE_BLOCK,
            num_warps=warps_of(RESPONSE_THREADS),
        )
    return w, statistics, lengths


@operator
def visual_weights(
    cos: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    has_visual: Tensor | None,
    cu_seqlens: Tensor | None,
    config: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return factors, psi and w in cos's shape, phi and score ``[B]``, and the focus metrics ``[7]``, all fp32."""
    settings = VGPOConfig.from_floats(config)
    batch, tokens = extent(response_mask, cu_seqlens)
    slots = num_slots(tokens, batch, cu_seqlens, TOKEN_BLOCK)
    minima = None
    if needs_minima(settings):
        minima = cos.new_empty((slots,))
        with device_guard(cos):
            wrap_triton(lowest_cosine_kernel)[(slots,)](
                cos, response_mask, has_visual, cu_seqlens, minima, batch, tokens, BLOCK=TOKEN_BLOCK
            )
    w, statistics, _ = launch_responses(cos, response_mask, has_visual, cu_seqlens, minima, settings)
    factors, psi = cos.new_empty(cos.shape), cos.new_empty(cos.shape)
    phi, score = cos.new_empty((batch,)), cos.new_empty((batch,))
    # Without responses no program runs that could write them.
    metrics = cos.new_empty((len(FOCUS_METRICS),)) if batch else cos.new_zeros((len(FOCUS_METRICS),))
    with device_guard(cos):
        wrap_triton(factor_kernel)[(slots,)](
            w,
            response_mask,
            statistics,
            group_ids,
            cu_seqlens,
            factors,
            psi,
            phi,
            score,
            metrics,
            batch,
            tokens,
            **factor_settings(settings),
            BLOCK=TOKEN_BLOCK,
        )
    return factors, psi, w, phi, score, metrics


@operator
def group_weights(score: Tensor, group_ids: Tensor, has_visual: Tensor | None, config: list[float]) -> Tensor:
    """Inter-trajectory weights phi, fp32 ``[B]``; 0 for a response that takes no part."""
    if not VGPOConfig.from_floats(config).inter:
        return torch.zeros_like(score)
    phi = torch.empty_like(score)
    with device_guard(score):
        wrap_triton(group_kernel)[(score.shape[0],)](score, group_ids, has_visual, phi, score.shape[0])
    return phi

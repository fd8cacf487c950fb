"""Factors of responses from their scores in Triton: one of B numbers among those of its group or of the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from vgpo_kernels.reference import token_shaping as reference
from vgpo_kernels.triton_kernels.common import (
    UNIT_SCALE,
    clamp,
    exponential,
    is_finite,
    mean_from_fixed,
    power_of_two,
    to_fixed,
)
from vgpo_kernels.triton_kernels.responses import choose_digit, order_key

MASS_FLOOR = tl.constexpr(reference.RANGE_FLOOR)
LEAST_RANGE = tl.constexpr(reference.LEAST_RANGE)
DEVIATION_FLOOR = tl.constexpr(reference.DEVIATION_FLOOR)
SCORES = tl.constexpr(256)  # that a program reads at a time


@triton.jit
def fixed_scale_of(largest):
    """Scale at which values of at most ``largest`` in magnitude are added in fixed point: none reaches 2^43."""
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return power_of_two(42 - tl.maximum(exponent, -80))


@triton.jit
def hyperbolic_tangent(value):
    """tanh(value) to a few units in the last place, by its series where a quotient would cancel."""
    size = tl.abs(value)
    small = clamp(value, -0.25, 0.25)
    square = small * small
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    power = exponential(-2.0 * size)
    large = tl.where(value < 0.0, -1.0, 1.0) * tl.div_rn(1.0 - power, 1.0 + power)
    return tl.where(size < 0.25, small * series, large)


@triton.jit
def faded_in(weight, progress, FADES: tl.constexpr):
    """A weight, or what it is at this progress of training."""
    return 1.0 + progress * (weight - 1.0) if FADES else weight


@triton.jit
def compared_scores(start, group, score, groups, batch, GROUPED: tl.constexpr):
    """Scores of a block of responses, and which of them take part."""
    other = start + tl.arange(0, SCORES)
    joined = other < batch
    if GROUPED:
        joined = joined & (tl.load(groups + other, mask=joined, other=0) == group)
    value = tl.load(score + other, mask=joined, other=0.0)
    joined = joined & is_finite(value)
    return tl.where(joined, value, 0.0), joined


@triton.jit
def score_extremes(group, score, groups, batch, GROUPED: tl.constexpr):
    """Smallest and largest score of those that take part, and their number."""
    low = tl.full((SCORES,), float("inf"), tl.float32)
    high = tl.full((SCORES,), -float("inf"), tl.float32)
    size = tl.zeros((SCORES,), tl.int32)
    for start in range(0, batch, SCORES):
        value, joined = compared_scores(start, group, score, groups, batch, GROUPED)
        low = tl.minimum(low, tl.where(joined, value, float("inf")))
        high = tl.maximum(high, tl.where(joined, value, -float("inf")))
        size += joined.to(tl.int32)
    number = tl.sum(size)
    # Of none, zeros.
    lowest, highest = tl.where(number > 0, tl.min(low), 0.0), tl.where(number > 0, tl.max(high), 0.0)
    return lowest, highest, tl.maximum(number, 1)


@triton.jit
def score_mean(
    group, score, groups, batch, size, centre, divisor, highest, scale, KIND: tl.constexpr, GROUPED: tl.constexpr
):
    """Mean of the scores, or of what KIND makes of ``x = (score - centre) / divisor``.

    ``"unit"``: x; ``"square"``: its square; ``"share"``: exp(x - highest). ``scale`` is that of the fixed-point sum.
    """
    total = tl.zeros((SCORES,), tl.int64)
    for start in range(0, batch, SCORES):
        value, joined = compared_scores(start, group, score, groups, batch, GROUPED)
        if KIND != "score":
            value = tl.div_rn(value - centre, divisor)
        if KIND == "square":
            value = value * value
        if KIND == "share":
            value = exponential(value - highest)
        total += to_fixed(tl.where(joined, value, 0.0), scale)
    return mean_from_fixed(tl.sum(total), scale, size)


@triton.jit
def median_of(group, score, groups, batch, size, centre, DISTANCE: tl.constexpr, GROUPED: tl.constexpr):
    """Median of the scores, or of their distances from ``centre``; the lower of two. Found digit by digit."""
    wanted = size - (size - 1) // 2  # counted from the largest
    leading = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)
    for step in range(4):
        shift = tl.zeros((), tl.uint32) + (24 - 8 * step)
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, batch, SCORES):
            value, joined = compared_scores(start, group, score, groups, batch, GROUPED)
            if DISTANCE:
                value = tl.abs(value - centre)
            key = order_key(value)
            joined = joined & ((key & known) == leading)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=joined)
        chosen, above = choose_digit(histogram, wanted)
        wanted -= above
        leading |= chosen.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    ordered = (leading ^ 0x80000000).to(tl.int32, bitcast=True)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def min_max_factor(own, group, score, groups, batch, response_floor, GROUPED: tl.constexpr):
    low, high, size = score_extremes(group, score, groups, batch, GROUPED)
    differs = high - low > LEAST_RANGE
    apart = tl.where(differs, high - low, 1.0)
    unit = tl.div_rn(own - low, apart)
    mean = score_mean(group, score, groups, batch, size, low, apart, 0.0, UNIT_SCALE, "unit", GROUPED)
    most = response_floor + tl.div_rn(1.0 - response_floor, mean + MASS_FLOOR)
    return tl.where(differs, response_floor + unit * (most - response_floor), 1.0)


@triton.jit
def median_factor(own, group, score, groups, batch, response_scale, GROUPED: tl.constexpr):
    _, _, size = score_extremes(group, score, groups, batch, GROUPED)
    median = median_of(group, score, groups, batch, size, 0.0, False, GROUPED)
    deviation = median_of(group, score, groups, batch, size, median, True, GROUPED)
    return 1.0 + response_scale * hyperbolic_tangent(tl.div_rn(own - median, deviation + MASS_FLOOR))


@triton.jit
def softmax_factor(own, group, score, groups, batch, temperature, GROUPED: tl.constexpr):
    low, high, size = score_extremes(group, score, groups, batch, GROUPED)
    scale = fixed_scale_of(tl.maximum(tl.abs(low), tl.abs(high)))
    mean = score_mean(group, score, groups, batch, size, 0.0, 1.0, 0.0, scale, "score", GROUPED)
    # Squares of distances as shares of the largest cannot leave fp32's range.
    largest = tl.maximum(high - mean, mean - low)
    largest = tl.where(largest > 0.0, largest, 1.0)
    square = score_mean(group, score, groups, batch, size, mean, largest, 0.0, UNIT_SCALE, "square", GROUPED)
    divisor = (largest * tl.sqrt_rn(square) + DEVIATION_FLOOR) * temperature
    highest = tl.div_rn(high - mean, divisor)
    share = score_mean(group, score, groups, batch, size, mean, divisor, highest, UNIT_SCALE, "share", GROUPED)
    return tl.div_rn(exponential(tl.div_rn(own - mean, divisor) - highest), share)


@triton.jit
def factor_of_response(
    response,
    score,  # [B]
    groups,  # [B]
    batch,
    response_floor,
    response_scale,
    response_temperature,
    progress,
    RESPONSE: tl.constexpr,
    GROUPED: tl.constexpr,
    FADES: tl.constexpr,
):
    """Factor of a response from its score; 1 where that is not finite."""
    factor = tl.full((), 1.0, tl.float32)
    if RESPONSE != "none":
        own = tl.load(score + response)
        group = tl.load(groups + response)
        member = is_finite(own)
        own = tl.where(member, own, 0.0)
        if RESPONSE == "min_max":
            found = min_max_factor(own, group, score, groups, batch, response_floor, GROUPED)
        elif RESPONSE == "median_mad":
            found = median_factor(own, group, score, groups, batch, response_scale, GROUPED)
        else:
            found = softmax_factor(own, group, score, groups, batch, response_temperature, GROUPED)
        factor = tl.where(member, faded_in(found, progress, FADES), 1.0)
    return factor


@triton.jit(do_not_specialize=["batch"])
def response_factor_kernel(
    score,  # [B]
    groups,  # [B]
    factors,  # out: [B]
    batch,
    response_floor,
    response_scale,
    response_temperature,
    progress,
    RESPONSE: tl.constexpr,
    GROUPED: tl.constexpr,
    FADES: tl.constexpr,
):
    response = tl.program_id(0)
    factor = factor_of_response(
        *(response, score, groups, batch, response_floor, response_scale, response_temperature, progress),
        *(RESPONSE, GROUPED, FADES),
    )
    tl.store(factors + response, factor)

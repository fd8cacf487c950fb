"""What Triton's token_shaping makes of the signals of single tokens, and which tokens of a response have some."""

from __future__ import annotations

import triton
import triton.language as tl

from vgpo_kernels.triton_kernels.common import exponential, is_finite


@triton.jit
def logarithm_of_more(value):
    """log(1 + value) of a value >= 0: what 1 + value rounds away is made up for in proportion."""
    more = 1.0 + value
    lost = more == 1.0
    return tl.where(lost, value, tl.log(more) * tl.div_rn(value, tl.where(lost, 1.0, more - 1.0)))


@triton.jit
def power(base, exponent):
    """Base, in [0, 1], to the power of the exponent, in [0, 1]; 1 of exponent 0."""
    found = exponential(exponent * tl.log(tl.maximum(base, 1e-30)))
    return tl.where(exponent == 0.0, 1.0, tl.where(base > 0.0, found, 0.0))


@triton.jit
def normalized(value, low, high, range_floor):
    return tl.div_rn(value - low, tl.maximum(high - low, range_floor))


@triton.jit
def widened(low, high, value, active):
    """Extremes of a block's values and of those seen before."""
    return (
        tl.minimum(low, tl.where(active, value, float("inf"))),
        tl.maximum(high, tl.where(active, value, -float("inf"))),
    )


@triton.jit
def known_extremes(length, low, high):
    """Extremes of so many tokens; 0 of none, so that what is computed for a response without any is finite."""
    return tl.where(length > 0, tl.min(low), 0.0), tl.where(length > 0, tl.max(high), 0.0)


@triton.jit
def inspect_signals(visual, entropy, gap, mask, size, BLOCK: tl.constexpr):
    """Look through the signals of a response of ``size`` positions.

    Returns the position of its first token that counts, the number of those that do (0 where one of their signals is
    not finite), whether that is so, and smallest and largest visual signal, entropy and gap of those tokens.
    """
    lane = tl.arange(0, BLOCK)
    valid_count = tl.zeros((BLOCK,), tl.int32)
    number_count = tl.zeros((BLOCK,), tl.int32)
    bad_count = tl.zeros((BLOCK,), tl.int32)
    starts = tl.zeros((BLOCK,), tl.int32) + size
    visual_low = tl.full((BLOCK,), float("inf"), tl.float32)
    visual_high = tl.full((BLOCK,), -float("inf"), tl.float32)
    entropy_low, entropy_high = visual_low, visual_high
    gap_low, gap_high = visual_low, visual_high
    for block in range(0, size, BLOCK):
        token = block + lane
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        value = tl.load(visual + token, mask=valid, other=0.0)
        number = valid & (value == value)
        good = is_finite(value)
        visual_low, visual_high = widened(visual_low, visual_high, value, number)
        if entropy is not None:
            value = tl.load(entropy + token, mask=number, other=0.0)
            good = good & is_finite(value)
            entropy_low, entropy_high = widened(entropy_low, entropy_high, value, number)
        if gap is not None:
            value = tl.load(gap + token, mask=number, other=0.0)
            good = good & is_finite(value)
            gap_low, gap_high = widened(gap_low, gap_high, value, number)
        valid_count += valid.to(tl.int32)
        number_count += number.to(tl.int32)
        bad_count += (number & (good == 0)).to(tl.int32)
        starts = tl.minimum(starts, tl.where(number, token, size))
    start = tl.min(starts)
    # Tokens before the first number saw no image. There are hardly ever any.
    unseen_count = tl.zeros((BLOCK,), tl.int32)
    for block in range(0, start, BLOCK):
        token = block + lane
        unseen_count += (tl.load(mask + token, mask=token < start, other=0) != 0).to(tl.int32)
    length = tl.sum(valid_count) - tl.sum(unseen_count)
    # A NaN after the first number is none of the numbers.
    broken = (tl.sum(bad_count) > 0) | (tl.sum(number_count) < length)
    length = tl.where(broken, 0, length)
    visual_low, visual_high = known_extremes(length, visual_low, visual_high)
    entropy_low, entropy_high = known_extremes(length, entropy_low, entropy_high)
    gap_low, gap_high = known_extremes(length, gap_low, gap_high)
    return start, length, broken, visual_low, visual_high, entropy_low, entropy_high, gap_low, gap_high


@triton.jit
def visual_score(
    visual_unit,
    entropy_unit,
    gap_unit,
    visual,
    fusion_weight,
    FUSION: tl.constexpr,
    TIMES_ENTROPY: tl.constexpr,
):
    """What the visual selection goes by, of a signal and normalised ones."""
    score = visual
    if FUSION == "soft_or":
        score = 1.0 - power(1.0 - visual_unit, fusion_weight) * power(1.0 - gap_unit, 1.0 - fusion_weight)
    if TIMES_ENTROPY:
        score = score * entropy_unit
    return score


@triton.jit
def gate_weight(unit, threshold, boost, floor):
    """The gate's weight of a normalised signal."""
    below = tl.maximum(tl.div_rn(unit, threshold), floor)
    above = 1.0 + tl.div_rn(boost * (unit - threshold), 1.0 - threshold)
    return tl.where(unit < threshold, below, above)

"""A response's weights in Triton: the gate, compensated weights and their statistics, one program per response.

A launch before that one finds the smallest cosine of each response, where scores are offset by the batch's.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.reference import visual_weights as reference
from vgpo_kernels.triton_kernels.common import (
    RANGE_FLOOR,
    UNIT_SCALE,
    device_guard,
    double_from_bits,
    exponential,
    extent,
    from_fixed,
    mean_from_fixed,
    to_fixed,
    token_range,
    warps_of,
    wrap_triton,
)

LARGEST_SIGNAL = tl.constexpr(reference.LARGEST_SIGNAL)
POSITION_SLACK = tl.constexpr(reference.POSITION_SLACK)

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
NONFINITE = tl.constexpr(10)  # 1 where a cosine is no signal, other than by preceding the response's image
# The response's first token with a signal, counted from its first one; the bits of an int32, which no sum reads.
SIGNAL = tl.constexpr(11)

RESPONSE_BLOCK = 1024
RESPONSE_THREADS = 512  # one program per response makes few programs, so each should be wide


@triton.jit
def order_key(value):
    """An unsigned integer that orders as the float does; -0.0 and +0.0 share one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def choose_digit(histogram, wanted):
    """The digit of the ``wanted``-th largest key, from how often each of 256 occurs, and how many keys have larger."""
    at_least = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
    chosen = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32)) - 1, 0)
    return chosen, tl.sum(tl.where(tl.arange(0, 256) > chosen, histogram, 0))


@triton.jit
def focus_score(cos, offset, SCORE_KIND: tl.constexpr):
    """rho_t: (1 + cos) / 2, or cos - offset."""
    return (1.0 + cos) * 0.5 if SCORE_KIND == "affine" else cos - offset


@triton.jit
def ramp_of(length, start_bits, step_bits, SCHEDULE: tl.constexpr, POSITION: tl.constexpr):
    """Where the schedule lies in a response of ``length`` valid tokens, in 0-based ordinals (csrc/math.h: Ramp).

    All that does not depend on the token is computed in fp64.
    """
    start = double_from_bits(start_bits)
    whole = length.to(tl.float64)
    ahead: tl.constexpr = 1.0 if POSITION == "one_based" else 0.0
    if POSITION == "zero_based":
        whole = whole - 1.0 + RANGE_FLOOR
    later = start
    if SCHEDULE == "step":
        later = tl.maximum(start, double_from_bits(step_bits))
    first = tl.ceil((later - POSITION_SLACK) * whole - ahead).to(tl.float32)
    exact = start * whole - ahead
    begin = exact.to(tl.float32)
    rest = (exact - begin.to(tl.float64)).to(tl.float32)
    return first, begin, rest, (whole * (1.0 - start + RANGE_FLOOR)).to(tl.float32)


@triton.jit
def compensation(ordinal, first, begin, rest, length, beta, exponent, SCHEDULE: tl.constexpr):
    """c_t (Eq. 5) of tokens with 0-based ``ordinal``; ``first``, ``begin``, ``rest`` and ``length`` of the ramp."""
    place = ordinal.to(tl.float32)
    if SCHEDULE == "step":
        strength = tl.full(place.shape, 1.0, tl.float32)
    else:
        strength = tl.maximum(tl.div_rn(place - begin - rest, length), 0.0)
        if SCHEDULE == "exponential":
            strength = tl.minimum(strength, 1.0)
            power = exponential(exponent * tl.log(tl.maximum(strength, 1e-30)))
            strength = tl.where(strength > 0.0, power, 0.0)
    return tl.where(place >= first, beta * strength, 0.0)


@triton.jit
def inspect_response(cos, mask, pictured, size, BLOCK: tl.constexpr):
    """Look through the cosines of a response of ``size`` positions.

    Returns its number of valid tokens, the position of the first with a signal, how many come before that, whether
    every cosine from there can be weighted, and whether the response is weighted.
    """
    lane = tl.arange(0, BLOCK)
    valid_count = tl.zeros((BLOCK,), tl.int32)
    bad_count = tl.zeros((BLOCK,), tl.int32)
    numbers = tl.zeros((BLOCK,), tl.int32) + size
    for start in range(0, size, BLOCK):
        token = start + lane
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        value = tl.load(cos + token, mask=valid, other=0.0)
        number = valid & (value == value)
        valid_count += valid.to(tl.int32)
        bad_count += tl.where(tl.abs(value) <= LARGEST_SIGNAL, 0, 1)
        numbers = tl.minimum(numbers, tl.where(number, token, size))
    length = tl.sum(valid_count)
    signal = tl.min(numbers)
    # Tokens before the first number saw no image. There are hardly ever any.
    unseen_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, signal, BLOCK):
        token = start + lane
        unseen_count += (tl.load(mask + token, mask=token < signal, other=0) != 0).to(tl.int32)
    unseen = tl.sum(unseen_count)
    usable = tl.sum(bad_count) == unseen
    return length, signal, unseen, usable, pictured & usable & (unseen < length)


@triton.jit
def is_pictured(images, response):
    """Whether a response has an image."""
    pictured = response >= 0
    if images is not None:
        pictured = tl.load(images + response) != 0
    return pictured


@triton.jit(do_not_specialize=["tokens"])
def lowest_cosine_kernel(
    cos,  # [B, T] or [N]
    mask,
    images,  # [B] or None
    boundaries,  # [B + 1] or None
    minima,  # out: [B], the smaller of 0 and a weighted response's smallest cosine
    tokens,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, tokens)
    cos += begin
    mask += begin
    size = (end - begin).to(tl.int32)
    _, signal, _, _, weighted = inspect_response(cos, mask, is_pictured(images, response), size, BLOCK)
    lowest = tl.zeros((BLOCK,), tl.float32)
    for start in range(signal, tl.where(weighted, size, 0), BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = tl.load(mask + token, mask=token < size, other=0) != 0
        lowest = tl.minimum(lowest, tl.load(cos + token, mask=valid, other=0.0))
    tl.store(minima + response, tl.min(lowest))


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
        chosen, above = choose_digit(histogram, wanted)
        wanted -= above
        larger += above
        equal = tl.sum(tl.where(digit == chosen, histogram, 0))
        threshold |= chosen.to(tl.uint32) << shift
        known |= tl.full((), 255, tl.uint32) << shift
    return tail_begin, threshold, larger + equal


@triton.jit(do_not_specialize=["tokens", "batch", "head_bits", "top_bits", "start_bits", "step_bits"])
def response_kernel(
    cos,  # [B, T] or [N]
    mask,
    images,  # [B], 0 where a response has no image; or None
    boundaries,  # [B + 1] or None
    minima,  # [B] or None
    w,  # out: cos's shape
    statistics,  # out: [B, STATISTICS]
    lengths,  # out: valid tokens of a response, int32 [B]
    tokens,  # T or N
    batch,
    head_bits,  # 1 - tail_ratio, the bits of a double
    top_bits,  # top_ratio, start_ratio and step_ratio likewise
    start_bits,
    step_bits,
    beta,
    exponent,
    score_offset,
    weight_scale,  # of the fixed-point sum of w
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

    pictured = is_pictured(images, response)
    length, signal, unseen, usable, weighted = inspect_response(cos, mask, pictured, size, BLOCK)
    seen_half = tl.maximum((length + 1) // 2, unseen)
    # A response that takes no part has no active tokens; its NaN must not reach arithmetic.
    active_size = tl.where(weighted, size, 0)
    seeing = tl.maximum(length - unseen, 1)  # tokens with a signal

    offset = score_offset
    if SCORE_KIND == "lowest":
        lowest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, batch, BLOCK):
            lowest = tl.minimum(lowest, tl.load(minima + start + lane, mask=start + lane < batch, other=0.0))
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
    late_sum = tl.zeros((BLOCK,), tl.float32)
    ramp_first, ramp_begin, ramp_rest, ramp_length = ramp_of(length, start_bits, step_bits, SCHEDULE, POSITION)
    for start in range(0, size, BLOCK):
        token = start + lane
        valid = tl.load(mask + token, mask=token < active_size, other=0) != 0
        active = valid & (token >= signal)
        value = tl.load(cos + token, mask=active, other=0.0)
        ordinal = count + tl.cumsum(valid.to(tl.int32), 0) - 1
        count += tl.sum(valid.to(tl.int32))
        focus = focus_score(value, offset, SCORE_KIND)
        compensated = compensation(ordinal, ramp_first, ramp_begin, ramp_rest, ramp_length, beta, exponent, SCHEDULE)
        open_gate = active
        if GATE:
            open_gate = active & (token >= tail_begin) & (order_key(value) >= threshold)
        weight = tl.where(active, focus * (1.0 + tl.where(open_gate, compensated, 0.0)), 0.0)
        tl.store(w + token, weight, mask=token < size)
        low = tl.minimum(low, tl.where(active, weight, float("inf")))
        high = tl.maximum(high, tl.where(active, weight, -float("inf")))
        weight_sum += to_fixed(weight, weight_scale)
        cos_sum += value
        early_sum += tl.where(active & (ordinal < seen_half), focus, 0.0)
        late_sum += tl.where(active & (ordinal >= seen_half), focus, 0.0)
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
        score = from_fixed(weight_total, weight_scale)
    elif ACCUMULATION == "normalized":
        score = from_fixed(unit_total, UNIT_SCALE)
    else:
        score = mean_from_fixed(weight_total, weight_scale, seeing)
    score = tl.where(weighted, score, float("nan"))

    early_count, late_count = seen_half - unseen, length - seen_half
    early = tl.div_rn(tl.sum(early_sum), tl.maximum(early_count, 1).to(tl.float32))
    late = tl.div_rn(tl.sum(late_sum), tl.maximum(late_count, 1).to(tl.float32))
    has_ratio = weighted & (late_count > 0) & (early > 0.0)
    row = statistics + response.to(tl.int64) * STATISTICS
    tl.store(row + LOW, lowest_weight)
    tl.store(row + RANGE, spread)
    tl.store(row + MEAN, mean_from_fixed(unit_total, UNIT_SCALE, seeing))
    tl.store(row + SCORE, score)
    tl.store(row + WEIGHTED, tl.where(weighted, 1.0, 0.0))
    tl.store(row + COS_SUM, tl.sum(cos_sum))
    tl.store(row + GATE_COUNT, open_count.to(tl.float32))
    tl.store(row + LATE_EARLY, tl.where(has_ratio, tl.div_rn(late, tl.where(has_ratio, early, 1.0)), 0.0))
    tl.store(row + HAS_RATIO, tl.where(has_ratio, 1.0, 0.0))
    tl.store(row + TOKENS, tl.where(weighted, seeing, 0).to(tl.float32))
    tl.store(row + NONFINITE, tl.where(usable, 0.0, tl.where(pictured, 1.0, 0.0)))
    tl.store(row + SIGNAL, signal.to(tl.float32, bitcast=True))
    tl.store(lengths + response, length)


def double_bits(value: float) -> int:
    """Return the bits of a double, for :func:`double_from_bits`."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def response_settings(config: VGPOConfig) -> dict[str, Any]:
    """Return a configuration as keyword arguments of ``response_kernel``."""
    return {
        "head_bits": double_bits(1.0 - config.tail_ratio),
        "top_bits": double_bits(config.top_ratio),
        "start_bits": double_bits(config.start_ratio),
        "step_bits": double_bits(config.step_ratio),
        "beta": config.beta,
        "exponent": config.exponent,
        "score_offset": config.score_offset or 0.0,
        "weight_scale": weight_scale(config),
        "SCORE_KIND": "lowest" if needs_minima(config) else config.score,
        "SCHEDULE": config.schedule,
        "POSITION": config.position,
        "ACCUMULATION": config.accumulation,
        "GATE": config.gate,
    }


def weight_scale(config: VGPOConfig) -> float:
    """Return the scale of the fixed-point sum of w: the largest power of two, up to 2^32, at which none wraps.

    Equal to ``WeightsConfig::fixed_scale`` in csrc/math.h.
    """
    largest = reference.LARGEST_SIGNAL
    offset = largest if config.score_offset is None else abs(config.score_offset)
    focus = (1 + largest) / 2 if config.score == "affine" else largest + offset
    scale = 2.0**32
    while scale * focus * (1 + config.beta) >= 2.0**43:  # times 2^20 tokens
        scale /= 2
    return scale


def needs_minima(config: VGPOConfig) -> bool:
    """Whether scores are offset by the smallest cosine of the batch."""
    return config.score == "offset" and config.score_offset is None


def launch_responses(
    cos: Tensor,
    response_mask: Tensor,
    images: Tensor | None,
    cu_seqlens: Tensor | None,
    config: VGPOConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return w, the statistics of each response ``[B, STATISTICS]``, and its number of valid tokens, int32 ``[B]``."""
    batch, tokens = extent(response_mask, cu_seqlens)
    w = cos.new_empty(cos.shape)
    statistics = cos.new_empty((batch, STATISTICS.value))
    lengths = cos.new_empty((batch,), dtype=torch.int32)
    minima = cos.new_empty((batch,)) if needs_minima(config) else None
    with device_guard(cos):
        if minima is not None:
            wrap_triton(lowest_cosine_kernel)[(batch,)](
                cos,
                response_mask,
                images,
                cu_seqlens,
                minima,
                tokens,
                BLOCK=RESPONSE_BLOCK,
                num_warps=warps_of(RESPONSE_THREADS),
            )
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
            batch,
            **response_settings(config),
            BLOCK=RESPONSE_BLOCK,
            num_warps=warps_of(RESPONSE_THREADS),
        )
    return w, statistics, lengths

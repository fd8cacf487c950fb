"""From per-token signals to weights of tokens and responses in Triton: two launches, or more for wider comparisons.

The first launch has one program per response, which loops over its tokens: whether it takes part, extremes, sums,
weights before a selection, the score, and the selection where that is within a response. The last has one program per
block of tokens. It compares the response with others: scores are only B numbers, so each program reduces them itself,
except to medians, which take long enough for a launch of their own. A selection among a group's or the batch's tokens
adds five launches (selections.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.ops.token_shaping import SHAPING_METRICS
from vgpo_kernels.shaping import ShapingConfig
from vgpo_kernels.triton_kernels.common import (
    UNIT_SCALE,
    device_guard,
    exponential,
    extent,
    mean_from_fixed,
    num_slots,
    operator,
    slot_range,
    to_fixed,
    token_range,
    warps_of,
    wrap_triton,
)
from vgpo_kernels.triton_kernels.response_scores import (
    MASS_FLOOR,
    factor_of_response,
    faded_in,
    fixed_scale_of,
    hyperbolic_tangent,
    response_factor_kernel,
)
from vgpo_kernels.triton_kernels.responses import double_bits
from vgpo_kernels.triton_kernels.selections import (
    BROKEN,
    BY_SCORE,
    COUNTS,
    DIGIT_VALUES,
    DIGITS,
    FOR_ENTROPY,
    FOR_SCORE,
    LENGTH,
    RESPONSES,
    SEGMENT,
    SELECTED,
    START,
    digit_kernel,
    mark_kernel,
    select_in_response,
)
from vgpo_kernels.triton_kernels.token_signals import (
    gate_weight,
    inspect_signals,
    logarithm_of_more,
    normalized,
    visual_score,
)

RESPONSE_BLOCK = 1024
RESPONSE_THREADS = 256  # more leave each too few registers on some architectures
DIGIT_THREADS = 512  # which counts alone
TOKEN_BLOCK = 1024


@triton.jit
def softmax_shares(
    visual,
    entropy,
    mask,
    weights,
    start,
    size,
    visual_low,
    visual_high,
    entropy_low,
    entropy_high,
    mixed_mean,
    range_floor,
    temperature,
    entropy_gate,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write exponentials of a response's softmax, the largest 1, and return their fixed-point sum."""
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for block in range(start, size, BLOCK):
        token = block + lane
        active = tl.load(mask + token, mask=token < size, other=0) != 0
        value = tl.load(visual + token, mask=active, other=0.0)
        exponent = tl.div_rn(value, temperature)
        if GATED:
            mixed = normalized(value, visual_low, visual_high, range_floor)
            value = tl.load(entropy + token, mask=active, other=0.0)
            mixed += normalized(value, entropy_low, entropy_high, range_floor)
            exponent = exponent * (1.0 + entropy_gate * hyperbolic_tangent(mixed - mixed_mean))
        highest = tl.maximum(highest, tl.where(active, exponent, -float("inf")))
        tl.store(weights + token, exponent, mask=active)
    # The blocks before wrote what these read with other threads.
    tl.debug_barrier()
    most = tl.max(highest)
    total = tl.zeros((BLOCK,), tl.int64)
    for block in range(start, size, BLOCK):
        token = block + lane
        active = tl.load(mask + token, mask=token < size, other=0) != 0
        share = exponential(tl.load(weights + token, mask=active, other=0.0) - most)
        tl.store(weights + token, share, mask=active)
        total += to_fixed(tl.where(active, share, 0.0), UNIT_SCALE)
    return tl.sum(total)


@triton.jit
def segment_of(response, groups, batch, SCOPE: tl.constexpr):
    """The first response of a response's group, or 0 for the batch."""
    segment = tl.zeros((), tl.int32)
    if SCOPE == "group":
        group = tl.load(groups + response)
        firsts = tl.zeros((RESPONSES,), tl.int32) + response
        for start in range(0, response, RESPONSES):
            other = start + tl.arange(0, RESPONSES)
            same = tl.load(groups + other, mask=other < response, other=0) == group
            firsts = tl.minimum(firsts, tl.where(same & (other < response), other, response))
        segment = tl.min(firsts)
    return segment


@triton.jit(do_not_specialize=["batch", "tokens", "visual_bits", "entropy_bits"])
def shaping_kernel(
    visual,  # [B, T] or [N]
    entropy,  # visual's shape, or None
    gap,  # visual's shape, or None
    mask,
    groups,  # [B]
    boundaries,  # [B + 1] or None
    weights,  # out: visual's shape, before scales; not written where all are 1
    scores,  # out: what the visual selection goes by, or None
    marks,  # out: uint8, visual's shape, or None
    counts,  # out: [B, COUNTS]
    scales,  # out: fp32 [B, 2], what weights are multiplied by, and what is added
    score,  # out: [B]
    batch,
    tokens,
    visual_bits,  # top_visual and top_entropy, the bits of doubles
    entropy_bits,
    range_floor,
    fusion_weight,
    temperature,
    entropy_gate,
    threshold,
    boost,
    floor,
    WEIGHT: tl.constexpr,
    LOG1P: tl.constexpr,
    CONSERVE: tl.constexpr,
    GATED: tl.constexpr,
    FUSION: tl.constexpr,
    TIMES_ENTROPY: tl.constexpr,
    SCOPE: tl.constexpr,
    TOP_VISUAL: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, tokens)
    # Within the response 32-bit positions suffice.
    visual += begin
    mask += begin
    weights += begin
    if entropy is not None:
        entropy += begin
    if gap is not None:
        gap += begin
    whole = (end - begin).to(tl.int32)
    inspected = inspect_signals(visual, entropy, gap, mask, whole, BLOCK)
    start, length, broken, visual_low, visual_high, entropy_low, entropy_high, gap_low, gap_high = inspected
    shaped = length > 0
    # Nothing is read of a response that is left as it is.
    size = tl.where(shaped, whole, 0)
    number = tl.maximum(length, 1).to(tl.float32)

    signal_scale = fixed_scale_of(tl.maximum(tl.abs(visual_low), tl.abs(visual_high)))
    gate_scale = fixed_scale_of(tl.maximum(1.0 + boost, floor))
    gate_low, gate_high = visual_low, visual_high
    if LOG1P:
        gate_low = logarithm_of_more(tl.maximum(visual_low, 0.0))
        gate_high = logarithm_of_more(tl.maximum(visual_high, 0.0))
    signal_sum = tl.zeros((BLOCK,), tl.int64)
    mixed_sum = tl.zeros((BLOCK,), tl.int64)
    mass = tl.zeros((BLOCK,), tl.int64)
    for block in range(start, size, BLOCK):
        token = block + tl.arange(0, BLOCK)
        active = tl.load(mask + token, mask=token < size, other=0) != 0
        value = tl.load(visual + token, mask=active, other=0.0)
        signal_sum += to_fixed(value, signal_scale)
        unit = normalized(value, visual_low, visual_high, range_floor)
        entropy_unit, gap_unit = unit, unit
        if GATED or TIMES_ENTROPY:
            other = tl.load(entropy + token, mask=active, other=0.0)
            entropy_unit = normalized(other, entropy_low, entropy_high, range_floor)
        if FUSION == "soft_or":
            gap_unit = normalized(tl.load(gap + token, mask=active, other=0.0), gap_low, gap_high, range_floor)
        if GATED:
            mixed_sum += to_fixed(tl.where(active, unit + entropy_unit, 0.0), UNIT_SCALE)
        if WEIGHT == "gate":
            gated = logarithm_of_more(tl.maximum(value, 0.0)) if LOG1P else value
            raw = gate_weight(normalized(gated, gate_low, gate_high, range_floor), threshold, boost, floor)
            mass += to_fixed(tl.where(active, raw, 0.0), gate_scale)
            tl.store(weights + token, raw, mask=active)
        if FUSION == "soft_or" or TIMES_ENTROPY:
            fused = visual_score(unit, entropy_unit, gap_unit, value, fusion_weight, FUSION, TIMES_ENTROPY)
            tl.store(scores + begin + token, fused, mask=active)

    scale = tl.full((), 1.0, tl.float32)
    shift = tl.zeros((), tl.float32)
    if WEIGHT == "softmax":
        total = softmax_shares(
            *(visual, entropy, mask, weights, start, size, visual_low, visual_high, entropy_low, entropy_high),
            *(mean_from_fixed(tl.sum(mixed_sum), UNIT_SCALE, tl.maximum(length, 1)), range_floor),
            *(temperature, entropy_gate, GATED, BLOCK),
        )
        scale = tl.div_rn(number, mean_from_fixed(tl.maximum(total, 1), UNIT_SCALE, tl.full((), 1, tl.int32)))
    if WEIGHT == "gate" and CONSERVE:
        weight_sum = mean_from_fixed(tl.sum(mass), gate_scale, tl.full((), 1, tl.int32))
        empty = weight_sum <= MASS_FLOOR
        scale = tl.where(empty, 0.0, tl.div_rn(number, tl.where(empty, 1.0, weight_sum)))
        shift = tl.where(empty, 1.0, 0.0)

    row = counts + response.to(tl.int64) * COUNTS
    tl.store(row + START, start)
    tl.store(row + LENGTH, length)
    tl.store(row + BROKEN, broken.to(tl.int32))
    tl.store(row + SEGMENT, segment_of(response, groups, batch, SCOPE))
    tl.store(scales + response.to(tl.int64) * 2, scale)
    tl.store(scales + response.to(tl.int64) * 2 + 1, shift)
    mean = mean_from_fixed(tl.sum(signal_sum), signal_scale, tl.maximum(length, 1))
    tl.store(score + response, tl.where(shaped, mean, float("nan")))

    if not TOP_VISUAL and not TOP_ENTROPY:
        tl.store(row + SELECTED, length)
    elif SCOPE == "response":
        if FUSION == "soft_or" or TIMES_ENTROPY:
            tl.debug_barrier()
            visual = scores + begin
        select_in_response(
            *(visual, entropy, mask, marks + begin, row, start, size, length, visual_bits, entropy_bits),
            *(TOP_VISUAL, TOP_ENTROPY, BLOCK),
        )


@triton.jit
def selection_weight(
    mark, row, share, visual_weight, entropy_weight, other_weight, WEIGHT: tl.constexpr, TOP_ENTROPY: tl.constexpr
):
    """The weights that a selection gives a block of tokens; ``row`` of the counts."""
    for_score = (mark & FOR_SCORE) != 0
    if WEIGHT == "share":
        length, chosen = tl.load(row + LENGTH), tl.load(row + BY_SCORE)
        both = (chosen > 0) & (chosen < length)
        number = length.to(tl.float32)
        inside = tl.div_rn(share * number, tl.maximum(chosen, 1).to(tl.float32))
        outside = tl.div_rn((1.0 - share) * number, tl.maximum(length - chosen, 1).to(tl.float32))
        found = tl.where(for_score, tl.where(both, inside, 1.0), tl.where(both, outside, 1.0))
    else:
        found = tl.where(for_score, visual_weight, other_weight)
        if TOP_ENTROPY:
            found = tl.where((mark & FOR_ENTROPY) != 0, entropy_weight, found)
    return found


@triton.jit
def store_shaping_metrics(counts, score, metrics, batch):
    """Sum what is known of all responses, in their order, to SHAPING_METRICS."""
    total = tl.zeros((RESPONSES,), tl.float64)
    count = tl.zeros((RESPONSES,), tl.int64)
    selected = tl.zeros((RESPONSES,), tl.int64)
    shaped = tl.zeros((RESPONSES,), tl.int32)
    broken = tl.zeros((RESPONSES,), tl.int32)
    for start in range(0, batch, RESPONSES):
        response = (start + tl.arange(0, RESPONSES)).to(tl.int64)
        row = counts + response * COUNTS
        length = tl.load(row + LENGTH, mask=response < batch, other=0)
        joined = length > 0
        mean = tl.load(score + response, mask=joined, other=0.0)
        total += mean.to(tl.float64) * length.to(tl.float64)
        count += length.to(tl.int64)
        selected += tl.load(row + SELECTED, mask=joined, other=0).to(tl.int64)
        shaped += joined.to(tl.int32)
        broken += tl.load(row + BROKEN, mask=response < batch, other=0)
    number = tl.sum(count)
    divisor = tl.maximum(number, 1).to(tl.float64)
    # The mean of nothing is NaN.
    tl.store(metrics, tl.where(number > 0, tl.sum(total) / divisor, float("nan")).to(tl.float32))
    rate = tl.sum(selected).to(tl.float64) / divisor
    tl.store(metrics + 1, tl.where(number > 0, rate, float("nan")).to(tl.float32))
    tl.store(metrics + 2, tl.sum(shaped).to(tl.float32))
    tl.store(metrics + 3, tl.sum(broken).to(tl.float32))


@triton.jit(do_not_specialize=["batch", "tokens"])
def shaped_factor_kernel(
    mask,  # [B, T] or [N]
    marks,  # uint8, mask's shape, or None
    counts,  # [B, COUNTS]
    scales,  # [B, 2]
    score,  # [B]
    groups,  # [B]
    boundaries,  # [B + 1] or None
    weights,  # in and out: mask's shape
    factors,  # out: mask's shape
    selected,  # out: bool, mask's shape
    response_factor,  # [B], of medians in, else out
    metrics,  # out: [4]
    batch,
    tokens,
    share,
    visual_weight,
    entropy_weight,
    other_weight,
    response_floor,
    response_scale,
    response_temperature,
    progress,
    WEIGHT: tl.constexpr,
    TOP_ENTROPY: tl.constexpr,
    RESPONSE: tl.constexpr,
    GROUPED: tl.constexpr,
    ON_VISUAL: tl.constexpr,
    FADES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    response, begin, end = slot_range(boundaries, slot, batch, tokens, BLOCK)
    first, _ = token_range(boundaries, response, tokens)
    row = counts + response.to(tl.int64) * COUNTS
    if RESPONSE == "median_mad":
        own = tl.load(response_factor + response)
    else:
        own = factor_of_response(
            *(response, score, groups, batch, response_floor, response_scale, response_temperature, progress),
            *(RESPONSE, GROUPED, FADES),
        )
        if begin == first:
            tl.store(response_factor + response, own)

    token = begin + tl.arange(0, BLOCK)
    inside = token < end
    valid = tl.load(mask + token, mask=inside, other=0) != 0
    counted_end = tl.where(tl.load(row + LENGTH) > 0, end, 0)
    counted = valid & (token >= first + tl.load(row + START)) & (token < counted_end)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHT == "softmax" or WEIGHT == "gate":
        entry = scales + response.to(tl.int64) * 2
        weight = tl.load(weights + token, mask=counted, other=1.0) * tl.load(entry) + tl.load(entry + 1)
    chosen = valid
    weighed = valid
    if marks is not None:
        mark = tl.load(marks + token, mask=counted, other=0).to(tl.int32)
        weight *= selection_weight(mark, row, share, visual_weight, entropy_weight, other_weight, WEIGHT, TOP_ENTROPY)
        chosen = tl.where(counted, mark != 0, valid)
        if ON_VISUAL:
            weighed = counted & ((mark & FOR_SCORE) != 0)
    weight = tl.where(counted, faded_in(weight, progress, FADES), 1.0)
    tl.store(weights + token, weight, mask=inside)
    tl.store(factors + token, tl.where(weighed, weight * own, weight), mask=inside)
    tl.store(selected + token, chosen, mask=inside)
    if slot == 0:
        store_shaping_metrics(counts, score, metrics, batch)


def response_settings(settings: ShapingConfig, progress: float) -> dict[str, Any]:
    """Return the keyword arguments that tell kernels how to compare responses."""
    return {
        "response_floor": settings.response_floor,
        "response_scale": settings.response_scale,
        "response_temperature": settings.response_temperature,
        "progress": progress,
        "RESPONSE": settings.response,
        "GROUPED": settings.response_scope == "group",
        "FADES": settings.schedule != "none",
    }


def top_settings(settings: ShapingConfig) -> dict[str, Any]:
    """Return the keyword arguments that tell kernels of a program per response which fractions to select."""
    return {
        "visual_bits": double_bits(settings.top_visual or 0.0),
        "entropy_bits": double_bits(settings.top_entropy or 0.0),
        "TOP_VISUAL": settings.top_visual is not None,
        "TOP_ENTROPY": settings.top_entropy is not None,
        "BLOCK": RESPONSE_BLOCK,
    }


def launch_selection(
    scores: Tensor,
    entropy: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor | None,
    counts: Tensor,
    marks: Tensor,
    settings: ShapingConfig,
) -> None:
    """Mark the top fractions of every group's or of the batch's tokens."""
    batch, tokens = extent(response_mask, cu_seqlens)
    segments = batch if settings.scope == "group" else 1
    selections = (settings.top_visual is not None) + (settings.top_entropy is not None)
    histograms = counts.new_zeros((selections, DIGITS.value, segments, DIGIT_VALUES.value))
    last_digits = counts.new_empty((selections, batch, DIGIT_VALUES.value))
    for step in range(DIGITS.value):
        wrap_triton(digit_kernel)[(batch,)](
            *(scores, entropy, response_mask, cu_seqlens, counts, histograms, last_digits),
            *(batch, tokens, segments, step),
            **top_settings(settings),
            num_warps=warps_of(DIGIT_THREADS),
        )
    wrap_triton(mark_kernel)[(batch,)](
        *(scores, entropy, response_mask, cu_seqlens, counts, histograms, last_digits, marks),
        *(batch, tokens, segments),
        **top_settings(settings),
        num_warps=warps_of(RESPONSE_THREADS),
    )


@operator
def token_shaping(
    visual: Tensor,
    entropy: Tensor | None,
    gap: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor | None,
    progress: float,
    config: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return factors, weights and selected, response_factor and score ``[B]``, and the metrics ``[4]``."""
    settings = ShapingConfig.from_floats(config)
    batch, tokens = extent(response_mask, cu_seqlens)
    slots = num_slots(tokens, batch, cu_seqlens, TOKEN_BLOCK)
    selects = settings.top_visual is not None or settings.top_entropy is not None
    fused = settings.fusion != "visual" or settings.times_entropy
    weights, factors = visual.new_empty(visual.shape), visual.new_empty(visual.shape)
    scores = visual.new_empty(visual.shape) if fused else None
    marks = visual.new_empty(visual.shape, dtype=torch.uint8) if selects else None
    selected = visual.new_empty(visual.shape, dtype=torch.bool)
    counts = visual.new_empty((batch, COUNTS.value), dtype=torch.int32)
    scales = visual.new_empty((batch, 2))
    score, response_factor = visual.new_empty((batch,)), visual.new_empty((batch,))
    metrics = visual.new_empty((len(SHAPING_METRICS),))
    if not batch:  # then no program runs that could write them
        metrics = visual.new_zeros((len(SHAPING_METRICS),))
        metrics[:2] = math.nan
    with device_guard(visual):
        wrap_triton(shaping_kernel)[(batch,)](
            *(visual, entropy, gap, response_mask, group_ids, cu_seqlens, weights, scores, marks),
            *(counts, scales, score, batch, tokens),
            range_floor=settings.range_floor,
            fusion_weight=settings.fusion_weight,
            temperature=settings.temperature,
            entropy_gate=settings.entropy_gate,
            threshold=settings.threshold,
            boost=settings.boost,
            floor=settings.floor,
            WEIGHT=settings.weight,
            LOG1P=settings.weight == "gate" and settings.log1p,
            CONSERVE=settings.conserve,
            GATED=settings.weight == "softmax" and settings.entropy_gate > 0,
            FUSION=settings.fusion,
            TIMES_ENTROPY=settings.times_entropy,
            SCOPE=settings.scope,
            **top_settings(settings),
            num_warps=warps_of(RESPONSE_THREADS),
        )
        if marks is not None and settings.scope != "response":
            goes_by = visual if scores is None else scores
            launch_selection(goes_by, entropy, response_mask, cu_seqlens, counts, marks, settings)
        comparison = response_settings(settings, progress)
        if settings.response == "median_mad":
            wrap_triton(response_factor_kernel)[(batch,)](score, group_ids, response_factor, batch, **comparison)
        wrap_triton(shaped_factor_kernel)[(slots,)](
            *(response_mask, marks, counts, scales, score, group_ids, cu_seqlens),
            *(weights, factors, selected, response_factor, metrics, batch, tokens),
            share=settings.share,
            visual_weight=settings.visual_weight,
            entropy_weight=settings.entropy_weight,
            other_weight=settings.other_weight,
            WEIGHT=settings.weight,
            TOP_ENTROPY=settings.top_entropy is not None,
            ON_VISUAL=settings.response_on == "visual",
            **comparison,
            BLOCK=TOKEN_BLOCK,
        )
    return factors, weights, selected, response_factor, score, metrics


@operator
def response_factors(score: Tensor, group_ids: Tensor, progress: float, config: list[float]) -> Tensor:
    """Return the factors of responses, fp32 ``[B]``."""
    settings = ShapingConfig.from_floats(config)
    if settings.response == "none":
        return torch.ones_like(score)
    factors, batch = torch.empty_like(score), score.shape[0]
    with device_guard(score):
        wrap_triton(response_factor_kernel)[(batch,)](
            score, group_ids, factors, batch, **response_settings(settings, progress)
        )
    return factors

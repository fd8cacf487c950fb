"""From cosines to advantage factors in Triton: two launches, three where the offset is the batch's smallest cosine.

The first launch has one program per response, which loops over its tokens: gate threshold, compensated weights and
their statistics. The second has one program per block of tokens. It needs the statistics of every response of a group,
and Triton has no barrier across programs but the end of a launch. Group statistics are only B numbers, so each program
reduces them itself, which is faster than another launch.
"""

from __future__ import annotations

import math
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
    clamp,
    device_guard,
    extent,
    is_finite,
    mean_from_fixed,
    num_slots,
    operator,
    slot_range,
    to_fixed,
    token_range,
    wrap_triton,
)
from vgpo_kernels.triton_kernels.responses import (
    COS_SUM,
    GATE_COUNT,
    HAS_RATIO,
    LATE_EARLY,
    LOW,
    MEAN,
    NONFINITE,
    RANGE,
    SCORE,
    SIGNAL,
    STATISTICS,
    TOKENS,
    WEIGHTED,
    launch_responses,
)

TOKEN_BLOCK = 1024
GROUP_BLOCK = tl.constexpr(128)


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
    # The mean of nothing is NaN.
    tokens, ratios = field_of(total, field, TOKENS), field_of(total, field, HAS_RATIO)
    tl.store(metrics, mean_of(field_of(total, field, COS_SUM), tokens))
    tl.store(metrics + 1, mean_of(field_of(total, field, GATE_COUNT), tokens))
    tl.store(metrics + 2, mean_of(field_of(total, field, LATE_EARLY), ratios))
    tl.store(metrics + 3, field_of(total, field, WEIGHTED).to(tl.float32))
    tl.store(metrics + 4, field_of(total, field, NONFINITE).to(tl.float32))
    tl.store(metrics + 5, tl.sum(found).to(tl.float32))
    tl.store(metrics + 6, tl.sum(found - several).to(tl.float32))


@triton.jit
def mean_of(total, count):
    return tl.where(count > 0.0, total / tl.maximum(count, 1.0), float("nan")).to(tl.float32)


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
    w, statistics, _ = launch_responses(cos, response_mask, has_visual, cu_seqlens, settings)
    factors, psi = cos.new_empty(cos.shape), cos.new_empty(cos.shape)
    phi, score = cos.new_empty((batch,)), cos.new_empty((batch,))
    metrics = cos.new_empty((len(FOCUS_METRICS),))
    if not batch:  # then no program runs that could write them
        metrics = cos.new_zeros((len(FOCUS_METRICS),))
        metrics[:3] = math.nan
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

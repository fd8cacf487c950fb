"""From cosines to token and trajectory factors in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.reference.layout import Tokens, group_numbers, numbers_of, sums_of, tokens_of

EPSILON = 1e-8
LARGEST_SIGNAL = 1024.0  # a cosine beyond it is broken, and spoils its response
POSITION_SLACK = 1e-6  # a position one rounding error below where the schedule begins still counts


def visual_weights(
    cos: Tensor,  # [B, T] or [N]
    response_mask: Tensor,  # cos's shape
    group_ids: Tensor,  # [B]
    has_visual: Tensor | None,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    config: list[float],
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compensate (Eq. 5-6), re-weight within (Eq. 7-8) and between trajectories (Eq. 9-11).

    Returns:
        factors, psi and w in cos's shape, phi and score ``[B]``, and the focus metrics ``[7]``.

    """
    settings = VGPOConfig.from_floats(config)
    tokens = tokens_of(response_mask, cu_seqlens)
    flat = torch.where(tokens.valid, cos.reshape(-1).to(dtype), torch.zeros_like(cos.reshape(-1), dtype=dtype))
    with_image = torch.ones_like(tokens.length, dtype=torch.bool) if has_visual is None else has_visual
    # Leading NaNs are tokens before the first image: no signal. Anything else that is no cosine spoils a response.
    ordinal = torch.where(torch.isnan(flat), math.inf, tokens.ordinal.to(dtype))
    start = torch.minimum(tokens.extreme(ordinal, "amin", math.inf) - 1, tokens.length.to(dtype)).to(torch.int64)
    sighted = tokens.valid & (tokens.ordinal > tokens.spread(start))
    signal = flat.abs() <= LARGEST_SIGNAL
    broken = with_image & (tokens.total((sighted & ~signal).to(dtype)) > 0)
    weighted = with_image & ~broken & (start < tokens.length)
    # The cosines of responses that are not weighted must not reach any arithmetic.
    active = sighted & tokens.spread(weighted)
    usable = torch.where(active, flat, torch.zeros_like(flat))
    counted = tokens._replace(valid=active)

    rho = _focus(usable, settings)
    gate = _gate(usable, active, tokens, start, settings)
    w = rho * (1 + gate * _schedule(tokens, settings, dtype))
    low, high = counted.extreme(w, "amin", math.inf), counted.extreme(w, "amax", -math.inf)
    normalized = (w - tokens.spread(low)) / (tokens.spread(high) - tokens.spread(low) + EPSILON)
    number = (tokens.length - start).clamp(min=1).to(dtype)
    psi = normalized - tokens.spread(counted.signal_total(normalized) / number)
    if not settings.intra:
        psi = torch.zeros_like(psi)
    psi = torch.where(active, psi, torch.zeros_like(psi))
    score = {
        "compensated": lambda: counted.signal_total(w),
        "normalized": lambda: counted.signal_total(normalized),
        "mean": lambda: counted.signal_total(w) / number,
    }[settings.accumulation]()
    score = torch.where(weighted, score, torch.full_like(score, math.nan))
    phi = group_weights(score, group_ids, None, config, dtype=dtype)

    number_of = numbers_of(settings, psi)
    factors = _clamp(1 + psi, number_of["intra_clamp"]) * tokens.spread(_clamp(1 + phi, number_of["inter_clamp"]))
    metrics = _metrics(usable, rho, gate, counted, tokens, weighted)
    counts = [weighted.sum(), broken.sum(), *_group_counts(weighted, group_ids)]
    return (
        torch.where(tokens.valid & tokens.spread(weighted), factors, torch.ones_like(factors)).reshape(cos.shape),
        psi.reshape(cos.shape),
        torch.where(active, w, torch.zeros_like(w)).reshape(cos.shape),
        phi,
        score,
        torch.cat([metrics, torch.stack(counts).to(dtype)]),
    )


def group_weights(
    score: Tensor,  # [B]
    group_ids: Tensor,  # [B]
    has_visual: Tensor | None,  # [B]
    config: list[float],
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B]
    """Min-max normalise scores within their group and centre them (Eq. 9-10): phi, 0 for those left out."""
    if not VGPOConfig.from_floats(config).inter:
        return torch.zeros_like(score, dtype=dtype)
    score = score.to(dtype)
    member = torch.isfinite(score) if has_visual is None else torch.isfinite(score) & has_visual
    group = group_numbers(group_ids)

    def reduce(values: Tensor, how: str, empty: float) -> Tensor:
        chosen = torch.where(member, values, torch.full_like(values, empty))
        return values.new_full(values.shape, empty).scatter_reduce(0, group, chosen, how)[group]

    low, high = reduce(score, "amin", math.inf), reduce(score, "amax", -math.inf)
    normalized = (score - low) / (high - low + EPSILON)
    size = reduce(torch.ones_like(score), "sum", 0.0).clamp(min=1)
    order = group.argsort()
    total = sums_of(torch.where(member, normalized, 0.0)[order, None], group[order], len(score)).squeeze(-1)[group]
    phi = normalized - total / size
    return torch.where(member, phi, torch.zeros_like(phi))


def _group_counts(weighted: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Count the groups that have a weighted response, and those that have one only."""
    sizes = torch.zeros_like(group_ids).scatter_add(0, group_numbers(group_ids), weighted.to(group_ids.dtype))
    return (sizes > 0).sum(), (sizes == 1).sum()


def _focus(usable: Tensor, settings: VGPOConfig) -> Tensor:
    """Visual focus rho of each token; ``usable`` is 0 where a token takes no part."""
    if settings.score == "affine":
        return (1 + usable) / 2
    if settings.score_offset is not None:
        return usable - settings.score_offset
    return usable - torch.cat([usable, usable.new_zeros(1)]).amin()


def _schedule(tokens: Tokens, settings: VGPOConfig, dtype: torch.dtype) -> Tensor:
    """Compensation c_t of each token (Eq. 5)."""
    ordinal, length = tokens.ordinal.to(dtype), tokens.spread(tokens.length).to(dtype)
    if settings.position == "one_based":
        position = ordinal / length.clamp(min=1)
    else:
        position = (ordinal - 1) / (length - 1 + EPSILON)
    ramp = (position - settings.start_ratio) / (1 - settings.start_ratio + EPSILON)
    if settings.schedule == "linear":
        strength = ramp.clamp(min=0)
    elif settings.schedule == "exponential":
        strength = ramp.clamp(0, 1) ** numbers_of(settings, ramp)["exponent"]
    else:
        strength = (position >= settings.step_ratio - POSITION_SLACK).to(dtype)
    before = position < settings.start_ratio - POSITION_SLACK
    return torch.where(before, torch.zeros_like(strength), settings.beta * strength)


def _gate(usable: Tensor, active: Tensor, tokens: Tokens, start: Tensor, settings: VGPOConfig) -> Tensor:
    """Gate G of each token (Eq. 6): 1 in the tail where the cosine reaches the k-th largest of the tail.

    rho increases with the cosine, so comparing cosines selects the same tokens, and exactly so in any precision.
    """
    if not settings.gate:
        return torch.ones_like(usable)
    wide = usable.dtype == torch.float64
    first = _share_of(tokens.length, 1.0 - settings.tail_ratio, wide).maximum(start)
    tail_length = tokens.length - first
    k = _share_of(tail_length, settings.top_ratio, wide).clamp(min=1)
    tail = active & (tokens.ordinal > tokens.spread(first))
    # Sort by response, then by decreasing cosine, with the tail first: the k-th of a response is at begin + k - 1.
    candidates = torch.where(tail, usable, torch.full_like(usable, -math.inf))
    order = candidates.argsort(descending=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    # By numbers of which no two are equal: not every release of torch sorts stably on Apple's GPUs.
    order = (tokens.response * len(order) + rank).argsort()
    ranked = torch.cat([candidates[order], candidates.new_zeros(1)])
    threshold = ranked[(tokens.begin + k - 1).clamp(max=len(candidates))]
    return (tail & (usable >= tokens.spread(threshold))).to(usable.dtype)


def _share_of(count: Tensor, ratio: float, wide: bool) -> Tensor:
    """Share of each count ``[B]``, rounded down from an fp64 product: on the host, unless the device is ``wide``."""
    there = count if wide else count.cpu()
    return (there.to(torch.float64) * ratio).to(torch.int64).to(count.device)


def _clamp(factor: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
    return factor if bounds is None else factor.clamp(*bounds)


def _metrics(usable: Tensor, rho: Tensor, gate: Tensor, counted: Tokens, tokens: Tokens, weighted: Tensor) -> Tensor:
    """focus_mean, gate_rate, late_early_ratio of the tokens that are counted; the mean of nothing is NaN."""
    share = counted.valid.to(usable.dtype)
    number = share.sum()
    late = tokens.ordinal > tokens.spread((tokens.length + 1) // 2)

    def half(chosen: Tensor) -> tuple[Tensor, Tensor]:
        tokens_of_half = counted._replace(valid=counted.valid & chosen)
        return tokens_of_half.total(rho), tokens_of_half.total(torch.ones_like(rho))

    (early_sum, early_count), (late_sum, late_count) = half(~late), half(late)
    defined = weighted & (late_count > 0) & (early_sum > 0)
    early_mean, late_mean = early_sum / early_count.clamp(min=1), late_sum / late_count.clamp(min=1)
    ratio = torch.where(defined, late_mean / torch.where(defined, early_mean, 1.0), 0.0)
    return torch.stack(
        [
            (usable * share).sum() / number,
            (gate * share).sum() / number,
            ratio.sum() / defined.sum().to(ratio.dtype),
        ]
    )

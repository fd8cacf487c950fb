"""From cosines to token and trajectory factors in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.reference.layout import Tokens, tokens_of

EPSILON = 1e-8


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
        factors, psi and w in cos's shape, phi and score ``[B]``, and the focus metrics ``[5]``.

    """
    settings = VGPOConfig.from_floats(config)
    tokens = tokens_of(response_mask, cu_seqlens)
    flat = torch.where(tokens.valid, cos.reshape(-1).to(dtype), torch.zeros_like(cos.reshape(-1), dtype=dtype))
    with_image = torch.ones_like(tokens.length, dtype=torch.bool) if has_visual is None else has_visual
    finite = tokens.total((~torch.isfinite(flat)).to(dtype)) == 0
    weighted = with_image & finite
    # The cosines of responses that are not weighted must not reach any arithmetic.
    active = tokens.valid & tokens.spread(weighted)
    usable = torch.where(active, flat, torch.zeros_like(flat))

    rho = _focus(flat, usable, tokens.valid & tokens.spread(with_image), settings)
    gate = _gate(usable, active, tokens, settings)
    w = rho * (1 + gate * _schedule(tokens, settings, dtype))
    low, high = tokens.extreme(w, "amin", math.inf), tokens.extreme(w, "amax", -math.inf)
    normalized = (w - tokens.spread(low)) / (tokens.spread(high) - tokens.spread(low) + EPSILON)
    length = tokens.length.clamp(min=1).to(dtype)
    psi = normalized - tokens.spread(tokens.total(normalized) / length)
    if not settings.intra:
        psi = torch.zeros_like(psi)
    score = {
        "compensated": tokens.total(w),
        "normalized": tokens.total(normalized),
        "mean": tokens.total(w) / length,
    }[settings.accumulation]
    score = torch.where(with_image, score, torch.zeros_like(score))
    score = torch.where(finite, score, torch.full_like(score, math.nan))
    phi = group_weights(score, group_ids, with_image, config, dtype=dtype)

    factors = _clamp(1 + psi, settings.intra_clamp) * tokens.spread(_clamp(1 + phi, settings.inter_clamp))
    ones, zeros = torch.ones_like(factors), torch.zeros_like(factors)
    metrics = _metrics(usable, rho, gate, active, weighted, with_image & ~finite, tokens)
    return (
        torch.where(active, factors, ones).reshape(cos.shape),
        torch.where(active, psi, zeros).reshape(cos.shape),
        torch.where(active, w, zeros).reshape(cos.shape),
        phi,
        score,
        metrics,
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
    # Number the groups by sorting their ids. No shape depends on the number of groups, so that this can be traced.
    order = group_ids.argsort(stable=True)
    ordered = group_ids[order]
    starts = torch.cat([ordered.new_zeros(min(1, len(ordered))), (ordered[1:] != ordered[:-1]).to(torch.int64)])
    group = torch.empty_like(group_ids).scatter(0, order, starts.cumsum(0))

    def reduce(values: Tensor, how: str, empty: float) -> Tensor:
        chosen = torch.where(member, values, torch.full_like(values, empty))
        return values.new_full(values.shape, empty).scatter_reduce(0, group, chosen, how)[group]

    low, high = reduce(score, "amin", math.inf), reduce(score, "amax", -math.inf)
    normalized = (score - low) / (high - low + EPSILON)
    size = reduce(torch.ones_like(score), "sum", 0.0).clamp(min=1)
    phi = normalized - reduce(normalized, "sum", 0.0) / size
    return torch.where(member, phi, torch.zeros_like(phi))


def _focus(flat: Tensor, usable: Tensor, with_image: Tensor, settings: VGPOConfig) -> Tensor:
    """Visual focus rho of each token."""
    if settings.score == "affine":
        return (1 + usable) / 2
    if settings.score_offset is not None:
        return usable - settings.score_offset
    finite = with_image & torch.isfinite(flat)
    candidates = torch.cat([torch.where(finite, flat, torch.zeros_like(flat)), flat.new_zeros(1)])
    return usable - candidates.amin()


def _schedule(tokens: Tokens, settings: VGPOConfig, dtype: torch.dtype) -> Tensor:
    """Compensation c_t of each token (Eq. 5)."""
    ordinal, length = tokens.ordinal.to(dtype), tokens.spread(tokens.length).to(dtype)
    if settings.position == "one_based":
        position = ordinal / length.clamp(min=1)
    else:
        position = (ordinal - 1) / (length - 1 + EPSILON)
    ramp = (position - settings.start_ratio) / (1 - settings.start_ratio + EPSILON)
    if settings.schedule == "linear":
        strength = ramp
    elif settings.schedule == "exponential":
        strength = ramp.clamp(0, 1) ** settings.exponent
    else:
        strength = (position >= settings.step_ratio - 1e-6).to(dtype)
    return torch.where(position < settings.start_ratio, torch.zeros_like(strength), settings.beta * strength)


def _gate(usable: Tensor, active: Tensor, tokens: Tokens, settings: VGPOConfig) -> Tensor:
    """Gate G of each token (Eq. 6): 1 in the tail where the cosine reaches the k-th largest of the tail.

    rho increases with the cosine, so comparing cosines selects the same tokens, and exactly so in any precision.
    """
    if not settings.gate:
        return torch.ones_like(usable)
    first = (tokens.length.to(torch.float64) * (1.0 - settings.tail_ratio)).to(torch.int64)
    tail_length = tokens.length - first
    k = (tail_length.to(torch.float64) * settings.top_ratio).to(torch.int64).clamp(min=1)
    tail = active & (tokens.ordinal > tokens.spread(first))
    # Sort by response, then by decreasing cosine, with the tail first: the k-th of a response is at begin + k - 1.
    candidates = torch.where(tail, usable, torch.full_like(usable, -math.inf))
    order = candidates.argsort(descending=True, stable=True)
    order = order[tokens.response[order].argsort(stable=True)]
    ranked = torch.cat([candidates[order], candidates.new_zeros(1)])
    threshold = ranked[(tokens.begin + k - 1).clamp(max=len(candidates))]
    return (tail & (usable >= tokens.spread(threshold))).to(usable.dtype)


def _clamp(factor: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return factor if bounds is None else factor.clamp(*bounds)


def _metrics(
    usable: Tensor,
    rho: Tensor,
    gate: Tensor,
    active: Tensor,
    weighted: Tensor,
    nonfinite: Tensor,
    tokens: Tokens,
) -> Tensor:
    """focus_mean, gate_rate, late_early_ratio, weighted_responses, nonfinite_responses."""
    dtype = usable.dtype
    share = active.to(dtype)
    number = share.sum().clamp(min=1)
    half = (tokens.length + 1) // 2
    late = tokens.ordinal > tokens.spread(half)
    early_sum = tokens.total(torch.where(late, torch.zeros_like(rho), rho))
    late_sum = tokens.total(torch.where(late, rho, torch.zeros_like(rho)))
    early_mean, late_mean = early_sum / half.clamp(min=1), late_sum / (tokens.length - half).clamp(min=1)
    counted = weighted & (tokens.length >= 2) & (early_sum > 0)
    ratio = torch.where(counted, late_mean / torch.where(counted, early_mean, 1.0), 0.0)
    return torch.stack(
        [
            (usable * share).sum() / number,
            (gate * share).sum() / number,
            ratio.sum() / counted.sum().clamp(min=1),
            weighted.sum().to(dtype),
            nonfinite.sum().to(dtype),
        ]
    ).to(dtype)

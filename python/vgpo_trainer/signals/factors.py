"""Factors from the visual signal of a rollout batch, in two phases: per response, then per group.

Phase one turns the signal of this process's responses into token weights. Phase two gathers a few numbers per response
from all processes, and weighs the responses of each prompt against one another. So groups may be shuffled, split into
micro-batches and spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig, group_weights, visual_weights


@dataclass(frozen=True)
class SignalFactors:
    """What the signal of B responses becomes, detached, fp32.

    Attributes:
        psi: Intra-trajectory weights, ``[B, T]``.
        phi: Inter-trajectory weights, ``[B]``.
        factors: What advantages are multiplied by, ``[B, T]``; 1 off the mask and for unweighted responses.
        weighted: Whether a response takes part: it has an image, and a finite signal, ``[B]``.
        gate_rate: Share of the weighted responses' tokens that the gate lets through, 0-dimensional.
        late_early: Mean score of the second half of a response over that of its first, ``[B]``; NaN where undefined.
    """

    psi: Tensor
    phi: Tensor
    factors: Tensor
    weighted: Tensor
    gate_rate: Tensor
    late_early: Tensor


def compute_factors(
    values: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    group_ids: Tensor,  # [B]
    has_visual: Tensor,  # [B]
    config: VGPOConfig,
    *,
    gather: Callable[[Tensor], Tensor],
    process_index: int,
) -> SignalFactors:
    """Turn the signal of this process's share of a rollout batch into factors, comparing whole groups.

    Args:
        values: Of a :class:`~vgpo_trainer.signals.VisualSignal`.
        response_mask: True at scored response tokens.
        group_ids: Responses to one prompt share an id, on all processes.
        has_visual: Whether a response has an image.
        config: The settings. An offset left to the batch is fixed over the batches of all processes.
        gather: Concatenates a tensor ``[B, ...]`` of every process, in order; every process must call it.
        process_index: Which of the gathered shares is this one's.

    """
    config = fix_offset(config, values, response_mask, has_visual, gather)
    batch = values.shape[0]
    # Phase one. Each response is its own group here: phi comes from all processes' scores below.
    alone = torch.arange(batch, device=values.device)
    local = visual_weights(values, response_mask, alone, config, has_visual=has_visual)
    # Phase two.
    scores = gather(local.score)
    groups, images = gather(torch.stack([group_ids, has_visual.to(torch.int64)], dim=1)).unbind(dim=1)
    phi = group_weights(scores, groups, config, has_visual=images.bool())
    phi = phi[process_index * batch : (process_index + 1) * batch]

    weighted = has_visual & local.score.isfinite()
    return SignalFactors(
        psi=local.psi,
        phi=phi,
        factors=combine(local.psi, phi, response_mask.bool() & weighted[:, None], config),
        weighted=weighted,
        gate_rate=local.metrics["gate_rate"],
        late_early=late_early_ratio(values, response_mask, weighted, config),
    )


def combine(psi: Tensor, phi: Tensor, weighted_tokens: Tensor, config: VGPOConfig) -> Tensor:
    """Return ``(1 + psi) (1 + phi)``, each clamped as ``config`` says, and 1 off ``weighted_tokens``."""
    token, trajectory = 1 + psi, 1 + phi
    if config.intra_clamp is not None:
        token = token.clamp(*config.intra_clamp)
    if config.inter_clamp is not None:
        trajectory = trajectory.clamp(*config.inter_clamp)
    return torch.where(weighted_tokens, token * trajectory[:, None], torch.ones_like(psi))


def fix_offset(
    config: VGPOConfig,
    values: Tensor,
    response_mask: Tensor,
    has_visual: Tensor,
    gather: Callable[[Tensor], Tensor],
) -> VGPOConfig:
    """Fix an offset that the config leaves to the batch: the smallest value of the whole rollout batch, or 0."""
    if config.score != "offset" or config.score_offset is not None:
        return config
    counted = response_mask.bool() & has_visual[:, None] & values.isfinite()
    smallest = torch.where(counted, values, torch.zeros_like(values)).amin().clamp(max=0)
    return replace(config, score_offset=gather(smallest.reshape(1)).min().item())


def late_early_ratio(values: Tensor, response_mask: Tensor, weighted: Tensor, config: VGPOConfig) -> Tensor:
    """Mean score (of visual focus: rho) of each response's second half over that of its first, ``[B]``.

    NaN for a response of fewer than two tokens, without image, or whose first half scores 0.
    """
    mask = response_mask.bool()
    score = (1 + values) / 2 if config.score == "affine" else values - (config.score_offset or 0.0)
    ordinal = mask.cumsum(dim=1) - 1
    length = mask.sum(dim=1, keepdim=True)
    late = ordinal >= (length + 1) // 2

    def mean(half: Tensor) -> Tensor:
        return torch.where(half, score, torch.zeros_like(score)).sum(dim=1) / half.sum(dim=1)

    early_mean = mean(mask & ~late)
    defined = weighted & (length[:, 0] >= 2) & (early_mean > 0)
    return torch.where(defined, mean(mask & late) / early_mean, torch.full_like(early_mean, torch.nan))

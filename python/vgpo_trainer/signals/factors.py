"""Factors from the visual signal of a rollout batch, in two phases: per response, then per group.

Phase one turns the signal of this process's responses into token weights. Phase two gathers a few numbers per response
from all processes, and weighs the responses of each prompt against one another. So groups may be shuffled, split into
micro-batches and spread over processes. Here this is VGPO's; :mod:`vgpo_trainer.signals.shaping` is that of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig, backends, combine_factors, group_weights, visual_weights


@dataclass(frozen=True)
class Factors:
    """What the signal of B responses becomes by any method, detached, fp32.

    Attributes:
        psi: Weights of tokens less 1, ``[B, T]``.
        phi: Weights of responses less 1, ``[B]``.
        factors: What advantages are multiplied by, ``[B, T]``; 1 off the mask and for unweighted responses.
        weighted: Whether a response takes part: it has a scored token, an image before one, and a finite signal,
            ``[B]``.
        counted: True at scored tokens of weighted responses that have seen an image, ``[B, T]``.
        late_early: Mean score of the second half of a response over that of its first, ``[B]``; NaN where undefined.
        nonfinite: Number of these responses that are unweighted for a signal that is not finite, 0-dimensional.
    """

    psi: Tensor
    phi: Tensor
    factors: Tensor
    weighted: Tensor
    counted: Tensor
    late_early: Tensor
    nonfinite: Tensor


@dataclass(frozen=True)
class SignalFactors(Factors):
    """What it becomes by VGPO: psi and phi are the intra- and the inter-trajectory weights.

    Attributes:
        gate_rate: Share of the counted tokens that the gate lets through, 0-dimensional; NaN without any.
        groups: Number of groups with a weighted response, over all processes, 0-dimensional.
        singleton_groups: Number of those with one only, whose phi is 0, likewise.
        phi_length: Rank correlation of phi with the length of a response less its group's mean, over weighted responses
            of all processes, 0-dimensional; NaN where either does not vary.
    """

    gate_rate: Tensor
    groups: Tensor
    singleton_groups: Tensor
    phi_length: Tensor


def compute_factors(
    values: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    group_ids: Tensor,  # [B]
    config: VGPOConfig,
    *,
    gather: Callable[[Tensor], Tensor],
    process_index: int,
) -> SignalFactors:
    """Turn the signal of this process's share of a rollout batch into factors, comparing whole groups.

    Args:
        values: Of a :class:`~vgpo_trainer.signals.VisualSignal`: NaN at tokens that have seen no image.
        response_mask: True at scored response tokens.
        group_ids: Responses of a group share an id, on all processes.
        config: The settings. An offset left to the batch is fixed over the batches of all processes.
        gather: Concatenates a tensor ``[B, ...]`` of every process, in order; every process must call it.
        process_index: Which of the gathered shares is this one's.

    """
    batch = values.shape[0]
    # Phase one. Each response is its own group here: phi comes from all processes' scores below.
    each = torch.arange(batch, device=values.device)
    config = fix_offset(config, values, response_mask, each, gather)
    local = visual_weights(values, response_mask, each, config)
    # Phase two.
    scores, groups = gather(local.score), gather(group_ids)
    phi = group_weights(scores, groups, config)
    number, alone = count_groups(groups, scores.isfinite())
    follows = phi_length(phi, gather(response_mask.bool().sum(dim=1)), groups, scores.isfinite())
    phi = phi[process_index * batch : (process_index + 1) * batch]

    weighted = local.score.isfinite()
    counted = response_mask.bool() & weighted[:, None] & values.isfinite()
    return SignalFactors(
        psi=local.psi,
        phi=phi,
        factors=combine_factors(local.psi, phi, response_mask, config, weighted=weighted),
        weighted=weighted,
        counted=counted,
        gate_rate=local.metrics["gate_rate"],
        late_early=late_early_ratio(values, response_mask, counted, config),
        nonfinite=local.metrics["nonfinite_responses"],
        groups=number,
        singleton_groups=alone,
        phi_length=follows,
    )


def count_groups(group_ids: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """Count the groups among weighted responses, and those of them that have one only; without the host's help."""
    nobody = torch.iinfo(torch.int64).max
    ordered = group_ids.to(torch.int64).masked_fill(~weighted, nobody).sort().values
    edge = ordered.new_ones(1, dtype=torch.bool)
    step = ordered[1:] != ordered[:-1]
    first, last = torch.cat([edge, step]) & (ordered != nobody), torch.cat([step, edge])
    return first.sum(), (first & last).sum()


def phi_length(phi: Tensor, lengths: Tensor, group_ids: Tensor, weighted: Tensor) -> Tensor:
    """Return the rank correlation of phi with length, over weighted responses; without the host's help.

    Phi compares the responses of a group only, so their lengths are taken less the group's mean. A sum over tokens
    grows with their number: where this is near 1, phi hardly says more than which response is longer.

    Args:
        phi: ``[B]``.
        lengths: Scored tokens of each response, ``[B]``.
        group_ids: ``[B]``.
        weighted: Which responses take part, bool ``[B]``.
    """
    wide = backends.wide_dtype(phi.device)
    if not len(phi):
        return torch.full((), torch.nan, dtype=wide, device=phi.device)
    ordered = group_ids.sort().values
    group = torch.searchsorted(ordered, group_ids)  # a number for each group that is an index, too
    there = weighted.to(wide)
    length = lengths.to(wide) * there
    total, count = (torch.zeros_like(there).scatter_add(0, group, value)[group] for value in (length, there))
    beside = (length - total / count.clamp(min=1)).masked_fill(~weighted, 0.0)
    ranks = [_ranks(values.to(wide), weighted) for values in (phi, beside)]
    first, second = ((rank - (rank * there).sum() / there.sum()) * there for rank in ranks)
    square = (first * first).sum() * (second * second).sum()
    return torch.where(square > 0, (first * second).sum() / square.sqrt(), torch.nan)


def _ranks(values: Tensor, weighted: Tensor) -> Tensor:
    """Ranks among the weighted, equal values sharing theirs, ``[B]``."""
    ordered = values.masked_fill(~weighted, torch.inf).sort().values
    places = [torch.searchsorted(ordered, values, right=right) for right in (False, True)]
    return (places[0] + places[1]).to(values.dtype) / 2


def fix_offset(
    config: VGPOConfig, values: Tensor, response_mask: Tensor, each: Tensor, gather: Callable[[Tensor], Tensor]
) -> VGPOConfig:
    """Fix an offset that the config leaves to the batch: the smallest value of weighted responses of all, or 0."""
    if config.score != "offset" or config.score_offset is not None:
        return config
    # Which responses are weighted does not depend on the offset.
    weighted = visual_weights(values, response_mask, each, replace(config, score_offset=0.0)).score.isfinite()
    there = response_mask.bool() & weighted[:, None] & ~values.isnan()
    smallest = torch.where(there, values, torch.zeros_like(values)).amin().clamp(max=0)
    return replace(config, score_offset=gather(smallest.reshape(1)).min().item())


def late_early_ratio(values: Tensor, response_mask: Tensor, counted: Tensor, config: VGPOConfig) -> Tensor:
    """Mean score (of visual focus: rho) of each response's second half over that of its first, ``[B]``."""
    score = (1 + values) / 2 if config.score == "affine" else values - (config.score_offset or 0.0)
    return half_ratio(score, response_mask, counted)


def half_ratio(score: Tensor, response_mask: Tensor, counted: Tensor) -> Tensor:
    """Mean score of each response's second half over that of its first, ``[B]``.

    The halves are those of the scored tokens, the means over those of them in ``counted [B, T]``. NaN where a half has
    none of them, as in a response of fewer than two tokens, or the first half scores no more than 0.
    """
    mask = response_mask.bool()
    late = mask.cumsum(dim=1) > (mask.sum(dim=1, keepdim=True) + 1) // 2

    def mean(half: Tensor) -> Tensor:
        return torch.where(half, score, torch.zeros_like(score)).sum(dim=1) / half.sum(dim=1)

    early_mean = mean(counted & ~late)
    return torch.where(early_mean > 0, mean(counted & late) / early_mean, torch.full_like(early_mean, torch.nan))

"""Weights of whole responses, phi: what they follow, and how much of them is chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig, group_weights
from vgpo_trainer.probe.measuring import DEPENDENCY, Key, Measured
from vgpo_trainer.probe.record import PhiFinding
from vgpo_trainer.probe.statistics import (
    LEVEL,
    NOTHING,
    Array,
    Ranking,
    Resampling,
    lift,
    rank_correlation,
    shuffled_within,
    within,
)
from vgpo_trainer.probe.weights import weights_of

SIGNALS = (Key("focus", "token"), Key("attention", "token"), DEPENDENCY)
SHUFFLES = 200
DRAWS = 64  # of other responses, for each response


def phi_findings(
    measured: Measured, config: VGPOConfig, resampling: Resampling, rng: np.random.Generator
) -> list[PhiFinding]:
    """Return what phi follows, for each of :data:`SIGNALS` and for the sum and the mean as accumulation.

    Args:
        measured: The responses.
        config: The settings; their own accumulation comes first.
        resampling: Of responses.
        rng: For shuffles and draws.
    """
    groups = measured.groups.numpy()
    lengths = measured.mask.sum(dim=1).double().numpy()
    dependency = per_response(measured.signals[DEPENDENCY], measured.mask)
    compared = [lengths, dependency]
    if measured.rewards is not None and bool(measured.rewards.isfinite().all()):
        compared.append(measured.rewards.numpy())
    # Phi says which responses of a prompt get more weight, so it is compared with what differs within a prompt.
    others = [Ranking(within(numbers, groups)) for numbers in compared]
    found = []
    for key in SIGNALS:
        for accumulation in dict.fromkeys((config.accumulation, "compensated", "mean")):
            settings = replace(config, accumulation=accumulation, inter=True)
            weighed = weights_of(measured, key, settings)
            weights = weighed.phi.double().numpy()
            ranking = Ranking(weights)

            def statistics(drawn: Array, ranking: Ranking = ranking, weights: Array = weights) -> Array:
                columns = [rank_correlation(ranking, other, drawn) for other in others]
                return np.stack([*columns, lift(1 + weights, dependency, drawn)], axis=1)

            *correlations, lifted = map(resampling.interval, resampling.values(statistics).T)
            found.append(
                PhiFinding(
                    *key,
                    accumulation=accumulation,
                    length=correlations[0],
                    reward=correlations[2] if len(correlations) > 2 else NOTHING,
                    dependency=correlations[1],
                    lift=lifted,
                    lift_shuffled=shuffled_lift(weights, dependency, groups, rng),
                    spread=spread_in_groups(weighed.score, measured.groups),
                    mates=share_of_mates(weighed.score, measured.groups, settings, rng),
                )
            )
    return found


def per_response(values: Tensor, mask: Tensor) -> Array:
    """Return the mean of each response's tokens, ``[B]``; 0 without tokens."""
    means: Array = (values.double().sum(dim=1) / mask.sum(dim=1).clamp(min=1)).numpy()
    return means


def shuffled_lift(phi: Array, dependency: Array, groups: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Return the range that the lift has in most shuffles of phi among the responses of each prompt."""
    once = np.ones((1, len(phi)))
    lifts = [float(lift(1 + phi[shuffled_within(groups, rng)], dependency, once)[0]) for _ in range(SHUFFLES)]
    low, high = np.quantile(lifts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def spread_in_groups(score: Tensor, groups: Tensor) -> float:
    """Return the range of a group's scores over their mean, on average; NaN without a group of two."""
    ranges = []
    for name in groups.unique().tolist():
        of_group = score[(groups == name) & score.isfinite()]
        if len(of_group) > 1 and float(of_group.mean()) > 0:
            ranges.append(float((of_group.max() - of_group.min()) / of_group.mean()))
    return float(np.mean(ranges)) if ranges else math.nan


def share_of_mates(score: Tensor, groups: Tensor, config: VGPOConfig, rng: np.random.Generator) -> float:
    """Return the share of the variance of phi that is the choice of the other responses to the prompt.

    Each response keeps its score; the others of its group are drawn anew, with replacement, from those that were
    sampled. What phi then varies by is theirs; what its mean differs by between responses is the response's own.

    Args:
        score: Visual accumulation of each response, ``[B]``.
        groups: The prompt of each, ``[B]``.
        config: The settings.
        rng: For the draws.

    Returns:
        A share in 0 to 1; NaN where no group has three responses, or phi does not vary.
    """
    scores, owners = [], []
    for name in groups.unique().tolist():
        members = (groups == name).nonzero()[:, 0].numpy()
        for place in range(len(members) if len(members) > 2 else 0):
            others = np.delete(members, place)
            drawn = others[rng.integers(len(others), size=(DRAWS, len(others)))]
            scores.append(np.concatenate([np.full((DRAWS, 1), members[place]), drawn], axis=1))
            owners.append(len(others) + 1)
    if not scores:
        return math.nan
    index = torch.from_numpy(np.concatenate([draws.reshape(-1) for draws in scores]))
    sizes = torch.tensor(owners).repeat_interleave(DRAWS)
    settings = replace(config, score="affine", score_offset=None)  # how scores came about is behind us
    phi = group_weights(score[index], torch.arange(len(sizes)).repeat_interleave(sizes), settings)
    own = phi[sizes.cumsum(0) - sizes].reshape(-1, DRAWS).double()
    within, between = own.var(dim=1, correction=0).mean(), own.mean(dim=1).var(correction=0)
    total = float(within + between)
    return float(within) / total if total > 0 else math.nan

"""How well numbers per token find the tokens that need the image, with intervals over prompts.

Tokens of a prompt are no independent draws, so a bootstrap replicate draws whole prompts. It is a weight for each
token, how often its prompt was drawn, and every statistic takes the weights of many replicates at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
CHUNK_NUMBERS = 500_000  # weights at a time, 4 MB


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: Of the whole sample; NaN where it is undefined.
        low, high: Percentiles of the bootstrap; NaN with fewer than two prompts.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


NOTHING = Estimate(math.nan, math.nan, math.nan)


class Resampling:
    """Bootstrap replicates of a sample of tokens or responses whose prompts are known.

    Args:
        groups: The prompt of each item, integer ``[N]``.
        replicates: Number of replicates.
        seed: Of the draws.
    """

    def __init__(self, groups: NDArray[np.int64], replicates: int, seed: int) -> None:
        names, member = np.unique(groups, return_inverse=True)
        self._member = member.reshape(-1)
        self._number = len(names)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self._number, np.full(self._number, 1 / max(self._number, 1)), size=replicates)
        self._counts = np.concatenate([np.ones((1, self._number)), drawn]).astype(np.float64)

    def values(self, statistic: Callable[[Array], Array]) -> Array:
        """Return a statistic of the sample, and then of each replicate, ``[1 + replicates, ...]``.

        Args:
            statistic: Takes weights ``[R, N]`` and returns a number or a row of numbers for each of R replicates.
        """
        rows = max(CHUNK_NUMBERS // max(len(self._member), 1), 1)
        chunks = [self._counts[begin : begin + rows] for begin in range(0, len(self._counts), rows)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.concatenate([statistic(chunk[:, self._member]) for chunk in chunks])

    def estimate(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Return a statistic with its interval over replicates; as :meth:`values`, of one number."""
        return self.interval(self.values(statistic))

    def interval(self, values: Array) -> Estimate:
        """Return the interval of numbers that :meth:`values` gave."""
        drawn = values[1:][np.isfinite(values[1:])]
        if self._number < 2 or not len(drawn):
            return Estimate(float(values[0]), math.nan, math.nan)
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(values[0]), float(low), float(high))


class Ranking:
    """The order of some numbers, ties known.

    Args:
        values: Finite numbers ``[N]``.
    """

    def __init__(self, values: Array) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        new = np.ones(len(values), dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        self._starts = np.flatnonzero(new)
        self._place = np.empty(len(values), dtype=np.int64)  # of each item among the distinct values
        self._place[self._order] = np.cumsum(new) - 1

    def totals(self, weights: Array) -> Array:
        """Sum weights ``[R, N]`` over equal values, in increasing order, ``[R, distinct values]``."""
        return np.add.reduceat(weights[:, self._order], self._starts, axis=1)

    def spread(self, per_value: Array) -> Array:
        """Hand a number for each distinct value ``[R, distinct values]`` to its items, ``[R, N]``."""
        return per_value[:, self._place]

    def mid_ranks(self, weights: Array) -> Array:
        """Return ranks ``[R, N]`` where an item counts as often as its weight says; equal values share their mean."""
        totals = self.totals(weights)
        return self.spread(np.cumsum(totals, axis=1) - totals / 2)

    def top(self, weights: Array, share: float) -> Array:
        """Return how much of an item is among the highest ``share`` of the weight, ``[R, N]`` in 0 to 1.

        Values that are equal at the threshold are in with equal parts, so the parts always add up to the share.
        """
        totals = self.totals(weights)
        above = totals.sum(axis=1, keepdims=True) - np.cumsum(totals, axis=1)
        room = share * totals.sum(axis=1, keepdims=True) - above
        part = np.divide(room, totals, out=np.zeros_like(totals), where=totals > 0)
        return self.spread(np.clip(part, 0.0, 1.0))


def auc(signal: Ranking, positive: Array, negative: Array) -> Array:
    """Chance that a positive item has the higher signal than a negative one, a tie counting half, ``[R]``.

    Args:
        signal: Of N items.
        positive: How much of an item is positive, ``[R, N]``.
        negative: How much is negative, likewise.
    """
    hits, misses = signal.totals(positive), signal.totals(negative)
    below = np.cumsum(misses, axis=1) - misses / 2
    wins: Array = (hits * below).sum(axis=1)
    return wins / (hits.sum(axis=1) * misses.sum(axis=1))


def detection(signal: Ranking, top: Array, weights: Array) -> Array:
    """AUC of a signal for the tokens with the highest dependency, ``[R]``.

    Args:
        signal: Of N tokens.
        top: How much of a token is among those, ``[R, N]``: :meth:`Ranking.top` of the dependency.
        weights: How often a token counts, likewise.
    """
    return auc(signal, weights * top, weights * (1 - top))


def overlap(signal: Ranking, top: Array, weights: Array, share: float) -> Array:
    """Share of the tokens with the highest dependency that are among as many with the highest signal, ``[R]``.

    Args:
        signal: As in :func:`detection`.
        top: Likewise.
        weights: Likewise.
        share: The share of all tokens that ``top`` is.
    """
    return share_of(weights * top * signal.top(weights, share), weights * top)


def lift(factors: Array, dependency: Array, weights: Array) -> Array:
    """Mean factor weighted by dependency over the plain mean factor, ``[R]``: 1 is what equal factors give.

    Args:
        factors: ``1 + psi`` of each token ``[N]``, or ``1 + phi`` of each response.
        dependency: Not negative, ``[N]``.
        weights: ``[R, N]``.
    """
    weighted = share_of(weights * dependency * factors, weights * dependency)
    return weighted / share_of(weights * factors, weights)


def share_of(part: Array, whole: Array) -> Array:
    """Ratio of two sums over items, ``[R]``."""
    ratio: Array = part.sum(axis=1) / whole.sum(axis=1)
    return ratio


def rank_correlation(first: Ranking, second: Ranking, weights: Array) -> Array:
    """Spearman's rank correlation, ``[R]``; NaN where one side does not vary."""
    ranks = [ranking.mid_ranks(weights) for ranking in (first, second)]
    total = weights.sum(axis=1, keepdims=True)
    centred = [rank - (weights * rank).sum(axis=1, keepdims=True) / total for rank in ranks]
    covariance = (weights * centred[0] * centred[1]).sum(axis=1)
    variances = [(weights * rank * rank).sum(axis=1) for rank in centred]
    product = variances[0] * variances[1]
    return np.divide(covariance, np.sqrt(product), out=np.full_like(product, math.nan), where=product > 1e-12)


def within(values: Array, groups: NDArray[np.int64]) -> Array:
    """Return numbers per response less the mean of their group, ``[N]``: phi compares within groups only."""
    _, member = np.unique(groups, return_inverse=True)
    member = member.reshape(-1)
    means = np.bincount(member, weights=values) / np.bincount(member)
    left: Array = values - means[member]
    # What is equal in its group but for rounding is equal.
    left[np.abs(left) <= 1e-9 * np.abs(values).max(initial=0.0)] = 0.0
    return left


def gain_curve(values: Array, amount: Array, shares: Array) -> list[float]:
    """Share of an amount that the highest values hold, for several shares of the items; ties count in equal parts."""
    ranking, ones = Ranking(values), np.ones((1, len(values)))
    total = amount.sum()
    return [float((ranking.top(ones, share) * amount).sum() / total) if total > 0 else math.nan for share in shares]


def shuffled_within(rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a permutation of N items that moves each within its row only, given the row of each, ``[N]``."""
    random = rng.permutation(len(rows))
    source = random[np.argsort(rows[random], kind="stable")]
    moved = np.empty(len(rows), dtype=np.int64)
    moved[np.argsort(rows, kind="stable")] = source
    return moved

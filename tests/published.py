"""The published perception-aware methods, each as its paper or code computes it, in loops over Python's floats.

A response is a list of its tokens' signals. Each function returns, for each response, its tokens' factors and which of
them are selected. Nothing here is shared with the library, and nothing between the methods but rounding and ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Row = Sequence[float]


@dataclass(frozen=True)
class Response:
    """Signals of a response's tokens, and its prompt."""

    visual: Row
    entropy: Row
    gap: Row
    group: int


@dataclass(frozen=True)
class Shaped:
    """Of a response's tokens."""

    factors: list[float]
    selected: list[bool]


def unit(row: Row, least: float) -> list[float]:
    """Min-max normalised."""
    if not row:
        return []
    low, high = min(row), max(row)
    return [(value - low) / max(high - low, least) for value in row]


def first_of(row: Row, fraction: float) -> set[int]:
    """Places of the largest values, so many of them rounded up; of equal ones the first."""
    number = math.ceil(round(len(row) * fraction, 6))
    return set(sorted(range(len(row)), key=lambda place: (-row[place], place))[:number])


def pepo(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2603.22847: a softmax over the response of the cosine, gated by entropy, faded in."""
    found = []
    for one in batch:
        mixed = [v + h for v, h in zip(unit(one.visual, 1e-6), unit(one.entropy, 1e-6), strict=True)]
        centre = sum(mixed) / len(mixed)
        powers = [
            math.exp(v * (1 + 0.05 * math.tanh(z - centre)) / 1.8) for v, z in zip(one.visual, mixed, strict=True)
        ]
        weights = [power / sum(powers) * len(powers) for power in powers]
        found.append(Shaped([(1 - progress) + progress * weight for weight in weights], [True] * len(weights)))
    return found


def vppo(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2510.09285: the top 40 % of a response, and a factor of the response from its mean."""
    means = [sum(one.visual) / len(one.visual) for one in batch]
    low, high = min(means), max(means)
    factors = [1.0] * len(batch)
    if len(batch) > 1 and high - low > 1e-6:
        units = [(mean - low) / (high - low) for mean in means]
        most = 0.9 + (1 - 0.9) / (sum(units) / len(units) + 1e-8)
        factors = [0.9 + (most - 0.9) * one for one in units]
    found = []
    for one, factor in zip(batch, factors, strict=True):
        top = first_of(one.visual, 0.4)
        chosen = [place in top for place in range(len(one.visual))]
        found.append(Shaped([factor * picked for picked in chosen], chosen))
    return found


def pgpo(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2604.01840, Eq. 4-7: a gate at 0.4 of the normalised logarithm, of unchanged mass."""
    found = []
    for one in batch:
        scores = unit([math.log(1 + max(value, 0.0)) for value in one.visual], 1e-8)
        raw = [score / 0.4 if score < 0.4 else 1 + 2 * (score - 0.4) / (1 - 0.4) for score in scores]
        total = sum(raw)
        weights = [value * len(raw) / total for value in raw] if total > 1e-8 else [1.0] * len(raw)
        found.append(Shaped(weights, [True] * len(weights)))
    return found


def pooled(batch: Sequence[Response], rows: Sequence[Row], fraction: float) -> list[list[bool]]:
    """Whether a token is among the top fraction of the batch's."""
    places = [(index, place) for index, row in enumerate(rows) for place in range(len(row))]
    top = first_of([rows[index][place] for index, place in places], fraction)
    chosen = {places[number] for number in top}
    return [[(index, place) in chosen for place in range(len(row))] for index, row in enumerate(rows)]


def tor(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2603.25077: 1 for the batch's top 30 % by entropy, 0.5 for those by the image, 0 for the rest."""
    reasoning = pooled(batch, [one.entropy for one in batch], 0.3)
    perception = pooled(batch, [one.visual for one in batch], 0.3)
    found = []
    for thinks, sees in zip(reasoning, perception, strict=True):
        pairs = list(zip(thinks, sees, strict=True))
        found.append(Shaped([1.0 if r else 0.5 if p else 0.0 for r, p in pairs], [r or p for r, p in pairs]))
    return found


def vepo(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2606.03937: the top 20 % of a response by a soft or of divergence and gap, times the entropy."""
    found = []
    for one in batch:
        signals = zip(unit(one.visual, 1e-8), unit(one.gap, 1e-8), unit(one.entropy, 1e-8), strict=True)
        scores = [(1 - (1 - j) ** 0.7 * (1 - d) ** 0.3) * h for j, d, h in signals]
        top = first_of(scores, 0.2)
        chosen = [place in top for place in range(len(scores))]
        found.append(Shaped([float(picked) for picked in chosen], chosen))
    return found


def cgpo(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """doi 10.1145/3767308.3835969: tokens by entropy or by the image; the latter with their response's factor."""
    means = [sum(one.visual) / len(one.visual) for one in batch]
    middle = statistics.median_low(means)
    deviation = statistics.median_low([abs(mean - middle) for mean in means])
    factors = [1 + 0.1 * math.tanh((mean - middle) / (deviation + 1e-8)) for mean in means]
    reasoning = pooled(batch, [one.entropy for one in batch], 0.3)
    perception = pooled(batch, [one.visual for one in batch], 0.3)
    found = []
    for factor, thinks, sees in zip(factors, reasoning, perception, strict=True):
        pairs = list(zip(thinks, sees, strict=True))
        found.append(Shaped([factor if p else float(r) for r, p in pairs], [r or p for r, p in pairs]))
    return found


def va_opd(batch: Sequence[Response], progress: float) -> list[Shaped]:
    """arXiv 2605.21924, Eq. 2-6, as factors of a loss that is averaged in a response, and then over responses."""
    means = [sum(one.visual) / len(one.visual) for one in batch]
    found = []
    for index, one in enumerate(batch):
        peers = [means[other] for other, its in enumerate(batch) if its.group == one.group]
        spread = statistics.pstdev(peers)
        powers = [math.exp((mean - statistics.fmean(peers)) / (spread + 1e-6)) for mean in peers]
        own = math.exp((means[index] - statistics.fmean(peers)) / (spread + 1e-6))
        factor = own / sum(powers) * len(peers)
        length = len(one.visual)
        top = first_of(one.visual, 0.2)
        rest = length - len(top)
        high, low = (0.5 * length / len(top), 0.5 * length / rest) if rest else (1.0, 1.0)
        chosen = [place in top for place in range(length)]
        found.append(Shaped([factor * (high if picked else low) for picked in chosen], chosen))
    return found


METHODS: dict[str, Callable[[Sequence[Response], float], list[Shaped]]] = {
    "pepo": pepo,
    "vppo": vppo,
    "pgpo": pgpo,
    "tor": tor,
    "vepo": vepo,
    "cgpo": cgpo,
    "va_opd": va_opd,
}

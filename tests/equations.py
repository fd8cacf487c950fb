"""The paper's equations as loops over Python numbers, without a line of the library: what every setting must come to.

A batch is a list of responses; a response is a list of its positions in order. Slow, and meant to be read beside the
paper: Eq. 3-4 (:func:`focus`), Eq. 5-11 (:func:`factors`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAN = math.nan
LARGEST = 3.4028234663852886e38  # of fp32
LEAST = 2.0**-51  # a smaller norm has a square that is not precise in fp32


@dataclass
class Position:
    """A position of a sequence: its hidden state, whether it shows a part of an image, whether it is a scored token."""

    hidden: list[float]
    visual: bool
    scored: bool


@dataclass
class Weights:
    """Of one response: factor, psi and w of each scored token, and of the response phi and score (NaN: unweighted)."""

    factors: list[float]
    psi: list[float]
    w: list[float]
    phi: float
    score: float


def positions(hidden: Tensor, visual: Tensor, scored: Tensor) -> list[Position]:
    """Return the positions of one response, from ``[S, D]``, ``[S]`` and ``[T]``, T <= S: the last T positions."""
    ahead = len(visual) - len(scored)
    mask = [False] * ahead + scored.bool().tolist()
    return [Position(*one) for one in zip(hidden.double().tolist(), visual.bool().tolist(), mask, strict=True)]


def focus(response: Sequence[Position], causal: bool) -> list[float]:
    """Cosine of each scored token with the mean of the visual tokens that it sees (Eq. 3-4); NaN if it sees none.

    Infinite where a hidden state is, or where the square of a norm leaves fp32's range and decides the cosine.
    """
    found = []
    for place, token in enumerate(response):
        if not token.scored:
            continue
        within = response[:place] if causal else response
        seen = [other.hidden for other in within if other.visual]
        if not seen:
            found.append(NAN)
            continue
        if not all(map(math.isfinite, [*token.hidden, *(value for row in seen for value in row)])):
            found.append(math.inf)
            continue
        mean = [math.fsum(column) / len(seen) for column in zip(*seen, strict=True)]
        dot = math.fsum(x * y for x, y in zip(token.hidden, mean, strict=True))
        one, other = math.hypot(*token.hidden), math.hypot(*mean)
        vanished = min(one, other) < LEAST and max(one, other) > 1e-8 / LEAST and dot != 0
        known = max(one, other) ** 2 <= LARGEST and not vanished
        found.append(dot / max(one * other, 1e-8) if known else math.inf)
    return found


def factors(cosines: Sequence[Sequence[float]], groups: Sequence[Any], config: Any) -> list[Weights]:
    """Factors of the advantage (Eq. 5-11) of responses from the cosines of their scored tokens.

    Args:
        cosines: One list for each response, empty for one without a scored token. NaN: no image is seen yet. A
            cosine that is NaN after a number, or beyond +-1024, spoils its response.
        groups: The prompt of each response.
        config: The settings, with the fields of ``VGPOConfig``.
    """
    signals = [signal_of(response) for response in cosines]
    offset = config.score_offset
    if config.score == "offset" and offset is None:
        offset = min([0.0, *(value for signal in signals for value in signal)])
    found = []
    for response, signal in zip(cosines, signals, strict=True):
        if not signal:
            found.append(Weights([1.0] * len(response), [0.0] * len(response), [0.0] * len(response), 0.0, NAN))
            continue
        blind = len(response) - len(signal)  # the first tokens, which see no image
        rho = [(1 + value) / 2 if config.score == "affine" else value - offset for value in signal]
        tail = max(int(len(response) * (1 - config.tail_ratio)) - blind, 0)
        passing = sorted(signal[tail:], reverse=True)  # rho rises with the cosine
        threshold = passing[max(1, int(len(passing) * config.top_ratio)) - 1] if passing else math.inf
        w = []
        for index, value in enumerate(rho):
            opened = not config.gate or (index >= tail and signal[index] >= threshold)
            w.append(value * (1 + opened * schedule(index + blind + 1, len(response), config)))
        low, high = min(w), max(w)
        normalized = [(value - low) / (high - low + 1e-8) for value in w]
        mean = math.fsum(normalized) / len(normalized)
        psi = [value - mean if config.intra else 0.0 for value in normalized]
        score = {
            "compensated": math.fsum(w),
            "normalized": math.fsum(normalized),
            "mean": math.fsum(w) / len(w),
        }[config.accumulation]
        found.append(Weights([], [0.0] * blind + psi, [0.0] * blind + w, 0.0, score))
    for weights, group in zip(found, groups, strict=True):
        if math.isnan(weights.score):
            continue
        scores = [
            other.score
            for other, its_group in zip(found, groups, strict=True)
            if its_group == group and not math.isnan(other.score)
        ]
        span = max(scores) - min(scores) + 1e-8
        mean = math.fsum((score - min(scores)) / span for score in scores) / len(scores)
        weights.phi = (weights.score - min(scores)) / span - mean if config.inter else 0.0
        trajectory = clamped(1 + weights.phi, config.inter_clamp)
        weights.factors = [clamped(1 + psi, config.intra_clamp) * trajectory for psi in weights.psi]
    return found


def signal_of(response: Sequence[float]) -> Sequence[float]:
    """Return the cosines from the first number on; none of a response that is not weighted."""
    first = next((index for index, value in enumerate(response) if not math.isnan(value)), len(response))
    signal = response[first:]
    return signal if all(abs(value) <= 1024 for value in signal) else []


def schedule(ordinal: int, length: int, config: Any) -> float:
    """Compensation c_t of the token with 1-based ``ordinal`` of ``length``."""
    at = ordinal / length if config.position == "one_based" else (ordinal - 1) / (length - 1 + 1e-8)
    if at < config.start_ratio - 1e-6:
        return 0.0
    ramp = max((at - config.start_ratio) / (1 - config.start_ratio + 1e-8), 0.0)
    if config.schedule == "exponential":
        ramp = min(ramp, 1.0) ** config.exponent
    elif config.schedule == "step":
        ramp = float(at >= config.step_ratio - 1e-6)
    return float(config.beta * ramp)


def clamped(factor: float, bounds: tuple[float, float] | None) -> float:
    return factor if bounds is None else min(max(factor, bounds[0]), bounds[1])

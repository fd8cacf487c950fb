"""Factors as the paper defines them, in float64 and plain loops: from hidden states, with nothing of the library."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

BETA, TAIL, TOP, EPSILON = 0.3, 0.5, 0.2, 1e-8


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return product / max(norms, 1e-8)


def focus(hidden: Tensor, image: Sequence[bool], scored: Sequence[bool]) -> list[float | None]:
    """Cosine of each scored token of a sequence to the mean of the image tokens before it; ``None``: there is none.

    Args:
        hidden: ``[S, D]``.
        image: Whether a position holds an image token, of all S positions.
        scored: Whether a position is a scored response token.
    """
    states = hidden.double().tolist()
    found: list[float | None] = []
    for place, is_scored in enumerate(scored):
        if not is_scored:
            continue
        shown = [states[before] for before in range(place) if image[before]]
        mean = [sum(column) / len(shown) for column in zip(*shown, strict=True)]
        found.append(cosine(states[place], mean) if shown else None)
    return found


def token_weights(cosines: Sequence[float | None]) -> tuple[list[float], float | None]:
    """psi of each scored token of a response (Eq. 5-8), and its accumulation (Eq. 9); ``None``: it is unweighted."""
    length, start = len(cosines), sum(cos is None for cos in cosines)
    if start == length:
        return [0.0] * length, None
    rho = [(1 + cos) / 2 for cos in cosines if cos is not None]
    first = max(int(length * (1 - TAIL)), start)
    tail = sorted(rho[first - start :], reverse=True)
    threshold = tail[max(1, int(len(tail) * TOP)) - 1]
    w = []
    for index, value in enumerate(rho, start=start):
        gated = index >= first and value >= threshold
        w.append(value * (1 + BETA * (index + 1) / length * gated))
    normalized = [(value - min(w)) / (max(w) - min(w) + EPSILON) for value in w]
    mean = sum(normalized) / len(normalized)
    return [0.0] * start + [value - mean for value in normalized], sum(w)


def group_weights(scores: Sequence[float | None], groups: Sequence[int]) -> list[float]:
    """phi of each response (Eq. 10-11)."""
    phi = []
    for score, group in zip(scores, groups, strict=True):
        peers = [s for s, g in zip(scores, groups, strict=True) if g == group and s is not None]
        if score is None:
            phi.append(0.0)
            continue
        spread = max(peers) - min(peers) + EPSILON
        phi.append((score - min(peers)) / spread - sum((peer - min(peers)) / spread for peer in peers) / len(peers))
    return phi


def factors(
    hidden: Tensor, image: Tensor, scored: Tensor, groups: Sequence[int]
) -> tuple[list[list[float]], list[list[float | None]], list[float]]:
    """Factors and cosines of the scored tokens of each response, and phi, with the paper's settings.

    Args:
        hidden: ``[B, S, D]``.
        image: True at image tokens that were shown, ``[B, S]``.
        scored: True at scored response tokens, ``[B, S]``.
        groups: Of each response.
    """
    cosines = [focus(*row) for row in zip(hidden, image.tolist(), scored.tolist(), strict=True)]
    weights = [token_weights(row) for row in cosines]
    phi = group_weights([score for _, score in weights], groups)
    made = [
        [1.0] * len(psi) if score is None else [(1 + value) * (1 + own) for value in psi]
        for (psi, score), own in zip(weights, phi, strict=True)
    ]
    return made, cosines, phi

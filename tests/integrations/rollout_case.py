"""A rollout batch as agents leave it, and its advantages in float64 by plain loops, for the adapters' tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig

IMAGE = 7


class Rollout(NamedTuple):
    """One response: its prompt's name and ids, its own ids, which of them the policy sampled, whether it is scored."""

    uid: str
    prompt: list[int]
    response: list[int]
    sampled: list[int]
    scored: bool = True

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response

    @property
    def response_mask(self) -> list[int]:
        """As frameworks have it: 0 at a tool's tokens, and everywhere in a response that was cut off and filtered."""
        return self.sampled if self.scored else [0] * len(self.sampled)


def rollouts() -> list[Rollout]:
    """Nine responses to four prompts, in no order."""
    seen, blind = [9, 12, IMAGE, IMAGE, 21, 10], [14, 11, 19]
    tool = [30, IMAGE, IMAGE, IMAGE, 31]
    return [
        Rollout("seen", seen, [8, 25, 13, 17, 22, 28], [1] * 6),
        Rollout("blind", blind, [16, 27, 12, 18, 29, *tool, 24, 15, 26], [1] * 5 + [0] * 5 + [1] * 3),
        Rollout("seen", seen, [20, IMAGE, IMAGE, 14, 26, 9, 31, 11], [1] * 8),  # it sampled placeholders
        Rollout("blind", blind, [23, 10, 19, 30], [1] * 4),  # sees no image
        Rollout("seen", seen, [13, 24, IMAGE, 22, 17, 28, 8, 12, 29], [1] * 9, scored=False),
        Rollout("blind", blind, [25, *tool, 9, 28, *tool, 17, 13, 21], [1] + [0] * 5 + [1] * 2 + [0] * 5 + [1] * 3),
        Rollout("both", seen, [11, 16, *tool, 20, 27, 15], [1] * 2 + [0] * 5 + [1] * 3),
        Rollout("seen", seen, [18, 10, 23, 29, 12], [1] * 5),
        Rollout("alone", [8, IMAGE, 30], [31, 19, 14, 24], [1] * 4),
    ]


def cosines(rollout: Rollout, hidden: Tensor) -> list[float]:
    """Cosine of each scored token to the mean of the images shown before it; NaN before the first."""
    states = hidden.double().tolist()
    begin = len(rollout.prompt)
    total, number, found = [0.0] * len(states[0]), 0, []
    for position, (token, state) in enumerate(zip(rollout.ids, states, strict=True)):
        answer = position - begin
        if answer >= 0 and rollout.response_mask[answer]:
            mean = [value / max(number, 1) for value in total]
            dot = sum(one * other for one, other in zip(state, mean, strict=True))
            norms = math.sqrt(sum(value**2 for value in state)) * math.sqrt(sum(value**2 for value in mean))
            found.append(dot / max(norms, 1e-8) if number else math.nan)
        if token == IMAGE and not (answer >= 0 and rollout.response_mask[answer]):
            total = [one + other for one, other in zip(total, state, strict=True)]
            number += 1
    return found


def expected_factors(batch: list[Rollout], hidden: list[Tensor], config: VGPOConfig) -> list[list[float]]:
    """Factor of each response token, from the last hidden states ``[S, D]`` of each sequence.

    For the schedule "linear" from the beginning, which both presets have.
    """
    cos = [cosines(*pair) for pair in zip(batch, hidden, strict=True)]
    numbers = [value for values in cos for value in values if value == value]
    offset = min([0.0, *numbers])
    psi, scores = [], []
    for values in cos:
        leading = sum(value != value for value in values)
        seen = list(range(leading, len(values)))
        if not seen:
            psi.append([0.0] * len(values))
            scores.append(math.nan)
            continue
        first = max(int(len(values) * (1 - config.tail_ratio)), leading)
        tail = sorted((values[t] for t in range(first, len(values))), reverse=True)
        threshold = tail[max(1, int(len(tail) * config.top_ratio)) - 1]
        weights = {}
        for t in seen:
            focus = (1 + values[t]) / 2 if config.score == "affine" else values[t] - offset
            one_based = config.position == "one_based"
            place = (t + 1) / len(values) if one_based else t / (len(values) - 1 + 1e-8)
            gate = t >= first and values[t] >= threshold
            weights[t] = focus * (1 + gate * config.beta * place / (1 + 1e-8))
        low, high = min(weights.values()), max(weights.values())
        normal = {t: (weight - low) / (high - low + 1e-8) for t, weight in weights.items()}
        mean = sum(normal.values()) / len(seen)
        psi.append([normal[t] - mean if t in normal else 0.0 for t in range(len(values))])
        scores.append(sum((weights if config.accumulation == "compensated" else normal).values()))

    factors = []
    for rollout, token_weights, score in zip(batch, psi, scores, strict=True):
        group = [s for other, s in zip(batch, scores, strict=True) if other.uid == rollout.uid and s == s]
        phi = 0.0
        if score == score and len(group) > 1:
            spread = max(group) - min(group) + 1e-8
            phi = (score - min(group)) / spread - sum((s - min(group)) / spread for s in group) / len(group)
        of_tokens = iter(token_weights)
        row = []
        for answered in rollout.response_mask:
            token, trajectory = 1 + (next(of_tokens) if answered else 0.0), 1 + phi
            if config.intra_clamp is not None:
                token = min(max(token, config.intra_clamp[0]), config.intra_clamp[1])
            if config.inter_clamp is not None:
                trajectory = min(max(trajectory, config.inter_clamp[0]), config.inter_clamp[1])
            row.append(token * trajectory if answered and score == score else 1.0)
        factors.append(row)
    return factors


def last_hidden_states(model: object, batch: list[Rollout]) -> list[Tensor]:
    """Last hidden states ``[S, D]`` of each sequence by itself."""
    with torch.no_grad():
        return [model.model(torch.tensor([rollout.ids])).last_hidden_state[0] for rollout in batch]  # type: ignore[attr-defined]


# Of the batch: the responses that are weighted, the prompts they belong to, those of them with one such response.
METRICS = {
    "vgpo/weighted_responses": 7,
    "vgpo/nonfinite_responses": 0,
    "vgpo/groups": 4,
    "vgpo/singleton_groups": 2,
}

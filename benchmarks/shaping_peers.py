"""The family's presets as one writes them without this library: plain, vectorised PyTorch for padded batches.

Settings are fixed to the presets', every response has an image and a token, signals are finite, and of ties all are
selected. They are compared with the definitions before they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-8
PROGRESS = 0.5

Signals = dict[str, Tensor]  # [B, T]: visual, entropy, gap


def normalized(values: Tensor, mask: Tensor, least: float = EPSILON) -> Tensor:
    """Min-max normalise each response, ``[B, T]``; 0 off the mask."""
    low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return ((values - low) / (high - low).clamp(min=least)).masked_fill(~mask, 0.0)


def top(values: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Whether a token is among the top fraction of its row's, bool in ``values``'s shape."""
    ranked = values.masked_fill(~mask, -torch.inf).topk(math.ceil(values.shape[-1] * fraction)).values
    count = (mask.sum(-1, keepdim=True) * fraction - 1e-6).ceil().long().clamp(min=1)
    return mask & (values >= ranked.gather(-1, count - 1))


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each response, ``[B]``."""
    return (values * mask).sum(-1) / mask.sum(-1)


def top_of_batch(signals: Signals, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Top 30 % of the batch's tokens by the visual signal and by the entropy."""
    flat = mask.flatten()
    by_visual, by_entropy = (top(signals[name].flatten(), flat, 0.3).view_as(mask) for name in ("visual", "entropy"))
    return by_visual, by_entropy


def pepo(signals: Signals, mask: Tensor) -> Tensor:
    visual, length = signals["visual"], mask.sum(-1, keepdim=True)
    mixed = normalized(visual, mask, 1e-6) + normalized(signals["entropy"], mask, 1e-6)
    centred = mixed - mixed.sum(-1, keepdim=True) / length
    power = visual * (1 + 0.05 * centred.tanh()) / 1.8
    weights = power.masked_fill(~mask, -torch.inf).softmax(-1) * length
    return torch.where(mask, 1 + PROGRESS * (weights - 1), 1.0)


def vppo(signals: Signals, mask: Tensor) -> Tensor:
    selected = top(signals["visual"], mask, 0.4)
    score = mean(signals["visual"], mask)
    unit = (score - score.min()) / (score.max() - score.min())
    factor = 0.9 + unit * 0.1 / (unit.mean() + EPSILON)
    return torch.where(mask, selected * factor[:, None], 1.0)


def pgpo(signals: Signals, mask: Tensor) -> Tensor:
    unit = normalized(signals["visual"].clamp(min=0).log1p(), mask)
    raw = torch.where(unit < 0.4, unit / 0.4, 1 + 2 * (unit - 0.4) / 0.6) * mask
    scale = mask.sum(-1, keepdim=True) / raw.sum(-1, keepdim=True).clamp(min=EPSILON)
    return torch.where(mask, raw * scale, 1.0)


def tor(signals: Signals, mask: Tensor) -> Tensor:
    by_visual, by_entropy = top_of_batch(signals, mask)
    return torch.where(mask, torch.where(by_entropy, 1.0, 0.5 * by_visual), 1.0)


def vepo(signals: Signals, mask: Tensor) -> Tensor:
    visual, gap = (1 - normalized(signals[name], mask) for name in ("visual", "gap"))
    score = (1 - visual**0.7 * gap**0.3) * normalized(signals["entropy"], mask)
    return torch.where(mask, top(score, mask, 0.2).float(), 1.0)


def cgpo(signals: Signals, mask: Tensor) -> Tensor:
    by_visual, by_entropy = top_of_batch(signals, mask)
    score = mean(signals["visual"], mask)
    distance = score - score.median()
    factor = 1 + 0.1 * (distance / (distance.abs().median() + EPSILON)).tanh()
    return torch.where(mask, torch.where(by_visual, factor[:, None], by_entropy.float()), 1.0)


METHODS: dict[str, Callable[[Signals, Tensor], Tensor]] = {
    "pepo": pepo,
    "vppo": vppo,
    "pgpo": pgpo,
    "tor": tor,
    "vepo": vepo,
    "cgpo": cgpo,
}

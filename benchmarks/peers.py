"""What one writes without this library: plain, vectorised PyTorch for padded batches, and a loop over tokens.

Peers of the benchmarks: the settings are fixed to the paper's and to DAPO's, no masks but the two, and nothing is
invariant to the bit. They are compared with the definitions before they are timed, as the operators are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

BETA, TAIL_RATIO, TOP_RATIO = 0.3, 0.5, 0.2
EPSILON = 1e-8


def prototype(hidden: Tensor, visual_mask: Tensor) -> Tensor:
    """Mean hidden state of the image tokens, ``[B, D]``."""
    visible = visual_mask[..., None]
    return (hidden.float() * visible).sum(1) / visible.sum(1).clamp(min=1)


def focus(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Cosines of the response tokens, ``[B, T]``."""
    rows = hidden[:, hidden.shape[1] - response_mask.shape[1] :].float()
    cos = cosine_similarity(rows, prototype(hidden, visual_mask)[:, None], dim=-1, eps=EPSILON)
    return cos.masked_fill(~response_mask, 0.0)


def weights(cos: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor:
    """Factors of the advantages, ``[B, T]``."""
    length = response_mask.sum(-1, keepdim=True)
    ordinal = response_mask.cumsum(-1)
    first = (length * (1 - TAIL_RATIO)).long()
    count = ((length - first) * TOP_RATIO).long().clamp(min=1)
    tail = response_mask & (ordinal > first)
    ranked = cos.masked_fill(~tail, -torch.inf).sort(descending=True).values
    gate = tail & (cos >= ranked.gather(-1, count - 1))
    w = (1 + cos) / 2 * (1 + gate * BETA * ordinal / length.clamp(min=1))
    low = w.masked_fill(~response_mask, torch.inf).amin(-1, keepdim=True)
    high = w.masked_fill(~response_mask, -torch.inf).amax(-1, keepdim=True)
    normalized = ((w - low) / (high - low + EPSILON)).masked_fill(~response_mask, 0.0)
    psi = normalized - normalized.sum(-1, keepdim=True) / length.clamp(min=1)
    score = (w * response_mask).sum(-1)
    phi = group(score, group_ids)
    return torch.where(response_mask, (1 + psi) * (1 + phi[:, None]), 1.0)


def group(score: Tensor, group_ids: Tensor) -> Tensor:
    """Inter-trajectory weights, ``[B]``, by a table of who shares a group with whom."""
    same = group_ids[:, None] == group_ids
    low = score.where(same, torch.inf).amin(-1)
    high = score.where(same, -torch.inf).amax(-1)
    normalized = (score - low) / (high - low + EPSILON)
    return normalized - (normalized * same).sum(-1) / same.sum(-1)


def loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, response_mask: Tensor, factors: Tensor) -> Tensor:
    """DAPO's loss; its gradient is autograd's."""
    advantage = advantages[:, None] * factors
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
    return (surrogate * response_mask).sum() / response_mask.sum()


def token_loop(hidden: Tensor, visual_mask: Tensor, response_mask: Tensor) -> Tensor:
    """Cosines token by token, each read back to the host before the next is computed."""
    skipped = hidden.shape[1] - response_mask.shape[1]
    cos = torch.zeros(response_mask.shape)
    for index, (response, visual) in enumerate(zip(hidden, visual_mask, strict=True)):
        mean = response[visual].float().mean(0)
        for position, state in enumerate(response[skipped:]):
            cos[index, position] = cosine_similarity(state.float(), mean, dim=0).item()
    return cos

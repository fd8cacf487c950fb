"""Visual prototypes and focus scores in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgpo_kernels.reference.layout import counts_of, responses_of, rows_of, sums_of, tokens_of

NORM_FLOOR = 1e-8


def visual_prototype(
    hidden: Tensor,  # [B, S, D] or [N, D]
    visual_mask: Tensor,  # [B, S] or [N]
    cu_seqlens: Tensor | None = None,  # [B + 1]
    causal: bool = False,
    unit: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B, D], causal: hidden's shape
    """Mean hidden state of each response's visual tokens (Eq. 3), causal: of those before each position.

    ``unit``: of the states divided by their norms. Zeros where there are none.
    """
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    visible = visual_mask.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    # A hidden state off the mask may be NaN, and NaN times zero is NaN: replace it instead of multiplying by zero.
    rows = torch.where(visible[:, None], rows, torch.zeros_like(rows))
    if unit:
        rows = rows * _inverse_norms(rows, _numbers(hidden))
    response, begin = responses_of(visible.shape[0], batch, cu_seqlens, hidden.device)
    if causal:
        place = torch.arange(len(visible), device=hidden.device) - begin[response]
        total = totals_before(rows, place)
        count = totals_before(visible.to(dtype)[:, None], place)
        return (total / count.clamp(min=1)).reshape(hidden.shape)
    total = sums_of(rows, response, batch)
    return total / counts_of(visible, response, batch).clamp(min=1).to(dtype)[:, None]


def totals_before(rows: Tensor, place: Tensor) -> Tensor:
    """Sum the rows ``[N, D]`` of a response before each of them; ``place [N]`` is a row's position in its response.

    Spans double: a row holds the sum of 1, 2, 4, ... rows. So no other response and no later row enters a sum, not even
    with a factor of zero, which would carry a NaN over.
    """

    def shifted(values: Tensor, by: int) -> Tensor:
        earlier = torch.cat([values.new_zeros(by, values.shape[1]), values[:-by]])
        return torch.where((place >= by)[:, None], earlier, torch.zeros_like(values))

    if len(rows) < 2:
        return torch.zeros_like(rows)
    total, span = shifted(rows, 1), 1
    while span < len(rows):
        total = total + shifted(total, span)
        span *= 2
    return total


def visual_focus(
    hidden: Tensor,  # [B, S, D] or [N, D]
    visual_mask: Tensor | None,  # [B, S] or [N]
    response_mask: Tensor,  # [B, T] or [N]
    cu_seqlens: Tensor | None = None,  # [B + 1]
    prototype: Tensor | None = None,  # [P, D]
    prototype_index: Tensor | None = None,  # [B], else response_mask's shape
    causal: bool = False,
    unit: bool = False,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # response_mask's shape
    """Cosine between each response token's hidden state and its image's prototype (Eq. 4).

    ``unit``: the mean of its cosines with the image's tokens, which is its product, over its norm, with their mean unit
    vector: that is the prototype then.

    NaN where a token sees no image; infinite where it does, but a hidden state is not finite, or a norm leaves the
    range of what kernels compute in: fp32, or fp64 for fp64 hidden states and prototypes.
    """
    tokens = tokens_of(response_mask, cu_seqlens)
    if prototype is None:
        assert visual_mask is not None
        means = visual_prototype(hidden, visual_mask, cu_seqlens, causal, unit, dtype=dtype)
        seen = images_of(hidden, visual_mask, cu_seqlens, causal)
        if causal:
            mean, looking = rows_of(response_mask, means), rows_of(response_mask, seen[..., None])[:, 0]
        else:
            mean, looking = tokens.spread(means), tokens.spread(seen)
    else:
        index = torch.arange(len(prototype), device=hidden.device) if prototype_index is None else prototype_index
        row = tokens.spread(index) if index.shape == (tokens.batch(),) else index.reshape(-1)
        mean = prototype.to(dtype)[row.clamp(min=0)]
        looking = (row >= 0) & (mean != 0).any(-1)
    rows = rows_of(response_mask, hidden).to(dtype)
    norms = mean.new_ones(len(mean)) if unit else torch.linalg.vector_norm(mean, dim=-1)
    cos = _cosine(rows, mean, norms, _numbers(hidden, prototype))
    cos = torch.where(looking, cos, torch.full_like(cos, math.nan))
    return torch.where(tokens.valid, cos, torch.zeros_like(cos)).reshape(response_mask.shape)


def _numbers(hidden: Tensor, prototype: Tensor | None = None) -> torch.finfo:
    """The numbers that results are told in."""
    wide = torch.float64 in (hidden.dtype, None if prototype is None else prototype.dtype)
    return torch.finfo(torch.float64 if wide else torch.float32)


def _inverse_norms(rows: Tensor, numbers: torch.finfo) -> Tensor:
    """What makes unit vectors of rows, ``[N, 1]``; NaN where the square of a norm is none of ``numbers``."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse = 1 / norms.clamp(min=NORM_FLOOR)
    return torch.where(norms < math.sqrt(numbers.max), inverse, torch.full_like(inverse, math.nan))


def _cosine(rows: Tensor, mean: Tensor, other: Tensor, numbers: torch.finfo) -> Tensor:
    """Cosines of rows ``[N, D]`` with means ``[N, D]``, or products with them where their norms ``[N]`` are given as 1.

    Infinite where a number on the way to one is none of ``numbers``.
    """
    dot = (rows * mean).sum(-1)
    one = torch.linalg.vector_norm(rows, dim=-1)
    cos = dot / (one * other).clamp(min=NORM_FLOOR)
    # The square of a smaller norm has lost bits, which matters beside a norm so large that the floor does not decide.
    least, most = math.sqrt(2 * numbers.tiny / numbers.eps), math.sqrt(numbers.max)
    smaller, larger = torch.minimum(one, other), torch.maximum(one, other)
    lost = (smaller < least) & (larger > NORM_FLOOR / least) & (dot != 0)
    known = torch.isfinite(cos) & (larger < most) & ~lost
    return torch.where(known, cos, torch.full_like(cos, math.inf))


def images_of(hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    """Whether a response has a visual token, bool ``[B]``; causal: before each position, in visual_mask's shape."""
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    visible = visual_mask.reshape(-1)
    response, begin = responses_of(visible.shape[0], batch, cu_seqlens, hidden.device)
    if causal:
        running = torch.cat([visible.new_zeros(1, dtype=torch.int64), visible.cumsum(0)])
        return (running[:-1] > running[begin][response]).reshape(visual_mask.shape)
    return counts_of(visible, response, batch) > 0

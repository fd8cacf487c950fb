"""Padded and packed batches in one form: flat tokens, each with its response and its ordinal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A padded ``[B, T]`` or packed ``[N]`` batch of response tokens, flattened to ``[N]``.

    Attributes:
        valid: Whether the response mask is set, bool ``[N]``.
        response: Index of the token's response, int64 ``[N]``.
        begin: Flat index at which a response begins, int64 ``[B]``.
        ordinal: 1-based count of valid tokens up to and including this one, int64 ``[N]``.
        length: Number of valid tokens of a response, int64 ``[B]``.

    """

    valid: Tensor
    response: Tensor
    begin: Tensor
    ordinal: Tensor
    length: Tensor

    def batch(self) -> int:
        """Count the responses B. No property: torch.compile of torch 2.8 sees none in a tuple."""
        return self.begin.shape[0]

    def spread(self, per_response: Tensor) -> Tensor:
        """Return for each token ``[N]`` the value ``[B]`` of its response."""
        return per_response[self.response]

    def total(self, values: Tensor) -> Tensor:
        """Sum values ``[N]`` over the valid tokens of each response, ``[B]``."""
        chosen = torch.where(self.valid, values, torch.zeros_like(values))
        return values.new_zeros(self.batch()).index_add(0, self.response, chosen)

    def extreme(self, values: Tensor, reduce: str, empty: float) -> Tensor:
        """Smallest (``"amin"``) or largest (``"amax"``) value over the valid tokens of each response, ``[B]``."""
        chosen = torch.where(self.valid, values, torch.full_like(values, empty))
        return values.new_full((self.batch(),), empty).scatter_reduce(0, self.response, chosen, reduce)


def responses_of(length: int, batch: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the response index of each of ``length`` flat entries, and where each response begins."""
    flat = torch.arange(length, device=device)
    if cu_seqlens is None:
        width = length // max(batch, 1)
        return flat // max(width, 1), torch.arange(batch, device=device) * width
    return torch.searchsorted(cu_seqlens[1:].contiguous(), flat, right=True), cu_seqlens[:-1]


def tokens_of(response_mask: Tensor, cu_seqlens: Tensor | None) -> Tokens:
    """Flatten a response mask, ``[B, T]`` or ``[N]`` with boundaries."""
    batch = response_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    valid = response_mask.reshape(-1)
    response, begin = responses_of(valid.shape[0], batch, cu_seqlens, valid.device)
    running = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    ordinal = running[1:] - running[begin][response]
    count = valid.new_zeros(batch, dtype=torch.int64).index_add(0, response, valid.to(torch.int64))
    return Tokens(valid, response, begin, ordinal, count)


def rows_of(response_mask: Tensor, hidden: Tensor) -> Tensor:
    """Return the hidden states at the response positions, ``[N, D]``: the last T of S, or all when packed."""
    if hidden.dim() == 3:
        hidden = hidden[:, hidden.shape[1] - response_mask.shape[1] :]
    return hidden.reshape(-1, hidden.shape[-1])


def numbers_of(settings: Any, like: Tensor) -> dict[str, Any]:
    """Return the numbers among settings as 0-dimensional tensors of ``like``'s dtype; ``None`` stays ``None``.

    torch.compile keeps a tensor that is made of a changing float as an input of the graph. ``clamp``, ``**`` and
    ``full_like`` make a constant of the float itself, and would be compiled anew for each value.
    """
    one = like.new_ones(())
    found: dict[str, Any] = {}
    for name in settings.kinds:
        value = getattr(settings, name)
        if isinstance(value, tuple):
            found[name] = tuple(one * bound for bound in value)
        elif isinstance(value, float) or value is None:
            found[name] = None if value is None else one * value
    return found

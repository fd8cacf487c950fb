"""Padded and packed batches in one form: flat tokens, each with its response and its ordinal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows that sums in 64 bits have room for, as a power of two.
ROOM = 24
LEAST_MAGNITUDE = 2.0**-80  # what is smaller is rounded as this is: its last bit must be a normal number


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

    def signal_total(self, values: Tensor) -> Tensor:
        """Sum values ``[N]`` as :meth:`total` does, without a gradient, and by :func:`sums_of`."""
        chosen = torch.where(self.valid, values, torch.zeros_like(values))
        return sums_of(chosen[:, None], self.response, self.batch()).squeeze(-1)

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


def sums_of(rows: Tensor, index: Tensor, number: int) -> Tensor:
    """Sum the rows ``[N, D]`` of each of ``number`` entries, ``[number, D]``, without a gradient.

    In fp32 as integers, of which a row's largest entry gets 38 bits: a sum has the same bits in whatever order a device
    adds, whatever else is in a batch. Integers are added by running sums, which need no atomic instructions.

    Args:
        rows: fp32 or fp64.
        index: The entry of each row, ``[N]``, in ascending order.
        number: Of entries, each of at most 2**24 rows; one without rows is zero.

    """
    if rows.dtype == torch.float64:
        return rows.new_zeros(number, rows.shape[1]).index_add(0, index, rows)
    finite = rows.isfinite()
    whole = torch.where(finite, rows, torch.zeros_like(rows))
    size = whole.abs().amax(-1) if rows.shape[1] else rows.new_zeros(len(rows))
    largest = size.new_zeros(number).scatter_reduce(0, index, size, "amax")
    # The power of two below, whose exponent stands above the other bits.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = (power.clamp(min=LEAST_MAGNITUDE) * 2.0 ** (ROOM - 62))[:, None]
    fixed = (whole / unit[index]).round().to(torch.int64)
    running = torch.cat([fixed.new_zeros(1, fixed.shape[1]), fixed.cumsum(0)])
    entries = torch.arange(number, device=rows.device)
    begin, end = (torch.searchsorted(index, entries, right=right) for right in (False, True))
    # What is not finite spoils its own sum.
    spoiled = rows.new_zeros(number, rows.shape[1]).index_add(0, index, torch.where(finite, 0.0, rows))
    return (running[end] - running[begin]).to(rows.dtype) * unit + spoiled


def tokens_of(response_mask: Tensor, cu_seqlens: Tensor | None) -> Tokens:
    """Flatten a response mask, ``[B, T]`` or ``[N]`` with boundaries."""
    batch = response_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    valid = response_mask.reshape(-1)
    response, begin = responses_of(valid.shape[0], batch, cu_seqlens, valid.device)
    running = torch.cat([valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)])
    ordinal = running[1:] - running[begin][response]
    return Tokens(valid, response, begin, ordinal, counts_of(valid, response, batch))


def counts_of(valid: Tensor, index: Tensor, number: int) -> Tensor:
    """Count how often ``valid [N]`` is True for each of ``number`` entries, int64 ``[number]``.

    Args:
        valid: Bool.
        index: The entry of each of its elements, ``[N]``.
        number: Of entries.

    """
    # Not every release of torch adds 64-bit integers on Apple's GPUs.
    return valid.new_zeros(number, dtype=torch.int32).index_add(0, index, valid.to(torch.int32)).to(torch.int64)


def group_numbers(group_ids: Tensor) -> Tensor:
    """Number the groups by sorting their ids, ``[B]``. No shape depends on their number, so this can be traced."""
    order = group_ids.argsort()
    ordered = group_ids[order]
    starts = torch.cat([ordered.new_zeros(min(1, len(ordered))), (ordered[1:] != ordered[:-1]).to(torch.int64)])
    return torch.empty_like(group_ids).scatter(0, order, starts.cumsum(0))


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

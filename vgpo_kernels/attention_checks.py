"""Checks of attention's arguments, and their messages, as in checks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgpo_kernels.checks import (
    cu_seqlens,
    describe,
    integers,
    not_negative_integer,
    positive_integer,
    require_device,
    require_floating,
    require_shape,
    rows_apart,
    values_are_free,
)
from vgpo_kernels.config import is_number, spell, type_name

MOST_SEGMENTS = 65535 * 8  # a GPU starts no more blocks than 65,535 along this dimension, and each sums up 8 segments
LARGEST_SCALE = 2.0**127  # kernels multiply it by log2(e) in float32


def queries_and_keys(
    queries: object, keys: object, cu_seqlens_q: object, cu_seqlens_k: object
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Check q ``[B, Hq, T, d]`` and k ``[B, Hk, S, d]``, or ``[N, Hq, d]`` and ``[M, Hk, d]`` with both boundaries.

    Returns:
        Both, their last dimension contiguous, and the boundaries as int64 or ``None``.

    """
    q, k = require_floating("q", queries), require_floating("k", keys)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k belong together: give both, or neither")
    packed = cu_seqlens_q is not None
    for name, tensor, layouts in (("q", q, ("[B, Hq, T, d]", "[N, Hq, d]")), ("k", k, ("[B, Hk, S, d]", "[M, Hk, d]"))):
        if tensor.dim() != (3 if packed else 4):
            layout = f"{layouts[1]} with cu_seqlens" if packed else f"{layouts[0]} without cu_seqlens"
            raise ValueError(f"{name} must have shape {layout}, got {describe(tensor)}")
    if k.dtype != q.dtype:
        raise TypeError(f"k must have q's dtype, got {describe(k)} and q {describe(q)}")
    require_device("k", k, q.device, "q")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0 or (not packed and k.shape[0] != q.shape[0]):
        raise ValueError(f"k must have q's head size and batch, got {describe(k)} and q {describe(q)}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q must have a multiple of k's heads, got {q.shape[1]} heads {describe(q)} and {k.shape[1]} {describe(k)}"
        )
    q, k = rows_apart(q), rows_apart(k)
    if not packed:
        return q, k, (None, None)
    begins = cu_seqlens(cu_seqlens_q, q, "q", "cu_seqlens_q")
    begins_k = cu_seqlens(cu_seqlens_k, k, "k", "cu_seqlens_k")
    require_shape("cu_seqlens_k", begins_k, begins.shape, "cu_seqlens_q's")
    return q, k, (begins, begins_k)


def token_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of one number per token: ``[B, T]`` for q or k ``[B, H, T, d]``, ``[N]`` for ``[N, H, d]``."""
    return tuple(tensor.shape[::2]) if tensor.dim() == 4 else (tensor.shape[0],)


def segment_count(value: object) -> int:
    """Return ``num_segments`` if it is an integer from 1 to MOST_SEGMENTS."""
    return positive_integer("num_segments", value, MOST_SEGMENTS)


def chosen_segments(value: object) -> tuple[int, ...]:
    """Return ``segment``, an integer from 0 or a sequence of them, as a tuple."""
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not given:
        raise ValueError(f"segment must be a segment of keys or several, got {value!r}")
    return tuple(not_negative_integer("segment", one) for one in given)


def key_segments(value: object, k: Tensor, num_segments: int) -> Tensor:
    """Return the segment of each key as int32, -1 for each key to ignore."""
    segments = integers("key_segments", value)
    require_shape("key_segments", segments, token_shape(k), "one entry per key of k")
    require_device("key_segments", segments, k.device, "k")
    if values_are_free(segments) and segments.numel() and segments.max() >= num_segments:
        raise ValueError(
            f"key_segments must be below num_segments={num_segments} (negative: ignored), got {int(segments.max())}"
        )
    # The bounds may not fit into the dtype of the segments: widen before clamping.
    return segments.to(torch.int64).clamp(-1, num_segments).to(torch.int32).contiguous()


def query_positions(
    value: object, q: Tensor, k: Tensor, boundaries: tuple[Tensor | None, Tensor | None]
) -> Tensor | None:
    """Return the position of each query as int64 ``[B, T]`` or ``[N]``, or ``None``: queries are the last positions."""
    if value is not None:
        positions = integers("query_positions", value)
        require_shape("query_positions", positions, token_shape(q), "one entry per query of q")
        require_device("query_positions", positions, q.device, "q")
        return positions.to(torch.int64).clamp(min=-1).contiguous()
    begins_q, begins_k = boundaries
    if begins_q is None or begins_k is None:
        fits = q.shape[2] <= k.shape[2]
    else:
        fits = not values_are_free(begins_q) or bool((begins_q.diff() <= begins_k.diff()).all())
    if not fits:
        raise ValueError(
            f"q {describe(q)} has more queries than k {describe(k)} has keys, so queries cannot be the last positions: "
            "give query_positions"
        )
    return None


def window(value: object) -> int:
    """Return how many positions a query sees, 0 for ``None``: all."""
    return 0 if value is None else positive_integer("window", value)


def attention_scale(value: object, head_size: int) -> float:
    """Return the factor of attention scores, ``1 / sqrt(head_size)`` for ``None``."""
    if value is None:
        return float(head_size**-0.5)
    if not is_number(value):
        raise TypeError(f"scale must be a number or None, got {type_name(value)}")
    if not abs(value) <= LARGEST_SCALE:
        raise ValueError(f"scale must be finite and within +-2**127, got {spell(value)}")
    return float(value)

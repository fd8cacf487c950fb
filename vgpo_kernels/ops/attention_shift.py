"""How far attention moves over the image from one token to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import attention_checks, checks
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.reference.attention_mass import default_positions

CHUNK_BYTES = 64 * 2**20  # of scores that exist at a time
FEWEST_QUERIES = 16  # of a chunk: fewer would make more products of them than necessary


@explained
def attention_shift(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    *,
    segment: int | Sequence[int] = 0,
    query_positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    per_head: bool = False,
) -> Tensor:
    """Fisher-Rao distance between the attention of each query and of the one before it, over the image's keys.

    ``shift[t] = 2 arccos(sum_j sqrt(p_t(j) p_{t-1}(j)))``, where ``p_t`` is the attention of query t, averaged over
    heads and normalised over the keys of ``segment`` (DyCo-RL). It is 0 where the token looks at the same places as the
    one before, and pi where it looks at none of them. DyCo-RL takes the last layer's. Its text's counterpart is the
    shift over the other segments.

    The averages and distances are those of DyCo-RL's released code, without what it adds to sums and to probabilities
    (1e-8 and 1e-12). Its paper could not be read.

    Scores exist for a few queries at a time, at most 64 MiB of them or those of 16 queries. The distance is computed
    as ``4 arcsin(|sqrt(p_t) - sqrt(p_{t-1})| / 2)``, which is the same, and in float32 is precise to about 1e-5, and to
    fewer digits where scores are in the hundreds. ``arccos`` of a sum near 1 would be precise to 1e-3. Not
    differentiable: q and k are detached.

    Args:
        q: Queries ``[B, Hq, T, d]``, or packed ``[N, Hq, d]``; float32, bfloat16 or float16, after position embedding.
            Those that follow each other in a response are compared.
        k: Keys ``[B, Hk, S, d]`` or ``[M, Hk, d]`` in q's dtype, Hq a multiple of Hk.
        key_segments: Segment of each key, integer ``[B, S]`` or ``[M]``, as in :func:`attention_mass`; below 524,280.
            Keys with a negative one are ignored.
        segment: The segment of the keys to normalise over, or several segments that are taken as one.
        query_positions: As in :func:`attention_mass`, like the arguments that follow.
        cu_seqlens_q: Boundaries of packed queries, int32 or int64 ``[B + 1]``. The host reads them, so it waits for a
            GPU.
        cu_seqlens_k: Boundaries of packed keys, likewise.
        scale: Factor of the scores, within +-2**127; by default ``1 / sqrt(d)``.
        window: Number of positions that a query sees at most, with its own; ``None``: all.
        per_head: Return the distances of every head's own attention. Their mean is not the distance of the mean.

    Returns:
        Distances in [0, pi], float32 ``[B, T]``, packed ``[N]``; with ``per_head`` ``[B, Hq, T]``, packed ``[Hq, N]``.
        Both queries are normalised over the keys that both see: one that arrives between them, or leaves the window,
        is not counted. NaN, no signal, at the first query of a response and where the two see no key of ``segment``;
        infinite where they do, but their scores are not finite.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, boundaries or settings do not fit together.

    """
    q, k, boundaries = attention_checks.queries_and_keys(q, k, cu_seqlens_q, cu_seqlens_k)
    labels = attention_checks.key_segments(key_segments, k, attention_checks.MOST_SEGMENTS)
    chosen = attention_checks.chosen_segments(segment)
    positions = attention_checks.query_positions(query_positions, q, k, boundaries)
    factor, limit = attention_checks.attention_scale(scale, q.shape[-1]), attention_checks.window(window)
    by_head = checks.flag("per_head", per_head)
    dtype = checks.compute_dtype(q)
    q, k = q.detach(), k.detach()
    with torch.no_grad(), registry.without_autocast(q.device):
        lse = None
        if not by_head:
            # What a head's attention to the image counts in the mean depends on its attention to everything else.
            _, _, lse = registry.call(
                "attention_mass",
                q.device,
                dtype,
                q=q,
                k=k,
                key_segments=torch.where(labels >= 0, 0, -1).to(torch.int32),
                query_positions=positions,
                cu_seqlens_q=boundaries[0],
                cu_seqlens_k=boundaries[1],
                num_segments=1,
                scale=factor,
                window=limit,
                per_head=True,
            )
        if positions is None:
            numbers = (attention_checks.token_shape(tensor) for tensor in (q, k))
            queries, keys = (shape[-1] for shape in numbers)
            positions = default_positions(queries, keys, *boundaries, q.device)
            positions = positions.expand(attention_checks.token_shape(q))
        shown = torch.stack([labels == one for one in chosen]).any(0)
        whole = _Queries(q, k, shown, positions, lse)
        if boundaries[0] is None or boundaries[1] is None:
            return _shifts(whole, factor, limit, dtype)
        ranges = (pairwise(begins.tolist()) for begins in boundaries if begins is not None)
        parts = [
            _shifts(whole.response(slice(*queries), slice(*keys)), factor, limit, dtype)[0]
            for queries, keys in zip(*ranges, strict=True)
        ]
        return torch.cat(parts, -1) if parts else q.new_zeros((q.shape[1], 0) if by_head else (0,), dtype=dtype)


class _Queries(NamedTuple):
    """Padded queries and keys, or all of a packed batch.

    Attributes:
        q: ``[B, Hq, T, d]``, packed ``[N, Hq, d]``.
        k: ``[B, Hk, S, d]``, packed ``[M, Hk, d]``.
        shown: Keys to normalise over, bool ``[B, S]`` or ``[M]``.
        positions: Those of the queries, ``[B, T]`` or ``[N]``.
        lse: Log-sum-exp of every query's scores by head, ``[B, Hq, T]`` or ``[Hq, N]``; ``None``: heads stay apart.

    """

    q: Tensor
    k: Tensor
    shown: Tensor
    positions: Tensor
    lse: Tensor | None

    def response(self, queries: slice, keys: slice) -> _Queries:
        """Return a response of a packed batch as a padded batch of one."""
        return _Queries(
            self.q[queries].transpose(0, 1)[None],
            self.k[keys].transpose(0, 1)[None],
            self.shown[keys][None],
            self.positions[queries][None],
            None if self.lse is None else self.lse[:, queries][None],
        )


def _shifts(given: _Queries, scale: float, window: int, dtype: torch.dtype) -> Tensor:
    """Return the shifts of padded queries, ``[B, T]`` or by head ``[B, Hq, T]``."""
    batch, heads, queries, features = given.q.shape
    keys, begin = given.shown.shape[-1], 0
    if checks.values_are_free(given.shown):  # only from the first to the last key that counts
        places = given.shown.any(0).nonzero()[:, 0].tolist()
        begin, keys = (places[0], places[-1] + 1) if places else (0, 0)
    columns = torch.arange(begin, keys, device=given.q.device)
    k = given.k[:, :, begin:keys].to(dtype).transpose(-1, -2)[:, :, None]
    shown = given.shown[:, None, None, begin:keys]
    groups = (given.k.shape[1], heads // given.k.shape[1])

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        position = given.positions[:, None, rows, None]
        seen = shown & (columns <= position)
        if window:
            seen = seen & (columns > position - window)
        grouped = given.q[:, :, rows].to(dtype).reshape(batch, *groups, seen.shape[2], features)
        scores = (grouped @ k * scale).reshape(batch, heads, seen.shape[2], len(columns))
        return scores if given.lse is None else scores - given.lse[:, :, rows, None].to(dtype), seen

    return shifts_in_chunks((batch, heads, queries, len(columns)), part, given.lse is None, given.q.device, dtype)


def shifts_in_chunks(
    shape: tuple[int, int, int, int],
    part: Callable[[slice], tuple[Tensor, Tensor]],
    by_head: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return the shifts of padded queries, a few of which are looked at at a time.

    Args:
        shape: Of all scores: B, Hq, T, S.
        part: For some of the queries the logarithms of every head's attention, up to a constant of the query (with
            ``by_head`` of the query and head), ``[B, Hq, t, S]``; and the keys that count and that each query sees,
            bool ``[B, 1, t, S]`` or ``[B, Hq, t, S]``.
        by_head: Whether heads stay apart.
        device: That of the result.
        dtype: Likewise.

    Returns:
        ``[B, T]``, by head ``[B, Hq, T]``.

    """
    batch, heads, queries, keys = shape
    first_of_all = (batch, heads, min(queries, 1)) if by_head else (batch, min(queries, 1))
    found = [torch.full(first_of_all, math.nan, device=device, dtype=dtype)]
    step = max(CHUNK_BYTES // max(4 * batch * heads * keys, 1), FEWEST_QUERIES)
    for first in range(1, queries, step):
        found.append(_distances(*part(slice(first - 1, min(first + step, queries))), by_head))
    return torch.cat(found, -1)


def _distances(logits: Tensor, seen: Tensor, by_head: bool) -> Tensor:
    """Distances between the attention of successive queries, of ``t`` queries ``[B, t - 1]`` or ``[B, Hq, t - 1]``."""
    if not logits.shape[-1]:
        return logits.new_full((*logits.shape[: 2 if by_head else 1], logits.shape[2] - 1), math.nan)
    logits = logits.masked_fill(~seen, -math.inf)
    # Attention to the image may be so faint that it would vanish before it is normalised.
    peak = logits.amax((-1,) if by_head else (1, 3), keepdim=True)
    attention = (logits - torch.where(peak == -math.inf, 0.0, peak)).exp()
    attention, seen = (attention, seen) if by_head else (attention.sum(1), seen.any(1))
    common = seen[..., 1:, :] & seen[..., :-1, :]
    before, after = (torch.where(common, part, 0.0) for part in (attention[..., :-1, :], attention[..., 1:, :]))
    before, after = (part / part.sum(-1, keepdim=True) for part in (before, after))
    chord = (after.sqrt() - before.sqrt()).square().sum(-1).sqrt()
    shift = 4 * (chord / 2).clamp(max=math.sqrt(0.5)).asin()
    shift = torch.where(shift.isfinite(), shift, math.inf)
    return torch.where(common.any(-1), shift, math.nan)

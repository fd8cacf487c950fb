"""Attention by segment and by key in plain PyTorch, with the whole matrix of probabilities in memory.

Shapes below are those of a padded batch. A packed batch has queries ``[N, Hq, d]``, keys ``[M, Hk, d]`` and boundaries.
It is computed as one sequence in which queries see only the keys of their own response.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgpo_kernels.reference.layout import responses_of


def attention_mass(
    q: Tensor,  # [B, Hq, T, d]
    k: Tensor,  # [B, Hk, S, d]
    key_segments: Tensor,  # [B, S], a value outside 0..num_segments-1: key ignored
    query_positions: Tensor | None,  # [B, T], index among the response's keys
    cu_seqlens_q: Tensor | None,  # [B + 1]
    cu_seqlens_k: Tensor | None,  # [B + 1]
    num_segments: int,  # G
    scale: float,
    window: int,  # 0: none
    per_head: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, G], [B, Hq, T, G], [B, Hq, T]; packed without B
    """Share of each query's attention by segment: the mean over heads, and by head; and the log-sum-exp of its scores.

    With ``per_head`` the first result is the shares by head, and the second is empty. A query that sees no key has
    shares of zero and a log-sum-exp of -inf.
    """
    scores, visible = _scores(
        q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k, num_segments, scale, window, dtype
    )
    sees = visible.any(-1, keepdim=True)
    # A row without a visible key keeps its scores, so that its softmax is finite. It is not used.
    scores = torch.where(visible | ~sees, scores, -torch.inf)
    probability = torch.where(visible, scores.softmax(-1), torch.zeros_like(scores))
    # The added column changes no sum. It is there for responses without keys.
    lse = torch.where(sees[..., 0], nn.functional.pad(scores, (0, 1), value=-torch.inf).logsumexp(-1), -torch.inf)
    segments = torch.arange(num_segments, device=k.device)
    member = (_batch(key_segments, cu_seqlens_k)[:, None, :, None] == segments).to(dtype)
    # Where a query sees no key of a segment, its mass is a constant zero, whose gradient must not be read.
    head_mass = probability @ member
    head_mass = torch.where((visible.to(dtype) @ member > 0) | head_mass.isnan(), head_mass, 0.0)
    head_mass, lse = _unbatch(head_mass, cu_seqlens_q), _unbatch(lse, cu_seqlens_q)
    return (head_mass, lse.new_empty(0), lse) if per_head else (head_mass.mean(-3), head_mass, lse)


def attention_heatmap(
    q: Tensor,  # [B, Hq, T, d]
    k: Tensor,  # [B, Hk, S, d]
    key_segments: Tensor,  # [B, S], 1: shown, 0: seen but not shown, else ignored
    query_positions: Tensor | None,  # [B, T]
    query_weights: Tensor,  # [B, T]
    lse: Tensor,  # [B, Hq, T], of attention_mass
    cu_seqlens_q: Tensor | None,  # [B + 1]
    cu_seqlens_k: Tensor | None,  # [B + 1]
    scale: float,
    window: int,  # 0: none
    per_head: bool,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B, S], or [B, Hq, S] per head; packed without B
    """Return the weighted sum over queries of each shown key's attention; 0 for the other keys.

    A query of weight 0 is not read.
    """
    positions = _weighted_positions(q, k, query_positions, query_weights, cu_seqlens_q, cu_seqlens_k)
    scores, visible = _scores(q, k, key_segments, positions, cu_seqlens_q, cu_seqlens_k, 2, scale, window, dtype)
    shown = visible & (_batch(key_segments, cu_seqlens_k)[:, None, None] == 1)
    lse, query_weights = (_batch(tensor, cu_seqlens_q).to(dtype) for tensor in (lse, query_weights))
    exponent = torch.where(shown, scores - lse[..., None], -torch.inf)
    received = torch.where(shown, exponent.exp() * query_weights[:, None, :, None], 0.0)
    heat = _unbatch(received.sum(-2), cu_seqlens_q)
    return heat if per_head else heat.mean(-2)


def attention_mass_backward(
    grad_mass: Tensor,  # [B, Hq, T, num_segments]
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    head_mass: Tensor,  # [B, Hq, T, num_segments], what attention_mass returned, like lse
    lse: Tensor,
    scale: float,
    window: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # of q's and k's shapes
    """Gradients of :func:`attention_mass` per head w.r.t. q and k."""
    layout = (query_positions, cu_seqlens_q, cu_seqlens_k)
    with torch.enable_grad():
        q, k = (tensor.detach().to(dtype).requires_grad_() for tensor in (q, k))
        result, *_ = attention_mass(q, k, key_segments, *layout, grad_mass.shape[-1], scale, window, True, dtype=dtype)
        grad_q, grad_k = torch.autograd.grad(result, (q, k), grad_mass.to(dtype))
    return grad_q, grad_k


def attention_heatmap_backward(
    grad_heat: Tensor,  # [B, Hq, S]
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    query_weights: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    window: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # of q's and k's shapes
    """Gradients of :func:`attention_heatmap` per head w.r.t. q and k, through the denominator ``lse`` as well."""
    boundaries = (cu_seqlens_q, cu_seqlens_k)
    query_positions = _weighted_positions(q, k, query_positions, query_weights, *boundaries)
    with torch.enable_grad():
        q, k = (tensor.detach().to(dtype).requires_grad_() for tensor in (q, k))
        inputs = (q, k, key_segments, query_positions)
        _, _, lse = attention_mass(*inputs, *boundaries, 2, scale, window, True, dtype=dtype)
        result = attention_heatmap(*inputs, query_weights, lse, *boundaries, scale, window, True, dtype=dtype)
        grad_q, grad_k = torch.autograd.grad(result, (q, k), grad_heat.to(dtype))
    return grad_q, grad_k


def default_positions(
    num_queries: int,  # T, or N
    num_keys: int,  # S, or M
    cu_seqlens_q: Tensor | None,  # [B + 1]
    cu_seqlens_k: Tensor | None,  # [B + 1]
    device: torch.device,
) -> Tensor:  # [T] or [N]
    """Positions of queries that are the last ones of their response."""
    index = torch.arange(num_queries, device=device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return index + (num_keys - num_queries)
    response, begin = responses_of(num_queries, cu_seqlens_q.shape[0] - 1, cu_seqlens_q, device)
    return index - begin[response] + (cu_seqlens_k.diff() - cu_seqlens_q.diff())[response]


def _weighted_positions(
    q: Tensor,
    k: Tensor,
    query_positions: Tensor | None,
    query_weights: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:  # [B, T] or [N]
    """Positions of queries, -1 for those of weight 0: they see nothing."""
    if query_positions is None:
        keys = k.shape[-2 if k.dim() == 4 else 0]
        query_positions = default_positions(query_weights.shape[-1], keys, cu_seqlens_q, cu_seqlens_k, q.device)
    return torch.where(query_weights == 0, -1, query_positions)


def _scores(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    scale: float,
    window: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [B, Hq, T, S], [B, 1, T, S]
    """Scaled products of all queries and keys, and which of them are seen: causal, in the window, not ignored."""
    seen = _batch((key_segments >= 0) & (key_segments < num_segments), cu_seqlens_k)
    if query_positions is None:
        query_positions = default_positions(
            q.shape[-2 if q.dim() == 4 else 0], seen.shape[-1], cu_seqlens_q, cu_seqlens_k, q.device
        )
    position = torch.arange(seen.shape[-1], device=k.device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        batch = cu_seqlens_q.shape[0] - 1
        query_response, _ = responses_of(q.shape[0], batch, cu_seqlens_q, q.device)
        key_response, begin = responses_of(k.shape[0], batch, cu_seqlens_k, k.device)
        seen = seen[:, None] & (query_response[:, None] == key_response)
        position = position - begin[key_response]
        q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    else:
        seen = seen[:, None]
    # A negative position sees nothing, however negative: then no difference overflows.
    distance = _batch(query_positions.clamp(min=-1), cu_seqlens_q)[..., None] - position
    visible = seen & (distance >= 0) & (distance < window if window else True)
    # A key that a query does not see may be NaN, and NaN times zero is NaN, also in the gradient of a product. So every
    # NaN is replaced before the product, and added to the score where the query sees the key and one of the two has it:
    # there zero times the row is NaN, and so is its gradient.
    batch, heads, queries, size = q.shape
    group = heads // k.shape[1]
    broken = ~q.isfinite().all(-1)[..., None] | ~k.isfinite().all(-1).repeat_interleave(group, 1)[..., None, :]
    zero_or_nan = (q * 0).sum(-1)[..., None] + (k * 0).sum(-1).repeat_interleave(group, 1)[..., None, :]
    # Rows that take no part may hold numbers whose products leave the range of fp32.
    read = [(tensor, tensor.isfinite() & visible.any(other)[:, None, :, None]) for tensor, other in ((q, -1), (k, -2))]
    q, k = (torch.where(used, tensor, torch.zeros_like(tensor)).to(dtype) for tensor, used in read)
    grouped = q.reshape(batch, k.shape[1], group, queries, size)
    scores = (grouped @ k[:, :, None].mT).flatten(1, 2) * scale
    return scores + torch.where(broken & visible[:, None], zero_or_nan, 0.0), visible[:, None]


def _batch(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Add a batch dimension to a packed batch: it is one sequence."""
    return tensor if cu_seqlens is None else tensor[None]


def _unbatch(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return tensor if cu_seqlens is None else tensor[0]

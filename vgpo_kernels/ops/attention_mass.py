"""Shares of attention by segment of keys and by single key, without the attention matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import attention_checks, checks
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.reference import attention_mass as reference
from vgpo_kernels.reference.layout import responses_of

# Segments of the keys in attention_heatmap.
IGNORED, SEEN, SHOWN = -1, 0, 1
LABELS = 2  # of keys that take part


@explained
def attention_mass(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    *,
    num_segments: int = 3,
    query_positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    per_head: bool = False,
) -> Tensor:
    """Share of each query's causal softmax attention that falls on each segment of the keys.

    ``mass[t, g]`` is the sum of ``softmax(scale q_t k^T)`` over the visible keys of segment g; the usual segments are
    image, question and generated text. It goes over the keys in blocks, as flash attention does, and needs no values:
    there is never an array of queries by keys. Differentiable in q and k (first derivatives), by recomputation. A query
    that sees no key and a key that no query sees may hold NaN: they show in no result, and in no gradient but their
    own, which is zero.

    Args:
        q: Queries ``[B, Hq, T, d]``, or packed ``[N, Hq, d]``; float32, bfloat16 or float16, after position embedding.
        k: Keys ``[B, Hk, S, d]`` or ``[M, Hk, d]`` in q's dtype. Hq is a multiple of Hk: query heads share key heads in
            order; do not repeat keys.
        key_segments: Segment of each key, integer ``[B, S]`` or ``[M]``, below ``num_segments``. Keys with a negative
            segment are ignored and not read; padding needs one.
        num_segments: Number of segments G, at most 524,280. A GPU goes over the keys again for every eight.
        query_positions: Position of each query among the keys of its response, any integer, ``[B, T]`` or ``[N]``. A
            query sees the keys up to its position; with a negative one, none. It may lie behind the last key. Default:
            queries are the last T positions.
        cu_seqlens_q: Boundaries of packed queries, int32 or int64 ``[B + 1]``.
        cu_seqlens_k: Boundaries of packed keys, likewise.
        scale: Factor of the scores, within +-2**127, so that kernels hold it in float32; by default ``1 / sqrt(d)``.
        window: Number of positions that a query sees at most, with its own, as in sliding-window layers; ``None``: all.
        per_head: Return the masses of every head instead of their mean.

    Returns:
        Masses ``[B, T, G]``, packed ``[N, G]``, float32; with ``per_head`` ``[B, Hq, T, G]``, packed ``[Hq, N, G]``. A
        row sums to 1, or is zero where a query sees no key.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, boundaries or settings do not fit together.

    """
    q, k, boundaries = attention_checks.queries_and_keys(q, k, cu_seqlens_q, cu_seqlens_k)
    number = attention_checks.segment_count(num_segments)
    segments = attention_checks.key_segments(key_segments, k, number)
    positions = attention_checks.query_positions(query_positions, q, k, boundaries)
    by_head = checks.flag("per_head", per_head)
    dtype = checks.compute_dtype(q)
    mass, _, _ = registry.call(
        "attention_mass",
        q.device,
        dtype,
        q=q,
        k=k,
        key_segments=segments,
        query_positions=positions,
        cu_seqlens_q=boundaries[0],
        cu_seqlens_k=boundaries[1],
        num_segments=number,
        scale=attention_checks.attention_scale(scale, q.shape[-1]),
        window=attention_checks.window(window),
        per_head=by_head,
    )
    return mass.to(dtype)  # type: ignore[no-any-return]


@explained
def attention_heatmap(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor,
    *,
    query_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    per_head: bool = False,
) -> Tensor:
    """Causal softmax attention that each key receives, averaged over queries: a map of what the queries look at.

    The softmax is over all visible keys; ``key_mask`` chooses those to return, such as the image's. There is never an
    array of queries by keys. Differentiable in q and k (first derivatives), by recomputation. Rows that take no part
    may hold NaN, as in :func:`attention_mass`.

    Args:
        q: Queries ``[B, Hq, T, d]``, or packed ``[N, Hq, d]``; float32, bfloat16 or float16, after position embedding.
        k: Keys ``[B, Hk, S, d]`` or ``[M, Hk, d]`` in q's dtype, Hq a multiple of Hk.
        key_mask: True at keys to return, bool or 0 and 1, ``[B, S]`` or ``[M]``.
        query_mask: True at queries to average over, bool or 0 and 1, ``[B, T]`` or ``[N]``; by default all. A query
            that sees no key is left out.
        attention_mask: True at keys that are not padding (transformers' attention mask), bool or 0 and 1, in
            ``key_mask``'s shape; by default all. The other keys are not read.
        query_positions: As in :func:`attention_mass`, like the arguments that follow.
        cu_seqlens_q: Boundaries of packed queries, int32 or int64 ``[B + 1]``.
        cu_seqlens_k: Boundaries of packed keys, likewise.
        scale: Factor of the scores, within +-2**127; by default ``1 / sqrt(d)``.
        window: Number of positions that a query sees at most, with its own; ``None``: all.
        per_head: Return the maps of every head instead of their mean.

    Returns:
        Attention of each key ``[B, S]``, packed ``[M]``, float32; with ``per_head`` ``[B, Hq, S]``, packed ``[Hq, M]``.
        Zero off the masks, and in a response without a query to average.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices, boundaries or settings do not fit together.

    """
    q, k, boundaries = attention_checks.queries_and_keys(q, k, cu_seqlens_q, cu_seqlens_k)
    shown = checks.mask("key_mask", key_mask, attention_checks.token_shape(k), "one entry per key of k", q.device, "q")
    labels = torch.where(shown, SHOWN, SEEN).to(torch.int32)
    if attention_mask is not None:
        seen = checks.mask("attention_mask", attention_mask, shown.shape, "one entry per key of k", q.device, "q")
        labels = labels.masked_fill(~seen, IGNORED)
    positions = attention_checks.query_positions(query_positions, q, k, boundaries)
    if query_mask is not None:
        chosen = checks.mask(
            "query_mask", query_mask, attention_checks.token_shape(q), "one entry per query of q", q.device, "q"
        )
        if positions is None:
            positions = reference.default_positions(chosen.shape[-1], shown.shape[-1], *boundaries, q.device)
        # A query at a negative position sees nothing, so kernels skip it.
        positions = torch.where(chosen, positions, -1).contiguous()
    by_head = checks.flag("per_head", per_head)
    dtype = checks.compute_dtype(q)
    arguments = {
        "q": q,
        "k": k,
        "key_segments": labels,
        "query_positions": positions,
        "cu_seqlens_q": boundaries[0],
        "cu_seqlens_k": boundaries[1],
        "scale": attention_checks.attention_scale(scale, q.shape[-1]),
        "window": attention_checks.window(window),
    }
    _, _, lse = registry.call("attention_mass", q.device, dtype, **arguments, num_segments=LABELS, per_head=True)
    weights = _query_weights(lse, boundaries[0])
    heat = registry.call(
        "attention_heatmap", q.device, dtype, **arguments, query_weights=weights, lse=lse, per_head=by_head
    )
    return heat.to(dtype)  # type: ignore[no-any-return]


def _query_weights(lse: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """One over the number of queries of the response that see a key, ``[B, T]`` or ``[N]``; 0 for the others."""
    sees = lse.detach().select(-2, 0) != -torch.inf  # whether a query sees a key is the same in every head
    counted = sees.to(lse.dtype)
    if cu_seqlens_q is None:
        return counted / counted.sum(-1, keepdim=True).clamp(min=1)
    batch = cu_seqlens_q.shape[0] - 1
    response, _ = responses_of(sees.shape[0], batch, cu_seqlens_q, lse.device)
    count = counted.new_zeros(batch).index_add(0, response, counted)
    return counted / count.clamp(min=1)[response]


def _fake_mass(q: Tensor, num_segments: int, per_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    *batch, heads, queries = _by_head(q)
    by_head = q.new_empty((*batch, heads, queries, num_segments), dtype=torch.float32)
    lse = q.new_empty((*batch, heads, queries), dtype=torch.float32)
    if per_head:
        return by_head, lse.new_empty((0,)), lse
    return lse.new_empty((*batch, queries, num_segments)), by_head, lse


def _fake_heatmap(q: Tensor, k: Tensor, per_head: bool) -> Tensor:
    *batch, heads, _ = _by_head(q)
    keys = _by_head(k)[-1]
    return q.new_empty((*batch, heads, keys) if per_head else (*batch, keys), dtype=torch.float32)


def _fake_gradients(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _by_head(tensor: Tensor) -> tuple[int, ...]:
    """Shape of one number per head and token: ``[B, H, T]``, packed ``[H, N]``."""
    shape = tensor.shape[:-1]
    return tuple(shape) if tensor.dim() == 4 else tuple(reversed(shape))


def _save_mass(
    ctx: Any, output: tuple[Tensor, Tensor, Tensor], num_segments: int, per_head: bool, **arguments: Any
) -> None:
    mass, head_mass, lse = output
    registry.keep(ctx, **arguments, head_mass=mass if per_head else head_mass, lse=lse)
    ctx.averaged_heads = None if per_head else arguments["q"].shape[1]
    ctx.mark_non_differentiable(head_mass, lse)
    ctx.set_materialize_grads(False)


def _backward_mass(ctx: Any, needed: set[str], grad_mass: Tensor | None, *_: Tensor | None) -> dict[str, Tensor]:
    if grad_mass is None:
        return {}
    return _gradients("attention_mass_backward", ctx, grad_mass=_of_heads(grad_mass, ctx.averaged_heads, -3))


def _save_heatmap(ctx: Any, output: Tensor, per_head: bool, **arguments: Any) -> None:
    registry.keep(ctx, **arguments)
    ctx.averaged_heads = None if per_head else arguments["q"].shape[1]
    ctx.set_materialize_grads(False)


def _backward_heatmap(ctx: Any, needed: set[str], grad_heat: Tensor | None) -> dict[str, Tensor]:
    if grad_heat is None:
        return {}
    return _gradients("attention_heatmap_backward", ctx, grad_heat=_of_heads(grad_heat, ctx.averaged_heads, -2))


def _of_heads(grad: Tensor, averaged_heads: int | None, head_dim: int) -> Tensor:
    """Gradient w.r.t. the result of every head, from that w.r.t. their mean (``None``: from itself)."""
    if averaged_heads is not None:
        grad = (grad / averaged_heads).unsqueeze(head_dim)
        grad = grad.expand(*grad.shape[:head_dim], averaged_heads, *grad.shape[head_dim + 1 :])
    return grad.contiguous()


def _gradients(name: str, ctx: Any, **grad: Tensor) -> dict[str, Tensor]:
    """Gradients w.r.t. q and k, by the operator ``name`` of the gradient w.r.t. the result of every head."""
    arguments = registry.kept(ctx)
    q, k = arguments["q"], arguments["k"]
    grad_q, grad_k = registry.call(name, q.device, checks.compute_dtype(*grad.values()), **grad, **arguments)
    return {"q": grad_q.to(q.dtype), "k": grad_k.to(k.dtype)}


_KEYS = "Tensor q, Tensor k, Tensor key_segments, Tensor? query_positions"
_LAYOUT = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"

registry.define(
    reference.attention_mass,
    f"({_KEYS}, {_LAYOUT}, int num_segments, float scale, int window, bool per_head) "
    "-> (Tensor mass, Tensor head_mass, Tensor lse)",
    _fake_mass,
    setup_context=_save_mass,
    backward=_backward_mass,
)
registry.define(
    reference.attention_mass_backward,
    f"(Tensor grad_mass, {_KEYS}, {_LAYOUT}, Tensor head_mass, Tensor lse, float scale, int window) "
    "-> (Tensor grad_q, Tensor grad_k)",
    _fake_gradients,
)
registry.define(
    reference.attention_heatmap,
    f"({_KEYS}, Tensor query_weights, Tensor lse, {_LAYOUT}, float scale, int window, bool per_head) -> Tensor",
    _fake_heatmap,
    setup_context=_save_heatmap,
    backward=_backward_heatmap,
)
registry.define(
    reference.attention_heatmap_backward,
    f"(Tensor grad_heat, {_KEYS}, Tensor query_weights, Tensor lse, {_LAYOUT}, float scale, int window) "
    "-> (Tensor grad_q, Tensor grad_k)",
    _fake_gradients,
)

"""The arguments of a layer's attention in transformers: queries, keys, and which keys each query sees.

transformers passes an attention function a mask (dense, padding only, a block mask, or none) and whether it is causal.
Usually a query sees every key up to its own position, perhaps within a window, without padding; then the kernels
compute the shares without an array of queries by keys. Under any other mask (chunks, images seen in both directions,
blocks chosen by the data) the shares are computed from the mask itself, a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgpo_kernels import attention_checks
from vgpo_kernels.ops.attention_mass import attention_heatmap, attention_mass
from vgpo_kernels.ops.attention_shift import attention_shift, shifts_in_chunks
from vgpo_kernels.summaries import summary

CHUNK_BYTES = 64 * 2**20  # of scores that exist at a time where a mask has to be followed
# Arguments of attention functions that change the softmax itself: its shares are then no plain softmax of q k^T.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")
PACKED = "cu_seq_lens_q"


class AttentionCall(NamedTuple):
    """Queries and keys of one call of a layer's attention.

    Attributes:
        layer: Index of the layer in the decoder.
        q: Queries after position embedding, ``[B, Hq, T, d]``.
        k: Keys, including those of the cache, ``[B, Hk, S, d]``.
        query_positions: Index of the last key that each query sees, ``[B, T]``.
        first_query: Index of the first query's token in the sequence.
        first_key: Index of the first key's token: not 0 where a sliding-window cache has dropped keys.
        scale: Factor of the scores, or ``None`` for the usual one.
        window: Positions that a query of a sliding-window layer sees, else ``None``.
        kept: True at keys that the model's mask shows to any query, bool ``[B, S]``; ``None``: all.
        visible: Which keys each query sees, bool ``[B, 1, T, S]`` or ``[B, Hq, T, S]``; ``None`` where these are the
            keys of ``kept`` up to its position within the window.
        sequence: Number of the sequence in the block: passes that continue one cache share it.
        reordered: Whether beam search has exchanged rows of the cache, so that they are not those of earlier passes.

    """

    layer: int
    q: Tensor
    k: Tensor
    query_positions: Tensor
    first_query: int
    first_key: int
    scale: float | None
    window: int | None
    kept: Tensor | None = None
    visible: Tensor | None = None
    sequence: int = 0
    reordered: bool = False

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)

    def last(self, number: int) -> AttentionCall:
        """Return the call with its last queries only."""
        begin = max(self.q.shape[2] - number, 0)
        return self._replace(
            q=self.q[:, :, begin:],
            query_positions=self.query_positions[:, begin:],
            first_query=self.first_query + begin,
            visible=None if self.visible is None else self.visible[:, :, begin:],
        )

    def one_query_each(self) -> AttentionCall:
        """Return the queries of a single sequence as a batch of them, so that each gets a heat map of its own.

        Raises:
            ValueError: The batch holds several sequences.

        """
        if self.q.shape[0] != 1:
            raise ValueError(f"queries can be taken apart for one sequence, and the batch has {self.q.shape[0]}")
        number = self.q.shape[2]
        return self._replace(
            q=self.q[0].transpose(0, 1)[:, :, None],
            k=self.k.expand(number, -1, -1, -1),  # shared, not copied
            query_positions=self.query_positions[0][:, None],
            kept=None if self.kept is None else self.kept.expand(number, -1),
            visible=None if self.visible is None else self.visible[0].transpose(0, 1)[:, :, None],
        )

    def mass(self, key_segments: Tensor, *, num_segments: int = 3, per_head: bool = False) -> Tensor:
        """Return :func:`vgpo_kernels.attention_mass` of the call, under the mask that the model uses.

        Args:
            key_segments: Segment of each key, integer ``[B, S]``, below ``num_segments``; negative: ignored.
            num_segments: Number of segments.
            per_head: Return the masses of every head instead of their mean.

        """
        labels = key_segments if self.kept is None else key_segments.masked_fill(~self.kept, -1)
        if self.visible is None:
            return attention_mass(
                self.q, self.k, labels, num_segments=num_segments, per_head=per_head, **self._options()
            )
        labels = attention_checks.key_segments(labels, self.k, num_segments)
        members = torch.stack([labels == segment for segment in range(num_segments)], dim=-1).float()[:, None]
        by_head = torch.cat(self._reduced(labels >= 0, lambda weights: weights @ members), dim=2)
        return by_head if per_head else by_head.mean(1)

    def heatmap(self, key_mask: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Return :func:`vgpo_kernels.attention_heatmap` of the call, under the mask that the model uses.

        Args:
            key_mask: True at keys to return, bool ``[B, S]``.
            attention_mask: True at keys that take part at all, bool ``[B, S]``; by default all.

        """
        taken = torch.ones_like(key_mask) if attention_mask is None else attention_mask
        taken = taken if self.kept is None else taken & self.kept
        if self.visible is None:
            return attention_heatmap(self.q, self.k, key_mask, attention_mask=taken, **self._options())
        # Per query and summed over them: a query that sees no key counts for nothing.
        sums = torch.stack(self._reduced(taken, lambda weights: weights.mean(1).sum(1))).sum(0)
        number = (self.shown(slice(None)) & taken[:, None, None]).any(-1).any(1).sum(1, keepdim=True)
        return (sums / number.clamp(min=1)).masked_fill(~key_mask, 0)

    def shift(self, key_segments: Tensor, *, segment: int | Sequence[int] = 0, per_head: bool = False) -> Tensor:
        """Return :func:`vgpo_kernels.attention_shift` of the call, under the mask that the model uses.

        Args:
            key_segments: Segment of each key, integer ``[B, S]``; negative: ignored.
            segment: The segment to normalise over, or several that are taken as one.
            per_head: Return the distances of every head's own attention.

        """
        labels = key_segments if self.kept is None else key_segments.masked_fill(~self.kept, -1)
        if self.visible is None:
            return attention_shift(self.q, self.k, labels, segment=segment, per_head=per_head, **self._options())
        labels = attention_checks.key_segments(labels, self.k, attention_checks.MOST_SEGMENTS)
        chosen = torch.stack([labels == one for one in attention_checks.chosen_segments(segment)]).any(0)

        def part(rows: slice) -> tuple[Tensor, Tensor]:
            shown = self.shown(rows) & (labels >= 0)[:, None, None]
            logits = masked_scores(self.q[:, :, rows], self.k, shown, self.scale).log_softmax(-1)
            return logits, shown & chosen[:, None, None]

        with torch.no_grad():
            shape = (*self.q.shape[:3], self.k.shape[2])
            return shifts_in_chunks(shape, part, per_head, self.q.device, torch.float32)

    def shown(self, rows: slice | Tensor) -> Tensor:
        """Which keys chosen queries see, bool ``[B, 1, t, S]`` or ``[B, Hq, t, S]``: an array of queries by keys."""
        if self.visible is not None:
            return self.visible[:, :, rows]
        keys = torch.arange(self.k.shape[2], device=self.k.device)
        position = self.query_positions[:, None, rows, None]
        seen = keys <= position
        if self.window is not None:
            seen = seen & (keys > position - self.window)
        return seen if self.kept is None else seen & self.kept[:, None, None]

    def attended(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What chosen queries' attention yields of ``values`` ``[B, Hv, S, dv]``, and what even attention would.

        Returns:
            Both float32 ``[B, Hq, t, dv]``.

        """
        shown = self.shown(rows)
        weights = masked_softmax(self.q[:, :, rows], self.k, shown, self.scale)
        repeated = values.float().repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        even = shown.float() / shown.sum(-1, keepdim=True).clamp(min=1)
        return weights @ repeated, even @ repeated

    def _options(self) -> dict[str, Any]:
        return {"query_positions": self.query_positions, "scale": self.scale, "window": self.window}

    def _reduced(self, taken: Tensor, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Reduce attention weights ``[B, Hq, t, S]`` over the keys ``taken`` ``[B, S]``, a few queries at a time."""
        batch, heads, queries, _ = self.q.shape
        step = max(CHUNK_BYTES // (4 * batch * heads * self.k.shape[2]), 1)

        def part(q: Tensor, k: Tensor, shown: Tensor) -> Tensor:
            return reduce(masked_softmax(q, k, shown & taken[:, None, None], self.scale))

        chunks = [slice(begin, begin + step) for begin in range(0, queries, step)]
        arguments = [(self.q[:, :, rows], self.k, self.shown(rows)) for rows in chunks]
        if torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad):
            # So that the backward pass, too, holds the scores of one chunk.
            return [checkpoint(part, *chunk, use_reentrant=False) for chunk in arguments]
        return [part(*chunk) for chunk in arguments]


def masked_softmax(q: Tensor, k: Tensor, shown: Tensor, scale: float | None) -> Tensor:
    """Attention weights ``[B, Hq, t, S]``, float32, of queries over the keys they see; zero where they see none."""
    weights = masked_scores(q, k, shown, scale).softmax(-1)
    return weights.masked_fill(~shown, 0)  # a query that sees nothing has NaN there


def masked_scores(q: Tensor, k: Tensor, shown: Tensor, scale: float | None) -> Tensor:
    """Scores ``[B, Hq, t, S]``, float32, of queries and the keys they see; -inf for other keys."""
    batch, heads, queries, features = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, queries, features)
    factor = features**-0.5 if scale is None else scale
    scores = (grouped @ k.float()[:, :, None].transpose(-1, -2) * factor).reshape(batch, heads, queries, -1)
    return scores.masked_fill(~shown, -torch.inf)


def read_call(
    layer: int,
    q: Tensor,
    k: Tensor,
    mask: Any,
    first_query: int,
    options: Mapping[str, Any],
    *,
    causal: bool,
    masks: MaskReader,
) -> AttentionCall:
    """Return the call that the arguments of an attention function describe.

    Args:
        layer: Index of the layer.
        q: Queries ``[B, Hq, T, d]``.
        k: Keys ``[B, Hk, S, d]``.
        mask: The mask that the function was handed: dense, of padding ``[B, S]``, a block mask, or ``None``.
        first_query: Index of the first query's token in the sequence.
        options: The function's other arguments, by name.
        causal: Whether queries see only earlier keys where the mask does not say.
        masks: Reader of dense masks, which remembers those of the pass.

    Raises:
        ValueError: Attention does more than a softmax of scaled products, or the batch is packed.

    """
    unsupported = [name for name in UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        raise ValueError(f"attention with {', '.join(unsupported)} is no plain softmax: its masses cannot be captured")
    if options.get(PACKED) is not None:
        raise ValueError("a packed batch (flash attention without padding) cannot be captured; pad it")
    queries, keys = q.shape[2], k.shape[2]
    # A static cache has room behind the last token; a sliding one has dropped its first tokens.
    first_key = max(first_query + queries - keys, 0)
    positions = torch.arange(queries, device=q.device).add(first_query - first_key)
    if not causal and mask_is_padding(mask):
        positions = torch.full_like(positions, keys - 1)
    window = options.get("sliding_window")
    call = AttentionCall(
        layer, q, k, positions.expand(q.shape[0], -1), first_query, first_key, options.get("scaling"), window
    )
    if mask is None:
        return call
    if mask_is_padding(mask):
        kept = nn.functional.pad(mask[:, :keys].bool(), (0, max(keys - mask.shape[1], 0)))
        return call._replace(kept=kept.expand(q.shape[0], -1))
    kept, visible = masks.read(mask, call)
    return call._replace(kept=kept, visible=visible)


def mask_is_padding(mask: Any) -> bool:
    """Whether a mask says nothing of single queries."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)


class MaskReader:
    """Reads each dense mask once, since the layers of a pass share it."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, int | None, tuple[Tensor, Tensor | None]]] = []

    def forget(self) -> None:
        """Forget the masks of the pass that is over."""
        self._known.clear()

    def read(self, mask: Any, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Return ``kept`` and ``visible`` of an :class:`AttentionCall` whose queries see keys as ``mask`` says.

        Args:
            mask: Bool (True: seen), additive, or a block mask of flex attention; it broadcasts to ``[B, Hq, T, S]``.
            call: The call as it would be without the mask.

        Raises:
            ValueError: An additive mask adds something else than nothing and minus infinity.

        """
        for known, window, result in self._known:
            if known is mask and window == call.window:
                return result
        visible = dense_mask(mask, call)
        kept = visible.flatten(1, 2).any(1)
        plain = call._replace(kept=kept).shown(slice(None))
        result = (kept, None if torch.equal(visible, plain.expand_as(visible)) else visible)
        self._known.append((mask, call.window, result))
        return result


def dense_mask(mask: Any, call: AttentionCall) -> Tensor:
    """Return a mask as bool ``[B, 1, T, S]`` or ``[B, Hq, T, S]``: True where a query sees a key."""
    batch, _, queries, _ = call.q.shape
    keys = call.k.shape[2]
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, batch, 1, queries, keys, device=call.q.device.type)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ValueError(f"layer {call.layer} has a mask that cannot be read: {type(mask).__name__}")
    mask = mask[..., :keys]
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if (mask.masked_fill(hidden, 0) != 0).any():
            raise ValueError(f"the mask of layer {call.layer} adds a bias to scores: its masses cannot be captured")
        mask = ~hidden
    visible: Tensor = mask.expand(batch, -1, queries, -1)
    return visible

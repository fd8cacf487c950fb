"""What the attention of an unmodified transformers model looks at, while the model's own kernels do the work.

transformers finds the attention function of a layer by name. Inside the ``with`` block of a capture that name leads to
a function that hands queries and keys on to a consumer, and then calls what the name led to before (sdpa, flash
attention, eager): outputs, gradients and caches are the model's own. Training forwards, scoring passes and ``generate``
are captured alike::

    segments = attention_segments(inputs["input_ids"], model, inputs["attention_mask"])
    with capture_attention_mass(model, segments, layers=(-1,)) as captured:
        model.generate(**inputs)
    image_share = captured.masses[..., IMAGE]  # [B, layers, tokens]

A token's attention is that of the query at the token itself, which sees the token and everything before it. The last
token of ``generate`` is never a query. Bidirectional attention within an image (Gemma, PaliGemma) is read as causal,
which makes a difference for the image's own tokens only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.integrations.model_surface import final_norm, unwrap, visual_mask
from vgpo_kernels.ops.attention_mass import attention_mass

IGNORED, IMAGE, QUESTION, GENERATED = -1, 0, 1, 2
SEGMENT_NAMES = ("image", "question", "generated")

# Arguments of attention functions that change the softmax itself: its shares are then no plain softmax of q k^T.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
PACKED = "cu_seq_lens_q"


class AttentionCall(NamedTuple):
    """Queries and keys as a layer's attention is about to use them.

    Attributes:
        layer: Index of the layer.
        q: Queries after position embedding, ``[B, Hq, T, d]``.
        k: Keys, those of the cache included, ``[B, Hk, S, d]``.
        query_positions: Which of the keys each query sits at, ``[B, T]``.
        first_query: Index of the first query's token in the sequence.
        first_key: Index of the first key's token: not 0 where a sliding-window cache has dropped keys.
        scale: Factor of the scores, or ``None`` for the usual one.
        window: Positions that a query of a sliding-window layer sees, else ``None``.

    """

    layer: int
    q: Tensor
    k: Tensor
    query_positions: Tensor
    first_query: int
    first_key: int
    scale: float | None
    window: int | None

    def last(self, number: int) -> AttentionCall:
        """Return the call with its last queries only."""
        begin = max(self.q.shape[2] - number, 0)
        return self._replace(
            q=self.q[:, :, begin:],
            query_positions=self.query_positions[:, begin:],
            first_query=self.first_query + begin,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for ``attention_mass`` and ``attention_heatmap``."""
        return {"query_positions": self.query_positions, "scale": self.scale, "window": self.window}


@contextmanager
def capture_attention(
    model: nn.Module, consumer: Callable[[AttentionCall], None], *, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Hand queries and keys of chosen decoder layers to ``consumer`` during every forward pass in the block.

    Not seen are passes that a compiled graph replays without Python, and recomputation under gradient checkpointing.
    The registry of attention functions is process-wide: other models keep working inside the block, and are not
    captured.

    Args:
        model: A model of transformers, or one wrapped by DistributedDataParallel, FSDP, DeepSpeed, accelerate or PEFT.
        consumer: Called before each attention, in the order of layers. What it does counts for gradients.
        layers: Indices of decoder layers, negative ones counted from the last; by default all.

    Raises:
        TypeError: The model has no decoder layers whose attention transformers looks up by name.
        ValueError: A layer is out of range, attention does more than a softmax of scaled products, or the batch is
            packed.

    """
    from transformers import AttentionInterface

    checks.function("consumer", consumer)
    registry: Any = AttentionInterface
    decoder = _decoder(model)
    attentions = _attention_modules(decoder)
    chosen = {id(attentions[index]): index for index in resolve_layers(layers, len(attentions))}
    name = decoder.config._attn_implementation
    previous = registry().get(name)
    seen: list[int] = []  # tokens before the pass under way; empty outside of one

    def attend(module: nn.Module, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        if seen and id(module) in chosen:
            consumer(_call(chosen[id(module)], q, k, seen[-1], options))
        return (previous or _eager(module))(module, q, k, *rest, **options)

    def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache = options.get("past_key_values")
        seen.append(0 if cache is None else int(cache.get_seq_length()))

    def leave(*_: Any) -> None:
        seen.clear()

    hooks = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(leave, always_call=True),
    ]
    registry.register(name, attend)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if previous is not None:
            registry.register(name, previous)
        else:
            # Eager attention stands in no registry, but in each model's own module: nothing public takes a name out.
            registry._global_mapping.pop(name, None)


class CapturedMasses:
    """What :func:`capture_attention_mass` yields: attention shares of the tokens that were queries in its block.

    Attributes:
        layers: Indices of the captured layers, in the order of ``masses``.

    """

    def __init__(self, layers: tuple[int, ...], join_dim: int) -> None:
        self.layers = layers
        self._join_dim = join_dim
        self._passes: list[dict[int, list[tuple[int, Tensor]]]] = []

    def _add(self, layer: int, begins: bool, first_query: int, mass: Tensor) -> None:
        if not self._passes or (begins and self._passes[-1][layer]):
            self._passes.append({index: [] for index in self.layers})
        parts = self._passes[-1][layer]
        # Tokens that assisted generation took back come again.
        parts[:] = [(first, part) for first, part in parts if first < first_query]
        if parts and parts[-1][0] + parts[-1][1].shape[self._join_dim] > first_query:
            first, part = parts[-1]
            parts[-1] = (first, part.narrow(self._join_dim, 0, first_query - first))
        parts.append((first_query, mass))

    @property
    def passes(self) -> list[Tensor]:
        """Masses of every sequence of forward passes, each begun without a cache and continued on it."""
        return [self._joined(found) for found in self._passes]

    @property
    def masses(self) -> Tensor:
        """Masses ``[B, layers, T, segments]``, float32; ``[B, layers, Hq, T, segments]`` per head.

        T counts the prompt's tokens and those of later steps on its cache, or the last ones of each pass if the
        capture was told so.

        Raises:
            RuntimeError: No forward pass ran in the block, or several that began without a cache: see ``passes``.

        """
        if not self._passes:
            raise RuntimeError(
                "no attention of the model was called by name inside capture_attention_mass; compiled graphs skip that"
            )
        if len(self._passes) > 1:
            raise RuntimeError(
                f"{len(self._passes)} forward passes began inside capture_attention_mass, so `masses` is ambiguous; "
                "read `passes`"
            )
        return self._joined(self._passes[0])

    def _joined(self, found: dict[int, list[tuple[int, Tensor]]]) -> Tensor:
        return torch.stack(
            [torch.cat([part for _, part in found[layer]], dim=self._join_dim) for layer in self.layers], dim=1
        )


@contextmanager
def capture_attention_mass(
    model: nn.Module,
    segments: Tensor,
    *,
    layers: Sequence[int] | None = None,
    num_segments: int = 3,
    later_segment: int = GENERATED,
    last: int | None = None,
    per_head: bool = False,
    differentiable: bool = False,
) -> Iterator[CapturedMasses]:
    """Record :func:`vgpo_kernels.attention_mass` of chosen layers for every forward pass inside the ``with`` block.

    Args:
        model: As in :func:`capture_attention`.
        segments: Segment of each token, integer ``[B, S]``, negative for padding, as :func:`attention_segments` makes
            them. A batch that generation expands (several sequences a prompt) repeats each row.
        layers: Indices of decoder layers, negative ones counted from the last; by default all.
        num_segments: Number of segments.
        later_segment: Segment of tokens beyond ``segments``, which generation appends.
        last: Only the last so many queries of each pass, the response tokens of a training pass say; by default all.
        per_head: Keep the masses of every head.
        differentiable: Keep the graph, for losses on attention; by default masses are detached.

    Yields:
        The record; ``.masses`` is the tensor.

    Raises:
        TypeError: The model has no decoder layers whose attention transformers looks up by name.
        ValueError: A layer is out of range, attention does more than a softmax of scaled products, or the batch is no
            multiple of that of ``segments``.

    """
    chosen = tuple(resolve_layers(layers, len(_attention_modules(_decoder(model)))))
    if checks.integers("segments", segments).dim() != 2:
        raise ValueError(f"segments must have shape [B, S], got {checks.describe(segments)}")
    checks.positive_integer("num_segments", num_segments, checks.MOST_SEGMENTS)
    if last is not None:
        checks.positive_integer("last", last)
    if not isinstance(later_segment, int) or later_segment >= num_segments:
        raise ValueError(f"later_segment must be an integer below num_segments={num_segments}, got {later_segment!r}")
    checks.flag("per_head", per_head)
    checks.flag("differentiable", differentiable)
    captured = CapturedMasses(chosen, 2 if per_head else 1)

    def consume(call: AttentionCall) -> None:
        begins = call.first_query == 0
        if last is not None:
            call = call.last(last)
        labels = key_segments(segments, call, later_segment)
        with nullcontext() if differentiable else torch.no_grad():
            mass = attention_mass(call.q, call.k, labels, num_segments=num_segments, per_head=per_head, **call.options)
        captured._add(call.layer, begins, call.first_query, mass)

    with capture_attention(model, consume, layers=chosen):
        yield captured


def attention_segments(
    input_ids: Tensor,
    visual_tokens: Any,
    attention_mask: Tensor | None = None,
    response_mask: Tensor | None = None,
) -> Tensor:
    """Return the segment of each token: ``IMAGE``, ``QUESTION`` (any other text given), ``GENERATED``, ``IGNORED``.

    Args:
        input_ids: ``[B, S]``.
        visual_tokens: A model, a config, or the ids of image tokens, as for ``visual_mask``.
        attention_mask: 0 at padding, ``[B, S]``; by default nothing is padding.
        response_mask: True at tokens that the model sampled, ``[B, T]`` for the last T positions; by default none. A
            visual token that the model sampled itself stands for no image.

    Returns:
        int64 ``[B, S]``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, or as ``visual_mask``, where the ids are not given.

    """
    segments = torch.where(visual_mask(input_ids, visual_tokens), IMAGE, QUESTION)
    if segments.dim() != 2:
        raise ValueError(f"input_ids must have shape [B, S], got {checks.describe(input_ids)}")
    if response_mask is not None:
        answered, _ = checks.response_layout(response_mask, None, segments.device)
        checks.response_rows(answered, segments[..., None], "input_ids")
        begin = segments.shape[1] - answered.shape[1]
        segments[:, begin:] = segments[:, begin:].masked_fill(answered, GENERATED)
    if attention_mask is None:
        return segments
    kept = checks.mask("attention_mask", attention_mask, segments.shape, "input_ids'", segments.device, "input_ids")
    return segments.masked_fill(~kept, IGNORED)


def key_segments(segments: Tensor, call: AttentionCall, later_segment: int) -> Tensor:
    """Return the segments ``[B, S]`` of a call's keys, from those of the first tokens of the sequence."""
    batch, end = call.k.shape[0], call.first_key + call.k.shape[2]
    if segments.shape[0] == 0 or batch % segments.shape[0]:
        raise ValueError(
            f"segments has {segments.shape[0]} rows, and the model runs on a batch of {batch}: no multiple of them"
        )
    rows = segments.to(call.k.device).repeat_interleave(batch // segments.shape[0], dim=0)
    rows = nn.functional.pad(rows, (0, max(end - rows.shape[1], 0)), value=later_segment)
    return rows[:, call.first_key : end]


def resolve_layers(layers: Sequence[int] | None, number: int) -> list[int]:
    """Return indices of layers in their order, each once.

    Raises:
        TypeError: A layer is no integer.
        ValueError: None is left, or one is out of range.

    """
    if layers is not None and not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"layers must be integers, got {layers}")
    found = sorted({layer + number if layer < 0 else layer for layer in (range(number) if layers is None else layers)})
    if not found or found[0] < 0 or found[-1] >= number:
        raise ValueError(f"layers must lie in [-{number}, {number}) and not be empty, got {layers}")
    return found


def _decoder(model: nn.Module) -> Any:
    """Return the module that runs the decoder layers and then the final norm."""
    norm = final_norm(model)
    return next(module for module in unwrap(model).modules() if any(child is norm for child in module.children()))


def _attention_modules(decoder: Any) -> list[nn.Module]:
    """Return the attention of every layer, in order."""
    found = {
        module.layer_idx: module
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }
    if not found or not hasattr(decoder, "config"):
        raise TypeError(f"{type(decoder).__name__} has no attention layers that transformers numbers")
    return [found[index] for index in sorted(found)]


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention of a model, which stands beside its layers; a wrapper's class stands elsewhere."""
    modules = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    found: Iterator[Callable[..., Any] | None] = (
        getattr(beside, "eager_attention_forward", None) for beside in modules
    )
    return next(function for function in found if function is not None)


def _call(layer: int, q: Tensor, k: Tensor, seen: int, options: dict[str, Any]) -> AttentionCall:
    unsupported = [name for name in UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        raise ValueError(f"attention with {', '.join(unsupported)} is no plain softmax: its masses cannot be captured")
    if options.get(PACKED) is not None:
        raise ValueError("a packed batch (flash attention without padding) cannot be captured; pad it")
    queries, keys = q.shape[2], k.shape[2]
    # A static cache has room behind the last token; a sliding one has dropped its first tokens.
    first_key = max(seen + queries - keys, 0)
    positions = torch.arange(queries, device=q.device).add(seen - first_key).expand(q.shape[0], -1)
    return AttentionCall(layer, q, k, positions, seen, first_key, options.get("scaling"), options.get("sliding_window"))

"""Shows what an unmodified transformers model attends to, while the model's own attention kernels run.

A layer of transformers looks up its attention function by name. Inside the ``with`` block of a capture it gets a
function that calls the original one (sdpa, flash attention, its own eager attention) and also passes queries and keys
to a consumer. Outputs, gradients and caches do not change. This works in training passes, scoring passes and
``generate``::

    segments = attention_segments(inputs["input_ids"], model, inputs["attention_mask"])
    with capture_attention_mass(model, segments, layers=(-1,)) as captured:
        model.generate(**inputs)
    image_share = captured.masses[..., IMAGE]  # [B, layers, tokens]

A token's attention is that of the query at the token itself. The last token of ``generate`` is never a query. A query
sees the keys that the model's mask shows it: everything up to itself in most layers, a window, a chunk, or an image and
prompt in both directions (Gemma, PaliGemma). When a layer is first seen, a few of its queries are computed again to
check that its output is the softmax of ``q k^T`` under its mask. A layer that does something else raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vgpo_kernels import attention_checks, checks
from vgpo_kernels.integrations.attention_call import AttentionCall, MaskReader, read_call
from vgpo_kernels.integrations.attention_passes import Follower, Pass, looked_up_by, plain_function
from vgpo_kernels.model_surface import (
    decoder_of,
    sampled_positions,
    uses_prompt_learning,
    visual_mask,
)

IGNORED, IMAGE, QUESTION, GENERATED = -1, 0, 1, 2
SEGMENT_NAMES = ("image", "question", "generated")

VERIFIED_QUERIES = 4
# Largest difference by the largest value, in float32 (TF32 included) and in 16 bits.
VERIFIED_ERROR = {True: 1e-2, False: 4e-2}


@contextmanager
def capture_attention(
    model: nn.Module,
    consumer: Callable[[AttentionCall], None],
    *,
    layers: Sequence[int] | None = None,
    norm: str | nn.Module | None = None,
) -> Iterator[None]:
    """Pass queries and keys of chosen decoder layers to ``consumer`` during every forward pass in the block.

    Not captured: passes that a compiled graph replays without Python, and recomputation under gradient checkpointing.
    The look-up of attention functions is process-wide. Other models work normally inside the block and are not
    captured. Blocks may nest, overlap and run in several threads, each with its own model.

    Args:
        model: A model of transformers, or one wrapped by DistributedDataParallel, FSDP, DeepSpeed, accelerate or PEFT.
        consumer: Called after the attention of each layer, in the order of layers. It runs under autograd, as the pass
            does.
        layers: Indices of decoder layers; negative ones count from the last. Default: all layers that have attention.
        norm: The final norm, as for :func:`capture_hidden_states`; its decoder is the one that is captured.

    Raises:
        TypeError: The model has no decoder layers whose attention transformers looks up by name.
        UnknownSurfaceError: The decoder keeps its cache where this adapter does not find it.
        ValueError: A layer is out of range or has no attention, attention does anything else than a softmax of scaled
            products under its mask, a cache keeps other keys than the last ones, the batch is packed, or the model has
            virtual tokens (prompt and prefix tuning).

    """
    checks.function("consumer", consumer)
    if uses_prompt_learning(model):
        raise ValueError(
            "prompt and prefix tuning put tokens before those of input_ids: their attention is not captured"
        )
    _, decoder = decoder_of(model, norm)
    attentions = attention_modules(decoder)
    chosen = {id(attentions[index]): index for index in _chosen_layers(decoder, attentions, layers)}
    under_way: list[Pass] = []
    follower = Follower()
    masks = MaskReader()

    # The names of the arguments are those that layers pass them by.
    def attend(
        function: Callable[..., Any],
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        result = function(module, query, key, value, attention_mask, **options)
        if under_way and id(module) in chosen:
            layer, pass_ = chosen[id(module)], under_way[-1]
            if layer in pass_.reached:
                raise ValueError(f"layer {layer} of {pass_.decoder} attends twice in a pass: its shares are ambiguous")
            pass_.check_keys(layer, key)
            causal = name != "eager" and is_causal(module, options)
            first = pass_.tokens_before + pass_.tokens - query.shape[2]
            call = read_call(layer, query, key, attention_mask, first, options, causal=causal, masks=masks)
            call = call._replace(sequence=pass_.sequence, reordered=pass_.reordered)
            _verify(module, name, plain_function(function), call, value, attention_mask, options, result[0])
            pass_.reached.add(layer)
            consumer(call)
        return result

    def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        under_way.append(follower.begin(type(module).__name__, arguments, options))

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        reached = under_way.pop().reached if under_way else set()  # none where the pass could not begin
        missing = sorted(set(chosen.values()) - reached)
        under_way.clear()
        masks.forget()
        follower.end(output)
        if output is not None and missing:
            raise ValueError(
                f"layers {missing} of {type(module).__name__} did not call their attention by name: it is of another "
                "kind, skipped or compiled before; choose other layers"
            )

    hooks = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(leave, always_call=True),
    ]
    try:
        with looked_up_by(attend):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    told = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


# What was verified of a layer: the attention function, and the kind of call.
_VERIFIED: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()


def _verify(
    module: nn.Module,
    name: str,
    function: Callable[..., Any],
    call: AttentionCall,
    values: Tensor,
    mask: Any,
    options: Mapping[str, Any],
    output: Tensor,
) -> None:
    """Compare a layer's output with that of the attention its shares are taken of, once for each kind of call.

    Raises:
        ValueError: They differ.

    """
    batch, heads, queries, _ = call.q.shape
    keys, window = call.k.shape[2], call.window
    kind = (
        (function, queries == 1, keys.bit_length(), call.first_query > 0, call.first_key > 0),
        (window, window is not None and keys > window, call.kept is None, call.visible is None),
    )
    if torch.compiler.is_compiling():
        return
    checked = _VERIFIED.setdefault(module, set())
    if kind in checked:
        return
    with torch.no_grad():
        if options.get("dropout"):
            output = function(module, call.q, call.k, values, mask, **{**options, "dropout": 0.0})[0]
        chosen = min(queries, VERIFIED_QUERIES)
        rows = torch.linspace(0, queries - 1, chosen, dtype=torch.float32, device=call.q.device).long()
        expected, even = call.attended(values, rows)
        found = output.reshape(batch, queries, heads, -1).transpose(1, 2)[:, :, rows].float()
        # What the query of a padding token gets is up to the kernel.
        real = call.shown(rows).any(-1).any(1)
        if call.kept is not None:
            real &= call.kept[:, rows + call.first_query - call.first_key]
        # Neither does a query that comes to no number.
        real = real[:, None, :, None] & expected.isfinite()
        difference = (found - expected).masked_fill(~real, 0).abs().max()
        limit = VERIFIED_ERROR[call.q.dtype == torch.float32] * values.nan_to_num(0, 0, 0).abs().max().float()
        # Attention that is spread evenly says nothing of its scores, so a later call is looked at again.
        told = (expected - even).masked_fill(~real, 0).abs().max() > limit or queries == 1
    if not difference <= limit:
        raise ValueError(
            f"the attention of layer {call.layer} ({type(module).__name__}, {name}) is no softmax of q k^T under the "
            f"mask it was given: outputs differ by {difference:.1e} (values up to {values.abs().max():.1e}), so that "
            "its shares cannot be captured"
        )
    if told:
        checked.add(kind)


class CapturedMasses:
    """What :func:`capture_attention_mass` yields: attention shares of the tokens that were queries in its block.

    Attributes:
        layers: Indices of the captured layers, in the order of ``masses``.

    """

    def __init__(self, layers: tuple[int, ...], per_head: bool) -> None:
        self.layers = layers
        self._token_dim = 3 if per_head else 2
        self._recorded: list[_PassMasses] = []

    def _add(self, call: AttentionCall, mass: Tensor) -> None:
        if not self._recorded or call.layer in self._recorded[-1].by_layer or call.layer == self.layers[0]:
            self._recorded.append(_PassMasses(call.sequence, call.reordered, call.first_query, {}))
        self._recorded[-1].by_layer[call.layer] = mass

    def _complete(self) -> list[_PassMasses]:
        """The passes that ended; another was broken off by an error."""
        return [found for found in self._recorded if len(found.by_layer) == len(self.layers)]

    def _stacked(self, found: _PassMasses) -> Tensor:
        masses = [found.by_layer[layer] for layer in self.layers]
        if len({mass.shape for mass in masses}) > 1:
            raise RuntimeError(
                f"layers {list(self.layers)} have different numbers of queries or heads: "
                f"{[list(mass.shape) for mass in masses]}; capture those that are alike"
            )
        return torch.stack(masses, dim=1)

    @property
    def passes(self) -> list[Tensor]:
        """Masses of every forward pass in order, shaped like ``masses``: in ``generate`` one of each step.

        Raises:
            RuntimeError: Layers differ in their numbers of queries (layers that share keys) or, per head, of heads.

        """
        return [self._stacked(found) for found in self._complete()]

    @property
    def sequences(self) -> list[Tensor]:
        """Masses of every sequence of tokens: a pass without tokens before it, and those that went on with its cache.

        Raises:
            RuntimeError: As ``passes``, or beam search exchanged rows between passes.

        """
        sequences: dict[int, list[tuple[int, Tensor]]] = {}
        for found in self._complete():
            if found.reordered:
                raise RuntimeError("beam search exchanged rows between passes, so they cannot be joined; read `passes`")
            # Tokens that assisted generation took back come again.
            before = sequences.get(found.sequence, [])
            parts = [(first, part) for first, part in before if first < found.first_query]
            if parts:
                first, part = parts[-1]
                kept = min(part.shape[self._token_dim], found.first_query - first)
                parts[-1] = (first, part.narrow(self._token_dim, 0, kept))
            sequences[found.sequence] = [*parts, (found.first_query, self._stacked(found))]
        return [torch.cat([part for _, part in parts], dim=self._token_dim) for parts in sequences.values()]

    @property
    def masses(self) -> Tensor:
        """Masses ``[B, layers, T, segments]``, float32; ``[B, layers, Hq, T, segments]`` per head.

        T counts the prompt's tokens and those of later steps on its cache, or the last ones of each pass if the
        capture was told so.

        Raises:
            RuntimeError: No forward pass ran in the block, or several that began without a cache; or as ``sequences``.

        """
        sequences = self.sequences
        if not sequences:
            raise RuntimeError(
                "no attention of the model was called by name inside capture_attention_mass; compiled graphs skip that"
            )
        if len(sequences) > 1:
            raise RuntimeError(
                f"{len(sequences)} forward passes began inside capture_attention_mass, so `masses` is ambiguous; "
                "read `sequences`, or `passes`"
            )
        return sequences[0]


class _PassMasses(NamedTuple):
    """The masses of one forward pass, by layer."""

    sequence: int
    reordered: bool
    first_query: int
    by_layer: dict[int, Tensor]


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
    norm: str | nn.Module | None = None,
) -> Iterator[CapturedMasses]:
    """Record :func:`vgpo_kernels.attention_mass` of chosen layers for every forward pass inside the ``with`` block.

    Args:
        model: As in :func:`capture_attention`.
        segments: Segment of each token, integer ``[B, S]``, negative for padding, as :func:`attention_segments` makes
            them. A batch that generation expands (several sequences a prompt) repeats each row.
        layers: As in :func:`capture_attention`.
        num_segments: Number of segments.
        later_segment: Segment of tokens beyond ``segments``, which generation appends.
        last: Only the last so many queries of each pass, the response tokens of a training pass say; by default all.
        per_head: Keep the masses of every head.
        differentiable: Keep the graph, for losses on attention; by default masses are detached. Not under gradient
            checkpointing.
        norm: As in :func:`capture_attention`.

    Yields:
        The record; ``.masses`` is the tensor.

    Raises:
        TypeError: As in :func:`capture_attention`.
        UnknownSurfaceError: Likewise.
        ValueError: Likewise, or the batch is no multiple of that of ``segments``.

    """
    _, decoder = decoder_of(model, norm)
    chosen = tuple(_chosen_layers(decoder, attention_modules(decoder), layers))
    if checks.integers("segments", segments).dim() != 2:
        raise ValueError(f"segments must have shape [B, S], got {checks.describe(segments)}")
    attention_checks.segment_count(num_segments)
    if last is not None:
        checks.positive_integer("last", last)
    if not isinstance(later_segment, int) or later_segment >= num_segments:
        raise ValueError(f"later_segment must be an integer below num_segments={num_segments}, got {later_segment!r}")
    checks.flag("per_head", per_head)
    checks.flag("differentiable", differentiable)
    captured = CapturedMasses(chosen, per_head)

    def consume(call: AttentionCall) -> None:
        begins = call.layer == chosen[0]
        if differentiable and (not torch.is_grad_enabled() or (begins and _is_checkpointed(decoder))):
            raise ValueError(
                "differentiable=True where no graph is kept: under no_grad, or under gradient checkpointing"
            )
        if last is not None:
            call = call.last(last)
        labels = key_segments(segments, call, later_segment)
        with nullcontext() if differentiable else torch.no_grad():
            mass = call.mass(labels, num_segments=num_segments, per_head=per_head)
        captured._add(call, mass)

    with capture_attention(model, consume, layers=chosen, norm=norm):
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
        segments = segments.masked_fill(sampled_positions(input_ids, response_mask), GENERATED)
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


def resolve_layers(layers: Sequence[int], number: int) -> list[int]:
    """Return indices of layers in their order, each once.

    Raises:
        TypeError: They are no sequence, or a layer is no integer.
        ValueError: None is left, or one is out of range.

    """
    given: Any = layers
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"layers must be a sequence of integers, (-1,) say, got {layers!r}")
    if not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"layers must be integers, got {layers}")
    found = sorted({layer + number if layer < 0 else layer for layer in layers})
    if not found or found[0] < 0 or found[-1] >= number:
        raise ValueError(f"layers must lie in [-{number}, {number}) and not be empty, got {layers}")
    return found


def attention_modules(decoder: Any) -> dict[int, nn.Module]:
    """Return the self-attention of every layer that has one, by the layer's index.

    Raises:
        TypeError: There is none, or a layer has several.

    """
    kinds = getattr(getattr(decoder, "config", None), "layer_types", None) or ()
    found: dict[int, nn.Module] = {}
    for name, module in decoder.named_modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index < 0 or "Attention" not in type(module).__name__:
            continue
        names = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if "cross" in names or "encoder_attn" in names or getattr(module, "is_cross_attention", False):
            continue
        if type(module).__name__.endswith("Layer"):  # a layer that is called by its kind of attention
            continue
        if "linear" in "".join(kinds[index : index + 1]):
            continue
        if index in found:
            raise TypeError(
                f"layer {index} of {type(decoder).__name__} has several attentions: {type(found[index]).__name__} and "
                f"{type(module).__name__}"
            )
        found[index] = module
    if not found or not hasattr(decoder, "config"):
        raise TypeError(f"{type(decoder).__name__} has no attention layers that transformers numbers")
    return dict(sorted(found.items()))


def _is_checkpointed(decoder: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass, where they are not captured again: torch misses that."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in decoder.modules())


def _chosen_layers(decoder: Any, attentions: Mapping[int, nn.Module], layers: Sequence[int] | None) -> list[int]:
    """Return the indices of the layers to capture.

    Raises:
        TypeError: A layer is no integer.
        ValueError: One is out of range or has no attention, or none is left.

    """
    if layers is None:
        return list(attentions)
    chosen = resolve_layers(layers, max(getattr(decoder.config, "num_hidden_layers", 0), max(attentions) + 1))
    without = [layer for layer in chosen if layer not in attentions]
    if without:
        raise ValueError(
            f"layers {without} of {type(decoder).__name__} have no attention that transformers numbers; these have: "
            f"{', '.join(map(str, attentions))}"
        )
    return chosen

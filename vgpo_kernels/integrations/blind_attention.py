"""A pass of an unmodified model in which text does not see the images, and one without the vision tower.

The second view that costs least: image features stay in the sequence and no query of text attends to them::

    images = visual_mask(inputs["input_ids"], model)
    with reuse_vision_tower(model):
        logits = model(**inputs).logits
        with blind_attention(model, images):
            blind = model(**inputs).logits  # the decoder only
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.integrations.attention_capture import attention_modules, is_causal
from vgpo_kernels.integrations.attention_passes import Follower, Pass, looked_up_by
from vgpo_kernels.model_surface import decoder_of, unwrap, uses_prompt_learning

# Attention functions of transformers that add or apply a mask of queries by keys.
MASKED = ("sdpa", "eager")
# Options of a whole pass that reach the call for image features and do not change them.
NOT_OF_FEATURES = ("num_items_in_batch", "output_attentions", "output_hidden_states", "use_cache")


@dataclass
class _BlindPass:
    """A forward pass of the decoder in a block: its tokens, and the masks made for its layers."""

    tokens: Pass
    masks: list[tuple[Any, tuple[Any, ...], Tensor]] = field(default_factory=list)


@contextmanager
def blind_attention(model: nn.Module, visual_mask: Tensor, *, norm: str | nn.Module | None = None) -> Iterator[None]:
    """Hide image tokens from all other tokens, in every layer of every forward pass inside the ``with`` block.

    Nothing that a text token computes depends on the images then. Positions stay as they are, and image tokens see what
    they saw. The block may be left before the backward pass: gradients are those of the blind pass, under gradient
    checkpointing too. ``generate`` works as well; tokens beyond ``visual_mask`` are text.

    Args:
        model: As in :func:`capture_attention`; with SDPA or eager attention.
        visual_mask: True at image tokens, bool or 0 and 1 ``[B, S]``, as :func:`visual_mask` makes it. A batch that
            generation expands (several sequences a prompt) repeats each row.
        norm: As in :func:`capture_attention`.

    Raises:
        TypeError: ``visual_mask`` is no mask, or the model has no decoder layers whose attention transformers looks up
            by name.
        ValueError: Something in the decoder carries images to text in another way than by keys (recurrent and
            convolutional layers, indexers that choose keys, cross-attention), or an attention function takes no mask
            (flash and flex attention); the batch is no multiple of that of ``visual_mask``; ``visual_mask`` has another
            number of dimensions; or the model has virtual tokens.

    """
    if uses_prompt_learning(model):
        raise ValueError(
            "prompt and prefix tuning put tokens before those of input_ids: visual_mask has no place there"
        )
    if checks.require_tensor("visual_mask", visual_mask).dim() != 2:
        raise ValueError(f"visual_mask must have shape [B, S], got {checks.describe(visual_mask)}")
    mask = checks.mask("visual_mask", visual_mask, visual_mask.shape, "its own", visual_mask.device, "itself")
    _, decoder = decoder_of(model, norm)
    found = attention_modules(decoder)
    _refuse_other_ways(decoder, found)
    attentions = {id(module): index for index, module in found.items()}
    under_way: list[_BlindPass] = []
    follower = Follower()

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
        if under_way and id(module) in attentions:
            layer, pass_ = attentions[id(module)], under_way[-1]
            pass_.tokens.reached.add(layer)
            pass_.tokens.check_keys(layer, key)
            if name not in MASKED:
                raise ValueError(f"layer {layer} attends by {name}, which takes no mask of queries by keys: use sdpa")
            causal = name == "sdpa" and is_causal(module, options)
            attention_mask = _blind_mask(pass_, mask, layer, name, query, key, attention_mask, causal)
        return function(module, query, key, value, attention_mask, **options)

    def enter(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        under_way.append(_BlindPass(follower.begin(type(module).__name__, arguments, options)))

    def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        reached = under_way.pop().tokens.reached if under_way else set()  # none where the pass could not begin
        missing = sorted(set(attentions.values()) - reached)
        follower.end(output)
        if output is not None and missing:
            raise ValueError(
                f"layers {missing} of {type(module).__name__} did not call their attention by name, so that images "
                "cannot be hidden from them: they are skipped or compiled before"
            )

    def recomputed(plain: Callable[..., Any]) -> Callable[..., Any]:
        """Let gradient checkpointing compute a layer again as it was, which is after the block."""

        def checkpoint(layer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            if not under_way:
                return plain(layer, *arguments, **options)
            pass_ = under_way[-1]

            def blind(*again: Any, **named: Any) -> Any:
                if under_way and under_way[-1] is pass_:
                    return layer(*again, **named)
                under_way.append(pass_)
                try:
                    with looked_up_by(attend):
                        return layer(*again, **named)
                finally:
                    under_way.pop()

            return plain(blind, *arguments, **options)

        return checkpoint

    hooks = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(leave, always_call=True),
    ]
    checkpointed = [(one, one._gradient_checkpointing_func) for one in decoder.modules() if _is_checkpointed(one)]
    for module, plain in checkpointed:
        module._gradient_checkpointing_func = recomputed(plain)
    try:
        with looked_up_by(attend):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, plain in checkpointed:
            module._gradient_checkpointing_func = plain


def _is_checkpointed(module: Any) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False)) and hasattr(module, "_gradient_checkpointing_func")


# Parts of a decoder's layers that carry images to text in another way than by the keys of attention.
OTHER_WAYS = {
    "Indexer": "choose keys by what they hold, images among them",
    "Conv": "mix neighbouring tokens by convolution, and images with them",
    "CrossAttention": "read images by cross-attention",
    "CheckpointWrapper": "are wrapped for checkpointing by torch, which computes them again with images",
}
INSTEAD = '; spoilt_view(inputs, "none", model) takes the images out'


def _refuse_other_ways(decoder: Any, attentions: Mapping[int, nn.Module]) -> None:
    """Raise ValueError where a decoder can carry images to text in another way than by the keys of its attention."""
    kind, of = type(decoder).__name__, {id(module) for module in attentions.values()}
    others = sorted(set(range(getattr(decoder.config, "num_hidden_layers", 0))) - set(attentions))
    if others:
        raise ValueError(f"layers {others} of {kind} mix tokens without attention, and images with them{INSTEAD}")
    # "layers.0.self_attn" is of the layers in "layers": a vision tower may be part of the decoder, too.
    stacks = {re.split(r"\.\d+\.", name)[0] for name, module in decoder.named_modules() if id(module) in of}
    for name, module in decoder.named_modules():
        for part, how in OTHER_WAYS.items():
            if part in type(module).__name__ and any(name.startswith(f"{stack}.") for stack in stacks):
                raise ValueError(f"layers of {kind} {how} ({type(module).__name__}){INSTEAD}")


def _blind_mask(
    pass_: _BlindPass, visual: Tensor, layer: int, name: str, query: Tensor, key: Tensor, given: Any, causal: bool
) -> Tensor:
    """Return the mask of a layer's attention without images: bool for SDPA, additive for eager attention."""
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    kind = (name, queries, keys, causal, query.dtype, query.device)
    for known, of, mask in pass_.masks:
        if known is given and of == kind:
            return mask
    first = pass_.tokens.tokens_before + pass_.tokens.tokens - queries
    first_key = max(first + queries - keys, 0)
    if visual.shape[0] == 0 or batch % visual.shape[0]:
        raise ValueError(
            f"visual_mask has {visual.shape[0]} rows, and the model runs on a batch of {batch}: no multiple of them"
        )
    rows = visual.to(query.device).repeat_interleave(batch // visual.shape[0], dim=0)
    rows = nn.functional.pad(rows, (0, max(first_key + keys - rows.shape[1], 0)))
    of_keys = rows[:, None, None, first_key : first_key + keys]
    of_queries = rows[:, None, first : first + queries, None]
    own = (
        torch.arange(queries, device=query.device)[:, None] + first
        == torch.arange(keys, device=query.device) + first_key
    )
    hidden = of_keys & ~of_queries
    if given is None:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        if causal and queries > 1:
            seen = seen.tril()  # as SDPA's is_causal, whose first query sees the first key
        given_seen = seen[None, None]
    elif isinstance(given, Tensor) and given.dim() == 4:
        given_seen = given[..., :keys]
    else:
        raise ValueError(f"layer {layer} has a mask that cannot be read: {type(given).__name__}")
    if given_seen.dtype == torch.bool:
        visible = given_seen & ~hidden
        # A token that saw images alone sees itself: a softmax of nothing would be no number.
        lost = given_seen.any(-1, keepdim=True) & ~visible.any(-1, keepdim=True)
        mask = visible | (lost & own)
    else:
        lowest = torch.finfo(given_seen.dtype).min
        mask = given_seen.masked_fill(hidden, lowest)
        lost = (given_seen > lowest).any(-1, keepdim=True) & ~(mask > lowest).any(-1, keepdim=True)
        mask = mask.masked_fill(lost & own, 0.0)
    if name == "eager" and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    pass_.masks.append((given, kind, mask))
    return mask


@dataclass
class _Remembered:
    """Image features of one call: what it was called with, in which mode, and what came out."""

    arguments: list[tuple[str, Any, int]]
    state: tuple[Any, ...]
    graph: bool
    output: Any


@contextmanager
def reuse_vision_tower(model: nn.Module) -> Iterator[None]:
    """Run the vision tower once for the same images inside the ``with`` block.

    A later pass with equal images takes the features of an earlier one. They carry its graph: losses of both passes
    give the tower the sum of their gradients, in one backward pass (``(first + second).backward()``). Features that
    were computed without a graph are computed again in a pass that needs one, and all are after the weights have
    changed. The features of all passes in the block are kept until it ends.

    Args:
        model: A model of transformers, wrapped or not, whose forward pass calls its ``get_image_features``.

    Raises:
        TypeError: The model has no ``get_image_features``.

    """
    inner = unwrap(model)
    parts = inner.modules() if isinstance(inner, nn.Module) else ()
    owners: list[Any] = [one for one in parts if callable(getattr(one, "get_image_features", None))]
    if not owners:
        raise TypeError(f"{type(inner).__name__} has no get_image_features: its vision tower cannot be reused")
    for owner in owners:
        owner.get_image_features = _remembering(owner, owner.get_image_features)
    try:
        yield
    finally:
        for owner in owners:
            del owner.get_image_features


def _remembering(owner: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    remembered: list[_Remembered] = []
    trained = _trained_besides_layers(owner)

    def get_image_features(*arguments: Any, **options: Any) -> Any:
        named = [(name, value) for name, value in sorted(options.items()) if name not in NOT_OF_FEATURES]
        given = [(str(place), value) for place, value in enumerate(arguments)] + named
        pixels = next((value for _, value in given if isinstance(value, Tensor)), None)
        device = "cpu" if pixels is None else pixels.device.type
        state = (
            owner.training,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            [_version(parameter) for parameter in owner.parameters()],
        )
        needs = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in trained)
        for known in remembered:
            if known.state == state and (known.graph or not needs) and _same_arguments(known.arguments, given):
                return copy(known.output)
        output = plain(*arguments, **options)
        kept = [(name, value, _version(value)) for name, value in given]
        remembered.append(_Remembered(kept, state, torch.is_grad_enabled(), copy(output)))
        return output

    return get_image_features


def _trained_besides_layers(owner: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the decoder's layers: those that image features may depend on."""
    _, decoder = decoder_of(owner)
    layers = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    own = {id(parameter) for stack in layers for parameter in stack.parameters()}
    return [parameter for parameter in owner.parameters() if id(parameter) not in own]


def _version(value: Any) -> int:
    """Return how often a tensor was written to; inference tensors do not count that."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _same_arguments(known: Sequence[tuple[str, Any, int]], given: Sequence[tuple[str, Any]]) -> bool:
    if [name for name, _, _ in known] != [name for name, _ in given]:
        return False
    return all(_same(old, version, new) for (_, old, version), (_, new) in zip(known, given, strict=True))


def _same(old: Any, version: int, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if _version(old) != version:
            return False
        alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
        return old is new or (alike and old.requires_grad == new.requires_grad and torch.equal(old, new))
    if isinstance(old, (list, tuple)) and type(old) is type(new) and len(old) == len(new):
        return all(_same(one, _version(one), other) for one, other in zip(old, new, strict=True))
    if isinstance(old, (Mapping, Tensor)) or isinstance(new, Tensor):
        return old is new
    return bool(old == new)

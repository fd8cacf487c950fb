"""Last hidden states and visual tokens of a vision-language model as transformers builds it.

The hidden states that VGPO scores are the decoder's after its final norm. ``output_hidden_states=True`` would keep
those of every layer; a hook on the final norm keeps exactly one tensor, and it is the one that the LM head reads, so
it costs no memory beyond a reference::

    with capture_hidden_states(model) as captured:
        logits = model(**inputs).logits
    cos = visual_focus(captured.hidden, visual_mask(inputs["input_ids"], model), response_mask)

Nothing here imports transformers: a model is known by its surface (``get_decoder()``, a final norm, ``config``), which
LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and most other decoders share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A decoder's attribute for its final norm, by family: Llama, Qwen and Gemma; Phi and StableLM; GPT-2; OPT; Mamba.
NORM_NAMES = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")

# LLaVA called its id an index; transformers keeps both names for some models.
VISUAL_TOKEN_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class CapturedHiddenStates:
    """What :func:`capture_hidden_states` yields: the last hidden states of the forward passes inside its block."""

    def __init__(self) -> None:
        self._passes: list[Tensor] = []

    @property
    def passes(self) -> list[Tensor]:
        """Hidden states of every forward pass so far, in order, each ``[B, S, D]`` and detached."""
        return list(self._passes)

    @property
    def hidden(self) -> Tensor:
        """Hidden states ``[B, S, D]`` of the one forward pass, detached, in the dtype the model computed them in.

        Raises:
            RuntimeError: No forward pass reached the final norm, or more than one did.

        """
        if not self._passes:
            raise RuntimeError(
                "no forward pass reached the final norm inside capture_hidden_states; one that torch.compile compiled "
                "outside the block skips its hook"
            )
        if len(self._passes) > 1:
            raise RuntimeError(
                f"{len(self._passes)} forward passes ran inside capture_hidden_states, so `hidden` is ambiguous; "
                "read `passes`, or hand over a consumer that reduces each pass as it comes"
            )
        return self._passes[0]


@contextmanager
def capture_hidden_states(
    model: nn.Module, consumer: Callable[[Tensor], None] | None = None
) -> Iterator[CapturedHiddenStates]:
    """Capture the hidden states after the final norm of every forward pass inside the ``with`` block.

    Gradients are untouched: what is captured is detached. Recomputation under gradient checkpointing happens outside
    the block (in the backward pass), and outside the final norm, so nothing is captured twice.

    Args:
        model: A model of transformers, or one wrapped by DistributedDataParallel, FSDP, DeepSpeed, torch.compile,
            accelerate or PEFT.
        consumer: Called with each pass's hidden states ``[B, S, D]`` as they are computed. Then nothing is kept, so
            a batch scored in slices needs the memory of one slice.

    Yields:
        The captured states; ``.hidden`` is the tensor of the one pass.

    Raises:
        TypeError: No final norm was found.

    """
    captured = CapturedHiddenStates()

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        hidden = _local(output.detach())
        if consumer is None:
            captured._passes.append(hidden)
        else:
            consumer(hidden)

    handle = final_norm(model).register_forward_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm after the last decoder layer.

    Raises:
        TypeError: The model has no decoder with one of the names in ``NORM_NAMES``.

    """
    inner = unwrap(model)
    decoder = inner
    while True:
        for name in NORM_NAMES:
            norm = getattr(decoder, name, None)
            if isinstance(norm, nn.Module):
                return norm
        get_decoder: Any = getattr(decoder, "get_decoder", None)
        below = get_decoder() if callable(get_decoder) else None
        if below is None or below is decoder:
            below = getattr(decoder, "model", None)
        if not isinstance(below, nn.Module):
            raise TypeError(
                f"found no final norm in {type(inner).__name__}: looked for {', '.join(NORM_NAMES)} in "
                f"{type(decoder).__name__}, its decoder"
            )
        decoder = below


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)):  # PEFT
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, FSDP, DeepSpeed
            model = model.module  # type: ignore[assignment]
        else:
            return model


def visual_token_ids(model_or_config: Any) -> tuple[int, ...]:
    """Return the ids that stand for image and video features in ``input_ids``, from the model's config.

    Args:
        model_or_config: A model, wrapped or not, or its config.

    Raises:
        ValueError: The config names no such token, as a text-only model's, or its image features enter by
            cross-attention, so that no position of the sequence holds one.

    """
    config = model_or_config
    if isinstance(model_or_config, nn.Module):
        config = getattr(unwrap(model_or_config), "config", None)
    kind = getattr(config, "model_type", type(config).__name__)
    if kind == "mllama":
        raise ValueError(
            "mllama reads its images by cross-attention: no position of its sequence holds an image feature, so there "
            "is no image prototype to compare responses with"
        )
    found = [getattr(config, name, None) for name in VISUAL_TOKEN_NAMES]
    ids = tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
    if not ids:
        raise ValueError(
            f"the config of {kind} has none of {', '.join(VISUAL_TOKEN_NAMES)}: not a vision-language model, or one "
            "whose visual tokens have to be passed by id"
        )
    return ids


def visual_mask(input_ids: Tensor, visual_tokens: Any) -> Tensor:
    """Return True where ``input_ids`` holds an image or video token: any number of images, in any places.

    Args:
        input_ids: Integers of any shape, ``[B, S]`` or packed ``[N]``.
        visual_tokens: A model, a config, or the ids themselves.

    Returns:
        Bool of the shape of ``input_ids``.

    """
    ids = visual_tokens if isinstance(visual_tokens, (tuple, list)) else visual_token_ids(visual_tokens)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in ids:  # one or two; torch.isin would copy the ids to the device
        mask |= input_ids == token
    return mask


def _local(hidden: Tensor) -> Tensor:
    """Gather hidden states that tensor parallelism left sharded."""
    return hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden

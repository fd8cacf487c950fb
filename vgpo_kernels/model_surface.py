"""Finds the parts of a transformers model: its final norm, its decoder, the ids of its visual tokens.

Nothing here imports transformers. The parts are found by attributes (``get_decoder()``, a final norm, ``config``) that
LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and most other decoders share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.config import is_number

# A decoder's attribute for its final norm, by family: Llama, Qwen and Gemma; Phi and StableLM; GPT-2; OPT; Mamba; LFM2;
# Qwen4, whose last module averages several streams.
NORM_NAMES = (
    "norm",
    "final_layernorm",
    "ln_f",
    "final_layer_norm",
    "norm_f",
    "embedding_norm",
    "hyper_connection_mixer",
)

# LLaVA called its id an index; transformers keeps both names for some models.
VISUAL_TOKEN_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def final_norm(model: nn.Module, norm: str | nn.Module | None = None) -> nn.Module:
    """Return the norm after the last decoder layer.

    Args:
        model: A model of transformers, wrapped or not.
        norm: The norm, or its name in the unwrapped model (``"model.text.ln_out"``), where it is known; by default it
            is looked for in the decoder, under ``NORM_NAMES``.

    Raises:
        TypeError: The model has no decoder with one of the names in ``NORM_NAMES``, or ``norm`` is of another type.
        ValueError: The model has no module ``norm``.

    """
    inner = unwrap(model)
    if norm is not None:
        return _named_norm(inner, norm)
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


def decoder_of(model: nn.Module, norm: str | nn.Module | None = None) -> tuple[str, Any]:
    """Return the module that runs the decoder layers and the final norm: its name in the unwrapped model, and itself.

    Args:
        model: A model of transformers, wrapped or not.
        norm: As in :func:`final_norm`.

    Raises:
        TypeError: As in :func:`final_norm`.
        ValueError: Likewise.

    """
    inner, last = unwrap(model), final_norm(model, norm)
    return next(
        (name, module) for name, module in inner.named_modules() if any(child is last for child in module.children())
    )


def _named_norm(model: nn.Module, norm: str | nn.Module) -> nn.Module:
    if not isinstance(norm, (str, nn.Module)):
        raise TypeError(f"norm must be a module or its name, got {type(norm).__name__}")
    for name, module in model.named_modules():
        if module is not model and (module is norm or name == norm):
            return module  # type: ignore[no-any-return]
    raise ValueError(f"{type(model).__name__} has no module {norm if isinstance(norm, str) else type(norm).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Args:
        model: Any model; one without such a wrapper is returned as it is.

    """
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the model inside a wrapper, or ``None`` if the model is not a wrapper."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
        return model._orig_mod  # type: ignore[return-value]
    if callable(getattr(model, "get_base_model", None)):  # PEFT
        return model.get_base_model()  # type: ignore[operator, no-any-return]
    if isinstance(getattr(model, "module", None), nn.Module):  # DistributedDataParallel, FSDP, DeepSpeed
        return model.module  # type: ignore[return-value]
    return None


def uses_prompt_learning(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before those of ``input_ids``, as in prompt and prefix tuning."""
    inside: nn.Module | None = model
    while inside is not None:
        if getattr(getattr(inside, "active_peft_config", None), "is_prompt_learning", False):
            return True
        inside = _inside(inside)
    return False


def visual_token_ids(model_or_config: Any, processor: Any = None) -> tuple[int, ...]:
    """Return the ids that stand for image and video features in ``input_ids``, from the model's config.

    Args:
        model_or_config: A model, wrapped or not, or its config.
        processor: The model's processor, asked where the config says nothing.

    Raises:
        ValueError: Neither has such an id (a text-only model), or the model's image features enter by cross-attention,
            so that no position of the sequence holds one.

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
    asked = "" if processor is None else ", nor its processor"
    # Phi-4-multimodal keeps its id with the vision tower's settings.
    for place in (config, getattr(config, "vision_config", None), processor):
        found = [getattr(place, name, None) for name in VISUAL_TOKEN_NAMES]
        ids = tuple(dict.fromkeys(token for token in found if isinstance(token, int)))
        if ids:
            return ids
    raise ValueError(
        f"the config of {kind} has none of {', '.join(VISUAL_TOKEN_NAMES)}{asked}: "
        "not a vision-language model, or one whose visual tokens have to be passed by id"
    )


def visual_mask(input_ids: Tensor, visual_tokens: Any, response_mask: Tensor | None = None) -> Tensor:
    """Return True where ``input_ids`` holds an image or video token: any number of images, in any places.

    Args:
        input_ids: Integers of any shape, ``[B, S]`` or packed ``[N]``.
        visual_tokens: A model, a config, or the ids themselves.
        response_mask: True at tokens that the policy sampled, bool or 0 and 1: ``[B, T]`` for the last T positions of
            ``[B, S]``, or in ``input_ids``' shape. A visual token that the policy sampled itself stands for no image;
            what a tool shows in the middle of a response is not sampled. By default nothing is.

    Returns:
        Bool of the shape of ``input_ids``.

    Raises:
        TypeError: ``input_ids`` is no integer tensor, ``response_mask`` no mask, or an id no integer.
        ValueError: Shapes or devices do not fit together, or as :func:`visual_token_ids`, where the ids are not given.

    """
    checks.integers("input_ids", input_ids)
    ids = visual_tokens if isinstance(visual_tokens, (tuple, list)) else visual_token_ids(visual_tokens)
    if not all(isinstance(token, int) for token in ids):
        raise TypeError(f"visual_tokens must be a model, a config or ids, which are integers, got {visual_tokens!r}")
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in ids:  # one or two; torch.isin would copy the ids to the device
        mask |= input_ids == token
    return mask if response_mask is None else mask & ~sampled_positions(input_ids, response_mask)


def sampled_positions(input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return ``response_mask`` as bool in the shape of ``input_ids``: of ``[B, S]`` it may be the last T positions.

    Raises:
        TypeError: ``response_mask`` is no mask.
        ValueError: It has another shape or device.

    """
    if input_ids.dim() != 2:
        meaning = "input_ids'"
        return checks.mask("response_mask", response_mask, input_ids.shape, meaning, input_ids.device, "input_ids")
    sampled = checks.last_positions(response_mask, input_ids, "input_ids")
    return nn.functional.pad(sampled, (input_ids.shape[1] - sampled.shape[1], 0))


# Settings of text models, and the scale that each may stand for: Granite divides by what HyperCLOVA X multiplies by.
_SCALES: tuple[tuple[str, Callable[[float], float]], ...] = (
    ("logit_scale", lambda value: value),
    ("logits_scaling", lambda value: 1 / value),
    ("logits_scaling", lambda value: value),
    ("logits_mup_width_multiplier", lambda value: 1 / value),
    ("output_multiplier", lambda value: value),
    ("lm_head_multiplier", lambda value: value),
)
_CAP = "final_logit_softcapping"


def logit_maps(config: Any) -> list[tuple[float, float | None]]:
    """Return what a configuration says, or may say, of a model's logits, and last that it says nothing.

    Args:
        config: The configuration of a model of transformers.

    Returns:
        ``(logit_scale, softcap)`` pairs, as :func:`linear_logprob` takes them. Where several agree with a model, the
        first is right: a cap that a few tokens do not reach is there all the same.

    """

    def positive(name: str) -> float | None:
        value = getattr(text, name, None)
        return float(value) if is_number(value) and value > 0 else None

    inside = getattr(config, "get_text_config", None)
    text = inside() if callable(inside) else config
    scales = [scale(value) for name, scale in _SCALES if (value := positive(name)) is not None]
    return list(dict.fromkeys((scale, cap) for cap in (positive(_CAP), None) for scale in (*scales, 1.0)))

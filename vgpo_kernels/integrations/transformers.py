"""Hidden states, attention shares, visual tokens and second views of a model of transformers as it is.

VGPO reads the decoder's hidden states after its final norm. ``output_hidden_states=True`` would keep those of every
layer. A hook on the final norm keeps a reference to one tensor, the one that the LM head reads anyway, so it needs no
further memory::

    with capture_hidden_states(model) as captured:
        logits = model(**inputs).logits
    images = visual_mask(inputs["input_ids"], model, response_mask)
    cos = visual_focus(captured.hidden, images, response_mask)

Of several layers :func:`capture_layer_mean` keeps what is made of them, averaged, and none of their states.

The attention of its layers is captured the same way, without the attention matrix::

    segments = attention_segments(inputs["input_ids"], model, inputs["attention_mask"])
    with capture_attention_mass(model, segments, layers=(-1,)) as captured:
        sequences = model.generate(**inputs)
    image_share = captured.masses[..., IMAGE]

What the model would say of other images, or of none, is computed in a second pass::

    spoilt = model(**spoilt_view(inputs, "mask", model, seed=0)).logits
    with blind_attention(model, images):
        blind = model(**inputs).logits

Importing this imports no transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.integrations.attention_call import AttentionCall
from vgpo_kernels.integrations.attention_capture import (
    GENERATED,
    IGNORED,
    IMAGE,
    QUESTION,
    SEGMENT_NAMES,
    CapturedMasses,
    attention_segments,
    capture_attention,
    capture_attention_mass,
)
from vgpo_kernels.integrations.blind_attention import blind_attention, reuse_vision_tower
from vgpo_kernels.integrations.layer_mean import CapturedLayerMean, capture_layer_mean
from vgpo_kernels.integrations.views import KINDS, NoOtherImageError, spoilt_view
from vgpo_kernels.model_surface import (
    NORM_NAMES,
    VISUAL_TOKEN_NAMES,
    decoder_of,
    final_norm,
    logit_maps,
    unwrap,
    visual_mask,
    visual_token_ids,
)

__all__ = [
    "GENERATED",
    "IGNORED",
    "IMAGE",
    "KINDS",
    "NORM_NAMES",
    "QUESTION",
    "SEGMENT_NAMES",
    "VISUAL_TOKEN_NAMES",
    "AttentionCall",
    "CapturedHiddenStates",
    "CapturedLayerMean",
    "CapturedMasses",
    "NoOtherImageError",
    "attention_segments",
    "blind_attention",
    "capture_attention",
    "capture_attention_mass",
    "capture_hidden_states",
    "capture_layer_mean",
    "decoder_of",
    "final_norm",
    "logit_maps",
    "reuse_vision_tower",
    "spoilt_view",
    "unwrap",
    "visual_mask",
    "visual_token_ids",
]


class CapturedHiddenStates:
    """The hidden states after the final norm of the forward passes inside a :func:`capture_hidden_states` block."""

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
    model: nn.Module,
    consumer: Callable[[Tensor], None] | None = None,
    *,
    norm: str | nn.Module | None = None,
) -> Iterator[CapturedHiddenStates]:
    """Capture the hidden states after the final norm of every forward pass inside the ``with`` block.

    Gradients are untouched: what is captured is detached. Recomputation under gradient checkpointing happens outside
    the block (in the backward pass), and outside the final norm, so nothing is captured twice.

    Args:
        model: A model of transformers, or one wrapped by DistributedDataParallel, FSDP, DeepSpeed, torch.compile,
            accelerate or PEFT.
        consumer: Called with each pass's hidden states ``[B, S, D]`` as they are computed. Then nothing is kept, so
            a batch scored in slices needs the memory of one slice.
        norm: The final norm or its name, for a model in which :func:`final_norm` does not find it.

    Yields:
        The captured states; ``.hidden`` is the tensor of the one pass.

    Raises:
        TypeError: No final norm was found.
        ValueError: The model has no module ``norm``.

    """
    if consumer is not None:
        checks.function("consumer", consumer)
    captured = CapturedHiddenStates()

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        hidden = _local(output.detach())
        if consumer is None:
            captured._passes.append(hidden)
        else:
            consumer(hidden)

    handle = final_norm(model, norm).register_forward_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def _local(hidden: Tensor) -> Tensor:
    """Gather hidden states that tensor parallelism left sharded."""
    return hidden.full_tensor() if hasattr(hidden, "full_tensor") else hidden

"""The LM head of a model as :func:`vgpo_kernels.check_batch` finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.model_surface import final_norm, logit_maps, unwrap, visual_token_ids


class Head(NamedTuple):
    """What turns hidden states into logits.

    Attributes:
        weight: ``[V, D]``, or ``None`` where it cannot be read.
        bias: ``[V]``, or ``None``.
        maps: What may happen to the products, ``(logit_scale, softcap)`` each: one of these is right.
        norm: The model's final norm, where there is a model and it is found.
        visual_tokens: Ids of its image tokens, where there is a model and it has them.
        ends: Ids that end a sequence, likewise.
        why_not: Why there is no weight.
        is_given: Whether the weight is the caller's argument, not a module's.

    """

    weight: Tensor | None
    bias: Tensor | None
    maps: tuple[tuple[float, float | None], ...]
    norm: nn.Module | None
    visual_tokens: tuple[int, ...]
    why_not: str
    is_given: bool = False
    ends: tuple[int, ...] = ()


def find(
    model_or_head: nn.Module | Tensor | None, bias: Tensor | None, logit_scale: float | None, softcap: float | None
) -> Head:
    """Return the head of a model, or a head as it is given.

    Raises:
        TypeError: It is neither a model with an LM head, nor a linear layer, nor its weight.
        ValueError: The weight is no matrix.

    """
    told: tuple[tuple[float, float | None], ...] = ((1.0 if logit_scale is None else logit_scale, softcap),)
    head = Head(None, None, told, None, (), "no model or head is given")
    if model_or_head is None:
        return head
    if isinstance(model_or_head, Tensor):
        weight = checks.require_floating("model_or_head", model_or_head)
        if weight.dim() != 2:
            raise ValueError(f"model_or_head must have shape [V, D] as a weight, got {checks.describe(weight)}")
        return _with_weight(head, weight, bias)._replace(is_given=True)
    if not isinstance(model_or_head, nn.Module):
        raise TypeError(
            "model_or_head must be a model with get_output_embeddings(), its LM head, or the head's weight [V, D], "
            f"got {type(model_or_head).__name__}"
        )
    model = unwrap(model_or_head)
    head = head._replace(ends=_ends(model))
    layer: Any = model
    if callable(getattr(model, "get_output_embeddings", None)):
        layer = _found(model.get_output_embeddings)  # type: ignore[arg-type]
        norm, tokens = _found(lambda: final_norm(model)), _found(lambda: visual_token_ids(model))
        head = head._replace(norm=norm, visual_tokens=tokens or ())
        config = getattr(model, "config", None)
        if logit_scale is None and softcap is None and config is not None:
            head = head._replace(maps=tuple(logit_maps(config)))
    # Not a subclass: layers of adapters and of quantised numbers hold another weight than they multiply by.
    inner = getattr(layer, "original_module", layer)  # PEFT trains a copy of it, and hands on its weight and bias
    if inner is None:
        return head._replace(why_not=f"{type(model).__name__} has no LM head; hand over the whole model")
    if type(inner) is not nn.Linear:
        return head._replace(why_not=f"the LM head is no plain linear layer but {type(inner).__name__}")
    return _with_weight(head, layer.weight, layer.bias if bias is None else bias)


def _ends(model: nn.Module) -> tuple[int, ...]:
    """Return the ids that end a sequence, as generation takes them."""
    for place in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(place, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def _with_weight(head: Head, weight: Tensor, bias: Tensor | None) -> Head:
    """Return a head with its weight, or without it where that is sharded over processes (FSDP, ZeRO-3)."""
    sharded = hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") or weight.dim() != 2
    if sharded or (type(weight) is nn.Parameter and weight.untyped_storage().size() == 0):
        return head._replace(why_not="the LM head's weight is sharded over processes")
    if type(weight) not in (Tensor, nn.Parameter):
        return head._replace(why_not=f"the LM head's weight is a {type(weight).__name__}")
    if bias is not None:
        bias = checks.require_floating("bias", bias).detach()
        checks.require_shape("bias", bias, weight.shape[:1], "one entry per row of model_or_head's weight")
        checks.require_device("bias", bias, weight.device, "model_or_head")
    return head._replace(weight=weight.detach(), bias=bias, why_not="")


def _found(look: Callable[[], Any]) -> Any:
    """Return what there is, or ``None``: a model may be text alone, or name its parts in another way."""
    try:
        return look()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None

"""Argument checks, and their messages: the argument, what it is, what was expected. Attention and heads have their own.

Checks of shape, dtype and device cost nothing on the device. Checks of values (boundaries, indices, masks of integers)
would make the host wait for a GPU, so they run for CPU tensors only; GPU kernels clamp the values that they read
instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from vgpo_kernels import hints
from vgpo_kernels.config import FLOAT32_LEAST, FLOAT32_MOST, Pooling, Visibility, is_number, spell, type_name

T = TypeVar("T")

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INDEX_DTYPES = (torch.int64, torch.int32)
VISIBILITIES: tuple[str, ...] = get_args(Visibility)
POOLINGS: tuple[str, ...] = get_args(Pooling)

_LARGEST = 2**63 - 1  # integer of an operator's argument


def describe(tensor: Tensor) -> str:
    """Spell a tensor's dtype, shape and device for an error message."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def require_tensor(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a dense tensor, else raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hints.not_a_tensor(name, value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense torch.Tensor, got {kind}")
    return value


def require_floating(name: str, value: object) -> Tensor:
    """Return ``value`` if it is a tensor of fp32, bf16, fp16 or fp64, else raise TypeError."""
    tensor = require_tensor(name, value)
    if tensor.dtype not in HIDDEN_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}"
            f"{hints.not_floating(name, tensor)}"
        )
    return tensor


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str, like: str = "") -> None:
    """Raise ValueError unless ``tensor`` has ``shape``, which ``meaning`` explains: that of ``like``, if of any."""
    if tensor.shape != shape:
        hint = hints.shape(name, tensor.shape, shape, like)
        raise ValueError(f"{name} must have shape {list(shape)} ({meaning}), got {describe(tensor)}{hint}")


def require_device(name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    """Raise ValueError unless ``tensor`` is on ``device``, where ``other`` is."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like {other}, got {describe(tensor)}")


def require_separate_rows(name: str, matrix: Tensor) -> None:
    """Raise ValueError unless the rows of a matrix that is written to are contiguous and share no memory."""
    rows, columns = matrix.shape
    if (columns > 1 and matrix.stride(1) != 1) or (rows > 1 and matrix.stride(0) < columns):
        raise ValueError(
            f"{name} is written to, so its rows must be contiguous and apart, got strides {list(matrix.stride())} of "
            f"{describe(matrix)}"
        )


def rows_apart(tensor: Tensor) -> Tensor:
    """Return ``tensor`` if the step along its last dimension is 1, else a copy."""
    # contiguous() would not change a tensor with no elements, or with one.
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def mask(name: str, value: object, shape: tuple[int, ...], meaning: str, device: torch.device, other: str) -> Tensor:
    """Return a boolean mask as contiguous bool; integer masks of 0 and 1 are converted.

    Raises:
        TypeError: Not a tensor, or a floating-point mask, which would have to be rounded.
        ValueError: Wrong shape or device, or (CPU tensors) integers other than 0 and 1.

    """
    tensor = require_tensor(name, value)
    if tensor.dtype != torch.bool and tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be bool or an integer mask, got {describe(tensor)}; use {name}.bool()")
    require_shape(name, tensor, shape, meaning, other if len(shape) == 2 else "")
    require_device(name, tensor, device, other)
    if tensor.dtype != torch.bool:
        if values_are_free(tensor) and tensor.numel():
            low, high = (int(bound) for bound in tensor.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"{name} must hold 0 and 1, got {low} to {high} in {describe(tensor)}; say what counts, as by "
                    f"{name} != {-100 if low < 0 else 0}"
                )
        tensor = tensor != 0
    return tensor.contiguous()


def cu_seqlens(value: object, packed: Tensor, other: str, name: str = "cu_seqlens") -> Tensor:
    """Return the boundaries ``[B + 1]`` of ``packed`` as int64. Messages call ``packed`` by the name ``other``.

    Raises:
        TypeError: Not an int32 or int64 tensor.
        ValueError: Not 1-D, empty, on another device, or (CPU tensors) not increasing from 0 to the packed length.

    """
    total = packed.shape[0]
    boundaries = require_tensor(name, value)
    if boundaries.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {describe(boundaries)}; use {name}.int()")
    if boundaries.dim() != 1 or boundaries.shape[0] < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {describe(boundaries)}")
    require_device(name, boundaries, packed.device, other)
    if values_are_free(boundaries):
        steps = boundaries.diff()
        if boundaries[0] != 0 or boundaries[-1] != total or bool((steps < 0).any()):
            raise ValueError(
                f"{name} must rise from 0 to {total} (the packed length of {other}) without decreasing, "
                f"got {summarise(boundaries)}; of lengths they are torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
            )
    return boundaries.to(torch.int64).contiguous()


def values_are_free(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a GPU, and without a guard in a traced graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def batch_size(response_mask: Tensor, boundaries: Tensor | None) -> int:
    """Return the number of responses B of a padded ``[B, T]`` or packed ``[N]`` batch."""
    return response_mask.shape[0] if boundaries is None else boundaries.shape[0] - 1


def response_layout(
    response_mask: object, boundaries: object, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """Check ``response_mask`` and ``cu_seqlens`` against each other: ``[B, T]`` alone, or ``[N]`` with boundaries.

    Returns:
        The mask as contiguous bool and the boundaries as int64 or ``None``.

    """
    tensor = require_tensor("response_mask", response_mask)
    expected = 2 if boundaries is None else 1
    if tensor.dim() != expected:
        layout = "[B, T] without cu_seqlens" if boundaries is None else "[N] with cu_seqlens"
        hint = hints.response_mask(tensor.shape, tensor.is_floating_point(), boundaries is not None)
        raise ValueError(f"response_mask must have shape {layout}, got {describe(tensor)}{hint}")
    checked = mask("response_mask", tensor, tensor.shape, "", device or tensor.device, "hidden")
    if boundaries is None:
        return checked, None
    return checked, cu_seqlens(boundaries, checked, "response_mask")


def hidden_states(hidden: object, boundaries: object) -> tuple[Tensor, Tensor | None]:
    """Check ``hidden``, ``[B, S, D]`` alone or ``[N, D]`` with boundaries, and detach it.

    Returns:
        The hidden states, their last dimension contiguous, and the boundaries as int64 or ``None``.

    """
    tensor = require_floating("hidden", hidden).detach()
    expected = 3 if boundaries is None else 2
    if tensor.dim() != expected:
        layout = "[B, S, D] without cu_seqlens" if boundaries is None else "[N, D] with cu_seqlens"
        hint = hints.hidden(tensor.shape, boundaries is not None)
        raise ValueError(f"hidden must have shape {layout}, got {describe(tensor)}{hint}")
    if tensor.shape[-1] == 0:
        raise ValueError(f"hidden must have at least one feature, got {describe(tensor)}")
    tensor = rows_apart(tensor)
    if boundaries is None:
        return tensor, None
    return tensor, cu_seqlens(boundaries, tensor, "hidden")


def visual_mask(value: object, hidden: Tensor) -> Tensor:
    """Return ``visual_mask`` as bool in the shape of ``hidden`` without its features."""
    meaning = "hidden's without its last dimension"
    return mask("visual_mask", value, hidden.shape[:-1], meaning, hidden.device, "hidden")


def last_positions(value: object, of: Tensor, name: str) -> Tensor:
    """Return ``response_mask``, the last T positions of ``of`` ``[B, S, ...]``, as contiguous bool ``[B, T]``.

    Messages call ``of`` by ``name``.
    """
    tensor = require_tensor("response_mask", value)
    if tensor.dim() != 2 or tensor.shape[0] != of.shape[0] or tensor.shape[1] > of.shape[1]:
        raise ValueError(
            f"response_mask must have shape [{of.shape[0]}, T] with T <= {of.shape[1]} (the last T "
            f"positions of {name} {describe(of)}), got {describe(tensor)}"
            f"{hints.last_positions(tensor.shape, of.shape, name)}"
        )
    return mask("response_mask", tensor, tensor.shape, "", of.device, name)


def response_rows(response_mask: Tensor, hidden: Tensor) -> None:
    """Raise ValueError unless the response positions are the last T of hidden's S, or all N when packed."""
    require_device("response_mask", response_mask, hidden.device, "hidden")
    if hidden.dim() == 2:
        require_shape("response_mask", response_mask, hidden.shape[:1], "one entry per row of hidden")
    else:
        last_positions(response_mask, hidden, "hidden")


def visibility(value: object) -> bool:
    """Return whether ``visibility`` is ``"causal"``."""
    if not isinstance(value, str) or value not in VISIBILITIES:
        raise ValueError(f"visibility must be one of {', '.join(VISIBILITIES)}, got {spell(value)}")
    return value == "causal"


def pooling(value: object) -> bool:
    """Return whether ``pooling`` is ``"unit_mean"``."""
    if not isinstance(value, str) or value not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {spell(value)}")
    return value == "unit_mean"


def prototype(
    value: object, index: object, hidden: Tensor, response_mask: Tensor, batch: int
) -> tuple[Tensor | None, Tensor | None]:
    """Check given prototypes and their ``prototype_index`` (-1: no image).

    Returns:
        Prototypes ``[P, D]``, and the row of each response ``[B]`` or of each token, in response_mask's shape; without
        rows response b has row b.

    """
    if value is None:
        if index is not None:
            raise ValueError("prototype_index needs prototype, which is None")
        return None, None
    means = require_floating("prototype", value).detach()
    require_device("prototype", means, hidden.device, "hidden")
    if means.dtype != torch.float64:
        means = means.float()
    # [B] and [N] are the same shape in a packed batch of as many tokens: then rows are per response.
    if index is None and means.shape == hidden.shape and means.shape != (batch, hidden.shape[-1]):
        rows = torch.arange(means.shape[:-1].numel(), device=means.device).view(means.shape[:-1])
        first = rows.shape[-1] - response_mask.shape[-1]
        return _with_a_row(means.reshape(-1, means.shape[-1])), rows[..., first:].contiguous()
    if means.dim() != 2 or means.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"prototype must have shape [P, {hidden.shape[-1]}], a column per feature of hidden {describe(hidden)}, "
            f"or hidden's shape, got {describe(means)}"
        )
    if index is None:
        require_shape("prototype", means, (batch, hidden.shape[-1]), "a row per response without prototype_index")
        return (means.contiguous(), None) if batch else (_with_a_row(means), means.new_zeros(0, dtype=torch.int64))
    rows = integers("prototype_index", index)
    if rows.shape != (batch,):
        require_shape("prototype_index", rows, response_mask.shape, f"one entry per response, [{batch}], or per token")
    require_device("prototype_index", rows, hidden.device, "hidden")
    rows = rows.to(torch.int64).contiguous()
    if values_are_free(rows) and rows.numel() and (rows.min() < -1 or rows.max() >= means.shape[0]):
        raise ValueError(
            f"prototype_index must lie in [-1, {means.shape[0]}) (-1: no image), the rows of prototype "
            f"{describe(means)}, got {summarise(rows)}"
        )
    return _with_a_row(means), rows


def _with_a_row(means: Tensor) -> Tensor:
    """Return prototypes, contiguous, or a row of zeros, no image, for none: kernels need an address to point to."""
    return means.contiguous() if means.shape[0] else means.new_zeros(1, means.shape[1])


def image(
    visual: object,
    means: object,
    index: object,
    seen: object,
    hidden: Tensor,
    response_mask: Tensor,
    boundaries: Tensor | None,
) -> dict[str, Any]:
    """Check what gives the prototypes: ``visual_mask``, or ``prototype`` with its ``prototype_index``.

    Returns:
        The arguments by name, as operators take them.

    """
    if visual is None and means is None:
        raise ValueError("visual_mask is None, which needs prototype to be given")
    causal = visibility(seen)
    given, rows = prototype(means, index, hidden, response_mask, batch_size(response_mask, boundaries))
    return {
        "visual_mask": None if visual is None else visual_mask(visual, hidden),
        "prototype": given,
        "prototype_index": rows,
        "causal": causal and given is None,
    }


def integers(name: str, value: object) -> Tensor:
    """Return ``value`` if it is an integer tensor, else raise TypeError."""
    tensor = require_tensor(name, value)
    if tensor.dtype not in INTEGER_DTYPES:
        hint = "" if tensor.is_complex() else f"; use {name}.long()"
        raise TypeError(f"{name} must be an integer tensor, got {describe(tensor)}{hint}")
    return tensor


def per_response_integers(name: str, value: object, batch: int, device: torch.device, other: str) -> Tensor:
    """Return integers ``[B]`` as int64."""
    tensor = integers(name, value)
    require_shape(name, tensor, (batch,), f"one entry per response of {other}")
    require_device(name, tensor, device, other)
    return tensor.to(torch.int64).contiguous()


def per_response_mask(name: str, value: object, batch: int, device: torch.device, other: str) -> Tensor | None:
    """Return a mask of responses as bool ``[B]``, or ``None``."""
    return None if value is None else mask(name, value, (batch,), f"one entry per response of {other}", device, other)


def per_token(name: str, value: object, like: Tensor, *, detach: bool = True) -> Tensor:
    """Return a floating tensor of ``like``'s shape, fp32 (or fp64 if it is), contiguous."""
    tensor = require_floating(name, value)
    require_shape(name, tensor, like.shape, "response_mask's", "response_mask")
    require_device(name, tensor, like.device, "response_mask")
    return computable(tensor, detach)


def optional_per_token(name: str, value: object, like: Tensor, *, detach: bool = True) -> Tensor | None:
    """Apply :func:`per_token` to a value that may be ``None``."""
    return None if value is None else per_token(name, value, like, detach=detach)


def per_response(name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """Return a floating tensor ``[B]``, fp32 (or fp64 if it is), contiguous and detached."""
    tensor = require_floating(name, value)
    require_shape(name, tensor, (batch,), "one entry per response")
    require_device(name, tensor, device, "the other arguments")
    return computable(tensor, detach=True)


def per_response_or_token(name: str, value: object, like: Tensor, batch: int) -> Tensor:
    """Return a floating tensor that is ``[B]`` or of ``like``'s shape, fp32 (or fp64), contiguous and detached."""
    tensor = require_floating(name, value)
    # Not written as `in`, which tracing cannot resolve for symbolic shapes of different lengths.
    one_each = tensor.dim() == 1 and tensor.shape[0] == batch
    if not one_each and tensor.shape != like.shape:
        meant = [
            hints.shape(name, tensor.shape, (batch,)),
            hints.shape(name, tensor.shape, like.shape, "response_mask"),
        ]
        by_token = tensor.dim() == like.dim() and tensor.shape[-1] != 1
        hint = next(filter(None, reversed(meant) if by_token else meant), "")
        raise ValueError(
            f"{name} must have shape [{batch}] (one entry per response) or {list(like.shape)} (response_mask's), "
            f"got {describe(tensor)}{hint}"
        )
    require_device(name, tensor, like.device, "response_mask")
    return computable(tensor, detach=True)


def optional_per_response_or_token(name: str, value: object, like: Tensor, batch: int) -> Tensor | None:
    """Apply :func:`per_response_or_token` to a value that may be ``None``."""
    return None if value is None else per_response_or_token(name, value, like, batch)


def count(name: str, value: object, device: torch.device) -> Tensor | None:
    """Return a denominator as a 0-dimensional fp32 tensor on ``device``. A number is written there without a copy."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        require_tensor(name, value)
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            hint = f"; use {name}.sum()" if value.numel() > 1 and not value.is_complex() else ""
            raise ValueError(f"{name} must be a number or a tensor of one number, got {describe(value)}{hint}")
        require_device(name, value, device, "the other arguments")
        if values_are_free(value):
            _denominator(name, value.item())
        return value.detach().reshape(()).to(torch.float32)
    if not is_number(value):
        hint = "; such as response_mask.sum()" if isinstance(value, bool) else ""
        raise TypeError(
            f"{name} must be a number (int or float), a tensor of one, or None, got {type_name(value)}{hint}"
        )
    _denominator(name, value)
    if torch.compiler.is_compiling():  # a product keeps a number that changes an input of the graph
        return torch.ones((), dtype=torch.float32, device=device) * value
    return torch.full((), float(value), dtype=torch.float32, device=device)


def _denominator(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {spell(value)}")
    # One that fp32 rounds to infinity would make the loss zero, and one that it rounds to zero would count as one.
    if value > FLOAT32_MOST or 0 < value < FLOAT32_LEAST:
        raise ValueError(f"{name} must be 0 or in [{FLOAT32_LEAST:.4g}, {FLOAT32_MOST:.4g}], got {spell(value)}")


def ignore_index(value: object) -> int | None:
    """Return ``value`` if it is an integer or ``None``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index must be an integer or None, got {type_name(value)}")
    return _bounded_integer("ignore_index", value, -_LARGEST, _LARGEST)


def chunk_bytes(value: object) -> int:
    """Return the size of a workspace in bytes, 0 for ``None``: the default."""
    return 0 if value is None else positive_integer("chunk_bytes", value)


def not_negative_integer(name: str, value: object) -> int:
    """Return ``value`` if it is an integer from 0 to 2^63 - 1."""
    return _bounded_integer(name, value, 0, _LARGEST)


def predicted_tokens(response_mask: Tensor, first_tokens: Tensor) -> None:
    """Raise ValueError if a scored token is the first of its sequence: no hidden state predicts that one.

    This waits for the device, so it is called where the host has to wait for the number of tokens anyway.
    """
    if bool((response_mask & first_tokens).any()):
        raise ValueError(
            "response_mask must be False at the first token of a sequence, which no hidden state predicts, "
            f"got True at {int((response_mask & first_tokens).sum())} of them"
        )


def positive_integer(name: str, value: object, most: int = _LARGEST) -> int:
    """Return ``value`` if it is an integer above zero, at most ``most``."""
    return _bounded_integer(name, value, 1, most)


def fraction(name: str, value: object) -> float:
    """Return ``value`` as a float if it lies between 0 and 1, without them."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {spell(value)}")
    return float(value)


def share(name: str, value: object) -> float:
    """Return ``value`` as a float if it lies in [0, 1]."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {spell(value)}")
    return value if torch.compiler.is_compiling() else float(value)


def choices(name: str, value: object, known: Sequence[str]) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a list or tuple of known names."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{name} must be a list or tuple of names, got {type_name(value)}")
    for one in value:
        if one not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}, got {one!r}")
    return tuple(value)


def flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type_name(value)}")
    return value


def function(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def settings(name: str, value: object, kind: type[T]) -> T:
    """Return ``value`` if it is of the settings class ``kind``, else raise TypeError."""
    if not isinstance(value, kind):
        hint = hints.settings(name, value, kind)
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}{hint}")
    return value


def compute_dtype(*arguments: object) -> torch.dtype:
    """Return fp64 if an argument is an fp64 tensor (then the reference implementation handles the call), else fp32."""
    for value in arguments:
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _bounded_integer(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type_name(value)}")
    if value < least:
        bound = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {bound}, got {spell(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {spell(value)}")
    return value


def computable(tensor: Tensor, detach: bool) -> Tensor:
    if detach:  # whatever requires_grad says, which is False for tensors that functorch differentiates
        tensor = tensor.detach()
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.contiguous()


def summarise(tensor: Tensor) -> str:
    values = tensor.reshape(-1).tolist()
    shown = ", ".join(str(value) for value in values[:8])
    return f"[{shown}, ...] of {len(values)}" if len(values) > 8 else f"[{shown}]"

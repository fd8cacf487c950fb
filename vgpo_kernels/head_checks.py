"""Checks of what an LM head takes, and their messages, as in checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.checks import (
    computable,
    describe,
    integers,
    positive_integer,
    require_device,
    require_floating,
    require_shape,
    rows_apart,
    summarise,
    values_are_free,
)
from vgpo_kernels.config import is_number, spell, type_name


def head(hidden: object, weight: object, bias: object) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check hidden states ``[..., D]`` and an LM head, weight ``[V, D]`` and bias ``[V]``.

    Returns:
        Hidden states in autocast's dtype where it is on, the weight with its last dimension contiguous, and the bias in
        fp32 (or fp64 if it is).

    """
    states, rows = require_floating("hidden", hidden), require_floating("weight", weight)
    if states.dim() < 2:
        raise ValueError(f"hidden must have shape [N, D] or [..., D], got {describe(states)}")
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, D] with V > 0, got {describe(rows)}")
    if rows.shape[1] != states.shape[-1] or rows.shape[1] == 0:
        raise ValueError(
            f"weight must have shape [V, {states.shape[-1]}], a column per feature of hidden {describe(states)}, "
            f"got {describe(rows)}{'; use weight.T' if rows.shape[0] == states.shape[-1] else ''}"
        )
    require_device("weight", rows, states.device, "hidden")
    if bias is not None:
        offsets = require_floating("bias", bias)
        require_shape("bias", offsets, rows.shape[:1], "one entry per row of weight")
        require_device("bias", offsets, states.device, "hidden")
        bias = computable(offsets, detach=False)
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.dtype != torch.float64:
        states = states.to(torch.get_autocast_dtype(kind))
    return states, rows_apart(rows), bias


def other_view(
    other: object, other_weight: object, other_bias: object, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check the other view of hidden states ``[..., D]`` before a head ``[V, D]``, which may have a head of its own.

    Returns:
        The states in hidden's dtype, and the other head's weight and bias, or ``None``.

    """
    states = require_floating("other", other)
    if states.shape[:-1] != hidden.shape[:-1] or states.dim() != hidden.dim():
        raise ValueError(f"other must have hidden's shape {list(hidden.shape)}, got {describe(states)}")
    require_device("other", states, hidden.device, "hidden")
    if other_weight is None:
        if other_bias is not None:
            raise ValueError("other_bias is the bias of other_weight, which is missing; bias is that of both views")
        if states.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"other must have {hidden.shape[-1]} features like hidden, got {describe(states)}; a view with other "
                "features needs an other_weight"
            )
        return states.to(hidden.dtype), None, None
    rows = require_floating("other_weight", other_weight)
    meaning = f"weight's rows, and a column per feature of other {describe(states)}"
    require_shape("other_weight", rows, (weight.shape[0], states.shape[-1]), meaning)
    require_device("other_weight", rows, hidden.device, "hidden")
    if other_bias is None:
        return states.to(hidden.dtype), rows_apart(rows), None
    offsets = require_floating("other_bias", other_bias)
    require_shape("other_bias", offsets, rows.shape[:1], "one entry per row of other_weight")
    require_device("other_bias", offsets, hidden.device, "hidden")
    return states.to(hidden.dtype), rows_apart(rows), computable(offsets, detach=False)


def targets(value: object, shape: tuple[int, ...], meaning: str, device: torch.device, other: str = "hidden") -> Tensor:
    """Return target ids of ``shape`` as int64; ``meaning`` says whose shape it is."""
    ids = integers("targets", value)
    require_shape("targets", ids, shape, meaning, meaning.partition("'")[0])
    require_device("targets", ids, device, other)
    return ids.to(torch.int64).contiguous()


def target_values(ids: Tensor, read: Tensor, vocabulary: int | None) -> None:
    """Raise ValueError unless the ids where ``read`` are rows of a weight with ``vocabulary`` rows (``None``: any)."""
    if not values_are_free(ids) or not bool(read.any()):
        return
    low, high = (int(bound) for bound in ids[read].aminmax())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        bound = "" if vocabulary is None else f" and below {vocabulary}, the rows of weight"
        raise ValueError(f"targets must be at least 0{bound}, got {low} to {high}")


def vocabulary_slices(value: object, *statistics: int) -> Tensor:
    """Return the results ``[R, statistics, ...]`` of slices of the vocabulary, fp32 (or fp64).

    ``statistics`` are the numbers of them that there may be.
    """
    slices = require_floating("slices", value)
    if slices.dim() < 2 or slices.shape[0] == 0 or slices.shape[1] not in statistics:
        shapes = " or ".join(f"[R, {number}, ...]" for number in statistics)
        raise ValueError(f"slices must have shape {shapes} with R > 0, got {describe(slices)}")
    return computable(slices, detach=False)


def slice_targets(value: object, slices: Tensor) -> Tensor:
    """Return the targets of slices of the vocabulary ``[R, _, ...]``."""
    meaning = f"what follows [R, {slices.shape[1]}] in the shape of slices {describe(slices)}"
    return targets(value, slices.shape[2:], meaning, slices.device, "slices")


def vocabulary_totals(value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the normalisers ``[4, ...]`` of both views over the whole vocabulary, fp32 (or fp64)."""
    tensor = require_floating("totals", value)
    require_shape("totals", tensor, (4, *shape), "maximum and log-sum of both views for each row")
    require_device("totals", tensor, device, "hidden")
    return computable(tensor, detach=False)


def logit_map(
    temperature: object, logit_scale: object, softcap: object, hidden: Tensor, read: Tensor, meaning: str
) -> dict[str, Any]:
    """Check how products become logits, ``cap(logit_scale * product) / temperature``.

    Args:
        temperature: A number, or a tensor of one for each row.
        logit_scale: A number.
        softcap: A number, or ``None``: no cap.
        hidden: The hidden states, which temperatures must share a device with.
        read: Which rows are read, bool in the shape that temperatures must have.
        meaning: Whose shape that is, for messages.

    Returns:
        The arguments by name, as operators take them: ``temperatures`` in fp32 (fp64 if hidden is), or ``None`` beside
        a number; ``softcap`` 0 for none.

    """
    scale = _factor("logit_scale", logit_scale)
    cap = 0.0 if softcap is None else _factor("softcap", softcap)
    rows, divisor = None, 1.0
    if isinstance(temperature, Tensor):
        rows = _temperatures(temperature, hidden, read, meaning)
    else:
        divisor = _factor("temperature", temperature)
    # Kernels multiply by these: they, too, must be normal fp32 numbers.
    products = [("softcap / temperature", cap, divisor), ("logit_scale / softcap", scale, cap)]
    for name, above, below in products if cap else [("logit_scale / temperature", scale, divisor)]:
        if not _FACTORS[0] <= above / below <= _FACTORS[1]:
            raise ValueError(f"{name} must be from 2^-126 to 2^126, got {spell(above)} / {spell(below)}")
    return {"temperature": divisor, "temperatures": rows, "logit_scale": scale, "softcap": cap}


def truncation(top_k: object, top_p: object, min_p: object) -> tuple[int, float, float] | None:
    """Return ``top_k``, ``top_p`` and ``min_p`` of a sampler that truncates, or ``None`` where none is given."""
    if top_k is None and top_p is None and min_p is None:
        return None
    count = 0 if top_k is None else positive_integer("top_k", top_k)
    mass = 1.0 if top_p is None else _share("top_p", top_p)
    if mass == 0:
        raise ValueError(f"top_p must be above 0, got {spell(top_p)}")
    return count, mass, 0.0 if min_p is None else _share("min_p", min_p)


def _share(name: str, value: object) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {spell(value)}")
    return float(value)


# One over such a number is a normal fp32 number as well.
_FACTORS = (2.0**-126, 2.0**126)


def _factor(name: str, value: object) -> float:
    """Return ``value`` as a float if it and one over it are normal fp32 numbers above zero: kernels multiply."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    if not _FACTORS[0] <= value <= _FACTORS[1]:
        raise ValueError(f"{name} must be finite and above 0, from 2^-126 to 2^126, got {spell(value)}")
    return float(value)


def _temperatures(value: Tensor, hidden: Tensor, read: Tensor, meaning: str) -> Tensor:
    tensor = require_floating("temperature", value)
    require_shape("temperature", tensor, read.shape, meaning)
    require_device("temperature", tensor, hidden.device, "hidden")
    rows = tensor.detach().to(torch.float64 if hidden.dtype == torch.float64 else torch.float32).contiguous()
    if values_are_free(rows) and bool(read.any()):
        used = rows[read]
        if not bool(((used >= _FACTORS[0]) & (used <= _FACTORS[1])).all()):
            raise ValueError(
                f"temperature must be finite and above 0, from 2^-126 to 2^126, got {summarise(used)} of "
                f"{describe(tensor)}"
            )
    return rows

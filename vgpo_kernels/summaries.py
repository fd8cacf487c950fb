"""Results in a few lines: shapes, means and metrics where printing every number would flood the screen."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

WIDTH = 100  # of a line of metrics


def summary(result: Any) -> str:
    """Return what a named tuple holds, a line a field: shape, mean and range of a tensor, and every metric.

    Means and ranges are over all finite numbers of a tensor, those off the mask among them. All are computed where the
    tensors are and read at once. Where there is nothing to read, only shapes are shown: tensors that are traced, fake,
    batched by ``torch.vmap`` or split over ranks, and a stream that is being captured.

    Args:
        result: Its fields are tensors of any shape, dictionaries of 0-dimensional ones, anything with a short text, or
            ``None``, which is left out.

    """
    fields = {name: value for name, value in result._asdict().items() if value is not None}
    read = iter(_read([tensor for value in fields.values() for tensor in _tensors(value)]))
    lines = []
    for name, value in fields.items():
        if isinstance(value, dict):
            metrics = ", ".join(f"{metric}={_number(next(read))}" for metric in value)
            lines.append(fill(f"{name}: {metrics}", WIDTH, subsequent_indent="    ", break_on_hyphens=False))
        elif isinstance(value, Tensor):
            lines.append(f"{name}: {_described(value, next(read))}")
        else:
            lines.append(f"{name}: {value}")
    return "\n  ".join([type(result).__name__, *lines])


def _tensors(value: Any) -> list[Tensor]:
    found = value.values() if isinstance(value, dict) else [value]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _read(tensors: list[Tensor]) -> Iterator[list[float] | None]:
    """Yield the numbers of :func:`_statistics` of each tensor, or None where there is nothing to read."""
    read: list[float] = []
    if tensors and all(map(_readable, tensors)):
        try:
            with torch.no_grad():
                read = torch.cat([_statistics(tensor) for tensor in tensors]).tolist()
        # Batched tensors refuse to be read, and so do tensors that a mode of torch stands between.
        except Exception:
            read = []
    for tensor in tensors:
        size = 4 if tensor.dim() else 1
        yield read[:size] or None
        read = read[size:]


def _readable(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or torch.compiler.is_compiling():
        return False
    # Reading would wait for the stream, which ends its capture.
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _statistics(tensor: Tensor) -> Tensor:
    """Return a number, ``[1]``, or mean, minimum and maximum of what is finite, and how many are not, ``[4]``."""
    values = (tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()).reshape(-1)
    if tensor.dim() == 0:
        return values
    if tensor.numel() == 0:
        return values.new_zeros(4)
    finite = values.isfinite()
    missing = (~finite).sum()
    return torch.stack(
        [
            torch.where(finite, values, 0.0).sum() / (values.numel() - missing),
            torch.where(finite, values, torch.inf).amin(),
            torch.where(finite, values, -torch.inf).amax(),
            missing.to(values.dtype),
        ]
    )


def _described(tensor: Tensor, read: list[float] | None) -> str:
    """Describe one tensor: a number by itself, others by shape and what is in them."""
    kind = str(tensor.dtype).removeprefix("torch.") + ("" if tensor.device.type == "cpu" else f" on {tensor.device}")
    if tensor.dim() == 0 and read is not None:
        return f"{read[0]:.4g} ({kind})"
    shape = f"{kind} {list(tensor.shape)}"
    if read is None or tensor.numel() == 0:
        return shape
    mean, low, high, missing = read
    spread = f", mean {mean:.4g}, {low:.4g} to {high:.4g}" if missing < tensor.numel() else ""
    return shape + spread + (f", {missing:.0f} not finite" if missing else "")


def _number(read: list[float] | None) -> str:
    """Write a metric."""
    return "?" if read is None else f"{read[0]:.4g}"

"""The one tolerance policy: how far a fast result may lie from the reference implementation in fp64.

A result computed in fp32 is right if its error is at most twice that of the reference implementation run in fp32 on the
same input, plus a floor of a few units in the last place of the values at hand: more for long sums, and for results
that are rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOOR = 8 * torch.finfo(torch.float32).eps
# Terms of a sum whose rounding FLOOR covers. Errors of longer ones grow as a random walk does, with their square root.
COVERED_TERMS = 1024


def floor_of(dtype: torch.dtype = torch.float32, terms: int = 1, device: torch.device | None = None) -> float:
    """Floor of a sum of ``terms`` products in fp32 in any order, each term and then the sum rounded to ``dtype``.

    Rounding to nearest is off by half a unit in the last place; Triton's interpreter truncates bfloat16, off by one.
    A GPU's matrix units cut off what they align before they add: three times the floor was measured.
    """
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    units = 1 if device is None or device.type == "cpu" else 4
    return units * FLOOR * max(1.0, (terms / COVERED_TERMS) ** 0.5) + rounding


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, and NaN in the same places."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def assert_close(
    actual: Tensor, exact: Tensor, narrow: Tensor | None = None, *, name: str = "result", floor: float = FLOOR
) -> None:
    """Fail unless ``actual`` is as close to ``exact`` (fp64) as the policy demands.

    Args:
        actual: The result under test.
        exact: The reference implementation in fp64.
        narrow: The reference implementation in fp32, whose error is the yardstick; without it only the floor counts.
        name: Named in the failure.
        floor: Allowed error relative to the largest magnitude of ``exact`` (at least 1).

    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual, exact = actual.detach().cpu().double(), exact.detach().cpu().double()
    assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN in other places than the reference has"
    assert torch.equal(actual.isinf(), exact.isinf()), f"{name}: infinite in other places than the reference is"
    if not exact.numel():
        return
    finite = exact.isfinite()
    actual, exact = torch.where(finite, actual, 0.0), torch.where(finite, exact, 0.0)
    yardstick = 0.0
    if narrow is not None:
        yardstick = torch.where(finite, narrow.detach().cpu().double() - exact, 0.0).nan_to_num().abs().max().item()
    allowed = 2 * yardstick + floor * max(1.0, exact.abs().max().item())
    error = (actual - exact).abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_matches(
    actual: Any, definition: Callable[..., Any], arguments: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    """Compare every tensor of ``actual`` with ``definition(*arguments)`` in fp64, its fp32 error the yardstick."""
    exact = definition(*arguments, dtype=torch.float64)
    narrow = definition(*arguments, dtype=torch.float32)
    if isinstance(actual, Tensor):
        actual, exact, narrow = (actual,), (exact,), (narrow,)
    for name, one, wide, thin in zip(names, actual, exact, narrow, strict=True):
        assert_close(one, wide, thin, name=name)

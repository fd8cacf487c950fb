"""What the Triton kernels share: registration of operators, blocks of a batch, scalar formulas.

Tokens are flat, as in csrc/layout.h: those of response i are ``[i * T, (i + 1) * T)`` of a padded batch and
``[cu_seqlens[i], cu_seqlens[i + 1])`` of a packed one. Kernels get ``boundaries`` (``cu_seqlens`` or ``None``) and
``tokens`` (T or N). Lengths are run-time arguments and never specialised on, so a new rollout compiles nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.ops import registry

RANGE_FLOOR = tl.constexpr(1e-8)  # keeps a min-max normalisation of equal values at zero

# Sums that a response's factors depend on are taken over 64-bit fixed-point numbers. Integer addition is associative,
# so neither padding nor packing nor the block size changes a bit of them.
UNIT_SCALE = tl.constexpr(2.0**40)  # for normalised values in [0, 1]
FIXED_LIMIT = tl.constexpr(2.0**51)  # a single term saturates here instead of overflowing


@triton.jit
def to_fixed(value, scale):
    # Scaling by a power of two is exact, so fp32 arithmetic loses nothing of `value` here. From 2^23 on numbers are
    # whole, and adding a half would round odd ones up.
    scaled = tl.minimum(tl.maximum(value * scale, -FIXED_LIMIT), FIXED_LIMIT)
    return tl.floor(scaled + tl.where(tl.abs(scaled) < 8388608.0, 0.5, 0.0)).to(tl.int64)


@triton.jit
def from_fixed(total, scale):
    return (total.to(tl.float64) / scale).to(tl.float32)


@triton.jit
def mean_from_fixed(total, scale, count):
    return (total.to(tl.float64) / scale / count.to(tl.float64)).to(tl.float32)


@triton.jit
def clamp(value, low, high):
    # A NaN passes, which minimum and maximum would drop.
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def is_finite(value):
    # Not by value - value: where value is a product, the compiler makes both one instruction, whose result is what the
    # product's rounding lost, and not 0.
    return tl.abs(value) < float("inf")


@triton.jit
def exponential(value):
    """exp(value) to a few units in the last place.

    The hardware's exponential loses accuracy in proportion to |value|, and importance ratios reach exp(20). Here it
    sees only the remainder of a division by ln 2, whose multiples are powers of two, which are exact.
    """
    bounded = clamp(value, -104.0, 89.0)
    quotient = tl.floor(bounded * 1.4426950408889634 + 0.5)
    # ln 2 in two parts: products with the first, which has nine bits, are exact.
    remainder = bounded - quotient * 0.693359375 + quotient * 2.12194440e-4
    # In two factors, because 2^128 and 2^-150 are no fp32 numbers.
    half = tl.floor(quotient * 0.5)
    return tl.exp(remainder) * power_of_two(half) * power_of_two(quotient - half)


@triton.jit
def power_of_two(exponent):
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def double_from_bits(bits):
    # Triton passes a Python float as fp32. Ratios that select a token must be doubles, as in the reference
    # implementation.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def boundary(boundaries, index, tokens):
    # Clamped into the arrays: a kernel cannot raise on bad values, and must not read outside.
    return tl.minimum(tl.maximum(tl.load(boundaries + index), 0), tokens)


@triton.jit
def token_range(boundaries, response, tokens):
    """First token of a response, and the end behind its last one."""
    if boundaries is None:
        begin = response.to(tl.int64) * tokens
        end = begin + tokens
    else:
        begin = boundary(boundaries, response, tokens).to(tl.int64)
        end = boundary(boundaries, response + 1, tokens).to(tl.int64)
    return begin, end


@triton.jit
def first_slot(boundaries, response, tokens, BLOCK: tl.constexpr):
    """First of the slots (see :func:`num_slots`) of a response."""
    if boundaries is None:
        slot = response.to(tl.int64) * tl.maximum(tl.cdiv(tokens, BLOCK), 1)
    else:
        slot = boundary(boundaries, response, tokens).to(tl.int64) // BLOCK + response
    return slot


@triton.jit
def response_of_slot(boundaries, slot, batch, tokens, BLOCK: tl.constexpr):
    if boundaries is None:
        response = slot // tl.maximum(tl.cdiv(tokens, BLOCK), 1)
    else:
        # Count the responses that begin at or before the slot: a few wide loads, where a binary search would wait
        # for memory in every step.
        SEARCH: tl.constexpr = 256
        response = tl.zeros((), tl.int32)
        for start in range(1, batch, SEARCH):
            other = start + tl.arange(0, SEARCH)
            inside = other < batch
            begin = tl.load(boundaries + other, mask=inside, other=0)
            begin = tl.minimum(tl.maximum(begin, 0), tokens)
            response += tl.sum((inside & (begin // BLOCK + other <= slot)).to(tl.int32))
    return response


@triton.jit
def slot_range(boundaries, slot, batch, tokens, BLOCK: tl.constexpr):
    """Response of a slot, the slot's first token, and the end of the response's tokens."""
    response = response_of_slot(boundaries, slot, batch, tokens, BLOCK)
    begin, end = token_range(boundaries, response, tokens)
    block = tl.maximum(slot - first_slot(boundaries, response, tokens, BLOCK), 0)
    return response, begin + block * BLOCK, end


def num_slots(tokens: int, batch: int, cu_seqlens: Tensor | None, block: int) -> int:
    """Return how many slots a batch has: blocks of ``block`` tokens that never straddle two responses.

    A packed response i owns the slots from ``cu_seqlens[i] // block + i`` to the next response's: enough for its
    tokens, at least one, none shared. So the host knows their number without reading the boundaries from the device.

    Args:
        tokens: T of a padded batch, N of a packed one.
        batch: B.
        cu_seqlens: Boundaries of a packed batch.
        block: Tokens a slot.

    """
    if cu_seqlens is None:
        return batch * max(-(-tokens // block), 1)
    return tokens // block + batch


def extent(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Return B, and T of a padded ``[B, T]`` or N of a packed ``[N]`` mask."""
    batch = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return batch, mask.shape[-1]


def is_per_response(values: Tensor, batch: int) -> bool:
    """Whether there is one value per response. A vector of B values means that, also where B = N."""
    return values.dim() == 1 and values.shape[0] == batch


# ---- registration -----------------------------------------------------------------------------------------------

INTERPRETED = not isinstance(is_finite, triton.runtime.JITFunction)


def wrap_triton(kernel: Any) -> Any:
    """Let ``torch.compile`` see a launch. Interpreted kernels compute in Python, which it cannot see."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


# How schemas spell types, and Python does.
ANNOTATIONS = {
    "Tensor": Tensor,
    "Optional[Tensor]": Tensor | None,
    "List[float]": list[float],
    "float": float,
    "int": int,
    "bool": bool,
}


def operator(launcher: Callable[..., Any]) -> Any:
    """Make a launcher the operator ``torch.ops.vgpo_kernels_triton.<name>``, which ``torch.compile`` traces into.

    Schema, fake kernel and gradients are those of the operator of its name; the launcher declares the arguments that it
    reads. Interpreted kernels compute on the host and cannot be traced: there the operator is opaque.
    """
    if INTERPRETED:
        return opaque_operator(launcher.__name__, launcher)
    definition = registry.OPERATORS[launcher.__name__]
    bound: Any = registry.by_name(launcher, definition.arguments)
    # torch reads the schema of an operator that it traces into from annotations.
    schema = definition.compiled._schema  # type: ignore[attr-defined]
    bound.__signature__ = inspect.Signature(
        [
            inspect.Parameter(one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=ANNOTATIONS[str(one.type)])
            for one in schema.arguments
        ],
        return_annotation=Tensor if len(schema.returns) == 1 else tuple[(Tensor,) * len(schema.returns)],  # type: ignore[misc]
    )
    registered = torch.library.triton_op(f"vgpo_kernels_triton::{launcher.__name__}", bound, mutates_args=())
    return _completed(registered, definition)


def opaque_operator(name: str, implementation: Callable[..., Any]) -> Any:
    """Make Python that calls kernels the operator ``torch.ops.vgpo_kernels_triton.<name>``, not to be traced into."""
    definition = registry.OPERATORS[name]
    bound = registry.by_name(implementation, definition.arguments)
    registered = torch.library.custom_op(
        f"vgpo_kernels_triton::{name}", bound, mutates_args=(), schema=definition.signature
    )
    return _completed(registered, definition)


def _completed(registered: Any, definition: registry.Operator) -> Any:
    """Give an operator the fake kernel and the gradients of its definition."""
    registered.register_fake(definition.fake)
    if definition.backward is not None:
        registered.register_autograd(definition.backward, setup_context=definition.setup_context)
    if definition.floats:
        registry.define_dynamic(definition, registered._opoverload)
    return registered


def device_guard(tensor: Tensor) -> AbstractContextManager[None]:
    """Make a tensor's GPU the current one: Triton launches on that."""
    if INTERPRETED or tensor.device.type == "cpu" or not torch.accelerator.is_available():
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)  # type: ignore[no-any-return]


def architecture() -> str:
    """Return the key of block-size tables for the GPU that Triton compiles for.

    Devices that no table knows (Intel's, Ascend's) take the smallest blocks of NVIDIA's GPUs.
    """
    if INTERPRETED:
        return "sm90"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx9"
    return "sm80" if target.backend != "cuda" or target.arch < 90 else "sm90" if target.arch < 100 else "sm100"


def warps_of(threads: int) -> int:
    """Return the number of warps (wavefronts on AMD) of so many threads."""
    return threads // (64 if architecture() == "gfx9" else 32)

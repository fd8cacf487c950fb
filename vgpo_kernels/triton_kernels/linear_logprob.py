"""Epilogues of an LM head's matrix products in Triton: statistics of a chunk's logits, and their gradient in place.

The products are torch's (cuBLAS, hipBLASLt): fp32 results from 16-bit inputs. A program goes over a row of the chunk
once, in blocks, and keeps the running maximum and sums.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.ops import linear_logprob as head_ops
from vgpo_kernels.ops import linear_vgpo_loss as loss_ops
from vgpo_kernels.ops.lm_head import HeadKernels
from vgpo_kernels.reference.linear_logprob import gradient_of
from vgpo_kernels.triton_kernels.common import device_guard, opaque_operator
from vgpo_kernels.triton_kernels.policy_loss import policy_loss

# Logits of a block, and warps that share it: 16 registers per thread, and enough loads in flight.
BLOCK = 4096
WARPS = 8

# Below this, exp() is zero. With a finite bound, zero times the distance is zero, not NaN.
FARTHEST = tl.constexpr(-128.0)


@triton.jit
def hyperbolic_tangent(x):
    """Tanh to a few units in the last place, also of small numbers, where the form with exponentials would cancel."""
    square = x * x
    series = (((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square) + 1.33314422036e-1
    small = x + x * square * (series * square - 3.33332819422e-1)
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude >= 0.625, tl.where(x < 0.0, -large, large), small)


@triton.jit
def bounded_of(products, bias, columns, inside, squeeze, CAPPED: tl.constexpr):
    """Products of a block's columns plus bias, and with a cap the tanh of them: logits but for the row's factor."""
    bounded = tl.load(products + columns, mask=inside, other=0.0)
    if bias is not None:
        bounded += tl.load(bias + columns, mask=inside, other=0.0)
    if CAPPED:
        bounded = hyperbolic_tangent(bounded * squeeze)
    return bounded


@triton.jit
def factor_of(factor, temperatures, row):
    """What a row's products, or their tanh, are multiplied by."""
    if temperatures is not None:
        factor = factor / tl.load(temperatures + row)
    return factor


@triton.jit
def column_of(target, first):
    """Column of a target, -1 if it is before the first one. No difference overflows, whatever the target is."""
    return tl.where(target >= first, tl.maximum(target, 0) - first, -1)


# Columns and the strides of rows are specialised: of multiples of 16 Triton makes vectors of 16 bytes.
@triton.jit(do_not_specialize=["first", "statistics_stride"])
def head_statistics_kernel(
    logits,  # [N, V] fp32: hidden @ weight.T
    bias,  # [V] or None
    targets,  # [N]
    statistics,  # [4, N], updated; [5, N] with SQUARES
    columns,
    first,
    temperatures,  # [N] or None
    factor,  # of products, or of a cap's tanh
    squeeze,  # of products inside the tanh
    row_stride,
    statistics_stride,
    CAPPED: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products = logits + row * row_stride
    factor = factor_of(factor, temperatures, row)
    maximum = tl.load(statistics + row)
    total = tl.load(statistics + statistics_stride + row)
    weighted = tl.load(statistics + 2 * statistics_stride + row)
    if SQUARES:
        squares = tl.load(statistics + 4 * statistics_stride + row)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        inside = column < columns
        bounded = bounded_of(products, bias, column, inside, squeeze, CAPPED)
        block = tl.where(inside, bounded * factor, -float("inf"))
        largest = tl.maximum(maximum, tl.max(block, 0))
        # A bias of minus infinity may have excluded every entry so far: then distances have no origin.
        origin = tl.where(largest == -float("inf"), 0.0, largest)
        drop = tl.where(total > 0.0, maximum - origin, 0.0)
        distance = block - origin
        share = tl.exp(distance)
        scale = tl.exp(drop)
        weighted = (weighted + total * drop) * scale + tl.sum(share * tl.maximum(distance, FARTHEST), 0)
        total = total * scale + tl.sum(share, 0)
        if SQUARES:
            squares = squares * scale * scale + tl.sum(share * share, 0)
        maximum = largest
    tl.store(statistics + row, maximum)
    tl.store(statistics + statistics_stride + row, total)
    tl.store(statistics + 2 * statistics_stride + row, weighted)
    if SQUARES:
        tl.store(statistics + 4 * statistics_stride + row, squares)
    target = column_of(tl.load(targets + row), first)
    own = (target >= 0) & (target < columns)
    logit = bounded_of(products, bias, target, own, squeeze, CAPPED) * factor
    tl.store(statistics + 3 * statistics_stride + row, logit, mask=own)


@triton.jit(do_not_specialize=["first", "coefficients_stride"])
def head_gradient_kernel(
    logits,  # [N, V] fp32: hidden @ weight.T
    gradient,  # [N, V], each row at the beginning of the logits' row
    bias,  # [V] or None
    targets,  # [N]
    coefficients,  # [5, N]: maximum, log_sum, scale, slope, at_target
    columns,
    first,
    temperatures,  # [N] or None
    factor,  # of products, or of a cap's tanh
    squeeze,  # of products inside the tanh
    row_stride,
    gradient_stride,
    coefficients_stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    products = logits + row * row_stride
    factor = factor_of(factor, temperatures, row)
    maximum = tl.load(coefficients + row)
    log_sum = tl.load(coefficients + coefficients_stride + row)
    level = tl.load(coefficients + 2 * coefficients_stride + row)
    slope = tl.load(coefficients + 3 * coefficients_stride + row)
    at_target = tl.load(coefficients + 4 * coefficients_stride + row)
    target = column_of(tl.load(targets + row), first)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        inside = column < columns
        bounded = bounded_of(products, bias, column, inside, squeeze, CAPPED)
        log_probability = bounded * factor - maximum - log_sum
        value = tl.exp(log_probability) * (level + slope * tl.maximum(log_probability, FARTHEST))
        value += tl.where(column == target, at_target, 0.0)
        if CAPPED:
            value *= 1.0 - bounded * bounded
        # 16-bit numbers overwrite fp32 ones that other threads may still have to read, but only those of this block.
        tl.debug_barrier()
        tl.store(gradient + row * gradient_stride + column, value.to(gradient.dtype.element_ty), mask=inside)


def factors(temperature: float, logit_scale: float, softcap: float) -> tuple[float, float]:
    """Return what products are multiplied by after a cap and inside it (0: there is none)."""
    return ((softcap or logit_scale) / temperature, logit_scale / softcap if softcap else 0.0)


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    statistics: Tensor,
    logits: Tensor,
    keep: bool,
) -> None:
    """Launch the product of a chunk and the statistics of its logits, which are kept whether ``keep`` is set or not."""
    checks.require_separate_rows("statistics", statistics)
    checks.require_separate_rows("logits", logits)
    head_product(hidden, weight.T, logits, False)
    rows, columns = logits.shape
    with device_guard(logits):
        head_statistics_kernel[(rows,)](
            logits,
            bias,
            targets,
            statistics,
            columns,
            first,
            temperatures,
            *factors(temperature, logit_scale, softcap),
            logits.stride(0),
            statistics.stride(0),
            CAPPED=softcap != 0,
            SQUARES=statistics.shape[0] == 5,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    coefficients: Tensor,
    logits: Tensor,
    recompute: bool,
) -> None:
    """Launch the product of a chunk, unless it is there, and its gradient, which overwrites it."""
    checks.require_separate_rows("logits", logits)
    if recompute:
        head_product(hidden, weight.T, logits, False)
    gradient = gradient_of(logits, hidden.dtype)
    rows, columns = logits.shape
    with device_guard(logits):
        head_gradient_kernel[(rows,)](
            logits,
            gradient,
            bias,
            targets,
            coefficients,
            columns,
            first,
            temperatures,
            *factors(temperature, logit_scale, softcap),
            logits.stride(0),
            gradient.stride(0),
            coefficients.stride(0),
            CAPPED=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def head_product(left: Tensor, right: Tensor, result: Tensor, accumulate: bool) -> None:
    """Write ``left @ right`` to ``result`` in fp32, or add it."""
    checks.require_separate_rows("result", result)
    if left.device.type == "cpu":  # interpreted: torch multiplies 16-bit numbers into 16 bits there
        left, right = left.float(), right.float()
    if left.dtype == torch.float32:
        result.addmm_(left, right, beta=float(accumulate))
    elif not accumulate:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=result)
    elif not _add_product(left, right, result):
        result += torch.mm(left, right, out_dtype=torch.float32)


# Whether addmm has refused an fp32 matrix to add the product of 16-bit ones to. Torch's releases differ in that; they
# check before they compute, so the first call finds out.
_refused = False


def _add_product(left: Tensor, right: Tensor, result: Tensor) -> bool:
    """Add ``left @ right``, of 16-bit matrices, to an fp32 matrix where it lies; return whether that is done."""
    global _refused
    # A single row may be taken for a bias, which a kernel would read while it writes the row.
    if result.shape[0] == 1 or _refused:
        return False
    try:
        torch.ops.aten.addmm.dtype_out(result, left, right, torch.float32, out=result)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # where the product itself fails, its next call says why
        _refused = True
        return False
    return True


KERNELS = HeadKernels(head_statistics, head_gradient, head_product, policy_loss, half=True, packs=False)


linear_logprob = opaque_operator("linear_logprob", partial(head_ops.compute, KERNELS))
linear_logprob_keeping = opaque_operator("linear_logprob_keeping", partial(head_ops.compute_keeping, KERNELS))
linear_logprob_backward = opaque_operator("linear_logprob_backward", partial(head_ops.compute_backward, KERNELS))
linear_policy_loss = opaque_operator("linear_policy_loss", partial(loss_ops.compute, KERNELS))

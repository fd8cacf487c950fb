"""Epilogues of an LM head's matrix products for two views of every token in Triton.

A program goes over both rows of a pair once, in blocks. What it computes is what csrc/logit_statistics.h and
csrc/cuda/linear_divergence.cuh do.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.ops import linear_divergence as divergence_ops
from vgpo_kernels.ops.paired_head import PairKernels
from vgpo_kernels.reference.linear_logprob import gradient_of
from vgpo_kernels.triton_kernels import linear_logprob
from vgpo_kernels.triton_kernels.common import device_guard, opaque_operator
from vgpo_kernels.triton_kernels.linear_logprob import FARTHEST, bounded_of, column_of, factor_of, factors

# Logits of a block, of each view, and warps that share it.
BLOCK = 2048
WARPS = 8


@triton.jit
def logits_of(products, bias, columns, inside, factor, squeeze, CAPPED: tl.constexpr):
    """Logits of a block's columns, minus infinity behind the last one."""
    bounded = bounded_of(products, bias, columns, inside, squeeze, CAPPED)
    return tl.where(inside, bounded * factor, -float("inf"))


@triton.jit
def at_least(value, bound):
    """The larger one. A NaN passes, which tl.maximum would drop."""
    return tl.where(value < bound, bound, value)


@triton.jit
def origin_of(maximum):
    """What logits are measured from. Of minus infinities alone there is nothing to measure from."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def moved(total, weighted, distance, drop, other_drop):
    """Sums of a view measured from a larger logit, which lies ``-drop`` higher."""
    scale = tl.exp(drop)
    # What has no weight any more, or never had any, may be infinitely far apart.
    counts = (total > 0.0) & (total * scale > 0.0)
    distance = tl.where(counts, (distance + total * (drop - other_drop)) * scale, 0.0)
    return total * scale, (weighted + total * drop) * scale, distance


@triton.jit
def apart(share, own, other):
    """Their difference times the share, and nothing without one: both may be infinitely far away."""
    return tl.where(share > 0.0, share * (own - other), 0.0)


# Columns and the stride of logits are specialised: of multiples of 16 Triton makes vectors of 16 bytes.
@triton.jit(do_not_specialize=["first", "sums_stride"])
def pair_statistics_kernel(
    logits,  # [2 n, V] fp32: products of both views in turn
    bias,  # [V] or None
    other_bias,  # [V] or None
    targets,  # [n]
    sums,  # [11, n], updated
    columns,
    first,
    temperatures,  # [n] or None
    factor,  # of products, or of a cap's tanh
    squeeze,  # of products inside the tanh
    row_stride,
    sums_stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    products = logits + 2 * pair * row_stride
    other_products = products + row_stride
    factor = factor_of(factor, temperatures, pair)
    running = sums + pair
    maximum = tl.load(running)
    total = tl.load(running + sums_stride)
    weighted = tl.load(running + 2 * sums_stride)
    other_maximum = tl.load(running + 4 * sums_stride)
    other_total = tl.load(running + 5 * sums_stride)
    other_weighted = tl.load(running + 6 * sums_stride)
    distance = tl.load(running + 8 * sums_stride)
    other_distance = tl.load(running + 9 * sums_stride)
    root = tl.load(running + 10 * sums_stride)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        inside = column < columns
        block = logits_of(products, bias, column, inside, factor, squeeze, CAPPED)
        other_block = logits_of(other_products, other_bias, column, inside, factor, squeeze, CAPPED)
        largest = tl.maximum(maximum, tl.max(block, 0))
        other_largest = tl.maximum(other_maximum, tl.max(other_block, 0))
        origin, other_origin = origin_of(largest), origin_of(other_largest)
        drop, other_drop = origin_of(maximum) - origin, origin_of(other_maximum) - other_origin
        # Nothing so far is not to be rescaled: its maximum may be infinitely far away.
        drop, other_drop = tl.where(total > 0.0, drop, 0.0), tl.where(other_total > 0.0, other_drop, 0.0)
        root = tl.where(root == 0.0, 0.0, root * tl.exp(0.5 * (drop + other_drop)))
        total, weighted, distance = moved(total, weighted, distance, drop, other_drop)
        other_total, other_weighted, other_distance = moved(
            other_total, other_weighted, other_distance, other_drop, drop
        )
        a, b = block - origin, other_block - other_origin
        # Exponentials of half give those of the whole and of their mean.
        half_a, half_b = tl.exp(0.5 * a), tl.exp(0.5 * b)
        share, other_share = half_a * half_a, half_b * half_b
        total += tl.sum(share, 0)
        weighted += tl.sum(share * tl.maximum(a, FARTHEST), 0)
        distance += tl.sum(apart(share, a, b), 0)
        other_total += tl.sum(other_share, 0)
        other_weighted += tl.sum(other_share * tl.maximum(b, FARTHEST), 0)
        other_distance += tl.sum(apart(other_share, b, a), 0)
        root += tl.sum(half_a * half_b, 0)
        maximum, other_maximum = largest, other_largest
    tl.store(running, maximum)
    tl.store(running + sums_stride, total)
    tl.store(running + 2 * sums_stride, weighted)
    tl.store(running + 4 * sums_stride, other_maximum)
    tl.store(running + 5 * sums_stride, other_total)
    tl.store(running + 6 * sums_stride, other_weighted)
    tl.store(running + 8 * sums_stride, distance)
    tl.store(running + 9 * sums_stride, other_distance)
    tl.store(running + 10 * sums_stride, root)
    target = column_of(tl.load(targets + pair), first)
    own = (target >= 0) & (target < columns)
    logit = bounded_of(products, bias, target, own, squeeze, CAPPED) * factor
    other_logit = bounded_of(other_products, other_bias, target, own, squeeze, CAPPED) * factor
    tl.store(running + 3 * sums_stride, logit, mask=own)
    tl.store(running + 7 * sums_stride, other_logit, mask=own)


@triton.jit
def to_mixture(x, y, beta):
    """Log m - x and log m - y, where m is the mixture of two probabilities with the logarithms x and y."""
    difference = y - x
    other_is_larger = difference > 0.0
    # The smaller one over the larger; m over the larger lies between beta and one.
    ratio = tl.exp(-tl.abs(difference))
    rest = 1.0 - beta
    log = tl.log(tl.where(other_is_larger, beta * ratio + rest, rest * ratio + beta))
    return log + tl.where(other_is_larger, difference, 0.0), log - tl.where(other_is_larger, 0.0, difference)


@triton.jit
def sign_of(x, y):
    """1 where the first is larger, -1 where the second is, 0 where neither is."""
    return tl.where(x > y, 1.0, tl.where(y > x, -1.0, 0.0))


@triton.jit(do_not_specialize=["sums_stride", "totals_stride"])
def pair_shares_kernel(
    logits,  # [2 n, V] fp32: products of both views in turn
    bias,  # [V] or None
    other_bias,  # [V] or None
    totals,  # [4, n]: maximum and log-sum of both views
    sums,  # [4, n], updated
    columns,
    temperatures,  # [n] or None
    factor,  # of products, or of a cap's tanh
    squeeze,  # of products inside the tanh
    beta,
    row_stride,
    totals_stride,
    sums_stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    products = logits + 2 * pair * row_stride
    other_products = products + row_stride
    factor = factor_of(factor, temperatures, pair)
    maximum = tl.load(totals + pair)
    log_sum = tl.load(totals + totals_stride + pair)
    other_maximum = tl.load(totals + 2 * totals_stride + pair)
    other_log_sum = tl.load(totals + 3 * totals_stride + pair)
    js_p = tl.zeros((BLOCK,), tl.float32)
    js_q = tl.zeros((BLOCK,), tl.float32)
    tv = tl.zeros((BLOCK,), tl.float32)
    signs = tl.zeros((BLOCK,), tl.float32)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        inside = column < columns
        block = logits_of(products, bias, column, inside, factor, squeeze, CAPPED)
        other_block = logits_of(other_products, other_bias, column, inside, factor, squeeze, CAPPED)
        x = at_least(block - maximum - log_sum, FARTHEST)
        y = at_least(other_block - other_maximum - other_log_sum, FARTHEST)
        p, q = tl.exp(x), tl.exp(y)
        away, other_away = to_mixture(x, y, beta)
        js_p -= p * away
        js_q -= q * other_away
        tv += tl.abs(p - q)
        signs += p * sign_of(x, y)
    of_p, of_q = tl.sum(js_p, 0), tl.sum(js_q, 0)
    running = sums + pair
    tl.store(running, tl.load(running) + beta * of_p + (1.0 - beta) * of_q)
    tl.store(running + sums_stride, tl.load(running + sums_stride) + 0.5 * tl.sum(tv, 0))
    tl.store(running + 2 * sums_stride, tl.load(running + 2 * sums_stride) + of_p)
    tl.store(running + 3 * sums_stride, tl.load(running + 3 * sums_stride) + tl.sum(signs, 0))


@triton.jit
def five(values, stride):
    """Return the first five of values ``stride`` apart."""
    first, second, third = tl.load(values), tl.load(values + stride), tl.load(values + 2 * stride)
    return first, second, third, tl.load(values + 3 * stride), tl.load(values + 4 * stride)


@triton.jit
def gradient_of_view(c0, c1, c2, c3, c4, own, other, share, other_share, root):
    """What the first five coefficients of a view make of a block."""
    return share * (c0 + c1 * own + c2 * (own - other)) + c3 * other_share + c4 * root


@triton.jit(do_not_specialize=["first", "coefficients_stride"])
def pair_gradient_kernel(
    logits,  # [2 n, V] fp32: products of both views in turn
    gradient,  # [2 n, V], each row at the beginning of the logits' row
    bias,  # [V] or None
    other_bias,  # [V] or None
    targets,  # [n]
    coefficients,  # [20, n]: maximum and log-sum of both views, c0 to c7 of each
    columns,
    first,
    temperatures,  # [n] or None
    factor,  # of products, or of a cap's tanh
    squeeze,  # of products inside the tanh
    beta,
    row_stride,
    gradient_stride,
    coefficients_stride,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    products = logits + 2 * pair * row_stride
    other_products = products + row_stride
    factor = factor_of(factor, temperatures, pair)
    maximum = tl.load(coefficients + pair)
    log_sum = tl.load(coefficients + coefficients_stride + pair)
    other_maximum = tl.load(coefficients + 2 * coefficients_stride + pair)
    other_log_sum = tl.load(coefficients + 3 * coefficients_stride + pair)
    c = coefficients + 4 * coefficients_stride + pair
    d = c + 8 * coefficients_stride
    c0, c1, c2, c3, c4 = five(c, coefficients_stride)
    d0, d1, d2, d3, d4 = five(d, coefficients_stride)
    c5, c6 = tl.load(c + 5 * coefficients_stride), tl.load(c + 6 * coefficients_stride)
    d5, d6 = tl.load(d + 5 * coefficients_stride), tl.load(d + 6 * coefficients_stride)
    shares = (c5 != 0.0) | (c6 != 0.0) | (d5 != 0.0) | (d6 != 0.0)
    at_target = tl.load(c + 7 * coefficients_stride)
    other_at_target = tl.load(d + 7 * coefficients_stride)
    target = column_of(tl.load(targets + pair), first)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, columns, BLOCK):
        column = begin + lanes
        inside = column < columns
        bounded = bounded_of(products, bias, column, inside, squeeze, CAPPED)
        other_bounded = bounded_of(other_products, other_bias, column, inside, squeeze, CAPPED)
        x = at_least(bounded * factor - maximum - log_sum, FARTHEST)
        y = at_least(other_bounded * factor - other_maximum - other_log_sum, FARTHEST)
        half_x, half_y = tl.exp(0.5 * x), tl.exp(0.5 * y)
        p, q, root = half_x * half_x, half_y * half_y, half_x * half_y
        value = gradient_of_view(c0, c1, c2, c3, c4, x, y, p, q, root)
        other_value = gradient_of_view(d0, d1, d2, d3, d4, y, x, q, p, root)
        if shares:
            away, other_away = to_mixture(x, y, beta)
            sign = sign_of(x, y)
            value += p * (c6 * sign - c5 * away)
            other_value += q * (d6 * sign - d5 * other_away)
        value += tl.where(column == target, at_target, 0.0)
        other_value += tl.where(column == target, other_at_target, 0.0)
        if CAPPED:
            value *= 1.0 - bounded * bounded
            other_value *= 1.0 - other_bounded * other_bounded
        # 16-bit numbers overwrite fp32 ones that other threads may still have to read, but only those of this block.
        tl.debug_barrier()
        own_row = gradient + 2 * pair * gradient_stride + column
        tl.store(own_row, value.to(gradient.dtype.element_ty), mask=inside)
        tl.store(own_row + gradient_stride, other_value.to(gradient.dtype.element_ty), mask=inside)


def pair_statistics(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    sums: Tensor,
    logits: Tensor,
    recompute: bool,
) -> None:
    """Launch the product of a chunk of pairs, unless it is there, and the sums over its logits."""
    checks.require_separate_rows("sums", sums)
    _multiply(rows, weight, logits, recompute)
    with device_guard(logits):
        pair_statistics_kernel[(logits.shape[0] // 2,)](
            logits,
            bias,
            other_bias,
            targets,
            sums,
            logits.shape[1],
            first,
            temperatures,
            *factors(temperature, logit_scale, softcap),
            logits.stride(0),
            sums.stride(0),
            CAPPED=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def pair_shares(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    totals: Tensor,
    js_beta: float,
    sums: Tensor,
    logits: Tensor,
    recompute: bool,
) -> None:
    """Launch the product of a chunk of pairs, unless it is there, and its shares in sums over the vocabulary."""
    checks.require_separate_rows("sums", sums)
    _multiply(rows, weight, logits, recompute)
    with device_guard(logits):
        pair_shares_kernel[(logits.shape[0] // 2,)](
            logits,
            bias,
            other_bias,
            totals,
            sums,
            logits.shape[1],
            temperatures,
            *factors(temperature, logit_scale, softcap),
            js_beta,
            logits.stride(0),
            totals.stride(0),
            sums.stride(0),
            CAPPED=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def pair_gradient(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    targets: Tensor,
    first: int,
    temperature: float,
    temperatures: Tensor | None,
    logit_scale: float,
    softcap: float,
    coefficients: Tensor,
    js_beta: float,
    logits: Tensor,
    recompute: bool,
) -> None:
    """Launch the product of a chunk of pairs, unless it is there, and its gradient, which overwrites it."""
    _multiply(rows, weight, logits, recompute)
    gradient = gradient_of(logits, rows.dtype)
    with device_guard(logits):
        pair_gradient_kernel[(logits.shape[0] // 2,)](
            logits,
            gradient,
            bias,
            other_bias,
            targets,
            coefficients,
            logits.shape[1],
            first,
            temperatures,
            *factors(temperature, logit_scale, softcap),
            js_beta,
            logits.stride(0),
            gradient.stride(0),
            coefficients.stride(0),
            CAPPED=softcap != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _multiply(rows: Tensor, weight: Tensor, logits: Tensor, recompute: bool) -> None:
    checks.require_separate_rows("logits", logits)
    if recompute:
        linear_logprob.head_product(rows, weight.T, logits, False)


KERNELS = PairKernels(linear_logprob.KERNELS, pair_statistics, pair_shares, pair_gradient)


linear_divergence = opaque_operator("linear_divergence", partial(divergence_ops.compute, KERNELS))
linear_divergence_backward = opaque_operator(
    "linear_divergence_backward", partial(divergence_ops.compute_backward, KERNELS)
)

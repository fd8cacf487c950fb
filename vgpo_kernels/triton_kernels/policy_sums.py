"""Sums of the policy losses in Triton: a row of partial results for each block of tokens, then loss and metrics."""

from __future__ import annotations

import triton
import triton.language as tl

from vgpo_kernels.ops.policy_loss import POLICY_METRICS
from vgpo_kernels.triton_kernels.common import is_finite
from vgpo_kernels.triton_kernels.visual_weights import field_of, store_focus_metrics

# Columns of a block's partial results, fp32 [slots, PARTIALS]: the metrics in their order up to the number of tokens,
# then the loss. The first metric is the sum of the next two, so that its place is free for the last one.
PARTIALS = tl.constexpr(16)
NONFINITE = tl.constexpr(0)
CLIPPED_LOW = tl.constexpr(1)
CLIPPED_HIGH = tl.constexpr(2)
DUAL_CLIPPED = tl.constexpr(3)
RATIO_SUM = tl.constexpr(4)
RATIO_MIN = tl.constexpr(5)
RATIO_MAX = tl.constexpr(6)
OLD_KL_SUM = tl.constexpr(7)
REF_KL_SUM = tl.constexpr(8)
ENTROPY_SUM = tl.constexpr(9)
FACTOR_MEAN = tl.constexpr(10)  # of the block
FACTOR_MIN = tl.constexpr(11)
FACTOR_MAX = tl.constexpr(12)
FACTOR_STD = tl.constexpr(13)  # of the block
COUNT = tl.constexpr(14)
LOSS = tl.constexpr(15)
METRICS = tl.constexpr(len(POLICY_METRICS))


@triton.jit
def store_partials(partial, valid, value, ratio, old_kl, kl, bonus, factor, below, above, dual, broken):
    """Reduce a block of tokens to its row of partial results."""
    count = tl.sum(valid.to(tl.int32)).to(tl.float32)
    # Measured from one of the factors, so that equal ones deviate by nothing; in fp64, where no square overflows.
    smallest_factor = tl.min(tl.where(valid, factor, float("inf")))
    origin = tl.where(is_finite(smallest_factor), smallest_factor, 0.0)
    deviation = tl.where(valid, factor - origin, 0.0).to(tl.float64)
    offset = tl.sum(deviation) / tl.maximum(count, 1.0)
    centred = tl.where(valid, deviation - offset, 0.0)
    variance = tl.sum(centred * centred) / tl.maximum(count, 1.0)
    tl.store(partial + NONFINITE, tl.sum((valid & broken).to(tl.int32)).to(tl.float32))
    tl.store(partial + CLIPPED_LOW, tl.sum((valid & below).to(tl.int32)).to(tl.float32))
    tl.store(partial + CLIPPED_HIGH, tl.sum((valid & above).to(tl.int32)).to(tl.float32))
    tl.store(partial + DUAL_CLIPPED, tl.sum((valid & dual).to(tl.int32)).to(tl.float32))
    tl.store(partial + RATIO_SUM, tl.sum(tl.where(valid, ratio, 0.0)))
    tl.store(partial + RATIO_MIN, tl.min(tl.where(valid, ratio, float("inf"))))
    tl.store(partial + RATIO_MAX, tl.max(tl.where(valid, ratio, -float("inf"))))
    tl.store(partial + OLD_KL_SUM, tl.sum(tl.where(valid, old_kl, 0.0)))
    tl.store(partial + REF_KL_SUM, tl.sum(tl.where(valid, kl, 0.0)))
    tl.store(partial + ENTROPY_SUM, tl.sum(tl.where(valid, bonus, 0.0)))
    tl.store(partial + FACTOR_MEAN, (origin + offset).to(tl.float32))
    tl.store(partial + FACTOR_MIN, smallest_factor)
    tl.store(partial + FACTOR_MAX, tl.max(tl.where(valid, factor, -float("inf"))))
    tl.store(partial + FACTOR_STD, tl.sqrt(variance).to(tl.float32))
    tl.store(partial + COUNT, count)
    tl.store(partial + LOSS, tl.sum(tl.where(valid, value, 0.0)))


@triton.jit(do_not_specialize=["slots", "batch"])
def reduce_kernel(
    partials,  # [slots, PARTIALS]
    statistics,  # [B, STATISTICS] or None
    groups,  # [B] or None
    loss,  # out: []
    metrics,  # out: [METRICS] or, with statistics, the focus metrics behind them
    slots,
    batch,
):
    BLOCK: tl.constexpr = 64
    field = tl.arange(0, PARTIALS)
    sums = tl.zeros((BLOCK, PARTIALS), tl.float64)
    least = tl.full((BLOCK, PARTIALS), float("inf"), tl.float32)
    most = tl.full((BLOCK, PARTIALS), -float("inf"), tl.float32)
    # Of the factors that each of BLOCK rows of slots has seen: number, mean, and squared deviations from the mean.
    seen = tl.zeros((BLOCK,), tl.float64)
    mean_seen = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < slots
        row = partials + slot.to(tl.int64) * PARTIALS
        present = inside[:, None] & (field >= 0)[None, :]
        values = tl.load(row[:, None] + field[None, :], mask=present, other=0.0)
        least = tl.where(present, tl.minimum(least, values), least)
        most = tl.where(present, tl.maximum(most, values), most)
        sums += values.to(tl.float64)
        count = tl.load(row + COUNT, mask=inside, other=0.0).to(tl.float64)
        change = tl.load(row + FACTOR_MEAN, mask=inside, other=0.0).to(tl.float64) - mean_seen
        deviation = tl.load(row + FACTOR_STD, mask=inside, other=0.0).to(tl.float64)
        share = count / tl.maximum(seen + count, 1.0)
        spread = count * deviation * deviation + change * change * seen * share
        mean_seen = tl.where(count > 0.0, mean_seen + change * share, mean_seen)
        squares = tl.where(count > 0.0, squares + spread, squares)
        seen += count
    total = tl.sum(sums, 0)
    number = field_of(total, field, COUNT)
    nonfinite = field_of(total, field, NONFINITE)
    clipped = field_of(total, field, CLIPPED_LOW) + field_of(total, field, CLIPPED_HIGH)
    result = tl.where(field == NONFINITE, clipped, total) / tl.maximum(number, 1.0)
    # The rows' means are measured from one of them: equal ones deviate by nothing.
    lowest = tl.min(tl.where(seen > 0.0, mean_seen, float("inf")))
    origin = tl.where(is_finite(lowest), lowest, 0.0)
    deviation = tl.where(seen > 0.0, mean_seen - origin, 0.0)
    offset = tl.sum(seen * deviation) / tl.maximum(number, 1.0)
    centred = tl.where(seen > 0.0, deviation - offset, 0.0)
    variance = tl.sum(squares + seen * centred * centred) / tl.maximum(number, 1.0)
    mean = origin + offset
    result = tl.where(field == FACTOR_MEAN, mean, tl.where(field == FACTOR_STD, tl.sqrt(variance), result))
    smallest, largest = (field == RATIO_MIN) | (field == FACTOR_MIN), (field == RATIO_MAX) | (field == FACTOR_MAX)
    # A smallest or largest value drops NaN on GPUs; the mean has it.
    of_ratio = (field == RATIO_MIN) | (field == RATIO_MAX)
    mean_of_field = tl.where(of_ratio, field_of(result, field, RATIO_SUM), mean)
    extreme = tl.where(smallest, tl.min(least, 0), tl.max(most, 0)).to(tl.float64)
    extreme = tl.where(mean_of_field != mean_of_field, mean_of_field, extreme)
    result = tl.where(smallest | largest, extreme, result)
    result = tl.where(field == COUNT, number, result)
    result = tl.where(tl.zeros_like(result) + number > 0.0, result, 0.0).to(tl.float32)
    tl.store(metrics + field, result, mask=field < LOSS)
    tl.store(metrics + LOSS, nonfinite.to(tl.float32))
    tl.store(loss, field_of(total, field, LOSS).to(tl.float32))
    if statistics is not None:
        store_focus_metrics(statistics, groups, metrics + METRICS, batch)

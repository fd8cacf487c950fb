"""The scalar formulas of the policy losses in Triton, as csrc/loss_math.h defines them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vgpo_kernels.reference.policy_loss import VESPO_FLOOR, VESPO_LIMIT
from vgpo_kernels.triton_kernels.common import clamp, exponential, is_finite

LEAST_LOG_WEIGHT = tl.constexpr(VESPO_FLOOR)
LARGEST_LOG_WEIGHT = tl.constexpr(VESPO_LIMIT)  # and of a token's log-ratio, on both sides
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def exponential_excess(x, power):
    """e^x - 1 - x from x and e^x, by its series where the subtraction would cancel; infinite where x is."""
    series = 1.0 / 5040.0 + x * (1.0 / 40320.0)
    series = 1.0 / 720.0 + x * series
    series = 1.0 / 120.0 + x * series
    series = 1.0 / 24.0 + x * series
    series = 1.0 / 6.0 + x * series
    series = x * x * (0.5 + x * series)
    # Beyond the bound e^x is infinite, from which an infinite x must not be subtracted.
    return tl.where((x < 0.5) & (x > -0.5), series, power - 1.0 - tl.where(x > 128.0, 128.0, x))


@triton.jit
def surrogate(
    ratio,
    constant,  # whether the ratio is: its clamp is active
    logp,
    advantage,
    vespo,  # vespo's weight
    clip_low,
    clip_high,
    dual_clip,  # infinity: none
    tau_positive,
    tau_negative,
    LOSS_TYPE: tl.constexpr,
):
    """A token's surrogate loss, its derivative w.r.t. the log-ratio, and where it was clipped: low, high, dual.

    A constant is told by a mask: a derivative of zero would make NaN of what is infinite.
    """
    below = ratio < clip_low
    above = ratio > clip_high
    clipped_ratio = clamp(ratio, clip_low, clip_high)
    dual = (advantage < 0.0) & (ratio > dual_clip)
    nothing = advantage == 0.0
    if LOSS_TYPE == "sapo":
        tau = tl.where(advantage > 0.0, tau_positive, tau_negative)
        exponent = tau * (ratio - 1.0)
        falling = exponential(-exponent)
        gate = tl.div_rn(1.0, 1.0 + falling)
        # 1 - gate, which cancels where the gate is wide open. There it vanishes faster than any ratio grows.
        closing = tl.where(exponent > 0.0, falling * gate, 1.0 - gate)
        value = tl.where(nothing, 0.0, -advantage * tl.div_rn(gate * 4.0, tau))
        steepness = 4.0 * gate * closing * tl.where(ratio > LARGEST, LARGEST, ratio)
        slope = tl.where(nothing | constant, 0.0, -advantage * steepness)
        below = below & False
        above = above & False
        dual = dual & False
    elif LOSS_TYPE == "cispo":
        slope = tl.where(nothing, 0.0, -advantage * clipped_ratio)
        # A weight of zero makes nothing of any log-prob, also of one of minus infinity.
        value = tl.where(slope == 0.0, 0.0, slope * logp)
        dual = dual & False
    elif LOSS_TYPE == "vespo":
        slope = tl.where(nothing, 0.0, -advantage * vespo)
        value = tl.where(slope == 0.0, 0.0, slope * logp)
        below = below & False
        above = above & False
        dual = dual & False
    else:
        unclipped = -advantage * tl.where(dual, dual_clip, ratio)
        clipped = -advantage * clipped_ratio
        clips = clipped > unclipped
        value = tl.where(nothing, 0.0, tl.where(clips, clipped, unclipped))
        flat = nothing | constant | (clips & (below | above)) | (dual & (clips == 0))
        slope = tl.where(flat, 0.0, -advantage * ratio)
        below = below & (advantage < 0.0)
        above = above & (advantage > 0.0)
    return value, slope, below, above, dual


@triton.jit
def kl_estimate(difference, ESTIMATOR: tl.constexpr):
    """KL to the reference policy from ``difference = ref_logp - logp``, and its derivative w.r.t. logp."""
    if ESTIMATOR == "k1":
        value = -difference
        slope = tl.full(difference.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        value = 0.5 * difference * difference
        slope = -difference
    elif ESTIMATOR == "k3":
        value = exponential_excess(difference, exponential(difference))
        # The slope is 1 - e^difference, which is 1 where minus infinity may stand.
        slope = tl.where(difference < -20.0, 1.0, -(value + difference))
    else:
        bounded = clamp(difference, -20.0, 20.0)
        value = exponential_excess(bounded, exponential(bounded))
        flat = (difference > 20.0) | (difference < -20.0) | (value > 10.0)
        slope = tl.where(flat, 0.0, -(value + bounded))
        value = tl.where(value > 10.0, 10.0, value)
    return value, slope


@triton.jit
def importance_correction(weight, importance_cap, IMPORTANCE_MODE: tl.constexpr):
    capped = importance_cap if IMPORTANCE_MODE == "truncate" else 0.0
    return tl.where(weight > importance_cap, capped, weight)


@triton.jit
def log_importance(weight, importance_cap, IMPORTANCE_MODE: tl.constexpr):
    """What an importance weight adds to vespo's log w."""
    logarithm = tl.log(importance_correction(weight, importance_cap, IMPORTANCE_MODE))
    return clamp(logarithm, LEAST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)


@triton.jit
def vespo_weight(log_weight, k, decay):
    """phi(w), 0 where it is not finite."""
    weight = exponential(decay + k * log_weight - decay * exponential(log_weight))
    return tl.where(is_finite(weight), weight, 0.0)


@triton.jit
def apply_importance(value, slope, importance, advantage):
    """Multiply a surrogate and its derivative by an importance weight, one of zero to zero."""
    nothing = (importance == 0.0) | (advantage == 0.0)
    return tl.where(nothing, 0.0, importance * value), tl.where(nothing | (slope == 0.0), 0.0, importance * slope)

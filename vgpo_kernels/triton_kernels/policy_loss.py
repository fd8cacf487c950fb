"""The policy losses in Triton: loss and gradient in one launch, metrics in a second.

A launch before them counts the tokens of each response, where a token's share of the loss depends on a count that the
caller did not pass: the mean over all tokens without ``num_tokens``, and the mean over a response's tokens. In
sequence-level losses a program handles a response, and goes over its tokens up to three times.

The first launch writes a row of partial sums per block of tokens; the second adds them in their order, in fp64. (The
last block could do that itself, but it would need counters that start at zero, and zeroing them is another launch.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.ops.policy_loss import POLICY_METRICS
from vgpo_kernels.ops.visual_weights import FOCUS_METRICS
from vgpo_kernels.reference.policy_loss import SEQUENCE_LEVEL, VESPO_LEAST_LAMBDA, LossArguments
from vgpo_kernels.triton_kernels.common import (
    clamp,
    device_guard,
    exponential,
    extent,
    first_slot,
    is_finite,
    is_per_response,
    num_slots,
    operator,
    slot_range,
    token_range,
    wrap_triton,
)
from vgpo_kernels.triton_kernels.policy_sums import PARTIALS, reduce_kernel, store_partials
from vgpo_kernels.triton_kernels.policy_terms import (
    LARGEST_LOG_WEIGHT,
    LEAST_LOG_WEIGHT,
    apply_importance,
    exponential_excess,
    importance_correction,
    kl_estimate,
    log_importance,
    surrogate,
    vespo_weight,
)
from vgpo_kernels.triton_kernels.responses import SCORE, STATISTICS, WEIGHTED
from vgpo_kernels.triton_kernels.visual_weights import group_weight, token_factor

TOKEN_BLOCK = 1024
COUNT_BLOCK = 4096


@triton.jit
def per_response_or_token(values, response, token, valid, PER_RESPONSE: tl.constexpr):
    if PER_RESPONSE:
        # Read once, but not at all for a block without tokens: the value may be anything there.
        loaded = tl.load(values + response + tl.zeros_like(token), mask=valid, other=0.0)
    else:
        loaded = tl.load(values + token, mask=valid, other=0.0)
    return loaded


@triton.jit
def nonzero(count):
    return tl.where(count == 0.0, 1.0, count)


@triton.jit(do_not_specialize=["tokens"])
def length_kernel(
    mask,  # [B, T] or [N]
    boundaries,  # [B + 1] or None
    lengths,  # out: int32 [B]
    tokens,  # T or N
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    begin, end = token_range(boundaries, response, tokens)
    size = (end - begin).to(tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        count += (tl.load(mask + begin + token, mask=token < size, other=0) != 0).to(tl.int32)
    tl.store(lengths + response, tl.sum(count))


@triton.jit(do_not_specialize=["batch", "tokens"])
def loss_kernel(
    logp,  # [B, T] or [N]
    old_logp,
    advantages,  # [B] or per token
    response_mask,
    factors,  # per token or None
    w,  # per token or None: with statistics and groups, factors are made here
    statistics,  # [B, STATISTICS] or None
    groups,  # [B] or None
    cu_seqlens,  # [B + 1] or None
    lengths,  # int32 [B] or None
    ref_logp,  # per token or None
    entropy,  # per token or None
    importance_weights,  # [B], per token, or None
    num_tokens,  # [] or None
    num_sequences,  # [] or None
    grad_logp,  # out: per token
    grad_entropy,  # out: per token or None
    partials,  # out: [slots, PARTIALS]
    batch,
    tokens,  # T or N
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    entropy_coef,
    max_length,
    tau_positive,
    tau_negative,
    vespo_k_pos,
    vespo_lambda_pos,
    vespo_k_neg,
    vespo_lambda_neg,
    ratio_clamp,
    importance_cap,
    intra_low,
    intra_high,
    inter_low,
    inter_high,
    LOSS_TYPE: tl.constexpr,
    AGGREGATION: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    IMPORTANCE_MODE: tl.constexpr,
    INTRA: tl.constexpr,
    INTER: tl.constexpr,
    ADVANTAGE_PER_RESPONSE: tl.constexpr,
    IMPORTANCE_PER_RESPONSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The gradient goes through the mean log-ratio; the ratio is that of the mean; tokens need a sum of their response.
    THROUGH_MEAN: tl.constexpr = LOSS_TYPE == "gspo" or LOSS_TYPE == "luspo"
    SEQUENCE_RATIO: tl.constexpr = THROUGH_MEAN or LOSS_TYPE == "gspo_token"
    VESPO: tl.constexpr = LOSS_TYPE == "vespo"
    SEQUENCE_LEVEL: tl.constexpr = SEQUENCE_RATIO or VESPO
    # A program is a slot, or all slots of a response.
    if SEQUENCE_LEVEL:
        response = tl.program_id(0)
        slot_begin = first_slot(cu_seqlens, response, tokens, BLOCK)
        slot_end = first_slot(cu_seqlens, response + 1, tokens, BLOCK)
        first_token, end = token_range(cu_seqlens, response, tokens)
    else:
        slot_begin = tl.program_id(0).to(tl.int64)
        slot_end = slot_begin + 1
        response, first_token, end = slot_range(cu_seqlens, slot_begin, batch, tokens, BLOCK)

    if w is not None:
        phi = tl.zeros((), tl.float32)
        row = statistics + response.to(tl.int64) * STATISTICS
        weighted = tl.load(row + WEIGHTED) != 0.0
        origin = token_range(cu_seqlens, response, tokens)[0]
        if INTER:
            phi = group_weight(response, statistics + SCORE, statistics + WEIGHTED, groups, batch, STATISTICS)

    length = tl.zeros((), tl.float32)
    mean_log_ratio = tl.zeros((), tl.float32)
    vespo_gains = tl.zeros((), tl.float32)
    vespo_losses = tl.zeros((), tl.float32)
    if SEQUENCE_LEVEL:
        counted = tl.zeros((BLOCK,), tl.int32)
        summed = tl.zeros((BLOCK,), tl.float64)
        for slot in range(slot_end - slot_begin):
            token = first_token + slot * BLOCK + tl.arange(0, BLOCK)
            valid = tl.load(response_mask + token, mask=token < end, other=0) != 0
            counted += valid.to(tl.int32)
            term = tl.load(logp + token, mask=valid, other=0.0) - tl.load(old_logp + token, mask=valid, other=0.0)
            if VESPO:
                term = clamp(term, -LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
                if importance_weights is not None and not IMPORTANCE_PER_RESPONSE:
                    weight_of_token = tl.load(importance_weights + token, mask=valid, other=1.0)
                    logarithm = log_importance(weight_of_token, importance_cap, IMPORTANCE_MODE)
                    term += tl.where(valid, logarithm, 0.0)
            summed += term.to(tl.float64)
        length = tl.sum(counted).to(tl.float32)
        if VESPO:
            log_weight = tl.sum(summed).to(tl.float32)
            if importance_weights is not None and IMPORTANCE_PER_RESPONSE:
                log_weight += log_importance(tl.load(importance_weights + response), importance_cap, IMPORTANCE_MODE)
            log_weight = clamp(log_weight, LEAST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
            vespo_gains = vespo_weight(log_weight, vespo_k_pos, vespo_lambda_pos)
            vespo_losses = vespo_weight(log_weight, vespo_k_neg, vespo_lambda_neg)
        else:
            mean_log_ratio = (tl.sum(summed) / tl.maximum(length, 1.0)).to(tl.float32)
    elif AGGREGATION == "seq-mean-token-mean":
        length = tl.load(lengths + response).to(tl.float32)

    # Share of one token in the loss. A denominator of zero is taken as one.
    if AGGREGATION == "token-mean":
        if num_tokens is not None:
            denominator = tl.load(num_tokens)
        else:
            SEARCH: tl.constexpr = 128
            total = tl.zeros((SEARCH,), tl.int64)
            for start in range(0, batch, SEARCH):
                other = start + tl.arange(0, SEARCH)
                total += tl.load(lengths + other, mask=other < batch, other=0)
            denominator = tl.sum(total).to(tl.float32)
        share = tl.div_rn(1.0, nonzero(denominator))
    else:
        sequences = batch.to(tl.float32)
        if num_sequences is not None:
            sequences = tl.load(num_sequences)
        share = tl.div_rn(1.0, nonzero(sequences))
        if AGGREGATION == "seq-mean-token-mean":
            share = tl.div_rn(share, nonzero(length))
        elif AGGREGATION == "seq-mean-token-sum-norm":
            share = tl.div_rn(share, max_length)

    # Through the mean a token's gradient contains the derivatives of all tokens of its response w.r.t. their common
    # ratio: a first round sums them, the second writes gradients. Other losses have only the second.
    common_slope = tl.zeros((), tl.float32)
    for writes in tl.static_range(0 if THROUGH_MEAN else 1, 2):
        slope_sum = tl.zeros((BLOCK,), tl.float32)
        for slot in range(slot_end - slot_begin):
            token = first_token + slot * BLOCK + tl.arange(0, BLOCK)
            valid = tl.load(response_mask + token, mask=token < end, other=0) != 0
            current = tl.load(logp + token, mask=valid, other=0.0)
            token_log_ratio = current - tl.load(old_logp + token, mask=valid, other=0.0)
            log_ratio = token_log_ratio
            if SEQUENCE_RATIO:
                log_ratio = tl.zeros_like(current) + mean_log_ratio
            ratio = exponential(clamp(log_ratio, -ratio_clamp, ratio_clamp))
            constant = (log_ratio > ratio_clamp) | (log_ratio < -ratio_clamp)

            advantage = per_response_or_token(advantages, response, token, valid, ADVANTAGE_PER_RESPONSE)
            factor = tl.full((BLOCK,), 1.0, tl.float32)
            if factors is not None:
                factor = tl.load(factors + token, mask=valid, other=1.0)
            if w is not None:
                weight = tl.load(w + token, mask=valid, other=0.0)
                made, _ = token_factor(
                    weight, phi, row, token - origin, intra_low, intra_high, inter_low, inter_high, INTRA
                )
                factor = tl.where(weighted, made, 1.0)
            advantage *= factor
            value, slope, below, above, dual = surrogate(
                ratio,
                constant,
                current,
                advantage,
                tl.where(advantage >= 0.0, vespo_gains, vespo_losses),
                clip_low,
                clip_high,
                dual_clip,
                tau_positive,
                tau_negative,
                LOSS_TYPE,
            )
            if importance_weights is not None and not VESPO:
                correction = per_response_or_token(importance_weights, response, token, valid, IMPORTANCE_PER_RESPONSE)
                correction = importance_correction(correction, importance_cap, IMPORTANCE_MODE)
                value, slope = apply_importance(value, slope, correction, advantage)
            kl = tl.zeros((BLOCK,), tl.float32)
            own_slope = tl.zeros((BLOCK,), tl.float32)  # derivative w.r.t. logp other than through the ratio
            if ref_logp is not None:
                difference = tl.load(ref_logp + token, mask=valid, other=0.0) - current
                kl, own_slope = kl_estimate(difference, KL_ESTIMATOR)
                if KL_BIAS_CORRECTION:
                    kl *= ratio
                    # A slope of zero stays one beside an infinite ratio.
                    own_slope = tl.where(own_slope == 0.0, 0.0, own_slope * ratio)
                # With a coefficient of zero a term is off: it adds nothing, whatever it is.
                kl_term = tl.where(kl_coef == 0.0, 0.0, kl_coef * kl)
                value += kl_term
                own_slope = tl.where(kl_coef == 0.0, 0.0, kl_coef * own_slope)
                if KL_BIAS_CORRECTION:
                    slope += tl.where(constant, 0.0, kl_term)
            bonus = tl.zeros((BLOCK,), tl.float32)
            if entropy is not None:
                bonus = tl.load(entropy + token, mask=valid, other=0.0)
                value -= tl.where(entropy_coef == 0.0, 0.0, entropy_coef * bonus)

            if writes == 0:
                slope_sum += tl.where(valid, slope, 0.0)
            else:
                if THROUGH_MEAN:
                    slope = tl.zeros_like(slope) + common_slope
                gradient = tl.where(valid, share * (slope + own_slope), 0.0)
                tl.store(grad_logp + token, gradient, mask=token < end)
                if entropy is not None:
                    tl.store(grad_entropy + token, tl.where(valid, -entropy_coef * share, 0.0), mask=token < end)
                bounded = clamp(token_log_ratio, -ratio_clamp, ratio_clamp)
                old_kl = exponential_excess(bounded, exponential(bounded))
                partial = partials + (slot_begin + slot) * PARTIALS
                broken = ~is_finite(advantage)
                value = share * value
                store_partials(partial, valid, value, ratio, old_kl, kl, bonus, factor, below, above, dual, broken)
        if writes == 0:
            common_slope = tl.div_rn(tl.sum(slope_sum), tl.maximum(length, 1.0))


def clip_range(options: PolicyLossOptions) -> tuple[float, float]:
    """Return the range that ratios are clipped to."""
    if options.loss_type == "cispo" and options.cispo_cap is not None:
        return -float("inf"), options.cispo_cap
    return 1.0 - options.epsilon_low, 1.0 + options.epsilon_high


def loss_settings(options: PolicyLossOptions) -> dict[str, Any]:
    """Return the options as keyword arguments of ``loss_kernel``."""
    infinity = float("inf")
    clip_low, clip_high = clip_range(options)
    return {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": infinity if options.dual_clip is None else options.dual_clip,
        "kl_coef": options.kl_coef,
        "entropy_coef": options.entropy_coef,
        "max_length": options.max_length or 1.0,
        "tau_positive": options.sapo_temperature_positive,
        "tau_negative": options.sapo_temperature_negative,
        "vespo_k_pos": options.vespo_k_pos,
        "vespo_lambda_pos": max(options.vespo_lambda_pos, VESPO_LEAST_LAMBDA),
        "vespo_k_neg": options.vespo_k_neg,
        "vespo_lambda_neg": max(options.vespo_lambda_neg, VESPO_LEAST_LAMBDA),
        "ratio_clamp": infinity if options.ratio_clamp is None else options.ratio_clamp,
        "importance_cap": infinity if options.importance_cap is None else options.importance_cap,
        "LOSS_TYPE": options.loss_type,
        "AGGREGATION": options.aggregation,
        "KL_ESTIMATOR": options.kl_estimator,
        "KL_BIAS_CORRECTION": options.kl_bias_correction,
        "IMPORTANCE_MODE": options.importance_mode,
    }


NO_FACTORS = {
    "intra_low": 0.0,
    "intra_high": 0.0,
    "inter_low": 0.0,
    "inter_high": 0.0,
    "INTRA": False,
    "INTER": False,
}


def needs_lengths(options: PolicyLossOptions, num_tokens: Tensor | None) -> bool:
    """Whether a token's share of the loss depends on counts that must be taken from the mask."""
    if options.aggregation == "token-mean":
        return num_tokens is None
    return options.aggregation == "seq-mean-token-mean" and options.loss_type not in SEQUENCE_LEVEL


class FactorSource(NamedTuple):
    """What factors are computed from, if not given: the results of ``launch_responses``, groups and settings."""

    w: Tensor
    statistics: Tensor
    groups: Tensor
    settings: dict[str, Any]


def launch_loss(
    arguments: LossArguments,
    options: PolicyLossOptions,
    lengths: Tensor | None,
    factors: Tensor | None = None,
    source: FactorSource | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its gradients and the metrics; with a ``source`` of factors the focus metrics as well.

    Args:
        arguments: The tensors of the operator.
        options: Its options.
        lengths: Number of valid tokens of each response, int32 ``[B]``; may be ``None`` unless :func:`needs_lengths`.
        factors: Factor of each token's advantage.
        source: What to compute factors from instead.

    """
    logp, entropy, weights = arguments.logp, arguments.entropy, arguments.importance_weights
    batch, tokens = extent(arguments.response_mask, arguments.cu_seqlens)
    slots = num_slots(tokens, batch, arguments.cu_seqlens, TOKEN_BLOCK)
    w, statistics, groups, settings = source or FactorSource(None, None, None, NO_FACTORS)  # type: ignore[arg-type]
    num_metrics = len(POLICY_METRICS) + (0 if source is None else len(FOCUS_METRICS))
    loss, metrics = logp.new_empty(()), logp.new_empty((num_metrics,))
    grad_logp = torch.empty_like(logp)
    grad_entropy = logp.new_empty((0,)) if entropy is None else torch.empty_like(entropy)
    partials = logp.new_empty((slots, PARTIALS.value))
    with device_guard(logp):
        wrap_triton(loss_kernel)[(batch if options.loss_type in SEQUENCE_LEVEL else slots,)](
            **arguments._asdict(),
            factors=factors,
            w=w,
            statistics=statistics,
            groups=groups,
            lengths=lengths,
            grad_logp=grad_logp,
            grad_entropy=None if entropy is None else grad_entropy,
            partials=partials,
            batch=batch,
            tokens=tokens,
            **loss_settings(options),
            **settings,
            ADVANTAGE_PER_RESPONSE=is_per_response(arguments.advantages, batch),
            IMPORTANCE_PER_RESPONSE=weights is not None and is_per_response(weights, batch),
            BLOCK=TOKEN_BLOCK,
            # Two tokens a thread: with four, compilers give up a register here and there for one more block.
            num_warps=16,
        )
        wrap_triton(reduce_kernel)[(1,)](partials, statistics, groups, loss, metrics, slots, batch)
    return loss, grad_logp, grad_entropy, metrics


def launch_lengths(response_mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the number of valid tokens of each response, int32 ``[B]``."""
    batch, tokens = extent(response_mask, cu_seqlens)
    lengths = response_mask.new_empty((batch,), dtype=torch.int32)
    with device_guard(response_mask):
        wrap_triton(length_kernel)[(batch,)](response_mask, cu_seqlens, lengths, tokens, BLOCK=COUNT_BLOCK)
    return lengths


@operator
def policy_loss(
    factors: Tensor | None, options: list[float], **loss_arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its gradients w.r.t. logp and entropy (empty without), and the policy metrics."""
    arguments, settings = LossArguments(**loss_arguments), PolicyLossOptions.from_floats(options)
    lengths = None
    if needs_lengths(settings, arguments.num_tokens):
        lengths = launch_lengths(arguments.response_mask, arguments.cu_seqlens)
    return launch_loss(arguments, settings, lengths, factors)

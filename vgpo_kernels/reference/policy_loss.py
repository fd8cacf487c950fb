"""The policy losses of the field in plain PyTorch, differentiable by autograd in ``logp`` and ``entropy``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.reference.layout import Tokens, tokens_of

# Losses whose tokens need a number of their whole response: its mean log-ratio, or vespo's sum of log-ratios.
SEQUENCE_RATIO = ("gspo", "gspo_token", "luspo")
SEQUENCE_LEVEL = (*SEQUENCE_RATIO, "vespo")

# Bounds of vespo's log-ratios: of a token's on both sides, of a response's above, and of a response's below.
VESPO_LIMIT = 20.0
VESPO_FLOOR = math.log(1e-8)
VESPO_LEAST_LAMBDA = 1e-4


class LossArguments(NamedTuple):
    """The tensors that every loss reads, named like the arguments of the operators."""

    logp: Tensor  # [B, T] or [N], as every per-token tensor
    old_logp: Tensor
    advantages: Tensor  # [B] or per token
    response_mask: Tensor
    cu_seqlens: Tensor | None = None  # [B + 1]
    ref_logp: Tensor | None = None  # per token
    entropy: Tensor | None = None  # per token
    importance_weights: Tensor | None = None  # [B] or per token
    num_tokens: Tensor | None = None  # []
    num_sequences: Tensor | None = None  # []


def policy_loss(
    *,
    options: list[float],
    factors: Tensor | None = None,  # per token
    dtype: torch.dtype = torch.float64,
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss of :class:`LossArguments` and the policy metrics, in the order of POLICY_METRICS.

    The advantage of a token is ``advantages * factors``.
    """
    given = LossArguments(**loss_arguments)
    settings = PolicyLossOptions.from_floats(options)
    tokens = tokens_of(given.response_mask, given.cu_seqlens)
    valid = tokens.valid

    def per_token(values: Tensor) -> Tensor:
        spread = values.dim() == 1 and values.shape[0] == tokens.batch()
        flat = tokens.spread(values) if spread else values.reshape(-1)
        return torch.where(valid, flat.to(dtype), torch.zeros((), dtype=dtype, device=flat.device))

    current = per_token_values(given.logp, valid, dtype)
    advantage = per_token(given.advantages)
    if factors is not None:
        advantage = advantage * per_token_values(factors, valid, dtype)
    log_ratio = current - per_token_values(given.old_logp, valid, dtype)
    if settings.ratio_clamp is not None:
        log_ratio_of_tokens = log_ratio.clamp(-settings.ratio_clamp, settings.ratio_clamp)
    else:
        log_ratio_of_tokens = log_ratio
    ratio = _ratio(log_ratio, current, tokens, settings)
    importance = None if given.importance_weights is None else _importance(given.importance_weights.to(dtype), settings)
    if settings.loss_type == "vespo":
        weight = _vespo_weight(log_ratio.detach(), importance, advantage, tokens, settings)
        nowhere = torch.zeros_like(valid)
        token_loss, clipped = -weight * advantage * current, (nowhere, nowhere, nowhere)
    else:
        token_loss, clipped = _surrogate(ratio, current, advantage, settings)
        if importance is not None:
            token_loss = token_loss * per_token(importance)
    kl = torch.zeros_like(current)
    if given.ref_logp is not None:
        kl = _kl(per_token_values(given.ref_logp, valid, dtype) - current, settings)
        if settings.kl_bias_correction:
            kl = kl * ratio
        token_loss = token_loss + settings.kl_coef * kl
    bonus = torch.zeros_like(current)
    if given.entropy is not None:
        bonus = per_token_values(given.entropy, valid, dtype)
        token_loss = token_loss - settings.entropy_coef * bonus

    weight = _token_weight(tokens, settings, given, dtype)
    loss = torch.where(valid, token_loss * weight, torch.zeros_like(token_loss)).sum()
    scale = torch.ones_like(current) if factors is None else per_token_values(factors, valid, dtype)
    old_kl = log_ratio_of_tokens.exp() - 1 - log_ratio_of_tokens
    return loss, _metrics(valid, clipped, ratio, old_kl, kl, bonus, scale, advantage).detach()


def per_token_values(values: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Flatten a per-token tensor, with zeros off the mask, where values are undefined."""
    flat = values.reshape(-1).to(dtype)
    return torch.where(valid, flat, torch.zeros_like(flat))


def _ratio(log_ratio: Tensor, current: Tensor, tokens: Tokens, settings: PolicyLossOptions) -> Tensor:
    """Probability ratio of each token, or of its whole sequence."""
    if settings.loss_type in SEQUENCE_RATIO:
        mean = tokens.total(log_ratio) / tokens.length.clamp(min=1)
        log_ratio = tokens.spread(mean)
        if settings.loss_type == "gspo_token":
            # The value is the sequence's ratio, the gradient each token's own.
            log_ratio = log_ratio.detach() + current - current.detach()
    if settings.ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-settings.ratio_clamp, settings.ratio_clamp)
    return log_ratio.exp()


def _surrogate(
    ratio: Tensor, current: Tensor, advantage: Tensor, settings: PolicyLossOptions
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Surrogate loss of each token, and where it was clipped: below, above, and by the dual clip."""
    low, high = 1 - settings.epsilon_low, 1 + settings.epsilon_high
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if settings.loss_type == "cispo":
        if settings.cispo_cap is not None:
            low, high = -math.inf, settings.cispo_cap
        weight = ratio.clamp(low, high).detach()
        return -advantage * weight * current, (ratio < low, ratio > high, nowhere)
    if settings.loss_type == "sapo":
        temperature = _either(
            advantage > 0, settings.sapo_temperature_positive, settings.sapo_temperature_negative, ratio.dtype
        )
        gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
        return -advantage * gate, (nowhere, nowhere, nowhere)
    bounded = ratio if settings.dual_clip is None else ratio.clamp(max=settings.dual_clip)
    # The dual clip is for negative advantages; for others the ordinary clip is tighter.
    bounded = torch.where(advantage < 0, bounded, ratio)
    loss = torch.maximum(-advantage * bounded, -advantage * ratio.clamp(low, high))
    dual = nowhere if settings.dual_clip is None else (advantage < 0) & (ratio > settings.dual_clip)
    return loss, ((ratio < low) & (advantage < 0), (ratio > high) & (advantage > 0), dual)


def _vespo_weight(
    log_ratio: Tensor,  # [N]
    importance: Tensor | None,  # [B] or per token
    advantage: Tensor,  # [N]
    tokens: Tokens,
    settings: PolicyLossOptions,
) -> Tensor:
    """Weight of each token's log-prob in vespo, ``w^k exp(lambda (1 - w))``; w is the product of a response's ratios.

    It is computed as TRL does: bounded in log space, and 0 where it is not finite.
    """
    log_weight = tokens.total(log_ratio.clamp(-VESPO_LIMIT, VESPO_LIMIT))
    if importance is not None:
        correction = importance.log().clamp(VESPO_FLOOR, VESPO_LIMIT)
        if correction.dim() != 1 or correction.shape[0] != tokens.batch():
            correction = tokens.total(torch.where(tokens.valid, correction.reshape(-1), 0.0))
        log_weight = log_weight + correction
    log_weight = tokens.spread(log_weight.clamp(VESPO_FLOOR, VESPO_LIMIT))
    gains = advantage >= 0
    k = _either(gains, settings.vespo_k_pos, settings.vespo_k_neg, log_weight.dtype)
    decay = _either(gains, settings.vespo_lambda_pos, settings.vespo_lambda_neg, log_weight.dtype)
    decay = decay.clamp(min=VESPO_LEAST_LAMBDA)
    weight = (decay + k * log_weight - decay * log_weight.exp()).exp()
    return weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _either(condition: Tensor, one: float, other: float, dtype: torch.dtype) -> Tensor:
    """Choose between two numbers; ``torch.where`` would round them to the default dtype."""
    return torch.full_like(condition, other, dtype=dtype).masked_fill(condition, one)


def _importance(weights: Tensor, settings: PolicyLossOptions) -> Tensor:
    if settings.importance_cap is None:
        return weights
    if settings.importance_mode == "truncate":
        return weights.clamp(max=settings.importance_cap)
    return torch.where(weights > settings.importance_cap, torch.zeros_like(weights), weights)


def _kl(log_ratio: Tensor, settings: PolicyLossOptions) -> Tensor:
    """KL(policy || reference) of each token, from ``log_ratio = ref_logp - logp``."""
    if settings.kl_estimator == "k1":
        return -log_ratio
    if settings.kl_estimator == "k2":
        return log_ratio.square() / 2
    if settings.kl_estimator == "k3":
        return log_ratio.exp() - log_ratio - 1
    log_ratio = log_ratio.clamp(-20, 20)
    return (log_ratio.exp() - log_ratio - 1).clamp(-10, 10)


def _token_weight(
    tokens: Tokens,
    settings: PolicyLossOptions,
    given: LossArguments,
    dtype: torch.dtype,
) -> Tensor:
    """Weight of each token's loss: the sum of the weighted losses is the aggregation."""
    length = tokens.length.to(dtype)

    def nonzero(count: Tensor) -> Tensor:
        return torch.where(count == 0, torch.ones_like(count), count)

    if settings.aggregation == "token-mean":
        total = length.sum() if given.num_tokens is None else given.num_tokens.to(dtype)
        return tokens.spread((1 / nonzero(total)).expand(tokens.batch()))
    own = length.new_full((), float(tokens.batch()))
    batch = own if given.num_sequences is None else given.num_sequences.to(dtype)
    share = 1 / nonzero(batch)
    if settings.aggregation == "seq-mean-token-mean":
        return tokens.spread(share / nonzero(length))
    if settings.aggregation == "seq-mean-token-sum-norm":
        assert settings.max_length is not None
        share = share / settings.max_length
    return tokens.spread(share.expand(tokens.batch()))


def _metrics(
    valid: Tensor,
    clipped: tuple[Tensor, Tensor, Tensor],
    ratio: Tensor,
    old_kl: Tensor,
    kl: Tensor,
    entropy: Tensor,
    factors: Tensor,
    advantages: Tensor,
) -> Tensor:
    """Return the metrics in the order of POLICY_METRICS."""
    share = valid.to(ratio.dtype)
    number = share.sum()
    any_valid = number > 0

    def mean(values: Tensor) -> Tensor:
        chosen = torch.where(valid, values.to(ratio.dtype), torch.zeros_like(ratio))
        return chosen.sum() / number.clamp(min=1)

    def extreme(values: Tensor, largest: bool) -> Tensor:
        empty = -math.inf if largest else math.inf
        chosen = torch.where(valid, values, torch.full_like(values, empty))
        chosen = torch.cat([chosen, chosen.new_full((1,), empty)])
        found = chosen.amax() if largest else chosen.amin()
        return torch.where(any_valid, found, torch.zeros_like(found))

    low, high, dual = clipped
    factor_mean = mean(factors)
    return torch.stack(
        [
            mean(low | high),
            mean(low),
            mean(high),
            mean(dual),
            mean(ratio),
            extreme(ratio, largest=False),
            extreme(ratio, largest=True),
            mean(old_kl),
            mean(kl),
            mean(entropy),
            factor_mean,
            extreme(factors, largest=False),
            extreme(factors, largest=True),
            mean((factors - factor_mean).square()).sqrt(),
            number,
            (valid & ~advantages.isfinite()).sum().to(ratio.dtype),
        ]
    )

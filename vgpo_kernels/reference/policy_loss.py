"""The policy losses of the field in plain PyTorch, differentiable by autograd in ``logp`` and ``entropy``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.reference.layout import Tokens, numbers_of, tokens_of

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
    number_of = numbers_of(settings, current)
    exponent = _exponent(log_ratio, current, tokens, settings)
    ratio = _limited(exponent, number_of["ratio_clamp"]).exp()
    importance = None
    if given.importance_weights is not None:
        importance = _importance(given.importance_weights.to(dtype), number_of["importance_cap"], settings)
    correction = None if importance is None or settings.loss_type == "vespo" else per_token(importance)
    # A surrogate times zero is zero, whatever it is.
    counts = advantage != 0 if correction is None else (advantage != 0) & (correction != 0)
    if settings.loss_type == "vespo":
        largest = torch.finfo(torch.float64 if given.logp.dtype == torch.float64 else torch.float32).max
        weight = _vespo_weight(log_ratio.detach(), importance, advantage, tokens, number_of, largest)
        nowhere = torch.zeros_like(valid)
        token_loss, clipped = _log_prob_loss(weight, current, advantage, counts), (nowhere, nowhere, nowhere)
    else:
        token_loss, clipped = _surrogate(exponent, current, advantage, counts, settings, number_of)
    if correction is not None:
        token_loss = torch.where(counts, correction * token_loss, torch.zeros_like(token_loss))
    kl = torch.zeros_like(current)
    if given.ref_logp is not None:
        kl = _kl(per_token_values(given.ref_logp, valid, dtype) - current, settings)
        if settings.kl_bias_correction:
            kl = kl * ratio
        if settings.kl_coef != 0:
            token_loss = token_loss + settings.kl_coef * kl
    bonus = torch.zeros_like(current)
    if given.entropy is not None:
        bonus = per_token_values(given.entropy, valid, dtype)
        if settings.entropy_coef == 0:  # a gradient of zero, whatever the entropies are
            token_loss = torch.where(valid, token_loss, bonus)
        else:
            token_loss = token_loss - settings.entropy_coef * bonus

    weight = _token_weight(tokens, settings, given, dtype)
    loss = torch.where(valid, token_loss * weight, torch.zeros_like(token_loss)).sum()
    scale = torch.ones_like(current) if factors is None else per_token_values(factors, valid, dtype)
    old_kl = _excess(_limited(log_ratio.detach(), number_of["ratio_clamp"]))
    return loss, _metrics(valid, clipped, ratio, old_kl, kl, bonus, scale, advantage).detach()


def per_token_values(values: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Flatten a per-token tensor, with zeros off the mask, where values are undefined."""
    flat = values.reshape(-1).to(dtype)
    return torch.where(valid, flat, torch.zeros_like(flat))


def _limited(values: Tensor, limit: Tensor | float | None) -> Tensor:
    """Values clamped to +-limit. The gradient is 0 outside, and a NaN keeps its own, which torch.clamp would zero."""
    if limit is None:
        return values
    return torch.where(values > limit, limit, torch.where(values < -limit, -limit, values))


def _excess(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x``, infinite where x is, with an infinite derivative above."""
    endless, zero = x == math.inf, torch.zeros_like(x)
    # Infinity minus infinity would be NaN, and so would the gradient of zero of an infinite value that is not chosen.
    above, rest = torch.where(endless, x, zero), torch.where(endless, zero, x)
    return torch.where(endless, above.exp(), torch.expm1(rest) - rest)


def _exponent(log_ratio: Tensor, current: Tensor, tokens: Tokens, settings: PolicyLossOptions) -> Tensor:
    """Logarithm of the ratio that multiplies each token's advantage: its own, or that of its whole response."""
    if settings.loss_type not in SEQUENCE_RATIO:
        return log_ratio
    mean = tokens.spread(tokens.total(log_ratio) / tokens.length.clamp(min=1))
    if settings.loss_type == "gspo_token":
        # The value is the sequence's ratio, the gradient each token's own. Infinity minus itself would be NaN.
        rest = torch.where(mean == current, torch.zeros_like(mean), mean - current)
        return current + rest.detach()
    return mean


def _surrogate(
    exponent: Tensor,
    current: Tensor,
    advantage: Tensor,
    counts: Tensor,
    settings: PolicyLossOptions,
    number_of: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Surrogate loss of each token, and where it was clipped: below, above, and by the dual clip.

    Where the loss does not depend on the ratio, the ratio is a constant: the zero that autograd would multiply an
    infinite derivative by is NaN.
    """
    limit, dual_clip = number_of["ratio_clamp"], number_of["dual_clip"]
    ratio = _limited(exponent.detach(), limit).exp()
    low, high = 1 - number_of["epsilon_low"], 1 + number_of["epsilon_high"]
    nowhere = torch.zeros_like(counts)
    zero = torch.zeros_like(advantage)

    def ratio_where(depends: Tensor) -> Tensor:
        return _limited(torch.where(depends, exponent, exponent.detach()), limit).exp()

    if settings.loss_type == "cispo":
        if settings.cispo_cap is not None:
            low, high = torch.full_like(low, -math.inf), number_of["cispo_cap"]
        clipped = ratio.clamp(low, high)
        return _log_prob_loss(clipped, current, advantage, counts), (ratio < low, ratio > high, nowhere)
    if settings.loss_type == "sapo":
        positive, negative = number_of["sapo_temperature_positive"], number_of["sapo_temperature_negative"]
        temperature = torch.where(advantage > 0, positive, negative)
        # The gate closes faster than any ratio grows, to the end.
        depends = counts & ((ratio != math.inf) | ~advantage.isfinite())
        gate = torch.sigmoid(temperature * (ratio_where(depends) - 1)) * 4 / temperature
        return torch.where(counts, -advantage * gate, zero), (nowhere, nowhere, nowhere)
    below, above, negative = ratio < low, ratio > high, advantage < 0
    # The dual clip is for negative advantages; for others the ordinary clip is tighter.
    dual = nowhere if dual_clip is None else negative & (ratio > dual_clip)
    bound = math.inf if dual_clip is None else dual_clip
    clips = -advantage * ratio.clamp(low, high) > -advantage * torch.where(dual, bound, ratio)
    constant = torch.where(clips, below | above, dual)
    # A ratio of 0 is one, too: e^x does not rise there.
    constant = constant | ((ratio == 0) & advantage.isfinite())
    ratio = ratio_where(counts & ~constant)
    chosen = torch.where(clips, ratio.clamp(low, high), torch.where(dual, bound, ratio))
    loss = torch.where(counts, -advantage * chosen, zero)
    return loss, (below & negative, above & (advantage > 0), dual)


def _log_prob_loss(weight: Tensor, current: Tensor, advantage: Tensor, counts: Tensor) -> Tensor:
    """Loss that weights the log-prob: a weight of zero makes nothing of any log-prob, also of one of -infinity."""
    zero = torch.zeros_like(advantage)
    slope = torch.where(counts, -advantage * weight, zero)
    return torch.where(slope == 0, zero, slope * current)


def _vespo_weight(
    log_ratio: Tensor,  # [N]
    importance: Tensor | None,  # [B] or per token
    advantage: Tensor,  # [N]
    tokens: Tokens,
    number_of: dict[str, Any],
    largest: float,
) -> Tensor:
    """Weight of each token's log-prob in vespo, ``w^k exp(lambda (1 - w))``; w is the product of a response's ratios.

    It is computed as TRL does: bounded in log space, and 0 where it is not finite, or above ``largest``.
    """
    log_weight = tokens.total(log_ratio.clamp(-VESPO_LIMIT, VESPO_LIMIT))
    if importance is not None:
        correction = importance.log().clamp(VESPO_FLOOR, VESPO_LIMIT)
        if correction.dim() != 1 or correction.shape[0] != tokens.batch():
            correction = tokens.total(torch.where(tokens.valid, correction.reshape(-1), 0.0))
        log_weight = log_weight + correction
    log_weight = tokens.spread(log_weight.clamp(VESPO_FLOOR, VESPO_LIMIT))
    gains = advantage >= 0
    k = torch.where(gains, number_of["vespo_k_pos"], number_of["vespo_k_neg"])
    decay = torch.where(gains, number_of["vespo_lambda_pos"], number_of["vespo_lambda_neg"])
    decay = decay.clamp(min=VESPO_LEAST_LAMBDA)
    weight = (decay + k * log_weight - decay * log_weight.exp()).exp()
    return torch.where(weight <= largest, weight, torch.zeros_like(weight))


def _importance(weights: Tensor, cap: Tensor | None, settings: PolicyLossOptions) -> Tensor:
    if cap is None:
        return weights
    if settings.importance_mode == "truncate":
        return weights.clamp(max=cap)
    return torch.where(weights > cap, torch.zeros_like(weights), weights)


def _kl(log_ratio: Tensor, settings: PolicyLossOptions) -> Tensor:
    """KL(policy || reference) of each token, from ``log_ratio = ref_logp - logp``."""
    if settings.kl_estimator == "k1":
        return -log_ratio
    if settings.kl_estimator == "k2":
        return log_ratio.square() / 2
    if settings.kl_estimator == "k3":
        return _excess(log_ratio)
    return _limited(_excess(_limited(log_ratio, 20.0)), 10.0)


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

    def extreme(values: Tensor, largest: bool, average: Tensor) -> Tensor:
        empty = -math.inf if largest else math.inf
        chosen = torch.where(valid, values, torch.full_like(values, empty))
        chosen = torch.cat([chosen, chosen.new_full((1,), empty)])
        found = chosen.amax() if largest else chosen.amin()
        return torch.where(any_valid, torch.where(average.isnan(), average, found), torch.zeros_like(found))

    low, high, dual = clipped
    ratio_mean, factor_mean = mean(ratio), mean(factors)
    least = extreme(factors, False, factor_mean)
    # Measured from one of the factors, so that equal ones deviate by nothing at all.
    deviation = factors - torch.where(least.isfinite(), least, torch.zeros_like(least))
    return torch.stack(
        [
            mean(low | high),
            mean(low),
            mean(high),
            mean(dual),
            ratio_mean,
            extreme(ratio, False, ratio_mean),
            extreme(ratio, True, ratio_mean),
            mean(old_kl),
            mean(kl),
            mean(entropy),
            factor_mean,
            least,
            extreme(factors, True, factor_mean),
            mean((deviation - mean(deviation)).square()).sqrt(),
            number,
            (valid & ~advantages.isfinite()).sum().to(ratio.dtype),
        ]
    )

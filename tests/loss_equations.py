"""The policy losses as loops over Python numbers, without a line of the library: value, gradient and metrics.

A batch is a list of responses; a response is a list of its scored tokens in order. A coefficient of zero, an advantage
or an importance weight of zero makes nothing of what it multiplies, whatever that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NAN, INF = math.nan, math.inf


@dataclass
class Token:
    """What is known of a scored token. Importance weights of a response stand at each of its tokens."""

    logp: float
    old_logp: float
    advantage: float
    factor: float = 1.0
    ref_logp: float | None = None
    entropy: float | None = None
    importance: float | None = None
    weight: float = 1.0
    selected: bool = True  # whether its surrogate counts
    views: tuple[float | None, ...] = ()  # log-probs under other views, None where a view's term does not count


@dataclass
class Loss:
    value: float
    gradient: list[list[float]]  # w.r.t. each token's logp
    entropy_gradient: list[list[float]]
    metrics: dict[str, float]
    magnitude: float  # of the sum that the value is


class Range:
    """Arithmetic that overflows and underflows as the compared backend's numbers do: those of ``bits`` bits."""

    def __init__(self, bits: int) -> None:
        self.largest, self.smallest = (3.4028234e38, 1e-45) if bits == 32 else (1.7e308, 0.0)

    def __call__(self, value: float) -> float:
        return math.copysign(INF, value) if abs(value) > self.largest else value

    def exp(self, value: float) -> float:
        power = INF if value > 709 else math.exp(value)
        return 0.0 if power < self.smallest else self(power)

    def excess(self, value: float) -> float:
        """e^x - 1 - x."""
        return INF if self.exp(value) == INF else math.expm1(value) - value


def clamped(value: float, low: float, high: float) -> float:
    return low if value < low else high if value > high else value


def policy_loss(
    responses: Sequence[Sequence[Token]],
    options: Any,
    *,
    importance_per_response: bool = False,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    num_selected: float | None = None,
    views: Sequence[tuple[float, str]] = (),
    bits: int = 32,
) -> Loss:
    """Loss, gradient and metrics of a batch.

    Args:
        responses: The scored tokens of each response.
        options: The settings, with the fields of ``PolicyLossOptions``; ``max_length`` set where it is read.
        importance_per_response: Whether there is one importance weight for each response.
        num_tokens: Denominator of ``"token-mean"``; the number of tokens if ``None``.
        num_sequences: Denominator of the other aggregations; the number of responses if ``None``.
        num_selected: Denominator of the surrogate in ``"token-mean"``; if ``None`` the number of selected tokens, or
            ``num_tokens`` where all are.
        views: Coefficient and estimator of each view of the tokens.
        bits: Of the floating-point numbers that the compared backend computes in.
    """
    narrow = Range(bits)
    tokens = [token for response in responses for token in response]
    limit = INF if options.ratio_clamp is None else options.ratio_clamp
    total, magnitude, gradient, entropy_gradient, seen = 0.0, 0.0, [], [], []
    selected = [token for token in tokens if token.selected]
    num_tokens = len(tokens) if num_tokens is None else num_tokens
    if num_selected is None:
        num_selected = num_tokens if len(selected) == len(tokens) else len(selected)
    sequences = len(responses) if num_sequences is None else num_sequences
    for response in responses:
        weight = token_weight(len(response), options, num_tokens, sequences)
        chosen = sum(token.selected for token in response)
        of_surrogate = token_weight(chosen, options, num_selected, sequences)
        log_ratios = [narrow(token.logp - token.old_logp) for token in response]
        mean = sum(log_ratios) / max(len(response), 1)
        slopes, direct = [], []
        for token, own in zip(response, log_ratios, strict=True):
            exponent = mean if options.loss_type in ("gspo", "gspo_token", "luspo") else own
            one = Terms(token, exponent, own, limit, narrow, options)
            one.factor = token.factor * token.weight * of_surrogate / weight if token.selected else 0.0
            vespo = vespo_weight(response, log_ratios, one.advantage, importance_per_response, narrow, options)
            one.compute(vespo, views)
            for part in (of_surrogate * one.value, weight * one.rest):
                total += part
                magnitude += abs(part)
            slopes.append(of_surrogate * one.slope + weight * one.rest_slope)
            direct.append(weight * one.direct)
            seen.append(one)
        if options.loss_type in ("gspo", "luspo"):
            slopes = [sum(slopes) / max(len(slopes), 1)] * len(slopes)
        gradient.append([one + other for one, other in zip(slopes, direct, strict=True)])
        entropy_gradient.append([-options.entropy_coef * weight] * len(response))
    metrics = metrics_of(seen)
    for place in range(len(views)):
        name = "view_kl" if len(views) == 1 else f"view_kl/{place}"
        metrics[name] = sum(one.view_kl[place] for one in seen) / max(len(seen), 1)
    metrics["selected_rate"] = len(selected) / max(len(tokens), 1)
    return Loss(total, gradient, entropy_gradient, metrics, magnitude)


def token_weight(length: int, options: Any, num_tokens: float, num_sequences: float) -> float:
    tokens, sequences = num_tokens or 1.0, num_sequences or 1.0
    return {
        "token-mean": lambda: 1 / tokens,
        "seq-mean-token-mean": lambda: 1 / (length or 1) / sequences,
        "seq-mean-token-sum": lambda: 1 / sequences,
        "seq-mean-token-sum-norm": lambda: 1 / sequences / options.max_length,
    }[options.aggregation]()


class Terms:
    """What a token adds: the surrogate's value and the rest; their derivatives w.r.t. the log-ratio; and w.r.t. logp
    otherwise (direct)."""

    def __init__(self, token: Token, exponent: float, own: float, limit: float, narrow: Range, options: Any) -> None:
        self.token, self.narrow, self.options = token, narrow, options
        self.ratio = narrow.exp(clamped(exponent, -limit, limit))
        self.constant = abs(exponent) > limit
        self.old_kl = narrow.excess(clamped(own, -limit, limit))
        self.factor = token.factor  # all that multiplies the advantage
        # A factor of 0 turns a token off, but not an advantage that is not finite.
        self.advantage = narrow(token.advantage * (token.factor if token.selected else 0.0))
        self.value = self.slope = self.rest = self.rest_slope = self.direct = self.kl = 0.0
        self.view_kl: list[float] = []
        self.low = self.high = self.dual = False

    def compute(self, vespo: float, views: Sequence[tuple[float, str]]) -> None:
        token, options = self.token, self.options
        self.surrogate(vespo)
        if self.advantage == 0:
            self.value = self.slope = 0.0
        if token.importance is not None and options.loss_type != "vespo":
            weight = corrected(token.importance, options)
            if weight == 0 or self.advantage == 0:
                self.value = self.slope = 0.0
            else:
                self.value = self.narrow(weight * self.value)
                self.slope = 0.0 if self.slope == 0 else self.narrow(weight * self.slope)
        if token.weight * self.advantage == 0:
            self.value = self.slope = 0.0
        else:
            self.value, self.slope = self.narrow(token.weight * self.value), self.narrow(token.weight * self.slope)
        if token.ref_logp is not None:
            self.kl = self.add_kl(token.ref_logp, options.kl_coef, options.kl_estimator)
        for other, (coefficient, estimator) in zip(token.views, views, strict=True):
            self.view_kl.append(0.0 if other is None else self.add_kl(other, coefficient, estimator))
        if token.entropy is not None and options.entropy_coef != 0:
            self.rest -= options.entropy_coef * token.entropy

    def surrogate(self, vespo: float) -> None:
        options, ratio, advantage, narrow = self.options, self.ratio, self.advantage, self.narrow
        low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
        if options.loss_type == "sapo":
            tau = options.sapo_temperature_positive if advantage > 0 else options.sapo_temperature_negative
            exponent = tau * (ratio - 1)
            gate = 1 / (1 + narrow.exp(-exponent))
            falling = narrow.exp(-exponent) if exponent > 0 else 1.0
            self.value = narrow(-advantage * (gate * 4 / tau))
            closing = falling * gate if exponent > 0 else 1 - gate
            steepness = 4 * gate * closing * (ratio if math.isnan(ratio) else min(ratio, narrow.largest))
            self.slope = 0.0 if self.constant else narrow(-advantage * steepness)
            return
        if options.loss_type in ("cispo", "vespo"):
            weight = vespo
            if options.loss_type == "cispo":
                if options.cispo_cap is not None:
                    low, high = -INF, options.cispo_cap
                weight = clamped(ratio, low, high)
                self.low, self.high = ratio < low, ratio > high
            self.slope = narrow(-advantage * weight)
            self.value = 0.0 if self.slope == 0 else narrow(self.slope * self.token.logp)
            return
        bound = INF if options.dual_clip is None else options.dual_clip
        self.dual = advantage < 0 and ratio > bound
        plain = narrow(-advantage * (bound if self.dual else ratio))
        clipped = narrow(-advantage * clamped(ratio, low, high))
        if clipped > plain:
            self.value, flat = clipped, ratio < low or ratio > high
        else:
            self.value, flat = plain, self.dual
        self.slope = 0.0 if flat or self.constant else narrow(-advantage * ratio)
        self.low, self.high = ratio < low and advantage < 0, ratio > high and advantage > 0

    def add_kl(self, other: float, coefficient: float, estimator: str) -> float:
        options, narrow = self.options, self.narrow
        difference = narrow(other - self.token.logp)
        bounded = clamped(difference, -20.0, 20.0)
        kl, slope = {
            "k1": lambda: (-difference, 1.0),
            "k2": lambda: (narrow(difference * difference / 2), -difference),
            "k3": lambda: (narrow.excess(difference), 1 - narrow.exp(difference)),
            "k3_clamped": lambda: (clamped(narrow.excess(bounded), -10.0, 10.0), 1 - narrow.exp(bounded)),
        }[estimator]()
        if estimator == "k3_clamped" and (abs(difference) > 20 or narrow.excess(bounded) > 10):
            slope = 0.0
        if options.kl_bias_correction:
            kl, slope = narrow(kl * self.ratio), 0.0 if slope == 0 else narrow(slope * self.ratio)
        if coefficient != 0:
            self.rest += coefficient * kl
            self.direct += coefficient * slope
            if options.kl_bias_correction and not self.constant:
                self.rest_slope += coefficient * kl
        return kl


def corrected(weight: float, options: Any) -> float:
    cap = INF if options.importance_cap is None else options.importance_cap
    return weight if not weight > cap else cap if options.importance_mode == "truncate" else 0.0


def vespo_weight(
    response: Sequence[Token],
    log_ratios: Sequence[float],
    advantage: float,
    per_response: bool,
    narrow: Range,
    options: Any,
) -> float:
    """w^k e^(lambda (1 - w)) of a response, 0 where it is not finite."""
    if options.loss_type != "vespo":
        return NAN
    floor = math.log(1e-8)
    log_weight = sum(clamped(one, -20.0, 20.0) for one in log_ratios)
    for token in response[:1] if per_response else response:
        if token.importance is not None:
            weight = corrected(token.importance, options)
            logarithm = NAN if weight < 0 or math.isnan(weight) else -INF if weight == 0 else math.log(weight)
            log_weight += clamped(logarithm, floor, 20.0)
    log_weight = clamped(log_weight, floor, 20.0)
    k, decay = options.vespo_k_neg, options.vespo_lambda_neg
    if advantage >= 0:
        k, decay = options.vespo_k_pos, options.vespo_lambda_pos
    decay = max(decay, 1e-4)
    weight = narrow.exp(decay + k * log_weight - decay * narrow.exp(log_weight))
    return weight if math.isfinite(weight) else 0.0


def metrics_of(seen: Sequence[Terms]) -> dict[str, float]:
    """Every metric; those of a tensor that is not given are 0."""
    count = max(len(seen), 1)

    def mean(of: Callable[[Terms], float]) -> float:
        return sum(map(of, seen)) / count

    def extreme(of: Callable[[Terms], float], choose: Callable[..., float]) -> float:
        return mean(of) if math.isnan(mean(of)) else choose(map(of, seen), default=0.0)

    factor = mean(lambda one: one.factor)
    deviation = mean(lambda one: (one.factor - factor) ** 2 if math.isfinite(factor) else NAN)
    return {
        "clip_fraction": mean(lambda one: one.low or one.high),
        "clip_fraction_low": mean(lambda one: one.low),
        "clip_fraction_high": mean(lambda one: one.high),
        "dual_clip_fraction": mean(lambda one: one.dual),
        "ratio_mean": mean(lambda one: one.ratio),
        "ratio_min": extreme(lambda one: one.ratio, min),
        "ratio_max": extreme(lambda one: one.ratio, max),
        "approx_kl": mean(lambda one: one.old_kl),
        "ref_kl": mean(lambda one: one.kl),
        "entropy": mean(lambda one: one.token.entropy or 0.0),
        "factor_mean": factor,
        "factor_min": extreme(lambda one: one.factor, min),
        "factor_max": extreme(lambda one: one.factor, max),
        "factor_std": math.sqrt(deviation) if deviation >= 0 else deviation,
        "num_tokens": float(len(seen)),
        "nonfinite_advantages": float(sum(not math.isfinite(one.advantage) for one in seen)),
    }

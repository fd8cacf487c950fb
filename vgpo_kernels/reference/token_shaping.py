"""From per-token signals to weights of tokens and responses in plain PyTorch: the perception-aware methods."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.reference.layout import Tokens, counts_of, group_numbers, numbers_of, sums_of, tokens_of
from vgpo_kernels.shaping import ShapingConfig

RANGE_FLOOR = 1e-8  # of a mass, a mean, a median absolute deviation
LEAST_RANGE = 1e-6  # scores of responses that differ by no more are equal
DEVIATION_FLOOR = 1e-6
COUNT_SLACK = 1e-6  # a fraction of tokens one rounding error above a whole number is that number


def token_shaping(
    visual: Tensor,  # [B, T] or [N]
    entropy: Tensor | None,  # visual's shape, as gap and response_mask
    gap: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    progress: float,
    config: list[float],
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weigh and select tokens by their signals, and weigh responses by the mean of theirs.

    Returns:
        factors, weights and selected (bool) in visual's shape, response_factor and score ``[B]``, and metrics ``[4]``.

    """
    settings = ShapingConfig.from_floats(config)
    tokens = tokens_of(response_mask, cu_seqlens)
    counted, shaped, broken = _counted(visual, entropy, gap, tokens)
    usable = [None if one is None else _usable(one, counted.valid, dtype) for one in (entropy, gap)]
    signals = _Signals(_usable(visual, counted.valid, dtype), *usable)
    number = counted.length.clamp(min=1).to(dtype)

    base = _base_weights(signals, counted, number, settings)
    chosen, by_visual, split = _select(signals, counted, number, group_ids, settings)
    weights = split if settings.weight == "share" else base * split

    score = counted.signal_total(signals.visual) / number
    score = torch.where(shaped, score, torch.full_like(score, math.nan))
    response_factor = response_factors(score, group_ids, progress, config, dtype=dtype)
    weights = _faded_in(weights, progress, settings)
    weights = torch.where(counted.valid, weights, torch.ones_like(weights))
    weighed = tokens.valid if settings.response_on == "all" else by_visual
    factors = torch.where(weighed, weights * tokens.spread(response_factor), weights)

    selected = torch.where(counted.valid, chosen, tokens.valid)
    total = counted.length.sum().to(dtype)
    mean = torch.where(shaped, score * number, torch.zeros_like(score)).sum() / total
    metrics = [mean, (selected & counted.valid).sum() / total, shaped.sum(), broken.sum()]
    return (
        factors.reshape(visual.shape),
        weights.reshape(visual.shape),
        selected.reshape(visual.shape),
        response_factor,
        score,
        torch.stack([metric.to(dtype) for metric in metrics]),
    )


def response_factors(
    score: Tensor,  # [B]
    group_ids: Tensor,  # [B]
    progress: float,
    config: list[float],
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B]
    """Weigh responses by their scores, among those of their group or of the batch; 1 where a score is not finite."""
    settings = ShapingConfig.from_floats(config)
    numbers = numbers_of(settings, score.to(dtype))
    score = score.to(dtype)
    if settings.response == "none":
        return torch.ones_like(score)
    member = score.isfinite()
    values = torch.where(member, score, torch.zeros_like(score))
    among = _Among.of(group_ids if settings.response_scope == "group" else torch.zeros_like(group_ids), member)
    if settings.response == "min_max":
        low, high = among.extreme(values, "amin", math.inf), among.extreme(values, "amax", -math.inf)
        apart = high - low
        differs = apart > LEAST_RANGE
        unit = torch.where(differs, (values - low) / torch.where(differs, apart, torch.ones_like(apart)), 0.0)
        floor = numbers["response_floor"]
        most = floor + (1 - floor) / (among.mean(unit) + RANGE_FLOOR)
        found = torch.where(differs, floor + unit * (most - floor), torch.ones_like(unit))
    elif settings.response == "median_mad":
        distance = values - among.median(values)
        deviation = among.median(distance.abs())
        found = 1 + numbers["response_scale"] * torch.tanh(distance / (deviation + RANGE_FLOOR))
    else:
        distance = values - among.mean(values)
        deviation = among.mean(distance.square()).sqrt()
        power = distance / (deviation + DEVIATION_FLOOR) / numbers["response_temperature"]
        share = (power - among.extreme(power, "amax", -math.inf)).exp()
        found = share / among.mean(share)
    return torch.where(member, _faded_in(found, progress, settings), torch.ones_like(found))


def _faded_in(weights: Tensor, progress: float, settings: ShapingConfig) -> Tensor:
    """Move weights from 1 to what they are, by the progress of training."""
    if settings.schedule == "none":
        return weights
    return 1 + weights.new_ones(()) * progress * (weights - 1)


class _Signals(NamedTuple):
    """Signals ``[N]``; 0 at tokens that are not counted, ``None`` where not given."""

    visual: Tensor
    entropy: Tensor | None
    gap: Tensor | None


def _counted(
    visual: Tensor, entropy: Tensor | None, gap: Tensor | None, tokens: Tokens
) -> tuple[Tokens, Tensor, Tensor]:
    """Return the tokens that count, which responses have some, and which are left out for a broken signal.

    The visual signal of tokens before the first image is NaN: these do not count. A signal that is not finite at any
    token after them spoils its response, which is then left as it is.
    """
    flat = visual.reshape(-1)
    ordinal = torch.where(flat.isnan(), math.inf, tokens.ordinal.to(torch.float32))
    start = torch.minimum(tokens.extreme(ordinal, "amin", math.inf) - 1, tokens.length.to(torch.float32))
    sighted = tokens.valid & (tokens.ordinal > tokens.spread(start))
    good = flat.isfinite()
    for other in (entropy, gap):
        if other is not None:
            good = good & other.reshape(-1).isfinite()
    broken = counts_of(sighted & ~good, tokens.response, tokens.batch()) > 0
    valid = sighted & ~tokens.spread(broken)
    length = counts_of(valid, tokens.response, tokens.batch())
    ordinal = tokens.ordinal - tokens.spread(tokens.length - length)
    return tokens._replace(valid=valid, length=length, ordinal=ordinal), length > 0, broken


def _usable(signal: Tensor, counted: Tensor, dtype: torch.dtype) -> Tensor:
    flat = signal.reshape(-1).to(dtype)
    return torch.where(counted, flat, torch.zeros_like(flat))


def _normalized(values: Tensor, counted: Tokens, floor: Tensor) -> Tensor:
    """Min-max normalise within each response; equal values are 0."""
    low, high = counted.extreme(values, "amin", math.inf), counted.extreme(values, "amax", -math.inf)
    unit = (values - counted.spread(low)) / counted.spread(torch.maximum(high - low, floor))
    return torch.where(counted.valid, unit, torch.zeros_like(unit))


def _base_weights(signals: _Signals, counted: Tokens, number: Tensor, settings: ShapingConfig) -> Tensor:
    """Weights of tokens before any is selected."""
    numbers = numbers_of(settings, signals.visual)
    if settings.weight == "softmax":
        return _softmax_weights(signals, counted, number, settings)
    if settings.weight != "gate":
        return torch.ones_like(signals.visual)
    values = signals.visual.clamp(min=0).log1p() if settings.log1p else signals.visual
    unit, threshold = _normalized(values, counted, numbers["range_floor"]), numbers["threshold"]
    below = torch.maximum(unit / threshold, numbers["floor"])
    above = 1 + numbers["boost"] * (unit - threshold) / (1 - threshold)
    raw = torch.where(counted.valid, torch.where(unit < threshold, below, above), torch.zeros_like(unit))
    if not settings.conserve:
        return raw
    mass = counted.signal_total(raw)
    empty = mass <= RANGE_FLOOR
    scale = torch.where(empty, torch.zeros_like(mass), number / torch.where(empty, torch.ones_like(mass), mass))
    return raw * counted.spread(scale) + counted.spread(empty.to(raw.dtype))


def _softmax_weights(signals: _Signals, counted: Tokens, number: Tensor, settings: ShapingConfig) -> Tensor:
    """Softmax of the visual signal over each response, times its length; entropy gates the exponents."""
    numbers = numbers_of(settings, signals.visual)
    power = signals.visual / numbers["temperature"]
    if signals.entropy is not None and settings.entropy_gate != 0:
        floor = numbers["range_floor"]
        mixed = _normalized(signals.visual, counted, floor) + _normalized(signals.entropy, counted, floor)
        mean = counted.signal_total(mixed) / number
        power = power * (1 + numbers["entropy_gate"] * torch.tanh(mixed - counted.spread(mean)))
    highest = counted.extreme(power, "amax", -math.inf)
    share = torch.where(counted.valid, power - counted.spread(highest), torch.zeros_like(power)).exp()
    total = counted.signal_total(share)
    return share * counted.spread(number / torch.where(total > 0, total, torch.ones_like(total)))


def _select(
    signals: _Signals, counted: Tokens, number: Tensor, group_ids: Tensor, settings: ShapingConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens are selected, which by the visual score, and the weights that this gives them."""
    ones = torch.ones_like(signals.visual)
    numbers = numbers_of(settings, signals.visual)
    if settings.top_visual is None and settings.top_entropy is None:
        return counted.valid, counted.valid, ones
    if settings.scope == "response":
        segment = torch.arange(counted.batch(), device=group_ids.device)
    else:
        segment = group_numbers(group_ids if settings.scope == "group" else torch.zeros_like(group_ids))
    segment = counted.spread(segment)
    by_visual, by_entropy = torch.zeros_like(counted.valid), torch.zeros_like(counted.valid)
    if settings.top_visual is not None:
        by_visual = _top(_visual_score(signals, counted, settings), counted, segment, settings.top_visual)
    if settings.top_entropy is not None:
        assert signals.entropy is not None
        by_entropy = _top(signals.entropy, counted, segment, settings.top_entropy)
    if settings.weight == "share":
        return by_visual, by_visual, _shared(by_visual, counted, number, numbers["share"])
    other = ones * numbers["other_weight"]
    split = torch.where(by_visual, ones * numbers["visual_weight"], other)
    return by_visual | by_entropy, by_visual, torch.where(by_entropy, ones * numbers["entropy_weight"], split)


def _shared(by_visual: Tensor, counted: Tokens, number: Tensor, share: Tensor) -> Tensor:
    """Weights by which the chosen tokens of a response have this share of its mass; 1 where all are chosen."""
    chosen = counts_of(by_visual, counted.response, counted.batch()).to(number.dtype)
    others = number - chosen
    both = (others > 0) & (chosen > 0)
    inside = torch.where(both, share * number / chosen.clamp(min=1), torch.ones_like(number))
    outside = torch.where(both, (1 - share) * number / others.clamp(min=1), torch.ones_like(number))
    return torch.where(by_visual, counted.spread(inside), counted.spread(outside))


def _visual_score(signals: _Signals, counted: Tokens, settings: ShapingConfig) -> Tensor:
    """What the visual selection goes by."""
    numbers = numbers_of(settings, signals.visual)
    score, floor = signals.visual, numbers["range_floor"]
    if settings.fusion == "soft_or":
        assert signals.gap is not None
        alpha = numbers["fusion_weight"]
        less = (1 - _normalized(signals.visual, counted, floor)) ** alpha
        score = 1 - less * (1 - _normalized(signals.gap, counted, floor)) ** (1 - alpha)
    if settings.times_entropy:
        assert signals.entropy is not None
        score = score * _normalized(signals.entropy, counted, floor)
    return score


def _top(score: Tensor, counted: Tokens, segment: Tensor, fraction: float) -> Tensor:
    """Whether a token is among the top fraction of its segment's: exactly so many, of equal ones the first."""
    size = counts_of(counted.valid, segment, counted.batch())
    wanted = top_count(size, fraction, wide=score.dtype == torch.float64)
    return counted.valid & (ranks(score, segment, counted.valid, counted.batch()) < wanted[segment])


def top_count(number: Tensor, fraction: float, *, wide: bool) -> Tensor:
    """Return how many are the top ``fraction`` of each number, rounded up, and at least one."""
    exact = number.to(torch.float64) if wide else number.cpu().to(torch.float64)
    return (exact * fraction - COUNT_SLACK).ceil().to(torch.int64).to(number.device).clamp(min=1)


def ranks(values: Tensor, segment: Tensor, member: Tensor, number: int) -> Tensor:
    """Return how many members of its segment come before each entry, the largest first, of equal ones the earliest.

    By sorts of numbers of which no two are equal, where it matters: not every release of torch sorts stably on Apple's
    GPUs.

    Args:
        values: ``[N]``.
        segment: Of each entry, ``[N]``, in any order.
        member: Whether an entry counts; others come after all members of their segment.
        number: Of segments.

    """
    length = len(values)
    place = torch.arange(length, device=values.device)
    descending = torch.where(member, -values, torch.full_like(values, math.inf))
    order = descending.argsort()
    ordered = descending[order]
    steps = (ordered[1:] != ordered[:-1]).to(torch.int64).cumsum(0)
    level = torch.empty_like(place).scatter(0, order, torch.cat([place[:1], steps]))
    sequence = ((segment * length + level) * length + place).argsort()
    begin = counts_of(torch.ones_like(member), segment, number).cumsum(0)
    begin = torch.cat([begin.new_zeros(1), begin])[segment]
    return torch.empty_like(place).scatter(0, sequence, place) - begin


class _Among(NamedTuple):
    """Responses ``[B]`` compared with those of their segment that take part."""

    segment: Tensor
    member: Tensor
    size: Tensor  # members of its segment

    @classmethod
    def of(cls, group_ids: Tensor, member: Tensor) -> _Among:
        segment = group_numbers(group_ids)
        return cls(segment, member, counts_of(member, segment, len(segment))[segment])

    def extreme(self, values: Tensor, how: str, empty: float) -> Tensor:
        """Smallest or largest value of the members of each response's segment, ``[B]``."""
        chosen = torch.where(self.member, values, torch.full_like(values, empty))
        found = values.new_full(values.shape, empty).scatter_reduce(0, self.segment, chosen, how)[self.segment]
        return torch.where(self.size > 0, found, torch.zeros_like(found))

    def mean(self, values: Tensor) -> Tensor:
        """Their mean."""
        order = self.segment.argsort()
        chosen = torch.where(self.member, values, torch.zeros_like(values))
        total = sums_of(chosen[order, None], self.segment[order], len(values)).squeeze(-1)[self.segment]
        return total / self.size.clamp(min=1).to(values.dtype)

    def median(self, values: Tensor) -> Tensor:
        """Their median, of an even number the lower of both."""
        place = ranks(-values, self.segment, self.member, len(values))
        middle = self.member & (place == (self.size - 1) // 2)
        chosen = torch.where(middle, values, torch.zeros_like(values))
        return values.new_zeros(values.shape).scatter_add(0, self.segment, chosen)[self.segment]

"""Checks of log-probabilities: some are computed again, from hidden states and the LM head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.batch_checks.batch import Batch
from vgpo_kernels.batch_checks.findings import Finding
from vgpo_kernels.batch_checks.heads import Head
from vgpo_kernels.ops.linear_logprob import linear_logprob
from vgpo_kernels.reference.logits import LogitMap

FULL = (torch.float32, torch.float64)
# Mean differences, in nats and as shares of 1 + the mean size: no more than rounding makes, and more than engines do.
FINE = {True: 1e-3, False: 0.02}  # of states of 32 bits and more, and of 16; logits may be of 16 nevertheless
FAR = 0.1
ROUNDING = 0.2  # nats that rounding of logits to 16 bits makes at most, where states are of 32
OFF_POLICY = 0.5  # of log-probabilities of another policy, which is near this one
BETTER = 4  # how many times closer an explanation has to be
LEAST_TEMPERATURE = 0.08  # difference of its logarithm that is told
TELLING = 16  # tokens: of fewer, one or another explanation fits by chance

ABOVE = ("logits", "probabilities", "negated", "entropy")  # what may be above 0

_LOGITS = "logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)"


class Sample(NamedTuple):
    """Some scored tokens.

    Attributes:
        positions: Of the tokens among all positions, int64 ``[n]``; each has a row before it.
        ids: The tokens, ``[n]``.
        temperatures: What their logits are divided by, fp32 ``[n]``.

    """

    positions: Tensor
    ids: Tensor
    temperatures: Tensor


class Reader(NamedTuple):
    """Computes log-probabilities of a batch by the head."""

    batch: Batch
    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    def logp(self, rows: Tensor, sample: Sample, ids: Tensor, states: Tensor | None = None) -> Tensor:
        """Log-probabilities of tokens after the rows at some positions, ``[n]``."""
        assert self.batch.hidden is not None
        found = linear_logprob(
            self.batch.hidden[rows] if states is None else states,
            self.weight,
            ids,
            bias=self.bias,
            temperature=sample.temperatures,
            logit_scale=self.scale,
            softcap=self.cap,
            ignore_index=None,
        )
        assert isinstance(found, Tensor)
        return found

    def logits(self, rows: Tensor) -> Tensor:
        """Logits at some positions before they are divided by a temperature, fp32 ``[n, V]``."""
        assert self.batch.hidden is not None
        weight = self.weight.to(self.batch.hidden.dtype)
        products = nn.functional.linear(self.batch.hidden[rows], weight).float()
        bias = None if self.bias is None else self.bias.float()
        return LogitMap(logit_scale=self.scale, softcap=self.cap or 0.0).logits(products, bias)


class Explanation(NamedTuple):
    """What log-probabilities could be instead of what they should be."""

    name: str
    values: Tensor
    told: str
    read: Callable[[Tensor], Tensor] = torch.Tensor.detach  # what to compare of what is given

    def distance(self, given: Tensor) -> float:
        """How far what is given is from this."""
        return _core(self.read(given), self.values)


def check_logprobs(
    batch: Batch, head: Head, temperature: float | Tensor, samples: int
) -> tuple[list[Finding], list[str]]:
    """Find log-probabilities that the hidden states and the head do not give.

    Returns:
        The findings, and what could not be looked at.

    """
    given = {name: value for name, value in _given(batch).items() if value is not None}
    if not given:
        return [], []
    positive = [finding for name, value in given.items() if (finding := _positive(name, value[batch.scored]))]
    if batch.hidden is None or batch.ids is None or head.weight is None:
        why = head.why_not if head.weight is None else "hidden or ids are not given"
        return positive, [f"{' and '.join(given)} against hidden: {why}"]
    if head.weight.device != batch.hidden.device:
        if head.is_given:
            checks.require_device("model_or_head", head.weight, batch.hidden.device, "hidden")
        return positive, [f"{' and '.join(given)} against hidden: the LM head is on {head.weight.device}"]
    if head.weight.shape[1] != batch.hidden.shape[1]:
        raise ValueError(
            f"model_or_head must have a column for each of the {batch.hidden.shape[1]} features of hidden, got "
            f"{checks.describe(head.weight)}"
        )
    sample = _sample(batch, next(iter(given.values())), len(head.weight), temperature, samples)
    if sample is None:
        return positive, [f"{' and '.join(given)} against hidden: no scored token has a row before it and a known id"]
    found = list(_compare(batch, head, sample, {name: value[sample.positions] for name, value in given.items()}))
    return found or positive, []


def _given(batch: Batch) -> dict[str, Tensor | None]:
    return {"logp": batch.logp, "old_logp": batch.old_logp}


def _positive(name: str, values: Tensor) -> Finding | None:
    """Find log-probabilities above 0, by more than rounding."""
    above = int((values > 0.1).sum())
    if not above:
        return None
    if bool(((values >= 0) & (values <= 1)).all()):
        return Finding("probabilities", f"{name} lies between 0 and 1: it holds probabilities; take {name}.log()")
    return Finding(
        "logits",
        f"{name} is above 0 at {above} of {len(values)} tokens, as no log-probability is; logits? {_LOGITS}",
    )


def _sample(batch: Batch, values: Tensor, vocabulary: int, temperature: float | Tensor, samples: int) -> Sample | None:
    """Choose tokens: half of them evenly, half of those that the policy was least sure of, which tell most."""
    assert batch.ids is not None and batch.hidden is not None
    usable = batch.scored & (batch.ids >= 0) & (batch.ids < vocabulary) & values.isfinite()
    begins = batch.begin[batch.begin < len(usable)]
    usable = usable.index_fill(0, begins, False)
    places = usable.nonzero().squeeze(-1)
    if not len(places):
        return None
    if len(places) > samples:
        # Where log-probs are shifted, those at the ends of a response are of other tokens altogether.
        scored = nn.functional.pad(batch.scored, (1, 1))
        inside = (scored[:-2] & scored[2:])[places]
        even = torch.linspace(0, len(places) - 1, samples // 2, device=places.device).round().long()
        unsure = torch.where(inside, values[places].abs(), -1.0).topk(samples - samples // 2).indices
        chosen = torch.zeros_like(places, dtype=torch.bool)
        chosen[even] = chosen[unsure] = True
        places = places[chosen]
    if isinstance(temperature, Tensor):
        of_all = torch.ones_like(values).index_copy(0, batch.response, temperature.detach().float().reshape(-1))
        temperatures = of_all[places]
    else:
        temperatures = torch.full_like(places, temperature, dtype=torch.float32)
    return Sample(places, batch.ids[places], temperatures)


def _compare(batch: Batch, head: Head, sample: Sample, given: dict[str, Tensor]) -> Iterator[Finding]:
    """Compare what is given with what the head gives, and say what explains the difference."""
    assert head.weight is not None and batch.hidden is not None
    full = batch.hidden.dtype in FULL and not torch.is_autocast_enabled(batch.hidden.device.type)
    full = full and head.weight.dtype in FULL
    readers = [Reader(batch, head.weight, head.bias, scale, cap) for scale, cap in head.maps]
    before = sample.positions - 1
    right = [reader.logp(before, sample, sample.ids) for reader in readers]
    # Names mean different things in different models: the map that fits is the model's.
    fits = [min(_apart(values, one) for values in given.values()) for one in right]
    best = fits.index(min(fits))
    expected, reader = right[best], readers[best]
    size = 1 + float(expected.abs().mean())
    apart = {name: _apart(values, expected) for name, values in given.items()}
    fine = {"logp": FINE[full] * size, "old_logp": FINE[False] * size}  # engines are of 16 bits
    farthest = {"logp": min(FAR * size, ROUNDING) if full else FAR * size, "old_logp": OFF_POLICY * size}
    off = [name for name in given if fine[name] < apart[name] < math.inf]
    tells = bool(off) and len(sample.ids) >= TELLING
    explanations = list(_explanations(reader, head, sample)) if tells else []
    explained: dict[int, list[str]] = {}
    unexplained = []
    for name in off:
        same = len(sample.ids) >= TELLING and bool((given[name] == given[name][0]).all())
        if same and apart[name] > OFF_POLICY:
            yield Finding("log-probs", f"{name} is {float(given[name][0]):.3g} at every token; was it ever filled?")
            continue
        beside = "temperature" if name == "old_logp" and _may_be_cut(given[name] - expected, size) else ""
        distances = [math.inf if one.name == beside else one.distance(given[name]) for one in explanations]
        if bool((given[name] <= 1e-3).all()):
            # No log-probs are above 0: of what is, nothing but an exact fit tells.
            exact = FINE[full] * (1 + float(given[name].abs().mean()))
            loose = [one.name in ABOVE and far > exact for one, far in zip(explanations, distances, strict=True)]
            distances = [math.inf if is_loose else far for is_loose, far in zip(loose, distances, strict=True)]
        nearest = min(range(len(distances)), key=distances.__getitem__, default=-1)
        core = _core(given[name], expected)
        # Where all but a few tokens fit, the rest of them tells nothing.
        if distances and core > fine[name] and distances[nearest] < min(core / BETTER, FAR * size):
            explained.setdefault(nearest, []).append(name)
        elif apart[name] > farthest[name] or (name == "logp" and _has_others(given[name] - expected)):
            unexplained.append(name)
    for nearest, names in explained.items():
        others = f", and {names[1]} too" if len(names) > 1 else ""
        told = explanations[nearest].told.format(name=names[0])
        figures = f"{apart[names[0]]:.2g} nats off on average of {len(sample.ids)} tokens"
        yield Finding(explanations[nearest].name, f"{told} ({figures}{others})")
    if unexplained:
        agree = [name for name in given if apart[name] <= farthest["logp"]]
        yield _unexplained(unexplained, agree, apart, len(sample.ids))


def _has_others(differences: Tensor) -> bool:
    """Whether a tenth of the tokens, those of some rows, are off by more than any rounding."""
    return 10 * int((differences.abs() > 1).sum()) >= len(differences) >= TELLING


def _may_be_cut(above: Tensor, size: float) -> bool:
    """Whether a sampler may have cut the tail (top-p, top-k) and given log-probs of what is left, which are higher.

    They are so by minus the logarithm of what is left, of at most one half.
    """
    above = above[above.isfinite()]
    other = (above < -FINE[False] * size) | (above > math.log(2))
    return 10 * int(other.sum()) < len(above)


def _unexplained(names: list[str], agree: list[str], apart: dict[str, float], number: int) -> Finding:
    figures = " and ".join(f"{name} by {apart[name]:.2g}" for name in names)
    told = f"the LM head gives other log-probabilities on hidden: {figures} nats on average of {number} tokens"
    if agree:
        return Finding(
            "log-probs", f"{told}, though {agree[0]} agrees; is {names[0]} of the same tokens, rows and temperature?"
        )
    return Finding(
        "hidden-states",
        f"{told}; hidden must be what the LM head reads, after the last layer and the final norm "
        "(capture_hidden_states(model), or the decoder's last_hidden_state), of the same tokens, weights and pass",
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """Mean difference of what is finite in both; infinite where nothing is."""
    both = one.isfinite() & other.isfinite()
    return float((one - other).abs()[both].mean()) if bool(both.any()) else math.inf


def _core(one: Tensor, other: Tensor) -> float:
    """Mean of the smallest three quarters of what :func:`_apart` averages: some tokens may be beside the point.

    Infinite where fewer than half are finite: a few fit by chance.
    """
    differences = (one - other).abs()
    differences = differences[differences.isfinite()].sort().values
    enough = len(differences) >= max(len(one) / 2, TELLING)
    return float(differences[: 3 * len(differences) // 4].mean()) if enough else math.inf


def _explanations(reader: Reader, head: Head, sample: Sample) -> Iterator[Explanation]:
    """What log-probabilities are in the mistakes that pass silently; ``{name}`` stands for their argument."""
    batch, positions = reader.batch, sample.positions
    assert batch.ids is not None and batch.hidden is not None
    last = len(batch.ids) - 1
    yield Explanation(
        "shifted",
        reader.logp(positions, sample, sample.ids),
        "{name}[b, t] must be the log-probability of the token at position t, which the row before it predicts, but it "
        "fits the row at the token itself: take logits[:, -T-1:-1] for the last T tokens, and hidden unshifted",
    )
    for step, which in ((1, "after"), (-1, "before")):
        rows = (positions + step).clamp(1, last)
        ids = batch.ids[rows]
        inside = (batch.sequence[rows] == batch.sequence[positions]) & (ids >= 0) & (ids < len(reader.weight))
        values = reader.logp(rows - 1, sample, torch.where(inside, ids, 0))
        yield Explanation(
            "shifted",
            values.masked_fill(~inside, torch.nan),
            f"{{name}}[b, t] is the log-probability of the token {which} position t: shift it by one, so that it "
            "stands where ids and response_mask have its token (logits[:, -T-1:-1] for the last T tokens; hidden and "
            "visual_mask stay whole)",
        )
    raw = reader.logits(positions - 1)
    divided = raw / sample.temperatures[:, None]
    own = sample.ids[:, None]
    distribution = divided.log_softmax(-1)
    logp = distribution.gather(-1, own)[:, 0]
    yield Explanation("logits", raw.gather(-1, own)[:, 0], "{name} holds logits: " + _LOGITS)
    yield Explanation("logits", divided.gather(-1, own)[:, 0], "{name} holds logits: " + _LOGITS)
    # By their logarithms: next to a small probability zeros would do as well.
    yield Explanation("probabilities", logp, "{name} holds probabilities: take their logarithm", torch.log)
    yield Explanation("negated", -logp, "{name} has the wrong sign: cross_entropy gives minus the log-probability")
    entropy = -(distribution.exp() * distribution.clamp(min=-1e4)).sum(-1)
    yield Explanation("entropy", entropy, "{name} holds entropies")
    told = _spell(sample.temperatures)
    for other in _temperatures(raw, own, batch, sample):
        if float((sample.temperatures / other).log().abs().mean()) < LEAST_TEMPERATURE:
            continue
        yield Explanation(
            "temperature",
            (raw / other).log_softmax(-1).gather(-1, own)[:, 0],
            f"{{name}} fits a temperature of {other:.3g} instead of {told}: divide logits by the temperature that "
            "sampled, in every pass, and pass it as temperature= (a head that scales its logits needs logit_scale=)",
        )
    if head.norm is not None:
        normed = head.norm(batch.hidden[positions - 1])
        if isinstance(normed, Tensor) and normed.shape[-1] == batch.hidden.shape[-1]:
            yield Explanation(
                "hidden-states",
                reader.logp(positions - 1, sample, sample.ids, normed.detach()),
                "{name} fits hidden after the model's final norm, which it has not been through: take what "
                "capture_hidden_states(model) captures, or the decoder's last_hidden_state",
            )


def _spell(temperatures: Tensor) -> str:
    least, most = float(temperatures.min()), float(temperatures.max())
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


def _temperatures(raw: Tensor, own: Tensor, batch: Batch, sample: Sample) -> list[float]:
    """Return temperatures that what is given may have, each the one that fits best."""
    found = [1.0]
    for given in _given(batch).values():
        if given is None:
            continue
        values = given[sample.positions]

        def distance(log: float, values: Tensor = values) -> float:
            return _apart(values, (raw / math.exp(log)).log_softmax(-1).gather(-1, own)[:, 0])

        centre, step = 0.0, 0.5
        while step > 1e-3:
            centre = min((centre + place * step for place in range(-5, 6)), key=distance)
            step /= 4
        found.append(math.exp(centre))
    return found

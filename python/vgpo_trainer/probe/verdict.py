"""What a probe's numbers mean, in sentences that say no more than their intervals allow."""

from __future__ import annotations

import math

from vgpo_trainer.probe.record import Findings, PhiFinding, SignalFinding, ViewFinding
from vgpo_trainer.probe.statistics import Estimate

GOOD, FAIR = 0.9, 0.7  # AUC
SHOWN = (("focus", "token"), ("focus", "state"), ("attention", "token"), ("attention", "state"))
LITTLE = 0.001  # nats per token


def verdict(found: Findings) -> list[str]:
    """Return the sentences, the most important first."""
    dependency = found.views[0]
    if not dependency.mean.value > LITTLE:
        return [
            f"The answers hardly depend on the image: {named(found.view)} moves the prediction of a token by "
            f"{dependency.mean.value:.2g} nats on average. No signal can find what is not there."
        ]
    sentences = [_where(found, dependency)]
    sentences += [_signal(found.signal(*key)) for key in SHOWN]
    sentences.append(_kinds(found))
    sentences.append(_energy(found))
    sentences += [_phi(finding, found.reward) for finding in found.phi if finding.signal == "focus"]
    sentences += _views(found)
    if found.gradient is not None:
        sentences.append(_gradient(found))
    return [sentence for sentence in sentences if sentence]


def named(view: str) -> str:
    """A view in words."""
    return {
        "swap": "another row's image",
        "blank": "a blank image",
        "noise": "an image in noise",
        "swap again": "the image of yet another row",
    }.get(view, view)


def _where(found: Findings, dependency: ViewFinding) -> str:
    top = found.settings["top"]
    return (
        f"With {named(found.view)} a token's prediction moves by {dependency.mean.value:.2f} nats on average "
        f"{_range(dependency.mean)}; {top:.0%} of the tokens hold {dependency.held.value:.0%} of that, and half of it "
        f"lies on {found.half:.1%} of them."
    )


def _signal(signal: SignalFinding) -> str:
    """How a signal finds the tokens, and what weighting by it does."""
    name = f"{signal.signal.capitalize()} at the {signal.place}"
    auc = signal.auc
    if auc.low > GOOD:
        finds = "finds the tokens that need the image"
    elif auc.low > FAIR:
        finds = "often tells the tokens that need the image from the others"
    elif auc.low > 0.5:
        finds = "tells the tokens that need the image from the others only a little"
    elif auc.high < 0.5:
        finds = "is lower at the tokens that need the image than at others"
    else:
        finds = "was not seen to tell the tokens that need the image from the others"
    joint = "and" if (auc.low > FAIR) == (signal.lift.value > 1.25) else "but"
    return (
        f"{name} {finds} (AUC {auc}), {joint} weighting by it {_weight(signal.lift)}. Its scores differ by "
        f"{signal.spread:.0%} of their mean within an answer, which psi stretches to the full range."
    )


def _weight(lift: Estimate) -> str:
    """A lift in words."""
    change = f"{100 * abs(lift.value - 1):.0f}%"
    interval = f"lift {lift}"
    if lift.low > 1:
        return f"puts {change} more weight on what depends on the image than equal weights do ({interval})"
    if lift.high < 1:
        return f"takes {change} of the weight away from what depends on the image ({interval})"
    return f"puts no more weight on what depends on the image than equal weights do, as far as this tells ({interval})"


def _kinds(found: Findings) -> str:
    """Which kinds of tokens the best signal of the trainer misses, if they matter."""
    best = max((found.signal(*key) for key in SHOWN[::2]), key=lambda signal: signal.auc.value)
    key = f"{best.signal} at the {best.place}"
    missed = [kind for kind in found.texts if kind.ranks[key] < 0.4 and kind.dependency > 0.05]
    if not missed:
        return ""
    listed = ", ".join(f"{kind.text!r} ({kind.dependency:.0%})" for kind in missed)
    return f"{key.capitalize()} ranks low where part of the dependency is: {listed}."


def _energy(found: Findings) -> str:
    return (
        f"The tokens with the highest dependency already hold {found.energy.value:.0%} {_range(found.energy, 'share')} "
        "of the gradient's energy before any weighting."
    )


def _phi(phi: PhiFinding, reward: float) -> str:
    """What phi of one accumulation follows."""
    parts = []
    if phi.length.low > 0.5:
        parts.append(f"follows the length of a response (rank correlation {phi.length})")
    elif phi.length.low > 0 or phi.length.high < 0:
        parts.append(f"has to do with the length of a response (rank correlation {phi.length})")
    else:
        parts.append(f"was not seen to follow length (rank correlation {phi.length})")
    low, high = phi.lift_shuffled
    if low <= phi.lift.value <= high:
        parts.append(f"does no better than phi shuffled within prompts (lift {_precise(phi.lift)})")
    else:
        better = "more" if phi.lift.value > high else "less"
        parts.append(f"puts {better} weight on dependent responses than shuffled phi does (lift {_precise(phi.lift)})")
    if math.isfinite(reward) and (phi.reward.low > 0 or phi.reward.high < 0):
        parts.append(f"goes with the reward (rank correlation {phi.reward})")
    told = ", ".join(parts[:-1]) + f" and {parts[-1]}"
    mates = f"; {phi.mates:.0%} of its variance is the choice of the other responses" if phi.mates == phi.mates else ""
    return (
        f"Phi of focus with accumulation={phi.accumulation!r} {told}; what it stretches to the full range differs by "
        f"{phi.spread:.1%} within a prompt{mates}."
    )


def _views(found: Findings) -> list[str]:
    """What other views would have said, and how far the dependency repeats itself."""
    sentences = []
    for view in found.views[1:]:
        if view.view == "swap again":
            sentences.append(
                f"Another swap finds the same tokens with AUC {view.auc}: about the best for a signal that does not "
                "know which image was swapped in."
            )
        else:
            sentences.append(
                f"{named(view.view).capitalize()} moves predictions by {view.mean.value:.2f} nats and points at "
                f"{view.overlap.value:.0%} of the same tokens."
            )
    return sentences


def _gradient(found: Findings) -> str:
    """Which weightings help or hurt, beyond their intervals."""
    assert found.gradient is not None
    told = [item for item in found.gradient.findings if item.weighting != "none"]
    plain = next(item for item in found.gradient.findings if item.weighting == "none")
    if not plain.cosine.low > 0:
        return (
            f"Gradients of {found.gradient.batches} batches do not agree with one another beyond chance (cosine "
            f"{plain.cosine}), so they say nothing about weightings: probe more prompts."
        )
    better = [item.weighting for item in told if item.change.low > 0]
    worse = [item.weighting for item in told if item.change.high < 0]
    parts = []
    for names, how in ((better, "closer to"), (worse, "farther from")):
        if names:
            parts.append(f"{', '.join(names)}: {how} the policy gradient than plain advantages")
    if not parts:
        return (
            f"Over {found.gradient.batches} batches no weighting was seen to bring the gradient closer to the policy "
            "gradient than plain advantages do, nor to take it farther away."
        )
    return f"Gradients over {found.gradient.batches} batches: {'; '.join(parts)}."


def _precise(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _range(estimate: Estimate, kind: str = "") -> str:
    low, high = estimate.low, estimate.high
    return f"[{low:.0%}, {high:.0%}]" if kind == "share" else f"[{low:.2f}, {high:.2f}]"

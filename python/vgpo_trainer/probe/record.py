"""What a probe found: the content of ``probe.json``, which is written as these classes nest.

A number that is undefined (NaN here) is ``null`` there. Every :class:`~vgpo_trainer.probe.statistics.Estimate` is an
object with ``value``, ``low`` and ``high``: a number and its 95% interval over prompts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vgpo_trainer.probe.statistics import Estimate
from vgpo_trainer.runs.json import finite
from vgpo_trainer.runs.writing import write_atomically

VERSION = 1  # of the file's form


@dataclass(frozen=True)
class SignalFinding:
    """How one signal, read at one place, finds the tokens that depend on the image.

    Attributes:
        signal: One of :data:`~vgpo_trainer.probe.measuring.SIGNALS`.
        place: ``"token"`` or ``"state"``, the position before it, which predicted the token.
        auc: Chance that a token of those with the highest dependency (the ``top`` of the settings: 20% of all) has a
            higher signal than another.
        auc_shuffled: The same where signals are shuffled within each response: 0.5 unless responses differ as wholes.
        overlap: Share of those that are among as many with the highest signal; by chance ``top``.
        lift: Mean of ``1 + psi`` weighted by dependency over its plain mean: 1 is no better than equal weights.
        lift_shuffled: The same where the signal is shuffled within each response.
        spread: Largest less smallest score of a response over their mean, mean over responses.
        gain: Share of the dependency on the highest shares of tokens by this signal, :attr:`Findings.gain_at`.
        passes: Forward passes it takes beside the one that training makes anyway.
        seconds: Time it took beside that pass, for all responses.
    """

    signal: str
    place: str
    auc: Estimate
    auc_shuffled: float
    overlap: Estimate
    lift: Estimate
    lift_shuffled: float
    spread: float
    gain: list[float]
    passes: int
    seconds: float


@dataclass(frozen=True)
class ViewFinding:
    """How far the predictions move where another view takes the image's place.

    Attributes:
        view: ``"swap"``, another row's image; ``"blank"``; ``"noise"``; or ``"swap again"``, of yet another row: what
            it finds of the first swap's tokens is about what any signal can find.
        mean: KL in nats per token.
        held: Share of its nats on the ``top`` tokens with the most of them.
        auc: As in :class:`SignalFinding`, of this KL for the dependency; NaN for the dependency itself.
        overlap: Likewise.
    """

    view: str
    mean: Estimate
    held: Estimate
    auc: Estimate
    overlap: Estimate


@dataclass(frozen=True)
class PhiFinding:
    """What the weight of a response, phi, follows.

    Attributes:
        signal, place: What phi is made of.
        accumulation: How (:class:`vgpo_kernels.VGPOConfig`).
        length: Rank correlation with the number of tokens less its mean over the responses to the prompt: phi compares
            no others.
        reward: Likewise with the reward; NaN without one.
        dependency: Likewise with the mean dependency of the response's tokens.
        lift: Mean of ``1 + phi`` weighted by mean dependency over its plain mean.
        lift_shuffled: Range that this has in 95% of shuffles of phi among the responses of each prompt: low, high.
        spread: Largest less smallest accumulation of a group over their mean, mean over groups; phi stretches it to 1.
        mates: Share of the variance of phi that is the choice of the other responses to the prompt; NaN with fewer than
            three responses a prompt.
    """

    signal: str
    place: str
    accumulation: str
    length: Estimate
    reward: Estimate
    dependency: Estimate
    lift: Estimate
    lift_shuffled: tuple[float, float]
    spread: float
    mates: float


@dataclass(frozen=True)
class TokenFinding:
    """Tokens that are written alike.

    Attributes:
        text: What they are.
        share: Of all tokens.
        dependency: Share of all dependency.
        mean: Dependency in nats per token.
        ranks: Mean rank of each signal among all tokens, 0 lowest to 1 highest, by ``"<signal> at the <place>"``.
    """

    text: str
    share: float
    dependency: float
    mean: float
    ranks: dict[str, float]


@dataclass(frozen=True)
class GradientFinding:
    """How far a step along a weighted gradient goes along the policy gradient of other prompts.

    Attributes:
        weighting: What advantages are multiplied by.
        cosine: Mean cosine of a batch's weighted gradient with the plain gradient of independent batches.
        change: The cosine less that without weights, ``"none"``, of the same batches: below 0, weights do harm.
        efficiency: The cosine over that without weights. Worth a look only where the latter is clearly above 0.
    """

    weighting: str
    cosine: Estimate
    change: Estimate
    efficiency: float


@dataclass(frozen=True)
class Gradient:
    """The measurement behind :class:`GradientFinding`.

    Attributes:
        parameters: Which parameters the gradients are of.
        batches: Number of batches that have a gradient: those whose rewards differ within a group.
        findings: By weighting.
    """

    parameters: str
    batches: int
    findings: list[GradientFinding]


@dataclass(frozen=True)
class Example:
    """A response to look at.

    Attributes:
        prompt: Number of its prompt.
        reward: NaN without one.
        tokens: Their texts.
        dependency: KL of each token, in nats.
        signals: Each signal's value of each token, by ``"<signal> at the <place>"``.
        psi: Token weight of each, likewise.
        phi: Weight of the response, from the focus at the token.
    """

    prompt: int
    reward: float
    tokens: list[str]
    dependency: list[float]
    signals: dict[str, list[float]]
    psi: dict[str, list[float]]
    phi: float


@dataclass(frozen=True)
class Findings:
    """Everything that a probe found.

    Attributes:
        model, dataset: Their names.
        settings: The options of the probe, and the fields of :class:`vgpo_kernels.VGPOConfig` under ``vgpo``.
        versions: Of torch and transformers.
        view: What the dependency is the divergence to.
        prompts, responses, tokens: How many.
        length: Mean tokens of a response.
        reward: Mean; NaN without rewards.
        half: Share of the tokens that hold half of the dependency.
        energy: Share of the gradient's energy (squared norm of the gradient of log p by the logits) that lies on the
            tokens with the highest dependency.
        signals, views, phi, texts: The findings.
        gain_at: Shares of tokens of :attr:`SignalFinding.gain`.
        gain: Likewise for the dependency itself: the most that a signal can hold.
        positions: Relative positions in a response, and the mean KL of each view there, by its name.
        seconds: Of parts of the work; ``"pass"`` is a pass over all responses that reads nothing.
        gradient: ``None`` unless it was asked for.
        verdict: What this means, in sentences.
        examples: Responses to look at.
        version: Of the file's form.
    """

    model: str
    dataset: str
    settings: dict[str, Any]
    versions: dict[str, str]
    view: str
    prompts: int
    responses: int
    tokens: int
    length: float
    reward: float
    half: float
    energy: Estimate
    signals: list[SignalFinding]
    views: list[ViewFinding]
    phi: list[PhiFinding]
    texts: list[TokenFinding]
    gain_at: list[float]
    gain: list[float]
    positions: dict[str, list[float]]
    seconds: dict[str, float]
    gradient: Gradient | None
    verdict: list[str]
    examples: list[Example]
    version: int = field(default=VERSION)

    def signal(self, name: str, place: str) -> SignalFinding:
        """Return the finding of a signal at a place."""
        return next(found for found in self.signals if (found.signal, found.place) == (name, place))

    def write(self, path: str | Path) -> Path:
        """Write ``probe.json`` and return its path."""
        write_atomically(path, json.dumps(finite(asdict(self), digits=6), indent=1, allow_nan=False) + "\n")
        return Path(path)

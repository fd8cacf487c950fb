"""Settings of the family: how per-token signals become weights, with a preset for each published method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from vgpo_kernels import hints
from vgpo_kernels.config import Number, Settings, VGPOConfig, named, spell

# Kernels know a choice by its place in these lists (csrc/shaping_math.h has enums of the same order).
Fusion = Literal["visual", "soft_or"]
TokenWeight = Literal["ones", "softmax", "gate", "share"]
SelectionScope = Literal["response", "group", "batch"]
ResponseWeight = Literal["none", "min_max", "median_mad", "softmax"]
ResponseScope = Literal["group", "batch"]
Weighed = Literal["all", "visual"]
ShapingSchedule = Literal["none", "linear"]


@named()
@dataclass(frozen=True)
class ShapingConfig(Settings):
    """How per-token signals become weights of tokens and responses; the presets are the published methods.

    A token's weight is what ``weight`` makes of its signals, times what the selection gives it; its advantage is
    multiplied by that and by its response's factor. Where a method selects tokens, exactly ``ceil(fraction * n)`` of
    the n tokens in ``scope`` are selected; of equal scores the tokens that come first in the batch.

    Min-max normalisation is within a response: ``(x - min) / max(max - min, range_floor)``.

    Args:
        log1p: Whether ``"gate"`` normalises ``log(1 + max(x, 0))`` of the visual signal x, instead of x.
        fusion: The score that ``top_visual`` goes by: ``"visual"``, the visual signal; ``"soft_or"``,
            ``1 - (1 - x)^a (1 - d)^(1 - a)`` of the min-max normalised visual signal x and entropy gap d.
        fusion_weight: The exponent a, in [0, 1].
        times_entropy: Whether that score is multiplied by the min-max normalised entropy.
        range_floor: Least range that a min-max normalisation divides by, > 0.
        weight: Token weights before any is selected. ``"ones"``; ``"softmax"``, the softmax of
            ``x * (1 + entropy_gate * tanh(z - mean z)) / temperature`` over the response, times its length, where z is
            the sum of the min-max normalised visual signal and entropy; ``"gate"``, of the normalised signal u:
            ``max(u / threshold, floor)`` below the threshold, ``1 + boost (u - threshold) / (1 - threshold)`` from it
            on; ``"share"``: the tokens that ``top_visual`` selects have the share ``share`` of their response's mass
            in equal parts, the others the rest, and all have 1 where all are selected.
        temperature: Of the softmax, > 0.
        entropy_gate: Strength of the entropy's gate on the softmax, >= 0; 0 needs no entropy.
        threshold: Of the gate, in (0, 1).
        boost: Slope of the gate's upper part, >= 0.
        floor: Least weight below the threshold, >= 0.
        conserve: Whether ``"gate"``'s weights are scaled so that a response's add up to its length (all 1 where they
            add up to nothing).
        share: Mass of the selected tokens of a response, in [0, 1].
        top_visual: Fraction of tokens selected for their visual score, in (0, 1]; ``None``: no such selection.
        top_entropy: Fraction selected for their entropy.
        scope: Among which tokens a fraction is taken: those of the ``"response"``, ``"group"`` or ``"batch"``.
        visual_weight: Weight of tokens selected for their visual score alone, >= 0.
        entropy_weight: Weight of tokens selected for their entropy, >= 0, also where both selected it.
        other_weight: Weight of all others where there is a selection, >= 0.
        response: Factor of a response from its score s, the mean of its visual signal, compared with the scores in
            ``response_scope``. ``"none"``: 1. ``"min_max"``: ``f + u (m - f)`` with the floor f = ``response_floor``,
            the min-max normalised score u and ``m = f + (1 - f) / (mean u + 1e-8)``, so that the factors' mean is 1;
            1 where scores differ by no more than 1e-6. ``"median_mad"``: ``1 + response_scale tanh((s - median) /
            (MAD + 1e-8))``, with the lower of two medians. ``"softmax"``: the softmax of ``z / response_temperature``
            times the number of responses, ``z = (s - mean) / (std + 1e-6)`` with the population's deviation.
        response_scope: Which responses are compared: those of the ``"group"`` or of the ``"batch"``.
        response_floor: f, in [0, 1].
        response_scale: Of ``"median_mad"``, in [0, 1].
        response_temperature: Of ``"softmax"``, > 0.
        response_on: Which tokens have their response's factor: ``"all"``, or those that ``"visual"`` scores select.
        schedule: ``"linear"``: a weight or factor w is ``1 + progress (w - 1)``, of the progress of training.

    Raises:
        ValueError: A number lies outside its range, a choice is not one of those listed, or settings do not fit.
        TypeError: A field has the wrong type.

    """

    log1p: bool = False
    fusion: Fusion = "visual"
    fusion_weight: Annotated[float, Number("in [0, 1]")] = 0.5
    times_entropy: bool = False
    range_floor: Annotated[float, Number("> 0")] = 1e-8
    weight: TokenWeight = "ones"
    temperature: Annotated[float, Number("> 0")] = 1.0
    entropy_gate: Annotated[float, Number(">= 0")] = 0.0
    threshold: Annotated[float, Number("in (0, 1)")] = 0.5
    boost: Annotated[float, Number(">= 0", most=1e4)] = 1.0
    floor: Annotated[float, Number(">= 0", most=1e4)] = 0.0
    conserve: bool = True
    share: Annotated[float, Number("in [0, 1]")] = 0.5
    top_visual: Annotated[float | None, Number("in (0, 1]", none="0")] = None
    top_entropy: Annotated[float | None, Number("in (0, 1]", none="0")] = None
    scope: SelectionScope = "response"
    visual_weight: Annotated[float, Number(">= 0")] = 1.0
    entropy_weight: Annotated[float, Number(">= 0")] = 1.0
    other_weight: Annotated[float, Number(">= 0")] = 0.0
    response: ResponseWeight = "none"
    response_scope: ResponseScope = "batch"
    response_floor: Annotated[float, Number("in [0, 1]")] = 0.9
    response_scale: Annotated[float, Number("in [0, 1]")] = 0.1
    response_temperature: Annotated[float, Number("> 0")] = 1.0
    response_on: Weighed = "all"
    schedule: ShapingSchedule = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight == "share" and (self.top_visual is None or self.top_entropy is not None):
            raise ValueError("weight='share' splits a response by top_visual: set that one alone")
        if self.weight == "share" and self.scope != "response":
            raise ValueError(f"weight='share' selects within a response, got scope={self.scope!r}")
        if self.response_on == "visual" and self.top_visual is None:
            raise ValueError("response_on='visual' needs top_visual, which is None")
        if self.top_visual is None and (self.fusion != "visual" or self.times_entropy):
            raise ValueError("fusion and times_entropy make the score that top_visual goes by, which is None")

    def needs(self) -> tuple[str, ...]:
        """Return the names of the signals that :func:`shape_tokens` reads: ``"visual"``, ``"entropy"``, ``"gap"``."""
        gated = self.weight == "softmax" and self.entropy_gate > 0
        entropy = self.times_entropy or self.top_entropy is not None or gated
        return ("visual", *["entropy"] * entropy, *["gap"] * (self.fusion == "soft_or"))

    @classmethod
    @hints.explained
    def vgpo(cls, **changes: Any) -> VGPOConfig:
        """VGPO (arXiv 2604.09349): :meth:`VGPOConfig.paper`, with ``changes`` applied.

        Signal: cosines of :func:`visual_focus`. :func:`shape_tokens` is then :func:`visual_weights`.
        """
        return VGPOConfig.paper(**changes)

    @classmethod
    @hints.explained
    def pepo(cls, **changes: Any) -> ShapingConfig:
        """PEPO (arXiv 2603.22847), with ``changes`` applied.

        Signals: the mean cosine with the image tokens (``visual_focus(pooling="unit_mean")``, mean over layers) and the
        entropy. Weights are a softmax with temperature 1.8 (of the released scripts; the paper has none), faded in
        over training: pass ``progress``. The released code lets gradients into the weights, and compares a response
        without an image with its whole sequence; here weights are constants, and such a response is left as it is.
        """
        pepo = cls(weight="softmax", temperature=1.8, entropy_gate=0.05, range_floor=1e-6, schedule="linear")
        return replace(pepo, **changes)

    @classmethod
    @hints.explained
    def vppo(cls, **changes: Any) -> ShapingConfig:
        """VPPO (arXiv 2510.09285), with ``changes`` applied.

        Signal: how much a token depends on the image. The paper's is the KL divergence from the distribution with a
        masked image; the released code's is k3 of the sampled token, bounded by 10. The top 40 % of a response's tokens
        are trained on; responses are weighed by their mean. The released code takes the extremes of that per device
        and its mean per micro-batch; here, as in the paper, both are the batch's.
        """
        return replace(cls(top_visual=0.4, response="min_max", response_floor=0.9), **changes)

    @classmethod
    @hints.explained
    def pgpo(cls, **changes: Any) -> ShapingConfig:
        """PGPO (arXiv 2604.01840, Eq. 4-7), with ``changes`` applied.

        Signal: k3 of the sampled token between attention with and without the image's tokens (``blind_attention``).
        Its development code takes a quantile for the threshold and a floor of 0.1, and does not conserve the mass.
        """
        return replace(cls(weight="gate", log1p=True, threshold=0.4, boost=2.0), **changes)

    @classmethod
    @hints.explained
    def tor(cls, **changes: Any) -> ShapingConfig:
        """Token reweighting (ToR, arXiv 2603.25077), with ``changes`` applied.

        Signals: the absolute change of the sampled token's log-prob without the image, and the entropy (the paper's is
        that of the top 95 % of the probability; no code was released).
        """
        return replace(cls(top_visual=0.3, top_entropy=0.3, scope="batch", visual_weight=0.5), **changes)

    @classmethod
    @hints.explained
    def vepo(cls, **changes: Any) -> ShapingConfig:
        """VEPO (arXiv 2606.03937, score D of the released code), with ``changes`` applied.

        Signals: the Jensen-Shannon divergence from the distribution with a noisy image, the absolute gap between both
        entropies, and the entropy. Its loss is a mean over the selected tokens: pass ``selected`` to
        :func:`policy_loss`.
        """
        return replace(cls(top_visual=0.2, fusion="soft_or", fusion_weight=0.7, times_entropy=True), **changes)

    @classmethod
    @hints.explained
    def cgpo(cls, **changes: Any) -> ShapingConfig:
        """CGPO (doi 10.1145/3767308.3835969, as its official code computes it), with ``changes`` applied.

        Signals: k3 of the sampled token without the regions that the response names, and the entropy. Tokens are
        selected from the batch that is given; the released code takes it whole or, by default, a micro-batch of the
        update. Its tokens of regions and its reward of their consistency are not part of this.
        """
        cgpo = cls(top_visual=0.3, top_entropy=0.3, scope="batch", response="median_mad", response_on="visual")
        return replace(cgpo, **changes)

    @classmethod
    @hints.explained
    def va_opd(cls, **changes: Any) -> ShapingConfig:
        """VA-OPD (arXiv 2605.21924, Eq. 2-6), with ``changes`` applied: weights of a distillation loss.

        Signal: ``max(log q(image) - log q(pixelated image), 0)`` of the sampled token under the teacher. Factors are
        those of a loss that is averaged within each response and then over responses, of which every prompt has the
        same number.
        """
        va_opd = cls(weight="share", top_visual=0.2, share=0.5, response="softmax", response_scope="group")
        return replace(va_opd, **changes)

    @classmethod
    @hints.explained
    def preset(cls, method: str, **changes: Any) -> ShapingConfig | VGPOConfig:
        """Return the settings of a method by its name, with ``changes`` applied.

        ``vgpo_kernels.shaping.METHODS`` has the names.

        Raises:
            ValueError: There is no such method, or a change is out of range.
            TypeError: A change is of no field.

        """
        if not isinstance(method, str) or method not in METHODS:
            hint = f"; {ELSEWHERE[method]}" if method in [*ELSEWHERE] else hints.choice(method, tuple(METHODS))
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {spell(method)}{hint}")
        return METHODS[method](**changes)


# What has no preset, and why.
ELSEWHERE = {
    "papo": "PAPO weighs nothing: its term is policy_loss(..., views=[ViewTerm(masked_logp, -gamma, 'k3_clamped')])",
    "dyco_rl": "the weights of DyCo-RL are not published in full; attention_shift computes its distances",
    "at_rl": "the clusters of AT-RL and their weights are not published in full",
}
# Every preset by its method's name.
METHODS: dict[str, Callable[..., ShapingConfig | VGPOConfig]] = {
    name: getattr(ShapingConfig, name) for name in ("vgpo", "pepo", "vppo", "pgpo", "tor", "vepo", "cgpo", "va_opd")
}

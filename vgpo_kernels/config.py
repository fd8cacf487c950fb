"""Settings: how cosines become factors (with the two named presets), and how log-probs become a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gspo_token", "cispo", "sapo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3", "k3_clamped"]
ImportanceMode = Literal["truncate", "mask"]
Schedule = Literal["linear", "exponential", "step"]
Score = Literal["affine", "offset"]
Position = Literal["one_based", "zero_based"]
Accumulation = Literal["compensated", "normalized", "mean"]
Clamp = tuple[float, float]

# The order is the code by which kernels know a choice (csrc/math.h: Schedule, Score, ...).
CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("linear", "exponential", "step"),
    "score": ("affine", "offset"),
    "position": ("one_based", "zero_based"),
    "accumulation": ("compensated", "normalized", "mean"),
    "loss_type": ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gspo_token", "cispo", "sapo"),
    "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    "kl_estimator": ("k1", "k2", "k3", "k3_clamped"),
    "importance_mode": ("truncate", "mask"),
}

# What a loss type averages over unless the caller says otherwise.
DEFAULT_AGGREGATION: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "gspo": "seq-mean-token-mean",
    "gspo_token": "seq-mean-token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
}


@dataclass(frozen=True)
class VGPOConfig:
    """How cosines become token and trajectory factors. The defaults are the paper's.

    Args:
        beta: Strength of the visual attention compensation, >= 0 (Eq. 5).
        tail_ratio: Fraction of a response, counted from its end, that the gate may open in, in [0, 1] (gamma).
        top_ratio: Fraction of the tail's tokens that pass the gate, in (0, 1] (kappa).
        schedule: How compensation grows along the response: ``"linear"``, ``"exponential"`` or ``"step"``.
        start_ratio: Position in [0, 1) before which compensation is zero.
        exponent: Exponent of the exponential schedule, > 0.
        step_ratio: Position in [0, 1] from which the step schedule compensates.
        gate: Compensate only the tail's strongest tokens (Eq. 6); ``False`` compensates every token.
        intra: Re-weight tokens within a trajectory by ``1 + psi`` (Eq. 7-8).
        inter: Re-weight the trajectories of a group by ``1 + phi`` (Eq. 9-11).
        score: Visual focus of a token: ``"affine"``, ``(1 + cos) / 2``; ``"offset"``, ``cos - m``.
        score_offset: The ``m`` of ``"offset"``. ``None`` takes the smaller of 0 and the smallest valid cosine of
            the batch handed in, which couples the responses of that batch; pass a number to fix it over a rollout.
        position: Position of token t of T: ``"one_based"``, ``t / T``; ``"zero_based"``, ``(t - 1) / (T - 1)``.
        accumulation: Visual accumulation of a response: ``"compensated"``, the sum of w; ``"normalized"``, the sum
            of min-max normalised w; ``"mean"``, the mean of w, free of the length bias of a sum.
        intra_clamp: Range that ``1 + psi`` is clamped to, or ``None``.
        inter_clamp: Range that ``1 + phi`` is clamped to, or ``None``.

    Raises:
        ValueError: A number lies outside its range, or a choice is not one of those listed.
        TypeError: A field has the wrong type.

    """

    beta: float = 0.3
    tail_ratio: float = 0.5
    top_ratio: float = 0.2
    schedule: Schedule = "linear"
    start_ratio: float = 0.0
    exponent: float = 2.0
    step_ratio: float = 0.5
    gate: bool = True
    intra: bool = True
    inter: bool = True
    score: Score = "affine"
    score_offset: float | None = None
    position: Position = "one_based"
    accumulation: Accumulation = "compensated"
    intra_clamp: Clamp | None = None
    inter_clamp: Clamp | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "tail_ratio", "top_ratio", "start_ratio", "exponent", "step_ratio"):
            _check_number(name, getattr(self, name))
        for name in ("gate", "intra", "inter"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in ("schedule", "score", "position", "accumulation"):
            _check_choice(name, getattr(self, name))
        _check_range("beta", self.beta, self.beta >= 0, ">= 0")
        _check_range("tail_ratio", self.tail_ratio, 0 <= self.tail_ratio <= 1, "in [0, 1]")
        _check_range("top_ratio", self.top_ratio, 0 < self.top_ratio <= 1, "in (0, 1]")
        _check_range("start_ratio", self.start_ratio, 0 <= self.start_ratio < 1, "in [0, 1)")
        _check_range("exponent", self.exponent, self.exponent > 0, "> 0")
        _check_range("step_ratio", self.step_ratio, 0 <= self.step_ratio <= 1, "in [0, 1]")
        if self.score_offset is not None:
            _check_number("score_offset", self.score_offset)
            if self.score != "offset":
                raise ValueError(f"score_offset={self.score_offset} needs score='offset', got {self.score!r}")
        for name in ("intra_clamp", "inter_clamp"):
            _check_clamp(name, getattr(self, name))

    @classmethod
    def paper(cls, **changes: Any) -> VGPOConfig:
        """Return the settings of the paper's equations (arXiv 2604.09349), with ``changes`` applied."""
        return replace(cls(), **changes)

    @classmethod
    def released(cls, **changes: Any) -> VGPOConfig:
        """Return the settings that the authors' released training code computes, with ``changes`` applied."""
        released = cls(
            score="offset",
            position="zero_based",
            accumulation="normalized",
            intra_clamp=(0.1, 2.0),
            inter_clamp=(0.9, 2.0),
        )
        return replace(released, **changes)

    def as_floats(self) -> list[float]:
        """Flatten to the 18 numbers that kernels take, in the order of ``WeightsConfig`` in csrc/math.h."""
        unclamped = (-math.inf, math.inf)
        return [
            _code("schedule", self.schedule),
            float(self.beta),
            float(self.tail_ratio),
            float(self.top_ratio),
            float(self.start_ratio),
            float(self.exponent),
            float(self.step_ratio),
            float(self.gate),
            float(self.intra),
            float(self.inter),
            _code("score", self.score),
            math.nan if self.score_offset is None else float(self.score_offset),
            _code("position", self.position),
            _code("accumulation", self.accumulation),
            *(float(bound) for bound in self.intra_clamp or unclamped),
            *(float(bound) for bound in self.inter_clamp or unclamped),
        ]

    @classmethod
    def from_floats(cls, floats: list[float]) -> VGPOConfig:
        """Return the settings that :meth:`as_floats` flattened."""
        schedule, beta, tail, top, start, exponent, step, gate, intra, inter, score, offset = floats[:12]
        position, accumulation, *clamps = floats[12:]
        intra_clamp, inter_clamp = (clamps[0], clamps[1]), (clamps[2], clamps[3])
        return cls(
            beta=beta,
            tail_ratio=tail,
            top_ratio=top,
            schedule=_choice("schedule", schedule),
            start_ratio=start,
            exponent=exponent,
            step_ratio=step,
            gate=bool(gate),
            intra=bool(intra),
            inter=bool(inter),
            score=_choice("score", score),
            score_offset=None if math.isnan(offset) else offset,
            position=_choice("position", position),
            accumulation=_choice("accumulation", accumulation),
            intra_clamp=None if math.isinf(intra_clamp[0]) else intra_clamp,
            inter_clamp=None if math.isinf(inter_clamp[0]) else inter_clamp,
        )


@dataclass(frozen=True)
class PolicyLossOptions:
    """How log-probs and advantages become a loss. ``policy_loss`` takes these fields as keyword arguments.

    Args:
        loss_type: Surrogate: ``"grpo"``, ``"bnpo"``, ``"dapo"`` and ``"dr_grpo"`` clip the token ratio and differ in
            their default aggregation; ``"gspo"`` and ``"gspo_token"`` clip the sequence ratio; ``"cispo"`` weights
            the log-prob by the clipped, detached ratio; ``"sapo"`` gates softly.
        aggregation: How token losses become one number; ``None`` takes the loss type's own.
        epsilon_low: Clip range below 1, >= 0.
        epsilon_high: Clip range above 1, >= 0.
        dual_clip: Bound on the ratio where the advantage is negative, > 1 (two-sided clipping), or ``None``.
        kl_coef: Weight of the KL term to the reference policy.
        kl_estimator: ``"k1"``, ``"k2"``, ``"k3"``, or ``"k3_clamped"`` (log-ratio to +-20, value to +-10, as verl).
        entropy_coef: Weight of the entropy bonus.
        max_length: Length that ``"seq-mean-token-sum-norm"`` divides by, > 0.
        sapo_temperature_positive: Temperature of sapo's gate where the advantage is positive, > 0.
        sapo_temperature_negative: The same where it is not, > 0.
        ratio_clamp: Bound on the absolute log-ratio before ``exp``, > 0, or ``None``.
        cispo_cap: Clip cispo's ratio to at most this value instead of to the clip range, > 0, or ``None``.
        kl_bias_correction: Multiply the KL term by the policy ratio.
        importance_cap: Bound on ``importance_weights``, > 0, or ``None``.
        importance_mode: ``"truncate"`` importance weights at the cap, or ``"mask"`` (zero) those above it.

    Raises:
        ValueError: A number lies outside its range, or a choice is not one of those listed.
        TypeError: A field has the wrong type.

    """

    loss_type: LossType = "dapo"
    aggregation: Aggregation | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    max_length: float | None = None
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    ratio_clamp: float | None = 20.0
    cispo_cap: float | None = None
    kl_bias_correction: bool = False
    importance_cap: float | None = None
    importance_mode: ImportanceMode = "truncate"

    def __post_init__(self) -> None:
        for name in ("loss_type", "kl_estimator", "importance_mode"):
            _check_choice(name, getattr(self, name))
        if self.aggregation is None:
            object.__setattr__(self, "aggregation", DEFAULT_AGGREGATION[self.loss_type])
        _check_choice("aggregation", self.aggregation)
        for name in ("epsilon_low", "epsilon_high", "kl_coef", "entropy_coef"):
            _check_number(name, getattr(self, name))
        for name in ("epsilon_low", "epsilon_high"):
            _check_range(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative"):
            _check_positive(name, getattr(self, name))
        for name in ("dual_clip", "max_length", "ratio_clamp", "cispo_cap", "importance_cap"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.dual_clip is not None:
            _check_range("dual_clip", self.dual_clip, self.dual_clip > 1, "> 1")
        if not isinstance(self.kl_bias_correction, bool):
            raise TypeError(f"kl_bias_correction must be a bool, got {self.kl_bias_correction!r}")

    def as_floats(self) -> list[float]:
        """Flatten to the 16 numbers that kernels take, in the order of ``LossOptions`` in csrc/math.h."""
        assert self.aggregation is not None
        return [
            _code("loss_type", self.loss_type),
            _code("aggregation", self.aggregation),
            float(self.epsilon_low),
            float(self.epsilon_high),
            math.inf if self.dual_clip is None else float(self.dual_clip),
            float(self.kl_coef),
            _code("kl_estimator", self.kl_estimator),
            float(self.entropy_coef),
            0.0 if self.max_length is None else float(self.max_length),
            float(self.sapo_temperature_positive),
            float(self.sapo_temperature_negative),
            math.inf if self.ratio_clamp is None else float(self.ratio_clamp),
            math.nan if self.cispo_cap is None else float(self.cispo_cap),
            float(self.kl_bias_correction),
            math.inf if self.importance_cap is None else float(self.importance_cap),
            _code("importance_mode", self.importance_mode),
        ]

    @classmethod
    def from_floats(cls, floats: list[float]) -> PolicyLossOptions:
        """Return the options that :meth:`as_floats` flattened."""
        loss_type, aggregation, low, high, dual, kl_coef, estimator, entropy_coef = floats[:8]
        max_length, positive, negative, clamp, cap, correction, importance_cap, mode = floats[8:]
        return cls(
            loss_type=_choice("loss_type", loss_type),
            aggregation=_choice("aggregation", aggregation),
            epsilon_low=low,
            epsilon_high=high,
            dual_clip=None if math.isinf(dual) else dual,
            kl_coef=kl_coef,
            kl_estimator=_choice("kl_estimator", estimator),
            entropy_coef=entropy_coef,
            max_length=None if max_length == 0 else max_length,
            sapo_temperature_positive=positive,
            sapo_temperature_negative=negative,
            ratio_clamp=None if math.isinf(clamp) else clamp,
            cispo_cap=None if math.isnan(cap) else cap,
            kl_bias_correction=bool(correction),
            importance_cap=None if math.isinf(importance_cap) else importance_cap,
            importance_mode=_choice("importance_mode", mode),
        )


def _code(name: str, choice: str) -> float:
    return float(CHOICES[name].index(choice))


def _choice(name: str, code: float) -> Any:
    return CHOICES[name][int(code)]


def _check_choice(name: str, value: object) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    _check_range(name, value, value > 0, "> 0")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_range(name: str, value: float, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {expected}, got {value}")


def _check_clamp(name: str, clamp: Clamp | None) -> None:
    if clamp is None:
        return
    if not isinstance(clamp, tuple) or len(clamp) != 2:
        raise TypeError(f"{name} must be a pair (low, high) or None, got {clamp!r}")
    for bound in clamp:
        _check_number(name, bound)
    if clamp[0] > clamp[1]:
        raise ValueError(f"{name} must have low <= high, got {clamp}")

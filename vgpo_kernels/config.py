"""Settings: how cosines become factors (with the two named presets), and how log-probs become a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from vgpo_kernels import hints

# Kernels know a choice by its place in these lists (csrc/math.h and loss_math.h have enums of the same order).
LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "gspo_token", "cispo", "sapo", "luspo", "vespo"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3", "k3_clamped"]
ImportanceMode = Literal["truncate", "mask"]
Schedule = Literal["linear", "exponential", "step"]
Score = Literal["affine", "offset"]
Position = Literal["one_based", "zero_based"]
Accumulation = Literal["compensated", "normalized", "mean"]
Visibility = Literal["all", "causal"]
Pooling = Literal["mean", "unit_mean"]
Clamp = tuple[float, float]

# What a loss type averages over unless the caller says otherwise.
DEFAULT_AGGREGATION: dict[LossType, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "gspo": "seq-mean-token-mean",
    "gspo_token": "seq-mean-token-mean",
    "cispo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "vespo": "token-mean",
}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float; a bool, though an int to Python, is no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def spell(value: object) -> str:
    """Spell a value for an error message, also an integer of more digits than Python writes."""
    if isinstance(value, int) and not -(2**128) < value < 2**128:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r}"


def type_name(value: object) -> str:
    """Spell the type of a value, with its module where it is none of Python's own: NumPy's ``bool`` is another."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


# ---- kinds of fields: what a value may be, and how it travels to kernels, which take numbers -----------------------

# Kernels compute in fp32: its largest number, and the smallest that has all its bits.
FLOAT32_MOST = 3.4028234663852886e38
FLOAT32_LEAST = 1.1754943508222875e-38

_RANGES: dict[str, Callable[[float], bool]] = {
    "finite": lambda value: True,  # asked of every number
    ">= 0": lambda value: value >= 0,
    "> 0": lambda value: value > 0,
    "> 1": lambda value: value > 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


@dataclass(frozen=True)
class Number:
    """A number of a range, in float32's. A field that may be ``None`` has a number that travels in its place.

    Comparisons alone check it: torch.compile traces them for a number that changes from call to call.
    """

    width: ClassVar[int] = 1  # in how many numbers a value travels
    expected: str = "finite"
    none: str | None = None  # a number as text, which torch.compile never takes for an input of a graph
    most: float = FLOAT32_MOST  # of the absolute value

    def check(self, name: str, value: Any) -> None:
        if value is None and self.none is not None:
            return
        if not is_number(value):
            raise TypeError(f"{name} must be a number, an int or a float, got {value!r}{hints.number(value)}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
        if not _RANGES[self.expected](value):
            raise ValueError(f"{name} must be {self.expected}, got {spell(value)}")
        if not -self.most <= value <= self.most:
            raise ValueError(f"{name} must be at most {self.most:.4g} in absolute value, got {spell(value)}")
        if self.expected == "> 0" and value < FLOAT32_LEAST:
            raise ValueError(f"{name} must be at least {FLOAT32_LEAST:.4g}, got {value}")

    def encode(self, value: Any) -> list[float]:
        return [float(self.none if value is None and self.none is not None else value)]

    def decode(self, name: str, numbers: Iterator[float]) -> float | None:
        number = next(numbers)
        if self.none is not None and (number == float(self.none) or (number != number and self.none == "nan")):
            return None
        return number


@dataclass(frozen=True)
class Flag:
    """A bool, which travels as 0 or 1."""

    width: ClassVar[int] = 1

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {spell(value)}")

    def encode(self, value: bool) -> list[float]:
        return [float(value)]

    def decode(self, name: str, numbers: Iterator[float]) -> bool:
        return bool(next(numbers))


@dataclass(frozen=True)
class Choice:
    """One of some strings, which travels as its place among them."""

    width: ClassVar[int] = 1
    choices: tuple[str, ...]

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in self.choices:  # an array would compare element by element
            hint = hints.choice(value, self.choices)
            raise ValueError(f"{name} must be one of {', '.join(self.choices)}, got {spell(value)}{hint}")

    def encode(self, value: str) -> list[float]:
        return [float(self.choices.index(value))]

    def decode(self, name: str, numbers: Iterator[float]) -> str:
        code = next(numbers)
        if not 0 <= code < len(self.choices):
            raise ValueError(f"{name} must be the code of a choice, in [0, {len(self.choices)}), got {code}")
        return self.choices[int(code)]


@dataclass(frozen=True)
class Bounds:
    """A pair (low, high), which travels as two numbers; ``None`` as -inf and inf."""

    width: ClassVar[int] = 2

    def check(self, name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"{name} must be a pair (low, high) or None, got {spell(value)}")
        for bound in value:
            Number().check(name, bound)
        if value[0] > value[1]:
            raise ValueError(f"{name} must have low <= high, got {value}")

    def encode(self, value: Clamp | None) -> list[float]:
        low, high = value or (-math.inf, math.inf)
        return [float(low), float(high)]

    def decode(self, name: str, numbers: Iterator[float]) -> Clamp | None:
        low, high = next(numbers), next(numbers)
        return None if low == -math.inf else (low, high)


Kind = Number | Flag | Choice | Bounds


def _kind_of(hint: Any) -> Kind:
    """Return the kind that an annotation names, or that goes without saying."""
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0]  # type: ignore[no-any-return]
    if get_origin(hint) is Literal:
        return Choice(get_args(hint))
    return Flag() if hint is bool else Number()


S = TypeVar("S", bound="Settings")


class Settings:
    """A dataclass whose fields are checked, and turned into numbers and back, each as its annotation says."""

    kinds: ClassVar[dict[str, Kind]] = {}  # of the fields, in their order
    defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kinds:  # a user's subclass: kernels know nothing of its own fields
            return
        hints = get_type_hints(cls, include_extras=True)
        cls.kinds = {name: _kind_of(hint) for name, hint in hints.items() if get_origin(hint) is not ClassVar}
        cls.defaults = {name: getattr(cls, name) for name in cls.kinds}

    def __post_init__(self) -> None:
        for name, default in self.defaults.items():
            value = getattr(self, name)
            if value is not default:  # most are, in every call of a loss
                if isinstance(value, list) and isinstance(self.kinds[name], Bounds):  # of YAML and JSON
                    value = tuple(value)
                    object.__setattr__(self, name, value)
                self.kinds[name].check(name, value)

    def as_floats(self) -> list[float]:
        """Flatten to the numbers that kernels take, field by field (``read`` in csrc/math.h and loss_math.h)."""
        numbers: list[float] = []
        for name, kind in self.kinds.items():
            value = getattr(self, name)
            if type(value) is float:
                numbers.append(value)
            else:
                numbers += kind.encode(value)
        return numbers

    @classmethod
    def from_floats(cls: type[S], floats: list[float]) -> S:
        """Return the settings that :meth:`as_floats` flattened.

        Raises:
            ValueError: There are more or fewer numbers, or one is not what its field takes.

        """
        expected = sum(kind.width for kind in cls.kinds.values())
        if len(floats) != expected:
            raise ValueError(f"{cls.__name__} must have {expected} numbers, got {len(floats)}")
        numbers = iter(floats)
        return cls(**{name: kind.decode(name, numbers) for name, kind in cls.kinds.items()})


# ---- the settings --------------------------------------------------------------------------------------------------


def _option_meant(name: str) -> str:
    """Say what an unknown option of a loss was meant to be."""
    field = hints.AUTHORS_NAMES.get(name, name)
    if field in VGPOConfig.kinds and name not in hints.MISPLACED:
        return f"{field} is a field of VGPOConfig"
    return hints.MISPLACED.get(name) or hints.name_meant(name, [*PolicyLossOptions.kinds, *hints.LOSS_ARGUMENTS])


def named(meant: Callable[[str], str] | None = None, called: str = "") -> Callable[[type[S]], type[S]]:
    """Let a field that there is not be answered by the one that was probably meant."""

    def explain(kind: type[S]) -> type[S]:
        kind.__init__ = hints.explained(kind.__init__, meant, called)  # type: ignore[method-assign]
        return kind

    return explain


@named()
@dataclass(frozen=True)
class VGPOConfig(Settings):
    """How cosines become token and trajectory factors. The defaults are the paper's.

    Numbers must fit float32: at most 3.4e38 in magnitude, and at least 1.2e-38 where they must be above 0.

    Args:
        beta: Strength of the visual attention compensation, in [0, 1e4] (Eq. 5).
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
            the batch handed in, which couples the responses of that batch; pass a number to fix it over a rollout, in
            [-1024, 1024].
        position: Position of token t of T: ``"one_based"``, ``t / T``; ``"zero_based"``, ``(t - 1) / (T - 1)``.
        accumulation: Visual accumulation of a response: ``"compensated"``, the sum of w; ``"normalized"``, the sum
            of min-max normalised w; ``"mean"``, the mean of w, free of the length bias of a sum. With ``"normalized"``
            every response of two different tokens sums to 1 (but for 1e-8 of their difference): in a group of such
            responses, phi stretches differences in the last bits to full size.
        intra_clamp: Range that ``1 + psi`` is clamped to, or ``None``.
        inter_clamp: Range that ``1 + phi`` is clamped to, or ``None``.

    Raises:
        ValueError: A number lies outside its range, or a choice is not one of those listed.
        TypeError: A field has the wrong type.

    """

    # Bounded like score_offset, so that the fixed-point sum of a response's w cannot overflow (csrc/math.h).
    beta: Annotated[float, Number(">= 0", most=1e4)] = 0.3
    tail_ratio: Annotated[float, Number("in [0, 1]")] = 0.5
    top_ratio: Annotated[float, Number("in (0, 1]")] = 0.2
    schedule: Schedule = "linear"
    start_ratio: Annotated[float, Number("in [0, 1)")] = 0.0
    exponent: Annotated[float, Number("> 0")] = 2.0
    step_ratio: Annotated[float, Number("in [0, 1]")] = 0.5
    gate: bool = True
    intra: bool = True
    inter: bool = True
    score: Score = "affine"
    score_offset: Annotated[float | None, Number(none="nan", most=1024)] = None
    position: Position = "one_based"
    accumulation: Accumulation = "compensated"
    intra_clamp: Annotated[Clamp | None, Bounds()] = None
    inter_clamp: Annotated[Clamp | None, Bounds()] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_offset is not None and self.score != "offset":
            raise ValueError(f"score_offset={self.score_offset} needs score='offset', got {self.score!r}")

    def needs(self) -> tuple[str, ...]:
        """Return the names of the signals that :func:`shape_tokens` reads: as those of a :class:`ShapingConfig`."""
        return ("visual",)

    @classmethod
    @hints.explained
    def paper(cls, **changes: Any) -> VGPOConfig:
        """Return the settings of the paper's equations (arXiv 2604.09349), with ``changes`` applied."""
        return replace(cls(), **changes)

    @classmethod
    @hints.explained
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


@named(_option_meant, "policy_loss (PolicyLossOptions)")
@dataclass(frozen=True)
class PolicyLossOptions(Settings):
    """How log-probs and advantages become a loss. ``policy_loss`` takes these fields as keyword arguments.

    Numbers must fit float32: at most 3.4e38 in magnitude, and at least 1.2e-38 where they must be above 0.

    Args:
        loss_type: Surrogate: ``"grpo"``, ``"bnpo"``, ``"dapo"`` and ``"dr_grpo"`` clip the token ratio and differ in
            their default aggregation; ``"gspo"`` and ``"gspo_token"`` clip the sequence ratio; ``"cispo"`` weights
            the log-prob by the clipped, detached ratio; ``"sapo"`` gates softly; ``"luspo"`` is ``"gspo"`` with each
            response's loss multiplied by its length; ``"vespo"`` weights the log-prob by a smooth, detached function
            of the product of the response's ratios (see :func:`policy_loss`).
        aggregation: How token losses become one number: ``"token-mean"``, ``"seq-mean-token-mean"``,
            ``"seq-mean-token-sum"`` or ``"seq-mean-token-sum-norm"``; ``None`` takes the loss type's own.
        epsilon_low: Clip range below 1, >= 0.
        epsilon_high: Clip range above 1, >= 0.
        dual_clip: Bound on the ratio where the advantage is negative, > 1 (two-sided clipping), or ``None``.
        kl_coef: Weight of the KL term to the reference policy.
        kl_estimator: ``"k1"``, ``"k2"``, ``"k3"``, or ``"k3_clamped"`` (log-ratio to +-20, value to +-10, as verl).
        entropy_coef: Weight of the entropy bonus.
        max_length: Length that ``"seq-mean-token-sum-norm"`` divides by, > 0.
        sapo_temperature_positive: Temperature of sapo's gate where the advantage is positive, > 0.
        sapo_temperature_negative: The same where it is not, > 0.
        vespo_k_pos: Exponent k of vespo's weight where the advantage is not negative, >= 0: how fast the weight falls
            as the response's ratio goes below 1.
        vespo_lambda_pos: Decay lambda of the same, >= 0 (at least 1e-4 is taken): how fast it falls above 1.
        vespo_k_neg: k where the advantage is negative.
        vespo_lambda_neg: lambda where the advantage is negative.
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
    aggregation: Annotated[Aggregation | None, Choice(get_args(Aggregation))] = None
    epsilon_low: Annotated[float, Number(">= 0")] = 0.2
    epsilon_high: Annotated[float, Number(">= 0")] = 0.28
    dual_clip: Annotated[float | None, Number("> 1", none="inf")] = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    max_length: Annotated[float | None, Number("> 0", none="0")] = None
    sapo_temperature_positive: Annotated[float, Number("> 0")] = 1.0
    sapo_temperature_negative: Annotated[float, Number("> 0")] = 1.05
    vespo_k_pos: Annotated[float, Number(">= 0")] = 2.0
    vespo_lambda_pos: Annotated[float, Number(">= 0")] = 3.0
    vespo_k_neg: Annotated[float, Number(">= 0")] = 3.0
    vespo_lambda_neg: Annotated[float, Number(">= 0")] = 2.0
    ratio_clamp: Annotated[float | None, Number("> 0", none="inf")] = 20.0
    cispo_cap: Annotated[float | None, Number("> 0", none="nan")] = None
    kl_bias_correction: bool = False
    importance_cap: Annotated[float | None, Number("> 0", none="inf")] = None
    importance_mode: ImportanceMode = "truncate"

    def __post_init__(self) -> None:
        if self.aggregation is None and isinstance(self.loss_type, str) and self.loss_type in CHOICES["loss_type"]:
            object.__setattr__(self, "aggregation", DEFAULT_AGGREGATION[self.loss_type])
        super().__post_init__()


CHOICES: dict[str, tuple[str, ...]] = {
    name: kind.choices
    for name, kind in (VGPOConfig.kinds | PolicyLossOptions.kinds).items()
    if isinstance(kind, Choice)
}

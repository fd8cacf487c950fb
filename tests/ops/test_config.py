"""Settings: presets by name, validation on construction, and the numbers that kernels take."""

from __future__ import annotations

import dataclasses
import math
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from vgpo_kernels import PolicyLossOptions, VGPOConfig
from vgpo_kernels.config import CHOICES, DEFAULT_AGGREGATION, Choice

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MATH = "".join((CSRC / name).read_text() for name in ("math.h", "loss_math.h"))


def test_the_defaults_are_the_papers() -> None:
    assert VGPOConfig.paper() == VGPOConfig()
    assert VGPOConfig() == VGPOConfig(
        beta=0.3,
        tail_ratio=0.5,
        top_ratio=0.2,
        schedule="linear",
        score="affine",
        position="one_based",
        accumulation="compensated",
        intra_clamp=None,
        inter_clamp=None,
    )


def test_released_differs_where_the_released_code_does() -> None:
    paper, released = dataclasses.asdict(VGPOConfig.paper()), dataclasses.asdict(VGPOConfig.released())
    assert {name: released[name] for name in released if released[name] != paper[name]} == {
        "score": "offset",
        "position": "zero_based",
        "accumulation": "normalized",
        "intra_clamp": (0.1, 2.0),
        "inter_clamp": (0.9, 2.0),
    }


def test_presets_take_changes() -> None:
    assert VGPOConfig.released(beta=0.5).beta == 0.5
    with pytest.raises(TypeError, match="gamma"):
        VGPOConfig.paper(gamma=0.5)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VGPOConfig().beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("beta", -0.1, ValueError),
        ("beta", float("nan"), ValueError),
        ("beta", "0.3", TypeError),
        ("beta", True, TypeError),
        ("tail_ratio", 1.5, ValueError),
        ("tail_ratio", -0.5, ValueError),
        ("top_ratio", 0.0, ValueError),
        ("top_ratio", 1.01, ValueError),
        ("schedule", "cosine", ValueError),
        ("start_ratio", 1.0, ValueError),
        ("exponent", 0.0, ValueError),
        ("step_ratio", 2.0, ValueError),
        ("gate", 1, TypeError),
        ("intra", None, TypeError),
        ("inter", "yes", TypeError),
        ("score", "cosine", ValueError),
        ("score_offset", 0.1, ValueError),
        ("position", "two_based", ValueError),
        ("accumulation", "sum", ValueError),
        ("intra_clamp", (2.0, 0.1), ValueError),
        ("intra_clamp", 0.1, TypeError),
        ("inter_clamp", (0.9, float("inf")), ValueError),
    ],
)
def test_a_bad_setting_is_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        VGPOConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("loss_type", "ppo", ValueError),
        ("aggregation", "mean", ValueError),
        ("epsilon_low", -0.2, ValueError),
        ("epsilon_high", None, TypeError),
        ("dual_clip", 0.5, ValueError),
        ("kl_coef", float("inf"), ValueError),
        ("kl_estimator", "k4", ValueError),
        ("max_length", 0, ValueError),
        ("ratio_clamp", -20.0, ValueError),
        ("sapo_temperature_positive", 0.0, ValueError),
        ("vespo_k_pos", -1.0, ValueError),
        ("vespo_lambda_neg", float("nan"), ValueError),
        ("cispo_cap", 0.0, ValueError),
        ("kl_bias_correction", 1, TypeError),
        ("importance_cap", 0.0, ValueError),
        ("importance_mode", "clip", ValueError),
    ],
)
def test_a_bad_loss_option_is_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        PolicyLossOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [VGPOConfig, PolicyLossOptions])
def test_what_python_cannot_compare_or_spell_is_named(settings: type[VGPOConfig | PolicyLossOptions]) -> None:
    """Integers of more digits than Python writes, arrays, and numbers of other libraries."""
    others = (Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.int64(1), np.bool_(True))
    for name in settings.kinds:
        for value in (10**5000, -(10**5000), np.array(["grpo", "bnpo"]), np.array([0.5, 1]), *others):
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
                settings(**{name: value})


def test_a_float_of_numpy_is_one_of_python() -> None:
    config = VGPOConfig(beta=np.float64(0.25), intra_clamp=(np.float64(0.5), 2))
    assert config == VGPOConfig(beta=0.25, intra_clamp=(0.5, 2.0))
    assert hash(VGPOConfig(intra_clamp=[0.5, 2.0])) == hash(VGPOConfig(intra_clamp=(0.5, 2.0))), "of YAML"
    assert all(type(number) is float for number in config.as_floats())


@pytest.mark.parametrize(
    "config",
    [
        VGPOConfig.paper(),
        VGPOConfig.released(),
        VGPOConfig.released(score_offset=-0.25, accumulation="mean", schedule="step", gate=False, inter=False),
    ],
)
def test_what_kernels_take_says_it_all(config: VGPOConfig) -> None:
    assert VGPOConfig.from_floats(config.as_floats()) == config
    assert len(config.as_floats()) == 18


@pytest.mark.parametrize("loss_type", CHOICES["loss_type"])
def test_what_loss_kernels_take_says_it_all(loss_type: str) -> None:
    options = PolicyLossOptions(loss_type=loss_type, dual_clip=3.0, max_length=32)  # type: ignore[arg-type]
    assert PolicyLossOptions.from_floats(options.as_floats()) == options
    plain = PolicyLossOptions(loss_type=loss_type)  # type: ignore[arg-type]
    assert PolicyLossOptions.from_floats(plain.as_floats()) == plain
    assert len(options.as_floats()) == 20


@pytest.mark.parametrize("settings", [VGPOConfig(), PolicyLossOptions()])
def test_numbers_that_are_no_settings_are_refused(settings: VGPOConfig | PolicyLossOptions) -> None:
    kind, floats = type(settings), settings.as_floats()
    for wrong in ([], floats[:-1], [*floats, 0.0]):
        with pytest.raises(ValueError, match=rf"{kind.__name__} must have {len(floats)} numbers, got {len(wrong)}"):
            kind.from_floats(wrong)
    choices = {name: field.choices for name, field in kind.kinds.items() if isinstance(field, Choice)}
    for name, names in choices.items():
        place = sum(field.width for field in list(kind.kinds.values())[: list(kind.kinds).index(name)])
        for code in (-1.0, float(len(names)), math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} must be the code of a choice"):
                kind.from_floats([*floats[:place], code, *floats[place + 1 :]])


def test_a_subclass_may_have_fields_of_its_own() -> None:
    @dataclasses.dataclass(frozen=True)
    class Labelled(VGPOConfig):
        beta: float = 0.5
        label: str = "mine"
        extra: float = 1.0

    config = Labelled(label="ours")
    assert VGPOConfig.from_floats(config.as_floats()) == VGPOConfig(beta=0.5) and config.label == "ours"
    with pytest.raises(ValueError, match="beta must be >= 0"):
        Labelled(beta=-3.0)

    @dataclasses.dataclass(frozen=True)
    class Negative(VGPOConfig):
        beta: float = -3.0

    with pytest.raises(ValueError, match="beta must be >= 0"):
        Negative()


def test_signatures_can_be_read() -> None:
    for kind in (VGPOConfig, PolicyLossOptions):
        assert "floats" in get_type_hints(kind.from_floats)
        assert get_type_hints(kind).keys() >= kind.kinds.keys()


def test_every_loss_type_has_a_default_aggregation() -> None:
    assert tuple(DEFAULT_AGGREGATION) == CHOICES["loss_type"]
    assert set(DEFAULT_AGGREGATION.values()) <= set(CHOICES["aggregation"])


@pytest.mark.parametrize("name", CHOICES)
def test_kernels_name_choices_alike(name: str) -> None:
    """Choices travel as numbers: an enum of csrc/math.h or csrc/loss_math.h has the same names in the same order."""
    kind = name.title().replace("_", "")
    (listed,) = re.findall(rf"enum class {kind} {{(.*?)}}", MATH, re.DOTALL)
    *enumerators, count = re.findall(r"\bk(\w+)", listed)
    assert count == "Count"
    spelled = [enumerator.lower().replace("sequence", "seq") for enumerator in enumerators]
    assert spelled == [re.sub(r"[-_]", "", choice) for choice in CHOICES[name]]


@pytest.mark.parametrize("settings", [VGPOConfig, PolicyLossOptions])
def test_the_docstring_lists_every_choice(settings: type[VGPOConfig | PolicyLossOptions]) -> None:
    for name in settings.kinds.keys() & CHOICES.keys():
        (text,) = re.findall(rf"^ {{8}}{name}: (.*?)(?=^ {{8}}\w|^$)", settings.__doc__ or "", re.DOTALL | re.MULTILINE)
        assert set(CHOICES[name]) <= set(re.findall(r'"([\w-]+)"', text)), name

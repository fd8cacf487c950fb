"""Bad input to the operators themselves, past the public functions: a wrong shape raises and is never read beyond.

The operators are those of the C++ extension, and those of CUDA: their bindings, with all checks, on the emulated GPU.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import Response, make_batch
from emulation.harness import compiler, emulated_operators
from operator_cases import BATCH_OPERATORS, SHAPING, SHAPING_OPERATORS, field_kind, operator_arguments, schema_order
from test_attention_mass import draw
from torch import Tensor

from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig, backends
from vgpo_kernels.ops import registry

if not backends.describe()["built"]["cpp"]:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

OPERATORS = {
    name: getattr(torch.ops.vgpo_kernels, name).default
    for name in registry.OPERATORS
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{registry.NAMESPACE}::{name}", "CPU")
}


class Change(NamedTuple):
    """One argument of an operator changed for the worse."""

    why: str
    value: Any


def worse(good: Tensor) -> list[Change]:
    """Other ranks, shapes, dtypes and strides than those of a tensor that fits."""
    narrower = {
        torch.float32: torch.float64,
        torch.int64: torch.int32,
        torch.int32: torch.int64,
        torch.bool: torch.uint8,
    }
    changes = [
        Change("a dimension more", good[None]),
        Change("no elements", good.new_empty(0)),
        Change("another dtype", good.to(narrower[good.dtype])),
    ]
    if good.dim():
        changes += [Change("a number", good.reshape(-1)[0]), Change("gaps", torch.stack([good, good], -1)[..., 0])]
    for dim, length in enumerate(good.shape):
        changes.append(Change(f"one fewer of dimension {dim}", good.narrow(dim, 0, length - 1).clone()))
        changes.append(Change(f"one more of dimension {dim}", torch.cat([good, good.narrow(dim, 0, 1)], dim)))
        changes.append(Change(f"none of dimension {dim}", good.narrow(dim, 0, 0)))
    return changes


def good_arguments(packed: bool) -> dict[str, dict[str, Any]]:
    """Arguments that each operator takes, by name, every tensor among them given."""
    batch = make_batch(tuple(Response(visual=4, length=5 + index) for index in range(3)), features=8, packed=packed)
    optional = {
        "prototype": torch.rand(2, 8),
        "prototype_index": torch.tensor([0, -1, 1]),
        "importance_weights": torch.rand(3),
        "num_tokens": torch.tensor(20.0),
        "num_sequences": torch.tensor(3.0),
    }
    found = {name: operator_arguments(name, batch, **optional) for name in BATCH_OPERATORS}
    found |= attention_arguments(packed) | head_arguments()
    return {name: found[name] for name in OPERATORS}


def attention_arguments(packed: bool) -> dict[str, dict[str, Any]]:
    case = draw(((3, 9), (3, 9)), size=8, packed=packed)
    positions = torch.full(case.q.shape[::2] if case.q.dim() == 4 else case.q.shape[:1], 2)
    given = {
        "q": case.q,
        "k": case.k,
        "key_segments": case.segments.clamp(max=1).int(),
        "query_positions": positions,
        "query_weights": torch.full(positions.shape, 0.25),
        "cu_seqlens_q": None if case.cu_seqlens_q is None else case.cu_seqlens_q.long(),
        "cu_seqlens_k": None if case.cu_seqlens_k is None else case.cu_seqlens_k.long(),
        "num_segments": 2,
        "scale": 0.2,
        "window": 4,
        "per_head": True,
    }

    def heads(operator: str) -> tuple[Tensor, ...]:
        return OPERATORS[operator](**schema_order(operator, **given))

    given["head_mass"], _, given["lse"] = heads("attention_mass")
    given |= {"grad_mass": given["head_mass"], "grad_heat": heads("attention_heatmap"), "per_head": False}
    return {name: schema_order(name, **given) for name in ATTENTION}


def head_arguments() -> dict[str, dict[str, Any]]:
    rows, features, vocabulary = 5, 8, 7
    hidden, weight = torch.rand(rows, features), torch.rand(vocabulary, features)
    given = {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.rand(vocabulary),
        "targets": torch.arange(rows),
        "first": 0,
        "temperature": 1.0,
        "temperatures": torch.ones(rows),
        "logit_scale": 1.0,
        "softcap": 0.0,
        "statistics": torch.zeros(4, rows),
        "coefficients": torch.zeros(5, rows),
        "logits": torch.zeros(rows, vocabulary),
        "keep": True,
        "recompute": True,
        "left": hidden,
        "right": weight.T.contiguous(),
        "result": torch.zeros(rows, vocabulary),
        "accumulate": False,
    }
    return {name: schema_order(name, **given) for name in (*HEADS, "head_product")} | pair_arguments(given)


def pair_arguments(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the operators of two views, of as many pairs as the head's have rows."""
    rows, vocabulary = given["hidden"].shape[0], given["weight"].shape[0]
    given = {name: value for name, value in given.items() if name not in ("statistics", "coefficients", "logits")}
    given |= {
        "rows": torch.cat([given["hidden"], given["hidden"].flip(0)]),
        "other_bias": torch.rand(vocabulary),
        "logits": torch.zeros(2 * rows, vocabulary),
        "js_beta": 0.5,
    }
    special = {
        "pair_statistics": {"sums": torch.zeros(11, rows)},
        "pair_shares": {"sums": torch.zeros(4, rows), "totals": torch.ones(4, rows)},
        "pair_gradient": {"coefficients": torch.ones(20, rows)},
    }
    return {name: schema_order(name, **given, **of_one) for name, of_one in special.items()}


WRITTEN = ("statistics", "sums", "logits", "result")
FOCUSING = ("visual_focus", "vgpo_loss")
HEADS = ("head_statistics", "head_gradient")
PAIRS = ("pair_statistics", "pair_shares", "pair_gradient")
ATTENTION = tuple(name for name in OPERATORS if name.startswith("attention"))
ARGUMENTS = {"padded": good_arguments(False), "packed": good_arguments(True)}
# Changes that make another call, as good as the first.
LAYOUTS = tuple(ARGUMENTS)
DIVISORS = {"one fewer of dimension 1", "one more of dimension 1"}  # of six heads: two, and so one or three
ANY_MATRIX = {"another dtype", "gaps"}
ACCEPTED: dict[str, set[str]] = {
    "visual_prototype, padded: hidden": {"one fewer of dimension 2", "one more of dimension 2"},
    "visual_prototype, packed: hidden": {"one fewer of dimension 1", "one more of dimension 1"},
    "visual_focus, padded: response_mask": {
        "one fewer of dimension 1",
        "one more of dimension 1",
        "none of dimension 1",
    },
    **{f"{name}, {layout}: prototype": {"one more of dimension 0"} for name, layout in product(FOCUSING, LAYOUTS)},
    # A fifth row asks for sums of squares.
    **{f"head_statistics, {layout}: statistics": {"one more of dimension 0"} for layout in LAYOUTS},
    **{f"{name}, {layout}: k": DIVISORS for name, layout in product(ATTENTION, LAYOUTS)},
    **{f"head_product, {layout}: {side}": ANY_MATRIX for side, layout in product(("left", "right"), LAYOUTS)},
}
# No look at a GPU's values: kernels clamp boundaries and indices. Products are cuBLAS's, which takes any strides.
OTHER_LENGTHS = {"one fewer of dimension 0", "one more of dimension 0"}
ACCEPTED_BY_CUDA: dict[str, set[str]] = {
    "visual_prototype, packed: cu_seqlens": OTHER_LENGTHS,
    **{f"{name}, {layout}: prototype": OTHER_LENGTHS for name, layout in product(FOCUSING, LAYOUTS)},
    **{f"{name}, {layout}: {side}": {"gaps"} for name, side, layout in product(HEADS, ("hidden", "weight"), LAYOUTS)},
    **{f"{name}, {layout}: {side}": {"gaps"} for name, side, layout in product(PAIRS, ("rows", "weight"), LAYOUTS)},
    **{f"head_product, {layout}: {side}": {"gaps"} for side, layout in product(("left", "right"), LAYOUTS)},
}
CASES = [
    pytest.param(layout, operator, name, id=f"{operator}, {layout}: {name}")
    for layout, operators in ARGUMENTS.items()
    for operator, arguments in operators.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test once per device: on the C++ extension's operators, and on those of CUDA, emulated."""
    if request.param == "cuda" and compiler() is None:
        pytest.skip("needs Linux and g++ to emulate a GPU")
    if request.param == "cuda" and "cuda" not in os.environ.get("VGPO_TEST_BACKENDS", "cuda").split(","):
        pytest.skip("VGPO_TEST_BACKENDS leaves CUDA out")
    return request.param


def operators_of(device: str) -> dict[str, Any]:
    return OPERATORS if device == "cpu" else emulated_operators()


def call(device: str, layout: str, operator: str, **changed: Any) -> tuple[Tensor, ...]:
    """Call an operator; return its results, or the arguments that it writes to."""
    arguments = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in ARGUMENTS[layout][operator].items()
    } | changed
    result = operators_of(device)[operator](**arguments)
    if result is None:
        return tuple(arguments[name] for name in WRITTEN if name in arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_both_devices_have_the_same_operators(device: str) -> None:
    assert operators_of(device).keys() == operators_of("cpu").keys()


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_argument_is_given(operator: str) -> None:
    assert not [name for name, value in ARGUMENTS["packed"][operator].items() if value is None]


@pytest.mark.parametrize(("layout", "operator"), [(layout, name) for layout in ARGUMENTS for name in OPERATORS])
def test_what_fits_is_accepted(device: str, layout: str, operator: str) -> None:
    found, expected = call(device, layout, operator), call("cpu", layout, operator)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("layout", "operator", "name"), CASES)
def test_what_does_not_fit_is_refused(device: str, layout: str, operator: str, name: str) -> None:
    accepted = set()
    for why, value in worse(ARGUMENTS[layout][operator][name].detach()):
        try:
            call(device, layout, operator, **{name: value})
        except (ValueError, TypeError):
            continue
        accepted.add(why)
    case = f"{operator}, {layout}: {name}"
    expected = ACCEPTED.get(case, set())
    assert accepted == (expected if device == "cpu" else ACCEPTED_BY_CUDA.get(case, expected))


NAN, INFINITY = float("nan"), float("inf")
SETTINGS: dict[str, VGPOConfig | PolicyLossOptions] = {
    "config": VGPOConfig.paper(),
    "options": PolicyLossOptions(max_length=8),
}


def settings_of(operator: str) -> dict[str, VGPOConfig | PolicyLossOptions | ShapingConfig]:
    """Return the settings that an operator takes, by its argument's name."""
    if operator in SHAPING_OPERATORS:
        return {"config": SHAPING}
    return {argument: settings for argument, settings in SETTINGS.items() if argument in ARGUMENTS["padded"][operator]}


# Numbers that no field of a kind may be.
NONE_OF_KIND: dict[str, tuple[float, ...]] = {
    "code": (-1.0, 99.0, NAN, INFINITY),
    "flag": (0.5, -1.0, NAN),
    "bounds": (NAN,),
    "ratio": (-5.0, 1.5, NAN),
    "number": (NAN, INFINITY),
    "optional": (),
}


def bad_settings(
    argument: str, settings: VGPOConfig | PolicyLossOptions | ShapingConfig
) -> list[tuple[str, list[float]]]:
    """Return numbers that are no settings, each with what the error must say."""
    good = settings.as_floats()
    bad = [(f"{argument} must have {len(good)} numbers", numbers) for numbers in ([], good[:-1], [*good, 0.0])]
    index = 0
    for name, kind in settings.kinds.items():
        bad += [(name, [*good[:index], value, *good[index + 1 :]]) for value in NONE_OF_KIND[field_kind(kind)]]
        index += kind.width
    return bad


@pytest.mark.parametrize(
    "operator", ["visual_weights", "group_weights", "policy_loss", "vgpo_loss", *SHAPING_OPERATORS]
)
def test_settings_that_are_none_are_refused(device: str, operator: str) -> None:
    """Codes choose, and ratios of a length become an index: the wrong ones would read anywhere."""
    tried = settings_of(operator)
    assert tried
    for argument, settings in tried.items():
        for says, numbers in bad_settings(argument, settings):
            with pytest.raises(ValueError, match=says):
                call(device, "padded", operator, **{argument: numbers})


@pytest.mark.parametrize("operator", ATTENTION)
def test_numbers_that_are_none_are_refused(device: str, operator: str) -> None:
    numbers = {"window": -1, "num_segments": 0} if operator == "attention_mass" else {"window": -1}
    for name, number in numbers.items():
        with pytest.raises(ValueError, match=name):
            call(device, "packed", operator, **{name: number})


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_no_check_sees_stay_inside(device: str, layout: str, operator: str) -> None:
    """Positions and segments of any value, as an unchecked GPU tensor may hold them: nothing else is read for them."""
    arguments = ARGUMENTS[layout][operator]
    far = torch.tensor([-(2**63), -5, 2**63 - 1])
    positions = far[torch.arange(arguments["query_positions"].numel()) % 3].view_as(arguments["query_positions"])
    segments = torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32)
    labels = segments[torch.arange(arguments["key_segments"].numel()) % 3].view_as(arguments["key_segments"])
    for window in (0, 1, 2**63 - 1):
        found = call(device, layout, operator, query_positions=positions, key_segments=labels, window=window)
        assert all(torch.isfinite(result[result != -torch.inf]).all() for result in found)


@pytest.mark.parametrize("boundaries", [[1, 9], [0, 8], [0, 12, 9], [0, -3, 9], [0, 2**62, 9]])
def test_boundaries_that_lie_are_refused(boundaries: list[int]) -> None:
    """On a CPU; a look at a GPU's values would wait for it (test_cuda_emulation: its kernels stay inside)."""
    case = draw(((3, 9),), size=8, packed=True)
    lies, truth = torch.tensor(boundaries), torch.tensor([0, 9] if len(boundaries) == 2 else [0, 0, 9])
    queries = torch.tensor([0, 3] if len(boundaries) == 2 else [0, 0, 3])
    arguments = (case.q, case.k, case.segments.int(), None)
    OPERATORS["attention_mass"](*arguments, queries, truth, 3, 0.2, 0, False)
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATORS["attention_mass"](*arguments, queries, lies, 3, 0.2, 0, False)
    values, mask, groups = torch.rand(9), torch.ones(9, dtype=torch.bool), torch.zeros(len(lies) - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATORS["visual_weights"](values, mask, groups, None, lies, SETTINGS["config"].as_floats())


def test_products_over_nothing_are_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = torch.full((3, 4), NAN)
        OPERATORS["head_product"](torch.zeros(3, 0, dtype=dtype), torch.zeros(0, 4, dtype=dtype), result, False)
        assert (result == 0).all()

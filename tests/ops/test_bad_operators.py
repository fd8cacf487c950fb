"""Bad input to the operators themselves, past the public functions: a wrong shape raises and is never read beyond."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import Response, make_batch
from test_attention_mass import draw
from test_operators import operator_arguments
from torch import Tensor

from vgpo_kernels import PolicyLossOptions, VGPOConfig, backends
from vgpo_kernels.ops import registry

pytestmark = pytest.mark.skipif(not backends.describe()["built"]["cpp"], reason="tests what only the extension has")

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
    found = {name: list(values) for name, values in operator_arguments(batch).items()}
    prototypes = [torch.rand(2, 8), torch.tensor([0, -1, 1])]
    weights = [torch.rand(3), torch.tensor(20.0), torch.tensor(3.0)]
    found["visual_focus"][4:6] = prototypes
    found["vgpo_loss"][8:10], found["vgpo_loss"][12:15] = prototypes, weights
    found["policy_loss"][8:11] = weights
    found["group_weights"][2] = batch.has_visual
    found |= attention_arguments(packed) | head_arguments()
    names = {name: [argument.name for argument in OPERATORS[name]._schema.arguments] for name in OPERATORS}
    return {name: dict(zip(names[name], found[name], strict=True)) for name in OPERATORS}


def attention_arguments(packed: bool) -> dict[str, list[Any]]:
    case = draw(((3, 9), (3, 9)), size=8, packed=packed)
    q, k, labels = case.q, case.k, case.segments.clamp(max=1).int()
    boundaries = [None if tensor is None else tensor.long() for tensor in (case.cu_seqlens_q, case.cu_seqlens_k)]
    positions = torch.full(q.shape[::2] if q.dim() == 4 else q.shape[:1], 2)
    keys = [q, k, labels, positions]
    head_mass, _, lse = OPERATORS["attention_mass"](*keys, *boundaries, 2, 0.2, 4, True)
    weights = torch.full(positions.shape, 0.25)
    grad_heat = OPERATORS["attention_heatmap"](*keys, weights, lse, *boundaries, 0.2, 4, True)
    return {
        "attention_mass": [*keys, *boundaries, 2, 0.2, 4, False],
        "attention_mass_backward": [head_mass, *keys, *boundaries, head_mass, lse, 0.2, 4],
        "attention_heatmap": [*keys, weights, lse, *boundaries, 0.2, 4, False],
        "attention_heatmap_backward": [grad_heat, *keys, weights, lse, *boundaries, 0.2, 4],
    }


def head_arguments() -> dict[str, list[Any]]:
    rows, features, vocabulary = 5, 8, 7
    hidden, weight, bias = torch.rand(rows, features), torch.rand(vocabulary, features), torch.rand(vocabulary)
    head = [hidden, weight, bias, torch.arange(rows), 0, 1.0]
    logits = torch.zeros(rows, vocabulary)
    return {
        "head_statistics": [*head, torch.zeros(4, rows), logits, True],
        "head_gradient": [*head, torch.zeros(5, rows), logits, True],
        "head_product": [hidden, weight.T.contiguous(), logits, False],
    }


ARGUMENTS = {"padded": good_arguments(False), "packed": good_arguments(True)}
# Changes that make another call, as good as the first.
LAYOUTS = tuple(ARGUMENTS)
FOCUSING = ("visual_focus", "vgpo_loss")
ATTENTION = tuple(name for name in OPERATORS if name.startswith("attention"))
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
    **{f"{name}, {layout}: k": DIVISORS for name, layout in product(ATTENTION, LAYOUTS)},
    **{f"head_product, {layout}: {side}": ANY_MATRIX for side, layout in product(("left", "right"), LAYOUTS)},
}
CASES = [
    pytest.param(layout, operator, name, id=f"{operator}, {layout}: {name}")
    for layout, operators in ARGUMENTS.items()
    for operator, arguments in operators.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


def call(layout: str, operator: str, **changed: Any) -> Any:
    arguments = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in ARGUMENTS[layout][operator].items()
    }
    return OPERATORS[operator](**(arguments | changed))


@pytest.mark.parametrize(("layout", "operator"), [(layout, name) for layout in ARGUMENTS for name in OPERATORS])
def test_what_fits_is_accepted(layout: str, operator: str) -> None:
    call(layout, operator)


@pytest.mark.parametrize(("layout", "operator", "name"), CASES)
def test_what_does_not_fit_is_refused(layout: str, operator: str, name: str) -> None:
    accepted = set()
    for why, value in worse(ARGUMENTS[layout][operator][name].detach()):
        try:
            call(layout, operator, **{name: value})
        except (ValueError, TypeError):
            continue
        accepted.add(why)
    assert accepted == ACCEPTED.get(f"{operator}, {layout}: {name}", set())


CONFIG, OPTIONS = VGPOConfig.paper().as_floats(), PolicyLossOptions(max_length=8).as_floats()
NAN, INFINITY = float("nan"), float("inf")


def changed(numbers: list[float], index: int, value: float) -> list[float]:
    return [*numbers[:index], value, *numbers[index + 1 :]]


CODES = {"schedule": 0, "score": 10, "position": 12, "accumulation": 13}
RATIOS = {"tail_ratio": 2, "top_ratio": 3}
CHOSEN = {"loss_type": 0, "aggregation": 1, "kl_estimator": 6, "importance_mode": 15}
SETTINGS = [
    *((name, "config", changed(CONFIG, CODES[name], code)) for name in CODES for code in (-1, 99, NAN, INFINITY)),
    *((name, "config", changed(CONFIG, RATIOS[name], ratio)) for name in RATIOS for ratio in (-5.0, 1.5, NAN)),
    *((name, "options", changed(OPTIONS, CHOSEN[name], code)) for name in CHOSEN for code in (-1, 99, NAN, INFINITY)),
    *(("must have 18 numbers", "config", numbers) for numbers in ([], CONFIG[:-1], [*CONFIG, 0.0])),
    *(("must have 16 numbers", "options", numbers) for numbers in ([], OPTIONS[:-1], [*OPTIONS, 0.0])),
]


@pytest.mark.parametrize("operator", ["visual_weights", "group_weights", "policy_loss", "vgpo_loss"])
def test_settings_that_are_none_are_refused(operator: str) -> None:
    """Codes choose, and ratios of a length become an index: the wrong ones would read anywhere."""
    tried = [setting for setting in SETTINGS if setting[1] in ARGUMENTS["padded"][operator]]
    assert tried
    for says, name, numbers in tried:
        with pytest.raises(ValueError, match=says):
            call("padded", operator, **{name: numbers})


@pytest.mark.parametrize("operator", ATTENTION)
def test_numbers_that_are_none_are_refused(operator: str) -> None:
    numbers = {"window": -1, "num_segments": 0} if operator == "attention_mass" else {"window": -1}
    for name, number in numbers.items():
        with pytest.raises(ValueError, match=name):
            call("packed", operator, **{name: number})


@pytest.mark.parametrize("operator", ATTENTION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_no_check_sees_stay_inside(layout: str, operator: str) -> None:
    """Positions and segments of any value, as an unchecked GPU tensor may hold them: nothing else is read for them."""
    arguments = ARGUMENTS[layout][operator]
    far = torch.tensor([-(2**63), -5, 2**63 - 1])
    positions = far[torch.arange(arguments["query_positions"].numel()) % 3].view_as(arguments["query_positions"])
    segments = torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32)
    labels = segments[torch.arange(arguments["key_segments"].numel()) % 3].view_as(arguments["key_segments"])
    for window in (0, 1, 2**63 - 1):
        found = call(layout, operator, query_positions=positions, key_segments=labels, window=window)
        assert all(torch.isfinite(result[result != -torch.inf]).all() for result in as_tuple(found))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("boundaries", [[1, 9], [0, 8], [0, 12, 9], [0, -3, 9], [0, 2**62, 9]])
def test_boundaries_that_lie_are_refused(boundaries: list[int]) -> None:
    case = draw(((3, 9),), size=8, packed=True)
    lies, truth = torch.tensor(boundaries), torch.tensor([0, 9] if len(boundaries) == 2 else [0, 0, 9])
    queries = torch.tensor([0, 3] if len(boundaries) == 2 else [0, 0, 3])
    arguments = (case.q, case.k, case.segments.int(), None)
    OPERATORS["attention_mass"](*arguments, queries, truth, 3, 0.2, 0, False)
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATORS["attention_mass"](*arguments, queries, lies, 3, 0.2, 0, False)
    values, mask, groups = torch.rand(9), torch.ones(9, dtype=torch.bool), torch.zeros(len(lies) - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens"):
        OPERATORS["visual_weights"](values, mask, groups, None, lies, CONFIG)


def test_products_over_nothing_are_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = torch.full((3, 4), NAN)
        OPERATORS["head_product"](torch.zeros(3, 0, dtype=dtype), torch.zeros(0, 4, dtype=dtype), result, False)
        assert (result == 0).all()

"""attention_mass by the products of warpgroups, on an emulated Hopper GPU: the other kernel's bits, in every order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import test_attention_edges
import test_attention_mass
import torch
from emulation.harness import EmulationError, Emulator, Shape
from emulation.serving import adopt
from test_attention_mass import Attention, draw
from tolerance import assert_matches
from torch import Tensor

from vgpo_kernels.reference import attention_mass as reference

adopt(globals(), test_attention_mass, test_attention_edges)

SCALE = 0.2
HOPPER, OTHER_GPU = Shape(hopper=True), Shape()
SHAPES = {
    "forward": HOPPER,
    "reverse": Shape(order="reverse", hopper=True),
    "shuffled": Shape(order="shuffled", seed=1, hopper=True),
    "interleaved": Shape(order="interleaved", hopper=True),
    "guards before": Shape(order="shuffled", seed=2, guard="before", hopper=True),
}


@pytest.fixture(autouse=True)
def asked_for(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", "1")
    with emulator.launched_as(HOPPER):
        yield


def masses(emulator: Emulator, case: Attention, window: int = 0, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Masses and log-sum-exps by head."""
    boundaries = (None if one is None else one.long() for one in (case.cu_seqlens_q, case.cu_seqlens_k))
    layout = (case.q, case.k, case.segments.int(), case.positions, *boundaries)
    mass, _, lse = emulator.attention_mass(*layout, count(case), scale, window, True)
    return mass, lse


def count(case: Attention) -> int:
    return int(case.segments.max()) + 1


def kernel_of(emulator: Emulator) -> str:
    return emulator.launched[0].partition("<")[0]


BF16, FP16 = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
CASES = {
    "one tile": draw(((5, 20),), heads=2, key_heads=1, size=64, **BF16),
    "two tiles": draw(((9, 128),), heads=3, key_heads=1, size=64, **FP16),
    "ragged": draw(((75, 215),), heads=4, key_heads=2, size=64, **BF16),
    "128": draw(((20, 330),), heads=7, key_heads=1, size=128, num_segments=2, **BF16),
    "128 in fp16": draw(((30, 150),), heads=2, key_heads=2, size=128, **FP16),
    "packed": draw(((3, 90), (70, 70), (0, 5), (66, 200), (2, 0)), heads=2, key_heads=1, size=64, packed=True, **BF16),
    "packed, 128": draw(((66, 200), (0, 5), (40, 260)), heads=2, key_heads=1, size=128, packed=True, **BF16),
    "left padding": draw(((150, 150),), heads=2, key_heads=1, size=64, padding=70, **BF16),
    "mixed": draw(((40, 140),), heads=2, key_heads=1, size=128, num_segments=11, mixed=True, **BF16),
    "positions": replace(
        draw(((70, 260),), heads=2, key_heads=1, size=64, **BF16),
        positions=(torch.arange(70) * 37 % 300 - 3)[None],
    ),
    "sees nothing": replace(draw(((9, 90),), heads=2, key_heads=1, size=64, **BF16), positions=torch.full((1, 9), -1)),
}


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("name", CASES)
def test_masses(emulator: Emulator, name: str, window: int) -> None:
    """The bits of the kernel with a warp's products, whose sums are the same, in every order of threads."""
    case = CASES[name]
    with emulator.launched_as(OTHER_GPU):
        expected = masses(emulator, case, window)
        assert kernel_of(emulator) == "attention_mass_kernel"
    for order, shape in SHAPES.items():
        with emulator.launched_as(shape):
            found = masses(emulator, case, window)
        assert kernel_of(emulator) == "attention_warpgroup_kernel"
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), order


@pytest.mark.parametrize("scale", [SCALE, -SCALE, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_the_definition(emulator: Emulator, name: str, scale: float) -> None:
    case = CASES[name]
    boundaries = (None if one is None else one.long() for one in (case.cu_seqlens_q, case.cu_seqlens_k))
    layout = (case.q, case.k, case.segments.int(), case.positions, *boundaries, count(case), scale, 60, True)
    mass, lse = masses(emulator, case, 60, scale)
    assert_matches((mass, mass.new_empty(0), lse), reference.attention_mass, layout, ("mass", "none", "lse"))


@pytest.mark.parametrize("size", [64, 128])
def test_no_row_is_read_that_takes_no_part(emulator: Emulator, size: int) -> None:
    """Keys to ignore, and queries that see nothing, may hold anything, at the begin, at the end and in between."""
    case = draw(((150, 230),), heads=2, key_heads=1, size=size, padding=70, **BF16)
    case.segments[0, 120:140] = -1
    case.segments[0, 222:] = -1
    positions = torch.arange(80, 230)[None]
    positions[0, 40:50] = -1
    ignored, blind = case.segments[0] < 0, positions[0] < 0
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        k = torch.where(ignored[:, None], poison, case.k.nan_to_num())
        q = torch.where(blind[:, None], poison, case.q)
        results.append(masses(emulator, replace(case, q=q, k=k, positions=positions)))
        assert not results[-1][0].isnan().any()
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_numbers_that_are_not_finite(emulator: Emulator) -> None:
    """They end in the results of the other kernel."""
    case = draw(((40, 150),), heads=2, key_heads=1, size=64, **BF16)
    case.k[0, 0, 100, 3] = float("inf")
    case.q[0, 1, 7] = float("nan")
    found = masses(emulator, case)
    with emulator.launched_as(OTHER_GPU):
        expected = masses(emulator, case)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_many_segments_and_heads(emulator: Emulator) -> None:
    """Blocks of further segments and key heads."""
    case = draw(((30, 100), (30, 100)), heads=6, key_heads=3, size=64, num_segments=20, mixed=True, **BF16)
    found = masses(emulator, case)
    with emulator.launched_as(OTHER_GPU):
        expected = masses(emulator, case)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_goes_to_the_other_kernel(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["one tile"]
    room = torch.full((*case.q.shape[:-1], 67), float("nan"), dtype=case.q.dtype)
    room[..., 1:65] = case.q
    others = [
        replace(case, q=room[..., 1:65]),  # rows that are not aligned
        case.to(torch.float32),
        draw(((5, 20),), heads=2, key_heads=1, size=72, **BF16),
    ]
    for other in others:
        masses(emulator, other)
        assert kernel_of(emulator) == "attention_mass_kernel"
    for value in ("0", "", None):
        if value is None:
            monkeypatch.delenv("VGPO_WARPGROUP_ATTENTION")
        else:
            monkeypatch.setenv("VGPO_WARPGROUP_ATTENTION", value)
        masses(emulator, case)
        assert kernel_of(emulator) == "attention_mass_kernel"


def test_a_kernel_that_strays_is_caught(emulator: Emulator) -> None:
    strays = "attention_mass: attention_warpgroup_kernel<__nv_bfloat16, 64>: .* past the end of key_segments"
    with emulator.cut_short(key_segments=2), pytest.raises(EmulationError, match=strays):
        masses(emulator, CASES["one tile"])


def multiply_registers(emulator: Emulator, name: str, shape: Shape) -> str:
    """Return what is found of a product of this name: the harness's message, "wrong numbers", or nothing."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (64, 64), generator=generator).bfloat16() for _ in range(2))
    with emulator.launched_as(shape):
        try:
            product = emulator.run_register_plant(left, right, name)
        except EmulationError as error:
            return str(error)
    return "" if torch.equal(product, left.float() @ right.float().T) else "wrong numbers"


@pytest.mark.parametrize("order", SHAPES)
def test_a_right_product_of_registers(emulator: Emulator, order: str) -> None:
    assert multiply_registers(emulator, "right", SHAPES[order]) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copies are not published", "products of copies that were not published"),
        ("sums are read before the wait", "wrong numbers"),
        ("halves of the left operand change places", "wrong numbers"),
    ],
)
def test_a_mistake_with_registers_shows(emulator: Emulator, name: str, expected: str) -> None:
    """In some order of threads; the next launch is not affected."""
    found = [multiply_registers(emulator, name, shape) for shape in SHAPES.values()]
    assert any(expected in one for one in found), found
    assert multiply_registers(emulator, "right", HOPPER) == ""

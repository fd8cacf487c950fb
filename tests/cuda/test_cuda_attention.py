"""The attention kernels for CUDA on the emulated GPU: tests of the operators, and every order of threads and blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_attention_edges
import test_attention_mass
import test_attention_shift
import torch
from emulation.harness import EmulationError, Emulator, Shape
from emulation.serving import adopt
from test_attention_mass import RAGGED, Attention, draw
from tolerance import assert_matches
from torch import Tensor

from vgpo_kernels.reference import attention_mass as reference

adopt(globals(), test_attention_mass, test_attention_edges, test_attention_shift)

SCALE = 0.2
SHAPES = {
    "reverse": Shape(blocks=1, order="reverse"),
    "shuffled": Shape(order="shuffled", seed=1),
    "interleaved": Shape(order="interleaved"),
    "guards before": Shape(order="shuffled", seed=2, guard="before"),
}


def arguments(case: Attention) -> tuple[Tensor | None, ...]:
    """Return the tensors that every operator takes."""
    boundaries = (None if tensor is None else tensor.long() for tensor in (case.cu_seqlens_q, case.cu_seqlens_k))
    return case.q, case.k, case.segments.int(), case.positions, *boundaries


def call_everything(emulator: Emulator, case: Attention, window: int = 0) -> list[Tensor]:
    """Every kernel on one batch; the results of all, flat."""
    q, k, segments, positions, *boundaries = arguments(case)
    count = int(segments.max()) + 1
    mass = emulator.attention_mass(q, k, segments, positions, *boundaries, count, SCALE, window, False)
    _, head_mass, lse = mass
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(lse.select(-2, 0).shape, generator=generator)
    labels = segments.clamp(max=1)
    heat = (q, k, labels, positions, weights, lse, *boundaries, SCALE, window)
    by_head = emulator.attention_heatmap(*heat, True)
    mean = emulator.attention_heatmap(*heat, False)
    grads = [torch.randn(tensor.shape, generator=generator) for tensor in (head_mass, by_head)]
    layout = (q, k, segments, positions, *boundaries)
    by_mass = emulator.attention_mass_backward(grads[0], *layout, head_mass, lse, SCALE, window)
    return [*mass, by_head, mean, *by_mass, *emulator.attention_heatmap_backward(grads[1], *heat)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_order_of_threads_or_blocks_changes_a_bit(emulator: Emulator, dtype: torch.dtype, packed: bool) -> None:
    """What a missing barrier, a copy not waited for, or an index out of range would break."""
    lengths = ((5, 170), (30, 30)) if packed else ((21, 140),)
    case = draw(lengths, heads=6, key_heads=1, size=32, packed=packed, mixed=packed, dtype=dtype)
    expected = call_everything(emulator, case)
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            for actual, wanted in zip(call_everything(emulator, case), expected, strict=True):
                assert torch.equal(actual, wanted), name


@pytest.mark.parametrize("size", [1, 8, 19, 64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_rows_give_the_same_bits(emulator: Emulator, dtype: torch.dtype, size: int) -> None:
    """Rows that are copied as whole vectors, and the same rows where they must be read element by element."""
    case = draw(((7, 40),), size=size, dtype=dtype)
    expected = call_everything(emulator, case, window=9)
    wide = replace(case, q=unaligned(case.q), k=unaligned(case.k))
    for guard in ("after", "before"):
        with emulator.launched_as(Shape(guard=guard)):
            found = call_everything(emulator, wide, window=9)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def unaligned(tensor: Tensor) -> Tensor:
    """Return the same rows where no kernel of a head size can take them."""
    room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    room[..., 1:-2] = tensor
    return room[..., 1:-2]


LONG = {
    "runs": draw(((75, 215),), heads=4, key_heads=2, size=64, dtype=torch.bfloat16),
    "packed": draw(
        ((3, 90), (70, 70), (0, 5), (66, 200)), heads=2, key_heads=1, size=64, packed=True, dtype=torch.bfloat16
    ),
    "left padding": draw(((150, 150),), heads=2, key_heads=1, size=64, padding=70, dtype=torch.bfloat16),
    "mixed": draw(((40, 140),), heads=2, key_heads=1, size=64, num_segments=11, mixed=True, dtype=torch.bfloat16),
    "a head a key head": draw(((30, 150),), heads=2, key_heads=2, size=128, dtype=torch.float16),
    "128": draw(((20, 200),), heads=7, key_heads=1, size=128, num_segments=2, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("name", LONG)
def test_kernels_of_a_head_size_give_the_bits_of_the_others(emulator: Emulator, name: str, window: int) -> None:
    """Tiles of which every key is seen, those at an edge, and those of several segments."""
    case = LONG[name]
    expected = call_everything(emulator, replace(case, q=unaligned(case.q), k=unaligned(case.k)), window)
    for shape in (Shape(), Shape(order="shuffled", seed=5, guard="before")):
        with emulator.launched_as(shape):
            found = call_everything(emulator, case, window)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LONG)
def test_kernels_of_a_head_size_match_the_definition(emulator: Emulator, name: str) -> None:
    case = LONG[name]
    layout, count = arguments(case), int(case.segments.max()) + 1
    for scale, window in ((SCALE, 0), (-SCALE, 60), (0.0, 0)):
        mass, _, lse = emulator.attention_mass(*layout, count, scale, window, True)
        names = ("mass", "none", "lse")
        assert_matches(
            (mass, mass.new_empty(0), lse), reference.attention_mass, (*layout, count, scale, window, True), names
        )
        grad = torch.randn(mass.shape, generator=torch.Generator().manual_seed(4))
        given = (grad, *layout, mass, lse, scale, window)
        exact = reference.attention_mass_backward(*given)
        for found, wide in zip(emulator.attention_mass_backward(*given), exact, strict=True):
            assert (found.double() - wide).abs().max() <= 0.01 * wide.abs().max() + 1e-6
        weights = torch.rand(lse.select(-2, 0).shape, generator=torch.Generator().manual_seed(5))
        weights[..., ::5] = 0.0
        heat = (layout[0], layout[1], layout[2].clamp(max=1), layout[3], weights, lse, *layout[4:], scale, window)
        _, _, heat_lse = emulator.attention_mass(*layout[:2], heat[2], *layout[3:], 2, scale, window, True)
        heat = (*heat[:5], heat_lse, *heat[6:])
        found = emulator.attention_heatmap(*heat, True)
        exact_heat = reference.attention_heatmap(*heat, True)
        assert (found.double() - exact_heat).abs().max() <= 2e-6 * max(1.0, exact_heat.abs().max().item())
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
        exact = reference.attention_heatmap_backward(grad, *heat)
        for one, wide in zip(emulator.attention_heatmap_backward(grad, *heat), exact, strict=True):
            assert (one.double() - wide).abs().max() <= 0.01 * wide.abs().max() + 1e-6


@pytest.mark.parametrize("size", [64, 128])
def test_kernels_of_a_head_size_read_no_row_that_takes_no_part(emulator: Emulator, size: int) -> None:
    """Nor the gradient of what is constant: of a mass without a key to see, and of the heat of a key nobody sees."""
    clean = draw(((150, 150),), heads=2, key_heads=1, size=size, padding=70, dtype=torch.bfloat16)
    clean = replace(clean, k=clean.k.nan_to_num())
    seen = clean.segments[0] >= 0
    spoilt = [torch.where(seen[:, None], tensor, float("nan")) for tensor in (clean.q, clean.k)]
    count = int(clean.segments.max()) + 1
    results = []
    for q, k, poison in ((clean.q, clean.k, 0.0), (*spoilt, float("nan"))):
        layout = arguments(replace(clean, q=q, k=k))
        mass, _, lse = emulator.attention_mass(*layout, count, SCALE, 0, True)
        grad = torch.where(mass == 0, poison, torch.ones_like(mass).cumsum(-1))
        by_mass = emulator.attention_mass_backward(grad, *layout, mass, lse, SCALE, 0)
        weights = torch.ones(1, 150)
        weights[:, ::3] = 0.0
        heat = (*layout[:2], layout[2].clamp(max=1), layout[3], weights, lse, *layout[4:], SCALE, 0)
        by_head = emulator.attention_heatmap(*heat, True)
        grad = torch.where(by_head == 0, poison, torch.ones_like(by_head).cumsum(-1))
        results.append([mass, lse, *by_mass, by_head, *emulator.attention_heatmap_backward(grad, *heat)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert not other.isnan().any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_strides_of_dimensions_of_one_entry_lead_nowhere(emulator: Emulator, packed: bool) -> None:
    """Rows are copied as whole vectors whatever the stride of a batch, head or token that is alone."""
    case = draw(((1, 40),), heads=1, key_heads=1, size=64, packed=packed, dtype=torch.bfloat16)
    expected = call_everything(emulator, case)
    odd = [
        tensor.as_strided(tensor.shape, [3 if size == 1 else stride for size, stride in zip(*layout, strict=True)])
        for tensor in (case.q, case.k)
        for layout in [(tensor.shape, tensor.stride())]
    ]
    found = call_everything(emulator, replace(case, q=odd[0], k=odd[1]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [128, 136, 256])
def test_long_heads_take_several_blocks_for_their_gradients(emulator: Emulator, size: int) -> None:
    case = draw(((3, 70),), heads=2, key_heads=1, size=size, dtype=torch.bfloat16)
    layout = arguments(case)
    mass = emulator.attention_mass(*layout, 3, SCALE, 0, True)
    wanted = reference.attention_mass(*layout, 3, SCALE, 0, True, dtype=torch.float32)
    torch.testing.assert_close(mass[0], wanted[0], rtol=0, atol=2e-6)
    given = (torch.ones_like(mass[0]).cumsum(-1), *layout, mass[0], mass[2], SCALE, 0)
    exact = reference.attention_mass_backward(*given)
    for found, wide in zip(emulator.attention_mass_backward(*given), exact, strict=True):
        assert (found.double() - wide).abs().max() <= 0.01 * wide.abs().max()


def test_a_batch_of_many_responses_finds_its_blocks(emulator: Emulator) -> None:
    """Blocks of a packed batch look for their response among more of them than a warp has lanes."""
    lengths = tuple((index % 3, 2 + index % 5) for index in range(70))
    case = draw(lengths, heads=2, key_heads=1, size=8, packed=True)
    layout = (*arguments(case), 3, SCALE, 0, True)
    mass, _, lse = emulator.attention_mass(*layout)
    exact, _, exact_lse = reference.attention_mass(*layout)
    torch.testing.assert_close(mass.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


def test_products_of_floats_keep_their_digits(emulator: Emulator) -> None:
    """TF32 alone would be off by 5e-4 of a score; its two parts are as exact as fp32."""
    case = draw(((20, 60),), heads=2, key_heads=2, size=128)
    layout = (*arguments(case), 3, SCALE, 0, True)
    assert_matches(emulator.attention_mass(*layout), reference.attention_mass, layout, ("mass", "none", "lse"))


def test_segments_out_of_range_are_ignored(emulator: Emulator) -> None:
    case = draw(((4, 90),), mixed=True)
    q, k, segments, *rest = arguments(case)
    wild = torch.where(segments < 0, torch.tensor([-9, 3, 10**6, -(2**31)]).repeat(23)[:90], segments).int()
    found, expected = (emulator.attention_mass(q, k, labels, *rest, 3, SCALE, 0, True) for labels in (wild, segments))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_boundaries_that_lie_cannot_lead_outside(emulator: Emulator) -> None:
    """No value on the device is checked before a launch: kernels clamp, and a wrong call stays inside its arrays."""
    case = draw(RAGGED, packed=True)
    queries, keys = len(case.q), len(case.k)
    labels = torch.where(torch.arange(keys) % 3 == 0, 10**6, case.segments.int()).int()
    for wrong in ([-5, 10, 20, 10**12, 3], [keys, 0, keys, 3, 0], [0, 0, 0, 0, 2 * keys]):
        starts = torch.tensor(wrong)
        positions = torch.full((queries,), 2**40)
        q, k = case.q, case.k.nan_to_num()
        layout = (q, k, labels, positions, starts, starts.flip(0))
        mass, _, lse = emulator.attention_mass(*layout, 3, SCALE, 2**31 - 1, True)
        weights = torch.ones(queries)
        emulator.attention_heatmap(*layout[:4], weights, lse, *layout[4:], SCALE, 5, True)
        emulator.attention_mass_backward(torch.ones_like(mass), *layout, mass, lse, SCALE, 0)


def test_a_kernel_that_strays_is_caught(emulator: Emulator) -> None:
    """The harness looks at these kernels, too: fewer segments than keys are read past their end."""
    case = draw(((9, 40),))
    strays = "attention_mass: attention_mass_kernel<float, 0>: .* past the end of key_segments"
    with emulator.cut_short(key_segments=2), pytest.raises(EmulationError, match=strays):
        emulator.attention_mass(*arguments(case), 3, SCALE, 0, True)

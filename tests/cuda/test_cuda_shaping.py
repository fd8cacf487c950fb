"""Token shaping on the emulated GPU: the operators' tests, and every order of threads and blocks."""

from __future__ import annotations

from typing import Any

import pytest
import test_token_shaping
import torch
from cases import EDGES, Response, make_batch
from emulation.harness import EmulationError, Emulator, Shape
from emulation.serving import adopt
from test_cuda_emulation import SHAPES
from test_token_shaping import CONFIGS, draw
from tolerance import assert_close, same_bits
from torch import Tensor

from vgpo_kernels import ShapingConfig
from vgpo_kernels.reference import token_shaping as reference

adopt(globals(), test_token_shaping)

BOTH = ShapingConfig(top_visual=0.3, top_entropy=0.4, visual_weight=0.5, other_weight=0.1)
SETTINGS = {**CONFIGS, "two in a response": BOTH}
ORDERS = {name: SHAPES[name] for name in SHAPES if name not in ("reverse", "shuffled again")}
NAMES = ("factors", "weights", "selected", "response_factor", "score", "metrics")
# More responses than blocks, longer ones than a block has threads, in groups of one to three.
MIXED = (
    Response(length=70, group=1),
    Response(length=150, holes=True),
    Response(length=0),
    Response(length=1, group=2**40),
    Response(length=33, group=1),
    Response(length=64, holes=True),
    Response(length=65, group=1),
    Response(length=20, group=-7),
    Response(length=9),
)


def given(
    config: ShapingConfig, edge: tuple[Response, ...] = MIXED, *, packed: bool, levels: int = 0
) -> tuple[Any, ...]:
    """Arguments of the operator; in MIXED with broken responses, one without an image, and tokens before theirs."""
    batch = make_batch(edge, features=1, packed=packed)
    signals, mask = draw(batch, levels=levels), batch.response_mask
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    if edge == MIXED:
        width = mask.shape[-1]
        begins = [index * width for index in range(len(edge))] if boundaries is None else boundaries.tolist()
        of = [begin + mask.view(-1)[begin:].nonzero()[:, 0] for begin in begins[: len(edge)]]
        visual, entropy, gap = (signals[name].view(-1) for name in ("visual", "entropy", "gap"))
        visual[of[0][:40]] = entropy[of[0][3]] = gap[of[0][39]] = torch.nan  # an image comes late
        visual[of[4][:33]] = visual[of[5][:1]] = torch.nan  # of response 4 none
        visual[of[7][5]] = torch.nan
        entropy[of[8][0]] = torch.inf
    needed = (signals[name] if name in config.needs() else None for name in signals)
    return *needed, mask, batch.group_ids, boundaries, 0.7, config.as_floats()


def assert_defined(emulator: Emulator, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compare both operators with the definition; return what token_shaping has found."""
    found: tuple[Tensor, ...] = emulator.token_shaping(*arguments)
    for name, one, exact in zip(NAMES, found, reference.token_shaping(*arguments), strict=True):
        if name == "selected":
            assert torch.equal(one, exact)
        else:
            assert_close(one, exact, name=name, floor=4e-6)
    assert torch.equal(emulator.response_factors(found[4], arguments[4], *arguments[6:]), found[3])
    return found


# vepo's score rounds, so that it may tie where the reference's does not.
@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_order_of_threads_or_blocks_changes_a_bit(emulator: Emulator, name: str, levels: int) -> None:
    arguments = given(SETTINGS[name], packed=levels > 0, levels=0 if name == "vepo" else levels)
    found = assert_defined(emulator, arguments)
    for order, shape in ORDERS.items():
        with emulator.launched_as(shape):
            again = emulator.token_shaping(*arguments)
            factors = emulator.response_factors(found[4], arguments[4], *arguments[6:])
        assert torch.equal(factors, found[3]), order
        for field, one, other in zip(NAMES, again, found, strict=True):
            assert same_bits(one, other), (order, field)


def test_padding_and_packing_change_no_bit(emulator: Emulator) -> None:
    """Of responses of several strides of a block, with the same ties in both layouts."""
    for name in ("va_opd", "tor", "pgpo"):
        both = [given(CONFIGS[name], packed=packed, levels=3) for packed in (False, True)]
        padded, packed = (emulator.token_shaping(*arguments) for arguments in both)
        for one, other in zip(padded[:3], packed[:3], strict=True):
            assert same_bits(one[both[0][3]], other[both[1][3]])
        for one, other in zip(padded[3:], packed[3:], strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("name", ["cgpo", "group scope", "median of the group", "va_opd"])
def test_more_responses_than_a_warp_looks_at_together(emulator: Emulator, name: str) -> None:
    """Of which many tie across responses, and some are empty."""
    edge = tuple(
        Response(length=0 if index in (31, 32, 63) else index * 7 % 11, group=index % 9) for index in range(70)
    )
    with emulator.launched_as(Shape(blocks=2, threads=64)):
        assert_defined(emulator, given(CONFIGS[name], edge, packed=True, levels=2))


@pytest.mark.parametrize("threads", [32, 96, 512])
def test_any_block_size_is_right(emulator: Emulator, threads: int) -> None:
    edge = (*EDGES["holes"], *EDGES["long"])
    for name in ("cgpo", "pepo", "va_opd"):
        with emulator.launched_as(Shape(blocks=2, threads=threads, order="reverse")):
            assert_defined(emulator, given(CONFIGS[name], edge, packed=False, levels=5))


@pytest.mark.parametrize("name", ["vppo", "pepo", "vepo", "cgpo"])
def test_launches_as_on_a_gpu(emulator: Emulator, name: str) -> None:
    """With the binding's own blocks and threads, and all arrays of a workspace in one allocation."""
    arguments = given(CONFIGS[name], packed=True, levels=0 if name == "vepo" else 3)
    expected = emulator.token_shaping(*arguments)
    for shape in (Shape(blocks=0), Shape(blocks=0, order="reverse", guard="before")):
        with emulator.launched_as(shape):
            found = emulator.token_shaping(*arguments)
            assert emulator.launched == ["token_shaping_kernel<512>"]
        for field, one, other in zip(NAMES, found, expected, strict=True):
            if field == "metrics":  # their order follows the block's size
                torch.testing.assert_close(one, other)
            else:
                assert same_bits(one, other), field


def test_wrong_boundaries_cannot_lead_outside(emulator: Emulator) -> None:
    for config in (ShapingConfig.cgpo(), ShapingConfig.vepo(), CONFIGS["group scope"]):
        *signals, mask, _, _, progress, floats = given(config, EDGES["plain"], packed=True)
        count = len(mask)
        for wrong in ([-5, 10, 20, 10**12, count], [count, 0, count, 3, 0], [0, 0, 0, 0, 2 * count], [0, count] * 9):
            boundaries, groups = torch.tensor(wrong), torch.arange(len(wrong) - 1) % 2
            emulator.token_shaping(*signals, torch.ones_like(mask), groups, boundaries, progress, floats)


@pytest.mark.parametrize("short", ["visual", "entropy", "gap", "response_mask", "group_ids"])
def test_a_kernel_that_strays_is_caught(emulator: Emulator, short: str) -> None:
    arguments = given(ShapingConfig.vepo(scope="group"), packed=True)
    strays = f"token_shaping: token_shaping_kernel<512>: .* past the end of {short}"
    with emulator.cut_short(**{short: 9}), pytest.raises(EmulationError, match=strays):
        emulator.token_shaping(*arguments)


def test_a_signal_that_settings_read_is_missing(emulator: Emulator) -> None:
    visual, entropy, gap, *rest = given(ShapingConfig.vepo(), packed=False)
    with pytest.raises(ValueError, match="entropy is None, which this config reads"):
        emulator.token_shaping(visual, None, gap, *rest)
    with pytest.raises(ValueError, match="gap is None, which this config reads"):
        emulator.token_shaping(visual, entropy, None, *rest)

"""Levels of visibility on the emulated GPU: images and tokens in any order, in every order of threads and blocks."""

from __future__ import annotations

import pytest
import torch
from cases import EDGES, Response, make_batch
from emulation.harness import EmulationError, Emulator, Shape
from emulation.serving import adopt
from equations import focus, positions
from test_cuda_emulation import SHAPES
from tolerance import assert_close, assert_matches, same_bits
from torch import Tensor

from vgpo_kernels import VGPOConfig
from vgpo_kernels.reference import visual_focus as reference
from vgpo_kernels.reference import visual_weights as weights_reference

adopt(globals())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAUSAL, UNIT = (None, None, True, False), (None, None, True, True)
NAN_BITS = torch.tensor(torch.nan).view(torch.int32)


def interleaved(kinds: list[str], features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A packed batch with a response for each string: ``v`` is a visual row, ``t`` a scored token, ``b`` both."""
    text = "".join(kinds)
    hidden = torch.randn(len(text), features, generator=torch.Generator().manual_seed(0)) + 0.3
    hidden[[index for index, kind in enumerate(text) if kind == "."]] = torch.nan
    visual = torch.tensor([kind in "vb" for kind in text])
    scored = torch.tensor([kind in "tb" for kind in text])
    boundaries = torch.tensor([0, *(len(kind) for kind in kinds)]).cumsum(0)
    return hidden.to(dtype), visual, scored, boundaries


def by_equation(hidden: Tensor, visual: Tensor, scored: Tensor, boundaries: Tensor) -> Tensor:
    cos = torch.zeros(len(scored), dtype=torch.float64)
    for begin, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        part = slice(begin, end)
        values = focus(positions(hidden[part], visual[part], scored[part]), causal=True)
        cos[part][scored[part]] = torch.tensor(values, dtype=torch.float64)
    return cos


RESPONSES = [
    "vt" * 23,  # every token has a new image
    "tv" * 9 + "...",
    "vvvv.ttttttttttttttttttt",
    "ttttt.tt",
    "vvv..vv",
    "",
    "ttvvvt" + "v" * 40 + "t" * 19 + "v" * 33 + "t",  # chunks of more rows than a run has
    "b" * 21,
    "vtbtbbvtb.tb" * 2,  # a token on a visual row does not see it
    "v.t..v.t" * 3 + "vvvvv",
    "t" * 11 + "v",  # an image after the last token
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [8, 67, 264])
def test_images_and_tokens_in_any_order(emulator: Emulator, features: int, dtype: torch.dtype) -> None:
    given = interleaved(RESPONSES, features, dtype)
    cos = emulator.visual_focus(*given, *CAUSAL)
    assert_close(cos, by_equation(*given), floor=2e-6)
    # Memory that is not written is NaN as well, of other bits.
    assert (cos.view(torch.int32)[cos.isnan()] == NAN_BITS).all()
    assert_matches(cos, reference.visual_focus, (*given, *CAUSAL), ("cos",))
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            assert same_bits(emulator.visual_focus(*given, *CAUSAL), cos), name
    means = emulator.visual_prototype(*given[:2], given[3], True, False)
    assert_matches(means, reference.visual_prototype, (*given[:2], given[3], True), ("prototype",))


def test_small_states_are_compared_with_a_mean(emulator: Emulator) -> None:
    """Cosines do not depend on a prototype's length, but where the smallest denominator stands in for tiny norms."""
    hidden, *rest = interleaved(RESPONSES, 8)
    given = (3e-5 * hidden, *rest)
    cos = emulator.visual_focus(*given, *CAUSAL)
    assert cos.nan_to_num().abs().max() > 0.1
    assert_close(cos, by_equation(*given), floor=2e-6)


def test_batch_order_and_layout_change_no_bit(emulator: Emulator) -> None:
    given = interleaved(RESPONSES, 40)
    cos = emulator.visual_focus(*given, *CAUSAL)
    spans = [slice(begin, end) for begin, end in zip(given[3][:-1], given[3][1:], strict=True)]
    for order in (list(reversed(range(len(spans)))), [0], [6, 2]):
        hidden, visual, scored = (torch.cat([tensor[spans[index]] for index in order]) for tensor in given[:3])
        boundaries = torch.tensor([0, *(len(RESPONSES[index]) for index in order)]).cumsum(0)
        again = emulator.visual_focus(hidden, visual, scored, boundaries, *CAUSAL)
        assert same_bits(again, torch.cat([cos[spans[index]] for index in order]))
    # Padded on both sides; the response mask covers the rows from some column on, or all.
    width = max(len(kind) for kind in RESPONSES) + 5
    hidden = torch.full((len(spans), width, 40), torch.nan)
    visual, scored = (torch.zeros(len(spans), width, dtype=torch.bool) for _ in range(2))
    for index, span in enumerate(spans):
        place = slice(3, 3 + span.stop - span.start)
        for padded, flat in ((hidden, given[0]), (visual, given[1]), (scored, given[2])):
            padded[index, place] = flat[span]
    for skipped in (0, 3):
        rows = emulator.visual_focus(hidden, visual, scored[:, skipped:].contiguous(), None, *CAUSAL)
        assert same_bits(rows[scored[:, skipped:]], cos[given[2]])


def test_the_beginning_does_not_depend_on_what_follows(emulator: Emulator) -> None:
    """Of every prefix of a response, whatever image the rest of it brings."""
    whole = "vvt" + "v" * 37 + "ttttttttt" + "vt" * 6 + "v" * 20 + "t"
    given = interleaved([whole], 64, torch.bfloat16)
    for way in (CAUSAL, UNIT):
        cos = emulator.visual_focus(*given, *way)
        for length in range(3, len(whole), 4):
            part = [tensor[:length] for tensor in given[:3]]
            assert same_bits(emulator.visual_focus(*part, torch.tensor([0, length]), *way), cos[:length])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_level_has_the_bits_of_all_rows(emulator: Emulator, dtype: torch.dtype) -> None:
    """More than 8,192 visual rows, which make longer runs, and a few."""
    given = interleaved(["v" * 9001 + "t" * 17, "v" * 40 + ".v" + "ttt.t", "t" * 0, "vv"], 8, dtype)
    for way in (CAUSAL, UNIT):
        every = emulator.visual_focus(*given, None, None, False, way[-1])
        assert same_bits(emulator.visual_focus(*given, *way), every)
        assert every[given[2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [8, 129, 264])
def test_unaligned_rows_give_the_same_bits(emulator: Emulator, features: int, dtype: torch.dtype) -> None:
    given = interleaved(RESPONSES, features, dtype)
    wide = torch.full((len(given[0]), features + 3), torch.nan, dtype=dtype)
    wide[:, 1:-2] = given[0]
    for guard in ("after", "before"):
        with emulator.launched_as(Shape(guard=guard)):
            sliced = (wide[:, 1:-2], *given[1:])
            for way in (CAUSAL, UNIT):
                assert same_bits(emulator.visual_focus(*sliced, *way), emulator.visual_focus(*given, *way))
                means = [emulator.visual_prototype(*rows[:2], rows[3], *way[2:]) for rows in (sliced, given)]
                assert same_bits(*means)


def test_hundreds_of_levels_keep_their_precision(emulator: Emulator) -> None:
    """A row a level: nothing is summed in runs, and the running total must not drift."""
    count = 3000
    hidden = torch.full((2 * count, 4), 1.0 / 3.0)
    hidden[:, 1] = torch.linspace(-1.0, 1.0, 2 * count)
    visual = torch.arange(2 * count) % 2 == 0
    given = (hidden, visual, ~visual, torch.tensor([0, 2 * count]))
    with emulator.launched_as(Shape(blocks=2, threads=32)):
        assert_matches(emulator.visual_focus(*given, *CAUSAL), reference.visual_focus, (*given, *CAUSAL), ("cos",))
        means = emulator.visual_prototype(hidden, visual, given[3], True, False)
    assert_close(means[1:, 0], torch.full((2 * count - 1,), 1.0 / 3.0, dtype=torch.float64), floor=2e-7)


def test_rows_after_the_last_token_are_not_read(emulator: Emulator) -> None:
    given = interleaved(["vvtt", "vtvvt" + "v" * 5], 16)
    expected = emulator.visual_focus(*given, *CAUSAL)
    with emulator.cut_short(hidden=5 * 16):
        assert same_bits(emulator.visual_focus(*given, *CAUSAL), expected)
        with pytest.raises(EmulationError, match="past the end of hidden"):
            emulator.visual_focus(*given, None, None, False, False)
        with pytest.raises(EmulationError, match="past the end of hidden"):
            emulator.visual_prototype(*given[:2], given[3], True, False)


@pytest.mark.parametrize("short", ["visual_mask", "response_mask", "hidden"])
def test_a_kernel_that_strays_is_caught(emulator: Emulator, short: str) -> None:
    given = interleaved(["vtvt", "vtvvtvvt"], 16)
    strays = f"visual_focus: visual_focus_kernel<float>: .* past the end of {short}"
    with emulator.cut_short(**{short: 1}), pytest.raises(EmulationError, match=strays):
        emulator.visual_focus(*given, *CAUSAL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [24, 67, 264])
def test_rows_do_not_see_each_others_prototypes(emulator: Emulator, features: int, dtype: torch.dtype) -> None:
    """Rows are taken eight at a time, together where they have one prototype: no bit depends on the neighbours."""
    batch = make_batch((Response(length=29, holes=True), Response(length=40), Response(length=3)), features=features)
    hidden, mask = batch.hidden.to(dtype), batch.response_mask
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.randn(4, features, generator=generator)
    prototypes[2] = 0
    prototypes[3] *= 1e-30  # its square is zero in fp32; an image all the same
    alone = [
        emulator.visual_focus(hidden, None, mask, None, prototypes, torch.full((3,), row), False, False)
        for row in range(4)
    ]
    assert alone[2][mask].isnan().all()
    assert alone[3][mask].isfinite().all()
    index = torch.randint(-1, 4, mask.shape, generator=generator)
    index[0, :16] = 1  # a stretch of one image
    expected = torch.stack([torch.full_like(alone[0], torch.nan), *alone]).gather(0, index[None] + 1)[0]
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            mixed = emulator.visual_focus(hidden, None, mask, None, prototypes, index, False, False)
        assert same_bits(mixed[mask], expected[mask]), name
        assert (mixed[~mask] == 0).all()
    arguments = (hidden, None, mask, None, prototypes, index)
    assert_matches(mixed, reference.visual_focus, arguments, ("cos",))


def test_wrong_rows_of_prototypes_cannot_lead_outside(emulator: Emulator) -> None:
    batch = make_batch(EDGES["plain"], packed=True)
    index = torch.randint(-5, 9, batch.response_mask.shape, generator=torch.Generator().manual_seed(1))
    boundaries = batch.cu_seqlens.long()
    for guard in ("after", "before"):
        with emulator.launched_as(Shape(guard=guard)):
            prototypes = torch.ones(2, batch.hidden.shape[-1])
            emulator.visual_focus(batch.hidden, None, batch.response_mask, boundaries, prototypes, index, False, False)


# ---- weights of tokens without a signal --------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_tokens_before_their_image_in_every_order(emulator: Emulator, preset: str, packed: bool) -> None:
    """Responses of which all, some or no cosines are NaN, more than there are blocks, in groups of one to three."""
    generator = torch.Generator().manual_seed(4)
    cos = torch.rand(11, 70, generator=generator) * 2 - 1
    mask = torch.rand(11, 70, generator=generator) < 0.8
    blind = torch.tensor([0, 0, 69, 3, 70, 40, 0, 64, 12, 35, 33])
    cos[torch.arange(70) < blind[:, None]] = torch.nan
    mask[1] = False
    mask[2, 69] = True
    cos[6, 50], mask[6, 50] = torch.nan, True
    cos[8, 5], mask[8, 5] = -torch.inf, True
    groups = torch.tensor([5, 5, 2, 2, 9, 7, 7, 1, 1, 1, 2**40])
    boundaries = torch.arange(0, 771, 70) if packed else None
    layout = (cos.view(-1), mask.view(-1)) if packed else (cos, mask)
    config = getattr(VGPOConfig, preset)()
    for settings in (config, VGPOConfig.paper(gate=False, inter=False, accumulation="mean")):
        given = (*layout, groups, None, boundaries, settings.as_floats())
        expected = emulator.visual_weights(*given)
        names = ("factors", "psi", "w", "phi", "score", "metrics")
        assert_matches(expected, weights_reference.visual_weights, given, names)
        # Weighted: 0, 2, 3, 5, 7, 9 and 10. Of the groups 5, 2, 7, 1 and 2**40 three have one of them only.
        assert expected[5][3:].tolist() == [7, 2, 5, 3]
        for name, shape in SHAPES.items():
            with emulator.launched_as(shape):
                for actual, wanted in zip(emulator.visual_weights(*given), expected, strict=True):
                    assert same_bits(actual, wanted), name

"""visual_prototype and visual_focus on every backend, against the reference implementation and against plain loops."""

from __future__ import annotations

import pytest
import torch
from cases import EDGES, Response, make_batch
from equations import focus, positions
from tolerance import assert_close, assert_matches, same_bits

from vgpo_kernels import backend, visual_focus, visual_prototype
from vgpo_kernels.reference import visual_focus as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", EDGES)
def test_matches_the_definition(backend_name: str, device: torch.device, edge: str, packed: bool) -> None:
    batch = make_batch(EDGES[edge], packed=packed).to(device)
    arguments = (batch.hidden, batch.visual_mask, batch.cu_seqlens)
    actual = visual_prototype(*arguments[:2], cu_seqlens=batch.cu_seqlens)
    assert_matches(actual, reference.visual_prototype, arguments, ("prototype",))
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, batch.cu_seqlens)
    actual = visual_focus(*arguments[:3], cu_seqlens=batch.cu_seqlens)
    assert actual.dtype == torch.float32
    assert_matches(actual, reference.visual_focus, arguments, ("cos",))


@pytest.mark.parametrize("features", [1, 7, 64, 515, 3584])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_dtypes(backend_name: str, device: torch.device, dtype: torch.dtype, features: int) -> None:
    batch = make_batch(EDGES["plain"][:2], features=features, dtype=dtype).to(device)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, None)
    assert_matches(visual_focus(*arguments[:3]), reference.visual_focus, arguments, ("cos",))


def test_the_definition_is_the_equation() -> None:
    batch = make_batch(EDGES["holes"])
    with backend("reference"):
        cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    for index, mask in enumerate(batch.response_mask):
        wanted = focus(positions(batch.hidden[index], batch.visual_mask[index], mask), causal=False)
        assert cos[index][mask].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_order_do_not_change_a_bit(exact_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    # One dtype is enough of a batch that takes the interpreter seconds.
    edge = EDGES["holes"] + (EDGES["long"] if dtype == torch.float32 else ()) + EDGES["no image"]
    padded = make_batch(edge, dtype=dtype, features=67).to(device)
    wider = make_batch(edge, dtype=dtype, features=67, extra_padding=13).to(device)
    packed = make_batch(edge, dtype=dtype, features=67, packed=True).to(device)
    cos = visual_focus(padded.hidden, padded.visual_mask, padded.response_mask)
    expected = cos[padded.response_mask]
    again = visual_focus(wider.hidden, wider.visual_mask, wider.response_mask)[wider.response_mask]
    assert same_bits(again, expected)
    again = visual_focus(packed.hidden, packed.visual_mask, packed.response_mask, cu_seqlens=packed.cu_seqlens)
    assert same_bits(again[packed.response_mask], expected)
    order = torch.randperm(len(edge), generator=torch.Generator().manual_seed(1)).to(device)
    again = visual_focus(padded.hidden[order], padded.visual_mask[order], padded.response_mask[order])
    assert same_bits(again, cos[order])
    for part in (slice(0, 2), slice(2, None)):
        again = visual_focus(padded.hidden[part], padded.visual_mask[part], padded.response_mask[part])
        assert same_bits(again, cos[part])


def test_a_prototype_may_be_shared(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    own = visual_prototype(batch.hidden, batch.visual_mask)
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    given = visual_focus(batch.hidden, None, batch.response_mask, prototype=own)
    assert_close(given, cos.double(), name="cos by a given prototype")
    index = torch.tensor([2, -1, 2, 0], device=device)
    shared = visual_focus(batch.hidden, None, batch.response_mask, prototype=own, prototype_index=index)
    arguments = (batch.hidden, None, batch.response_mask, None, own, index)
    assert_matches(shared, reference.visual_focus, arguments, ("cos",))
    assert shared[1][batch.response_mask[1]].isnan().all()


def test_nan_stays_in_its_response(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    expected = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    broken = batch.hidden.clone()
    broken[1][batch.visual_mask[1]] = float("inf")
    broken[2, -batch.response_mask.shape[1]] = float("nan")
    actual = visual_focus(broken, batch.visual_mask, batch.response_mask)
    others = torch.tensor([0, 3], device=device)
    assert torch.equal(actual[others], expected[others])
    assert actual[1][batch.response_mask[1]].isposinf().all()
    assert actual[2, 0].isposinf()
    assert torch.equal(actual[2, 1:], expected[2, 1:])


def test_scale_does_not_matter(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    scaled = visual_focus(batch.hidden * 1024, batch.visual_mask, batch.response_mask)
    assert_close(scaled, cos.double(), name="cos of scaled states")


def test_inputs_need_not_be_contiguous(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"], features=24).to(device)
    expected = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    wide = torch.full((*batch.hidden.shape[:2], 31), float("nan"), device=device)
    wide[..., 3:27] = batch.hidden
    sliced = visual_focus(wide[..., 3:27], batch.visual_mask, batch.response_mask)
    assert torch.equal(sliced, expected)
    transposed = batch.hidden.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(visual_focus(transposed, batch.visual_mask, batch.response_mask), expected)
    steps = torch.stack([batch.visual_mask, batch.visual_mask], dim=-1)[..., 0]
    assert torch.equal(visual_focus(batch.hidden, steps, batch.response_mask), expected)


def test_the_signal_is_detached(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    hidden = batch.hidden.clone().requires_grad_()
    assert not visual_focus(hidden, batch.visual_mask, batch.response_mask).requires_grad
    assert not visual_prototype(hidden, batch.visual_mask).requires_grad


def test_integer_masks_are_masks(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["holes"]).to(device)
    expected = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask)
    actual = visual_focus(batch.hidden, batch.visual_mask.long(), batch.response_mask.to(torch.int32))
    assert torch.equal(actual, expected)


def test_many_images_make_one_prototype(backend_name: str, device: torch.device) -> None:
    batch = make_batch((Response(visual=9, length=5),)).to(device)
    mask = batch.visual_mask.clone()
    mask[0, 3:5] = False
    expected = batch.hidden[0][mask[0]].double().mean(0)
    assert_close(visual_prototype(batch.hidden, mask)[0], expected, name="prototype")


def test_long_sums_keep_their_precision(backend_name: str, device: torch.device) -> None:
    hidden = torch.full((1, 20_000, 8), 1.0 / 3.0, device=device)
    mask = torch.ones(1, 20_000, dtype=torch.bool, device=device)
    prototype = visual_prototype(hidden, mask)
    assert_close(prototype, torch.full((1, 8), 1.0 / 3.0, dtype=torch.float64), name="prototype", floor=1e-6)

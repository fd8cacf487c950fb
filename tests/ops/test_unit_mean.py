"""``pooling="unit_mean"``: the mean of a token's cosines with its image's tokens, without an array of them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from tolerance import assert_close, assert_matches, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import visual_focus, visual_prototype
from vgpo_kernels.reference import visual_focus as reference

VISIBILITIES = ("all", "causal")


def mean_cosines(batch: Batch, visibility: str = "all") -> Tensor:
    image = (batch.hidden, batch.visual_mask, batch.response_mask)
    return visual_focus(*image, cu_seqlens=batch.cu_seqlens, visibility=visibility, pooling="unit_mean")


def units(batch: Batch, visibility: str = "all") -> Tensor:
    image = (batch.hidden, batch.visual_mask)
    return visual_prototype(*image, cu_seqlens=batch.cu_seqlens, visibility=visibility, pooling="unit_mean")


def by_loops(batch: Batch, visibility: str) -> Tensor:
    """Every cosine of every token with every image token that it sees, in fp64, and their mean."""
    found = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    if batch.cu_seqlens is None:
        parts = [(index, slice(None)) for index in range(len(batch.hidden))]
    else:
        ends = batch.cu_seqlens.tolist()
        parts = [(slice(begin, end),) for begin, end in pairwise(ends)]
    for part in parts:
        hidden, visual = batch.hidden[part].double().cpu(), batch.visual_mask[part].cpu()
        mask = batch.response_mask[part].cpu()
        values = found[part]
        for token in mask.nonzero()[:, 0].tolist():
            row = len(visual) - len(mask) + token
            seen = hidden[:row][visual[:row]] if visibility == "causal" else hidden[visual]
            cosines = torch.cosine_similarity(hidden[row], seen, dim=-1, eps=reference.NORM_FLOOR)
            values[token] = cosines.mean() if len(seen) else math.nan
    return found


def by_hand(image: list[list[float]], token: list[float], device: torch.device) -> Batch:
    """A response of one token after the rows of an image."""
    batch = make_batch((Response(visual=len(image), text=0, length=1),), features=len(token)).to(device)
    return replace(batch, hidden=torch.tensor([[*image, token]], device=device))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", ["holes", "empty response", "no image", "late images", "all empty", "no responses"])
def test_matches_loops_over_every_pair(backend_name: str, device: torch.device, edge: str, packed: bool) -> None:
    batch = make_batch(EDGES[edge], packed=packed).to(device)
    for visibility in VISIBILITIES:
        wanted = by_loops(batch, visibility)
        found = mean_cosines(batch, visibility)
        assert found.dtype == torch.float32
        assert_close(found, wanted, name="mean cosines")
        means = units(batch, visibility)
        arguments = (batch.hidden, batch.visual_mask, batch.cu_seqlens, visibility == "causal", True)
        assert_matches(means, reference.visual_prototype, arguments, ("unit prototype",))
        given = visual_focus(
            batch.hidden,
            None,
            batch.response_mask,
            cu_seqlens=batch.cu_seqlens,
            prototype=means,
            pooling="unit_mean",
        )
        assert_close(given, wanted, name="by given prototypes")


@pytest.mark.parametrize(
    ("features", "dtype"), [(1, torch.float32), (515, torch.bfloat16), (3584, torch.float16), (67, torch.bfloat16)]
)
def test_widths_and_dtypes(backend_name: str, device: torch.device, dtype: torch.dtype, features: int) -> None:
    edge = (*EDGES["late images"][:3], Response(visual=70, length=3))
    batch = make_batch(edge, features=features, dtype=dtype).to(device)
    for visibility in VISIBILITIES:
        assert_close(mean_cosines(batch, visibility), by_loops(batch, visibility), floor=floor_of(terms=features))


def test_a_long_image(exact_backend: str, device: torch.device) -> None:
    """So many rows that every backend sums them in parts."""
    batch = make_batch((Response(visual=700, length=3), Response(visual=3, length=5)), features=24).to(device)
    assert_close(mean_cosines(batch), by_loops(batch, "all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_and_order_do_not_change_a_bit(exact_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    edge = EDGES["holes"] + EDGES["no image"] + (Response(visual=150, length=20),)
    padded = make_batch(edge, dtype=dtype, features=67).to(device)
    packed = make_batch(edge, dtype=dtype, features=67, packed=True).to(device)
    cosines = mean_cosines(padded)
    assert same_bits(mean_cosines(packed)[packed.response_mask], cosines[padded.response_mask])
    assert same_bits(mean_cosines(packed, "causal")[packed.response_mask], cosines[padded.response_mask])
    assert same_bits(mean_cosines(padded, "causal"), cosines)
    means = units(padded)
    assert same_bits(units(packed), means)
    for part in (slice(0, 2), slice(2, None)):
        fields = {"hidden": padded.hidden[part], "visual_mask": padded.visual_mask[part]}
        alone = replace(padded, **fields, response_mask=padded.response_mask[part])
        assert same_bits(mean_cosines(alone), cosines[part])
        assert same_bits(units(alone), means[part])


def test_a_late_image_changes_no_bit_before_it(exact_backend: str, device: torch.device) -> None:
    batch = make_batch((Response(visual=40, length=30), Response(visual=9, length=20)), features=67).to(device)
    before = mean_cosines(batch, "causal")
    prompt = batch.visual_mask.shape[1] - batch.response_mask.shape[1]
    visual, mask, hidden = batch.visual_mask.clone(), batch.response_mask.clone(), batch.hidden.clone()
    visual[:, prompt + 9 : prompt + 12] = True
    mask[:, 9:12] = False
    hidden[0, prompt + 9] = math.nan
    after = mean_cosines(replace(batch, hidden=hidden, visual_mask=visual, response_mask=mask), "causal")
    assert same_bits(after[:, :9], before[:, :9])
    assert after[0, 12:].isposinf().all()
    assert not torch.equal(after[1, 12:], before[1, 12:])


def test_what_a_zero_means(backend_name: str, device: torch.device) -> None:
    up, down, token = [3.0, 0.0], [-2.0, 0.0], [4.0, 3.0]
    assert mean_cosines(by_hand([up, [0.0, 0.0]], token, device)).item() == pytest.approx(0.4)  # 0.8 and 0
    assert mean_cosines(by_hand([[0.0, 0.0]], token, device)).item() == 0
    assert mean_cosines(by_hand([up, down], token, device)).item() == 0  # cosines 0.8 and -0.8, no prototype left
    assert mean_cosines(by_hand([up], [0.0, 0.0], device)).item() == 0
    batch = by_hand([up], token, device)
    given = torch.zeros(1, 2, device=device)
    cosine = visual_focus(batch.hidden, None, batch.response_mask, prototype=given, pooling="unit_mean")
    assert cosine.isnan().all()


def test_norms_at_the_edge_of_their_range(backend_name: str, device: torch.device) -> None:
    token = [4.0, 3.0]
    for image in ([1e18, 0.0], [1e-7, 0.0]):
        assert mean_cosines(by_hand([image], token, device)).item() == pytest.approx(0.8)
    assert mean_cosines(by_hand([[1e-9, 0.0]], token, device)).item() == pytest.approx(0.08)  # below the floor
    assert mean_cosines(by_hand([[1e18, 0.0]], [4e-7, 3e-7], device)).item() == pytest.approx(0.8)
    for image in ([1e20, 0.0], [math.inf, 0.0], [0.0, math.nan]):
        batch = by_hand([[1.0, 0.0], image], token, device)
        assert mean_cosines(batch).isposinf().all()
        assert units(batch).isnan().all()
    assert mean_cosines(by_hand([[1.0, 0.0]], [math.inf, 0.0], device)).isposinf().all()


def test_it_is_detached(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"][:1]).to(device)
    batch = replace(batch, hidden=batch.hidden.requires_grad_())
    assert not mean_cosines(batch).requires_grad
    assert not units(batch).requires_grad

"""Images that arrive among scored tokens, in Triton: what a token sees, to the bit, wherever blocks begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from cases import Batch
from equations import focus, positions
from test_visibility import cosines as cosines_of
from tolerance import assert_close, assert_matches
from torch import Tensor

from vgpo_kernels import VGPOConfig, backends, visual_focus, visual_prototype, visual_weights
from vgpo_kernels.reference import visual_focus as reference
from vgpo_kernels.reference import visual_weights as weights_reference

RUNS = backends.describe()["built"]["triton"] and (backends.triton_interpreted() or torch.cuda.is_available())
pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton runs nowhere here"),
    pytest.mark.parametrize("backend_name", ["triton"], indirect=True),
    pytest.mark.usefixtures("backend_name"),
]

# The rows of a response: an image's (v), a scored token's (t), both (b), neither (.).
LATE = {
    "late": "vvv..tttt.vvvv.tttttttt",
    "after some tokens": "..tttt.vvv.tttt",
    "every token has a new image": "vtvtvtvtvvtvtvtvtvt",
    "scored placeholders": ".tvbbttbtbb",
    "long": "vvvvv" + "t" * 37 + "v" * 150 + "t" * 40 + "v" * 3 + "t" * 9 + "v" * 70,
    "long after its image": "tvt" + "v" * 9 + "t" * 150,
    "first row is a scored placeholder": "tbttvt",
    "ends with its span": "vvt" + "v" * 61 + "t" * 3,
}
FIRST = {"first": "vvvv..tttttttt", "two images": "vv..vvv.t.tttttttttttttt", "one token": "vt"}
NONE = {"after the last token": "..tttt.vvv", "no image": "..ttttt", "no token": "vvv..."}
SHAPES = LATE | FIRST | NONE
FEATURES = 20  # more than one slice of columns, and a partial one


def make(shapes: Sequence[str], packed: bool, dtype: torch.dtype = torch.float32, pad: int = 0) -> Batch:
    """Draw a batch; the numbers of a response depend on its shape alone. Rows off both masks are NaN."""
    rows = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(len(shape) + 1000 * shape.count("v"))
        hidden = torch.randn(len(shape), FEATURES, generator=generator) + 0.6 * torch.randn(
            FEATURES, generator=generator
        )
        hidden[[kind == "." for kind in shape]] = math.nan
        logp = -torch.rand(len(shape), generator=generator)
        rows.append((hidden.to(dtype), lettered(shape, "vb"), lettered(shape, "tb"), logp))
    width = max(map(len, shapes)) + pad
    scored = [len(shape) - index for shape in shapes for index, kind in enumerate(shape) if kind in "tb"]
    tokens = max(scored, default=0) + pad // 2

    def lay_out(column: int, fill: float | bool) -> Tensor:
        parts = [row[column] for row in rows]
        if packed:
            return torch.cat(parts)
        padded = [torch.cat([part.new_full((width - len(part), *part.shape[1:]), fill), part]) for part in parts]
        return torch.stack(padded)

    def at_tokens(values: Tensor) -> Tensor:
        return values if packed else values[:, width - tokens :]

    logp = at_tokens(lay_out(3, 0.0))
    return Batch(
        hidden=lay_out(0, math.nan),
        visual_mask=lay_out(1, False),
        response_mask=at_tokens(lay_out(2, False)),
        group_ids=torch.arange(len(shapes)) // 2,
        cu_seqlens=torch.tensor([0, *map(len, shapes)]).cumsum(0) if packed else None,
        logp=logp,
        old_logp=logp + 0.1,
        ref_logp=logp,
        entropy=logp,
        advantages=torch.linspace(-1, 1, len(shapes)),
        token_advantages=logp,
    )


def lettered(shape: str, letters: str) -> Tensor:
    return torch.tensor([kind in letters for kind in shape], dtype=torch.bool)


def scored_cosines(batch: Batch, visibility: str = "causal") -> list[Tensor]:
    """Return the cosines of each response's scored tokens."""
    packed = batch.cu_seqlens is not None
    cos = cosines_of(batch, visibility)
    assert (cos[~batch.response_mask] == 0).all()
    lengths = batch.cu_seqlens.diff().tolist() if packed else []
    parts = (
        zip(cos.split(lengths), batch.response_mask.split(lengths), strict=True)
        if packed
        else zip(cos, batch.response_mask, strict=True)
    )
    return [values[mask] for values, mask in parts]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def by_hand(batch: Batch, index: int, shape: str) -> list[float]:
    """Cosines of a response's scored tokens in plain loops."""
    hidden = batch.hidden
    if batch.cu_seqlens is not None:
        hidden = hidden[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
    else:
        hidden = hidden[index, hidden.shape[1] - len(shape) :]
    return focus(positions(hidden, lettered(shape, "vb"), lettered(shape, "tb")), causal=True)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_sees_the_images_before_it(device: torch.device, dtype: torch.dtype, packed: bool) -> None:
    batch = make(list(SHAPES.values()), packed, dtype).to(device)
    for index, (shape, actual) in enumerate(zip(SHAPES.values(), scored_cosines(batch), strict=True)):
        assert_close(actual, torch.tensor(by_hand(batch, index, shape), dtype=torch.float64), name=shape)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, batch.cu_seqlens, None, None, True)
    cos = visual_focus(*arguments[:3], cu_seqlens=batch.cu_seqlens, visibility="causal")
    assert_matches(cos, reference.visual_focus, arguments, ("cos",))


@pytest.mark.parametrize("name", LATE)
def test_a_later_image_changes_no_bit(device: torch.device, name: str) -> None:
    shape = LATE[name]
    (whole,) = scored_cosines(make([shape], packed=True).to(device))
    for cut in [row for row in range(1, len(shape)) if shape[row] in "vb" and shape[row - 1] in "tb"][:6]:
        batch = make([shape], packed=True).to(device)
        batch.hidden[cut:][batch.visual_mask[cut:] & ~batch.response_mask[cut:]] = math.nan
        batch.visual_mask[cut:] = False
        (without,) = scored_cosines(batch)
        before = int(batch.response_mask[:cut].sum())
        assert before
        assert same(without[:before], whole[:before]), f"cut at row {cut}"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_images_that_come_first_give_the_bits_of_all(device: torch.device, packed: bool) -> None:
    batch = make([*FIRST.values(), "v" * 70 + "t" * 9], packed).to(device)
    for causal, everything in zip(scored_cosines(batch), scored_cosines(batch, "all"), strict=True):
        assert same(causal, everything)


def test_blocks_may_begin_anywhere(device: torch.device) -> None:
    """Rows before a response shift its spans and its blocks of tokens."""
    shape = LATE["long"]
    (expected,) = scored_cosines(make([shape], packed=True).to(device))
    for shift in (1, 7, 63):
        batch = shifted(make([shape], packed=True), shift).to(device)
        (actual,) = scored_cosines(batch)
        assert same(actual, expected)


def shifted(batch: Batch, shift: int) -> Batch:
    def behind(values: Tensor, fill: float | bool) -> Tensor:
        return torch.cat([values.new_full((shift, *values.shape[1:]), fill), values])

    assert batch.cu_seqlens is not None
    return replace(
        batch,
        hidden=behind(batch.hidden, math.nan),
        visual_mask=behind(batch.visual_mask, False),
        response_mask=behind(batch.response_mask, False),
        cu_seqlens=batch.cu_seqlens + torch.tensor([0, shift]),
    )


def test_what_is_not_finite_spoils_what_sees_it(device: torch.device) -> None:
    shape = LATE["late"]
    (expected,) = scored_cosines(make([shape], packed=True).to(device))
    spoilt = make([shape], packed=True).to(device)
    spoilt.hidden[shape.rindex("v")] = math.inf
    (actual,) = scored_cosines(spoilt)
    assert same(actual[:4], expected[:4])
    assert (actual[4:] == math.inf).all()
    spoilt = make([shape], packed=True).to(device)
    spoilt.hidden[shape.index("t")] = math.nan
    (actual,) = scored_cosines(spoilt)
    assert actual[0] == math.inf
    assert same(actual[1:], expected[1:])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_running_prototypes(device: torch.device, packed: bool) -> None:
    shapes = [LATE["late"], LATE["scored placeholders"], NONE["no image"], "v" * 70 + "t"]
    batch = make(shapes, packed, torch.bfloat16).to(device)
    actual = visual_prototype(batch.hidden, batch.visual_mask, cu_seqlens=batch.cu_seqlens, visibility="causal")
    arguments = (batch.hidden, batch.visual_mask, batch.cu_seqlens, True)
    assert_matches(actual, reference.visual_prototype, arguments, ("prototype",))
    # Given to visual_focus, they are what it makes itself.
    given = visual_focus(batch.hidden, None, batch.response_mask, cu_seqlens=batch.cu_seqlens, prototype=actual)
    own = visual_focus(
        batch.hidden, batch.visual_mask, batch.response_mask, cu_seqlens=batch.cu_seqlens, visibility="causal"
    )
    assert_close(given, own.double(), name="cos by given prototypes")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_prototype_for_each_token(device: torch.device, packed: bool) -> None:
    batch = make([FIRST["two images"], LATE["late"]], packed).to(device)
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(4, FEATURES, generator=generator)
    means[2] = 0
    means[3] *= 1e-30  # whose squares vanish
    index = torch.randint(-1, 4, batch.response_mask.shape, generator=generator).to(device)
    means = means.to(device)

    def focus(rows: Tensor) -> Tensor:
        return visual_focus(
            batch.hidden, None, batch.response_mask, cu_seqlens=batch.cu_seqlens, prototype=means, prototype_index=rows
        )

    actual = focus(index)
    arguments = (batch.hidden, None, batch.response_mask, batch.cu_seqlens, means, index)
    assert_matches(actual, reference.visual_focus, arguments, ("cos",))
    for row in range(4):
        # The same bits as among tokens that have this prototype too.
        chosen = batch.response_mask & (index == row)
        assert chosen.any()
        assert same(actual[chosen], focus(torch.full_like(index, row))[chosen])
    for row, seen in ((-1, False), (0, True), (2, False), (3, True)):
        chosen = batch.response_mask & (index == row)
        assert torch.equal(~actual[chosen].isnan(), torch.full_like(chosen[chosen], seen))
        everywhere = focus(torch.full((2,), row, device=device))
        assert_close(everywhere[chosen], actual[chosen].double(), name="one prototype for all")


# ---- weights of cosines with leading NaN ---------------------------------------------------------------------------

UNSEEN = {"none": 0, "one": 1, "into the tail": 9, "all but one": 11, "all": 12}
CONFIGS = {
    "paper": VGPOConfig.paper(),
    "released": VGPOConfig.released(),
    "mean, no gate": VGPOConfig.paper(accumulation="mean", gate=False),
    "clamps without 1": VGPOConfig.paper(intra_clamp=(1.1, 2.0), inter_clamp=(0.2, 0.9)),
}


def cosines(spoil: Callable[[Tensor], None] = lambda values: None) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of responses that see their image after so many tokens; mask with holes; groups."""
    generator = torch.Generator().manual_seed(6)
    cos = torch.rand(len(UNSEEN) + 3, 19, generator=generator) * 1.8 - 0.9
    mask = torch.zeros(cos.shape, dtype=torch.bool)
    mask[:, [0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 15, 16]] = True
    for row, unseen in enumerate(UNSEEN.values()):
        cos[row, mask[row].nonzero()[:unseen, 0]] = math.nan
    mask[5] = False  # overlong filtering
    cos[6, 5] = math.inf
    cos[7, 5] = math.nan
    spoil(cos)
    return cos.masked_fill(~mask, math.nan), mask, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize("with_flags", [False, True], ids=["", "has_visual"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_before_their_image_have_no_signal(device: torch.device, name: str, with_flags: bool) -> None:
    cos, mask, groups = (values.to(device) for values in cosines())
    flags = torch.arange(len(cos), device=device) != 0 if with_flags else None
    config = CONFIGS[name]
    weights = visual_weights(cos, mask, groups, config, has_visual=flags)
    flat = (*weights[:5], torch.stack(list(weights.metrics.values())))
    arguments = (cos, mask, groups, flags, None, config.as_floats())
    names = ("factors", "psi", "w", "phi", "score", "metrics")
    assert_matches(flat, weights_reference.visual_weights, arguments, names)
    weighted = torch.tensor([not with_flags, True, True, True, False, False, False, False], device=device)
    assert torch.equal(weights.score.isfinite(), weighted)
    assert (weights.factors[~weighted] == 1).all()
    blind = cos.isnan() & mask
    assert (weights.psi[blind] == 0).all()
    assert (weights.w[blind] == 0).all()
    assert weights.metrics["nonfinite_responses"] == 2
    assert weights.metrics["groups"] == 2
    assert weights.metrics["singleton_groups"] == 1


def test_packing_does_not_change_a_bit_of_the_weights(device: torch.device) -> None:
    cos, mask, groups = (values.to(device) for values in cosines())
    expected = visual_weights(cos, mask, groups, VGPOConfig.paper())
    boundaries = torch.arange(len(cos) + 1, device=device) * cos.shape[1]
    packed = visual_weights(cos.view(-1), mask.view(-1), groups, VGPOConfig.paper(), cu_seqlens=boundaries)
    assert same(packed.factors.view(cos.shape), expected.factors)
    assert same(packed.psi.view(cos.shape), expected.psi)
    assert torch.equal(packed.phi, expected.phi)


def test_the_smallest_cosine_is_of_tokens_with_a_signal(device: torch.device) -> None:
    """Where a response without image, or one that is spoilt, has the smallest one, the offset is another's."""
    cos, mask, groups = (values.to(device) for values in cosines())
    flags = torch.arange(len(cos), device=device) != 1
    cos[1][mask[1] & cos[1].isfinite()] = -1.0
    config = VGPOConfig.released()
    weights = visual_weights(cos, mask, groups, config, has_visual=flags)
    exact = weights_reference.visual_weights(cos, mask, groups, flags, None, config.as_floats())
    assert_close(weights.w, exact[2], name="w")
    candidates = cos[mask & cos.isfinite() & weights.score.isfinite()[:, None]]
    assert_close(weights.w[0, 0], (cos[0, 0] - candidates.min()).double(), name="w of the first token")


def test_groups_are_counted_over_many_responses(device: torch.device) -> None:
    """More responses than one block of the count has."""
    generator = torch.Generator().manual_seed(8)
    batch = 150
    cos = torch.rand(batch, 2, generator=generator)
    groups = torch.randint(0, 90, (batch,), generator=generator) - 2**40
    cos[torch.rand(batch, generator=generator) < 0.3] = math.nan
    mask = torch.ones_like(cos, dtype=torch.bool)
    metrics = visual_weights(cos.to(device), mask.to(device), groups.to(device), VGPOConfig.paper()).metrics
    members = [group for group, seen in zip(groups.tolist(), cos[:, 0].isfinite().tolist(), strict=True) if seen]
    assert metrics["groups"] == len(set(members))
    assert metrics["singleton_groups"] == sum(members.count(group) == 1 for group in set(members)) > 0

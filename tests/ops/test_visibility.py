"""Images that arrive late: a token is compared with what it had seen, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from equations import NAN, factors, focus, positions
from test_vgpo_loss import in_one_call
from tolerance import assert_close, assert_matches, same_bits
from torch import Tensor

from vgpo_kernels import VGPOConfig, linear_vgpo_loss, visual_focus, visual_prototype, visual_weights
from vgpo_kernels.reference import visual_focus as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cosines(batch: Batch, visibility: str = "causal") -> Tensor:
    return visual_focus(
        batch.hidden, batch.visual_mask, batch.response_mask, cu_seqlens=batch.cu_seqlens, visibility=visibility
    )


def after(batch: Batch, first: int, count: int = 1) -> Batch:
    """The same padded batch with an image of ``count`` rows in every response, from its token ``first`` on."""
    begin = batch.visual_mask.shape[1] - batch.response_mask.shape[1] + first
    visual, mask, hidden = batch.visual_mask.clone(), batch.response_mask.clone(), batch.hidden.clone()
    visual[:, begin : begin + count] = True
    mask[:, first : first + count] = False
    hidden[:, begin : begin + count] = 3.0 - hidden[:, begin : begin + count].nan_to_num()
    return replace(batch, hidden=hidden, visual_mask=visual, response_mask=mask)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", EDGES)
def test_matches_the_definition(backend_name: str, device: torch.device, edge: str, packed: bool) -> None:
    batch = make_batch(EDGES[edge], packed=packed).to(device)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, batch.cu_seqlens, None, None, True)
    assert_matches(cosines(batch), reference.visual_focus, arguments, ("cos",))
    means = visual_prototype(batch.hidden, batch.visual_mask, cu_seqlens=batch.cu_seqlens, visibility="causal")
    assert means.dtype == torch.float32
    arguments = (batch.hidden, batch.visual_mask, batch.cu_seqlens, True)
    assert_matches(means, reference.visual_prototype, arguments, ("prototype",))


@pytest.mark.parametrize("features", [1, 7, 515, 3584])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_and_dtypes(backend_name: str, device: torch.device, dtype: torch.dtype, features: int) -> None:
    batch = make_batch(EDGES["late images"][:3], features=features, dtype=dtype).to(device)
    arguments = (batch.hidden, batch.visual_mask, batch.response_mask, None, None, None, True)
    assert_matches(cosines(batch), reference.visual_focus, arguments, ("cos",))


@pytest.mark.parametrize("name", ["paper", "released"])
@pytest.mark.parametrize("visibility", ["all", "causal"])
def test_the_three_steps_are_the_equations(backend_name: str, device: torch.device, visibility: str, name: str) -> None:
    """A batch with everything that happens: late images, no image, overlong responses, holes, groups in any order."""
    edge = EDGES["late images"] + EDGES["no image"] + EDGES["empty response"] + EDGES["holes"] + EDGES["one token"]
    batch = make_batch(edge).to(device)
    config = VGPOConfig.paper() if name == "paper" else VGPOConfig.released()
    cos = cosines(batch, visibility)
    weights = visual_weights(cos, batch.response_mask, batch.group_ids, config)
    loss, metrics = in_one_call(batch, batch.logp, config, visibility=visibility)

    responses = [
        positions(*one)
        for one in zip(batch.hidden.cpu(), batch.visual_mask.cpu(), batch.response_mask.cpu(), strict=True)
    ]
    wanted = [focus(response, visibility == "causal") for response in responses]
    expected = factors(wanted, batch.group_ids.tolist(), config)
    for index, (one, seen) in enumerate(zip(expected, wanted, strict=True)):
        mask = batch.response_mask[index]
        for found, values in ((cos, seen), (weights.factors, one.factors), (weights.psi, one.psi), (weights.w, one.w)):
            assert_close(found[index][mask], torch.tensor(values), floor=5e-6)
    assert_close(weights.phi, torch.tensor([one.phi for one in expected]), floor=5e-6)
    assert_close(weights.score, torch.tensor([one.score for one in expected]), floor=5e-6)
    number = sum(len(one.factors) for one in expected)
    mean = sum(sum(one.factors) for one in expected) / number
    assert metrics["factor_mean"].item() == pytest.approx(mean, abs=1e-5)
    assert metrics["weighted_responses"] == sum(one.score == one.score for one in expected)
    assert metrics["nonfinite_responses"] == 0
    assert loss.isfinite()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_that_come_first_give_the_same_bits(
    exact_backend: str, device: torch.device, dtype: torch.dtype, packed: bool
) -> None:
    edge = EDGES["holes"] + EDGES["no image"] + EDGES["empty response"] + (Response(visual=150, length=90),)
    batch = make_batch(edge, dtype=dtype, features=67, packed=packed).to(device)
    assert same_bits(cosines(batch, "causal"), cosines(batch, "all"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_later_image_changes_no_bit_before_it(exact_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    batch = make_batch(tuple(Response(visual=40, length=30 + index) for index in range(3)), dtype=dtype, features=67)
    batch = batch.to(device)
    alone = cosines(batch)
    for first in (1, 9, 20):
        changed = cosines(after(batch, first, count=3))
        assert same_bits(changed[:, :first], alone[:, :first])
        assert not same_bits(changed[:, first + 3 :], alone[:, first + 3 :])
        twice = cosines(after(after(batch, first, count=3), 24, count=2))
        assert same_bits(twice[:, :24], changed[:, :24])


def test_an_image_after_the_response_changes_no_factor(exact_backend: str, device: torch.device) -> None:
    batch = make_batch(tuple(Response(length=20, group=index // 2) for index in range(4)), features=67).to(device)
    batch = replace(batch, response_mask=batch.response_mask & (torch.arange(20, device=device) < 15))
    late = after(batch, 16, count=4)
    for visibility, same in (("causal", True), ("all", False)):
        one, two = (
            visual_weights(cosines(each, visibility), each.response_mask, each.group_ids, VGPOConfig.paper())
            for each in (batch, late)
        )
        assert same_bits(one.factors, two.factors) == same


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_and_order_do_not_change_a_bit(exact_backend: str, device: torch.device, dtype: torch.dtype) -> None:
    edge = EDGES["late images"] + EDGES["plain"] + EDGES["no image"]
    padded, wider, packed = (
        make_batch(edge, dtype=dtype, features=67, **layout).to(device)
        for layout in ({}, {"extra_padding": 13}, {"packed": True})
    )
    cos = cosines(padded)
    for other in (wider, packed):
        assert same_bits(cosines(other)[other.response_mask], cos[padded.response_mask])
    order = torch.randperm(len(edge), generator=torch.Generator().manual_seed(1)).to(device)
    fields = ("hidden", "visual_mask", "response_mask")
    assert same_bits(cosines(replace(padded, **{name: getattr(padded, name)[order] for name in fields})), cos[order])
    for part in (slice(0, 2), slice(2, None)):
        cut = replace(padded, **{name: getattr(padded, name)[part] for name in fields})
        assert same_bits(cosines(cut), cos[part])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_token_may_bring_an_image(backend_name: str, device: torch.device, packed: bool) -> None:
    """Images and tokens by turns, also where a scored token is itself a visual row, which it does not see."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 24, 40, generator=generator).to(device)
    visual = (torch.rand(2, 24, generator=generator) < 0.5).to(device)
    for mask in (~visual, torch.ones_like(visual), torch.rand(2, 24, generator=generator).to(device) < 0.5):
        shape = (48,) if packed else (2, 24)
        given = (hidden.view(*shape, 40), visual.view(shape), mask.view(shape))
        layout = torch.tensor([0, 24, 48], device=device) if packed else None
        cos = visual_focus(*given, cu_seqlens=layout, visibility="causal").view(2, 24)
        for index in range(2):
            wanted = focus(positions(hidden[index].cpu(), visual[index].cpu(), mask[index].cpu()), causal=True)
            assert_close(cos[index][mask[index]], torch.tensor(wanted), floor=2e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_prototypes_may_be_given_for_each_position(backend_name: str, device: torch.device, packed: bool) -> None:
    batch = make_batch(EDGES["late images"], packed=packed).to(device)
    means = visual_prototype(batch.hidden, batch.visual_mask, cu_seqlens=batch.cu_seqlens, visibility="causal")
    strided = torch.stack([means, means], -1)[..., 0]
    for prototype in (means, strided):
        given = visual_focus(batch.hidden, None, batch.response_mask, cu_seqlens=batch.cu_seqlens, prototype=prototype)
        assert_close(given, cosines(batch).double(), name="cos by given prototypes", floor=4e-6)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 3)], ids=str)
def test_there_may_be_no_prototype(backend_name: str, device: torch.device, shape: tuple[int, ...]) -> None:
    hidden = torch.zeros(shape, device=device)
    mask = torch.ones(shape[:-1], dtype=torch.bool, device=device)
    layouts = [None] if len(shape) == 3 else [torch.tensor([0], device=device), torch.tensor([0, 0, 0], device=device)]
    for layout in layouts:
        batch = shape[0] if layout is None else len(layout) - 1
        for prototype in (hidden, torch.zeros(batch, shape[-1], device=device)):
            cos = visual_focus(hidden, None, mask, cu_seqlens=layout, prototype=prototype)
            assert cos.shape == mask.shape


def test_rows_are_per_response_where_a_packed_batch_has_as_many_tokens(backend_name: str, device: torch.device) -> None:
    hidden = torch.tensor([[1.0, 0.0]] * 3, device=device)
    prototype = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=device)
    layout, mask = torch.tensor([0, 3, 3, 3], device=device), torch.ones(3, dtype=torch.bool, device=device)
    for index in (None, torch.arange(3, device=device)):
        cos = visual_focus(hidden, None, mask, cu_seqlens=layout, prototype=prototype, prototype_index=index)
        assert cos.tolist() == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_prototypes_may_be_given_for_each_token(backend_name: str, device: torch.device, packed: bool) -> None:
    batch = make_batch(EDGES["plain"], packed=packed).to(device)
    generator = torch.Generator().manual_seed(5)
    prototype = torch.randn(5, batch.hidden.shape[-1], generator=generator).to(device)
    prototype[3] = 0  # no image
    index = torch.randint(-1, 5, batch.response_mask.shape, generator=generator).to(device)
    cos = visual_focus(
        batch.hidden,
        None,
        batch.response_mask,
        cu_seqlens=batch.cu_seqlens,
        prototype=prototype,
        prototype_index=index,
    )
    arguments = (batch.hidden, None, batch.response_mask, batch.cu_seqlens, prototype, index)
    assert_matches(cos, reference.visual_focus, arguments, ("cos",))
    blind = batch.response_mask & ((index < 0) | (index == 3))
    assert cos[blind].isnan().all() and blind.any()
    loss = in_one_call(
        replace(batch, visual_mask=None),
        batch.logp,
        VGPOConfig.paper(),
        prototype=prototype,
        prototype_index=index.clamp(min=0, max=2),
    )
    assert loss.metrics["weighted_responses"] == len(batch.group_ids)


def test_one_call_is_the_three_steps(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["late images"] + EDGES["no image"] + EDGES["empty response"]).to(device)
    for visibility in ("all", "causal"):
        given = (batch.advantages, batch.visual_mask, batch.response_mask, batch.group_ids, VGPOConfig.paper())
        one = in_one_call(batch, batch.logp, VGPOConfig.paper(), visibility=visibility)
        weights = visual_weights(cosines(batch, visibility), batch.response_mask, batch.group_ids, VGPOConfig.paper())
        for name, value in weights.metrics.items():
            assert one.metrics[name].item() == pytest.approx(value.item(), abs=1e-6), name
        factors_of_tokens = weights.factors[batch.response_mask]
        assert one.metrics["factor_mean"].item() == pytest.approx(factors_of_tokens.mean().item(), abs=1e-6)
        head = torch.randn(11, batch.hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(device)
        linear = linear_vgpo_loss(
            batch.hidden.nan_to_num(),
            head,
            torch.zeros_like(batch.response_mask, dtype=torch.int64),
            batch.old_logp.nan_to_num(),
            *given,
            visibility=visibility,
        )
        assert linear.metrics["factor_mean"].item() == pytest.approx(factors_of_tokens.mean().item(), abs=1e-5)


def test_a_hidden_state_that_is_not_finite_is_told_from_no_image(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["no image"] + EDGES["late images"]).to(device)
    hidden = batch.hidden.clone()
    hidden[3] = NAN  # all of a response with an image, whose cosines could be taken for none
    cos = cosines(replace(batch, hidden=hidden))
    assert cos[3][batch.response_mask[3]].isposinf().all()
    weights = visual_weights(cos, batch.response_mask, batch.group_ids, VGPOConfig.paper())
    assert weights.metrics["nonfinite_responses"] == 1
    assert weights.metrics["weighted_responses"] == len(cos) - 3
    assert (weights.factors[3] == 1).all()

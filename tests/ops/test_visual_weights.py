"""visual_weights and group_weights on every backend, against the reference implementation and against plain loops."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import EDGES, Batch, make_batch
from equations import factors
from tolerance import assert_close, assert_matches, same_bits
from torch import Tensor

from vgpo_kernels import VGPOConfig, VisualWeights, backend, combine_factors, group_weights, visual_weights
from vgpo_kernels.reference import visual_weights as reference

NAMES = ("factors", "psi", "w", "phi", "score", "metrics")
CONFIGS = {
    "paper": VGPOConfig.paper(),
    "released": VGPOConfig.released(),
    "released, fixed offset": VGPOConfig.released(score_offset=-0.5),
    "mean": VGPOConfig.paper(accumulation="mean"),
    "exponential": VGPOConfig.paper(schedule="exponential", exponent=1.5, start_ratio=0.25),
    "step": VGPOConfig.paper(schedule="step", step_ratio=0.5),
    "late start": VGPOConfig.paper(start_ratio=0.7),
    "no gate": VGPOConfig.paper(gate=False),
    "whole response": VGPOConfig.paper(tail_ratio=1.0, top_ratio=1.0),
    "no tail": VGPOConfig.paper(tail_ratio=0.0),
    "intra only": VGPOConfig.released(inter=False),
    "inter only": VGPOConfig.released(intra=False),
}


def draw_cosines(batch: Batch, seed: int = 0) -> Tensor:
    """Cosines of the batch's valid tokens, by response and ordinal; NaN off the mask."""
    cos = torch.full(batch.response_mask.shape, float("nan"))
    mask = batch.response_mask.cpu()
    for index in range(len(batch.group_ids)):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        if batch.cu_seqlens is None:
            place = (index, mask[index])
            cos[place] = torch.rand(int(mask[index].sum()), generator=generator) * 1.9 - 0.95
        else:
            begin, end = batch.cu_seqlens[index : index + 2].tolist()
            part = mask[begin:end]
            cos[begin:end][part] = torch.rand(int(part.sum()), generator=generator) * 1.9 - 0.95
    return cos.to(batch.hidden.device)


def weigh(batch: Batch, cos: Tensor, config: VGPOConfig) -> VisualWeights:
    return visual_weights(
        cos,
        batch.response_mask,
        batch.group_ids,
        config,
        cu_seqlens=batch.cu_seqlens,
        has_visual=batch.has_visual,
    )


def flatten(weights: VisualWeights) -> tuple[Tensor, ...]:
    return (*weights[:5], torch.stack(list(weights.metrics.values())))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_edges_match_the_definition(
    backend_name: str, device: torch.device, preset: str, edge: str, packed: bool
) -> None:
    batch = make_batch(EDGES[edge], features=1, packed=packed).to(device)
    check(batch, draw_cosines(batch), CONFIGS[preset])


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_match_the_definition(backend_name: str, device: torch.device, name: str) -> None:
    batch = make_batch(EDGES["shuffled groups"] + EDGES["holes"], features=1).to(device)
    check(batch, draw_cosines(batch), CONFIGS[name])


def check(batch: Batch, cos: Tensor, config: VGPOConfig) -> None:
    arguments = (
        cos,
        batch.response_mask,
        batch.group_ids,
        batch.has_visual,
        batch.cu_seqlens,
        config.as_floats(),
    )
    actual = weigh(batch, cos, config)
    assert_matches(flatten(actual), reference.visual_weights, arguments, NAMES)
    phi = group_weights(actual.score, batch.group_ids, config, has_visual=batch.has_visual)
    assert_close(phi, actual.phi.double(), name="phi in two phases", floor=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_definition_is_the_equations(name: str) -> None:
    config = CONFIGS[name]
    batch = make_batch(EDGES["shuffled groups"] + EDGES["holes"], features=1)
    cos, mask = draw_cosines(batch), batch.response_mask
    with backend("reference"):
        actual = weigh(batch, cos, config)
    cosines = [row[valid].double().tolist() for row, valid in zip(cos, mask, strict=True)]
    for index, expected in enumerate(factors(cosines, batch.group_ids.tolist(), config)):
        assert actual.score[index].item() == pytest.approx(expected.score, rel=1e-6)
        assert actual.phi[index].item() == pytest.approx(expected.phi, abs=1e-6)
        assert actual.psi[index][mask[index]].tolist() == pytest.approx(expected.psi, abs=1e-6)
        assert actual.factors[index][mask[index]].tolist() == pytest.approx(expected.factors, abs=1e-6)


@pytest.mark.parametrize("name", ["paper", "released, fixed offset", "mean", "exponential"])
def test_layout_order_and_cuts_do_not_change_a_bit(exact_backend: str, device: torch.device, name: str) -> None:
    config = CONFIGS[name]
    edge = EDGES["plain"] + EDGES["long"] + EDGES["holes"] + EDGES["no image"]
    padded = make_batch(edge, features=1).to(device)
    expected = weigh(padded, draw_cosines(padded), config)
    mask = padded.response_mask
    for other in (make_batch(edge, features=1, extra_padding=21), make_batch(edge, features=1, packed=True)):
        other = other.to(device)
        actual = weigh(other, draw_cosines(other), config)
        for field in ("factors", "psi", "w"):
            one, two = getattr(actual, field)[other.response_mask], getattr(expected, field)[mask]
            assert torch.equal(one, two), field
        assert torch.equal(actual.phi, expected.phi)
        assert same_bits(actual.score, expected.score)
    two_phases = group_weights(expected.score, padded.group_ids, config, has_visual=padded.has_visual)
    assert torch.equal(two_phases, expected.phi)
    cos = draw_cosines(padded)
    order = torch.randperm(len(edge), generator=torch.Generator().manual_seed(3)).to(device)
    permuted = visual_weights(
        cos[order], mask[order], padded.group_ids[order], config, has_visual=padded.has_visual[order]
    )
    assert torch.equal(permuted.factors, expected.factors[order])
    assert torch.equal(permuted.phi, expected.phi[order])
    for group in padded.group_ids.unique().tolist():
        members = padded.group_ids == group
        alone = visual_weights(
            cos[members], mask[members], padded.group_ids[members], config, has_visual=padded.has_visual[members]
        )
        assert torch.equal(alone.factors, expected.factors[members])


def test_ties_pass_the_gate(backend_name: str, device: torch.device) -> None:
    cos = torch.tensor([[0.1, 0.2, 0.9, 0.9, 0.9, 0.5, 0.9, 0.4, 0.3, 0.9]], device=device)
    mask = torch.ones_like(cos, dtype=torch.bool)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    weights = visual_weights(cos, mask, ids, VGPOConfig.paper())
    ratio = weights.w / ((1 + cos) / 2)
    # The tail is the last five; one passes and the tied ones with it: 0.9 at the seventh and the tenth.
    opened = (ratio > 1 + 1e-6)[0].tolist()
    assert opened == [False] * 6 + [True, False, False, True]
    assert weights.metrics["gate_rate"].item() == pytest.approx(0.2)


def test_nearly_tied_cosines_are_told_apart(backend_name: str, device: torch.device) -> None:
    """Cosines one unit in the last place apart would tie after 1 + cos; the gate compares cosines."""
    low = torch.tensor(0.1)
    high = torch.nextafter(low, torch.tensor(1.0))
    cos = torch.stack([low, low, low, high]).view(1, 4).to(device)
    weights = visual_weights(
        cos,
        torch.ones_like(cos, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64, device=device),
        VGPOConfig.paper(tail_ratio=1.0, schedule="step", step_ratio=0.0),
    )
    ratio = weights.w / ((1 + cos) / 2)
    assert (ratio > 1.1)[0].tolist() == [False, False, False, True]


def test_means_are_zero(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["long"] + EDGES["shuffled groups"], features=1).to(device)
    weights = weigh(batch, draw_cosines(batch), VGPOConfig.paper())
    sums = weights.psi.double().sum(-1) / batch.response_mask.sum(-1)
    assert sums.abs().max() < 1e-6
    for group in batch.group_ids.unique():
        assert weights.phi[batch.group_ids == group].double().mean().abs() < 1e-6


def test_equal_scores_weigh_alike(backend_name: str, device: torch.device) -> None:
    cos = torch.full((3, 8), 0.25, device=device)
    mask = torch.ones_like(cos, dtype=torch.bool)
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    weights = visual_weights(cos, mask, ids, VGPOConfig.paper(beta=0.0))
    assert (weights.psi == 0).all()
    assert (weights.phi == 0).all()
    assert (weights.factors == 1).all()


def test_responses_without_image_are_unweighted(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["no image"], features=1).to(device)
    weights = weigh(batch, draw_cosines(batch), VGPOConfig.paper())
    blind = ~batch.has_visual
    assert (weights.factors[blind] == 1).all()
    assert (weights.psi[blind] == 0).all()
    assert (weights.phi[blind] == 0).all()
    assert weights.score[blind].isnan().all()
    seeing = batch.has_visual & (batch.group_ids == 0)
    alone = visual_weights(
        draw_cosines(batch)[seeing], batch.response_mask[seeing], batch.group_ids[seeing], VGPOConfig.paper()
    )
    assert_close(alone.factors, weights.factors[seeing].double(), name="factors")


@pytest.mark.parametrize("name", CONFIGS)
def test_responses_without_a_signal_take_no_part(backend_name: str, device: torch.device, name: str) -> None:
    """Overlong filtering leaves responses without a token, text has no image, and late images leave tokens without."""
    config = CONFIGS[name]
    batch = make_batch(EDGES["shuffled groups"] + EDGES["holes"] + EDGES["empty response"], features=1).to(device)
    cos, mask = draw_cosines(batch), batch.response_mask.clone()
    mask[1] = False  # filtered
    cos[2] = math.nan  # without an image
    ordinals = mask.cumsum(1)
    cos[0][ordinals[0] <= 5] = cos[4][ordinals[4] <= 1] = cos[7][ordinals[7] <= 15] = math.nan  # an image comes later
    weights = visual_weights(cos, mask, batch.group_ids, config)
    phi = group_weights(weights.score, batch.group_ids, replace(config, score_offset=offset_of(config, cos, mask)))
    combined = combine_factors(weights.psi, phi, mask, config)
    expected = factors(
        [row[valid].tolist() for row, valid in zip(cos, mask, strict=True)], batch.group_ids.tolist(), config
    )
    for index, one in enumerate(expected):
        for found, values in ((weights.factors, one.factors), (weights.psi, one.psi), (weights.w, one.w)):
            assert_close(found[index][mask[index]], torch.tensor(values), floor=4e-6)
        assert_close(combined[index][mask[index]], torch.tensor(one.factors), floor=4e-6)
    assert_close(weights.phi, torch.tensor([one.phi for one in expected]), floor=4e-6)
    assert_close(weights.score, torch.tensor([one.score for one in expected]), floor=4e-6)
    assert (weights.factors[~mask] == 1).all() and (combined[~mask] == 1).all()
    weighted = [not math.isnan(one.score) for one in expected]
    groups = Counter(group for group, took_part in zip(batch.group_ids.tolist(), weighted, strict=True) if took_part)
    assert weights.metrics["weighted_responses"] == sum(weighted)
    assert weights.metrics["nonfinite_responses"] == 0
    assert weights.metrics["groups"] == len(groups)
    assert weights.metrics["singleton_groups"] == sum(size == 1 for size in groups.values())


def offset_of(config: VGPOConfig, cos: Tensor, mask: Tensor) -> float | None:
    """The offset to fix over a whole rollout batch."""
    if config.score == "affine" or config.score_offset is not None:
        return config.score_offset
    return min(0.0, cos[mask].nan_to_num(0.0).min().item())


def test_filtered_responses_do_not_move_the_others(backend_name: str, device: torch.device) -> None:
    """Two equal responses beside two without a token: nothing to compare, so nothing to weigh."""
    cos, mask = torch.full((4, 3), 0.2, device=device), torch.ones(4, 3, dtype=torch.bool, device=device)
    mask[2:] = False
    ids = torch.zeros(4, dtype=torch.int64, device=device)
    weights = visual_weights(cos, mask, ids, VGPOConfig.paper(beta=0.0))
    assert (weights.factors == 1).all()
    assert weights.score[2:].isnan().all()
    assert weights.metrics["weighted_responses"] == 2


def test_no_signal_before_the_first_number_only(backend_name: str, device: torch.device) -> None:
    """NaN before the first number is no image yet; NaN or infinity after it spoils the response."""
    nan, inf = math.nan, math.inf
    rows = [[nan, nan, 0.1, 0.4], [nan, 0.1, nan, 0.4], [inf, 0.1, 0.2, 0.3], [nan, nan, nan, inf], [nan] * 4]
    cos = torch.tensor(rows, device=device)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    weights = visual_weights(cos, torch.ones_like(cos, dtype=torch.bool), ids, VGPOConfig.paper())
    assert weights.score.isfinite().tolist() == [True, False, False, False, False]
    assert weights.metrics["nonfinite_responses"] == 3
    assert weights.metrics["weighted_responses"] == 1
    assert weights.psi[0].tolist() == pytest.approx([0, 0, -0.5, 0.5], abs=1e-6)
    assert (weights.factors[1:] == 1).all()


def test_two_phases_give_the_factors_of_one(backend_name: str, device: torch.device) -> None:
    for packed in (False, True):
        batch = make_batch(EDGES["shuffled groups"] + EDGES["late images"], features=1, packed=packed).to(device)
        cos = draw_cosines(batch)
        for config in (CONFIGS["paper"], CONFIGS["released, fixed offset"], VGPOConfig.paper(intra_clamp=(1.1, 2.0))):
            whole = weigh(batch, cos, config)
            phi = group_weights(whole.score, batch.group_ids, config)
            factors_of_two = combine_factors(
                whole.psi,
                phi,
                batch.response_mask,
                config,
                cu_seqlens=batch.cu_seqlens,
                weighted=whole.score.isfinite(),
            )
            assert_close(factors_of_two, whole.factors.double(), name="factors")


def test_an_offset_of_each_call_is_warned_of() -> None:
    score, ids = torch.rand(4), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match="score_offset"):
        group_weights(score, ids, VGPOConfig.released())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_weights(score, ids, VGPOConfig.released(score_offset=-0.2))
        group_weights(score, ids, VGPOConfig.paper())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_broken_response_stays_alone(backend_name: str, device: torch.device, preset: str, bad: float) -> None:
    batch = make_batch(EDGES["shuffled groups"], features=1).to(device)
    cos = draw_cosines(batch)
    keep = torch.arange(len(batch.group_ids), device=device) != 3
    config = CONFIGS["released, fixed offset"] if preset == "released" else CONFIGS["paper"]
    expected = visual_weights(cos[keep], batch.response_mask[keep], batch.group_ids[keep], config)
    cos[3, 2] = bad
    weights = visual_weights(cos, batch.response_mask, batch.group_ids, config)
    assert_close(weights.factors[keep], expected.factors.double(), name="factors of the others", floor=0)
    assert (weights.factors[3] == 1).all()
    assert weights.phi[3] == 0
    assert math.isnan(weights.score[3])
    assert weights.metrics["nonfinite_responses"] == 1
    assert weights.metrics["weighted_responses"] == len(cos) - 1
    phi = group_weights(weights.score, batch.group_ids, config)
    assert_close(phi, weights.phi.double(), name="phi in two phases", floor=1e-5)


def test_a_long_response(backend_name: str, device: torch.device) -> None:
    length = 3_000 if backend_name == "triton" and device.type == "cpu" else 131_072
    generator = torch.Generator().manual_seed(5)
    cos = (torch.rand(1, length, generator=generator) * 2 - 1).to(device)
    mask = (torch.rand(1, length, generator=generator) > 0.1).to(device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    config = VGPOConfig.paper()
    actual = visual_weights(cos, mask, ids, config)
    assert_matches(flatten(actual), reference.visual_weights, (cos, mask, ids, None, None, config.as_floats()), NAMES)


def test_group_ids_are_only_labels(backend_name: str, device: torch.device) -> None:
    score = torch.rand(12, generator=torch.Generator().manual_seed(2)).to(device)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 3, 4], device=device)
    phi = group_weights(score, ids, VGPOConfig.paper())
    assert torch.equal(group_weights(score, -7 * ids + 2**33, VGPOConfig.paper()), phi)
    assert torch.equal(group_weights(score, ids.to(torch.int32), VGPOConfig.paper()), phi)
    assert phi[11] == 0


def test_many_groups(backend_name: str, device: torch.device) -> None:
    count = 300 if backend_name == "triton" and device.type == "cpu" else 10_000
    generator = torch.Generator().manual_seed(4)
    score = torch.rand(count, generator=generator).to(device)
    ids = torch.randint(0, count // 8, (count,), generator=generator).to(device)
    phi = group_weights(score, ids, VGPOConfig.paper())
    exact = reference.group_weights(score, ids, None, VGPOConfig.paper().as_floats())
    assert_close(phi, exact, name="phi")


def test_clamps_hold(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["long"] + EDGES["shuffled groups"], features=1).to(device)
    config = VGPOConfig.paper(intra_clamp=(0.9, 1.1), inter_clamp=(0.95, 1.05))
    weights = weigh(batch, draw_cosines(batch), config)
    low, high = weights.factors.min().item(), weights.factors.max().item()
    assert low >= 0.9 * 0.95 - 1e-6
    assert high <= 1.1 * 1.05 + 1e-6
    assert weights.psi.abs().max() > 0.2, "psi itself is not clamped"

"""Focus and weights at the limits of their numbers: values of the equations, on every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Response, make_batch
from equations import factors, focus, positions
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import VGPOConfig, VisualWeights, group_weights, vgpo_loss, visual_focus, visual_weights
from vgpo_kernels.config import CHOICES

NAN, INF = math.nan, math.inf
BEYOND = float(torch.nextafter(torch.tensor(1024.0), torch.tensor(INF)))
SIGNALS = [1024.0, -1024.0, 0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 0.3]
BROKEN = [BEYOND, -BEYOND, 1e30, -1e30, 3e38, INF, -INF]


def padded(rows: list[list[float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines of responses of any lengths, NaN off their mask, and the mask."""
    width = max(map(len, rows))
    cos = torch.tensor([[*row, *[NAN] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return cos, torch.arange(width, device=device) < lengths[:, None]


def check(rows: list[list[float]], config: VGPOConfig, device: torch.device, groups: list[int]) -> VisualWeights:
    """Weigh responses, and compare with the equations."""
    cos, mask = padded(rows, device)
    found = visual_weights(cos, mask, torch.tensor(groups, device=device), config)
    rows = [row[valid].tolist() for row, valid in zip(cos, mask, strict=True)]  # as fp32 has them
    for index, one in enumerate(factors(rows, groups, config)):
        valid = mask[index]
        assert_close(found.w[index][valid], torch.tensor(one.w).double(), name="w", floor=4e-7)
        assert_close(found.psi[index][valid], torch.tensor(one.psi).double(), name="psi", floor=4e-6)
        assert_close(found.score[index], torch.tensor(one.score).double(), name="score", floor=2e-6)
        assert_close(found.phi[index], torch.tensor(one.phi).double(), name="phi", floor=4e-6)
        assert_close(found.factors[index][valid], torch.tensor(one.factors).double(), name="factors", floor=1e-5)
    return found


# ---- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("schedule", CHOICES["schedule"])
def test_the_schedule_begins_at_a_position(
    backend_name: str, device: torch.device, schedule: str, position: str
) -> None:
    """Where the start, or the step, is exactly the position of a token, in some of the responses of 1 to 7 tokens."""
    rows = [[0.3 + 0.01 * index for index in range(length)] for length in range(1, 8)]
    config = VGPOConfig.paper(schedule=schedule, position=position, gate=False, beta=0.5)
    for ratio in (0.0, 1 / 2, 1 / 3, 2 / 3, 3 / 5, 5 / 6, 4 / 7):
        check(rows, replace(config, start_ratio=ratio, step_ratio=0.0), device, [0] * len(rows))
    if schedule == "step":
        for ratio in (1 / 2, 1 / 3, 5 / 6, 1.0):
            check(rows, replace(config, step_ratio=ratio), device, [0] * len(rows))


def test_a_step_that_is_a_position(backend_name: str, device: torch.device) -> None:
    config = VGPOConfig.paper(schedule="step", position="zero_based", start_ratio=0.5, gate=False)
    assert visual_weights(*padded([[0.0] * 3], device), torch.zeros(1, dtype=torch.int64, device=device), config).w[
        0
    ].tolist() == pytest.approx([0.5, 0.65, 0.65])


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("start", [0.9, 0.9999, 0.9999999, 1 - 1e-12])
def test_a_start_near_one(backend_name: str, device: torch.device, start: float, position: str) -> None:
    rows = [[0.5] * length for length in (1, 2, 3, 7, 1500)]
    config = VGPOConfig.paper(start_ratio=start, position=position, gate=False)
    check(rows, config, device, [0, 1, 2, 3, 4])


# ---- broken cosines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [VGPOConfig.paper(), VGPOConfig.released(), VGPOConfig.released(score_offset=-0.5)])
def test_the_largest_cosines_count(backend_name: str, device: torch.device, preset: VGPOConfig) -> None:
    rows = [SIGNALS, SIGNALS[::-1], [0.2, 0.4, -0.1]]
    found = check(rows, preset, device, [0, 0, 0])
    assert found.metrics["weighted_responses"] == 3
    assert found.metrics["nonfinite_responses"] == 0


@pytest.mark.parametrize("bad", [*BROKEN, NAN])
def test_a_cosine_beyond_them_spoils_its_response_alone(backend_name: str, device: torch.device, bad: float) -> None:
    """Not the offset of its batch either, which its other cosines would lower."""
    rows = [[0.1, 0.2, -0.3, 0.4], [-0.9, bad, -0.8], [0.2, 0.1]]
    for config in (VGPOConfig.paper(), VGPOConfig.released()):
        found = check(rows, config, device, [0, 0, 0])
        assert found.score.isfinite().tolist() == [True, False, True]
        assert found.metrics["nonfinite_responses"] == 1
        assert (found.factors[1] == 1).all() and found.phi[1] == 0 and (found.w[1] == 0).all()


def test_what_has_no_image_is_not_looked_at(backend_name: str, device: torch.device) -> None:
    rows = [[0.1, 0.2, -0.3, 0.4], [-0.9, -0.8], [-0.7, INF], [NAN, 3e38]]
    cos, mask = padded(rows, device)
    images, groups = torch.tensor([True, False, False, False]), torch.zeros(4, dtype=torch.int64)
    config = VGPOConfig.released()
    found = visual_weights(cos, mask, groups.to(device), config, has_visual=images.to(device))
    alone = visual_weights(cos[:1], mask[:1], groups[:1].to(device), config)
    assert torch.equal(found.factors[0], alone.factors[0])
    assert (found.factors[1:] == 1).all()
    assert found.metrics["nonfinite_responses"] == 0
    assert found.metrics["weighted_responses"] == 1


# ---- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", ["compensated", "mean"])
@pytest.mark.parametrize(("score", "offset"), [("affine", None), ("offset", None), ("offset", -1024.0)])
def test_no_sum_wraps(
    backend_name: str, device: torch.device, score: str, offset: float | None, accumulation: str
) -> None:
    length = 131_072 if backend_name in ("reference", "cpp") else 3_000
    config = VGPOConfig(beta=1e4, gate=False, score=score, score_offset=offset, accumulation=accumulation)
    rows = [[1024.0] * length, [*[1024.0] * 5, *[-1024.0] * 20], [0.3, 0.7, -0.2]]
    found = check(rows, config, device, [0, 0, 1])
    assert found.score[0] > 0


@pytest.mark.parametrize("config", [VGPOConfig.paper(gate=False), VGPOConfig.paper(gate=False, beta=2.9)])
def test_sums_of_w_keep_its_last_bits(exact_backend: str, device: torch.device, config: VGPOConfig) -> None:
    """The units of the fixed-point sum are 2^-32, which is what fp32 has from 2^-9 on: the sum of one w is w."""
    cos = 2 * torch.linspace(2.0**-9, 2.0**-8, 40, device=device)[:, None] / (1 + config.beta) - 1
    found = visual_weights(cos, torch.ones_like(cos, dtype=torch.bool), torch.arange(40, device=device), config)
    odd = (found.w * 2.0**32 % 2 == 1) & (found.w >= 2.0**-9)
    assert odd.any(), "no w has a last bit that a coarser sum would lose"
    assert torch.equal(torch.where(odd, found.w, 0.0)[:, 0], torch.where(odd[:, 0], found.score, 0.0))


def test_the_extremes_of_group_ids(backend_name: str, device: torch.device) -> None:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    labels = [low, high, 0, low, high, -1, low + 1, high - 1]
    rows = [[0.1 * index, 0.3, 0.2 + 0.05 * index] for index in range(len(labels))]
    found = check(rows, VGPOConfig.paper(), device, labels)
    assert found.metrics["groups"] == 6
    assert found.metrics["singleton_groups"] == 4
    phi = group_weights(found.score, torch.tensor(labels, device=device), VGPOConfig.paper())
    assert_close(phi, found.phi.double(), name="phi")


# ---- hidden states -------------------------------------------------------------------------------------------------

NORMS = [0.0, 1e-44, 1e-25, 1e-17, 1e-10, 1.0, 1e5, 1e12, 5e17, 1e20, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["averaged", "given"])
def test_norms_out_of_range(backend_name: str, device: torch.device, dtype: torch.dtype, given: bool) -> None:
    """Responses of images of each norm, with tokens of each: the cosine, or infinite, never 0 for what overflowed."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor(NORMS)
    count, features = len(NORMS), 9
    tokens = (torch.randn(count, count, features, generator=generator) * sizes[:, None]).to(dtype)
    images = (torch.randn(count, 1, features, generator=generator) * sizes[:, None, None]).to(dtype)
    hidden = torch.cat([images.expand(-1, 2, -1), tokens], dim=1).to(device)
    visual = torch.zeros(count, count + 2, dtype=torch.bool, device=device)
    visual[:, :2] = True
    scored = torch.ones(count, count, dtype=torch.bool, device=device)
    if given:
        cos = visual_focus(hidden, None, scored, prototype=images[:, 0].float().to(device))
    else:
        cos = visual_focus(hidden, visual, scored)
    wanted = torch.tensor(
        [focus(positions(hidden[row], visual[row], scored[row]), causal=False) for row in range(count)]
    ).double()
    if given:
        wanted[(images[:, 0] == 0).all(1)] = NAN  # a given prototype of zeros is no image
    assert_close(cos, wanted, name="cos", floor=4e-6)
    assert wanted.isinf().any() and (wanted.isfinite() & (wanted != 0)).any()


@pytest.mark.parametrize("visibility", ["all", "causal"])
def test_images_that_overflow_are_counted(backend_name: str, device: torch.device, visibility: str) -> None:
    """Images of rows of 2e38, whose sum is infinite, of 1e20, whose norm has no square, and tokens of 1e20."""
    batch = make_batch(tuple(Response(length=5, late=2 * (index == 3)) for index in range(5))).to(device)
    hidden = batch.hidden.clone()
    hidden[0][batch.visual_mask[0]] = 2e38
    hidden[1][batch.visual_mask[1]] = 1e20
    hidden[2, -1] = 1e20
    arguments = (hidden, batch.visual_mask, batch.response_mask)
    cos = visual_focus(*arguments, visibility=visibility)
    broken = cos.isposinf() & batch.response_mask
    assert broken.any(1).tolist() == [True, True, True, False, False]
    assert broken[:2].all() and broken[2].tolist() == [False] * 4 + [True]
    _, metrics = vgpo_loss(
        hidden,
        batch.logp,
        batch.old_logp,
        batch.advantages,
        *arguments[1:],
        batch.group_ids,
        VGPOConfig.released(),
        visibility=visibility,
    )
    assert metrics["nonfinite_responses"] == 3
    assert metrics["weighted_responses"] == 2


# ---- metrics -------------------------------------------------------------------------------------------------------

MEANS = ("focus_mean", "gate_rate", "late_early_ratio")


@pytest.mark.parametrize("config", [VGPOConfig.paper(), VGPOConfig.released()])
def test_the_mean_of_nothing_is_nan(backend_name: str, device: torch.device, config: VGPOConfig) -> None:
    def metrics(rows: list[list[float]]) -> dict[str, float]:
        groups = torch.zeros(len(rows), dtype=torch.int64, device=device)
        found = visual_weights(*padded(rows, device), groups, config).metrics
        return {name: value.item() for name, value in found.items()}

    for rows in ([[NAN] * 3], [[0.1, INF], [NAN, NAN]], [[], [NAN]]):
        found = metrics(rows)
        assert all(math.isnan(found.pop(name)) for name in MEANS)
        assert found["weighted_responses"] == found["groups"] == found["singleton_groups"] == 0
    # A response of one token has no second half.
    found = metrics([[0.25], [NAN, 0.5], [NAN, NAN]])
    assert math.isnan(found["late_early_ratio"])
    assert found["focus_mean"] == pytest.approx(0.375)
    assert 0 < found["gate_rate"] <= 1


def test_a_first_half_of_nothing_has_no_ratio(backend_name: str, device: torch.device) -> None:
    """Its tokens all have the smallest cosine of the batch, from which the others are measured: the sum is 0."""
    rows = [[-0.1] * 3 + [0.2, 0.3], [-0.05, 0.1, 0.2]]
    cos, mask = padded(rows, device)
    found = visual_weights(cos, mask, torch.zeros(2, dtype=torch.int64, device=device), VGPOConfig.released()).metrics
    assert found["late_early_ratio"].item() == pytest.approx(0.3 / ((0.05 + 0.2) / 2), rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_batch_without_responses(backend_name: str, device: torch.device, packed: bool) -> None:
    """Means of nothing in all functions; the metrics of the policy stay 0."""
    batch = make_batch((), packed=packed).to(device)
    images = (batch.visual_mask, batch.response_mask, batch.group_ids, VGPOConfig.released())
    options = {"cu_seqlens": batch.cu_seqlens}
    alone = visual_weights(batch.logp, batch.response_mask, batch.group_ids, VGPOConfig.paper(), **options).metrics
    _, metrics = vgpo_loss(batch.hidden, batch.logp, batch.old_logp, batch.advantages, *images, **options)
    assert {name for name, value in metrics.items() if value.isnan()} == set(MEANS)
    assert {name for name, value in alone.items() if value.isnan()} == set(MEANS)

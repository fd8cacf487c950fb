"""What the adapters to verl and EasyR1 share: advantages of a rollout batch times factors, and its metrics."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from vgpo_kernels import VGPOConfig, visual_weights
from vgpo_kernels.integrations.surface import reweight

COSINES = torch.tensor([[0.1, 0.3, -0.2], [0.4, 0.2, 0.6]])
MASK = torch.ones(2, 3, dtype=torch.bool)


def test_metrics_are_numbers_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = visual_weights(COSINES, MASK, torch.zeros(2, dtype=torch.int64), VGPOConfig.paper())

    def refused(_: torch.Tensor) -> float:
        raise AssertionError("the host waits for a single number")

    monkeypatch.setattr(torch.Tensor, "item", refused)
    advantages, metrics = reweight(torch.ones(2, 3), COSINES, MASK, ["a", "a"], VGPOConfig.paper())
    monkeypatch.undo()
    assert torch.equal(advantages, expected.factors)
    of_factors = {
        "vgpo/factor_mean": pytest.approx(expected.factors.mean().item()),
        "vgpo/factor_min": expected.factors.min().item(),
        "vgpo/factor_max": expected.factors.max().item(),
        "vgpo/weighted_share": 1,
    }
    assert metrics == {f"vgpo/{name}": value.item() for name, value in expected.metrics.items()} | of_factors


@pytest.mark.parametrize("packed", [False, True])
def test_metrics_of_factors_are_those_of_scored_tokens(packed: bool) -> None:
    """Four responses: one without a scored token, one without an image, two of a group, with holes."""
    cos = torch.tensor([[0.1, 0.3, -0.2], [0.4, 0.2, 0.6], [math.nan] * 3, [0.5, 0.1, 0.2]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]])
    groups = torch.tensor([0, 0, 0, 1])
    factors = visual_weights(cos, mask, groups, VGPOConfig.paper()).factors[mask.bool()]
    given = [torch.ones(4, 3), cos, mask]
    boundaries = None
    if packed:
        given, boundaries = [tensor.flatten() for tensor in given], torch.tensor([0, 3, 6, 9, 12])
    _, metrics = reweight(*given, ["a", "a", "a", "b"], VGPOConfig.paper(), cu_seqlens=boundaries)
    assert metrics["vgpo/factor_mean"] == pytest.approx(factors.mean().item(), abs=1e-6)
    assert metrics["vgpo/factor_min"] == factors.min().item() < 1
    assert metrics["vgpo/factor_max"] == factors.max().item() > 1
    assert metrics["vgpo/weighted_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("width", [0, 3])
def test_nothing_scored(width: int) -> None:
    tokens = torch.ones(2, width)
    advantages, metrics = reweight(tokens, tokens, torch.zeros(2, width), ["a", "a"], VGPOConfig.paper())
    assert torch.equal(advantages, tokens)
    assert not [name for name in metrics if "factor" in name or "share" in name]


def test_a_mean_of_nothing_is_left_out() -> None:
    broken = torch.stack([torch.full((3,), math.nan), torch.tensor([0.1, math.inf, 0.2])])
    advantages, metrics = reweight(torch.ones(2, 3), broken, MASK, ["a", "a"], VGPOConfig.paper())
    assert (advantages == 1).all()
    assert metrics == {
        "vgpo/weighted_responses": 0,
        "vgpo/nonfinite_responses": 1,
        "vgpo/groups": 0,
        "vgpo/singleton_groups": 0,
        "vgpo/factor_mean": 1,
        "vgpo/factor_min": 1,
        "vgpo/factor_max": 1,
        "vgpo/weighted_share": 0,
    }


def first_batch(advantages: torch.Tensor, cos: torch.Tensor, prompts: list[str]) -> list[str]:
    """What is said of a first batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reweight(advantages, cos, torch.ones_like(cos), prompts, VGPOConfig.paper(), look=True)
    return [str(warning.message) for warning in caught]


def test_the_first_batch_is_looked_at_on_request() -> None:
    centred = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2, -0.2])[:, None].expand(6, 3)
    cos, uids = torch.rand(6, 3), [*"aabbcc"]
    assert first_batch(centred, cos, uids) == []
    (of_groups,) = first_batch(centred, cos, [*"abcabc"])
    assert of_groups.startswith("VGPO's first batch: group-ids: advantages sum to zero over every 2 responses in a row")
    (of_images,) = first_batch(centred, torch.full((6, 3), math.nan), uids)
    assert of_images == "VGPO's first batch: no-image: no scored token has a visual focus: no response has an image"
    failed = torch.tensor([1.0, 1, math.nan, 1, 1, 1])[:, None]
    (of_rewards,) = first_batch(centred * failed, cos, uids)
    assert "nonfinite: advantages is NaN or infinite at 3 of 18" in of_rewards

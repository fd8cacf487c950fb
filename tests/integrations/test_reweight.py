"""What the adapters to verl and EasyR1 share: advantages of a rollout batch times factors, and its metrics."""

from __future__ import annotations

import math

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
    assert metrics == {f"vgpo/{name}": value.item() for name, value in expected.metrics.items()}


def test_a_mean_of_nothing_is_left_out() -> None:
    broken = torch.stack([torch.full((3,), math.nan), torch.tensor([0.1, math.inf, 0.2])])
    advantages, metrics = reweight(torch.ones(2, 3), broken, MASK, ["a", "a"], VGPOConfig.paper())
    assert (advantages == 1).all()
    assert metrics == {
        "vgpo/weighted_responses": 0,
        "vgpo/nonfinite_responses": 1,
        "vgpo/groups": 0,
        "vgpo/singleton_groups": 0,
    }

"""This library's policy losses in verl's registry, against verl's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from vgpo_kernels.integrations.verl import losses

PAIRS = {"vgpo": "vanilla", "vgpo_gspo": "gspo", "vgpo_cispo": "cispo", "vgpo_sapo": "sapo"}
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


@pytest.fixture(autouse=True)
def reweighted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker of a trainer that re-weights advantages."""
    monkeypatch.setattr(losses, "_reweighted", True)
    yield


def draw(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(5, 9, generator=generator)

    mask = torch.rand(5, 9, generator=generator) > 0.3
    mask[3] = False
    log_prob = -normal().abs()
    return {
        "old_log_prob": log_prob + 0.4 * normal(),
        "log_prob": log_prob,
        "advantages": normal(),
        "response_mask": mask,
        "rollout_is_weights": normal().abs(),
    }


def actor_config(**global_batch: Any) -> ActorConfig:
    # Other numbers than policy_loss would take by itself.
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.15,
        clip_ratio_high=0.35,
        tau_pos=0.8,
        tau_neg=1.2,
    )
    config.global_batch_info.update(global_batch)
    return config


@pytest.mark.parametrize("global_batch", [{}, {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 10}], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", PAIRS)
def test_losses_equal_verls_own(mode: str, aggregation: str, global_batch: dict[str, Any]) -> None:
    results = []
    for name in (mode, PAIRS[mode]):
        arguments = draw()
        arguments["log_prob"].requires_grad_()
        loss_fn = core_algos.get_policy_loss_fn(name)
        loss, metrics = loss_fn(**arguments, loss_agg_mode=aggregation, config=actor_config(**global_batch))
        loss.backward()
        results.append((loss, arguments["log_prob"].grad, metrics))
    (loss, gradient, metrics), (expected_loss, expected_gradient, expected_metrics) = results
    assert_close(loss, expected_loss.double(), name="loss", floor=1e-6)
    assert_close(gradient, expected_gradient.double(), name="gradient", floor=1e-6)
    assert metrics == pytest.approx(expected_metrics, abs=1e-6)


@pytest.mark.parametrize("gap", [-40.0, -19.0, 12.0, 16.0, 19.0, 40.0])
@pytest.mark.parametrize("mode", PAIRS)
def test_metrics_of_large_ratios_are_verls(mode: str, gap: float) -> None:
    arguments = draw()
    arguments["response_mask"][0, :2] = True
    arguments["old_log_prob"][0, 0] = arguments["log_prob"][0, 0] - gap
    ours, verls = (
        core_algos.get_policy_loss_fn(name)(**arguments, loss_agg_mode="token-mean", config=actor_config())
        for name in (mode, PAIRS[mode])
    )
    assert ours[1] == pytest.approx(verls[1], rel=1e-5, abs=1e-6)
    assert_close(ours[0], verls[0].double(), name="loss", floor=1e-6)


@pytest.mark.parametrize("mode", PAIRS)
def test_a_micro_batch_without_a_scored_token(mode: str) -> None:
    """verl's metrics are 0, and its loss is 0 / 0 where the batch's number of tokens is not given; ours is 0."""
    arguments = draw()
    arguments["response_mask"][:] = False
    arguments["log_prob"].requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(mode)(**arguments, loss_agg_mode="token-mean", config=actor_config())
    _, expected = core_algos.get_policy_loss_fn(PAIRS[mode])(
        **arguments, loss_agg_mode="token-mean", config=actor_config()
    )
    assert metrics == expected == dict.fromkeys(expected, 0.0)
    loss.backward()
    assert loss == 0
    assert not arguments["log_prob"].grad.any()


def test_the_loss_without_a_trainer_that_reweights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_reweighted", False)
    for mode in PAIRS:
        loss_fn = core_algos.get_policy_loss_fn(mode)
        with pytest.raises(RuntimeError, match=rf"loss_mode={mode} without .* is plain PPO: set \+algo"):
            loss_fn(**draw(), loss_agg_mode="token-mean", config=actor_config())
    losses.expect_reweighted_advantages()
    core_algos.get_policy_loss_fn("vgpo")(**draw(), loss_agg_mode="token-mean", config=actor_config())

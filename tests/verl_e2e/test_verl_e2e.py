"""verl's own ``main_ppo`` on Ray with VGPO: `make verl-e2e`, in an environment of its own."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make verl-e2e runs these")
pytest.importorskip("verl")

from verl_e2e import launch, recompute, task

from vgpo_kernels import VGPOConfig

METRICS = {
    *("vgpo/focus_mean", "vgpo/gate_rate", "vgpo/weighted_responses", "vgpo/nonfinite_responses", "vgpo/groups"),
    *("vgpo/factor_mean", "vgpo/factor_min", "vgpo/factor_max", "vgpo/weighted_share"),
    "vgpo/scoring_seconds_total",
}
RESPONSES = launch.PROMPTS * launch.RESPONSES


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short: Ray makes sockets in it."""
    with tempfile.TemporaryDirectory(prefix="vgpo") as name:
        yield Path(name)


def run(folder: Path, kind: str, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Make a run with VGPO and return what its driver held before each update, and its output."""
    model, prompts = folder / "model", folder / "prompts.parquet"
    task.write_model(model, kind)
    task.write_prompts(prompts, launch.STEPS * launch.PROMPTS)
    status, output = launch.run(folder, model, prompts, *overrides)
    assert status == 0, output[-6000:]
    assert "VGPO's first" not in output, "a right batch is warned of"
    files = [folder / "records" / f"{step}.pt" for step in range(1, launch.STEPS + 1)]
    return [torch.load(file, weights_only=True) for file in files], output


def check(step: dict[str, Any], model: Path, config: VGPOConfig) -> None:
    """Assert that all responses of a step are weighted, as the paper's equations weigh them."""
    assert step["metrics"].keys() >= METRICS
    assert step["metrics"]["vgpo/weighted_responses"] == RESPONSES
    assert step["metrics"]["vgpo/weighted_share"] == 1
    assert step["metrics"]["vgpo/groups"] == launch.PROMPTS
    assert step["metrics"]["vgpo/factor_min"] < 1 < step["metrics"]["vgpo/factor_max"]
    assert step["metrics"]["vgpo/scoring_seconds_total"] > 0
    assert sum(step["padding"]) == len(step["keys"]) - RESPONSES
    expected = recompute.advantages(step, model, config)
    for key, found, row in zip(step["keys"], step["columns"]["advantages"], expected, strict=True):
        torch.testing.assert_close(found.double(), torch.tensor(row).double(), rtol=1e-4, atol=1e-4, msg=key)
    assert any(abs(value) > 0.1 for row in expected for value in row)


def test_one_worker(folder: Path) -> None:
    """LoRA, no padding, verl's fused kernels, and a correction of the rollout that weighs tokens and rejects some."""
    steps, output = run(
        folder,
        "qwen3_vl",
        "+algorithm.vgpo.preset=released",
        "+algorithm.vgpo.beta=0.4",
        "actor_rollout_ref.actor.policy_loss.loss_mode=vgpo",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora.merge=True",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=0.5_1.0322",
    )
    # The weights change in the first step.
    check(steps[0], folder / "model", VGPOConfig.released(beta=0.4))
    assert any(0 < mask.sum() < len(mask) for mask in steps[0]["columns"]["response_mask"]), "no token was rejected"
    # verl's trainer is its own: the same replay buffer, batches and way to resume.
    assert (steps[0]["trainer"], steps[0]["replay_buffer"]) == ("PPOTrainerSync", "ReplayBuffer")
    assert re.search(r"VGPO re-weights advantages: vgpo_kernels \S+, verl 0\.9", output)
    assert re.search(r"engine fsdp2; workers: 1, nodes: 1, kernels: (cpp|reference)", output)
    assert "visual focus, in the old-log-prob pass; groups by uid, 4 responses each" in output
    assert steps[1]["metrics"].keys() >= METRICS
    assert "actor/grad_norm" in output


def test_another_method(folder: Path) -> None:
    """VPPO: a second pass in each of two workers, whose factors of responses are made of the whole batch."""
    steps, output = run(
        folder,
        "qwen2_5_vl",
        "+algorithm.vgpo.method=vppo",
        "trainer.n_gpus_per_node=2",
        "+ray_kwargs.ray_init.num_gpus=2",
        "actor_rollout_ref.actor.optim.lr=0",
    )
    for number, step in enumerate(steps, start=1):
        metrics = step["metrics"]
        assert metrics["vgpo/shaped_responses"] == RESPONSES
        assert metrics["vgpo/nonfinite_responses"] == 0
        assert 0.4 <= metrics["vgpo/selected_rate"] < 0.6
        assert metrics["vgpo/signal_mean"] > 0
        assert metrics["vgpo/factor_min"] == 0
        assert metrics["vgpo/scoring_seconds_total"] > 0
        expected = recompute.advantages_of_vppo(step, folder / "model", number)
        for key, found, row in zip(step["keys"], step["columns"]["advantages"], expected, strict=True):
            torch.testing.assert_close(found.double(), torch.tensor(row).double(), rtol=1e-3, atol=1e-3, msg=key)
        assert any(abs(value) > 0.1 for row in expected for value in row)
    assert "k3 of the sampled token, patches of the image masked (0.5), in the old-log-prob pass and one more" in output


def test_two_workers_with_dynamic_batches(folder: Path) -> None:
    """Asynchronous, padded, and without an old-log-prob pass: the focus is scored by a pass of the decoder alone."""
    steps, output = run(
        folder,
        "qwen2_5_vl",
        "+algorithm.vgpo.preset=paper",
        "trainer.v1.trainer_mode=colocate_async",
        "trainer.n_gpus_per_node=2",
        "+ray_kwargs.ray_init.num_gpus=2",
        "algorithm.rollout_correction.bypass_mode=True",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.actor.optim.lr=0",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
    )
    for step in steps:
        check(step, folder / "model", VGPOConfig.paper())
        assert step["trainer"] == "PPOTrainerColocateAsync"
    assert "visual focus, in a pass of the decoder by itself (bypass_mode)" in output

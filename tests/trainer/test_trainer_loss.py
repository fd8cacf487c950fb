"""The trainer's loss against TRL's own, on the same batch: value and gradient of every parameter."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.tiny_runs import generation_batch, make_trainer, rows
from trl import GRPOConfig, GRPOTrainer
from vgpo_trainer.trl_surface import FORWARD_INPUTS, LOSS_TYPES, SURFACE, VESPO_SETTINGS

from vgpo_kernels import PolicyLossOptions, VGPOConfig, backend, backends, policy_loss


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One trainer for all: its loss reads settings from attributes, which each test changes for itself."""
    built = make_trainer(
        tmp_path_factory.mktemp("run"),
        family="qwen2_5_vl",
        dataset=rows([1, 1, 2, 1]),
        vgpo="none",
        per_device_train_batch_size=8,
        num_generations=4,
        beta=0.0,
        rollout_samples=4,
        # Other numbers than policy_loss would take by itself.
        epsilon=0.15,
        epsilon_high=0.35,
        sapo_temperature_pos=0.7,
        sapo_temperature_neg=1.3,
        vespo_k_pos=1.5,
        vespo_lambda_pos=2.5,
        vespo_k_neg=0.7,
        vespo_lambda_neg=0.6,
    )
    built.model.train()
    built.current_gradient_accumulation_steps = 1  # the training loop sets it
    return built


@pytest.fixture(scope="module")
def rollout(trainer) -> dict[str, Any]:
    """A batch of the trainer, made off-policy: old and reference log-probs lie around the current ones."""
    torch.manual_seed(3)
    batch = dict(trainer._prepare_inputs(generation_batch(trainer)))
    noise = torch.Generator().manual_seed(4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logp, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            attention,
            batch["completion_ids"].shape[1],
            **{name: batch.get(name) for name in FORWARD_INPUTS},
        )
    batch["current"] = logp
    batch["old_per_token_logps"] = logp + 0.4 * torch.randn(logp.shape, generator=noise)
    batch["reference"] = logp + 0.4 * torch.randn(logp.shape, generator=noise)
    batch["advantages"] = torch.randn(logp.shape[0], generator=noise)
    trainer.max_completion_length = 2 * logp.shape[1]
    assert batch["completion_mask"].sum() < batch["completion_mask"].numel(), "the batch should have padding"
    return batch


def loss_and_gradients(loss_function, trainer, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trainer.model.zero_grad()
    loss = loss_function(trainer, trainer.model, dict(batch))
    loss.backward()
    return loss.detach(), [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]


def assert_same_loss(trainer, batch, trl_batch=None):
    ours, gradients = loss_and_gradients(type(trainer)._compute_loss, trainer, batch)
    theirs, expected = loss_and_gradients(GRPOTrainer._compute_loss, trainer, trl_batch or batch)
    assert expected, "TRL's loss reached no parameter"
    assert abs(ours - theirs) <= 1e-6 * max(1.0, abs(theirs))
    assert len(gradients) == len(expected)
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 1e-4
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).abs().max() <= 1e-5 * largest


def test_every_input_of_trls_pass_is_handed_on():
    found = signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert set(found) - {"self"} == set(SURFACE["_get_per_token_logps_and_entropies"])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_vgpo_the_loss_is_trls(trainer, rollout, monkeypatch, loss_type, beta, mode):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "beta", beta)
    monkeypatch.setattr(trainer, "epsilon_high", 5.0 if loss_type == "cispo" else 0.35)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 3)
    if beta:
        rollout = {**rollout, "ref_per_token_logps": rollout["reference"]}
    trainer.model.train(mode == "train")
    try:
        assert_same_loss(trainer, rollout)
    finally:
        trainer.model.train()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_with_vgpo_the_loss_is_trls_on_reweighted_advantages(trainer, rollout, monkeypatch, loss_type):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "_vgpo", VGPOConfig.paper())
    factors = 0.1 + 2 * torch.rand(rollout["completion_mask"].shape, generator=torch.Generator().manual_seed(5))
    reweighted = rollout["advantages"][:, None] * factors
    assert_same_loss(trainer, {**rollout, "visual_factors": factors}, trl_batch={**rollout, "advantages": reweighted})


@pytest.mark.parametrize("loss_type", [name for name, loss in LOSS_TYPES.items() if loss.clipped])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_sequence_level_ratios(trainer, rollout, monkeypatch, loss_type, beta):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "beta", beta)
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence")
    assert_same_loss(trainer, {**rollout, "ref_per_token_logps": rollout["reference"]} if beta else rollout)


def test_two_sided_clipping(trainer, rollout, monkeypatch):
    monkeypatch.setattr(trainer.args, "delta", 1.4)
    before, _ = loss_and_gradients(GRPOTrainer._compute_loss, trainer, rollout)
    assert_same_loss(trainer, rollout)
    monkeypatch.setattr(trainer.args, "delta", None)
    after, _ = loss_and_gradients(GRPOTrainer._compute_loss, trainer, rollout)
    assert before != after, "the bound should act on this batch"


@pytest.mark.parametrize("corrected", [False, True])
def test_kl_with_and_without_bias_correction(trainer, rollout, monkeypatch, corrected):
    monkeypatch.setattr(trainer, "beta", 0.3)
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", corrected)
    assert_same_loss(trainer, {**rollout, "ref_per_token_logps": rollout["reference"]})


def test_high_entropy_tokens_only(trainer, rollout, monkeypatch):
    monkeypatch.setattr(trainer, "top_entropy_quantile", 0.3)
    monkeypatch.setattr(trainer, "beta", 0.1)
    assert_same_loss(trainer, {**rollout, "ref_per_token_logps": rollout["reference"]})


def test_off_policy_sequences_masked(trainer, rollout, monkeypatch):
    monkeypatch.setattr(trainer, "off_policy_mask_threshold", 0.01)
    assert_same_loss(trainer, rollout)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction_of_another_sampler(trainer, rollout, monkeypatch, level):
    monkeypatch.setattr(trainer, "use_vllm", True)
    shape = rollout["completion_mask"].shape if level == "token" else (rollout["completion_mask"].shape[0], 1)
    ratio = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(6))
    assert_same_loss(trainer, {**rollout, "importance_sampling_ratio": ratio})


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masked"])
def test_vespo_corrects_the_ratio_of_another_sampler(trainer, rollout, monkeypatch, masks):
    """The weights go into the response's ratio, where TRL's masks of tokens and responses do not."""
    monkeypatch.setattr(trainer, "loss_type", "vespo")
    monkeypatch.setattr(trainer, "use_vllm", True)
    if masks:
        monkeypatch.setattr(trainer, "top_entropy_quantile", 0.5)
        monkeypatch.setattr(trainer, "off_policy_mask_threshold", 0.05)
    noise = 0.2 * torch.randn(rollout["completion_mask"].shape, generator=torch.Generator().manual_seed(6))
    ratio = (noise * rollout["completion_mask"]).exp()
    monkeypatch.setattr(trainer, "_vgpo", VGPOConfig.paper())
    near = {**nearer(rollout, 0.1), "visual_factors": torch.ones(ratio.shape)}
    corrected = {**near, "importance_sampling_ratio": ratio}
    assert_same_loss(trainer, corrected)
    losses = [loss_and_gradients(type(trainer)._compute_loss, trainer, batch)[0] for batch in (near, corrected)]
    assert abs(losses[0] - losses[1]) > 1e-4


def nearer(rollout: dict[str, Any], share: float) -> dict[str, Any]:
    """Move the old log-probs towards the current ones, so that ratios of whole responses are not 0 or infinite."""
    current = rollout["current"]
    return {**rollout, "old_per_token_logps": current + share * (rollout["old_per_token_logps"] - current)}


CASES = {
    "plain": {},
    "on-policy": {"old_per_token_logps": None},
    "far": {"share": 1.0},
    "KL": {"beta": 0.1},
    "KL, corrected": {"beta": 0.1, "corrected": True},
    "advantages per token": {"per_token": True},
    "another sampler": {"ratio": True},
}


@pytest.mark.parametrize("served_by", ["reference", "cpp"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_type", ["luspo", "vespo"])
def test_luspo_and_vespo_of_policy_loss_are_trls(trainer, rollout, monkeypatch, loss_type, case, served_by):
    """TRL's own function on given log-probs, value and gradient by them, to 1e-6."""
    if served_by == "cpp" and not backends.describe()["built"]["cpp"]:
        pytest.skip("the extension is not built")
    settings = CASES[case]
    mask = rollout["completion_mask"].clone()
    mask[:, 2] = 0
    batch = {**nearer(rollout, settings.get("share", 0.1)), "tool_mask": mask, "num_items_in_batch": mask.sum() * 2}
    if "old_per_token_logps" in settings:
        batch["old_per_token_logps"] = None
    generator = torch.Generator().manual_seed(8)
    if settings.get("per_token"):
        batch["advantages"] = torch.randn(mask.shape, generator=generator)
    if settings.get("ratio"):
        batch["importance_sampling_ratio"] = (0.2 * torch.randn(mask.shape, generator=generator) * mask).exp()
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "importance_sampling_level", "sequence" if loss_type == "luspo" else "token")
    monkeypatch.setattr(trainer, "use_vllm", bool(settings.get("ratio")))
    monkeypatch.setattr(trainer, "beta", settings.get("beta", 0.0))
    monkeypatch.setattr(trainer.args, "use_bias_correction_kl", bool(settings.get("corrected")))
    batch["ref_per_token_logps"] = rollout["reference"] if settings.get("beta") else None

    leaf = rollout["current"].clone().requires_grad_()
    entropy = torch.ones_like(leaf)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (leaf, entropy, None))
    expected = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    (slope,) = torch.autograd.grad(expected, leaf)

    logp = leaf.detach().clone().requires_grad_()
    with backend(served_by):
        loss = policy_loss(
            logp,
            batch["old_per_token_logps"],
            batch["advantages"],
            mask,
            loss_type=loss_type,
            ref_logp=batch["ref_per_token_logps"],
            kl_coef=trainer.beta,
            kl_bias_correction=trainer.args.use_bias_correction_kl,
            importance_weights=batch.get("importance_sampling_ratio"),
            num_tokens=mask.sum() * 2 / trainer.args.steps_per_generation,
            ratio_clamp=None,
            epsilon_low=trainer.epsilon_low,
            epsilon_high=trainer.epsilon_high,
            **{name: getattr(trainer.args, name) for name in VESPO_SETTINGS},
        ).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert abs(loss - expected) <= 1e-6 * max(1.0, abs(expected))
    assert slope.abs().max() > 1e-5
    assert (gradient - slope).abs().max() <= 1e-6 * max(1.0, slope.abs().max())


def test_defaults_of_vespo_are_trls():
    for name in VESPO_SETTINGS:
        assert getattr(PolicyLossOptions(), name) == GRPOConfig.__dataclass_fields__[name].default


@pytest.mark.parametrize("quantile", [1.0, 0.5])
def test_entropy_bonus(trainer, rollout, monkeypatch, quantile):
    monkeypatch.setattr(trainer, "entropy_coef", 0.05)
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", True)
    monkeypatch.setattr(trainer, "top_entropy_quantile", quantile)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2)
    assert_same_loss(trainer, rollout)


def test_router_loss_of_a_mixture_of_experts(trainer, rollout, monkeypatch):
    """TRL's log-probability pass returns it; here it is a parameter's square, so that its gradient shows too."""
    plain = GRPOTrainer._get_per_token_logps_and_entropies

    def with_router_loss(self, model, *arguments, **named):
        logps, entropies, _ = plain(self, model, *arguments, **{**named, "compute_aux_loss": False})
        return logps, entropies, next(model.parameters()).square().mean()

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", with_router_loss)
    monkeypatch.setattr(trainer, "aux_loss_enabled", True)
    monkeypatch.setattr(trainer, "router_aux_loss_coef", 0.7)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2)
    assert_same_loss(trainer, rollout)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_holes_and_a_masked_response(trainer, rollout, monkeypatch, loss_type):
    """Tool output in the middle of a response, and a response that is masked altogether."""
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    tools = torch.ones_like(rollout["completion_mask"])
    tools[:, 2:4] = 0
    tools[1] = 0
    assert_same_loss(trainer, {**rollout, "tool_mask": tools})


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_clip_shares_are_trls(trainer, rollout, monkeypatch, loss_type):
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "beta", 0.1)
    rollout = {**rollout, "ref_per_token_logps": rollout["reference"]}
    logged = []
    for loss_function in (type(trainer)._compute_loss, GRPOTrainer._compute_loss):
        trainer._metrics["train"].clear()
        loss_function(trainer, trainer.model, dict(rollout))
        logged.append({name: values[-1] for name, values in trainer._metrics["train"].items()})
    ours, theirs = logged
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy", "kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert ours["clip_ratio/low_mean"] > 0 and ours["clip_ratio/high_mean"] > 0
    assert ours["vgpo/old_policy_kl"] > 0

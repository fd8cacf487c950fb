"""The trainer's loss against TRL's own, on the same batch: value, gradient of every parameter, and what is logged."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.tiny_runs import generation_batch, make_trainer, rows
from trl import GRPOConfig, GRPOTrainer
from vgpo_trainer.trl_surface import FORWARD_INPUTS, LOSS_TYPES, SURFACE, VESPO_SETTINGS

from vgpo_kernels import PolicyLossOptions, backend, backends, policy_loss


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One trainer for all: its loss reads settings from attributes, which each test changes for itself.

    The signal is read in the scoring pass, so that a batch brings its factors along.
    """
    built = make_trainer(
        tmp_path_factory.mktemp("run"),
        family="qwen2_5_vl",
        dataset=rows([1, 1, 2, 1]),
        vgpo_signal="scoring",
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
    """A batch of the trainer, made off-policy: old and reference log-probs lie around the current ones.

    Its factors are 1, so that the loss is TRL's.
    """
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
    assert (batch["visual_factors"] != 1).any()
    batch["visual_factors"] = torch.ones_like(logp)
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
def test_with_factors_of_one_the_loss_is_trls(trainer, rollout, monkeypatch, loss_type, beta, mode):
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


def logged(loss_function, trainer, batch, mode: str) -> dict[str, float]:
    trainer._metrics[mode].clear()
    loss_function(trainer, trainer.model, dict(batch))
    assert all(len(values) == 1 for values in trainer._metrics[mode].values())
    return {name: values[0] for name, values in trainer._metrics[mode].items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.1},
        {"importance_sampling_level": "sequence", "beta": 0.1, "epsilon_low": 0.02, "epsilon_high": 0.02},
        {"entropy_coef": 0.05, "_entropy_bonus_enabled": True, "current_gradient_accumulation_steps": 2},
        {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.01},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_logged_is_trls_key_by_key(trainer, rollout, monkeypatch, loss_type, mode, settings):
    """The loss makes its own log; a key that TRL gains is missing there, and this fails."""
    if settings.get("importance_sampling_level") == "sequence" and not LOSS_TYPES[loss_type].clipped:
        pytest.skip("refused")
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    monkeypatch.setattr(trainer, "epsilon_high", 1.1 if loss_type == "cispo" else 0.35)
    for name, value in settings.items():
        monkeypatch.setattr(trainer, name, value)
    if trainer.beta:
        rollout = {**rollout, "ref_per_token_logps": rollout["reference"]}
    if loss_type == "vespo":
        rollout = nearer(rollout, 0.1)
    # A response that is masked altogether has no share of clipped tokens.
    tools = torch.ones_like(rollout["completion_mask"])
    tools[1] = 0
    tools[:, 2:4] = 0
    rollout = {**rollout, "tool_mask": tools}
    trainer.model.train(mode == "train")
    try:
        ours, theirs = (
            logged(loss_function, trainer, rollout, mode)
            for loss_function in (type(trainer)._compute_loss, GRPOTrainer._compute_loss)
        )
    finally:
        trainer.model.train()
    assert {name for name in ours if not name.startswith("vgpo/")} == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert ours["vgpo/old_policy_kl"] > 0
    if "clip_ratio/low_mean" in theirs:
        assert 0 < theirs["clip_ratio/low_mean"] < 1 and theirs["clip_ratio/high_max"] > 0
    if loss_type == "cispo":
        assert 0 < theirs["cispo_clip_ratio"] < 1
    if loss_type == "vespo":
        assert theirs["vespo/phi_seq_mean"] > 0.01


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_factors_change_what_is_clipped_nowhere(trainer, rollout, monkeypatch, loss_type):
    """They are positive: what TRL logs of re-weighted advantages is what it logs of those before."""
    monkeypatch.setattr(trainer, "loss_type", loss_type)
    factors = 0.1 + 2 * torch.rand(rollout["completion_mask"].shape, generator=torch.Generator().manual_seed(5))
    ours = logged(type(trainer)._compute_loss, trainer, {**rollout, "visual_factors": factors}, "train")
    reweighted = {**rollout, "advantages": rollout["advantages"][:, None] * factors}
    theirs = logged(GRPOTrainer._compute_loss, trainer, reweighted, "train")
    theirs.pop("vespo/phi_seq_mean", None)  # of advantages per token TRL takes the mean over tokens
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_advantages_that_are_not_finite_are_counted(trainer, rollout):
    advantages = rollout["advantages"].clone()
    advantages[1] = torch.nan
    trainer.model.eval()
    try:
        ours = logged(type(trainer)._compute_loss, trainer, {**rollout, "advantages": advantages}, "eval")
    finally:
        trainer.model.train()
    assert ours["vgpo/nonfinite_advantages"] == rollout["completion_mask"][1].sum() > 0


def test_where_no_token_is_scored_there_are_no_factors(trainer, rollout):
    nothing = {**rollout, "tool_mask": torch.zeros_like(rollout["completion_mask"])}
    ours = logged(type(trainer)._compute_loss, trainer, nothing, "train")
    names = ("factor_mean", "factor_min", "factor_max", "old_policy_kl")
    assert all(math.isnan(ours[f"vgpo/{name}"]) for name in names) and ours["vgpo/nonfinite_advantages"] == 0

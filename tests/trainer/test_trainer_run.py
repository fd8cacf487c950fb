"""Whole runs: what a run leaves behind, `vgpo train`, resuming, and what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl")

import vgpo_trainer
from trainer.tiny_runs import llava, make_trainer, parity_reward, rows
from transformers import Qwen2ForCausalLM, TrainerState
from trl import GRPOTrainer, TrlParser
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.runs.metrics import MetricsFile, read_metrics
from vgpo_trainer.trl_surface import check_surface

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.surface import UnknownSurfaceError

RECORD = {
    "step",
    "seconds",
    "loss",
    "reward",
    "accuracy",
    "entropy",
    "step_time",
    "completions/mean_length",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "vgpo/visual_focus",
    "vgpo/gate_rate",
    "vgpo/late_early_ratio",
    "vgpo/psi_std",
    "vgpo/phi_std",
    "vgpo/weighted_share",
    "vgpo/factor_min",
    "vgpo/factor_mean",
    "vgpo/factor_max",
}


def test_a_run_leaves_records_and_rollouts(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        gradient_accumulation_steps=2,
        rollout_samples=12,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        arguments={"eval_dataset": rows([1, 1])},
    )
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))

    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert set(steps[0]) >= RECORD
    (evaluation,) = (record for record in records if "eval_loss" in record)
    assert {"eval_accuracy", "eval_vgpo/visual_focus", "eval_vgpo/phi_std"} <= set(evaluation)

    samples = trainer.rollout_samples
    assert len(samples) == 12 and {sample.mode for sample in samples} == {"train", "eval"}
    for sample in samples:
        lengths = {len(values) for values in (sample.scored, sample.cos, sample.psi, sample.factors)}
        assert lengths == {len(sample.tokens)}
        assert sample.correct == (sample.reward == 1) and sample.images[0].size == (48, 48)
        assert sample.prompt == "Add the digits." and sample.answer is not None
        for factor, psi in zip(sample.factors, sample.psi, strict=True):
            assert factor == pytest.approx((1 + psi) * (1 + sample.phi), abs=1e-5)
    assert any(sample.phi != 0 for sample in samples)


def test_diagnostics_show_the_signal_and_leave_the_loss_alone(tmp_path):
    losses = []
    for diagnostics in (False, True):
        trainer = make_trainer(
            tmp_path / str(diagnostics), vgpo="none", vgpo_diagnostics=diagnostics, gradient_accumulation_steps=2
        )
        trainer.train()
        records = read_metrics(tmp_path / str(diagnostics) / "metrics.jsonl")
        losses.append([record["loss"] for record in records])
        assert all(("vgpo/visual_focus" in record) == diagnostics for record in records)
        assert all("vgpo/factor_mean" not in record for record in records)
        assert all(factor == 1 for sample in trainer.rollout_samples for factor in sample.factors)
        assert any(cos != 0 for sample in trainer.rollout_samples for cos in sample.cos) == diagnostics
    assert losses[0] == losses[1]


def test_vgpo_changes_the_training(tmp_path):
    losses = []
    for preset in ("none", "paper", "released"):
        make_trainer(tmp_path / preset, vgpo=preset, max_steps=1).train()
        losses.append(read_metrics(tmp_path / preset / "metrics.jsonl")[0]["loss"])
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"mask_truncated_completions": True},
        {"bf16": True},
        {"vgpo_signal": "scoring", "top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "steps_per_generation": 2},
        {"gradient_accumulation_steps": 2, "scale_rewards": "batch", "delta": 1.5, "pad_to_multiple_of": 8},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_settings_of_trl_go_with_vgpo(tmp_path, settings):
    trainer = make_trainer(tmp_path, family="qwen2_5_vl", dataset=rows([1, 2] * 4, size=16), **settings)
    trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert all(isinstance(record["loss"], float) for record in records)
    assert any(record["loss"] != 0 for record in records)
    # Generation batches leave the signal's records, and two steps may share one.
    assert records[0]["vgpo/phi_std"] is not None and records[0]["vgpo/factor_max"] >= 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        make_trainer(folder, family="qwen2_5_vl", max_steps=2, gradient_checkpointing=checkpointing).train()
        losses.append([record["loss"] for record in read_metrics(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != 0


def test_weights_of_half_precision(tmp_path):
    model, _ = llava()
    trainer = make_trainer(tmp_path, model=model.to(torch.bfloat16), max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["vgpo/phi_std"] > 0 and isinstance(record["loss"], float)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of"),
        ({"importance_sampling_level": "sequence", "loss_type": "cispo"}, "importance_sampling_level='sequence'"),
        ({"delta": 1.1}, "delta must exceed"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"torch_compile": True}, "torch_compile"),
        ({"torch_compile": True, "vgpo": None, "vgpo_diagnostics": True}, "torch_compile"),
        ({"vgpo_signal": "loss", "gradient_accumulation_steps": 2}, "steps_per_generation=1"),
        ({"vgpo_signal": "loss", "num_iterations": 2}, "num_iterations=1"),
        ({"vgpo_signal": "hidden"}, "vgpo_signal must be one of"),
        ({"vgpo": "new"}, "vgpo must be one of"),
        ({"vgpo": None, "vgpo_beta": 0.1}, "vgpo_beta has no effect"),
        ({"vgpo_schedule": "sudden"}, "schedule must be one of"),
        ({"rollout_samples": -1}, "rollout_samples"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_another_trl_is_refused_with_the_versions_known():
    class Later(GRPOTrainer):
        def _compute_loss(self, model, batch):
            return None

    with pytest.raises(
        UnknownSurfaceError, match=r"_compute_loss takes \(self, model, batch\), not inputs: .*trl 1\.16"
    ):
        check_surface(Later)


def test_a_text_model_is_refused_unless_vgpo_is_off(tmp_path):
    model, processor = llava()
    text = Qwen2ForCausalLM(model.config.text_config)
    for preset in ("paper", None):
        settings = VGPOTrainingConfig(str(tmp_path), vgpo=preset, bf16=False, use_cpu=True, report_to="none")
        refusal = pytest.raises(ValueError, match=r"qwen2 has none of image_token_id.*vgpo=None trains without")
        with refusal if preset else nullcontext():
            vgpo_trainer.VGPOTrainer(text, parity_reward, settings, rows([0]), processing_class=processor.tokenizer)


def test_settings_change_a_preset(tmp_path):
    def config(**settings):
        return VGPOTrainingConfig(str(tmp_path), bf16=False, use_cpu=True, **settings).vgpo_config()

    assert config(vgpo="released", vgpo_inter_clamp=[]).inter_clamp is None
    assert config(vgpo="released").inter_clamp == (0.9, 2.0)
    assert config(vgpo_intra_clamp=[0.5, 1.5]).intra_clamp == (0.5, 1.5)
    assert config(vgpo_gate=False).gate is False
    assert config(vgpo="None") is None


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, "loss"),
        ({"gradient_accumulation_steps": 2}, "scoring"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, "loss"),
        ({"num_iterations": 2}, "scoring"),
        ({"gradient_accumulation_steps": 2, "vgpo_inter": False}, "loss"),
        ({"gradient_accumulation_steps": 2, "vgpo_inter": False, "vgpo": "released"}, "scoring"),
        ({"gradient_accumulation_steps": 2, "vgpo_inter": False, "steps_per_generation": 4}, "scoring"),
        ({"vgpo_signal": "scoring"}, "scoring"),
    ],
)
def test_the_source_of_the_signal(tmp_path, settings, source):
    config = VGPOTrainingConfig(
        str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=8, num_generations=4, **settings
    )
    assert config.signal_source() == source


def test_trls_parser_explains_and_reads_the_settings(tmp_path):
    """The fields' help is for scripts that build their command line with it."""
    parser = TrlParser(VGPOTrainingConfig)
    explained = {action.dest for action in parser._actions if action.help}
    assert explained >= {name for name in VGPOTrainingConfig.__annotations__ if name in vars(VGPOTrainingConfig)}
    given = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--vgpo_intra_clamp", "0.5", "2"]
    (config,) = parser.parse_args_and_config([*given, "--signal", "attention", "--signal_layers", "-1"])
    assert config.vgpo_config() == VGPOConfig.paper(intra_clamp=(0.5, 2.0))
    assert (config.signal, config.signal_layers) == ("attention", [-1])


def test_metrics_of_a_resumed_run_drop_what_comes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "seconds": float(step), "loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "sec')
    callback, state = MetricsFile(path), TrainerState(global_step=2)
    callback.on_train_begin(None, state, None)
    state.global_step = 3
    callback.on_log(None, state, None, {"loss": float("nan")})
    callback.on_log(None, state, None, {"train_runtime": 1.0})
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[2]["loss"] is None and records[2]["seconds"] >= 2


def test_metrics_of_a_new_run_start_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "seconds": 1.0}\n')
    callback, state = MetricsFile(path), TrainerState(global_step=0)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, {"eval_loss": 2.0})
    state.global_step = 1
    callback.on_log(None, state, None, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(path)] == [0, 1]

"""VGPOTrainer beside TRL's: without VGPO a run is TRL's to the last digit, and TRL's settings are taken as they are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import vgpo_trainer
from trainer.tiny_runs import llava, make_trainer, parity_reward, rows, save_model
from transformers import AutoModelForImageTextToText, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.runs.metrics import read_metrics

torch.set_num_threads(1)
TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
TIMES |= {f"eval_{name}" for name in ("step_time", "runtime", "samples_per_second", "steps_per_second")}


def records(folder: Any, trainer_class: type, arguments: dict[str, Any] | None = None, **settings: Any) -> list[dict]:
    if settings.get("beta"):  # TRL loads the reference by its name
        settings["model"] = AutoModelForImageTextToText.from_pretrained(save_model(folder / "model"))
    trainer = make_trainer(folder, trainer_class=trainer_class, arguments=arguments, **settings)
    trainer.train()
    history = trainer.state.log_history
    return [{name: value for name, value in record.items() if name not in TIMES} for record in history]


def trls(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.removeprefix("eval_").startswith("vgpo/")}


SETTINGS = {
    "as it is": {},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "sequence ratios in cispo": {"loss_type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_target": 100.0,
        "entropy_coef_delta": 0.01,
        "entropy_coef_max": 0.5,
        "gradient_accumulation_steps": 2,
    },
    "a tight bound": {"loss_type": "grpo", "delta": 1.05, "num_iterations": 2, "learning_rate": 1e-2},
    "reference and bonus": {"beta": 0.1, "entropy_coef": 0.05, "loss_type": "bnpo", "top_entropy_quantile": 0.5},
    "an evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "loss_type": "luspo"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_without_vgpo_a_run_is_trls(tmp_path, name):
    """Values and all; TRL's own head is used in both, so that not a bit differs."""
    settings = {**SETTINGS[name], "max_steps": 3, "fused_head": False, "vgpo": None}
    settings["arguments"] = {"eval_dataset": rows([1] * 4)} if "eval_strategy" in settings else {}
    expected = records(tmp_path / "trl", GRPOTrainer, **settings)
    for diagnostics in (False, True) if name == next(iter(SETTINGS)) else (True,):
        folder = tmp_path / f"ours-{diagnostics}"
        ours = records(folder, vgpo_trainer.VGPOTrainer, vgpo_diagnostics=diagnostics, **settings)
        assert [trls(record) for record in ours] == expected
        steps = [record for record in ours if "loss" in record]
        assert len(steps) == 3 and any(record["grad_norm"] > 0 for record in steps)
        for record in steps:
            assert ("vgpo/visual_focus" in record) == (diagnostics and "reward" in record)
            assert record["vgpo/old_policy_kl"] >= 0
        if "num_iterations" in settings:
            assert steps[1]["vgpo/old_policy_kl"] > 0
        if name == "adaptive entropy":
            assert [record["entropy_coef"] for record in steps] == pytest.approx([0.01, 0.02, 0.03])


def test_without_vgpo_the_fused_head_still_serves(tmp_path):
    settings = {"vgpo": None, "loss_type": "luspo", "use_adaptive_entropy": True}
    expected = records(tmp_path / "trl", GRPOTrainer, **settings)
    ours = records(tmp_path / "ours", vgpo_trainer.VGPOTrainer, **settings)
    for record, other in zip(ours, expected, strict=True):
        record = trls(record)
        assert record.keys() == other.keys()
        for name, value in other.items():
            assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "luspo", "vespo"])
def test_with_factors_of_one_a_run_logs_what_trls_does(tmp_path, loss_type):
    """On the same seeds, key by key; a key that TRL gains anywhere is missing, and this fails."""
    settings = {"loss_type": loss_type, "entropy_coef": 0.02, "beta": 0.05, "gradient_accumulation_steps": 2}
    expected = records(tmp_path / "trl", GRPOTrainer, **settings)
    ours = records(tmp_path / "ours", vgpo_trainer.VGPOTrainer, vgpo_intra=False, vgpo_inter=False, **settings)
    for record, other in zip(ours, expected, strict=True):
        assert trls(record).keys() == other.keys()
        for name, value in other.items():
            assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert ours[0]["vgpo/factor_min"] == ours[0]["vgpo/factor_max"] == 1


def test_adaptive_entropy_goes_on_where_it_stopped(tmp_path):
    settings = {"vgpo": None, "use_adaptive_entropy": True, "entropy_target": 100.0, "entropy_coef_delta": 0.01}
    saved = {**settings, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=2, **saved).train()
    resumed = make_trainer(tmp_path, max_steps=3, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[-2]["entropy_coef"] == pytest.approx(0.03)


# A GRPOConfig.


def plain(folder: Any, **settings: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "bf16": False, "use_cpu": True, "report_to": "none", **settings}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1, "loss_type": "grpo"},
        {"generation_batch_size": 48, "per_device_train_batch_size": 4, "num_generations": 4},
        {"scale_rewards": False, "reward_weights": [1.0], "logging_steps": 5, "warmup_steps": 0.1},
        {"max_steps": 3, "lr_scheduler_kwargs": {"power": 2.0}, "generation_kwargs": {"top_k": 5}, "seed": 7},
    ],
    ids=str,
)
def test_settings_of_trl_are_carried_over(tmp_path, settings):
    given = GRPOConfig(**plain(tmp_path, **settings))
    before = dict(vars(given))
    carried = VGPOTrainingConfig.from_trl(given)
    assert vars(given) == before
    # What the class itself makes of the same settings, with TRL's default where ours is another.
    expected = VGPOTrainingConfig(**plain(tmp_path, **{"logging_steps": given.logging_steps, **settings}))
    assert vars(carried).keys() == vars(expected).keys()
    for setting in fields(VGPOTrainingConfig):
        assert getattr(carried, setting.name) == getattr(expected, setting.name), setting.name
    assert carried.to_dict() == expected.to_dict()
    assert carried.signal_source() == expected.signal_source()
    assert carried.vgpo_config() == expected.vgpo_config()


def test_settings_of_vgpo_come_beside_those_of_trl(tmp_path):
    given = GRPOConfig(**plain(tmp_path))
    config = VGPOTrainingConfig.from_trl(given, vgpo="released", vgpo_beta=0.5, signal="attention", signal_layers=[-1])
    assert (config.vgpo, config.vgpo_config().beta, config.signal_layers) == ("released", 0.5, [-1])
    with pytest.raises(ValueError, match="vgpo must be one of"):
        VGPOTrainingConfig.from_trl(given, vgpo="new")
    with pytest.raises(TypeError, match="beta: no setting of VGPO"):
        VGPOTrainingConfig.from_trl(given, beta=0.5)


def test_a_trainer_takes_a_config_of_trl(tmp_path):
    model, processor = llava()
    settings = plain(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4, num_generations=4)
    given = GRPOConfig(**settings)
    trainer = vgpo_trainer.VGPOTrainer(model, parity_reward, given, rows([1] * 8), processing_class=processor)
    assert trainer.args.vgpo == "paper" and trainer.args is not given
    trainer.train()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["vgpo/phi_std"] > 0


def test_a_trainer_takes_its_arguments_in_the_order_of_trl(tmp_path):
    """All of them, and ours only by name."""
    model, processor = llava()
    names = [name for name in inspect.signature(GRPOTrainer.__init__).parameters if name != "self"]
    callback = TrainerCallback()
    given = dict.fromkeys(names) | {
        "model": model,
        "reward_funcs": parity_reward,
        "args": GRPOConfig(**plain(tmp_path)),
        "train_dataset": rows([1] * 4),
        "processing_class": processor,
        "callbacks": [callback],
        "optimizers": (None, None),
    }
    trainer = vgpo_trainer.VGPOTrainer(*given.values(), signal="attention")
    assert callback in trainer.callback_handler.callbacks and trainer.args.signal == "attention"


def test_settings_with_those_of_vgpo_are_not_carried_over(tmp_path):
    given = VGPOTrainingConfig(**plain(tmp_path))
    with pytest.raises(TypeError, match=r"^args is a VGPOTrainingConfig, which has VGPO's settings: use it"):
        VGPOTrainingConfig.from_trl(given)


def test_other_settings_are_refused(tmp_path):
    @dataclass
    class Own(GRPOConfig):
        extra: int = 1

    model, processor = llava()
    for given in (Own(**plain(tmp_path)), TrainingArguments(**plain(tmp_path))):
        with pytest.raises(TypeError, match=f"a plain trl.GRPOConfig, got {type(given).__name__}; a class of your own"):
            vgpo_trainer.VGPOTrainer(model, parity_reward, given, rows([1]), processing_class=processor)

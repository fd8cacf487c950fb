"""Which modules `vgpo train --lora-rank` adapts: the decoder's, whatever they are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
from architectures.zoo import example
from trl import ModelConfig
from vgpo_trainer.commands import train
from vgpo_trainer.lora import LoraTargetError, decoder_targets, lora_config, quantization_config


def asked(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"use_peft": True, "lora_r": 4, "lora_alpha": 8, **changes})


def adapted(model: Any, config: Any) -> list[str]:
    names = [name for name, _ in peft.get_peft_model(model, config).named_parameters() if "lora_A" in name]
    return [name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in names]


def test_without_peft_there_is_no_adapter() -> None:
    assert lora_config(ModelConfig()) is None
    for option, value in {"lora_alpha": 8, "lora_target_modules": ["q_proj"], "use_dora": True}.items():
        with pytest.raises(LoraTargetError, match=f"{option} has no effect without --lora-rank"):
            lora_config(ModelConfig(**{option: value}))
    with pytest.raises(LoraTargetError, match="load_in_4bit needs --lora-rank"):
        lora_config(ModelConfig(load_in_4bit=True))


def test_settings_of_trl_are_those_of_the_adapter() -> None:
    model = example("smolvlm").model
    options = {"use_rslora": True, "use_dora": True, "lora_dropout": 0.1, "lora_modules_to_save": ["lm_head"]}
    config = lora_config(asked(**options), model=model)
    assert (config.use_rslora, config.use_dora, config.lora_dropout) == (True, True, 0.1)
    assert config.modules_to_save == ["lm_head"] and config.task_type == "CAUSAL_LM"
    trained = [name for name, weight in peft.get_peft_model(model, config).named_parameters() if weight.requires_grad]
    assert any("lm_head" in name for name in trained) and any("magnitude" in name for name in trained)


def test_quantized_weights_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization_config(ModelConfig()) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes: pip install bitsandbytes"):
        quantization_config(ModelConfig(load_in_4bit=True))


def test_the_structure_is_read_from_a_checkpoint_without_its_weights(tmp_path: Path) -> None:
    model = example("smolvlm").model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)  # and nothing else
    config = lora_config(asked(model_name_or_path=str(tmp_path)))
    names = adapted(model, config)
    assert len(names) == 14
    assert all(name.startswith("model.text_model.layers.") for name in names)
    assert config.r == 4 and config.lora_alpha == 8


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        # The vision tower has projections of the same name.
        ("smolvlm", ["q_proj"], {"self_attn.q_proj"}),
        ("llava", ["q_proj", "down_proj"], {"self_attn.q_proj", "mlp.down_proj"}),
        ("qwen3_5", ["linear_attn.out_proj"], {"linear_attn.out_proj"}),
        ("lfm2_vl", ["out_proj"], {"self_attn.out_proj", "conv.out_proj"}),
    ],
)
def test_targets_are_the_decoders_alone(family: str, targets: list[str], expected: set[str]) -> None:
    model = example(family).model
    names = adapted(model, lora_config(asked(lora_target_modules=targets), model=model))
    assert {re.sub(r".*\.layers\.\d+\.", "", name) for name in names} == expected
    assert not any("vision" in name for name in names)


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_k25", "glm4v", "minimax_m3_vl"])
def test_all_linear_is_the_default_and_leaves_out_what_chooses_keys(family: str) -> None:
    model = example(family).model
    assert decoder_targets(model) == decoder_targets(model, ["all-linear"])
    pattern = re.compile(decoder_targets(model)["target_modules"])
    linears = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear" and ".layers." in name and "language_model" in name
    }
    left_out = {name for name in linears if not pattern.fullmatch(name)}
    assert all(".indexer." in name for name in left_out)
    assert bool(left_out) == (family == "minimax_m3_vl")
    assert len(linears) - len(left_out) >= 10


def test_a_router_stays_as_it_is() -> None:
    model = example("llama4").model
    assert any(name.endswith("router") for name, _ in model.named_modules())
    assert not any("router" in name for name in adapted(model, lora_config(asked(), model=model)))


def test_a_name_that_the_decoder_lacks_is_refused_with_those_it_has() -> None:
    model = example("glm4v").model
    with pytest.raises(LoraTargetError, match=r"no linear layer gate_proj, w1; it has down_proj, gate_up_proj, k_proj"):
        lora_config(asked(lora_target_modules=["gate_proj", "w1", "q_proj"]), model=model)
    with pytest.raises(LoraTargetError, match="no linear layer is named"):
        decoder_targets(model, [])


def test_vgpo_train_says_it_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.tiny_runs import picture, save_model

    model = save_model(tmp_path / "model")
    picture(0).save(tmp_path / "0.png")
    rows = ['{"image": "0.png", "prompt": "Add the digits.", "answer": 1}'] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = ["--model", model, "--dataset", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--lora-rank", 2]
    assert train.main([str(option) for option in [*options, "--lora-targets", "query"]]) == 2
    assert (
        "vgpo train: the decoder of LlavaForConditionalGeneration has no linear layer query" in capsys.readouterr().err
    )

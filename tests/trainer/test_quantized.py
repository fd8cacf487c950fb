"""LoRA on weights of four and eight bits, as bitsandbytes keeps them (on a CPU too)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from trainer.tiny_runs import make_trainer, save_model
from transformers import AutoModelForImageTextToText
from trl import ModelConfig
from vgpo_trainer.lora import lora_config, quantization_config
from vgpo_trainer.runs.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trainer_of(checkpoint: Path, out: Path, bits: int, **settings: Any) -> Any:
    asked = ModelConfig(
        model_name_or_path=str(checkpoint), use_peft=True, lora_r=4, lora_dropout=0.0, **{f"load_in_{bits}bit": True}
    )
    arguments = {"peft_config": lora_config(asked), "quantization_config": quantization_config(asked)}
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", **settings}
    torch.manual_seed(0)  # of adapters
    return make_trainer(out, model=str(checkpoint), arguments=arguments, learning_rate=1e-2, **settings)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_an_adapter_on_quantized_weights_is_trained_and_resumed(checkpoint, tmp_path, bits, kind):
    whole = trainer_of(checkpoint, tmp_path / "whole", bits)
    quantized = [name for name, module in whole.model.named_modules() if type(module).__name__ == kind]
    assert any("language_model" in name for name in quantized) and not any("lm_head" in name for name in quantized)
    whole.train()
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["loss"] != 0 and record["grad_norm"] > 0 for record in records)
    assert records[0]["vgpo/psi_std"] > 0 and records[0]["vgpo/visual_focus"] != 0

    trainer_of(checkpoint, tmp_path / "broken", bits, max_steps=1).train()
    resumed = trainer_of(checkpoint, tmp_path / "broken", bits)
    resumed.train(resume_from_checkpoint=True)
    trained = {name: weight for name, weight in whole.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    others = dict(resumed.model.named_parameters())
    for name, weight in trained.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=0)

    from peft import PeftModel

    resumed.save_model(str(tmp_path / "adapter"))
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert PeftModel.from_pretrained(plain, tmp_path / "adapter").peft_config["default"].r == 4


def test_the_loss_without_logits_is_that_with_them(checkpoint, tmp_path):
    losses = []
    for fused in (True, False):
        out = tmp_path / str(fused)
        trainer_of(checkpoint, out, 4, fused_head=fused, max_steps=1).train()
        losses.append(read_metrics(out / "metrics.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != 0

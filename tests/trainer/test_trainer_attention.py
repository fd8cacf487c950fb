"""``signal="attention"``: factors from attention shares, against eager attention weights and the same definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.test_trainer_signal import capture_unshuffled
from trainer.tiny_runs import FAMILIES, generation_batch, make_trainer, rows
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.options.parser import parse_options
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.transformers import visual_mask
from vgpo_kernels.reference.visual_weights import visual_weights


def eager_shares(trainer: Any, batch: dict[str, Any], layers: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each response token on the image, ``[B, T]``, from the weights of eager attention; the mask."""
    sequence = Sequences.of(batch)
    model_inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch and name != "num_images"}
    model = trainer.model
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(
            input_ids=sequence.input_ids, attention_mask=sequence.attention_mask, output_attentions=True, **model_inputs
        ).attentions[layers]
    model.set_attn_implementation(previous)
    mask = sequence.response_mask.bool()
    shown = visual_mask(sequence.input_ids, model)
    shown[:, -mask.shape[1] :] = False
    mean = torch.stack(weights).mean(dim=(0, 2))  # over layers and heads
    return (mean * shown[:, None]).sum(-1)[:, -mask.shape[1] :], mask


def defined(trainer: Any, inputs: list[dict[str, Any]], shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Factors by the reference, told that the score is the share."""
    groups = torch.tensor([int(row["answer"]) for row in inputs])
    config = trainer.args.vgpo_config()
    cos = 2 * shares - 1 if config.score == "affine" else shares
    return visual_weights(cos, mask, groups, None, None, config.as_floats())[0].float()


@pytest.mark.parametrize(("preset", "layers"), [("paper", None), ("released", [-1])])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_follow_from_shares(tmp_path, monkeypatch, family, preset, layers):
    """Four micro-batches, their factors from a scoring pass in slices of four rows."""
    settings = {"vgpo": preset, "signal": "attention", "signal_layers": layers, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, family=family, dataset=rows([1, 2, 3, 1]), **settings)
    trainer.model.train()
    kept = capture_unshuffled(trainer, monkeypatch)
    inputs = generation_batch(trainer)
    trainer._prepare_inputs(inputs)
    shares, mask = eager_shares(trainer, kept[0], slice(None) if layers is None else slice(-1, None))
    expected = defined(trainer, inputs, shares, mask)
    assert shares[mask].std() > 1e-3 and expected[mask].std() > 0.1
    # A factor divides by the range of the shares in a response.
    torch.testing.assert_close(kept[0]["visual_factors"][mask], expected[mask], atol=2e-4, rtol=2e-4)


def test_the_pass_of_the_loss_gives_the_same(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, arguments={"signal": "attention"})
    assert trainer.args.signal == "attention"
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.args.signal_source() == "loss"
    signals = []
    plain = trainer._signal_factors

    def keeping(batch, signal, mode):
        signals.append(signal)
        return plain(batch, signal, mode)

    monkeypatch.setattr(trainer, "_signal_factors", keeping)
    inputs = generation_batch(trainer)
    batch = trainer._prepare_inputs(inputs)
    trainer._compute_loss(trainer.model, batch)
    shares, mask = eager_shares(trainer, batch, slice(None))
    torch.testing.assert_close(signals[0].shown, shares * mask, atol=1e-5, rtol=0)


def test_a_run_with_it(tmp_path):
    trainer = make_trainer(tmp_path, signal="attention", vgpo_signal="scoring", num_iterations=2, max_steps=2)
    trainer.train()
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert len(steps) == 2
    assert 0 < steps[0]["vgpo/visual_focus"] < 1 and steps[0]["vgpo/psi_std"] > 0
    assert all(0 <= share <= 1 for sample in trainer.rollout_samples for share in sample.cos)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="signal must be one of focus, attention, dependency"):
        VGPOTrainingConfig(str(tmp_path), signal="gaze", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="signal_layers has no effect"):
        VGPOTrainingConfig(str(tmp_path), signal_layers=[0], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"layers must lie in \["):
        make_trainer(tmp_path, signal="attention", signal_layers=[9])
    with pytest.raises(ValueError, match="signal must be one of"):
        make_trainer(tmp_path, arguments={"signal": "gaze"})


def test_the_command_line_says_which(tmp_path):
    asked = ["--model", "m", "--dataset", "d", "--out", str(tmp_path), "--signal", "attention", "--use_cpu", "true"]
    training = parse_options(asked).training
    assert training.signal == "attention" and training.vgpo_config() == VGPOConfig.paper()

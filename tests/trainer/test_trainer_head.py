"""fused_head: the trainer's log-probabilities, loss and gradients without logits are those with all of them."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.tiny_runs import FAMILIES, generation_batch, llava, make_trainer, qwen2_5_vl, rows
from trl.trainer.utils import add_fused_lm_head
from vgpo_trainer import fused_head
from vgpo_trainer.sharded import with_head
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

TEMPERATURE = 0.8


def build(folder, family="qwen2_5_vl", **settings: Any) -> Any:
    if settings.get("beta"):  # TRL loads the reference by its name
        {"llava": llava, "qwen2_5_vl": qwen2_5_vl}[family]()[0].save_pretrained(folder / "model")
        settings["model"] = str(folder / "model")
    defaults = {"per_device_train_batch_size": 4, "temperature": TEMPERATURE, "rollout_samples": 0}
    trainer = make_trainer(folder, family=family, dataset=rows([1, 2]), **{**defaults, **settings})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    return trainer


def rollout_of(trainer: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    batch = dict(trainer._prepare_inputs(generation_batch(trainer)))
    batch["advantages"] = torch.linspace(-1, 1.5, len(batch["completion_ids"]))
    return batch


def from_logits(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the completions, from everything the model computes when asked for logits."""
    sequence = Sequences.of(batch)
    inputs = {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None and name != "num_images"}
    model_inputs = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask, **inputs}
    logits = trainer.model(**model_inputs, use_cache=False).logits
    width = sequence.response_mask.shape[1]
    log_probabilities = (logits[:, -width - 1 : -1].float() / TEMPERATURE).log_softmax(dim=-1)
    logp = log_probabilities.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    return logp, -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


def from_trainer(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    sequence = Sequences.of(batch)
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        sequence.input_ids,
        sequence.attention_mask,
        sequence.response_mask.shape[1],
        compute_entropy=True,
        **{name: batch.get(name) for name in FORWARD_INPUTS},
    )
    return logp, entropy


def gradients(trainer: Any, values: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of every parameter by a number that depends on all scored tokens."""
    trainer.model.zero_grad()
    logp, entropy = values
    scale = torch.linspace(0.5, 2, logp.numel()).view_as(logp) * mask
    ((logp * scale).sum() + (entropy * scale.square()).sum()).backward()
    return {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}


def assert_same_as_logits(trainer: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Compare values and gradients by every parameter; returns the gradients."""
    mask = batch["completion_mask"]
    ours, theirs = from_trainer(trainer, batch), from_logits(trainer, batch)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one * mask, other * mask, atol=2e-6, rtol=1e-6)
    found, expected = gradients(trainer, ours, mask), gradients(trainer, theirs, mask)
    assert found.keys() == expected.keys() and found
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * largest, name
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_logits_as_with_them(tmp_path, family, checkpointing):
    trainer = build(tmp_path, family, gradient_checkpointing=checkpointing)
    assert_same_as_logits(trainer, rollout_of(trainer))


@pytest.mark.parametrize("settings", [{}, {"loss_type": "grpo", "beta": 0.1}, {"vgpo": "none", "entropy_coef": 0.1}])
def test_the_loss_is_that_of_trls_head(tmp_path, settings):
    results = []
    for wanted in (True, False):
        trainer = build(tmp_path / str(wanted), fused_head=wanted, **settings)
        batch = rollout_of(trainer) if not results else results[0][2]
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        slopes = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
        results.append((loss.detach(), slopes, batch))
    (loss, slopes, _), (expected, expected_slopes, _) = results
    assert abs(loss - expected) <= 1e-6 * max(1.0, abs(expected))
    largest = max(slope.abs().max() for slope in expected_slopes)
    assert len(slopes) == len(expected_slopes) and largest > 1e-4
    for one, other in zip(slopes, expected_slopes, strict=True):
        assert (one - other).abs().max() <= 1e-5 * largest


def test_every_pass_of_the_policy_and_the_reference_is_fused(tmp_path, monkeypatch):
    calls = []

    def counting(hidden, *arguments, **named):
        calls.append(hidden.requires_grad)
        return plain(hidden, *arguments, **named)

    plain = fused_head.linear_logprob
    monkeypatch.setattr(fused_head, "linear_logprob", counting)
    trainer = build(tmp_path, beta=0.1, num_iterations=2, gradient_accumulation_steps=2)
    calls.clear()  # the head was tried on a few tokens
    batch = trainer._prepare_inputs(generation_batch(trainer))
    assert "old_per_token_logps" in batch and "ref_per_token_logps" in batch
    assert calls == [False] * 4  # a generation batch of two micro-batches: old log-probabilities and the reference's
    trainer._compute_loss(trainer.model, batch)
    assert calls == [False] * 4 + [True]


def test_half_precision_under_autocast(tmp_path):
    trainer = build(tmp_path, bf16=True)
    batch = rollout_of(trainer)
    mask = batch["completion_mask"]
    with torch.no_grad():
        (logp, _), (expected, _) = from_trainer(trainer, batch), from_logits(trainer, batch)
    assert logp.dtype == torch.float32
    assert ((logp - expected) * mask).abs().max() < 0.1
    assert ((logp - expected) * mask).abs().max() > 0, "bf16 should show"


def test_a_tied_head_has_one_gradient(tmp_path):
    model, _ = qwen2_5_vl()
    model.lm_head.weight = model.get_input_embeddings().weight
    trainer = build(tmp_path, model=model)
    found = assert_same_as_logits(trainer, rollout_of(trainer))
    assert not any(name.startswith("lm_head") for name in found)


def test_a_bias_of_the_head_counts(tmp_path, monkeypatch):
    model, _ = qwen2_5_vl()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, model.lm_head.out_features))
    trainer = build(tmp_path, model=model)
    assert "lm_head.bias" in assert_same_as_logits(trainer, rollout_of(trainer))
    assert_head(trainer, is_ours=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize("replaced", [False, True], ids=["", "forward of TRL's"])
def test_a_head_that_is_cut_is_called_for_its_weight(replaced):
    """ZeRO-3 fills it in hooks of the module; tests/integrations/test_deepspeed.py trains with the real ones."""
    head, calls = torch.nn.Linear(4, 3), []
    head.weight.ds_id = 0
    if replaced:
        head.forward = lambda hidden: hidden
    before = vars(head).get("forward")
    head.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs)))
    one, other = torch.randn(2, 4), torch.randn(2, 4)
    found = with_head(
        head, lambda weight, bias, *states: {"sum": (states[0] - states[1]) @ weight.T + bias}, one, other
    )
    torch.testing.assert_close(found["sum"], torch.nn.functional.linear(one - other, head.weight, head.bias))
    assert calls == [2] and vars(head).get("forward") is before


def lora(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False, **settings})


def test_a_head_that_is_trained_whole_beside_lora(tmp_path):
    trainer = build(tmp_path, arguments={"peft_config": lora(modules_to_save=["lm_head"])})
    batch = rollout_of(trainer)
    found = assert_same_as_logits(trainer, batch)
    assert any("lm_head.modules_to_save" in name for name in found)
    # The reference is the model with its adapter off, and so with the head as it was.
    with torch.no_grad(), trainer.model.disable_adapter():
        trainer.model.get_output_embeddings().modules_to_save["default"].weight += 1
        logp, expected = from_trainer(trainer, batch)[0], from_logits(trainer, batch)[0]
    mask = batch["completion_mask"]
    torch.testing.assert_close(logp * mask, expected * mask, atol=2e-6, rtol=1e-6)


def test_an_adapter_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        build(tmp_path, arguments={"peft_config": lora(target_modules=["q_proj", "lm_head"])})


def transforming(change: Any) -> Any:
    """A model that does something to its logits, as its own forward computes them."""
    model, _ = qwen2_5_vl()
    plain = model.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        output = plain(*arguments, **named)
        output.logits = change(output.logits)
        return output

    model.forward = MethodType(forward, model)
    return model


def assert_head(trainer: Any, *, is_ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that log-probabilities are those of the model's logits, and whether linear_logprob computes them."""
    batch = rollout_of(trainer)
    assert_same_as_logits(trainer, batch)

    def reached(*_: Any, **__: Any) -> None:
        raise KeyError

    monkeypatch.setattr(fused_head, "linear_logprob", reached)
    with pytest.raises(KeyError) if is_ours else nullcontext():
        from_trainer(trainer, batch)


def test_a_cap_that_small_logits_do_not_reach_is_kept(tmp_path, monkeypatch):
    """The cap does not show on the small logits of this model, and would in a trained one."""
    model = transforming(lambda logits: 5000 * torch.tanh(logits / 5000))
    model.config.get_text_config().final_logit_softcapping = 5000.0
    with torch.no_grad():
        ids = torch.arange(10, 18)[None]
        plain = (5000 * torch.atanh(model(ids).logits.double() / 5000)).float()
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=0)
    trainer = build(tmp_path, model=model)
    assert fused_head.linear_head(model, None) == (fused_head.Mapping(softcap=5000.0), None)
    assert_head(trainer, is_ours=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(
    ("name", "value", "factor"),
    [("logit_scale", 0.25, 0.25), ("logits_scaling", 3.0, 1 / 3), ("logits_scaling", 3.0, 3.0)],
    ids=["Cohere", "Granite", "HyperCLOVA X"],
)
def test_scales_and_caps_of_a_configuration(tmp_path, monkeypatch, name, value, factor, cap):
    """One name has two meanings. The model's own logits say which it is."""
    model = transforming(lambda logits: logits * factor if cap is None else cap * torch.tanh(logits * factor / cap))
    text = model.config.get_text_config()
    setattr(text, name, value)
    text.final_logit_softcapping = cap
    trainer = build(tmp_path, model=model)
    assert fused_head.linear_head(model, None) == (fused_head.Mapping(factor, cap), None)
    assert_head(trainer, is_ours=True, monkeypatch=monkeypatch)


def test_a_scale_below_zero_stays_with_trl(tmp_path, monkeypatch):
    """TRL multiplies by whatever the configuration says; linear_logprob's scale is above 0."""
    model = transforming(lambda logits: logits * -0.5)
    model.config.get_text_config().logit_scale = -0.5
    with pytest.warns(UserWarning, match=r"fused_head: Qwen2_5_VL.* does more to its logits.*TRL's own head"):
        trainer = build(tmp_path, model=model)
    assert_head(trainer, is_ours=False, monkeypatch=monkeypatch)


def test_a_setting_that_the_model_does_not_obey_changes_nothing(tmp_path, monkeypatch):
    model, _ = qwen2_5_vl()
    model.config.get_text_config().final_logit_softcapping = 30.0
    assert_head(build(tmp_path, model=model), is_ours=True, monkeypatch=monkeypatch)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("change", [lambda x: x / 3, lambda x: x[..., :-2]], ids=["divided", "cut"])
def test_what_no_setting_names_is_read_from_all_logits(tmp_path, monkeypatch, change, fused):
    with pytest.warns(UserWarning, match=r"fused_head: .*; log-probabilities are computed from all logits"):
        trainer = build(tmp_path, model=transforming(change), fused_head=fused)
    assert_head(trainer, is_ours=False, monkeypatch=monkeypatch)


def test_trying_a_head_leaves_the_model_as_it_was():
    model, _ = qwen2_5_vl()
    model.train()
    model.model.language_model.layers[0].eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    fused_head.fuse_heads((model,), 1.0, fp32=False)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert {name: module.training for name, module in model.named_modules()} == training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.model.language_model.norm._forward_hooks


def test_a_change_that_hides_in_the_rounding_of_16_bits_is_found():
    """Two percent, where bfloat16 has three digits: TRL's head knows nothing of it either."""
    model = transforming(lambda logits: logits * 1.02).bfloat16()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with pytest.warns(UserWarning, match=r"does more to its logits.*from all logits"):
        fused_head.fuse_heads((model,), 1.0, fp32=False)


def test_generation_and_logits_are_left_alone(tmp_path):
    trainer = build(tmp_path, family="llava")
    model, _ = llava()
    ids = torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        generated = trainer.model.eval().generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated, model.eval().generate(ids, max_new_tokens=3, do_sample=False))
        labeled = trainer.model(input_ids=ids, labels=ids).loss
        assert torch.equal(labeled, model(input_ids=ids, labels=ids).loss)


def test_a_head_in_fp32_under_autocast(tmp_path):
    """Hidden states are bf16's, but what the head makes of them is exact: TRL's head in fp32 agrees."""
    results = []
    for wanted in (True, False):
        trainer = build(tmp_path / str(wanted), bf16=True, cast_lm_head_to_fp32=True, fused_head=wanted)
        batch = results[0][1] if results else rollout_of(trainer)
        with torch.no_grad():
            results.append((from_trainer(trainer, batch)[0] * batch["completion_mask"], batch))
    (logp, _), (expected, _) = results
    torch.testing.assert_close(logp, expected, atol=2e-6, rtol=1e-6)

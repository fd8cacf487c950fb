"""Methods by name: what enters the loss of each, against ``shape_tokens`` of signals that are computed the long way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from torch.nn.functional import normalize
from trainer.test_trainer_dependency import both_views, build, divergence, keep_signals, view_of
from trainer.tiny_runs import generation_batch, rows
from vgpo_trainer.commands import train
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.methods import ELSEWHERE, METHODS, compares_responses
from vgpo_trainer.options.names import OFTEN
from vgpo_trainer.options.parser import parse_options
from vgpo_trainer.reports.words import train_words
from vgpo_trainer.runs.card import write_card
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.signals import SIGNALS
from vgpo_trainer.signals.shaping import expected_selection
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

from vgpo_kernels import ShapingConfig, VGPOConfig, shape_tokens
from vgpo_kernels.integrations.transformers import blind_attention, visual_mask

SHAPED = [name for name, method in METHODS.items() if method.weighs and name != "vgpo"]
TWO_PROMPTS = [1, 2]


def shown_images(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """True at image tokens of the prompts, ``[B, S]``."""
    sequence = Sequences.of(batch)
    images = visual_mask(sequence.input_ids, trainer.model)
    images[:, -sequence.response_mask.shape[1] :] = False
    return images


def mean_cosines(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """Mean over layers and image tokens of each token's cosines, ``[B, T]``, pair by pair."""
    sequence, images = Sequences.of(batch), shown_images(trainer, batch)
    inputs = {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None and name != "num_images"}
    output = trainer.model(
        input_ids=sequence.input_ids, attention_mask=sequence.attention_mask, output_hidden_states=True, **inputs
    )
    length, layers = sequence.response_mask.shape[1], []
    for states in output.hidden_states:
        unit = normalize(states.double(), dim=-1)
        rows_of_layer = [row[-length:] @ row[image].T for row, image in zip(unit, images, strict=True)]
        layers.append(torch.stack([cosines.mean(-1) for cosines in rows_of_layer]))
    return torch.stack(layers).mean(0)


def log_probs(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the whole vocabulary in both views of a batch, ``[B, T, V]``."""
    if trainer.args.view != "blind":
        return both_views(trainer, batch, view_of(trainer, batch))
    with blind_attention(trainer.model, shown_images(trainer, batch)):
        other, _ = both_views(trainer, batch, {**Sequences.of(batch)._asdict(), **inputs_of(batch)})
    return both_views(trainer, batch, {**inputs_of(batch)})[0], other


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    sequence = Sequences.of(batch)
    inputs = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask}
    return inputs | {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None}


def long_way(trainer: Any, batch: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The signals of a method, from full logits and hidden states."""
    if name == "pepo":
        p, _ = both_views(trainer, batch, inputs_of(batch))
        return {"visual": mean_cosines(trainer, batch).float(), "entropy": -(p.exp() * p).sum(-1)}
    p, q = log_probs(trainer, batch)
    targets = batch["completion_ids"][..., None]
    logp, other = (view.gather(-1, targets)[..., 0] for view in (p, q))
    entropy, other_entropy = (-(view.exp() * view).sum(-1) for view in (p, q))
    if name in ("vppo", "pgpo"):
        ratio = (other - logp).clamp(-20, 20)
        return {"visual": (ratio.exp() - ratio - 1).clamp(0, 10)}
    if name == "tor":
        return {"visual": (logp - other).abs(), "entropy": entropy}
    middle = ((p.exp() + q.exp()) / 2).log()
    js = (divergence(p, middle) + divergence(q, middle)) / 2
    return {"visual": js, "entropy": entropy, "gap": (other_entropy - entropy).abs()}


SOURCES = {
    "a pass of its own": {"vgpo_signal": "scoring"},
    "TRL's pass": {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "the pass of the loss": {},
}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(name, source, marks=[pytest.mark.slow] if source == "TRL's pass" and name != "pepo" else [])
        for name in SHAPED
        for source in SOURCES
    ],
)
def test_factors_are_those_of_the_signals_the_long_way(tmp_path, monkeypatch, name, source):
    trainer = build(tmp_path, images=TWO_PROMPTS, method=name, **SOURCES[source])
    trainer.state.global_step, trainer.state.max_steps = 3, 4
    kept = keep_signals(trainer, monkeypatch)
    micro_batch = trainer._prepare_inputs(generation_batch(trainer))
    assert bool(kept) == (source != "the pass of the loss")
    if not kept:
        trainer._compute_loss(trainer.model, micro_batch)
    ((batch, signal, found),) = kept
    mask = Sequences.of(batch).response_mask.bool()
    with torch.no_grad():
        signals = long_way(trainer, batch, name)
    config = ShapingConfig.preset(name)
    assert sorted(signals) == sorted(config.needs()) and signals["visual"][mask].std() > 1e-3
    for key, value in signal.signals().items():
        torch.testing.assert_close(value[mask], signals[key][mask], atol=2e-5, rtol=2e-4)
    expected = shape_tokens(signals, mask, batch["prompt_group"], config, progress=0.75)
    assert torch.equal(found.selected, expected.selected)
    torch.testing.assert_close(found.factors, expected.factors, atol=2e-3, rtol=2e-3)
    assert expected.factors[mask].std() > (1e-3 if name == "pepo" else 0.1)
    product = torch.where(mask, (1 + found.psi) * (1 + found.phi)[:, None], 1.0)
    torch.testing.assert_close(found.factors, product, atol=1e-6, rtol=1e-6)
    if config.response != "none":
        assert found.phi.std() > 1e-2


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(tmp_path, name, family):
    """With layers that are computed again, rows of text, and an evaluation."""
    trainer = build(
        tmp_path,
        family,
        [1, 0, 1, 2],
        arguments={"method": name, "eval_dataset": rows([1, 2], size=48 if family == "llava" else 16)},
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        gradient_checkpointing=True,
    )
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    *_, trained = [record for record in records if "loss" in record]
    (evaluated,) = [record for record in records if "eval_loss" in record]
    assert any(not torch.equal(weight, weights[name]) for name, weight in trainer.model.named_parameters())
    if name == "papo":
        assert trained["vgpo/view_k3"] > 0 and evaluated["eval_vgpo/view_k3"] > 0
        assert "vgpo/visual_focus" not in trained and "vgpo/factor_mean" not in trained
        return
    for record, prefix in ((trained, ""), (evaluated, "eval_")):
        assert record[f"{prefix}vgpo/nonfinite_responses"] == 0 and record[f"{prefix}vgpo/weighted_share"] > 0
        assert record[f"{prefix}vgpo/factor_max"] > 1 or name == "tor"
        spread = "psi_std" if name == "vgpo" else "weight_std"
        assert record[f"{prefix}vgpo/{spread}"] > 0
    if name in ("vppo", "tor", "vepo"):
        assert trained["vgpo/selected_rate"] < 0.75 and trained["vgpo/factor_min"] == 0
    assert trainer.rollout_samples and all(len(one.factors) == len(one.tokens) for one in trainer.rollout_samples)


def test_responses_share_a_view_or_have_their_own(tmp_path):
    """Of a prompt with two images: PAPO masks it once, VPPO for each response."""
    for name, shared in {"papo": True, "vepo": True, "vppo": False}.items():
        trainer = build(tmp_path / name, "llava", [2, 1], method=name, vgpo_signal="loss", shuffle_dataset=False)
        batch = trainer._generate_and_score_completions(generation_batch(trainer))
        pixels = batch["view_pixel_values"]
        for first in (0, 4):
            alike = [torch.equal(pixels[first], pixels[first + other]) for other in (1, 2, 3)]
            assert alike == [shared] * 3, name
        assert not torch.equal(pixels[0][:1], pixels[4])


@pytest.mark.parametrize("source", ["scoring", "loss"])
@pytest.mark.parametrize("name", ["pgpo", "vppo"])
def test_a_view_of_the_same_pixels_passes_the_vision_tower_once(tmp_path, name, source):
    """In the pass of the loss it does where the layers of the decoder alone are trained, as with an adapter."""
    trainer = build(tmp_path, "llava", [1, 1], method=name, vgpo_signal=source)
    for part, weight in trainer.model.named_parameters():
        weight.requires_grad_(".layers." in part and "vision" not in part)
    tower, passes = trainer.model.model.vision_tower, []
    generate = trainer._generate

    def generating(prompts):
        generated = generate(prompts)
        tower.register_forward_hook(lambda *_: passes.append(1))
        return generated

    trainer._generate = generating
    batch = trainer._prepare_inputs(generation_batch(trainer))
    if source == "loss":
        trainer._compute_loss(trainer.model, batch)
    assert len(passes) == (1 if name == "pgpo" else 2)


def test_papo_is_its_term_alone(tmp_path):
    """As it is asked for setting by setting; drawn once for each response then, so images are masked wholly here."""
    losses = []
    told = {"vgpo": None, "view": "mask", "view_coef": 0.01, "view_estimator": "k3", "view_detach": True}
    for name, settings in {"by name": {"method": "papo"}, "by settings": told}.items():
        trainer = build(tmp_path / name, view_strength=1.0, max_steps=1, **settings)
        trainer.train()
        (record,) = [record for record in trainer.state.log_history if "loss" in record]
        losses.append((record["loss"], record["grad_norm"], record["vgpo/view_k3"]))
    assert losses[0] == losses[1]


def test_the_selection_is_counted_before_there_is_a_signal():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 37, generator=generator) < 0.8
    counted = mask & (torch.arange(37) >= torch.tensor([0, 0, 5, 9, 36, 40])[:, None])
    config = ShapingConfig.vepo()
    signals = {name: torch.rand(6, 37, generator=generator) for name in config.needs()}
    signals["visual"] = signals["visual"].masked_fill(~counted, torch.nan)
    found = shape_tokens(signals, mask, torch.arange(6), config).selected.sum(1)
    assert torch.equal(expected_selection(counted, mask, config), found) and (found < mask.sum(1)).any()


def test_the_mean_is_over_the_selected_tokens_of_the_whole_step(tmp_path, monkeypatch):
    """Of two micro-batches of 8 responses; each knows how many will be selected in both."""
    trainer = build(tmp_path, images=[1, 2, 1, 1], method="vepo", gradient_accumulation_steps=2, max_steps=1)
    kept = keep_signals(trainer, monkeypatch)
    told = []
    plain = trainer._compute_loss
    monkeypatch.setattr(
        trainer, "_compute_loss", lambda model, inputs: told.append(inputs["selected_in_batch"]) or plain(model, inputs)
    )
    trainer.train()
    assert len(kept) == 2 and [int(number) for number in told] == [sum(int(one[2].selected.sum()) for one in kept)] * 2


def test_a_method_compares_what_its_formula_compares():
    compares = {name: compares_responses(ShapingConfig.preset(name)) for name in ("vgpo", *SHAPED)}
    assert compares == {"vgpo": True, "pepo": False, "vppo": True, "pgpo": False, "tor": True, "vepo": False}
    assert not compares_responses(VGPOConfig.paper(inter=False))
    for name in ("vgpo", *SHAPED):
        split = VGPOTrainingConfig("o", use_cpu=True, bf16=False, method=name, gradient_accumulation_steps=2)
        assert split.signal_source() == ("scoring" if compares[name] else "loss")


def test_a_method_brings_its_settings_and_leaves_them_again():
    plain = VGPOTrainingConfig("o", use_cpu=True, bf16=False)
    assert (plain.method, plain.signal, plain.view, plain.view_coef) == ("vgpo", "focus", "swap", 0.0)
    without = VGPOTrainingConfig("o", use_cpu=True, bf16=False, method="papo", view_coef=0.0)
    assert without.view_coef == 0.0 and not without.passes_views()
    for name, method in METHODS.items():
        other = plain.replacing(method=name)
        assert (other.signal, other.view) == (method.signal or "focus", method.view or "swap")
        assert (other.view_strength, other.view_coef) == (method.strength, method.view_coef)
        assert other.weighs() == method.weighs and (method.signal is None or method.signal in SIGNALS)
        assert other.replacing(method="vgpo").of_method() == plain.of_method()
        back = other.replacing(method="vgpo")
        assert {key: getattr(back, key) for key in plain.of_method()} == plain.of_method()
    swapped = plain.replacing(method="vppo", view="swap")
    assert (swapped.view, swapped.view_strength, swapped.signal) == ("swap", None, "k3")
    changed = VGPOTrainingConfig("o", use_cpu=True, bf16=False, method="vppo", method_kwargs={"top_visual": 0.3})
    assert changed.shaping() == ShapingConfig.vppo(top_visual=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "vpo"}, "method must be one of vgpo, .*, got 'vpo'; did you mean 'vppo'"),
        ({"method": "VPPO"}, "did you mean 'vppo'"),
        ({"method": "none"}, r"method='none' is no weighting: a run without one has vgpo=None \(--vgpo none\)"),
        ({"method": "GRPO"}, "method='GRPO' is no weighting.*its loss is loss_type"),
        ({"method": "cgpo"}, "not in this trainer: it spoils the regions that a response names.*ShapingConfig.cgpo"),
        ({"method": "va-opd"}, "not in this trainer: it distils a teacher.*shape_tokens.*here are vgpo, pepo"),
        ({"method": "AT-RL"}, "its formula was not published in full"),
        ({"method": "vppo", "vgpo_beta": 0.5}, "vgpo_beta has no effect with method='vppo'"),
        ({"method": "vppo", "vgpo": "released"}, "vgpo has no effect with method='vppo'"),
        ({"method": "vppo", "vgpo": None}, "vgpo=None trains without the visual signal, which method='vppo' is"),
        ({"method": "vppo", "signal": "focus"}, "signal='focus' does not go with method='vppo', whose signal is 'k3'"),
        ({"method": "pepo", "view": "mask"}, "view has no effect with signal='similarity' and view_coef=0"),
        ({"method": "papo", "method_kwargs": {"top_visual": 0.3}}, "method_kwargs has no effect with method='papo'"),
        ({"method": "vppo", "method_kwargs": {"top_visual": 2.0}}, "top_visual must be in"),
        ({"method": "vepo", "method_kwargs": {"scope": "batch"}}, "method_kwargs has scope='batch', and method='vepo'"),
        ({"method": "vppo", "vgpo_signal": "loss", "gradient_accumulation_steps": 2}, "vgpo_signal='loss' needs"),
        ({"method": "pgpo", "view_strength": 0.5}, "view='blind' has no strength"),
        ({"method": "vppo", "fused_head": False}, "signal='k3' compares distributions by linear_divergence"),
        ({"method": "vppo", "torch_compile": True}, "torch_compile=True is not supported"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)


def test_a_setting_of_no_method_is_named(tmp_path):
    with pytest.raises(ValueError, match="method_kwargs: ShapingConfig has no 'top_visul': did you mean top_visual"):
        build(tmp_path, method="vppo", method_kwargs={"top_visul": 0.3})
    with pytest.raises(TypeError, match="method_kwargs must be a dict, or a JSON object as text, got 'top"):
        build(tmp_path, method="vppo", method_kwargs="top_visual=0.3")
    with pytest.raises(TypeError, match="method must be a name"):
        build(tmp_path, method=ShapingConfig.vppo())


def test_the_command_line_the_card_and_the_report_name_it(tmp_path):
    asked = ["--model", "m", "--dataset", "d", "--out", str(tmp_path), "--use_cpu", "true"]
    options = parse_options([*asked, "--method", "vppo", "--method-kwargs", '{"top_visual": 0.3}'])
    assert options.training.shaping() == ShapingConfig.vppo(top_visual=0.3) and "method" in OFTEN
    assert train.run_identity(options)["method"] == "vppo"
    assert not set(METHODS) & set(ELSEWHERE)

    trainer = build(tmp_path / "run", method="vppo", method_kwargs={"top_visual": 0.3})
    card = write_card(trainer, tmp_path / "model").read_text()
    paper = "[Spotlight on Token Perception for Multimodal RL](https://arxiv.org/abs/2510.09285)"
    assert f"trained with VPPO ({paper}) by" in card and "\n- vppo\n---" in card
    assert "- Method: VPPO, with `top_visual` `0.3`" in card and "- Visual signal: `k3`." in card
    assert "- Spoilt view of the image: `mask`, strength 0.5" in card and "eprint        = {2510.09285}" in card
    assert "| `view" not in card and "| `method" not in card

    words = train_words({"training": trainer.args.to_dict(), "run": {"model": "m", "dataset": "d"}})
    assert words.title == "VPPO: m on d" and words.weighs and words.other_method
    assert words.signal.name == "dependency on the image"
    assert {"method", "signal", "view"} <= words.settings[1].keys() and "vgpo" not in words.settings[1]

    papo = build(tmp_path / "papo", method="papo")
    words = train_words({"training": papo.args.to_dict()})
    assert words.algorithm == "PAPO" and not words.weighs and words.signal is None
    assert not {"vgpo", "signal"} & words.settings[1].keys() and words.settings[1]["view_coef"] == 0.01
    card = write_card(papo, tmp_path / "papo-model").read_text()
    assert "- Method: PAPO\n- Visual signal: not in the loss" in card
    assert "`mask`, strength 0.6; its term of the loss has weight 0.01, k3\n- Trained weights: all" in card


def test_the_page_of_methods_has_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
    for name, method in METHODS.items():
        assert f"`{name}`" in page and method.arxiv in page and (method.signal is None or f"`{method.signal}`" in page)
    for name in ("CGPO", "VA-OPD", "AT-RL", "DyCo-RL"):
        assert name in page

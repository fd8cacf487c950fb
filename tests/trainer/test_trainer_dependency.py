"""``signal="dependency"`` and ``view_coef``: two views of a batch, against the full logits of both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from trainer.test_trainer_head import transforming
from trainer.test_trainer_signal import capture_unshuffled
from trainer.test_trainer_tools import make as make_with_tool
from trainer.test_trainer_tools import states_and_places, zoom_to_picture
from trainer.tiny_runs import FAMILIES, generation_batch, make_trainer, picture, rows
from vgpo_trainer import fused_head
from vgpo_trainer.commands import train
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.options.parser import parse_options
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.signals import VIEWS, Comparison, SignalBatch, SignalSettings
from vgpo_trainer.signals.dependency import DependencySignal
from vgpo_trainer.signals.factors import compute_factors
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

from vgpo_kernels import VGPOConfig, policy_loss
from vgpo_kernels.integrations.transformers import KINDS, decoder_of, spoilt_view
from vgpo_kernels.reference.visual_weights import visual_weights

TEMPERATURE = 0.8
IMAGES = [1, 2, 3, 1]


def build(folder: Any, family: str = "qwen2_5_vl", images: Any = IMAGES, **settings: Any) -> Any:
    dataset = images if isinstance(images, Dataset) else rows(images, size=48 if family == "llava" else 16)
    defaults = {"temperature": TEMPERATURE, "per_device_train_batch_size": 8}
    trainer = make_trainer(folder, family=family, dataset=dataset, **{**defaults, **settings})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    return trainer


def both_views(trainer: Any, batch: dict[str, Any], spoilt: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all of the vocabulary for each response token, ``[B, T, V]``, in both views."""
    sequence = Sequences.of(batch)
    inputs = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask}
    inputs |= {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None}
    if spoilt is None:
        spoilt = spoilt_view(inputs, trainer.args.view, trainer.model, response_mask=sequence.response_mask)
    found = []
    for view in (inputs, spoilt):
        arguments = {name: value for name, value in view.items() if name not in ("num_images", "num_tiles")}
        logits = trainer.model(**arguments).logits[:, -sequence.response_mask.shape[1] - 1 : -1]
        found.append((logits.float() / trainer.temperature).log_softmax(-1))
    return found[0], found[1]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of each token, ``[B, T]``, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def keep_signals(trainer: Any, monkeypatch: Any) -> list[tuple[dict[str, Any], Any, Any]]:
    """Batches, signals and factors, as the trainer makes factors of them."""
    kept = []
    plain = trainer._signal_factors

    def keeping(batch, signal, mode):
        kept.append((batch, signal, plain(batch, signal, mode)))
        return kept[-1][2]

    monkeypatch.setattr(trainer, "_signal_factors", keeping)
    return kept


SOURCES = {
    "a pass of its own": {"gradient_accumulation_steps": 2},
    "TRL's pass": {"num_iterations": 2},
    "the pass of the loss": {},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_follow_from_the_divergence_of_full_logits(tmp_path, monkeypatch, family, preset, source):
    settings = {"vgpo": preset, "signal": "dependency", "view": "blank", "per_device_train_batch_size": 16}
    if source == "a pass of its own":  # in slices
        settings["per_device_train_batch_size"] = 8
    trainer = build(tmp_path, family, **settings, **SOURCES[source])
    if source == "TRL's pass":
        monkeypatch.setattr(trainer, "_scoring_pass", lambda *_: pytest.fail("a pass of its own"))
    kept = keep_signals(trainer, monkeypatch)
    inputs = generation_batch(trainer)
    micro_batch = trainer._prepare_inputs(inputs)
    if source == "the pass of the loss":
        assert not kept
        trainer._compute_loss(trainer.model, micro_batch)
    ((batch, signal, found),) = kept
    mask = Sequences.of(batch).response_mask.bool()
    with torch.no_grad():
        kl = divergence(*both_views(trainer, batch))
    torch.testing.assert_close(signal.shown, kl * mask, atol=2e-5, rtol=2e-5)
    assert kl[mask].std() > 1e-2

    score = 1 - (-kl.double().clamp(min=0)).exp()
    config = trainer.args.vgpo_config()
    cos = 2 * score - 1 if config.score == "affine" else score
    expected = visual_weights(cos, mask, batch["prompt_group"], None, None, config.as_floats())[0].float()
    torch.testing.assert_close(found.factors[mask], expected[mask], atol=1e-3, rtol=1e-3)
    assert expected[mask].std() > 0.1
    assert trainer._metrics["train"]["vgpo/visual_focus"] == [pytest.approx(kl[mask].mean().item(), rel=1e-4)]


@pytest.mark.parametrize("config", [VGPOConfig.paper(), VGPOConfig.released()])
def test_scores_of_divergences(config):
    """Order is kept, nothing is 0, and no token's divergence makes those of the others vanish; faults stay faults."""
    kl = torch.tensor([[0.0, -1e-7, 0.01, 0.5, 40.0], [0.3, 0.2, 0.1, 0.2, math.inf], [0.3, 0.2, 0.1, 0.2, math.nan]])
    mask = torch.ones_like(kl, dtype=torch.bool)
    batch = SignalBatch(torch.ones(3, 7, dtype=torch.bool), mask, torch.ones(3, 7))
    signal = DependencySignal(batch, SignalSettings(config))
    signal.take(Comparison(kl=kl[:2]))
    with pytest.raises(RuntimeError, match="2 of 3 responses passed in two views"):
        _ = signal.values
    signal.take(Comparison(kl=kl[2:]))
    found = compute_factors(
        signal.marked_values(), mask, torch.tensor([0, 1, 2]), config, gather=lambda tensor: tensor, process_index=0
    )
    score = [0.0, 0.0, 1 - math.exp(-0.01), 1 - math.exp(-0.5), 1.0]
    expected = torch.tensor([[2 * value - 1 if config.score == "affine" else value for value in score]])
    torch.testing.assert_close(signal.values[:1], expected)
    assert found.weighted.tolist() == [True, False, False] and found.nonfinite == 2
    assert (found.psi[0].diff()[1:] > 0).all() and found.psi[0, 3] - found.psi[0, 0] > 0.25


def count_passes(trainer: Any, monkeypatch: Any) -> dict[str, list[Any]]:
    """What runs once responses are generated: rows and whether with a graph, of the decoder; rows, of heads."""
    ran: dict[str, list[Any]] = {"decoder": [], "head": [], "linear_logprob": [], "linear_divergence": []}
    generate = trainer._generate

    def count(name: str, plain: Any) -> Any:
        def counting(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            ran[name].append(hidden.shape[0])
            return plain(hidden, *rest, **named)

        return counting

    def generating(prompts: list[Any]) -> Any:
        generated = generate(prompts)
        _, decoder = decoder_of(trainer.model)
        for name, module in (("decoder", decoder), ("head", trainer.model.get_output_embeddings())):
            module.register_forward_hook(
                lambda module, arguments, output, name=name: ran[name].append(graph_of(output))
            )
        for name in ("linear_logprob", "linear_divergence"):
            monkeypatch.setattr(fused_head, name, count(name, getattr(fused_head, name)))
        return generated

    def graph_of(output: Any) -> tuple[int, bool]:
        states = output if isinstance(output, Tensor) else output.last_hidden_state
        return states.shape[0], states.requires_grad

    monkeypatch.setattr(trainer, "_generate", generating)
    return ran


@pytest.mark.parametrize("source", SOURCES)
def test_the_other_view_is_one_more_pass_without_the_head(tmp_path, monkeypatch, source):
    """Of 16 responses in slices of eight or, in the pass of the loss, at once."""
    counts = {}
    in_loss = source == "the pass of the loss"
    for signal in ("focus", "dependency"):
        settings = {"signal": signal, "per_device_train_batch_size": 16 if in_loss else 8, **SOURCES[source]}
        trainer = build(tmp_path / signal, **{"gradient_accumulation_steps": 1 if in_loss else 2, **settings})
        with monkeypatch.context() as patch:
            counts[signal] = count_passes(trainer, patch)
            batch = trainer._prepare_inputs(generation_batch(trainer))
            if in_loss:
                trainer._compute_loss(trainer.model, batch)
    focus, dependency = counts["focus"], counts["dependency"]
    assert dependency["linear_logprob"] == focus["linear_logprob"]
    if in_loss:
        assert (focus["decoder"], dependency["decoder"]) == ([(16, True)], [(16, False), (16, True)])
        assert dependency["linear_divergence"] == [16]
    else:
        assert (focus["decoder"], dependency["decoder"]) == ([(8, False)] * 2, [(8, False)] * 4)
        assert dependency["linear_divergence"] == [8, 8]
    assert not dependency["head"] and not focus["linear_divergence"]


def view_of(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs in the spoilt view that a batch brought along."""
    sequence = Sequences.of(batch)
    inputs = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask}
    inputs |= {name: batch[name] for name in FORWARD_INPUTS if batch.get(name) is not None}
    told = {name.removeprefix("view_"): value for name, value in batch.items() if name.startswith("view_")}
    if trainer.args.view == "none":
        return spoilt_view(inputs, "none", trainer.model, response_mask=sequence.response_mask)
    return inputs | {name: torch.cat(value) if isinstance(value, list) else value for name, value in told.items()}


def test_swap_shows_the_image_of_another_prompt(tmp_path, monkeypatch):
    trainer = build(tmp_path, "llava", [1, 1], view_coef=0.1, shuffle_dataset=False)
    kept = capture_unshuffled(trainer, monkeypatch)
    trainer._prepare_inputs(generation_batch(trainer))
    own = kept[0]["pixel_values"]
    assert not torch.equal(own[0], own[4])
    other = torch.cat(kept[0]["view_pixel_values"])
    assert all(torch.equal(other[row], own[4 if row < 4 else 0]) for row in range(8))


TERMS = {
    "exact": {},
    "exact, detached": {"view_detach": True},
    "exact, clamped": {"view_clamp": 1.0},
    "k3": {"view_estimator": "k3"},
    "k3, detached": {"view_estimator": "k3", "view_detach": True},
    "none": {"view": "none"},
    "checkpointing": {"gradient_checkpointing": True},
    "VGPO": {"vgpo": "paper", "signal": "dependency"},
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_term_is_that_of_full_logits(tmp_path, family, term):
    """Advantages of 0 leave the term alone in the loss."""
    settings = {"vgpo": None, "loss_type": "grpo", "view_coef": 0.5, **TERMS[term]}
    trainer = build(tmp_path, family, [1, 2], **settings)
    batch = trainer._prepare_inputs(generation_batch(trainer))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    if "view_clamp" in settings:
        with torch.no_grad():
            kl = divergence(*both_views(trainer, batch, view_of(trainer, batch)))
        trainer.args.view_clamp = limit = kl[batch["completion_mask"] > 0].quantile(0.6).item()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    parameters = dict(trainer.model.named_parameters())
    found = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    trainer.model.zero_grad()

    p, q = both_views(trainer, batch, view_of(trainer, batch))
    q = q.detach() if settings.get("view_detach") else q
    if settings.get("view_estimator") == "k3":
        targets = batch["completion_ids"][..., None]
        ratio = (q.gather(-1, targets) - p.gather(-1, targets))[..., 0]
        values = (ratio.exp() - ratio - 1).clamp(max=10)
    else:
        values = divergence(p, q)
    mask = Sequences.of(batch).response_mask
    if "view_clamp" in settings:
        assert 0 < (values[mask.bool()] > limit).float().mean() < 1
        values = values.clamp(max=limit)
    expected = -0.5 * ((values * mask).sum(1) / mask.sum(1)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.item() < 0
    wanted = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert found.keys() == wanted.keys() and largest > 1e-4
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 2e-4 * largest, name


def test_logits_are_scaled_and_capped_in_both_views(tmp_path):
    """As the model's own are, which full logits show."""
    model = transforming(lambda logits: 2 * torch.tanh(0.25 * logits / 2))
    text = model.config.get_text_config()
    text.logit_scale, text.final_logit_softcapping = 0.25, 2.0
    trainer = build(tmp_path, model=model, view="blank", view_coef=0.5, loss_type="grpo", vgpo=None)
    batch = trainer._prepare_inputs(generation_batch(trainer))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    loss = trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        kl, mask = divergence(*both_views(trainer, batch)), batch["completion_mask"]
    assert loss.item() == pytest.approx(-0.5 * ((kl * mask).sum(1) / mask.sum(1)).mean().item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.8, 0.02])
def test_papos_estimator_is_policy_losss(tmp_path, monkeypatch, temperature):
    """Its k3 term, against a reference whose log-probabilities are the other view's; clamped as verl's if large."""
    settings = {"vgpo": None, "view_coef": 0.5, "view_estimator": "k3", "view_detach": True}
    trainer = build(tmp_path, "llava", [1, 1], temperature=temperature, **settings)
    batch = trainer._prepare_inputs(generation_batch(trainer))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    kept = []
    plain = trainer._view_term

    def keeping(inputs, views, mode):
        kept.append(views._found[0])
        return plain(inputs, views, mode)

    monkeypatch.setattr(trainer, "_view_term", keeping)
    loss = trainer._compute_loss(trainer.model, batch)
    (found,) = kept
    mask = batch["completion_mask"]
    logp = found.view_logp.detach().requires_grad_()
    estimator = "k3" if temperature == TEMPERATURE else "k3_clamped"
    theirs = policy_loss(
        logp,
        None,
        batch["advantages"],
        mask,
        ref_logp=found.other_logp.detach(),
        kl_coef=1.0,
        kl_estimator=estimator,
        num_tokens=batch["num_items_in_batch"],
    )
    assert loss.item() == pytest.approx(-0.5 * theirs.loss.item(), rel=1e-5)
    ratio = (found.other_logp - found.view_logp)[mask.bool()]
    assert (ratio.exp() - ratio - 1 > 10).any() == (estimator == "k3_clamped")
    (ours,) = torch.autograd.grad(loss, found.view_logp)
    (slope,) = torch.autograd.grad(theirs.loss, logp)
    torch.testing.assert_close(ours * mask, -0.5 * slope * mask, atol=1e-7, rtol=1e-4)


def test_an_exact_divergence_is_what_the_estimator_estimates(tmp_path):
    """Over all tokens instead of the sampled one, weighted by their probabilities."""
    trainer = build(tmp_path, "llava", [1, 1], view="blank", vgpo=None, view_coef=0.5)
    batch = trainer._prepare_inputs(generation_batch(trainer))
    with torch.no_grad():
        p, q = both_views(trainer, batch)
    ratio = q - p
    torch.testing.assert_close((p.exp() * (ratio.exp() - ratio - 1)).sum(-1), divergence(p, q), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_half_precision_under_autocast(tmp_path, detach):
    """A pass without a graph must not leave its casts of the weights to the pass that needs one."""
    settings = {"vgpo": None, "view": "blank", "view_coef": 1.0, "view_detach": detach}
    slopes = []
    for bf16 in (True, False):
        trainer = build(tmp_path, "qwen2_5_vl", [1, 2], bf16=bf16, **settings)
        if not slopes:
            batch = trainer._prepare_inputs(generation_batch(trainer))
        batch["advantages"] = torch.zeros_like(batch["advantages"])
        trainer._compute_loss(trainer.model, dict(batch)).backward()
        named = trainer.model.named_parameters()
        slopes.append({name: weight.grad for name, weight in named if weight.grad is not None})
    half, full = slopes
    assert half.keys() == full.keys()
    one, other = (torch.cat([slope.flatten().float() for slope in of.values()]) for of in slopes)
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


def test_lora_beside_a_reference(tmp_path, monkeypatch):
    """TRL's pass for the reference, the policy without its adapter, passes one view."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    settings = {"signal": "dependency", "view": "mask", "view_coef": 0.1, "num_iterations": 2, "beta": 0.1}
    trainer = build(tmp_path, arguments={"peft_config": adapter}, gradient_accumulation_steps=2, **settings)
    kept = keep_signals(trainer, monkeypatch)
    ran = count_passes(trainer, monkeypatch)
    batch = trainer._prepare_inputs(generation_batch(trainer))
    assert len(ran["decoder"]) == 6 and "ref_per_token_logps" in batch  # slices of two views, then of the reference
    ((whole, signal, _),) = kept
    mask = Sequences.of(whole).response_mask
    with torch.no_grad():
        kl = divergence(*both_views(trainer, whole, view_of(trainer, whole)))
    torch.testing.assert_close(signal.shown, kl * mask, atol=2e-5, rtol=2e-5)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    slopes = [weight.grad for name, weight in trainer.model.named_parameters() if "lora_" in name]
    assert slopes and all(slope is not None and slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("signal", ["focus", "attention"])
def test_another_signal_is_read_of_the_model_as_it_is(tmp_path, monkeypatch, signal):
    """Beside the term of the loss, in whose pass the spoilt view goes by as well."""
    found = []
    for folder, settings in {"with": {"view": "mask", "view_coef": 0.1}, "without": {}}.items():
        trainer = build(tmp_path / folder, signal=signal, seed=3, **settings)
        kept = keep_signals(trainer, monkeypatch)
        torch.manual_seed(0)
        batch = trainer._prepare_inputs(generation_batch(trainer))
        trainer._compute_loss(trainer.model, batch)
        found.append((batch["completion_ids"], kept[0][1].shown, kept[0][2].factors))
        assert len(kept) == 1
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_rows_of_text_have_neither_signal_nor_term(tmp_path):
    settings = {"signal": "dependency", "view_coef": 0.1, "max_steps": 1}
    trainer = build(tmp_path, "qwen2_5_vl", [1, 0, 1, 0], per_device_train_batch_size=16, **settings)
    trainer.train()
    for sample in trainer.rollout_samples:
        if not sample.images:
            assert all(factor == 1 for factor in sample.factors) and all(math.isnan(value) for value in sample.cos)
        else:
            assert all(value >= 0 for value in sample.cos) and max(sample.cos) > 0
    (first, *_) = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert first["vgpo/weighted_share"] == pytest.approx(0.5) and first["vgpo/view_kl"] > 0
    assert first["vgpo/view_kl"] == pytest.approx(first["vgpo/visual_focus"], rel=1e-4)  # of rows with images alone
    text = build(tmp_path / "text", "qwen2_5_vl", [0] * 4, **settings)
    text.train()
    (record,) = [record for record in text.state.log_history if "loss" in record]
    assert record["vgpo/view_kl"] is None and record["vgpo/weighted_share"] == 0


def test_images_that_tools_show(tmp_path, monkeypatch):
    """A token before the first image has no signal; the others depend on images in their prompt and their answer."""
    trainer, _ = make_with_tool(tmp_path, monkeypatch, zoom_to_picture, [1, 0], signal="dependency", view="blank")
    kept = keep_signals(trainer, monkeypatch)
    trainer._generate_and_score_completions(generation_batch(trainer))
    ((batch, signal, found),) = kept
    _, images, scored = states_and_places(trainer, batch)
    seen = images.cumsum(1)[:, -scored.shape[1] :] > 0
    with torch.no_grad():
        kl = divergence(*both_views(trainer, batch))
    marked = signal.marked_shown()
    assert torch.equal(marked.isnan(), scored & ~seen) and (scored & ~seen).any()
    torch.testing.assert_close(marked[scored & seen], kl[scored & seen], atol=2e-5, rtol=2e-5)
    assert kl[scored & ~seen].abs().max() < 1e-6  # nothing before an image depends on it
    assert found.weighted.tolist() == [True] * 7 + [False]
    assert torch.equal(trainer._views.counted(batch), scored & seen)


def test_a_batch_of_one_image_has_nothing_to_swap(tmp_path):
    same = [
        {"prompt": [{"role": "user", "content": "Add."}], "images": [picture(1, 24)], "answer": str(row)}
        for row in range(4)
    ]
    trainer = build(tmp_path, images=Dataset.from_list(same), signal="dependency", view_coef=0.1, max_steps=2)
    with pytest.warns(UserWarning, match="swap finds no other image.*neither a signal nor a term"):
        trainer.train()
    record = trainer.state.log_history[0]
    assert record["vgpo/weighted_share"] == 0 and record["vgpo/view_kl"] is None
    assert all(factor == 1 for sample in trainer.rollout_samples for factor in sample.factors)


@pytest.mark.parametrize("view", ["swap", pytest.param("noise", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_its_views(tmp_path, view):
    settings = {"signal": "dependency", "view": view, "view_coef": 0.1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"max_steps": 3, "lr_scheduler_type": "constant"}
    whole = build(tmp_path / "whole", "llava", [1] * 8, **settings)
    whole.train()
    again = build(tmp_path / "whole", "llava", [1] * 8, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    one, other = (
        {record["step"]: record for record in trainer.state.log_history if "loss" in record}
        for trainer in (whole, again)
    )
    for name in ("reward", "completions/mean_length", "vgpo/visual_focus", "vgpo/view_kl", "vgpo/phi_std", "loss"):
        assert other[3][name] == pytest.approx(one[3][name], rel=1e-4, abs=1e-6), name
    seeds = set()
    for process in (0, 1):
        for step in (0, 1):
            whole._views._process_index = process
            whole._views.begin(torch.zeros(1), step)
            seeds.add(whole._views._seed)
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[pytest.mark.slow] if place and kind not in ("swap", "none") else [])
        for place, family in enumerate(FAMILIES)
        for kind in VIEWS
    ],
)
def test_runs_with_every_view(tmp_path, family, kind):
    settings = {"signal": "dependency", "view": kind, "view_coef": 0.01, "view_clamp": 1.0, "view_estimator": "k3"}
    trainer = build(
        tmp_path,
        family,
        arguments={"eval_dataset": rows([1, 2], size=48 if family == "llava" else 16)},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        **settings,
    )
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    for prefix in ("", "eval_"):
        (record,) = [record for record in records if prefix + "loss" in record]
        kl, k3, clamped = (record[f"{prefix}vgpo/view_{name}"] for name in ("kl", "k3", "clamped"))
        assert kl > 0 and k3 > 0 and 0 <= clamped < 1
        assert record[prefix + "vgpo/visual_focus"] > 0 and record[prefix + "vgpo/weighted_share"] == 1
    assert record["eval_vgpo/visual_focus"] == pytest.approx(record["eval_vgpo/view_kl"], rel=1e-4)
    assert any(not torch.equal(weight, weights[name]) for name, weight in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signal": "dependency", "view": "upside down"}, "view must be one of swap|view must be one of mask"),
        ({"view": "mask"}, "view has no effect with signal='focus' and view_coef=0"),
        ({"view": "mask", "signal": "dependency", "vgpo": None}, "view has no effect"),
        ({"signal": "dependency", "view_clamp": 1.0}, "view_clamp has no effect with view_coef=0"),
        ({"view_coef": -0.1}, "view_coef must be finite and not negative"),
        ({"view_coef": 0.1, "view_clamp": 0.0}, "view_clamp must be positive"),
        ({"view_coef": 0.1, "view_estimator": "k2"}, "view_estimator must be one of exact, k3"),
        ({"view_coef": 0.1, "fused_head": False}, "needs fused_head=True"),
        ({"view_coef": 0.1, "torch_compile": True, "vgpo": None}, "torch_compile"),
        ({"view_coef": 0.1, "loss_type": "ppo", "vgpo": None}, "loss_type must be one of"),
        ({"signal": "dependency", "per_device_train_batch_size": 4}, "view='swap' takes the image of another prompt"),
        ({"signal": "dependency", "view": "swap", "view_strength": 0.5}, "swap has no strength"),
        ({"signal": "dependency", "view": "mask", "view_strength": 2.0}, "strength of mask is a share"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)


def test_every_kind_of_view_is_offered():
    assert VIEWS == KINDS


def test_arguments_of_the_trainer_and_the_command_line(tmp_path):
    trainer = build(tmp_path, arguments={"signal": "dependency", "view": "mask"})
    assert (trainer.args.signal, trainer.args.view) == ("dependency", "mask")
    asked = ["--model", "m", "--dataset", "d", "--out", str(tmp_path), "--signal", "dependency", "--view", "noise"]
    options = parse_options([*asked, "--use_cpu", "true", "--view_coef", "0.02"])
    training = options.training
    assert (training.signal, training.view, training.view_coef) == ("dependency", "noise", 0.02)
    assert train.run_identity(options)["view"] == "noise"
    assert VGPOTrainingConfig(str(tmp_path), use_cpu=True, bf16=False).view == "swap"


def test_diagnostics_leave_the_loss_alone(tmp_path):
    """One more pass, which is only looked at."""
    losses = []
    for signal in ("focus", "dependency"):
        trainer = build(tmp_path / signal, vgpo=None, vgpo_diagnostics=True, signal=signal, max_steps=1)
        trainer.train()
        (record,) = [record for record in trainer.state.log_history if "loss" in record]
        assert record["vgpo/psi_std"] > 0 and "vgpo/view_kl" not in record
        losses.append((record["loss"], record["grad_norm"]))
    assert losses[0] == losses[1]

"""The factors a trainer puts into its loss, against those of a whole rollout batch at once."""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
import transformers
from trainer.tiny_runs import FAMILIES, generation_batch, last_hidden_states, make_trainer, picture, rows
from vgpo_trainer.rollouts import prompt_id, prompt_text, row_images
from vgpo_trainer.signals.factors import compute_factors, count_groups, late_early_ratio
from vgpo_trainer.signals.reader import PolicyPasses, image_positions
from vgpo_trainer.trl_surface import Sequences

from vgpo_kernels import VGPOConfig, model_surface, visual_focus, visual_weights
from vgpo_kernels.integrations.transformers import visual_mask, visual_token_ids


def hidden_and_masks(trainer, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states the expensive way, image tokens and scored tokens of a batch."""
    sequence, hidden = Sequences.of(batch), last_hidden_states(trainer, batch)
    mask = sequence.response_mask.bool()
    shown = visual_mask(sequence.input_ids, trainer.model)
    shown[:, -mask.shape[1] :] = False
    return hidden, shown, mask


def defined_factors(trainer, rows_of_batch: list[dict[str, Any]], batch: dict[str, Any], config: VGPOConfig):
    """The factors by definition: groups by answer, one call over everything.

    ``batch`` is in the order of ``rows_of_batch``, before TRL shuffles it.
    """
    hidden, shown, mask = hidden_and_masks(trainer, batch)
    cos = visual_focus(hidden, shown, mask)
    groups = torch.tensor([int(row["answer"]) for row in rows_of_batch])
    return visual_weights(cos, mask, groups, config, has_visual=shown.any(dim=1)), mask


def capture_unshuffled(trainer, monkeypatch) -> list[dict[str, Any]]:
    """Keep each generation batch as it is before TRL shuffles it."""
    kept = []
    plain = type(trainer)._generate_and_score_completions

    def keeping(inputs):
        batch = plain(trainer, inputs)
        kept.append(dict(batch))
        return batch

    monkeypatch.setattr(trainer, "_generate_and_score_completions", keeping)
    return kept


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_follow_the_rollouts_through_shuffle_and_split(tmp_path, monkeypatch, family, preset):
    """Four micro-batches of four rows from four prompts, which have one to three images."""
    dataset = rows([1, 2, 3, 1])
    trainer = make_trainer(tmp_path, family=family, dataset=dataset, vgpo=preset, gradient_accumulation_steps=4)
    trainer.model.train()
    assert trainer.args.signal_source() == "scoring"
    kept = capture_unshuffled(trainer, monkeypatch)
    inputs = generation_batch(trainer)
    torch.manual_seed(7)
    trainer._prepare_inputs(inputs)
    expected, mask = defined_factors(trainer, inputs, kept[0], trainer.args.vgpo_config())

    seen = []
    groups_a_micro_batch = []
    for micro_batch in trainer._buffered_inputs:
        for row, index in enumerate(micro_batch["rollout_index"].tolist()):
            valid = mask[index]
            assert torch.equal(micro_batch["completion_mask"][row].bool(), valid)
            torch.testing.assert_close(
                micro_batch["visual_factors"][row][valid], expected.factors[index][valid], atol=2e-5, rtol=2e-5
            )
            seen.append(index)
        groups_a_micro_batch.append(micro_batch["prompt_group"].unique().numel())
    assert sorted(seen) == list(range(16))
    assert max(groups_a_micro_batch) > 1, "TRL should have mixed the prompts"
    assert expected.factors[mask].std() > 0.1


def test_both_sources_give_the_same_factors(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.args.signal_source() == "loss"
    inputs = generation_batch(trainer)
    signals = []
    plain = trainer._signal_factors

    def keeping(batch, signal, mode):
        signals.append((batch["rollout_index"], plain(batch, signal, mode)))
        return signals[-1][1]

    monkeypatch.setattr(trainer, "_signal_factors", keeping)
    torch.manual_seed(8)
    trainer._compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    monkeypatch.setattr(trainer.args, "vgpo_signal", "scoring")
    trainer._step = 0
    torch.manual_seed(8)
    assert "visual_factors" in trainer._prepare_inputs(inputs)
    (order, from_loss), (_, from_scoring) = signals
    torch.testing.assert_close(from_loss.factors, from_scoring.factors[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(from_loss.phi, from_scoring.phi[order], atol=1e-5, rtol=1e-5)
    assert from_loss.phi.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_pass_for_old_log_probs_is_reused(tmp_path, monkeypatch, lora):
    """With num_iterations=2 TRL scores the policy anyway; a LoRA model then passes twice, the second as reference."""
    arguments = {}
    if lora:
        peft = pytest.importorskip("peft")
        arguments["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    trainer = make_trainer(
        tmp_path, arguments=arguments, num_iterations=2, gradient_accumulation_steps=2, beta=0.1 if lora else 0.0
    )
    trainer.model.train()
    monkeypatch.setattr(trainer, "_scoring_pass", lambda *_: pytest.fail("a pass of its own"))
    kept = capture_unshuffled(trainer, monkeypatch)
    inputs = generation_batch(trainer)
    trainer._prepare_inputs(inputs)
    expected, mask = defined_factors(trainer, inputs, kept[0], VGPOConfig.paper())
    torch.testing.assert_close(kept[0]["visual_factors"][mask], expected.factors[mask], atol=2e-5, rtol=2e-5)
    assert ("ref_per_token_logps" in kept[0]) == lora


def test_old_log_probs_of_no_pass_are_refused():
    passes, logp = PolicyPasses(), torch.zeros(2, 3)
    passes.add(torch.zeros(2, 3), None)
    with pytest.raises(RuntimeError, match="old log-probabilities did not come from a pass"):
        passes.that_returned(logp)


def test_a_pass_of_its_own_leaves_out_the_head(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    trainer.model.train()
    widths = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, output: widths.append(output.shape[1]))
    inputs = generation_batch(trainer)
    batch = trainer._generate_and_score_completions(inputs)
    widths.clear()
    trainer._scoring_pass(batch, "train")
    assert widths == [1, 1]  # two slices of four rows, one position each


class Exchange:
    """Gathers between threads that stand for processes."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.shares: list[Any] = [None] * size

    def gather(self, process: int, tensor: torch.Tensor) -> torch.Tensor:
        self.shares[process] = tensor
        self.barrier.wait()
        everything = torch.cat(self.shares)
        self.barrier.wait()
        return everything


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_two_processes_have_the_signal_of_one(preset):
    """They hold halves of a batch whose groups straddle them; an image is missing, and a response is empty."""
    cos = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 1, 0, 9, 12, 5])[:, None]
    groups = torch.tensor([5, 9, 9, 5, 9, 7, 5, 9])
    cos[2] = torch.nan
    cos[1, :2] = torch.tensor([-0.9, torch.inf])  # spoilt, and so not the smallest of the batch
    config = VGPOConfig.paper() if preset == "paper" else VGPOConfig.released()
    whole = visual_weights(cos, mask, groups, config)
    exchange = Exchange(2)

    def process(index: int):
        half = slice(4 * index, 4 * index + 4)
        gather = partial(exchange.gather, index)
        return compute_factors(cos[half], mask[half], groups[half], config, gather=gather, process_index=index)

    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(process, range(2)))
    # The reference compares unrounded scores when it sees the whole batch.
    torch.testing.assert_close(torch.cat([share.phi for share in shares]), whole.phi, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([share.psi for share in shares]), whole.psi)
    torch.testing.assert_close(torch.cat([share.factors for share in shares]), whole.factors, atol=1e-6, rtol=1e-6)
    assert whole.phi.abs().max() > 0.1
    ratios = torch.cat([share.late_early for share in shares])
    assert ratios.nanmean().item() == pytest.approx(whole.metrics["late_early_ratio"].item(), rel=1e-5)
    assert ratios.isnan().tolist() == [False, True, True, True, True, False, False, False]
    for share in shares:  # 5 has three weighted responses, 7 and 9 one each; those of 9 are of the second process
        assert (share.groups.item(), share.singleton_groups.item()) == (3, 2)
    assert [share.nonfinite.item() for share in shares] == [1, 0]


def test_groups_are_counted():
    generator = torch.Generator().manual_seed(2)
    for size in (0, 1, 2, 40, 41):
        groups = torch.randint(0, 15, (size,), generator=generator)
        weighted = torch.rand(size, generator=generator) > 0.4
        counts = Counter(group for group, there in zip(groups.tolist(), weighted.tolist(), strict=True) if there)
        number, alone = count_groups(groups, weighted)
        assert (number, alone) == (len(counts), sum(count == 1 for count in counts.values()))


def test_late_early_ratio_counts_valid_tokens():
    cos = torch.tensor([[1.0, 0.0, -1.0, 0.0, 0.5]])
    mask = torch.tensor([[True, True, False, True, True]])  # two early tokens, two late ones
    ratio = late_early_ratio(cos, mask, mask, VGPOConfig.paper())
    assert ratio.item() == pytest.approx((0.5 + 0.75) / (1.0 + 0.5))


def test_a_sampled_visual_token_is_no_image():
    image, video = 8, 9
    ids = torch.tensor([[image, image, 3, 4, video, 5], [0, 7, 3, image, 4, 4]])
    attention = (ids != 0).long()
    response = torch.tensor([[1, 1, 1], [0, 1, 1]])  # the second response's first token is a tool's image
    shown = image_positions(ids, attention, response, (image, video))
    assert shown.tolist() == [[True, True, False, False, False, False], [False, False, False, True, False, False]]


def test_prompt_ids_tell_prompts_and_images_apart():
    row = {"prompt": [{"role": "user", "content": "Add the digits."}], "images": [picture(1)], "answer": "3"}
    assert prompt_id(row) == prompt_id({**row, "answer": "4", "images": [picture(1)]})
    assert prompt_id(row) != prompt_id({**row, "images": [picture(2)]})
    assert prompt_id(row) != prompt_id({**row, "images": [picture(1), picture(1)]})
    assert prompt_id(row) != prompt_id({**row, "prompt": [{"role": "user", "content": "Add the digits"}]})
    assert prompt_id({"prompt": "a", "image": None}) == prompt_id({"prompt": "a"})
    assert prompt_id({**row, "prompt_id": 7}) == prompt_id({"prompt": "other", "prompt_id": 7})
    with pytest.raises(TypeError, match=r"images\[0\] is a set.*prompt_id"):
        prompt_id({**row, "images": [{1, 2}]})


def test_prompt_ids_see_the_images_inside_messages():
    def row(seed: int) -> dict[str, Any]:
        parts = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "What is it?"}]
        return {"prompt": [{"role": "user", "content": parts}]}

    assert prompt_id(row(1)) == prompt_id(row(1)) != prompt_id(row(2))
    assert prompt_text(row(1)["prompt"]) == "<image>What is it?"
    assert row_images(row(1)) == [picture(1)]


def test_unused_halves_of_a_text_only_batch_are_finite(tmp_path):
    """Without any image every factor is 1, and the records say so instead of failing."""
    trainer = make_trainer(tmp_path, family="qwen2_5_vl", dataset=rows([0] * 4), max_steps=1)
    trainer.train()
    assert all(factor == 1 for sample in trainer.rollout_samples for factor in sample.factors)
    assert all(math.isnan(sample.late_early_ratio) and sample.phi == 0 for sample in trainer.rollout_samples)
    assert trainer.state.log_history[0]["vgpo/weighted_share"] == 0
    assert trainer.state.log_history[0]["vgpo/visual_focus"] is None


@pytest.mark.parametrize("signal", ["focus", "attention"])
def test_a_model_that_nobody_knows_is_told(tmp_path, monkeypatch, signal):
    """Its norm and its visual tokens are found nowhere, so they are given; the factors are those of a known model."""
    known = make_trainer(tmp_path / "known", signal=signal, dataset=rows([1, 2]))
    token = visual_token_ids(known.model)
    monkeypatch.setattr(model_surface, "NORM_NAMES", ("ln_out",))
    with pytest.raises(TypeError, match="no final norm in LlavaForConditionalGeneration"):
        make_trainer(tmp_path, signal=signal)
    monkeypatch.setattr(model_surface, "VISUAL_TOKEN_NAMES", ("picture_token_id",))
    told = {"final_norm": "model.language_model.norm"}
    with pytest.raises(ValueError, match=r"config of llava has none.*nor its processor.*visual_tokens=\(id, \.\.\.\)"):
        make_trainer(tmp_path, signal=signal, arguments=told)
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration has no module model\.norm"):
        make_trainer(tmp_path, signal=signal, arguments={"final_norm": "model.norm"})
    for bad in (["<image>"], 3, [True], [], [0.5]):
        with pytest.raises(TypeError, match="visual_tokens must be ids"):
            make_trainer(tmp_path, signal=signal, arguments={**told, "visual_tokens": bad})
    for bad in ([-5], [10**9]):
        with pytest.raises(ValueError, match=r"visual_tokens must lie in \[0, \d+\)"):
            make_trainer(tmp_path, signal=signal, arguments={**told, "visual_tokens": bad})
    told["visual_tokens"] = np.array(token)
    for name in ("scoring", "loss"):
        trainer = make_trainer(
            tmp_path / name, signal=signal, arguments=told, vgpo_signal=name, dataset=rows([1, 2]), logging_steps=1
        )
        trainer.train()
        (record, *_) = [line for line in trainer.state.log_history if "vgpo/visual_focus" in line]
        assert record["vgpo/weighted_share"] == 1 and math.isfinite(record["vgpo/visual_focus"])


def test_visual_tokens_are_found_where_models_keep_them():
    phi = transformers.Phi4MultimodalConfig(vision_config={"image_token_id": 77})
    assert visual_token_ids(phi) == (77,)
    mini = transformers.MiniCPMV4_6Config()
    assert mini.image_token_id is None
    with pytest.raises(ValueError, match="config of minicpmv4_6 has none of image_token_id"):
        visual_token_ids(mini)
    assert visual_token_ids(mini, SimpleNamespace(image_token_id=5, video_token_id=6)) == (5, 6)

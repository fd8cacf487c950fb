"""The digit task, the tiny model with its processor, and the warm start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging
from vgpo_trainer import load_demo_model
from vgpo_trainer.demo.digits import (
    CELL,
    GRID,
    MAX_DIGITS,
    MAX_RESPONSE_TOKENS,
    MIN_DIGITS,
    exact_answer_reward,
    final_answer,
    make_problems,
    scan_indices,
    solution_text,
)
from vgpo_trainer.demo.evaluation import Evaluation, encode_prompts, evaluate
from vgpo_trainer.demo.tiny_vlm import IMAGE, RESPOND, build_model, build_processor
from vgpo_trainer.demo.warm_start import SHIPPED, WarmStartSettings, imitation_batch, load_checkpoint, warm_start

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_no_scan_is_in_both_splits():
    train = {scan for digit in scan_indices("train") for scan in digit}
    held_out = {scan for digit in scan_indices("held_out") for scan in digit}
    assert not train & held_out
    assert len(train | held_out) == 1797
    assert all(len(scans) > 40 for scans in scan_indices("held_out"))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_problems_keep_to_their_split_and_show_what_they_say(split):
    rows = scan_indices(split)
    for problem in make_problems(50, split, seed=3):
        assert MIN_DIGITS <= len(problem.digits) <= MAX_DIGITS
        assert list(problem.cells) == sorted(set(problem.cells))
        assert all(scan in rows[digit] for scan, digit in zip(problem.scans, problem.digits, strict=True))
        pixels = np.asarray(problem.image)
        inked = [
            cell
            for cell in range(GRID * GRID)
            if pixels[CELL * (cell // GRID) :, CELL * (cell % GRID) :][:CELL, :CELL].min() < 128
        ]
        assert inked == list(problem.cells)


def test_problems_are_reproducible_and_differ_by_seed_and_split():
    first, again = make_problems(20, "train", 1), make_problems(20, "train", 1)
    assert [(p.scans, p.cells) for p in first] == [(p.scans, p.cells) for p in again]
    assert [p.image.tobytes() for p in first] == [p.image.tobytes() for p in again]
    assert [p.scans for p in first] != [p.scans for p in make_problems(20, "train", 2)]
    assert [p.digits for p in first] != [p.digits for p in make_problems(20, "held_out", 1)]


def test_solution_of_the_documentation():
    assert solution_text([3, 8, 4]) == "0+3=3, 3+8=11, 11+4=15. 15"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("0+3=3, 3+8=11, 11+4=15. 15", "15"),
        ("nonsense. 7 ", "7"),
        ("0+3=3, 3+8=11, 11+4=15", None),  # cut short before it answered
        ("0+3=3. 1 5", None),
        ("15", None),
        ("", None),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_reward_takes_messages_and_texts_and_reports():
    told = {}
    rewards = exact_answer_reward(
        completions=["x. 15", [{"role": "assistant", "content": "x. 16"}], "x. 015"],
        answer=["15", "15", "15"],
        log_extra=lambda name, values: told.update({name: values}),
        log_metric=lambda name, value: told.update({name: value}),
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, 0.0]
    assert told == {"correct": [True, False, False], "accuracy": pytest.approx(1 / 3)}


def test_longest_solution_fits_and_round_trips(processor):
    longest = solution_text([9] * MAX_DIGITS)
    ids = processor.tokenizer(longest + processor.tokenizer.eos_token)["input_ids"]
    assert len(ids) == len(longest) + 1 <= MAX_RESPONSE_TOKENS
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == longest


def test_prompt_has_one_image_token_a_cell_and_pixels_in_range(processor):
    inputs = encode_prompts(processor, make_problems(3, "train", 0))
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens.count(IMAGE) == GRID * GRID
    assert tokens[-1] == RESPOND
    assert processor.tokenizer.unk_token not in tokens
    assert inputs["pixel_values"].shape == (3, 3, GRID * CELL, GRID * CELL)
    assert inputs["pixel_values"].min() >= -1 and inputs["pixel_values"].max() == 1


def test_a_row_is_what_the_chat_template_and_trl_take(processor, tmp_path):
    """All ways to the model's inputs give the same: by the row's text, by TRL's messages, and of a dataset on disk."""
    from datasets import Dataset
    from trl.data_utils import prepare_multimodal_messages

    problem = make_problems(1, "train", 0)[0]
    expected = encode_prompts(processor, [problem])
    Dataset.from_list([problem.row()]).to_parquet(tmp_path / "rows.parquet")
    for row in (
        problem.row(),
        Dataset.from_list([problem.row()])[0],
        Dataset.from_parquet(str(tmp_path / "rows.parquet"))[0],
    ):
        text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        messages = prepare_multimodal_messages(row["prompt"], images=[row["image"]])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        for found in (
            processor(text=text, images=row["image"], return_tensors="pt"),
            processor.apply_chat_template([messages], **options),
        ):
            assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "pixel_values"))


def test_labels_score_the_solution_and_nothing_else(processor):
    problems = make_problems(4, "train", 0)
    batch = imitation_batch(processor, problems)
    for ids, labels, problem in zip(batch["input_ids"], batch["labels"], problems, strict=True):
        scored = labels != -100
        assert torch.equal(ids[scored], labels[scored])
        assert processor.tokenizer.decode(ids[scored]) == problem.solution + processor.tokenizer.eos_token


def test_model_saves_and_loads_without_network(processor, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build_model(processor, seed=1).eval()
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    problems = make_problems(2, "train", 0)
    inputs, again = encode_prompts(processor, problems), encode_prompts(loaded_processor, problems)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, loaded(**again).logits, rtol=0, atol=0)


def test_weights_depend_on_the_seed_alone(processor):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (build_model(processor, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_warm_start_imitates_and_stops_at_its_target(processor):
    steps = []
    settings = WarmStartSettings(max_steps=12, settle_steps=0, batch_size=8, check_every=6, check_problems=4)
    warm_start(build_model(processor, 0), processor, 0, settings, steps.append)
    assert [progress.step for progress in steps] == list(range(1, 13))
    assert steps[-1].loss < steps[0].loss - 0.3
    assert [progress.step for progress in steps if progress.accuracy is not None] == [6, 12]
    steps.clear()
    satisfied = WarmStartSettings(
        target=0.0, max_steps=12, settle_steps=0, batch_size=8, check_every=2, check_problems=4
    )
    warm_start(build_model(processor, 0), processor, 0, satisfied, steps.append)
    assert len(steps) == 2


def test_shipped_checkpoint_solves_some_and_leaves_most_to_learn(capsys):
    shows = transformers_logging.is_progress_bar_enabled()
    model, processor = load_demo_model()
    assert capsys.readouterr().err == "" and transformers_logging.is_progress_bar_enabled() == shows
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    evaluation = evaluate(model, processor, make_problems(160, "held_out", 11))
    assert 0.15 < evaluation.accuracy < 0.55
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 6 * 1024**2
    assert not [file for file in SHIPPED.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_checkpoint_of_a_folder_without_one(tmp_path):
    with pytest.raises(OSError, match="no checkpoint in"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), method 3; the last mirrors the third.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_of_an_accuracy_is_wilsons(successes, trials, low, high):
    evaluation = Evaluation([""] * trials, [index < successes for index in range(trials)])
    assert evaluation.interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_no_problems_have_no_interval():
    with pytest.raises(ValueError, match="must be"):
        _ = Evaluation([], []).interval

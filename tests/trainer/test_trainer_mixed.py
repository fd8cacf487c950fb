"""Rows of text alone beside rows with images: they train unweighted, each on what it shows and on nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("trl")

from datasets import Dataset, concatenate_datasets
from PIL import Image
from trainer.definition import assert_factors, by_definition
from trainer.test_trainer_signal import capture_unshuffled, hidden_and_masks
from trainer.tiny_runs import FAMILIES, generation_batch, make_trainer, picture
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences, why_not_mixed

QUESTION = "Add the digits."


def row(kind: str, number: int, seed: int) -> dict[str, Any]:
    """A row with as many images, in a column or inside its message."""
    images = [picture(10 * seed + index) for index in range(number)]
    content: Any = QUESTION
    columns: dict[str, Any] = {"answer": str(seed)}
    if kind == "messages":
        parts = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": QUESTION}]
    elif kind == "image":
        columns["image"] = images[0] if images else None
    else:
        columns["images"] = images if images or kind == "empty lists" else None
    return {"prompt": [{"role": "user", "content": content}], **columns}


def mixed(kind: str, numbers: list[int]) -> Dataset:
    """A dataset of rows with as many images."""
    content = [row(kind, number, seed) for seed, number in enumerate(numbers)]
    if kind != "messages":
        return Dataset.from_list(content)
    # Messages of parts are made as they are read: a table would give each part the fields of every other.

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {name: [content[index][name] for index in batch["row"]] for name in content[0]}

    return Dataset.from_dict({"row": list(range(len(content)))}).with_transform(read)


def alone(trainer: Any, batch: dict[str, Any], index: int, image_rows: list[int]) -> torch.Tensor:
    """Log-probs of one response from a pass over its sequence alone, with its own images."""
    sequence = Sequences.of(batch)
    inputs: dict[str, Any] = {}
    if image_rows[index]:
        # One image a row, in order.
        place = sum(image_rows[:index])
        pixels = batch["pixel_values"]
        size = pixels.shape[0] // sum(image_rows)
        inputs["pixel_values"] = pixels[place * size : (place + 1) * size]
        if "image_grid_thw" in batch:
            inputs["image_grid_thw"] = batch["image_grid_thw"][place : place + 1]
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in batch:
            inputs[name] = batch[name][index : index + 1]
    with torch.no_grad():
        logits = trainer.model(
            input_ids=sequence.input_ids[index : index + 1],
            attention_mask=sequence.attention_mask[index : index + 1],
            **inputs,
        ).logits
    length = sequence.response_mask.shape[1]
    logp = logits[:, -length - 1 : -1].log_softmax(dim=-1)
    return logp.gather(-1, batch["completion_ids"][index : index + 1, :, None])[0, :, 0]


@pytest.mark.parametrize("kind", ["image", "images", "empty lists", "messages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_text_train_beside_rows_with_images(tmp_path, monkeypatch, family, kind):
    """Four micro-batches, of which some have no image; each row is scored with its own images, or with none."""
    numbers = [1, 0, 1, 0]
    trainer = make_trainer(
        tmp_path, family=family, dataset=mixed(kind, numbers), gradient_accumulation_steps=4, num_iterations=2
    )
    trainer.model.train()
    kept = capture_unshuffled(trainer, monkeypatch)
    torch.manual_seed(11)
    inputs = generation_batch(trainer)
    trainer._prepare_inputs(inputs)
    (batch,) = kept
    image_rows = [int(int(line["answer"]) % 2 == 0) for line in inputs]
    assert batch["num_images"] == image_rows and sum(image_rows) == 8
    mask = Sequences.of(batch).response_mask.bool()
    for index in range(16):
        logp = alone(trainer, batch, index, image_rows)
        torch.testing.assert_close(
            batch["old_per_token_logps"][index][mask[index]], logp[mask[index]], atol=2e-4, rtol=1e-4
        )

    hidden, shown, _ = hidden_and_masks(trainer, batch)
    expected, _ = by_definition(hidden, shown, mask, [place // 4 for place in range(16)])
    assert_factors(batch["visual_factors"], expected, mask)
    assert [(row == 1).all().item() for row in batch["visual_factors"]] == [not number for number in image_rows]
    assert max(weights.phi for weights in expected) > 0.1
    assert trainer._metrics["train"]["vgpo/weighted_share"] == [0.5]

    # The loss sees what each row was scored with, in whichever micro-batch it came.
    counts = [micro["num_images"] for micro in trainer._buffered_inputs]
    for micro in trainer._buffered_inputs:
        passed = {name: micro.get(name) for name in FORWARD_INPUTS}
        sequence = Sequences.of(micro)
        with torch.no_grad():
            logp, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, sequence.input_ids, sequence.attention_mask, mask.shape[1], **passed
            )
        valid = sequence.response_mask.bool()
        torch.testing.assert_close(logp[valid], micro["old_per_token_logps"][valid], atol=2e-4, rtol=1e-4)
    assert sum(sum(count) for count in counts) == 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["image", "images", "messages"])
def test_batches_of_text_come_between_batches_with_images(tmp_path, family, kind):
    """A whole run with evaluation, one response to a micro-batch; TRL's table of images keeps step with its rows."""
    seen = []

    def reward(completions: list[Any], prompts: list[Any], **columns: Any) -> list[float]:
        seen.append(columns.get("image"))
        return [float(len(answer[0]["content"]) % 3) for answer in completions]

    trainer = make_trainer(
        tmp_path,
        family=family,
        dataset=mixed(kind, [1, 0, 0, 1, 0, 1]),
        reward=reward,
        arguments={"eval_dataset": mixed(kind, [0, 1])},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=6,
        shuffle_dataset=False,
        eval_strategy="steps",
        eval_steps=3,
        per_device_eval_batch_size=4,
    )
    shares, tables = [], []
    plain = trainer.log

    def log(logs: dict[str, float], *rest: Any) -> None:
        tables.append((len(trainer._logs["prompt"]), [len(images) for images in trainer._logs["images"]]))
        plain(logs, *rest)

    trainer.log = log
    trainer.train()
    shares = [record["vgpo/weighted_share"] for record in trainer.state.log_history if "loss" in record]
    assert shares == [1, 0, 0, 1, 0, 1]
    steps = [record for record in trainer.state.log_history if "loss" in record]
    assert all(isinstance(record["loss"], float) for record in steps) and any(record["loss"] for record in steps)
    assert all(number == len(images) for number, images in tables if images)
    assert {0, 1} <= {count for _, images in tables for count in images}
    if kind == "image":
        assert [images[0] is None for images in seen[:3]] == [False, True, True]


def joined_rows() -> Dataset:
    """Two datasets joined, one with ``image`` and one with ``images``: each row has both columns, and one is None."""
    return concatenate_datasets([mixed("image", [1, 1]), mixed("images", [1, 1])])


def rows_with_empty_lists() -> Dataset:
    return Dataset.from_list([{**line, "images": line["images"] or []} for line in joined_rows()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dataset", [joined_rows, rows_with_empty_lists, None])
def test_the_image_that_is_there_is_shown(tmp_path, family, dataset):
    """As where all rows have a list of them; without a dataset, rows of text have no column, and come first."""
    contents = (mixed("image", [0, 1, 1, 1]), mixed("images", [0, 1, 1, 1]))
    if dataset is not None:
        contents = (dataset(), concatenate_datasets([mixed("images", [1, 1])] * 2))
    batches, shown = [], []
    for place, content in enumerate(contents):
        trainer = make_trainer(
            tmp_path / str(place),
            family=family,
            dataset=content,
            per_device_train_batch_size=16,
            shuffle_dataset=False,
        )
        trainer.model.train()
        inputs = generation_batch(trainer)
        if dataset is None and place == 0:
            inputs = [{name: value for name, value in line.items() if value is not None} for line in inputs]
        batches.append(trainer._generate_and_score_completions(inputs))
        samples = trainer._recorder._pending["train"]
        shown.append([[np.asarray(image).tolist() for image in sample.images] for sample in samples])
    assert shown[0] == shown[1] and batches[0]["num_images"] == batches[1]["num_images"] == list(map(len, shown[0]))
    assert sum(batches[0]["num_images"]) >= 12
    torch.testing.assert_close(batches[0]["pixel_values"], batches[1]["pixel_values"])


@pytest.mark.parametrize("kind", ["image", "images"])
def test_reward_functions_are_given_the_columns_of_the_dataset(tmp_path, kind):
    """One that takes no other names, and a missing image is None."""
    seen = []

    def image_reward(prompts, completions, completion_ids, image, answer, trainer_state, log_extra, log_metric):
        seen.append(image)
        return [float(len(completion[0]["content"]) % 2) for completion in completions]

    def images_reward(prompts, completions, completion_ids, images, answer, trainer_state, log_extra, log_metric):
        return image_reward(prompts, completions, completion_ids, images, answer, trainer_state, log_extra, log_metric)

    trainer = make_trainer(
        tmp_path,
        family="qwen2_5_vl",
        dataset=mixed(kind, [0, 1, 1, 0]),
        reward=image_reward if kind == "image" else images_reward,
        per_device_train_batch_size=16,
        shuffle_dataset=False,
        max_steps=1,
    )
    trainer.train()
    assert [image is None for image in seen[0][::4]] == [True, False, False, True]
    assert trainer.state.log_history[0]["vgpo/weighted_share"] == 0.5


class Question:
    """An environment that takes the columns of its rows and no others."""

    resets: ClassVar[list[Any]] = []

    def reset(self, prompt: list[dict[str, Any]], image: Image.Image | None, answer: str) -> None:
        self.resets.append(image)

    def get_reward(self) -> float:
        return float(len(self.resets) % 3)


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_environments_are_given_the_columns_of_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(Question, "resets", [])
    trainer = make_trainer(
        tmp_path,
        family="qwen_with_tools",
        dataset=mixed("image", [0, 1]),
        reward=None,
        arguments={"environment_factory": Question},
        per_device_train_batch_size=8,
        shuffle_dataset=False,
        max_steps=1,
    )
    trainer.train()
    assert [image is None for image in Question.resets[::4]] == [True, False]
    assert trainer.state.log_history[0]["vgpo/weighted_share"] == 0.5


def test_processors_that_trl_reads_wrongly_are_refused_by_row(tmp_path):
    """A processor as Idefics has it has a row of pixel values for each row, which TRL takes for one for each image."""
    names = {
        name: getattr(transformers, name).model_input_names
        for name in ("Idefics3ImageProcessorPil", "SmolVLMImageProcessorPil", "LlavaNextImageProcessorPil")
    }
    trainer = make_trainer(tmp_path, dataset=mixed("images", [1, 0, 1, 0]), gradient_accumulation_steps=4)
    plain = trainer.processing_class.image_processor
    assert why_not_mixed(trainer) is None
    for name, inputs in names.items():
        plain.model_input_names = inputs
        assert (why_not_mixed(trainer) is None) == (name == "LlavaNextImageProcessorPil")
    plain.model_input_names = names["Idefics3ImageProcessorPil"]
    with pytest.raises(RunFailure, match=r"^row \d+ of the generation batch, 'Add the digits\.', has no image while"):
        trainer.train()
    # Rows that are alike are nobody's trouble.
    make_trainer(tmp_path / "alike", dataset=mixed("images", [0, 0]), max_steps=1).train()


def test_arrangements_that_would_hang_are_refused():
    def trainer(**changes: Any) -> Any:
        given = {"processes": 2, "fsdp": False, "unused": True, "stage": None, **changes}
        plugin = None if given["stage"] is None else SimpleNamespace(zero_stage=given["stage"])
        return SimpleNamespace(
            processing_class=SimpleNamespace(),
            accelerator=SimpleNamespace(num_processes=given["processes"]),
            is_fsdp_enabled=given["fsdp"],
            args=SimpleNamespace(deepspeed_plugin=plugin, ddp_find_unused_parameters=given["unused"]),
        )

    assert why_not_mixed(trainer()) is None and why_not_mixed(trainer(stage=2)) is None
    assert why_not_mixed(trainer(processes=1, fsdp=True, unused=None)) is None
    assert "sharded" in why_not_mixed(trainer(fsdp=True))
    assert "sharded" in why_not_mixed(trainer(stage=3))
    assert "ddp_find_unused_parameters=True" in why_not_mixed(trainer(unused=None))

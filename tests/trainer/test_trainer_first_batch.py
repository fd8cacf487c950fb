"""What a run says of its first batch: nothing of a right one, and of a wrong one what is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trainer.tiny_runs import generation_batch, make_trainer, rows

from vgpo_kernels import BatchFindings, check_batch
from vgpo_kernels.integrations import surface


def said(trainer: Any) -> list[str]:
    """Run a step and return what is said of the first batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught]
    return [message.removeprefix("the first batch: ") for message in messages if message.startswith("the first batch")]


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"vgpo": None}, {"view_coef": 0.1, "view": "mask"}])
def test_nothing_is_said_of_a_right_batch(tmp_path: Path, monkeypatch: Any, settings: dict[str, Any]) -> None:
    looks: list[tuple[set[str], BatchFindings]] = []

    def look(**given: Any) -> BatchFindings:
        found = check_batch(**given)
        looks.append(({name for name, value in given.items() if value is not None}, found))
        return found

    monkeypatch.setattr(surface, "check_batch", look)
    trainer = make_trainer(tmp_path, max_steps=2, temperature=0.8, **settings)
    assert said(trainer) == []
    states = set() if "view_coef" in settings else {"hidden"}  # those of two views are not told apart
    assert [not found.unchecked for _, found in looks] == [True, bool(states)][: len(looks)]
    expected = [{"group_ids", "advantages", "visual_mask"}, {"logp", "model_or_head"} | states]
    if settings.get("vgpo", "paper") is None:
        expected = []
    assert len(looks) == len(expected), "each is looked at once"
    for (given, _), names in zip(looks, expected, strict=True):
        assert names <= given


def test_rows_of_text_are_right(tmp_path: Path) -> None:
    assert said(make_trainer(tmp_path, dataset=rows([0, 0, 0, 0]), max_steps=1)) == []


def test_a_prompt_id_of_several_prompts(tmp_path: Path) -> None:
    dataset = rows([1, 1, 1, 1]).map(lambda row, index: {**row, "prompt_id": index % 2}, with_indices=True)
    dataset = dataset.map(lambda row, index: {**row, "prompt": question(index)}, with_indices=True)
    trainer = make_trainer(tmp_path, dataset=dataset, max_steps=1, per_device_train_batch_size=16)
    (message,) = said(trainer)
    assert message.startswith("group-ids: group_ids put responses to different prompts or images into one group")


def question(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Add the digits{' .' * index}"}]


def test_image_tokens_of_another_id(tmp_path: Path) -> None:
    (message,) = said(make_trainer(tmp_path, max_steps=1, arguments={"visual_tokens": (0,)}))
    assert message.startswith("no-image: visual_mask is false everywhere: no response has an image")


def test_a_pass_at_another_temperature(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=16, temperature=0.8)
    trainer.temperature = 0.3  # the head was made with 0.8
    (message,) = said(trainer)
    assert message.startswith("temperature: logp fits a temperature of 0.8 instead of 0.3")


def test_an_evaluation_is_not_looked_at(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.eval()
    generation_batch(trainer)
    assert not trainer._first_batch._generated


def test_a_micro_batch_in_which_nothing_is_scored_is_not_the_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    batch = trainer._prepare_inputs(generation_batch(trainer))
    first = trainer._first_batch
    with first.watching(trainer.model):
        first.passed(batch | {"completion_mask": torch.zeros_like(batch["completion_mask"])}, torch.zeros(0))
    with first.watching(trainer.model):
        assert first._states == [], "the next one is watched"
    first.passed(batch, torch.zeros(batch["completion_ids"].shape, requires_grad=True))
    with first.watching(trainer.model):
        assert first._states is None

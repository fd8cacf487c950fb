"""Images that a tool shows in the middle of a response: real tool calls through TRL, of a model with a script."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from equations import factors
from torch import Tensor
from trainer.definition import assert_factors, by_definition
from trainer.test_trainer_signal import capture_unshuffled
from trainer.tiny_runs import generation_batch, last_hidden_states, make_trainer, picture
from transformers import LogitsProcessor, LogitsProcessorList
from vgpo_trainer.trl_surface import Sequences

LENGTH = 240


class Script(LogitsProcessor):
    """Lets a model say what is written for it, token by token, and then end."""

    def __init__(self, lines: list[list[int]], begin: int, end: int) -> None:
        self.lines, self.begin, self.end = lines, begin, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self.begin
        said = [line[place] if place < len(line) else self.end for line in self.lines]
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(said)), said] = 0.0
        return forced


def tool(show: Callable[[int], dict[str, Any]]) -> Callable[..., Any]:
    """A tool that the prompt describes alike whatever it shows."""

    def zoom(place: int) -> list[dict[str, Any]]:
        """Look closer.

        Args:
            place: Where.

        Returns:
            What is there.
        """
        return [show(place)]

    return zoom


zoom_to_picture = tool(lambda place: {"type": "image", "image": picture(100 + place, 16)})
# As many tokens as the picture of 16 x 16 pixels with its marks.
zoom_to_text = tool(lambda place: {"type": "text", "text": "abcdef"})


def call(place: int) -> str:
    return f'Look.\n<tool_call>\n{{"name": "zoom", "arguments": {{"place": {place}}}}}\n</tool_call>'


def first_words(place: int) -> str:
    """Every fourth response calls no tool; the others lead up to the call at different lengths."""
    return "No need: 12" if place % 4 == 3 else "abcdefghij"[: 3 * (place % 3) + 1] + " " + call(place)


def last_words(place: int) -> str:
    return "I see " + "0123456789"[place % 5 :]


def follow_script(trainer: Any, monkeypatch: Any, first: Callable[[int], str], last: Callable[[int], str]) -> None:
    """Let the trainer's model say ``first`` of a response's place in the batch, and ``last`` after a tool."""
    plain, tokenizer = trainer.model.generate, trainer.processing_class.tokenizer

    def generate(input_ids: Tensor, **named: Any) -> Any:
        lines = []
        for row, ids in enumerate(input_ids):
            called = re.findall(r'"place": (\d+)', tokenizer.decode(ids).rpartition("<|im_start|>user\n<tool_resp")[0])
            lines.append(last(int(called[-1])) if called else first(row))
        ids = [tokenizer(line)["input_ids"] for line in lines]
        script = Script(ids, input_ids.shape[1], tokenizer.eos_token_id)
        return plain(input_ids=input_ids, logits_processor=LogitsProcessorList([script]), **named)

    monkeypatch.setattr(trainer.model, "generate", generate)


def make(folder: Any, monkeypatch: Any, tool: Any, images: list[int], **settings: Any) -> tuple[Any, list[Any]]:
    """A trainer with a tool, and the generation batches that it will have made."""
    first, last = settings.pop("first", first_words), settings.pop("last", last_words)
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": "Read it."}], "images": [picture(row, 16)] * number}
            for row, number in enumerate(images)
        ]
    )
    trainer = make_trainer(
        folder,
        family="qwen_with_tools",
        dataset=dataset,
        reward=lambda completions, **_: [float(len(str(answer)) % 7) for answer in completions],
        arguments={"tools": [tool]},
        **{
            "per_device_train_batch_size": 4 * len(images),
            "vgpo_signal": "scoring",
            "max_completion_length": LENGTH,
            "shuffle_dataset": False,
            "rollout_samples": 100,
            "max_steps": 1,
            **settings,
        },
    )
    follow_script(trainer, monkeypatch, first, last)
    trainer.model.train()
    return trainer, capture_unshuffled(trainer, monkeypatch)


def states_and_places(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a batch, where its images are, ``[B, S]``, and its scored tokens, ``[B, T]``."""
    sequence, hidden = Sequences.of(batch), last_hidden_states(trainer, batch)
    scored = sequence.response_mask.bool()
    config = trainer.model.config
    shown = (sequence.input_ids == config.image_token_id) | (sequence.input_ids == config.video_token_id)
    shown[:, -scored.shape[1] :] &= ~scored
    return hidden, shown, scored


def test_factors_with_images_that_tools_show(tmp_path, monkeypatch):
    """A row with an image and a row without; each has three responses whose tool shows one, and one without a call."""
    trainer, _ = make(tmp_path, monkeypatch, zoom_to_picture, [1, 0])
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    assert batch["num_images"] == [2, 2, 2, 1, 1, 1, 1, 0] and batch["pixel_values"].shape[0] > 0
    hidden, images, scored = states_and_places(trainer, batch)
    expected, cosines = by_definition(hidden, images, scored, [0] * 4 + [1] * 4)
    leading = [sum(cos != cos for cos in row) for row in cosines]
    assert leading[:4] == [0] * 4
    assert all(0 < number < len(row) for number, row in zip(leading[4:7], cosines[4:7], strict=True))
    assert_factors(batch["visual_factors"], expected, scored)
    # Before its image a token has the factor of its response alone; without any image a response has none.
    before = batch["visual_factors"][4][scored[4]][: leading[4]]
    assert torch.allclose(before, torch.tensor(1 + expected[4].phi)) and expected[4].phi != 0
    assert (batch["visual_factors"][7] == 1).all() and expected[7].phi == 0
    samples = trainer.rollout_samples
    for sample, row in zip(samples, cosines, strict=True):
        shown = [cos for cos, is_scored in zip(sample.cos, sample.scored, strict=True) if is_scored]
        assert [cos != cos for cos in shown] == [cos != cos for cos in row]
        assert all(abs(one - other) < 1e-5 for one, other in zip(shown, row, strict=True) if other == other)
        assert all(cos == 0 for cos, is_scored in zip(sample.cos, sample.scored, strict=True) if not is_scored)
    record = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert record["vgpo/weighted_share"] == 7 / 8
    counted = [cos for row in cosines for cos in row if cos == cos]
    assert record["vgpo/visual_focus"] == pytest.approx(sum(counted) / len(counted), abs=1e-5)


def test_a_placeholder_that_the_policy_says_shows_nothing(tmp_path, monkeypatch):
    """It says one of a video, early in its answers, and calls no tool."""

    def first(place: int) -> str:
        return "ab<|video_pad|>" + "cdefghij"[place:]

    trainer, _ = make(tmp_path, monkeypatch, zoom_to_picture, [1, 0], first=first)
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    hidden, images, scored = states_and_places(trainer, batch)
    said = batch["completion_ids"] == trainer.model.config.video_token_id
    assert (said & scored).sum(dim=1).tolist() == [1] * 8 and images.sum() == 4 * 4
    expected, _ = by_definition(hidden, images, scored, [0] * 4 + [1] * 4)
    assert_factors(batch["visual_factors"], expected, scored)
    assert (batch["visual_factors"][4:] == 1).all() and batch["visual_factors"][:4][scored[:4]].std() > 0.1


def test_images_that_trl_drops_give_no_signal(tmp_path, monkeypatch):
    """An image token in the answer after the tool makes TRL train on the batch without its images."""

    def last(place: int) -> str:
        return last_words(place) + ("<|image_pad|>" if place == 1 else "")

    trainer, _ = make(tmp_path, monkeypatch, zoom_to_picture, [1, 1], last=last)
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    assert "pixel_values" not in batch and batch["num_images"] is None
    assert (batch["visual_factors"] == 1).all() and trainer._metrics["train"]["vgpo/weighted_share"] == [0]


def test_shares_of_attention_begin_with_the_first_image(tmp_path, monkeypatch):
    """Before it a token's share is 0 because there is nothing to look at: its response is weighed without it."""
    trainer, _ = make(tmp_path, monkeypatch, zoom_to_picture, [0], signal="attention")
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    _, images, scored = states_and_places(trainer, batch)
    values = []
    for sample, image, own in zip(trainer.rollout_samples, images, scored, strict=True):
        seen = (image.cumsum(0)[-len(own) :][own] > 0).tolist()
        shares = [share for share, is_scored in zip(sample.cos, sample.scored, strict=True) if is_scored]
        assert [share == share for share in shares] == seen
        values.append([2 * share - 1 for share in shares])
    expected = factors(values, [0] * 4, trainer.args.vgpo_config())
    assert [math.isnan(weights.score) for weights in expected] == [False] * 3 + [True]
    assert_factors(batch["visual_factors"], expected, scored)


def both_tools(tmp_path: Any, monkeypatch: Any, **settings: Any) -> list[tuple[Any, dict[str, Any], Tensor]]:
    """The same responses with a tool that shows a picture, and with one that answers in as many tokens of text."""
    runs = []
    for name, tool in {"picture": zoom_to_picture, "text": zoom_to_text}.items():
        trainer, _ = make(tmp_path / name, monkeypatch, tool, [1, 1], **settings)
        batch = trainer._generate_and_score_completions(generation_batch(trainer))
        runs.append((trainer, batch, Sequences.of(batch).response_mask.bool()))
    (_, one, mask), (_, other, other_mask) = runs
    assert torch.equal(mask, other_mask) and torch.equal(one["completion_ids"][mask], other["completion_ids"][mask])
    assert "pixel_values" in one and one["pixel_values"].shape[0] > other["pixel_values"].shape[0]
    return runs


@pytest.mark.parametrize("signal", ["focus", "attention"])
def test_a_later_image_changes_no_bit_of_the_signal_before_it(tmp_path, monkeypatch, signal):
    runs = both_tools(tmp_path, monkeypatch, signal=signal)
    (with_picture, _, _), (without, _, _) = runs
    later = 0
    for place, (sample, other) in enumerate(zip(with_picture.rollout_samples, without.rollout_samples, strict=True)):
        until = sample.scored.index(False) if False in sample.scored else len(sample.scored)
        assert (until < len(sample.scored)) == (place % 4 != 3)
        assert sample.cos[:until] == other.cos[:until] and any(sample.cos[:until])
        later += sample.cos[until:] != other.cos[until:]
    assert later == 6  # and it does change what comes after


def test_an_image_after_the_last_word_changes_no_bit_of_the_factors(tmp_path, monkeypatch):
    """The completion is full when the tool has answered, so no token comes after its image."""

    def first(place: int) -> str:
        return "abcdefgh"[place:] + "abcdefgh"[:place] + " " + call(place)

    trainer, _ = make(tmp_path / "measure", monkeypatch, zoom_to_text, [1, 1], first=first)
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    ends = (batch["tool_mask"] == 0).nonzero()[:, 1].view(8, -1)[:, -1] + 1
    assert len(set(ends.tolist())) == 1
    runs = both_tools(tmp_path, monkeypatch, first=first, max_completion_length=int(ends[0]))
    made = []
    for _, batch, mask in runs:
        assert not mask[:, -6:].any()
        made.append(batch["visual_factors"][mask])
    assert torch.equal(*made) and made[0].std() > 0.1

"""Groups are what TRL generated together, whatever the rows hold: real datasets, environments, evaluations."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

import datasets
from datasets import Dataset
from PIL import Image
from trainer.definition import assert_factors, by_definition
from trainer.test_trainer_signal import capture_unshuffled, hidden_and_masks
from trainer.tiny_runs import generation_batch, make_trainer, picture, rows
from vgpo_trainer.generation_batch import RowFacts, group_ids, warn_of_sizes
from vgpo_trainer.rollouts import prompt_id, prompt_ids

MESSAGE = [{"role": "user", "content": "Add the digits."}]


def palette(colour: tuple[int, int, int], size: int = 48) -> Image.Image:
    """A square whose pixels are the same numbers for every colour."""
    image = Image.new("P", (size, size), 0)
    image.putpalette([*colour] + [0] * 765)
    return image


def palette_rows() -> Dataset:
    """Four rows that differ by nothing but their palette, in an Image column."""
    features = datasets.Features(
        {
            "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "image": datasets.Image(),
            "answer": datasets.Value("string"),
        }
    )
    colours = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)]
    content = {"prompt": [MESSAGE] * 4, "image": [palette(colour) for colour in colours], "answer": [*"abcd"]}
    return Dataset.from_dict(content, features=features)


def augmented_rows() -> Dataset:
    """Rows whose image is another one each time it is read."""
    generator = np.random.default_rng(0)

    def augment(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        def noisy(image: Image.Image) -> Image.Image:
            pixels = np.asarray(image).astype(int)
            return Image.fromarray(np.clip(pixels + generator.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8))

        return {**batch, "images": [[noisy(image) for image in images] for images in batch["images"]]}

    return rows([1, 2, 1, 1], size=48).with_transform(augment)


def equal_rows() -> Dataset:
    """Rows that are the same row."""
    return Dataset.from_list([{"prompt": MESSAGE, "images": [picture(3)], "answer": "1"} for _ in range(4)])


def streamed_rows() -> datasets.IterableDataset:
    def stream() -> Any:
        for row in range(4):
            yield {"prompt": MESSAGE, "image": picture(row), "answer": str(row)}

    return datasets.IterableDataset.from_generator(stream)


def assert_as_defined(trainer: Any, batch: dict[str, Any], groups: list[int]) -> None:
    """The factors of a batch are those of its hidden states and of these groups."""
    hidden, shown, mask = hidden_and_masks(trainer, batch)
    expected, _ = by_definition(hidden, shown, mask, groups)
    assert_factors(batch["visual_factors"], expected, mask)
    assert max(weights.phi for weights in expected) > 0.1


@pytest.mark.parametrize("dataset", [palette_rows, augmented_rows, equal_rows, streamed_rows])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_group_is_what_was_generated_together(tmp_path, monkeypatch, dataset, family):
    """Four prompts of four responses in a generation batch of two micro-batches, which TRL shuffles."""
    trainer = make_trainer(
        tmp_path, family=family, dataset=dataset(), per_device_train_batch_size=8, gradient_accumulation_steps=2
    )
    trainer.model.train()
    kept = capture_unshuffled(trainer, monkeypatch)
    torch.manual_seed(3)
    trainer._prepare_inputs(generation_batch(trainer))
    expected = [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4
    assert kept[0]["prompt_group"].tolist() == expected
    assert_as_defined(trainer, kept[0], [place // 4 for place in range(16)])
    # TRL shuffles what follows from the groups along with the rest.
    indices = [index for micro in trainer._buffered_inputs for index in micro["rollout_index"].tolist()]
    groups = [group for micro in trainer._buffered_inputs for group in micro["prompt_group"].tolist()]
    assert groups == [expected[index] for index in indices] and indices != sorted(indices)


def test_groups_are_those_of_the_advantages(tmp_path):
    """Within each group the advantages sum to 0, and in no other cut of the batch."""
    rewards = iter(range(1000))

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(next(rewards) ** 2) for _ in completions]

    trainer = make_trainer(
        tmp_path,
        dataset=equal_rows(),
        reward=reward,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        scale_rewards="none",
    )
    trainer.model.train()
    batch = trainer._generate_and_score_completions(generation_batch(trainer))
    sums = torch.zeros(16).index_add(0, batch["prompt_group"], batch["advantages"])
    assert sums.abs().max() < 1e-3
    assert batch["advantages"].view(8, 2).sum(dim=1).abs().min() > 1


def test_an_evaluation_has_groups_of_its_own_size(tmp_path, monkeypatch):
    """Five rows of two responses in batches of four: the last one is half full."""
    trainer = make_trainer(
        tmp_path,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        rollout_samples=100,
        arguments={"eval_dataset": Dataset.from_list([{**row, "images": [picture(1)]} for row in rows([1] * 5)])},
    )
    kept, found = capture_unshuffled(trainer, monkeypatch), []
    plain = trainer._signal_factors

    def keeping(batch, signal, mode):
        found.append(plain(batch, signal, mode))
        return found[-1]

    monkeypatch.setattr(trainer, "_signal_factors", keeping)
    metrics = trainer.evaluate()
    assert [batch["prompt_group"].tolist() for batch in kept] == [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0]]
    assert metrics["eval_vgpo/phi_std"] > 0
    for batch, own in zip(kept, found, strict=True):
        number = len(batch["prompt_group"])
        assert_as_defined(trainer, {**batch, "visual_factors": own.factors}, [place // 2 for place in range(number)])
    answers = [sample.answer for sample in trainer.rollout_samples]
    assert answers[::2] == answers[1::2] and len(answers) == 10


class Digits:
    """An environment that owns its prompts: a picture and a question for each seed."""

    resets: ClassVar[list[int]] = []

    def reset(self, seed: int) -> list[dict[str, Any]]:
        self.resets.append(seed)
        self.seed = seed
        return [{"type": "image", "image": picture(seed, 16)}, {"type": "text", "text": "What is it?"}]

    def get_reward(self) -> float:
        return float(len(self.resets) % 3)


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_an_environment_that_owns_its_prompts(tmp_path, monkeypatch):
    """Its rows have neither prompt nor image, and TRL names no place where the prompts could be compared."""
    monkeypatch.setattr(Digits, "resets", [])
    trainer = make_trainer(
        tmp_path,
        family="qwen_with_tools",
        dataset=Dataset.from_list([{"seed": seed} for seed in range(1, 5)]),
        reward=None,
        arguments={"environment_factory": Digits},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    kept = capture_unshuffled(trainer, monkeypatch)
    trainer.train()
    batch = kept[0]
    assert Digits.resets[:16] == [seed for seed in Digits.resets[:16:4] for _ in range(4)]
    assert batch["prompt_group"].tolist() == [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert records[0]["vgpo/weighted_share"] == 1 and records[0]["vgpo/phi_std"] > 0.1


def with_ids(ids: list[Any]) -> Dataset:
    return Dataset.from_list([{**row, "prompt_id": name} for row, name in zip(rows([1] * 4), ids, strict=True)])


def test_a_prompt_id_column_wins(tmp_path, monkeypatch):
    """Two rows that share an id are one group of eight, which is said once; a row without an id keeps its own."""
    trainer = make_trainer(
        tmp_path,
        dataset=with_ids(["a", "b", "a", None]),
        per_device_train_batch_size=16,
        shuffle_dataset=False,
        max_steps=2,
    )
    kept = capture_unshuffled(trainer, monkeypatch)
    message = r"are larger than num_generations=4: prompt_id 'a' has 8; rows of one generation batch share a prompt_id"
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.train()
    assert sum("groups of responses" in str(warning.message) for warning in caught) == 1
    groups = [0] * 4 + [4] * 4 + [0] * 4 + [12] * 4
    assert len(kept) == 2 and kept[0]["prompt_group"].tolist() == groups
    fresh = make_trainer(tmp_path / "again", per_device_train_batch_size=16, rollout_samples=0)
    signal = fresh._scoring_pass(kept[0], "train")
    assert_as_defined(
        fresh, kept[0] | {"visual_factors": fresh._signal_factors(kept[0], signal, "train").factors}, groups
    )


def test_ids_that_differ_between_readings_are_warned_of(tmp_path):
    counter = iter(range(10**6))
    dataset = rows([1] * 4).with_transform(
        lambda batch: {**batch, "prompt_id": [next(counter) for _ in batch["prompt"]]}
    )
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=8, max_steps=1)
    message = r"smaller than num_generations=4: prompt_id \d+ has 1.* and 3 more; a prompt_id must be the same each"
    with pytest.warns(UserWarning, match=message):
        trainer.train()


def test_a_prompt_id_that_cannot_be_compared_is_refused():
    with pytest.raises(TypeError, match="prompt_id must be an integer or a string, got a list"):
        RowFacts.of({"prompt_id": [1, 2]})
    arrays = [torch.tensor([7, 8]), np.array(["a", "b"]), torch.tensor(True), np.bool_(True), np.float64(7)]
    for value in (7.0, True, b"7", *arrays):
        with pytest.raises(TypeError, match=f"must be an integer or a string, got a {type(value).__name__}: "):
            RowFacts.of({"prompt_id": value})
    for value in (float("nan"), np.float32("nan"), torch.tensor(torch.nan)):
        with pytest.raises(TypeError, match="prompt_id is NaN, as tables write a missing one: give None"):
            RowFacts.of({"prompt_id": value})
    scalars = [np.int64(7), torch.tensor(7), 7, np.uint8(7)]
    assert {RowFacts.of({"prompt_id": value}).prompt_id for value in scalars} == {7}
    assert RowFacts.of({"prompt_id": np.str_("a")}).prompt_id == "a" and RowFacts.of({}).prompt_id is None


def test_groups_by_place_and_by_id():
    assert group_ids([None] * 6, 3) == [0, 0, 0, 3, 3, 3]
    assert group_ids(["a", "a", "b", "b", "a", "a"], 2) == [0, 0, 2, 2, 0, 0]
    # A number that is an id is not the number of a place.
    assert group_ids([None, None, 0, 0, None, None, 1, 1], 2) == [0, 0, 2, 2, 4, 4, 6, 6]


def test_each_kind_of_size_is_warned_of_once():
    warned: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            names = ["a"] * 6 + ["b"] * 1 + ["c"] * 2
            warn_of_sizes(group_ids(names, 2), names, 2, warned)
        warn_of_sizes([0, 0, 2, 2], [None] * 4, 2, set())
    assert [str(warning.message).split(" has ")[0].split()[-1] for warning in caught] == ["'a'", "'b'"]
    assert "6; rows" in str(caught[0].message) and "1; a prompt_id" in str(caught[1].message)


def test_ids_for_a_loop_of_ones_own():
    """They tell apart what images show, and rows of environments; an image that rows share is read once."""

    def row(image: Image.Image) -> dict[str, Any]:
        return {"prompt": MESSAGE, "image": image}

    red, blue = palette((255, 0, 0)), palette((0, 0, 255))
    assert prompt_id(row(red)) != prompt_id(row(blue))
    assert prompt_id(row(red)) == prompt_id(row(red.convert("RGB"))) == prompt_id(row(red.copy()))
    deep = [Image.fromarray(np.full((8, 8), value, dtype=np.uint16)) for value in (300, 4000)]
    assert prompt_id(row(deep[0])) != prompt_id(row(deep[1]))
    assert len({prompt_id({"seed": 1}), prompt_id({"seed": 2}), prompt_id({"start": 1})}) == 3
    read = []

    class Counted(Image.Image):
        def tobytes(self, *arguments: Any) -> bytes:
            read.append(self)
            return super().tobytes(*arguments)

        def convert(self, *arguments: Any, **named: Any) -> Image.Image:
            read.append(self)
            return super().convert(*arguments, **named)

    shared = red.convert("RGB")
    shared.__class__ = Counted
    ids = prompt_ids([row(shared) for _ in range(64)], torch.device("cpu"))
    assert len(set(ids.tolist())) == 1 and len(read) == 1

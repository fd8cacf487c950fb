"""Datasets from files: what is read, and that every error names the row. Rewards: which answers count as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("datasets")

from vgpo_trainer.data import DatasetError, build_dataset, load_examples
from vgpo_trainer.rewards import exact_answer, extract_answer, load_reward, normalise_answer


def write(folder: Path, *rows: Any, name: str = "metadata.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    Image.new("L", (6, 4), 128).save(tmp_path / "b.jpg")
    return tmp_path


def test_a_folder_becomes_rows_of_trl(folder):
    write(
        folder,
        {"image": "a.png", "prompt": "How many?", "answer": 3},
        "",
        {"images": ["a.png", "b.jpg"], "question": "From <image> to <image>: what?", "solution": "it", "level": 2},
        {"file_name": "b.jpg", "prompt": [{"role": "user", "content": "Which?"}], "answer": " b "},
    )
    rows = list(build_dataset(load_examples(folder, system="Be brief.")))
    assert [row["answer"] for row in rows] == ["3", "it", " b "]
    assert [row["level"] for row in rows] == [None, 2, None]
    assert [[image.size for image in row["images"]] for row in rows] == [[(4, 4)], [(4, 4), (6, 4)], [(6, 4)]]
    assert all(image.mode == "RGB" for row in rows for image in row["images"])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [row["prompt"][0] for row in rows] == [system] * 3
    assert rows[0]["prompt"][1]["content"] == [{"type": "image"}, {"type": "text", "text": "How many?"}]
    assert rows[1]["prompt"][1]["content"] == [
        {"type": "text", "text": "From "},
        {"type": "image"},
        {"type": "text", "text": " to "},
        {"type": "image"},
        {"type": "text", "text": ": what?"},
    ]


def test_a_jsonl_file_names_images_beside_it(folder):
    write(folder, {"image": "a.png", "prompt": "?", "answer": "x"}, name="rows.jsonl")
    (example,) = load_examples(folder / "rows.jsonl")
    assert example.images == [folder / "a.png"] and example.where.endswith("rows.jsonl:1")


GOOD = {"image": "a.png", "prompt": "?", "answer": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"not JSON"),
        ("[1]", r"expected a JSON object, got list"),
        ({**GOOD, "image": "c.png"}, r"image .*c\.png does not exist"),
        ({**GOOD, "image": "broken.png"}, r"cannot read image .*broken\.png"),
        ({**GOOD, "image": None}, r"image is missing"),
        ({**GOOD, "image": 3}, r"image must be a path"),
        ({**GOOD, "images": ["a.png"]}, r"give one of image, images"),
        ({**GOOD, "video": "film.mp4"}, r"video is not supported"),
        ({"image": "a.png", "prompt": "?"}, r"answer is missing: no answer or solution"),
        ({**GOOD, "answer": "  "}, r"answer must be text or a number"),
        ({**GOOD, "answer": True}, r"answer must be text or a number, got true"),
        ({"image": "a.png", "answer": "x"}, r"prompt is missing: no prompt or question or problem"),
        ({**GOOD, "prompt": ""}, r"needs a role .* and content"),
        ({**GOOD, "prompt": []}, r"must be text or a list of messages"),
        ({**GOOD, "prompt": "<image> or <image>?"}, r"marks 2 images, and the row has 1"),
        ({**GOOD, "prompt": [{"role": "robot", "content": "?"}]}, r"needs a role"),
        ({**GOOD, "prompt": [{"role": "system", "content": "?"}]}, r"no user message"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "video"}]}]}, r"text and image parts"),
        ({**GOOD, "completions": 1}, r"rename the field completions"),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    write(folder, GOOD, row)
    with pytest.raises(DatasetError, match=rf"metadata\.jsonl:2: .*{message}"):
        load_examples(folder)


def test_an_image_that_breaks_off_is_named_when_it_is_read(folder):
    """A JPEG's header says nothing about its end."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:800])
    dataset = build_dataset(load_examples(write(folder, GOOD, {**GOOD, "image": "cut.jpg"})))
    assert dataset[0]["answer"] == "x"
    with pytest.raises(DatasetError, match=r"metadata\.jsonl:2: cannot read image .*cut\.jpg"):
        dataset[1]


def test_missing_and_empty_files_are_named(folder):
    with pytest.raises(DatasetError, match=r"nowhere does not exist"):
        load_examples(folder / "nowhere")
    with pytest.raises(DatasetError, match=r"folder without metadata\.jsonl"):
        load_examples(folder)
    with pytest.raises(DatasetError, match=r"has no rows"):
        load_examples(write(folder, "", ""))
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"not UTF-8"):
        load_examples(folder)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("15", "15"),
        ("15.", "15.0"),
        ("<think>7 + 8</think><answer> 15 </answer>", "15"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("It is long.\nThe answer is: Paris.", "paris"),
        ("Answer: 1,234 \nThat is all.", "1234"),
        ("first line\n  The  Red   door! ", "the red door"),
        ("-0.50", "-.5"),
        ("\uff11\uff15", "15"),
        ("100", "1e2"),
    ],
)
def test_answers_that_are_right(response, answer):
    assert exact_answer([response], [answer]) == [1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("15", "16"),
        ("1,2", "12"),
        ("0.5", "5"),
        ("", "0"),
        ("the answer is 4. No: 5", "4"),
        ("nan", "inf"),
        ("-0.5", "5"),
    ],
)
def test_answers_that_are_wrong(response, answer):
    assert exact_answer([response], [answer]) == [0.0]


def test_a_number_beyond_writing_down_is_text():
    assert normalise_answer("1e999999999999") == "1e999999999999"
    assert len(normalise_answer("1e99999")) < 10


def test_an_unclosed_box_is_no_answer():
    assert extract_answer(r"\boxed{4} then \boxed{5") == "4"


def test_the_reward_reports_accuracy():
    extras, metrics = {}, {}
    messages = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("3", "4")]
    rewards = exact_answer(messages, ["3", "3"], log_extra=extras.__setitem__, log_metric=metrics.__setitem__)
    assert (rewards, extras, metrics) == ([1.0, 0.0], {"correct": [True, False]}, {"accuracy": 0.5})


def test_rewards_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "length_reward.py").write_text(
        "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("length_reward:short")(["abc"]) == [-3]
    for name, message in (
        ("length_reward", "module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("length_reward:long", "no function 'long'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(name)

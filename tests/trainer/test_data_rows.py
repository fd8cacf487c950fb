"""Fields of rows: which are read, and one table of rows that are refused with what is said of them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from trainer.data_cases import GOOD, encoded, load, noise, parts_of, plain, rows_of, write_images, write_lines
from vgpo_trainer.data import DatasetError, DataSource

NO_IMAGE = {"prompt": "?", "answer": "x"}
FILE = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
BASE64 = base64.b64encode(encoded(noise(8))).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cut.png").write_bytes(plain()[:40])
    (tmp_path / "cut.jpg").write_bytes(encoded(noise(), "JPEG")[:800])
    (tmp_path / "film.mp4").write_bytes(b"not a film")
    return write_images(tmp_path)


# ---- rows that are read --------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>\nFirst?"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "Then?"},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
]


@pytest.mark.parametrize(
    ("row", "parts", "answer"),
    [
        (GOOD, ["<image>", "?"], "x"),
        (NO_IMAGE, ["?"], "x"),
        ({"image": "a.png", "problem": "p", "query": "q", "solution": "s"}, ["<image>", "p"], "s"),
        ({"image": "a.png", "query": "q", "label": ["14"]}, ["<image>", "q"], "14"),
        ({"image": ["a.png"], "instruction": "i<image>", "ground_truth": 0.5}, ["i", "<image>"], "0.5"),
        ({**NO_IMAGE, "answer": None, "solution": "s", "question": "q"}, ["?"], "s"),
        ({"prompt": "?", "reward_model": {"style": "rule", "ground_truth": "3"}}, ["?"], "3"),
        ({"image": "a.png", "messages": CHAT}, ["Be brief.", "<image>", "\nFirst?", "one", "Then?"], "two"),
        (
            {"image": "a.png", "messages": CHAT, "answer": "2"},
            ["Be brief.", "<image>", "\nFirst?", "one", "Then?"],
            "2",
        ),
        (
            {
                "image": "a.png",
                "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}],
            },
            ["<image>", "\nWhat?"],
            "A cup.",
        ),
        ({"prompt": [{"role": "user", "content": FILE}], "answer": "x"}, ["<image>", "?"], "x"),
        (
            {"prompt": [{"role": "user", "content": [{"image": "a.png"}, {"text": "?"}]}], "answer": 1},
            ["<image>", "?"],
            "1",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, "?"]}],
                "answer": 1,
            },
            ["<image>", "?"],
            "1",
        ),
        (
            {"image": "a.png", "prompt": [{"role": "user", "content": [*FILE, {"type": "image"}]}], "answer": 1},
            ["<image>", "?", "<image>"],
            "1",
        ),
        ({**GOOD, "image": {"path": "a.png", "bytes": None}, "file_name": "elsewhere.png"}, ["<image>", "?"], "x"),
        ({**GOOD, "image": [[[0, 0, 0], [255, 255, 255]]]}, ["<image>", "?"], "x"),
    ],
)
def test_fields_that_are_read(folder: Path, row: dict[str, Any], parts: list[str], answer: str) -> None:
    (found,) = rows_of(write_lines(folder / "rows.jsonl", row))
    assert parts_of(found) == parts and found["answer"] == answer
    assert len(found["images"]) == parts.count("<image>")


def test_images_stand_in_the_order_of_their_marks(folder: Path) -> None:
    content = [{"type": "image"}, {"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}]
    row = {"images": ["b.jpg", "b.jpg"], "prompt": [{"role": "user", "content": content}], "answer": 1}
    (found,) = rows_of(write_lines(folder / "rows.jsonl", row))
    assert [image.width for image in found["images"]] == [6, 4, 6]


def test_columns_name_other_fields(folder: Path) -> None:
    row = {**GOOD, "media": {"pic": "b.jpg"}, "task": {"text": "Which?"}, "gold": 7}
    columns = {"images": "media.pic", "prompt": "task.text", "answer": "gold"}
    (found,) = rows_of(write_lines(folder / "rows.jsonl", row), columns=columns)
    assert parts_of(found) == ["<image>", "Which?"] and found["images"][0].width == 6
    assert found["answer"] == "7" and found["gold"] == 7
    # What the data have by the names of TRL's rows is not lost.
    assert (found["data_image"], found["data_prompt"], found["data_answer"]) == ("a.png", "?", "x")
    with pytest.raises(ValueError, match="columns: 'picture' is no role; expected prompt, images, videos, answer"):
        DataSource("rows", columns={"picture": "pic"})


def test_fields_are_handed_on_to_reward_functions(folder: Path) -> None:
    row = {"image": "a.png", "problem": "p", "solution": "s", "completions": ["c"], "row": 5, "prompt_id": 9}
    (found,) = rows_of(write_lines(folder / "rows.jsonl", row))
    assert {name: found[name] for name in set(found) - {"prompt", "images"}} == {
        "answer": "s",
        "row": "rows.jsonl:1",
        "problem": "p",
        "solution": "s",
        "prompt_id": 9,
        "data_completions": ["c"],
        "data_row": 5,
    }


def test_a_system_message_stays(folder: Path) -> None:
    path = write_lines(folder / "rows.jsonl", {"image": "a.png", "messages": CHAT}, GOOD)
    assert [parts_of(row)[0] for row in rows_of(path, system="Think.")] == ["Be brief.", "Think."]


def test_answers_may_be_missing_where_no_reward_needs_them(folder: Path) -> None:
    path = write_lines(folder / "rows.jsonl", {"image": "a.png", "prompt": "?"}, {**GOOD, "answer": ["a", "b"]}, GOOD)
    rows = rows_of(path, needs_answer=False)
    assert [row["answer"] for row in rows] == [None, None, "x"]
    assert [row["data_answer"] for row in rows] == [None, ["a", "b"], "x"]


def test_frames_are_a_video(folder: Path) -> None:
    asked = [
        {"role": "user", "content": [{"type": "video", "video": ["a.png", "b.jpg"]}, {"type": "text", "text": "?"}]}
    ]
    path = write_lines(
        folder / "rows.jsonl",
        {"video": ["a.png", "a.png", "b.jpg"], "prompt": "<video>What?", "answer": 1},
        {"videos": [["a.png", "a.png"]], "prompt": "?", "answer": 1},
        {"prompt": asked, "answer": 1},
        GOOD,
    )
    rows = rows_of(path)
    assert [[[frame.size for frame in video] for video in row["videos"]] for row in rows] == [
        [[(4, 4), (4, 4), (6, 4)]],
        [[(4, 4), (4, 4)]],
        [[(4, 4), (6, 4)]],
        [],
    ]
    assert [parts_of(row)[0] for row in rows] == ["<video>", "<video>", "<video>", "<image>"]


def test_a_video_file_is_a_path_to_whoever_decodes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgpo_trainer.data.videos.find_spec", lambda name: name == "av")
    path = write_lines(folder / "rows.jsonl", {"video": "film.mp4", "prompt": "?", "answer": 1})
    (row,) = rows_of(path)
    assert row["videos"] == [str(folder / "film.mp4")] and row["images"] == []


def test_a_video_as_bytes_becomes_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.setattr("vgpo_trainer.data.videos.find_spec", lambda name: name == "av")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"video": [{"bytes": b"a film", "path": None}], "prompt": ["?"], "answer": ["1"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    (row,) = rows_of(tmp_path / "rows.parquet")
    assert Path(row["videos"][0]).read_bytes() == b"a film"


# ---- rows that are refused -----------------------------------------------------------------------------------------


def chat(*content: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": list(content)}], "answer": "x"}


BAD = [
    ("{not json", r"not JSON: .* at column 2; expected an object a line"),
    ("[1]", r"expected a JSON object, got list"),
    ('{"answer": ' + "9" * 5000 + "}", r"not JSON that can be read: Exceeds the limit"),
    # images
    ({**GOOD, "image": "c.png"}, r"image .*c\.png does not exist"),
    ({**GOOD, "image": "cut.png"}, r"cannot read image .*cut\.png"),
    ({**GOOD, "image": "cut.jpg"}, r"cannot read image .*cut\.jpg: .*truncated"),
    (
        {**GOOD, "image": "film.mp4"},
        r"cannot read image .*film\.mp4: broken, or of no format that Pillow knows; it begins with b'not",
    ),
    ({**GOOD, "image": 3}, r"image: expected a path, the bytes of an image file, .*, got 3"),
    ({**GOOD, "image": ""}, r"image: expected a path, .*, got ''"),
    ({**GOOD, "image": {"url": "a.png"}}, r"image: expected a path, .*, got \{'url': 'a\.png'\}"),
    ({**GOOD, "image": "https://host/a.png"}, r"image holds a URL \('https://host/a\.png'\): download it first"),
    ({**GOOD, "image": BASE64}, r"image holds image data in base64 \('iVBOR.*: decode it to bytes or a file"),
    ({**GOOD, "image": {"bytes": BASE64}}, r"image holds image data in base64"),
    ({**GOOD, "image": "data:image/png;base64," + BASE64}, r"image holds a data: URI, image data in base64"),
    (
        {**GOOD, "image": [[0.5, 0.25]]},
        r"cannot use image: it is an array of float64 in the shape \[1, 2\]; expected int",
    ),
    ({**GOOD, "images": ["a.png"]}, r"give one of image, images, not several, or say by --image-column"),
    (chat({"type": "image_url", "image_url": {"url": "http://host/a.png"}}), r"an image of prompt holds a URL"),
    (chat({"type": "image", "base64": BASE64}), r"an image of prompt holds image data in base64"),
    (
        {**chat(*FILE), "image": "a.png"},
        r"the messages of prompt hold 1 image, and image 1 more: give one or the other",
    ),
    # prompts
    (
        {"image": "a.png", "answer": "x"},
        r"prompt is missing: no prompt or question .* in answer, image \(--prompt-column",
    ),
    ({**GOOD, "prompt": " "}, r"prompt is empty"),
    ({**GOOD, "prompt": []}, r"prompt must be text or a list of messages, got \[\]"),
    ({**GOOD, "prompt": 5}, r"prompt must be text or a list of messages, got 5"),
    ({**GOOD, "prompt": "<image> or <image>?"}, r"prompt marks 2 images, and the row has 1"),
    ({**NO_IMAGE, "prompt": "<image>?"}, r"prompt marks 1 image, and the row has 0"),
    ({**GOOD, "prompt": "<video>?"}, r"prompt marks 1 video, and the row has 0"),
    (
        {**GOOD, "prompt": [{"role": "robot", "content": "?"}]},
        r"each message of prompt needs a role \(system, user, assis",
    ),
    ({**GOOD, "prompt": [{"role": "user"}]}, r"prompt has a message without content"),
    ({**GOOD, "prompt": [{"role": "system", "content": "?"}]}, r"prompt has no user message"),
    (chat({"type": "audio", "audio": "a.wav"}), r"prompt may hold text, image and video parts, got \{'type': 'audio'"),
    ('{"prompt": "a \\ud83d b", "answer": "1"}', r"prompt holds '\\ud83d', half of a character"),
    # answers
    (
        {"image": "a.png", "prompt": "?"},
        r"answer is missing: no answer or solution .* in image, prompt \(--answer-column",
    ),
    ({**GOOD, "answer": "  "}, r"answer must be text or a number, or a list of one, got ' '"),
    ({**GOOD, "answer": True}, r"answer must be text or a number, or a list of one, got True"),
    ({**GOOD, "answer": ["a", "b"]}, r"answer must be text or a number, or a list of one, got \['a', 'b'\]"),
    ('{"image": "a.png", "prompt": "?", "answer": NaN}', r"answer must be text or a number, or a list of one, got nan"),
    # videos
    (
        {**NO_IMAGE, "video": "film.mp4"},
        r"video .*film\.mp4 cannot be decoded: install torchcodec or av, or give its frames",
    ),
    ({**NO_IMAGE, "video": "none.mp4"}, r"video .*none\.mp4 does not exist"),
    ({**NO_IMAGE, "video": "https://host/film.mp4"}, r"video holds a URL"),
    ({**NO_IMAGE, "video": 5}, r"video: expected a path, the bytes of a video file, .* got 5"),
    ({**NO_IMAGE, "video": ["a.png", "cut.png"]}, r"cannot read image .*cut\.png"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named(folder: Path, row: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgpo_trainer.data.videos.find_spec", lambda name: None)
    path = write_lines(folder / "rows.jsonl", GOOD, row)
    with pytest.raises(DatasetError, match=rf"^{path}:2: .*{message}") as caught:
        load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_bad_rows_are_left_out_and_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgpo_trainer.data.videos.find_spec", lambda name: None)
    path = write_lines(folder / "rows.jsonl", *(row for row, _ in BAD), {**GOOD, "answer": "y"})
    loaded = load(path, skip_bad_rows=True)
    assert [row["answer"] for row in loaded.dataset] == ["y"] and loaded.dataset[0][
        "row"
    ] == f"rows.jsonl:{len(BAD) + 1}"
    assert len(loaded.skipped) == len(BAD) and loaded.skipped[3].startswith(f"{path}:4: image ")
    with pytest.raises(DatasetError, match=r"has no row that can be used; the first: .*rows\.jsonl:1: not JSON"):
        load(write_lines(path, "{", "["), skip_bad_rows=True)


def test_data_without_images_is_told(folder: Path) -> None:
    path = write_lines(folder / "rows.jsonl", {"picture": "a.png", "prompt": "?", "answer": 1})
    with pytest.warns(
        UserWarning, match=r"no row of .* has an image or a video: its fields are answer, picture, prompt"
    ):
        load(path)
    with pytest.raises(
        DatasetError, match=r"no row has the field 'pictures' that --image-column names: they have answer, "
    ):
        load(path, columns={"images": "pictures"})

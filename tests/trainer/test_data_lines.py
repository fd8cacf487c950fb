"""Files of JSON lines and CSV: what is read, and that every error names the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from trainer.data_cases import GOOD, load, parts_of, rows_of, write_images, write_lines
from vgpo_trainer.data import DatasetError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path)


def test_a_folder_becomes_rows_of_trl(folder: Path) -> None:
    write_lines(
        folder / "metadata.jsonl",
        {"image": "a.png", "prompt": "How many?", "answer": 3},
        "",
        {"images": ["a.png", "b.jpg"], "question": "From <image> to <image>: what?", "solution": "it", "level": 2},
        {"file_name": "b.jpg", "prompt": [{"role": "user", "content": "Which?"}], "answer": " b "},
    )
    rows = rows_of(folder, system="Be brief.")
    assert [row["answer"] for row in rows] == ["3", "it", " b "]
    assert [row["level"] for row in rows] == [None, 2, None]
    assert [row["row"] for row in rows] == ["metadata.jsonl:1", "metadata.jsonl:3", "metadata.jsonl:4"]
    assert [[image.size for image in row["images"]] for row in rows] == [[(4, 4)], [(4, 4), (6, 4)], [(6, 4)]]
    assert all(image.mode == "RGB" for row in rows for image in row["images"])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [row["prompt"][0] for row in rows] == [system] * 3
    assert parts_of(rows[0]) == ["Be brief.", "<image>", "How many?"]
    assert parts_of(rows[1]) == ["Be brief.", "From ", "<image>", " to ", "<image>", ": what?"]
    assert not any("videos" in row for row in rows)


@pytest.mark.parametrize(
    "content",
    [
        '{"image": "a.png", "prompt": "one\u2028two", "answer": "1"}\n'.encode(),
        b'\xef\xbb\xbf{"image": "a.png", "prompt": "one two", "answer": "1"}',
        b'\r\n\n {"image": "a.png", "prompt": "one two", "answer": "1"} \r\n\r\n',
        b'{"prompt": "?", "image": "a.png", "prompt": "one two", "answer": "1"}',
        b'[{"image": "a.png",\n  "prompt": "one two", "answer": "1"}]',
        b'\xef\xbb\xbf[\n{"image": "a.png", "prompt": "one two", "answer": "1"}\n]',
    ],
    ids=["U+2028", "byte order mark", "blank lines", "a field twice", "a list", "a list with a mark"],
)
def test_json_is_what_the_standard_says(folder: Path, content: bytes) -> None:
    (folder / "rows.json").write_bytes(content)
    (row,) = rows_of(folder / "rows.json")
    assert parts_of(row)[1].split() == ["one", "two"] and row["answer"] == "1"
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    assert parts_of(rows_of(folder / "rows.jsonl.gz")[0]) == parts_of(row)


def test_paths_are_beside_the_file_or_else_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As datasets keeps them, and as files of lines are often written."""
    path = write_lines(folder / "lists" / "rows.jsonl", {**GOOD, "image": "b.jpg"})
    with pytest.raises(DatasetError, match=r"image .*lists/b\.jpg does not exist$"):
        load(path)
    monkeypatch.chdir(folder)
    assert rows_of(path)[0]["images"][0].size == (6, 4)
    write_images(path.parent)
    (path.parent / "a.png").replace(path.parent / "b.jpg")
    assert rows_of(path)[0]["images"][0].size == (4, 4)


def test_rows_may_differ_in_fields_and_types(folder: Path) -> None:
    lines = [
        {**GOOD, "answer": 3, "extra": {"a": 1}},
        {"images": ["a.png", "b.jpg"], "problem": "??", "answer": "three", "extra": ["b"]},
        {"messages": [{"role": "user", "content": "alone"}], "answer": 2.5, "more": None},
    ]
    path = write_lines(folder / "rows.jsonl", *lines)
    for streaming in (False, True):
        rows = rows_of(path, streaming=streaming)
        assert [row["answer"] for row in rows] == ["3", "three", "2.5"]
        assert [row["extra"] for row in rows] == [{"a": 1}, ["b"], None]
        assert [len(row["images"]) for row in rows] == [1, 2, 0]
        assert len({frozenset(row) for row in rows}) == 1 and "more" in rows[0]


def test_csv_stays_as_it_is_written(folder: Path) -> None:
    text = '\ufefffile_name,question,answer,level\na.png,"How\nmany?",007,\nb.jpg,Which?,NA,2\n'
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    rows = rows_of(folder)
    assert [row["answer"] for row in rows] == ["007", "NA"]
    assert [row["level"] for row in rows] == [None, "2"]
    assert [row["row"] for row in rows] == ["metadata.csv:2", "metadata.csv:4"]
    assert parts_of(rows[0]) == ["<image>", "How\nmany?"]
    (folder / "rows.tsv").write_text("image\tquestion\tanswer\na.png\tWhich?\t1\n")
    assert rows_of(folder / "rows.tsv")[0]["answer"] == "1"


def test_splits_of_a_folder_have_their_own_images(tmp_path: Path) -> None:
    for split, size in (("train", 4), ("test", 6)):
        write_images(tmp_path / split)
        (tmp_path / split / "a.png").rename(tmp_path / split / "0.png") if split == "train" else None
        (tmp_path / split / "b.jpg").rename(tmp_path / split / "0.png") if split == "test" else None
        write_lines(tmp_path / split / "metadata.jsonl", {**GOOD, "image": "0.png", "answer": size})
    assert [row["images"][0].width for row in rows_of(tmp_path)] == [4]
    assert [row["row"] for row in rows_of(tmp_path, split="test")] == ["test/metadata.jsonl:1"]
    both = rows_of(tmp_path, split="test+train")
    assert [row["answer"] for row in both] == [str(row["images"][0].width) for row in both] == ["6", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", b"\n \n", "has no rows"),
        ("rows.jsonl", json.dumps(GOOD).encode("utf-16"), r"rows\.jsonl is UTF-16 text: save it as UTF-8"),
        ("rows.jsonl", json.dumps(GOOD).encode("utf-16-le"), r"rows\.jsonl is UTF-16 text"),
        ("rows.jsonl", b'{"a": 1}\n{"b": "\xe9"}\n', r"rows\.jsonl:2: not UTF-8 text: .* at byte 8"),
        ("rows.json", b'[{"a": 1},\n{"a" 2}]', r"rows\.json:2: not JSON: .* at column 6"),
        ("rows.json", b'{\n "prompt": "?"\n}', r"rows\.json is no list of objects, nor an object a line$"),
        ("rows.json", b'{\n "data": [{"prompt": "?"}]\n}', r"an object a line: jq -c '\.data\[\]' .* makes lines of"),
        (
            "rows.json",
            b'{"v": 2, "data": [{"prompt": "?"}]}\n',
            r"an object a line: jq -c '\.data\[\]' .* makes lines of",
        ),
        (
            "rows.json",
            b'{"1": {"prompt": "?"}, "2": {"prompt": "?"}}',
            r"an object a line: jq -c '\.\[\]' .* makes lines of",
        ),
        ("rows.json", b'{"data": [{"prompt": "?"}]}\n{"prompt": "?"}', r"rows\.json:1: prompt is missing"),
        (
            "rows.csv",
            b"image;prompt\na.png;one\n",
            r"first line names one column, 'image;prompt'; expected ',' between",
        ),
        ("rows.tsv", b"image,prompt\na.png,one\n", r"names one column, 'image,prompt'; expected '\\t' between"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-20],
            r"rows\.jsonl\.gz cannot be read: Compressed file",
        ),
        ("rows.csv", b"image,prompt\na.png,one, two\n", r"rows\.csv:2: 3 cells, and the first line names 2 columns"),
        ("rows.csv", b"image,prompt\na.png,\xff\n", r"rows\.csv:\d: not CSV in UTF-8"),
        ("rows.txt", b"image,prompt\n", r"rows\.txt is no kind of file that is known: expected \.jsonl, .*\.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        load(folder / name)
    assert "\n" not in str(caught.value)

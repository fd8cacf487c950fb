"""Every kind of dataset, written by its own library and read back: formats, splits, configurations, the hub."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

import datasets
import numpy as np
from trainer.data_cases import GOOD, encoded, load, noise, parts_of, plain, rows_of, write_images, write_lines
from vgpo_trainer.data import DatasetError, DataSource
from vgpo_trainer.options.arguments import add_data_arguments, source_of, tell_skipped

IMAGES = datasets.List(datasets.Image())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets prepares is not left in the home of whoever tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def table(rows: int = 3, **columns: Any) -> Any:
    """A dataset in the form of geometry3k: a list of images, a problem, an answer."""
    made = {
        "images": [[{"bytes": plain(size=(4 + row, 4)), "path": None}] for row in range(rows)],
        "problem": [f"<image>Number {row}?" for row in range(rows)],
        "answer": [str(row) for row in range(rows)],
        **columns,
    }
    return datasets.Dataset.from_dict(made).cast_column("images", IMAGES)


def parquet_file(folder: Path) -> Path:
    table().to_parquet(folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(1).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def plain_structs(folder: Path) -> Path:
    """Without the features of datasets, as pandas and verl write it."""
    rows = [{"bytes": plain(size=(4 + row, 4)), "path": None} for row in range(3)]
    problems = [[{"role": "user", "content": f"<image>Number {row}?"}] for row in range(3)]
    models = [{"style": "rule", "ground_truth": str(row)} for row in range(3)]
    made = {"images": [[row] for row in rows], "prompt": problems, "reward_model": models}
    datasets.Dataset.from_dict(made).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder: Path) -> Path:
    table().save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"train": table(), "test": table(1)}).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow(folder: Path) -> Path:
    table().save_to_disk(folder / "saved")
    return next((folder / "saved").glob("*.arrow")).rename(folder / "rows.arrow")


def imagefolder(folder: Path) -> Path:
    """With a table of metadata, read as datasets' own imagefolder would."""
    lines = []
    for row in range(3):
        (folder / "train" / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / "train" / "pictures" / f"{row}.png").write_bytes(plain(size=(4 + row, 4)))
        lines.append({"file_name": f"pictures/{row}.png", "problem": f"<image>Number {row}?", "answer": str(row)})
    datasets.Dataset.from_list(lines).to_parquet(folder / "train" / "metadata.parquet")
    return folder


def paths_beside_a_table(folder: Path) -> Path:
    """As ViRL39K: lists of paths in a parquet file, many images beside it."""
    (folder / "images").mkdir()
    for row in range(3):
        (folder / "images" / f"{row}.png").write_bytes(plain(size=(4 + row, 4)))
    made = {"question": [f"<image>Number {row}?" for row in range(3)], "answer": list("012")}
    made["image"] = [[f"images/{row}.png"] for row in range(3)]
    datasets.Dataset.from_dict(made).to_parquet(folder / "39Krelease.parquet")
    (folder / "README.md").write_text("# Data")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def webdataset(folder: Path) -> Path:
    files: dict[str, bytes] = {}
    for row in range(3):
        files[f"{row}.png"] = plain(size=(4 + row, 4))
        files[f"{row}.json"] = json.dumps({"problem": f"<image>Number {row}?", "answer": str(row)}).encode()
    return _tar(folder / "train-000.tar", files)


def webdataset_of_texts(folder: Path) -> Path:
    files: dict[str, bytes] = {}
    for row in range(3):
        files[f"{row}.image.png"] = plain(size=(4 + row, 4))
        files[f"{row}.question.txt"] = f"<image>Number {row}?".encode()
        files[f"{row}.answer.txt"] = str(row).encode()
    return _tar(folder / "train-000.tar", files).parent


def lines_of_a_hub(folder: Path) -> Path:
    """A clone that says itself which files it has."""
    for row in range(3):
        (folder / f"{row}.png").write_bytes(plain(size=(4 + row, 4)))
    write_lines(
        folder / "part.jsonl",
        *({"image": f"{row}.png", "problem": f"Number {row}?", "answer": row} for row in range(3)),
    )
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    return folder


MAKERS = [
    parquet_file,
    parquet_folder,
    plain_structs,
    saved,
    saved_splits,
    arrow,
    imagefolder,
    paths_beside_a_table,
    webdataset,
    webdataset_of_texts,
    lines_of_a_hub,
]


@pytest.mark.parametrize("make", MAKERS)
def test_each_format_is_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    read = {}
    for name, options in {"": {}, "unchecked": {"check_images": False}, "stream": {"streaming": True}}.items():
        rows = rows_of(path, **options)
        assert [parts_of(row) for row in rows] == [["<image>", f"Number {row}?"] for row in range(3)]
        assert [row["answer"] for row in rows] == ["0", "1", "2"]
        assert [[image.size for image in row["images"]] for row in rows] == [[(4 + row, 4)] for row in range(3)]
        read[name] = [{**row, "images": [image.tobytes() for image in row["images"]]} for row in rows]
    assert read[""] == read["unchecked"] == read["stream"]
    if make is not lines_of_a_hub:
        assert [row["row"] for row in read[""]] == ["train[0]", "train[1]", "train[2]"]
    else:
        assert [row["row"] for row in read[""]] == ["part.jsonl:1", "part.jsonl:2", "part.jsonl:3"]


def test_later_rows_may_lack_a_column(tmp_path: Path) -> None:
    columns = {"problem": ["?", "?", "?"], "answer": ["1", None, "3"], "images": [[], None, [{"bytes": plain()}]]}
    columns["solution"] = [None, "2", None]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(path)
    for check in (True, False):
        rows = rows_of(path, check_images=check)
        assert [row["answer"] for row in rows] == ["1", "2", "3"] and [len(row["images"]) for row in rows] == [0, 0, 1]


def test_messages_of_a_table_hold_their_images(tmp_path: Path) -> None:
    """Parts of different kinds share their fields in a table; those that are null are none."""
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    asked = [{"type": "image", "image": {"bytes": plain()}, "text": None}, {"type": "text", "text": "?", "image": None}]
    answered = [{"type": "text", "text": "Three", "image": None}]
    row = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_dict({"messages": [row]}, features=features).to_parquet(tmp_path / "rows.parquet")
    for options in ({}, {"check_images": False}, {"streaming": True}):
        (read,) = rows_of(tmp_path / "rows.parquet", **options)
        assert parts_of(read) == ["<image>", "?"] and read["answer"] == "Three" and read["images"][0].size == (4, 4)


TEXT = datasets.Value("string")
PNG = plain()
CHAT = [{"role": "user", "content": "<image>?"}]
SPEECH = {"from": ["human", "gpt"], "value": ["<image>?", "x"]}


@pytest.mark.parametrize(
    ("values", "features"),
    [
        ({"image": PNG, "prompt": "?"}, {"image": datasets.Value("binary")}),
        ({"image": {"bytes": PNG, "path": None}, "prompt": "?"}, {}),
        ({"image": np.zeros((4, 4, 3), np.uint8), "prompt": "?"}, {"image": datasets.Array3D((4, 4, 3), "uint8")}),
        ({"image": np.zeros((4, 4, 3), np.uint8).tolist(), "prompt": "?"}, {}),
        ({"images": [PNG], "prompt": "?"}, {"images": datasets.List(datasets.Image(), length=1)}),
        ({"images": [PNG], "prompt": "?"}, {"images": datasets.LargeList(datasets.Image())}),
        ({"image": PNG, "messages": CHAT}, {"image": datasets.Image(), "messages": datasets.List(datasets.Json())}),
        ({"image": PNG, "conversations": SPEECH}, {"conversations": datasets.Sequence({"from": TEXT, "value": TEXT})}),
    ],
)
def test_columns_of_any_type(tmp_path: Path, values: dict[str, Any], features: dict[str, Any]) -> None:
    columns = {"answer": ["x"], **{name: [value] for name, value in values.items()}}
    told = {"answer": TEXT, "prompt": TEXT, "image": datasets.Image(), **features}
    known = datasets.Features({name: told[name] for name in columns}) if features else None
    datasets.Dataset.from_dict(columns, features=known).save_to_disk(tmp_path / "saved")
    for options in ({}, {"check_images": False}, {"streaming": True}):
        (row,) = rows_of(tmp_path / "saved", **options)
        assert parts_of(row) == ["<image>", "?"] and row["images"][0].size == (4, 4) and row["answer"] == "x"


def test_nothing_of_a_table_is_no_image(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": None}, {"bytes": PNG, "path": None}]
    made = {"image": images, "prompt": ["?", "?"], "answer": ["x", "x"]}
    datasets.Dataset.from_dict(made).to_parquet(tmp_path / "rows.parquet")
    assert [len(row["images"]) for row in rows_of(tmp_path / "rows.parquet")] == [0, 1]


def test_classes_are_known_by_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    made = {"image": [{"bytes": plain()}], "question": ["Which?"], "label": [1]}
    datasets.Dataset.from_dict(made, features=features).save_to_disk(tmp_path / "saved")
    (row,) = rows_of(tmp_path / "saved")
    assert row["answer"] == row["label"] == "dog"


def test_parts_of_splits(tmp_path: Path) -> None:
    path = saved_splits(tmp_path)
    names = {
        "train[1:]": ["train[1]", "train[2]"],
        "train[:34%]+test": ["train[0]", "test[0]"],
        "test": ["test[0]"],
        "train[-1:]": ["train[2]"],
    }
    for split, expected in names.items():
        assert [row["row"] for row in rows_of(path, split=split)] == expected
    assert [row["row"] for row in rows_of(path, split="train[1:2]", streaming=True)] == ["train[1]"]


def test_the_only_split_is_meant(tmp_path: Path) -> None:
    datasets.DatasetDict({"val": table(1)}).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved")[0]["row"] == "val[0]"


def test_configurations_are_named(tmp_path: Path) -> None:
    card = "---\nconfigs:\n"
    for number, name in enumerate(("easy", "hard")):
        table(1 + number).to_parquet(tmp_path / f"{name}.parquet")
        card += f"- config_name: {name}\n  data_files: {name}.parquet\n"
    (tmp_path / "README.md").write_text(card + "---\n")
    assert [len(rows_of(tmp_path, config=name)) for name in ("easy", "hard")] == [1, 2]
    with pytest.raises(DatasetError, match=r"has the configurations easy, hard: say which by --dataset-config"):
        load(tmp_path)
    with pytest.raises(DatasetError, match=r"is a file, which has no configurations: leave out --dataset-config"):
        load(tmp_path / "easy.parquet", config="easy")
    with pytest.raises(DatasetError, match=r"has the configurations easy, hard: and 'huge' is none"):
        load(tmp_path, config="huge")


def bad_split(folder: Path) -> dict[str, Any]:
    return {"path": saved_splits(folder), "split": "val"}


def several_splits(folder: Path) -> dict[str, Any]:
    datasets.DatasetDict({"a": table(1), "b": table(1)}).save_to_disk(folder / "saved")
    return {"path": folder / "saved"}


def no_column(folder: Path) -> dict[str, Any]:
    return {"path": saved(folder), "columns": {"images": "picture"}}


def other_image_column(folder: Path) -> dict[str, Any]:
    table().rename_column("images", "pictures").map(lambda row: {"problem": "?"}).save_to_disk(folder / "saved")
    return {"path": folder / "saved"}


def two_kinds(folder: Path) -> dict[str, Any]:
    write_lines(write_images(folder) / "rows.jsonl", GOOD)
    return {"path": parquet_file(folder).parent}


def bad_row(folder: Path) -> dict[str, Any]:
    table(3, answer=["0", "1", None]).save_to_disk(folder / "saved")
    return {"path": folder / "saved", "split": "train[1:]"}


def cut_image(folder: Path) -> dict[str, Any]:
    content = encoded(noise(), "JPEG")
    images = [[{"bytes": plain()}], [{"bytes": content[:800]}], [{"bytes": plain()}]]
    table(3, images=images, problem=["?", "?", "?"]).to_parquet(folder / "rows.parquet")
    return {"path": folder / "rows.parquet"}


def path_of_elsewhere(folder: Path) -> dict[str, Any]:
    made = {"image": ["images/1.jpg"], "question": ["?"], "answer": ["1"]}
    datasets.Dataset.from_dict(made).to_parquet(folder / "rows.parquet")
    return {"path": folder / "rows.parquet"}


def path_beside_images(folder: Path) -> dict[str, Any]:
    """As MathVista."""
    made = table().rename_column("images", "decoded_image").add_column("image", ["images/1.jpg"] * 3)
    made.save_to_disk(folder / "saved")
    return {"path": folder / "saved"}


def damaged(folder: Path) -> dict[str, Any]:
    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")
    return {"path": folder / "rows.parquet"}


def empty_folder(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"path": folder / "empty"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_split, r"saved has no split 'val': it has train, test"),
        (
            lambda folder: {"path": saved(folder), "split": "train[:9"},
            r"no such part of a split: 'train\[:9': Unrec",
        ),
        (lambda folder: {"path": saved(folder), "split": "train[2:2]"}, r"saved has no rows"),
        (several_splits, r"saved has the splits a, b: say which by --split"),
        (no_column, r"saved has no column 'picture' for images: it has images, problem, answer"),
        (
            other_image_column,
            r"no row has an image, but there are some in column 'pictures': say --image-column pi",
        ),
        (two_kinds, r"holds \.jsonl and \.parquet files: name the one that is meant|holds \.parquet and \.jsonl files"),
        (bad_row, r"saved: train\[2\]: answer is missing: no answer or solution .* in images, problem"),
        (cut_image, r"rows\.parquet: train\[1\]: cannot read image: .*truncated"),
        (path_of_elsewhere, r"rows\.parquet: train\[0\]: image .*images/1\.jpg does not exist"),
        (
            path_beside_images,
            r"images/1\.jpg does not exist, but there are images in column 'decoded_image': say --image",
        ),
        (damaged, r"rows\.parquet: datasets\.load_dataset\('parquet'\) cannot read it: .*Parquet"),
        (empty_folder, r"empty: datasets\.load_dataset cannot read it: .*doesn't contain any data files"),
        (
            lambda folder: {"path": folder / "nowhere"},
            r"nowhere does not exist: expected a folder, a file, or the id",
        ),
        (lambda folder: {"path": "rows.jsonl"}, r"^rows\.jsonl does not exist"),
        (lambda folder: {"path": "a/b/c"}, r"^a/b/c does not exist"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    options = make(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


# ---- the hub, which tests do not reach: its place is taken at the call of datasets ----------------------------------


def test_a_hub_that_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself is real; it is offline."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DatasetError) as caught:
        load("nobody/nothing", config="c")
    said = "nobody/nothing does not exist here, and the Hugging Face hub did not give it; tried "
    assert str(caught.value).startswith(
        said + "datasets.load_dataset('nobody/nothing', name='c') offline, as HF_HUB_OF"
    )
    assert "Couldn't reach" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hubs_dataset_is_asked_for_as_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        made = datasets.DatasetDict({"train": table(), "test": table(1)})
        return made if not options["streaming"] else {name: rows.to_iterable_dataset() for name, rows in made.items()}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stored = rows_of("hiyouga/geometry3k", split="train[:2]")
    streamed = rows_of("hiyouga/geometry3k", config="all", split="test", streaming=True)
    assert [row["row"] for row in [*stored, *streamed]] == ["train[0]", "train[1]", "test[0]"]
    assert asked == [
        ("hiyouga/geometry3k", {"name": None, "streaming": False}),
        ("hiyouga/geometry3k", {"name": "all", "streaming": True}),
    ]
    with pytest.raises(DatasetError, match=r"^hiyouga/geometry3k has no split 'val': it has train, test$"):
        load("hiyouga/geometry3k", split="val")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_a_hubs_rows_name_are_to_be_downloaded(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ViRL39K's."""
    made = datasets.Dataset.from_dict({"image": [["images/1.png"]], "question": ["?"], "answer": ["1"]})
    made = made.to_iterable_dataset() if streaming else made
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: {"train": made})
    message = (
        r"^TIGER-Lab/ViRL39K: train\[0\]: image images/1\.png does not exist: .*; hf download TIGER-Lab/ViRL39K --r"
    )
    with pytest.raises(DatasetError, match=message):
        load("TIGER-Lab/ViRL39K", streaming=streaming)


def test_a_stream_of_the_hub_that_decodes_in_threads_is_taken_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = encoded(noise(), "JPEG")[:800]
    made = {"image": [plain(), cut], "prompt": ["?", "?"], "answer": ["1", "2"], "more": [[{"a": 1}], ["b"]]}
    features = datasets.Features(
        {"image": datasets.Image(), "prompt": TEXT, "answer": TEXT, "more": datasets.List(datasets.Json())}
    )
    stream = datasets.Dataset.from_dict(made, features=features).to_iterable_dataset().decode(num_threads=2)
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: {"train": stream})
    read = iter(load("somebody/pictures", streaming=True).dataset)
    assert next(read)["more"] == [{"a": 1}]
    with pytest.raises(DatasetError, match=r"^somebody/pictures: train\[1\]: cannot read image: .*truncated"):
        next(read)


def test_the_package_is_imported_without_heavy_ones() -> None:
    code = (
        "import sys, vgpo_trainer.data; print([name for name in ('datasets', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_of_commands_say_a_source(capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    assert source_of(parser.parse_args(["--dataset", "a/b"])) == DataSource("a/b")
    given = (
        "--dataset a/b --dataset-config c --split test --streaming --system Think. --skip-bad-rows --no-check-images"
    )
    given += " --prompt-column p --image-column i --video-column v --answer-column a"
    assert source_of(parser.parse_args(given.split()), needs_answer=False) == DataSource(
        "a/b",
        config="c",
        split="test",
        streaming=True,
        columns={"prompt": "p", "images": "i", "videos": "v", "answer": "a"},
        system="Think.",
        skip_bad_rows=True,
        needs_answer=False,
        check_images=False,
    )
    tell_skipped([f"rows.jsonl:{row}: not JSON" for row in range(12)])
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "left out: rows.jsonl:0: not JSON" and told[10:] == ["left out: 2 rows more, 12 in all"]

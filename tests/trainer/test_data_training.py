"""Datasets in the hands of TRL: runs of real trainers, loaders with processes of their own, streams and shuffles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import datasets
import vgpo_trainer.data.rows
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from trainer.data_cases import GOOD, encoded, load, noise, plain, rows_of, write_lines
from trainer.tiny_runs import make_trainer, picture
from vgpo_trainer.data import DatasetError
from vgpo_trainer.runs.metrics import read_metrics

# Five seconds after each shuffled stream, at whatever time it is collected.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def write_parquet(folder: Path, rows: int = 8, text: tuple[int, ...] = ()) -> Path:
    """Rows in the form of geometry3k; those in ``text`` have no image."""
    made = {
        "images": [[] if row in text else [{"bytes": encoded(picture(row)), "path": None}] for row in range(rows)],
        "problem": ["Add the digits."] * rows,
        "answer": [str(row) for row in range(rows)],
        "level": list(range(rows)),
    }
    dataset = datasets.Dataset.from_dict(made)
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("options", [{}, {"streaming": True}], ids=["stored", "stream"])
def test_a_trainer_trains_on_it(tmp_path: Path, options: dict[str, Any]) -> None:
    seen: dict[str, Any] = {}

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.update(columns)
        return [float(place % 2) for place in range(len(completions))]

    dataset = load(write_parquet(tmp_path), **options).dataset
    assert isinstance(dataset, datasets.IterableDataset if options else datasets.Dataset)
    make_trainer(tmp_path / "run", dataset=dataset, reward=reward, max_steps=2).train()
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record] == [1, 2]
    assert {*seen} >= {"answer", "row", "problem", "level"}
    assert seen["answer"] == [row.removeprefix("train[").removesuffix("]") for row in seen["row"]]


def test_rows_of_text_stand_beside_rows_with_images(tmp_path: Path) -> None:
    dataset = load(write_parquet(tmp_path, 2, text=(1,))).dataset
    trainer = make_trainer(tmp_path / "run", dataset=dataset, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    (record,) = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert record["vgpo/weighted_share"] == 0.5


def test_an_image_is_decoded_once_for_the_responses_of_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = vgpo_trainer.data.rows.decode
    monkeypatch.setattr("vgpo_trainer.data.rows.decode", lambda *image: decoded.append(1) or decode(*image))
    batch = load(write_parquet(tmp_path)).dataset.__getitems__([3, 3, 3, 6, 6, 6])  # as a loader asks
    assert [row["answer"] for row in batch] == ["3"] * 3 + ["6"] * 3 and len(decoded) == 2
    assert len({id(row["prompt"]) for row in batch}) == len({id(row["images"]) for row in batch}) == 6


def test_loaders_with_processes_of_their_own(tmp_path: Path) -> None:
    dataset = load(write_parquet(tmp_path)).dataset
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert [row["answer"] for batch in loader for row in batch] == [str(row) for row in range(8)]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3]["answer"] == "3" and again[3]["images"][0].tobytes() == dataset[3]["images"][0].tobytes()


def test_an_error_in_a_loaders_process_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(plain())
    dataset = load(write_lines(tmp_path / "rows.jsonl", GOOD)).dataset
    (tmp_path / "a.png").unlink()
    try:
        dataset[0]
    except DatasetError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DatasetError) as caught:
        sent.reraise()
    assert str(caught.value) == f"{tmp_path}/rows.jsonl:1: image {tmp_path}/a.png does not exist"


def test_order_and_parts_of_a_dataset_keep_its_rows(tmp_path: Path) -> None:
    dataset = load(write_parquet(tmp_path)).dataset
    assert [row["row"] for row in dataset.select([5, 2])] == ["train[5]", "train[2]"]
    shuffled = dataset.shuffle(seed=1)
    assert sorted(row["row"] for row in shuffled) == [f"train[{row}]" for row in range(8)]
    assert load(tmp_path / "rows.parquet").dataset._fingerprint == dataset._fingerprint


def test_images_of_a_stream_are_decoded_after_its_shuffle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's shuffle holds a thousand rows."""
    decoded = []
    decode = vgpo_trainer.data.rows.decode
    monkeypatch.setattr("vgpo_trainer.data.rows.decode", lambda *image: decoded.append(1) or decode(*image))
    stream = load(write_parquet(tmp_path), streaming=True).dataset
    shuffled = stream.shuffle(seed=3)
    first = next(iter(shuffled))
    assert len(decoded) == 1 and first["images"][0].size == (48, 48)
    orders = []
    for epoch in (0, 1):
        shuffled.set_epoch(epoch)
        orders.append([row["answer"] for row in shuffled])
    assert sorted(orders[0]) == sorted(orders[1]) == [str(row) for row in range(8)] and orders[0] != orders[1]


def test_bad_rows_of_a_stream_end_it_or_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(plain())
    (tmp_path / "cut.jpg").write_bytes(encoded(noise(), "JPEG")[:800])
    bad = [{**GOOD, "image": "cut.jpg"}, {**GOOD, "answer": None}]
    path = write_lines(tmp_path / "rows.jsonl", GOOD, *bad, GOOD)
    read = iter(load(path, streaming=True).dataset)
    assert next(read)["row"] == "rows.jsonl:1"
    with pytest.raises(DatasetError, match=rf"^{path}:2: cannot read image .*cut\.jpg"):
        next(read)
    loaded = load(path, streaming=True, skip_bad_rows=True)
    with pytest.warns(UserWarning, match=r"rows left out of the stream: 1; the latest: .*rows\.jsonl:2: cannot read"):
        assert [row["row"] for row in loaded.dataset] == ["rows.jsonl:1", "rows.jsonl:4"]
    for row, message in zip(bad, ("cannot read image", "answer is missing"), strict=True):
        with pytest.raises(DatasetError, match=rf"rows\.jsonl:1: {message}"):
            load(write_lines(path, row, GOOD), streaming=True)
    assert len(rows_of(path, streaming=True, skip_bad_rows=True)) == 1


def test_progress_is_told_of_long_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = write_parquet(tmp_path)
    monkeypatch.setattr("vgpo_trainer.data.loading.BATCH", 4)
    load(path)
    assert "rows checked" not in capsys.readouterr().err
    monkeypatch.setattr("vgpo_trainer.data.loading.QUIET", 0.0)
    load(path)
    assert capsys.readouterr().err.splitlines() == [f"{path}: {done} of 8 rows checked" for done in (4, 8)]

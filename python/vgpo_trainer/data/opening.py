"""Opening a dataset with the ``datasets`` library: which files it has, which splits, and what went wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vgpo_trainer.data.errors import DatasetError, reason
from vgpo_trainer.data.lines import ENDINGS, LineFiles, ending_of
from vgpo_trainer.data.source import DataSource, OpenedSource
from vgpo_trainer.data.splits import Split, choose

# Files of rows beside their images, as the imagefolder format has them.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Builders of datasets by a file's ending.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_SPLIT_WORDS = {
    "train": r"train(ing)?",
    "validation": r"val(id(ation)?)?|dev(elopment)?",
    "test": r"test(ing)?|eval(uation)?",
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(source: DataSource) -> OpenedSource:
    """Open a dataset's split.

    Raises:
        DatasetError: It does not exist or cannot be read, or it is not said which split or configuration is meant.
    """
    path = Path(os.path.expanduser(source.path))
    if path.is_dir():
        return choose(source, _of_folder(path, source))
    if path.exists():
        if source.config is not None:
            raise DatasetError(f"{source.path} is a file, which has no configurations: leave out --dataset-config")
        return choose(source, _of_files({_split_of(path): [path]}, path.parent, source))
    return choose(source, _of_hub(source))


def _of_folder(folder: Path, source: DataSource) -> dict[str, Split]:
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with _told(source, "load_from_disk"):
            saved = datasets.load_from_disk(str(folder))
        named = dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        return {name: Split(dataset, (str(folder),)) for name, dataset in named.items()}
    if source.config is None and not _has_configs(folder):
        for name in METADATA:
            if (folder / name).is_file():
                return _of_files({"train": [folder / name]}, folder, source)
            if parts := sorted(folder.glob(f"*/{name}")):
                return _of_files({part.parent.name: [part] for part in parts}, folder, source)
        if found := _tables_in(folder):
            return _of_files(found, folder, source)
    with _told(source, "load_dataset"):
        builder = datasets.load_dataset_builder(str(folder), name=source.config)
    kind = type(builder).__module__.rpartition(".")[2]
    files = {
        str(name): [Path(str(file)) for file in listed] for name, listed in (builder.config.data_files or {}).items()
    }
    if kind in ("json", "csv") and all(ending_of(file) for listed in files.values() for file in listed):
        return _of_files(files, folder, source)
    with _told(source, "load_dataset"):
        loaded = datasets.load_dataset(str(folder), name=source.config, streaming=source.streaming)
    return {str(name): Split(dataset, (str(folder),), kind) for name, dataset in loaded.items()}


def _of_files(files: Mapping[str, Sequence[Path]], folder: Path, source: DataSource) -> dict[str, Split]:
    """Splits of files of one kind."""
    import datasets

    first = next(iter(files.values()))[0]
    if ending_of(first):
        rows = {name: LineFiles([str(file) for file in listed], str(folder)) for name, listed in files.items()}
        return {name: Split(listed, (str(folder),), "lines") for name, listed in rows.items()}
    kind = TABLES.get(first.suffix.lower())
    if kind is None:
        expected = ", ".join([*ENDINGS, *TABLES])
        raise DatasetError(f"{first} is no kind of file that is known: expected {expected}, or a folder")
    data_files = {name: [str(file) for file in listed] for name, listed in files.items()}
    with _told(source, f"load_dataset({kind!r})"):
        loaded = datasets.load_dataset(kind, data_files=data_files, streaming=source.streaming)
    # Paths in a table are relative to its file, or to the folder that was named.
    beside = {
        name: dict.fromkeys([*(str(file.parent) for file in listed), str(folder)]) for name, listed in files.items()
    }
    return {str(name): Split(dataset, tuple(beside[str(name)]), kind) for name, dataset in loaded.items()}


def _of_hub(source: DataSource) -> dict[str, Split]:
    import datasets

    path = str(source.path)
    if not _HUB_ID.fullmatch(path) or ending_of(path) or Path(path).suffix.lower() in TABLES:
        raise DatasetError(f"{path} does not exist: expected a folder, a file, or the id of a dataset on the hub")
    with _told(source, f"load_dataset({path!r}, name={source.config!r})", hub=True):
        loaded = datasets.load_dataset(path, name=source.config, streaming=source.streaming)
    return {str(name): Split(dataset) for name, dataset in loaded.items()}


def _tables_in(folder: Path) -> dict[str, list[Path]]:
    """Files of rows by split, in a folder or its ``data``; images and JSON of another kind may lie beside them."""
    found = sorted(path for place in (folder, folder / "data") if place.is_dir() for path in place.iterdir())
    kinds: dict[str, list[Path]] = {}
    for path in found:
        kind = ending_of(path) or path.suffix.lower()
        if kind in ENDINGS or kind in TABLES:
            kinds.setdefault(kind, []).append(path)
    if len(kinds) > 1:
        kinds.pop(".json", None)  # dataset_infos.json and the like
    if len(kinds) > 1:
        raise DatasetError(f"{folder} holds {' and '.join(kinds)} files: name the one that is meant")
    splits: dict[str, list[Path]] = {}
    for path in next(iter(kinds.values()), []):
        splits.setdefault(_split_of(path), []).append(path)
    return splits


def _split_of(path: Path) -> str:
    """The split that a file's name says, as the hub reads names: ``test-00000-of-00002.parquet``, ``my_val.jsonl``."""
    stem = path.name.partition(".")[0]
    if shard := _SHARD.fullmatch(stem):
        return shard.group(1)
    words = re.split(r"[-_ ]", stem.lower())
    for split, pattern in _SPLIT_WORDS.items():
        if any(re.fullmatch(pattern, word) for word in words):
            return split
    return "train"


def _has_configs(folder: Path) -> bool:
    """Whether a clone of a hub's dataset says itself which files its configurations have."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and bool(re.search(r"^configs:", text.split("\n---", 1)[0], re.MULTILINE))


@contextmanager
def _told(source: DataSource, call: str, *, hub: bool = False) -> Iterator[None]:
    """Make one line of whatever the datasets library raises."""
    from datasets import get_dataset_config_names

    try:
        yield
    except Exception as error:  # of many libraries: pyarrow, pandas, fsspec, huggingface_hub
        told = reason(error)
        if isinstance(error, ValueError) and ("Config name is missing" in told or "BuilderConfig" in told):
            try:
                names = ", ".join(get_dataset_config_names(source.path))
            except Exception:
                names = str(error).partition("[")[2].partition("]")[0]
            given = "say which by --dataset-config" if source.config is None else f"and {source.config!r} is none"
            raise DatasetError(f"{source.path} has the configurations {names}: {given}") from error
        if hub:
            offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
            tried = f"datasets.{call}" + (" offline, as HF_HUB_OFFLINE says" if offline else "")
            missing = f"{source.path} does not exist here, and the Hugging Face hub did not give it"
            raise DatasetError(f"{missing}; tried {tried}: {told}") from error
        raise DatasetError(f"{source.path}: datasets.{call} cannot read it: {told}") from error

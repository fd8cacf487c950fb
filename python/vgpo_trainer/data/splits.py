"""Splits of a dataset: the one that is meant, its media not decoded, its rows named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vgpo_trainer.data.errors import DatasetError, reason
from vgpo_trainer.data.lines import LineFiles, rows_of
from vgpo_trainer.data.rows import LINE, ROW
from vgpo_trainer.data.source import DataSource, OpenedSource

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_SLICE = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<begin>\d*):(?P<end>\d*)\])?")


@dataclass(frozen=True)
class Split:
    """A split of a source.

    Attributes:
        rows: A dataset, or files of lines that are read when the split is chosen.
        folders: Where relative paths are looked for.
        builder: See :class:`OpenedSource`.
    """

    rows: Dataset | IterableDataset | LineFiles
    folders: tuple[str, ...] = ()
    builder: str = ""


def choose(source: DataSource, splits: Mapping[str, Split]) -> OpenedSource:
    """Return the rows that ``source.split`` says.

    Raises:
        DatasetError: No such split, or none is named and it is not clear which is meant.
    """
    spec = source.split
    if spec is None:
        if "train" not in splits and len(splits) != 1:
            raise DatasetError(f"{source.path} has the splits {', '.join(splits)}: say which by --split")
        spec = "train" if "train" in splits else next(iter(splits))
    names = [part.partition("[")[0].strip() for part in spec.split("+")]
    for name in names:
        if name not in splits:
            raise DatasetError(f"{source.path} has no split {name!r}: it has {', '.join(splits)}")
    chosen = splits[names[0]]
    if any(splits[name].folders != chosen.folders for name in names):
        raise DatasetError(f"{source.path}: the splits of {spec} lie in different folders: take one of them")
    prefix = f"{source.path}: "
    if isinstance(chosen.rows, LineFiles):
        prefix = chosen.rows.prefix
    dataset = _stream(source, spec, splits) if source.streaming else _stored(source, spec, splits)
    return OpenedSource(dataset, prefix, chosen.folders, chosen.builder)


def _stored(source: DataSource, spec: str, splits: Mapping[str, Split]) -> Dataset:
    from datasets import Dataset, Features, ReadInstruction, Value, concatenate_datasets

    datasets: dict[str, Dataset] = {}
    for name in (part.partition("[")[0].strip() for part in spec.split("+")):
        rows = splits[name].rows
        if isinstance(rows, LineFiles):
            lines = list(rows_of(rows.files, rows.names))
            features = Features({ROW: Value("string"), LINE: Value("large_string")})
            rows = Dataset.from_dict({key: [line[key] for line in lines] for key in (ROW, LINE)}, features=features)
        assert isinstance(rows, Dataset)
        datasets[name] = rows
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(rows) for name, rows in datasets.items()})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"{source.path}: no such part of a split: {spec!r}: {reason(error)}") from error
    found = []
    for part in parts:
        begin, end = part.from_ or 0, len(datasets[part.splitname]) if part.to is None else part.to
        rows = _undecoded(datasets[part.splitname].select(range(begin, end)))
        if ROW not in rows.column_names:
            rows = rows.add_column(ROW, [f"{part.splitname}[{index}]" for index in range(begin, end)])
        found.append(rows)
    return found[0] if len(found) == 1 else concatenate_datasets(found)


def _stream(source: DataSource, spec: str, splits: Mapping[str, Split]) -> IterableDataset:
    from datasets import Dataset, IterableDataset

    part = _SLICE.fullmatch(spec)
    if part is None:
        raise DatasetError(f"{source.path}: of a stream a split is 'name' or 'name[begin:end]' in rows, got {spec!r}")
    name, begin, end = part["name"], int(part["begin"] or 0), part["end"]
    rows = splits[name].rows
    if isinstance(rows, LineFiles):
        named = IterableDataset.from_generator(rows_of, gen_kwargs={"files": rows.files, "names": rows.names})
    else:
        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset()
        undecoded: Any = {}
        if rows.features is not None:
            # Not a cast: streams of the hub decode in threads, which this alone takes back. It leaves JSON as text.
            rows = rows.decode(False)
            undecoded = {name: feature for name, feature in rows.features.items() if _holds_json(feature)}
        named = rows.map(partial(_name_row, name, undecoded), with_indices=True)
    if end:
        named = named.take(int(end))
    return named.skip(begin) if begin else named


def _name_row(split: str, undecoded: Mapping[str, Any], row: dict[str, Any], index: int) -> dict[str, Any]:
    read = {name: _read_json(feature, row[name]) for name, feature in undecoded.items()}
    return {**read, ROW: f"{split}[{index}]"}


def _inside(feature: Any) -> list[Any]:
    """Features of what is inside a feature."""
    if isinstance(feature, dict):
        return list(feature.values())
    return [feature.feature] if hasattr(feature, "feature") else []


def _holds_json(feature: Any) -> bool:
    return type(feature).__name__ == "Json" or any(map(_holds_json, _inside(feature)))


def _read_json(feature: Any, value: Any) -> Any:
    """A value of a stream whose JSON is text still."""
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: _read_json(feature[name], item) for name, item in value.items()}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_read_json(feature.feature, item) for item in value]
    return value


def _undecoded(dataset: Dataset) -> Dataset:
    """The same rows, whose media are {bytes, path}: casting would write them all once more."""
    from datasets import Dataset

    features = undecoded_features(dataset.features)
    if features == dataset.features:
        return dataset
    info = dataset.info.copy()
    info.features = features
    return Dataset(dataset.data, info=info, split=dataset.split)


def undecoded_features(feature: Any) -> Any:
    """Features with every image, video and recording as it is stored."""
    from datasets import Audio, Features, Image, LargeList, List, Video

    if isinstance(feature, Features):
        return Features({name: undecoded_features(item) for name, item in feature.items()})
    if isinstance(feature, dict):
        return {name: undecoded_features(item) for name, item in feature.items()}
    if isinstance(feature, (Image, Audio, Video)):
        return replace(feature, decode=False)
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=undecoded_features(feature.feature))
    return [undecoded_features(item) for item in feature] if isinstance(feature, list) else feature

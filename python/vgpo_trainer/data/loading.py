"""Rows of TRL out of any dataset: every row is read once before training, and images once more when they are needed."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from vgpo_trainer.data.errors import DatasetError, Unusable, reason
from vgpo_trainer.data.images import check
from vgpo_trainer.data.opening import open_source
from vgpo_trainer.data.rows import FLAGS, LINE, ROW, Row, RowReader, parse_line
from vgpo_trainer.data.source import DataSource, OpenedSource
from vgpo_trainer.data.videos import check_video

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BATCH = 32  # rows that are read at a time
QUIET = 5.0  # seconds after which, and between which, progress is told
PEEKED = 1000  # rows of a stream among which one must be usable


@dataclass(frozen=True)
class LoadedRows:
    """A dataset that TRL trains on.

    Attributes:
        dataset: Rows with ``prompt`` (chat messages, their contents lists of text, image and video parts), ``images``
            (images of Pillow in RGB, decoded when the row is read), ``videos`` (only if the data has any: paths, or
            lists of frames), ``answer`` (text, or ``None``), ``row`` (its name in messages) and the fields of the data.
            Reading a row raises :class:`DatasetError` where its image cannot be.
        skipped: Why rows were left out, a line each. Rows of a stream are left out while they are read, which a warning
            tells.
    """

    dataset: Dataset | IterableDataset
    skipped: list[str] = field(default_factory=list)


def load_rows(source: DataSource | str | os.PathLike[str]) -> LoadedRows:
    """Open a dataset and check its rows.

    Args:
        source: Which dataset, and how its rows are read; or the dataset's id or path alone.

    Raises:
        DatasetError: The dataset cannot be opened or has no rows, a row cannot be used (unless those are skipped), or
            no row has an image although the data has a column of images.
    """
    if not isinstance(source, DataSource):
        source = DataSource(source)
    opened = open_source(source)
    reader = RowReader(
        columns=dict(source.columns),
        system=source.system,
        needs_answer=source.needs_answer,
        max_pixels=source.max_pixels,
        prefix=opened.prefix,
        folders=opened.folders,
        classes=_classes(opened),
        samples=opened.builder == "webdataset",
    )
    _refuse_missing_columns(source, opened)
    if source.streaming:
        return _load_stream(source, opened, reader)
    return _load_stored(source, opened, reader)


def _load_stored(source: DataSource, opened: OpenedSource, reader: RowReader) -> LoadedRows:
    dataset: Any = opened.dataset
    if not len(dataset):
        raise DatasetError(f"{source.path} has no rows")
    skipped: list[str] = []
    kept: list[int] = []
    names: set[str] = set()
    kinds: set[str] = set()
    for place, (row, why) in enumerate(_checked(source, dataset, reader)):
        if row is None:
            assert why is not None
            if not source.skip_bad_rows:
                raise _with_hint(why, source, opened, reader) from why
            skipped.append(str(why))
            continue
        kept.append(place)
        names |= row.fields.keys()
        kinds |= {kind for kind, found in (("image", row.images), ("video", row.videos)) if found}
    if not kept:
        raise DatasetError(f"{source.path} has no row that can be used; the first: {skipped[0]}")
    if not kinds:
        _tell_of_text(source, opened, names, reader)
    if skipped:
        dataset = dataset.select(kept)
    return LoadedRows(dataset.with_transform(reader.handing_on(names, videos="video" in kinds)), skipped)


def _checked(source: DataSource, dataset: Any, reader: RowReader) -> Iterator[tuple[Row | None, DatasetError | None]]:
    """Yield each row, or why it cannot be used, in order."""
    stored = None if source.check_images else _Counted(dataset, reader)
    light = dataset if stored is None else dataset.remove_columns(stored.columns)
    told = time.monotonic()

    def examine(raw: Mapping[str, Any]) -> tuple[Row | None, DatasetError | None]:
        try:
            row = reader.read(raw)
            if source.check_images:
                _examine(row, f"{reader.prefix}{raw[ROW]}")
            return row, None
        except DatasetError as error:
            return None, error

    # Pillow decodes without Python's lock. Each process of a node checks all rows, on its share of the cores.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tells = os.environ.get("RANK", "0") == "0"
    with ThreadPoolExecutor(min(max((os.cpu_count() or 1) // processes, 1), 16)) as pool:
        for begin in range(0, len(dataset), BATCH):
            batch = light[begin : begin + BATCH]
            if stored is not None:
                batch.update(stored.placeholders(begin, begin + BATCH))
            rows = [{name: values[place] for name, values in batch.items()} for place in range(len(batch[ROW]))]
            yield from pool.map(examine, rows)
            if tells and time.monotonic() - told > QUIET:
                told = time.monotonic()
                print(f"{source.path}: {begin + len(rows)} of {len(dataset)} rows checked", file=sys.stderr, flush=True)


def _examine(row: Row, where: str) -> None:
    try:
        for image in row.images:
            check(image)
        for video in row.videos:
            check_video(video)
            for frame in video if isinstance(video, list) else ():
                check(frame)
    except Unusable as error:
        raise DatasetError(f"{where}: {error}") from error


class _Counted:
    """Columns of images, of which only the number in each row is read.

    Args:
        dataset: The rows.
        reader: Knows which columns hold images and videos.
    """

    def __init__(self, dataset: Dataset, reader: RowReader) -> None:
        names = {*reader.names("images"), *reader.names("videos")}
        self.columns = [name for name in dataset.column_names if name in names and _holds_bytes(dataset.features[name])]
        self._tables = dataset.select_columns(self.columns).with_format("arrow") if self.columns else None

    def placeholders(self, begin: int, end: int) -> dict[str, list[Any]]:
        """For each of the columns and rows, ``None`` or as many names as the row has images."""
        import pyarrow.compute as compute

        if self._tables is None:
            return {}
        table = self._tables[begin:end]
        found = {}
        for name in self.columns:
            column = table[name].combine_chunks()
            listed = hasattr(column.type, "value_type")
            counts = (
                compute.list_value_length(column) if listed else compute.is_valid(column).cast("int8")
            ).to_pylist()
            found[name] = [
                ["-"] * count if listed and count is not None else "-" if count else None for count in counts
            ]
        return found


def _holds_bytes(feature: Any) -> bool:
    """Whether a column is an image or video as it is stored, or a list of these."""
    from datasets import Image, LargeList, List, Value, Video

    if isinstance(feature, (List, LargeList)):
        return _holds_bytes(feature.feature)
    if isinstance(feature, Value):
        return "binary" in feature.dtype
    return isinstance(feature, (Image, Video)) or (isinstance(feature, dict) and "bytes" in feature)


def _load_stream(source: DataSource, opened: OpenedSource, reader: RowReader) -> LoadedRows:
    from vgpo_trainer.data.streaming import StreamedRows, StreamTransform

    first: Row | None = None
    raw: Mapping[str, Any] = {}
    why: DatasetError | None = None
    try:
        for raw in islice(opened.dataset, PEEKED if source.skip_bad_rows else 1):
            try:
                row = reader.read(raw)
                if source.check_images:
                    _examine(row, f"{reader.prefix}{raw[ROW]}")
                first = row
                break
            except DatasetError as error:
                why = why or error
    except DatasetError:
        raise
    except Exception as error:  # of many libraries: pyarrow, fsspec, huggingface_hub
        raise DatasetError(f"{source.path} cannot be read: {reason(error)}") from error
    if first is None:
        raise _with_hint(why, source, opened, reader) if why else DatasetError(f"{source.path} has no rows")
    names = set(first.fields)
    if LINE in raw:  # which may have different fields
        names = {name for line in opened.dataset for name in _fields_of(line[LINE])}
    videos = bool(first.videos) or not names.isdisjoint(reader.names("videos"))
    reader = reader.handing_on(names, videos=videos)
    return LoadedRows(StreamedRows(opened.dataset, StreamTransform(reader, source.skip_bad_rows), sorted(raw)))


def _fields_of(line: str) -> Iterable[str]:
    try:
        return parse_line(line)
    except Unusable:
        return ()


def _classes(opened: OpenedSource) -> dict[str, list[str]]:
    from datasets import ClassLabel

    features = opened.dataset.features or {}
    return {name: list(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _refuse_missing_columns(source: DataSource, opened: OpenedSource) -> None:
    """Refuse columns that a table does not have; rows of lines and samples have their own."""
    columns = opened.dataset.column_names
    if columns is None or opened.builder in ("lines", "webdataset"):
        return
    for role, name in source.columns.items():
        if name not in columns and name.partition(".")[0] not in columns:
            listed = ", ".join(column for column in columns if column != ROW)
            raise DatasetError(f"{source.path} has no column {name!r} for {role}: it has {listed}")


def _tell_of_text(source: DataSource, opened: OpenedSource, names: Iterable[str], reader: RowReader) -> None:
    """Refuse a dataset whose images were not found; warn of one that has none."""
    if others := _other_images(opened, reader):
        raise DatasetError(
            f"{source.path}: no row has an image, but there are some in column {others[0]!r}: say {others[1]}"
        )
    for role in ("images", "videos"):
        if (name := source.columns.get(role)) is not None and name.partition(".")[0] not in names:
            listed = ", ".join(sorted(names))
            raise DatasetError(
                f"{source.path}: no row has the field {name!r} that {FLAGS[role]} names: they have {listed}"
            )
    warnings.warn(
        f"no row of {source.path} has an image or a video: its fields are {', '.join(sorted(names))}; "
        "--image-column names the one with images",
        stacklevel=4,
    )


def _with_hint(error: DatasetError, source: DataSource, opened: OpenedSource, reader: RowReader) -> DatasetError:
    """Say where the images are, perhaps, if a path leads nowhere."""
    if not str(error).endswith("does not exist"):
        return error
    if others := _other_images(opened, reader):  # as in MathVista
        return DatasetError(f"{error}, but there are images in column {others[0]!r}: say {others[1]}")
    if reader.folders:
        return error
    download = f"hf download {source.path} --repo-type dataset --local-dir DIR"
    return DatasetError(f"{error}: its rows name files beside them; {download}, unpack what is packed, and give DIR")


def _other_images(opened: OpenedSource, reader: RowReader) -> tuple[str, str] | None:
    """A column of images that is not read, and the option that would read it."""
    from datasets import Image, List

    for name, feature in (opened.dataset.features or {}).items():
        held = isinstance(feature.feature if isinstance(feature, List) else feature, Image)
        if held and name not in reader.names("images"):
            return name, f"{FLAGS['images']} {name}"
    return None

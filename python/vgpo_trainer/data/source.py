"""What a dataset is named by, and what it is once it is open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vgpo_trainer.data.rows import NAMES

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class DataSource:
    """A dataset as people name it.

    Attributes:
        path: Id on the Hugging Face hub, folder or file; text, whatever kind of path is given.
        config: Configuration of a dataset that has several.
        split: Split, or a part of one as ``datasets`` writes it: ``train[:1000]``, ``train[:10%]+test``. By default
            ``train``, or the only one.
        streaming: Read rows while training asks for them; a hub's dataset is not stored first.
        columns: By role (``prompt``, ``images``, ``videos``, ``answer``), the column that is read, where it is called
            otherwise than docs/train.md lists. ``a.b`` is field ``b`` of column ``a``.
        system: System message put before every prompt that has none.
        skip_bad_rows: Leave out rows that cannot be used, in place of an error.
        needs_answer: Whether a row without an answer cannot be used.
        max_pixels: Images with more pixels are made smaller, their sides in proportion. Frames of videos stay.
        check_images: Decode each image far enough before training to know that it can be; not of a stream.

    Raises:
        ValueError: ``columns`` names no role.
    """

    path: str | os.PathLike[str]
    config: str | None = None
    split: str | None = None
    streaming: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    skip_bad_rows: bool = False
    needs_answer: bool = True
    max_pixels: int | None = None
    check_images: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        unknown = sorted(set(self.columns) - set(NAMES))
        if unknown:
            raise ValueError(f"columns: {unknown[0]!r} is no role; expected {', '.join(NAMES)}")


@dataclass(frozen=True)
class OpenedSource:
    """A split whose media are not decoded, with the name of each row in its column ``ROW``.

    Attributes:
        dataset: The rows.
        prefix: What stands before a row's name in messages.
        folders: Where relative paths of its rows are looked for.
        builder: What read it: ``lines`` (JSON, CSV), ``webdataset``, or another builder of datasets.
    """

    dataset: Dataset | IterableDataset
    prefix: str
    folders: tuple[str, ...] = ()
    builder: str = ""

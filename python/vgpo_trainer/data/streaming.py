"""Rows of a stream: decoded when they are read, and shuffled before that.

Imports datasets; nothing imports it before a stream is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import IterableDataset

from vgpo_trainer.data.errors import DatasetError
from vgpo_trainer.data.rows import RowReader


class StreamedRows(IterableDataset):  # type: ignore[misc]
    """Rows of TRL out of a stream of a dataset's rows.

    A shuffle holds a thousand rows, so it is done on the rows as they come, whose images are files still.

    Args:
        stream: The dataset's rows.
        transform: What makes rows of TRL of them.
        columns: Columns of the stream.
    """

    def __init__(self, stream: IterableDataset, transform: StreamTransform, columns: Sequence[str]) -> None:
        read = stream.map(transform, batched=True, batch_size=1, remove_columns=list(columns))
        super().__init__(read._ex_iterable, read.info, read.split)
        self._stream, self._transform, self._columns = stream, transform, columns

    def shuffle(self, *arguments: Any, **named: Any) -> StreamedRows:
        """As :meth:`datasets.IterableDataset.shuffle`."""
        return StreamedRows(self._stream.shuffle(*arguments, **named), self._transform, self._columns)


class StreamTransform:
    """A row reader that may leave rows out.

    Args:
        reader: Reads rows.
        skip: Leave out rows that cannot be used, and warn of the 1st, 2nd, 4th and so on.
    """

    def __init__(self, reader: RowReader, skip: bool) -> None:
        self._reader, self._skip, self._skipped = reader, skip, 0

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return rows of TRL, or none for rows that are left out."""
        try:
            return self._reader(batch)
        except DatasetError as error:
            if not self._skip:
                raise
            self._skipped += 1
            if self._skipped & (self._skipped - 1) == 0:
                warnings.warn(f"rows left out of the stream: {self._skipped}; the latest: {error}", stacklevel=2)
            return {name: [] for name in self._reader.row_names}

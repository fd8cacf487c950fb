"""Rows of measurements in CSV files, with nothing but Python: a machine with a GPU may have little else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def append_csv(rows: Sequence[Any], path: Path) -> None:
    """Append dataclasses of one type to a CSV file, which gets its heading when it is new.

    Raises:
        ValueError: The file has other columns.

    """
    if not rows:
        return
    columns = [column.name for column in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(f"{path} has the columns {', '.join(found)}, not {', '.join(columns)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)

"""Files of rows as people write them, JSON and CSV: rows may differ in fields and types, which tables do not allow.

A row is kept as a line of JSON, and read when it is asked for. Texts of CSV stay as they are: ``007`` is no number, and
``NA`` may be an answer; an empty cell is a field that is not there.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vgpo_trainer.data.errors import DatasetError, shown
from vgpo_trainer.data.rows import LINE, NAMES, ROW

JSON = (".jsonl", ".ndjson", ".json")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*JSON, *SEPARATORS)
# A list of objects, and not objects in lines, is told by how its file begins.
_LIST = re.compile(rb"\s*\[\s*([{\]]|$)")


@dataclass(frozen=True)
class LineFiles:
    """Files of one split.

    Attributes:
        files: Their paths.
        folder: What rows are named relative to.
    """

    files: list[str]
    folder: str

    @property
    def names(self) -> list[str]:
        """What each file is called in the names of rows."""
        return [os.path.relpath(file, self.folder) for file in self.files]

    @property
    def prefix(self) -> str:
        """What makes a path of a row's name again."""
        return "" if self.folder == "." else f"{self.folder}{os.sep}"


def ending_of(path: str | Path) -> str | None:
    """Which of :data:`ENDINGS` a file has, compressed with gzip or not; ``None`` for another kind of file."""
    name = str(path).lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def rows_of(files: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield each row's name and its text in JSON.

    Args:
        files: Files of JSON lines, of one list of objects, or of CSV with a line of names.
        names: What each is called in the names of rows.

    Raises:
        DatasetError: A file cannot be read, or is not UTF-8.
    """
    for file, name in zip(files, names, strict=True):
        try:
            with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as opened:
                content = io.BufferedReader(opened)  # type: ignore[arg-type]
                begin = content.peek(64)[:64]
                if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begin[:4]:
                    raise DatasetError(f"{file} is UTF-16 text: save it as UTF-8")
                if begin.startswith(codecs.BOM_UTF8):
                    begin = begin[len(codecs.BOM_UTF8) :]
                    content.read(len(codecs.BOM_UTF8))
                ending = ending_of(file)
                if ending in SEPARATORS:
                    yield from _cells(content, file, name, SEPARATORS[ending])
                elif _LIST.match(begin):
                    yield from _list_of_objects(content, file, name)
                else:
                    yield from _lines(content, file, name)
        except (OSError, EOFError) as error:  # EOFError: compressed data that break off
            raise DatasetError(f"{file} cannot be read: {error}") from error


def _lines(content: io.BufferedReader, file: str, name: str) -> Iterator[dict[str, str]]:
    # Of bytes, a line ends with a line feed: U+2028 inside a string ends none.
    for number, line in enumerate(content, start=1):
        text = _text(line, f"{file}:{number}").strip()
        if number == 1 and ending_of(file) == ".json":
            _refuse_one_object(text, content, file)
        if text:
            yield {ROW: f"{name}:{number}", LINE: text}


def _refuse_one_object(line: str, content: io.BufferedReader, file: str) -> None:
    """Refuse a file that is one object, over several lines or with its rows inside; told by its first line."""
    whole: Any = None
    several = False
    try:
        whole = json.loads(line)
        if content.peek(1) or not isinstance(whole, dict) or any(name in whole for name in NAMES["prompt"]):
            return
    except json.JSONDecodeError as error:
        if not line.startswith("{") or error.pos < len(line):
            return
        several = True
        with suppress(json.JSONDecodeError):
            whole = json.loads(line + _text(content.read(), file))
    inside = whole.items() if isinstance(whole, dict) else ()
    places = [f".{key}[]" for key, rows in inside if str(key).isidentifier() and _are_objects(rows)]
    if _are_objects([rows for _, rows in inside]):
        places = [".[]"]
    told = f"{file} is no list of objects, nor an object a line"
    if places:
        raise DatasetError(f"{told}: jq -c '{places[0]}' {file} > rows.jsonl makes lines of the rows in it")
    if several:
        raise DatasetError(told)


def _are_objects(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _list_of_objects(content: IO[bytes], file: str, name: str) -> Iterator[dict[str, str]]:
    try:
        rows = json.loads(_text(content.read(), file))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    for index, row in enumerate(rows):
        yield {ROW: f"{name}[{index}]", LINE: json.dumps(row)}


def _cells(content: IO[bytes], file: str, name: str, separator: str) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.TextIOWrapper(content, encoding="utf-8", newline=""), delimiter=separator)
    try:
        names = next(reader, [])
        number = reader.line_num + 1
        if len(names) == 1 and any(mark in names[0] for mark in ",;|\t"):
            raise DatasetError(
                f"{file}: its first line names one column, {shown(names[0])}; expected {separator!r} between cells"
            )
        for cells in reader:
            if len(cells) > len(names):
                raise DatasetError(
                    f"{file}:{number}: {len(cells)} cells, and the first line names {len(names)} columns"
                )
            row = {column: cell for column, cell in zip(names, cells, strict=False) if cell}
            if row:
                yield {ROW: f"{name}:{number}", LINE: json.dumps(row)}
            number = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}:{reader.line_num + 1}: not CSV in UTF-8: {error}") from error


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start + 1}") from error

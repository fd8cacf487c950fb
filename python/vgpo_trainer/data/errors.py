"""What is wrong with a dataset, in one line."""

from __future__ import annotations

from typing import Any

from vgpo_trainer.runs.writing import first_line

SHOWN = 80  # characters of a value that a message quotes


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message is one line and names the dataset, its split and the row."""

    def __str__(self) -> str:
        """The message alone: a loader's worker process raises an error again with its traceback as the message."""
        text = super().__str__()
        if "Original Traceback" not in text:
            return text
        return text.rstrip().rpartition("DatasetError: ")[2]


class Unusable(ValueError):
    """A value that cannot be used; who knows its row makes a :class:`DatasetError` of it."""


def shown(value: Any) -> str:
    """A value as a message quotes it: one line, cut short, bytes as their number."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        inside = ", ".join(f"{key!r}: {shown(item)}" for key, item in list(value.items())[:4])
        text = "{" + inside + ("}" if len(value) <= 4 else ", ...}")
    elif isinstance(value, list):
        text = "[" + ", ".join(map(shown, value[:3])) + ("]" if len(value) <= 3 else f", ... {len(value)} in all]")
    else:
        text = " ".join(repr(value[: 2 * SHOWN] if isinstance(value, str) else value).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def reason(error: BaseException) -> str:
    """The first line of what an error says, its own or of what caused it; its kind where it says nothing."""
    while error.__cause__ is not None and type(error).__name__ in (
        "DatasetGenerationError",
        "DatasetGenerationCastError",
    ):
        error = error.__cause__
    return first_line(error)

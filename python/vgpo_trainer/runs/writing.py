"""Writing the files of a run: whole or not at all, and one line that names the file where it cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunFailure(RuntimeError):
    """A run that broke off; the message says why, and names the file that is to blame or that holds the evidence."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while a file or folder is written into a :class:`RunFailure` that names it.

    A full disk shows in as many ways as there are libraries that write: an OSError without a name, safetensors' own
    error, and from PyTorch's archives a RuntimeError about a position.
    """
    try:
        yield
    except OSError as error:
        raise RunFailure(f"cannot write {error.filename or path}: {error.strerror or error}") from error
    except Exception as error:
        reason = first_line(error)
        if type(error).__name__ == "SafetensorError":  # by its name, so that writing text waits for no library
            raise RunFailure(f"cannot write {path}: {reason}") from error
        if "inline_container" not in reason and "PytorchStreamWriter" not in reason:
            raise
        raise RunFailure(f"cannot write {path}, is the disk full? {reason}") from error


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that whoever reads it finds the old content or the new, whatever happens meanwhile.

    Raises:
        RunFailure: It cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

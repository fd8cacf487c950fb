"""A line of a terminal that is rewritten in place while others print, and quiet for those that print too much."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, TextIO

ERASE = "\r\x1b[K"  # to the first column, and everything from there on


@contextmanager
def without_bars() -> Iterator[None]:
    """Let transformers show no bars in the block, of weights that it loads or writes."""
    from transformers.utils import logging as shown

    bars = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            shown.enable_progress_bar()


class TerminalLine:
    """A line at the bottom of a terminal that is rewritten in place; what others print meanwhile goes above it.

    While it is open, ``sys.stdout`` and ``sys.stderr`` are watched where they are terminals, and so is what handlers of
    :mod:`logging` hold of them.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._there = False  # whether the terminal shows the text
        self._begun = False  # whether others have left a line unfinished
        self._lock = RLock()
        self._replaced: list[tuple[Any, str, Any]] = []

    def open(self) -> None:
        """Begin to watch what others print."""
        watched: dict[int, _Watched] = {}
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                watched[id(stream)] = _Watched(stream, self)
                self._replace(sys, name, watched[id(stream)])
        for handler in _logging_handlers():
            if id(handler.stream) in watched:
                self._replace(handler, "stream", watched[id(handler.stream)])

    def close(self) -> None:
        """Leave the text where it is and give the streams back; harmless when that is done."""
        while self._replaced:
            owner, name, before = self._replaced.pop()
            setattr(owner, name, before)
        with self._lock:
            there, self._there, self._text = self._there, False, ""
            if there:
                self._stream.write("\n")
                self._stream.flush()

    def show(self, text: str) -> None:
        """Write a text in the place of the one before."""
        with self._lock:
            self._text = text
            self._draw()

    def above(self, text: str) -> None:
        """Write a line that stays."""
        self.print(self._stream, f"{text}\n")

    def print(self, stream: Any, text: str) -> int:
        """Write what someone else has to say; the line comes back when theirs has ended."""
        with self._lock:
            if self._there:
                self._stream.write(ERASE)
                self._stream.flush()
                self._there = False
            written: int = stream.write(text)
            stream.flush()
            if text:
                self._begun = not text.endswith("\n")
            if self._text and not self._begun:
                self._draw()
            return written

    def _draw(self) -> None:
        start = "\n" if self._begun else ERASE if self._there else ""
        self._stream.write(start + self._text)
        self._stream.flush()
        self._there, self._begun = True, False

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


class _Watched:
    """A stream whose text goes above a line; in everything else it is the stream."""

    def __init__(self, stream: Any, line: TerminalLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        return self._line.print(self._stream, text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _logging_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """The handlers of all loggers that write to a stream, each once."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {id(handler): handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    yield from (handler for handler in handlers.values() if isinstance(handler, logging.StreamHandler))

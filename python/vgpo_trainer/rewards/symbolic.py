"""Equality of expressions by math-verify, where it is installed, in a process of its own that cannot hang this one.

math-verify stops what takes too long by a signal, which works in the main thread only, and not while sympy is inside
one long multiplication of integers. Here the system ends the process that computes, and the next comparison starts
another.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import subprocess
import sys
import threading
import warnings
from functools import cache, lru_cache
from pathlib import Path

_LONGEST = 200
# Commands of notation, which a response may use where the right answer does not. With functions, sums and integrals it
# could answer with the question itself.
_NOTATION = {"sqrt", "pi", "infty", "frac", "begin", "end", "pmatrix", "bmatrix", "matrix", "cup", "cap", "in", "pm"}
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "log",
    "ln",
    "exp",
    "sinh",
    "cosh",
}
_GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "tau"}
_WORD = re.compile(r"[^\W\d_]{2,}")
_RELATION = re.compile(r"<=|>=|!=|\\in(?![a-z])|[=<>]")
_COMPOSED = re.compile(r"[-+*/^=<>({\[]|[0-9][a-z]|sqrt|pi|infty")
_LARGE_POWER = re.compile(r"\^\{?\(?-?[0-9]{4}")
_ALLOWED = re.compile(r"[\w\s+*/^=<>()\[\]{}\\.,|&!-]*")


def equal(given: str, right: str) -> bool:
    """Whether two expressions are equal as mathematics.

    False without math-verify, for what is not an expression on both sides, and for what takes two seconds to compare.

    Args:
        given: A response's answer, in the form of :func:`vgpo_trainer.rewards.notation.normal`.
        right: The right answer, likewise.

    """
    return available() and _comparable(given, right) and _equal(given, right)


@cache
def available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def _comparable(given: str, right: str) -> bool:
    if max(len(given), len(right)) > _LONGEST or not _COMPOSED.search(right):
        return False
    if not all(_ALLOWED.fullmatch(side) and not _LARGE_POWER.search(side) for side in (given, right)):
        return False
    words, right_words = set(_WORD.findall(given)), set(_WORD.findall(right))
    if not right_words <= _NOTATION | _FUNCTIONS | _GREEK or not words <= _NOTATION | right_words:
        return False
    # An equation is no value, a chain of them claims several, and the order of a list may matter.
    relations = len(_RELATION.findall(given))
    if relations != len(_RELATION.findall(right)) or relations > 1:
        return False
    return not _is_list(given) and not _is_list(right)


def _is_list(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            return True
    return False


@lru_cache(maxsize=4096)
def _equal(given: str, right: str) -> bool:
    # A fork must not read its parent's answers.
    return _worker_of(os.getpid()).ask(_latex(given), _latex(right))


def _latex(text: str) -> str:
    return re.sub(r"(?<![a-z\\])(pi|infty|alpha|beta|gamma|theta|lambda)(?![a-z])", r"\\\1 ", text)


class Worker:
    """A process that compares expressions, one pair at a time, and starts again after one that it did not survive."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._broken = False
        atexit.register(self.close)

    def ask(self, given: str, right: str) -> bool:
        """Whether the two are equal; false if the process ended over them."""
        with self._lock:
            if self._process is None and not self._broken:
                self._process = self._start()
            if self._process is None:
                return False
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                self._process.stdin.write(f"{given}\t{right}\n".replace("\r", " "))
                self._process.stdin.flush()
                said = self._process.stdout.readline()
            except OSError:
                said = ""
            if not said:
                self.close()
            return said == "equal\n"

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[str] | None:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("symbolic_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert process.stdout is not None
        if process.stdout.readline() == "ready\n":
            return process
        process.kill()
        _, complaint = process.communicate()
        self._broken = True
        reason = (complaint.strip().splitlines() or ["it ended"])[-1]
        warnings.warn(f"math-verify is installed but does not start, so it is left out: {reason}", stacklevel=2)
        return None


@cache
def _worker_of(process: int) -> Worker:
    return Worker()

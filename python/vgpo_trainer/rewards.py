"""Rewards for questions with one right answer, and reward functions named on the command line."""

from __future__ import annotations

import importlib
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_ANNOUNCED = re.compile(r".*\banswer\b\s*(?:is\b\s*:?|:)\s*(.*)", re.IGNORECASE | re.DOTALL)
_QUOTES = " \"'`*$"
_ENDINGS = _QUOTES + ".,;:!?"


def exact_answer(
    completions: Sequence[Any],
    answer: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float]:
    """Reward 1 where a completion's answer is the right one, after normalisation of both, else 0.

    Reports ``accuracy`` and, for each completion, whether it is ``correct``.

    Args:
        completions: Texts, or lists of chat messages whose last is the completion.
        answer: The right answers.
        log_extra: TRL's, for values of each completion.
        log_metric: TRL's, for numbers of the batch.

    """
    correct = [
        normalise_answer(extract_answer(completion_text(completion))) == normalise_answer(right)
        for completion, right in zip(completions, answer, strict=True)
    ]
    if log_extra is not None:
        log_extra("correct", correct)
    if log_metric is not None and correct:
        log_metric("accuracy", sum(correct) / len(correct))
    return [float(right) for right in correct]


def completion_text(completion: Any) -> str:
    """Text of a completion as TRL hands it over: plain, or as chat messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def extract_answer(text: str) -> str:
    r"""Return the part of a response that answers.

    The last ``<answer>...</answer>``, else the last ``\boxed{...}``, else the rest of the line after the last "answer:"
    or "answer is", else the last line that is not empty.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        return str(tagged[-1])
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    announced = _ANNOUNCED.match(text)
    if announced and announced.group(1).strip():
        return announced.group(1).strip().splitlines()[0]
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def normalise_answer(text: str) -> str:
    """Return an answer's bare form: case, spacing, surrounding punctuation and the spelling of numbers do not count."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).lstrip(_QUOTES).rstrip(_ENDINGS)
    # "1,234" is a number with a separator; "1,2" is a list.
    digits = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    try:
        number = (Decimal(digits) + 0).normalize()  # the sum turns -0 into 0
    except ArithmeticError:  # not a number, or beyond what can be written down
        return plain
    return str(number) if number.is_finite() else plain


def load_reward(name: str) -> Callable[..., list[float]]:
    """Import a reward function from ``module:function``; modules in the current folder are found.

    Raises:
        ValueError: The name has another form, or there is no such module or function.

    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"a reward is named module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import {module_name!r} for the reward {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}")
    return function


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}``, with its braces balanced."""
    begin = text.rfind(r"\boxed{")
    while begin >= 0:
        start = begin + len(r"\boxed{")
        depth = 1
        for position in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start:position]
        begin = text.rfind(r"\boxed{", 0, begin)
    return None

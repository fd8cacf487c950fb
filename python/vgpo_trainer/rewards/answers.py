"""The default reward: 1 where a response's answer is the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from vgpo_trainer.rewards.comparing import same_answer
from vgpo_trainer.rewards.notation import bare, normal, number

_THINKING = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_OPENING = re.compile(r"<answer>", re.IGNORECASE)
_CLOSING = re.compile(r"</answer>", re.IGNORECASE)
_MARKS = r"[ \t*_`]{0,8}"
_ANNOUNCED = re.compile(
    rf"(?<![^\W_])(?:answers?|correct[ ](?:option|choice)){_MARKS}"
    rf"(?:(?:is|are|was|would[ ]be|should[ ]be|must[ ]be)\b{_MARKS}[:\uff1a]?|[:\uff1a=])",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^[ \t#*_]*(?:final[ ]|the[ ])?answer[ \t*_]*$", re.IGNORECASE | re.MULTILINE)
_GSM8K = re.compile(r"^[ \t]*####[ \t]*(?=[-+$\u2212]{0,2}[0-9][0-9,./]*[ \t%]*$)", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(?:```\w*|\$\$|\\[\[\]])[ \t]*$", re.MULTILINE)


def exact_answer(
    completions: Sequence[Any],
    answer: Sequence[str | Sequence[str] | None],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""Reward 1 where a completion's answer is the right one, after normalisation of both, else 0.

    One answer is read from a completion, whatever the right one is (:func:`extract_answer`), so that several answers
    earn no more than one. It may differ from the right answer in notation: markup, LaTeX (``$\frac{1}{2}$`` and 0.5),
    Unicode's dashes and digits, case, spacing, separators of thousands. A letter of multiple choice may have its
    brackets, and its option's text behind it; a number may have a unit where the right one has none. An answer within a
    sentence, two answers ("5 or 6") and 0.333 for 1/3 earn nothing.

    Results depend on one package: where math-verify is installed, a right answer that is an expression (not a number)
    is also met by an equal one, ``\sqrt{12}`` for ``2\sqrt{3}``. It has two seconds for a comparison; what takes
    longer is wrong.

    Reports ``accuracy`` and, for each completion, whether it is ``correct``.

    Args:
        completions: Texts, or lists of chat messages whose last is the completion.
        answer: The right answers: a text, which may stand in ``<answer>`` tags, ``\boxed{}`` or behind ``####``, or
            several of which each is right. ``None`` for a row without one, which gets no reward (``None``).
        log_extra: TRL's, for values of each completion.
        log_metric: TRL's, for numbers of the batch.

    """
    correct = [
        None if right is None else is_correct(completion_text(completion), right)
        for completion, right in zip(completions, answer, strict=True)
    ]
    judged = [right for right in correct if right is not None]
    if log_extra is not None:
        log_extra("correct", correct)
    if log_metric is not None and judged:
        log_metric("accuracy", sum(judged) / len(judged))
    return [None if right is None else float(right) for right in correct]


def is_correct(response: str, right: str | Sequence[str]) -> bool:
    """Whether the answer read from a response is the right one, or one of several right ones."""
    given = extract_answer(response)
    accepted = [right] if isinstance(right, str) else right
    return any(same_answer(given, right_answer(one)) for one in accepted)


def completion_text(completion: Any) -> str:
    """Text of a completion as TRL hands it over: plain, or as chat messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def extract_answer(text: str) -> str:
    r"""Return the part of a response that answers: the last of the strongest kind of mark.

    What a model thinks (up to ``</think>``) does not count, and one that is still thinking has not answered. Of the
    rest the last ``<answer>...</answer>``, else the last ``\boxed{...}``, else what follows the last "answer:", "answer
    is" or GSM8K's ``####`` on its line (on the next where that one ends), else the last line that is not empty.
    """
    thoughts = list(_THINKING.finditer(text))
    if thoughts:
        if not thoughts[-1].group(1):
            return ""
        text = text[thoughts[-1].end() :]
    tagged = _last_tagged(text)
    if tagged is not None:
        marked = _last_marked(tagged)
        return tagged if marked is None else marked
    marked = _last_marked(text)
    if marked is not None:
        return marked
    lines = _lines(text)
    return lines[-1] if lines else ""


def normalise_answer(text: str) -> str:
    """Return an answer's bare form: case, spacing, markup, LaTeX's dress and the spelling of numbers do not count."""
    plain = bare(text)
    value = number(plain)
    return normal(plain) if value is None else f"{value.value} {value.unit}".rstrip()


def right_answer(text: str) -> str:
    """The answer in a right answer, which data sets give with tags, in a box, or at the end of a solution."""
    tagged = _last_tagged(text)
    inside = text if tagged is None else tagged
    boxed = _last_boxed(inside)
    if boxed is not None:
        return boxed
    behind = list(_GSM8K.finditer(inside))
    return _rest(inside, behind[-1].end()) if behind else inside


def _last_tagged(text: str) -> str | None:
    ends = list(_CLOSING.finditer(text))
    begins = list(_OPENING.finditer(text, 0, ends[-1].start())) if ends else []
    return text[begins[-1].end() : ends[-1].start()] if begins else None


def _last_marked(text: str) -> str | None:
    """What stands in the last box, else behind the last announcement that something follows."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    announcements = [found.end() for pattern in (_ANNOUNCED, _HEADING, _GSM8K) for found in pattern.finditer(text)]
    for end in sorted(announcements, reverse=True):
        rest = _rest(text, end)
        if rest:
            return rest
    return None


def _rest(text: str, begin: int) -> str:
    """The first line behind a place that holds more than markup."""
    lines = _lines(text[begin:])
    return lines[0] if lines else ""


def _lines(text: str) -> list[str]:
    """Lines that hold more than markup."""
    return [line.strip() for line in _FENCE.sub("", text).splitlines() if line.strip(" \t*_`#")]


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}`` that is in no other, with its braces balanced."""
    box = None
    opened: list[int | None] = []  # for each open brace, where a box's content begins
    boxes_open = 0
    for found in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if found.group() == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                boxes_open -= 1
                box = text[begin : found.start()] if boxes_open == 0 else box
        elif found.group() == "{":
            opened.append(None)
        elif found.group().endswith("{") and found.group() != r"\{":
            opened.append(found.end())
            boxes_open += 1
    return box

"""Whether two answers are the same one."""

from __future__ import annotations

import re

from vgpo_trainer.rewards import symbolic
from vgpo_trainer.rewards.notation import bare, normal, number

_LETTER = re.compile(r"\(?([A-Z])\)?")
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])(?:[).:]|(?=$)))(?:[:.]?\s+(.+))?", re.DOTALL
)
_ANOTHER_OPTION = re.compile(
    r"\b(?!A\b|I\b)[A-Z]\b(?!')|\b[A-Za-z](?:\)|[.:](?!\S))|(?:\b(?:or|and|not)\b|[,;/|&])\s*\(?(?!a\s+\w)[A-Za-z]\b(?!')"
)
_VARIABLE = re.compile(r"(?:[a-z]|alpha|beta|gamma|theta|phi|lambda|mu)(?:_[0-9a-z])?'?(?:\([a-z]\))?=([^=<>]+)")


def same_answer(given: str, right: str) -> bool:
    """Whether an answer is the right one; never by what a person would have to guess."""
    if len(given) > 4 * len(right) + 400:  # nothing of notation is that long
        return False
    plain, plain_right = bare(given), bare(right)
    if not plain or not plain_right:
        return bool(given.strip()) and given.strip() == right.strip()
    letter = _LETTER.fullmatch(plain_right)
    if letter is not None and _chosen(plain) == letter[1]:
        return True
    return _same(plain, plain_right)


def _same(plain: str, right: str) -> bool:
    wanted = number(right)
    form, right_form = normal(plain), normal(right)
    assigned = None if "=" in right_form else _VARIABLE.fullmatch(form)
    if assigned is not None:  # "x = 5" for 5
        plain, form = assigned[1].strip(), assigned[1].strip()
    value = number(plain)
    if wanted is not None:
        return value is not None and value.value == wanted.value and _fits(value.unit, wanted.unit)
    if form == right_form:
        return True
    return value is None and symbolic.equal(form, right_form)


def _fits(unit: str, wanted: str) -> bool:
    """Whether a number's unit is that of the right answer, or one more than that has; angles need no degree sign."""
    return unit == wanted or not wanted or (wanted == "°" and not unit)


def _chosen(plain: str) -> str | None:
    """The letter of an answer that chooses one option, with or without the option's text; ``None`` for any other."""
    found = _OPTION.fullmatch(plain)
    if found is None or _ANOTHER_OPTION.search(found[3] or ""):
        return None
    return (found[1] or found[2]).upper()

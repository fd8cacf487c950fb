"""Tokens in the colours of their numbers, for a notebook cell or a file: of anybody's loop, not only of a run's folder.

All text is escaped (see :mod:`vgpo_trainer.reports.pages`), and nothing is fetched or run: the markup has no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vgpo_trainer.reports.pages import render

Numbers = Sequence[Any] | np.ndarray | Tensor  # of a row


@dataclass(frozen=True)
class Scale:
    """What the colours of a row mean: from none at ``low`` to orange at ``high``, or from blue over none at ``center``.

    ``low`` and ``high`` are NaN where the row has no number.
    """

    low: float
    center: float | None
    high: float

    def strength(self, value: float) -> float:
        """Return the strength of a number's colour: 0 to 1, or from -1 with a center; NaN without a number."""
        begin = self.low if self.center is None else self.center
        end = self.low if self.center is not None and value < self.center else self.high
        if not math.isfinite(value) or begin == end:
            return 0.0 if math.isfinite(value) else math.nan
        share = min(max((value - begin) / (end - begin), 0.0), 1.0)
        return -share if end < begin else share


@dataclass(frozen=True)
class TokenRow:
    """One row of numbers: ``values`` has one for each token, NaN where there is no signal."""

    name: str
    values: list[float]
    scale: Scale

    @property
    def missing(self) -> int:
        """How many tokens have no signal."""
        return sum(map(math.isnan, self.values))

    def __str__(self) -> str:
        """Name and range, and how much is missing."""
        known = [value for value in self.values if not math.isnan(value)]
        span = f"{min(known):.4g} to {max(known):.4g}" if known else "no signal"
        missing = f" ({self.missing} without signal)" if known and self.missing else ""
        return f"{self.name} {span}{missing}".strip()


@dataclass(frozen=True, repr=False)
class TokenView:
    """Tokens in the colours of their numbers. A notebook shows it where a cell ends with it.

    Attributes:
        title: What stands above; may be empty.
        tokens: Text of each token.
        ids: Id of each token, or ``None`` where texts were given.
        rows: Name, numbers and scale of each row.

    """

    title: str
    tokens: list[str]
    ids: list[int] | None
    rows: list[TokenRow]

    def save(self, path: str | Path) -> Path:
        """Write a page that needs no other file and no network, and return its path."""
        path = Path(path)
        path.write_text(render("tokens.html.j2", view=self, title=self.title or "Tokens"), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        """One line: what is shown, without the tokens."""
        number = len(self.tokens)
        rows = "; ".join(map(str, self.rows))
        return f"<TokenView: {number} token{'' if number == 1 else 's'}{', ' if rows else ''}{rows}>"

    def _repr_html_(self) -> str:
        return render("token_rows.html.j2", view=self)


def show_tokens(
    tokens: Sequence[str] | Sequence[int] | Tensor,
    values: Numbers | Sequence[Numbers] | Mapping[str, Numbers],
    *,
    tokenizer: Any = None,
    title: str = "",
    center: float | Mapping[str, float] | None = None,
    limits: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
) -> TokenView:
    """Colour tokens by numbers: focus, ψ, factors, log-probabilities or anything else that a loop has for each token.

    The result shows itself in a notebook, and ``.save("tokens.html")`` writes it to a file. Spaces and line breaks are
    visible, and pointing at a token shows its number::

        show_tokens(ids[0, -T:], weights.factors[0], tokenizer=processor, center=1.0)
        show_tokens(texts, {"focus": cos[0], "factor": weights.factors[0]}, center={"factor": 1.0})

    Args:
        tokens: Text of each of the T tokens, or their ids ``[T]`` (a list, an array or a tensor) with a ``tokenizer``.
        values: T numbers: a list, an array ``[T]`` or a tensor ``[T]`` of any dtype and device. Several rows are
            ``[rows, T]``, a list of rows or, with names, a mapping. NaN, infinities and ``None`` mean no signal.
        tokenizer: Tokenizer or processor of transformers that decodes ids.
        title: What to write above.
        center: The number without a colour (1 for factors, 0 for ψ): larger ones are orange, smaller ones blue. By
            default there is one colour, from none at the smallest number of a row to orange at the largest. A mapping
            has one for each row that it names.
        limits: Numbers where colours end. By default those of the row's own numbers; with ``center`` as far from it on
            both sides. A mapping has one pair for each row that it names.

    Returns:
        A :class:`TokenView`.

    Raises:
        TypeError: Tokens are one string, or ids without a ``tokenizer``; or a value is not a number.
        ValueError: A row has not one number for each token, an id is negative, ``center`` or ``limits`` are not finite
            or out of order, or they name a row that is not there.

    """
    texts, ids = _tokens(tokens, tokenizer)
    named = _rows(values)
    for argument, given in (("center", center), ("limits", limits)):
        unknown = [name for name in given if name not in named] if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(f"{argument} names the row {unknown[0]!r}, but values has {_listed(list(named))}")
    rows = []
    for name, given_values in named.items():
        label = f"the row {name!r} of values" if len(named) > 1 or name else "values"
        numbers = _numbers(given_values, label)
        if len(numbers) != len(texts):
            raise ValueError(f"{label} must have one number for each of the {len(texts)} tokens, got {len(numbers)}")
        scale = _scale(
            numbers,
            center.get(name) if isinstance(center, Mapping) else center,
            limits.get(name) if isinstance(limits, Mapping) else limits,
        )
        rows.append(TokenRow(name, numbers, scale))
    return TokenView(title, texts, ids, rows)


def _tokens(tokens: Any, tokenizer: Any) -> tuple[list[str], list[int] | None]:
    """Return the text of each token, and its id where ids were given."""
    if isinstance(tokens, str):
        raise TypeError("tokens must be a list with the text of each token, got one string")
    if isinstance(tokens, Tensor | np.ndarray):
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be [T], the ids of one response, got {list(tokens.shape)}")
        tokens = tokens.tolist()
    tokens = [token.item() if isinstance(token, Tensor | np.generic) else token for token in tokens]
    if all(isinstance(token, str) for token in tokens):
        return tokens, None
    wrong = next((token for token in tokens if not isinstance(token, int) or isinstance(token, bool)), None)
    if wrong is not None:
        raise TypeError(f"tokens must be all texts or all ids, got {wrong!r} ({type(wrong).__name__}) among them")
    if tokenizer is None:
        raise TypeError("tokens are ids: pass the tokenizer (or processor) that decodes them as tokenizer=")
    negative = next((place for place, token in enumerate(tokens) if token < 0), None)
    if negative is not None:
        raise ValueError(f"tokens has the id {tokens[negative]} at position {negative}: leave out what is no token")
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode
    return [decode([token]) for token in tokens], tokens


def _rows(values: Any) -> dict[str, Any]:
    """Return the rows by name; a single row without a name has an empty one."""
    if isinstance(values, Mapping):
        return {str(name): row for name, row in values.items()}
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"values must be a list, an array or a tensor of numbers, got {type(values).__name__}")
    if isinstance(values, Tensor | np.ndarray):
        several = values.ndim > 1
    else:
        values = list(values)
        several = bool(values) and (getattr(values[0], "ndim", 0) > 0 or isinstance(values[0], Sequence))
    return {f"row {index + 1}": row for index, row in enumerate(values)} if several else {"": values}


def _numbers(values: Any, label: str) -> list[float]:
    """Return the numbers of a row, NaN for what is not finite."""
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{label} must be [T], one number a token, got {list(values.shape)}")
    if isinstance(values, Tensor):
        values = values.detach().cpu()  # at once, not number by number
        values = (values.double() if values.is_floating_point() else values).tolist()
    numbers = []
    for value in values:
        plain = value.item() if isinstance(value, Tensor | np.generic) else value
        if plain is not None and not isinstance(plain, int | float):
            raise TypeError(f"{label} must be numbers, got {plain!r} ({type(plain).__name__}) among them")
        numbers.append(float(plain) if plain is not None and math.isfinite(plain) else math.nan)
    return numbers


def _scale(values: list[float], center: float | None, limits: tuple[float, float] | None) -> Scale:
    if center is not None and not math.isfinite(center):
        raise ValueError(f"center must be finite, got {center}")
    if limits is not None:
        low, high = map(float, limits)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"limits must be two finite numbers, the smaller one first, got {tuple(limits)}")
        if center is not None and not low < center < high:
            raise ValueError(f"center must lie between limits {tuple(limits)}, got {center}")
        return Scale(low, center, high)
    known = [value for value in values if not math.isnan(value)]
    if center is None:
        return Scale(min(known, default=math.nan), None, max(known, default=math.nan))
    reach = max((abs(value - center) for value in known), default=0.0)
    return Scale(center - reach, center, center + reach)


def _listed(names: list[str]) -> str:
    return f"no row but {', '.join(map(repr, names))}" if any(names) else "rows without names"

"""Pages from the templates in ``templates/``, and how they write numbers.

Autoescape is on in every template, so all text from a model, a dataset or a file is shown as text. Only our own charts,
styles and scripts are :class:`~markupsafe.Markup`.
"""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vgpo_trainer.reports.charts import MINUS
from vgpo_trainer.runs.folder import StoredRollout
from vgpo_trainer.signals.words import SignalWords

FOLDER = Path(__file__).parent
NOTHING = "\N{EN DASH}"  # instead of a number that is not finite
RETURN = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"  # before a line break
TAB = "\N{RIGHTWARDS ARROW TO BAR}"  # before a tab
EMPTY = "\N{EMPTY SET}"  # instead of a token without text
BOX = "\N{REPLACEMENT CHARACTER}"  # instead of a character that shows nothing
READABLE = 0.6  # opacity of a colour below text on any page, light or dark
FIRST_TOKENS, LAST_TOKENS = 300, 100  # of a response that is longer than both


def render(template: str, **data: Any) -> str:
    """Return the page that a template makes of some data.

    Raises:
        jinja2.UndefinedError: The template needs a value that is not in the data.
    """
    return ENVIRONMENT.get_template(template).render(data)


def asset(*names: str) -> Markup:
    """Return the concatenated text of files of ``assets/``, which are part of this package."""
    return Markup("").join(Markup((FOLDER / "assets" / name).read_text(encoding="utf-8")) for name in names)


def percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{share:.1%}" if math.isfinite(share) else NOTHING


def plain(value: float) -> str:
    """Write a number with two digits after the point."""
    return f"{value:.2f}" if math.isfinite(value) else NOTHING


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, including a plus."""
    return f"{value:+.{digits}f}".replace("-", MINUS) if math.isfinite(value) else NOTHING


def shade(strength: float, most: float = 0.85) -> str:
    """Return the CSS colour of a token: orange at 1, none at 0 and without a number, blue at -1.

    Args:
        strength: Cut at -1 and 1.
        most: Opacity of the strongest colour.
    """
    opacity = most * min(abs(strength), 1.0) if math.isfinite(strength) else 0.0
    return f"rgba(var(--{'up' if strength > 0.0 else 'down'}),{opacity:.2f})"


def factor_colour(factor: float) -> str:
    """Return the CSS colour of a token with this factor: transparent at 1, strongest at 0 and from 2 on."""
    return shade(factor - 1.0)


def heat(strength: float) -> str:
    """Return the CSS colour of a token from transparent at 0 to strongest at 1."""
    return shade(max(0.0, strength))


def fold(text: Markup) -> Markup:
    """Join the lines of a paragraph and break it at 118 characters, the width of our Markdown."""
    return Markup(fill(str(text), 118, break_long_words=False, break_on_hyphens=False))


def cut(text: str, most: int = 200) -> str:
    """Leave out the rest of a text that is longer."""
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


def visible(token: str) -> str:
    """Show line breaks and tabs of a token, which would have no width or look like spaces, and what is no character."""
    shown = "".join(character if character.isprintable() or character in "\n\t" else BOX for character in token)
    return shown.replace("\n", f"{RETURN}\n").replace("\t", f"{TAB}\t")


def spaced(token: str) -> Markup:
    """Show the spaces of a token, too, by marks that are not copied with the text, and a token without text."""
    return (escape(visible(token)) or Markup(EMPTY)).replace(" ", Markup("<i> </i>"))


def reading(value: float, signal: SignalWords) -> str:
    """Write the number of a signal: a share as a percentage, anything else with its sign."""
    return percent(value) if signal.percent else signed(value)


class Ends(NamedTuple):
    """The tokens of a response that a page shows, each with factor, signal and psi, and how many lie between them."""

    begin: list[tuple[str, float, float, float]]
    left_out: int
    end: list[tuple[str, float, float, float]]


def ends(rollout: StoredRollout) -> Ends:
    """Return the beginning and the end of a long response, or all of it."""
    tokens = list(zip(rollout.tokens, rollout.factors, rollout.cos, rollout.psi, strict=False))
    left_out = len(tokens) - FIRST_TOKENS - LAST_TOKENS
    return Ends(tokens[:FIRST_TOKENS], left_out, tokens[-LAST_TOKENS:]) if left_out > 0 else Ends(tokens, 0, [])


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
FILTERS = (cut, ends, factor_colour, fold, heat, percent, plain, reading, shade, signed, spaced, visible)
ENVIRONMENT.filters |= {filter.__name__: filter for filter in FILTERS}
ENVIRONMENT.tests["special_token"] = lambda text: text.startswith("<") and text.endswith(">")
ENVIRONMENT.globals |= {"asset": asset, "zip": zip, "READABLE": READABLE}
ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False}

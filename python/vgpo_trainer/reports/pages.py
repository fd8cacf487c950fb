"""Pages from the templates in ``templates/``, and how they write numbers.

Autoescape is on in every template, so all text from a model, a dataset or a file is shown as text. Only our own charts,
styles and scripts are :class:`~markupsafe.Markup`.
"""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vgpo_trainer.reports.charts import MINUS

FOLDER = Path(__file__).parent
NOTHING = "\N{EN DASH}"  # instead of a number that is not finite


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


def factor_colour(factor: float) -> str:
    """Return the CSS colour of a token with this factor: transparent at 1, strongest at 0 and from 2 on."""
    strength = min(abs(factor - 1.0), 1.0) if math.isfinite(factor) else 0.0
    return f"rgba(var(--{'up' if factor > 1.0 else 'down'}),{0.85 * strength:.2f})"


def heat(strength: float) -> str:
    """Return the CSS colour of a token from transparent at 0 to strongest at 1."""
    return f"rgba(var(--up),{0.85 * min(max(strength, 0.0), 1.0) if math.isfinite(strength) else 0.0:.2f})"


def fold(text: Markup) -> Markup:
    """Join the lines of a paragraph and break it at 118 characters, the width of our Markdown."""
    return Markup(fill(str(text), 118, break_long_words=False, break_on_hyphens=False))


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {filter.__name__: filter for filter in (factor_colour, fold, heat, percent, plain, signed)}
ENVIRONMENT.tests["special_token"] = lambda text: text.startswith("<") and text.endswith(">")
ENVIRONMENT.globals |= {"asset": asset, "zip": zip}
ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False}

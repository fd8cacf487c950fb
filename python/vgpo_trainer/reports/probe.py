"""The page of ``vgpo probe``: one HTML file that needs no other file, no network and no script.

All text from a model, a dataset or a file name is escaped (see :mod:`vgpo_trainer.reports.pages`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from vgpo_trainer.probe.measuring import DEPENDENCY, KEYS, Key
from vgpo_trainer.probe.record import Example, Findings
from vgpo_trainer.probe.statistics import Estimate
from vgpo_trainer.probe.verdict import named
from vgpo_trainer.reports.charts import Axis, Panel, Series, axis_around, interval_chart, line_chart
from vgpo_trainer.reports.inspection import image_data
from vgpo_trainer.reports.intervals import Interval
from vgpo_trainer.reports.pages import NOTHING, render
from vgpo_trainer.runs.writing import write_atomically

SHOWN = ("focus", "attention", "entropy")  # beside the dependency, in charts and over tokens
RANKED = tuple(Key(signal, place) for signal in SHOWN[:2] for place in ("token", "state"))
LINES = (*RANKED, Key("entropy", "state"))


@dataclass(frozen=True)
class Line:
    """An answer in the colours of one signal.

    Attributes:
        name: Of the signal.
        strengths: Of each token's colour, 0 to 1.
        values: What a pointer reads off.
    """

    name: str
    strengths: list[float]
    values: list[str]


def write_page(found: Findings, pictures: Sequence[Image.Image], path: str | Path) -> Path:
    """Write the page of a probe and return its path.

    Args:
        found: What it found.
        pictures: The first picture of every prompt, by the number that examples have.
        path: Of the page.
    """
    write_atomically(path, build_page(found, pictures))
    return Path(path)


def build_page(found: Findings, pictures: Sequence[Image.Image]) -> str:
    """Return the page of a probe; as :func:`write_page`."""
    return render(
        "probe.html.j2",
        title=f"Where answers need the image: {found.model or 'a model'}",
        found=found,
        against=named(found.view),
        named=named,
        gains={place: _gain(found, place) for place in ("token", "state")},
        along=_along(found),
        finding=_finding(found),
        ranked=RANKED,
        examples=[
            (example, image_data(pictures[example.prompt]) if example.prompt < len(pictures) else "", lines(example))
            for example in found.examples
        ],
        estimate=estimate,
    )


def _gain(found: Findings, place: str) -> Markup:
    """The share of the dependency that the highest tokens of each signal hold."""
    best = Series("the dependency itself", list(zip(found.gain_at, found.gain, strict=True)))
    curves = [
        Series(signal, list(zip(found.gain_at, found.signal(signal, place).gain, strict=True))) for signal in SHOWN
    ]
    return line_chart(
        [best, *curves],
        Axis("share of the tokens, highest first", 0, 1, percent=True),
        Axis("share of the dependency", 0, 1, percent=True),
        f"dependency held by the highest tokens, signals at the {place}",
    )


def _along(found: Findings) -> Markup:
    at = found.positions["at"]
    views = [(view, values) for view, values in found.positions.items() if view != "at"]
    return line_chart(
        [Series(named(view), list(zip(at, values, strict=True))) for view, values in views],
        Axis("position in the answer", 0, 1, percent=True),
        axis_around("nats", [0.0, *(value for _, values in views for value in values)]),
        "divergence along the answer",
    )


def _finding(found: Findings) -> Markup:
    """AUC and lift of every signal but the dependency, with their intervals."""
    keys = [key for key in KEYS if key != DEPENDENCY]
    signals = [found.signal(*key) for key in keys]
    nothing: list[list[float]] = [[] for _ in keys]

    def intervals(estimates: Sequence[Estimate]) -> list[Interval]:
        return [Interval(one.value, one.low, one.high) for one in estimates]

    panels = [
        Panel("AUC", nothing, reference=0.5, intervals=intervals([signal.auc for signal in signals])),
        Panel("lift", nothing, reference=1.0, intervals=intervals([signal.lift for signal in signals])),
    ]
    names = [str(key) for key in keys]
    return interval_chart(names, panels, "how well signals find dependent tokens", baseline="", style=Markup(""))


def lines(example: Example) -> list[Line]:
    """The tokens of an answer in the colours of the dependency, and of each signal stretched to its range as psi is."""
    most = max(example.dependency, default=0.0)
    strengths = [value / most if most > 0 else 0.0 for value in example.dependency]
    shown = [Line("needs the image", strengths, [f"{value:.3f} nats" for value in example.dependency])]
    for key in map(str, LINES):
        values = example.signals[key]
        low, high = min(values, default=0.0), max(values, default=0.0)
        stretched = [(value - low) / (high - low) if high > low else 0.0 for value in values]
        told = [f"{value:.3f}, psi {psi:+.2f}" for value, psi in zip(values, example.psi[key], strict=True)]
        shown.append(Line(key, stretched, told))
    return shown


def estimate(number: Estimate, digits: int = 2, percent: bool = False) -> str:
    """Write a number with its interval."""
    if not math.isfinite(number.value):
        return NOTHING

    def write(value: float) -> str:
        return f"{value:.{max(digits - 2, 0)}%}" if percent else f"{value:.{digits}f}"

    if not math.isfinite(number.low):
        return write(number.value)
    return f"{write(number.value)} [{write(number.low)}, {write(number.high)}]"

"""Charts of a report as inline SVG: no script, no font, no file beside the page.

Colours come from the page's CSS (``.series-0``, ``.axis``, ``.grid``, ...), so one chart serves light and dark.
Everything that is text passes through :func:`html.escape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 300
MINUS = "\N{MINUS SIGN}"
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 46  # margins around the plot


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: ``(x, y)``, x increasing; a point that is not finite leaves a gap.
        band: ``(x, low, high)``, drawn behind the line.
        smoothed: Draw the points faintly and their running mean on top.
        markers: Draw a dot at every point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = field(default=())
    smoothed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        label: Its title.
        low, high: Its range.
        percent: Write ticks as percentages.
    """

    label: str
    low: float
    high: float
    percent: bool = False

    def ticks(self, most: int = 7) -> list[float]:
        """Round numbers inside the range, no more than that."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / (most - 1)))
        step = next(power * digit for digit in (1, 2, 5, 10) if span <= (most - 1) * power * digit)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def write(self, value: float) -> str:
        """A tick's text."""
        if self.percent:
            return f"{100 * value:.0f}%"
        return f"{value:.4g}".replace("-", MINUS)


def axis_around(label: str, values: Sequence[float], *, pad: float = 0.06, percent: bool = False) -> Axis:
    """An axis that holds all finite values with some room; an axis of 0 to 1 if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Axis(label, 0.0, 1.0, percent)
    low, high = min(finite), max(finite)
    room = pad * (high - low) or max(abs(high), 1.0) * pad
    return Axis(label, low - room, high + room, percent)


def line_chart(series: Sequence[Series], x_axis: Axis, y_axis: Axis, title: str) -> str:
    """Lines with bands, dots and a legend.

    Args:
        series: At most four; their colours are the page's ``series-0`` to ``series-3``.
        x_axis: The horizontal axis.
        y_axis: The vertical axis.
        title: What a screen reader says.
    """
    place_x, place_y = _placement(x_axis, y_axis)
    marks = []
    for index, line in enumerate(series):
        colour = f"series-{index}"
        band = [edge for edge in line.band if all(map(math.isfinite, edge))]
        if band:
            upper = [(place_x(x), place_y(high)) for x, _, high in band]
            lower = [(place_x(x), place_y(low)) for x, low, _ in reversed(band)]
            marks.append(f'<path class="band {colour}" d="{_path(upper + lower)}Z"/>')
        drawn = [(place_x(x), place_y(y)) for x, y in line.points if math.isfinite(y)]
        if line.smoothed:
            marks.append(f'<path class="line faint {colour}" d="{_path(drawn)}"/>')
            drawn = [(place_x(x), place_y(y)) for x, y in running_mean(line.points)]
        marks.append(f'<path class="line {colour}" d="{_path(drawn)}"/>')
        if line.markers:
            marks += [
                f'<circle class="dot {colour}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5">'
                f"<title>{escape(x_axis.label)} {x_axis.write(x)}: {_precise(y, y_axis)}</title></circle>"
                for x, y in line.points
                if math.isfinite(y)
            ]
    names = [line.name for line in series]
    return _chart(marks, names, x_axis, y_axis, place_x, place_y, title)


def histogram(groups: Sequence[tuple[str, Sequence[float]]], x_label: str, title: str, bins: int = 28) -> str:
    """Distributions over each other, each scaled to an area of 1, with a tick at each median.

    Args:
        groups: Name and values of each; values that are not finite are left out.
        x_label: Title of the horizontal axis.
        title: What a screen reader says.
        bins: Number of bins over the common range.
    """
    finite = [(name, [value for value in values if math.isfinite(value)]) for name, values in groups]
    x_axis = axis_around(x_label, [value for _, values in finite for value in values], pad=0.02)
    width = (x_axis.high - x_axis.low) / bins
    shares = []
    for _, values in finite:
        counts = [0] * bins
        for value in values:
            counts[min(int((value - x_axis.low) / width), bins - 1)] += 1
        shares.append([count / max(len(values), 1) for count in counts])
    y_axis = Axis("share", 0.0, 1.08 * max((max(share) for share in shares), default=1.0) or 1.0, percent=True)
    place_x, place_y = _placement(x_axis, y_axis)
    marks = []
    for index, share in enumerate(shares):
        outline = [(place_x(x_axis.low), place_y(0.0))]
        for number, height in enumerate(share):
            outline.append((place_x(x_axis.low + number * width), place_y(height)))
            outline.append((place_x(x_axis.low + (number + 1) * width), place_y(height)))
        outline.append((place_x(x_axis.high), place_y(0.0)))
        marks.append(f'<path class="band series-{index}" d="{_path(outline)}Z"/>')
        marks.append(f'<path class="line thin series-{index}" d="{_path(outline)}"/>')
    names = []
    for index, (name, values) in enumerate(finite):
        names.append(f"{name}: {len(values):,}" + (f", median {_median(values)}" if values else ""))
        if values:
            x = place_x(median(values))
            marks.append(
                f'<line class="median series-{index}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            )
    return _chart(marks, names, x_axis, y_axis, place_x, place_y, title)


def running_mean(points: Sequence[tuple[float, float]], window: int = 9) -> list[tuple[float, float]]:
    """Centred running mean of the finite points; the window ends where they do."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    half = window // 2
    means = []
    for index, (x, _) in enumerate(finite):
        near = finite[max(index - half, 0) : index + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def median(values: Sequence[float]) -> float:
    """The middle value; NaN without any."""
    if not values:
        return math.nan
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _placement(x_axis: Axis, y_axis: Axis) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Functions from values to pixels."""

    def place_x(value: float) -> float:
        return LEFT + (value - x_axis.low) / (x_axis.high - x_axis.low) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_axis.low) / (y_axis.high - y_axis.low) * (HEIGHT - TOP - BOTTOM)

    return place_x, place_y


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _chart(
    marks: Sequence[str],
    names: Sequence[str],
    x_axis: Axis,
    y_axis: Axis,
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    title: str,
) -> str:
    """Frame, grid, ticks and legend around the marks."""
    floor = HEIGHT - BOTTOM
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in y_axis.ticks():
        y = place_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{y_axis.write(value)}</text>'
        )
    for value in x_axis.ticks(8):
        x = place_x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{x_axis.write(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_axis.label)}</text>'
    )
    middle = (TOP + floor) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_axis.label)}</text>"
    )
    parts += marks
    parts.append("</svg>")
    entries = "".join(
        f'<span class="key"><i class="swatch series-{index}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>{"".join(parts)}'


def _precise(value: float, axis: Axis) -> str:
    return f"{100 * value:.1f}%" if axis.percent else f"{value:.4g}"


def _median(values: Sequence[float]) -> str:
    """The median for a legend, with its sign where the values have two."""
    sign = "+" if min(values) < 0 < max(values) else ""
    return f"{median(values):{sign}.2f}".replace("-", MINUS)

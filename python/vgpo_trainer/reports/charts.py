"""Charts as SVG: no script, no font, no other file.

Colours come from ``assets/chart.css`` (``.series-0``, ``.axis``, ``.grid``, ...), so the same chart works on light and
dark pages. Markup is always written with :meth:`markupsafe.Markup.format`, which escapes every value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from markupsafe import Markup

from vgpo_trainer.reports.intervals import Interval

WIDTH, HEIGHT = 560, 300
MINUS = "\N{MINUS SIGN}"
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 14, 46  # margins around the plot
NAMES, PANEL, ROW = 200, 300, 32  # of an interval chart: width of the names and of a panel, height of a row


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


@dataclass(frozen=True)
class Panel:
    """One quantity of an interval chart.

    Attributes:
        label: Title of its axis.
        values: Of each row; a row may have none.
        reference: Where a dashed line is drawn; None draws none.
        intervals: Of each row, where they are known; by default those of the mean of its values.
    """

    label: str
    values: Sequence[Sequence[float]]
    reference: float | None = None
    intervals: Sequence[Interval] = ()


def axis_around(label: str, values: Sequence[float], *, pad: float = 0.06) -> Axis:
    """An axis that holds all finite values with some room; an axis of 0 to 1 if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Axis(label, 0.0, 1.0)
    low, high = min(finite), max(finite)
    room = pad * (high - low) or max(abs(high), 1.0) * pad
    return Axis(label, low - room, high + room)


def line_chart(series: Sequence[Series], x_axis: Axis, y_axis: Axis, title: str) -> Markup:
    """Lines with bands, dots and a legend.

    Args:
        series: At most four; their colours are the page's ``series-0`` to ``series-3``.
        x_axis: The horizontal axis.
        y_axis: The vertical axis.
        title: What a screen reader says.
    """
    place_x, place_y = _scale(x_axis, LEFT, WIDTH - RIGHT), _scale(y_axis, HEIGHT - BOTTOM, TOP)
    marks = []
    for index, line in enumerate(series):
        colour = f"series-{index}"
        band = [edge for edge in line.band if all(map(math.isfinite, edge))]
        if band:
            upper = [(place_x(x), place_y(high)) for x, _, high in band]
            lower = [(place_x(x), place_y(low)) for x, low, _ in reversed(band)]
            marks.append(Markup('<path class="band {}" d="{}Z"/>').format(colour, _path(upper + lower)))
        drawn = [(place_x(x), place_y(y)) for x, y in line.points if math.isfinite(y)]
        if line.smoothed:
            marks.append(Markup('<path class="line faint {}" d="{}"/>').format(colour, _path(drawn)))
            drawn = [(place_x(x), place_y(y)) for x, y in running_mean(line.points)]
        marks.append(Markup('<path class="line {}" d="{}"/>').format(colour, _path(drawn)))
        if line.markers:
            dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{} {}: {}</title></circle>')
            marks += [
                dot.format(colour, place_x(x), place_y(y), x_axis.label, x_axis.write(x), _precise(y, y_axis))
                for x, y in line.points
                if math.isfinite(y)
            ]
    names = [line.name for line in series]
    return _chart(marks, names, x_axis, y_axis, place_x, place_y, title)


def histogram(groups: Sequence[tuple[str, Sequence[float]]], x_label: str, title: str, bins: int = 28) -> Markup:
    """Distributions in one plot, each as shares that sum to 1, with a dashed line at each median.

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
    place_x, place_y = _scale(x_axis, LEFT, WIDTH - RIGHT), _scale(y_axis, HEIGHT - BOTTOM, TOP)
    marks = []
    for index, share in enumerate(shares):
        outline = [(place_x(x_axis.low), place_y(0.0))]
        for number, height in enumerate(share):
            outline.append((place_x(x_axis.low + number * width), place_y(height)))
            outline.append((place_x(x_axis.low + (number + 1) * width), place_y(height)))
        outline.append((place_x(x_axis.high), place_y(0.0)))
        marks.append(Markup('<path class="band series-{}" d="{}Z"/>').format(index, _path(outline)))
        marks.append(Markup('<path class="line thin series-{}" d="{}"/>').format(index, _path(outline)))
    names = []
    for index, (name, values) in enumerate(finite):
        names.append(f"{name}: {len(values):,}" + (f", median {_median(values)}" if values else ""))
        if values:
            line = Markup('<line class="median series-{}" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
            marks.append(line.format(index, TOP, HEIGHT - BOTTOM, x=place_x(median(values))))
    return _chart(marks, names, x_axis, y_axis, place_x, place_y, title)


def interval_chart(names: Sequence[str], panels: Sequence[Panel], title: str, *, baseline: str, style: str) -> Markup:
    """Means with 95% intervals, one row per name and one column per panel, as an SVG file that needs no other file.

    Args:
        names: Of the rows.
        panels: From left to right.
        title: What a screen reader says.
        baseline: Name of the row that the others are compared with; it is drawn in grey.
        style: The CSS of charts.
    """
    width, floor = NAMES + len(panels) * PANEL, TOP + ROW * len(names)
    rows = [TOP + ROW * (index + 0.5) for index in range(len(names))]
    colours = ["baseline" if name == baseline else "series-1" for name in names]
    label = Markup('<text class="name" x="{}" y="{:.1f}" text-anchor="end">{}</text>')
    parts = [label.format(NAMES - 12, y + 4, name) for y, name in zip(rows, names, strict=True)]
    for number, panel in enumerate(panels):
        left = NAMES + number * PANEL
        parts += _panel(panel, list(zip(rows, colours, strict=True)), left + 8, left + PANEL - 16, floor)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" width="{width}" '
        'height="{height}" role="img" aria-label="{}">\n<style>\n{}</style>\n'
        '<rect class="paper" width="{width}" height="{height}"/>\n{}\n</svg>\n'
    ).format(title, style, Markup("\n").join(parts), width=width, height=floor + BOTTOM)


def _panel(
    panel: Panel, rows: Sequence[tuple[float, str]], left: float, right: float, floor: float
) -> Iterator[Markup]:
    """Grid, axis, intervals, values and means of one panel; a row is its height and its colour."""
    intervals = panel.intervals or [Interval.of(values) for values in panel.values]
    shown = [value for values in panel.values for value in values]
    shown += [edge for interval in intervals for edge in (interval.low, interval.mean, interval.high)]
    axis = axis_around(panel.label, shown if panel.reference is None else [*shown, panel.reference], pad=0.03)
    place = _scale(axis, left, right)
    upright = Markup('<line class="{}" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>')
    yield from (upright.format("grid", TOP, floor, x=place(value)) for value in axis.ticks())
    yield _bottom(axis, axis.ticks(), place, floor)
    if panel.reference is not None:
        yield upright.format("reference", TOP, floor, x=place(panel.reference))
    for (y, colour), values, interval in zip(rows, panel.values, intervals, strict=True):
        if math.isfinite(interval.low):
            line = Markup('<line class="line {}" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            yield line.format(colour, place(interval.low), place(interval.high), y=y)
        dot = Markup('<circle class="value {}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
        yield from (dot.format(colour, place(value), y) for value in values if math.isfinite(value))
        if math.isfinite(interval.mean):
            yield Markup('<path class="mean {}" d="M{:.1f} {:.1f}l5 5l-5 5l-5-5Z"/>').format(
                colour, place(interval.mean), y - 5
            )


def running_mean(points: Sequence[tuple[float, float]], window: int = 9) -> list[tuple[float, float]]:
    """Centred running mean of the finite points; the window ends where they do."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    half = window // 2
    means = []
    for index, (x, _) in enumerate(finite):
        near = finite[max(index - half, 0) : index + half + 1]
        means.append((x, fmean(y for _, y in near)))
    return means


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    """A function from values of an axis to pixels."""
    return lambda value: start + (value - axis.low) / (axis.high - axis.low) * (end - start)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _chart(
    marks: Sequence[Markup],
    names: Sequence[str],
    x_axis: Axis,
    y_axis: Axis,
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    title: str,
) -> Markup:
    """Frame, grid, ticks and legend around the marks."""
    floor = HEIGHT - BOTTOM
    tick = Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    )
    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    for value in y_axis.ticks():
        y = place_y(value)
        parts.append(tick.format(LEFT, WIDTH - RIGHT, LEFT - 8, y + 4, y_axis.write(value), y=y))
    parts.append(_bottom(x_axis, x_axis.ticks(8), place_x, floor))
    label = Markup('<text class="label" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>')
    parts.append(label.format((TOP + floor) / 2, y_axis.label))
    entry = Markup('<span class="key"><i class="swatch series-{}"></i>{}</span>')
    legend = Markup("").join(entry.format(index, name) for index, name in enumerate(names))
    return Markup('<div class="legend">{}</div>{}{}</svg>').format(
        legend, Markup("").join(parts), Markup("").join(marks)
    )


def _bottom(axis: Axis, ticks: Sequence[float], place: Callable[[float], float], floor: float) -> Markup:
    """A horizontal axis with its ticks and its label."""
    tick = Markup(
        '<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>'
        '<text class="tick" x="{x:.1f}" y="{}" text-anchor="middle">{}</text>'
    )
    frame = Markup(
        '<line class="axis" x1="{:.0f}" x2="{:.0f}" y1="{floor}" y2="{floor}"/>'
        '<text class="label" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
    )
    left, right = place(axis.low), place(axis.high)
    return Markup("").join(
        tick.format(floor, floor + 4, floor + 18, axis.write(value), x=place(value)) for value in ticks
    ) + frame.format(left, right, (left + right) / 2, floor + BOTTOM - 6, axis.label, floor=floor)


def _precise(value: float, axis: Axis) -> str:
    return f"{100 * value:.1f}%" if axis.percent else f"{value:.4g}"


def _median(values: Sequence[float]) -> str:
    """The median for a legend, with its sign where the values have two."""
    sign = "+" if min(values) < 0 < max(values) else ""
    return f"{median(values):{sign}.2f}".replace("-", MINUS)

"""The comparison of an ablation: statistics over seeds, the table, the plot, and the files they are written to."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

from vgpo_trainer.runs.writing import write_atomically, writing

BASELINE = "dapo"
LEVEL = 0.95
FEWEST_PAIRS = 3  # for a difference to be spoken of


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: For the table and the plot.
        changes: Fields of :class:`~vgpo_kernels.VGPOConfig` that differ from the paper's; None trains without VGPO.
    """

    title: str
    changes: dict[str, Any] | None


ARMS = {
    "dapo": Arm("DAPO", None),
    "intra": Arm("DAPO + intra", {"inter": False}),
    "inter": Arm("DAPO + inter", {"intra": False}),
    "vgpo": Arm("VGPO: both, linear, tail gate", {}),
    "exponential": Arm("VGPO, exponential schedule", {"schedule": "exponential"}),
    "step": Arm("VGPO, step schedule", {"schedule": "step"}),
    "full": Arm("VGPO, full compensation", {"gate": False}),
}


@dataclass(frozen=True)
class Run:
    """What came out of one arm with one seed.

    Attributes:
        accuracy_before, accuracy: Held-out, of greedy answers, 0 to 1.
        late_early_ratio: Visual accumulation of a response's second half over its first, of the responses sampled in
            the last ten steps.
        reward: Mean of the last ten steps.
        steps: Done.
        seconds: On the wall.
        cpu_seconds: Of all threads.
        rewards: Of every step.
    """

    arm: str
    seed: int
    accuracy_before: float
    accuracy: float
    late_early_ratio: float
    reward: float
    steps: int
    seconds: float
    cpu_seconds: float
    threads: int
    versions: dict[str, str]
    rewards: list[float]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval (Student's t); NaN where there are too few."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of the mean of some values; of one value, and of none, it is unknown."""
        if not values:
            return cls(math.nan, math.nan, math.nan)
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, math.nan, math.nan)
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ArmStatistics:
    """An arm over its seeds.

    Attributes:
        arm: Its name.
        seeds: Of the finished runs.
        pairs: How many of them have a run of DAPO beside them.
        accuracy: Held-out.
        difference: Of accuracy to DAPO's with the same seed.
        late_early_ratio: As in :class:`Run`.
        ratio_difference: Of the late/early ratio to DAPO's with the same seed.
    """

    arm: str
    seeds: list[int]
    pairs: int
    accuracy: Interval
    difference: Interval
    late_early_ratio: Interval
    ratio_difference: Interval


def summarise(runs: Sequence[Run]) -> list[ArmStatistics]:
    """Statistics of every arm that has a finished run, in the order of :data:`ARMS`."""
    baseline = {run.seed: run for run in runs if run.arm == BASELINE}
    summary = []
    for arm in ARMS:
        own = sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
        pairs = [(run, baseline[run.seed]) for run in own if run.seed in baseline and arm != BASELINE]
        if own:
            summary.append(
                ArmStatistics(
                    arm=arm,
                    seeds=[run.seed for run in own],
                    pairs=len(pairs),
                    accuracy=Interval.of([run.accuracy for run in own]),
                    difference=Interval.of([run.accuracy - other.accuracy for run, other in pairs]),
                    late_early_ratio=Interval.of([run.late_early_ratio for run in own]),
                    ratio_difference=Interval.of([run.late_early_ratio - o.late_early_ratio for run, o in pairs]),
                )
            )
    return summary


def write_ablation(folder: Path, report: Path, budget: Mapping[str, Any], runs: Sequence[Run]) -> Path:
    """Write ``results.csv`` and ``results.json`` to one folder, ``ablation.md`` and ``images/ablation.svg`` to another.

    Args:
        folder: The ablation's.
        report: For the comparison; it may be the same.
        budget: What the runs share.
        runs: At least one.

    Returns:
        The path of ``ablation.md``.

    Raises:
        RunFailure: A file cannot be written.
    """
    with writing(report):
        return _write(folder, report, budget, runs)


def _write(folder: Path, report: Path, budget: Mapping[str, Any], runs: Sequence[Run]) -> Path:
    summary = summarise(runs)
    columns = [field.name for field in fields(Run) if field.name not in ("versions", "rewards")]
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(run) for run in runs)
    write_atomically(folder / "results.csv", buffer.getvalue())
    results = {"budget": budget, "arms": [asdict(arm) for arm in summary], "runs": [asdict(run) for run in runs]}
    write_atomically(folder / "results.json", json.dumps(_without_nan(results), indent=2) + "\n")
    image = report / "images" / "ablation.svg"
    image.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(image, plot(summary, runs))
    page = report / "ablation.md"
    write_atomically(page, markdown(summary, runs, budget))
    return page


def markdown(summary: Sequence[ArmStatistics], runs: Sequence[Run], budget: Mapping[str, Any]) -> str:
    """The comparison as a page: table, plot, what it says and how it was measured."""
    lines = [
        "| | seeds | held-out accuracy | against DAPO, same seed | late/early accumulation | against DAPO, same seed |",
        "| :-- | --: | :-- | :-- | :-- | :-- |",
    ]
    for arm in summary:
        cells = [
            ARMS[arm.arm].title,
            str(len(arm.seeds)),
            _percent(arm.accuracy),
            "" if arm.arm == BASELINE else _points(arm.difference),
            _ratio(arm.late_early_ratio),
            "" if arm.arm == BASELINE else _ratio(arm.ratio_difference, sign=True),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before = statistics.fmean(run.accuracy_before for run in runs)
    versions = sorted({escape(f"{name} {number}") for run in runs for name, number in run.versions.items()})
    threads = sorted({run.threads for run in runs})
    shapes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in budget.items())
    measured = (
        f"Every run takes {budget['steps']} optimisation steps of {budget['prompts']} problems with "
        f"{budget['generations']} responses each, from the same warm-started checkpoint, which solves {before:.1%} of "
        f"the {budget['problems']} held-out problems; learning rate {budget['learning_rate']:g}, sampling temperature "
        f"{budget['temperature']:g}. Runs with the same seed see the same problems. Accuracy is that of greedy answers "
        "to problems whose scans no training problem uses, the same for every run. Intervals are 95% intervals of the "
        "mean over seeds (Student's t), so they hold the chance of training and sampling, not that of drawing other "
        "held-out problems. Late/early accumulation is the visual focus of a response's second half over that of its "
        f"first, over the responses sampled in the last ten steps. Measured with {', '.join(versions)} on "
        f"{' or '.join(map(str, threads))} CPU thread{'s' if threads != [1] else ''}, "
        f"{statistics.fmean(run.cpu_seconds for run in runs):.0f} CPU seconds a run."
    )
    return (
        "# Ablation\n\n"
        + _wrap("What the parts of VGPO do on the task of `vgpo demo`, as measured.")
        + "\n"
        + "\n".join(lines)
        + "\n\n![Held-out accuracy, its difference from DAPO and late/early accumulation of each arm]"
        + "(images/ablation.svg)\n\n"
        + _wrap(verdict(summary))
        + "\n"
        + _wrap(measured)
        + "\nTo measure it again, or to go on with it:\n\n"
        + f"```bash\nvgpo ablate --out DIR --seeds {max(len(arm.seeds) for arm in summary)} {shapes}\n```\n"
    )


def verdict(summary: Sequence[ArmStatistics]) -> str:
    """What the intervals say, in words."""
    # Of two values even Student's interval is a guess: they may agree by chance.
    compared = [arm for arm in summary if arm.arm != BASELINE and arm.pairs >= FEWEST_PAIRS]
    counts = sorted({len(arm.seeds) for arm in summary})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    if not compared:
        return "There are too few finished runs to compare arms yet."
    by_chance = 1 - LEVEL ** len(compared)
    caution = (
        f"Of {len(compared)} such intervals, at least one misses a true zero by chance alone in up to "
        f"{by_chance:.0%} of ablations."
    )
    apart = [arm for arm in compared if arm.difference.excludes_zero]
    below = sum(arm.difference.mean < 0 for arm in compared)
    direction = f"{below} of {len(compared)} means lie below DAPO's."
    if not apart:
        half = max((arm.difference.high - arm.difference.low) / 2 for arm in compared)
        return (
            f"With {seeds} seeds an arm, no difference from DAPO in held-out accuracy is shown: every interval holds "
            f"zero. {direction} The widest interval is ± {100 * half:.1f} points; smaller effects would not show here."
        )
    told = "; ".join(f"{ARMS[arm.arm].title} {_points(arm.difference)} points" for arm in apart)
    return (
        f"With {seeds} seeds an arm, the interval of the difference from DAPO excludes zero for: {told}. "
        f"{direction} {caution}"
    )


def plot(summary: Sequence[ArmStatistics], runs: Sequence[Run]) -> str:
    """Accuracy, its difference from DAPO and late/early accumulation of each arm as an SVG, seeds as dots."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    order = [arm.arm for arm in summary]
    baseline = {run.seed: run for run in runs if run.arm == BASELINE}
    own = {name: [run for run in runs if run.arm == name] for name in order}
    paired = {name: [run for run in own[name] if run.seed in baseline and name != BASELINE] for name in order}
    panels = [
        (
            "held-out accuracy, %",
            {arm.arm: arm.accuracy for arm in summary},
            {name: [run.accuracy for run in own[name]] for name in order},
            100,
        ),
        (
            "accuracy minus DAPO's, same seed, points",
            {arm.arm: arm.difference for arm in summary},
            {name: [run.accuracy - baseline[run.seed].accuracy for run in paired[name]] for name in order},
            100,
        ),
        (
            "late/early accumulation",
            {arm.arm: arm.late_early_ratio for arm in summary},
            {name: [run.late_early_ratio for run in own[name]] for name in order},
            1,
        ),
    ]
    # The same runs give the same file: identifiers from a fixed salt, no date.
    with mpl.rc_context({"svg.hashsalt": "ablation", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(11, 0.9 + 0.4 * len(order)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (label, intervals, values, scale) in zip(axes, panels, strict=True):
            for row, name in enumerate(order):
                colour = "#7a7a7a" if name == BASELINE else "#c8501e"
                interval, dots = intervals[name], [scale * value for value in values[name]]
                axis.plot(dots, [row] * len(dots), "o", color=colour, markerfacecolor="white", markersize=4.5, zorder=3)
                axis.plot([scale * interval.low, scale * interval.high], [row, row], color=colour, linewidth=1.8)
                axis.plot([scale * interval.mean], [row], "D", color=colour, markersize=5, zorder=4)
            axis.set_xlabel(label)
            axis.locator_params(axis="x", nbins=5)
            axis.grid(axis="x", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        axes[1].axvline(0, color="#7a7a7a", linewidth=1, linestyle=(0, (4, 3)))
        axes[0].set_yticks(range(len(order)), [ARMS[name].title for name in order])
        axes[0].set_ylim(len(order) - 0.5, -0.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _percent(interval: Interval) -> str:
    return _written(interval, lambda value: f"{100 * value:.1f}%")


def _points(interval: Interval) -> str:
    return _written(interval, lambda value: f"{100 * value:+.1f}")


def _ratio(interval: Interval, sign: bool = False) -> str:
    return _written(interval, lambda value: f"{value:{'+' if sign else ''}.4f}")


def _written(interval: Interval, write: Any) -> str:
    if math.isnan(interval.mean):
        return "\N{EN DASH}"
    text = write(interval.mean)
    if math.isfinite(interval.low):
        text += f" ({write(interval.low)} to {write(interval.high)})"
    return str(text).replace("-", "\N{MINUS SIGN}")


def _wrap(text: str) -> str:
    return fill(text, 118, break_long_words=False, break_on_hyphens=False) + "\n"


def _without_nan(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value

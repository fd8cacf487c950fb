"""The comparison of an ablation: statistics over seeds, the table, the plot, and their files."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vgpo_trainer.reports.arms import ARMS, BASELINE, Run
from vgpo_trainer.reports.charts import MINUS, Panel, interval_chart
from vgpo_trainer.reports.intervals import LEVEL, Interval
from vgpo_trainer.reports.pages import NOTHING, asset, percent, render
from vgpo_trainer.runs.json import finite
from vgpo_trainer.runs.writing import write_atomically, writing

FEWEST_PAIRS = 3  # of a difference that the verdict mentions


@dataclass(frozen=True)
class ArmStatistics:
    """An arm over its seeds.

    Attributes:
        arm: Its name.
        seeds: Of the finished runs.
        pairs: Number of these runs with a DAPO run of the same seed.
        accuracy: Held-out.
        difference: Accuracy minus that of DAPO with the same seed.
        late_early_ratio: As in :class:`Run`.
        ratio_difference: Late/early ratio minus that of DAPO with the same seed.
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


def write_ablation(folder: str | Path, report: str | Path, budget: Mapping[str, Any], runs: Sequence[Run]) -> Path:
    """Write ``results.csv`` and ``results.json`` to one folder, ``ablation.md`` and ``images/ablation.svg`` to another.

    Args:
        folder: Folder of the ablation.
        report: Folder of the comparison; it may be the same.
        budget: Settings that all runs share.
        runs: At least one.

    Returns:
        The path of ``ablation.md``.

    Raises:
        RunFailure: A file cannot be written.
    """
    folder, report = Path(folder), Path(report)
    summary = summarise(runs)
    columns = [field.name for field in fields(Run) if field.name not in ("versions", "rewards")]
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(run) for run in runs)
    write_atomically(folder / "results.csv", buffer.getvalue())
    results = {"budget": budget, "arms": [asdict(arm) for arm in summary], "runs": [asdict(run) for run in runs]}
    write_atomically(folder / "results.json", json.dumps(finite(results), indent=2) + "\n")
    image = report / "images" / "ablation.svg"
    with writing(image.parent):
        image.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(image, plot(summary, runs))
    page = report / "ablation.md"
    write_atomically(page, markdown(summary, runs, budget))
    return page


def markdown(summary: Sequence[ArmStatistics], runs: Sequence[Run], budget: Mapping[str, Any]) -> str:
    """The comparison as Markdown: table, plot, what the intervals say and how it was measured."""
    rows = [
        (
            ARMS[arm.arm].title,
            len(arm.seeds),
            _written(arm.accuracy, percent),
            "" if arm.arm == BASELINE else _points(arm.difference),
            _written(arm.late_early_ratio, "{:.4f}".format),
            "" if arm.arm == BASELINE else _written(arm.ratio_difference, "{:+.4f}".format),
        )
        for arm in summary
    ]
    return render(
        "ablation.md.j2",
        rows=rows,
        verdict=verdict(summary),
        budget=budget,
        seeds=max(len(arm.seeds) for arm in summary),
        before=statistics.fmean(run.accuracy_before for run in runs),
        versions=sorted({f"{name} {number}" for run in runs for name, number in run.versions.items()}),
        threads=sorted({run.threads for run in runs}),
        cpu_seconds=statistics.fmean(run.cpu_seconds for run in runs),
    )


def verdict(summary: Sequence[ArmStatistics]) -> Markup:
    """What the intervals say, in words."""
    # Of two values even Student's interval is a guess: they may agree by chance.
    compared = [arm for arm in summary if arm.arm != BASELINE and arm.pairs >= FEWEST_PAIRS]
    counts = sorted({len(arm.seeds) for arm in summary})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    if not compared:
        return Markup("There are too few finished runs to compare arms yet.")
    apart = [arm for arm in compared if arm.difference.excludes_zero]
    below = sum(arm.difference.mean < 0 for arm in compared)
    direction = Markup("{} of {} means lie below DAPO's.").format(below, len(compared))
    if not apart:
        half = max((arm.difference.high - arm.difference.low) / 2 for arm in compared)
        return Markup(
            "With {} seeds per arm, no difference from DAPO in held-out accuracy is shown: every interval contains "
            "zero. {} The widest interval is ± {:.1f} points; smaller effects cannot be seen here."
        ).format(seeds, direction, 100 * half)
    return Markup(
        "With {} seeds per arm, the interval of the difference from DAPO excludes zero for: {}. {} "
        "Of {} such intervals, at least one excludes zero by chance in up to {:.0%} of ablations, even if no arm "
        "differs from DAPO."
    ).format(
        seeds,
        "; ".join(f"{ARMS[arm.arm].title} {_points(arm.difference)} points" for arm in apart),
        direction,
        len(compared),
        1 - LEVEL ** len(compared),
    )


def plot(summary: Sequence[ArmStatistics], runs: Sequence[Run]) -> Markup:
    """Accuracy, its difference from DAPO and late/early accumulation of each arm as an SVG; one circle per seed."""
    own = [[run for run in runs if run.arm == arm.arm] for arm in summary]
    baseline = {run.seed: run.accuracy for run in runs if run.arm == BASELINE}
    differences = [
        [100 * (run.accuracy - baseline[run.seed]) for run in arm if run.seed in baseline and run.arm != BASELINE]
        for arm in own
    ]
    panels = [
        Panel("held-out accuracy, %", [[100 * run.accuracy for run in arm] for arm in own]),
        Panel("accuracy minus DAPO's, same seed, points", differences, reference=0.0),
        Panel("late/early accumulation", [[run.late_early_ratio for run in arm] for arm in own]),
    ]
    titles = [ARMS[arm.arm].title for arm in summary]
    return interval_chart(
        titles, panels, "Means of each arm with 95% intervals", baseline=ARMS[BASELINE].title, style=asset("chart.css")
    )


def _points(interval: Interval) -> str:
    return _written(interval, lambda value: f"{100 * value:+.1f}")


def _written(interval: Interval, write: Callable[[float], str]) -> str:
    if math.isnan(interval.mean):
        return NOTHING
    text = write(interval.mean)
    if math.isfinite(interval.low):
        text += f" ({write(interval.low)} to {write(interval.high)})"
    return text.replace("-", MINUS)

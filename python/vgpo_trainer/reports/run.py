"""The report of a run: one HTML file that needs no other file and no network. It links to the pages of
``vgpo inspect`` and ``vgpo probe`` in the folder of the run.

The report is made only from the files of the run folder, so it can be made again at any time. All text from a model, a
dataset or a file is escaped (see :mod:`vgpo_trainer.reports.pages`), images are decoded and encoded again, and there is
no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vgpo_trainer.reports.charts import Axis, Series, axis_around, histogram, line_chart
from vgpo_trainer.reports.intervals import Interval, paired_change
from vgpo_trainer.reports.pages import render
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, StoredRollout
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.writing import write_atomically

SHOWN_GROUPS = 6
SHOWN_RESPONSES = 3
CURVE_POINTS = 25  # of the focus curve


def write_report(folder: RunFolder) -> Path:
    """Make ``report.html`` from a run folder and return its path.

    Raises:
        RunFolderError: The folder lacks ``config.json`` or ``metrics.jsonl``, or one of its files cannot be read.
    """
    config = folder.read_config()
    try:
        records = read_metrics(folder.metrics)
    except OSError as error:
        raise RunFolderError(f"cannot read {folder.metrics}: {error.strerror}") from error
    rollouts = folder.read_rollouts()
    evaluation = folder.read_evaluation()
    settings, result = config.get("settings", {}), config.get("result", {})
    algorithm = str(settings.get("algo", "vgpo")).upper()
    change, half = 0.0, 0.0
    if evaluation is not None:
        counts = (int(evaluation[name]) for name in ("problems", "newly_right", "newly_wrong"))
        change, half = paired_change(*counts)
    page = render(
        "run.html.j2",
        title=f"{algorithm}, seed {settings.get('seed', '?')}: adding handwritten digits",
        algorithm=algorithm,
        evaluation=evaluation,
        change=change,
        half=half,
        steps=result.get("steps", max((record["step"] for record in records), default=0)),
        minutes=float(result.get("seconds", max((record["seconds"] for record in records), default=0.0))) / 60,
        learning=_learning(records),
        rollouts=rollouts,
        signal=_signal(rollouts) if rollouts else None,
        groups=choose_groups(rollouts),
        image_data=folder.image_data,
        inspection_address=folder.inspection_address,
        probes={when: address for when in ("before", "after") if (address := folder.probe_address(when))},
        settings=[config.get(part) or {} for part in ("settings", "vgpo", "versions")],
    )
    write_atomically(folder.report, page)
    return folder.report


def _learning(records: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Charts of the reward and of held-out accuracy by step, each only if it was measured."""
    steps = [record for record in records if _is_number(record.get("reward"))]
    measured = [record for record in records if _is_number(record.get("eval_accuracy"))]
    across = Axis("step", 0, max((record["step"] for record in records), default=0) or 1)
    charts = {}
    if steps:
        reward = Series("reward of sampled responses", _points(steps, "reward"), smoothed=True)
        charts["reward"] = line_chart([reward], across, Axis("mean reward", 0, 1, percent=True), "reward by step")
    if measured:
        band = [
            (record["step"], record["eval_accuracy_low"], record["eval_accuracy_high"])
            for record in measured
            if _is_number(record.get("eval_accuracy_low")) and _is_number(record.get("eval_accuracy_high"))
        ]
        curve = Series("held-out accuracy", _points(measured, "eval_accuracy"), band, markers=True)
        charts["accuracy"] = line_chart(
            [curve], across, Axis("accuracy", 0, 1, percent=True), "held-out accuracy by step"
        )
    return charts


def _signal(rollouts: Sequence[StoredRollout]) -> dict[str, Markup]:
    """Charts of the visual signal of the stored responses, of which there is at least one."""
    stages = sorted({rollout.step for rollout in rollouts})
    curves = [
        focus_curve(f"step {step}", [rollout for rollout in rollouts if rollout.step == step])
        for step in sorted({stages[0], stages[-1]})
    ]
    heights = [height for curve in curves for _, *edges in curve.band for height in edges]
    heights += [height for curve in curves for _, height in curve.points]
    verdicts = {
        "right": [rollout for rollout in rollouts if rollout.correct],
        "wrong": [rollout for rollout in rollouts if not rollout.correct],
    }
    reading, other = split_by_reading(rollouts)
    return {
        "focus": line_chart(
            curves,
            Axis("position in the response", 0, 1, percent=True),
            axis_around("cosine to the image", heights),
            "visual focus along the response",
        ),
        "ratios": histogram(
            [(name, [rollout.late_early_ratio for rollout in group]) for name, group in verdicts.items()],
            "second half over first half",
            "late over early visual accumulation",
        ),
        "psi": histogram(
            [("digit just read", reading), ("every other token", other)] if reading else [("tokens", other)],
            "ψ",
            "distribution of psi",
        ),
        "phi": histogram(
            [(name, [rollout.phi for rollout in group]) for name, group in verdicts.items()],
            "φ",
            "distribution of phi",
        ),
    }


def focus_curve(name: str, rollouts: Sequence[StoredRollout]) -> Series:
    """Mean cosine by relative position, with the 95% interval of the mean over responses.

    Each response is read at the same relative positions, so long and short ones count alike.
    """
    positions = [index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
    points, band = [], []
    for position in positions:
        values = [rollout.cos[round(position * (len(rollout.cos) - 1))] for rollout in rollouts if rollout.cos]
        values = [value for value in values if math.isfinite(value)]
        if not values:
            continue
        interval = Interval.of(values)
        points.append((position, interval.mean))
        band.append((position, interval.low, interval.high))
    return Series(name, points, band)


def split_by_reading(rollouts: Iterable[StoredRollout]) -> tuple[list[float], list[float]]:
    """The psi of digits that were just read from the image (right after a plus sign), and of all other tokens."""
    reading, other = [], []
    for rollout in rollouts:
        previous = ""
        for token, psi in zip(rollout.tokens, rollout.psi, strict=False):
            (reading if previous == "+" and token.isdigit() else other).append(psi)
            previous = token
    return reading, other


def choose_groups(rollouts: Sequence[StoredRollout]) -> list[list[StoredRollout]]:
    """Problems to show: first those with right and wrong answers, then the others; later steps first."""
    groups: dict[tuple[int, str | None], list[StoredRollout]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.step, rollout.image), []).append(rollout)
    ordered = sorted(
        groups.values(),
        key=lambda group: (len({rollout.correct for rollout in group}) > 1, group[0].step),
        reverse=True,
    )
    chosen = []
    for group in ordered[:SHOWN_GROUPS]:
        right = [rollout for rollout in group if rollout.correct]
        wrong = [rollout for rollout in group if not rollout.correct]
        # One of each kind first, so that a pair to compare is always among those shown.
        chosen.append([*right[:1], *wrong[: SHOWN_RESPONSES - 1], *right[1:]][:SHOWN_RESPONSES])
    return chosen


def _points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

"""The report of a run: one HTML file that needs no other file and no network. It links to the pages of
``vgpo inspect`` and ``vgpo probe`` in the folder of the run.

The report is made only from the files of the run folder, so it can be made again at any time. All text from a model, a
dataset or a file is escaped (see :mod:`vgpo_trainer.reports.pages`), images are decoded and encoded again, and there is
no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from vgpo_trainer.reports.charts import Axis, Series, axis_around, histogram, line_chart
from vgpo_trainer.reports.intervals import Interval, paired_change
from vgpo_trainer.reports.pages import percent, plain, render
from vgpo_trainer.reports.words import RunWords, run_words
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, StoredRollout
from vgpo_trainer.runs.metrics import evaluations, first_and_last, is_number, read_metrics, seconds_of, write_time
from vgpo_trainer.runs.writing import write_atomically

SHOWN_GROUPS = 6
SHOWN_RESPONSES = 3
CURVE_POINTS = 25  # of the focus curve


def write_report(folder: RunFolder | str | Path) -> Path:
    """Make ``report.html`` from a run folder, or from its path, and return the page's path.

    Raises:
        RunFolderError: The folder lacks ``config.json`` or ``metrics.jsonl``, or one of its files cannot be read.
    """
    if not isinstance(folder, RunFolder):
        folder = RunFolder(folder)
    config = folder.read_config()
    try:
        records = read_metrics(folder.metrics)
    except OSError as error:
        raise RunFolderError(f"cannot read {folder.metrics}: {error.strerror}") from error
    rollouts = folder.read_rollouts()
    evaluation = folder.read_evaluation()
    result, words = config.get("result", {}), run_words(config)
    change, half = 0.0, 0.0
    if evaluation is not None:
        counts = (int(evaluation[name]) for name in ("problems", "newly_right", "newly_wrong"))
        change, half = paired_change(*counts)
    page = render(
        "run.html.j2",
        title=words.title,
        words=words,
        evaluation=evaluation,
        change=change,
        half=half,
        steps=result.get("steps", max((record["step"] for record in records), default=0)),
        time=write_time(float(result.get("seconds", seconds_of(records)))),
        turns=[] if words.demo else turns(records),
        learning=_learning(records, words, None if evaluation is None else evaluation["problems"]),
        rollouts=rollouts,
        signal=_signal(rollouts, words) if rollouts and words.signal is not None else None,
        groups=choose_groups(rollouts),
        image_data=folder.image_data,
        inspection_address=folder.inspection_address,
        probes={when: address for when in ("before", "after") if (address := folder.probe_address(when))},
        settings=words.settings,
    )
    write_atomically(folder.report, page)
    return folder.report


class Figure(NamedTuple):
    """A chart with its title and what it shows."""

    title: str
    chart: Markup
    caption: str


class Turn(NamedTuple):
    """A number at the beginning and at the end of a run."""

    first: str
    last: str
    what: str


def turns(records: Sequence[dict[str, Any]]) -> list[Turn]:
    """Return what a run began and ended with: means over a few steps, and the first and the last evaluation."""
    found = []
    names = (("reward", "reward", plain), ("accuracy", "accuracy on training prompts", percent))
    for key, name, write in names:
        if (sampled := first_and_last(records, key)) is not None:
            few = sampled.steps
            what = (
                f"{name}, mean of the first and of the last {few} steps" if few > 1 else f"{name}, first and last step"
            )
            found.append(Turn(write(sampled.first), write(sampled.last), what))
    for key, name, write in names:
        if (measured := evaluations(records, key)) and len(measured) > 1:
            (before, first), (after, last) = measured[0], measured[-1]
            what = f"held-out {name.partition(' ')[0]}, after step {before} and after step {after}"
            found.append(Turn(write(first), write(last), what))
    return found


def _learning(records: Sequence[dict[str, Any]], words: RunWords, problems: int | None) -> list[Figure]:
    """Charts of what a run learned by step, each only of what was measured.

    Args:
        records: Those of ``metrics.jsonl``.
        words: For the run.
        problems: Held-out problems of the demo's evaluation.
    """
    across = Axis("step", 0, max((record["step"] for record in records), default=0) or 1)

    def chart(title: str, axis: str, curves: Sequence[Series], caption: str, bounded: bool = False) -> Iterator[Figure]:
        there = [curve for curve in curves if curve.points]
        heights = [height for curve in there for _, height in curve.points]
        share = Axis(axis, 0, 1, percent=True) if bounded else number_axis(axis, heights)
        if there:
            yield Figure(title, line_chart(there, across, share, f"{title[:1].lower()}{title[1:]} by step"), caption)

    def sampled(name: str, key: str) -> Series:
        return Series(name, _points(records, key), smoothed=True)

    def held_out(name: str, key: str) -> Series:
        band = [
            (record["step"], record[f"{key}_low"], record[f"{key}_high"])
            for record in records
            if is_number(record.get(f"{key}_low")) and is_number(record.get(f"{key}_high"))
        ]
        return Series(name, _points(records, key), band, markers=True)

    reward = sampled("reward of sampled responses", "reward")
    accuracy = held_out("held-out accuracy", "eval_accuracy")
    if words.demo:
        on = "" if problems is None else f" on the same {problems} problems each time"
        return [
            *chart("Reward", "mean reward", [reward], words.reward, bounded=True),
            *chart("Held-out accuracy", "accuracy", [accuracy], f"Greedy answers{on}, {words.accuracy}", bounded=True),
        ]
    figures = [
        *chart("Reward", "mean reward", [reward, held_out("held-out reward", "eval_reward")], words.reward),
        *chart(
            "Accuracy",
            "accuracy",
            [sampled("accuracy of sampled responses", "accuracy"), accuracy],
            words.accuracy,
            bounded=True,
        ),
    ]
    if words.signal is not None:
        curve, bounded = sampled(words.signal.name, "vgpo/visual_focus"), words.signal.percent
        title = f"{words.signal.name[:1].upper()}{words.signal.name[1:]}"
        figures += chart(
            title, words.signal.unit, [curve], "Mean over the scored tokens of each step.", bounded=bounded
        )
    length = sampled("mean length", "completions/mean_length")
    return [*figures, *chart("Length", "tokens", [length], "Mean length of the sampled responses, in tokens.")]


def number_axis(label: str, values: Sequence[float]) -> Axis:
    """Return an axis from 0 to 1 where all values lie there, and else one around them."""
    if all(0 <= value <= 1 for value in values):
        return Axis(label, 0, 1)
    return axis_around(label, values)


def _signal(rollouts: Sequence[StoredRollout], words: RunWords) -> dict[str, Markup]:
    """Charts of the visual signal of the stored responses, of which there is at least one."""
    assert words.signal is not None
    stages = sorted({rollout.step for rollout in rollouts})
    curves = [
        focus_curve(f"step {step}", [rollout for rollout in rollouts if rollout.step == step])
        for step in sorted({stages[0], stages[-1]})
    ]
    heights = [height for curve in curves for _, *edges in curve.band for height in edges]
    heights += [height for curve in curves for _, height in curve.points]
    verdicts = by_verdict(rollouts)
    reading, other = split_by_reading(rollouts) if words.demo else ([], [psi for one in rollouts for psi in one.psi])
    around = axis_around(words.signal.unit, heights)
    return {
        "focus": line_chart(
            curves,
            Axis("position in the response", 0, 1, percent=True),
            replace(around, percent=words.signal.percent),
            f"{words.signal.name} along the response",
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


def by_verdict(rollouts: Sequence[StoredRollout]) -> dict[str, list[StoredRollout]]:
    """Return right and wrong responses apart, where a reward function says which are which; else all together."""
    if all(rollout.correct is None for rollout in rollouts):
        return {"responses": list(rollouts)}
    return {
        "right": [rollout for rollout in rollouts if rollout.correct],
        "wrong": [rollout for rollout in rollouts if rollout.correct is not None and not rollout.correct],
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
    """Problems to show: first those with right and wrong answers, then the others; later steps first.

    Without a word on what is right, the response with the larger reward counts as the right one.
    """
    groups: dict[Any, list[StoredRollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    ordered = sorted(
        groups.values(),
        key=lambda group: (len({(one.correct, one.reward) for one in group}) > 1, group[0].step),
        reverse=True,
    )
    chosen = []
    for group in ordered[:SHOWN_GROUPS]:
        if all(rollout.correct is None for rollout in group):
            ranked = sorted(group, key=lambda rollout: rollout.reward, reverse=True)
            right, wrong = ranked[:-1], ranked[-1:]
        else:
            right = [rollout for rollout in group if rollout.correct]
            wrong = [rollout for rollout in group if not rollout.correct]
        # One of each kind first, so that a pair to compare is always among those shown.
        chosen.append([*right[:1], *wrong[: SHOWN_RESPONSES - 1], *right[1:]][:SHOWN_RESPONSES])
    return chosen


def _points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if is_number(record.get(key))]

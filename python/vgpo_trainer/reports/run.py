"""The report of a run: one HTML file that needs nothing beside it and nothing from the network. It links the pages of
``vgpo inspect`` that lie in the run's folder.

It is made from the files of the run folder alone, so it can be made again at any time. Everything that a model, a
dataset or a file said passes through :func:`html.escape`, images are decoded and encoded again, and there is no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vgpo_trainer.reports.charts import Axis, Series, axis_around, histogram, line_chart
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, StoredRollout
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.writing import write_atomically, writing

STYLE = Path(__file__).parent / "assets" / "report.css"
SHOWN_GROUPS = 6
SHOWN_RESPONSES = 3
CURVE_POINTS = 25  # of the focus curve
NOTHING = "\N{EN DASH}"  # in place of a number that is not finite


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
    settings = config.get("settings", {})
    algorithm = str(settings.get("algo", "vgpo")).upper()
    title = f"{algorithm}, seed {settings.get('seed', '?')}: adding handwritten digits"
    sections = [
        _headline(title, config, evaluation, records),
        _learning(records, evaluation),
        _signal(rollouts, algorithm),
        _rollout_section(rollouts, folder, algorithm),
        _held_out(evaluation, folder),
        _settings(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )
    with writing(folder.report):
        write_atomically(folder.report, page)
    return folder.report


# Sections. Each returns "" where the run left nothing to show.


def _headline(
    title: str, config: dict[str, Any], evaluation: dict[str, Any] | None, records: Sequence[dict[str, Any]]
) -> str:
    result = config.get("result", {})
    steps = result.get("steps", max((record["step"] for record in records), default=0))
    minutes = float(result.get("seconds", max((record["seconds"] for record in records), default=0.0))) / 60
    heading, tiles = escape(title), []
    if evaluation is not None:
        before, after, count = evaluation["before"], evaluation["after"], int(evaluation["problems"])
        change, half = paired_change(count, int(evaluation["newly_right"]), int(evaluation["newly_wrong"]))
        heading = f"{before['accuracy']:.1%} → {after['accuracy']:.1%} of held-out problems solved"
        tiles = [
            _tile(f"{before['accuracy']:.1%}", f"before; 95% interval {_range(before['interval'])}"),
            _tile(f"{after['accuracy']:.1%}", f"after; 95% interval {_range(after['interval'])}"),
            _tile(
                f"{_signed(100 * change, 1)} points",
                f"change, ± {100 * half:.1f} (95%, paired): {evaluation['newly_right']} newly right, "
                f"{evaluation['newly_wrong']} newly wrong, of {count}",
                "good" if change - half > 0 else "bad" if change + half < 0 else "",
            ),
        ]
    tiles.append(_tile(f"{minutes:.1f} min", f"for everything; {steps} steps of reinforcement learning"))
    return (
        f'<header><p class="eyebrow">{escape(title)}</p><h1>{heading}</h1>'
        "<p>A vision-language model of 1.3 million parameters reads handwritten digits from an image and adds them up "
        "step by step. It is rewarded for the right sum and for nothing else. Training and held-out problems are "
        f'drawn from different scans.</p><div class="tiles">{"".join(tiles)}</div></header>'
    )


def _learning(records: Sequence[dict[str, Any]], evaluation: dict[str, Any] | None) -> str:
    steps = [record for record in records if _is_number(record.get("reward"))]
    measured = [record for record in records if _is_number(record.get("eval_accuracy"))]
    last = max((record["step"] for record in records), default=0)
    across = Axis("step", 0, max(last, 1))
    figures = []
    if steps:
        reward = Series("reward of sampled responses", _points(steps, "reward"), smoothed=True)
        figures.append(
            _figure(
                "Reward",
                line_chart([reward], across, Axis("mean reward", 0, 1, percent=True), "reward by step"),
                "Share of right answers among the responses sampled in each step, on training problems never seen "
                "before; the bold line is a running mean.",
            )
        )
    if measured:
        curve = Series(
            "held-out accuracy",
            _points(measured, "eval_accuracy"),
            band=[
                (record["step"], record["eval_accuracy_low"], record["eval_accuracy_high"])
                for record in measured
                if _is_number(record.get("eval_accuracy_low")) and _is_number(record.get("eval_accuracy_high"))
            ],
            markers=True,
        )
        count = "" if evaluation is None else f" on the same {evaluation['problems']} problems each time"
        figures.append(
            _figure(
                "Held-out accuracy",
                line_chart([curve], across, Axis("accuracy", 0, 1, percent=True), "held-out accuracy by step"),
                f"Greedy answers{count}, with 95% intervals. Their scans appear in no training problem.",
            )
        )
    if not figures:
        return ""
    return f'<section><h2>What it learned</h2><div class="pair">{"".join(figures)}</div></section>'


def _signal(rollouts: Sequence[StoredRollout], algorithm: str) -> str:
    if not rollouts:
        return ""
    first, last = min(rollout.step for rollout in rollouts), max(rollout.step for rollout in rollouts)
    stages = [(f"step {first}", [rollout for rollout in rollouts if rollout.step == first])]
    if last > first:
        stages.append((f"step {last}", [rollout for rollout in rollouts if rollout.step == last]))
    curves = [focus_curve(name, group) for name, group in stages]
    heights = [height for curve in curves for _, *edges in curve.band for height in edges]
    focus = line_chart(
        curves,
        Axis("position in the response", 0, 1, percent=True),
        axis_around("cosine to the image", heights),
        "visual focus along the response",
    )
    right = [rollout for rollout in rollouts if rollout.correct]
    wrong = [rollout for rollout in rollouts if not rollout.correct]
    ratios = [
        (name, [rollout.late_early_ratio for rollout in group]) for name, group in (("right", right), ("wrong", wrong))
    ]
    reading, other = split_by_reading(rollouts)
    psi = [("digit just read", reading), ("every other token", other)] if reading else [("tokens", other)]
    phi = [(name, [rollout.phi for rollout in group]) for name, group in (("right", right), ("wrong", wrong))]
    figures = [
        _figure(
            "Visual focus along the response",
            focus,
            "Mean cosine between a token's last hidden state and the mean of the image's, with 95% intervals: how "
            "strongly the model still represents the image while it writes.",
        ),
        _figure(
            "Late over early accumulation",
            histogram(ratios, "second half over first half", "late over early visual accumulation"),
            "Visual focus of a response's second half over its first; below 1 the image fades. Dashed: medians.",
        ),
        _figure(
            "Token weights ψ",
            histogram(psi, "ψ", "distribution of psi"),
            "Intra-trajectory weights. Digits just read are the digits right after a plus sign.",
        ),
        _figure(
            "Trajectory weights φ",
            histogram(phi, "φ", "distribution of phi"),
            "Inter-trajectory weights: a response's visual accumulation against the others of its problem.",
        ),
    ]
    applied = (
        "VGPO multiplies the advantage of a token by (1 + ψ)(1 + φ)."
        if algorithm == "VGPO"
        else f"{algorithm} does not use these weights; they are what VGPO would have applied."
    )
    snapshots = len({rollout.step for rollout in rollouts})
    return (
        f'<section><h2>The visual signal</h2><p class="soft">{escape(applied)} From {len(rollouts):,} stored '
        f'responses of {snapshots} steps.</p><div class="pair">{"".join(figures)}</div></section>'
    )


def _rollout_section(rollouts: Sequence[StoredRollout], folder: RunFolder, algorithm: str) -> str:
    if not rollouts:
        return ""
    shown = choose_groups(rollouts)
    cards = [_problem(group, folder) for group in shown]
    meaning = "its advantage is multiplied by" if algorithm == "VGPO" else "VGPO would multiply its advantage by"
    return (
        f'<section><h2>Responses, token by token</h2><p class="soft">Each token\'s colour is the factor '
        f"{escape(meaning)}: orange strengthens, blue weakens, whether the advantage praises or blames. "
        "Point at a token for its numbers.</p>"
        '<div class="scale"><span>factor 0</span><span class="ramp"></span><span>2 and more</span>'
        f'<span>· uncoloured: 1</span></div><div class="pair">{"".join(cards)}</div></section>'
    )


def _problem(group: Sequence[StoredRollout], folder: RunFolder) -> str:
    image = folder.image_data(group[0].image)
    picture = f'<img src="{image}" alt="the digits to add">' if image else ""
    answer = "" if group[0].answer is None else f'<div class="truth">sum {escape(group[0].answer)}</div>'
    responses = "".join(_response(rollout) for rollout in group)
    return f'<div class="card problem"><div>{picture}{answer}</div><div>{responses}</div></div>'


def _response(rollout: StoredRollout) -> str:
    verdict = ("right", "right") if rollout.correct else ("wrong", "wrong")
    facts = (
        f'<span class="mark {verdict[0]}">{verdict[1]}</span><span>step {int(rollout.step)}</span>'
        f"<span>advantage {_signed(rollout.advantage)}</span><span>φ {_signed(rollout.phi)}</span>"
        f"<span>late/early {_plain(rollout.late_early_ratio)}</span>"
    )
    tokens = zip(rollout.tokens, rollout.factors, rollout.cos, rollout.psi, strict=False)
    return (
        f'<div class="response"><div class="facts">{facts}</div>'
        f'<div class="tokens">{"".join(_token(*token) for token in tokens)}</div></div>'
    )


def _token(text: str, factor: float, cos: float, psi: float) -> str:
    strength = min(abs(factor - 1.0), 1.0) if math.isfinite(factor) else 0.0
    direction = "up" if factor > 1.0 else "down"
    kind = ' class="special"' if text.startswith("<") and text.endswith(">") else ""
    hint = f"factor {_plain(factor)}, ψ {_signed(psi)}, cosine {_signed(cos)}"
    return (
        f'<span{kind} style="background:rgba(var(--{direction}),{0.85 * strength:.2f})" title="{hint}">'
        f"{escape(text)}</span>"
    )


def _held_out(evaluation: dict[str, Any] | None, folder: RunFolder) -> str:
    if evaluation is None or not evaluation.get("examples"):
        return ""
    cards = []
    for example in evaluation["examples"]:
        image = folder.image_data(example["image"])
        picture = f'<img src="{image}" alt="the digits to add">' if image else ""
        lines = "".join(
            f'<div><span class="soft">{when}</span> <span class="mark {verdict}">{verdict}</span><br>'
            f"<code>{escape(str(text))}</code></div>"
            for when, text, verdict in (
                ("before", example["before"], "right" if example["right_before"] else "wrong"),
                ("after", example["after"], "right" if example["right_after"] else "wrong"),
            )
        )
        address = folder.inspection_address(str(example["image"]))
        link = "" if address is None else f'<div><a href="{escape(address)}">what it looks at</a></div>'
        cards.append(
            f'<div class="card example"><div>{picture}<div class="truth">sum {escape(str(example["answer"]))}</div>'
            f"</div><div>{lines}{link}</div></div>"
        )
    return (
        '<section><h2>Held-out problems, before and after</h2><p class="soft">The first problems that training '
        f'turned right, then the first that it did not.</p><div class="examples">{"".join(cards)}</div></section>'
    )


def _settings(config: dict[str, Any]) -> str:
    parts = [config.get(part) or {} for part in ("settings", "vgpo", "versions")]
    cells = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for part in parts
        for name, value in part.items()
    )
    return f"<section><h2>Settings</h2><table>{cells}</table></section>"


# What is drawn, from what was stored.


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
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        half = 1.96 * spread / math.sqrt(len(values))
        points.append((position, mean))
        band.append((position, mean - half, mean + half))
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
    """Problems to show, latest first, those with right and wrong answers before the others; wrong answers lead."""
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


def paired_change(problems: int, newly_right: int, newly_wrong: int) -> tuple[float, float]:
    """Change of accuracy on the same problems, and the half width of its 95% interval (Wald, paired)."""
    change = (newly_right - newly_wrong) / problems
    variance = (newly_right + newly_wrong) / problems - change * change
    return change, 1.96 * math.sqrt(variance / problems)


# Small pieces of the page.


def _figure(title: str, chart: str, caption: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3>{chart}<figcaption>{escape(caption)}</figcaption></figure>'


def _tile(number: str, meaning: str, mood: str = "") -> str:
    return f'<div class="card tile {mood}"><b>{escape(number)}</b><span>{escape(meaning)}</span></div>'


def _points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _plain(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else NOTHING


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else NOTHING

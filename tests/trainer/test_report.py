"""Reports and run folders: complete, self-contained, and safe whatever the files say."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from vgpo_trainer.cli import main
from vgpo_trainer.reports.charts import (
    Axis,
    Panel,
    Series,
    axis_around,
    histogram,
    interval_chart,
    line_chart,
    running_mean,
)
from vgpo_trainer.reports.intervals import paired_change
from vgpo_trainer.reports.run import choose_groups, focus_curve, split_by_reading, write_report
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, StoredRollout

ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {"meta", "img", "br", "line", "circle", "path", "i"}


class Page(HTMLParser):
    """Checks that tags nest and keeps what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def rollout(**changes) -> StoredRollout:
    fields = {
        "step": 3,
        "prompt": "<image>Add the digits.",
        "image": None,
        "answer": "7",
        "tokens": ["0", "+", "7", "=", "7", "<eos>"],
        "cos": [0.5, 0.4, 0.6, 0.3, 0.2, 0.1],
        "psi": [0.1, -0.2, 0.5, -0.1, -0.1, -0.2],
        "factors": [1.2, 0.9, 1.6, 1.0, 0.9, 0.8],
        "phi": 0.1,
        "reward": 1.0,
        "advantage": 0.7,
        "late_early_ratio": 0.9,
        "correct": True,
    }
    return StoredRollout(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path):
    """A run folder with everything in it, and an attack in every text."""
    run = RunFolder(tmp_path / "run")
    run.create()
    image = run.store_image(Image.new("RGB", (48, 48), "white"))
    run.write_config(
        {
            "settings": {"algo": "vgpo", "seed": ATTACK, ATTACK: 1},
            "versions": {"torch": ATTACK},
            "result": {"seconds": 90, "steps": 2},
        }
    )
    records = [
        {"step": 0, "seconds": 0.0, "eval_accuracy": 0.4, "eval_accuracy_low": 0.3, "eval_accuracy_high": 0.5},
        {"step": 1, "seconds": 1.0, "reward": 0.25},
        {"step": 2, "seconds": 2.0, "reward": None},
        {"step": 2, "seconds": 2.5, "eval_accuracy": 0.6, "eval_accuracy_low": 0.5, "eval_accuracy_high": 0.7},
    ]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 3, "rew')
    run.append_rollouts(
        [
            rollout(image=image),
            rollout(image=image, correct=False, reward=0.0, advantage=-0.7, phi=math.nan, tokens=[ATTACK] * 6),
            rollout(image="../../secret.png", answer=ATTACK, step=5, late_early_ratio=math.nan, factors=[math.nan] * 6),
            rollout(image=None, answer=None, tokens=[], cos=[], psi=[], factors=[], step=5),
        ]
    )
    run.write_evaluation(
        {
            "problems": 100,
            "before": {"accuracy": 0.4, "interval": [0.3, 0.5]},
            "after": {"accuracy": 0.6, "interval": [0.5, 0.7]},
            "newly_right": 25,
            "newly_wrong": 5,
            "examples": [
                {
                    "image": image,
                    "answer": ATTACK,
                    "before": ATTACK,
                    "after": "0+7=7. 7",
                    "right_before": False,
                    "right_after": True,
                }
            ],
        }
    )
    return run


def test_report_shows_the_run(folder):
    page = Page(write_report(folder).read_text())
    assert "40.0% → 60.0% of held-out problems solved" in page.text
    assert "+20.0 points" in page.text
    assert "1.5 min" in page.text
    assert page.tags.count("svg") == 6
    assert page.tags.count("img") == 2  # the group with an image, and the held-out example
    hints = [value for name, value in page.attributes if name == "title"]
    assert "factor 1.60, ψ +0.50, cosine +0.60" in hints


def test_report_escapes_everything_it_was_told(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ATTACK in page.text  # shown as text, so nothing was dropped either
    assert page.text.count(ATTACK) >= 10


def test_report_needs_nothing_but_itself(folder):
    page = Page(write_report(folder).read_text())
    assert {"link", "iframe", "object", "embed", "script", "base"}.isdisjoint(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "action", "poster")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in (folder.report.read_text())
    policy = dict(page.attributes)["content"]
    assert policy.startswith("default-src 'none'")


def test_report_links_pages_that_lie_in_its_folder(folder, tmp_path):
    (image,) = (path.name for path in folder.images.iterdir())
    (tmp_path / "secret.html").write_text("")
    assert folder.inspection_address(image) is None and folder.inspection_address("../../secret.png") is None
    assert "href" not in write_report(folder).read_text()
    folder.inspections.mkdir()
    folder.inspection(image).write_text("")
    page = Page(write_report(folder).read_text())
    links = [value for name, value in page.attributes if name == "href"]
    assert links == [f"inspect/{image.removesuffix('png')}html"] and (folder.path / links[0]).is_file()


def test_images_outside_the_folder_stay_outside(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    assert folder.image_data("../../secret.png") is None
    (folder.images / "page.png").write_text("<svg onload=alert(1)>")
    assert folder.image_data("page.png") is None
    assert folder.image_data("missing.png") is None


@pytest.mark.parametrize("missing", ["evaluation", "rollouts"])
def test_report_of_a_run_that_lacks_a_part(folder, missing):
    getattr(folder, missing).unlink()
    page = Page(write_report(folder).read_text())
    assert ("Held-out problems, before and after" in page.text) == (missing != "evaluation")
    assert ("The visual signal" in page.text) == (missing != "rollouts")


def test_report_without_vgpo_says_so(folder):
    folder.write_config({"settings": {"algo": "dapo"}})
    text = Page(write_report(folder).read_text()).text
    assert "DAPO does not use these weights" in text
    assert "VGPO would multiply its advantage by" in text


def test_numbers_survive_the_folder_and_nan_does_too(tmp_path):
    run = RunFolder(tmp_path)
    run.append_rollouts([rollout(phi=math.nan, cos=[math.inf, *[0.0] * 5])])
    [read] = run.read_rollouts()
    assert math.isnan(read.phi) and math.isnan(read.cos[0])
    assert read.psi == rollout().psi and read.tokens == rollout().tokens
    assert "NaN" not in run.rollouts.read_text() and "Infinity" not in run.rollouts.read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "cannot read .*config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "does not hold a JSON object"),
        ("metrics.jsonl", None, "cannot read .*metrics.jsonl"),
        ("rollouts.jsonl", '{"step": 1}\n', "rollouts.jsonl, line 1, is not a rollout"),
        ("evaluation.json", "no", "evaluation.json is not JSON"),
    ],
)
def test_broken_folder_is_one_clear_line(folder, capsys, file, content, message):
    path = folder.path / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert main(["report", str(folder.path)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"vgpo report: .*{message}", error)
    assert error.count("\n") == 1


def test_report_command_prints_the_path(folder, capsys):
    assert main(["report", str(folder.path)]) == 0
    assert capsys.readouterr().out.strip() == str(folder.report)


def test_folder_in_use_is_refused(folder, tmp_path):
    with pytest.raises(RunFolderError, match="is not empty; choose another --out"):
        folder.create()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot make the run folder"):
        RunFolder(tmp_path / "file" / "run").create()


def test_equal_images_are_stored_once(folder):
    before = len(list(folder.images.iterdir()))
    assert folder.store_image(Image.new("RGB", (48, 48), "white")) == folder.store_image(
        Image.new("RGB", (48, 48), "white")
    )
    assert len(list(folder.images.iterdir())) == before


def test_paired_change_against_the_variance_of_the_differences():
    differences = [1] * 25 + [-1] * 5 + [0] * 70
    mean = sum(differences) / 100
    variance = sum((value - mean) ** 2 for value in differences) / 100
    assert paired_change(100, 25, 5) == (pytest.approx(0.2), pytest.approx(1.96 * math.sqrt(variance / 100)))
    assert paired_change(10, 0, 0) == (0.0, 0.0)


def test_focus_curve_is_the_mean_at_equal_relative_positions():
    curve = focus_curve("x", [rollout(cos=[0.0, 1.0]), rollout(cos=[1.0, 1.0, 1.0, 0.0, 0.0])])
    assert curve.points[0] == (0.0, 0.5)
    assert curve.points[-1] == (1.0, 0.5)
    position, low, high = curve.band[0]
    assert position == 0.0 and low < 0.5 < high
    assert focus_curve("x", [rollout(cos=[math.nan])]).points == []


def test_digits_just_read_follow_a_plus_sign():
    reading, other = split_by_reading([rollout()])
    assert reading == [0.5]
    assert other == [0.1, -0.2, -0.1, -0.1, -0.2]


def test_groups_with_both_verdicts_come_first_and_latest_leads():
    groups = choose_groups(
        [
            rollout(step=9, image="a"),
            rollout(step=2, image="b"),
            rollout(step=2, image="b", correct=False),
            rollout(step=4, image="c", correct=False),
            rollout(step=4, image="c"),
            rollout(step=4, image="c"),
            rollout(step=4, image="c"),
        ]
    )
    assert [group[0].image for group in groups] == ["c", "b", "a"]
    assert [item.correct for item in groups[0]] == [True, False, True]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-0.35, 0.7, [-0.2, 0, 0.2, 0.4, 0.6]), (0, 80, [0, 20, 40, 60, 80])],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert Axis("x", low, high).ticks() == pytest.approx(ticks)


def test_axis_holds_its_values_even_when_they_are_equal_or_none():
    axis = axis_around("x", [2.0, math.nan, 5.0])
    assert axis.low < 2.0 and axis.high > 5.0
    flat = axis_around("x", [3.0, 3.0])
    assert flat.low < 3.0 < flat.high
    assert (axis_around("x", []).low, axis_around("x", []).high) == (0.0, 1.0)


def test_charts_place_points_and_escape_labels():
    chart = line_chart(
        [Series(ATTACK, [(0, 0.0), (1, math.nan), (2, 1.0)], markers=True)], Axis(ATTACK, 0, 2), Axis("y", 0, 1), ATTACK
    )
    page = Page(chart)
    assert "script" not in page.tags
    points = [(float(a), float(b)) for a, b in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert len(points) == 2 and points[0][0] < points[1][0] and points[0][1] > points[1][1]


def test_interval_chart_places_means_and_intervals_and_escapes_names():
    panels = [Panel(ATTACK, [[1.0, 3.0], [4.0], [], [math.nan, 2.0]], reference=0.0), Panel("none", [[], [], [], []])]
    chart = interval_chart(["base", ATTACK, "empty", "unknown"], panels, ATTACK, baseline="base", style="")
    page = Page(chart)
    assert "script" not in page.tags and ElementTree.fromstring(chart).tag.endswith("svg")
    assert "nan" not in chart
    means = [float(x) for x in re.findall(r'class="mean [^"]*" d="M([\d.]+) ', chart)]
    edges = [(float(low), float(high)) for low, high in re.findall(r'"line [^"]*" x1="([\d.]+)" x2="([\d.]+)"', chart)]
    # One value has a mean and no interval.
    assert len(means) == 2 and len(edges) == 1 and means[0] < means[1]
    assert means[0] == pytest.approx(sum(edges[0]) / 2, abs=0.11)
    assert chart.count('class="value') == 4 and chart.count("baseline") == 4


def test_histogram_counts_shares_and_names_medians():
    chart = histogram([("left", [0.0] * 3 + [0.1]), ("right", [0.9, math.nan]), ("none", [])], "x", "t", bins=10)
    Page(chart)
    assert "left: 4" in chart and "right: 1" in chart and "none: 0" in chart
    assert chart.count('class="median') == 2
    assert "nan" not in chart
    Page(histogram([("none", [])], "x", "t"))


def test_running_mean_leaves_out_what_is_not_finite():
    means = running_mean([(0, 1.0), (1, 2.0), (2, math.nan), (3, 6.0)], window=3)
    assert means == [(0, 1.5), (1, 3.0), (3, 4.0)]

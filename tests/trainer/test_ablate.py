"""The ablation: its runs, what an interruption leaves, its statistics and what it writes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from contextlib import redirect_stdout
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("trl")

from vgpo_trainer.cli import main
from vgpo_trainer.demo import ablation as demo_ablation
from vgpo_trainer.reports.ablation import ARMS, Run, markdown, plot, summarise, verdict
from vgpo_trainer.reports.intervals import Interval
from vgpo_trainer.runs.metrics import read_metrics

from vgpo_kernels import VGPOConfig

torch.set_num_threads(1)
SMALL = ["--steps", "1", "--prompts", "3", "--generations", "4", "--problems", "4", "--learning-rate", "0.001"]
BUDGET = {"steps": 1, "prompts": 3, "generations": 4, "problems": 4, "learning_rate": 0.001, "temperature": 1.0}


def command(out: Path, *more: str) -> list[str]:
    return ["ablate", "--out", str(out), *SMALL, *more]


def result(arm: str, seed: int, accuracy: float, ratio: float = 1.0) -> Run:
    return Run(arm, seed, 0.25, accuracy, ratio, 0.5, 1, 2.0, 1.5, 1, {"torch": "2.13.0"}, [0.5])


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """Two arms with two seeds, interrupted in the second run, then gone on with."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    reinforce, calls = demo_ablation.reinforce, []

    def interrupted(settings, *rest, **named):
        calls.append((settings.algo, settings.seed))
        if len(calls) == 2:
            (settings.out / "metrics.jsonl").write_text("half a run")
            raise KeyboardInterrupt
        return reinforce(settings, *rest, **named)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(demo_ablation, "reinforce", interrupted)
        assert main(command(out, "--arms", "dapo", "vgpo", "--seeds", "2")) == 130
        first = {path.name for path in (out / "results").iterdir()}
        assert main(command(out, "--arms", "dapo", "vgpo", "--seeds", "2")) == 0
    return out, first, calls


def test_an_interrupted_ablation_goes_on_with_the_run_it_was_at(ablation):
    out, first, calls = ablation
    assert first == {"dapo-0.json"}
    # All arms of a seed before the next seed, and the finished run only once.
    assert calls == [("dapo", 0), ("vgpo", 0), ("vgpo", 0), ("dapo", 1), ("vgpo", 1)]
    assert {path.stem for path in (out / "results").iterdir()} == {"dapo-0", "vgpo-0", "dapo-1", "vgpo-1"}


def test_runs_are_the_demo_with_the_objective_of_their_arm(ablation):
    out, _, _ = ablation
    for arm in ("dapo", "vgpo"):
        config = json.loads((out / "runs" / f"{arm}-1" / "config.json").read_text())
        assert config["settings"]["algo"] == arm and config["settings"]["seed"] == 1
        (record,) = [r for r in read_metrics(out / "runs" / f"{arm}-1" / "metrics.jsonl") if "reward" in r]
        stored = json.loads((out / "results" / f"{arm}-1.json").read_text())
        assert stored["rewards"] == [record["reward"]]
        assert stored["late_early_ratio"] == record["vgpo/late_early_ratio"] > 0
        assert ("vgpo/factor_mean" in record) == (arm == "vgpo")


def test_arms_of_a_seed_sample_alike_from_one_start(ablation):
    out, _, _ = ablation
    for seed in (0, 1):
        one, other = (json.loads((out / "results" / f"{arm}-{seed}.json").read_text()) for arm in ("dapo", "vgpo"))
        # One step: whatever the objective, its responses come from the same model by the same random numbers.
        assert one["rewards"] == other["rewards"] and one["accuracy_before"] == other["accuracy_before"]
        assert one["late_early_ratio"] == pytest.approx(other["late_early_ratio"], rel=1e-6)


def test_files_hold_every_run(ablation):
    out, _, _ = ablation
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["arm"] + row["seed"] for row in rows] == ["dapo0", "dapo1", "vgpo0", "vgpo1"]
    results = json.loads((out / "results.json").read_text())
    assert results["budget"] == BUDGET and len(results["runs"]) == 4
    assert [arm["seeds"] for arm in results["arms"]] == [[0, 1], [0, 1]]
    page = (out / "ablation.md").read_text()
    assert "| DAPO | 2 |" in page and "images/ablation.svg" in page
    assert ElementTree.parse(out / "images" / "ablation.svg").getroot().tag.endswith("svg")
    assert not list(out.rglob("*.part"))


def test_the_report_is_made_again_without_training(ablation, tmp_path, monkeypatch, capsys):
    out, _, _ = ablation
    monkeypatch.setattr(demo_ablation, "reinforce", None)
    assert main(["ablate", "--out", str(out), "--report-only", "--report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ablation.md'}\n"
    for name in ("ablation.md", "images/ablation.svg"):
        assert (tmp_path / name).read_text() == (out / name).read_text()


def test_it_says_at_once_how_long_it_will_take(ablation, capsys, monkeypatch):
    out, _, _ = ablation
    monkeypatch.setattr(demo_ablation, "reinforce", lambda *_, **__: pytest.fail("trains before it says how long"))
    with pytest.raises(pytest.fail.Exception):
        main(command(out, "--arms", "dapo", "vgpo", "--seeds", "4"))
    said = capsys.readouterr().out
    assert "4 of 8 runs are finished" in said
    assert re.search(r"^4 runs of about \d+ s: \d+ s, until about \d\d:\d\d; ", said, re.MULTILINE)


def test_the_time_of_a_first_run_follows_from_its_steps(capsys, monkeypatch):
    clock = iter([10.0, 12.0, 14.0, 16.0])
    monkeypatch.setattr(demo_ablation.time, "monotonic", lambda: next(clock))
    display = demo_ablation.AblationDisplay(steps=50, runs=3, total=3, seconds=[])
    display.start()
    for step in (1, 2, 3, 4):
        display.stepped(step, {})
    said = capsys.readouterr().out
    assert "a step takes 2.0 s" in said and "3 runs of about 2 min: 5 min" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", "2"], r"holds an ablation with --steps 1, not 2; choose another --out"),
        (["--learning-rate", "0.1"], r"holds an ablation with --learning-rate 0.001, not 0.1"),
        (["--seeds", "0"], r"--seeds must be positive, got 0"),
        (["--generations", "1"], r"--generations must be at least 2"),
        (["--temperature", "0"], r"--temperature must be positive"),
    ],
)
def test_settings_that_do_not_go_together(ablation, changes, message, capsys):
    out, _, _ = ablation
    assert main(command(out, *changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vgpo ablate: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_arms_are_explained(tmp_path, capsys):
    meanings = [f"{name} ({arm.meaning})" for name, arm in ARMS.items()]
    with pytest.raises(SystemExit) as caught:
        main(["ablate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and all(meaning in said for meaning in meanings)
    with pytest.raises(SystemExit) as caught:
        main(command(tmp_path / "out", "--arms", "vgpo", "grpo"))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and f"there is no arm 'grpo'; the arms are {', '.join(meanings)}" in said
    with pytest.raises(ValueError, match="there is no arm 'grpo'; the arms are dapo"):
        demo_ablation.AblationSettings(arms=("vgpo", "grpo")).check(1)


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert main(command(tmp_path)) == 2
    assert "is not empty and holds no ablation" in capsys.readouterr().err
    assert main(["ablate", "--out", str(tmp_path), "--report-only"]) == 2
    assert "holds no ablation" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_broken_result_is_named(tmp_path, capsys):
    folder = demo_ablation.AblationFolder(tmp_path)
    folder.open(BUDGET)
    (folder.results / "dapo-0.json").write_text('{"arm": "da')
    assert main(["ablate", "--out", str(tmp_path), "--report-only"]) == 2
    error = capsys.readouterr().err
    assert "dapo-0.json is not the result of a run" in error and error.count("\n") == 1


def test_every_arm_is_a_setting_of_vgpo():
    changes = [arm.changes for arm in ARMS.values() if arm.changes is not None]
    configs = [VGPOConfig.paper(**change) for change in changes]
    assert len(set(configs)) == len(configs) == len(ARMS) - 1
    assert VGPOConfig.paper() in configs


def test_statistics_are_paired_by_seed():
    accuracies = {"dapo": [0.30, 0.50, 0.40], "vgpo": [0.32, 0.51, 0.43]}
    runs = [result(arm, seed, value) for arm, values in accuracies.items() for seed, value in enumerate(values)]
    runs.append(result("vgpo", 7, 0.9))  # no run of DAPO to compare it with
    dapo, vgpo = summarise(runs)
    assert dapo.accuracy.mean == pytest.approx(0.4) and vgpo.seeds == [0, 1, 2, 7]
    # t for two degrees of freedom is 4.302653; the differences are 2, 1 and 3 points.
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert vgpo.difference.mean == pytest.approx(0.02)
    assert (vgpo.difference.low, vgpo.difference.high) == pytest.approx((0.02 - half, 0.02 + half), rel=1e-6)
    assert not vgpo.difference.excludes_zero
    assert "no difference from DAPO in held-out accuracy is shown" in verdict([dapo, vgpo])
    assert "0 of 1 means lie below DAPO's" in verdict([dapo, vgpo])


def test_a_difference_that_shows_is_said_with_its_caution():
    accuracies = {"dapo": [0.30, 0.50, 0.40], "intra": [0.41, 0.60, 0.51], "inter": [0.2, 0.7, 0.3]}
    summary = summarise([result(arm, seed, a) for arm, values in accuracies.items() for seed, a in enumerate(values)])
    text = verdict(summary)
    assert "DAPO + intra +10.7 (+9.2 to +12.1) points" in text and "DAPO + inter" not in text
    assert "Of 2 such intervals" in text and "10%" in text


def test_two_seeds_that_agree_by_chance_are_not_spoken_of():
    runs = [result(arm, seed, 0.4 + (arm == "intra") * 0.1) for arm in ("dapo", "intra") for seed in range(2)]
    assert summarise(runs)[1].difference.excludes_zero
    assert "too few finished runs" in verdict(summarise(runs))


@pytest.mark.parametrize("values", [[], [0.5]])
def test_too_few_values_have_no_interval(values):
    interval = Interval.of(values)
    assert math.isnan(interval.low) and not interval.excludes_zero


def test_one_run_makes_a_page_and_a_plot():
    runs = [result("intra", 0, 0.5)]
    summary = summarise(runs)
    assert "too few finished runs" in markdown(summary, runs, BUDGET)
    assert "nan" not in markdown(summary, runs, BUDGET)
    ElementTree.fromstring(plot(summary, runs))


def test_the_plot_of_the_same_runs_is_the_same_file():
    runs = [result(arm, seed, 0.4 + 0.1 * seed) for arm in ARMS for seed in range(2)]
    assert plot(summarise(runs), runs) == plot(summarise(runs), runs)

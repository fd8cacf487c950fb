"""The command that proves and measures everything on a GPU: its plan of time, on a CPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from load_script import load_script

from benchmarks import measure

gpu_check = load_script("gpu_check")
Stage = gpu_check.Stage


def code(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def run(out: Path, *plan: object, seconds: float = 60) -> dict[str, str]:
    runner = gpu_check.Runner(plan, out, seconds)
    runner.run()
    return {name: outcome.partition(",")[0] for name, outcome in runner.outcomes.items()}


def test_a_stage_that_fails_or_hangs_costs_itself(tmp_path: Path) -> None:
    outcomes = run(
        tmp_path,
        Stage("first", code("print('hello')"), 30),
        Stage("fails", code("raise SystemExit(3)"), 30, after=("first",)),
        Stage("hangs", code("print('begun', flush=True); import time; time.sleep(60)"), 2, after=("first",)),
        Stage("needs it", code(""), 30, needs=("fails",)),
        Stage("comes after", code(""), 30, after=("fails", "hangs")),
        Stage("absent", code(""), 30, missing="there is no such tool"),
    )
    assert outcomes == {
        "first": "passed",
        "fails": "FAILED with code 3",
        "hangs": "stopped: its time was up",
        "needs it": "left out: fails did not pass",
        "comes after": "passed",
        "absent": "skipped: there is no such tool",
    }
    log = (tmp_path / "check.log").read_text()
    assert "[first] hello\n" in log and "[hangs] begun\n" in log
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == len(outcomes)


def test_what_does_not_fit_is_left_out_from_the_end(tmp_path: Path) -> None:
    sleep = code("import time; time.sleep(30)")
    outcomes = run(tmp_path, Stage("long", sleep, 60, least=1), Stage("late", sleep, 60, 9, ("long",)), seconds=3)
    assert outcomes == {"long": "stopped: its time was up", "late": "left out: no time"}


def test_a_stage_that_times_runs_alone(tmp_path: Path) -> None:
    def stage(name: str, alone: bool = False, after: tuple[str, ...] = ()) -> object:
        busy = f"import pathlib, time; here = pathlib.Path({str(tmp_path)!r}); (here / {name!r}).touch(); "
        busy += "time.sleep(0.5); print(sorted(path.name for path in here.glob('busy*'))); "
        return Stage(name, code(busy + f"(here / {name!r}).unlink()"), 30, after=after, alone=alone)

    run(tmp_path, stage("busy 1"), stage("busy 2"), stage("busy alone", alone=True), stage("busy 3"))
    assert "[busy alone] ['busy alone']\n" in (tmp_path / "check.log").read_text()


@pytest.mark.slow
def test_the_plan_has_every_op_and_fits_its_minutes() -> None:
    script = [sys.executable, "-W", "ignore", gpu_check.__file__, "--plan"]
    plan = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    for name in ("build", "small cases", "timings", "peers", "cuda tests", "memcheck", "racecheck", "counters"):
        assert f"\n{name} " in f"\n{plan}"
    ops = {op.name for op in measure.all_ops()}
    assert set(gpu_check.COUNTED) <= ops


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path: Path) -> None:
    """But those of tools that only a GPU's toolkit has."""
    command = [sys.executable, gpu_check.__file__, "--dry-run", "--minutes", "10", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "check.log").read_text()[-4000:]
    outcomes = (tmp_path / "summary.txt").read_text()
    assert outcomes.count("passed") == 5 + measure.installed("trl") and "FAILED" not in outcomes, outcomes
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert {"visual_focus", "visual_weights", "attention_mass"} <= {row["op"] for row in csv.DictReader(file)}
    assert (tmp_path / "cuda_tests.xml").exists()

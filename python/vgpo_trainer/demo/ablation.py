"""What the parts of VGPO do on the demo's task: each arm with the same seeds and the same budget.

An arm is the demo with another objective: DAPO, either factor alone, both, and both with another schedule or without
the tail gate. Runs go round by seed, so that an ablation that is not finished is as far in one arm as in another. Every
finished run is a file of its own; an interrupted ablation goes on with the run that it was at.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgpo_trainer.demo.settings import EVALUATION_SEED, DemoSettings
from vgpo_trainer.demo.training import reinforce, silence_libraries, starting_point
from vgpo_trainer.reports.arms import ARMS, Run, arm_named
from vgpo_trainer.runs.folder import RunFolder, versions_of_a_run
from vgpo_trainer.runs.writing import RunFailure, write_atomically

if TYPE_CHECKING:
    from vgpo_trainer.demo.evaluation import Evaluation
    from vgpo_trainer.demo.warm_start import WarmStartProgress

BUDGET = ("steps", "prompts", "generations", "problems", "learning_rate", "temperature")
WARM_UP_STEPS = 1  # left out of the time of a step: the first one is slower
TIMED_STEPS = 2
LAST_STEPS = 10  # over which reward and late/early accumulation are averaged


class AblationError(ValueError):
    """An ablation that cannot start as asked; the message says what to change."""


@dataclass(frozen=True)
class AblationSettings:
    """What is compared, and at what expense; everything but ``seeds`` and ``arms`` is the same in every run.

    Attributes:
        steps: Optimisation steps of a run.
        prompts: Problems a step.
        generations: Responses a problem.
        problems: Held-out problems, the same for every run.
        learning_rate: AdamW's.
        temperature: Of sampling.
        seeds: Runs an arm, with seeds 0, 1, ...
        arms: Names from :data:`~vgpo_trainer.reports.arms.ARMS`.
    """

    steps: int = 120
    prompts: int = DemoSettings.prompts
    generations: int = DemoSettings.generations
    problems: int = 1000
    learning_rate: float = DemoSettings.learning_rate
    temperature: float = DemoSettings.temperature
    seeds: int = 5
    arms: tuple[str, ...] = tuple(ARMS)

    def budget(self) -> dict[str, Any]:
        """What must be the same in all runs that are compared."""
        return {name: getattr(self, name) for name in BUDGET}

    def runs(self) -> Iterator[tuple[str, int]]:
        """Arm and seed of every run, in the order they are made: all arms of a seed before the next seed."""
        for seed in range(self.seeds):
            for arm in self.arms:
                yield arm, seed

    def demo(self, arm: str, seed: int, out: Path) -> DemoSettings:
        """The settings of one run."""
        changes = ARMS[arm].changes
        return DemoSettings(
            out,
            algo="dapo" if changes is None else "vgpo",
            changes=changes or {},
            seed=seed,
            steps=self.steps,
            minutes=1e6,  # the budget is steps
            prompts=self.prompts,
            generations=self.generations,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            evaluate_every=self.steps,
            evaluation_problems=self.problems,
        )

    def check(self, threads: int) -> None:
        """Refuse settings that cannot run.

        Args:
            threads: CPU threads that every run is given.

        Raises:
            ValueError: Naming the option.
        """
        for name, value in {
            "steps": self.steps,
            "seeds": self.seeds,
            "prompts": self.prompts,
            "problems": self.problems,
            "threads": threads,
        }.items():
            if value < 1:
                raise AblationError(f"--{name} must be positive, got {value}")
        for arm in self.arms:
            arm_named(arm)
        self.demo(self.arms[0], 0, Path()).check()


class AblationFolder:
    """The folder of an ablation.

    ==============================  ==================================================================
    ``ablation.json``               the budget, which all runs share
    ``results/<arm>-<seed>.json``   a finished run
    ``runs/<arm>-<seed>/``          its run folder (see :mod:`vgpo_trainer.runs.folder`)
    ``results.csv``, ``.json``      all finished runs, and the statistics of each arm
    ``ablation.md``, ``images/``    the comparison to read
    ==============================  ==================================================================

    Args:
        path: It need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.budget = self.path / "ablation.json"
        self.results = self.path / "results"

    def open(self, budget: dict[str, Any]) -> None:
        """Make the folder, or go on with it.

        Raises:
            AblationError: It holds something else, an ablation with another budget, or cannot be written.
        """
        try:
            if self.budget.is_file():
                self._check_same(budget)
            elif self.path.is_dir() and any(self.path.iterdir()):
                raise AblationError(f"{self.path} is not empty and holds no ablation; choose another --out")
            self.results.mkdir(parents=True, exist_ok=True)
            write_atomically(self.budget, json.dumps(budget, indent=2) + "\n")
        except OSError as error:
            raise AblationError(f"cannot write to {error.filename or self.path}: {error.strerror}") from error
        except RunFailure as error:
            raise AblationError(str(error)) from error

    def read_budget(self) -> dict[str, Any]:
        """The budget that all runs share.

        Raises:
            AblationError: There is no ablation.
        """
        try:
            budget: dict[str, Any] = json.loads(self.budget.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AblationError(f"{self.path} holds no ablation") from None
        except (OSError, ValueError) as error:
            raise AblationError(f"cannot read {self.budget}: {error}") from error
        return budget

    def run_folder(self, arm: str, seed: int) -> RunFolder:
        """A new run folder; what an interrupted run left in its place is removed."""
        path = self.path / "runs" / f"{arm}-{seed}"
        if path.exists():
            shutil.rmtree(path)
        folder = RunFolder(path)
        folder.create()
        return folder

    def finished(self) -> list[Run]:
        """All finished runs.

        Raises:
            AblationError: A file is not the result of a run.
        """
        runs = []
        for path in sorted(self.results.glob("*.json")):
            try:
                runs.append(Run(**json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, TypeError) as error:
                raise AblationError(
                    f"{path} is not the result of a run ({error}); delete it to run it again"
                ) from error
        return runs

    def store(self, run: Run) -> None:
        """Keep a finished run."""
        path = self.results / f"{run.arm}-{run.seed}.json"
        write_atomically(path, json.dumps(asdict(run)) + "\n")

    def _check_same(self, budget: dict[str, Any]) -> None:
        for name, value in self.read_budget().items():
            if budget.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                raise AblationError(
                    f"{self.path} holds an ablation with {option} {value}, not {budget.get(name)}; choose another --out"
                )


class AblationDisplay:
    """Plain lines: how long it will take as soon as that can be known, then a line a run. It is a run's listener.

    Args:
        steps: Of a run.
        runs: Still to be made.
        total: Of the ablation.
        seconds: That finished runs took.
    """

    def __init__(self, steps: int, runs: int, total: int, seconds: Sequence[float]) -> None:
        self.steps = steps
        self.left = runs
        self.total = total
        self.seconds = list(seconds)
        self._told = False
        self._measuring = 0.0
        self._clock: list[float] = []
        if runs < total:
            self._say(f"{total - runs} of {total} runs are finished")
        if runs and self.seconds:
            self._tell_time(statistics.median(self.seconds))

    def start(self) -> None:
        """A run starts now."""
        self._clock = []

    def measured(self, evaluation: Evaluation, seconds: float) -> None:
        """The accuracy of the starting point, and what it took to measure."""
        self._measuring = seconds
        self._say(f"before training: held-out accuracy {evaluation.accuracy:.1%}")

    def stage(self, name: str) -> None:
        """A run's stages need no line of their own."""

    def imitated(self, progress: WarmStartProgress) -> None:
        """Every run starts from the shipped checkpoint."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The result of a run is said when it is finished."""

    def stepped(self, step: int, record: Mapping[str, Any]) -> None:
        """Say how long everything takes once a few steps have been timed."""
        self._clock.append(time.monotonic())
        if not self._told and len(self._clock) == WARM_UP_STEPS + TIMED_STEPS:
            step_seconds = (self._clock[-1] - self._clock[WARM_UP_STEPS - 1]) / TIMED_STEPS
            self._say(f"a step takes {step_seconds:.1f} s")
            self._tell_time(step_seconds * self.steps + self._measuring)

    def finished(self, run: Run) -> None:
        """A run is finished."""
        self.left -= 1
        self.seconds.append(run.seconds)
        rest = _duration(self.left * statistics.median(self.seconds))
        self._say(
            f"[{self.total - self.left}/{self.total}] {run.arm}, seed {run.seed}: "
            f"held-out accuracy {run.accuracy:.1%}, late/early {run.late_early_ratio:.4f}, "
            f"{_duration(run.seconds)}; {self.left} left, about {rest}"
        )

    def _tell_time(self, run_seconds: float) -> None:
        self._told = True
        whole = self.left * run_seconds
        end = datetime.now() + timedelta(seconds=whole)
        self._say(
            f"{self.left} runs of about {_duration(run_seconds)}: {_duration(whole)}, until about {end:%H:%M}; "
            "interrupt it whenever you like, the same command goes on"
        )

    def _say(self, line: str) -> None:
        print(line, flush=True)


def run_ablation(settings: AblationSettings, folder: AblationFolder, threads: int, report: Path) -> None:
    """Make the runs that are not finished, and the table and the plot anew after each.

    Args:
        settings: What to compare.
        folder: An open folder.
        threads: CPU threads.
        report: Folder of the table and the plot.
    """
    from vgpo_trainer.reports.ablation import write_ablation

    done = {(run.arm, run.seed): run for run in folder.finished()}
    wanted = list(settings.runs())
    missing = [run for run in wanted if run not in done]
    display = AblationDisplay(settings.steps, len(missing), len(wanted), [run.seconds for run in done.values()])
    if missing:
        import torch

        torch.set_num_threads(threads)
        before = measure_start(settings, display)
        for arm, seed in missing:
            display.start()
            finished = run_one(settings, folder, arm, seed, before, display)
            folder.store(finished)
            display.finished(finished)
            write_ablation(folder.path, report, settings.budget(), folder.finished())
    print(write_ablation(folder.path, report, settings.budget(), folder.finished()))


def measure_start(settings: AblationSettings, display: AblationDisplay) -> Evaluation:
    """Held-out accuracy of the checkpoint that every run starts from, measured once."""
    from vgpo_trainer.demo.digits import make_problems
    from vgpo_trainer.demo.evaluation import evaluate

    silence_libraries()
    model, processor = starting_point(settings.demo(settings.arms[0], 0, Path()), display)
    held_out = make_problems(settings.problems, "held_out", EVALUATION_SEED)
    start = time.monotonic()
    before = evaluate(model, processor, held_out)
    display.measured(before, time.monotonic() - start)
    return before


def run_one(
    settings: AblationSettings,
    folder: AblationFolder,
    arm: str,
    seed: int,
    before: Evaluation,
    display: AblationDisplay,
) -> Run:
    """Train one arm with one seed and return what came out."""
    import torch

    from vgpo_trainer.runs.metrics import read_metrics

    start, start_cpu = time.monotonic(), time.process_time()
    run = folder.run_folder(arm, seed)
    result = reinforce(settings.demo(arm, seed, run.path), display, before=before)
    records = [record for record in read_metrics(run.metrics) if "reward" in record]
    last = records[-LAST_STEPS:]
    ratios = [record["vgpo/late_early_ratio"] for record in last]
    ratios = [ratio for ratio in ratios if ratio is not None]
    return Run(
        arm=arm,
        seed=seed,
        accuracy_before=before.accuracy,
        accuracy=result.after.accuracy,
        late_early_ratio=statistics.fmean(ratios) if ratios else math.nan,
        reward=statistics.fmean(record["reward"] for record in last),
        steps=result.trainer.state.global_step,
        seconds=round(time.monotonic() - start, 1),
        cpu_seconds=round(time.process_time() - start_cpu, 1),
        threads=torch.get_num_threads(),
        versions=versions_of_a_run(),
        rewards=[record["reward"] for record in records],
    )


def _duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

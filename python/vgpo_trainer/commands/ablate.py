"""``vgpo ablate``: compare DAPO, VGPO and its parts on the demo's task, over seeds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vgpo_trainer.demo.ablation import BUDGET, AblationError, AblationFolder, AblationSettings, run_ablation
from vgpo_trainer.reports.arms import arm_named, meanings

DESCRIPTION = (
    "Train the demo's model with DAPO, with VGPO, and with parts of VGPO, over several seeds each, and compare "
    "held-out accuracy. The same command goes on with an ablation that was interrupted."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo ablate`` to a parser."""
    default = AblationSettings()
    add = parser.add_argument
    add(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the ablation; one that exists is gone on with"
    )
    add("--steps", type=int, default=default.steps, help="steps a run (default: %(default)s)")
    add("--seeds", type=int, default=default.seeds, help="runs an arm (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads; with one, runs repeat exactly (default: %(default)s)")
    add("--prompts", type=int, default=default.prompts, help="problems a step (default: %(default)s)")
    add("--generations", type=int, default=default.generations, help="responses each (default: %(default)s)")
    add("--problems", type=int, default=default.problems, help="held-out problems (default: %(default)s)")
    add("--learning-rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    add("--temperature", type=float, default=default.temperature, help="of sampling (default: %(default)s)")
    add("--arms", nargs="+", type=_arm, default=default.arms, metavar="ARM", help=f"by default all: {meanings()}")
    add("--report-only", action="store_true", help="train nothing: make table and plot from the runs that are finished")
    add("--report", type=Path, metavar="DIR", help="folder of ablation.md and images/ablation.svg (default: --out)")


def _arm(text: str) -> str:
    try:
        return arm_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(arguments: argparse.Namespace) -> int:
    """Run the ablation as the command line says: 0 when done, 2 when it cannot start, 130 when interrupted."""
    from vgpo_trainer.reports.ablation import write_ablation

    folder = AblationFolder(arguments.out)
    report = arguments.report or arguments.out
    try:
        if arguments.report_only:
            budget = folder.read_budget()
            runs = folder.finished()
            if not runs:
                raise AblationError(f"{folder.path} has no finished run yet")
            print(write_ablation(folder.path, report, budget, runs))
            return 0
        settings = AblationSettings(
            seeds=arguments.seeds,
            arms=tuple(dict.fromkeys(arguments.arms)),
            **{name: getattr(arguments, name) for name in BUDGET},
        )
        settings.check(arguments.threads)
        folder.open(settings.budget())
        run_ablation(settings, folder, arguments.threads, report)
    except KeyboardInterrupt:
        number = len(folder.finished())
        print(f"vgpo ablate: interrupted; finished runs: {number}; the same command goes on", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"vgpo ablate: {error}", file=sys.stderr)
        return 2
    return 0

"""``vgpo demo``: train a small vision-language model with VGPO on a laptop, and show what it learned."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.options.arguments import natural, positive
from vgpo_trainer.runs.folder import RunFolder

DESCRIPTION = (
    "Train a small vision-language model with VGPO on images of handwritten digits, and report what it learned."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vgpo demo`` to a parser."""
    default = DemoSettings(Path())
    add = parser.add_argument
    add("--algo", choices=("vgpo", "dapo"), default=default.algo, help="dapo: the same without the visual signal")
    add("--seed", type=natural, default=default.seed, help="(default: %(default)s)")
    add("--steps", type=positive, default=default.steps, help="steps of reinforcement (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/demo-<algo>-<time>)")
    add(
        "--warm-start",
        choices=("shipped", "fresh"),
        default=default.warm_start,
        help="start from the shipped checkpoint, or imitate worked solutions first (default: %(default)s)",
    )
    add("--use-cpu", action="store_true", help="train on the CPU, also where there is an accelerator")
    add("--minutes", type=float, default=default.minutes, help="stop early to end in this time (default: %(default)s)")
    add("--prompts", type=positive, default=default.prompts, help="problems a step (default: %(default)s)")
    add("--generations", type=positive, default=default.generations, help="responses each (default: %(default)s)")
    add("--learning-rate", type=float, default=default.learning_rate, help="(default: %(default)s)")
    add("--temperature", type=float, default=default.temperature, help="of sampling (default: %(default)s)")
    add("--evaluate-every", type=positive, default=default.evaluate_every, metavar="STEPS", help=argparse.SUPPRESS)
    add("--evaluation-problems", type=positive, default=default.evaluation_problems, help=argparse.SUPPRESS)
    add("--warm-start-steps", type=positive, default=default.warm_start_steps, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo as the command line says: 0 when done, 2 when it cannot start, 130 when interrupted."""
    chosen = {name: value for name, value in vars(arguments).items() if name in DemoSettings.__dataclass_fields__}
    if chosen["out"] is None:
        chosen["out"] = Path("runs") / f"demo-{arguments.algo}-{datetime.now():%Y%m%d-%H%M%S}"
    settings = DemoSettings(**chosen)
    # First, so that a package that is missing leaves no folder behind.
    from vgpo_trainer.demo.display import DemoDisplay
    from vgpo_trainer.demo.training import run_demo

    try:
        settings.check()
        RunFolder(settings.out).create()
    except ValueError as error:
        print(f"vgpo demo: {error}", file=sys.stderr)
        return 2
    with DemoDisplay(settings.steps) as display:
        try:
            result = run_demo(settings, display)
        except KeyboardInterrupt:
            display.close()
            print(f"vgpo demo: interrupted; what there is lies in {settings.out}", file=sys.stderr)
            return 130
    display.summary(result)
    return 0

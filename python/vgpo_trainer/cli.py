"""The ``vgpo`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from vgpo_trainer.commands import ablate, demo, doctor, inspect, probe, report, train
from vgpo_trainer.runs.processes import complain
from vgpo_trainer.runs.writing import RunFailure

DESCRIPTION = """\
Visually-guided reinforcement learning of vision-language models.

  vgpo demo                             train a small model on a laptop and see what it learns
  vgpo train --model M --dataset D --out R   train any Hugging Face vision-language model
  vgpo report RUN                       make the report of a run again
  vgpo ablate --out DIR                 compare DAPO, VGPO and its parts on the demo's task, over seeds
  vgpo inspect --model M --image F --prompt T   see what each token of an answer looks at
  vgpo probe --model M --dataset D      which visual signal says where answers need the image, before training
  vgpo doctor                           what is installed, what is built, does it work
"""

# Modules that the extra "train" brings, by itself or by what it depends on.
TRAIN_EXTRA = ("accelerate", "datasets", "huggingface_hub", "jinja2", "markupsafe", "peft", "PIL", "rich")
TRAIN_EXTRA += ("safetensors", "scipy", "sklearn", "tokenizers", "transformers", "trl")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each subcommand leaves its function in ``run``."""
    parser = argparse.ArgumentParser(
        prog="vgpo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, module, summary in (
        ("demo", demo, "train a small model on a laptop and see what it learns"),
        ("train", train, "train any Hugging Face vision-language model"),
        ("report", report, "make the report of a run again"),
        ("inspect", inspect, "see what each token of an answer looks at"),
        ("probe", probe, "which visual signal says where answers need the image, before training"),
        ("ablate", ablate, "compare DAPO, VGPO and its parts over seeds"),
        ("doctor", doctor, "what is installed, what is built, does it work"),
    ):
        command = commands.add_parser(name, help=summary, description=module.DESCRIPTION)
        if module is train:  # main hands its arguments on, as TRL's parser reads them
            continue
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Returns:
        0 done, 1 for a run that broke off, 2 for what the user can put right, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "train":
        return _run("train", lambda: train.main(argv[1:]))
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from vgpo_kernels import __version__

        print(f"vgpo_kernels {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    return _run(arguments.command, lambda: arguments.run(arguments))


def _run(command: str, run: Callable[[], int]) -> int:
    """Run a command, and turn what went wrong into a line and an exit status."""
    try:
        return run()
    except KeyboardInterrupt:
        complain("vgpo: interrupted")
        return 130
    except RunFailure as error:
        complain(f"vgpo {command}: {error}")
        return 1
    except ModuleNotFoundError as error:
        # Ours missing is a defect and keeps its traceback; a dependency missing is an installation without an extra.
        if error.name is None or error.name.startswith("vgpo"):
            raise
        package = error.name.partition(".")[0]
        remedy = "; pip install 'vgpo-kernels[train]' brings it" if package in TRAIN_EXTRA else ""
        if package == "trl" and sys.version_info < (3, 11):
            remedy = f": the trainer needs Python 3.11 or later, as TRL does, and this is {sys.version.split()[0]}"
        complain(f"vgpo {command}: {package} is not installed{remedy}")
        return 2


if __name__ == "__main__":
    sys.exit(main())

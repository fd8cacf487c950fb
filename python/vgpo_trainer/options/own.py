"""The options of ``vgpo train`` that are no fields of a class of TRL's: data, rewards, and how a run goes on."""

from __future__ import annotations

import argparse

from vgpo_trainer.options.arguments import add_data_arguments
from vgpo_trainer.options.names import TRL_NAMES, flags


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser, in groups of their own."""
    data = parser.add_argument_group("data")
    add_data_arguments(data, other_names=TRL_NAMES)
    add = data.add_argument
    add(
        *flags("eval_dataset"),
        metavar="ID_OR_PATH",
        help="held-out rows, evaluated as they are; with --eval-split alone, those of --dataset",
    )
    add(*flags("eval_dataset_config"), metavar="NAME", help="its configuration")
    add(*flags(TRL_NAMES["eval_split"], "eval_split"), dest="eval_split", metavar="NAME", help="its split")
    rewards = parser.add_argument_group("rewards")
    rewards.add_argument(
        *flags(TRL_NAMES["reward"], "reward"),
        dest="reward",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="reward functions: file.py:function, module:function, or a name that docs/train.md lists. May be "
        "repeated, and --reward-weights weighs them. Default: exact_answer, 1 for the right answer and 0 for another",
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config",
        metavar="FILE",
        help="settings in YAML or JSON, by the names of the options, or the config.json of a run; what else is on the "
        "command line overrides it",
    )
    run.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from the last checkpoint in --out; default: if there is one",
    )

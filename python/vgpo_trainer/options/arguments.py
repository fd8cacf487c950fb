"""Kinds of values that options take, and the options of commands that read a dataset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgpo_trainer.data import DataSource

TOLD = 10  # rows that are named where more were left out


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def natural(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def indices(text: str) -> list[int]:
    """Integers with commas between them."""
    return [int(part) for part in text.split(",")]


def add_data_arguments(parser: Any, other_names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Add the options that say which dataset is read, and how; :func:`source_of` reads them.

    Args:
        parser: A parser, or a group of one.
        other_names: Option -> another name that it has.
    """

    def add(name: str, **settings: Any) -> None:
        names = [name, other_names.get(name, name)]
        spellings = dict.fromkeys(f"--{each}" for name in names for each in (name.replace("_", "-"), name))
        parser.add_argument(*spellings, dest=name, **settings)

    add("dataset", metavar="ID_OR_PATH", help="dataset: hub id, folder or file; see docs/train.md")
    add("dataset_config", metavar="NAME", help="configuration of a dataset that has several")
    add("split", metavar="NAME", help="split, or part of one: train[:1000]; default: train, or the only one")
    add("streaming", action="store_true", help="read rows while they are needed, without storing the dataset first")
    for role, what in (("prompt", "prompts"), ("image", "images"), ("video", "videos"), ("answer", "right answers")):
        add(f"{role}_column", metavar="NAME", help=f"column of the {what}, if it has none of the usual names")
    add("system", metavar="TEXT", help="system message put before every prompt that has none")
    add("max_pixels", type=positive, metavar="N", help="make images with more pixels smaller; 262144 is 512 by 512")
    add("skip_bad_rows", action="store_true", help="leave out rows that cannot be used, in place of an error")
    add(
        "check_images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image before the start, to find those that cannot be",
    )


def source_of(arguments: argparse.Namespace, *, needs_answer: bool = True, held_out: bool = False) -> DataSource:
    """Return the dataset that the options of :func:`add_data_arguments` say.

    Args:
        arguments: The options.
        needs_answer: Whether a row without an answer cannot be used.
        held_out: The one that ``eval_dataset``, ``eval_dataset_config`` and ``eval_split`` say, which is read whole;
            where there is no dataset among them, a split of the other.

    Raises:
        ValueError: No dataset is named.
    """
    from vgpo_trainer.data import DataSource

    if arguments.dataset is None:
        raise ValueError("--dataset ID_OR_PATH is missing")
    path, config, split = arguments.dataset, arguments.dataset_config, arguments.split
    if held_out:
        split = arguments.eval_split
        config = arguments.eval_dataset_config or (None if arguments.eval_dataset else config)
        path = arguments.eval_dataset or path
    columns = {
        "prompt": arguments.prompt_column,
        "images": arguments.image_column,
        "videos": arguments.video_column,
        "answer": arguments.answer_column,
    }
    return DataSource(
        path,
        config=config,
        split=split,
        streaming=arguments.streaming and not held_out,
        columns={role: name for role, name in columns.items() if name is not None},
        system=arguments.system,
        skip_bad_rows=arguments.skip_bad_rows,
        needs_answer=needs_answer,
        max_pixels=arguments.max_pixels,
        check_images=arguments.check_images,
    )


def tell_skipped(skipped: Sequence[str]) -> None:
    """Print why rows were left out (:attr:`vgpo_trainer.data.LoadedRows.skipped`) on stderr, the first few of many."""
    for why in skipped[:TOLD]:
        print(f"left out: {why}", file=sys.stderr)
    if len(skipped) > TOLD:
        print(f"left out: {len(skipped) - TOLD} rows more, {len(skipped)} in all", file=sys.stderr)

"""``vgpo train --help``: every field of TRL's settings, read from the source of the installed packages.

Importing TRL's settings takes seconds, as transformers and torch come with them. What the help needs, the names of the
fields and what they are for, is in their source as literals.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vgpo_trainer.options.names import DEFAULTS, OFTEN, SHORT_NAMES, flags
from vgpo_trainer.options.own import add_own_arguments

USAGE = "vgpo train --model ID_OR_PATH --dataset ID_OR_PATH --out DIR [options]"
# Rows of a dataset as the help shows them.
ROW = {"image": "figures/7.png", "question": "<image>How long is AB?", "answer": "12"}
EPILOG = f"""\
a row of the dataset, as a line of JSON (parquet, CSV and others have the same as columns):

  {json.dumps(ROW)}

  image     a path from the folder of the file, bytes or an array; as images a list of them; none for text alone
  question  the prompt, text or chat messages; <image> says where the image stands, by default first
  answer    what --reward compares answers with: text or a number
  any other is handed to reward functions by its name

  Columns may be called otherwise: prompt or problem, solution or label (docs/train.md), or what --prompt-column,
  --image-column and --answer-column say. A row may have --video-column, too.

Every option may be written with hyphens or underscores. true, false and none are values; settings that are
dictionaries are JSON. docs/train.md explains data, rewards, launchers and metrics.
"""


class FieldHelp(NamedTuple):
    """A field of a dataclass.

    Attributes:
        name: Its name.
        text: Its help; empty where it has none.
        default: Its default as the source has it; ``None`` where it has none.
    """

    name: str
    text: str
    default: str | None


def settings_groups() -> list[tuple[str, list[FieldHelp]]]:
    """Title and fields of each class of settings, a field in the class that declares it last."""
    trl, transformers = _folder("trl"), _folder("transformers")
    classes = [
        ("transformers' TrainingArguments", transformers / "training_args.py", "TrainingArguments"),
        ("TRL's GRPOConfig", trl / "trainer" / "base_config.py", "_BaseConfig"),
        ("TRL's GRPOConfig", trl / "trainer" / "grpo_config.py", "GRPOConfig"),
        ("VGPO, fields of VGPOTrainingConfig", Path(__file__).parent.parent / "config.py", "VGPOTrainingConfig"),
        ("TRL's ModelConfig", trl / "trainer" / "model_config.py", "ModelConfig"),
    ]
    latest: dict[str, tuple[str, FieldHelp]] = {}
    for title, path, name in classes:
        latest.update((field.name, (title, field)) for field in read_fields(path, name))
    titles = [classes[3][0], classes[4][0], classes[2][0], classes[0][0]]
    return [(title, [field for owner, field in latest.values() if owner == title]) for title in titles]


def read_fields(path: Path, class_name: str) -> Iterator[FieldHelp]:
    """Read the fields of a dataclass from its source, in order, but for those that its constructor does not take."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        text, default, init = "", None if node.value is None else ast.unparse(node.value), True
        if isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            text = _help(given.get("metadata"))
            default = ast.unparse(given["default"]) if "default" in given else None
            init = ast.unparse(given.get("init", ast.Constant(True))) == "True"
        if init:
            yield FieldHelp(node.target.id, text, default)


def help_parser() -> argparse.ArgumentParser:
    """A parser that prints the help, and does nothing else."""
    parser = argparse.ArgumentParser(
        prog="vgpo train",
        usage=USAGE,
        description="Train a vision-language model with VGPO on images, prompts and answers.",
        epilog=EPILOG,
        formatter_class=_Formatter,
        add_help=False,
    )
    groups = settings_groups()
    fields = {field.name: field for _, listed in groups for field in listed}
    often = parser.add_argument_group("most used")
    for name in (*SHORT_NAMES, *OFTEN):
        _add(often, fields[name])
    add_own_arguments(parser)
    for title, listed in groups:
        group = parser.add_argument_group(title)
        for field in listed:
            if field.name not in SHORT_NAMES and field.name not in OFTEN:
                _add(group, field)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Names each option once, with hyphens, and its value once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(dict.fromkeys(spelling.replace("_", "-") for spelling in action.option_strings))
        return f"{names} {action.metavar}" if action.metavar else names


def _add(group: Any, field: FieldHelp) -> None:
    short, text = SHORT_NAMES.get(field.name, (None, field.text))
    default = repr(DEFAULTS[field.name]) if field.name in DEFAULTS else field.default
    if default not in (None, "None", "''", "-1"):
        text = f"{text} (default: {default})"
    group.add_argument(*flags(field.name, *([short] if short else [])), help=text.replace("%%", "%").replace("%", "%%"))


def _help(metadata: ast.expr | None) -> str:
    """The help in a field's metadata; names inside an f-string are left as they are written."""
    if not isinstance(metadata, ast.Dict):
        return ""
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "help":
            return " ".join(_text(value).split())
    return ""


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ast.unparse(node)


def _folder(package: str) -> Path:
    spec = find_spec(package)  # finds, and does not import, a package at the top
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent

"""Options and files of settings -> the settings of a run, through TRL's parser."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import ModelConfig, TrlParser

from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.options.checks import check_given, check_optimizer
from vgpo_trainer.options.names import DEFAULTS, SHORT_NAMES, TRL_NAMES, flags
from vgpo_trainer.options.own import add_own_arguments

# What TRL says where a step does not hold whole groups, in names of fields that nobody gave.
_INDIVISIBLE = re.compile(r"generation_batch_size \((\d+)\) must be divisible by num_generations \((\d+)\)")
KINDS = (VGPOTrainingConfig, ModelConfig)


class OptionError(ValueError):
    """Options that do not make a run; the message says which and why."""


@dataclass(frozen=True)
class Options:
    """What a command line and its file of settings say.

    Attributes:
        own: The options of :mod:`vgpo_trainer.options.own`.
        training: Settings of the trainer.
        model: Settings of the model, its adapter and its quantization.
        given: Every option that was given, in the file or on the command line, by the name of its field; what
            ``config.json`` keeps, and reads back.
    """

    own: argparse.Namespace
    training: VGPOTrainingConfig
    model: ModelConfig
    given: dict[str, Any]


class Parser(TrlParser):
    """TRL's parser; what is wrong is an :class:`OptionError`, and only what is given is in the namespace."""

    def __init__(self, dataclass_types: Any = None, **settings: Any) -> None:
        super().__init__(dataclass_types, prog="vgpo train", add_help=False, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, without the list of all options."""
        raise OptionError(re.sub(r"^argument (--[^/:]+)[^:]*:", r"\1:", message))


def parse_options(argv: Sequence[str]) -> Options:
    """Read a command line, and the file that its ``--config`` names.

    Raises:
        OptionError: An option or a key that does not exist, a value that does not do, or options that do not go
            together.
        OSError: The file of settings cannot be read.
        ImportError: A setting needs a package that is not there.
    """
    if sum(part.partition("=")[0] == "--config" for part in argv) > 1:
        raise OptionError("--config is given more than once: one file holds all settings")
    line = _parse(argv)
    written = read_config(Path(line["config"])) if line.get("config") else {}
    given = {name: value for name, value in {**written, **line}.items() if name != "config"}
    own = {**_own_defaults(), **{name: given[name] for name in _own_defaults() if name in given}}
    model = _build(ModelConfig, {name: given[name] for name in _names(ModelConfig) if name in given})
    _settle_adapter(model, given)
    training = {name: given[name] for name in _names(VGPOTrainingConfig) if name in given}
    _settle_training(training, own)
    check_given(training)
    settings = _build(VGPOTrainingConfig, {**DEFAULTS, **training})
    check_optimizer(settings)
    return Options(argparse.Namespace(**own), settings, model, given)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a file of settings: YAML or JSON, or the ``config.json`` that a run wrote.

    Returns:
        Values by the names of their fields. ``env``, if there is one, has gone into the environment, as TRL does.

    Raises:
        OptionError: It is no mapping, names an option that does not exist, or a value does not do.
        OSError: It cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"--config {path} is neither YAML nor JSON: {reason}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} must hold names and values, got {type(content).__name__}")
    if isinstance(content.get("arguments"), dict) and "versions" in content:
        content = content["arguments"]
    environment = content.pop("env", {})
    if not isinstance(environment, dict):
        raise OptionError(f"--config {path}: env must hold names and values, got {type(environment).__name__}")
    try:
        os.environ.update({str(name): str(value) for name, value in environment.items()})
    except (ValueError, OSError) as error:
        raise OptionError(f"--config {path}: env holds a name or value that no environment has: {error}") from error
    values: dict[str, Any] = {}
    scalars = []
    keys: dict[str, str] = {}
    for key, value in content.items():
        name = _field_of(str(key))
        if name is None or name == "config":
            raise OptionError(f"--config {path}: there is no option {key}{_did_you_mean(str(key))}")
        if name in keys:
            raise OptionError(f"--config {path}: {keys[name]} and {key} are the same option")
        keys[name] = str(key)
        if value is None or isinstance(value, (list, dict)) or _is_switch(name):
            values[name] = _as_written(name, value, f"--config {path}: {key}")
        else:
            scalars.append(f"--{name}={json.dumps(value) if isinstance(value, bool) else value}")
    try:
        return {**values, **_parse(scalars)}
    except OptionError as error:
        raise OptionError(f"--config {path}: {str(error).removeprefix('--')}") from error


def with_short_names(kind: type) -> type:
    """A dataclass of settings whose options have their short names, too; only for the parser."""
    hints = get_type_hints(kind)
    changed = []
    for setting in fields(kind):
        if setting.name in SHORT_NAMES:
            metadata = {**setting.metadata, "aliases": flags(SHORT_NAMES[setting.name][0])}
            changed.append((setting.name, hints[setting.name], field(default=setting.default, metadata=metadata)))
    return make_dataclass(kind.__name__, changed, bases=(kind,))


@cache
def _parser() -> Parser:
    parser = Parser([with_short_names(kind) for kind in KINDS])
    add_own_arguments(parser)
    for action in parser._actions:  # TRL's parser sets defaults in the same way
        action.default = argparse.SUPPRESS
        action.required = False
    return parser


@cache
def _own_defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    add_own_arguments(parser)
    return vars(parser.parse_args([]))


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    """What a command line gives, by field."""
    argv, nothing = _without_nothing(argv)
    given, rest = _parser().parse_known_args(argv)
    if rest:
        option = rest[0].partition("=")[0]
        if not option.startswith("--"):
            raise OptionError(f"unexpected argument {rest[0]!r}: a value stands behind the name of its option")
        if option == "--set":
            raise OptionError("--set is gone: every setting is an option of its own, --use_cpu true or --beta 0.01 say")
        raise OptionError(f"there is no option {option}{_did_you_mean(option)}")
    return {**vars(given), **dict.fromkeys(nothing)}


def _without_nothing(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take options whose value is the word none from a command line, but for those that take text.

    Returns:
        The rest, and the fields that are to be None.
    """
    rest: list[str] = []
    nothing: list[str] = []
    parts = list(argv)
    while parts:
        part = parts.pop(0)
        option, equals, value = part.partition("=")
        word = value if equals else (parts[0] if parts else "")
        name = _field_of(option.removeprefix("--")) if option.startswith("--") else None
        if name is None or word.lower() != "none" or not _may_be_empty(name):
            rest.append(part)
            continue
        nothing.append(name)
        if not equals:
            parts.pop(0)
    return rest, nothing


def _may_be_empty(name: str) -> bool:
    """Whether a field may be None and takes no text, of which "none" might be one."""
    hints = [get_type_hints(kind)[name] for kind in KINDS if name in _names(kind)]
    return any("None" in str(hint) and hint != (str | None) and name not in ("vgpo", "report_to") for hint in hints)


def _names(kind: type) -> list[str]:
    return [setting.name for setting in fields(kind) if setting.init]


@cache
def _spellings() -> dict[str, str]:
    """Every name of an option, with underscores -> its field."""
    names = {name: name for kind in KINDS for name in _names(kind)} | {name: name for name in _own_defaults()}
    names.update({short: name for name, (short, _) in SHORT_NAMES.items()})
    names.update({theirs: name for name, theirs in TRL_NAMES.items()})
    return names


def _field_of(key: str) -> str | None:
    return _spellings().get(key.replace("-", "_"))


def _did_you_mean(option: str) -> str:
    bare = option.removeprefix("--").replace("-", "_")
    close = difflib.get_close_matches(bare, _spellings(), n=1, cutoff=0.7)
    return f"; did you mean --{close[0].replace('_', '-')}?" if close else "; vgpo train --help lists them"


def _is_switch(name: str) -> bool:
    """Whether an option of ours takes no value on the command line."""
    return isinstance(_own_defaults().get(name), bool) or name == "resume"


def _as_written(name: str, value: Any, where: str) -> Any:
    """Check a value that does not pass the parser: a list, a dictionary, nothing, or whether a switch is on."""
    if value is None:
        return None
    if _is_switch(name):
        expected, fits = "true or false", isinstance(value, bool)
    elif name == "reward":
        expected, fits = "a name or a list of names", isinstance(value, list) and all(isinstance(v, str) for v in value)
    elif name in _own_defaults():
        expected, fits = "one value", False
    else:
        (hint,) = (str(get_type_hints(kind)[name]) for kind in KINDS if name in _names(kind))
        expected, fits = f"of the type {hint}", type(value).__name__ in hint
    if not fits:
        raise OptionError(f"{where} must be {expected}, got {value!r}")
    return value


def _settle_adapter(model: ModelConfig, given: Mapping[str, Any]) -> None:
    """A rank asks for an adapter; its scale is twice its rank, and it has no dropout."""
    if "lora_r" in given and given.get("use_peft", True):
        model.use_peft = True
    if not model.use_peft:
        return
    if "lora_alpha" not in given:
        model.lora_alpha = 2 * model.lora_r
    if "lora_dropout" not in given:
        model.lora_dropout = 0.0


def _settle_training(training: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Fill in what follows from other settings."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    if not training.get("output_dir"):
        raise OptionError("--out DIR is missing: the folder of the run")
    if training.get("bf16") is None and not training.get("fp16"):
        # Where transformers takes it. It refuses what an accelerator lacks, Apple's GPUs before macOS 14 for instance.
        training["bf16"] = not training.get("use_cpu") and is_torch_bf16_gpu_available()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":  # nothing to copy to, and memory that cannot be pinned
        training.setdefault("dataloader_pin_memory", False)
    if "per_device_train_batch_size" in training:
        training.setdefault("per_device_eval_batch_size", training["per_device_train_batch_size"])
    if own["eval_dataset"] or own["eval_split"]:
        training.setdefault("eval_strategy", "steps")


def _build(kind: type, settings: Mapping[str, Any]) -> Any:
    for name, value in settings.items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise OptionError(f"--{name} is not JSON: {error}") from error
    try:
        return kind(**settings)
    except ValueError as error:
        if found := _INDIVISIBLE.match(str(error)):
            told = "--batch-size times --accumulate times processes must be a multiple of --generations"
            raise OptionError(f"{told}, got {found[1]} and {found[2]}") from error
        raise
    except ArithmeticError as error:  # an infinite number of steps
        raise OptionError(f"a setting is out of range: {error} ({_listed(settings)})") from error
    except (TypeError, AttributeError) as error:  # a value of another type, which nothing checks
        raise OptionError(
            f"a setting has a value of another type than it takes: {error} ({_listed(settings)})"
        ) from error


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{_shown(name)}={value!r}" for name, value in settings.items() if name not in ("bf16",))


def _shown(name: str) -> str:
    return SHORT_NAMES.get(name, (name,))[0].replace("_", "-")

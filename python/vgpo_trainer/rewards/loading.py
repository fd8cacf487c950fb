"""Reward functions by name: ours, TRL's, and functions of the user's files and modules."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vgpo_trainer.rewards import symbolic
from vgpo_trainer.rewards.answers import exact_answer
from vgpo_trainer.rewards.calling import Reward, guarded, needs_answer, place_of
from vgpo_trainer.runs.writing import first_line

__all__ = ["load_reward", "load_rewards", "needs_answer"]

OURS: dict[str, Reward] = {"exact_answer": exact_answer}
# TRL's by the names of its training script.
TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
# Length of a completion where the run has none, and the share of it over which the punishment grows: TRL's.
_LENGTH, _SHARE = 1280, 5
FORMS = "file.py:function, module:function or module.function"


class _Named(NamedTuple):
    name: str  # as the user gave it
    source: str  # what its module is called
    function: Reward


def load_rewards(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, *, max_completion_length: int | None = None
) -> list[Reward]:
    """Find reward functions by name.

    A name is that of one of ours (``exact_answer``) or of TRL's training script (``accuracy_reward``,
    ``reasoning_accuracy_reward``, ``think_format_reward``, ``get_soft_overlong_punishment``), or says where a function
    is: ``file.py:function``, ``module:function`` or ``module.function``; modules in the current folder are found.

    Args:
        names: A name or several; none for :func:`exact_answer` alone.
        max_completion_length: That of the run, in tokens, for ``get_soft_overlong_punishment``: it punishes the last
            fifth. ``None`` for TRL's 1280.

    Returns:
        Functions of TRL's form. All but ours get the right answer as ``answer``, ``solution`` or ``ground_truth``,
        whichever they ask for, and end the run in one line where they fail. Their ``__name__`` is the function's,
        with that of its module before it where two are called the same.

    Raises:
        ValueError: There is no such function, its file does not run, or a name is given twice; one line.
        TypeError: A name is no text.

    """
    if not names:
        return [exact_answer]
    names = [names] if isinstance(names, (str, os.PathLike)) else names
    names = [os.fspath(name) if isinstance(name, os.PathLike) else name for name in names]
    for name in names:
        if not isinstance(name, str):
            hint = "; VGPOTrainer takes functions as they are" if callable(name) else ""
            raise TypeError(f"a reward is named by text, {FORMS} say, got {name!r}{hint}")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"the reward {repeated[0]} is given twice")
    found = [_find(name, max_completion_length) for name in names]
    counts = Counter(_called(reward.function) for reward in found)
    rewards = []
    for reward in found:
        called = _called(reward.function)
        unique = called if counts[called] == 1 else f"{reward.source}.{called}"
        rewards.append(reward.function if reward.name in OURS else guarded(reward.function, unique))
    same = [name for name, count in Counter(_called(reward) for reward in rewards).items() if count > 1]
    if same:
        raise ValueError(f"two rewards are called {same[0]}, and so would be their metrics: rename one")
    return rewards


def load_reward(name: str) -> Reward:
    """Find one reward function; see :func:`load_rewards`.

    Raises:
        ValueError: As there.

    """
    return load_rewards([name])[0]


def _find(name: str, max_completion_length: int | None) -> _Named:
    if name in OURS:
        return _Named(name, "vgpo_trainer", OURS[name])
    if name in TRL:
        return _Named(name, "trl", _of_trl(name, max_completion_length))
    source, colon, path = name.rpartition(":")
    if not colon:
        source, _, path = name.rpartition(".")
    if not source or not path or (not colon and source.endswith(("/", "\\"))):
        close = difflib.get_close_matches(name, [*OURS, *TRL], n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join([*OURS, *TRL])}, or {FORMS}"
        raise ValueError(f"there is no reward {name!r}; {hint}")
    if not colon and (path == "py" or os.sep in source):
        raise ValueError(f"the reward {name!r} names no function; expected {FORMS}")
    module = _from_file(Path(source), name) if source.endswith(".py") else _from_module(source, name)
    try:
        function: Any = functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(path, public, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{source} has no function {path!r} for the reward {name!r}{hint}") from None
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else type(function).__name__
        raise ValueError(f"the reward {name!r} must be a function or an object that can be called, and is {kind}")
    return _Named(name, Path(source).stem if source.endswith(".py") else source, function)


def _of_trl(name: str, max_completion_length: int | None) -> Reward:
    if "accuracy" in name and not symbolic.available():
        raise ValueError(f"the reward {name} needs math-verify: pip install math-verify")
    rewards = importlib.import_module("trl.rewards")
    found: Any = getattr(rewards, name)
    if name != "get_soft_overlong_punishment":
        return found  # type: ignore[no-any-return]
    length = max_completion_length or _LENGTH
    return found(max_completion_len=length, soft_punish_cache=max(1, length // _SHARE))  # type: ignore[no-any-return]


def _from_file(path: Path, name: str) -> ModuleType:
    """Run a file once, as a module that only it can be; modules beside it are found."""
    if not path.is_file():
        raise ValueError(f"there is no file {path} for the reward {name!r}")
    whole = path.resolve()
    module_name = f"{path.stem}_{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))
    specification = importlib.util.spec_from_file_location(module_name, whole)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module  # where dataclasses and pickle look for it
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _cannot_import(str(path), name, error) from error
    return module


def _from_module(source: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise _cannot_import(source, name, error) from error


def _cannot_import(source: str, name: str, error: BaseException) -> ValueError:
    """A file's own error; of a module that is missing the name alone, since the place is in Python's import."""
    reason = first_line(error) if isinstance(error, Exception) else f"it exits with status {error}"
    place = place_of(error)
    kind = "" if isinstance(error, (ModuleNotFoundError, SystemExit)) else f"{type(error).__name__}: "
    return ValueError(
        f"cannot import {source!r} for the reward {name!r}: {kind}{reason}{f' ({place})' if place else ''}"
    )


def _called(function: Reward) -> str:
    """What TRL calls a function in its metrics."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)

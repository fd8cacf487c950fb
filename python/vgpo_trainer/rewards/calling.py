"""Calling a user's reward function: it gets what it asks for, and what goes wrong in it ends the run in one line."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from vgpo_trainer.runs.processes import complain
from vgpo_trainer.runs.writing import RunFailure, first_line

Reward = Callable[..., Any]

# What reward functions call the right answer: TRL's say solution, verl's ground_truth.
ANSWER_NAMES = ("answer", "solution", "ground_truth")
# Seconds for finding the row that a function failed at.
_SEARCH = 10.0


def needs_answer(functions: Sequence[Reward]) -> bool:
    """Whether a reward function asks for the right answer: a parameter without a default, by one of its names."""
    return any(
        parameter.name in ANSWER_NAMES and parameter.default is inspect.Parameter.empty
        for function in functions
        for parameter in parameters_of(function).values()
    )


def guarded(function: Reward, name: str) -> Reward:
    """Wrap a reward function for a run.

    It gets the right answer by whichever of its names it asks for, and of the data's columns those that it takes.

    Args:
        function: A reward function of TRL's form, or an async one.
        name: What the wrapper is called, and so what TRL's metrics are.

    Returns:
        A function that raises :class:`~vgpo_trainer.runs.writing.RunFailure`, in one line that names the function, the
        place and, where it can be found, the row, for an exception and for what is no list of a number or ``None`` per
        completion. The end of the traceback, from the user's file on, goes to standard error.

    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def reward_later(**given: Any) -> list[float | None]:
            arguments = _arguments(function, name, given)
            try:
                rewards = await function(**arguments)
            except (Exception, SystemExit) as error:
                raise _failure(name, error, None) from error
            return checked_rewards(rewards, name, given)

        return _named(reward_later, function, name)

    def reward(**given: Any) -> list[float | None]:
        arguments = _arguments(function, name, given)
        try:
            rewards = function(**arguments)
        except (Exception, SystemExit) as error:
            raise _failure(name, error, _failing_row(function, arguments, given, error)) from error
        return checked_rewards(rewards, name, given)

    return _named(reward, function, name)


def parameters_of(function: Reward) -> Mapping[str, inspect.Parameter]:
    """The parameters of a reward function, by name; none for one that does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def checked_rewards(rewards: Any, name: str, given: Mapping[str, Any]) -> list[float | None]:
    """The rewards that a function returned, a finite number or ``None`` for each completion.

    Raises:
        RunFailure: They are something else.

    """
    expected = len(given["completions"])
    listed = rewards.tolist() if hasattr(rewards, "tolist") else rewards
    if not isinstance(listed, (list, tuple)):
        if inspect.iscoroutine(rewards):
            rewards.close()
        raise RunFailure(
            f"the reward {name} returned {_shown(rewards)}, expected a list of {expected} numbers, one a completion"
        )
    if len(listed) != expected:
        raise RunFailure(f"the reward {name} returned {len(listed)} rewards for {expected} completions")
    values: list[float | None] = []
    for index, item in enumerate(listed):
        value = item.item() if hasattr(item, "item") and getattr(item, "size", None) is not None else item
        if value is not None and (not isinstance(value, Real) or not _fits(value)):
            row = _row(given, index)
            raise RunFailure(
                f"the reward {name} returned {_shown(value)} for {row or f'completion {index}'}, expected a finite "
                "number or None"
            )
        values.append(None if value is None else float(value))
    return values


def _fits(value: Real) -> bool:
    """Whether a number is NaN, which TRL takes for no reward, or a finite float."""
    try:
        return not math.isinf(float(value))
    except OverflowError:
        return False


def place_of(error: BaseException) -> str:
    """Where an error was raised, as ``name.py:line``: the last place in the user's own file; empty if unknown."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = _user_frames(error)
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{Path(frames[0].filename).name}:{lines[-1]}" if frames else ""


def _arguments(function: Reward, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the given arguments a function takes, with the right answer by the name that it asks for."""
    parameters = parameters_of(function)
    # Lists of its own, so that a function that changes one changes nothing else.
    arguments = {key: list(value) if isinstance(value, list) else value for key, value in given.items()}
    known = next((arguments[known] for known in ANSWER_NAMES if known in arguments), None)
    if known is not None:
        arguments = {**dict.fromkeys(ANSWER_NAMES, known), **arguments}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()) or not parameters:
        return arguments
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.name not in arguments
    ]
    if missing:
        raise RunFailure(
            f"the reward {name} asks for {', '.join(missing)}, which the data does not have; it has "
            f"{', '.join(sorted(given))}"
        )
    return {argument: value for argument, value in arguments.items() if argument in parameters}


def _failure(name: str, error: BaseException, row: str | None) -> RunFailure:
    frames = _user_frames(error)
    if frames:
        lines = "".join(traceback.format_list(frames))
        complain(f"the reward {name} failed:\n{lines}{type(error).__name__}: {error}", about="a reward's error")
    place = place_of(error)
    return RunFailure(
        f"the reward {name} failed{f' at {row}' if row else ''}: {type(error).__name__}: {first_line(error)}"
        f"{f' ({place})' if place else ''}"
    )


def _user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of a traceback from the user's function or module on."""
    callers = (str(Path(__file__).parent), "<frozen importlib", importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith(callers)]


def _failing_row(
    function: Reward, arguments: Mapping[str, Any], given: Mapping[str, Any], error: BaseException
) -> str | None:
    """The row whose completion raises the same kind of error by itself, looked for while there is time."""
    count = len(given["completions"])
    silent = {name: lambda *_, **__: None for name in ("log_extra", "log_metric") if name in arguments}
    end = time.monotonic() + _SEARCH
    for index in range(count):
        alone = {
            name: value[index : index + 1] if isinstance(value, list) and len(value) == count else value
            for name, value in arguments.items()
        }
        try:
            function(**{**alone, **silent})
        except type(error):
            return _row(given, index)
        except Exception:
            pass
        if time.monotonic() > end:
            break
    return None


def _row(given: Mapping[str, Any], index: int) -> str | None:
    rows = given.get("row")
    return str(rows[index]) if isinstance(rows, list) and len(rows) > index and rows[index] is not None else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(wrapper: Reward, function: Reward, name: str) -> Reward:
    functools.update_wrapper(wrapper, function, updated=())
    wrapper.__name__ = wrapper.__qualname__ = name
    return wrapper

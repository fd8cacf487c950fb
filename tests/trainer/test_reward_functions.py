"""Reward functions by name, and what a run says of one that fails."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
from vgpo_trainer.rewards import exact_answer, load_reward, load_rewards, needs_answer
from vgpo_trainer.rewards.calling import guarded
from vgpo_trainer.runs.writing import RunFailure

FILE = '''\
"""Rewards of a user."""
import asyncio
from functools import partial

import numpy as np
import torch


def short(completions, **_):
    return [-len(c) for c in completions]


def right(completions, ground_truth):
    return [float(c == g) for c, g in zip(completions, ground_truth)]


def optional(completions, solution=None, **kwargs):
    return [float(s is not None) for s in solution]


def levels(completions, level):
    return level


def divide(completions, **kwargs):
    return [1 / int(c) for c in completions]


def deep(completions, **kwargs):
    return [c.index("x") and helper(c) for c in completions]


def helper(text):
    return np.array(text).reshape(7, 7)


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def words(completions, **kwargs):
    return ["good" if c == "3" else 1.0 for c in completions]


def infinite(completions, **kwargs):
    return [float("inf") if c == "3" else None for c in completions]


def scalar(completions, **kwargs):
    return 1.0


def array(completions, **kwargs):
    return np.arange(len(completions))


def tensors(completions, **kwargs):
    return [torch.tensor(2.0), np.float32(3), True, None][: len(completions)]


async def later(completions, solution, **kwargs):
    await asyncio.sleep(0)
    return [float(c == s) for c, s in zip(completions, solution)]


async def later_bad(completions, **kwargs):
    raise KeyError("judge")


class Scored:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completions, answer, **kwargs):
        return [self.scale * (c == a) for c, a in zip(completions, answer)]


scored = Scored(2.0)
scaled = partial(short)
number = 3
'''
GIVEN = {
    "prompts": [None] * 3,
    "completions": ["1", "2", "3"],
    "answer": ["1", "0", "3"],
    "row": ["train[0]", "train[7]", "train[9]"],
    "trainer_state": None,
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    yield path
    for name in ("my_rewards", "broken", "other", "my_lib", "my_lib.rewards"):
        sys.modules.pop(name, None)


def test_without_a_name_the_answer_is_rewarded():
    assert load_rewards([]) == load_rewards(["exact_answer"]) == [exact_answer]


@pytest.mark.parametrize("name", ["my_rewards.py:short", "{folder}/my_rewards.py:short", "my_rewards:short"])
def test_functions_are_found(file, name):
    (reward,) = load_rewards([name.format(folder=file.parent)])
    assert reward(**{**GIVEN, "completions": ["abc"]}) == [-3.0]
    assert reward.__name__ == "short"


def test_a_dotted_path_is_a_module_and_a_function(file):
    (file.parent / "my_lib").mkdir()
    (file.parent / "my_lib" / "rewards.py").write_text("def one(completions):\n    return [1] * len(completions)\n")
    assert load_reward("my_lib.rewards.one")(**GIVEN) == [1.0] * 3


def test_a_file_finds_modules_beside_it_and_runs_once(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "beside_it.py").write_text("BONUS = 4\n")
    (folder / "other.py").write_text(
        "import beside_it\nCALLS = []\nCALLS.append(1)\n\n"
        "def bonus(completions):\n    return [beside_it.BONUS + len(CALLS)] * len(completions)\n\n"
        "def calls(completions):\n    return [len(CALLS)] * len(completions)\n"
    )
    bonus, calls = load_rewards([f"{folder}/other.py:bonus", f"{folder}/other.py:calls"])
    assert (bonus(**GIVEN), calls(**GIVEN)) == ([5.0] * 3, [1.0] * 3)


def test_a_function_gets_what_it_asks_for(file):
    names = ["right", "optional", "scored", "array", "tensors", "scaled"]
    right, optional, scored, array, tensors, scaled = load_rewards([f"my_rewards.py:{name}" for name in names])
    assert right(**GIVEN) == [1.0, 0.0, 1.0]
    assert optional(**GIVEN) == [1.0, 1.0, 1.0]
    assert scored(**GIVEN) == [2.0, 0.0, 2.0]
    assert array(**GIVEN) == [0.0, 1.0, 2.0]
    assert tensors(**GIVEN) == [2.0, 3.0, 1.0]
    assert scaled(**GIVEN) == [-1.0] * 3
    # A column of that name goes before the answer.
    assert right(**{**GIVEN, "ground_truth": ["0", "2", "0"]}) == [0.0, 1.0, 0.0]
    with pytest.raises(
        RunFailure, match=r"^the reward levels asks for level, which the data does not have; it has ans"
    ):
        load_reward("my_rewards.py:levels")(**GIVEN)


def test_names_of_metrics_are_those_of_functions(file):
    trl_utils = pytest.importorskip("trl.trainer.utils")
    rewards = load_rewards(
        ["exact_answer", "my_rewards.py:scored", "my_rewards.py:scaled", "my_rewards.py:later", "think_format_reward"]
    )
    names = [trl_utils.get_callable_name(reward) for reward in rewards]
    assert names == ["exact_answer", "Scored", "short", "later", "think_format_reward"]
    assert [trl_utils.is_async_callable(reward) for reward in rewards] == [False, False, False, True, False]


def test_functions_of_one_name_are_told_apart(file):
    (file.parent / "other.py").write_text("def short(completions):\n    return [1] * len(completions)\n")
    rewards = load_rewards(["my_rewards.py:short", "other:short", "exact_answer"])
    assert [reward.__name__ for reward in rewards] == ["my_rewards.short", "other.short", "exact_answer"]
    with pytest.raises(ValueError, match=r"my_rewards\.py:short is given twice"):
        load_rewards(["my_rewards.py:short", "my_rewards.py:short"])
    with pytest.raises(ValueError, match=r"two rewards are called my_rewards\.short"):
        load_rewards(["my_rewards.py:short", "my_rewards.py:scaled"])


def test_which_rewards_need_an_answer(file):
    def needs(*names: str) -> bool:
        return needs_answer(load_rewards([f"my_rewards.py:{name}" for name in names]))

    assert [needs(name) for name in ("right", "later", "scored", "short", "optional")] == [True] * 3 + [False] * 2
    assert needs("short", "right") and not needs("short", "levels")
    assert needs_answer([exact_answer]) and needs_answer([partial(exact_answer)])
    assert not needs_answer([max])


def test_a_function_that_is_async_stays_so(file):
    assert asyncio.run(load_reward("my_rewards.py:later")(**GIVEN)) == [1.0, 0.0, 1.0]
    with pytest.raises(RunFailure, match=r"^the reward later_bad failed: KeyError: 'judge' \(my_rewards\.py:67\)$"):
        asyncio.run(load_reward("my_rewards.py:later_bad")(**GIVEN))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divide", r"failed at train\[7\]: ZeroDivisionError: division by zero \(my_rewards\.py:26\)"),
        ("deep", r"failed at train\[7\]: ValueError: cannot reshape .* \(my_rewards\.py:34\)"),
        ("too_few", r"returned 2 rewards for 3 completions"),
        ("words", r"returned 'good' for train\[9\], expected a finite number or None"),
        ("infinite", r"returned inf for train\[9\], expected a finite number or None"),
        ("scalar", r"returned 1\.0, expected a list of 3 numbers, one a completion"),
    ],
)
def test_a_function_that_fails_ends_the_run_in_one_line(file, capsys, name, message):
    completions = {"divide": ["1", "0", "3"], "deep": ["x", "ax", "x"]}.get(name, ["1", "2", "3"])
    with pytest.raises(RunFailure, match=rf"^the reward {name} {message}$") as failure:
        load_reward(f"my_rewards.py:{name}")(**{**GIVEN, "completions": completions})
    said = capsys.readouterr().err
    if "failed" in message:  # the end of the traceback, and nothing of the trainer's
        assert said.startswith(f"the reward {name} failed:\n") and "my_rewards.py" in said and "calling.py" not in said
        assert isinstance(failure.value.__cause__, (ZeroDivisionError, ValueError))
    else:
        assert said == ""


def clears(completions, **_):
    completions.clear()
    return []


def leaves(completions, **_):
    sys.exit(3)


def beyond_floats(completions, **_):
    return [10**400] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (clears, "returned 0 rewards for 3 completions"),
        (leaves, r"failed at train\[0\]: SystemExit: 3 \(.*\)"),
        (beyond_floats, r"returned 10+\.\.\. for train\[0\], expected a finite number or None"),
    ],
)
def test_whatever_a_function_does_is_said_in_one_line(function, message):
    completions = ["1", "2", "3"]
    with pytest.raises(RunFailure, match=rf"^the reward f {message}$"):
        guarded(function, "f")(**{**GIVEN, "completions": completions})
    assert completions == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exat_answer", r"there is no reward 'exat_answer'; did you mean exact_answer\?"),
        ("accuracy", r"did you mean accuracy_reward\?"),
        ("something", r"expected one of exact_answer, accuracy_reward, .*, or file\.py:function"),
        ("my_rewards.py", r"'my_rewards\.py' names no function"),
        ("nowhere.py:f", r"there is no file nowhere\.py for the reward 'nowhere\.py:f'"),
        ("no_such_module:f", r"cannot import 'no_such_module' .*: No module named 'no_such_module'$"),
        ("no_such_module.f", r"cannot import 'no_such_module'"),
        ("my_rewards.py:shrt", r"my_rewards\.py has no function 'shrt' .*; did you mean short\?"),
        ("my_rewards:Scored", r"must be a function or an object that can be called, and is a class"),
        ("my_rewards:number", r"must be a function .*, and is int"),
        ("my_rewards.py:", r"there is no reward 'my_rewards\.py:'"),
        (":f", r"there is no reward ':f'"),
    ],
)
def test_a_wrong_name_is_told(file, name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_rewards([name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = undefined\n", r"NameError: name 'undefined' is not defined \(broken\.py:2\)"),
        ("def f(:\n", r"SyntaxError: .* \(broken\.py:1\)"),
        ("\nimport no_such_thing\n", r"No module named 'no_such_thing' \(broken\.py:2\)"),
        ("import sys\nsys.exit(3)\n", r"it exits with status 3 \(broken\.py:2\)"),
    ],
)
@pytest.mark.parametrize("form", ["broken.py:f", "broken:f"])
def test_a_file_that_does_not_run_is_said_with_its_own_error(file, source, message, form):
    (file.parent / "broken.py").write_text(source)
    with pytest.raises(ValueError, match=rf"cannot import '.*' for the reward '{form}': {message}$") as error:
        load_rewards([form])
    assert "\n" not in str(error.value)


def test_rewards_of_trl_are_known_by_its_names():
    pytest.importorskip("trl")
    form, punishment = load_rewards(["think_format_reward", "get_soft_overlong_punishment"], max_completion_length=100)
    messages = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b", "c")]
    assert form(**{**GIVEN, "completions": messages}) == [1.0, 0.0, 0.0]
    lengths = {"completion_ids": [[1] * 80, [1] * 90, [1] * 100]}
    assert punishment(**GIVEN, **lengths) == [0.0, -0.5, -1.0]
    assert punishment.__name__ == "soft_overlong_punishment_reward"
    (default,) = load_rewards(["get_soft_overlong_punishment"])
    assert default(**GIVEN, completion_ids=[[1] * 1024, [1] * 1152, [1] * 1280]) == [0.0, -0.5, -1.0]
    assert not needs_answer([form, punishment])


def test_accuracy_reward_takes_the_answer_or_says_what_it_needs():
    pytest.importorskip("trl")
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(ValueError, match="accuracy_reward needs math-verify: pip install math-verify"):
            load_rewards(["accuracy_reward"])
        return
    (reward,) = load_rewards(["accuracy_reward"])
    messages = [[{"role": "assistant", "content": rf"\boxed{{{text}}}"}] for text in "123"]
    assert needs_answer([reward]) and reward(**{**GIVEN, "completions": messages}) == [1.0, 0.0, 1.0]

"""What a run shows while it runs: the line, when it is written, and how it shares a terminal with others."""

from __future__ import annotations

import logging
import os
import pty
import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from rich.console import Console
from trainer.tiny_runs import make_trainer, rows
from transformers import PrinterCallback, ProgressCallback
from vgpo_trainer.runs.progress import (
    Progress,
    ProgressLine,
    evaluation_text,
    is_time_to_tell,
    progress_text,
    show_progress,
    write_duration,
    write_seconds,
)
from vgpo_trainer.runs.terminal import TerminalLine

torch.set_num_threads(1)

RECORD = {"reward": 0.53125, "accuracy": 0.5, "vgpo/visual_focus": 0.1234, "completions/mean_length": 311.6}
HALFWAY = Progress(step=500, total=1000, start=400, seconds=300.0, step_seconds=2.5, record=RECORD)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            120,
            "step 500/1000 50% · 25 min left · 2.50 s/step · reward 0.531 · accuracy 50.0% · focus 0.123 · 312 tokens",
        ),
        (
            100,
            "step 500/1000 50% · 25 min left · 2.50 s/step · reward 0.531 · accuracy 50.0% · focus 0.123",
        ),
        (79, "step 500/1000 50% · 25 min left · reward 0.531 · accuracy 50.0% · focus 0.123"),
        (70, "step 500/1000 50% · 25 min left · reward 0.531 · accuracy 50.0%"),
        (60, "step 500/1000 50% · 25 min left · reward 0.531"),
        (20, "step 500/1000 50%"),
        (6, "step 5"),
    ],
)
def test_a_narrow_line_keeps_what_tells_most(width, line):
    assert progress_text(HALFWAY, "focus", width) == line


def test_time_left_is_that_of_this_part_of_the_run():
    assert HALFWAY.seconds_left == 300 / 100 * 500
    assert Progress(step=400, total=1000, start=400, seconds=60).seconds_left is None
    assert "1:00 min" in progress_text(Progress(step=10, total=10, start=5, seconds=60), None)


def test_a_run_of_unknown_length_shows_steps_and_time():
    assert progress_text(Progress(step=7, total=0, seconds=21), None) == "step 7 · in 21 s"


@pytest.mark.parametrize(
    ("signal", "value", "words"),
    [
        ("focus", 0.25, "focus 0.250"),
        ("attention", 0.25, "attention 25.0%"),
        ("dependency", 0.25, "dependency 0.250"),
        ("nearest", 0.25, "nearest 0.250"),
    ],
)
def test_a_signal_is_called_by_its_name(signal, value, words):
    assert progress_text(Progress(1, 0, start=1, record={"vgpo/visual_focus": value}), signal) == f"step 1 · {words}"


def test_what_is_not_known_is_not_shown():
    record = {"reward": None, "accuracy": float("nan"), "vgpo/visual_focus": 0.5, "entropy": 1.0}
    assert progress_text(Progress(1, 0, start=1, record=record), None) == "step 1"


def test_an_evaluation_is_told_in_a_line_of_its_own():
    record = {f"eval_{name}": value for name, value in RECORD.items()} | {"eval_runtime": 64.2, "epoch": 1.0}
    expected = "evaluation after step 50 · reward 0.531 · accuracy 50.0% · focus 0.123 · 312 tokens"
    assert evaluation_text(record, 50, "focus") == f"{expected} · in 1:04 min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (599.4, "9:59 min"),
        (600, "10 min"),
        (3569, "59 min"),
        (3571, "1:00 h"),
        (3599.6, "1:00 h"),
        (7530, "2:06 h"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations(seconds, text):
    assert write_duration(seconds) == text


def test_seconds_of_a_step():
    assert [write_seconds(value) for value in (0.1234, 9.996, 99.96)] == ["0.12 s", "10.0 s", "100 s"]


def test_a_log_gets_a_line_now_and_then():
    first = Progress(1, 1000)
    assert is_time_to_tell(None, 0.0, first)
    assert not is_time_to_tell((0.0, first), 9.9, Progress(900, 1000))  # too soon, however far the run is
    assert is_time_to_tell((0.0, first), 10.1, Progress(101, 1000))
    assert not is_time_to_tell((0.0, first), 59.0, Progress(90, 1000))
    assert is_time_to_tell((0.0, first), 61.0, Progress(2, 1000))
    assert is_time_to_tell((0.0, first), 61.0, Progress(2, 0))
    assert is_time_to_tell((0.0, Progress(999, 1000)), 0.1, Progress(1000, 1000), last=True)
    assert not is_time_to_tell((0.0, Progress(1000, 1000)), 99.0, Progress(1000, 1000), last=True)


class Terminal:
    """A pseudo-terminal, and what stands on it."""

    def __init__(self) -> None:
        self._here, there = pty.openpty()
        self.stream = os.fdopen(there, "w")
        self.drawn = ""

    def hang_up(self) -> None:
        """Close the terminal under those who write to it."""
        self.lines()
        os.close(self._here)

    def lines(self) -> list[str]:
        """What is on the screen now."""
        self.stream.flush()
        os.set_blocking(self._here, False)
        try:
            while part := os.read(self._here, 65536):
                self.drawn += part.decode()
        except BlockingIOError:
            pass
        screen, column = [""], 0
        for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+", self.drawn):
            if part == "\r":
                column = 0
            elif part == "\n":
                screen.append("")
            elif part == "\x1b[K":
                screen[-1] = screen[-1][:column]
            else:
                screen[-1] = screen[-1][:column].ljust(column) + part + screen[-1][column + len(part) :]
                column += len(part)
        return screen


@pytest.fixture
def terminal():
    return Terminal()


def test_what_others_print_goes_above_the_line(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    handler = logging.StreamHandler()  # holds the stream itself, as those of libraries do
    logger = logging.getLogger("somebody")
    logger.addHandler(handler)
    line = TerminalLine(terminal.stream)
    line.open()
    line.show("a long line of progress")
    print("one", "two", file=sys.stderr)
    logger.warning("three")
    Console(file=sys.stderr, force_terminal=False).print("four")
    assert terminal.lines() == ["one two", "three", "four", "a long line of progress"]
    line.show("shorter")
    line.above("stays")
    assert terminal.lines() == ["one two", "three", "four", "stays", "shorter"]
    print("unfinished", end="", file=sys.stderr)
    assert terminal.lines()[-1] == "unfinished"
    line.show("later")
    assert terminal.lines()[-2:] == ["unfinished", "later"]
    line.close()
    line.close()
    print("after", file=sys.stderr)
    assert terminal.lines()[-3:] == ["later", "after", ""]
    assert sys.stderr is terminal.stream and handler.stream is terminal.stream
    logger.removeHandler(handler)


def noisy(completions, log_metric=None, **_):
    warnings.warn("a reward function warns", stacklevel=1)
    if log_metric is not None:
        log_metric("accuracy", 0.5)
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def run(folder):
    trainer = make_trainer(
        folder,
        reward=noisy,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        disable_tqdm=False,
        arguments={"eval_dataset": rows([1] * 2)},
    )
    with pytest.warns(UserWarning), show_progress(trainer):
        trainer.train()
    return trainer


def test_a_run_on_a_terminal(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    trainer = run(tmp_path)
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert ProgressLine in kinds and not kinds & {ProgressCallback, PrinterCallback}
    lines = terminal.lines()
    assert [line for line in lines if line.startswith("evaluation after step")] == lines[-4:-2]
    assert lines[-2].startswith("step 2/2 100% · in ") and lines[-1] == ""
    assert len(lines[-2]) < 90 and "accuracy 50.0%" in lines[-2]
    assert "evaluating, batch 1/2" in terminal.drawn and "step 1/2 50%" in terminal.drawn
    assert "{" not in terminal.drawn


def test_a_run_into_a_log_file(tmp_path, capsys):
    run(tmp_path)
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith(("step", "evaluation"))]
    assert re.match(r"step 1/2 50% · \d s left · [\d.]+ s/step · reward [\d.]+ · accuracy 50.0% · focus ", lines[0])
    assert [line[:23] for line in lines[1:3]] == ["evaluation after step 1", "evaluation after step 2"]
    assert lines[3].startswith("step 2/2 100% · in ")
    assert "\r" not in text and "\x1b" not in text


def test_a_terminal_that_is_closed_does_not_end_a_run(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    line = ProgressLine("focus")
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=3)
    line.on_train_begin(SimpleNamespace(disable_tqdm=False), state, None)
    assert sys.stderr is not terminal.stream
    terminal.hang_up()
    line.on_step_end(None, state, None)
    assert sys.stderr is terminal.stream
    line.on_log(None, state, None, logs={"loss": 0.1})
    line.on_log(None, state, None, logs={"eval_loss": 0.1})
    line.on_train_end(None, state, None)


@pytest.mark.parametrize(("main", "off"), [(False, False), (True, True)], ids=["another process", "turned off"])
def test_who_shows_nothing(capsys, main, off):
    line = ProgressLine("focus")
    state = SimpleNamespace(is_world_process_zero=main, global_step=0, max_steps=3)
    line.on_train_begin(SimpleNamespace(disable_tqdm=off), state, None)
    line.on_step_end(None, state, None)
    line.on_log(None, state, None, logs={"loss": 0.1})
    line.on_log(None, state, None, logs={"eval_loss": 0.1})
    line.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")

"""The progress of a run on a terminal, as one line that is rewritten in place, and in a log file as plain lines.

It takes the place of transformers' progress bar and printed dictionaries::

    with show_progress(trainer):
        trainer.train()

A line: steps, share, time left, seconds a step, and the latest record's reward, accuracy, visual signal and length of
completions, as many of them as fit. An evaluation leaves a line of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from vgpo_trainer.runs.metrics import is_number
from vgpo_trainer.runs.terminal import TerminalLine, without_bars
from vgpo_trainer.signals.words import words_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from vgpo_trainer.config import VGPOTrainingConfig

SEPARATOR = " · "
LEFT_OUT_FIRST = ("length", "pace", "signal", "accuracy", "time", "reward")  # where a line is too narrow for all
PLAIN_SECONDS = 10.0  # between two plain lines at least
PLAIN_PATIENCE = 60.0  # after which a plain line comes although less than a tenth of the run is done
PLAIN_SHARE = 0.1  # of the run, after which a plain line comes


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: Steps done, those of earlier parts of a resumed run included.
        total: Steps in all; 0 where that is not known.
        start: Steps that were done before this part began.
        seconds: Since this part began.
        step_seconds: Of the latest step, without evaluations and checkpoints; None before the first.
        record: The latest record of a step.
    """

    step: int
    total: int
    start: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the steps that are done, 0 where the number of all is not known."""
        return min(self.step / self.total, 1.0) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the pace of this part, what it spent on evaluations included; None if not known."""
        done = self.step - self.start
        if done <= 0 or self.total < self.step:
            return None
        return self.seconds / done * (self.total - self.step)


def progress_text(progress: Progress, signal: str | None, width: int | None = None) -> str:
    """Return the line of a run's progress.

    Args:
        progress: Where the run is.
        signal: Name of the visual signal; None leaves it out.
        width: Characters that it may take; parts are left out until it fits, and what remains is cut if it has to be.
    """
    step = f"step {progress.step}"
    parts = {"step": f"{step}/{progress.total} {100 * progress.share:.0f}%" if progress.total else step}
    left = progress.seconds_left
    if left is not None and progress.step < progress.total:
        parts["time"] = f"{write_duration(left)} left"
    elif progress.step > progress.start:
        parts["time"] = f"in {write_duration(progress.seconds)}"
    if progress.step_seconds is not None:
        parts["pace"] = f"{write_seconds(progress.step_seconds)}/step"
    return fit(parts | _measurements(progress.record, signal), width)


def evaluation_text(record: Mapping[str, Any], step: int, signal: str | None) -> str:
    """Return the line of an evaluation, whose keys begin with ``eval_``."""
    plain = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
    parts = {"step": f"evaluation after step {step}", **_measurements(plain, signal)}
    if is_number(plain.get("runtime")):
        parts["time"] = f"in {write_duration(plain['runtime'])}"
    return fit(parts)


def fit(parts: Mapping[str, str], width: int | None = None) -> str:
    """Join parts of a line; those that tell least are left out until it fits, and the rest is cut if it has to be."""
    kept = dict(parts)
    for name in LEFT_OUT_FIRST:
        if width is None or len(SEPARATOR.join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return SEPARATOR.join(kept.values())[:width]


def write_duration(seconds: float) -> str:
    """Write a time: ``42 s``, ``3:07 min``, ``25 min``, ``2:05 h``, ``3 d 4 h``."""
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{hours // 24} d {hours % 24} h"


def write_seconds(seconds: float) -> str:
    """Write a short time with three digits."""
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"


def _measurements(record: Mapping[str, Any], signal: str | None) -> dict[str, str]:
    """What a record says; what it lacks is left out."""
    parts = {}
    if is_number(record.get("reward")):
        parts["reward"] = f"reward {_short(record['reward'])}"
    if is_number(record.get("accuracy")):
        parts["accuracy"] = f"accuracy {100 * record['accuracy']:.1f}%"
    if signal is not None and is_number(record.get("vgpo/visual_focus")):
        words, value = words_of(signal), record["vgpo/visual_focus"]
        parts["signal"] = f"{words.word} {100 * value:.1f}%" if words.percent else f"{words.word} {_short(value)}"
    if is_number(record.get("completions/mean_length")):
        parts["length"] = f"{record['completions/mean_length']:.0f} tokens"
    return parts


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


class ProgressLine(TrainerCallback):
    """Shows where a run is, on the main process: one line on a terminal, plain lines now and then elsewhere.

    ``disable_tqdm=True`` of the training arguments turns it off. A context manager: the line ends with the ``with``
    block, whichever way that is left.

    Args:
        signal: Name of the visual signal, None for a run without one.
        console: Where to write; default: standard error.
    """

    def __init__(self, signal: str | None, console: Console | None = None) -> None:
        self.signal = signal
        self.console = console or Console(stderr=True)
        self._line: TerminalLine | None = None
        self._on = False
        self._begin = self._step_begin = 0.0
        self._start = 0
        self._total = 0
        self._step_seconds: float | None = None
        self._record: dict[str, Any] = {}
        self._told: tuple[float, Progress] | None = None  # the last plain line and its time
        self._evaluated = 0  # batches of an evaluation so far

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the line and leave it as it is; harmless when it has ended."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of this part of the run."""
        self._on = state.is_world_process_zero and not args.disable_tqdm
        self._begin = self._step_begin = time.monotonic()
        self._start, self._total = state.global_step, max(state.max_steps, 0)
        self._told, self._record, self._step_seconds = None, {}, None
        if self._on and self.console.file.isatty() and not self.console.is_dumb_terminal:
            self._line = TerminalLine(self.console.file)
            self._line.open()
            self._show(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_begin = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count a step."""
        self._step_seconds = time.monotonic() - self._step_begin
        self._show(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the record of a step or an evaluation; TRL's summary at the end of training is neither."""
        if not self._on or not logs:
            return
        if "loss" in logs:
            self._record = dict(logs)
            self._show(state)
            self._tell(state)
        elif any(name.startswith("eval_") for name in logs):
            self._evaluated = 0
            self._write(evaluation_text(logs, state.global_step, self.signal), stays=True)
            self._show(state)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Count a batch of an evaluation."""
        self._evaluated += 1
        if self._line is not None:
            try:
                batches = f"{self._evaluated}/{len(eval_dataloader)}"
            except TypeError:  # a stream has no length
                batches = str(self._evaluated)
            self._write(f"step {state.global_step}{SEPARATOR}evaluating, batch {batches}"[: self._width()])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last state of the line, or a last plain line."""
        if self._on:
            self._show(state)
            self._tell(state, last=True)
            self.close()

    def _progress(self, state: TrainerState) -> Progress:
        seconds = time.monotonic() - self._begin
        return Progress(state.global_step, self._total, self._start, seconds, self._step_seconds, self._record)

    def _width(self) -> int:
        return max(self.console.width - 1, 1)  # the last column makes some terminals begin another line

    def _show(self, state: TrainerState) -> None:
        """Bring the line of a terminal up to date."""
        if self._line is not None:
            self._write(progress_text(self._progress(state), self.signal, self._width()))

    def _tell(self, state: TrainerState, last: bool = False) -> None:
        """Write a plain line where it is time for one: after the first step, the last one, and now and then."""
        if self._line is not None:
            return
        progress, now = self._progress(state), time.monotonic()
        if is_time_to_tell(self._told, now, progress, last=last):
            self._told = now, progress
            self._write(progress_text(progress, self.signal), stays=True)

    def _write(self, text: str, stays: bool = False) -> None:
        """Write a line; where the terminal or the pipe is gone, the run goes on without."""
        try:
            if self._line is None:
                print(text, file=self.console.file, flush=True)
            elif stays:
                self._line.above(text)
            else:
                self._line.show(text)
        except OSError:
            self._on = False
            with suppress(OSError):
                self.close()


def is_time_to_tell(told: tuple[float, Progress] | None, now: float, progress: Progress, *, last: bool = False) -> bool:
    """Whether a log file gets a line now.

    Args:
        told: When the line before was written, and what it said; None if there was none.
        now: On the same clock.
        progress: Where the run is.
        last: Whether training has ended.
    """
    if told is None:
        return True
    when, before = told
    if last:
        return progress.step > before.step
    seconds = now - when
    tenth = progress.share - before.share >= PLAIN_SHARE
    return seconds >= PLAIN_SECONDS and (tenth or seconds >= PLAIN_PATIENCE)


@contextmanager
def show_progress(trainer: Trainer) -> Iterator[ProgressLine]:
    """Show a VGPOTrainer's progress in the block by a :class:`ProgressLine`, in place of what transformers shows.

    That is its bar, its printed records, and the bars of the weights that it writes.
    """
    args: VGPOTrainingConfig = trainer.args
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    with without_bars(), ProgressLine(args.signal if args.reads_signal() else None) as line:
        trainer.add_callback(line)
        yield line

"""``metrics.jsonl``: written while a run trains, and read afterwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vgpo_trainer.runs.json import finite
from vgpo_trainer.runs.writing import write_atomically, writing


class MetricsFile(TrainerCallback):
    """Appends TRL's log record of every optimisation step to a file, one JSON object a line.

    A record is what TRL logs, with ``step`` and ``seconds`` (of training, earlier parts of a resumed run included).
    Numbers that are not finite become ``null``. A run that starts anew starts the file anew; a resumed run drops the
    records after the step it resumes from and goes on.

    A number of nothing is ``None`` in TRL's records. It is ``null`` in the file, and taken out of the record for the
    callbacks that follow: trackers plot numbers, and TensorBoard's warns of each that is none.

    Args:
        path: The file; its folder is made.

    Raises:
        RunFailure: It cannot be written.

    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._written = False
        self._start = time.perf_counter()
        self._earlier_seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the records after the step that a run resumes from."""
        self._start = time.perf_counter()
        if not state.is_world_process_zero or state.global_step == 0 or not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= state.global_step]
        self._earlier_seconds = max((record["seconds"] for record in kept), default=0.0)
        write_atomically(self.path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._written = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append a record of a step or an evaluation; TRL's summary at the end of training is neither."""
        if not logs:
            return
        if state.is_world_process_zero:
            self._append(state.global_step, logs)
        for name in [name for name, value in logs.items() if value is None]:
            del logs[name]

    def _append(self, step: int, logs: dict[str, Any]) -> None:
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return
        seconds = round(self._earlier_seconds + time.perf_counter() - self._start, 3)
        record = {"step": step, "seconds": seconds}
        record.update(finite(logs))
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self._written else "w") as file:
                file.write(f"{json.dumps(record)}\n")
        self._written = True


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file that :class:`MetricsFile` wrote; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


MEAN_STEPS = 10  # at the beginning and at the end of a run, that a number is a mean of


class FirstAndLast(NamedTuple):
    """A number at the beginning and at the end of a run, each a mean over so many records of a step."""

    first: float
    last: float
    steps: int


def first_and_last(records: Sequence[dict[str, Any]], key: str) -> FirstAndLast | None:
    """Return what a number of the steps began and ended with; None with fewer than two."""
    values = [record[key] for record in records if is_number(record.get(key))]
    few = min(MEAN_STEPS, len(values) // 2)
    return FirstAndLast(fmean(values[:few]), fmean(values[-few:]), few) if few else None


def evaluations(records: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return steps and values of a number in the records of evaluations, ``key`` without ``eval_``."""
    name = f"eval_{key}"
    return [(record["step"], record[name]) for record in records if is_number(record.get(name))]


def seconds_of(records: Sequence[dict[str, Any]]) -> float:
    """Return how long a run took, as far as its records tell."""
    return max((float(record["seconds"]) for record in records), default=0.0)


def write_time(seconds: float) -> str:
    """Write how long a run took: ``1.5 min``, ``2.1 h``."""
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)

"""``metrics.jsonl``: written while a run trains, and read afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vgpo_trainer.runs.json import finite
from vgpo_trainer.runs.writing import write_atomically, writing


class MetricsFile(TrainerCallback):
    """Appends TRL's log record of every optimisation step to a file, one JSON object a line.

    A record is what TRL logs, with ``step`` and ``seconds`` (of training, earlier parts of a resumed run included).
    Numbers that are not finite become ``null``. A run that starts anew starts the file anew; a resumed run drops the
    records after the step it resumes from and goes on.

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
        if not state.is_world_process_zero or not logs:
            return
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return
        seconds = round(self._earlier_seconds + time.perf_counter() - self._start, 3)
        record = {"step": state.global_step, "seconds": seconds}
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

"""What the demo does between the trainer's steps: measure, keep rollouts, show progress, mind the time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vgpo_trainer.demo.digits import Problem
from vgpo_trainer.demo.evaluation import Evaluation, evaluate
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.rollouts import stored_rollouts

if TYPE_CHECKING:
    from vgpo_trainer.demo.warm_start import WarmStartProgress
    from vgpo_trainer.trainer import VGPOTrainer

KEPT_GROUPS = 8  # problems of a step whose responses go to rollouts.jsonl


class Listener(Protocol):
    """What a run tells of itself as it happens."""

    def stage(self, name: str) -> None:
        """Something else starts now."""

    def imitated(self, progress: WarmStartProgress) -> None:
        """A step of the warm start is done."""

    def stepped(self, step: int, record: Mapping[str, Any]) -> None:
        """A step of reinforcement is done and left this record."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Held-out accuracy was measured."""


class DemoCallback(TrainerCallback):  # type: ignore[misc]
    """Measures held-out accuracy every few steps and at the end, as records of ``metrics.jsonl``.

    Args:
        trainer: The trainer it is added to.
        folder: Where rollouts go.
        problems: The held-out problems.
        before: Their evaluation before training.
        every: Steps between two measurements.
        deadline: On :func:`time.monotonic`; training stops when the next step would pass it.
        display: What is told as it happens.
    """

    def __init__(
        self,
        trainer: VGPOTrainer,
        folder: RunFolder,
        problems: Sequence[Problem],
        before: Evaluation,
        every: int,
        deadline: float,
        display: Listener,
    ) -> None:
        self.trainer = trainer
        self.folder = folder
        self.problems = problems
        self.latest = before
        self.every = every
        self.deadline = deadline
        self.display = display
        self._step_start = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record the accuracy before training as that of step 0."""
        self._log_evaluation()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of a step."""
        self._step_start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where the time is up; measure and keep rollouts where it is their turn."""
        now = time.monotonic()
        last = state.global_step == state.max_steps
        if not last and now + (now - self._step_start) > self.deadline:
            control.should_training_stop = last = True
        measures = last or state.global_step % self.every == 0
        if measures or state.global_step == 1:
            self.folder.append_rollouts(stored_rollouts(self.trainer.rollout_samples, self.folder, KEPT_GROUPS))
        if measures:
            self.latest = evaluate(self.trainer.model, self.trainer.processing_class, self.problems)
            # Any record ends the turn to log; the step's own is still to come.
            should_log = control.should_log
            self._log_evaluation()
            control.should_log = should_log
            self.display.evaluated(state.global_step, self.latest)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the record of a step."""
        if logs and "reward" in logs:
            self.display.stepped(state.global_step, logs)

    def _log_evaluation(self) -> None:
        low, high = self.latest.interval
        record = {"eval_accuracy": self.latest.accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}
        # TRL tells an evaluation's record from a step's by the mode of the model.
        training = self.trainer.model.training
        self.trainer.model.eval()
        self.trainer.log(record)
        self.trainer.model.train(training)

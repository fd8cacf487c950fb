"""Which run a folder holds, where it goes on, and whether there is anything left to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vgpo_trainer.runs.checkpoints import STATE, CheckpointError, check_checkpoint, checkpoints
from vgpo_trainer.runs.folder import RunFolder, RunFolderError

NEARLY = 1e-6  # of an epoch, which is counted in floating point


class ResumeError(ValueError):
    """A folder that this run cannot use; the message says what to change."""


def earlier_run(folder: RunFolder, model: str) -> dict[str, Any] | None:
    """Return what ``config.json`` says of the run in a folder; ``None`` for a folder that is new or empty.

    Args:
        folder: Of the run that is asked for.
        model: What it starts from.

    Raises:
        ResumeError: The folder is the model's, or holds what is no run of ``vgpo train``.
        OSError: It cannot be read.
    """
    out = folder.path
    if Path(model).is_dir() and out.exists() and out.samefile(model):
        raise ResumeError(f"--out and --model are the same folder, {out}: the run would write over the model")
    if out.exists() and not out.is_dir():
        raise ResumeError(f"--out {out} is a file")
    held = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")) if out.exists() else []
    if not held:
        return None
    try:
        config = folder.read_config()
    except RunFolderError:
        config = {}
    if not isinstance(config.get("run"), dict):
        raise ResumeError(f"--out {out} holds {held[0]} and no run of vgpo train; choose a folder that is new or empty")
    return config


def refuse_another_run(folder: RunFolder, earlier: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ResumeError if a folder's run was asked for with another model, dataset or method.

    Args:
        folder: Of the run.
        earlier: What its ``config.json`` says.
        identity: Options that make the run the run it is, by their names; anything else may change.
    """
    for option, value in identity.items():
        before = earlier["run"].get(option, value)
        if before != value:
            raise ResumeError(
                f"{folder.path} holds a run with --{option} {_shown(before)}, not {_shown(value)}; choose another --out"
            )


def checkpoint_to_resume(folder: RunFolder, resume: bool | None) -> Path | None:
    """Return where a run starts: at a checkpoint, or (``None``) at the beginning.

    Raises:
        ResumeError: ``--resume`` without a checkpoint, ``--no-resume`` where there are some, or a damaged one.
    """
    complete = checkpoints(folder.path)
    last = complete[-1] if complete else None
    if resume and last is None:
        raise ResumeError(f"--resume: {folder.path} has no checkpoint")
    if resume is False and last is not None:
        raise ResumeError(f"--no-resume: {folder.path} already has {last.name}; choose another --out")
    if last is not None:
        try:
            check_checkpoint(last)
        except CheckpointError as error:
            start = f"from {complete[-2].name}" if len(complete) > 1 else "from the beginning"
            raise ResumeError(f"{error}; delete {last} to go on {start}") from error
    return last


def is_complete(progress: Mapping[str, Any], args: TrainingArguments) -> bool:
    """Whether a run that has come so far has nothing left to do.

    Args:
        progress: ``global_step``, ``epoch`` and, of a checkpoint, ``max_steps`` and ``num_train_epochs``.
        args: What is asked for now.
    """
    if args.max_steps > 0:
        return bool(progress["global_step"] >= args.max_steps)
    return bool((progress["epoch"] or 0.0) >= args.num_train_epochs - NEARLY)


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """How far a run had come at a checkpoint: the trainer's state."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())
    return state


class AllDone(Exception):
    """Nothing is left to train."""


class StopBeforeTraining(TrainerCallback):
    """Ends training where it would begin, when the weights of a checkpoint are loaded.

    The loop of transformers makes a step before it looks whether any are left.

    Raises:
        AllDone: Always.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise."""
        raise AllDone


class ScheduleOfNow(TrainerCallback):
    """Sets the learning rate of a resumed run to its schedule over the steps that are asked for now.

    A checkpoint has the rate of the schedule that it was saved with, which a run of another length would make its
    first step with.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Set it, for schedules that are functions of the step."""
        rules = getattr(lr_scheduler, "lr_lambdas", None)
        if not state.global_step or not rules:
            return
        rates = [base * rule(lr_scheduler.last_epoch) for base, rule in zip(lr_scheduler.base_lrs, rules, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler._last_lr = rates


def _shown(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)

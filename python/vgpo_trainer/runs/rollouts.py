"""``rollouts.jsonl``: which responses of a run are kept to be looked at, and when they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vgpo_trainer.rollouts import RolloutSample, prompt_id
from vgpo_trainer.runs.folder import RunFolder, RunFolderError, StoredRollout
from vgpo_trainer.runs.writing import RunFailure

KEPT_GROUPS = 4  # problems of a step whose responses are kept
MOST_STEPS = 40  # of a run from which responses are kept
LONGEST_SIDE = 512  # pixels of a kept image


class Recorder(Protocol):
    """What :class:`RolloutFile` asks of a trainer; :class:`~vgpo_trainer.trainer.VGPOTrainer` has it."""

    @property
    def rollout_samples(self) -> list[RolloutSample]:
        """The latest responses, oldest first."""


class RolloutFile(TrainerCallback):
    """Stores sampled responses of the first step, of about every ``save_steps`` and of the last, with their images.

    From each of at most ``MOST_STEPS`` steps it keeps up to ``KEPT_GROUPS`` problems with all their responses that the
    trainer has kept (``rollout_samples`` of its arguments). A run that starts anew starts the file anew; a resumed run
    drops what belongs to steps after the one that it resumes from.

    Args:
        trainer: The trainer that it is added to.
        folder: Of the run.

    Raises:
        RunFailure: A file cannot be written, or what is resumed is not a file of rollouts.
    """

    def __init__(self, trainer: Recorder, folder: RunFolder) -> None:
        self.trainer = trainer
        self.folder = folder
        self._every = 1
        self._due = True
        self._stored = -1  # the step whose responses were stored last

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the rollouts after the step that a run resumes from."""
        every = state.save_steps if args.save_strategy == "steps" and state.save_steps >= 1 else 1
        self._every = max(int(every), math.ceil(state.max_steps / MOST_STEPS))
        self._due, self._stored = state.global_step == 0, -1
        if state.is_world_process_zero:
            try:
                self.folder.keep_rollouts(before=state.global_step)
            except RunFolderError as error:
                raise RunFailure(str(error)) from error

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Store responses where it is their turn, or was and there were none."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        self._due |= last or state.global_step % self._every == 0
        if self._due:
            self._store(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Store the last responses of a run that ended early."""
        self._store(state)

    def _store(self, state: TrainerState) -> None:
        # An evaluation's responses may have taken the place of those that were trained on.
        samples = [sample for sample in self.trainer.rollout_samples if sample.mode == "train"]
        if not state.is_world_process_zero or not samples or samples[-1].step == self._stored:
            return
        latest = [sample for sample in samples if sample.step == samples[-1].step]
        self.folder.append_rollouts(stored_rollouts(latest, self.folder, KEPT_GROUPS, LONGEST_SIDE))
        self._stored, self._due = latest[-1].step, False


def stored_rollouts(
    samples: Sequence[RolloutSample], folder: RunFolder, groups: int, longest_side: int | None = None
) -> list[StoredRollout]:
    """Return the responses to some problems of a step, group by group and ready to be stored; their images are.

    Factors are stored as VGPO makes them even where the run does not apply them, so that a run without VGPO can be
    looked at beside one with it.

    Args:
        samples: Of one step.
        folder: Where images go.
        groups: How many problems; those that most responses are known of, the first of them first.
        longest_side: Pixels of an image; larger ones are scaled down.
    """
    found: dict[int, list[RolloutSample]] = {}
    for sample in samples:
        found.setdefault(prompt_id({"prompt": sample.prompt, "images": sample.images}), []).append(sample)
    stored = []
    for group in sorted(found.values(), key=len, reverse=True)[:groups]:
        shown = [image for image in group[0].images if isinstance(image, Image.Image)]
        names = [folder.store_image(scaled(image, longest_side)) for image in shown]
        stored += [_stored(sample, names) for sample in group]
    return stored


def scaled(image: Image.Image, longest_side: int | None) -> Image.Image:
    """Return an image whose sides are at most that long; the image itself where they are."""
    if longest_side is None or max(image.size) <= longest_side:
        return image
    small = image.convert("RGB")
    small.thumbnail((longest_side, longest_side))
    return small


def _stored(sample: RolloutSample, images: list[str]) -> StoredRollout:
    applied = any(factor != 1.0 for factor in sample.factors)
    return StoredRollout(
        step=sample.step,
        prompt=sample.prompt,
        image=images[0] if images else None,
        more_images=images[1:],
        answer=sample.answer,
        tokens=sample.tokens,
        cos=[value if scored else math.nan for value, scored in zip(sample.cos, sample.scored, strict=True)],
        psi=sample.psi,
        factors=sample.factors if applied else [(1 + psi) * (1 + sample.phi) for psi in sample.psi],
        phi=sample.phi,
        reward=sample.reward,
        advantage=sample.advantage,
        late_early_ratio=sample.late_early_ratio,
        correct=sample.correct,
    )

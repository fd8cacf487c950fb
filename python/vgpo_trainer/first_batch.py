"""A look at the first generation batch and the first pass of a loss, for mistakes that would pass silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from vgpo_kernels.integrations.surface import look_at_first_batch
from vgpo_kernels.integrations.transformers import capture_hidden_states
from vgpo_trainer.generation_batch import RowFacts
from vgpo_trainer.signals.reader import image_positions
from vgpo_trainer.trl_surface import Sequences

WHERE = "the first batch"


class FirstBatch:
    """Warns of what :func:`vgpo_kernels.check_batch` finds in the first batch of a run, on the process that has it.

    Args:
        trainer: TRL's trainer.
        visual_tokens: Ids of image and video tokens.
        norm: The final norm or its name, for a model in which it is not found.
    """

    def __init__(
        self, trainer: GRPOTrainer, visual_tokens: tuple[int, ...], norm: str | nn.Module | None = None
    ) -> None:
        self._trainer = trainer
        self._visual_tokens = visual_tokens
        self._norm = norm
        self._states: list[Tensor] | None = None  # of a pass that is being watched
        self._generated = self._passed = False

    def generated(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], groups: Tensor) -> None:
        """Look at prompts, images, groups and advantages of a generation batch, once."""
        if self._generated or not self._trainer.model.training:
            return
        self._generated = True
        sequence = Sequences.of(batch)
        shown = any(fact.has_image or fact.has_video for fact in map(RowFacts.of, rows))
        look_at_first_batch(
            WHERE,
            ids=sequence.input_ids,
            advantages=batch["advantages"],
            visual_mask=image_positions(*sequence, self._visual_tokens) if shown else None,
            response_mask=sequence.response_mask,
            group_ids=groups,
            prompt_mask=torch.cat([batch["prompt_mask"], torch.zeros_like(batch["completion_mask"])], dim=1),
        )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep the hidden states of the first loss's pass in the block."""
        if self._passed or not self._trainer.model.training:
            yield
            return
        self._passed, self._states = True, []
        with capture_hidden_states(model, self._states.append, norm=self._norm):
            yield

    def passed(self, inputs: Mapping[str, Any], logp: Tensor) -> None:
        """Look at the log-probabilities of the pass that was watched, if one was."""
        if self._states is None:
            return
        states, self._states = self._states, None
        sequence = Sequences.of(inputs)
        if not bool(sequence.response_mask.any()):  # a micro-batch of responses that are masked out: the next will do
            self._passed = False
            return
        # The passes of two views are not told apart here.
        whole = sum(len(one) for one in states) == len(sequence.input_ids)
        look_at_first_batch(
            WHERE,
            model_or_head=self._trainer.model,
            hidden=torch.cat(states) if whole else None,
            ids=sequence.input_ids,
            logp=logp,
            old_logp=inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps")),
            response_mask=sequence.response_mask,
            temperature=self._trainer.temperature,
        )

"""Reading the visual signal in forward passes of the policy: the trainer's own, and those that TRL makes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vgpo_kernels.integrations.transformers import visual_mask, visual_token_ids
from vgpo_trainer.sharded import rows_of
from vgpo_trainer.signals import SignalBatch, SignalSettings, VisualSignal


class PolicyPasses:
    """Signals that were read in TRL's own passes of the policy over a generation batch.

    That for old log-probabilities is one. What a pass returned tells which one it was.
    """

    def __init__(self) -> None:
        self._read: list[tuple[Tensor, VisualSignal]] = []

    @property
    def any(self) -> bool:
        """Whether a signal was read."""
        return bool(self._read)

    def add(self, logp: Tensor, signal: VisualSignal) -> None:
        """Keep the signal of the pass that returned these log-probabilities."""
        self._read.append((logp, signal))

    def that_returned(self, logp: Tensor) -> VisualSignal:
        """Return the signal of the pass that returned these log-probabilities, the very tensor.

        Raises:
            RuntimeError: No pass did.
        """
        for returned, signal in self._read:
            if returned is logp:
                return signal
        raise RuntimeError("old log-probabilities did not come from a pass of the policy whose signal was read")


class SignalReader:
    """Reads the visual signal of responses in forward passes of the policy.

    There are three such passes. That of the loss and the trainer's own over a generation batch are read by
    :meth:`read`. TRL's pass for old log-probabilities happens inside TRL: within :meth:`following` the trainer reads
    every pass that TRL makes of the policy and keeps the signals in :attr:`passes`.

    Args:
        kind: The signal.
        settings: What it is told.
        visual_tokens: Ids of image and video tokens.
    """

    def __init__(self, kind: type[VisualSignal], settings: SignalSettings, visual_tokens: tuple[int, ...]) -> None:
        self.passes: PolicyPasses | None = None  # set while TRL's passes are read
        self._kind = kind
        self._settings = settings
        self._visual_tokens = visual_tokens

    @contextmanager
    def read(
        self,
        model: nn.Module,
        input_ids: Tensor,  # [B, S]
        attention_mask: Tensor,  # [B, S]
        response_mask: Tensor,  # [B, T], the last T positions
    ) -> Iterator[VisualSignal]:
        """Read the signal of some sequences from the model's passes over them in the block."""
        images = image_positions(input_ids, attention_mask, response_mask, self._visual_tokens)
        signal = self._kind(SignalBatch(images, response_mask, attention_mask), self._settings)
        with signal.capture(model):
            yield signal

    @contextmanager
    def following(self) -> Iterator[PolicyPasses]:
        """Set :attr:`passes` in the block, to keep the signals of TRL's passes."""
        self.passes = PolicyPasses()
        try:
            yield self.passes
        finally:
            self.passes = None


def find_visual_tokens(told: Any, model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """Return ids of visual tokens: those that a caller gives, else those of the model.

    Raises:
        TypeError: Those given are no sequence of integers.
        ValueError: One is no token of the model; or none is given, and neither the model nor its processor has any.

    """
    given = visual_tokens_told(told, model)
    try:
        return given or visual_token_ids(model, processor)
    except ValueError as error:
        raise ValueError(f"{error} (visual_tokens=(id, ...)); vgpo=None trains without the visual signal") from error


def visual_tokens_told(ids: Any, model: PreTrainedModel) -> tuple[int, ...]:
    """Return ids of visual tokens that a caller gives for a model; none, where there are none.

    Raises:
        TypeError: They are no sequence of integers.
        ValueError: One is no token of the model.

    """
    if ids is None:
        return ()
    try:
        found = tuple(operator.index(token) for token in ids)
    except TypeError:
        found = ()
    if not found or any(isinstance(token, bool) for token in ids):
        raise TypeError(f"visual_tokens must be ids, which are integers, got {ids!r}")
    number = rows_of(model.get_input_embeddings().weight)
    if not all(0 <= token < number for token in found):
        raise ValueError(f"visual_tokens must lie in [0, {number}), the tokens of the model, got {ids!r}")
    return found


def image_positions(
    input_ids: Tensor,  # [B, S]
    attention_mask: Tensor,  # [B, S]
    response_mask: Tensor,  # [B, T], the last T positions
    visual_tokens: tuple[int, ...],
) -> Tensor:
    """Return True at image and video tokens the model was shown, ``[B, S]``."""
    return visual_mask(input_ids, visual_tokens, response_mask) & attention_mask.bool()

"""What signals of hidden states have in common."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers import capture_hidden_states, final_norm
from vgpo_trainer.signals import SignalBatch, SignalSettings, VisualSignal


class HiddenStateSignal(VisualSignal):
    """Reduces the hidden states of successive slices of a batch, so that no slice's states are kept."""

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        super().__init__(batch, settings)
        self._slices: list[Tensor] = []

    @abstractmethod
    def reduce(self, hidden: Tensor, image_mask: Tensor, response_mask: Tensor) -> Tensor:
        """Return the signal of some rows, ``[b, T]`` fp32; that of a token is made of the image tokens before it.

        Args:
            hidden: Their hidden states after the final norm, detached, ``[b, S, D]``.
            image_mask: ``[b, S]``.
            response_mask: ``[b, T]``, the last T positions.
        """

    @classmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Raise TypeError or ValueError for a model whose final norm is not found."""
        final_norm(model, settings.norm)

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Take the hidden states of every forward pass in the block."""
        return capture_hidden_states(model, self._take, norm=self.settings.norm)

    def _take(self, hidden: Tensor) -> None:
        """Take the hidden states ``[b, S, D]`` of the next b rows."""
        if self.paused:
            return
        rows = self.next_rows(hidden.shape[0])
        image_mask = self.batch.image_mask[rows].to(hidden.device)
        response_mask = self.batch.response_mask[rows].to(hidden.device)
        if image_mask.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"the final norm gave hidden states {list(hidden.shape)} where input_ids has {list(image_mask.shape)}: "
                "VGPO needs one hidden state for each position of the sequence"
            )
        self._slices.append(self.reduce(hidden, image_mask, response_mask))

    @property
    def values(self) -> Tensor:
        """The signal of all rows, ``[B, T]``.

        Raises:
            RuntimeError: The forward pass did not reach the final norm for every row.
        """
        self.check_read(
            "hidden states of {read} of {rows} responses reached the hook on the final norm; a compiled or replaced "
            "forward pass skips hooks"
        )
        return torch.cat(self._slices).to(self.batch.response_mask.device)

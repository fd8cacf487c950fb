"""The attention share of the image as visual signal, ``signal="attention"``, in place of the visual focus score.

The share a of a response token is that of its query, averaged over heads and layers. It takes the place of the focus
score rho in everything that follows: compensation, token and trajectory weights, factors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers import IGNORED, AttentionCall, capture_attention
from vgpo_trainer.signals import SignalBatch, SignalSettings, VisualSignal, as_cosines

IMAGE, OTHER = 0, 1


class AttentionSignal(VisualSignal):
    """Reduces the attention of successive slices of a batch to shares of the image, layer by layer."""

    reads_layers: ClassVar[bool] = True

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        super().__init__(batch, settings)
        self._segments = torch.where(batch.image_mask, IMAGE, OTHER).masked_fill(batch.attention_mask == 0, IGNORED)
        self._slices: list[list[Tensor]] = []  # the shares of each layer
        self._slice = slice(0)  # the rows that pass
        self._last_layer: int | None = None

    @classmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Raise what capturing the attention of these layers would raise, before any work is done.

        Raises:
            TypeError: The model has no decoder layers whose attention transformers looks up by name.
            ValueError: A layer is out of range.
        """
        with capture_attention(model, _nothing, layers=settings.layers, norm=settings.norm):
            pass

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Take the attention of every forward pass in the block."""
        return capture_attention(model, self._take, layers=self.settings.layers, norm=self.settings.norm)

    def _take(self, call: AttentionCall) -> None:
        """Take the queries and keys of the next layer; the first layer again begins the next slice."""
        if self.paused:
            return
        if self._last_layer is None or call.layer <= self._last_layer:
            self._slices.append([])
            self._slice = self.next_rows(call.q.shape[0])
        self._last_layer = call.layer
        segments = self._segments[self._slice].to(call.k.device)
        if segments.shape != (call.k.shape[0], call.k.shape[2]):
            raise RuntimeError(
                f"layer {call.layer} has keys {list(call.k.shape)} for segments {list(segments.shape)}: the attention "
                "signal needs one key for each position of the sequence"
            )
        call = call.last(self.batch.response_mask.shape[1])
        with torch.no_grad():
            share = call.mass(segments, num_segments=2)[..., IMAGE]
        self._slices[-1].append(share.to(self.batch.response_mask.device))

    @property
    def values(self) -> Tensor:
        """What to hand to ``visual_weights`` as cosines ``[B, T]``, so that the score it makes of them is the share."""
        return as_cosines(self.shown, self.settings.config)

    @property
    def shown(self) -> Tensor:
        """Shares ``[B, T]`` of all rows, 0 off the mask.

        Raises:
            RuntimeError: The forward pass did not reach an attention layer for every row.
        """
        self.check_read(
            "the attention of {read} of {rows} responses was captured; a compiled or replaced forward pass does not "
            "call attention by its name"
        )
        mean = torch.cat([torch.stack(layers).mean(dim=0) for layers in self._slices])
        return mean * self.batch.response_mask.bool()


def _nothing(call: AttentionCall) -> None:
    pass

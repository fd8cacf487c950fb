"""A token's mean cosine to the image tokens, over all layers, ``signal="similarity"``: of PEPO.

The mean of the cosines with all image tokens is the cosine with the mean of their unit states, times that mean's norm,
so that no cosine of a pair is computed. Each layer is reduced as it passes; what goes into the first layer is the first
of them, as in transformers' ``output_hidden_states``, and the last comes after the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from vgpo_kernels import visual_focus
from vgpo_kernels.integrations.transformers import capture_layer_mean
from vgpo_trainer.signals import SignalBatch, SignalSettings, VisualSignal


class SimilaritySignal(VisualSignal):
    """Reduces the hidden states of each layer and of successive slices of a batch; none of them are kept."""

    reads_layers: ClassVar[bool] = True

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        super().__init__(batch, settings)
        self._passes: list[Tensor] = []

    @classmethod
    def check(cls, model: nn.Module, settings: SignalSettings) -> None:
        """Raise TypeError or ValueError for a model whose layers are not found, or a layer that is out of range."""
        with capture_layer_mean(model, lambda hidden: hidden, layers=settings.layers, norm=settings.norm):
            pass

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[None]:
        """Reduce the layers of every forward pass in the block."""
        under_way: int | None = None  # which pass
        rows, skipped = slice(0), set()

        def reduce(hidden: Tensor) -> Tensor:
            nonlocal under_way, rows
            first = under_way != len(captured.passes)
            under_way = len(captured.passes)
            if self.paused:
                skipped.add(under_way)
                return hidden.new_zeros(0, dtype=torch.float32)
            if first:
                rows = self.next_rows(hidden.shape[0])
            masks = (mask[rows].to(hidden.device) for mask in (self.batch.image_mask, self.batch.response_mask))
            return visual_focus(hidden, *masks, visibility="causal", pooling="unit_mean")

        settings = self.settings
        with capture_layer_mean(model, reduce, layers=settings.layers, norm=settings.norm) as captured:
            yield
        self._passes += [found for index, found in enumerate(captured.passes) if index not in skipped]

    @property
    def values(self) -> Tensor:
        """Mean cosines of all rows, ``[B, T]``.

        Raises:
            RuntimeError: The forward pass did not reach the decoder for every row.
        """
        self.check_read("hidden states of {read} of {rows} responses passed; a compiled forward pass skips hooks")
        return torch.cat(self._passes).to(self.batch.response_mask.device)

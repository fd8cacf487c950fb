"""The attention share of the image as visual signal, ``signal="attention"``, in place of the visual focus score.

The share a of a response token is that of its query, averaged over heads and layers. It takes the place of the focus
score rho in everything that follows: compensation, token and trajectory weights, factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.transformers import IGNORED, AttentionCall, capture_attention

IMAGE, OTHER = 0, 1


class AttentionPass:
    """Reduces the attention of successive slices of a batch to shares of the image, layer by layer.

    Args:
        image_mask: True at visual tokens, ``[B, S]``.
        response_mask: True at scored response tokens, ``[B, T]``: the last T positions.
        attention_mask: True at tokens, ``[B, S]``.
        config: The settings that the shares are scored with.
        layers: Indices of decoder layers, negative ones counted from the last; ``None``: all that have attention.
        norm: The model's final norm or its name, where it has to be told.

    """

    def __init__(
        self,
        image_mask: Tensor,
        response_mask: Tensor,
        attention_mask: Tensor,
        config: VGPOConfig,
        layers: Sequence[int] | None,
        norm: str | nn.Module | None = None,
    ) -> None:
        self.image_mask = image_mask
        self.response_mask = response_mask
        self._segments = torch.where(image_mask, IMAGE, OTHER).masked_fill(attention_mask == 0, IGNORED)
        self._affine = config.score == "affine"
        self._layers = layers
        self._norm = norm
        self._slices: list[list[Tensor]] = []  # the shares of each layer
        self._rows = 0
        self._last_layer: int | None = None

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Take the attention of every forward pass in the block."""
        return capture_attention(model, self, layers=self._layers, norm=self._norm)

    def __call__(self, call: AttentionCall) -> None:
        """Take the queries and keys of the next layer; the first layer again begins the next slice."""
        if self._last_layer is None or call.layer <= self._last_layer:
            self._slices.append([])
            self._rows += call.q.shape[0]
        self._last_layer = call.layer
        segments = self._segments[self._rows - call.q.shape[0] : self._rows].to(call.k.device)
        if segments.shape != (call.k.shape[0], call.k.shape[2]):
            raise RuntimeError(
                f"layer {call.layer} has keys {list(call.k.shape)} for segments {list(segments.shape)}: the attention "
                "signal needs one key for each position of the sequence"
            )
        call = call.last(self.response_mask.shape[1])
        with torch.no_grad():
            share = call.mass(segments, num_segments=2)[..., IMAGE]
        self._slices[-1].append(share.to(self.response_mask.device))

    @property
    def shown(self) -> Tensor:
        """Shares ``[B, T]`` of all rows, 0 off the mask.

        Raises:
            RuntimeError: The forward pass did not reach an attention layer for every row.

        """
        if self._rows != self.response_mask.shape[0]:
            raise RuntimeError(
                f"the attention of {self._rows} of {self.response_mask.shape[0]} responses was captured; a compiled or "
                "replaced forward pass does not call attention by its name"
            )
        mean = torch.cat([torch.stack(layers).mean(dim=0) for layers in self._slices])
        return mean * self.response_mask.bool()

    @property
    def cos(self) -> Tensor:
        """What to hand to ``visual_weights`` as cosines ``[B, T]``, so that the score it makes of them is the share."""
        # (1 + cos) / 2 where the score is affine; an offset that is left to the batch is 0 for shares.
        return 2 * self.shown - 1 if self._affine else self.shown


def check_attention(model: nn.Module, layers: Sequence[int] | None, norm: str | nn.Module | None = None) -> None:
    """Raise what capturing the attention of these layers would raise, before any work is done.

    Raises:
        TypeError: The model has no decoder layers whose attention transformers looks up by name.
        ValueError: A layer is out of range.

    """
    with capture_attention(model, _nothing, layers=layers, norm=norm):
        pass


def _nothing(call: AttentionCall) -> None:
    pass

"""How much a token depends on the image, ``signal="dependency"``: the policy's divergence from what it says without it.

The divergence D of a response token is KL(p || q) of the next-token distributions that the state before it gives, p
with the image as it is and q with a spoilt one (``view``): exact, over the whole vocabulary. The focus score rho is
then ``1 - exp(-D)``.

Divergences have no bound and a heavy tail: next to none where the text decides a token, many nats for a few. The paper
scales ``w`` to 0..1 within a response. Of D itself that would leave a weight for the few alone, by the measure of the
most surprised token; the sum over a response, which phi compares, would be theirs too. ``1 - exp(-D)`` is D where that
is small, grows with it, so that the gate chooses the same tokens (to the rounding of fp32, in which D beyond 16 nats
ties), and ends at 1, as the paper's rho does. It bounds the square of the total variation between p and q (Bretagnolle
and Huber), so it says how many of the probabilities the image has changed. And it is 0 where nothing depends on the
image, so that compensation, which multiplies rho, raises nothing there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgpo_trainer.signals import SignalBatch, SignalSettings, ViewSignal, as_cosines


class DependencySignal(ViewSignal):
    """Gathers the divergences of successive slices of a batch, which the trainer's passes over both views give."""

    def __init__(self, batch: SignalBatch, settings: SignalSettings) -> None:
        super().__init__(batch, settings)
        self._slices: list[Tensor] = []

    def take(self, kl: Tensor) -> None:
        """Take the divergence of the next rows, in nats."""
        self.next_rows(kl.shape[0])
        self._slices.append(kl.to(self.batch.response_mask.device))

    @property
    def values(self) -> Tensor:
        """What to hand to ``visual_weights`` as cosines ``[B, T]``, so that its score is ``1 - exp(-D)``."""
        kl = self.shown
        score = -torch.expm1(-kl).masked_fill(kl.isinf(), torch.inf)  # a fault, which must not pass for a score of 1
        return as_cosines(score, self.settings.config)

    @property
    def shown(self) -> Tensor:
        """Divergences in nats ``[B, T]`` of all rows, 0 off the mask.

        Raises:
            RuntimeError: The passes did not reach every row.
        """
        self.check_read("{read} of {rows} responses passed in two views")
        # Of equal distributions rounding may leave less than nothing; what is not finite stays so.
        kl = torch.cat(self._slices)
        return torch.where(self.batch.response_mask.bool(), torch.where(kl < 0, 0.0, kl), 0.0)

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vgpo_trainer.signals import Comparison, ViewSignal, as_cosines


class DependencySignal(ViewSignal):
    """Gathers the divergences of successive slices of a batch, which the trainer's passes over both views give.

    A signal derived from it has another :meth:`measure` of how far the views are apart, and the same score.
    """

    compares: ClassVar[tuple[str, ...]] = ("kl",)

    def measure(self, found: Comparison) -> Tensor:
        """Return divergences in nats."""
        assert found.kl is not None
        # Of equal distributions rounding may leave less than nothing; what is not finite stays so.
        return torch.where(found.kl < 0, 0.0, found.kl)

    @property
    def values(self) -> Tensor:
        """What to hand to ``visual_weights`` as cosines ``[B, T]``, so that its score is ``1 - exp(-D)``."""
        apart = self.shown
        score = -torch.expm1(-apart).masked_fill(apart.isinf(), torch.inf)  # a fault, which must not be a score of 1
        return as_cosines(score, self.settings.config)

"""The Jensen-Shannon divergence of both views' distributions of a token, ``signal="js"``: of VEPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vgpo_trainer.signals import Comparison
from vgpo_trainer.signals.dependency import DependencySignal


class JSSignal(DependencySignal):
    """Gathers these divergences of successive slices of a batch: exact, at most log 2."""

    compares: ClassVar[tuple[str, ...]] = ("js",)

    def measure(self, found: Comparison) -> Tensor:
        """Return divergences in nats."""
        assert found.js is not None
        return found.js.clamp(min=0.0)

"""How much the image changes the log-probability of the token that was sampled, ``signal="logp_change"``: of ToR."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vgpo_trainer.signals import Comparison
from vgpo_trainer.signals.dependency import DependencySignal


class LogpChangeSignal(DependencySignal):
    """Gathers absolute log-ratios of successive slices of a batch."""

    compares: ClassVar[tuple[str, ...]] = ()

    def measure(self, found: Comparison) -> Tensor:
        """Return the absolute difference of both log-probabilities, in nats."""
        assert found.logp is not None and found.other_logp is not None
        return (found.logp - found.other_logp).abs()

"""How far both views are apart at the token that was sampled, ``signal="k3"``: of VPPO and PGPO.

With the log-ratio d of the spoilt view and the images as they are, k3 is ``exp(d) - d - 1``: never negative, and in the
mean over tokens drawn from the policy its divergence from the spoilt view. It needs no distribution, so that the head
computes the log-probabilities of the other view and nothing else.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vgpo_kernels.integrations.methods import k3
from vgpo_trainer.signals import Comparison
from vgpo_trainer.signals.dependency import DependencySignal


class K3Signal(DependencySignal):
    """Gathers k3 of successive slices of a batch."""

    compares: ClassVar[tuple[str, ...]] = ()

    def measure(self, found: Comparison) -> Tensor:
        """Return k3 of each token, between 0 and 10."""
        assert found.logp is not None and found.other_logp is not None
        return k3(found.logp, found.other_logp)

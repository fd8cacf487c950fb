"""The factors that training would make of a signal."""

from __future__ import annotations

import torch

from vgpo_kernels import VGPOConfig, VisualWeights, visual_weights
from vgpo_trainer.probe.measuring import Key, Measured
from vgpo_trainer.signals import as_cosines

UNBOUNDED = ("kl", "k3", "logp change")


def weights_of(measured: Measured, key: Key, config: VGPOConfig) -> VisualWeights:
    """Return psi, phi and what they are made of, where a signal is what tokens are scored by.

    Focus is a cosine, of which the score is ``(1 + cos) / 2``. The share of attention, JS and entropy are scores
    themselves. Divergences without a bound become ``1 - exp(-D)``, as in the trainer's ``signal="dependency"``: else
    the most surprised token of a response would leave no weight for the others.
    """
    values = measured.signals[key]
    if key.signal in UNBOUNDED:
        values = -torch.expm1(-values)
    if key.signal != "focus":
        values = as_cosines(values, config)
    return visual_weights(values, measured.mask, measured.groups, config)

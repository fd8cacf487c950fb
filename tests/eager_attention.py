"""What a model's own eager attention says, to compare captured shares with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers import GENERATED, IMAGE, QUESTION

TOLERANCE = 1e-4


def sums_by_segment(weights: tuple[Tensor, ...], segments: Tensor) -> Tensor:
    """Eager weights ``[B, Hq, T, S]`` of each layer to masses ``[B, layers, Hq, T, 3]``."""
    members = torch.stack([segments == g for g in (IMAGE, QUESTION, GENERATED)], dim=-1).float()
    return torch.stack([layer.float() @ members[:, None] for layer in weights], dim=1)


def eager_weights(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(previous)
    return weights


def assert_same(captured: Tensor, expected: Tensor, real: Tensor) -> None:
    """Compare where there is a token; what padding looks at is nobody's."""
    rows = real.bool()[:, None, :, None].expand_as(captured)
    torch.testing.assert_close(captured[rows], expected[rows], atol=TOLERANCE, rtol=0)

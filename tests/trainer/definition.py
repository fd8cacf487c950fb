"""What a batch of the trainer must come to by the paper's equations: from hidden states, in loops over numbers."""

from __future__ import annotations

from collections.abc import Sequence

from equations import Weights, factors, focus, positions
from torch import Tensor

from vgpo_kernels import VGPOConfig


def by_definition(
    hidden: Tensor, image: Tensor, scored: Tensor, groups: Sequence[int], config: VGPOConfig | None = None
) -> tuple[list[Weights], list[list[float]]]:
    """Weights of each response, and the cosines of its scored tokens: NaN where no image was seen yet.

    Args:
        hidden: ``[B, S, D]``.
        image: True at image tokens that were shown, ``[B, S]``.
        scored: True at scored response tokens, ``[B, T]``: the last T positions.
        groups: Of each response.
        config: By default the paper's.
    """
    cosines = [focus(positions(*row), causal=True) for row in zip(hidden, image, scored, strict=True)]
    return factors(cosines, groups, config or VGPOConfig.paper()), cosines


def assert_factors(made: Tensor, expected: Sequence[Weights], scored: Tensor) -> None:
    """The factors ``[B, T]`` of a batch are those; a factor divides by the range of a response's scores."""
    for row, weights in enumerate(expected):
        wanted = made.new_tensor(weights.factors)
        diff = (made[row][scored[row].bool()] - wanted).abs()
        assert diff.numel() == 0 or diff.max() < 5e-4 * max(1.0, wanted.abs().max().item()), row

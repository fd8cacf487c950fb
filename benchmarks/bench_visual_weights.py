"""Speed of visual_weights: from cosines to factors.

Bytes a token: the cosine (4) and the mask (1) in; factors, psi and w out (12). The tail's order keys, the selection of
the gate's threshold and two more passes over w stay in a core's cache. Flops: two divisions and some thirty other
operations a token, and half a token's worth of 32 integer comparisons.

Prediction for the CPU: arithmetic and not memory decides; several times faster than sorting one copy of the cosines.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.measure import Case, copy_ceiling
from vgpo_kernels import VGPOConfig, visual_weights
from vgpo_kernels.reference.visual_weights import visual_weights as definition

BYTES_PER_TOKEN = 17


def weights_case(batch: int, length: int, device: torch.device, group: int = 8) -> Case:
    """The op on drawn cosines, beside one sort of them and the same in torch."""
    generator = torch.Generator(device).manual_seed(0)
    cos = (0.3 * torch.randn(batch, length, generator=generator, device=device)).clamp(-1, 1)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    groups = torch.arange(batch, device=device) // group
    config = VGPOConfig.paper()

    def check() -> None:
        actual = visual_weights(cos, mask, groups, config)
        exact = definition(cos, mask, groups, None, None, config.as_floats())
        # phi is a difference of fp32 sums of thousands of weights, by their small range.
        torch.testing.assert_close(actual.factors.double(), exact[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(actual.psi.double(), exact[1], atol=1e-6, rtol=0)

    size = BYTES_PER_TOKEN * batch * length
    return Case(
        op="visual_weights",
        shape=f"{batch} x {length}",
        dtype=torch.float32,
        device=device,
        bytes=size,
        run=lambda: visual_weights(cos, mask, groups, config),
        check=check,
        ceilings=(copy_ceiling(size, device),),
        peers={
            "one sort of the cosines": lambda: cos.sort(dim=-1),
            "PyTorch": lambda: peers.weights(cos, mask, groups),
        },
    )


@pytest.mark.parametrize(("batch", "length"), [(64, 4096), (1, 131072)])
def test_visual_weights(speed, device: torch.device, batch: int, length: int) -> None:
    speed(weights_case(batch, length, device))

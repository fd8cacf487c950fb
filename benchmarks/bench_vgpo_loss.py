"""Speed of vgpo_loss: hidden states to loss, metrics and gradient in one call.

Bytes: those of visual_focus (see bench_visual_focus.py); the arrays of B T floats that follow are 0.1% of them.

Prediction for the CPU: at most 1.05 times visual_focus alone, and a few MiB of memory: prototypes and arrays of N
floats, nothing of the size of the hidden states.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.bench_visual_focus import exact_cosines, focus_bytes, with_bmm
from benchmarks.measure import CPU_SHAPE, Case, RolloutShape, make_rollout, read_ceiling
from vgpo_kernels import PolicyLossOptions, VGPOConfig, vgpo_loss, visual_focus
from vgpo_kernels.reference.policy_loss import policy_loss as loss_definition
from vgpo_kernels.reference.visual_weights import visual_weights as weights_definition


def vgpo_case(shape: RolloutShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Forward and backward on a drawn batch, beside visual_focus alone and the same in torch."""
    rollout = make_rollout(shape, dtype, device)
    config = VGPOConfig.paper()
    logp = rollout.logp
    focus = (rollout.hidden, rollout.visual_mask, rollout.response_mask)
    floats = config.as_floats()

    def ours() -> tuple[Tensor, ...]:
        loss = vgpo_loss(
            rollout.hidden,
            logp,
            rollout.old_logp,
            rollout.advantages,
            rollout.visual_mask,
            rollout.response_mask,
            rollout.group_ids,
            config,
        ).loss
        return torch.autograd.grad(loss, logp)

    def in_torch() -> tuple[Tensor, ...]:
        cos = with_bmm(*focus).float()
        factors = peers.weights(cos, rollout.response_mask, rollout.group_ids)
        loss = peers.loss(logp, rollout.old_logp, rollout.advantages, rollout.response_mask, factors)
        return torch.autograd.grad(loss, logp)

    def check() -> None:
        cos = exact_cosines(rollout)
        factors = weights_definition(cos, rollout.response_mask, rollout.group_ids, None, None, floats)[0]
        options = PolicyLossOptions().as_floats()
        nothing = (None,) * 6
        loss, _ = loss_definition(
            logp, rollout.old_logp, rollout.advantages, rollout.response_mask, factors, *nothing, options
        )
        (expected,) = torch.autograd.grad(loss, logp)
        # A token at the gate's threshold may fall to either side of it by rounding of the cosine.
        wrong = ((ours()[0] - expected).abs() > 1e-3 * expected.abs().max()).sum().item()
        assert wrong <= 2, f"{wrong} of {expected.numel()} gradients differ from the definition's"

    return Case(
        op="vgpo_loss",
        shape=str(shape),
        dtype=dtype,
        device=device,
        bytes=focus_bytes(shape, dtype),
        run=ours,
        check=check,
        ceilings=(read_ceiling(rollout.hidden),),
        peers={"visual_focus alone": lambda: visual_focus(*focus), "PyTorch": in_torch},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vgpo_loss(speed, device: torch.device, dtype: torch.dtype) -> None:
    speed(vgpo_case(CPU_SHAPE, dtype, device))

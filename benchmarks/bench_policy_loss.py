"""Speed of policy_loss: loss, metrics and gradient in one pass over the tokens.

Bytes a token: logp, old_logp and the factor (12) and the mask (1) in, the gradient (4) out; backward reads that and
writes it scaled (8). Flops: two exponentials and some sixty other operations a token.

Prediction for the CPU: arithmetic and not memory decides; an order faster than a chain of torch's operations, which
reads and writes an array each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import Case, copy_ceiling
from vgpo_kernels import PolicyLossOptions, policy_loss
from vgpo_kernels.reference.policy_loss import policy_loss as definition

BYTES_PER_TOKEN = 25


def loss_case(batch: int, length: int, device: torch.device) -> Case:
    """Forward and backward on drawn log-probs, beside the same in torch, eager and compiled."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    logp = -normal(batch, length).abs()
    old_logp = logp + 0.2 * normal(batch, length)
    logp.requires_grad_()
    advantages, factors = normal(batch), 1 + 0.1 * normal(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    compiled = torch.compile(peers.loss, dynamic=False)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(policy_loss(logp, old_logp, advantages, mask, factors=factors).loss, logp)

    def theirs(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(logp, old_logp, advantages, mask, factors), logp)

    def check() -> None:
        nothing = (None,) * 6
        options = PolicyLossOptions().as_floats()
        loss, _ = definition(logp, old_logp, advantages, mask, factors, *nothing, options)
        (expected,) = torch.autograd.grad(loss, logp)
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours()[0], expected, atol=1e-5 * scale, rtol=1e-5)

    size = BYTES_PER_TOKEN * batch * length
    return Case(
        op="policy_loss",
        shape=f"{batch} x {length}",
        dtype=torch.float32,
        device=device,
        bytes=size,
        run=ours,
        check=check,
        ceilings=(copy_ceiling(size, device),),
        peers={
            "PyTorch, no metrics": lambda: theirs(peers.loss),
            "torch.compile, no metrics": lambda: theirs(compiled),
        },
    )


@pytest.mark.parametrize(("batch", "length"), [(8, 2048), (64, 4096)])
def test_policy_loss(speed, device: torch.device, batch: int, length: int) -> None:
    speed(loss_case(batch, length, device))

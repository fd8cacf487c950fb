"""vgpo_loss on responses of several blocks of tokens: what a block leaves behind must not reach the next one."""

from __future__ import annotations

import pytest
import torch
from cases import Response, make_batch
from tolerance import assert_close

from vgpo_kernels import VGPOConfig, backend, vgpo_loss

# Kernels that take a response in blocks of 1,024 tokens need two and three of them; the last one is not weighted.
RESPONSES = (Response(length=1100), Response(length=2100, holes=True), Response(visual=0, length=1030))


@pytest.mark.parametrize(
    ("loss_type", "estimator", "per_token"),
    [
        ("gspo", "k3", True),
        ("gspo_token", "k3_clamped", False),
        ("luspo", "k1", True),
        ("luspo", "k2", False),
        ("vespo", "k3", True),
        ("vespo", "k1", False),
        ("dapo", "k2", True),
    ],
)
def test_every_term_on_long_responses(
    backend_name: str, device: torch.device, loss_type: str, estimator: str, per_token: bool
) -> None:
    """Loss and gradients with a KL term, a bonus, factors, and importance weights per token or response."""
    batch = make_batch(RESPONSES, features=8, packed=per_token).to(device)
    generator = torch.Generator().manual_seed(7)
    # Close to on-policy, so that neither a ratio nor vespo's weight is clipped: each depends on every token.
    noise = torch.randn(batch.logp.shape, generator=generator).to(device)
    weights = 1 + 0.01 * torch.rand(batch.logp.shape if per_token else (3,), generator=generator).to(device)
    arguments = {
        "old_logp": batch.logp + 0.01 * noise,
        "advantages": batch.token_advantages if per_token else batch.advantages,
        "visual_mask": batch.visual_mask,
        "response_mask": batch.response_mask,
        "group_ids": batch.group_ids,
        "config": VGPOConfig.paper(gate=False),
        "cu_seqlens": batch.cu_seqlens,
        "ref_logp": batch.ref_logp,
        "importance_weights": weights,
        "loss_type": loss_type,
        "kl_coef": 0.1,
        "kl_estimator": estimator,
        "entropy_coef": 0.01,
    }

    def loss_and_gradients() -> list[torch.Tensor]:
        leaves = [batch.logp.clone().requires_grad_(), batch.entropy.clone().requires_grad_()]
        loss, metrics = vgpo_loss(batch.hidden, leaves[0], entropy=leaves[1], **arguments)
        gradients = torch.autograd.grad(loss, leaves)
        return [loss, *gradients, torch.stack([metrics["factor_std"], metrics["ref_kl"], metrics["ratio_mean"]])]

    found = loss_and_gradients()
    with backend("reference"):
        exact = loss_and_gradients()
    for name, one, other in zip(("loss", "logp", "entropy", "metrics"), found, exact, strict=True):
        scale = other.detach().nan_to_num().abs().max().clamp(min=1e-30)
        assert_close(one / scale, (other / scale).double(), name=name, floor=1e-4)

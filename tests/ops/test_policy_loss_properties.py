"""Properties of policy losses, drawn by hypothesis."""

from __future__ import annotations

import torch
from cases import Batch, Response, make_batch
from drawn import CASES, ON_THE_CPU, part_of, responses, same, seeds
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from vgpo_kernels import policy_loss
from vgpo_kernels.config import CHOICES, DEFAULT_AGGREGATION

pytestmark = ON_THE_CPU


@CASES
@given(responses, seeds, st.sampled_from(CHOICES["loss_type"]), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_losses_add_up_over_any_partition(
    drawn: tuple[Response, ...], seed: int, loss_type: str, parts: list[int]
) -> None:
    """Over micro-batches of any responses, with the whole batch's denominators: the loss, and the gradient."""
    batch = make_batch(drawn, seed=seed, features=1)
    options = {
        "loss_type": loss_type,
        "aggregation": DEFAULT_AGGREGATION[loss_type],
        "max_length": 40,
        "num_tokens": batch.response_mask.sum(),
        "num_sequences": len(drawn),
        "dual_clip": 3.0,
    }

    def loss_and_gradient(part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logp = part.logp.clone().requires_grad_()
        loss = policy_loss(logp, part.old_logp, part.advantages, part.response_mask, **options).loss
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    whole, gradient = loss_and_gradient(batch)
    total = torch.zeros((), dtype=torch.float64)
    for part in range(4):
        index = torch.tensor([row for row in range(len(drawn)) if parts[row] == part], dtype=torch.int64)
        loss, of_part = loss_and_gradient(part_of(batch, index))
        total += loss
        same(of_part, gradient[index], "gradient")
    assert_close(total, whole.double(), name="loss", floor=4e-6)

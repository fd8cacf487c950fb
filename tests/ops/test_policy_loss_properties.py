"""Properties of policy losses, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from cases import Batch, Response, default_dtype, make_batch
from drawn import CASES, EXACT, MANY, ON_THE_CPU, part_of, responses, same, seeds
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import LossCase, check_loss, draw_loss, packed, run
from tolerance import assert_close, same_bits

from vgpo_kernels import policy_loss
from vgpo_kernels.config import CHOICES, DEFAULT_AGGREGATION

pytestmark = ON_THE_CPU
randoms = st.randoms(use_true_random=False)


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


@MANY
@given(randoms)
def test_losses_are_the_equations(random: Random) -> None:
    """Loss, gradients and metrics of any settings, with infinities, NaN and zeros at single tokens."""
    check_loss(draw_loss(random), bits=32 if EXACT else 64)


def all_results(case: LossCase) -> list[torch.Tensor]:
    """Everything that a loss returns; gradients of the scored tokens alone."""
    loss, gradients, metrics = run(case)
    mask = case.tensors["response_mask"].reshape(-1)
    return [loss, *(gradient.reshape(-1)[mask] for gradient in gradients.values()), *metrics.values()]


def spread_out(values: torch.Tensor) -> torch.Tensor:
    """The same values, transposed in memory with a hole behind each."""
    apart = torch.stack([values, torch.full_like(values, True)]).movedim(0, -1)
    return apart.mT.contiguous().mT[..., 0] if values.dim() == 2 else apart[..., 0]


@CASES
@given(randoms, st.sampled_from([torch.float64, torch.bfloat16, torch.float16]))
def test_neither_layout_nor_strides_nor_the_default_dtype_matter(random: Random, dtype: torch.dtype) -> None:
    case = draw_loss(random)
    expected = all_results(case)
    strided = replace(case, tensors={name: spread_out(values) for name, values in case.tensors.items()})
    for other in (packed(case), strided):
        for found, wanted in zip(all_results(other), expected, strict=True):
            assert same_bits(found, wanted)
    with default_dtype(dtype):
        again = all_results(case)
    for found, wanted in zip(again, expected, strict=True):
        assert found.dtype == wanted.dtype and same_bits(found, wanted)


@CASES
@given(randoms)
def test_broken_responses_spoil_no_other(random: Random) -> None:
    """The gradient of the others is the one that they have without them, to the bit."""
    case = draw_loss(random)
    mask = case.tensors["response_mask"]
    counts = {"num_tokens": mask.sum().item(), "num_sequences": len(mask)}
    options = case.options | {name: value for name, value in counts.items() if case.options[name] is None}
    sound = torch.tensor([row for row in range(len(mask)) if row not in case.poisoned], dtype=torch.int64)
    part = {name: values[sound] for name, values in case.tensors.items()}
    _, whole, _ = run(replace(case, options=options))
    _, alone, _ = run(replace(case, tensors=part, options=options))
    for name, gradient in alone.items():
        same(gradient, whole[name][sound], name)

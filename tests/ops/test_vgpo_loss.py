"""vgpo_loss on every backend: one call equals the three it is made of."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, make_batch
from operator_cases import computed_metrics
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import PolicyLoss, VGPOConfig, backend, policy_loss, vgpo_loss, visual_focus, visual_prototype
from vgpo_kernels import visual_weights as weigh
from vgpo_kernels.config import CHOICES
from vgpo_kernels.ops.vgpo_loss import METRICS


def in_one_call(batch: Batch, logp: Tensor, config: VGPOConfig, **options: Any) -> PolicyLoss:
    return vgpo_loss(
        batch.hidden,
        logp,
        batch.old_logp,
        batch.advantages,
        batch.visual_mask,
        batch.response_mask,
        batch.group_ids,
        config,
        cu_seqlens=batch.cu_seqlens,
        **options,
    )


def in_three_calls(batch: Batch, logp: Tensor, config: VGPOConfig, **options: Any) -> PolicyLoss:
    packed = {"cu_seqlens": batch.cu_seqlens}
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, **packed)
    weights = weigh(cos, batch.response_mask, batch.group_ids, config, has_visual=batch.has_visual, **packed)
    loss, metrics = policy_loss(
        logp,
        batch.old_logp,
        batch.advantages,
        batch.response_mask,
        factors=weights.factors,
        **packed,
        **options,
    )
    return PolicyLoss(loss, metrics | weights.metrics)


def check(batch: Batch, config: VGPOConfig, **options: Any) -> None:
    results = []
    for call in (in_one_call, in_three_calls):
        logp = batch.logp.clone().requires_grad_()
        loss, metrics = call(batch, logp, config, **options)
        assert tuple(metrics) == computed_metrics(METRICS, options)
        (gradient,) = torch.autograd.grad(loss, logp)
        results.append((loss, gradient, torch.stack(list(metrics.values()))))
    for name, actual, expected in zip(("loss", "gradient", "metrics"), *results, strict=True):
        assert_close(actual, expected.double(), name=name, floor=4e-6)
    with backend("reference"):
        exact = in_one_call(batch, batch.logp, config, **options)
    # A gate may fall either way where two cosines differ by less than fp32 can tell, so this bound is loose.
    assert_close(results[0][0], exact.loss.double(), name="loss against the reference implementation", floor=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", EDGES)
def test_one_call_equals_three(backend_name: str, device: torch.device, edge: str, packed: bool) -> None:
    batch = make_batch(EDGES[edge], packed=packed).to(device)
    check(batch, VGPOConfig.paper(), max_length=32)


@pytest.mark.parametrize(("loss_type", "preset"), zip(CHOICES["loss_type"], cycle(["paper", "released"])))
def test_losses_and_presets(backend_name: str, device: torch.device, preset: str, loss_type: str) -> None:
    batch = make_batch(EDGES["shuffled groups"] + EDGES["no image"], dtype=torch.bfloat16).to(device)
    options = {"ref_logp": batch.ref_logp, "kl_coef": 0.1, "loss_type": loss_type}
    check(batch, getattr(VGPOConfig, preset)(), **options)


def test_a_prototype_may_be_shared(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    own = visual_prototype(batch.hidden, batch.visual_mask)
    expected = in_one_call(batch, batch.logp, VGPOConfig.paper())
    given = in_one_call(batch, batch.logp, VGPOConfig.paper(), prototype=own)
    assert_close(given.loss, expected.loss.double(), name="loss", floor=1e-3)
    index = torch.tensor([0, 0, -1, 2], device=device)
    shared = in_one_call(batch, batch.logp, VGPOConfig.paper(), prototype=own, prototype_index=index)
    assert shared.metrics["weighted_responses"] == 3


def test_the_metrics_say_what_the_calls_say(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["no image"]).to(device)
    metrics = in_one_call(batch, batch.logp, VGPOConfig.paper()).metrics
    assert metrics["weighted_responses"] == 2
    assert metrics["num_tokens"] == batch.response_mask.sum()
    assert 0 < metrics["gate_rate"] < 0.5

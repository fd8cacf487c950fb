"""What a policy loss does without old log-probs, and which metrics it has, on every backend."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from linear_cases import with_predicting_rows
from operator_cases import computed_metrics
from torch import Tensor

from vgpo_kernels import PolicyLoss, VGPOConfig, linear_policy_loss, linear_vgpo_loss, policy_loss, vgpo_loss
from vgpo_kernels.config import CHOICES
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.policy_loss import POLICY_METRICS
from vgpo_kernels.ops.vgpo_loss import METRICS

MIXED = (*EDGES["holes"], Response(length=0), Response(length=1), Response(length=7))


# ---- on-policy -----------------------------------------------------------------------------------------------------


def both_losses(batch: Batch, logp: Tensor, old_logp: Tensor | None, **options: Any) -> list[PolicyLoss]:
    layout = {"cu_seqlens": batch.cu_seqlens}
    image = (batch.visual_mask, batch.response_mask, batch.group_ids, VGPOConfig.paper())
    return [
        policy_loss(logp, old_logp, batch.advantages, batch.response_mask, **layout, **options),
        vgpo_loss(batch.hidden, logp, old_logp, batch.advantages, *image, **layout, **options),
    ]


@pytest.mark.parametrize(("loss_type", "packed"), zip(CHOICES["loss_type"], cycle([False, True])))
def test_without_old_logp_the_policy_is_its_own(
    backend_name: str, device: torch.device, loss_type: str, packed: bool
) -> None:
    batch = make_batch(MIXED, packed=packed).to(device)
    results: list[list[Tensor]] = []
    for given in (False, True):
        logp = batch.logp.clone().requires_grad_()
        options = {"loss_type": loss_type, "max_length": 32}
        for loss, metrics in both_losses(batch, logp, logp.detach().clone() if given else None, **options):
            (gradient,) = torch.autograd.grad(loss, logp)
            assert gradient.abs().max() > 0
            assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0
            results.append([loss.detach(), gradient, *metrics.values()])
    for one, other in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_nothing_is_copied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = make_batch(EDGES["plain"]), []
    call = registry.call

    def spy(name: str, *rest: Any, **arguments: Any) -> Any:
        seen.append((arguments["logp"], arguments["old_logp"]))
        return call(name, *rest, **arguments)

    monkeypatch.setattr(registry, "call", spy)
    both_losses(batch, batch.logp.to(dtype).requires_grad_(), None)
    for logp, old_logp in seen:
        assert logp.data_ptr() == old_logp.data_ptr()
        assert logp.requires_grad and not old_logp.requires_grad
    assert len(seen) == 2


# ---- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [(), ("ref_logp",), ("entropy",), ("ref_logp", "entropy")], ids=str)
def test_a_metric_that_was_not_computed_is_absent(
    backend_name: str, device: torch.device, given: tuple[str, ...]
) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    options = {name: getattr(batch, name) for name in given}
    policy, vgpo = both_losses(batch, batch.logp, batch.old_logp, **options)
    assert tuple(policy.metrics) == computed_metrics(POLICY_METRICS, options)
    assert tuple(vgpo.metrics) == computed_metrics(METRICS, options)
    assert ("ref_kl" in policy.metrics) == ("ref_logp" in given)
    assert ("entropy" in vgpo.metrics) == ("entropy" in given)
    for name in given:
        assert policy.metrics[{"ref_logp": "ref_kl"}.get(name, name)] > 0


def test_the_head_computes_its_entropy(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), 50)
    batch, head = batch.to(device), head.to(device)
    arguments = (head.hidden.nan_to_num(), head.weight, head.targets, None, batch.advantages)
    image = (batch.visual_mask, batch.response_mask, batch.group_ids, VGPOConfig.paper())
    for metrics in (
        linear_policy_loss(*arguments, batch.response_mask).metrics,
        linear_vgpo_loss(*arguments, *image).metrics,
    ):
        assert metrics["entropy"] > 0 and "ref_kl" not in metrics
    with_reference = linear_policy_loss(*arguments, batch.response_mask, ref_logp=batch.ref_logp).metrics
    assert "ref_kl" in with_reference


BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("loss_type", "packed"), zip(CHOICES["loss_type"], cycle([True, False])))
def test_advantages_that_are_not_finite_are_counted(
    backend_name: str, device: torch.device, loss_type: str, packed: bool
) -> None:
    batch = make_batch((*EDGES["long"], *MIXED), features=4, packed=packed).to(device)
    options = {"loss_type": loss_type, "max_length": 32, "dual_clip": 1.5, "cu_seqlens": batch.cu_seqlens}
    places = batch.response_mask.nonzero()
    broken = batch.token_advantages.clone()  # NaN off the mask
    factors = torch.ones_like(batch.logp)
    chosen = places[torch.arange(1, len(places), 97, device=device)]
    for index, place in enumerate(chosen):
        broken[tuple(place)] = BROKEN[index % 3]
    last = tuple(places[-3])
    broken[last], factors[last] = 0.0, math.inf

    def count(advantages: Tensor, **more: Any) -> float:
        arguments = (batch.logp, batch.old_logp, advantages, batch.response_mask)
        return policy_loss(*arguments, **options, **more).metrics["nonfinite_advantages"].item()

    assert count(batch.token_advantages) == 0
    assert count(broken) == len(chosen)
    assert count(broken, factors=factors) == len(chosen) + 1
    per_response = batch.advantages.clone()
    per_response[1] = -math.inf
    second = batch.response_mask[slice(*batch.cu_seqlens[1:3])] if packed else batch.response_mask[1]
    assert count(per_response) == second.sum() > 0


def test_a_loss_that_overflows_has_finite_advantages(backend_name: str, device: torch.device) -> None:
    logp, mask = torch.zeros(1, 40, device=device), torch.ones(1, 40, dtype=torch.bool, device=device)
    advantages = torch.full((1,), 3e38, device=device)
    loss, metrics = policy_loss(logp, logp - 5, advantages, mask, dual_clip=None, epsilon_high=1e3, num_tokens=1)
    assert loss.isinf() and metrics["nonfinite_advantages"] == 0


def test_every_function_counts_advantages_that_are_not_finite(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), 50)
    batch, head = batch.to(device), head.to(device)
    advantages = batch.token_advantages.clone()
    for index, place in enumerate(batch.response_mask.nonzero()[::5]):
        advantages[tuple(place)] = BROKEN[index % 3]
    expected = len(batch.response_mask.nonzero()[::5])
    projected = (head.hidden.nan_to_num(), head.weight, head.targets, None, advantages)
    image = (batch.visual_mask, batch.response_mask, batch.group_ids, VGPOConfig.paper())
    for metrics in (
        vgpo_loss(batch.hidden, batch.logp, None, advantages, *image).metrics,
        linear_policy_loss(*projected, batch.response_mask, chunk_bytes=4096).metrics,
        linear_vgpo_loss(*projected, *image).metrics,
    ):
        assert metrics["nonfinite_advantages"] == expected


def test_a_cap_of_importance_needs_weights(backend_name: str, device: torch.device) -> None:
    """Without any there is nothing to cap."""
    batch = make_batch(EDGES["plain"], features=1).to(device)
    arguments = (batch.logp, batch.old_logp, batch.advantages, batch.response_mask)
    assert torch.equal(policy_loss(*arguments, importance_cap=0.5).loss, policy_loss(*arguments).loss)

"""Floats that change from call to call of a compiled function: one graph serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EDGES, make_batch
from test_vgpo_loss import in_one_call
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vgpo_kernels import (
    PolicyLossOptions,
    VGPOConfig,
    ViewTerm,
    attention_mass,
    linear_logprob,
    policy_loss,
    visual_weights,
)
from vgpo_kernels.config import CHOICES, Bounds, Number

STEPS = 4
VALUES = [(step + 1) / (STEPS + 1) for step in range(STEPS)]


def annealed(settings: type[VGPOConfig] | type[PolicyLossOptions], value: float) -> dict[str, Any]:
    """Return every number among the fields, each within its range and one that changes with ``value`` in (0, 1)."""
    offsets = {"dual_clip": 1.0, "score_offset": -1.0}
    found: dict[str, Any] = {}
    for name, kind in settings.kinds.items():
        if isinstance(kind, Number):
            found[name] = value + offsets.get(name, 0.0)
        elif isinstance(kind, Bounds):
            found[name] = (1 - value, 1 + value)
    return found


def assert_one_graph(function: Callable[..., Tensor], *tensors: Tensor, values: list[float]) -> None:
    """Assert that a compiled function is right for all values, and was compiled for one and for any other."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = [compiled(*tensors, value).detach() for value in values]
    expected = [function(*tensors, value).detach() for value in values]
    torch.testing.assert_close(torch.stack(results), torch.stack(expected), rtol=1e-6, atol=1e-7)
    assert not torch.equal(expected[0], expected[1]), "the value does not matter"
    assert counter.frame_count <= 2


@pytest.mark.parametrize("schedule", CHOICES["schedule"])
def test_fields_of_the_config_change(backend_name: str, device: torch.device, schedule: str) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    cos = torch.rand(batch.response_mask.shape, generator=torch.Generator().manual_seed(2)).to(device)

    def factors(cos: Tensor, value: float) -> Tensor:
        config = VGPOConfig(schedule=schedule, score="offset", **annealed(VGPOConfig, value))
        return visual_weights(cos, batch.response_mask, batch.group_ids, config).factors

    assert_one_graph(factors, cos, values=VALUES)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "sapo", "vespo"])
def test_options_of_the_loss_change(backend_name: str, device: torch.device, loss_type: str) -> None:
    batch = make_batch(EDGES["plain"]).to(device)

    def loss(logp: Tensor, value: float) -> Tensor:
        return policy_loss(
            logp,
            batch.old_logp,
            batch.advantages,
            batch.response_mask,
            ref_logp=batch.ref_logp,
            entropy=batch.entropy,
            importance_weights=batch.advantages.abs(),
            loss_type=loss_type,
            **annealed(PolicyLossOptions, value),
        ).loss

    assert_one_graph(loss, batch.logp.nan_to_num().requires_grad_(), values=VALUES)


def test_denominators_and_coefficients_of_views_change(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)

    def loss(logp: Tensor, value: float) -> Tensor:
        given = (logp, batch.old_logp, batch.advantages, batch.response_mask)
        counts = {"num_tokens": value, "num_selected": value / 2, "selected": batch.logp < -0.5}
        return policy_loss(*given, aggregation="token-mean", views=[ViewTerm(batch.ref_logp, value)], **counts).loss

    for kind in (float, int):
        assert_one_graph(loss, batch.logp.nan_to_num(), values=[kind(7 + 3 * step) for step in range(STEPS)])


def test_a_coefficient_changes_with_its_gradient(backend_name: str, device: torch.device) -> None:
    """The whole loss, forwards and backwards, as a training step compiles it."""
    batch = make_batch(EDGES["plain"]).to(device)

    def loss(logp: Tensor, coefficient: float, beta: float) -> Tensor:
        return in_one_call(batch, logp, VGPOConfig(beta=beta), ref_logp=batch.ref_logp, kl_coef=coefficient).loss

    def gradient(function: Callable[..., Tensor], step: int) -> Tensor:
        leaf = batch.logp.nan_to_num().requires_grad_()
        function(leaf, 0.1 * step, 0.2 + 0.1 * step).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(STEPS):
        torch.testing.assert_close(gradient(compiled, step), gradient(loss, step), rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 3  # a coefficient of 0 is its own graph


def test_temperature_and_scale_change(backend_name: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    states, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((3, 4), (5, 4)))
    targets = torch.tensor([0, 4, 2], device=device)

    def logp(states: Tensor, value: float) -> Tensor:
        return linear_logprob(states, weight, targets, temperature=value)

    assert_one_graph(logp, states, values=VALUES)
    queries, keys = states.view(1, 1, 3, 4), torch.randn(1, 1, 5, 4, generator=generator).to(device)
    segments = torch.tensor([[0, 0, 1, 1, 1]], device=device)

    def mass(queries: Tensor, value: float) -> Tensor:
        return attention_mass(queries, keys, segments, num_segments=2, scale=value)

    assert_one_graph(mass, queries, values=VALUES)

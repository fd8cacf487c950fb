"""Derivatives beyond a gradient: they are right, or refused by name, and never zero because nobody computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import EDGES, make_batch
from test_vgpo_loss import in_one_call
from tolerance import assert_close
from torch import Tensor
from torch.autograd import forward_ad

from vgpo_kernels import (
    VGPOConfig,
    attention_heatmap,
    attention_mass,
    backend,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
)

GENERATOR = torch.Generator().manual_seed(5)
BATCH = make_batch(EDGES["plain"])
HEAD = torch.randn(11, 6, generator=GENERATOR)
STATES = torch.randn(2, 4, 6, generator=GENERATOR)
TARGETS = torch.tensor([[1, 2, 3], [4, 10, 0]])
SCORED = torch.ones(2, 3, dtype=torch.bool)
QUERIES, KEYS = torch.randn(1, 2, 3, 4, generator=GENERATOR), torch.randn(1, 1, 5, 4, generator=GENERATOR)
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1]])


def of_policy(logp: Tensor) -> Tensor:
    batch = BATCH.to(logp.device)
    ref = batch.ref_logp.nan_to_num()
    return policy_loss(logp, batch.old_logp, batch.advantages, batch.response_mask, ref_logp=ref, kl_coef=0.5).loss


def of_vgpo(logp: Tensor) -> Tensor:
    batch = BATCH.to(logp.device)
    return in_one_call(batch, logp, VGPOConfig(), ref_logp=batch.ref_logp, kl_coef=0.5).loss


def of_logprob(states: Tensor) -> Tensor:
    logp, entropy = linear_logprob(
        states[:, :-1], HEAD.to(states.device), TARGETS.to(states.device), return_entropy=True
    )
    return (logp + entropy).sum()


def of_linear_policy(states: Tensor) -> Tensor:
    device = states.device
    advantages = torch.tensor([1.0, -0.5], device=device)
    tensors = (HEAD.to(device), TARGETS.to(device), torch.full((2, 3), -2.0, device=device), advantages)
    return linear_policy_loss(states, *tensors, SCORED.to(device)).loss


def of_mass(queries: Tensor) -> Tensor:
    keys, segments = KEYS.to(queries), SEGMENTS.to(queries.device)
    return attention_mass(queries, keys, segments, num_segments=2)[..., 0].square().sum()


def of_heatmap(queries: Tensor) -> Tensor:
    keys, segments = KEYS.to(queries), SEGMENTS.to(queries.device)
    return attention_heatmap(queries, keys, segments == 0).square().sum()


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "policy_loss": (of_policy, BATCH.logp.nan_to_num()),
    "vgpo_loss": (of_vgpo, BATCH.logp.nan_to_num()),
    "linear_logprob": (of_logprob, STATES),
    "linear_policy_loss": (of_linear_policy, STATES),
    "attention_mass": (of_mass, QUERIES),
    "attention_heatmap": (of_heatmap, QUERIES),
}
each = pytest.mark.parametrize("name", FUNCTIONS)


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """Return a leaf at the given place, and the gradient there."""
    leaf = at.clone().requires_grad_()
    return leaf, torch.autograd.grad(function(leaf), leaf, **options)[0]


@each
def test_a_gradient_in_a_graph_is_the_gradient(exact_backend: str, device: torch.device, name: str) -> None:
    """``create_graph`` of a loss that has other parts: the gradient is right as long as nobody differentiates it."""
    function, at = FUNCTIONS[name]
    _, plain = gradient_of(function, at.to(device))
    _, in_graph = gradient_of(function, at.to(device), create_graph=True)
    assert in_graph.requires_grad and torch.equal(in_graph, plain)


@each
def test_second_derivatives_are_refused(exact_backend: str, device: torch.device, name: str) -> None:
    function, at = FUNCTIONS[name]
    leaf, gradient = gradient_of(function, at.to(device), create_graph=True)
    with pytest.raises(RuntimeError, match=rf"vgpo_kernels::{name}(_keeping)? has first derivatives only.*'reference'"):
        gradient.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only|not have been used in the graph"):
        torch.autograd.grad(gradient.square().sum(), leaf)


@each
def test_the_derivative_by_a_factor_of_the_loss_is_refused(exact_backend: str, device: torch.device, name: str) -> None:
    """A learned weight of a loss is not among the operator's arguments: it comes with the gradient of its result."""
    function, at = FUNCTIONS[name]
    factor = torch.tensor(2.0, device=device, requires_grad=True)
    _, gradient = gradient_of(lambda leaf: factor * function(leaf), at.to(device), create_graph=True)
    with pytest.raises(RuntimeError, match=rf"vgpo_kernels::{name}(_keeping)? has first derivatives only.*'reference'"):
        torch.autograd.grad(gradient.sum(), factor, allow_unused=True)


@each
def test_forward_mode_is_refused(exact_backend: str, device: torch.device, name: str) -> None:
    function, at = FUNCTIONS[name]
    at = at.to(device)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative on backend .*'reference'"):
        torch.func.jvp(function, (at,), (torch.ones_like(at),))
    for leaf in (at, at.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(forward_ad.make_dual(leaf, torch.ones_like(at)))
    with forward_ad.dual_level():  # of something else
        assert torch.equal(function(at), function(at))


@each
def test_functional_gradients_are_refused(exact_backend: str, device: torch.device, name: str) -> None:
    function, at = FUNCTIONS[name]
    with pytest.raises(RuntimeError, match=r"no derivative for torch\.func on backend .*'reference'"):
        torch.func.grad(function)(at.to(device))


@each
def test_the_reference_has_them_all(name: str) -> None:
    """Forward mode, second derivatives and torch.func, against differences of the gradient."""
    function, at = FUNCTIONS[name]
    at = at.double()
    with backend("reference"):
        leaf, gradient = gradient_of(function, at, create_graph=True)
        direction = torch.linspace(-1, 1, at.numel(), dtype=torch.float64).reshape(at.shape)
        (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        step = 1e-5
        (_, above), (_, below) = (gradient_of(function, at + sign * step * direction) for sign in (1, -1))
        _, slope = torch.func.jvp(function, (at,), (direction,))
        functional = torch.func.grad(function)(at)
    assert_close(second, (above - below) / (2 * step), name="second derivative", floor=1e-5)
    assert_close(slope, (gradient * direction).sum().detach(), name="slope")
    assert_close(functional, gradient.detach(), name="torch.func.grad")


@each
def test_batched_gradients(exact_backend: str, device: torch.device, name: str) -> None:
    function, at = FUNCTIONS[name]
    leaf, gradient = gradient_of(function, at.to(device))
    scales = torch.tensor([1.0, -2.0, 0.0], device=device)
    (batched,) = torch.autograd.grad(function(leaf), leaf, scales, is_grads_batched=True)
    expected = scales.view(-1, *[1] * gradient.dim()) * gradient
    assert_close(batched, expected.double(), name="batched gradients")


@each
def test_vmap_is_a_loop(exact_backend: str, device: torch.device, name: str) -> None:
    function, at = FUNCTIONS[name]
    several = torch.stack([at, at * 0.5, at * 2]).to(device)
    expected = torch.stack([function(one) for one in several])
    assert_close(torch.func.vmap(function)(several), expected.double(), name="vmap")

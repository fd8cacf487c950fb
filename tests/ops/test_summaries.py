"""What results print: a few lines, whatever kind of tensor they hold."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vgpo_kernels import (
    LinearDivergence,
    LinearLogprob,
    PolicyLoss,
    VGPOConfig,
    VisualWeights,
    linear_divergence,
    linear_logprob,
    policy_loss,
    visual_weights,
)

B, T = 4, 500


def weights(cos: torch.Tensor | None = None) -> VisualWeights:
    cos = torch.linspace(-0.5, 0.5, B * T).reshape(B, T) if cos is None else cos
    return visual_weights(
        cos, torch.ones(B, T, dtype=torch.bool), torch.zeros(B, dtype=torch.int64), VGPOConfig.paper()
    )


def loss() -> PolicyLoss:
    logp = torch.full((B, T), -0.5, requires_grad=True)
    return policy_loss(logp, logp.detach() - 0.1, torch.ones(B), torch.ones(B, T, dtype=torch.bool))


def test_weights_in_a_few_lines() -> None:
    found = weights()
    name, factors, *_ = repr(found).split("\n  ")
    assert name == "VisualWeights"
    low, high = found.factors.aminmax()
    assert factors == f"factors: float32 [4, 500], mean {found.factors.mean():.4g}, {low:.4g} to {high:.4g}"
    assert f"weighted_responses={B}," in repr(found) and len(repr(found)) < 700
    assert str(found) == repr(found) == f"{found}"


def test_a_loss_shows_its_number_and_every_metric() -> None:
    found = loss()
    text = repr(found)
    assert text.startswith(f"PolicyLoss\n  loss: {found.loss.item():.4g} (float32)\n  metrics: ")
    words = " ".join(text.split())
    for name, value in found.metrics.items():
        assert f"{name}={value.item():.4g}" in words
    assert max(map(len, text.splitlines())) <= 102


def test_what_was_not_asked_for_is_left_out() -> None:
    hidden, other, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(16, 8)
    assert repr(linear_divergence(hidden, other, weight, measures=("kl",))).count("\n") == 1
    found = linear_logprob(hidden, weight, torch.arange(3), top_k=4)
    assert isinstance(found, LinearLogprob)
    assert "\n  kept: bool [3], mean " in repr(found)


def test_numbers_that_are_not_finite_are_counted() -> None:
    kl = torch.tensor([[1.0, math.nan], [math.inf, 3.0]])
    assert repr(LinearDivergence(kl=kl)) == "LinearDivergence\n  kl: float32 [2, 2], mean 2, 1 to 3, 2 not finite"
    assert repr(LinearDivergence(kl=kl[:1, 1:])) == "LinearDivergence\n  kl: float32 [1, 1], 1 not finite"
    assert repr(LinearDivergence(kl=kl[:0].double())) == "LinearDivergence\n  kl: float64 [0, 2]"


def test_tensors_without_values_show_shapes() -> None:
    shapes = "LinearLogprob\n  logp: float32 [2, 3]\n  entropy: float32 [2, 3]"
    assert repr(LinearLogprob(*torch.empty(2, 2, 3, device="meta"))) == shapes.replace("float32", "float32 on meta")
    with FakeTensorMode():
        assert repr(LinearLogprob(torch.empty(2, 3), torch.empty(2, 3))) == shapes
        assert repr(PolicyLoss(torch.empty(()), {"entropy": torch.empty(())})).endswith("metrics: entropy=?")


def test_inside_a_transform_of_torch_func() -> None:
    seen = []

    def show(logp: torch.Tensor) -> torch.Tensor:
        seen.append(repr(LinearLogprob(logp)))
        return logp.sum()

    torch.func.vmap(show)(torch.ones(5, 3))
    torch.func.grad(show)(torch.ones(3))
    torch.func.jvp(show, (torch.ones(3),), (torch.ones(3),))
    known = "LinearLogprob\n  logp: float32 [3], mean 1, 1 to 1"
    assert seen == ["LinearLogprob\n  logp: float32 [3]", known, known]


def test_printing_leaves_no_mark_on_a_graph() -> None:
    """Neither of autograd nor in one that is traced."""
    found = loss()
    repr(found)
    assert found.loss.grad_fn is not None and found.loss.grad_fn.next_functions
    result = pickle.loads(pickle.dumps(PolicyLoss(found.loss.detach(), found.metrics)))
    assert isinstance(result, PolicyLoss) and repr(result) == repr(found)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(cos: torch.Tensor) -> VisualWeights:
        return weights(cos)

    cos = torch.rand(B, T)
    assert repr(compiled(cos)) == repr(weights(cos))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_and_while_a_stream_is_captured() -> None:
    logp = torch.ones(2, 3, device="cuda")
    assert repr(LinearLogprob(logp)) == "LinearLogprob\n  logp: float32 on cuda:0 [2, 3], mean 1, 1 to 1"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = 2 * logp
        captured = repr(LinearLogprob(doubled))
    assert captured == "LinearLogprob\n  logp: float32 on cuda:0 [2, 3]"
    graph.replay()
    assert "mean 2" in repr(LinearLogprob(doubled))

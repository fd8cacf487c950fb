"""What only a GPU can show: streams, graphs, launches, and memory beyond 32-bit offsets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from cases import EDGES, Batch, make_batch
from gpu_calls import captured, on_a_sleeping_stream, without_synchronising
from tolerance import same_bits
from torch import Tensor

from vgpo_kernels import (
    ShapingConfig,
    VGPOConfig,
    attention_heatmap,
    attention_mass,
    backend,
    backends,
    group_weights,
    linear_divergence,
    linear_logprob,
    policy_loss,
    response_factors,
    shape_tokens,
    vgpo_loss,
    visual_focus,
    visual_prototype,
    visual_weights,
)
from vgpo_kernels.config import Visibility

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not backends.describe()["built"]["cuda"], reason="needs an extension built with CUDA"),
]


@pytest.fixture(autouse=True)
def cuda_backend() -> Iterator[None]:
    with backend("cuda"):
        yield


def calls(batch: Batch) -> dict[str, Callable[[], Any]]:
    """Every operator as a call of no arguments, on tensors that need no conversion."""
    config = VGPOConfig.released()

    def cos_of(visibility: Visibility) -> Tensor:
        return visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, visibility=visibility)

    def loss_of(visibility: Visibility) -> Tensor:
        return vgpo_loss(
            *(batch.hidden, batch.logp, *tokens[:2], batch.visual_mask, batch.response_mask),
            *(batch.group_ids, config),
            visibility=visibility,
        ).loss

    cos = cos_of("causal")
    weights = visual_weights(cos, batch.response_mask, batch.group_ids, config)
    tokens = (batch.old_logp, batch.advantages, batch.response_mask)
    generator = torch.Generator().manual_seed(0)
    device = batch.hidden.device
    q, k = (
        torch.randn(2, heads, length, 64, generator=generator).to(device, torch.bfloat16)
        for heads, length in ((6, 50), (2, 200))
    )
    segments = torch.arange(200, device=device).div(70, rounding_mode="floor").to(torch.int32).repeat(2, 1)
    signals = {"visual": cos, "entropy": batch.entropy, "gap": batch.entropy.square()}
    score = weights.score

    def shaped(shaping: ShapingConfig) -> tuple[Tensor, ...]:
        return shape_tokens(signals, batch.response_mask, batch.group_ids, shaping)[:5]

    rows = batch.hidden.flatten(0, -2)[:70].nan_to_num()
    weight = torch.randn(3001, rows.shape[-1], generator=generator).to(device, rows.dtype)
    targets = torch.arange(len(rows), device=device)

    def divergences(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = linear_divergence(
            rows, rows.flip(0), weight, targets, measures=("kl", "js"), ignore_index=None, chunk_bytes=4 * 30 * 1024
        )
        return tuple(one for one in found if one is not None)

    def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    return {
        "attention_mass": lambda: attention_mass(q, k, segments),
        "attention_mass's gradient": lambda: gradients(lambda q, k: attention_mass(q, k, segments), q, k),
        "attention_heatmap": lambda: attention_heatmap(q, k, segments == 1),
        "attention_heatmap's gradient": lambda: gradients(lambda q, k: attention_heatmap(q, k, segments == 1), q, k),
        "linear_logprob": lambda: linear_logprob(
            rows, weight, targets, return_entropy=True, ignore_index=None, chunk_bytes=4 * 30 * 1024
        ),
        "linear_logprob's gradient": lambda: gradients(
            lambda rows, weight: linear_logprob(rows, weight, targets, ignore_index=None), rows, weight
        ),
        "linear_divergence": lambda: divergences(rows, weight),
        "linear_divergence's gradient": lambda: gradients(
            lambda rows, weight: torch.stack(divergences(rows, weight)), rows, weight
        ),
        "visual_prototype": lambda: visual_prototype(batch.hidden, batch.visual_mask),
        "causal_prototype": lambda: visual_prototype(batch.hidden, batch.visual_mask, visibility="causal"),
        "unit_focus": lambda: visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, pooling="unit_mean"),
        "visual_focus": lambda: cos_of("all"),
        "visual_focus, causal": lambda: cos_of("causal"),
        "visual_weights": lambda: visual_weights(cos, batch.response_mask, batch.group_ids, config)[:5],
        "group_weights": lambda: group_weights(score, batch.group_ids, config),
        "token_shaping": lambda: shaped(ShapingConfig.vepo(response="softmax", response_scope="group")),
        "token_shaping, pooled": lambda: shaped(ShapingConfig.cgpo(scope="group")),
        "response_factors": lambda: response_factors(score, batch.group_ids, ShapingConfig.cgpo()),
        "policy_loss": lambda: policy_loss(batch.logp, *tokens, factors=weights.factors).loss,
        "vgpo_loss": lambda: loss_of("all"),
        "vgpo_loss, causal": lambda: loss_of("causal"),
    }


ONE_LAUNCH = (
    *("visual_prototype", "causal_prototype", "visual_focus", "visual_focus, causal"),
    *("visual_weights", "group_weights", "policy_loss", "vgpo_loss", "vgpo_loss, causal"),
    *("token_shaping", "token_shaping, pooled", "response_factors"),
)
OPERATORS = (
    *ONE_LAUNCH,
    "unit_focus",
    *("attention_mass", "attention_mass's gradient", "attention_heatmap", "attention_heatmap's gradient"),
    *("linear_logprob", "linear_logprob's gradient"),
    *("linear_divergence", "linear_divergence's gradient"),
)


@pytest.fixture
def batch() -> Batch:
    edge = EDGES["shuffled groups"] + EDGES["no image"] + EDGES["late images"]
    return make_batch(edge, dtype=torch.bfloat16, features=512).to("cuda")


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return same_bits(one, two)
    return all(same_bits(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_a_call_is_one_launch(batch: Batch, name: str) -> None:
    call = calls(batch)[name]
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # The suite fills fresh memory with NaN; those kernels are its own.
    kernels = [kernel for kernel in kernels if "fill" not in kernel.lower() and "memset" not in kernel.lower()]
    assert len(kernels) == 1, kernels
    assert f"{name.partition(',')[0]}_kernel" in kernels[0]


@pytest.mark.parametrize("name", OPERATORS)
def test_no_call_synchronises(batch: Batch, name: str) -> None:
    call = calls(batch)[name]
    without_synchronising(call)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_is_captured_into_a_graph(batch: Batch, name: str) -> None:
    call = calls(batch)[name]
    expected = call()
    graph, result = captured(call)
    for _ in range(3):
        graph.replay()
    assert same(result, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_runs_on_the_current_stream(batch: Batch, name: str) -> None:
    call = calls(batch)[name]
    expected = call()
    assert same(on_a_sleeping_stream(call), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_calls_repeat_to_the_bit(batch: Batch, name: str) -> None:
    call = calls(batch)[name]
    expected = call()
    for _ in range(20):
        assert same(call(), expected)


def test_offsets_pass_32_bits() -> None:
    """A packed batch of more than 2^31 elements; the rows that count lie at its end."""
    features, count = 3584, 620_000
    if torch.cuda.mem_get_info()[0] < 3 * features * count:
        pytest.skip("needs 7 GB of free GPU memory")
    small = make_batch(EDGES["late images"][:2], features=features, dtype=torch.bfloat16, packed=True).to("cuda")
    length = small.hidden.shape[0]
    hidden = torch.full((count, features), float("nan"), dtype=torch.bfloat16, device="cuda")
    hidden[count - length :] = small.hidden
    masks = []
    for mask in (small.visual_mask, small.response_mask):
        masks.append(torch.zeros(count, dtype=torch.bool, device="cuda"))
        masks[-1][count - length :] = mask
    boundaries = torch.cat([small.cu_seqlens.new_zeros(1), small.cu_seqlens + (count - length)])
    of_small = (small.hidden, small.visual_mask, small.response_mask)
    for visibility in get_args(Visibility):
        cos = visual_focus(hidden, *masks, cu_seqlens=boundaries, visibility=visibility)
        expected = visual_focus(*of_small, cu_seqlens=small.cu_seqlens, visibility=visibility)
        assert same_bits(cos[count - length :], expected)


def test_offsets_of_attention_pass_32_bits() -> None:
    """Packed keys of more than 2^31 elements; the response that counts lies at their end."""
    size, key_heads, count, length = 128, 8, 2_150_000, 300
    if torch.cuda.mem_get_info()[0] < 3 * size * key_heads * count:
        pytest.skip("needs 7 GB of free GPU memory")
    generator = torch.Generator(device="cuda").manual_seed(0)
    q = torch.randn(40, 16, size, generator=generator, device="cuda").bfloat16()
    small = torch.randn(length, key_heads, size, generator=generator, device="cuda").bfloat16()
    k = torch.full((count, key_heads, size), float("nan"), dtype=torch.bfloat16, device="cuda")
    k[count - length :] = small
    segments = torch.arange(count, device="cuda", dtype=torch.int32) % 3
    starts = [
        torch.tensor(ends, device="cuda") for ends in ([0, 0, 40], [0, count - length, count], [0, 40], [0, length])
    ]
    found = attention_mass(q, k, segments, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    expected = attention_mass(q, small, segments[-length:], cu_seqlens_q=starts[2], cu_seqlens_k=starts[3])
    assert torch.equal(found, expected)


def test_a_call_leaves_the_current_device_alone(batch: Batch) -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    moved = batch.to(last)
    before = torch.cuda.current_device()
    for name, call in calls(moved).items():
        result = call()
        first = result if isinstance(result, Tensor) else result[0]
        assert first.device == last, name
        assert torch.cuda.current_device() == before, name

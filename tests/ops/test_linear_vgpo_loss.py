"""linear_vgpo_loss and linear_policy_loss on every backend: one call equals logits, then the losses made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from linear_cases import Head, with_predicting_rows
from operator_cases import computed_metrics, operator_arguments
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import PolicyLoss, VGPOConfig, linear_vgpo_loss, visual_focus, visual_weights
from vgpo_kernels.config import CHOICES, PolicyLossOptions
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.linear_vgpo_loss import _warn_of_detached, linear_policy_loss
from vgpo_kernels.ops.vgpo_loss import METRICS
from vgpo_kernels.reference.linear_logprob import linear_policy_loss as definition
from vgpo_kernels.reference.logits import LogitMap

VOCABULARY = 90
# Several chunks, the last of them short.
CHUNK_BYTES = 4 * 20 * VOCABULARY
FEW = (
    Response(length=9, holes=True),
    Response(length=12, holes=True),
    Response(visual=0, length=5),
    Response(length=0),
)


def in_one_call(batch: Batch, head: Head, leaves: list[Tensor], **options: Any) -> PolicyLoss:
    hidden, weight, bias = leaves
    return linear_vgpo_loss(
        hidden,
        weight,
        head.targets,
        options.pop("old_logp", batch.old_logp),
        batch.advantages,
        batch.visual_mask,
        batch.response_mask,
        batch.group_ids,
        options.pop("config", VGPOConfig.paper()),
        bias=bias,
        temperature=0.9,
        cu_seqlens=batch.cu_seqlens,
        chunk_bytes=CHUNK_BYTES,
        **options,
    )


def by_definition(batch: Batch, head: Head, leaves: list[Tensor], **options: Any) -> PolicyLoss:
    """Focus and factors of the backend in force, then every logit in fp64 (or fp32), and autograd."""
    packed = {"cu_seqlens": batch.cu_seqlens}
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, **packed)
    config = options.pop("config", VGPOConfig.paper())
    weights = visual_weights(cos, batch.response_mask, batch.group_ids, config, has_visual=batch.has_visual, **packed)
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    options.pop("recompute", None)
    given = {name: options.pop(name, None) for name in ("ref_logp", "importance_weights")}
    hidden, weight, bias = leaves
    loss, _ = definition(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=head.targets,
        old_logp=options.pop("old_logp", batch.old_logp),
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        factors=weights.factors,
        cu_seqlens=boundaries,
        **LogitMap(0.9)._asdict(),
        options=PolicyLossOptions(**options).as_floats(),
        dtype=hidden.dtype,
        **given,
    )
    return PolicyLoss(loss, {})


def loss_and_gradients(call: Callable[..., PolicyLoss], leaves: list[Tensor], *arguments: Any, **options: Any) -> Any:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    result = call(*arguments, leaves, **options)
    # A factor: what forward left for backward is scaled.
    return [result.loss, *torch.autograd.grad(3 * result.loss, leaves)]


def check(batch: Batch, head: Head, **options: Any) -> None:
    actual = loss_and_gradients(in_one_call, head.tensors(), batch, head, **options)
    exact, narrow = (
        loss_and_gradients(by_definition, [leaf.to(dtype) for leaf in head.tensors()], batch, head, **options)
        for dtype in (torch.float64, torch.float32)
    )
    dtype = head.hidden.dtype
    for name, one, *expected in zip(("loss", "by hidden", "by weight", "by bias"), actual, exact, narrow, strict=True):
        floor = floor_of() if name == "loss" else floor_of(dtype, int(batch.response_mask.sum()))
        assert_close(one, *(value.detach() for value in expected), name=name, floor=floor)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "long"])
def test_one_call_equals_logits_and_their_loss(
    backend_name: str, device: torch.device, edge: str, packed: bool
) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES[edge], packed=packed), VOCABULARY)
    check(batch.to(device), head.to(device), max_length=32)


@pytest.mark.parametrize("loss_type", CHOICES["loss_type"])
def test_every_loss(backend_name: str, device: torch.device, loss_type: str) -> None:
    """The losses of tokens in one sweep, those of sequences in two, with every gradient that a loss may have."""
    batch, head = with_predicting_rows(make_batch(FEW), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    check(batch, head, loss_type=loss_type, ref_logp=batch.ref_logp, kl_coef=0.1, entropy_coef=0.05, max_length=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_all_logits_at_the_same_time(
    backend_name: str, device: torch.device, loss_type: str, dtype: torch.dtype
) -> None:
    batch, head = with_predicting_rows(make_batch(FEW), VOCABULARY)
    head = replace(head, hidden=head.hidden.to(dtype), weight=head.weight.to(dtype))
    batch = replace(batch, hidden=batch.hidden.to(dtype))
    check(batch.to(device), head.to(device), loss_type=loss_type, entropy_coef=0.05, recompute=False)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(backend_name: str, device: torch.device, dtype: torch.dtype, loss_type: str) -> None:
    batch, head = with_predicting_rows(make_batch(FEW, dtype=dtype), VOCABULARY)
    check(batch.to(device), head.to(device), loss_type=loss_type)


def test_without_old_logp_every_ratio_is_one(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    check(batch, head, old_logp=None)
    metrics = in_one_call(batch, head, head.tensors(), old_logp=None).metrics
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0


def test_the_metrics_are_those_of_vgpo_loss(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["no image"]), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    metrics = in_one_call(batch, head, head.tensors()).metrics
    assert tuple(metrics) == computed_metrics(METRICS, {"entropy": "computed"})
    assert metrics["weighted_responses"] == 2
    assert metrics["num_tokens"] == batch.response_mask.sum()
    assert 0 < metrics["entropy"] < torch.tensor(VOCABULARY).log()


def test_what_is_frozen_has_no_gradient(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    expected = loss_and_gradients(in_one_call, head.tensors(), batch, head)
    weight = head.weight.clone().requires_grad_()
    in_one_call(batch, head, [head.hidden, weight, head.bias]).loss.backward()
    assert weight.grad is not None and batch.hidden.grad is None
    assert_close(3 * weight.grad, expected[2].double(), name="gradient by weight")
    with torch.no_grad():
        loss = in_one_call(batch, head, head.tensors()).loss
    assert not loss.requires_grad
    assert_close(loss, expected[0].double(), name="loss without gradients")


def head_losses(batch: Batch, head: Head) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Both losses as functions of hidden states and weight."""

    def vgpo(hidden: Tensor, weight: Tensor) -> Tensor:
        return in_one_call(batch, head, [hidden, weight, head.bias]).loss

    def policy(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, head.targets, None, batch.advantages, batch.response_mask).loss

    return [vgpo, policy]


@pytest.mark.parametrize("place", [0, 1], ids=["linear_vgpo_loss", "linear_policy_loss"])
def test_states_without_a_gradient_are_warned_of_once(place: int) -> None:
    """Where a gradient is wanted of the head, and of nothing below it; at the line of the caller."""
    batch, head = with_predicting_rows(make_batch(FEW), VOCABULARY)
    loss, hidden = head_losses(batch, head)[place], head.hidden.nan_to_num()
    trained, weight = hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    _warn_of_detached.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(trained, weight)
        loss(trained, head.weight)
        loss(hidden, head.weight)
        with torch.no_grad():
            loss(hidden, weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(hidden, weight)
        loss(hidden, weight)
    (warning,) = caught
    assert issubclass(warning.category, UserWarning) and warning.filename == __file__
    for said in ("hidden has no gradient", "trains the head alone", "`captured.hidden`", "last_hidden_state"):
        assert said in str(warning.message)


@pytest.mark.parametrize("place", [0, 1], ids=["linear_vgpo_loss", "linear_policy_loss"])
def test_states_without_a_gradient_trace_into_one_graph(place: int) -> None:
    batch, head = with_predicting_rows(make_batch(FEW), VOCABULARY)
    loss, hidden = head_losses(batch, head)[place], head.hidden.nan_to_num()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        weight = head.weight.clone().requires_grad_()
        found.append(torch.autograd.grad(function(hidden, weight), weight)[0])
    assert_close(found[1], found[0].double(), name="traced")


def test_gradients_are_scaled_where_they_lie_by_the_last_backward_pass_only(
    exact_backend: str, device: torch.device
) -> None:
    batch, head = with_predicting_rows(make_batch(FEW), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    leaves = head.leaves()
    loss = in_one_call(batch, head, leaves).loss
    saved = loss.grad_fn.saved_tensors[1].data_ptr()
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    (3 * loss).backward()
    for leaf, gradient in zip(leaves, first, strict=True):
        assert gradient.abs().max() > 0
        assert leaf.grad.equal(gradient)
    assert leaves[1].grad.data_ptr() == saved


def test_a_broken_response_does_not_reach_the_others(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    hidden = head.hidden.clone()
    start = hidden.shape[1] - batch.response_mask.shape[1]
    hidden[1, start + 2] = float("nan")
    found = loss_and_gradients(in_one_call, [hidden, head.weight, head.bias], batch, replace(head, hidden=hidden))
    assert found[0].isnan()
    rows = torch.tensor([0, 2, 3], device=device)
    assert found[1][rows].isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_token_is_predicted_by_the_row_before_its_own(backend_name: str, device: torch.device, packed: bool) -> None:
    """Every row is sure of the token after its own: with that row, and no other, all ratios to certainty are 1."""
    ids = torch.arange(10).view(2, 5)
    hidden = 80.0 * torch.eye(11)[(ids + 1)]
    targets, mask = ids[:, 2:], torch.ones(2, 3, dtype=torch.bool)
    boundaries = None
    if packed:
        hidden, targets = hidden.view(10, 11), ids.view(-1)
        mask = torch.tensor([False, True, True, True, True]).repeat(2)
        boundaries = torch.tensor([0, 5, 10], device=device)
    hidden, targets, mask = (tensor.to(device) for tensor in (hidden, targets, mask))
    metrics = linear_policy_loss(
        hidden,
        torch.eye(11, device=device),
        targets,
        torch.zeros(targets.shape, device=device),
        torch.ones(2, device=device),
        mask,
        cu_seqlens=boundaries,
    ).metrics
    assert metrics["num_tokens"] == mask.sum()
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


def test_a_token_that_nothing_predicts_is_refused(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch((Response(length=4),)), VOCABULARY)
    width = batch.hidden.shape[1]
    everything = torch.ones(1, width, dtype=torch.bool)
    with pytest.raises(ValueError, match="predict"):
        linear_policy_loss(
            batch.hidden.nan_to_num().to(device),
            head.weight.to(device),
            torch.zeros(1, width, dtype=torch.int64, device=device),
            None,
            batch.advantages.to(device),
            everything.to(device),
        )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(exact_backend: str, device: torch.device, packed: bool) -> None:
    batch, head = with_predicting_rows(make_batch(FEW, packed=packed), VOCABULARY)
    batch, head = batch.to(device), head.to(device)
    arguments = operator_arguments(
        "linear_policy_loss",
        batch,
        hidden=head.hidden.nan_to_num().requires_grad_(),
        weight=head.weight.clone().requires_grad_(),
        bias=head.bias,
        targets=head.targets,
        **LogitMap(0.9, softcap=3.0, logit_scale=0.7)._asdict(),
        gradients=[True, True, False],
        chunk_bytes=CHUNK_BYTES,
        # The loss is positive without, and opcheck's gradient of its magnitude 1: backward, which scales results in
        # place, leaves those that opcheck compares as they were.
        factors=None,
    )
    torch.library.opcheck(registry.implementation("linear_policy_loss", exact_backend), tuple(arguments.values()))


def test_traces_into_one_graph(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["shuffled groups"]), VOCABULARY)
    batch, head = batch.to(device), head.to(device)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return in_one_call(batch, head, [hidden, weight, bias]).loss

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = head.leaves()
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*found, strict=True):
        assert_close(other, one.detach().double(), name="traced")

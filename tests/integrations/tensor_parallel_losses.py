"""Losses of a vocabulary that is split over ranks: the cases, what a rank computes of them, and what is right."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from cases import EDGES, Batch, make_batch
from linear_cases import Head, with_predicting_rows
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import (
    VGPOConfig,
    backend,
    backends,
    linear_logprob,
    linear_policy_loss,
    linear_vgpo_loss,
    visual_focus,
    visual_weights,
)
from vgpo_kernels.config import CHOICES
from vgpo_kernels.integrations.tensor_parallel import parallel_policy_loss, parallel_vgpo_loss
from vgpo_kernels.reference.linear_logprob import predicting_rows

VOCABULARY, PADDING = 150, 10
# Where the rows of each rank begin in the vocabulary, and its end. The last has the padding behind its own.
BOUNDS = {2: (0, 61, VOCABULARY), 4: (0, 8, 70, 71, VOCABULARY)}
FAST = "cpp" if backends.describe()["built"]["cpp"] else "reference"
ALL = {"entropy_coef": 0.05, "kl_coef": 0.1, "max_length": 32}  # with every gradient that a loss may have


@dataclass(frozen=True)
class Case:
    """A batch, a head and a loss of them."""

    edge: str = "late images"
    dtype: torch.dtype = torch.float32
    packed: bool = False
    on: str = FAST
    with_bias: bool = True
    focused: bool = True  # factors in the same call; else they are given
    trains_hidden: bool = True
    old: bool = True
    owner: int | None = None  # of all targets; None: any rank
    padding: bool = False  # behind the last rank's rows
    idle: bool = False  # the last rank has padding alone
    temperatures: bool = False
    visibility: str = "all"
    head_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    **{f"{kind} focused": Case(options={"loss_type": kind, **ALL}) for kind in CHOICES["loss_type"]},
    **{
        f"{kind} of bfloat16": Case(dtype=torch.bfloat16, options={"loss_type": kind, **ALL})
        for kind in ("dapo", "gspo")
    },
    "by the reference": Case(on="reference", options=ALL),
    "given factors": Case(focused=False, options=ALL),
    "packed": Case(packed=True, visibility="causal", options=ALL),
    "no bias": Case(with_bias=False),
    "on-policy": Case(old=False, options=ALL),
    "all logits at the same time": Case(head_options={"recompute": False}, options=ALL),
    "scaled and capped": Case(head_options={"logit_scale": 0.7, "softcap": 4.0, "chunk_bytes": 900}, options=ALL),
    "temperatures": Case(temperatures=True, options=ALL),
    "importance": Case(options={"importance_cap": 1.0, "num_tokens": 100, "dual_clip": 3.0}),
    "targets of the first rank": Case(owner=0, options=ALL),
    "targets of the last rank": Case(owner=-1, options=ALL),
    "padded vocabulary": Case(padding=True, options=ALL),
    "a rank of padding alone": Case(padding=True, idle=True, options=ALL),
    "a frozen decoder": Case(trains_hidden=False),
    "no scored token": Case(edge="all empty"),
}


class Inputs(NamedTuple):
    """The batch and the whole head of a case, without padding."""

    batch: Batch
    head: Head
    arguments: dict[str, Any]  # of the loss, but hidden, weight, bias and what gives the factors


def bounds_of(case: Case, world: int) -> tuple[int, ...]:
    """Where the rows of each rank begin in the vocabulary of a case, and its end."""
    bounds = BOUNDS[world]
    return (*bounds[:-1], bounds[-2]) if case.idle else bounds


def inputs_of(case: Case, world: int) -> Inputs:
    bounds = bounds_of(case, world)
    batch = make_batch(EDGES[case.edge], packed=case.packed, dtype=case.dtype)
    batch, head = with_predicting_rows(batch, bounds[-1])
    if not case.with_bias:
        head = replace(head, bias=None)
    generator = torch.Generator().manual_seed(3)
    if case.owner is not None:
        low, high = bounds[:-1][case.owner], bounds[1:][case.owner]
        head = replace(head, targets=torch.randint(low, high, head.targets.shape, generator=generator))
    temperature = 0.5 + torch.rand(head.targets.shape, generator=generator) if case.temperatures else 0.9
    logp = sampled_logp(batch, head)
    arguments = {
        "targets": head.targets,
        "old_logp": logp + (batch.old_logp - batch.logp) if case.old else None,
        "advantages": batch.advantages,
        "response_mask": batch.response_mask,
        "cu_seqlens": batch.cu_seqlens,
        "temperature": temperature,
        **case.head_options,
        **case.options,
    }
    if case.options.get("kl_coef"):
        arguments["ref_logp"] = logp + (batch.ref_logp - batch.logp)
    if "importance_cap" in case.options:
        arguments["importance_weights"] = 2 * torch.rand(head.targets.shape, generator=generator)
    return Inputs(batch, head, arguments)


def sampled_logp(batch: Batch, head: Head) -> Tensor:
    """Log-probabilities of a policy like this one, so that ratios are near 1."""
    mask = batch.response_mask
    rows = batch.hidden.reshape(-1, batch.hidden.shape[-1])[predicting_rows(mask, batch.hidden)[mask.view(-1)]]
    wide = replace(head, hidden=rows, targets=head.targets[mask]).double()
    with backend("reference"):
        found = linear_logprob(wide.hidden, wide.weight, wide.targets, bias=wide.bias)
    return torch.zeros(mask.shape).masked_scatter(mask, found.float())


def of_focus(case: Case, batch: Batch) -> dict[str, Any]:
    """Arguments that give the factors."""
    return {
        "visual_mask": batch.visual_mask,
        "group_ids": batch.group_ids,
        "config": VGPOConfig.paper(),
        "visibility": case.visibility,
    }


def factors_of(case: Case, batch: Batch) -> Tensor:
    packed = {"cu_seqlens": batch.cu_seqlens}
    cos = visual_focus(batch.hidden, batch.visual_mask, batch.response_mask, visibility=case.visibility, **packed)
    return visual_weights(cos, batch.response_mask, batch.group_ids, VGPOConfig.paper(), **packed).factors


def run_rank(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Loss, metrics and gradients of a case on one rank."""
    batch, head, arguments = inputs_of(case, world)
    first, end = bounds_of(case, world)[rank : rank + 2]
    weight, bias = head.weight[first:end].clone(), None if head.bias is None else head.bias[first:end].clone()
    if case.padding and rank == world - 1:  # that would win every softmax
        weight = torch.cat([weight, weight.new_full((PADDING, weight.shape[1]), 50.0)])
        bias = None if bias is None else torch.cat([bias, bias.new_full((PADDING,), 50.0)])
    hidden = batch.hidden.clone().requires_grad_(case.trains_hidden)
    leaves = [leaf.requires_grad_() for leaf in (weight, bias) if leaf is not None]
    # Padding is cut off, or excluded where nothing else is left.
    own = slice(bounds_of(case, world)[-1] - first or None)
    offsets = None if bias is None else bias[own]
    if offsets is not None and first == end:
        offsets = offsets - torch.inf
    arguments |= {"first": first, "bias": offsets}
    with backend(case.on):
        if case.focused:
            found = parallel_vgpo_loss(hidden, weight[own], **arguments, **of_focus(case, batch))
        else:
            found = parallel_policy_loss(hidden, weight[own], factors=factors_of(case, batch), **arguments)
        trained = [hidden, *leaves] if case.trains_hidden else leaves
        # A factor: the loss is a part of another.
        gradients = list(torch.autograd.grad(3 * found.loss, trained))
    by_hidden = gradients.pop(0) if case.trains_hidden else None
    return {"loss": found.loss.detach(), "metrics": found.metrics, "by_hidden": by_hidden, "of_rows": gradients}


def metrics_of_one(case: Case, inputs: Inputs, factors: Tensor) -> dict[str, Tensor]:
    """The metrics that one process computes."""
    batch, head, arguments = inputs
    whole = (batch.hidden, head.weight)
    with backend(case.on):
        if case.focused:
            return linear_vgpo_loss(*whole, bias=head.bias, **arguments, **of_focus(case, batch)).metrics
        return linear_policy_loss(*whole, bias=head.bias, factors=factors, **arguments).metrics


def by_reference(inputs: Inputs, factors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients by hidden, weight and bias of one process, in plain PyTorch."""
    wide = [leaf.to(dtype).requires_grad_() for leaf in replace(inputs.head, hidden=inputs.batch.hidden).leaves()]
    bias = wide[2] if len(wide) > 2 else None
    with backend("reference"):
        loss = linear_policy_loss(*wide[:2], bias=bias, factors=factors.to(dtype), **inputs.arguments).loss
    return [loss.detach(), *torch.autograd.grad(3 * loss, wide)]


def check(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Fail unless every rank has what one process with the whole head has."""
    world = len(ranks)
    inputs = inputs_of(case, world)
    with backend(case.on):
        factors = factors_of(case, inputs.batch)
    metrics = metrics_of_one(case, inputs, factors)
    right = [by_reference(inputs, factors, dtype) for dtype in (torch.float64, torch.float32)]
    by_hidden, by_rows = ([both[1] for both in right], list(zip(*(both[2:] for both in right), strict=True)))
    scored = inputs.batch.response_mask
    owners = torch.bucketize(inputs.head.targets[scored], torch.tensor(bounds_of(case, world)[1:-1]), right=True)
    expected = set(range(world - case.idle)) if case.owner is None else {case.owner % world}
    assert set(owners.tolist()) == (expected if scored.any() else set()), "whose targets these are"
    # The normalisers are sums of the slices', each of which was rounded.
    floor = 2 * floor_of(case.dtype, max(int(scored.sum()), VOCABULARY))
    for rank, found in enumerate(ranks):
        assert_close(found["loss"], right[0][0], right[1][0], name=f"loss of rank {rank}")
        assert tuple(found["metrics"]) == tuple(metrics)
        for name, value in found["metrics"].items():
            assert_close(value, metrics[name].double(), name=f"{name} of rank {rank}")
        if case.trains_hidden:
            assert_close(found["by_hidden"], *by_hidden, name=f"gradient by hidden of rank {rank}", floor=floor)
    of_rows = zip(*(found["of_rows"] for found in ranks), strict=True)
    for name, parts, both in zip(("weight", "bias"), of_rows, by_rows, strict=case.with_bias):
        whole = torch.cat(parts)
        real, padding = whole.tensor_split([len(both[0])])
        assert_close(real, *both, name=f"gradient by {name}", floor=floor)
        assert (padding == 0).all()
    one = ranks[0]
    for found in ranks[1:]:  # ranks that differ in a bit would drift apart
        assert torch.equal(found["loss"], one["loss"])
        assert all(same_bits(value, one["metrics"][name]) for name, value in found["metrics"].items())
        assert not case.trains_hidden or torch.equal(found["by_hidden"], one["by_hidden"])

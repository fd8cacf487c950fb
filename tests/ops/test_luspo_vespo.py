"""luspo and vespo on every backend against loops over tokens that follow their equations."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from linear_cases import with_predicting_rows
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import linear_policy_loss, policy_loss

MIXED = (*EDGES["holes"], Response(length=0), Response(length=1), Response(length=7))


# ---- luspo and vespo, token by token -------------------------------------------------------------------------------


def rows_of(batch: Batch, values: Tensor) -> list[list[Any]]:
    """Split values of scored tokens, or of responses, into a list for each response."""
    if values.shape == batch.advantages.shape and values.shape != batch.response_mask.shape:
        return [[value] * len(row) for value, row in zip(values, rows_of(batch, batch.response_mask), strict=True)]
    if batch.cu_seqlens is None:
        pairs = list(zip(values, batch.response_mask, strict=True))
    else:
        bounds = batch.cu_seqlens.tolist()
        spans = [slice(begin, end) for begin, end in pairwise(bounds)]
        pairs = [(values[span], batch.response_mask[span]) for span in spans]
    return [[value for value, scored in zip(row, mask, strict=True) if scored] for row, mask in pairs]


def by_loops(batch: Batch, logp: Tensor, loss_type: str, **options: Any) -> Tensor:
    """The loss as the papers and TRL write it, in fp64; autograd differentiates the additions."""
    double = {name: value.double() for name, value in options.items() if isinstance(value, Tensor)}
    advantages = rows_of(batch, double.get("advantages", batch.advantages.double()))
    factors = rows_of(batch, double["factors"]) if "factors" in double else None
    reference = rows_of(batch, double["ref_logp"]) if "ref_logp" in double else None
    importance = double.get("importance_weights")
    per_response = importance is not None and importance.shape == batch.advantages.shape
    cap, mode = options.get("importance_cap", math.inf), options.get("importance_mode", "truncate")

    def corrected(weight: Tensor) -> Tensor:
        if mode == "mask":
            return weight * (weight <= cap)
        return weight.clamp(max=cap)

    current = rows_of(batch, logp)
    old = rows_of(batch, batch.old_logp.double())
    weights = None if importance is None else rows_of(batch, importance)
    total, scored = logp.new_zeros(()), 0
    for response, (news, olds) in enumerate(zip(current, old, strict=True)):
        length = len(news)
        scored += length
        gaps = [new - before for new, before in zip(news, olds, strict=True)]
        if length == 0:
            continue
        common = (sum(gaps) / length).exp()
        exponent = sum(gap.detach().clamp(-20, 20) for gap in gaps)
        if weights is not None:
            given = weights[response][:1] if per_response else weights[response]
            exponent = exponent + sum(corrected(weight).log().clamp(math.log(1e-8), 20) for weight in given)
        exponent = exponent.clamp(math.log(1e-8), 20)
        for t in range(length):
            advantage = advantages[response][t] * (1 if factors is None else factors[response][t])
            if loss_type == "luspo":
                clipped = common.clamp(1 - options.get("epsilon_low", 0.2), 1 + options.get("epsilon_high", 0.28))
                loss = -torch.minimum(common * advantage, clipped * advantage)
                if weights is not None:
                    loss = loss * corrected(weights[response][t])
            else:
                sign = "pos" if advantage >= 0 else "neg"
                k = options.get(f"vespo_k_{sign}", {"pos": 2.0, "neg": 3.0}[sign])
                decay = options.get(f"vespo_lambda_{sign}", {"pos": 3.0, "neg": 2.0}[sign])
                phi = exponent.exp() ** k * (decay * (1 - exponent.exp())).exp()
                loss = -phi * advantage * news[t]
            if reference is not None:
                gap = reference[response][t] - news[t]
                estimate = gap.exp() - gap - 1
                if options.get("kl_bias_correction"):
                    estimate = estimate * (common if loss_type == "luspo" else gaps[t].exp())
                loss = loss + options["kl_coef"] * estimate
            total = total + loss
    divisor = len(current) if loss_type == "luspo" else max(scored, 1)
    return total / options.get("num_sequences" if loss_type == "luspo" else "num_tokens", divisor)


def sure(batch: Batch, spread: float) -> Batch:
    """The batch with old log-probs nearer to the current ones, so that whole responses have ratios near 1."""
    old_logp = batch.logp + spread * (batch.old_logp - batch.logp)
    return type(batch)(**(vars(batch) | {"old_logp": old_logp}))


def uniform(batch: Batch, per_token: bool, seed: int = 0) -> Tensor:
    shape = batch.response_mask.shape if per_token else batch.advantages.shape
    values = 0.6 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return values.masked_fill(~batch.response_mask, math.nan) if per_token else values


# What is drawn for a batch, by name; the rest are settings.
DRAWN = {
    "factors": lambda batch: uniform(batch, per_token=True, seed=1),
    "advantages": lambda batch: batch.token_advantages,
    "ref_logp": lambda batch: batch.ref_logp,
    "weights per token": lambda batch: uniform(batch, per_token=True, seed=2),
    "weights per response": lambda batch: uniform(batch, per_token=False, seed=3),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"draw": ["factors"]},
    {"draw": ["factors", "advantages"]},
    {"draw": ["weights per token"]},
    {"draw": ["weights per token", "advantages"], "importance_cap": 1.1, "importance_mode": "mask"},
    {"draw": ["weights per response"], "importance_cap": 0.9},
    {"draw": ["weights per response"], "importance_cap": 0.9, "importance_mode": "mask"},
    {"draw": ["ref_logp", "factors"], "kl_coef": 0.2},
    {"draw": ["ref_logp"], "kl_coef": 0.2, "kl_bias_correction": True},
    {"vespo_k_pos": 0.5, "vespo_lambda_pos": 1.5, "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.5},
    {"epsilon_low": 0.01, "epsilon_high": 0.02},
    {"num_tokens": 321, "num_sequences": 5},
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("spread", [0.05, 1.0])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("loss_type", ["luspo", "vespo"])
def test_luspo_and_vespo_are_their_equations(
    backend_name: str, device: torch.device, loss_type: str, settings: dict[str, Any], spread: float, packed: bool
) -> None:
    batch = sure(make_batch(MIXED, features=1, packed=packed), spread)
    options = {name: value for name, value in settings.items() if name != "draw"}
    for name in settings.get("draw", ()):
        options["importance_weights" if name.startswith("weights") else name] = DRAWN[name](batch)
    leaf = batch.logp.double().requires_grad_()
    exact = by_loops(batch, leaf, loss_type, **options)
    (slope,) = torch.autograd.grad(exact, leaf)

    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    logp = batch.logp.to(device).requires_grad_()
    advantages = moved.pop("advantages", batch.advantages.to(device))
    boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    loss = policy_loss(
        logp,
        batch.old_logp.to(device),
        advantages,
        batch.response_mask.to(device),
        cu_seqlens=boundaries,
        loss_type=loss_type,
        **moved,
    ).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert_close(loss, exact, name="loss", floor=4e-6)
    assert_close(gradient / slope.abs().max(), slope / slope.abs().max(), name="gradient", floor=4e-6)


@pytest.mark.parametrize("gap", [300.0, 5.0, 0.0, -0.5, -5.0, -300.0])
def test_vespo_far_off_the_policy(backend_name: str, device: torch.device, gap: float) -> None:
    """The weight is exact wherever it can be told from zero, and no ratio makes it NaN or infinite."""
    logp = torch.full((2, 4), -1.5, device=device, requires_grad=True)
    mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    advantages = torch.tensor([2.0, -1.0], device=device)
    options = {"loss_type": "vespo", "num_tokens": 1}
    loss = policy_loss(logp, logp.detach() - gap / 4, advantages, mask, **options).loss
    (gradient,) = torch.autograd.grad(loss, logp)
    ratio = min(max(gap, math.log(1e-8)), 20.0)
    for row, (advantage, k, decay) in enumerate(((2.0, 2.0, 3.0), (-1.0, 3.0, 2.0))):
        phi = math.exp(decay + k * ratio - decay * math.exp(ratio))
        assert gradient[row].tolist() == pytest.approx([-phi * advantage] * 4, rel=1e-4, abs=1e-12)


def test_a_ratio_that_is_no_number_weighs_nothing_in_vespo(backend_name: str, device: torch.device) -> None:
    """As in TRL: what is known of the tokens themselves stays, the weight of their response is 0."""
    batch = sure(make_batch(EDGES["plain"], features=1), 0.1).to(device)
    old_logp = batch.old_logp.clone()
    old_logp[1, 2] = math.nan
    logp = batch.logp.clone().requires_grad_()
    loss = policy_loss(logp, old_logp, batch.advantages, batch.response_mask, loss_type="vespo").loss
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite()
    assert (gradient[1] == 0).all() and (gradient[0, batch.response_mask[0]] != 0).all()


@pytest.mark.parametrize("loss_type", ["luspo", "vespo"])
def test_the_head_has_the_new_losses(backend_name: str, device: torch.device, loss_type: str) -> None:
    """From hidden states, near the policy that generated: the gradient reaches them, and is that of the log-probs."""
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), 50)
    batch, head = batch.to(device), head.to(device)
    hidden, weight = head.hidden.nan_to_num(), head.weight
    arguments = (head.targets, None, batch.token_advantages, batch.response_mask)
    leaf = hidden.clone().requires_grad_()
    found = torch.autograd.grad(linear_policy_loss(leaf, weight, *arguments, loss_type=loss_type).loss, leaf)[0]

    wide = hidden.double().requires_grad_()
    start = hidden.shape[1] - batch.response_mask.shape[1]
    table = (wide @ weight.double().T).log_softmax(-1)[:, start - 1 : -1]
    logp = table.gather(-1, head.targets.clamp(min=0)[..., None])[..., 0]
    # On-policy every ratio and every weight is 1, and the gradient that of logp.
    terms = torch.where(batch.response_mask, -batch.token_advantages.nan_to_num() * logp, 0.0)
    exact = terms.sum() / (len(terms) if loss_type == "luspo" else batch.response_mask.sum())
    if loss_type == "luspo":
        # Through the mean: every token has the mean of its response's advantages.
        means = torch.where(batch.response_mask, batch.token_advantages, 0.0).sum(-1) / batch.response_mask.sum(-1)
        exact = torch.where(batch.response_mask, -means[:, None] * logp, 0.0).sum() / len(terms)
    (expected,) = torch.autograd.grad(exact, wide)
    unit = expected.abs().max()
    assert unit > 0
    assert_close(found / unit, expected / unit, name="gradient", floor=1e-5)

"""policy_loss on every backend against the reference implementation, and that against the equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, Response, make_batch
from operator_cases import computed_metrics
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import PolicyLoss, backend, policy_loss
from vgpo_kernels.config import CHOICES
from vgpo_kernels.ops.policy_loss import POLICY_METRICS

LOSS_TYPES = CHOICES["loss_type"]
AGGREGATIONS = CHOICES["aggregation"]


def loss_of(batch: Batch, *, advantages: Tensor | None = None, wide: bool = False, **options: Any) -> PolicyLoss:
    """The loss of a batch on the backend in force, or of its fp64 copy, which the reference implementation computes."""

    def cast(value: Any) -> Any:
        return value.double() if wide and isinstance(value, Tensor) and value.is_floating_point() else value

    return policy_loss(
        cast(options.pop("logp", batch.logp)),
        cast(batch.old_logp),
        cast(batch.advantages if advantages is None else advantages),
        batch.response_mask,
        cu_seqlens=batch.cu_seqlens,
        **{name: cast(value) for name, value in options.items()},
    )


def check(batch: Batch, **options: Any) -> None:
    """Compare loss, gradients and metrics with the fp64 definition."""
    results = []
    for wide in (False, True):
        logp = (batch.logp.double() if wide else batch.logp).clone().requires_grad_()
        entropy = options.get("entropy")
        if entropy is not None:
            entropy = (entropy.double() if wide else entropy).clone().requires_grad_()
        inputs = [logp] if entropy is None else [logp, entropy]
        given = options if entropy is None else options | {"entropy": entropy}
        if wide:
            with backend("reference"):
                loss, metrics = loss_of(batch, logp=logp, wide=True, **given)
        else:
            loss, metrics = loss_of(batch, logp=logp, **given)
        assert tuple(metrics) == computed_metrics(POLICY_METRICS, options)
        gradients = torch.autograd.grad(loss, inputs)
        results.append((loss, torch.stack(list(metrics.values())), *gradients))
    scale = max(1.0, results[1][1][POLICY_METRICS.index("ratio_max")].item())
    for name, actual, exact in zip(("loss", "metrics", "gradient", "entropy gradient"), *results, strict=False):
        assert_close(actual, exact, name=name, floor=4e-6 * scale)
    assert (results[0][2][~batch.response_mask] == 0).all(), "no gradient off the mask"


def full_options(batch: Batch) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    factors = torch.rand(batch.response_mask.shape, generator=generator) + 0.5
    return {
        "factors": factors.to(batch.hidden.device).masked_fill(~batch.response_mask, float("nan")),
        "ref_logp": batch.ref_logp,
        "kl_coef": 0.1,
        "entropy": batch.entropy,
        "entropy_coef": 0.01,
        "dual_clip": 1.5,
        "max_length": 64,
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_edges_match_the_definition(
    backend_name: str, device: torch.device, loss_type: str, edge: str, packed: bool
) -> None:
    batch = make_batch(EDGES[edge], features=1, packed=packed).to(device)
    check(batch, loss_type=loss_type, **full_options(batch))


@pytest.mark.parametrize("aggregation", [None, *AGGREGATIONS])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_match_the_definition(
    backend_name: str, device: torch.device, loss_type: str, aggregation: str | None
) -> None:
    batch = make_batch(EDGES["holes"] + EDGES["empty response"], features=1).to(device)
    check(batch, loss_type=loss_type, aggregation=aggregation)
    check(batch, loss_type=loss_type, aggregation=aggregation, **full_options(batch))


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k1"},
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3_clamped"},
        {"kl_estimator": "k3", "kl_bias_correction": True},
        {"kl_estimator": "k1", "kl_bias_correction": True, "loss_type": "gspo"},
        {"kl_estimator": "k3", "kl_bias_correction": True, "loss_type": "gspo_token"},
        {"ratio_clamp": None},
        {"ratio_clamp": 0.1},
        {"ratio_clamp": 0.1, "loss_type": "gspo"},
        {"loss_type": "cispo", "cispo_cap": 1.2},
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.0,
            "vespo_lambda_pos": 0.0,
            "vespo_k_neg": 0.5,
            "vespo_lambda_neg": 0.3,
        },
        {"loss_type": "vespo", "kl_estimator": "k3", "kl_bias_correction": True},
        {"loss_type": "luspo", "kl_estimator": "k3", "kl_bias_correction": True},
        {"importance_cap": 0.5},  # of no weights
        {"loss_type": "sapo", "sapo_temperature_positive": 2.0, "sapo_temperature_negative": 3.0},
        {"epsilon_low": 0.0, "epsilon_high": 0.0},
        {"num_tokens": 100},
        {"num_tokens": 0},
        {"loss_type": "grpo", "num_sequences": 12.0},
        {"loss_type": "dr_grpo", "num_sequences": 5},
    ],
    ids=str,
)
def test_options_match_the_definition(backend_name: str, device: torch.device, options: dict[str, Any]) -> None:
    batch = make_batch(EDGES["holes"], features=1).to(device)
    check(batch, **(full_options(batch) | options))


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per response", "per token"])
def test_importance_weights(backend_name: str, device: torch.device, per_token: bool, mode: str) -> None:
    batch = make_batch(EDGES["holes"], features=1).to(device)
    generator = torch.Generator().manual_seed(3)
    shape = batch.response_mask.shape if per_token else batch.group_ids.shape
    weights = (torch.rand(shape, generator=generator) * 2).to(device)
    check(batch, importance_weights=weights)
    check(batch, importance_weights=weights, importance_cap=1.0, importance_mode=mode)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_advantages_per_token(backend_name: str, device: torch.device, packed: bool) -> None:
    batch = make_batch(EDGES["holes"], features=1, packed=packed).to(device)
    with backend("reference"):
        expected = loss_of(batch, advantages=batch.token_advantages, wide=True)
    assert_close(loss_of(batch, advantages=batch.token_advantages).loss, expected.loss, name="loss")
    spread = torch.ones_like(batch.logp)
    if packed:
        lengths = batch.cu_seqlens.diff()
        spread = batch.advantages.repeat_interleave(lengths)
    else:
        spread = spread * batch.advantages[:, None]
    assert_close(loss_of(batch, advantages=spread).loss, loss_of(batch).loss.double(), name="spread advantages")


def test_the_definition_is_the_equation() -> None:
    batch = make_batch(EDGES["plain"], features=1)
    with backend("reference"):
        loss = loss_of(batch, factors=torch.full_like(batch.logp, 1.5), ref_logp=batch.ref_logp, kl_coef=0.2).loss
    total, count = 0.0, 0
    for b, t in batch.response_mask.nonzero().tolist():
        ratio = math.exp(batch.logp[b, t] - batch.old_logp[b, t])
        advantage = 1.5 * batch.advantages[b].item()
        surrogate = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
        gap = (batch.ref_logp[b, t] - batch.logp[b, t]).item()
        total += surrogate + 0.2 * (math.exp(gap) - gap - 1)
        count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_definition_has_the_right_gradient(loss_type: str) -> None:
    batch = make_batch(EDGES["plain"][:2], features=1)
    mask = batch.response_mask
    options = {name: value for name, value in full_options(batch).items() if name not in ("factors", "entropy_coef")}
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        spread = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, logp)
        bonus = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, entropy)
        given = options | {"entropy": bonus, "entropy_coef": 0.1, "loss_type": loss_type}
        return loss_of(batch, logp=spread, wide=True, **given).loss

    logp = batch.logp[mask].double().requires_grad_()
    entropy = batch.entropy[mask].double().requires_grad_()
    if loss_type in ("gspo_token", "cispo", "vespo"):
        # Their gradient is by construction not that of their value.
        torch.autograd.grad(loss(logp, entropy), [logp, entropy])
        assert torch.autograd.gradcheck(lambda bonus: loss(logp.detach(), bonus), (entropy,))
    else:
        assert torch.autograd.gradcheck(loss, (logp, entropy))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(backend_name: str, device: torch.device, loss_type: str) -> None:
    batch = make_batch(EDGES["shuffled groups"], features=1).to(device)
    options = {"loss_type": loss_type, "max_length": 17}
    denominators = {"num_tokens": batch.response_mask.sum(), "num_sequences": len(batch.group_ids)}
    whole = loss_of(batch, **options).loss
    parts = torch.zeros((), device=device)
    for part in (slice(0, 3), slice(3, 4), slice(4, None)):
        parts = parts + (
            policy_loss(
                batch.logp[part],
                batch.old_logp[part],
                batch.advantages[part],
                batch.response_mask[part],
                **denominators,
                **options,
            ).loss
        )
    assert_close(parts, whole.double(), name="sum over micro-batches")


def test_a_fully_masked_batch_is_silent(backend_name: str, device: torch.device) -> None:
    batch = make_batch((Response(length=5), Response(length=3)), features=1).to(device)
    nothing = torch.zeros_like(batch.response_mask)
    logp = torch.full_like(batch.logp, float("nan")).requires_grad_()
    for loss_type in LOSS_TYPES:
        loss, metrics = policy_loss(
            logp, batch.old_logp, batch.advantages, nothing, loss_type=loss_type, entropy=logp, entropy_coef=1.0
        )
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, logp)[0] == 0).all()
        expected = dict.fromkeys(computed_metrics(POLICY_METRICS, {"entropy": logp}), 0.0)
        assert {name: value.item() for name, value in metrics.items()} == expected


def test_zero_advantages_have_no_gradient(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"], features=1).to(device)
    logp = batch.logp.clone().requires_grad_()
    loss = loss_of(batch, logp=logp, advantages=torch.zeros_like(batch.advantages)).loss
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logp)[0] == 0).all()


def test_half_precision_log_probs_keep_their_gradient(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"], features=1).to(device)
    logp = batch.logp.bfloat16().requires_grad_()
    loss = loss_of(batch, logp=logp).loss
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.dtype == torch.bfloat16
    wide = logp.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(batch, logp=wide).loss, wide)
    assert torch.equal(gradient, expected.bfloat16())


def test_backward_scales(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"], features=1).to(device)
    logp = batch.logp.clone().requires_grad_()
    (once,) = torch.autograd.grad(loss_of(batch, logp=logp).loss, logp)
    (scaled,) = torch.autograd.grad(loss_of(batch, logp=logp).loss * -0.25, logp)
    assert_close(scaled, -0.25 * once.double(), name="scaled gradient")


def test_runs_repeat_to_the_bit(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["long"], features=1).to(device)
    first, second = (loss_of(batch, **full_options(batch)) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert first.metrics.keys() == second.metrics.keys()
    for name, value in first.metrics.items():
        assert torch.equal(value, second.metrics[name]), name


@pytest.mark.parametrize(
    ("options", "missing"),
    [({"kl_coef": 0.1}, "ref_logp"), ({"entropy_coef": 0.1}, "entropy")],
)
def test_a_term_needs_its_tensor(options: dict[str, float], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        loss_of(make_batch(EDGES["plain"], features=1), **options)


def test_a_packed_batch_needs_a_max_length() -> None:
    with pytest.raises(ValueError, match="max_length"):
        loss_of(make_batch(EDGES["plain"], features=1, packed=True), loss_type="dr_grpo")

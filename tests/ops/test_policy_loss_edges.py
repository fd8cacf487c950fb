"""Infinities, NaN and zeros in a policy loss, on every backend: what is off stays out, and nothing spreads."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from cases import EDGES, Response, make_batch
from linear_cases import with_predicting_rows
from loss_cases import check_loss, draw_loss
from torch import Tensor

from vgpo_kernels import PolicyLoss, linear_policy_loss, policy_loss
from vgpo_kernels.config import CHOICES

NAN, INF = math.nan, math.inf
LOSS_TYPES = CHOICES["loss_type"]


def loss_of(logp: list[float], old_logp: list[float], advantage: float = 1.0, **options: object) -> tuple[Tensor, ...]:
    """Loss, gradient and metrics of one response."""
    device = options.pop("device", "cpu")
    given = {
        name: torch.tensor([value], device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }
    leaf = torch.tensor([logp], device=device).requires_grad_()
    loss, metrics = policy_loss(
        leaf,
        torch.tensor([old_logp], device=device),
        torch.tensor([advantage], device=device),
        torch.ones_like(leaf, dtype=torch.bool),
        **given,
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0].squeeze(0), metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_whatever_stands_at_single_tokens(backend_name: str, device: torch.device, loss_type: str) -> None:
    """Loss, gradients and metrics of drawn batches and settings, against loops over the equations."""
    for seed in range(6):
        case = draw_loss(Random(f"{loss_type} {seed}"), {"loss_type": loss_type})
        check_loss(case, device, bits=64 if backend_name == "reference" else 32)


def test_the_least_temperature_of_sapo(backend_name: str, device: torch.device) -> None:
    """Four over it is no float32 number, but a gate of a half times that is one."""
    least = {"loss_type": "sapo", "sapo_temperature_positive": 2.0**-126, "sapo_temperature_negative": 2.0**-126}
    loss, gradient, _ = loss_of([-1.0, -2.0], [-1.0, -2.0], 0.5, device=device, **least)
    assert loss == -(2.0**126) and gradient.tolist() == [-0.25, -0.25]


# ---- what is off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias correction"])
@pytest.mark.parametrize("estimator", CHOICES["kl_estimator"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_terms_that_are_off_leave_no_trace(
    backend_name: str, device: torch.device, loss_type: str, estimator: str, bias: bool
) -> None:
    """With a coefficient of 0 loss and gradient are those without the tensor, and the metric is the tensor's."""
    tokens = [-1.0, -2.0, -0.5, -3.0], [-1.1, -1.8, -0.7, -3.0]
    options = {"loss_type": loss_type, "device": device, "kl_estimator": estimator, "kl_bias_correction": bias}
    loss, gradient, _ = loss_of(*tokens, **options)
    ref_logp, entropy = [-1.0, INF, -INF, -1e30], [1.0, INF, 2.0, 3.0]
    again, same, metrics = loss_of(*tokens, ref_logp=ref_logp, entropy=entropy, **options)
    assert torch.equal(again, loss) and torch.equal(same, gradient)
    assert metrics["entropy"] == INF and not (metrics["ref_kl"].isfinite() and estimator != "k3_clamped")
    again, same, metrics = loss_of(*tokens, ref_logp=[NAN] * 4, entropy=[NAN] * 4, **options)
    assert torch.equal(again, loss) and torch.equal(same, gradient)
    assert metrics["entropy"].isnan() and metrics["ref_kl"].isnan()


def test_a_bonus_that_is_off_has_a_gradient_of_zero(backend_name: str, device: torch.device) -> None:
    logp = torch.full((1, 3), -1.0, device=device)
    entropy = torch.tensor([[1.0, NAN, INF]], device=device, requires_grad=True)
    loss = policy_loss(
        logp.clone().requires_grad_(), logp, torch.ones(1, device=device), logp < 0, entropy=entropy
    ).loss
    assert loss == -1 and torch.equal(torch.autograd.grad(loss, entropy)[0], torch.zeros_like(entropy))


def test_the_head_leaves_out_what_is_off(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(EDGES["plain"]), 50)
    batch, head = batch.to(device), head.to(device)
    results = []
    for ref_logp in (None, torch.where(batch.response_mask, -INF, NAN)):
        hidden = head.hidden.nan_to_num().requires_grad_()
        arguments = (hidden, head.weight, head.targets, batch.old_logp, batch.advantages, batch.response_mask)
        loss, metrics = linear_policy_loss(*arguments, ref_logp=ref_logp)
        results.append([loss.detach(), torch.autograd.grad(loss, hidden)[0]])
    assert metrics["ref_kl"] == INF
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_importance_weight_of_zero_takes_a_token_out(
    backend_name: str, device: torch.device, loss_type: str
) -> None:
    """Also one whose advantage is not finite, which is still counted."""
    if loss_type == "vespo":
        pytest.skip("importance weights of vespo multiply the response's ratio")
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    logp = torch.tensor([[-1.0, -2.0, -0.5]], device=device).requires_grad_()
    old_logp = torch.tensor([[-1.1, -1.8, -0.7]], device=device)
    weights = torch.tensor([[1.0, 0.0, 5.0]], device=device)
    options = {"loss_type": loss_type, "importance_cap": 2.0, "importance_mode": "mask", "max_length": 3}
    results = []
    for broken in (1.0, INF, NAN):
        advantages = torch.tensor([[1.0, broken, -broken]], device=device)
        loss, metrics = policy_loss(logp, old_logp, advantages, mask, importance_weights=weights, **options)
        results.append((loss.item(), torch.autograd.grad(loss, logp)[0]))
        assert metrics["nonfinite_advantages"] == (0 if broken == 1 else 2)
    for loss_value, gradient in results:
        assert math.isfinite(loss_value) and loss_value == results[0][0]
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_advantage_of_zero_makes_nothing_of_a_log_prob(
    backend_name: str, device: torch.device, loss_type: str
) -> None:
    for broken in (INF, -INF, NAN):
        given = {"ratio_clamp": None, "loss_type": loss_type, "device": device}
        loss, gradient, _ = loss_of([-1.0, broken], [-1.0, -1.0], advantage=0.0, **given)
        assert loss == 0 and (gradient == 0).all(), broken


# ---- infinite log-probs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gspo_token", "luspo", "sapo"])
def test_an_infinite_ratio_that_is_clipped_has_no_gradient(
    backend_name: str, device: torch.device, loss_type: str
) -> None:
    for clamp in (None, 20.0):
        loss, gradient, metrics = loss_of(
            *([INF, -1.0], [-1.0, -1.0]), loss_type=loss_type, ratio_clamp=clamp, num_sequences=1, device=device
        )
        largest = INF if clamp is None else pytest.approx(math.exp(20.0), rel=1e-5)
        assert metrics["ratio_max"].item() == largest
        assert loss.isfinite() and gradient[0] == 0, clamp


def test_gspo_token_weighs_each_token_by_the_sequence(backend_name: str, device: torch.device) -> None:
    """Its gradient is the sequence's ratio where the clamp is inactive, and 0 where it is active."""
    options = {"loss_type": "gspo_token", "device": device}
    _, gradient, metrics = loss_of([-1.0, -2.0], [-1.1, -1.9], advantage=2.0, **options)
    assert gradient.tolist() == pytest.approx([-1.0, -1.0], rel=1e-5) and metrics["ratio_mean"] == 1
    for place in range(2):
        for infinite in (INF, -INF):
            logp, old_logp = [-1.0, -2.0], [-1.1, -1.9]
            (logp if place else old_logp)[1] = infinite
            for advantage in (1.0, -1.0):
                loss, gradient, _ = loss_of(logp, old_logp, advantage=advantage, **options)
                assert loss.isfinite() and gradient.tolist() == [0, 0], (place, infinite, advantage)
    # Without a clamp the ratio itself is infinite or zero.
    loss, gradient, _ = loss_of([-INF, -2.0], [-1.1, -1.9], ratio_clamp=None, **options)
    assert loss == 0 and gradient.tolist() == [0, 0]
    loss, gradient, _ = loss_of([-1.0, -2.0], [-INF, -1.9], advantage=-1.0, ratio_clamp=None, **options)
    assert loss == INF and gradient.tolist() == [INF, INF]


def test_a_reference_that_excludes_a_token(backend_name: str, device: torch.device) -> None:
    """k3 is infinite where either log-prob is -infinity; its derivative is 1 where the reference's is."""
    options = {"ref_logp": [-INF, -1.5], "kl_coef": 0.5, "device": device}
    loss, gradient, metrics = loss_of([-1.0, -1.0], [-1.0, -1.0], advantage=0.0, **options)
    assert loss == INF and metrics["ref_kl"] == INF
    assert gradient.tolist() == pytest.approx([0.25, 0.25 * (1 - math.exp(-0.5))])
    loss, gradient, _ = loss_of([-INF, -1.0], [-INF, -1.0], advantage=0.0, **(options | {"ref_logp": [-1.0, -1.0]}))
    assert loss == INF and gradient.tolist() == [-INF, 0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_broken_token_spoils_no_other_response(backend_name: str, device: torch.device, loss_type: str) -> None:
    batch = make_batch(EDGES["holes"], features=1).to(device)
    place = tuple(batch.response_mask[1].nonzero()[3].tolist())
    options = {"loss_type": loss_type, "kl_coef": 0.1, "entropy_coef": 0.1, "max_length": 32}

    def gradients(name: str, value: float) -> Tensor:
        tensors = {
            "logp": batch.logp.clone(),
            "old_logp": batch.old_logp.clone(),
            "ref_logp": batch.ref_logp.clone(),
            "entropy": batch.entropy.clone(),
            "advantages": batch.token_advantages.clone(),
            "factors": torch.ones_like(batch.logp),
        }
        if name:
            tensors[name][1][place] = value
        leaf = tensors["logp"].requires_grad_()
        loss = policy_loss(**tensors, response_mask=batch.response_mask, **options).loss
        return torch.autograd.grad(loss, leaf)[0][[0, 2]]

    clean = gradients("", 0.0)
    for name, value in (
        *(("logp", NAN), ("logp", -INF), ("old_logp", INF), ("ref_logp", NAN), ("ref_logp", -INF)),
        *(("entropy", NAN), ("advantages", NAN), ("advantages", 3e38), ("factors", INF)),
    ):
        assert torch.equal(gradients(name, value), clean), (name, value)


# ---- denominators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "denominators", "share"),
    [
        ("token-mean", {"num_tokens": 0}, 1),
        ("seq-mean-token-mean", {"num_sequences": 0}, 1 / 4),
        ("seq-mean-token-sum", {"num_sequences": 0}, 1),
        ("seq-mean-token-sum-norm", {"num_sequences": 0}, 1 / 100),
        ("seq-mean-token-mean", {"num_sequences": 2}, 1 / 8),
        ("seq-mean-token-sum-norm", {"num_sequences": 2}, 1 / 200),
    ],
    ids=str,
)
def test_a_denominator_of_zero_counts_as_one_by_itself(
    backend_name: str, device: torch.device, aggregation: str, denominators: dict[str, float], share: float
) -> None:
    options = {"aggregation": aggregation, "max_length": 100, "device": device}
    loss, gradient, _ = loss_of([-1.0] * 4, [-1.0] * 4, **options, **denominators)
    assert loss.item() == pytest.approx(-4 * share) and gradient.tolist() == pytest.approx([-share] * 4)


# ---- metrics that cancel -------------------------------------------------------------------------------------------

LONG = (Response(length=0), Response(length=2100, holes=True), Response(length=1), Response(length=700))


def metrics_of(factors: Tensor, packed: bool, device: torch.device) -> dict[str, float]:
    batch = make_batch(LONG, features=1, packed=packed).to(device)
    spread = torch.full_like(batch.logp, NAN)
    spread[batch.response_mask] = factors[: int(batch.response_mask.sum())].to(device)
    arguments = (batch.logp, batch.old_logp, batch.advantages, batch.response_mask)
    found: PolicyLoss = policy_loss(*arguments, factors=spread, cu_seqlens=batch.cu_seqlens)
    return {name: value.item() for name, value in found.metrics.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_deviation_of_factors_does_not_cancel(backend_name: str, device: torch.device, packed: bool) -> None:
    mask = make_batch(LONG, features=1, packed=packed).response_mask
    count = int(mask.sum())
    for constant in (1.3, 1e-3, 1234.5):
        metrics = metrics_of(torch.full((count,), constant), packed, device)
        assert metrics["factor_std"] == 0, constant
        assert metrics["factor_mean"] == metrics["factor_min"] == metrics["factor_max"] == pytest.approx(constant)
    noise = 1e-5 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    outlier = torch.full((count,), 1.3)
    outlier[0] = 3.0
    huge = torch.ones(count)
    huge[count // 2] = 1e30
    for factors in (1.3 + noise, outlier + noise, 1 + 3e4 * noise, huge):
        metrics = metrics_of(factors, packed, device)
        assert metrics["factor_std"] == pytest.approx(factors.double().std(correction=0).item(), rel=1e-3)
        assert metrics["factor_mean"] == pytest.approx(factors.double().mean().item(), rel=1e-6)
    huge[1] = INF
    metrics = metrics_of(huge, packed, device)
    assert math.isnan(metrics["factor_std"]) and metrics["factor_mean"] == metrics["factor_max"] == INF


def test_the_divergences_of_close_policies_do_not_cancel(backend_name: str, device: torch.device) -> None:
    apart = 2.0**-13  # which fp32 adds to these log-probs without rounding
    logp = [-1.0, -1.5, -0.5]
    moved = [value + apart for value in logp]
    exact = math.expm1(apart) - apart
    _, gradient, metrics = loss_of(moved, logp, advantage=0.0, device=device)
    assert metrics["approx_kl"].item() == pytest.approx(exact, rel=1e-5)
    _, gradient, metrics = loss_of(logp, logp, advantage=0.0, ref_logp=moved, kl_coef=3.0, device=device)
    assert metrics["approx_kl"] == 0
    assert metrics["ref_kl"].item() == pytest.approx(exact, rel=1e-5)
    assert gradient.tolist() == pytest.approx([-math.expm1(apart)] * 3, rel=1e-5)


def test_means_of_many_equal_tokens(backend_name: str, device: torch.device) -> None:
    count = 30_000
    old_logp = torch.full((1, count), -1.0, device=device)
    entropy = torch.full((1, count), 0.7, device=device)
    metrics = policy_loss(
        old_logp + 0.1, old_logp, torch.ones(1, device=device), old_logp < 0, entropy=entropy, ref_logp=old_logp
    ).metrics
    exact = (old_logp.new_tensor(-1.0) + 0.1 + 1).double().item()
    assert metrics["ratio_mean"].item() == pytest.approx(math.exp(exact), rel=2e-6)
    assert metrics["approx_kl"].item() == pytest.approx(math.expm1(exact) - exact, rel=1e-5)
    assert metrics["ref_kl"].item() == pytest.approx(math.expm1(-exact) + exact, rel=1e-5)
    assert metrics["entropy"].item() == pytest.approx(0.7, rel=2e-6)

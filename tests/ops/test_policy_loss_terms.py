"""Weights of tokens, selected tokens and terms of other views in a policy loss, on every backend."""

from __future__ import annotations

import math
from itertools import cycle
from random import Random
from typing import Any

import pytest
import torch
from cases import EDGES, Batch, default_dtype, make_batch
from linear_cases import with_predicting_rows
from loss_cases import check_loss, draw_terms, packed, run
from tolerance import assert_close, same_bits
from torch import Tensor

from vgpo_kernels import (
    PolicyLoss,
    VGPOConfig,
    ViewTerm,
    backend,
    linear_policy_loss,
    linear_vgpo_loss,
    policy_loss,
    vgpo_loss,
    visual_focus,
    visual_weights,
)
from vgpo_kernels.config import CHOICES

NAN, INF = math.nan, math.inf
LOSS_TYPES = CHOICES["loss_type"]
TOKEN_RATIO = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")


def loss_of(batch: Batch, **changes: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient w.r.t. logp and metrics of a batch."""
    given = {
        "old_logp": batch.old_logp,
        "advantages": batch.advantages,
        "response_mask": batch.response_mask,
        "cu_seqlens": batch.cu_seqlens,
        "max_length": 32,
    }
    logp = changes.pop("logp", batch.logp).detach().clone().requires_grad_()
    loss, metrics = policy_loss(logp, **(given | changes))
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def uniform(like: Tensor, seed: int = 3) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_terms_are_the_equations(backend_name: str, device: torch.device, loss_type: str) -> None:
    """Loss, gradients and metrics of drawn batches, against loops that multiply a surrogate that is computed before."""
    for seed in range(5):
        case = draw_terms(Random(f"{loss_type} {seed}"), {"loss_type": loss_type})
        check_loss(case, device, bits=64 if backend_name == "reference" else 32)


@pytest.mark.slow
def test_the_terms_are_the_equations_of_many_batches() -> None:
    for seed in range(500):
        check_loss(draw_terms(Random(seed)))


def test_neither_layout_nor_the_default_dtype_matters(backend_name: str, device: torch.device) -> None:
    for seed in range(2 if backend_name == "triton" else 6):
        case = draw_terms(Random(f"layout {seed}"))
        mask = case.tensors["response_mask"].to(device)
        results = [run(case, device), run(packed(case), device)]
        with default_dtype((torch.float64, torch.bfloat16)[seed % 2]):
            results.append(run(case, device))
        loss, gradients, metrics = results[0]
        for other_loss, other_gradients, other_metrics in results[1:]:
            assert same_bits(other_loss, loss)
            for name, gradient in gradients.items():
                assert same_bits(other_gradients[name].view_as(mask)[mask], gradient[mask])
            assert other_metrics.keys() == metrics.keys()
            for name, metric in metrics.items():
                assert same_bits(other_metrics[name], metric), name


# ---- selected tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss_type", "is_packed"), [*zip(LOSS_TYPES, cycle([False, True]), strict=False)])
def test_to_select_every_token_changes_no_bit(
    backend_name: str, device: torch.device, loss_type: str, is_packed: bool
) -> None:
    batch = make_batch(EDGES["holes"] + EDGES["empty response"], features=1, packed=is_packed).to(device)
    options = {"loss_type": loss_type, "factors": uniform(batch.logp), "ref_logp": batch.ref_logp, "kl_coef": 0.1}
    for counts in ({}, {"num_tokens": 100, "num_sequences": 9}):
        expected = loss_of(batch, **options, **counts)
        more = {"num_selected": 100} if counts else {}
        loss, gradient, metrics = loss_of(
            batch, selected=torch.ones_like(batch.response_mask), **options, **counts, **more
        )
        assert metrics.pop("selected_rate") == 1
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
        assert metrics == expected[2]


@pytest.mark.parametrize("loss_type", TOKEN_RATIO)
def test_what_is_not_selected_is_off(backend_name: str, device: torch.device, loss_type: str) -> None:
    """Whatever stands there: ratios, factors and weights that are infinite or NaN."""
    batch = make_batch(EDGES["plain"], features=1).to(device)
    selected = batch.response_mask & (uniform(batch.logp, 5) < 0.5)
    others = batch.response_mask & ~selected
    options = {"loss_type": loss_type, "selected": selected, "ratio_clamp": None}
    loss, gradient, _ = loss_of(batch, factors=uniform(batch.logp), token_weights=uniform(batch.logp, 4), **options)
    assert loss.isfinite() and (gradient[others] == 0).all() and (gradient[selected] != 0).any()
    for value in (INF, NAN):
        factors, weights = (uniform(batch.logp, seed).masked_fill(~selected, value) for seed in (3, 4))
        old_logp = batch.old_logp.masked_fill(others, -value)
        spoilt = loss_of(batch, factors=factors, token_weights=weights, old_logp=old_logp, **options)
        assert torch.equal(spoilt[0], loss) and torch.equal(spoilt[1], gradient)


@pytest.mark.parametrize("aggregation", CHOICES["aggregation"])
def test_where_nothing_is_selected_the_surrogate_is_zero(
    backend_name: str, device: torch.device, aggregation: str
) -> None:
    batch = make_batch(EDGES["plain"], features=1).to(device)
    nothing = torch.zeros_like(batch.response_mask)
    with pytest.raises(ValueError, match="num_selected needs selected, which is None"):
        loss_of(batch, num_selected=3)
    with pytest.raises(ValueError, match="num_tokens beside selected needs num_selected"):
        loss_of(batch, selected=batch.response_mask, num_tokens=30)
    loss, gradient, metrics = loss_of(batch, selected=nothing, aggregation=aggregation)
    assert loss == 0 and (gradient == 0).all()
    assert metrics["selected_rate"] == metrics["factor_mean"] == 0 and metrics["ratio_mean"] > 0
    terms = {"aggregation": aggregation, "ref_logp": batch.ref_logp, "kl_coef": 0.1}
    loss, gradient, _ = loss_of(batch, selected=nothing, **terms)
    alone = loss_of(batch, advantages=torch.zeros_like(batch.advantages), **terms)
    assert torch.equal(loss, alone[0]) and torch.equal(gradient, alone[1]) and loss > 0


@pytest.mark.parametrize("aggregation", CHOICES["aggregation"])
def test_micro_batches_add_up(backend_name: str, device: torch.device, aggregation: str) -> None:
    batch = make_batch(EDGES["shuffled groups"], features=1).to(device)
    selected = batch.response_mask & (uniform(batch.logp, 5) < 0.4)
    weights, counted = uniform(batch.logp), uniform(batch.logp, 6) < 0.5
    counts = {"num_tokens": batch.response_mask.sum(), "num_sequences": 7, "num_selected": selected.sum()}

    def part(rows: slice, **given: Any) -> tuple[Tensor, Tensor]:
        views = (ViewTerm(batch.ref_logp[rows], -0.2, "k1"), ViewTerm(batch.old_logp[rows], 0.1, "k2", counted[rows]))
        tensors = {"logp": batch.logp, "old_logp": batch.old_logp, "advantages": batch.advantages, "selected": selected}
        tensors |= {"response_mask": batch.response_mask, "token_weights": weights}
        given |= {name: values[rows] for name, values in tensors.items()}
        return loss_of(batch, aggregation=aggregation, views=views, **given)[:2]

    whole, gradient = part(slice(None))
    parts = [part(rows, **counts) for rows in (slice(0, 3), slice(3, 4), slice(4, None))]
    assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole.double(), name="loss")
    assert_close(torch.cat([slopes for _, slopes in parts]), gradient.double(), name="gradient")


def test_a_packed_batch_of_as_many_tokens_as_responses(backend_name: str, device: torch.device) -> None:
    """Weights of its shape are those of responses; selected ones are tokens all the same."""
    lengths = torch.tensor([2, 0, 1, 1], device=device)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logp = torch.tensor([-1.0, -2.0, -0.5, -0.7], device=device)
    given = {"advantages": torch.ones(4, device=device), "response_mask": logp < 0, "cu_seqlens": boundaries}
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
    selected = torch.tensor([True, False, True, False], device=device)
    loss, metrics = policy_loss(logp, None, token_weights=weights, **given)
    assert loss == -(1 + 1 + 4 + 8) / 4 and metrics["factor_max"] == 8
    assert policy_loss(logp, None, token_weights=weights, selected=selected, **given).loss == -(1 + 4) / 2
    by_response = policy_loss(logp, None, token_weights=weights, selected=selected, loss_type="grpo", **given).loss
    assert by_response == -(1 + 0 + 4 + 0) / 4


# ---- other views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", CHOICES["kl_estimator"])
def test_a_view_is_a_reference_of_its_own(backend_name: str, device: torch.device, estimator: str) -> None:
    batch = make_batch(EDGES["holes"], features=1).to(device)
    view = ViewTerm(batch.ref_logp, -0.3, estimator)
    bonus = {"entropy": batch.entropy, "entropy_coef": 0.1, "loss_type": "grpo"}
    expected = loss_of(batch, ref_logp=batch.ref_logp, kl_coef=-0.3, kl_estimator=estimator, **bonus)
    alone = loss_of(batch, views=[view], **bonus)
    assert torch.equal(alone[0], expected[0]) and torch.equal(alone[1], expected[1])
    assert "ref_kl" not in alone[2] and alone[2]["view_kl"] == expected[2]["ref_kl"]
    # Beside a reference, the kernel computes it by itself.
    other = {"ref_logp": batch.old_logp, "kl_coef": 0.2, "kl_estimator": "k2", **bonus}
    both, parts = loss_of(batch, views=(view, view._replace(coef=0.0)), **other), loss_of(batch, **other)
    without = loss_of(batch, **bonus)
    assert_close(both[0], parts[0].double() + expected[0].double() - without[0].double(), name="loss")
    assert_close(both[1], parts[1].double() + expected[1].double() - without[1].double(), name="gradient")
    assert both[2]["view_kl/0"] == both[2]["view_kl/1"] == expected[2]["ref_kl"]
    assert both[2]["ref_kl"] == parts[2]["ref_kl"]


@pytest.mark.parametrize("estimator", CHOICES["kl_estimator"])
def test_a_view_counts_on_its_mask(backend_name: str, device: torch.device, estimator: str) -> None:
    """Whatever stands elsewhere, also under the policy; the denominators stay."""
    batch = make_batch(EDGES["plain"], features=1).to(device)
    counted = uniform(batch.logp, 5) < 0.5
    read, rest = counted & batch.response_mask, ~counted & batch.response_mask
    off = {"advantages": torch.zeros_like(batch.advantages)}
    for value in (0.0, NAN, INF):
        view = ViewTerm(batch.ref_logp.masked_fill(~read, value), 0.5, estimator, counted.to(torch.uint8))
        logp = batch.logp.masked_fill(rest, -1.0 if value == 0 else -value)
        loss, gradient, metrics = loss_of(batch, logp=logp, views=[view], **off)
        total, slopes, number = 0.0, torch.zeros_like(gradient), int(batch.response_mask.sum())
        for place in read.nonzero():
            gap = (batch.ref_logp[tuple(place)] - batch.logp[tuple(place)]).item()
            value_of = {"k1": -gap, "k2": gap * gap / 2}.get(estimator, math.exp(gap) - gap - 1)
            slopes[tuple(place)] = {"k1": 1.0, "k2": -gap}.get(estimator, 1 - math.exp(gap)) * 0.5 / number
            total += value_of
        assert loss.item() == pytest.approx(0.5 * total / number, rel=1e-5)
        assert metrics["view_kl"].item() == pytest.approx(total / number, rel=1e-5)
        assert_close(gradient, slopes.double(), name="gradient")
        assert (gradient[~read] == 0).all()


def test_views_without_log_probs_of_the_policy(backend_name: str, device: torch.device) -> None:
    """The negative log-probability of what was sampled, which several methods add: k1 to zeros."""
    batch = make_batch(EDGES["plain"], features=1).to(device)
    off = {"advantages": torch.zeros_like(batch.advantages)}
    loss, gradient, _ = loss_of(batch, views=[ViewTerm(torch.zeros_like(batch.logp), -0.25, "k1")], **off)
    mask = batch.response_mask
    assert_close(loss, -0.25 * batch.logp[mask].double().mean(), name="loss")
    assert_close(gradient[mask], torch.full_like(batch.logp[mask], -0.25).double() / mask.sum(), name="gradient")


def test_what_was_scored_in_inference_mode_is_taken(backend_name: str, device: torch.device) -> None:
    batch = make_batch(EDGES["plain"]).to(device)
    with torch.inference_mode():
        scored = uniform(batch.logp)
        chosen = scored > 0.5
        view = ViewTerm(-scored, 0.1, mask=chosen)
    given = {"factors": scored, "token_weights": scored, "selected": chosen, "views": [view]}
    plain = {name: given[name].clone() for name in ("factors", "token_weights", "selected")}
    plain["views"] = [view._replace(logp=view.logp.clone(), mask=chosen.clone())]
    found, expected = loss_of(batch, **given), loss_of(batch, **plain)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_mask_needs_ratios_of_tokens() -> None:
    batch = make_batch(EDGES["plain"], features=1)
    view = ViewTerm(batch.ref_logp, 0.1, mask=batch.response_mask)
    for loss_type in ("gspo", "gspo_token", "luspo"):
        loss_of(batch, views=[view], loss_type=loss_type)
        with pytest.raises(ValueError, match=rf"views\[0\].mask does not go with .*'{loss_type}'"):
            loss_of(batch, views=[view], loss_type=loss_type, kl_bias_correction=True)


def test_views_are_detached_and_derived_twice() -> None:
    batch = make_batch(EDGES["plain"][:2], features=1)
    mask, other = batch.response_mask, batch.ref_logp.double().requires_grad_()
    counted = uniform(batch.logp) < 0.5

    def loss(logp: Tensor) -> Tensor:
        spread = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, logp)
        views = [ViewTerm(other, -0.3), ViewTerm(other, 0.2, "k2", counted), ViewTerm(other, 0.2, "k1", ~counted)]
        given = {"token_weights": batch.advantages.abs(), "selected": counted, "views": views}
        return policy_loss(spread, batch.old_logp, batch.advantages, mask, kl_bias_correction=True, **given).loss

    logp = batch.logp[mask].double().requires_grad_()
    with backend("reference"):
        assert torch.autograd.grad(loss(logp), [logp, other], allow_unused=True)[1] is None
        assert torch.autograd.gradcheck(loss, (logp,)) and torch.autograd.gradgradcheck(loss, (logp,))


# ---- where they go -------------------------------------------------------------------------------------------------


def test_all_of_it_traces_into_one_graph() -> None:
    """Nothing waits for a number."""
    batch = make_batch(EDGES["shuffled groups"], features=1, packed=True)
    selected = uniform(batch.logp, 5) < 0.4

    def loss(logp: Tensor) -> PolicyLoss:
        views = (ViewTerm(batch.ref_logp, -0.1), ViewTerm(batch.ref_logp, 0.1, "k1", selected))
        given = {"token_weights": batch.advantages.abs(), "selected": selected, "loss_type": "grpo", "views": views}
        given["cu_seqlens"] = batch.cu_seqlens
        return policy_loss(logp, batch.old_logp, batch.advantages, batch.response_mask, **given)

    found, expected = torch.compile(loss, fullgraph=True, backend="eager")(batch.logp), loss(batch.logp)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in {"loss": expected.loss, **expected.metrics}.items():
        assert_close({"loss": found.loss, **found.metrics}[name], value.double(), name=name)


@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
def test_losses_that_compute_factors_or_log_probs(backend_name: str, device: torch.device, is_packed: bool) -> None:
    if backend_name == "triton":
        pytest.skip("calls functions that are tested by themselves, and the interpreter is slow")
    batch, head = with_predicting_rows(make_batch(EDGES["plain"], packed=is_packed), 50)
    batch, head = batch.to(device), head.to(device)
    mask, config, layout = batch.response_mask, VGPOConfig.paper(), {"cu_seqlens": batch.cu_seqlens}
    states = head.hidden.nan_to_num()
    image = (batch.visual_mask, mask, batch.group_ids, config)
    selected = mask & (uniform(batch.logp, 5) < 0.5)
    weights = {"token_weights": uniform(batch.logp), "selected": selected, "num_selected": selected.sum()} | layout
    views = {"views": [ViewTerm(batch.ref_logp, -0.1), ViewTerm(batch.ref_logp, 0.2, "k1", selected)]}
    cos = visual_focus(states, batch.visual_mask, mask, **layout)
    factors = {"factors": visual_weights(cos, mask, batch.group_ids, config, **layout).factors}

    def same(found: PolicyLoss, expected: PolicyLoss) -> None:
        assert_close(found.loss, expected.loss.double(), name="loss", floor=4e-6)
        assert expected.metrics.keys() <= found.metrics.keys()
        for name, metric in expected.metrics.items():
            assert_close(found.metrics[name], metric.double(), name=name, floor=4e-6)

    given = (batch.logp, batch.old_logp, batch.advantages)
    for terms in (weights | views, views | layout):
        same(vgpo_loss(states, *given, *image, **terms), policy_loss(*given, mask, **factors, **terms))
    projected = (states, head.weight, head.targets, batch.old_logp, batch.advantages)
    found = linear_vgpo_loss(*projected, *image, **weights)
    same(found, linear_policy_loss(*projected, mask, **factors, **weights))
    product = factors["factors"] * weights["token_weights"]
    weighted = linear_policy_loss(*projected, mask, **factors, token_weights=weights["token_weights"], **layout)
    assert torch.equal(weighted.loss, linear_policy_loss(*projected, mask, factors=product, **layout).loss)
    for function, arguments in ((linear_policy_loss, (mask,)), (linear_vgpo_loss, image)):
        with pytest.raises(TypeError, match=r"has no 'views': .*linear_logprob to policy_loss"):
            function(*projected, *arguments, **layout, **views)

"""linear_divergence on every backend: values and gradients against dense logits, slices, edges."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from divergence_cases import DTYPES, RESULTS, Views, check, dense, divergences, gradients, make_views
from tolerance import FLOOR, assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import (
    combine_divergences,
    divergence_totals,
    linear_divergence,
    linear_divergence_slice,
    linear_logprob,
    policy_loss,
)
from vgpo_kernels.ops import registry
from vgpo_kernels.reference.linear_divergence import MEASURES
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.logits import LogitMap

# (rows, features, vocabulary, bytes of a workspace): tails in every dimension, one chunk and many, and the least.
SHAPES = {
    "one chunk": (37, 33, 300, None),
    "many chunks": (70, 48, 2600, 4 * 16 * 1024),
    "tiny workspace": (3, 8, 20, 4),
    "one row": (1, 64, 130, None),
    "one entry": (9, 16, 1, None),
    "no rows": (0, 16, 7, None),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_dense_logits(backend_name: str, device: torch.device, dtype: str, shape: str) -> None:
    rows, features, vocabulary, chunk_bytes = SHAPES[shape]
    check(make_views(rows, features, vocabulary, dtype=DTYPES[dtype]), device, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_scale_cap_temperatures_and_ignored_rows(backend_name: str, device: torch.device, dtype: str) -> None:
    views = make_views(41, 24, 530, dtype=DTYPES[dtype], bias=True, ignored=0.4)
    temperature = torch.linspace(0.5, 1.5, 41).masked_fill(views.targets == IGNORED, math.nan)
    options = {"temperature": temperature, "logit_scale": 0.7, "softcap": 5.0, "js_beta": 0.2}
    check(views, device, chunk_bytes=4 * 20 * 128, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own(backend_name: str, device: torch.device, dtype: str) -> None:
    views = make_views(29, 24, 530, dtype=DTYPES[dtype], bias=True, other_features=17, ignored=0.2)
    check(views, device, temperature=0.7, chunk_bytes=4 * 20 * 128)


@pytest.mark.parametrize("name", RESULTS)
def test_each_result_alone(backend_name: str, device: torch.device, name: str) -> None:
    views = make_views(12, 16, 90).to(device).leaves()
    measures = (name,) if name in MEASURES else ()
    found = divergences(views, measures=measures)
    everything = divergences(views)
    assert same_bits(getattr(found, name), getattr(everything, name))
    assert all(getattr(found, other) is None for other in MEASURES if other != name)
    one, all_of_them = (gradients(views, {name: getattr(values, name)}, (name,)) for values in (found, everything))
    for leaf, gradient in one.items():
        assert_close(gradient, all_of_them[leaf].double(), name=f"gradient of {name} by {leaf}")


def test_the_reference_has_the_gradient_of_finite_differences() -> None:
    views = make_views(4, 3, 6, bias=True, other_features=2, ignored=0.3, seed=3).double()
    kept = views.targets != IGNORED
    views = replace(views, hidden=views.hidden.nan_to_num(), other=views.other.nan_to_num())

    def values(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = replace(views, **dict(zip(views.tensors(), leaves, strict=True)))
        options = {
            "softcap": 4.0,
            "logit_scale": 1.5,
            "temperature": torch.linspace(0.5, 2, 4).double(),
            "js_beta": 0.3,
        }
        return tuple(value[kept] for value in divergences(given, **options))

    assert torch.autograd.gradcheck(values, list(views.leaves().tensors().values()))


def test_two_equal_views_do_not_diverge(backend_name: str, device: torch.device) -> None:
    views = make_views(20, 16, 3000, apart=0.0).to(device).leaves()
    found = divergences(views)
    for name in ("kl", "reverse_kl", "tv"):
        assert not getattr(found, name).any(), name
    for name in ("js", "hellinger"):
        assert getattr(found, name).abs().max() < 5e-7, name
    assert torch.equal(found.entropy, found.other_entropy)
    (by_other,) = torch.autograd.grad(found.kl.sum(), views.other)
    assert by_other.abs().max() < 1e-6


def test_small_divergences_keep_their_digits(backend_name: str, device: torch.device) -> None:
    # Of KL 1e-5 in logits of size 30: measured from zero, an fp32 logit would only be known to 2e-6.
    views = make_views(50, 64, 800, apart=1.5e-3, spread=8.0)
    expected = dense(views.double())
    found = divergences(views.to(device))
    assert 1e-6 < float(expected["kl"].mean()) < 1e-4
    for name in ("kl", "reverse_kl", "js"):
        torch.testing.assert_close(getattr(found, name).cpu().double(), expected[name], rtol=0, atol=1.5e-6)


def test_far_apart(backend_name: str, device: torch.device) -> None:
    # Each view is certain of another entry: KL is a difference of logits, JS ln 2, and the affinity next to nothing.
    hidden = torch.eye(4)[:3] * 120
    weight = torch.zeros(600, 4)
    weight[:4] = torch.eye(4)
    views = Views(hidden, hidden.roll(1, 0), weight, torch.arange(3))
    expected = dense(views.double())
    assert expected["kl"].min() > 100
    found = divergences(views.to(device))
    for name in RESULTS:
        assert_close(getattr(found, name), expected[name], name=name)


def test_forbidden_entries(backend_name: str, device: torch.device) -> None:
    views = make_views(8, 16, 3000, bias=True)
    assert views.bias is not None
    views.bias[:1500] = -math.inf
    views.bias[2000::3] = -math.inf
    allowed = (views.bias > -math.inf).nonzero().squeeze(-1)
    views = replace(views, targets=allowed[torch.arange(8) * 50])
    inner = replace(
        views,
        weight=views.weight[allowed],
        bias=views.bias[allowed],
        targets=torch.searchsorted(allowed, views.targets),
    )
    here, wide = views.to(device).leaves(), inner.double().leaves()
    found, expected = divergences(here, chunk_bytes=4 * 8 * 1024)._asdict(), dense(wide)
    narrow = dense(inner)
    for name in RESULTS:
        assert_close(found[name], expected[name], narrow[name], name=name)
    by, exact = gradients(here, found), gradients(wide, expected)
    assert_close(by["hidden"], exact["hidden"], name="gradient by hidden", floor=floor_of(terms=3000))
    assert_close(by["weight"].cpu()[allowed], exact["weight"], name="gradient by weight", floor=floor_of(terms=3000))
    assert not by["weight"][here.bias == -math.inf].any()


def test_what_only_one_view_forbids_is_infinitely_far(backend_name: str, device: torch.device) -> None:
    views = make_views(6, 8, 700, bias=True, other_features=8)
    assert views.other_bias is not None
    views.other_bias[300:] = -math.inf
    views = replace(views, targets=views.targets % 300)
    here = views.to(device).leaves()
    found, expected = divergences(here, chunk_bytes=4 * 2 * 6 * 128)._asdict(), dense(views.double())
    assert found["kl"].isposinf().all()
    for name in RESULTS:
        assert_close(found[name], expected[name], name=name)
    assert all(gradient.isfinite().all() for gradient in gradients(here, found).values())
    assert not any(gradient.any() for gradient in gradients(here, found, ("kl",)).values())


def test_nothing_but_forbidden_entries_is_no_distribution(backend_name: str, device: torch.device) -> None:
    views = make_views(3, 8, 20, bias=True).to(device)
    assert views.bias is not None
    views.bias[:] = -math.inf
    assert all(value.isnan().all() for value in divergences(views))


def test_a_broken_row_keeps_to_itself(backend_name: str, device: torch.device) -> None:
    views = make_views(7, 16, 60)
    broken, intact = [1, 4, 5], [0, 2, 3, 6]
    hidden, other = views.hidden.clone(), views.other.clone()
    hidden[1, 3], other[4, 0], hidden[5] = math.nan, math.nan, math.inf
    found = divergences(replace(views, hidden=hidden, other=other).to(device))
    expected = dense(views.double())
    for name in ("kl", "reverse_kl", "js", "tv", "hellinger"):
        assert getattr(found, name)[broken].isnan().all(), name
    for name in RESULTS:
        assert_close(getattr(found, name)[intact], expected[name][intact], name=name)


def test_leading_dimensions_and_strided_inputs(backend_name: str, device: torch.device) -> None:
    views = make_views(12, 16, 50).to(device)
    flat = divergences(views)
    states = torch.full((12, 2, 40), math.nan, device=device)
    states[:, 0, 8:24], states[:, 1, 8:24] = views.hidden, views.other
    shaped = linear_divergence(
        states[:, 0, 8:24].unflatten(0, (3, 4)),
        states[:, 1, 8:24].unflatten(0, (3, 4)),
        views.weight.T.contiguous().T,
        views.targets.view(3, 4).int(),
        measures=MEASURES,
    )
    for name in RESULTS:
        assert torch.equal(getattr(shaped, name).flatten(), getattr(flat, name)), name


def test_without_targets_every_row_counts(backend_name: str, device: torch.device) -> None:
    views = make_views(12, 16, 50).to(device)
    found = linear_divergence(views.hidden, views.other, views.weight, measures=MEASURES)
    assert found.logp is None and found.other_logp is None
    for name in MEASURES:
        assert torch.equal(getattr(found, name), getattr(divergences(views), name)), name


def test_ignored_rows_are_zero(backend_name: str, device: torch.device) -> None:
    views = make_views(6, 8, 30, ignored=1.1).to(device).leaves()
    found = divergences(views)._asdict()
    assert not any(value.any() for value in found.values())
    assert not any(gradient.any() for gradient in gradients(views, found).values())


@pytest.mark.parametrize("wanted", [names for n in (1, 2) for names in combinations(("hidden", "other", "weight"), n)])
def test_gradients_of_some_inputs(backend_name: str, device: torch.device, wanted: tuple[str, ...]) -> None:
    views = make_views(9, 16, 40, dtype=torch.bfloat16, ignored=0.3).to(device)
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in views.tensors().items()}
    found = linear_divergence(*leaves.values(), views.targets, measures=("kl",)).kl
    assert found is not None
    by = torch.autograd.grad(found.sum(), [leaves[name] for name in wanted])
    everything = views.leaves()
    expected = torch.autograd.grad(
        divergences(everything, measures=("kl",)).kl.sum(), list(everything.tensors().values())
    )
    for name, one, other in zip(wanted, by, [expected[list(leaves).index(name)] for name in wanted], strict=True):
        assert_close(one, other.double(), name=name, floor=floor_of(torch.bfloat16))


def test_the_weights_gradient_is_summed_in_fp32(backend_name: str, device: torch.device) -> None:
    # Every token adds as much to each row of the gradient. A bf16 sum would stop growing.
    rows = 256
    hidden, other = torch.ones(rows, 8, dtype=torch.bfloat16), torch.ones(rows, 8, dtype=torch.bfloat16)
    weight = torch.zeros(64, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    found = linear_divergence(
        hidden.to(device),
        other.to(device),
        weight,
        torch.zeros(rows, dtype=torch.int64, device=device),
        chunk_bytes=4 * 64 * 16,
    )
    (gradient,) = torch.autograd.grad(-(found.logp + found.other_logp).sum(), weight)
    assert (gradient[1:] == 2 * rows / 64).all()
    assert (gradient[0] == 2 * (rows / 64 - rows)).all()


def test_log_probabilities_are_those_of_linear_logprob(backend_name: str, device: torch.device) -> None:
    views = make_views(30, 24, 700).to(device)
    found = divergences(views, measures=("entropy",))
    logp, entropy = linear_logprob(views.hidden, views.weight, views.targets, return_entropy=True)
    assert_close(found.logp, logp.double(), name="logp")
    assert_close(found.entropy, entropy.double(), name="entropy")


def test_papos_term_is_the_k3_of_both_log_probabilities(backend_name: str, device: torch.device) -> None:
    """PAPO's term takes k3 of the sampled tokens, which is policy_loss's KL with the other view as reference."""
    views = make_views(24, 16, 90).to(device).leaves()
    mask = torch.arange(24, device=device).view(2, 12) % 5 != 4
    found = divergences(views, measures=())
    logp, other = found.logp.view(2, 12), found.other_logp.view(2, 12)
    ratio = other - logp
    term = ((ratio.exp() - 1 - ratio) * mask).sum() / mask.sum()
    nothing = torch.zeros(2, device=device)
    loss = policy_loss(logp, logp.detach(), nothing, mask, ref_logp=other, kl_coef=1.0, kl_estimator="k3").loss
    assert_close(loss, term.detach().double(), name="term")
    by_term, by_loss = (torch.autograd.grad(one, views.hidden, retain_graph=True)[0] for one in (term, loss))
    # policy_loss takes the reference as a constant, and so does the term's gradient by hidden.
    assert_close(by_loss, by_term.double(), name="gradient by hidden")


def test_the_sampled_estimate_is_right_on_average() -> None:
    views = make_views(4, 8, 12, spread=1.5)
    x = (views.hidden @ views.weight.T).log_softmax(-1)
    tokens = torch.multinomial(x.exp(), 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = divergences(views)
    sampled = linear_divergence(
        views.hidden[:, None].expand(-1, 40_000, -1),
        views.other[:, None].expand(-1, 40_000, -1),
        views.weight,
        tokens,
        measures=(),
    )
    estimate = (sampled.logp - sampled.other_logp).mean(-1)
    torch.testing.assert_close(estimate, found.kl, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("shares", [False, True], ids=["one pass", "two passes"])
def test_opcheck(exact_backend: str, device: torch.device, shares: bool) -> None:
    views = make_views(10, 16, 40, bias=True, other_features=12 if shares else None).to(device).leaves()
    logit_map = LogitMap(0.8, torch.rand(10, device=device) + 0.5, 1.3, 5.0) if shares else LogitMap(0.8)
    tensors = (views.hidden, views.other, views.weight, views.other_weight, views.bias, views.other_bias)
    given = (views.targets, 0, *logit_map, None, shares, 0.3, IGNORED)
    operator = registry.implementation("linear_divergence", exact_backend)
    torch.library.opcheck(operator, (*tensors, *given, 0))
    statistics = operator(*tensors, *given, 0).detach()
    detached = (None if one is None else one.detach() for one in tensors)
    asked = [tensor is not None for tensor in tensors]
    torch.library.opcheck(
        registry.implementation("linear_divergence_backward", exact_backend),
        (torch.ones_like(statistics), statistics, *detached, *given, asked, 0),
    )


def test_traces_into_one_graph(backend_name: str, device: torch.device) -> None:
    views = make_views(12, 16, 90, bias=True, ignored=0.3).to(device).leaves()

    def total(hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        found = linear_divergence(hidden, other, weight, views.targets, bias=views.bias, measures=("kl", "js"))
        assert found.kl is not None and found.js is not None and found.logp is not None
        return (found.kl + 2 * found.js - found.logp).sum()

    leaves = (views.hidden, views.other, views.weight)
    expected = total(*leaves)
    found = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    assert_close(found, expected.double(), name="total", floor=1e-5)
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_close(one, other.double(), name="gradient", floor=1e-5)


# ---- slices of the vocabulary -----------------------------------------------------------------------------------


def of_slices(views: Views, bounds: tuple[int, ...], **options: object) -> dict[str, Tensor]:
    """Every result of views from slices of their vocabulary."""

    def parts(totals: Tensor | None = None) -> Tensor:
        found = []
        for begin, end in pairwise(bounds):
            named = {
                name: one[begin:end]
                for name, one in views.tensors().items()
                if name not in ("hidden", "other", "weight")
            }
            found.append(
                linear_divergence_slice(
                    views.hidden,
                    views.other,
                    views.weight[begin:end],
                    views.targets,
                    first=begin,
                    totals=totals,
                    **named,
                    **options,
                )
            )
        return torch.stack(found)

    slices = parts()
    slices = slices + parts(divergence_totals(slices))
    return combine_divergences(slices, views.targets, measures=MEASURES)._asdict()


@pytest.mark.parametrize("other_features", [None, 12], ids=["one head", "two heads"])
def test_slices_of_the_vocabulary_combine(backend_name: str, device: torch.device, other_features: int | None) -> None:
    views = make_views(23, 16, 200, bias=True, ignored=0.2, other_features=other_features)
    here, wide = views.to(device).leaves(), views.double().leaves()
    found = of_slices(here, (0, 5, 150, 200), temperature=1.3, js_beta=0.3)
    expected = dense(wide, temperature=1.3, js_beta=0.3)
    for name in RESULTS:
        assert_close(found[name], expected[name], name=name)
    floor = 2 * floor_of(terms=200)  # as in check()
    for name, gradient in gradients(here, found).items():
        assert_close(gradient, gradients(wide, expected)[name], name=f"gradient by {name}", floor=floor)


def test_a_slice_without_a_finite_logit_counts_as_nothing(backend_name: str, device: torch.device) -> None:
    views = make_views(23, 16, 200, bias=True)
    assert views.bias is not None
    views.bias[5:150] = -math.inf
    views = replace(views, targets=views.targets % 5)
    here = views.to(device).leaves()
    found, whole = of_slices(here, (0, 5, 150, 200)), divergences(here)._asdict()
    for name in RESULTS:
        assert_close(found[name], whole[name].double(), name=name)
    # Both sides are rounded here, and each may be off by the floor.
    for name, gradient in gradients(here, found).items():
        assert_close(gradient, gradients(here, whole)[name].double(), name=f"gradient by {name}", floor=2 * FLOOR)

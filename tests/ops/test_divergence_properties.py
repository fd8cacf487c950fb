"""Properties of two views' divergences, drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from divergence_cases import RESULTS, Views, dense, divergences, gradients, make_views
from drawn import CASES, MANY, ON_THE_CPU, POISONS, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_linear_arguments import LAYOUTS
from test_linear_divergence import of_slices
from tolerance import assert_close

pytestmark = ON_THE_CPU

SHAPE = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 60))
APART = st.sampled_from([0.0, 1e-3, 0.3, 3.0, 50.0])
LAYOUT = st.sampled_from((torch.clone, *LAYOUTS))
ROUNDING = 2e-6  # of a measure near its bound


def drawn(shape: tuple[int, int, int], seed: int, apart: float, **options: Any) -> Views:
    return make_views(*shape, apart=apart, seed=seed, **options)


@MANY
@given(SHAPE, seeds, APART)
def test_inequalities_between_the_measures(shape: tuple[int, int, int], seed: int, apart: float) -> None:
    found = divergences(drawn(shape, seed, apart))
    for name in ("kl", "reverse_kl", "js", "tv", "hellinger"):
        assert (getattr(found, name) >= 0).all(), name
    assert (found.tv <= 1 + ROUNDING).all() and (found.hellinger <= 1 + ROUNDING).all()
    assert (found.js <= math.log(2) + ROUNDING).all()
    # Pinsker's inequality, and those of Hellinger's distance with total variation and with KL.
    assert (found.tv <= (found.kl / 2).sqrt() + 1e-3).all()
    assert (found.hellinger <= found.tv + ROUNDING).all()
    assert (found.tv <= (2 * found.hellinger).sqrt() + 1e-3).all()
    assert (found.js <= (found.kl + found.reverse_kl) / 4 + ROUNDING).all()


@MANY
@given(SHAPE, seeds, APART, st.floats(0.05, 0.95))
def test_views_that_change_places(shape: tuple[int, int, int], seed: int, apart: float, js_beta: float) -> None:
    views = drawn(shape, seed, apart)
    found = divergences(views, js_beta=js_beta)
    turned = divergences(replace(views, hidden=views.other, other=views.hidden), js_beta=1 - js_beta)
    places = {"kl": "reverse_kl", "reverse_kl": "kl", "entropy": "other_entropy", "other_entropy": "entropy"}
    places |= {"logp": "other_logp", "other_logp": "logp"}
    for name in RESULTS:
        expected = getattr(found, places.get(name, name))
        assert_close(getattr(turned, name), expected.double(), name=name, floor=4e-6)


@MANY
@given(SHAPE, seeds, st.sampled_from(POISONS))
def test_ignored_rows_are_not_read(shape: tuple[int, int, int], seed: int, poison: float) -> None:
    views = drawn(shape, seed, 0.5, bias=True, ignored=0.4)
    results = []
    for value in (0.0, poison):
        clean = {name: torch.where(one.isnan(), value, one) for name, one in views.tensors().items()}
        leaves = replace(views, **clean).leaves()
        found = divergences(leaves)._asdict()
        results.append([*found.values(), *gradients(leaves, found).values()])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@CASES
@given(
    SHAPE,
    seeds,
    APART,
    st.lists(st.integers(0, 59), max_size=3),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 60)), max_size=2),
    st.tuples(LAYOUT, LAYOUT, LAYOUT, LAYOUT),
    st.floats(0.2, 5.0),
    st.integers(1, 2**11),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_any_cut_layout_and_workspace_give_the_dense_measures(
    shape: tuple[int, int, int],
    seed: int,
    apart: float,
    cuts: list[int],
    forbidden: list[tuple[int, int]],
    layouts: tuple[Any, Any, Any, Any],
    temperature: float,
    chunk_bytes: int,
    other_features: int | None,
) -> None:
    """Whole and in slices, with logits of minus infinity in both views."""
    views = drawn(shape, seed, apart, bias=True, other_features=other_features)
    assert views.bias is not None
    for begin, length in forbidden:
        for bias in (views.bias, views.other_bias):
            if bias is not None:
                bias[begin : begin + length] = -math.inf
    for bias in (views.bias, views.other_bias):
        if bias is not None:  # something has to be left
            bias[seed % shape[2]] = 1.0
    names = ("hidden", "other", "weight", "targets")
    views = replace(views, **{name: one(getattr(views, name)) for name, one in zip(names, layouts, strict=True)})
    edges = tuple(sorted({0, shape[2], *(cut for cut in cuts if cut < shape[2])}))
    expected = dense(views.double(), temperature=temperature)
    narrow = dense(views, temperature=temperature)
    whole = divergences(views, temperature=temperature, chunk_bytes=chunk_bytes)._asdict()
    for found in (whole, of_slices(views, edges, temperature=temperature, chunk_bytes=chunk_bytes)):
        for name in RESULTS:
            assert_close(found[name], expected[name], narrow[name], name=name, floor=4e-6)

"""Properties of the LM head's log-probs and losses, drawn by hypothesis."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from cases import Response, default_dtype, make_batch
from drawn import CASES, FEW, MANY, ON_THE_CPU, POISONS, part_of, responses, seeds
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import Head, gradients, logprob, make_head, with_predicting_rows
from test_linear_arguments import LARGEST, LAYOUTS
from test_linear_minus_infinity import by_log_softmax
from tolerance import assert_close, floor_of, same_bits

from vgpo_kernels import combine_slices, linear_logprob, linear_logprob_slice, linear_policy_loss

pytestmark = ON_THE_CPU


@MANY
@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 40), seeds, st.sampled_from(POISONS))
def test_ignored_rows_of_the_head_are_not_read(
    rows: int, features: int, vocabulary: int, seed: int, poison: float
) -> None:
    head = make_head(rows, features, vocabulary, bias=True, ignored=0.4, seed=seed)
    results = []
    for value in (0.0, poison):
        leaves = replace(head, hidden=torch.where(head.hidden.isnan(), value, head.hidden)).leaves()
        hidden, weight, bias = leaves
        logp, entropy = linear_logprob(hidden, weight, head.targets, bias=bias, return_entropy=True)
        results.append([logp.detach(), entropy.detach(), *torch.autograd.grad((logp + entropy).sum(), leaves)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


@MANY
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 40), seeds, st.integers(1, 2**12), st.randoms())
def test_rows_and_chunks_of_the_head_are_independent(
    rows: int, features: int, vocabulary: int, seed: int, chunk_bytes: int, random: object
) -> None:
    head = make_head(rows, features, vocabulary, bias=True, seed=seed)
    expected = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias)
    order = list(range(rows))
    random.shuffle(order)  # type: ignore[attr-defined]
    index = torch.tensor(order)
    hidden, targets = head.hidden[index], head.targets[index]
    actual = linear_logprob(hidden, head.weight, targets, bias=head.bias, chunk_bytes=chunk_bytes)
    assert_close(actual, expected[index].double(), name="logp", floor=4e-6)
    # A cut anywhere in the vocabulary.
    cut = seed % (vocabulary + 1)
    slices = [
        linear_logprob_slice(head.hidden, head.weight[part], head.targets, first=part.start, bias=head.bias[part])
        for part in (slice(0, cut), slice(cut, vocabulary))
        if part.stop > part.start
    ]
    combined, _ = combine_slices(torch.stack(slices), head.targets)
    assert_close(combined, expected.double(), name="logp of slices", floor=4e-6)


@FEW
@given(
    responses.map(lambda drawn: tuple(replace(one, visual=one.visual + 1) for one in drawn)),
    seeds,
    st.sampled_from(["dapo", "grpo", "gspo", "luspo", "vespo"]),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_losses_of_the_head_add_up(drawn: tuple[Response, ...], seed: int, loss_type: str, parts: list[int]) -> None:
    batch, head = with_predicting_rows(make_batch(drawn, seed=seed, features=6), 11)
    options = {"loss_type": loss_type, "num_tokens": batch.response_mask.sum(), "num_sequences": len(drawn)}

    def loss(index: torch.Tensor) -> torch.Tensor:
        part = part_of(batch, index)
        tensors = (head.targets[index], part.old_logp, part.advantages, part.response_mask)
        return linear_policy_loss(part.hidden, head.weight, *tensors, **options).loss

    whole = loss(torch.arange(len(drawn)))
    places = [[row for row in range(len(drawn)) if parts[row] == part] for part in range(3)]
    total = sum(loss(torch.tensor(place, dtype=torch.int64)).double() for place in places)
    assert_close(torch.as_tensor(total), whole.double(), name="loss", floor=4e-6)


LAYOUT = st.sampled_from((torch.clone, *LAYOUTS))
DEFAULTS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@CASES
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(2, 60)),
    seeds,
    st.lists(st.integers(0, 59), max_size=3),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 60)), max_size=2),
    st.tuples(LAYOUT, LAYOUT, LAYOUT, LAYOUT),
    st.floats(0.2, 5.0),
    st.one_of(st.just(1), st.just(LARGEST), st.integers(1, 2**11)),
    DEFAULTS,
)
def test_the_head_is_log_softmax(
    shape: tuple[int, int, int],
    seed: int,
    cuts: list[int],
    forbidden: list[tuple[int, int]],
    layouts: tuple[Any, Any, Any, Any],
    temperature: float,
    chunk_bytes: int,
    default: torch.dtype,
) -> None:
    """Whole and in slices; logits of minus infinity, any strides, workspace and default dtype."""
    head = make_head(*shape, bias=True, seed=seed)
    assert head.bias is not None
    for begin, length in forbidden:
        head.bias[begin : begin + length] = -float("inf")
    hidden, weight, bias, targets = (
        layout(tensor) for layout, tensor in zip(layouts, (*head.tensors(), head.targets), strict=True)
    )
    head = Head(hidden, weight, bias, targets)
    edges = sorted({0, shape[2], *(cut for cut in cuts if cut < shape[2])})

    def sliced(head: Head, leaves: list[torch.Tensor] | None = None, **options: Any) -> tuple[Any, ...]:
        states, rows, offsets = leaves or head.tensors()
        parts = [
            linear_logprob_slice(states, rows[begin:end], head.targets, first=begin, bias=offsets[begin:end], **options)
            for begin, end in itertools.pairwise(edges)
        ]
        return combine_slices(torch.stack(parts), head.targets)

    options = {"temperature": temperature}
    wide = replace(head.double(), targets=targets)
    with default_dtype(default):
        found = [
            [*function(head, **options, chunk_bytes=chunk_bytes), *gradients(head, function, **options)]
            for function in (logprob, sliced)
        ]
    exact, narrow = (
        [*by_log_softmax(one, **options), *gradients(one, by_log_softmax, **options)] for one in (wide, head)
    )
    # A probability has the logits' rounding over the temperature, and its gradient that over the temperature once more.
    floor = floor_of(terms=4096) * max(1.0, temperature**-2)
    for results in found:
        for number, (one, *expected) in enumerate(zip(results, exact, narrow, strict=True)):
            assert one.dtype == torch.float32
            assert_close(one, *expected, name=str(number), floor=floor)


@MANY
@given(
    st.one_of(st.integers(0, LARGEST), st.integers(LARGEST - 40, LARGEST)),
    st.lists(st.one_of(st.integers(0, LARGEST), st.integers(-30, 30)), min_size=6, max_size=6),
    st.one_of(st.none(), st.integers(-LARGEST, LARGEST), st.just(-LARGEST)),
    st.integers(1, 2**10),
    seeds,
)
def test_a_target_is_in_a_slice_by_its_index(
    first: int, near: list[int], ignored: int | None, chunk_bytes: int, seed: int
) -> None:
    """Integers without bounds: which logit is the target's, and which target is nobody's."""
    head = make_head(6, 5, 25, bias=True, seed=seed)
    targets = [min(max(first + value, 0), LARGEST) if value <= 30 else value for value in near]
    given = {"first": first, "bias": head.bias, "ignore_index": ignored, "chunk_bytes": chunk_bytes}
    statistics = linear_logprob_slice(head.hidden, head.weight, torch.tensor(targets), **given)
    logits = head.hidden.double() @ head.weight.double().T + head.bias
    for row, target in enumerate(targets):
        if target == ignored:
            assert not statistics[:, row].any()
        elif 0 <= target - first < 25:
            expected = logits[row, target - first] - logits[row].max()
            assert_close(statistics[2, row], expected, floor=4e-6)
        else:
            assert statistics[2, row] == -float("inf")


@FEW
@given(
    responses.map(lambda drawn: tuple(replace(one, visual=one.visual + 1) for one in drawn)).filter(bool),
    seeds,
    st.sampled_from(["dapo", "grpo", "gspo", "vespo"]),
    st.sampled_from(POISONS),
    st.sampled_from([LARGEST, -LARGEST - 1, 10**6]),
    st.tuples(st.sampled_from((torch.clone, *LAYOUTS[:2])), st.sampled_from((torch.clone, *LAYOUTS[:2]))),
    DEFAULTS,
)
def test_losses_of_the_head_read_what_they_score(
    drawn: tuple[Response, ...],
    seed: int,
    loss_type: str,
    poison: float,
    target: int,
    layouts: tuple[Any, Any],
    default: torch.dtype,
) -> None:
    """Whatever stands where nobody looks, in any strides and under any default dtype: the same bits."""
    batch, head = with_predicting_rows(make_batch(drawn, seed=seed, features=6), 11)
    mask = batch.response_mask
    results = []
    for value, elsewhere, (of_hidden, of_weight), dtype in (
        (0.0, 0, (torch.clone, torch.clone), torch.float32),
        (poison, target, layouts, default),
    ):
        hidden, old_logp = (torch.where(one.isnan(), value, one) for one in (head.hidden, batch.old_logp))
        leaves = [of_hidden(hidden).requires_grad_(), of_weight(head.weight).requires_grad_()]
        with default_dtype(dtype):
            loss, metrics = linear_policy_loss(
                *leaves,
                torch.where(mask, head.targets, elsewhere),
                old_logp,
                batch.advantages,
                mask,
                loss_type=loss_type,
                entropy_coef=0.1,
            )
            by_leaf = torch.autograd.grad(loss, leaves)
        results.append([loss.detach(), *metrics.values(), *by_leaf])
    for clean, poisoned in zip(*results, strict=True):
        assert same_bits(clean, poisoned)

"""Properties of the LM head's log-probs and losses, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Response, make_batch
from drawn import FEW, MANY, ON_THE_CPU, POISONS, part_of, responses, seeds
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import make_head, with_predicting_rows
from tolerance import assert_close

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

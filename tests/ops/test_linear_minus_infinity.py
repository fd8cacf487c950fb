"""Logits of minus infinity: chunks, slices of the vocabulary and rows of nothing else, and targets among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Response, make_batch
from linear_cases import DTYPES, Head, gradients, logprob, make_head, with_predicting_rows
from test_linear_logprob import sliced
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import combine_slices, linear_logprob_slice, linear_policy_loss
from vgpo_kernels.config import PolicyLossOptions
from vgpo_kernels.reference.linear_logprob import predicting_rows
from vgpo_kernels.reference.policy_loss import policy_loss as loss_by_definition

INFINITY = float("inf")
ROWS, VOCABULARY = 8, 2500
CHUNK_BYTES = 4 * ROWS * 1024
# Of three chunks. Every fourth target is among them.
FORBIDDEN = {
    "scattered": slice(0, None, 3),
    "the first chunk": slice(0, 1024),
    "a chunk between": slice(1024, 2048),
    "the last chunk": slice(2048, None),
    "all but one": slice(1, None),
    "all but one chunk": slice(1024, None),
}


def by_log_softmax(head: Head, leaves: list[Tensor] | None = None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """torch's log-softmax of all logits, and its entropy, to which what cannot happen adds nothing."""
    hidden, weight, bias = leaves or head.tensors()
    log_probabilities = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    logp = log_probabilities.gather(-1, head.targets[:, None]).squeeze(-1)
    finite = log_probabilities.masked_fill(log_probabilities == -INFINITY, 0)
    return logp, -(log_probabilities.exp() * finite).sum(-1)


def forbidding(which: slice, *, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> Head:
    """Draw a head with a bias of minus infinity at some entries; one target of four is among them."""
    head = make_head(ROWS, 16, vocabulary, dtype=dtype, bias=True)
    assert head.bias is not None
    head.bias[which] = -INFINITY
    places = torch.arange(ROWS)
    allowed, others = ((head.bias == -INFINITY) == forbidden for forbidden in (False, True))
    good, bad = (kind.nonzero().squeeze(-1) for kind in (allowed, others))
    chosen = torch.where(places % 4 == 1, bad[places * 37 % len(bad)], good[places * 31 % len(good)])
    return replace(head, targets=chosen)


def check(head: Head, device: torch.device, function: Any = logprob, **options: Any) -> None:
    """Compare values and gradients with torch's log-softmax in fp64; its error in fp32 is the yardstick."""
    settings = {"temperature": options.get("temperature", 1.0)}
    wide = replace(head.double(), targets=head.targets)
    narrow = replace(head, hidden=head.hidden.float(), weight=head.weight.float())
    exact, thin = (by_log_softmax(one, **settings) for one in (wide, narrow))
    values = function(head.to(device), **options)
    for name, one, *expected in zip(("logp", "entropy"), values, exact, thin, strict=True):
        assert_close(one, *expected, name=name)
    found = gradients(head.to(device), function, **options)
    exact, thin = (gradients(one, by_log_softmax, **settings) for one in (wide, narrow))
    for name, one, *expected in zip(("hidden", "weight", "bias"), found, exact, thin, strict=True):
        assert_close(one, *expected, name=f"gradient by {name}", floor=floor_of(head.hidden.dtype, len(head.weight)))


@pytest.mark.parametrize("which", FORBIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_head(backend_name: str, device: torch.device, dtype: str, which: str) -> None:
    check(forbidding(FORBIDDEN[which], dtype=DTYPES[dtype]), device, chunk_bytes=CHUNK_BYTES, temperature=0.8)


def test_a_forbidden_target_has_the_gradient_of_log_softmax(backend_name: str, device: torch.device) -> None:
    """By hand: the bias's gradient is one at the target, less the two even probabilities."""
    bias = torch.tensor([0.0, -INFINITY, 0.0], device=device).requires_grad_()
    hidden, weight = torch.zeros(1, 4, device=device), torch.zeros(3, 4, device=device)
    head = Head(hidden, weight, bias, torch.tensor([1], device=device))
    logp, entropy = logprob(head)
    assert logp.item() == -INFINITY and entropy.item() == pytest.approx(0.6931472)
    (gradient,) = torch.autograd.grad(logp, bias)
    assert gradient.tolist() == pytest.approx([-0.5, 1.0, -0.5])


# A slice of nothing else, in front, between and behind; with the target of a row in it, or not.
SLICED = {"the first": slice(0, 5), "the second": slice(5, 150), "the third": slice(150, None), "two": slice(5, None)}


@pytest.mark.parametrize("which", SLICED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_nothing_else_count_as_nothing(
    backend_name: str, device: torch.device, dtype: str, which: str
) -> None:
    check(forbidding(SLICED[which], vocabulary=200, dtype=DTYPES[dtype]), device, sliced, temperature=1.2)


def test_the_statistics_of_a_slice_of_nothing_else(backend_name: str, device: torch.device) -> None:
    head = make_head(3, 8, 40).to(device)
    bias = torch.full((40,), -INFINITY, device=device)
    for first in (0, 100):
        found = linear_logprob_slice(head.hidden, head.weight, head.targets, first=first, bias=bias)
        assert found.tolist() == [[-INFINITY] * 3] * 3 + [[0.0] * 3]


@pytest.mark.parametrize("function", [logprob, sliced])
def test_a_row_of_nothing_else_is_nan(backend_name: str, device: torch.device, function: Any) -> None:
    """Values and gradients, as of torch's log-softmax. The other rows keep theirs."""
    head = make_head(ROWS, 16, 200, bias=True)
    head.weight[:, 0] = 1
    head.hidden[2, 0] = -INFINITY
    head = replace(head, bias=head.bias.clone().index_fill(0, torch.arange(5), -INFINITY), targets=head.targets + 5)
    check(replace(head, targets=head.targets.clamp(max=199)), device, function)


@pytest.mark.parametrize("vocabulary", [1, 37, 300, 2100])
def test_a_nan_among_them_shows(backend_name: str, device: torch.device, vocabulary: int) -> None:
    for place in {0, vocabulary // 3, vocabulary - 2, vocabulary - 1} - {-1}:
        head = make_head(2, 8, vocabulary, bias=True)
        assert head.bias is not None
        head.bias[:] = -INFINITY
        head.weight[place] = float("nan")
        logp, entropy = logprob(head.to(device))
        assert logp.isnan().all() and entropy.isnan().all()
        head = head.to(device)
        part = linear_logprob_slice(head.hidden, head.weight, head.targets, first=10**6, bias=head.bias)
        other = linear_logprob_slice(head.hidden, torch.ones_like(head.weight), head.targets, first=0)
        assert combine_slices(torch.stack([part, other]), head.targets)[0].isnan().all()


def test_slices_that_are_not_read_have_no_part_in_a_gradient(backend_name: str, device: torch.device) -> None:
    slices = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).to(device)
    slices[:, :, 1] = float("nan")
    slices.requires_grad_()
    logp, entropy = combine_slices(slices, torch.tensor([0, -100, 1], device=device))
    (gradient,) = torch.autograd.grad((logp + entropy).sum(), slices)
    assert not gradient[:, :, 1].any() and gradient.isfinite().all()


FEW = (Response(length=9, holes=True), Response(length=12), Response(length=0))


@pytest.mark.parametrize(("loss_type", "dtype"), [("cispo", "float32"), ("cispo", "float16"), ("gspo", "float32")])
def test_losses_of_the_head(backend_name: str, device: torch.device, loss_type: str, dtype: str) -> None:
    """In one sweep over the logits and in two. Where cispo scores a forbidden target, its gradient is finite."""
    vocabulary, batch = 90, make_batch(FEW, dtype=DTYPES[dtype])
    batch, head = with_predicting_rows(batch, vocabulary)
    mask = batch.response_mask
    head.bias[30:70] = -INFINITY
    targets = head.targets.clone()
    targets[mask] = targets[mask] % 30
    if loss_type == "cispo":
        targets[tuple(mask.nonzero()[3])] = 44
    options = {"loss_type": loss_type, "entropy_coef": 0.05, "max_length": 32}

    def by_logits(leaves: list[Tensor]) -> Tensor:
        hidden, weight, bias = leaves
        rows = hidden.reshape(-1, hidden.shape[-1])[predicting_rows(mask, hidden)[mask.view(-1)]]
        found = by_log_softmax(Head(rows, weight, bias, targets[mask]), [rows, weight, bias])
        logp, entropy = (torch.zeros(mask.shape, dtype=hidden.dtype).masked_scatter(mask, one) for one in found)
        settings = PolicyLossOptions(**options).as_floats()
        given = {"old_logp": batch.old_logp, "advantages": batch.advantages, "response_mask": mask}
        return loss_by_definition(logp=logp, entropy=entropy, options=settings, dtype=hidden.dtype, **given)[0]

    def by_the_head(leaves: list[Tensor]) -> Tensor:
        moved, hidden_weight_bias = batch.to(device), [leaf.to(device) for leaf in leaves]
        arguments = (targets.to(device), moved.old_logp, moved.advantages, moved.response_mask)
        hidden, weight, bias = hidden_weight_bias
        return linear_policy_loss(
            hidden, weight, *arguments, bias=bias, chunk_bytes=4 * 20 * vocabulary, **options
        ).loss

    results = []
    for function, kind in ((by_the_head, None), (by_logits, torch.float64), (by_logits, torch.float32)):
        leaves = [leaf.detach().to(kind or leaf.dtype).clone().requires_grad_() for leaf in head.tensors()]
        loss = function(leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for name, one, *expected in zip(("loss", "hidden", "weight", "bias"), *results, strict=True):
        assert_close(one, *expected, name=name, floor=floor_of(DTYPES[dtype], int(mask.sum())))
    assert results[0][0].isinf() == (loss_type == "cispo")

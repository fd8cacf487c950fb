"""What linear_logprob returns beside log-probabilities: sums of squared probabilities, and what a sampler keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, Head, definition_of, logprob, make_head
from tolerance import assert_close, same_bits
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vgpo_kernels import LinearLogprob, combine_slices, linear_logprob, linear_logprob_slice
from vgpo_kernels.reference.linear_logprob import IGNORED
from vgpo_kernels.reference.truncation import Truncation

CHUNK_BYTES = 4 * 30 * 1100


def more(head: Head, leaves: list[Tensor] | None = None, **options: Any) -> LinearLogprob:
    hidden, weight, *bias = leaves or head.tensors()
    options |= {"bias": bias[0] if bias else None}
    with definition_of(hidden):
        found = linear_logprob(hidden, weight, head.targets, **options)
    assert isinstance(found, LinearLogprob)
    return found


def log_probabilities(head: Head, softcap: float | None = None) -> Tensor:
    """Of every token, in fp64."""
    logits = torch.where((head.targets != IGNORED)[:, None], head.hidden.double(), 0.0) @ head.weight.double().T
    logits = logits if head.bias is None else logits + head.bias.double()
    return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)


# ---- sums of squares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_sums_of_squares(backend_name: str, device: torch.device, dtype: str, softcap: float | None) -> None:
    head = make_head(37, 16, 1300, dtype=DTYPES[dtype], bias=True, ignored=0.2)
    found = more(head.to(device), return_sum_squares=True, softcap=softcap, chunk_bytes=CHUNK_BYTES)
    kept = head.targets != IGNORED
    expected = torch.where(kept, log_probabilities(head, softcap).exp().square().sum(-1), 0.0)
    assert found.sum_squares is not None and found.sum_squares.dtype == torch.float32
    assert_close(found.sum_squares, expected)
    assert found.entropy is None and found.log_mass is None and found.kept is None


def test_asking_for_more_changes_nothing_else(backend_name: str, device: torch.device) -> None:
    head = make_head(19, 16, 700, bias=True).to(device)
    leaves, others = head.leaves(), head.leaves()
    logp, entropy = logprob(head, leaves)
    found = more(head, others, return_sum_squares=True, return_entropy=True)
    assert found.entropy is not None and found.sum_squares is not None
    assert same_bits(found.logp, logp) and same_bits(found.entropy, entropy)
    assert not found.sum_squares.requires_grad
    expected = torch.autograd.grad((logp + entropy.square()).sum(), leaves)
    gradients = torch.autograd.grad((found.logp + found.entropy.square()).sum(), others)
    assert all(same_bits(*pair) for pair in zip(gradients, expected, strict=True))


def test_sums_of_squares_of_slices_combine(backend_name: str, device: torch.device) -> None:
    head = make_head(11, 8, 90, bias=True, ignored=0.2)
    assert head.bias is not None
    head.bias[:30] = -math.inf  # a slice that counts as nothing
    targets = head.targets.masked_fill((head.targets >= 0) & (head.targets < 30), 40)
    head = replace(head, targets=targets)
    moved = head.to(device)
    assert moved.bias is not None
    parts = [
        linear_logprob_slice(
            moved.hidden,
            moved.weight[begin:end],
            moved.targets,
            first=begin,
            bias=moved.bias[begin:end],
            return_sum_squares=True,
        )
        for begin, end in pairwise([0, 30, 31, 90])
    ]
    found = combine_slices(torch.stack(parts), moved.targets)
    assert isinstance(found, LinearLogprob) and found.sum_squares is not None
    expected = torch.where(targets != IGNORED, log_probabilities(head).exp().square().sum(-1), 0.0)
    assert_close(found.sum_squares, expected)
    for one, other in zip(found[:2], logprob(head.double()), strict=True):
        assert_close(one, other.double())


# ---- what a sampler keeps ------------------------------------------------------------------------------------------

CUTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 7},
    "one": {"top_k": 1},
    "more than there are": {"top_k": 10_000},
    "top-p": {"top_p": 0.8},
    "the likeliest": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "top-k and top-p": {"top_k": 20, "top_p": 0.9},
    "all": {"top_k": 30, "top_p": 0.95, "min_p": 0.001},
}


def as_transformers(
    logp: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Any:
    """Mask of what transformers' own warpers keep, in vLLM's order."""
    ids: Any = torch.zeros(logp.shape[0], 1, dtype=torch.int64)
    warpers = [
        *([MinPLogitsWarper(min_p)] if min_p is not None else []),
        *([TopKLogitsWarper(top_k)] if top_k is not None else []),
        *([TopPLogitsWarper(top_p)] if top_p is not None else []),
    ]
    for warper in warpers:
        logp = warper(ids, logp)
    return logp > -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CUTS)
def test_what_a_sampler_keeps(backend_name: str, device: torch.device, name: str, dtype: str) -> None:
    head = make_head(60, 16, 1300, dtype=DTYPES[dtype], bias=True, ignored=0.2)
    logp = log_probabilities(head)
    # Likely targets and others, so that both answers occur.
    likely = logp.topk(12).indices[torch.arange(60), torch.arange(60) % 12]
    scored = head.targets != IGNORED
    targets = torch.where(scored & (torch.arange(60) % 3 > 0), likely, head.targets)
    head = replace(head, targets=targets)
    found = more(head.to(device), return_entropy=True, chunk_bytes=CHUNK_BYTES, **CUTS[name])
    keeps = as_transformers(logp, **CUTS[name])
    mass = torch.where(keeps, logp, -math.inf).logsumexp(-1)
    assert found.log_mass is not None and found.kept is not None and found.entropy is not None
    assert_close(found.log_mass, torch.where(scored, mass, 0.0))
    expected = keeps.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1) & scored
    assert found.kept.dtype == torch.bool and torch.equal(found.kept.cpu(), expected)
    assert not found.log_mass.requires_grad
    for one, other in zip(found[:2], logprob(head.double()), strict=True):
        assert_close(one, other.double())
    # Those of the kept tokens are log-probabilities of the renormalised distribution.
    renormalised = torch.where(keeps, logp, -math.inf).log_softmax(-1)
    difference = (found.logp - found.log_mass).cpu().double()[expected]
    assert_close(difference, renormalised.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)[expected])


@pytest.mark.parametrize("name", ["top-k", "top-p", "all"])
def test_gradients_beside_a_cut(backend_name: str, device: torch.device, name: str) -> None:
    head = make_head(19, 16, 700, bias=True, ignored=0.2).to(device)
    leaves, others = head.leaves(), head.leaves()
    logp, entropy = logprob(head, leaves, softcap=5.0)
    found = more(head, others, return_sum_squares=True, return_entropy=True, softcap=5.0, **CUTS[name])
    assert found.entropy is not None
    expected = torch.autograd.grad((logp + entropy.square()).sum(), leaves)
    gradients = torch.autograd.grad((found.logp + found.entropy.square()).sum(), others)
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other.double())


def test_settings_that_keep_everything(backend_name: str, device: torch.device) -> None:
    head = make_head(9, 8, 50, ignored=0.3).to(device)
    found = more(head, top_p=1.0, min_p=0.0)
    assert found.log_mass is not None and found.kept is not None
    assert (found.log_mass == 0).all() and torch.equal(found.kept, head.targets != IGNORED)


def test_a_row_without_a_distribution_has_no_mass(backend_name: str, device: torch.device) -> None:
    head = make_head(5, 8, 50)
    hidden = head.hidden.clone()
    hidden[2] = math.nan
    for cut in CUTS.values():
        found = more(replace(head, hidden=hidden).to(device), return_sum_squares=True, **cut)
        assert found.log_mass is not None and found.sum_squares is not None
        assert (
            found.log_mass.isnan().tolist() == found.sum_squares.isnan().tolist() == [False, False, True, False, False]
        )


def test_no_row(backend_name: str, device: torch.device) -> None:
    head = make_head(0, 8, 50).to(device)
    found = more(head, return_sum_squares=True, return_entropy=True, top_k=3, top_p=0.9)
    assert all(values is not None and values.shape == (0,) for values in found)


def test_ties_at_the_edge() -> None:
    """As likely as the last of the top k: kept, as transformers and vLLM do. Top-p keeps as many as it needs."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).log()
    mass, kept = Truncation(top_k=2).kept(logits, torch.tensor([3]))
    assert math.isclose(mass.exp().item(), 1.0, rel_tol=1e-6) and kept.item() == 1
    mass, kept = Truncation(top_p=0.55).kept(logits, torch.tensor([3]))
    assert math.isclose(mass.exp().item(), 0.6, rel_tol=1e-6) and kept.item() == 1


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "top_k": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "top_k's type": ({"top_k": 1.5}, TypeError, "top_k must be an integer, got float"),
    "top_p": ({"top_p": 1.5}, ValueError, "top_p must be from 0 to 1, got 1.5"),
    "no top_p": ({"top_p": 0.0}, ValueError, "top_p must be above 0, got 0.0"),
    "min_p": ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1, got -0.1"),
    "flag": ({"return_sum_squares": 1}, TypeError, "return_sum_squares must be True or False, got int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    head = make_head(3, 8, 20)
    with pytest.raises(error, match=message):
        linear_logprob(head.hidden, head.weight, head.targets, **options)

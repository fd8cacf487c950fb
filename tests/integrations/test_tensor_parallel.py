"""A vocabulary split over processes of a gloo group: the results and gradients of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integrations import tensor_parallel_losses as losses
from integrations.ranks import run_ranks
from integrations.tensor_parallel_case import FIRST, TEMPERATURE, divergence_objective, objective, other_view
from linear_cases import DTYPES, Head, make_head
from tolerance import assert_close, floor_of
from torch import Tensor

from vgpo_kernels import LinearDivergence, backend, backends, linear_divergence, linear_logprob
from vgpo_kernels.reference.linear_divergence import MEASURES

WORLD = 2
BACKENDS = ["reference", *(["cpp"] if backends.describe()["built"]["cpp"] else [])]
# Of the second, one rank's slice of the vocabulary has no finite logit, but the targets of some rows.
KINDS = ("any logits", "minus infinities")
CASES = [(name, dtype, kind) for name in BACKENDS for dtype in ("float32", "bfloat16") for kind in KINDS]


def head_of(dtype: str, kind: str) -> Head:
    head = make_head(23, 16, FIRST[-1], dtype=DTYPES[dtype], bias=True, ignored=0.2)
    if kind == "minus infinities":
        assert head.bias is not None
        head.bias[FIRST[1] :] = -float("inf")
    return head


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what each of two processes computes for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(
        {case: (*head_of(*case[1:]).tensors(), head_of(*case[1:]).targets) for case in CASES},
        folder / "cases.pt",
    )
    run_ranks("tensor_parallel_case.py", WORLD, folder)
    return folder


@pytest.fixture(scope="module")
def ranks(two_ranks: Path) -> list[dict[tuple[str, str, str], tuple[list[Tensor], list[Tensor]]]]:
    """What each of two processes computes of every head."""
    return [torch.load(two_ranks / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_are_one_head(
    ranks: list[dict[tuple[str, str, str], tuple[list[Tensor], list[Tensor]]]], case: tuple[str, str, str]
) -> None:
    head = head_of(*case[1:])
    hidden, weight, bias = head.double().leaves()
    with backend("reference"):
        values = linear_logprob(hidden, weight, head.targets, bias=bias, temperature=TEMPERATURE, return_entropy=True)
    by_hidden, by_weight, by_bias = torch.autograd.grad(objective(*values), (hidden, weight, bias))
    floor = floor_of(head.hidden.dtype, FIRST[-1])
    for rank, results in enumerate(ranks):
        rows = slice(FIRST[rank], FIRST[rank + 1])
        logp, entropy, *gradients = results[case][0]
        assert_close(logp, values[0], name=f"logp of rank {rank}")
        assert_close(entropy, values[1], name=f"entropy of rank {rank}")
        assert_close(gradients[0], by_hidden, name=f"gradient by hidden of rank {rank}", floor=floor)
        assert_close(gradients[1], by_weight[rows], name=f"gradient by the rows of rank {rank}", floor=floor)
        assert_close(gradients[2], by_bias[rows], name=f"gradient by the bias of rank {rank}", floor=floor)
    # Ranks that differ in a bit would drift apart.
    one, other = (results[case][0][:3] for results in ranks)
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_divergences_of_two_ranks_are_those_of_one_head(
    ranks: list[dict[tuple[str, str, str], tuple[list[Tensor], list[Tensor]]]], case: tuple[str, str, str]
) -> None:
    head = head_of(*case[1:])
    other = other_view(head.hidden).double().requires_grad_()
    hidden, weight, bias = head.double().leaves()
    with backend("reference"):
        values = linear_divergence(
            hidden, other, weight, head.targets, bias=bias, temperature=TEMPERATURE, measures=MEASURES, js_beta=0.3
        )
    by_hidden, by_other, by_weight, by_bias = torch.autograd.grad(
        divergence_objective(values), (hidden, other, weight, bias)
    )
    # The gradients of nine results add up, of which some are of opposite signs.
    floor = 2 * floor_of(head.hidden.dtype, FIRST[-1])
    for rank, results in enumerate(ranks):
        rows = slice(FIRST[rank], FIRST[rank + 1])
        found, gradients = LinearDivergence(*results[case][1][:9]), results[case][1][9:]
        for name, value in found._asdict().items():
            assert_close(value, getattr(values, name), name=f"{name} of rank {rank}")
        expected = {"hidden": by_hidden, "other": by_other, "weight": by_weight[rows], "bias": by_bias[rows]}
        for (name, exact), gradient in zip(expected.items(), gradients, strict=True):
            assert_close(gradient, exact, name=f"gradient by {name} of rank {rank}", floor=floor)
    one, another = (results[case][1][:11] for results in ranks)
    assert all(torch.equal(left, right) for left, right in zip(one, another, strict=True))


def check_losses(folder: Path, world: int, name: str) -> None:
    """Compare what each rank has of a loss with one process, and the ranks with each other, bit by bit."""
    losses.check(losses.CASES[name], [torch.load(folder / f"losses{rank}.pt")[name] for rank in range(world)])


@pytest.mark.parametrize("name", losses.CASES)
def test_losses_of_two_ranks_are_those_of_one_head(two_ranks: Path, name: str) -> None:
    check_losses(two_ranks, WORLD, name)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what each of four processes computes for every loss."""
    folder = tmp_path_factory.mktemp("four")
    run_ranks("tensor_parallel_case.py", 4, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.CASES)
def test_losses_of_four_unequal_ranks_are_those_of_one_head(four_ranks: Path, name: str) -> None:
    check_losses(four_ranks, 4, name)

"""An LM head in tiles on a Hopper GPU: against fp64, against the way over logits, and whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from gpu_calls import NEEDS_HOPPER_KERNELS, captured
from tolerance import same_bits
from torch import Tensor

from vgpo_kernels import backend, linear_logprob, linear_policy_loss
from vgpo_kernels.ops.lm_head import HeadKernels, compiled_kernels, finished, new_statistics
from vgpo_kernels.reference.logits import LogitMap

pytestmark = NEEDS_HOPPER_KERNELS

SHAPES = [
    (9, 5, 40),
    (1, 256, 8),
    (128, 300, 64),
    (300, 1003, 72),
    (513, 700, 200),
    (700, 5001, 3584),
    (4096, 2000, 896),
]


@pytest.fixture(autouse=True)
def cuda_backend() -> Iterator[None]:
    with backend("cuda"):
        yield


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor


def make(rows: int, columns: int, dim: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Case:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, dim, device="cuda", generator=generator).to(dtype)
    weight = (2 * torch.randn(columns, dim, device="cuda", generator=generator) / dim**0.5).to(dtype)
    return Case(hidden, weight, torch.randint(columns, (rows,), device="cuda", generator=generator))


def kernels() -> HeadKernels:
    return compiled_kernels(torch.device("cuda"))


def statistics(case: Case, *, tiles: bool, temperature: float = 1.0, first: int = 0) -> Tensor:
    running = new_statistics(case.hidden)
    columns = kernels().tile_columns(case.hidden, case.weight, False)
    assert columns, "no tiles for this call"
    workspace = torch.full((case.hidden.shape[0], columns if tiles else case.weight.shape[0]), torch.nan, device="cuda")
    kernels().statistics(
        case.hidden, case.weight, None, case.targets + first, first, *LogitMap(temperature), running, workspace, False
    )
    return finished(running)


def expected(case: Case, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in fp64."""
    logits = case.hidden.double() @ case.weight.double().T / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, case.targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make(*shape, dtype)
    logp, entropy = linear_logprob(*case, return_entropy=True, temperature=0.7)
    for found, right in zip((logp, entropy), expected(case, 0.7), strict=True):
        # The tensor cores cut off a little more than fp32 would round, at each of D / 16 steps.
        torch.testing.assert_close(found, right.float(), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [2.0**-10, 1.0, 2.0**20])
def test_both_ways_agree(temperature: float) -> None:
    case = make(300, 1003, 1000)
    in_tiles, over_logits = (
        statistics(case, tiles=tiles, temperature=temperature, first=17) for tiles in (True, False)
    )
    torch.testing.assert_close(in_tiles, over_logits, rtol=1e-4, atol=1e-4 / min(temperature, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make(*shape, dtype)
    by = torch.randn(2, shape[0], device="cuda")
    inputs = [tensor.detach().requires_grad_() for tensor in case[:2]]
    logp, entropy = linear_logprob(*inputs, case.targets, return_entropy=True)
    found = torch.autograd.grad((logp, entropy), inputs, tuple(by))
    wide = [tensor.detach().double().requires_grad_() for tensor in case[:2]]
    right = torch.autograd.grad(expected(Case(*wide, case.targets)), wide, tuple(by.double()))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        assert ((one.double() - other).norm() / other.norm()).item() < 6e-3


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    case = make(1000, 3000, 512)
    whole = statistics(case, tiles=True)
    for rows in (slice(0, 1), slice(3, 131), slice(999, 1000), slice(500, 1000)):
        part = Case(case.hidden[rows], case.weight, case.targets[rows])
        assert same_bits(statistics(part, tiles=True), whole[:, rows])
    for _ in range(20):
        assert same_bits(statistics(case, tiles=True), whole)


@pytest.mark.parametrize("columns", range(1, 9))
def test_hardly_any_columns(columns: int) -> None:
    case = make(9, columns, 40)
    for found, right in zip(linear_logprob(*case, return_entropy=True), expected(case), strict=True):
        torch.testing.assert_close(found, right.float(), rtol=2e-5, atol=1e-5)


def test_a_row_spoils_no_other() -> None:
    case = make(400, 900, 128)
    whole = statistics(case, tiles=True)
    spoilt = case.hidden.clone()
    spoilt[7], spoilt[200], spoilt[399] = torch.nan, torch.inf, -torch.inf
    found = statistics(Case(spoilt, *case[1:]), tiles=True)
    others = torch.ones(400, dtype=torch.bool, device="cuda")
    others[[7, 200, 399]] = False
    assert same_bits(found[:, others], whole[:, others])
    assert not found[1, ~others].isfinite().any()


def test_no_weight_is_read_behind_the_last_column() -> None:
    case = make(300, 1003, 64)
    larger = torch.full((1200, 64), torch.nan, device="cuda", dtype=torch.bfloat16)
    larger[:1003] = case.weight
    beside = Case(case.hidden, larger[:1003], case.targets)
    assert same_bits(statistics(beside, tiles=True), statistics(case, tiles=True))


def test_strided_rows() -> None:
    case = make(300, 500, 128)
    wide = torch.full((300, 2, 192), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[:, 1, :128] = case.hidden
    beside = Case(wide[:, 1, :128], *case[1:])
    assert same_bits(statistics(beside, tiles=True), statistics(case, tiles=True))


def test_a_call_is_captured_into_a_graph() -> None:
    case = make(600, 3000, 256)
    expected_logp = linear_logprob(*case, ignore_index=None)
    graph, logp = captured(lambda: linear_logprob(*case, ignore_index=None))
    logp.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(logp, expected_logp)


@pytest.mark.parametrize("normalised", ["dapo", "gspo"])
def test_a_loss_and_its_gradients(normalised: str) -> None:
    case = make(6 * 100, 3000, 512)
    hidden = case.hidden.view(6, 100, 512)
    targets, mask = case.targets.view(6, 100)[:, 40:], torch.ones(6, 60, dtype=torch.bool, device="cuda")
    advantages = torch.randn(6, device="cuda")
    results = []
    for name in ("cuda", "reference"):
        inputs = [tensor.detach().requires_grad_() for tensor in (hidden, case.weight)]
        with backend(name):
            loss = linear_policy_loss(*inputs, targets, None, advantages, mask, loss_type=normalised, entropy_coef=0.01)
        results.append((loss.loss.detach(), *torch.autograd.grad(loss.loss, inputs)))
    torch.testing.assert_close(results[0][0].double(), results[1][0].double(), rtol=1e-5, atol=1e-6)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert ((one.double() - other.double()).norm() / other.double().norm()).item() < 8e-3


def test_offsets_pass_32_bits() -> None:
    """A gradient of 2^31 elements and more, in one chunk."""
    rows, columns, dim = 12000, 200000, 64
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB")
    case = make(rows, columns, dim)
    inputs = [tensor.detach().requires_grad_() for tensor in case[:2]]
    logp = linear_logprob(*inputs, case.targets, chunk_bytes=2**34)
    by_hidden, by_weight = torch.autograd.grad(logp.sum(), inputs)
    tail = Case(case.hidden[-50:].detach().double().requires_grad_(), case.weight.double(), case.targets[-50:])
    (right,) = torch.autograd.grad(expected(tail)[0].sum(), tail.hidden)
    assert ((by_hidden[-50:].double() - right).norm() / right.norm()).item() < 6e-3
    assert by_weight.isfinite().all()

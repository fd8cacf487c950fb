"""Arguments of the LM head's functions at their edges: strides, integers, temperatures, batches of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Response, make_batch
from linear_cases import DTYPES, check, logprob, make_head, with_predicting_rows
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import combine_slices, linear_logprob, linear_logprob_slice, linear_policy_loss
from vgpo_kernels.ops.lm_head import HeadKernels, compiled_kernels
from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.policy_loss import policy_loss

LARGEST = 2**63 - 1


# ---- strides -----------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """Lay a tensor out with its first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def stepping(tensor: Tensor) -> Tensor:
    """Lay a tensor out with gaps of an odd number of elements, which must not be read, in every dimension."""
    wide = tensor.new_full([3 * size + 1 for size in tensor.shape], float("nan") if tensor.is_floating_point() else -7)
    view = wide[tuple(slice(1, None, 3) for _ in tensor.shape)]
    return view.copy_(tensor)


def one_row(tensor: Tensor) -> Tensor:
    """Repeat the first row without memory for it: a stride of 0."""
    return tensor[:1].clone().expand_as(tensor)


def one_column(tensor: Tensor) -> Tensor:
    """Repeat the first of the last dimension."""
    return tensor[..., :1].clone().expand_as(tensor)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (transposed, stepping, one_row, one_column)


def results_of(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Compute results and the gradients of a weighted sum of them by leaves that keep their strides."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves)
    weights = [torch.arange(1.0, one.numel() + 1, device=one.device).view_as(one) / one.numel() for one in results]
    return [*(one.detach() for one in results), *torch.autograd.grad(results, leaves, weights)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "ignored"), [("float32", 0.0), ("float32", 0.4), ("bfloat16", 0.0), ("float16", 0.4)]
)
def test_any_strides(
    backend_name: str, device: torch.device, dtype: str, layout: Callable[[Tensor], Tensor], ignored: float
) -> None:
    head = make_head(12, 8, 90, dtype=DTYPES[dtype], bias=True, ignored=ignored).to(device)
    head = replace(head, hidden=head.hidden.nan_to_num())
    for name in ("hidden", "weight", "bias", "targets"):
        laid = layout(getattr(head, name))
        odd, plain = replace(head, **{name: laid}), replace(head, **{name: laid.contiguous()})
        found, expected = (
            results_of(lambda *leaves, of=one: logprob(of, list(leaves), chunk_bytes=4 * 300), one.tensors())
            for one in (odd, plain)
        )
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other.double(), name=f"{layout.__name__} {name}", floor=floor_of(DTYPES[dtype], 90))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_any_strides(backend_name: str, device: torch.device, layout: Callable[[Tensor], Tensor]) -> None:
    targets = torch.arange(5, device=device)
    parts = layout(torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(device))
    odd, plain = (results_of(lambda one: combine_slices(one, targets), [one]) for one in (parts, parts.contiguous()))
    for one, other in zip(odd, plain, strict=True):
        assert_close(one, other.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slices_of_16_bits_are_combined_in_float32(backend_name: str, device: torch.device, dtype: torch.dtype) -> None:
    targets = torch.arange(5, device=device)
    parts = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found, wanted = (results_of(lambda one: combine_slices(one, targets), [one]) for one in (parts, parts.float()))
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    assert torch.equal(found[2], wanted[2].to(dtype))


FEW = (Response(length=9, holes=True), Response(length=12), Response(length=0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_losses_of_any_strides(
    backend_name: str, device: torch.device, loss_type: str, layout: Callable[[Tensor], Tensor]
) -> None:
    batch, head = with_predicting_rows(make_batch(FEW), 30)
    given = {
        "hidden": head.hidden.nan_to_num(),
        "weight": head.weight,
        "targets": head.targets.clamp(min=0),
        "old_logp": batch.old_logp.nan_to_num(),
        "advantages": batch.token_advantages.nan_to_num(),
        "bias": head.bias,
    }
    given = {name: value.to(device) for name, value in given.items()}
    # What the interpreter takes its time for is the same for every layout.
    changed = ("hidden", "weight") if backend_name == "triton" else tuple(given)

    def loss(arguments: dict[str, Tensor]) -> list[Tensor]:
        names = ("hidden", "weight", "bias")
        return results_of(
            lambda *leaves: [
                linear_policy_loss(
                    **(arguments | dict(zip(names, leaves, strict=True))),
                    response_mask=batch.response_mask.to(device),
                    loss_type=loss_type,
                ).loss
            ],
            [arguments[name] for name in names],
        )

    for name in changed:
        laid = layout(given[name])
        for one, other in zip(loss(given | {name: laid}), loss(given | {name: laid.contiguous()}), strict=True):
            assert_close(one, other.double(), name=f"{layout.__name__} {name}")


# ---- outputs of the operators that write to their arguments -------------------------------------------------------


def kernels_of(backend_name: str, device: torch.device) -> HeadKernels:
    """Return the arithmetic of a chunk on a backend."""
    if backend_name == "reference":
        operators = (reference.head_statistics, reference.head_gradient, reference.head_product)
        return HeadKernels(*operators, policy_loss, half=False, packs=False)
    if backend_name == "triton":
        from vgpo_kernels.triton_kernels.linear_logprob import KERNELS

        return KERNELS
    return compiled_kernels(device)


def chunk(device: torch.device) -> dict[str, Any]:
    head = make_head(3, 8, 5).to(device)
    return {
        "hidden": head.hidden,
        "weight": head.weight,
        "bias": None,
        "targets": head.targets,
        "first": 0,
        "temperature": 1.0,
        "temperatures": None,
        "logit_scale": 1.0,
        "softcap": 0.0,
    }


OVERLAPS = {
    "one row": lambda rows, columns, device: torch.zeros(1, columns, device=device).expand(rows, columns),
    "one number": lambda rows, columns, device: torch.zeros(1, 1, device=device).expand(rows, columns),
    "rows too close": lambda rows, columns, device: torch.zeros(rows * columns, device=device).as_strided(
        (rows, columns), (columns - 1, 1)
    ),
    "columns apart": lambda rows, columns, device: torch.zeros(columns, rows, device=device).T,
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_outputs_that_overlap_themselves_are_refused(backend_name: str, device: torch.device, overlap: str) -> None:
    kernels, given = kernels_of(backend_name, device), chunk(device)
    rows, columns = 3, 5

    def output(number: int, length: int) -> Tensor:
        return OVERLAPS[overlap](number, length, device)

    def fresh(number: int, length: int) -> Tensor:
        return torch.zeros(number, length, device=device)

    with pytest.raises(ValueError, match=r"statistics (is written to|must be float32)"):
        kernels.statistics(*given.values(), output(4, rows), fresh(rows, columns), True)
    with pytest.raises(ValueError, match=r"logits (is written to|must be float32)"):
        kernels.statistics(*given.values(), fresh(4, rows), output(rows, columns), True)
    with pytest.raises(ValueError, match=r"logits (is written to|must be float32)"):
        kernels.gradient(*given.values(), fresh(5, rows), output(rows, columns), True)
    left, right = given["hidden"], given["weight"].T.contiguous()
    for accumulate in (False, True):
        with pytest.raises(ValueError, match=r"result (is written to|must be float32)"):
            kernels.product(left, right, output(rows, columns), accumulate)
        # One row cannot overlap with another, whatever its stride.
        kernels.product(left[:1], right, torch.zeros(columns, device=device).expand(1, columns), accumulate)


# ---- integers and temperatures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2**31 - 1, 2**40, LARGEST - 2, LARGEST])
def test_a_slice_may_begin_anywhere(backend_name: str, device: torch.device, first: int) -> None:
    """Its end may lie behind the largest integer. No target is wrapped round to another column."""
    head = make_head(6, 8, 30, bias=True).to(device)
    places = torch.tensor([0, 1, 2, 3, 29, 30], device=device).clamp(max=LARGEST - first)

    def part(begin: int, targets: Tensor) -> list[Tensor]:
        return results_of(
            lambda *leaves: [
                linear_logprob_slice(leaves[0], leaves[1], targets, first=begin, bias=leaves[2], chunk_bytes=4 * 10)[1:]
            ],
            head.tensors(),
        )

    for one, other in zip(part(first, places + first), part(0, places), strict=True):
        assert same_bits(one, other)
    before = torch.tensor([0, 1, 5, first - 1, first - 30, first - 31], device=device)
    assert (part(first, before)[0][1] == -float("inf")).all()


@pytest.mark.parametrize("index", [LARGEST, -LARGEST, 0, 7])
def test_any_integer_may_be_ignored(backend_name: str, device: torch.device, index: int) -> None:
    head = make_head(40, 8, 30, bias=True, ignored=0.4)
    targets = torch.where(head.targets == index, 1, head.targets)
    expected = logprob(replace(head, targets=targets).to(device))
    marked = replace(head, targets=torch.where(head.hidden[:, 0].isnan(), index, targets)).to(device)
    for one, other in zip(logprob(marked, ignore_index=index), expected, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("chunk_bytes", [1, LARGEST])
def test_any_workspace_will_do(backend_name: str, device: torch.device, chunk_bytes: int) -> None:
    check(make_head(3, 8, 20, bias=True), device, chunk_bytes=chunk_bytes)


def test_targets_that_nobody_reads_may_be_anything(backend_name: str, device: torch.device) -> None:
    batch, head = with_predicting_rows(make_batch(FEW), 30)
    mask = batch.response_mask

    def loss(elsewhere: int) -> Tensor:
        targets = torch.where(mask, head.targets, elsewhere).to(device)
        tensors = (batch.old_logp, batch.advantages, mask)
        return linear_policy_loss(
            head.hidden.to(device), head.weight.to(device), targets, *(one.to(device) for one in tensors)
        ).loss

    expected = loss(0)
    assert expected.isfinite()
    for elsewhere in (LARGEST, -LARGEST - 1, -100):
        assert torch.equal(loss(elsewhere), expected)


@pytest.mark.parametrize(("temperature", "scale"), [(2.0**-126, 2.0**-60), (2.0**126, 2.0**62), (1e-30, 2.0**-50)])
def test_temperatures_that_fp32_knows(
    backend_name: str, device: torch.device, temperature: float, scale: float
) -> None:
    head = make_head(6, 8, 30)
    head = replace(head, hidden=head.hidden * scale, weight=head.weight * scale)
    for name, one, other in zip(
        ("logp", "entropy"),
        logprob(head.to(device), temperature=temperature),
        logprob(head.double(), temperature=temperature),
        strict=True,
    ):
        assert_close(one, other, name=name, floor=4e-6)


@pytest.mark.parametrize(
    "temperature", [5e-324, 1e-46, 2.0**-127, 1e-38, 2.0**127, 8.6e37, 1e300, 10**400], ids=lambda value: str(value)[:8]
)
def test_temperatures_beyond_fp32_are_refused(temperature: float) -> None:
    head = make_head(6, 8, 30)
    with pytest.raises(ValueError, match=r"temperature must be finite and above 0, from 2\^-126 to 2\^126, got "):
        linear_logprob(head.hidden, head.weight, head.targets, temperature=temperature)


# ---- batches of gradients -----------------------------------------------------------------------------------------


def assert_batches(results: Callable[[], tuple[Tensor, list[Tensor]]], count: int = 3) -> None:
    """Compare ``is_grads_batched`` with a loop, on graphs that are kept and on one that is not."""
    result, leaves = results()
    weights = torch.randn(count, *result.shape, generator=torch.Generator().manual_seed(3)).to(result)
    loop = [torch.autograd.grad(result, leaves, weight, retain_graph=True) for weight in weights]
    kept = torch.autograd.grad(result, leaves, weights, is_grads_batched=True, retain_graph=True)
    freed = torch.autograd.grad(result, leaves, weights, is_grads_batched=True)
    for one, other, each in zip(kept, freed, zip(*loop, strict=True), strict=True):
        assert torch.equal(one, torch.stack(each)) and torch.equal(other, torch.stack(each))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_gradients_is_a_loop(backend_name: str, device: torch.device, dtype: str) -> None:
    head = make_head(6, 8, 30, dtype=DTYPES[dtype], bias=True, ignored=0.3).to(device)

    def results() -> tuple[Tensor, list[Tensor]]:
        leaves = head.leaves()
        return torch.stack(logprob(head, leaves)), leaves

    def of_a_slice() -> tuple[Tensor, list[Tensor]]:
        leaves = head.leaves()
        part = linear_logprob_slice(leaves[0], leaves[1], head.targets, first=3, bias=leaves[2])
        return torch.stack(combine_slices(part[None], head.targets.clamp(min=3)))[:, head.targets >= 3], leaves

    assert_batches(results)
    assert_batches(of_a_slice)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_gradients_of_a_loss_is_a_loop(
    backend_name: str, device: torch.device, dtype: str, loss_type: str
) -> None:
    batch, head = with_predicting_rows(make_batch(FEW, dtype=DTYPES[dtype]), 30)
    batch, head = batch.to(device), head.to(device)

    def results() -> tuple[Tensor, list[Tensor]]:
        leaves = head.leaves()
        arguments = (head.targets, batch.old_logp, batch.advantages, batch.response_mask)
        return linear_policy_loss(*leaves[:2], *arguments, bias=leaves[2], loss_type=loss_type).loss, leaves

    assert_batches(results)

"""What models and samplers do to logits: scales, caps and a temperature for each row, on every backend."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, Head, check, gradients, logprob, make_head
from tolerance import assert_close, floor_of, same_bits
from torch import Tensor

from vgpo_kernels import backend, linear_logprob, linear_policy_loss
from vgpo_kernels.ops.linear_logprob import combine_slices, linear_logprob_slice
from vgpo_kernels.reference.linear_logprob import IGNORED

CHUNK_BYTES = 4 * 30 * 1100


def temperatures_of(head: Head) -> Tensor:
    """Draw a temperature for each row, NaN where the row is skipped."""
    drawn = 0.3 + 1.5 * torch.rand(head.targets.shape, generator=torch.Generator().manual_seed(3))
    return drawn.masked_fill(head.targets == IGNORED, math.nan)


MAPS: dict[str, dict[str, Any]] = {
    "scale": {"logit_scale": 0.0625},
    "cap": {"softcap": 3.0},
    "far cap": {"softcap": 1000.0, "temperature": 0.7},
    "temperatures": {"temperature": temperatures_of},
    "all": {"logit_scale": 2.0, "softcap": 5.0, "temperature": temperatures_of},
}


def options_of(name: str, head: Head) -> dict[str, Any]:
    return {key: value(head) if callable(value) else value for key, value in MAPS[name].items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_values_and_gradients(backend_name: str, device: torch.device, name: str, dtype: str) -> None:
    head = make_head(37, 16, 1300, dtype=DTYPES[dtype], bias=True, ignored=0.2)
    check(head, device, chunk_bytes=CHUNK_BYTES, **options_of(name, head))


@pytest.mark.parametrize("name", ["cap", "all"])
@pytest.mark.parametrize("columns", [1, 5, 255, 257])
def test_few_columns(backend_name: str, device: torch.device, name: str, columns: int) -> None:
    head = make_head(5, 8, columns)
    check(head, device, **options_of(name, head))


@pytest.mark.parametrize("name", MAPS)
def test_no_row(backend_name: str, device: torch.device, name: str) -> None:
    head = make_head(0, 8, 20, bias=True).to(device)
    options = options_of(name, head)
    assert [values.shape for values in logprob(head, **options)] == [(0,), (0,)]
    assert all((gradient == 0).all() for gradient in gradients(head, **options))


def test_equal_temperatures_are_one(backend_name: str, device: torch.device) -> None:
    head = make_head(9, 16, 300, bias=True).to(device)
    one = logprob(head, temperature=0.5)
    rows = logprob(head, temperature=torch.full((9,), 0.5, device=device))
    assert all(same_bits(*pair) for pair in zip(one, rows, strict=True))


def test_leading_dimensions(backend_name: str, device: torch.device) -> None:
    head = make_head(12, 8, 50).to(device)
    temperature = temperatures_of(head).to(device)
    flat = linear_logprob(head.hidden, head.weight, head.targets, temperature=temperature, softcap=4.0)
    shaped = linear_logprob(
        head.hidden.view(3, 4, 8), head.weight, head.targets.view(3, 4), temperature=temperature.view(3, 4), softcap=4.0
    )
    assert same_bits(shaped.reshape(-1), flat)


def test_temperatures_are_constants(backend_name: str, device: torch.device) -> None:
    head = make_head(4, 8, 20).to(device)
    temperature = torch.full((4,), 0.7, device=device, requires_grad=True)
    hidden = head.hidden.clone().requires_grad_()
    logp = linear_logprob(hidden, head.weight, head.targets, temperature=temperature)
    by_temperature, _ = torch.autograd.grad(logp.sum(), (temperature, hidden), allow_unused=True)
    assert by_temperature is None


@pytest.mark.parametrize("name", MAPS)
def test_derivatives(name: str) -> None:
    """In fp64, against finite differences."""
    head = make_head(4, 3, 6, bias=True).double()
    options = options_of(name, head)

    def both(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return logprob(head, list(leaves), **options)

    assert torch.autograd.gradcheck(both, head.leaves())


def test_a_cap_lets_a_forbidden_entry_back(backend_name: str, device: torch.device) -> None:
    """tanh of minus infinity is -1: the cap's arithmetic, not the bias's meaning."""
    head = make_head(6, 8, 40, bias=True)
    assert head.bias is not None
    head.bias[::3] = -math.inf
    check(head, device, softcap=2.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_breaks_no_other(backend_name: str, device: torch.device, poison: float) -> None:
    head = make_head(7, 16, 300)
    temperature = temperatures_of(head)
    broken = head.hidden.clone()
    broken[3] = poison
    rows = [0, 1, 2, 4, 5, 6]
    for cap in (None, 3.0):
        options: dict[str, Any] = {"temperature": temperature.to(device), "softcap": cap}
        expected = logprob(head.to(device), **options)
        found = logprob(Head(broken, head.weight, None, head.targets).to(device), **options)
        for one, other in zip(found, expected, strict=True):
            assert one[3].isnan() and same_bits(one[rows], other[rows])


@pytest.mark.parametrize("name", MAPS)
def test_slices_combine(backend_name: str, device: torch.device, name: str) -> None:
    head = make_head(11, 8, 90, bias=True, ignored=0.2)
    options, moved = options_of(name, head), head.to(device)
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    bounds = [0, 30, 31, 90]
    parts = [
        linear_logprob_slice(
            moved.hidden, moved.weight[begin:end], moved.targets, first=begin, bias=moved.bias[begin:end], **options
        )
        for begin, end in pairwise(bounds)
        if moved.bias is not None
    ]
    found = combine_slices(torch.stack(parts), moved.targets)
    wide = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in options.items()}
    for one, other in zip(found, logprob(head.double(), **wide), strict=True):
        assert_close(one, other.double())


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])  # one sweep over the logits, and two
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_losses(backend_name: str, device: torch.device, name: str, dtype: str, loss_type: str) -> None:
    """The fused loss is the loss of the log-probabilities."""
    head = make_head(24, 16, 700, dtype=DTYPES[dtype], bias=True)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 0], mask[1, 9:] = False, False
    off = Head(head.hidden, head.weight, head.bias, head.targets.masked_fill(~mask.view(-1), IGNORED))
    options = options_of(name, off)

    def loss(one: Head, options: dict[str, Any]) -> list[Tensor]:
        hidden, weight, bias = (leaf.requires_grad_() for leaf in one.leaves())
        options = {
            key: value.view(2, 12).to(hidden.device) if isinstance(value, Tensor) else value
            for key, value in options.items()
        }
        value = linear_policy_loss(
            hidden.view(2, 12, 16),
            weight,
            one.targets.view(2, 12),
            None,
            torch.tensor([1.0, -0.5], device=hidden.device, dtype=torch.float32),
            mask.to(hidden.device),
            bias=bias,
            loss_type=loss_type,
            entropy_coef=0.1,
            chunk_bytes=CHUNK_BYTES,
            **options,
        ).loss
        return [value, *torch.autograd.grad(value, (hidden, weight, bias))]

    with backend("reference"):
        exact = loss(head.double(), options)
    for one, other in zip(loss(head.to(device), options), exact, strict=True):
        assert_close(one, other.double(), floor=floor_of(head.hidden.dtype, head.weight.shape[0]))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and above 0.*got 0.0"),
    "scale's type": ({"logit_scale": "1"}, TypeError, "logit_scale must be a number, got str"),
    "cap": ({"softcap": -1.0}, ValueError, "softcap must be finite and above 0.*got -1.0"),
    "cap's type": ({"softcap": True}, TypeError, "softcap must be a number, got bool"),
    "shape": ({"temperature": torch.ones(4)}, ValueError, r"temperature must have shape \[3\] \(targets'\), got"),
    "dtype": ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, "temperature must be float32"),
    "value": ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "temperature must be finite and above 0"),
    "NaN": ({"temperature": torch.tensor([1.0, 1.0, math.nan])}, ValueError, "temperature must be finite and above 0"),
    "factor": (
        {"temperature": 2.0**-100, "logit_scale": 2.0**100},
        ValueError,
        r"logit_scale / temperature must be from 2\^-126 to 2\^126, got",
    ),
    "squeeze": (
        {"softcap": 2.0**-100, "logit_scale": 2.0**100},
        ValueError,
        r"logit_scale / softcap must be from 2\^-126 to 2\^126, got",
    ),
    "factor of a cap": (
        {"softcap": 2.0**-100, "temperature": 2.0**100},
        ValueError,
        r"softcap / temperature must be from 2\^-126 to 2\^126, got",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    head = make_head(3, 8, 20)
    with pytest.raises(error, match=message):
        linear_logprob(head.hidden, head.weight, head.targets, **options)

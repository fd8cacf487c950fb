"""The LM head's kernels for CUDA on the emulated GPU: tests of the operators, and every order of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_linear_arguments
import test_linear_logits
import test_linear_logprob
import test_linear_minus_infinity
import test_linear_more
import torch
from emulation.harness import Emulator, Shape
from emulation.serving import adopt
from linear_cases import make_head
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels.reference import linear_logprob as reference
from vgpo_kernels.reference.linear_logprob import gradient_of
from vgpo_kernels.reference.logits import LogitMap

adopt(
    globals(),
    test_linear_logprob,
    test_linear_logits,
    test_linear_more,
    test_linear_arguments,
    test_linear_minus_infinity,
)

Kernel = Callable[..., None]
SHAPES = {
    "reverse": Shape(order="reverse"),
    "interleaved": Shape(order="interleaved"),
    "guards before": Shape(order="shuffled", seed=2, guard="before"),
}


MAPS = {"plain": LogitMap(0.9), "capped": LogitMap(0.9, torch.tensor([0.5, 1.0, 2.0]), 1.5, 4.0)}


def chunk(columns: int, dtype: torch.dtype, bias: bool, logit_map: LogitMap) -> tuple[Any, ...]:
    """Hidden to softcap, as both kernels take them."""
    head = make_head(3, 16, columns, dtype=dtype, bias=bias)
    return head.hidden, head.weight, head.bias, head.targets + 30, 30, *logit_map


def run(statistics: Kernel, gradient: Kernel, head: tuple[Any, ...], **options: torch.dtype) -> list[Tensor]:
    """Statistics, gradient and products of a chunk whose rows are 7 floats longer than its columns."""
    columns = head[1].shape[0]
    running = torch.tensor([1.5, 3.0, -2.0, 0.0])[:, None].repeat(1, 3)
    coefficients = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    coefficients[0] += 9  # a maximum, so that no probability explodes
    logits = torch.full((3, columns + 7), float("nan"))[:, :columns]
    statistics(*head, running, logits, True, **options)
    products = logits.clone()
    gradient(*head, coefficients, logits, True, **options)
    return [running, gradient_of(logits, head[0].dtype).clone(), products]


@pytest.mark.parametrize("columns", [1, 3, 64, 4097, 8300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_rows_at_any_address_of_any_length(emulator: Emulator, name: str, dtype: torch.dtype, columns: int) -> None:
    """Rows that begin and end inside a vector or inside a pass of the block; every order of threads."""
    head = chunk(columns, dtype, columns % 2 == 1, MAPS[name])
    exact, narrow = (
        run(reference.head_statistics, reference.head_gradient, head, dtype=precision)
        for precision in (torch.float64, torch.float32)
    )
    expected = run(emulator.head_statistics, emulator.head_gradient, head)
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            found = run(emulator.head_statistics, emulator.head_gradient, head)
        assert_close(found[0], exact[0].double(), narrow[0], name=f"statistics, {name}", floor=4e-6)
        rounding = 2 * torch.finfo(dtype).eps
        assert_close(found[1], exact[1].double(), narrow[1], name=f"gradient, {name}", floor=rounding)
        assert_close(found[2], exact[2].double(), narrow[2], name=f"products, {name}", floor=4e-6)
        assert torch.equal(found[1], expected[1]), name
        # Which logits a thread adds up depends on where their vectors begin, and guards move that.
        assert shape.guard == "before" or torch.equal(found[0], expected[0]), name

"""The kernels of pairs before an LM head on the emulated GPU: tests of the operators, and every order of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_linear_divergence
import torch
from emulation.harness import Emulator, Shape
from emulation.serving import adopt
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels.reference import linear_divergence as reference
from vgpo_kernels.reference.linear_divergence import COEFFICIENTS
from vgpo_kernels.reference.linear_logprob import gradient_of
from vgpo_kernels.reference.logits import LogitMap

adopt(globals(), test_linear_divergence)

Kernel = Callable[..., None]
Kernels = tuple[Kernel, Kernel, Kernel]
PAIRS, FEATURES, FIRST, JS_BETA = 3, 16, 30, 0.3
SHAPES = {
    "reverse": Shape(order="reverse"),
    "interleaved": Shape(order="interleaved"),
    "guards before": Shape(order="shuffled", seed=2, guard="before"),
}
MAPS = {
    "plain": LogitMap(0.9),
    "capped": LogitMap(0.9, torch.tensor([0.7, 1.0, 1.9]), 0.8, 3.0),
}


class Chunk:
    """A chunk of pairs whose rows of logits are ``gap`` floats longer than its columns."""

    def __init__(self, columns: int, dtype: torch.dtype, logit_map: LogitMap, gap: int) -> None:
        generator = torch.Generator().manual_seed(columns)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.rows, self.weight = normal(2 * PAIRS, FEATURES).to(dtype), (normal(columns, FEATURES) / 2).to(dtype)
        with_bias = columns % 2 == 1
        self.bias, self.other_bias = (normal(columns) if with_bias else None for _ in range(2))
        coefficients = normal(COEFFICIENTS - 4, PAIRS)
        coefficients[[5, 6, 13, 14], 1] = 0  # without shares
        if self.bias is not None and self.other_bias is not None:
            self.bias[2::3] = self.other_bias[2::3] = -torch.inf
            if columns % 4 == 1:
                # One view forbids what the other does not: they are infinitely far apart, and have no such gradient.
                self.other_bias[1::3] = -torch.inf
                coefficients[[2, 10]] = 0
        self.targets = torch.tensor([0, columns - 1, columns]) + FIRST
        self.logit_map = logit_map
        self.gap = gap
        sums = [[1.5, 3.0, -2.0, 0.0], [0.5, 2.0, -1.0, 0.0], [0.7, 0.2, 1.2]]
        self.sums = torch.tensor([one for part in sums for one in part])[:, None].repeat(1, PAIRS)
        self.sums[:, 2] = torch.tensor([-torch.inf, 0, 0, -torch.inf] * 2 + [0] * 3)  # before the first entry
        self.totals = torch.tensor([9.0, 1.5, 8.0, 2.5])[:, None].repeat(1, PAIRS)  # no probability explodes
        self.coefficients = torch.cat([self.totals, coefficients])

    @property
    def head(self) -> tuple[Tensor | None, ...]:
        return self.rows, self.weight, self.bias, self.other_bias

    def logits(self) -> Tensor:
        columns = self.weight.shape[0]
        return torch.full((2 * PAIRS, columns + self.gap), float("nan"))[:, :columns]

    def run(self, kernels: Kernels, product: Kernel | None = None, **options: torch.dtype) -> dict[str, Tensor]:
        """Everything that the three kernels compute, of their own products or of those of ``product``."""
        statistics, shares, gradient = kernels
        at, sums, shared = (self.targets, FIRST), self.sums.clone(), torch.ones(4, PAIRS)
        logits, recompute = self.logits(), product is None
        if product is not None:
            product(self.rows, self.weight.T, logits, False)
        statistics(*self.head, *at, *self.logit_map, sums, logits, recompute, **options)
        shares(*self.head, *self.logit_map, self.totals, JS_BETA, shared, logits, recompute, **options)
        gradient(*self.head, *at, *self.logit_map, self.coefficients, JS_BETA, logits, recompute, **options)
        return {"sums": sums, "shares": shared, "gradient": gradient_of(logits, self.rows.dtype).clone()}


def by_reference(chunk: Chunk, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute the same by the reference implementation, in ``dtype``."""
    return chunk.run((reference.pair_statistics, reference.pair_shares, reference.pair_gradient), dtype=dtype)


def kernels_of(emulator: Emulator) -> Kernels:
    return emulator.pair_statistics, emulator.pair_shares, emulator.pair_gradient


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize(("columns", "gap"), [(1, 7), (3, 1), (64, 0), (2049, 6), (4300, 6), (4301, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_at_any_address_of_any_length(
    emulator: Emulator, dtype: torch.dtype, columns: int, gap: int, logit_map: str
) -> None:
    """Both views' rows aligned alike or not, from the beginning or inside a vector; every order of threads."""
    chunk = Chunk(columns, dtype, MAPS[logit_map], gap)
    exact, narrow = (by_reference(chunk, precision) for precision in (torch.float64, torch.float32))
    expected = chunk.run(kernels_of(emulator))
    for name, shape in SHAPES.items():
        with emulator.launched_as(shape):
            found = chunk.run(kernels_of(emulator))
        for of, one in found.items():
            floor = 2 * torch.finfo(dtype).eps if of == "gradient" else 4e-6
            assert_close(one, exact[of].double(), narrow[of], name=f"{of}, {name}", floor=floor)
            # Which logits a thread adds up depends on where their vectors begin, and guards move that.
            if of == "gradient" or shape.guard == "after":
                assert torch.equal(one, expected[of]), (of, name)
    for of, one in chunk.run(kernels_of(emulator), emulator.head_product).items():
        assert torch.equal(one, expected[of]), of

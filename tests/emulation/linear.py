"""Call the LM head's epilogues on the emulated GPU as the operators are called; torch computes the products."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emulation.harness import DTYPES, ORDERS, Buffers, EmulationError, Shape, Struct, build, fetch, operator
from torch import Tensor

INTEGERS = (
    *("order", "seed", "dtype", "rows", "columns", "first", "stride"),
    *("statistics_stride", "coefficients_stride"),
)
POINTERS = ("logits", "bias", "targets", "statistics", "coefficients")


class Call(Struct):
    """Mirror of ``Call`` in linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("factor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


class HeadEmulator:
    """The kernels of csrc/cuda/linear_logprob.cuh on the emulated GPU, under the operators' names and schemas."""

    def __init__(self) -> None:
        self.library = build("linear.cpp")
        self.shape = Shape()

    @contextmanager
    def launched_as(self, shape: Shape) -> Iterator[None]:
        """Run threads and blocks in this shape's order inside the ``with`` block; a kernel's grid is its own."""
        previous, self.shape = self.shape, shape
        try:
            yield
        finally:
            self.shape = previous

    def run(self, kernel: str, inputs: dict[str, Tensor | None], results: dict[str, Tensor], **numbers: float) -> None:
        """Run a kernel; ``results`` are read and written."""
        call = Call(ORDERS[self.shape.order], self.shape.seed, **numbers)
        with Buffers(self.library, self.shape.guard) as buffers:
            for name, tensor in inputs.items():
                setattr(call, name, buffers.put(name, tensor))
            places = {name: buffers.put(name, one, writable=True) for name, one in results.items()}
            for name, address in places.items():
                setattr(call, name, address)
            function = getattr(self.library, kernel)
            function.restype = ctypes.c_char_p
            error = function(ctypes.byref(call)).decode()
            if error:
                raise EmulationError(f"{kernel}: {error}")
            for name, address in places.items():
                results[name].copy_(
                    fetch(address, (span(results[name]),)).as_strided(results[name].shape, results[name].stride())
                )

    @operator
    def head_statistics(
        self, hidden: Tensor, weight: Tensor, statistics: Tensor, logits: Tensor, keep: bool, **given: Any
    ) -> None:
        self.head_product(hidden, weight.T, logits, False)
        numbers = sizes(hidden, logits, given.pop("first"), given.pop("temperature"))
        numbers["statistics_stride"] = statistics.stride(0)
        if logits.numel():
            self.run("head_statistics", given | {"logits": logits}, {"statistics": statistics}, **numbers)

    @operator
    def head_gradient(
        self, hidden: Tensor, weight: Tensor, coefficients: Tensor, logits: Tensor, recompute: bool, **given: Any
    ) -> None:
        if recompute:
            self.head_product(hidden, weight.T, logits, False)
        numbers = sizes(hidden, logits, given.pop("first"), given.pop("temperature"))
        numbers["coefficients_stride"] = coefficients.stride(0)
        if logits.numel():
            self.run("head_gradient", given | {"coefficients": coefficients}, {"logits": logits}, **numbers)

    def head_product(self, left: Tensor, right: Tensor, result: Tensor, accumulate: bool) -> None:
        result.addmm_(left.float(), right.float(), beta=float(accumulate))


def span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def sizes(hidden: Tensor, logits: Tensor, first: int, temperature: float) -> dict[str, float]:
    return {
        "dtype": DTYPES[hidden.dtype],
        "rows": logits.shape[0],
        "columns": logits.shape[1],
        "first": first,
        "stride": logits.stride(0),
        "factor": 1.0 / temperature,
    }

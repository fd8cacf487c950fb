"""Call the LM head's epilogues on the emulated GPU with the operators' signatures; torch brings the products."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from emulation.harness import DTYPES, ORDERS, Buffers, EmulationError, Shape, build, fetch
from torch import Tensor

INTEGERS = (
    *("order", "seed", "dtype", "rows", "columns", "first", "stride"),
    *("statistics_stride", "coefficients_stride"),
)
POINTERS = ("logits", "bias", "targets", "statistics", "coefficients")


class Call(ctypes.Structure):
    """Mirror of ``Call`` in linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("factor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


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

    def head_statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        temperature: float,
        statistics: Tensor,
        logits: Tensor,
        keep: bool,
    ) -> None:
        self.head_product(hidden, weight.T, logits, False)
        if not logits.numel():
            return
        numbers = {**sizes(hidden, logits, first, temperature), "statistics_stride": statistics.stride(0)}
        inputs = {"bias": bias, "targets": targets, "logits": logits}
        self.run("head_statistics", inputs, {"statistics": statistics}, **numbers)

    def head_gradient(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        temperature: float,
        coefficients: Tensor,
        logits: Tensor,
        recompute: bool,
    ) -> None:
        if recompute:
            self.head_product(hidden, weight.T, logits, False)
        if not logits.numel():
            return
        numbers = {**sizes(hidden, logits, first, temperature), "coefficients_stride": coefficients.stride(0)}
        inputs = {"bias": bias, "targets": targets, "coefficients": coefficients}
        self.run("head_gradient", inputs, {"logits": logits}, **numbers)

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

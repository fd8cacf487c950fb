"""Call the attention kernels on the emulated GPU as the operators are called, and as their bindings do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from emulation.harness import DTYPES, ORDERS, Buffers, EmulationError, Shape, Struct, build, fetch, operator
from torch import Tensor

from vgpo_kernels.ops.attention_mass import LABELS

INTEGERS = ("order", "seed", "dtype", "batch", "queries", "keys", "heads", "key_heads", "size")
STRIDES = ("q", "k", "grad_q", "grad_k")
POINTERS = (
    *("query_boundaries", "key_boundaries", "q", "k", "segments", "positions", "weights", "grad", "mass_in", "lse_in"),
    *("mass", "lse", "heat", "means", "grad_q", "grad_k", "mean"),
)
# The kernels' names of what operators are given.
NAMES = {
    "cu_seqlens_q": "query_boundaries",
    "cu_seqlens_k": "key_boundaries",
    "key_segments": "segments",
    "query_positions": "positions",
    "query_weights": "weights",
    "grad_mass": "grad",
    "grad_heat": "grad",
    "head_mass": "mass_in",
    "lse": "lse_in",
}


class Call(Struct):
    """Mirror of ``Call`` in attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*INTEGERS, "num_segments", "window")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in STRIDES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


class AttentionEmulator:
    """The attention kernels of csrc/cuda on the emulated GPU, under the operators' names and schemas."""

    def __init__(self) -> None:
        self.library = build("attention.cpp")
        self.shape = Shape()

    @contextmanager
    def launched_as(self, shape: Shape) -> Iterator[None]:
        """Run threads and blocks in this shape's order inside the ``with`` block; a kernel's grid is its own."""
        previous, self.shape = self.shape, shape
        try:
            yield
        finally:
            self.shape = previous

    def run(self, kernel: str, given: dict[str, Any], outputs: dict[str, Tensor], **numbers: Any) -> tuple[Tensor, ...]:
        """Run a kernel on the tensors given, named as arguments of an operator or as in ``Call``.

        ``outputs`` give shapes, dtypes and strides of what it returns.
        """
        inputs = {NAMES.get(name, name): value for name, value in given.items() if name not in numbers}
        call = Call(ORDERS[self.shape.order], self.shape.seed, **numbers)
        with Buffers(self.library, self.shape.guard) as buffers:
            for name, tensor in inputs.items():
                setattr(call, name, buffers.put(name, tensor))
            places = {name: buffers.allocate(name, one.nbytes) for name, one in outputs.items()}
            for name, address in places.items():
                setattr(call, name, address)
            function = getattr(self.library, kernel)
            function.restype = ctypes.c_char_p
            error = function(ctypes.byref(call)).decode()
            if error:
                raise EmulationError(f"{kernel}: {error}")
            return tuple(
                fetch(address, tuple(outputs[name].shape), outputs[name].dtype) for name, address in places.items()
            )

    def mean_of_heads(self, values: Tensor, head_dim: int) -> Tensor:
        shape = values.shape
        mean = values.new_empty((*shape[:head_dim], *shape[head_dim + 1 :]))
        batch = 1 if values.dim() == -head_dim else shape[0]
        if not mean.numel():
            return mean
        numbers = {"batch": batch, "heads": shape[head_dim], "queries": mean.numel() // batch}
        return self.run("head_mean", {"mass_in": values}, {"mean": mean}, **numbers)[0]

    @operator
    def attention_mass(self, num_segments: int, per_head: bool, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        lse = torch.empty(by_head(given["q"], given["q"]))
        outputs = {"mass": lse.new_empty((*lse.shape, num_segments)), "lse": lse}
        mass, lse = self.run("attention_mass", given, outputs, **sizes(given, num_segments))
        if per_head:
            return mass, lse.new_empty(0), lse
        return self.mean_of_heads(mass, -3), mass, lse

    @operator
    def attention_heatmap(self, per_head: bool, **given: Any) -> Tensor:
        outputs = {"heat": torch.empty(by_head(given["q"], given["k"]))}
        (heat,) = self.run("attention_heatmap", given, outputs, **sizes(given, LABELS))
        return heat if per_head else self.mean_of_heads(heat, -2)

    @operator
    def attention_mass_backward(self, head_mass: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return self.gradients(given, head_mass, head_mass.shape[-1])

    @operator
    def attention_heatmap_backward(self, **given: Any) -> tuple[Tensor, Tensor]:
        return self.gradients(given, None, LABELS)

    def gradients(self, given: dict[str, Any], head_mass: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor]:
        grad_q, grad_k = (given[name].new_empty(given[name].shape) for name in ("q", "k"))
        numbers = sizes(given, num_segments) | {
            "grad_q_strides": strides_of(grad_q),
            "grad_k_strides": strides_of(grad_k),
        }
        outputs = {"means": torch.empty_like(given["lse"]), "grad_q": grad_q}
        inputs = given if head_mass is None else given | {"head_mass": head_mass}
        means, grad_q = self.run("attention_query_gradient", inputs, outputs, **numbers)
        (grad_k,) = self.run("attention_key_gradient", given | {"means": means}, {"grad_k": grad_k}, **numbers)
        return grad_q, grad_k


def strides_of(tensor: Tensor) -> Any:
    """Strides of a response, a head and a token."""
    token, head = (2, 1) if tensor.dim() == 4 else (0, 1)
    batch = tensor.stride(0) if tensor.dim() == 4 else 0
    return (ctypes.c_int64 * 3)(batch, tensor.stride(head), tensor.stride(token))


def by_head(q: Tensor, tokens_of: Tensor) -> tuple[int, ...]:
    """Shape of one number per head of q and token of ``tokens_of``: ``[B, H, L]``, packed ``[H, L]``."""
    if q.dim() == 4:
        return q.shape[0], q.shape[1], tokens_of.shape[2]
    return q.shape[1], tokens_of.shape[0]


def sizes(given: dict[str, Any], num_segments: int) -> dict[str, Any]:
    q, k, boundaries = given["q"], given["k"], given["cu_seqlens_q"]
    token = 2 if boundaries is None else 0
    return {
        "dtype": DTYPES[q.dtype],
        "batch": q.shape[0] if boundaries is None else len(boundaries) - 1,
        "queries": q.shape[token],
        "keys": k.shape[token],
        "heads": q.shape[1],
        "key_heads": k.shape[1],
        "size": q.shape[-1],
        "q_strides": strides_of(q),
        "k_strides": strides_of(k),
        "scale": given["scale"],
        "window": given["window"],
        "num_segments": num_segments,
    }

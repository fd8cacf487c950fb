"""Call the attention kernels on the emulated GPU with the operators' signatures, as their bindings do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from emulation.harness import DTYPES, ORDERS, Buffers, EmulationError, Shape, build, fetch
from torch import Tensor

INTEGERS = ("order", "seed", "dtype", "batch", "queries", "keys", "heads", "key_heads", "size")
STRIDES = ("q", "k", "grad_q", "grad_k")
POINTERS = (
    *("query_boundaries", "key_boundaries", "q", "k", "segments", "positions", "weights", "grad", "mass_in", "lse_in"),
    *("mass", "lse", "heat", "means", "grad_q", "grad_k", "mean"),
)


class Call(ctypes.Structure):
    """Mirror of ``Call`` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*INTEGERS, "num_segments", "window")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in STRIDES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


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

    def run(
        self, kernel: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], **numbers: Any
    ) -> tuple[Tensor, ...]:
        """Run a kernel; ``outputs`` give shapes, dtypes and strides of what it returns."""
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

    def attention_mass(
        self,
        q: Tensor,
        k: Tensor,
        key_segments: Tensor,
        query_positions: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        num_segments: int,
        scale: float,
        window: int,
        per_head: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = (key_segments, query_positions, cu_seqlens_q, cu_seqlens_k)
        lse = torch.empty(by_head(q, q))
        outputs = {"mass": lse.new_empty((*lse.shape, num_segments)), "lse": lse}
        numbers = {"num_segments": num_segments, "scale": scale, "window": window}
        mass, lse = self.run("attention_mass", tensors(q, k, *layout), outputs, **sizes(q, k, cu_seqlens_q), **numbers)
        if per_head:
            return mass, lse.new_empty(0), lse
        return self.mean_of_heads(mass, -3), mass, lse

    def attention_heatmap(
        self,
        q: Tensor,
        k: Tensor,
        key_segments: Tensor,
        query_positions: Tensor | None,
        query_weights: Tensor,
        lse: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        scale: float,
        window: int,
        per_head: bool,
    ) -> Tensor:
        inputs = tensors(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k)
        inputs |= {"weights": query_weights, "lse_in": lse}
        numbers = {"num_segments": 2, "scale": scale, "window": window}
        outputs = {"heat": torch.empty(by_head(q, k))}
        (heat,) = self.run("attention_heatmap", inputs, outputs, **sizes(q, k, cu_seqlens_q), **numbers)
        return heat if per_head else self.mean_of_heads(heat, -2)

    def attention_mass_backward(
        self,
        grad_mass: Tensor,
        q: Tensor,
        k: Tensor,
        key_segments: Tensor,
        query_positions: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        head_mass: Tensor,
        lse: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = tensors(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k)
        inputs |= {"grad": grad_mass, "mass_in": head_mass, "lse_in": lse}
        return self.gradients(q, k, inputs, num_segments=head_mass.shape[-1], scale=scale, window=window)

    def attention_heatmap_backward(
        self,
        grad_heat: Tensor,
        q: Tensor,
        k: Tensor,
        key_segments: Tensor,
        query_positions: Tensor | None,
        query_weights: Tensor,
        lse: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        inputs = tensors(q, k, key_segments, query_positions, cu_seqlens_q, cu_seqlens_k)
        inputs |= {"grad": grad_heat, "weights": query_weights, "lse_in": lse}
        return self.gradients(q, k, inputs, num_segments=2, scale=scale, window=window)

    def gradients(
        self, q: Tensor, k: Tensor, inputs: dict[str, Tensor | None], **numbers: Any
    ) -> tuple[Tensor, Tensor]:
        numbers |= sizes(q, k, inputs["query_boundaries"])
        lse = inputs["lse_in"]
        grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
        strides = {"grad_q_strides": strides_of(grad_q), "grad_k_strides": strides_of(grad_k)}
        outputs = {"means": torch.empty_like(lse), "grad_q": grad_q}
        means, grad_q = self.run("attention_query_gradient", inputs, outputs, **numbers, **strides)
        inputs = {name: tensor for name, tensor in inputs.items() if name != "mass_in"} | {"means": means}
        (grad_k,) = self.run("attention_key_gradient", inputs, {"grad_k": grad_k}, **numbers, **strides)
        return grad_q, grad_k


def tensors(
    q: Tensor,
    k: Tensor,
    key_segments: Tensor,
    query_positions: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "q": q,
        "k": k,
        "segments": key_segments,
        "positions": query_positions,
        "query_boundaries": cu_seqlens_q,
        "key_boundaries": cu_seqlens_k,
    }


def strides_of(tensor: Tensor) -> Any:
    """Strides of a response, a head and a token."""
    token, head = (2, 1) if tensor.dim() == 4 else (0, 1)
    batch = tensor.stride(0) if tensor.dim() == 4 else 0
    return (ctypes.c_int64 * 3)(batch, tensor.stride(head), tensor.stride(token))


def by_head(q: Tensor, tokens_of: Tensor) -> tuple[int, ...]:
    """Shape of one number a head of q and token of ``tokens_of``: ``[B, H, L]``, packed ``[H, L]``."""
    if q.dim() == 4:
        return q.shape[0], q.shape[1], tokens_of.shape[2]
    return q.shape[1], tokens_of.shape[0]


def sizes(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> dict[str, Any]:
    token = 2 if cu_seqlens_q is None else 0
    return {
        "dtype": DTYPES[q.dtype],
        "batch": q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1,
        "queries": q.shape[token],
        "keys": k.shape[token],
        "heads": q.shape[1],
        "key_heads": k.shape[1],
        "size": q.shape[-1],
        "q_strides": strides_of(q),
        "k_strides": strides_of(k),
    }

"""Build the CUDA kernels for emulation with an ordinary C++ compiler, and call them with the operators' signatures."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.ops.policy_loss import POLICY_METRICS
from vgpo_kernels.ops.visual_weights import FOCUS_METRICS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2, "interleaved": 3}
GUARDS = {"after": 0, "before": 1}

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-shared",
    "-fPIC",
    "-fno-gnu-unique",  # or two libraries would share one emulated GPU
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # pragma unroll
    "-fno-strict-aliasing",
    # Array bounds, alignment of vector loads, shifts and casts, each a trap that the harness reports.
    "-fsanitize=bounds-strict,alignment,shift,signed-integer-overflow,float-cast-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]


class EmulationError(RuntimeError):
    """What the emulated GPU found wrong with a kernel."""


def compiler() -> str | None:
    """Return the C++ compiler that builds kernels for emulation: g++, whose sanitizers need no library."""
    return shutil.which(os.environ.get("VGPO_EMULATION_CXX", "g++"))


def compile_library(source: str, *flags: str) -> Path:
    """Compile ``source``, a file of this folder; unchanged sources are compiled once."""
    command = [compiler() or "g++", *FLAGS, f"-I{HERE / 'include'}", *flags]
    files = [HERE / source, *HERE.glob("*.h"), *HERE.glob("include/**/*.h")]
    files += [*ROOT.glob("csrc/*.*"), *ROOT.glob("csrc/cuda/*.*")]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    library = ROOT / "build" / "emulation" / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in library.parent.glob(f"{Path(source).stem}-*.so"):
            stale.unlink()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Compiled aside and moved in place: another test process may be doing the same.
            built = Path(folder) / library.name
            result = subprocess.run([*command, str(HERE / source), "-o", str(built)], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{source} does not compile for emulation:\n{result.stderr}")
            built.replace(library)
    return library


def build(source: str) -> ctypes.CDLL:
    """Compile kernels behind C functions, and load them."""
    loaded = ctypes.CDLL(str(compile_library(source)))
    loaded.buffer_new.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
    loaded.buffer_new.restype = ctypes.c_void_p
    for name in ("buffer_data", "buffer_protect", "buffer_delete"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
    loaded.buffer_data.restype = ctypes.c_void_p
    return loaded


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: its grid, and the order in which threads and blocks run between barriers."""

    blocks: int = 3
    threads: int = 64
    order: str = "forward"
    seed: int = 0
    guard: str = "after"  # the side of every buffer on which an index out of range faults


INTEGERS = (
    *("blocks", "threads", "order", "seed", "guard", "dtype"),
    *("batch", "tokens", "rows", "dim", "batch_stride", "row_stride", "num_prototypes"),
    *("advantages_per_token", "importance_per_token"),
)
POINTERS = (
    *("cu_seqlens", "hidden", "visual_mask", "response_mask", "prototype", "prototype_index"),
    *("cos", "group_ids", "has_visual", "score_in"),
    *("logp", "old_logp", "advantages", "factors_in", "ref_logp", "entropy", "importance_weights"),
    *("num_tokens", "num_sequences", "config", "options"),
    *("prototypes_out", "cos_out", "factors", "psi", "w", "phi", "score"),
    *("loss", "grad_logp", "grad_entropy", "metrics"),
)


class Call(ctypes.Structure):
    """Mirror of ``Call`` in kernels.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [(name, ctypes.c_void_p) for name in POINTERS]


class Buffers:
    """Guarded copies of tensors: inputs read-only, outputs poisoned. Freed at the end of a ``with`` block."""

    def __init__(self, library: ctypes.CDLL, guard: str) -> None:
        self.library, self.guard = library, GUARDS[guard]
        self.handles: list[int] = []

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            self.library.buffer_delete(handle)

    def allocate(self, name: str, size: int) -> int:
        """Return the address of a poisoned buffer."""
        self.handles.append(self.library.buffer_new(name.encode(), size, self.guard))
        return self.library.buffer_data(self.handles[-1])

    def put(self, name: str, tensor: Tensor | None, *, writable: bool = False) -> int | None:
        """Return the address of a copy, a strided tensor's with everything between its elements."""
        if tensor is None:
            return None
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((span if tensor.numel() else 0,), (1,)).contiguous()
        size = flat.numel() * flat.element_size()
        address = self.allocate(name, size)
        if size:
            ctypes.memmove(address, flat.data_ptr(), size)
        if not writable:
            self.library.buffer_protect(self.handles[-1])
        return address


def fetch(address: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Copy values out of a buffer."""
    result = torch.empty(shape, dtype=dtype)
    if result.numel():
        ctypes.memmove(result.data_ptr(), address, result.nbytes)
    return result


class Emulator:
    """The kernels of csrc/cuda on the emulated GPU, under the operators' names and schemas."""

    def __init__(self) -> None:
        self.library = build("kernels.cpp")
        self.shape = Shape()

    @contextmanager
    def launched_as(self, shape: Shape) -> Iterator[None]:
        """Launch every kernel inside the ``with`` block in this shape."""
        previous, self.shape = self.shape, shape
        try:
            yield
        finally:
            self.shape = previous

    def run(
        self, kernel: str, inputs: dict[str, Any], outputs: dict[str, tuple[int, ...]], **integers: int
    ) -> tuple[Tensor, ...]:
        shape = self.shape
        call = Call(shape.blocks, shape.threads, ORDERS[shape.order], shape.seed, GUARDS[shape.guard], **integers)
        with Buffers(self.library, shape.guard) as buffers:
            for name, tensor in inputs.items():
                setattr(call, name, buffers.put(name, tensor))
            places = {name: buffers.allocate(name, 4 * math.prod(size)) for name, size in outputs.items()}
            for name, address in places.items():
                setattr(call, name, address)
            function = getattr(self.library, kernel)
            function.restype = ctypes.c_char_p
            error = function(ctypes.byref(call)).decode()
            if error:
                raise EmulationError(f"{kernel}: {error}")
            return tuple(fetch(address, outputs[name]) for name, address in places.items())

    def visual_prototype(self, hidden: Tensor, visual_mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        sizes = hidden_sizes(hidden, cu_seqlens)
        inputs = {"hidden": hidden, "visual_mask": visual_mask, "cu_seqlens": cu_seqlens}
        outputs = {"prototypes_out": (sizes["batch"], sizes["dim"])}
        return self.run("visual_prototype", inputs, outputs, **sizes)[0]

    def visual_focus(
        self,
        hidden: Tensor,
        visual_mask: Tensor | None,
        response_mask: Tensor,
        cu_seqlens: Tensor | None,
        prototype: Tensor | None,
        prototype_index: Tensor | None,
    ) -> Tensor:
        inputs = {
            "hidden": hidden,
            "visual_mask": visual_mask,
            "response_mask": response_mask,
            "cu_seqlens": cu_seqlens,
            "prototype": prototype,
            "prototype_index": prototype_index,
        }
        sizes = hidden_sizes(hidden, cu_seqlens, response_mask, prototype)
        return self.run("visual_focus", inputs, {"cos_out": tuple(response_mask.shape)}, **sizes)[0]

    def visual_weights(
        self,
        cos: Tensor,
        response_mask: Tensor,
        group_ids: Tensor,
        has_visual: Tensor | None,
        cu_seqlens: Tensor | None,
        config: list[float],
    ) -> tuple[Tensor, ...]:
        inputs = {
            "cos": cos,
            "response_mask": response_mask,
            "group_ids": group_ids,
            "has_visual": has_visual,
            "cu_seqlens": cu_seqlens,
            "config": torch.tensor(config, dtype=torch.float64),
        }
        per_token, per_response = tuple(cos.shape), tuple(group_ids.shape)
        outputs = dict.fromkeys(("factors", "psi", "w"), per_token)
        outputs |= {"phi": per_response, "score": per_response, "metrics": (len(FOCUS_METRICS),)}
        return self.run("visual_weights", inputs, outputs, **token_sizes(response_mask, cu_seqlens))

    def group_weights(self, score: Tensor, group_ids: Tensor, has_visual: Tensor | None, config: list[float]) -> Tensor:
        inputs = {
            "score_in": score,
            "group_ids": group_ids,
            "has_visual": has_visual,
            "config": torch.tensor(config, dtype=torch.float64),
        }
        return self.run("group_weights", inputs, {"phi": tuple(score.shape)}, batch=len(score))[0]

    def policy_loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        factors: Tensor | None,
        cu_seqlens: Tensor | None,
        ref_logp: Tensor | None,
        entropy: Tensor | None,
        importance_weights: Tensor | None,
        num_tokens: Tensor | None,
        num_sequences: Tensor | None,
        options: list[float],
    ) -> tuple[Tensor, ...]:
        inputs = {
            "logp": logp,
            "old_logp": old_logp,
            "advantages": advantages,
            "response_mask": response_mask,
            "factors_in": factors,
            "cu_seqlens": cu_seqlens,
            "ref_logp": ref_logp,
            "entropy": entropy,
            "importance_weights": importance_weights,
            "num_tokens": num_tokens,
            "num_sequences": num_sequences,
            "options": torch.tensor(options, dtype=torch.float64),
        }
        sizes = token_sizes(response_mask, cu_seqlens)
        return self.run_loss("policy_loss", inputs, len(POLICY_METRICS), sizes)

    def vgpo_loss(
        self,
        hidden: Tensor,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        visual_mask: Tensor | None,
        response_mask: Tensor,
        group_ids: Tensor,
        cu_seqlens: Tensor | None,
        prototype: Tensor | None,
        prototype_index: Tensor | None,
        ref_logp: Tensor | None,
        entropy: Tensor | None,
        importance_weights: Tensor | None,
        num_tokens: Tensor | None,
        num_sequences: Tensor | None,
        config: list[float],
        options: list[float],
    ) -> tuple[Tensor, ...]:
        inputs = {
            "hidden": hidden,
            "logp": logp,
            "old_logp": old_logp,
            "advantages": advantages,
            "visual_mask": visual_mask,
            "response_mask": response_mask,
            "group_ids": group_ids,
            "cu_seqlens": cu_seqlens,
            "prototype": prototype,
            "prototype_index": prototype_index,
            "ref_logp": ref_logp,
            "entropy": entropy,
            "importance_weights": importance_weights,
            "num_tokens": num_tokens,
            "num_sequences": num_sequences,
            "config": torch.tensor(config, dtype=torch.float64),
            "options": torch.tensor(options, dtype=torch.float64),
        }
        sizes = hidden_sizes(hidden, cu_seqlens, response_mask, prototype)
        return self.run_loss("vgpo_loss", inputs, len(POLICY_METRICS) + len(FOCUS_METRICS), sizes)

    def run_loss(
        self, kernel: str, inputs: dict[str, Tensor | None], metrics: int, sizes: dict[str, int]
    ) -> tuple[Tensor, ...]:
        batch, weights = sizes["batch"], inputs["importance_weights"]

        def per_token(tensor: Tensor | None) -> int:
            return int(tensor is not None and tuple(tensor.shape) != (batch,))

        flags = {
            "advantages_per_token": per_token(inputs["advantages"]),
            "importance_per_token": per_token(weights),
        }
        shape = tuple(inputs["logp"].shape)
        outputs = {"loss": (), "grad_logp": shape}
        if inputs["entropy"] is not None:
            outputs["grad_entropy"] = shape
        result = self.run(kernel, inputs, outputs | {"metrics": (metrics,)}, **sizes, **flags)
        return result if len(result) == 4 else (*result[:2], torch.empty(0), result[2])


def token_sizes(response_mask: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    if cu_seqlens is not None:
        return {"batch": len(cu_seqlens) - 1, "tokens": len(response_mask), "rows": len(response_mask)}
    return {"batch": response_mask.shape[0], "tokens": response_mask.shape[1], "rows": response_mask.shape[1]}


def hidden_sizes(
    hidden: Tensor, cu_seqlens: Tensor | None, response_mask: Tensor | None = None, prototype: Tensor | None = None
) -> dict[str, int]:
    rows = hidden.shape[-2]
    return {
        "dtype": DTYPES[hidden.dtype],
        "batch": hidden.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1,
        "tokens": rows if response_mask is None else response_mask.shape[-1],
        "rows": rows,
        "dim": hidden.shape[-1],
        "batch_stride": hidden.stride(0) if cu_seqlens is None else 0,
        "row_stride": hidden.stride(-2),
        "num_prototypes": 0 if prototype is None else prototype.shape[0],
    }

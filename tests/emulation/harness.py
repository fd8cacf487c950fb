"""Build the CUDA kernels for emulation with an ordinary C++ compiler, and call them as the operators are called."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.ops import registry
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


class Struct(ctypes.Structure):
    """A structure of C that refuses values that it has no field for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in {field for field, *_ in self._fields_}:
            raise AttributeError(f"{type(self).__name__} has no field {name}")
        super().__setattr__(name, value)


class Call(Struct):
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


def operator(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method be called as the operator of its name is; it declares the arguments that it reads."""
    return registry.by_name(method, ("self", *registry.OPERATORS[method.__name__].arguments))


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
        """Run a kernel on tensors and settings, named as in ``Call``."""
        shape = self.shape
        call = Call(shape.blocks, shape.threads, ORDERS[shape.order], shape.seed, GUARDS[shape.guard], **integers)
        with Buffers(self.library, shape.guard) as buffers:
            for name, value in inputs.items():
                tensor = torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
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

    @operator
    def visual_prototype(self, **inputs: Any) -> Tensor:
        sizes = hidden_sizes(inputs)
        return self.run("visual_prototype", inputs, {"prototypes_out": (sizes["batch"], sizes["dim"])}, **sizes)[0]

    @operator
    def visual_focus(self, **inputs: Any) -> Tensor:
        outputs = {"cos_out": tuple(inputs["response_mask"].shape)}
        return self.run("visual_focus", inputs, outputs, **hidden_sizes(inputs))[0]

    @operator
    def visual_weights(self, **inputs: Any) -> tuple[Tensor, ...]:
        per_token, per_response = tuple(inputs["cos"].shape), tuple(inputs["group_ids"].shape)
        outputs = dict.fromkeys(("factors", "psi", "w"), per_token)
        outputs |= {"phi": per_response, "score": per_response, "metrics": (len(FOCUS_METRICS),)}
        return self.run("visual_weights", inputs, outputs, **token_sizes(inputs))

    @operator
    def group_weights(self, score: Tensor, **inputs: Any) -> Tensor:
        inputs["score_in"] = score
        return self.run("group_weights", inputs, {"phi": tuple(score.shape)}, batch=len(score))[0]

    @operator
    def policy_loss(self, factors: Tensor | None, **inputs: Any) -> tuple[Tensor, ...]:
        inputs["factors_in"] = factors
        return self.run_loss("policy_loss", inputs, len(POLICY_METRICS), token_sizes(inputs))

    @operator
    def vgpo_loss(self, **inputs: Any) -> tuple[Tensor, ...]:
        return self.run_loss("vgpo_loss", inputs, len(POLICY_METRICS) + len(FOCUS_METRICS), hidden_sizes(inputs))

    def run_loss(self, kernel: str, inputs: dict[str, Any], metrics: int, sizes: dict[str, int]) -> tuple[Tensor, ...]:
        def per_token(tensor: Tensor | None) -> int:
            return int(tensor is not None and tuple(tensor.shape) != (sizes["batch"],))

        flags = {
            "advantages_per_token": per_token(inputs["advantages"]),
            "importance_per_token": per_token(inputs["importance_weights"]),
        }
        shape = tuple(inputs["logp"].shape)
        outputs = {"loss": (), "grad_logp": shape}
        if inputs["entropy"] is not None:
            outputs["grad_entropy"] = shape
        result = self.run(kernel, inputs, outputs | {"metrics": (metrics,)}, **sizes, **flags)
        return result if len(result) == 4 else (*result[:2], torch.empty(0), result[2])


def token_sizes(inputs: dict[str, Any]) -> dict[str, int]:
    mask, boundaries = inputs["response_mask"], inputs["cu_seqlens"]
    batch = mask.shape[0] if boundaries is None else len(boundaries) - 1
    return {"batch": batch, "tokens": mask.shape[-1], "rows": mask.shape[-1]}


def hidden_sizes(inputs: dict[str, Any]) -> dict[str, int]:
    hidden, boundaries, prototype = inputs["hidden"], inputs["cu_seqlens"], inputs.get("prototype")
    rows = hidden.shape[-2]
    return {
        "dtype": DTYPES[hidden.dtype],
        "batch": hidden.shape[0] if boundaries is None else len(boundaries) - 1,
        "tokens": inputs["response_mask"].shape[-1] if "response_mask" in inputs else rows,
        "rows": rows,
        "dim": hidden.shape[-1],
        "batch_stride": hidden.stride(0) if boundaries is None else 0,
        "row_stride": hidden.stride(-2),
        "num_prototypes": 0 if prototype is None else prototype.shape[0],
    }

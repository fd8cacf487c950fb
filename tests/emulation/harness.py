"""The CUDA bindings on the emulated GPU: built with an ordinary C++ compiler, called on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from vgpo_kernels.ops import registry

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMESPACE = "vgpo_emulated"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2, "interleaved": 3}
GUARDS = {"after": 0, "before": 1}

FLAGS = [
    "-std=c++20",
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

# Kept: the operators end with it.
_library = torch.library.Library(NAMESPACE, "DEF")


class EmulationError(RuntimeError):
    """What the emulated GPU found wrong with a kernel."""


def compiler() -> str | None:
    """Return the C++ compiler that builds kernels for emulation: g++, whose sanitizers need no library.

    On Linux alone: macOS calls its clang g++, and torch there has another C++ library than GCC.
    """
    return shutil.which(os.environ.get("VGPO_EMULATION_CXX", "g++")) if sys.platform == "linux" else None


def compile_library(source: str, *flags: str) -> Path:
    """Compile ``source``, a file of this folder or any other, against torch; unchanged sources are compiled once."""
    folders = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    torch_library = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{torch_library}", f"-Wl,-rpath,{torch_library},--no-as-needed", "-ltorch_cpu", "-lc10"]
    version = f"-DBUILT_FOR_TORCH={torch.__version__}"  # another torch is another command, which compiles anew
    command = [compiler() or "g++", *FLAGS, f"-I{HERE / 'include'}", version, *flags, *folders, *libraries]
    files = [HERE / source, *HERE.glob("*.h"), *HERE.glob("include/**/*.h")]
    files += [*ROOT.glob("csrc/*.*"), *ROOT.glob("csrc/cuda/*.*")]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    library = ROOT / "build" / "emulation" / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in library.parent.glob(f"{Path(source).stem}-*.so"):
            stale.unlink(missing_ok=True)  # two test processes may come to it at once
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Compiled aside and moved in place: another test process may be doing the same.
            built = Path(folder) / library.name
            result = subprocess.run([*command, str(HERE / source), "-o", str(built)], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"{source} does not compile for emulation:\n{result.stderr}")
            built.replace(library)
    return library


@functools.cache
def emulated_operators() -> dict[str, Callable[..., Any]]:
    """Return ``torch.ops.vgpo_emulated.<name>`` for every operator that csrc/cuda registers.

    They launch as they do on a GPU, without guards; an :class:`Emulator` adds those.
    """
    path = compile_library("bindings.cpp")
    for operator in registry.OPERATORS.values():
        _library.define(str(operator.compiled._schema).removeprefix(f"{registry.NAMESPACE}::"))
    torch.ops.load_library(path)
    return {
        name: getattr(torch.ops.vgpo_emulated, name).default
        for name in registry.OPERATORS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    }


@dataclass(frozen=True)
class Shape:
    """How kernels are launched: in which grid, and in which order threads and blocks run between barriers.

    Kernels that are right for any number of blocks and threads take these. Others keep the binding's, and so do all
    with 0 blocks: the launch is a GPU's, with one allocation for a workspace. Otherwise its arrays are guarded apart.
    """

    blocks: int = 3
    threads: int = 64
    order: str = "forward"
    seed: int = 0
    guard: str = "after"  # the side of every buffer on which an index out of range faults
    hopper: bool = False  # whether the device is one, or older


class Emulator:
    """The operators of csrc/cuda as methods, on guarded copies of their tensors.

    Every tensor ends or begins at a page that faults, an argument is read-only unless the operator's schema says that
    it is written to, and what the binding allocates is poisoned.
    """

    def __init__(self) -> None:
        self.operators = emulated_operators()
        self.shape = Shape()
        self.missing: dict[str, int] = {}
        self.launched: list[str] = []  # the kernels of the last call

    @contextmanager
    def launched_as(self, shape: Shape) -> Iterator[None]:
        """Launch every kernel inside the ``with`` block in this shape."""
        previous, self.shape = self.shape, shape
        try:
            yield
        finally:
            self.shape = previous

    @contextmanager
    def cut_short(self, **missing: int) -> Iterator[None]:
        """Let arguments lack so many of their last elements, which no check of a binding can see."""
        self.missing = missing
        try:
            yield
        finally:
            self.missing = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self.call, getattr(torch.ops.vgpo_emulated, name).default)

    def call(self, operator: torch._ops.OpOverload, *values: Any) -> Any:
        """Call an operator; what it returns is ordinary memory again.

        Raises:
            EmulationError: A fault, with the names of the operator, the kernel and the buffer.

        """
        emulated, shape = torch.ops.vgpo_emulated, self.shape
        side = GUARDS[shape.guard]
        guarded, written = [], []
        for argument, value in zip(operator._schema.arguments, values, strict=True):
            if isinstance(value, Tensor):
                writable = argument.alias_info is not None and argument.alias_info.is_write
                copy = emulated.guarded_copy(value, argument.name, writable, side, self.missing.get(argument.name, 0))
                written += [(value, copy)] if writable else []
                value = copy
            guarded.append(value)
        emulated.begin_call(shape.blocks, shape.threads, ORDERS[shape.order], shape.seed, side, shape.hopper)
        try:
            result = operator(*guarded)
        except RuntimeError as error:
            if "the emulated GPU: " not in str(error):
                raise
            raise EmulationError(f"{operator._opname}: {str(error).partition('the emulated GPU: ')[2]}") from None
        finally:
            emulated.end_call()
            self.launched = emulated.launched()
        for value, copy in written:
            value.copy_(copy)
        return torch.utils._pytree.tree_map_only(Tensor, torch.clone, result)

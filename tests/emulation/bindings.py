"""The CUDA bindings themselves on the emulated GPU, as operators of CPU tensors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from emulation.harness import compile_library
from torch.utils import cpp_extension

from vgpo_kernels.ops import registry

NAMESPACE = "vgpo_emulated"
# Kept: the operators end with it.
_library = torch.library.Library(NAMESPACE, "DEF")


@functools.cache
def emulated_operators() -> dict[str, Any]:
    """Return ``torch.ops.vgpo_emulated.<name>`` for every operator that csrc/cuda registers."""
    folders = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    torch_library = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{torch_library}", f"-Wl,-rpath,{torch_library},--no-as-needed", "-ltorch_cpu", "-lc10"]
    version = f"-DBUILT_FOR_TORCH={torch.__version__}"  # another torch is another command, which compiles anew
    path = compile_library("bindings.cpp", "-std=c++20", version, *folders, *libraries)
    for operator in registry.OPERATORS.values():
        _library.define(str(operator.compiled._schema).removeprefix(f"{registry.NAMESPACE}::"))
    torch.ops.load_library(path)
    return {
        name: getattr(getattr(torch.ops, NAMESPACE), name).default
        for name in registry.OPERATORS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    }

"""Let the emulated GPU handle the operators, and run the tests of the operators on it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from vgpo_kernels import backend, backends


@contextmanager
def serving(emulator: Any, operators: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let an emulator's methods handle CPU tensors, in place of the C++ backend (built or not)."""
    library = torch.library.Library("vgpo_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in operators:
            library.impl(name, getattr(emulator, name), "CPU")
    monkeypatch.setattr(backends, "_BUILT_CPP", True)
    with backend("cpp"):
        yield "cuda"
    library._destroy()


def adopt(into: dict[str, Any], module: ModuleType) -> None:
    """Take over the tests of a module that run once a backend."""
    for name, function in vars(module).items():
        if name.startswith("test_") and {"backend_name", "exact_backend"} & set(inspect.signature(function).parameters):
            into[f"{module.__name__}_{name.removeprefix('test_')}"] = function

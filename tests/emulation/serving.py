"""Let the emulated GPU handle the operators, and run the tests of the operators on it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from emulation.harness import Emulator, compiler

from vgpo_kernels import backend, backends
from vgpo_kernels.ops import linear_divergence, linear_logprob, linear_vgpo_loss


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture
def backend_name(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the emulated GPU handle CPU tensors, in place of the C++ backend (built or not)."""
    library = torch.library.Library("vgpo_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, operator in emulator.operators.items():
            library.impl(name, functools.partial(emulator.call, operator), "CPU")
    monkeypatch.setattr(backends, "_BUILT_CPP", True)
    # The device is the CPU's, where 16-bit products would be taken in fp32, and the kernels a GPU's.
    kernels = linear_logprob.compiled_kernels(torch.device("cpu"))._replace(half=True)
    for module in (linear_logprob, linear_vgpo_loss):
        monkeypatch.setattr(module, "compiled_kernels", lambda _: kernels)
    of_pairs = linear_divergence.compiled_kernels(torch.device("cpu"))._replace(head=kernels)
    monkeypatch.setattr(linear_divergence, "compiled_kernels", lambda _: of_pairs)
    with backend("cpp"):
        yield "cuda"
    library._destroy()


@pytest.fixture
def exact_backend(backend_name: str) -> str:
    return backend_name


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


def adopt(into: dict[str, Any], *modules: ModuleType) -> None:
    """Take over the tests of modules that run once per backend, with fixtures that run them on the emulated GPU."""
    into["pytestmark"] = pytest.mark.skipif(compiler() is None, reason="needs Linux and g++ to emulate a GPU")
    into.update(emulator=emulator, backend_name=backend_name, exact_backend=exact_backend, device=device)
    for module in modules:
        for name, function in vars(module).items():
            if not name.startswith("test_"):
                continue
            if {"backend_name", "exact_backend"} & set(inspect.signature(function).parameters):
                into[f"{module.__name__}_{name.removeprefix('test_')}"] = function

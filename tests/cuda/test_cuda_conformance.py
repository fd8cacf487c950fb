"""The conformance matrix on the emulated GPU: every kernel for CUDA serves the functions at once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import test_conformance
import test_cuda_attention
import test_cuda_emulation
import test_cuda_linear
import torch
from emulation.attention import AttentionEmulator
from emulation.harness import Emulator, compiler
from emulation.linear import HeadEmulator
from emulation.serving import adopt, serving

from vgpo_kernels.ops import linear_logprob, linear_vgpo_loss

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ to build kernels for emulation")


@pytest.fixture(scope="session")
def emulators() -> SimpleNamespace:
    """Return the operators' kernels, whichever emulator they belong to."""
    parts = (
        (Emulator(), test_cuda_emulation.OPERATORS),
        (AttentionEmulator(), test_cuda_attention.OPERATORS),
        (HeadEmulator(), test_cuda_linear.OPERATORS),
    )
    return SimpleNamespace(**{name: getattr(emulator, name) for emulator, names in parts for name in names})


@pytest.fixture
def backend_name(emulators: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # The device is the CPU's, where 16-bit products would be taken in fp32, and the kernels a GPU's.
    kernels = linear_logprob.compiled_kernels(torch.device("cpu"))._replace(half=True)
    for module in (linear_logprob, linear_vgpo_loss):
        monkeypatch.setattr(module, "compiled_kernels", lambda _: kernels)
    with serving(emulators, tuple(vars(emulators)), monkeypatch) as name:
        yield name


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


adopt(globals(), test_conformance)

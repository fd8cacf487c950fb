"""Choose the backend that handles a call: the fastest one built for the device, unless one is forced.

``with backend(name)`` forces one inside the block, the environment variable ``VGPO_BACKEND`` in the whole process.
``VGPO_SIMD`` names the vector instructions of ``cpp``, one of ``simd_levels`` of :func:`describe`; by default the best.
Another library's kernel can take :func:`vgpo_kernels.linear_logprob` on one kind of GPU: :func:`liger_head`.

========= ===================================================== ========================
backend   what it is                                            handles
========= ===================================================== ========================
reference the reference implementation: plain PyTorch           every device
cpp       C++ with vector code, from the extension              CPU
cuda      CUDA C++, from an extension built with nvcc           NVIDIA GPUs
triton    Triton kernels                                        devices for which Triton
                                                                has a driver; all,
                                                                interpreted
========= ===================================================== ========================

The reference implementation computes in float64 where a device has it, and elsewhere (Apple's GPUs, some of Intel's) in
float32: :func:`wide_dtype`. It holds every logit of an LM head. So where no backend is forced and none of the others
handles a device, heads are computed by plain PyTorch in chunks, in float32, to the same results within rounding.

OpenMP's threads do not survive a ``fork()``: in the child process, the first parallel operator of torch would wait for
them forever. So if the extension has used several threads, a forked child runs torch with one thread. Processes started
by ``spawn`` or ``forkserver`` use all threads.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from vgpo_kernels import extension

NAMES = ("reference", "cpp", "cuda", "triton")

# The extension's operators are registered when it is loaded, so whether it loads decides what is built.
_LOADED = extension.load()
_C: Any = _LOADED.module
_BUILT_CPP = _C is not None
_BUILT_CUDA = _BUILT_CPP and bool(_C.has_cuda())
_HAS_TRITON = find_spec("triton") is not None

# The extension takes its best level for a name that it does not know, or that this processor does not run.
_simd = os.environ.get("VGPO_SIMD", "")
if _BUILT_CPP and _simd not in ("", *_C.simd_levels()):
    raise ValueError(f"VGPO_SIMD must be one of {', '.join(_C.simd_levels())} on this processor, got {_simd!r}")


def _forget_threads() -> None:
    if _C.threads_used():
        torch.set_num_threads(1)


if _BUILT_CPP and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

# For the whole process, like torch.backends' flags: backward passes on a GPU run in autograd's threads, which have no
# context of the caller's. A plain global, so that torch.compile guards on it.
_forced: str | None = None


class _Block:
    """A ``with backend(name)`` that has been entered and not left."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread = threading.get_ident()


_blocks: list[_Block] = []  # in the order in which they were entered
_lock = threading.Lock()
# Types of devices that a user has been told of; of the CPU already where an extension was found and is not used.
_warned = {"cpu"} if _LOADED.refused is not None else set()


def _validate_name(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


if "VGPO_BACKEND" in os.environ and os.environ["VGPO_BACKEND"] not in ("", "auto"):
    _forced = _validate_name(os.environ["VGPO_BACKEND"], "VGPO_BACKEND")
_of_environment = _forced

# What Liger's kernel rounds was read in this release.
LIGER = "0.8.5"
_HOPPER = (9, 0)
_TO_INSTALL = "`pip install 'vgpo-kernels[liger]'` installs it"


def _asked_for_liger() -> bool:
    asked = os.environ.get("VGPO_LIGER", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"VGPO_LIGER must be 0 or 1, got {asked!r}")
    return asked == "1"


_liger = _asked_for_liger()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let one backend handle every call inside the ``with`` block, in all threads of the process.

    Blocks of several threads may overlap if they name the same backend.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: The name is unknown. A call inside the block raises ``RuntimeError`` if the backend is not built, or
            does not handle the device or dtype of the call.
        RuntimeError: Another thread is inside a block of another backend.

    """
    global _forced
    name = _validate_name(name, "the name of a backend")
    if torch.compiler.is_compiling():  # tracing is over when another thread can come in between, and knows no threads
        previous, _forced = _forced, name
        try:
            yield
        finally:
            _forced = previous
        return
    block = _enter(name)
    try:
        yield
    finally:
        _leave(block)


def _enter(name: str) -> _Block:
    global _forced
    block = _Block(name)
    with _lock:
        for other in _blocks:
            if other.thread != block.thread and other.name != name:
                raise RuntimeError(
                    f"backend('{name}') is entered while another thread is inside backend('{other.name}'), and a "
                    "backend is chosen for all threads of the process; let one thread choose it for all"
                )
        _blocks.append(block)
        _forced = name
    return block


def _leave(block: _Block) -> None:
    """Force what the last block that is still entered says, in whichever order blocks are left."""
    global _forced
    with _lock:
        _blocks.remove(block)
        _forced = _blocks[-1].name if _blocks else _of_environment


def liger_head(enabled: bool) -> None:
    """Let Liger's kernel for NVIDIA Hopper GPUs compute ``linear_logprob``, in the whole process. Off by default.

    ``VGPO_LIGER=1`` in the environment turns it on as well. It computes calls on a GPU of compute capability 9.0 with
    hidden states and a contiguous weight in bfloat16, features in multiples of 64, entries of the vocabulary in
    multiples of 8, no bias, where no backend is forced, outside of torch.compile. All other calls, slices of the
    vocabulary and the losses are computed as ever.

    It rounds where our kernels do not: logits to fp16 before they are divided by the temperature (an error of up to
    1/128 in a log-probability where logits reach 32; beyond 65,504 they are infinite), entropies and their incoming
    gradient to bf16, and the sum of the weight's gradient to bf16 after every 1,024 tokens. Results are fp32 all the
    same. So compare log-probabilities only with others of the same kernel.

    Args:
        enabled: Whether to use it.

    Raises:
        TypeError: ``enabled`` is no bool.
        RuntimeError: It is to be used, and a package that it needs is not installed.

    """
    global _liger
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    missing = _missing_for_liger() if enabled else None
    if missing is not None:
        raise RuntimeError(f"Liger's head {missing}")
    _liger = enabled


def liger_serves(device: torch.device) -> bool:
    """Return whether Liger's kernel computes LM heads on ``device``, where it covers a call.

    Args:
        device: Where the tensors are.

    Raises:
        RuntimeError: ``VGPO_LIGER=1`` asks for it on a GPU that it is made for, and it is not installed.

    """
    if not _liger or _refusal_of_liger(device) is not None:
        return False
    missing = _missing_for_liger()
    if missing is not None:
        raise RuntimeError(f"VGPO_LIGER=1 asks for Liger's head, which {missing}")
    return True


def _refusal_of_liger(device: torch.device) -> str | None:
    """Why Liger's kernel is not used on a device even where it is turned on and installed, or ``None`` if it is."""
    if _forced is not None:
        return f"is not used: backend '{_forced}' is forced"
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != _HOPPER:
        return f"needs compute capability 9.0, and this GPU has {capability[0]}.{capability[1]}"
    return None


@lru_cache
def _missing_for_liger() -> str | None:
    """Which package Liger's kernel needs that is not installed, or ``None``."""
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return f"needs liger-kernel {LIGER}, which is not installed: {_TO_INSTALL}"
    if found != LIGER:
        return f"needs liger-kernel {LIGER}, and {found} is installed: {_TO_INSTALL}"
    if find_spec("cutlass") is None:
        return f"needs nvidia-cutlass-dsl, which is not installed: {_TO_INSTALL}"
    return None


def _state_of_liger() -> str:
    if not _liger:
        return "is off: backends.liger_head(True) or VGPO_LIGER=1 turns it on"
    return _missing_for_liger() or _refusal_of_liger(torch.device("cuda")) or "is on"


def triton_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device. It is used only where it is forced."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# What needs no trial. A graph that torch.compile traces has its devices, and takes this as a constant.
# Ascend's NPUs (npu) turn most float64 into float32 with a warning, and a sum in float64 has broken their stream.
_WIDE = {"cpu": torch.float64, "cuda": torch.float64, "meta": torch.float64, "mps": torch.float32, "npu": torch.float32}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype that a device computes in, in which the reference implementation computes there.

    Args:
        device: Any device. One of a type that is not known to have float64 or to lack it computes a sum, once.

    """
    key = device.type if device.type in _WIDE else str(device)
    if key not in _WIDE:
        with _disable_current_modes():  # a trial on fake tensors would tell nothing
            _WIDE[key] = torch.float64 if _computes_float64(device) else torch.float32
    return _WIDE[key]


def _computes_float64(device: torch.device) -> bool:
    # Some devices store what they cannot compute, and some narrow it.
    small = 2.0**-40
    try:
        return bool((torch.full((2,), small, dtype=torch.float64, device=device) + 1).sum().item() == 2 + 2 * small)
    except (RuntimeError, TypeError):
        return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_device() -> str | None:
    return _find_triton_device()


@lru_cache
def _find_triton_device() -> str | None:
    """Type of the devices that Triton has a driver for here, or ``None``: it refuses to have two."""
    try:
        from triton.runtime import driver

        return str(driver.active.get_active_torch_device().type)
    except Exception:  # whatever a driver raises that finds no device, or half of its software
        return None


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not handle a device and compute dtype, or ``None`` if it does."""
    if name == "reference":
        return None
    if dtype == torch.float64:
        return "computes in float32; 'reference' handles float64 inputs"
    if name in ("cpp", "cuda") and _LOADED.refused:
        return f"is out of date: {_LOADED.refused}"
    if name == "cpp":
        if not _BUILT_CPP:
            return "is not built: `pip install -e .` where a C++ compiler and torch are installed builds it"
        return None if device.type == "cpu" else f"handles CPU tensors, and these are on {device}"
    if name == "cuda":
        if not _BUILT_CUDA:
            return "is not built: VGPO_BUILD=cuda with `pip install -e .` builds it and says what is missing"
        return None if device.type == "cuda" else f"handles CUDA tensors, and these are on {device}"
    return _refusal_of_triton(device)


def _refusal_of_triton(device: torch.device) -> str | None:
    if not triton_interpreted() and wide_dtype(device) != torch.float64:  # first: no package or driver would help
        return f"sums in float64, which {device} does not compute"
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed"
    if triton_interpreted() or device.type == "cuda":
        return None
    if device.type == "cpu":
        return "handles GPU tensors; CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before import)"
    if _triton_device() != device.type:
        return f"has no driver for {device.type} here"
    return None


def select(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that handles tensors on ``device`` with compute dtype ``dtype``.

    Args:
        device: Where the tensors are.
        dtype: float32, or float64 where an input is.

    Raises:
        RuntimeError: A backend is forced that does not handle them.

    """
    if _forced is not None:
        refusal = _refusal(_forced, device, dtype)
        if refusal is not None:
            raise RuntimeError(f"backend '{_forced}' {refusal}")
        return _forced
    name = _fastest(device, dtype)
    if name == "reference" and dtype != torch.float64:
        _warn_unserved(device)
    return name


def is_forced() -> bool:
    """Whether a backend is forced, by :func:`backend` or by ``VGPO_BACKEND``."""
    return _forced is not None


def _fastest(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    candidates = ("cpp",) if device.type == "cpu" else ("cuda",) if triton_interpreted() else ("cuda", "triton")
    return next((name for name in candidates if _refusal(name, device, dtype) is None), "reference")


def _warn_unserved(device: torch.device) -> None:
    if device.type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device.type)
    width = str(wide_dtype(device)).removeprefix("torch.")
    slower = f"plain PyTorch computes in {width} there, which is right, and slower"
    if device.type in ("cpu", "cuda"):
        missing = "CUDA kernels" if device.type == "cuda" else "C++ extension"
        reason = f" ({_LOADED.failure})" if _LOADED.failure else ""
        message = (
            f"vgpo_kernels runs without its {missing}{reason}: on {device.type} {slower}. To build: "
            "`pip install -e .` with a C++ compiler (and nvcc for CUDA) installed."
        )
    else:
        message = f"vgpo_kernels has no kernels for {device.type}, and Triton {_refusal_of_triton(device)}: {slower}."
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def describe() -> dict[str, Any]:
    """Return what is built, and which backend handles which device.

    Returns:
        A dict with ``built`` (backend name to bool), ``serves`` (device type to backend name), ``forced`` (name
        or ``None``), ``extension`` (build information of the extension, or ``None``), ``refused`` (why an extension
        that was found is not used, or ``None``), ``torch`` and ``triton`` (versions; ``triton`` may be ``None``),
        ``liger_head`` (``"is on"``, or why Liger's kernel computes no LM head: see :func:`liger_head`).

    """
    triton_version = None
    if _HAS_TRITON:
        try:
            triton_version = version("triton")
        except PackageNotFoundError:
            triton_version = "unknown"
    serves = {"cpu": _fastest(torch.device("cpu"))}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        serves[accelerator.type] = _fastest(accelerator)
    return {
        "built": {"reference": True, "cpp": _BUILT_CPP, "cuda": _BUILT_CUDA, "triton": _HAS_TRITON},
        "serves": serves if _forced is None else dict.fromkeys(serves, _forced),
        "forced": _forced,
        "extension": dict(_C.build_info()) if _BUILT_CPP else None,
        "refused": _LOADED.refused,
        "torch": torch.__version__,
        "triton": triton_version,
        "liger_head": _state_of_liger(),
    }

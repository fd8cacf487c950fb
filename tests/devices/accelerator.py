"""A device in this process that refuses what an Apple GPU (mps) refuses, as far as can be known without one.

It is torch's third-party device (PrivateUse1), with a kernel for everything in Python: the operator of the CPU, on the
same memory. Before it runs, these are refused, in mps's words:

- float64 and complex128, unless the device is registered with ``float64=True``;
- operators to which torch's own table gives a kernel for other devices, and neither one for mps nor one for all;
- what :func:`_refuse_dtypes` has from torch's sources for mps.

Where mps promises no order it takes another one than the CPU: of equal values that are sorted, and of numbers that are
added to one place. :func:`host_copies` counts the elements that leave the device.

The registration is for the whole process and cannot be taken back, so tests register it in a process of their own.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch.utils import backend_registration

# aten/src/ATen/native/mps/TensorFactory.h
NO_DOUBLE = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 "
    "instead."
)
WIDE = (torch.float64, torch.complex128)
aten = torch.ops.aten
CPU = torch.device("cpu")
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EXTENSION_DEVICE = 12  # kDLExtDev of dlpack.h, which torch takes for PrivateUse1
# Operators that take tensors of the CPU beside those of the device: copies, and indices, which torch moves.
_MIXED = ("_copy_from", "index", "_index_put_impl_")
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

_library: torch.library.Library | None = None
_float64 = False
_most_copied: int | None = None
_copied: list[int] = []
_order = torch.Generator().manual_seed(0)


class _Event:
    """An event of the device, which is never behind the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._time = 0.0

    def record(self) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end._time - self._time)


class _Module:
    """What torch, accelerate and transformers ask of ``torch.<name of the device>``; random numbers are the CPU's."""

    Event = _Event

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class _Generator(torch._C.Generator):
    """Draws on the CPU what is drawn for the device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        ours = torch.device(device).type == torch._C._get_privateuse1_backend_name()
        return super().__new__(cls, "cpu" if ours else device)


def register(name: str = "nodouble", *, float64: bool = False) -> torch.device:
    """Register the device under a name of letters, once per process, and return it."""
    global _library, _float64
    _float64 = float64
    backend_registration._setup_privateuseone_for_python_backend(name, backend_module=_Module())
    _library = torch.library.Library("_", "IMPL")
    _library.fallback(_run, "PrivateUse1")
    _library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # By other names torch calls these on devices of others.
    torch.library.impl("aten::convolution_overrideable", "PrivateUse1")(partial(_run, aten.convolution.default))
    torch.library.impl("aten::convolution_backward_overrideable", "PrivateUse1")(_convolution_backward)
    # What only C++ can give a device.
    torch.accelerator.synchronize = lambda device=None: None
    torch.Generator = _Generator  # type: ignore[misc]
    torch._tensor_str.tensor_totype = lambda tensor: tensor.float()  # as tensors of mps are printed
    return torch.device(name, 0)


@contextmanager
def host_copies(most: int | None = None) -> Iterator[list[int]]:
    """Collect how many elements each copy to the host has; a copy of more than ``most`` raises."""
    global _most_copied
    begin, before, _most_copied = len(_copied), _most_copied, most
    found: list[int] = []
    try:
        yield found
    finally:
        _most_copied = before
        found += _copied[begin:]


@cache
def _kernels() -> dict[str, tuple[set[str], str | None]]:
    """Keys with a kernel of each ``aten`` operator, and the operator that a structured one delegates to."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: dict[str, tuple[set[str], str | None]] = {}
    for entry in re.split(r"^- func: ", table.read_text(), flags=re.MULTILINE)[1:]:
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE)
        dispatch = re.search(r"^  dispatch:\n((?:    .*\n| *#.*\n)*)", entry, re.MULTILINE)
        lines = dispatch[1].splitlines() if dispatch else []
        keys = {key.strip() for line in lines if ":" in line for key in line.partition(":")[0].split(",")}
        found[entry.partition("(")[0]] = keys, delegate and delegate[1]
    return found


@cache
def _has_kernel(name: str) -> bool:
    """Whether mps has a kernel of an ``aten`` operator that is no composition of others."""
    keys, delegate = _kernels()[name]
    return "MPS" in keys or any(key.startswith("Composite") for key in keys) or bool(delegate and _has_kernel(delegate))


def _refuse_dtypes(name: str, given: list[Any]) -> None:
    """Refuse what some release of torch that this library supports refuses on mps."""
    # index_add_mps_out in aten/src/ATen/native/mps/operations/Indexing.mm; newer releases add one after the other.
    if name == "index_add" and given[3].dtype == torch.int64:
        raise RuntimeError("index_add(): Expected non int64 dtype for source.")


def _reordered(name: str, given: list[Any]) -> list[Any]:
    """Return the arguments with what is added to one place in another order: mps adds by atomic instructions."""
    if name not in ("index_add", "scatter_add"):
        return given
    first, dim, index, source, *others = given
    if name == "scatter_add" and first.dim() != 1:
        return given
    order = torch.randperm(index.shape[-1], generator=_order)
    return [first, dim, index[order], source.index_select(dim, order), *others]


def _sort(values: Tensor, *, values_out: Tensor, indices: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """Sort, equal values last to first: sort_stable_out_mps of Sort.mm passes over ``stable`` in some releases."""
    backwards = values.flip(dim) if values.dim() else values
    ordered, places = backwards.sort(dim=dim, descending=descending, stable=True)
    values_out.copy_(ordered)
    indices.copy_(values.shape[dim] - 1 - places if values.dim() else places)
    return values_out, indices


def _to_device(tensor: Tensor) -> Tensor:
    """Return a tensor on the device over the memory of one on the CPU, which lives as long."""
    capsule = torch._C._to_dlpack(tensor)
    kind = ctypes.c_int32.from_address(_get_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    kind.value = _EXTENSION_DEVICE
    return torch._C._from_dlpack(capsule)


def _to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU over the memory of one on the device, to be used while that lives."""
    memory = tensor.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), CPU, memory.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _place(tensor: Tensor, like: Tensor, memory: Tensor) -> Tensor:
    """Make a tensor of the device lie in ``memory``'s storage as ``like`` lies in its own."""
    place = (memory.untyped_storage(), like.storage_offset(), like.shape, like.stride())
    return aten.set_.source_Storage_storage_offset.redispatch(_ON_CPU, tensor, *place)


def _refuse_wide(tensor: Tensor) -> None:
    if tensor.dtype in WIDE and not _float64:
        raise TypeError(NO_DOUBLE)


def _convolution_backward(gradient: Tensor, states: Tensor, weight: Tensor, *others: Any) -> Any:
    return _run(aten.convolution_backward.default, gradient, states, weight, [weight.shape[0]], *others)


class _StandIns:
    """Tensors of the CPU that an operator gets in place of the device's."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.memory: dict[int, Tensor] = {}  # tensors of the device by the storage of their stand-ins
        self.same: dict[int, Tensor] = {}  # and by the stand-ins themselves
        self.on_cpu: list[Tensor] = []
        self.resized: list[tuple[Tensor, Tensor]] = []

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of_tensor(value)
        if isinstance(value, torch.device):
            return value if value.type == "meta" else CPU
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(map(self.of, value))
        return value

    def of_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            self.on_cpu.append(tensor)
            return tensor
        found = _to_cpu(tensor)
        self.memory[found.untyped_storage()._cdata] = tensor
        self.same[id(found)] = tensor
        return found

    def of_output(self, output: Any) -> Any:
        """An output without elements is one yet to be resized, which borrowed memory cannot be."""
        if not isinstance(output, Tensor) or output.numel():
            return self.of(output)
        found = torch.empty(0, dtype=output.dtype)
        self.same[id(found)] = output
        self.resized.append((output, found))
        return found

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
        number = torch.float64 if wide else torch.float32
        arguments = self.op._schema.arguments
        given = [
            # A number that torch has made a tensor of, and a number again for Python.
            torch.tensor(value, dtype=number if isinstance(value, float) else None)
            if str(argument.type) == "Tensor" and isinstance(value, (bool, int, float))
            else self.of(value)
            for value, argument in zip(args, arguments, strict=False)
        ]
        outputs = {argument.name for argument in arguments if argument.is_out}
        named = {key: self.of_output(value) if key in outputs else self.of(value) for key, value in kwargs.items()}
        return given, named | ({"pin_memory": False} if "pin_memory" in named else {})

    def back(self, value: Any) -> Any:
        """Return the device's tensors in place of the CPU's in a result."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.back, value))
        if not isinstance(value, Tensor) or any(value is other for other in self.on_cpu):
            return value
        if id(value) in self.same:
            return self.same[id(value)]
        _refuse_wide(value)
        base = self.memory.get(value.untyped_storage()._cdata)
        return _to_device(value) if base is None else _place(_to_device(torch.empty(0, dtype=value.dtype)), value, base)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU, on the memory of the device's tensors."""
    name = op._schema.name.removeprefix("aten::")
    full = name if op._overloadname == "default" else f"{name}.{op._overloadname}"
    if op.namespace != "aten" or not _has_kernel(full):  # as mps_error_fallback says it, in MPSFallback.mm
        raise NotImplementedError(
            f"The operator '{op._schema.name}' is not currently implemented for the MPS device. If you want this op to "
            "be considered for addition please comment on https://github.com/pytorch/pytorch/issues/141287 and mention "
            "use-case, that resulted in missing op"
        )
    if name == "set_":
        return op.redispatch(_ON_CPU, *args, **kwargs)
    stand_ins = _StandIns(op)
    given, named = stand_ins.of_arguments(args, kwargs)
    if name == "_copy_from":
        return _copy(args, given)
    if name not in _MIXED and stand_ins.same and any(other.dim() for other in stand_ins.on_cpu):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices")
    _refuse_dtypes(name, given)
    with torch._C._AutoDispatchBelowAutograd():
        if full == "sort.values_stable":
            named.pop("stable")
            result: Any = _sort(*given, values_out=named.pop("values"), **named)
        else:
            result = op(*_reordered(name, given), **named)
    for output, found in stand_ins.resized:
        _place(output, found, _to_device(found))
    return stand_ins.back(result)


def _copy(args: tuple[Any, ...], given: list[Any]) -> Tensor:
    source, target = args[:2]
    _refuse_wide(target if source.device.type == "cpu" else source)
    if target.device.type == "cpu":
        _copied.append(source.numel())
        if _most_copied is not None and source.numel() > _most_copied:
            raise AssertionError(f"a tensor {list(source.shape)} is copied to the host")
    given[1].copy_(given[0])
    return target

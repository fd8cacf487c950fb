"""Define each operator once, and route a call to the backend that serves it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from vgpo_kernels import backends

# Schemas are defined here, in Python, so that they exist whether or not the extension is built. C++ and CUDA
# implementations register themselves under their dispatch keys when the extension loads.
NAMESPACE = "vgpo_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


class Operator(NamedTuple):
    """An operator as the backends know it."""

    stem: str
    reference: Callable[..., Any]
    compiled: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None


OPERATORS: dict[str, Operator] = {}


def define(
    reference: Callable[..., Any],
    signature: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    implementation: Callable[..., Any] | None = None,
) -> None:
    """Define ``torch.ops.vgpo_kernels.<name>``, named as the function that is its definition.

    Args:
        reference: The definition, ``vgpo_kernels.reference.<stem>.<name>``.
        signature: Arguments and result as the schema spells them, ``"(Tensor x) -> Tensor"``.
        fake: Shapes and dtypes of the result, for tracing.
        setup_context: Saves what ``backward`` needs.
        backward: Gradients of the arguments, in order.
        implementation: Python that serves every device, for an operator that only drives others.

    """
    name = reference.__name__
    qualified = f"{NAMESPACE}::{name}"
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(qualified, fake, lib=_library)
    if implementation is not None:
        _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    stem = reference.__module__.rpartition(".")[2]
    compiled = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPERATORS[name] = Operator(stem, reference, compiled, fake, setup_context, backward)


def call(name: str, device: torch.device, dtype: torch.dtype, *arguments: Any) -> Any:
    """Run the operator ``name`` on the backend that serves ``device`` and ``dtype``.

    Returns:
        The schema's result; of the reference, fp64 tensors (and for losses only the loss, which autograd
        differentiates, and the metrics).

    """
    return implementation(name, backends.select(device, dtype))(*arguments)


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """Return the function by which ``backend`` implements the operator ``name``."""
    operator = OPERATORS[name]
    if backend == "reference":
        return operator.reference
    if backend == "triton":
        _import_triton(operator.stem)
        return getattr(torch.ops.vgpo_kernels_triton, name).default  # type: ignore[no-any-return]
    return operator.compiled


# Triton is imported when it is first needed. A traced function cannot import, so tracing takes this as done.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _import_triton(stem: str) -> None:
    import_module(f"vgpo_kernels.triton_kernels.{stem}")

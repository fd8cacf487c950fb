"""Define each operator once, bind everything to its arguments by name, and route a call to the backend that handles it.

An operator's schema is the only place that spells its signature. A fake kernel, a reference, a launcher or a backward
function declares the arguments that it reads, by the schema's names and in any order, and nothing else: adding an
argument to an operator changes its schema and the functions that read the argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import backends

# Schemas are defined here, in Python, so that they exist whether or not the extension is built. C++ and CUDA
# implementations register themselves under their dispatch keys when the extension loads.
NAMESPACE = "vgpo_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


class Operator(NamedTuple):
    """An operator as the backends know it. Its functions take all arguments by position, in the schema's order.

    Attributes:
        stem: Name of the files that it lives in.
        signature: Arguments and result, as the schema spells them.
        arguments: Names of the arguments, in the schema's order.
        reference: The reference implementation.
        compiled: The operator of torch: C++ and CUDA.
        fake: Shapes and dtypes of the result.
        setup_context: What saves the values that ``backward`` needs, as torch calls it; ``None`` without gradients.
        backward: Gradients, one for each argument, as torch calls it; ``None`` without gradients.

    """

    stem: str
    signature: str
    arguments: tuple[str, ...]
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
    backward: Callable[..., Mapping[str, Tensor | None]] | None = None,
    implementation: Callable[..., Any] | None = None,
) -> None:
    """Define ``torch.ops.vgpo_kernels.<name>``, named after its reference implementation.

    The functions are bound by :func:`by_name`: each declares only the arguments that it reads.

    Args:
        reference: The reference implementation, ``vgpo_kernels.reference.<stem>.<name>``.
        signature: Arguments and result as the schema spells them, ``"(Tensor x) -> Tensor"``.
        fake: Shapes and dtypes of the result, for tracing.
        setup_context: Keeps (see :func:`keep`) what ``backward`` needs. It takes ``ctx``, ``output``, and arguments.
        backward: ``backward(ctx, needed, *gradients)`` takes the names of the arguments that need a gradient, and the
            gradients of the results. It returns gradients by name; an argument without one has none.
        implementation: Python that handles every device, for an operator that only calls others.

    """
    name = reference.__name__
    qualified = f"{NAMESPACE}::{name}"
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    compiled = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = tuple(argument.name for argument in compiled._schema.arguments)
    operator = Operator(
        reference.__module__.rpartition(".")[2],
        signature,
        names,
        by_name(reference, names),
        compiled,
        by_name(fake, names),
        None if setup_context is None else _setup(setup_context, names),
        None if backward is None else _backward(backward, names),
    )
    torch.library.register_fake(qualified, operator.fake, lib=_library)
    if implementation is not None:
        _library.impl(name, by_name(implementation, names), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if operator.backward is not None:
        torch.library.register_autograd(
            qualified, operator.backward, setup_context=operator.setup_context, lib=_library
        )
    OPERATORS[name] = operator


def by_name(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Make a function of values in the order of ``names`` from one that declares those which it reads.

    Args:
        function: Has parameters called like some of ``names``; with a ``**parameter``, it takes the others as well.
            Parameters of other names must have a default.
        names: Names of the values.

    Returns:
        A function that takes one value for each name, by position.

    Raises:
        TypeError: The function has a parameter without a default that is none of ``names``.

    """
    read = _read(function, names)

    @wraps(function)
    def bound(*values: Any) -> Any:
        if len(values) != len(names):
            raise TypeError(f"{function} takes the {len(names)} values {', '.join(names)}, got {len(values)}")
        return function(**{name: values[index] for index, name in read})

    return bound


def _read(function: Callable[..., Any], names: tuple[str, ...], *others: str) -> list[tuple[int, str]]:
    """Return index and name of those of ``names`` that a function declares; ``others`` it may declare as well."""
    parameters = inspect.signature(function).parameters.values()
    declared = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    takes_all = len(declared) < len(parameters)
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty} & declared
    unknown = required - {*names, *others}
    if unknown:
        raise TypeError(f"{function} reads {', '.join(sorted(unknown))}, none of the arguments {', '.join(names)}")
    return [(index, name) for index, name in enumerate(names) if takes_all or name in declared]


def _setup(setup_context: Callable[..., None], names: tuple[str, ...]) -> Callable[..., None]:
    read = _read(setup_context, names, "ctx", "output")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, output, **{name: inputs[index] for index, name in read})

    return setup


def _backward(
    backward: Callable[..., Mapping[str, Tensor | None]], names: tuple[str, ...]
) -> Callable[..., tuple[Tensor | None, ...]]:
    place = {name: index for index, name in enumerate(names)}

    def in_order(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(names)
        for name, gradient in backward(ctx, {*compress(names, ctx.needs_input_grad)}, *gradients).items():
            found[place[name]] = gradient
        return tuple(found)

    return in_order


def keep(ctx: Any, **values: Any) -> None:
    """Keep values for the backward pass by name, tensors in the way that autograd asks for."""
    tensors = {name: value for name, value in values.items() if value is None or isinstance(value, Tensor)}
    ctx.save_for_backward(*tensors.values())
    ctx.tensor_names = tuple(tensors)
    ctx.others = {name: value for name, value in values.items() if name not in tensors}


def kept(ctx: Any) -> dict[str, Any]:
    """Return what :func:`keep` kept."""
    return {**dict(zip(ctx.tensor_names, ctx.saved_tensors, strict=True)), **ctx.others}


def call(name: str, device: torch.device, dtype: torch.dtype, **arguments: Any) -> Any:
    """Run the operator ``name`` on the backend that handles ``device`` and ``dtype``.

    Args:
        name: The operator.
        device: Where its tensors are.
        dtype: float32, or float64 where an input is.
        **arguments: Every argument of the schema, by name.

    Returns:
        The schema's result; of the reference implementation, fp64 tensors (and for losses only the loss, which
        autograd differentiates, and the metrics).

    Raises:
        TypeError: An argument is missing, or the schema has none of its name.

    """
    names = OPERATORS[name].arguments
    if arguments.keys() != set(names):
        wrong = ", ".join(sorted(arguments.keys() ^ set(names)))
        raise TypeError(f"{name} takes the arguments {', '.join(names)}; missing or unknown: {wrong}")
    return implementation(name, backends.select(device, dtype))(*[arguments[key] for key in names])


def implementation(name: str, backend: str) -> Callable[..., Any]:
    """Return the function by which ``backend`` implements the operator ``name``, arguments in the schema's order."""
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

"""Define each operator once, bind everything to its arguments by name, and route a call to the backend that handles it.

An operator's schema is the only place that spells its signature. A fake kernel, a reference, a launcher or a backward
function declares the arguments that it reads, by the schema's names and in any order, and nothing else: adding an
argument to an operator changes its schema and the functions that read the argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from importlib import import_module
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor, peek_interpreter_stack
from torch.autograd import forward_ad

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
        floats: Names of those that are floats or lists of floats.
        reference: The reference implementation; it also takes the ``dtype`` to compute in, by name.
        compiled: The operator of torch: C++ and CUDA.
        fake: Shapes and dtypes of the result.
        setup_context: What saves the values that ``backward`` needs, as torch calls it; ``None`` without gradients.
        backward: Gradients, one for each argument, as torch calls it; ``None`` without gradients.
        chunked: Plain PyTorch in fp32 that works in chunks, where the reference implementation would hold every logit
            in fp64, or ``None``.

    """

    stem: str
    signature: str
    arguments: tuple[str, ...]
    floats: tuple[str, ...]
    reference: Callable[..., Any]
    compiled: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    chunked: Callable[..., Any] | None


OPERATORS: dict[str, Operator] = {}


def define(
    reference: Callable[..., Any],
    signature: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Mapping[str, Tensor | None]] | None = None,
    implementation: Callable[..., Any] | None = None,
    chunked: Callable[..., Any] | None = None,
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
        implementation: Python for every device that the extension has nothing else for: it only calls other operators,
            or is plain PyTorch in fp32.
        chunked: Plain PyTorch in chunks, returning what the reference implementation does; by default the operator
            itself where it has an ``implementation``.

    """
    name = reference.__name__
    qualified = f"{NAMESPACE}::{name}"
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    compiled = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = tuple(argument.name for argument in compiled._schema.arguments)
    in_chunks: Callable[..., Any] | None = None if implementation is None else partial(run, name, "cpp")
    if chunked is not None:
        in_chunks = by_name(chunked, names)
    operator = Operator(
        reference.__module__.rpartition(".")[2],
        signature,
        names,
        tuple(_FLOATS.findall(signature.partition("->")[0])),
        by_name(reference, names),
        compiled,
        by_name(fake, names),
        None if setup_context is None else _setup(setup_context, names),
        None if backward is None else _backward(backward, qualified, names),
        in_chunks,
    )
    if implementation is not None:
        _library.impl(name, by_name(implementation, names), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _register_formulas(_library, qualified, operator)
    OPERATORS[name] = operator
    if operator.floats:
        define_dynamic(operator, compiled)


def _register_formulas(library: torch.library.Library, qualified: str, operator: Operator) -> None:
    """Give an operator of ``library`` the fake kernel and the gradients of ``operator``."""
    torch.library.register_fake(qualified, operator.fake, lib=library)
    if operator.backward is not None:
        torch.library.register_autograd(qualified, operator.backward, setup_context=operator.setup_context, lib=library)


# Definitions live as long as their library is referred to.
_libraries = {NAMESPACE: _library}
# A float or a list of floats in a signature, and its name.
_FLOATS = re.compile(r"\bfloat(?:\[\])? (\w+)")


def define_dynamic(operator: Operator, implementation: Any) -> None:
    """Define the twin ``<name>_dynamic`` of an implementation, which takes floats and lists of them as CPU tensors.

    torch.compile makes a constant of a float that an operator takes, and compiles anew for each value. Tensors it makes
    of floats stay inputs of the graph, so a coefficient may change from step to step.
    """
    namespace, _, name = implementation.name().partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    library = _libraries[namespace]
    arguments, arrow, result = operator.signature.partition("->")
    schema = _FLOATS.sub(r"Tensor \1", arguments) + arrow + result
    library.define(f"{name}_dynamic{schema}", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    places = [operator.arguments.index(argument) for argument in operator.floats]

    def twin(*values: Any) -> Any:
        given = list(values)
        for place in places:
            given[place] = given[place].tolist()
        return implementation(*given)

    library.impl(f"{name}_dynamic", twin, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _register_formulas(library, f"{namespace}::{name}_dynamic", operator)


def by_name(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """Make a function of values in the order of ``names`` from one that declares those which it reads.

    Args:
        function: Has parameters called like some of ``names``; with a ``**parameter``, it takes the others as well.
            Parameters of other names must have a default.
        names: Names of the values.

    Returns:
        A function that takes one value for each name, by position, and other parameters by theirs.

    Raises:
        TypeError: The function has a parameter without a default that is none of ``names``.

    """
    read = _read(function, names)

    @wraps(function)
    def bound(*values: Any, **others: Any) -> Any:
        if len(values) != len(names):
            raise TypeError(f"{function} takes the {len(names)} values {', '.join(names)}, got {len(values)}")
        return function(**{name: values[index] for index, name in read}, **others)

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
    backward: Callable[..., Mapping[str, Tensor | None]], qualified: str, names: tuple[str, ...]
) -> Callable[..., tuple[Tensor | None, ...]]:
    place = {name: index for index, name in enumerate(names)}

    def in_order(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(names)
        in_graph = torch.is_grad_enabled()
        with torch.no_grad() if in_graph else nullcontext():
            by_argument = backward(ctx, {*compress(names, ctx.needs_input_grad)}, *gradients)
        for name, gradient in by_argument.items():
            found[place[name]] = gradient
        return differentiable_once(ctx, qualified, gradients, found) if in_graph else tuple(found)

    return in_order


def differentiable_once(
    ctx: Any, qualified: str, incoming: tuple[Tensor | None, ...], gradients: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Make gradients part of a graph (``create_graph=True``), which raises where it is differentiated.

    Kernels have no second derivatives, and gradients outside of the graph would count as constants.
    """
    message = (
        f"{qualified} has first derivatives only; vgpo_kernels.backend('reference') has higher ones, and is slower"
    )
    given = [gradient.detach().requires_grad_() for gradient in gradients if gradient is not None]
    # With the arguments that were kept, and the results' own gradients (which hold the loss's factor), the graph leads
    # back to where a caller may ask for a derivative.
    leading = (*ctx.saved_tensors, *incoming)
    anchors = [tensor for tensor in leading if tensor is not None and tensor.requires_grad]
    refusal: Any = torch._C._functions.DelayedError(message.encode(), len(given) + len(anchors))
    refused = refusal(*given, *anchors)  # of one tensor, a tensor
    refusing = iter((refused,) if isinstance(refused, Tensor) else refused)
    return tuple(None if gradient is None else next(refusing) for gradient in gradients)


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
        The schema's result; of plain PyTorch, tensors of :func:`vgpo_kernels.backends.wide_dtype` (and for losses only
        the loss, which autograd differentiates, and the metrics).

    Raises:
        TypeError: An argument is missing, or the schema has none of its name.

    """
    operator = OPERATORS[name]
    names = operator.arguments
    if arguments.keys() != set(names):
        wrong = ", ".join(sorted(arguments.keys() ^ set(names)))
        raise TypeError(f"{name} takes the arguments {', '.join(names)}; missing or unknown: {wrong}")
    backend = backends.select(device, dtype)
    values = [arguments[key] for key in names]
    tracing = torch.compiler.is_compiling()
    transforms = not tracing and transformed()
    if backend == "reference":
        # Of chunks there are gradients alone.
        if operator.chunked is not None and dtype != torch.float64 and not backends.is_forced() and not transforms:
            return operator.chunked(*values)
        width = backends.wide_dtype(device)
        with without_autocast(device) if width == torch.float32 else nullcontext():
            return operator.reference(*values, dtype=width)
    if transforms:
        _refuse_transforms(operator, name, backend, values)
    return run(name, backend, *values)


def run(name: str, backend: str, *values: Any) -> Any:
    """Run the operator ``name`` as ``backend`` implements it, with floats that torch.compile may change as tensors.

    Args:
        name: The operator.
        backend: ``"triton"``; all others are the operator of torch, in Python where the extension has no kernel.
        *values: The arguments, in the schema's order.

    """
    operator = OPERATORS[name]
    tracing = torch.compiler.is_compiling()
    arguments = dict(zip(operator.arguments, values, strict=True))
    if any(_changes(arguments[key], tracing) for key in operator.floats):
        given = [_as_tensor(value) if key in operator.floats else value for key, value in arguments.items()]
        return implementation(name, backend, dynamic=True)(*given)
    return implementation(name, backend)(*values)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off where it is on: it would multiply fp32 in half precision. Not every device knows of it."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def fake_nothing() -> None:
    """Be the fake kernel of an operator that only writes to its arguments."""


def transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is under way."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def _refuse_transforms(operator: Operator, name: str, backend: str, values: list[Any]) -> None:
    """Raise RuntimeError for derivatives that kernels do not have: those of forward mode and of torch.func."""
    if operator.backward is None:
        return
    tensors = [value for value in values if isinstance(value, Tensor)]
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(one).tangent is not None for one in tensors):
        missing = "forward-mode derivative"
    elif any(is_gradtrackingtensor(one) for one in tensors):
        missing = "derivative for torch.func"
    else:
        return
    raise RuntimeError(
        f"{name} has no {missing} on backend '{backend}'; the slower vgpo_kernels.backend('reference') has one"
    )


def _changes(value: Any, tracing: bool) -> bool:
    """Whether floats are inputs of the graph that torch.compile is tracing, or tensors that it made of such."""
    if isinstance(value, Tensor):
        return True
    if not tracing:
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(number) for number in (value if isinstance(value, list) else [value]))


def _as_tensor(value: Any) -> Tensor:
    """Make a tensor of floats, which torch.compile keeps as inputs of a graph if they are only multiplied by one."""
    if isinstance(value, Tensor):
        return value
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * number for number in value]) if isinstance(value, list) else one * value


def implementation(name: str, backend: str, *, dynamic: bool = False) -> Callable[..., Any]:
    """Return the function by which ``backend`` implements the operator ``name``, arguments in the schema's order.

    With ``dynamic`` it takes floats as tensors (:func:`define_dynamic`).
    """
    operator = OPERATORS[name]
    if backend == "reference":
        return operator.reference
    entry = f"{name}_dynamic" if dynamic else name
    if backend == "triton":
        _import_triton(operator.stem)
        return getattr(torch.ops.vgpo_kernels_triton, entry).default  # type: ignore[no-any-return]
    return getattr(torch.ops.vgpo_kernels, entry).default if dynamic else operator.compiled


# Triton is imported when it is first needed. A traced function cannot import, so tracing takes this as done.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _import_triton(stem: str) -> None:
    import_module(f"vgpo_kernels.triton_kernels.{stem}")

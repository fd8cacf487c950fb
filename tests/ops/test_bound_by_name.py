"""C++ operators find their arguments by the schema's names: under schemas of another order, longer, and shorter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.harness import NAMESPACE, compile_library
from test_bad_operators import ARGUMENTS, LAYOUTS, OPERATORS, call, device  # skips where nothing is built

from vgpo_kernels.ops import registry

__all__ = ["device"]

# Defines operators by other schemas than vgpo_kernels does, and calls them by keywords: a process of its own.
CALL_ALL = """\
import sys

import torch

namespace, path, folder = sys.argv[1:]
library = torch.library.Library(namespace, "DEF")
calls = torch.load(f"{folder}/calls.pt")
for name, (schema, _) in calls.items():
    library.define(name + schema)
torch.ops.load_library(path)
found = {}
for name, (_, arguments) in calls.items():
    try:
        result = getattr(getattr(torch.ops, namespace), name)(**arguments)
    except RuntimeError as error:
        found[name] = str(error)
        continue
    if result is None:
        result = [arguments[name] for name in ("statistics", "sums", "logits", "result") if name in arguments]
    found[name] = [result] if isinstance(result, torch.Tensor) else list(result)
torch.save(found, f"{folder}/found.pt")
"""


def library_of(device: str) -> tuple[str, str]:
    """Return the namespace of a device's operators, and the library that implements them."""
    if device == "cuda":
        return NAMESPACE, str(compile_library("bindings.cpp"))
    spec = find_spec("vgpo_kernels._C")
    assert spec is not None and spec.origin is not None
    return registry.NAMESPACE, spec.origin


def fresh(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def call_all(
    device: str, layout: str, change: Callable[[list[str]], list[str]], folder: Path
) -> dict[str, str | list[Any]]:
    """Call every operator under a changed list of arguments; return its results, or what its error says."""
    calls = {}
    for name, operator in OPERATORS.items():
        schema = str(operator._schema)
        listed, result = schema[schema.index("(") + 1 :].split(") -> ")
        declared = change(listed.split(", "))
        names = {argument.split()[-1] for argument in declared}
        given = {key: fresh(value) for key, value in ARGUMENTS[layout][name].items() if key in names}
        calls[name] = (f"({', '.join(declared)}) -> {result}", given)
    torch.save(calls, folder / "calls.pt")
    subprocess.run([sys.executable, "-c", CALL_ALL, *library_of(device), str(folder)], check=True)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_a_schema_is_nothing_to_them(device: str, layout: str, tmp_path: Path) -> None:
    found = call_all(device, layout, lambda declared: declared[::-1], tmp_path)
    for name, results in found.items():
        assert not isinstance(results, str), results
        for actual, expected in zip(results, call(device, layout, name), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_argument_that_they_do_not_read_is_an_error(device: str, tmp_path: Path) -> None:
    found = call_all(device, "padded", lambda declared: [*declared, "Tensor? forgotten=None"], tmp_path)
    for name, error in found.items():
        assert isinstance(error, str) and f"{name} does not read its argument forgotten" in error


def test_an_argument_that_the_schema_lacks_is_an_error(device: str, tmp_path: Path) -> None:
    found = call_all(device, "padded", lambda declared: declared[:-1], tmp_path)
    for name, error in found.items():
        last = OPERATORS[name]._schema.arguments[-1].name
        assert isinstance(error, str) and f"{name} has no argument {last}" in error

"""Which module imports which: no circles, the trainer stands on the kernels' public names, and never the reverse."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"vgpo_kernels": ROOT / "vgpo_kernels", "vgpo_trainer": ROOT / "python" / "vgpo_trainer"}
# What the kernels may be built on; integrations adapt to other packages besides.
FOUNDATIONS = {"torch", "numpy", "triton", "vgpo_kernels"}


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


TREES = {
    module_name(package, path): ast.parse(path.read_text())
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
PARENTS = {name.rpartition(".")[0] for name in TREES}  # packages


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Module and name of every import, those in functions and for type checking only among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(tree: ast.AST) -> set[str]:
    """Modules of ours that a module names in its imports: ``from package import module`` is that module."""
    named = {f"{module}.{name}" if f"{module}.{name}" in TREES else module for module, name in imports(tree)}
    return named & TREES.keys()


def room(module: str) -> str:
    """The folder of a module, or the module itself where it lies at the top of its package."""
    package, _, rest = module.partition(".")
    first, _, deeper = rest.partition(".")
    return f"{package}.{first}" if deeper or f"{package}.{first}" in PARENTS else module


GRAPH = {name: imported_modules(tree) for name, tree in TREES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_is_in_a_circle() -> None:
    assert GRAPH["vgpo_trainer.demo.training"] >= {"vgpo_trainer.demo.callback", "vgpo_trainer.trainer"}, "lazy, typed"
    assert circle(GRAPH) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_is_in_a_circle(package: str) -> None:
    rooms: dict[str, set[str]] = {}
    for module, named in GRAPH.items():
        if module.startswith(f"{package}."):  # the package itself, which collects the public names, is no room
            others = {room(other) for other in named if other != package} - {room(module)}
            rooms.setdefault(room(module), set()).update(others)
    assert len(rooms) > 5 and circle(rooms) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle({"a": {"b", "c"}, "b": {"c"}})


def test_the_trainer_imports_public_names_of_the_kernels() -> None:
    (exported,) = [
        set(ast.literal_eval(node.value))
        for node in TREES["vgpo_kernels"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    for module, tree in TREES.items():
        if not module.startswith("vgpo_trainer"):
            continue
        for imported, name in imports(tree):
            if imported == "vgpo_kernels":
                assert name is None or name in exported or name == "__version__", f"{module}: {name}"
            elif imported.startswith("vgpo_kernels."):
                assert imported.startswith("vgpo_kernels.integrations."), f"{module}: {imported}"
                assert not str(name).startswith("_"), f"{module}: {imported}.{name}"


def at_module_level(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Imports that run when the module is imported."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


def test_the_kernels_import_nothing_of_the_trainer_or_its_packages() -> None:
    for module, tree in TREES.items():
        if not module.startswith("vgpo_kernels"):
            continue
        assert not [name for name, _ in imports(tree) if name.startswith("vgpo_trainer")], module
        roots = {name.partition(".")[0] for name, _ in at_module_level(tree)}
        if room(module) == "vgpo_kernels.integrations":
            assert not roots & {"transformers", "trl"}, module
        else:
            assert roots <= FOUNDATIONS | set(sys.stdlib_module_names), module

"""What the pages promise and a machine can check: docstrings, links, anchors, pictures, code and commands."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from load_script import load_script
from vgpo_trainer.cli import build_parser
from vgpo_trainer.options.help import help_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# The reference is made of docstrings, and its signatures are no statements.
WRITTEN = [page for page in PAGES if page.name != "api.md"]


api = load_script("api_reference")
NAMES = [(group.module, name) for group in api.GROUPS for name in group.names]

# ---- the API reference ---------------------------------------------------------------------------------------------

# The paper's equation that a function computes; attention and log-probabilities have none there.
EQUATIONS = {
    "visual_prototype": "Eq. 3",
    "visual_focus": "Eq. 4",
    "visual_weights": "Eq. 5-11",
    "group_weights": "Eq. 9-10",
    "policy_loss": "Eq. 11",
    "vgpo_loss": "Eq. 3-11",
    "linear_policy_loss": "Eq. 11",
    "linear_vgpo_loss": "Eq. 3-11",
}
# They raise nothing of their own.
RAISES_NOTHING = {
    "expect_reweighted_advantages",
    "describe",
    "is_forced",
    "triton_interpreted",
    "wide_dtype",
    "unwrap",
    "logit_maps",
    "compares_responses",
    "k3",
}
# What says a tensor's shape: brackets, another argument to compare with, or a number without any.
SHAPE = re.compile(r"\[[^\]]*\]|s'? shape|[Ss]hape of|As in|\b0-dimensional|[Pp]er token|likewise")
# What says the shapes of the arguments after it.
FOLLOWING = re.compile(r"[Aa]s (all|the \w+) that follow|like (all|the arguments) that follow")


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    page = api.page()
    assert api.PAGE.read_text() == page, "run scripts/api_reference.py"
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    assert len({api.anchor(title) for title in titles}) == len(titles), "a link would lead to the first of two"


def public_names(module: str) -> set[str]:
    """Functions and classes of a module: those it exports, or else those it defines."""
    _, tree = api.source_of(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = set(ast.literal_eval(node.value))
            return {name for name in exported if not name.isupper() and name != "backends"}
    return {node.name for node in tree.body if isinstance(node, api.Definition) and not node.name.startswith("_")}


@pytest.mark.parametrize(
    "module", sorted({group.module for group in api.GROUPS} - {"vgpo_kernels.integrations.surface"})
)
def test_the_api_reference_has_every_public_name(module: str) -> None:
    assert {name for listed, name in NAMES if listed == module} | (
        {"backend"} if module == "vgpo_kernels" else set()
    ) == public_names(module)


def functions() -> list[tuple[str, ast.FunctionDef, str]]:
    """Public functions, and those methods and properties of public classes that are described."""
    found = []
    for module, name in NAMES:
        place, node = api.locate(module, name)
        for function in [node, *api.methods(node)]:
            if isinstance(function, ast.FunctionDef):
                label = api.heading(module, name) + ("" if function is node else f".{function.name}")
                found.append((label, function, place))
    return found


@pytest.mark.parametrize(("node", "place"), [pytest.param(node, place, id=label) for label, node, place in functions()])
def test_a_public_function_is_documented(node: ast.FunctionDef, place: str) -> None:
    parts = {section.title: section for section in api.sections(ast.get_docstring(node) or "")}
    assert parts[""].text, "a summary"
    arguments = [*node.args.args, *node.args.kwonlyargs]
    method = bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
    if method:
        return  # a line says what it does; its class says the rest
    described = dict(parts["Args"].items()) if "Args" in parts else {}
    assert [name.lstrip("*") for name in described if not name.startswith("*")] == [item.arg for item in arguments]
    following = False
    for item in arguments:
        following = following or bool(FOLLOWING.search(described[item.arg]))
        if not following and re.search(r"(?<!\[)Tensor", ast.unparse(item.annotation or ast.Constant(None))):
            assert SHAPE.search(described[item.arg]), f"{item.arg}: which shape?"
    returned = "None" if node.returns is None else ast.unparse(node.returns)
    result = parts.get("Returns") or parts.get("Yields")
    if "Tensor" in returned:
        assert result and (SHAPE.search(result.text) or "`VisualWeights`" in result.text), "which shape is returned?"
    if node.name not in RAISES_NOTHING:
        assert "Raises" in parts, "which errors?"
        assert all(text and name.isidentifier() for name, text in parts["Raises"].items())
    if node.name in EQUATIONS and place.startswith("vgpo_kernels.ops"):
        assert EQUATIONS[node.name] in parts[""].text


# ---- links and pictures --------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def links_of(page: Path) -> list[str]:
    """Targets of a page's links and pictures, in Markdown and in HTML."""
    text = without_code(page.read_text())
    return [one or other for one, other in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), link
        assert file.is_relative_to(ROOT), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", without_code(file.read_text()), flags=re.MULTILINE)
            assert anchor in {api.anchor(title) for title in titles}, link


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_lines_of_prose_are_no_longer_than_those_of_code(page: Path) -> None:
    prose = [line for line in without_code(page.read_text()).splitlines() if not line.startswith(("|", "<", "!["))]
    assert not [line for line in prose if len(line) > 120]


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links_of(page)}
    assert not [page.name for page in PAGES if page.parent.name == "docs" and page not in linked]
    assert not [file.name for file in (ROOT / "docs" / "images").iterdir() if file not in linked]


# ---- code ----------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of the pages people wrote, each named by page and place; test_adding_an_op.py runs its page's."""
    return [
        (f"{page.stem}-{index}", code)
        for page in WRITTEN
        if page.stem != "adding-an-op"
        for index, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.M))
    ]


# Examples of a trainer or of a framework's adapter: those have tests of their own.
NEEDS_MORE = re.compile(r"vgpo_trainer|integrations\.(verl|easyr1)")


def example_scope() -> dict[str, object]:
    """What the pages' examples take as given: a batch of two responses to a prompt, and a model's last layer."""
    batch, length, features, vocabulary = 2, 6, 8, 32
    visual_mask = torch.zeros(batch, length, dtype=torch.bool)
    visual_mask[:, :2] = True
    logp = torch.randn(batch, 3).sub(3).requires_grad_()
    return {
        "torch": torch,
        "hidden": torch.randn(batch, length, features, requires_grad=True),
        "visual_mask": visual_mask,
        "response_mask": torch.ones(batch, 3, dtype=torch.bool),
        "group_ids": torch.zeros(batch, dtype=torch.int64),
        "cos": torch.rand(batch, 3) - 0.3,
        "has_image": torch.ones(batch, dtype=torch.bool),
        "logp": logp,
        "old_logp": logp.detach(),
        "spoilt_logp": logp.detach() - 0.1,
        "advantages": torch.tensor([1.0, -1.0]),
        "states": torch.randn(batch, 3, features),
        "noisy_states": torch.randn(batch, 3, features),
        "weight": torch.randn(vocabulary, features, requires_grad=True),
        "targets": torch.randint(vocabulary, (batch, 3)),
        "q": torch.randn(batch, 4, 3, 16),
        "k": torch.randn(batch, 2, length, 16),
        "key_segments": torch.tensor([[0, 0, 1, 2, 2, 2]] * batch),
    }


def free_names(code: str) -> set[str]:
    """Names that a block reads and does not make."""
    read: set[str] = set()
    made = set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.FunctionDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return read - made


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks("python")])
def test_python_blocks_compile_and_run_if_they_can(code: str) -> None:
    compiled = compile(code, "<page>", "exec")
    scope = example_scope()
    if free_names(code) <= set(scope) and not NEEDS_MORE.search(code):
        exec(compiled, scope)
        if "loss" in scope:
            assert torch.isfinite(scope["loss"])
            if "backward()" not in code:
                scope["loss"].backward()


def test_enough_blocks_run() -> None:
    scope = set(example_scope())
    run = {name for name, code in blocks("python") if free_names(code) <= scope and not NEEDS_MORE.search(code)}
    assert len([name for name in run if name.startswith("integrate")]) >= 2
    pages = {f"how-it-works-{index}" for index in range(5)}
    assert run >= {"README-0", "README-1", "adding-a-signal-0", "methods-1"} | pages


def test_imports_in_python_blocks_exist() -> None:
    for name, code in blocks("python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vgpo_"):
                for alias in node.names:
                    if NEEDS_MORE.search(str(node.module)):
                        api.locate(node.module, alias.name)
                    else:
                        assert hasattr(importlib.import_module(str(node.module)), alias.name), name


def test_commands_and_targets_exist() -> None:
    text = "".join(page.read_text() for page in WRITTEN)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)) <= set(phony.split())
    parser = build_parser()
    lines = re.findall(r"^vgpo .*$", text.replace("\\\n", ""), re.MULTILINE)
    assert len(lines) >= 5
    # argparse exits, which fails the test, where a command or an option does not exist.
    for line in lines:
        command, *options = shlex.split(line, comments=True)[1:]
        if command == "train":
            assert_options_of_train(option for option in options if option.startswith("--"))
        else:
            parser.parse_args([command, *options])
    for command in re.findall(r"`vgpo ([a-z]+)", text):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([command, "--help"])


def test_options_of_train_exist() -> None:
    for page in ("train.md", "faq.md"):
        assert_options_of_train(re.findall(r"`(--[a-z][a-z0-9_-]+)", (ROOT / "docs" / page).read_text()))


def assert_options_of_train(options: Iterable[str]) -> None:
    pytest.importorskip("trl")
    known = {spelling for action in help_parser()._actions for spelling in action.option_strings}
    of_launchers = {"--config-file", "--main-process-ip", "--main-process-port", "--machine-rank", "--num-machines"}
    of_launchers |= {"--enable-scale-out"}  # vLLM's
    assert {option.replace("_", "-") for option in options} - known <= of_launchers

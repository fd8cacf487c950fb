"""Write docs/api.md, the API reference, from signatures and docstrings; nothing is imported.

    python scripts/api_reference.py [--check]

``--check`` writes nothing and fails if the page is not what the docstrings say.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
FOLDERS = (ROOT, ROOT / "python")
LINE = 100

HEAD = """\
# API reference

<!-- Made by scripts/api_reference.py from signatures and docstrings: edit those, then run it. -->

B responses of S positions, T of them response tokens; N tokens of a packed batch; D features; V entries of the
vocabulary. A padded batch has one row a response, and response arrays `[B, T]` mean the **last** T positions; a packed
one has no padding, and `cu_seqlens` `[B + 1]` says where its responses begin. Arguments are checked before any work.
Inputs in float64 are computed, and returned, in float64 by the reference. [How it works](how-it-works.md) explains what
is computed, [Integrate](integrate.md) where it goes.
"""


class Group(NamedTuple):
    """A chapter of the page."""

    title: str
    module: str
    names: tuple[str, ...]
    introduction: str | None = None  # None: the module's docstring


GROUPS = (
    Group(
        "Visual signal, factors and loss",
        "vgpo_kernels",
        (
            "visual_focus",
            "visual_prototype",
            "visual_weights",
            "group_weights",
            "combine_factors",
            "policy_loss",
            "vgpo_loss",
        ),
        "From hidden states to the loss, step by step and in one call.",
    ),
    Group(
        "The family of perception-aware methods",
        "vgpo_kernels",
        ("shape_tokens", "response_factors", "ShapingConfig", "TokenShaping"),
        "Any per-token signal becomes weights as a published method has them; a preset for each.",
    ),
    Group(
        "A look at the first batch",
        "vgpo_kernels",
        ("check_batch", "BatchFindings", "Finding", "BatchError"),
        "For the mistakes that raise no error.",
    ),
    Group(
        "From the LM head",
        "vgpo_kernels",
        (
            "linear_logprob",
            "linear_policy_loss",
            "linear_vgpo_loss",
            "linear_logprob_slice",
            "combine_slices",
            "LinearLogprob",
        ),
        "Log-probabilities and losses without the logits.",
    ),
    Group(
        "Two views",
        "vgpo_kernels",
        (
            "linear_divergence",
            "LinearDivergence",
            "linear_divergence_slice",
            "divergence_totals",
            "combine_divergences",
        ),
        "How far apart the distributions of two hidden states are, without the logits.",
    ),
    Group(
        "Attention",
        "vgpo_kernels",
        ("attention_mass", "attention_heatmap", "attention_shift"),
        "What queries look at, without the attention matrix.",
    ),
    Group(
        "Settings and results",
        "vgpo_kernels",
        ("VGPOConfig", "PolicyLossOptions", "ViewTerm", "VisualWeights", "PolicyLoss"),
        "What the functions above take and return.",
    ),
    Group(
        "Backends",
        "vgpo_kernels.backends",
        (
            "backend",
            "describe",
            "is_forced",
            "liger_head",
            "liger_serves",
            "select",
            "triton_interpreted",
            "wide_dtype",
        ),
        "Which implementation handles a call; `vgpo_kernels.backend` is the first of these.",
    ),
    Group(
        "Models of transformers",
        "vgpo_kernels.integrations.transformers",
        (
            "capture_hidden_states",
            "CapturedHiddenStates",
            "capture_layer_mean",
            "CapturedLayerMean",
            "visual_mask",
            "visual_token_ids",
            "capture_attention_mass",
            "CapturedMasses",
            "attention_segments",
            "capture_attention",
            "AttentionCall",
            "spoilt_view",
            "NoOtherImageError",
            "blind_attention",
            "reuse_vision_tower",
            "final_norm",
            "logit_maps",
            "decoder_of",
            "unwrap",
        ),
    ),
    Group(
        "Methods by name",
        "vgpo_kernels.integrations.methods",
        ("Method", "find_method", "compares_responses", "k3"),
    ),
    Group(
        "Tensor parallelism",
        "vgpo_kernels.integrations.tensor_parallel",
        ("parallel_logprob", "parallel_policy_loss", "parallel_vgpo_loss", "parallel_divergence"),
    ),
    Group(
        "Sequence parallelism",
        "vgpo_kernels.integrations.sequence_parallel",
        ("parallel_focus", "parallel_token_logprob", "next_tokens", "gather_tokens", "zigzag_positions"),
    ),
    Group(
        "verl",
        "vgpo_kernels.integrations.verl",
        ("attach", "compute_policy_loss", "expect_reweighted_advantages", "focus_of_packed", "score_focus"),
    ),
    Group(
        "EasyR1",
        "vgpo_kernels.integrations.easyr1",
        ("patch_easyr1", "authors_config", "compute_policy_loss"),
    ),
    Group(
        "What adapters raise",
        "vgpo_kernels.integrations.surface",
        ("UnknownSurfaceError",),
        "An adapter looks at the functions it attaches to before it attaches.",
    ),
    Group(
        "Trainer",
        "vgpo_trainer",
        ("VGPOTrainer", "VGPOTrainingConfig", "RolloutSample"),
        "On TRL; the `vgpo` command is made of these.",
    ),
    Group(
        "In a notebook",
        "vgpo_trainer",
        ("show_tokens", "TokenView", "inspect_answer", "Inspection", "load_demo_model"),
        "The tokens of any loop in colours, what a model looks at, a model to try it with: [a page](notebook.md).",
    ),
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Section(NamedTuple):
    """A part of a docstring: what stands before the first heading has the title ``""``."""

    title: str
    text: str

    def items(self) -> Iterator[tuple[str, str]]:
        """Split ``name: text`` entries, whose further lines are indented."""
        for entry in re.split(r"\n(?=\S)", self.text):
            name, _, text = entry.partition(":")
            first, _, rest = text.strip().partition("\n")
            yield name, f"{first}\n{dedent(rest)}".strip()


@cache
def source_of(module: str) -> tuple[str, ast.Module]:
    """Return a module's text and tree."""
    stem = module.replace(".", "/")
    files = [folder / f"{stem}{suffix}" for folder in FOLDERS for suffix in (".py", "/__init__.py")]
    text = next(file for file in files if file.is_file()).read_text()
    return text, ast.parse(text)


def locate(module: str, name: str) -> tuple[str, Definition]:
    """Find a definition where a module has it, or imports it from, or loads it lazily from.

    Raises:
        LookupError: The module has no such name.

    """
    _, tree = source_of(module)
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return locate(str(node.module), name)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY":
            lazy = ast.literal_eval(node.value)
            if name in lazy:
                return locate(f"{module}.{lazy[name]}", name)
    raise LookupError(f"{module} has no {name}")


def sections(docstring: str) -> list[Section]:
    """Split a docstring at its headings."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    titles, texts = ["", *parts[1::2]], [parts[0], *parts[2::2]]
    return [
        Section(title, dedent(text).strip() if title else text.strip())
        for title, text in zip(titles, texts, strict=True)
    ]


def heading(module: str, name: str) -> str:
    """Name a definition as headings and links do: what an ``import vgpo_kernels`` would not show gets its module."""
    package, _, last = module.rpartition(".")
    return f"{last}.{name}" if package else name


def anchor(title: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@cache
def anchors() -> dict[str, str]:
    """Return the anchor of everything on the page, by its name and by its dotted name."""
    found: dict[str, str] = {}
    for group in GROUPS:
        for name in group.names:
            place = f"#{anchor(heading(group.module, name))}"
            found.setdefault(name, place)
            found[f"{group.module}.{name}"] = place
    return found


def inline(text: str) -> str:
    """Turn a docstring's markup into Markdown: roles into links, double backquotes into single ones."""

    def link(match: re.Match[str]) -> str:
        name = match.group(1)
        place = anchors().get(name) or anchors().get(name.rpartition(".")[2])
        return f"[`{name}`]({place})" if place else f"`{name}`"

    return re.sub(r":\w+:`([^`]+)`", link, text).replace("``", "`")


def markdown(text: str) -> str:
    """Turn a docstring's paragraphs into Markdown: a paragraph that ends with two colons announces code."""
    blocks: list[str] = []
    announced = False
    for block in re.split(r"\n\s*\n", text):
        if announced and block.startswith(" "):
            code = inspect.cleandoc(f"\n{block}")
            if blocks and blocks[-1].endswith("```") and not blocks[-1].startswith("    "):
                blocks[-1] = f"{blocks[-1][:-3]}\n{code}\n```"
                continue
            language = "bash" if re.match(r"[A-Z_]+=", code) else "python"
            blocks.append(f"```{language}\n{code}\n```")
            continue
        announced = block.endswith("::")
        if announced:
            block = block.removesuffix("::").rstrip() + (":" if block != "::" else "")
        if block:
            blocks.append(inline(block))
    return "\n\n".join(blocks)


def signature(module: str, node: Definition, title: str) -> str:
    """Write how a function, a class or a property is called or read."""
    text, _ = source_of(module)

    def source(part: ast.AST | None) -> str:
        return "" if part is None else " ".join((ast.get_source_segment(text, part) or "").split())

    if isinstance(node, ast.ClassDef):
        init = next((item for item in node.body if isinstance(item, Function) and item.name == "__init__"), None)
        if init is None or ast.get_docstring(node) is None or "Args:" not in (ast.get_docstring(node) or ""):
            parameters, returns = [field_source(item, source) for item in fields_of(node)], ""
            return called(title, parameters, returns) if parameters else f"class {title}"
        node, returns = init, ""
    else:
        returns = f" -> {source(node.returns)}" if node.returns else ""
    kinds = {ast.unparse(decorator) for decorator in node.decorator_list}
    if "property" in kinds:
        return f"{title}: {source(node.returns)}"
    above = "".join(f"@{kind}\n" for kind in ("classmethod", "contextmanager") if kind in kinds)
    return above + called(title, parameters_of(node, source), returns)


def called(title: str, parameters: list[str], returns: str) -> str:
    """Lay a signature out on one line, or on one a parameter."""
    line = f"{title}({', '.join(parameters)}){returns}"
    if len(line) <= LINE:
        return line
    return "\n".join([f"{title}(", *(f"    {parameter}," for parameter in parameters), f"){returns}"])


def fields_of(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """Return the fields of a dataclass or a named tuple."""
    kinds = {ast.unparse(part).partition("(")[0] for part in (*node.decorator_list, *node.bases)}
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return fields if kinds & {"dataclass", "NamedTuple"} else []


def field_source(item: ast.AnnAssign, source: object) -> str:
    """Write a field as a parameter: its type without what is annotated, ``field(default=...)`` by the default."""
    assert callable(source)
    value, kind = item.value, item.annotation
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Annotated":
        kind = kind.slice.elts[0] if isinstance(kind.slice, ast.Tuple) else kind.slice
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    return f"{source(item.target)}: {source(kind)}" + (f" = {source(value)}" if value is not None else "")


def parameters_of(node: Function, source: object) -> list[str]:
    """Write the parameters of a function as its source does, ``self`` and ``cls`` left out."""
    assert callable(source)
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(named) - len(arguments.defaults)) + list(arguments.defaults)

    def one(argument: ast.arg, default: ast.expr | None, stars: str = "") -> str:
        annotation = f": {source(argument.annotation)}" if argument.annotation else ""
        value = "" if default is None else f" = {source(default)}" if annotation else f"={source(default)}"
        return f"{stars}{argument.arg}{annotation}{value}"

    written = [one(*pair) for pair in zip(named, defaults, strict=True) if pair[0].arg not in ("self", "cls")]
    if arguments.vararg:
        written.append(one(arguments.vararg, None, "*"))
    elif arguments.kwonlyargs:
        written.append("*")
    written += [one(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*written, *([one(arguments.kwarg, None, "**")] if arguments.kwarg else [])]


def body(docstring: str) -> Iterator[str]:
    """Write the sections of a docstring."""
    for section in sections(docstring):
        if not section.title:
            yield markdown(section.text)
        elif section.title in ("Returns", "Yields"):
            yield f"**{section.title}**\n\n{markdown(section.text)}"
        else:
            title = {"Args": "Arguments"}.get(section.title, section.title)
            entries = []
            for name, text in section.items():
                lines = markdown(text).replace("\n", "\n  ")
                entries.append(re.sub(r"[ ]+$", "", f"- `{name}`: {lines}", flags=re.MULTILINE))
            yield f"**{title}**\n\n" + "\n".join(entries)


def methods(node: Definition) -> list[Function]:
    """Return the documented public methods and properties that a class defines itself."""
    if not isinstance(node, ast.ClassDef):
        return []
    found = [item for item in node.body if isinstance(item, Function) and not item.name.startswith("_")]
    return [item for item in found if ast.get_docstring(item)]


def entry(group: Group, name: str) -> Iterator[str]:
    """Write the entry of one public name."""
    module, node = locate(group.module, name)
    title = heading(group.module, name)
    yield f"### `{title}`"
    yield f"```py\n{signature(module, node, name)}\n```"
    yield from body(ast.get_docstring(node) or "")
    for method in methods(node):
        yield f"#### `{title}.{method.name}`"
        yield f"```py\n{signature(module, method, method.name)}\n```"
        yield from body(ast.get_docstring(method) or "")


def page() -> str:
    """Return the page."""
    parts = [HEAD.strip()]
    listed = (
        f"- [{group.title}](#{anchor(group.title)}): "
        + ", ".join(f"[`{name}`]({anchors()[f'{group.module}.{name}']})" for name in group.names)
        for group in GROUPS
    )
    parts.append("\n".join(listed))
    for group in GROUPS:
        _, tree = source_of(group.module)
        parts.append(f"## {group.title}")
        parts.append(f"`{group.module}`")
        parts.append(group.introduction or markdown(ast.get_docstring(tree) or ""))
        for name in group.names:
            parts += entry(group, name)
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    current = PAGE.is_file() and PAGE.read_text() == text
    if not current:
        print(f"{PAGE.relative_to(ROOT)} is not what the docstrings say: run scripts/api_reference.py", file=sys.stderr)
    return int(not current)


if __name__ == "__main__":
    sys.exit(main())

"""docs/notebook.md, cell by cell."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from vgpo_trainer import Inspection, TokenView

from vgpo_kernels import VisualWeights

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notebook.md"


def test_the_cells_of_the_page_run_and_show_something():
    torch.manual_seed(0)
    names, shown = {}, []
    for cell in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        *statements, last = ast.parse(cell).body
        exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), "<cell>", "eval"), names))
    inspection, view = shown
    assert isinstance(inspection, Inspection) and inspection._repr_html_().startswith("<iframe")
    assert isinstance(view, TokenView) and [row.name for row in view.rows] == ["focus", "factor"]
    assert "".join(view.tokens).endswith("<eos>") and view.rows[1].scale.center == 1.0
    # What it prints has the lines of the page, whatever numbers another machine samples.
    weights = names["weights"]
    assert isinstance(weights, VisualWeights)
    lines = re.search(r"^>>> weights\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE).group(1)
    assert [line.split(":")[0].split("=")[0] for line in repr(weights).splitlines()] == [
        line.split(":")[0].split("=")[0] for line in lines.splitlines()
    ]

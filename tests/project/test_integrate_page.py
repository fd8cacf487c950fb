"""docs/integrate.md: its code is the examples', and its tables have every metric and every finding."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from vgpo_kernels import VGPOConfig, check_batch
from vgpo_kernels.integrations.surface import reweight
from vgpo_kernels.ops.policy_loss import POLICY_METRICS
from vgpo_kernels.ops.visual_weights import FOCUS_METRICS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "integrate.md").read_text()
QUOTED = re.findall(r"^```python\n# (examples/\S+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def without_indent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))


@pytest.mark.parametrize(("path", "code"), QUOTED, ids=range(len(QUOTED)))
def test_quoted_code_is_the_examples(path: str, code: str) -> None:
    """Piece by piece, in its order; a line of dots stands for what was left out between two."""
    source, begin = (ROOT / path).read_text().splitlines(), 0
    for piece in code.split("...\n"):
        lines = piece.splitlines()
        ends = range(begin + len(lines), len(source) + 1)
        found = [end for end in ends if without_indent(source[end - len(lines) : end]) == "\n".join(lines)]
        assert found, f"{path} has no\n{piece}"
        begin = found[0]


def test_the_loop_is_quoted() -> None:
    assert len(QUOTED) >= 4


def first_column(heading: str) -> list[str]:
    """Names in the first column of the table in a section."""
    section = PAGE.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return re.findall(r"`([a-z_-]+)`", " ".join(rows))


def test_the_table_of_metrics_has_every_metric() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    _, logged = reweight(torch.ones(2, 3), torch.rand(2, 3), mask, ["a", "a"], VGPOConfig.paper())
    of_adapters = {name.removeprefix("vgpo/") for name in logged}
    verl = (ROOT / "vgpo_kernels" / "integrations" / "verl" / "trainers.py").read_text()
    of_adapters |= set(re.findall(r'METRIC = "vgpo/(\w+)"', verl))
    assert {"weighted_share", "scoring_seconds_total", "factor_max"} <= of_adapters
    listed = first_column("Metrics")
    assert len(listed) == len(set(listed))
    assert set(listed) == {*POLICY_METRICS, *FOCUS_METRICS, *of_adapters, "selected_rate", "view_kl"}


def test_the_table_of_findings_has_every_finding() -> None:
    listed = first_column("The first step")
    assert sorted(listed) == sorted(re.findall(r"^ +- ``([a-z-]+)``:", check_batch.__doc__ or "", re.MULTILINE))

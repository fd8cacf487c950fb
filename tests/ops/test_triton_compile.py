"""Triton kernels as compilers see them, without a GPU: machine code, resources, recompilations, tracing."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "triton_resources.csv"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}

# Tile sizes were chosen for two releases, so that nothing spills. Other compilers may trade a value or two for another
# block on a multiprocessor; the oldest does so in vgpo_loss's response kernel, for packed bfloat16.
SPILLS = {"3.6.0": 0, "3.9.0": 0, "3.4.0": 20}
FEW_SPILLS = 8

pytest.importorskip("triton")


def run_uninterpreted(*command: str) -> str:
    """Run a script in a process whose kernels are compiled, whatever this one does with them."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "TRITON_HIP_LLD_PATH" in result.stderr:
        pytest.skip("this release of Triton links AMD's code with an ld.lld of the machine, which has none")
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Every kernel, compiled for every architecture."""
    path = tmp_path_factory.mktemp("triton") / "resources.csv"
    run_uninterpreted("scripts/triton_resources.py", str(path))
    return read(path)


@pytest.fixture(scope="module")
def uninterpreted() -> dict[str, Any]:
    """What tests/ops/triton_uninterpreted.py found."""
    return dict(json.loads(run_uninterpreted("tests/ops/triton_uninterpreted.py")))


def defined_kernels() -> set[str]:
    sources = (ROOT / "vgpo_kernels" / "triton_kernels").glob("*.py")
    return {name for path in sources for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture(resources: list[dict[str, str]]) -> None:
    compiled = {(row["architecture"], row["kernel"]) for row in resources}
    assert compiled == {(architecture, kernel) for architecture in ARCHITECTURES for kernel in defined_kernels()}


@pytest.mark.slow
def test_no_kernel_spills(resources: list[dict[str, str]]) -> None:
    allowed = SPILLS.get(version("triton"), FEW_SPILLS)
    assert [row for row in resources if int(row["spills"]) > allowed] == []


@pytest.mark.slow
def test_no_kernel_exceeds_a_multiprocessor(resources: list[dict[str, str]]) -> None:
    for row in resources:
        # 64 KiB of shared memory is what every block gets on the smallest of them, AMD's.
        assert int(row["shared_bytes"]) <= 64 * 1024, row
        assert int(row["registers"]) * int(row["warps"]) * (64 if row["architecture"] == "gfx942" else 32) <= 2**17, row


@pytest.mark.slow
def test_the_recorded_table_is_of_these_kernels(resources: list[dict[str, str]]) -> None:
    def kernels(rows: list[dict[str, str]]) -> set[tuple[str, ...]]:
        return {(row["architecture"], row["kernel"], row["variant"]) for row in rows}

    recorded = read(TABLE)
    assert kernels(recorded) == kernels(resources), "run `python scripts/triton_resources.py`"
    if recorded[0]["triton"] == version("triton"):
        assert recorded == resources, "run `python scripts/triton_resources.py`"


def test_ten_rollouts_compile_a_kernel_once(uninterpreted: dict[str, Any]) -> None:
    counts = uninterpreted["compilations"]
    assert len(counts) >= 10
    assert set(counts.values()) == {1}, counts


def test_torch_compile_sees_every_launch(uninterpreted: dict[str, Any]) -> None:
    given = ["focus_kernel", "lowest_cosine_kernel", "response_kernel", "loss_kernel", "reduce_kernel"]
    own = ["visual_index_kernel", "prototype_kernel", *given]
    assert uninterpreted["traced"] == {"own": own, "causal": own, "given": given}


def test_no_product_is_fused_into_the_question_whether_it_is_finite(uninterpreted: dict[str, Any]) -> None:
    """Else every product that was rounded would count as infinite, on a GPU only."""
    instructions = re.findall(r"^\s*(?:@%\w+ )?(mul|fma|sub|abs)\S*", uninterpreted["finite_product"], re.MULTILINE)
    assert "mul" in instructions and not {"fma", "sub"} & set(instructions), instructions

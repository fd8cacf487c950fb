"""The op of docs/adding-an-op.md, with the code of that page: laid out as the page says, tested, compiled, timed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from cases import EDGES
from emulation.harness import compile_library, compiler

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding-an-op.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
PROJECT = ROOT / "build" / "adding-an-op"  # always the same place, so that what is compiled is found again

# Both compiled versions in one library: C++ as it is, the CUDA binding and its kernel on the emulated GPU.
LIBRARY = f"""\
#include <cuda_runtime.h>
#include <torch/library.h>

#include "{PROJECT}/csrc/arguments.cpp"
#include "{PROJECT}/csrc/cpu/response_mean.cpp"
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, library) _TORCH_LIBRARY_IMPL(vgpo_emulated, CPU, library, C10_UID)
#include "{PROJECT}/csrc/cuda/response_mean.cu"
"""

COMPARE = """\
import sys

import torch
from cases import EDGES, make_batch
from tolerance import assert_close

from vgpo_kernels.ops import registry, response_mean
from vgpo_kernels.reference import response_mean as reference

library = torch.library.Library("vgpo_emulated", "DEF")
library.define("response_mean" + registry.OPERATORS["response_mean"].signature)
torch.ops.load_library(sys.argv[1])
for edge in EDGES:
    for packed in (False, True):
        batch = make_batch(EDGES[edge], packed=packed)
        boundaries = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
        arguments = (batch.entropy, batch.response_mask, boundaries)
        exact = reference.response_mean(*arguments)
        for name in ("vgpo_kernels", "vgpo_emulated"):
            assert_close(getattr(torch.ops, name).response_mean(*arguments), exact, name=f"{name}, {edge}")
checked = (batch.entropy.requires_grad_(), *arguments[1:])
torch.library.opcheck(torch.ops.vgpo_kernels.response_mean.default, checked)

from benchmarks.bench_response_mean import OPS

case = OPS[0].make(OPS[0].small, torch.float32, torch.device("cpu"), 0)
case.check(case.run(), 1e-5)
case.check(case.peers["PyTorch"].run(), 1e-5)
"""


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """The packages, sources and helpers of the tests, with the files of the page among them."""
    PROJECT.parent.mkdir(exist_ok=True)
    with PROJECT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be doing the same
        shutil.rmtree(PROJECT, ignore_errors=True)
        unbuilt = shutil.ignore_patterns("*.so", "__pycache__", "results", "integrations")
        for folder in ("vgpo_kernels", "csrc", "benchmarks"):
            shutil.copytree(ROOT / folder, PROJECT / folder, ignore=unbuilt)
        (PROJECT / "tests/ops").mkdir(parents=True)
        for name in ("conftest.py", "cases.py", "tolerance.py"):
            shutil.copy(ROOT / "tests" / name, PROJECT / "tests" / name)
        shutil.copy(ROOT / "pyproject.toml", PROJECT)
        for name, code in FILES.items():
            assert not (ROOT / name).exists()
            (PROJECT / name).write_text(code)
        yield PROJECT


def run(project: Path, *command: str) -> str:
    environment = os.environ | {
        "VGPO_TEST_EVERYTHING": "1",
        "PYTHONPATH": f"{project}:{project}/tests",
        "TRITON_INTERPRET": "1",
        "VGPO_TEST_BACKENDS": "reference,triton",
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=project, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_page_has_a_file_for_every_room() -> None:
    folders = {str(Path(name).parent) for name in FILES}
    assert folders == {
        *("vgpo_kernels/ops", "vgpo_kernels/reference", "vgpo_kernels/triton_kernels"),
        *("csrc/cpu", "csrc/cuda", "benchmarks", "tests/ops"),
    }
    assert len(FILES) == 8


@pytest.mark.slow
def test_its_tests_pass(project: Path) -> None:
    output = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_response_mean.py")
    backends = 1 + (find_spec("triton") is not None)
    assert re.search(rf"^{1 + 2 * len(EDGES) * backends} passed", output, re.MULTILINE), output


def test_its_python_is_formatted(project: Path) -> None:
    python = [name for name in FILES if name.endswith(".py")]
    for command in (("check", "--config", str(ROOT / "pyproject.toml")), ("format", "--check")):
        run(project, "-m", "ruff", *command, "--no-cache", *python)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="needs Linux and g++")
def test_its_compiled_versions_match(project: Path) -> None:
    source = project / "library.cpp"
    source.write_text(LIBRARY)
    code = hashlib.sha256("".join(FILES.values()).encode()).hexdigest()
    path = compile_library(str(source), f"-DPAGE={code[:16]}")
    (project / "compare.py").write_text(COMPARE)
    run(project, "compare.py", str(path))

"""CUDA sources through nvcc, without a GPU: kernels for every architecture, bindings against torch's headers."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from load_script import load_script
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "nvcc"


# Every kernel, and the threads of its block.
THREADS = {
    **dict.fromkeys(("visual_prototype", "visual_focus", "visual_weights"), 512),
    **dict.fromkeys(("causal_prototype", "policy_loss", "vgpo_loss"), 512),
    **dict.fromkeys(("attention_mass", "attention_heatmap", "head_mean"), 128),
    **dict.fromkeys(("attention_query_gradient", "attention_key_gradient"), 128),
    **dict.fromkeys(("head_statistics", "head_gradient"), 256),
    "group_weights": 32,
}


cuda_resources = load_script("cuda_resources")


@pytest.fixture(scope="module")
def nvcc() -> str:
    """Nvcc's path; without one, or with one that is too old for an architecture, the checks skip, but not in CI."""
    found = cuda_resources.find_nvcc()
    reason = ""
    if found is None:
        reason = "there is no nvcc"
    elif tuple(map(int, cuda_resources.release(found).split("."))) < (12, 8):
        reason = f"nvcc {cuda_resources.release(found)} does not know sm_100"
    if reason and os.environ.get("VGPO_REQUIRE_NVCC") == "1":
        pytest.fail(f"{reason}, and VGPO_REQUIRE_NVCC=1 forbids to skip")
    if reason:
        pytest.skip(reason)
    return found


def once(name: str, key: str, sources: list[Path], make: object) -> str:
    """Return ``make()``, kept from an earlier run where neither the sources nor the key have changed."""
    assert callable(make)
    digest = hashlib.sha256(key.encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    kept = CACHE / f"{name}-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        result = make()
        CACHE.mkdir(parents=True, exist_ok=True)
        for stale in CACHE.glob(f"{name}-*.txt"):
            stale.unlink()
        kept.write_text(result)
    return kept.read_text()


def kernel_sources() -> list[Path]:
    return [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *ROOT.glob("csrc/*.h"), cuda_resources.SOURCE]


def test_kernels_compile_without_warnings_or_spills(nvcc: str) -> None:
    command = cuda_resources.command(nvcc, Path("kernels.o"))
    key = " ".join(command) + cuda_resources.release(nvcc)
    report = once("kernels", key, kernel_sources(), lambda: cuda_resources.compile_kernels(nvcc))
    rows = cuda_resources.parse(report, cuda_resources.release(nvcc))
    architectures = {row.architecture for row in rows}
    assert architectures == {f"sm_{number}" for number in cuda_resources.ARCHITECTURES}
    assert {row.kernel for row in rows} == set(THREADS)
    for row in rows:
        assert row.spill_store_bytes == row.spill_load_bytes == row.stack_bytes == 0, row
        # A block must fit a multiprocessor, its static shared memory without opting in to more.
        assert row.registers * THREADS[row.kernel] <= 64 * 1024, row
        assert row.shared_bytes <= 48 * 1024, row
    recorded = cuda_resources.read_table()
    if recorded[0].nvcc == cuda_resources.release(nvcc):
        assert rows == recorded, "benchmarks/results/cuda_resources.csv is stale: run scripts/cuda_resources.py"


def test_a_spill_would_be_seen() -> None:
    report = (
        "ptxas info    : Compiling entry function '_ZN19visual_focus_kernelI13__nv_bfloat16EEvT_' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 2056 bytes smem\n"
        "ptxas info    : Function properties for grid_sync\n"
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    (row,) = cuda_resources.parse(report, "13.0")
    assert row == ("13.0", "sm_90", "visual_focus", "bfloat16", 64, 2056, 24, 4, 12)


def test_bindings_compile(nvcc: str, tmp_path: Path) -> None:
    """All bindings, their kernels as PTX, against the headers of this torch, CPU-only though it may be."""
    bindings = sorted(CUDA.glob("*.cu"))
    stems = [path.stem for path in bindings]
    assert stems == [
        *("attention_mass", "linear_logprob", "policy_loss", "vgpo_loss"),
        *("visual_focus", "visual_weights"),
    ]
    together = tmp_path / "bindings.cu"
    together.write_text("".join(f'#include "{path}"\n' for path in bindings))
    folders = cpp_extension.include_paths()
    stub = ROOT / "tests" / "emulation" / "torch_stub"
    if torch.version.cuda is None:
        folders = [str(stub), *folders]
    command = [
        *(nvcc, "-std=c++20", "-gencode", "arch=compute_90,code=compute_90"),
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fsyntax-only", "-Xcicc", "-O0"),
        *(f"-isystem={folder}" for folder in folders),
        *("-c", str(together), "-o", str(tmp_path / "bindings.o")),
    ]

    def build() -> str:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return "compiled"

    key = " ".join(command[:-3]) + torch.__version__ + cuda_resources.release(nvcc)
    assert once("bindings", key, [*kernel_sources(), *bindings], build) == "compiled"

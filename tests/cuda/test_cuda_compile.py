"""CUDA sources through nvcc, without a GPU: kernels for every architecture, bindings against torch's headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from compiled import CUDA, ROOT, compile_kernels, cuda_resources, kernel_sources, once, require_nvcc
from torch.utils import cpp_extension

# Every kernel, and the threads of its block.
THREADS = {
    **dict.fromkeys(("visual_prototype", "visual_focus", "visual_weights"), 512),
    **dict.fromkeys(("causal_prototype", "policy_loss", "vgpo_loss", "token_shaping"), 512),
    **dict.fromkeys(("inverse_norm", "unit_prototype", "causal_unit_prototype", "unit_focus"), 512),
    **dict.fromkeys(("attention_mass", "attention_warpgroup", "attention_heatmap", "head_mean"), 128),
    **dict.fromkeys(("attention_query_gradient", "attention_key_gradient"), 128),
    **dict.fromkeys(("head_statistics", "head_gradient"), 256),
    **dict.fromkeys(("pair_statistics", "pair_shares", "pair_gradient"), 128),
    "head_tiles": 384,
    "head_merge": 512,
    "group_weights": 32,
    "response_factors": 128,
}


@pytest.fixture(scope="module")
def nvcc() -> str:
    return require_nvcc()


@pytest.mark.slow
def test_kernels_compile_without_warnings_or_spills(nvcc: str) -> None:
    report = compile_kernels(nvcc).read_text()
    assert "serialized" not in report, "products of a warpgroup wait for each other"
    rows = cuda_resources.parse(report, cuda_resources.release(nvcc))
    architectures = {row.architecture for row in rows}
    assert architectures == {f"sm_{name}" for name in cuda_resources.ARCHITECTURES}
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
        "ptxas info    : Compiling entry function '_ZN19visual_focus_kernelI13__nv_bfloat16EEvT_' for 'sm_90a'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 2056 bytes smem\n"
        "ptxas info    : Function properties for grid_sync\n"
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    (row,) = cuda_resources.parse(report, "13.0")
    assert row == ("13.0", "sm_90a", "visual_focus", "bfloat16", 64, 2056, 24, 4, 12)


@pytest.mark.slow
def test_bindings_compile(nvcc: str, tmp_path: Path) -> None:
    """All bindings, their kernels as PTX, against the headers of this torch, CPU-only though it may be."""
    bindings = sorted(CUDA.glob("*.cu"))
    stems = [path.stem for path in bindings]
    assert stems == [
        *("attention_mass", "head_tiles", "linear_divergence", "linear_logprob", "policy_loss", "token_shaping"),
        *("vgpo_loss", "visual_focus", "visual_weights"),
    ]
    together = tmp_path / "bindings.cu"
    together.write_text("".join(f'#include "{path}"\n' for path in bindings))
    folders = cpp_extension.include_paths()
    stub = ROOT / "tests" / "emulation" / "torch_stub"
    if torch.version.cuda is None:
        folders = [str(stub), *folders]
    command = [
        *(nvcc, "-std=c++20", "-gencode", "arch=compute_90a,code=compute_90a", "-DVGPO_HOPPER"),
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fsyntax-only", "-Xcicc", "-O0"),
        *(f"-isystem={folder}" for folder in folders),
        *("-c", str(together), "-o", str(tmp_path / "bindings.o")),
    ]

    def build(_: Path) -> str:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return "compiled"

    key = " ".join(command[:-3]) + torch.__version__ + cuda_resources.release(nvcc)
    assert once("bindings", key, [*kernel_sources(), *bindings], build).read_text() == "compiled"

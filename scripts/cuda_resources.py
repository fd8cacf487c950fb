"""Compile every CUDA kernel for every architecture, without a GPU, and record what the compiler says it needs.

Writes benchmarks/results/cuda_resources.csv: registers, static shared memory, stack and spills of each kernel.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "cuda_resources.csv"
SOURCE = ROOT / "tests" / "emulation" / "every_kernel.cu"
# As setup.py has them: 90a, with the instructions that only Hopper has, in place of 90.
ARCHITECTURES = ("80", "90a", "100")
ELEMENTS = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


class Resources(NamedTuple):
    """What one kernel takes on one architecture, as ptxas reports it."""

    nvcc: str
    architecture: str
    kernel: str
    # Of hidden states, queries and keys, and what else it is a template over, like an epilogue; empty without any.
    element: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def find_nvcc() -> str | None:
    """Return nvcc's path, or ``None``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def release(nvcc: str) -> str:
    """Return nvcc's release, like ``13.0``."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found.group(1) if found else "unknown"


def command(nvcc: str, output: Path) -> list[str]:
    """Return the command that compiles every kernel: warnings are errors, on host and device."""
    architectures = [flag for name in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{name},code=sm_{name}")]
    return [
        *(nvcc, "-std=c++17", "-O3", "--threads", "2", *architectures),
        *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"),
        *("-c", str(SOURCE), "-o", str(output)),
    ]


def compile_kernels(nvcc: str, output: Path | None = None) -> str:
    """Compile every kernel, into the file ``output`` if one is given; return what ptxas reports.

    Raises:
        RuntimeError: A kernel does not compile without a warning.

    """
    with tempfile.TemporaryDirectory() as folder:
        into = output or Path(folder) / "kernels.o"
        result = subprocess.run(command(nvcc, into), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"CUDA kernels do not compile:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def parse(report: str, nvcc_release: str) -> list[Resources]:
    """Read ptxas's report, a kernel of an architecture at a time."""
    rows = []
    for entry in re.split(r"ptxas info\s*: Compiling entry function ", report)[1:]:
        name = re.match(r"'(\S+)' for '(\w+)'", entry)
        kernel = re.search(
            r"\d+([a-z_]+)_kernelI(Li\d+E|6__half|13__nv_bfloat16|f)((?:L[bi]\d+E)*)(?:NS\d_\d+([A-Z][a-z]+)Epilogue)?",
            entry,
        )
        registers = re.search(r"Used (\d+) registers", entry)
        if name is None or kernel is None or registers is None:
            raise ValueError(f"unknown report of ptxas: {entry[:400]}")
        epilogue = [kernel.group(4).lower()] if kernel.group(4) else []
        # Functions that were not inlined report stack and spills of their own, after the kernel's.
        stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        rows.append(
            Resources(
                nvcc_release,
                name.group(2),
                kernel.group(1),
                " ".join((ELEMENTS.get(kernel.group(2), ""), *re.findall(r"\d+", kernel.group(3)), *epilogue)),
                int(registers.group(1)),
                int(shared.group(1)) if shared else 0,
                *(sum(int(numbers[i]) for numbers in stack) for i in range(3)),
            )
        )
    return sorted(rows, key=lambda row: (number_of(row.architecture), row.kernel, row.element))


def number_of(architecture: str) -> int:
    """Return the number of an architecture like ``sm_90a``."""
    return int(architecture.strip("sm_a"))


def read_table() -> list[Resources]:
    """Return the recorded table."""
    with TABLE.open(newline="") as file:
        return [Resources(*row[:4], *map(int, row[4:])) for row in list(csv.reader(file))[1:]]


def write_table(rows: list[Resources]) -> None:
    """Record a table."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def main() -> int:
    """Compile, record and print the table."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("there is no nvcc (searched in CUDA_HOME, PATH and /usr/local/cuda)", file=sys.stderr)
        return 1
    rows = parse(compile_kernels(nvcc), release(nvcc))
    write_table(rows)
    for row in rows:
        print(*row, sep="\t")
    return int(any(row.spill_store_bytes or row.spill_load_bytes for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Every CUDA kernel through nvcc, once for all tests: what the compiler reports, and the machine code for sm_90a."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from load_script import load_script

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "nvcc"

cuda_resources = load_script("cuda_resources")


def skip(reason: str) -> None:
    """Skip a test, but not in CI."""
    if os.environ.get("VGPO_REQUIRE_NVCC") == "1":
        pytest.fail(f"{reason}, and VGPO_REQUIRE_NVCC=1 forbids to skip")
    pytest.skip(reason)


def require_nvcc() -> str:
    """Return nvcc's path; without one, or with one that is too old for an architecture, the test skips."""
    found = cuda_resources.find_nvcc()
    if found is None:
        skip("there is no nvcc")
    elif tuple(map(int, cuda_resources.release(found).split("."))) < (12, 8):
        skip(f"nvcc {cuda_resources.release(found)} does not know sm_100")
    return str(found)


def require_tool(name: str, nvcc: str) -> str:
    """Return the path of a tool that reads machine code: nvcc's, or that of Triton's wheel; without one skip."""
    triton = importlib.util.find_spec("triton")
    packages = (triton and triton.submodule_search_locations) or ()
    folders = [Path(nvcc).parent, *(Path(package) / "backends" / "nvidia" / "bin" for package in packages)]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    if found is None:
        skip(f"there is no {name}")
    return str(found)


def once(name: str, key: str, sources: list[Path], make: Callable[[Path], str]) -> Path:
    """Return a file with what ``make`` returns, kept from an earlier run where neither sources nor key have changed.

    ``make`` gets the file's path, beside which it may put another of the same stem.
    """
    digest = hashlib.sha256(key.encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    kept = CACHE / f"{name}-{digest.hexdigest()[:16]}.txt"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            for stale in CACHE.glob(f"{name}-*"):
                stale.unlink()
            kept.write_text(make(kept))
    return kept


def kernel_sources() -> list[Path]:
    return [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *ROOT.glob("csrc/*.h"), cuda_resources.SOURCE]


def kernels_key(nvcc: str) -> str:
    return " ".join(cuda_resources.command(nvcc, Path("every_kernel.o"))) + cuda_resources.release(nvcc)


def compile_kernels(nvcc: str) -> Path:
    """Return the file of the compiler's report, beside which the object lies."""
    return once(
        *("kernels", kernels_key(nvcc), kernel_sources()),
        lambda kept: str(cuda_resources.compile_kernels(nvcc, kept.with_suffix(".o"))),
    )


def symbols(elf: bytes) -> list[str]:
    """Return the names in an object's table of symbols, in its order."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    table = next(section for section in sections if section[1] == 2)  # SHT_SYMTAB
    _, _, _, _, begin, length, names, _, _, entry = table
    found = []
    for place in range(begin, begin + length, entry):
        name = sections[names][4] + int(struct.unpack_from("<I", elf, place)[0])
        found.append(elf[name : elf.index(b"\0", name)].decode())
    return found


def machine_code(nvcc: str, pattern: str) -> str:
    """Return the machine code for sm_90a of the kernels whose mangled name has the pattern, as nvdisasm prints it."""
    cuobjdump, nvdisasm = require_tool("cuobjdump", nvcc), require_tool("nvdisasm", nvcc)
    compiled = compile_kernels(nvcc).with_suffix(".o")

    def disassemble(_: Path) -> str:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([cuobjdump, "-xelf", "sm_90a", str(compiled)], cwd=folder, capture_output=True, check=True)
            (cubin,) = Path(folder).glob("*.cubin")
            names = enumerate(symbols(cubin.read_bytes()))
            functions = ",".join(str(i) for i, name in names if name.startswith("_Z") and re.search(pattern, name))
            command = [nvdisasm, "-c", "-fun", functions, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return once("machine_code", kernels_key(nvcc) + pattern, kernel_sources(), disassemble).read_text()

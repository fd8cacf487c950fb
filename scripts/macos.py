"""Compile and link the extension for a Mac with Apple silicon on another machine, and say what it would miss there.

    python scripts/macos.py [--quick] [--optional] [--torch REQUIREMENT]

The compiler is zig's clang, from PyPI, which brings the headers and the symbols of macOS. Headers and libraries of
torch are those of its wheel for macOS. The flags are setup.py's, and every warning fails. Python's headers are this
machine's: Python.h sets right for macOS what ``pyconfig.h`` says of C types. What stays undefined must be Python's.

``--quick`` optimises nothing, reads torch's headers once for all sources, and takes the C++ library's symbols on trust.
Both downloads (110 MB each) stay in build/macos for the next run. ``--optional`` ends well if one cannot be had.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "macos"
ZIG = "ziglang==0.17.1"
TARGET = ("-target", "aarch64-macos.14.0")
PLATFORMS = ("--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64")
LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")  # as setup.py links them
# Torch's OpenMP runtime is loaded with torch and not linked: it has the path of the machine that built it for a name.
LOADED = "omp"
DOWNLOAD_SECONDS = 120
# Of the C++ library, mangled: namespace std, its exceptions' types, operators new and delete, and its runtime.
OF_CXX = re.compile(r"__Z(T[ISTV])?(N?K?St|nw|na|dl|da)|__ZTVN10__cxxabiv1|___(cxa_|gxx_|dynamic_cast$)")


class Wrong(Exception):
    """The sources do not compile or link for macOS; the message is the compiler's."""


class NotToBeHad(Exception):
    """A package cannot be downloaded; the message is pip's last line."""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotToBeHad(f"pip took more than {DOWNLOAD_SECONDS} s") from error
    if result.returncode:
        raise NotToBeHad(([f"pip ended with {result.returncode}", *result.stderr.strip().splitlines()])[-1])


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def fetch_zig(folder: Path) -> Path:
    """Download zig unless it is there; return its program."""
    packages = folder / ZIG
    if not packages.is_dir():
        partial = empty(folder / "partial")
        pip("install", "--quiet", "--no-deps", "--target", partial, ZIG)
        partial.rename(packages)
    return packages / "ziglang" / "zig"


def fetch_torch(folder: Path, requirement: str) -> Path:
    """Download torch's wheel for macOS unless it is there, and unpack headers and libraries; return its package."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    package = folder / re.sub(r"[^\w.=]+", "_", f"{requirement} {version}")
    if not package.is_dir():
        partial = empty(folder / "partial")
        binary = ("--no-deps", "--only-binary=:all:", "--python-version", version, *PLATFORMS)
        pip("download", "--quiet", *binary, "--dest", partial, *shlex.split(requirement))
        (wheel,) = partial.glob("*.whl")
        libraries = {f"torch/lib/lib{name}.dylib" for name in (*LIBRARIES, LOADED)}
        with zipfile.ZipFile(wheel) as content:
            names = [name for name in content.namelist() if name.startswith("torch/include/") or name in libraries]
            content.extractall(partial, names)
        wheel.unlink()
        partial.rename(package)
    return package / "torch"


def flags_of_setup(package: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the sources and the compiler's flags that setup.py would use on a Mac with that torch."""
    import setuptools
    from torch.utils import cpp_extension

    with mock.patch.object(setuptools, "setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    extension = setuptools.Extension("vgpo_kernels._C", [], language="c++")
    with (
        mock.patch.object(sys, "platform", "darwin"),
        mock.patch.object(cpp_extension, "_TORCH_PATH", str(package)),
        mock.patch.object(cpp_extension, "TORCH_LIB_PATH", str(package / "lib")),
    ):
        setup["configure"](extension, "cpu", str(folder))
    assert "-fopenmp" in extension.extra_compile_args["cxx"], "torch brings omp.h"
    return extension.sources, extension.extra_compile_args["cxx"]


def run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Wrong(f"{result.stdout}{result.stderr}" or f"{command[0]} ended with {result.returncode}")


def compile_sources(compiler: Sequence[str | Path], package: Path, folder: Path, quick: bool) -> list[Path]:
    """Compile every source of the CPU's extension; return the objects.

    Raises:
        Wrong: One does not compile, or with a warning.

    """
    sources, flags = flags_of_setup(package, folder)
    headers = ["-isystem", sysconfig.get_path("include"), "-DTORCH_EXTENSION_NAME=_C"]
    command = [*compiler, *flags, *headers, "-std=c++20", "-fPIC", "-Werror", *(["-O0"] if quick else [])]
    if quick:
        text = "".join((ROOT / source).read_text() for source in [*sources, *ROOT.glob("csrc/**/*.h")])
        known = folder / "torch.h"
        known.write_text("".join(sorted(set(re.findall(r"#include <(?:ATen|c10|torch)/[^>]+>\n", text)))))
        run([*command, "-fpch-instantiate-templates", "-x", "c++-header", known, "-o", folder / "torch.pch"])
        command += ["-include-pch", str(folder / "torch.pch")]
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        jobs = [[*command, "-c", source, "-o", made] for source, made in zip(sources, objects, strict=True)]
        list(workers.map(run, jobs))
    return objects


def undefined(command: Sequence[str | Path]) -> set[str]:
    """Symbols that nothing defines in a link that admits none."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = set(re.findall(r"^error: undefined symbol: (\S+)$", result.stderr, re.MULTILINE))
    others = [
        line for line in re.findall(r"^error: .*$", result.stderr, re.MULTILINE) if "undefined symbol" not in line
    ]
    if others or not names:
        raise Wrong(result.stderr or "Python's functions are not among the undefined symbols, so none are listed")
    return names


def link(compiler: Sequence[str | Path], objects: list[Path], package: Path, folder: Path, quick: bool) -> int:
    """Link the extension as setuptools does on a Mac; return how many of Python's functions it takes.

    Raises:
        Wrong: It takes something that neither torch nor macOS nor Python has.

    """
    command = [*compiler, "-shared", *objects, f"-L{package / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]
    command += [f"-Wl,-rpath,{package / 'lib'}", "-o", folder / "_C.so", *(["-nostdlib++"] if quick else [])]
    names = undefined([*command, f"-l{LOADED}"])
    # By name, too, as what is looked up there finds the C library of this machine as well.
    of_python = {name for name in names if re.match("__?Py", name) and hasattr(ctypes.pythonapi, name[1:])}
    missing = {name for name in names - of_python if not (quick and OF_CXX.match(name))}
    if missing:
        raise Wrong(f"nothing that is loaded on a Mac defines {', '.join(sorted(missing))}")
    run([*command, "-undefined", "dynamic_lookup"])
    return len(of_python)


def check(folder: Path, requirement: str, quick: bool) -> str:
    """Download what is needed, compile and link; return what was found, in words."""
    os.environ["ZIG_GLOBAL_CACHE_DIR"] = str(folder / "cache")  # else in the home folder
    zig, package = fetch_zig(folder), fetch_torch(folder, requirement)
    start = time.monotonic()
    made = empty(folder / ("quick" if quick else "full"))
    compiler = (zig, "c++", *TARGET)
    objects = compile_sources(compiler, package, made, quick)
    count = link(compiler, objects, package, made, quick)
    return (
        f"{len(objects)} sources compile for macOS on arm64 without a warning and link with {requirement}'s libraries; "
        f"all that stays undefined is {count} functions and objects of Python ({time.monotonic() - start:.0f} s)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="compile fast instead of as on a Mac")
    parser.add_argument("--optional", action="store_true", help="end well where a download cannot be had")
    parser.add_argument("--torch", required=True, metavar="REQUIREMENT", help="which torch, as pip takes it")
    options = parser.parse_args()
    try:
        print(f"macos: {check(FOLDER, options.torch, options.quick)}")
    except NotToBeHad as error:
        print(f"macos: NOT RUN{', WHICH DOES NOT FAIL THIS RUN' * options.optional}: {error}")
        return 0 if options.optional else 1
    except Wrong as error:
        print(f"macos: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

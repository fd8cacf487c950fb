"""The build: what each VGPO_BUILD does on a machine that can, and on one that cannot.

Setups run for real, on a copy of the project whose only source is a small one that needs no torch header.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vgpo_kernels import extension as extension_module
from vgpo_kernels.extension import built_digest, source_digest

setuptools = pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
SOURCE = r"""
#include <math.h>  // the system's, whatever csrc/math.h holds
#include "csrc_alone.h"
#include <Python.h>
namespace vgpo { extern const char source_digest[]; }
static PyObject* no(PyObject*, PyObject*) { Py_RETURN_FALSE; }
static PyObject* info(PyObject*, PyObject*) { return Py_BuildValue("{s:s}", "source_digest", vgpo::source_digest); }
static PyObject* levels(PyObject*, PyObject*) { return Py_BuildValue("[s]", "portable"); }
static PyMethodDef methods[] = {{"has_cuda", no, METH_NOARGS, ""}, {"threads_used", no, METH_NOARGS, ""},
                                {"simd_levels", levels, METH_NOARGS, ""}, {"build_info", info, METH_NOARGS, ""},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the project with one small source and a package that is all but empty."""
    folder = tmp_path / "project"
    for name in ("vgpo_kernels", "csrc"):
        (folder / name).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vgpo_kernels/extension.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "vgpo_kernels/__init__.py").write_text('__version__ = "0.0"\n')
    (folder / "csrc/library.cpp").write_text(SOURCE)
    (folder / "csrc/math.h").write_text("#error csrc/math.h hides the system's\n")
    (folder / "csrc/csrc_alone.h").touch()
    return folder


def run(command: list[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("VGPO_BUILD", "PYTHONPATH")}
    return subprocess.run(
        command,
        cwd=folder,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def build(project: Path, mode: str = "auto", **variables: str) -> tuple[int, list[str], str]:
    """Build in place; return the exit code, the lines that setup.py itself said, and everything printed."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = run(command, project, VGPO_BUILD=mode, **variables)
    output = result.stdout + result.stderr
    said = [line for line in output.splitlines() if line.startswith("vgpo_kernels: ")]
    return result.returncode, said, output


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the functions of setup.py, which is not run as a setup."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


# In a process that imported Python's own distutils before setuptools could put its own in its place.
pytestmark = pytest.mark.filterwarnings("ignore:The distutils:DeprecationWarning")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")


@needs_compiler
@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_build_says_what_it_built_and_why_not_more(project: Path, mode: str) -> None:
    reason = "VGPO_BUILD=cpu" if mode == "cpu" else f"torch {torch.__version__} is built without CUDA"
    if mode == "auto" and torch.version.cuda is not None:
        reason = "its CUDA sources (csrc/cuda) are missing"
    code, said, output = build(project, mode)
    assert code == 0, output
    assert said == [f"vgpo_kernels: built its CPU kernels for torch {torch.__version__}; no CUDA kernels: {reason}"]
    assert run([sys.executable, "-c", "import vgpo_kernels._C"], project).returncode == 0
    assert "warning" not in output


def test_none_builds_nothing_and_removes_the_extension_of_before(project: Path) -> None:
    stale = project / "vgpo_kernels" / EXTENSION
    stale.touch()
    code, said, output = build(project, "none")
    assert code == 0, output
    assert len(said) == 1 and "built no extension: VGPO_BUILD=none" in said[0]
    assert not stale.exists()


def copy_package(project: Path) -> None:
    """Give a project the whole package, without the extension."""
    shutil.rmtree(project / "vgpo_kernels")
    shutil.copytree(
        ROOT / "vgpo_kernels", project / "vgpo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )


def test_without_an_extension_the_reference_serves_after_one_warning(project: Path) -> None:
    copy_package(project)
    assert build(project, "none")[0] == 0
    program = """
import sys
# An editable installation would find the extension of the source tree.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
import warnings, torch, vgpo_kernels
hidden = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
mask = torch.tensor([[True, False]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        cos = vgpo_kernels.visual_focus(hidden, mask, ~mask)
assert vgpo_kernels.backends.describe()["serves"]["cpu"] == "reference"
assert abs(cos[0, 1].item() - 0.6) < 1e-6, cos
print(*(warning.message for warning in caught), sep="\\n")
"""
    result = run([sys.executable, "-c", program], project, VGPO_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    (warning,) = result.stdout.splitlines()
    assert "pip install -e ." in warning


# Prints which backend serves CPU tensors, then what was warned of. With an argument, the extension of that folder's
# package is found as by an editable installation of it, where this one has none of its own.
SERVES = """
import sys, warnings
from importlib.machinery import PathFinder
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
class Finder:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, sys.argv[1:]) if name == "vgpo_kernels._C" else None
sys.meta_path.append(Finder)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vgpo_kernels
    found = vgpo_kernels.backends.describe()
    if found["refused"]:
        mask = torch.tensor([[True, False]])
        vgpo_kernels.visual_focus(torch.randn(1, 2, 4), mask, ~mask)
        try:
            import vgpo_kernels._C
        except ImportError:
            pass
        else:
            sys.exit("it can be imported all the same")
        try:
            with vgpo_kernels.backend("cpp"):
                vgpo_kernels.visual_focus(torch.randn(1, 2, 4), mask, ~mask)
        except RuntimeError as error:
            assert found["refused"] in str(error)
    else:
        assert not found["extension"] or found["extension"]["source_digest"]
print(found["serves"]["cpu"], *(warning.message for warning in caught), sep="\\n")
"""


def serves(project: Path, *other: Path) -> list[str]:
    """Lines of SERVES, run in a project."""
    result = run([sys.executable, "-c", SERVES, *other], project, VGPO_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_compiler
@pytest.mark.slow
def test_an_extension_of_other_sources_is_refused_before_it_loads(project: Path, tmp_path: Path) -> None:
    copy_package(project)
    assert build(project, "cpu")[0] == 0
    extension = project / "vgpo_kernels" / EXTENSION

    second = tmp_path / "second"
    shutil.copytree(project, second, ignore=shutil.ignore_patterns("*.so", "build"))
    assert extension_module.why_refused(extension, second) is None, "its sources are the same"
    with (second / "csrc/csrc_alone.h").open("a") as file:
        file.write("// changed\n")
    served, warning = serves(second, extension.parent)
    assert served == "reference"
    assert str(extension) in warning and f"sources in {second / 'csrc'} as they are now" in warning
    assert "`make build` or `pip install -e .`" in warning

    # With an old extension no test run ends well.
    shutil.copy(extension, second / "vgpo_kernels")
    (second / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", second / "tests")
    (second / "tests/test_nothing.py").write_text("def test_nothing():\n    pass\n")
    tested = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"], second)
    assert tested.returncode == pytest.ExitCode.USAGE_ERROR
    assert "was not built from the sources" in tested.stderr

    assert build(second, "cpu")[0] == 0
    assert serves(second) == ["cpp"]


@pytest.mark.slow
@needs_compiler
def test_a_build_after_a_change_compiles_what_changed_and_the_digest(project: Path) -> None:
    (project / "csrc/cpu").mkdir()
    (project / "csrc/cpu/one.cpp").touch()
    (project / "csrc/cpu/two.cpp").touch()

    def compiled() -> set[str]:
        code, _, output = build(project, "cpu")
        assert code == 0, output
        return set(re.findall(r"-o \S*/(\w+)\.o\b", output))

    assert compiled() == {"library", "one", "two", "source_digest"}
    assert compiled() == set()
    (project / "csrc/cpu/one.cpp").write_text("// changed\n")
    assert compiled() == {"one", "source_digest"}
    assert built_digest(project / "vgpo_kernels" / EXTENSION) == source_digest(project)


def test_the_digest_is_of_names_and_contents_alone(project: Path, tmp_path: Path) -> None:
    before = source_digest(project)
    assert before is not None and len(before) == 2 * extension_module.DIGEST_BYTES
    second = tmp_path / "elsewhere"
    shutil.copytree(project, second)
    os.utime(second / "csrc/library.cpp", (0, 0))
    (second / "csrc/.library.cpp.swp").touch()
    (second / "csrc/library.cpp~").touch()
    assert source_digest(second) == before

    for name in ("csrc/library.cpp", "csrc/math.h", "setup.py"):
        text = (second / name).read_text()
        (second / name).write_text(text + " ")
        assert source_digest(second) != before, name
        (second / name).write_text(text)
    assert source_digest(second) == before
    (second / "csrc/math.h").rename(second / "csrc/maths.h")
    assert source_digest(second) != before
    (second / "csrc/math.h").write_text((second / "csrc/maths.h").read_text())
    (second / "csrc/maths.h").unlink()
    (second / "csrc/cuda").mkdir()
    (second / "csrc/cuda/kernel.cuh").touch()
    assert source_digest(second) != before


def test_the_digest_is_of_every_source() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {path.suffix for path in files} <= set(extension_module.SUFFIXES)


def test_an_installed_package_has_nothing_to_compare_with(project: Path) -> None:
    (project / "anything.so").write_bytes(b"")
    assert extension_module.why_refused(project / "anything.so", project) is not None
    shutil.rmtree(project / "csrc")
    assert source_digest(project) is None
    assert extension_module.why_refused(project / "anything.so", project) is None


@without_cuda
def test_cuda_that_cannot_be_built_fails_with_one_line(project: Path) -> None:
    code, said, output = build(project, "cuda")
    assert code == 1
    assert said == [f"vgpo_kernels: VGPO_BUILD=cuda cannot be built: torch {torch.__version__} is built without CUDA"]
    assert "Traceback" not in output


def test_an_unknown_mode_is_named(project: Path) -> None:
    code, said, _ = build(project, "gpu")
    assert code == 1
    assert said == ["vgpo_kernels: VGPO_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"]


@pytest.mark.parametrize(("mode", "expected"), [("auto", 0), ("cpu", 1)])
def test_without_a_compiler_only_auto_goes_on(project: Path, mode: str, expected: int) -> None:
    code, said, output = build(project, mode, CXX="no-such-compiler")
    assert code == expected, output
    assert len(said) == 1 and "there is no C++ compiler ('no-such-compiler')" in said[0]
    assert ("warning: " in said[0]) == (mode == "auto")
    assert "Traceback" not in output


@needs_compiler
@pytest.mark.parametrize(("mode", "expected"), [("auto", 0), ("cpu", 1)])
def test_when_the_compiler_fails_only_auto_goes_on(project: Path, mode: str, expected: int) -> None:
    (project / "csrc/library.cpp").write_text("#error planted\n")
    code, said, output = build(project, mode)
    assert code == expected, output
    assert len(said) == 1 and "its CPU sources failed to compile" in said[0]
    assert "planted" in output
    assert not (project / "vgpo_kernels" / EXTENSION).exists()


@needs_compiler
def test_an_isolated_build_finds_the_torch_of_the_environment(project: Path, tmp_path: Path) -> None:
    # What pip does: the environment's own interpreter, its packages off the path, those of the build on it.
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    packages = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack"):
        (overlay / name).symlink_to(packages / name)
    (overlay / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "hidden = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}\n"
        "sys.path = [path for path in sys.path if path not in hidden]\n"
    )
    hidden = run([sys.executable, "-c", "import torch"], project, PYTHONPATH=str(overlay))
    assert "No module named 'torch'" in hidden.stderr
    code, said, output = build(project, "cpu", PYTHONPATH=str(overlay))
    assert code == 0, output
    assert f"for torch {torch.__version__}" in said[0]


@needs_compiler
@pytest.mark.slow
def test_pip_builds_against_the_torch_of_the_environment(project: Path, tmp_path: Path) -> None:
    """``pip install -e .``, isolated as it is by default, in a fresh environment that has torch."""
    pytest.importorskip("pip")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    packages = Path(run([python, "-c", "import site; print(site.getsitepackages()[0])"], tmp_path).stdout.strip())
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not (packages / entry.name).exists() and not entry.name.startswith(("__", "vgpo")):
            (packages / entry.name).symlink_to(entry)
    pip = [python, "-m", "pip", "install", "--no-deps", "-v", "-e", "."]
    # The isolated build takes its tools from the index: those of the lock, so that this tests our build alone.
    tools = tmp_path / "tools.txt"
    locked = re.findall(r"^(?:setuptools|ninja)==\S+", (ROOT / "requirements/lock.txt").read_text(), re.MULTILINE)
    tools.write_text("\n".join(locked))
    constraints = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(tools))
    result = run(pip, project, VGPO_BUILD="cpu", **constraints)
    if "CI" not in os.environ and "No matching distribution found for setuptools" in result.stdout + result.stderr:
        pytest.skip("pip's isolated build needs a package index")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"built its CPU kernels for torch {torch.__version__}" in result.stdout + result.stderr
    assert "Collecting torch" not in result.stdout
    installed = re.findall(r"Successfully installed (.*setuptools.*)", result.stdout + result.stderr)
    assert [set(line.split()) for line in installed] == [{tool.replace("==", "-") for tool in locked}]
    assert run([python, "-c", "import vgpo_kernels._C"], tmp_path).returncode == 0


@pytest.mark.parametrize("visible", [True, False])
def test_packages_of_the_system_count_where_the_environment_sees_them(
    setup_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: bool
) -> None:
    (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {str(visible).lower()}\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setattr(sys, "base_exec_prefix", str(tmp_path / "base"))
    in_base = [path for path in setup_module.target_site_packages() if path.startswith(str(tmp_path / "base"))]
    assert bool(in_base) == visible


@pytest.mark.parametrize(
    ("version", "cuda", "expected"),
    [
        ("2.7.1+cu128", "12.8", "torch 2.7.1+cu128 is older than 2.8"),
        ("2.10.0", None, "torch 2.10.0 is built without CUDA"),
    ],
)
def test_the_reason_for_not_building_more(
    setup_module: Any, monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, expected: str
) -> None:
    monkeypatch.setitem(setup_module.why_no_cpu.__globals__, "sources", lambda folder, suffix: ["one.cpp"])
    found = setup_module.Torch(version, cuda)
    assert expected == (setup_module.why_no_cpu(found) or setup_module.why_no_cuda(found))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one C++ library")
def test_no_other_cxx_library_than_torchs_is_linked(setup_module: Any, tmp_path: Path) -> None:
    """Also by a compiler that is told to link it statically."""
    (tmp_path / "say.cpp").write_text("#include <sstream>\nvoid say(std::ostream& out, double it) { out << it; }\n")
    compiler = [*shlex.split(os.environ.get("CXX") or "c++"), "-static-libstdc++"]
    runtime = setup_module.shared_cxx_runtime()
    subprocess.run([*compiler, "-fPIC", "-c", "say.cpp"], cwd=tmp_path, check=True)
    needs = {}
    for name, extra in {"plain.so": [], "shared.so": runtime}.items():
        subprocess.run([*compiler, "-shared", "say.o", *extra, "-o", name], cwd=tmp_path, check=True)
        needs[name] = b"libstdc++.so.6" in (tmp_path / name).read_bytes()
    assert needs == {"plain.so": False, "shared.so": True}


@pytest.mark.parametrize("asked", [{}, {"ARCHFLAGS": "-arch x86_64", "MACOSX_DEPLOYMENT_TARGET": "11.0"}])
def test_on_macos_the_build_is_for_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, setup_module: Any, asked: dict[str, str]
) -> None:
    """As Python's own hook for compilers on macOS reads it, for a Python that was built for two processors."""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.6.1", ("", "", ""), "arm64"))
    monkeypatch.setenv("CC", "clang")
    for name in ("ARCHFLAGS", "MACOSX_DEPLOYMENT_TARGET"):
        monkeypatch.setenv(name, asked.get(name, ""))
        if name not in asked:
            monkeypatch.delenv(name)
    setup_module.settle_macos()
    assert os.environ["MACOSX_DEPLOYMENT_TARGET"] == asked.get("MACOSX_DEPLOYMENT_TARGET", "15.0")
    both = "-arch arm64 -arch x86_64 -g"
    settings = importlib.import_module("_osx_support").customize_compiler({"CC": "clang", "CFLAGS": both})
    assert re.findall(r"-arch (\w+)", settings["CFLAGS"]) == ["x86_64" if asked else "arm64"]


def test_openmp_is_on_where_torchs_own_runtime_serves_the_compiler(
    monkeypatch: pytest.MonkeyPatch, setup_module: Any, tmp_path: Path
) -> None:
    def flags(system: str, compiler: str) -> list[str]:
        monkeypatch.setattr(sys, "platform", system)
        (tmp_path / "compiler").write_text(f"#!/bin/sh\necho '{compiler}'\n")
        (tmp_path / "compiler").chmod(0o755)
        found, reason = setup_module.openmp_flags([str(tmp_path)])
        assert bool(found) != bool(reason)
        return found

    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    assert flags("linux", "g++ (Debian 12.2.0) 12.2.0") == ["-fopenmp"]
    assert flags("linux", "Debian clang version 19.1.7") == []
    assert flags("darwin", "Apple clang version 17.0.0") == []
    (tmp_path / "omp.h").touch()
    assert flags("darwin", "Apple clang version 17.0.0") == ["-Xclang", "-fopenmp"]


def test_without_torch_the_advice_is_to_install_it(setup_module: Any) -> None:
    assert setup_module.why_no_cpu(None).startswith("torch is not installed")


def test_nvcc_of_another_cuda_is_refused(setup_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.6, V12.6.20'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setitem(setup_module.why_no_cuda.__globals__, "sources", lambda folder, suffix: ["kernels.cu"])
    assert setup_module.why_no_cuda(setup_module.Torch("2.11.0+cu126", "12.6")) == ""
    refusal = setup_module.why_no_cuda(setup_module.Torch("2.11.0+cu130", "13.0"))
    assert refusal == "nvcc is of CUDA 12.6 and torch 2.11.0+cu130 of CUDA 13.0"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert "there is no nvcc" in setup_module.why_no_cuda(setup_module.Torch("2.11.0+cu130", "13.0"))


@pytest.mark.parametrize(
    ("asked", "capabilities", "expected"),
    [
        ("", [], "8.0;9.0+PTX"),
        ("", [(9, 0), (9, 0)], "9.0+PTX"),
        ("", [(9, 0), (8, 6), (7, 5)], "8.6;9.0+PTX"),
        ("10.0", [(9, 0)], "10.0"),
    ],
)
def test_cuda_architectures(
    setup_module: Any,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    capabilities: list[tuple[int, int]],
    expected: str,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_module.choose_architectures(torch_with(capabilities)) == expected
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected


def test_a_gpu_too_old_for_the_kernels_is_refused(setup_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    with pytest.raises(setup_module.Unbuildable, match=r"no GPU here has compute capability 8\.0"):
        setup_module.choose_architectures(torch_with([(7, 5)]))


def test_hopper_gets_all_of_its_instructions(setup_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0;9.0a;9.0+PTX;10.0")
    found = setup_module.architecture_flags()
    codes = {flag.rpartition("code=")[2] for flag in found}
    assert codes == {"sm_80", "sm_90a", "compute_90", "sm_100"}
    assert "-gencode=arch=compute_90a,code=sm_90a" in found


def torch_with(capabilities: list[tuple[int, int]]) -> Any:
    cuda = SimpleNamespace(device_count=lambda: len(capabilities), get_device_capability=capabilities.__getitem__)
    return SimpleNamespace(cuda=cuda)


def test_metadata(project: Path) -> None:
    shutil.copytree(ROOT / "python", project / "python", ignore=shutil.ignore_patterns("__pycache__"))
    result = run([sys.executable, "setup.py", "-q", "egg_info"], project, VGPO_BUILD="none")
    assert result.returncode == 0, result.stderr
    info = next(project.glob("*.egg-info"))
    required = (info / "requires.txt").read_text().split("\n\n")[0].split()
    assert required == ["torch>=2.8", "numpy"]
    assert "vgpo = vgpo_trainer.cli:main" in (info / "entry_points.txt").read_text()
    assert (info / "top_level.txt").read_text().split() == ["vgpo_kernels", "vgpo_trainer"]
    assert "Version: 0.0\n" in (info / "PKG-INFO").read_text()


def test_a_wheel_holds_what_the_trainer_reads(project: Path) -> None:
    shutil.copytree(ROOT / "python", project / "python", ignore=shutil.ignore_patterns("__pycache__"))
    result = run([sys.executable, "setup.py", "-q", "bdist_wheel"], project, VGPO_BUILD="none")
    assert result.returncode == 0, result.stderr
    (wheel,) = (project / "dist").glob("*.whl")
    held = {name.rpartition("purelib/")[2] for name in zipfile.ZipFile(wheel).namelist()}
    source = project / "python"
    files = {path.relative_to(source).as_posix() for path in (source / "vgpo_trainer").rglob("*") if path.is_file()}
    assert {"vgpo_trainer/reports/templates/run.html.j2", "vgpo_trainer/reports/assets/report.css"} <= files
    assert files <= held


def test_the_command_names_the_extra_it_lacks(tmp_path: Path) -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(("PIL", "rich", "trl", "transformers", "datasets", "sklearn")))
from vgpo_trainer.cli import main
raise SystemExit(main(["demo"]))
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    result = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=path)
    assert result.returncode == 2
    assert not any(tmp_path.iterdir())
    assert "pip install 'vgpo-kernels[train]'" in result.stderr and "Traceback" not in result.stderr

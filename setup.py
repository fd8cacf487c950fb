"""Build of vgpo_kernels: decides what this machine can compile, compiles it, and says so in one line.

The environment variable ``VGPO_BUILD`` chooses: ``auto`` (the default) builds what the machine can and
never fails an installation; ``cpu`` and ``cuda`` build exactly that or fail; ``none`` installs pure Python,
whose calls are computed by plain PyTorch (and Triton on a GPU). ``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``,
``CXX`` and ``MAX_JOBS`` mean what they mean to every PyTorch extension.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 8)
OLDEST_CAPABILITY = (8, 0)
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


class Torch(NamedTuple):
    """What is known of the installed torch without paying for its import."""

    version: str
    cuda: str | None


class Unbuildable(Exception):
    """Why a target cannot be built here, where that shows only once torch is imported."""


class Plan(NamedTuple):
    """What to build, and why not more."""

    targets: tuple[str, ...]  # in order of preference: the next is built where one fails; empty: nothing
    reason: str


def say(message: str) -> None:
    print(f"vgpo_kernels: {message}", file=sys.stderr, flush=True)


def refuse(message: str) -> SystemExit:
    return SystemExit(f"vgpo_kernels: {message}")


def sources(folder: str, suffix: str) -> list[str]:
    """Source files of one folder, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def target_site_packages() -> list[str]:
    """Folders where the environment that is being installed into keeps its packages."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    configuration = Path(sys.prefix) / "pyvenv.cfg"
    is_venv = configuration.is_file()
    if is_venv and not re.search(r"(?im)^include-system-site-packages\s*=\s*true", configuration.read_text()):
        return folders
    folders += site.getsitepackages([sys.base_prefix, sys.base_exec_prefix] if is_venv else None)
    return [*folders, site.getusersitepackages()]


def settle_macos() -> None:
    """Build for this Mac alone, unless the caller has chosen, as torch's wheels are built for one processor.

    An installer's Python is built for two processors and for systems older than those that torch takes, and setuptools
    would go by that. Compiler and linker would not even agree on the system.
    """
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", platform.mac_ver()[0].split(".")[0] + ".0")


def find_torch() -> Torch | None:
    """Find torch, looking into the target environment if this is an isolated build, which hides it.

    pip runs an isolated build with the target environment's own interpreter and takes its packages off
    ``sys.path``. They return at its end, so that the setuptools and ninja of the build come first.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [path for path in target_site_packages() if path not in sys.path and os.path.isdir(path)]
        importlib.invalidate_caches()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return Torch(facts["__version__"], facts["cuda"])


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def nvcc_says(nvcc: str, pattern: str, *arguments: str) -> str:
    """First match of a pattern in what nvcc prints, or an empty string."""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    match = re.search(pattern, result.stdout + result.stderr)
    return match.group(1) if match else ""


def why_no_cpu(torch: Torch | None) -> str:
    """Why the C++ extension cannot be compiled here; empty if it can."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if torch is None:
        return "torch is not installed (install it first, then vgpo_kernels again)"
    if tuple(int(part) for part in re.findall(r"\d+", torch.version)[:2]) < OLDEST_TORCH:
        return f"torch {torch.version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if not sources("", "library.cpp"):
        return "its sources (csrc) are missing"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ('{compiler}')"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are missing (on Debian and Ubuntu: python3-dev)"
    return ""


def why_no_cuda(torch: Torch) -> str:
    """Why the CUDA kernels cannot be compiled here, given that the C++ extension can; empty if they can."""
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    if not sources("cuda", ".cu"):
        return "its CUDA sources (csrc/cuda) are missing"
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc (searched in CUDA_HOME, PATH and /usr/local/cuda)"
    release = nvcc_says(nvcc, r"release ([\d.]+)", "--version")
    if release.split(".")[0] != torch.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release or '(unknown)'} and torch {torch.version} of CUDA {torch.cuda}"
    return ""


def plan_build(mode: str) -> Plan:
    """Choose what to build.

    Raises:
        SystemExit: The mode is unknown, or the mode asks for what this machine cannot build.

    """
    if mode not in MODES:
        raise refuse(f"VGPO_BUILD must be one of {', '.join(MODES)}, got '{mode}'")
    if mode == "none":
        return Plan((), "VGPO_BUILD=none")
    torch = find_torch()
    reason = why_no_cpu(torch)
    if reason and mode == "auto":
        return Plan((), reason)
    if not reason and mode == "cpu":
        return Plan(("cpu",), "VGPO_BUILD=cpu")
    reason = reason or why_no_cuda(torch)
    if reason and mode != "auto":
        raise refuse(f"VGPO_BUILD={mode} cannot be built: {reason}")
    targets = ("cpu",) if reason else ("cuda", "cpu")
    return Plan(targets[:1] if mode == "cuda" else targets, reason)


def write_digest(folder: str) -> str:
    """Write the source that leaves a digest of all sources in the extension, if it changed; return its path.

    A source of its own, so that a change of one file compiles that file and this one, and not all of them anew.
    """
    extension = runpy.run_path(str(ROOT / "vgpo_kernels" / "extension.py"))
    digest = extension["MARKER"] + extension["source_digest"](ROOT)
    code = f'namespace vgpo {{\nextern const char source_digest[];\nconst char source_digest[] = "{digest}";\n}}\n'
    path = Path(folder, "source_digest.cpp").absolute()
    if not path.is_file() or path.read_text() != code:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return str(path)


def shared_cxx_runtime() -> list[str]:
    """File of the C++ library that torch shares, so that the extension uses no other, whatever the linker would take.

    Some toolchains link it statically. Of two copies in a process one does not know what the other has set up: there,
    the first message of an error with a number in it took the process down.
    """
    if sys.platform != "linux":
        return []
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-print-file-name=libstdc++.so.6"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return [found] if os.path.isfile(found) else []  # a bare name where the compiler has none


def openmp_flags(include_dirs: list[str]) -> tuple[list[str], str]:
    """Flags that turn OpenMP on, without which at::parallel_for, a template of torch's headers, is serial; or why none.

    Its runtime is not linked: the symbols come from the one that torch has loaded, so that there is only one. On Linux
    that is GCC's, which lacks what clang's code calls. On macOS torch's libomp could not even be linked, as it goes by
    the name of a file on the machine that built it; its header comes with torch and not with Apple's compiler.
    """
    if sys.platform == "darwin":
        found = any(Path(folder, "omp.h").is_file() for folder in include_dirs)
        # Apple's driver refuses the flag, and its compiler takes it.
        return (["-Xclang", "-fopenmp"], "") if found else ([], "torch brings no omp.h")
    if sys.platform != "linux":
        return [], f"OpenMP is not used on {sys.platform}"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    if "clang" in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
        return [], "clang calls another OpenMP than torch's, g++ would not"
    return ["-fopenmp"], ""


def configure(extension: Extension, target: str, build_folder: str) -> str:
    """Give the extension the sources and flags of a target; return what the target is, in words.

    Raises:
        Unbuildable: The target is CUDA, and no GPU of this machine is new enough for the kernels.

    """
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    description = "its CPU kernels"
    # Contraction would let the compiler fuse a product and a sum in one copy of a loop and not in another.
    cxx = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    nvcc = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]
    files = [*sources("", ".cpp"), *sources("cpu", ".cpp"), write_digest(build_folder)]
    if target == "cuda":
        description = f"its CPU and CUDA kernels ({choose_architectures(torch)})"
        files += sources("cuda", ".cu")
        architectures = architecture_flags()
        defined = ["-DVGPO_HAS_CUDA", *(["-DVGPO_HOPPER"] if any("sm_90a" in flag for flag in architectures) else [])]
        cxx += defined
        nvcc += defined + architectures
    # torch knows the folders and libraries. Its headers become system headers: only our own code can warn.
    known = (CUDAExtension if target == "cuda" else CppExtension)(extension.name, files)
    system = [flag for path in known.include_dirs for flag in ("-isystem", path)]
    openmp, serial = openmp_flags(known.include_dirs)
    cxx += openmp
    # Ours are found by quoted includes alone: in another folder of the path csrc/math.h would hide the system's.
    own = ["-iquote", str(ROOT / "csrc")]
    if target == "cuda":
        # torch's headers want those of cuSPARSE and more. A small toolkit lacks them, and torch's wheels bring them.
        wheels = sorted(Path(torch.__file__).parent.parent.glob("nvidia/*/include"))
        own += [flag for path in wheels for flag in ("-idirafter", str(path))]
    extension.sources = files
    extension.library_dirs = known.library_dirs
    # Elsewhere torch's libraries are found by their names once torch is loaded.
    extension.runtime_library_dirs = known.library_dirs if sys.platform == "darwin" else known.runtime_library_dirs
    extension.libraries = known.libraries
    extension.extra_objects = shared_cxx_runtime()
    extension.language = "c++"
    extension.depends = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.*h"))]
    extension.extra_compile_args = {
        "cxx": cxx + system + own,
        "nvcc": nvcc + system + [part for flag in own for part in ("-Xcompiler", flag)],
    }
    return f"{description} for torch {torch.__version__}" + (f", on one thread ({serial})" if serial else "")


def choose_architectures(torch) -> str:
    """Set the CUDA architectures unless the caller has: this machine's GPUs, or the default without a GPU."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        capabilities = sorted(pair for pair in capabilities if pair >= OLDEST_CAPABILITY)
        if torch.cuda.device_count() and not capabilities:
            raise Unbuildable(f"no GPU here has compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or later")
        own = ";".join(f"{major}.{minor}" for major, minor in capabilities)
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{own}+PTX" if own else DEFAULT_ARCHITECTURES
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def architecture_flags() -> list[str]:
    """Flags of nvcc for TORCH_CUDA_ARCH_LIST, with all instructions of a Hopper GPU where 9.0 is one of them.

    Only sm_90a has them, and such machine code runs on Hopper alone, as that of sm_90 does. PTX is left as it is: later
    GPUs take no other. torch adds no flags where these stand.
    """
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    hopper = "arch=compute_90,code=sm_90"
    return [flag.replace(hopper, "arch=compute_90a,code=sm_90a") for flag in _get_cuda_arch_flags()]


class BuildExtension(build_ext):
    """setuptools' build_ext that hands the compilation to torch's, and survives its failure where it may."""

    def run(self) -> None:
        mode = os.environ.get("VGPO_BUILD") or "auto"
        plan = plan_build(mode)
        reason = plan.reason
        # As if the environment were activated: builds by one ninja share objects, by two versions of it they may not.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        for target in plan.targets:
            try:
                built = self.compile(target)
            except Unbuildable as error:
                reason = str(error)
            except Exception as error:
                reason = f"its {target.upper()} sources failed to compile, see above ({first_line(error)})"
            else:
                say(f"built {built}" + (f"; no CUDA kernels: {reason}" if reason else ""))
                return
        if plan.targets and mode != "auto":
            raise refuse(f"VGPO_BUILD={mode} cannot be built: {reason}")
        self.build_nothing(mode, reason)

    def compile(self, target: str) -> str:
        """Compile the extension for a target and return what was built, in words."""
        nvcc = find_nvcc()
        if target == "cuda" and nvcc and not os.environ.get("CUDA_HOME"):
            # nvcc on PATH may be a wrapper far from its toolkit, which nvcc itself knows.
            top = nvcc_says(nvcc, r"#\$ TOP=(.*)", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
            os.environ["CUDA_HOME"] = os.path.realpath(top or Path(nvcc).resolve().parent.parent)
        from torch.utils.cpp_extension import BuildExtension as TorchBuildExtension

        (extension,) = self.extensions
        command = TorchBuildExtension(self.distribution)
        vars(command).update(vars(self))
        command.force = True  # ninja decides what is out of date
        if self.inplace:
            # Outlives an editable installation, unlike its own folder: ninja recompiles only what changed.
            version = find_torch().version
            name = f"temp-{sys.implementation.cache_tag}-{sysconfig.get_platform()}-torch{version}-{target}"
            command.build_temp = str(ROOT / "build" / name)
        description = configure(extension, target, command.build_temp)
        command.run()
        return description

    def build_nothing(self, mode: str, reason: str) -> None:
        if self.inplace:
            # An extension of an earlier build would still be loaded, and may be of another torch.
            (ROOT / self.get_ext_filename("vgpo_kernels._C")).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        kind = "" if mode == "none" else "warning: "
        say(f"{kind}built no extension: {reason}; plain PyTorch computes instead, which is slower")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if sys.platform == "darwin":
    settle_macos()
setup(
    # Here and not in pyproject.toml, whose way to say it depends on the version of setuptools.
    license="Apache-2.0",
    ext_modules=[Extension("vgpo_kernels._C", ["csrc/library.cpp"], language="c++")],
    cmdclass={"build_ext": BuildExtension},
)

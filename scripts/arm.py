"""Run the operators' tests on the C++ backend as it is for 64-bit ARM, on another machine, under qemu.

    python scripts/arm.py [--folder FOLDER] [--levels portable,neon,neon-bf16] [arguments of pytest]

It takes what it makes from FOLDER, by default `.venv-arm`, and makes what is missing there:

    root/    Debian 12 for ARM with Python 3.11, by mmdebstrap from Debian's mirror (130 MB)
    site/    torch's wheel for ARM and the lock's releases of what the tests import, from the package index (700 MB)
    tree/    a copy of this checkout, in which setup.py builds the extension: ARM's Python starts the cross-compiler

The tests run once for each SIMD level. qemu shows that instructions and numbers are right; it says nothing of speed. On
an ARM machine `make test` does all of this as it does elsewhere.

It needs: apt-get install mmdebstrap qemu-user-static g++-aarch64-linux-gnu (debian-archive-keyring outside Debian).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"  # Debian 12's
# The newest whose wheel for ARM stands alone: later ones ask for NVIDIA's libraries.
TORCH = "torch==2.10.0"
PACKAGES = (
    *("filelock", "fsspec", "hypothesis", "iniconfig", "jinja2", "markupsafe", "mpmath", "networkx", "numpy"),
    *("packaging", "pluggy", "pygments", "pytest", "setuptools", "sortedcontainers", "sympy", "typing-extensions"),
)
TAGS = ("--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64", "--only-binary=:all:")
COPIED = ("csrc", "vgpo_kernels", "python", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md")
LEVELS = ("portable", "neon", "neon-bf16")
TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        *("cpu", "visual_focus", "visual_weights", "policy_loss", "vgpo_loss", "attention_mass"),
        *("attention_edges", "linear_logprob", "linear_divergence", "token_shaping"),
    )
)
DEBIAN_PACKAGES = "mmdebstrap qemu-user-static g++-aarch64-linux-gnu"
TOOLS = ("mmdebstrap", "qemu-aarch64-static", "aarch64-linux-gnu-g++")
START = time.monotonic()


class Unfit(Exception):
    """What is missing, or what went wrong."""


def say(what: str) -> None:
    print(f"[{time.monotonic() - START:4.0f} s] {what}", flush=True)


def run(command: Sequence[str | Path], log: Path, folder: Path = ROOT, **variables: str) -> None:
    """Run a command in a folder, its output into a file.

    Raises:
        Unfit: It failed; the message ends with what it printed last.
    """
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=folder, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise Unfit(f"{' '.join(map(str, command))}\n{log.read_text()[-4000:]}")


def once(folder: Path, key: str) -> bool:
    """Whether a folder must be made, which it is empty for then: another key, or none, stands in the file beside it."""
    stamp = folder.with_suffix(".made")
    if stamp.is_file() and stamp.read_text() == key:
        return False
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def made(folder: Path, key: str, what: str) -> None:
    folder.with_suffix(".made").write_text(key)
    say(what)


def make_root(root: Path) -> None:
    """Unpack Debian for ARM. Nothing of it is configured or started: its Python runs from where it lies."""
    packages = f"python{PYTHON},libpython{PYTHON}-dev,libgomp1,libstdc++6"
    command = ["mmdebstrap", "--architectures=arm64", "--variant=extract", f"--include={packages}", "bookworm"]
    if once(root, " ".join(command)):
        run([*command, root], root.with_suffix(".log"))
        made(root, " ".join(command), f"unpacked Debian for ARM into {root}")


def locked(lock: str, names: Iterable[str]) -> str:
    """Requirements of packages with their hashes, as the lock has them for ARM's Python.

    Raises:
        Unfit: The lock does not have one of them.
    """
    environment = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.2",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": "aarch64",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }
    found = {}
    for entry in lock.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        pinned, _, marker = requirement.partition(";")
        name = pinned.partition("==")[0]
        if hashes and name in names and (not marker.strip() or Marker(marker.strip()).evaluate(environment)):
            found[name] = " --hash=".join((pinned.strip(), *(part.strip() for part in hashes)))
    if missing := set(names) - set(found):
        raise Unfit(f"requirements/lock.txt lacks {', '.join(sorted(missing))}")
    return "".join(f"{line}\n" for line in found.values())


def make_site(site: Path) -> None:
    """Install torch and what the tests import, for ARM's Python."""
    requirements = locked((ROOT / "requirements" / "lock.txt").read_text(), PACKAGES)
    if not once(site, TORCH + requirements):
        return
    listed = site.with_suffix(".txt")
    listed.write_text(requirements)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    pip += ["--python-version", PYTHON, *TAGS, "--target", str(site)]
    run([*pip, TORCH], site.with_suffix(".log"))
    run([*pip, "--upgrade", "--require-hashes", "-r", listed], site.with_suffix(".log"))
    made(site, TORCH + requirements, f"installed {TORCH} for ARM into {site}")


def make_tree(tree: Path) -> None:
    """Bring the copy of the checkout up to date. What stays the same keeps its date, so that ninja compiles no more."""
    for name in COPIED:
        source, target = ROOT / name, tree / name
        paths = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
        paths = [path for path in paths if path.suffix not in (".so", ".pyc")]
        wanted = {path.relative_to(ROOT) for path in paths}
        for path in wanted:
            if not (tree / path).is_file() or (tree / path).read_bytes() != (ROOT / path).read_bytes():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, tree / path)
        for path in target.rglob("*") if target.is_dir() else ():
            if path.is_file() and path.suffix not in (".so", ".pyc") and path.relative_to(tree) not in wanted:
                path.unlink()


class Machine:
    """ARM's Python in qemu. What it starts is found on this machine's path, and runs on this machine."""

    def __init__(self, folder: Path) -> None:
        root, self.tree = folder / "root", folder / "tree"
        # SVE and real pointer authentication are slow to emulate, and nothing here has them.
        self.python = [
            *("qemu-aarch64-static", "-cpu", "max,sve=off,pauth-impdef=on", "-L", str(root)),
            str(root / "usr" / "bin" / f"python{PYTHON}"),
        ]
        include = root / "usr" / "include"
        self.variables = {
            "PYTHONPATH": os.pathsep.join(map(str, (folder / "site", self.tree, self.tree / "python"))),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),  # ninja
            "CXX": "aarch64-linux-gnu-g++",
            "CFLAGS": f"-Werror -isystem {include / f'python{PYTHON}'} -isystem {include}",
            "VGPO_BUILD": "cpu",
            "VGPO_TEST_BACKENDS": "cpp",
            "OMP_NUM_THREADS": "1",
        }

    def build(self) -> None:
        """Build the extension in the copy."""
        command = [*self.python, "setup.py", "build_ext", "--inplace"]
        run(command, self.tree.with_suffix(".log"), self.tree, **self.variables)

    def test(self, level: str, arguments: Sequence[str]) -> bool:
        """Run tests at a SIMD level; return whether they pass."""
        check = f"from vgpo_kernels import _C; assert _C.simd() == {level!r}, _C.simd_levels()"
        environment = os.environ | self.variables | {"VGPO_SIMD": level}
        subprocess.run([*self.python, "-c", check], cwd=self.tree, env=environment, check=True)
        command = [*self.python, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=self.tree, env=environment, check=False).returncode == 0


def main() -> int:
    """Run the operators' tests for ARM; 0 where all of them pass."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-arm", help="what is made is kept there")
    parser.add_argument("--levels", default=",".join(LEVELS), help="SIMD levels, with commas; default: %(default)s")
    options, arguments = parser.parse_known_args()
    folder = options.folder.resolve()
    failed = []
    try:
        if platform.machine() in ("aarch64", "arm64"):
            raise Unfit("this machine is an ARM machine: `make test` runs the tests on it")
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise Unfit(f"there is no {', '.join(missing)}: apt-get install {DEBIAN_PACKAGES}")
        folder.mkdir(parents=True, exist_ok=True)
        make_root(folder / "root")
        make_site(folder / "site")
        make_tree(folder / "tree")
        machine = Machine(folder)
        machine.build()
        say("built the extension for ARM")
        for level in options.levels.split(","):
            passed = machine.test(level, arguments or TESTS)
            failed += [] if passed else [level]
            say(f"{level}: {'passed' if passed else 'FAILED'}")
    except Unfit as error:
        say(f"FAILED: {error}")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

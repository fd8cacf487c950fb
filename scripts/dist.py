"""Build the sdist and a wheel into dist/, and prove that both, and a clone by git+file://, install, load and compute.

    python scripts/dist.py [--torch REQUIREMENT]

The wheel is made of the sdist, as pip makes it for people, so the sdist holds what a build needs. It is for the Python,
the torch and the machine's architecture that built it. ``VGPO_BUILD`` decides what is compiled. Each installation goes
into an environment of its own that has that torch alone, and is gone at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# Beside what packages hold: what a build reads, what tests read, what people look for.
OF_AN_SDIST = (
    *(".ci", ".github", "benchmarks", "csrc", "docs", "examples", "python", "requirements", "scripts", "tests"),
    "vgpo_kernels",
)
FILES_OF_AN_SDIST = (
    *("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile"),
    *("README.md", "SECURITY.md", "pyproject.toml", "setup.py"),
)
OF_A_WHEEL = {"vgpo_kernels": ROOT / "vgpo_kernels", "vgpo_trainer": ROOT / "python" / "vgpo_trainer"}
NO_SOURCE = {".pyc", ".so", ".o"}

# Run with what was installed, from a folder without any of the sources.
CHECK = """
import sys
from pathlib import Path
import torch, vgpo_kernels, vgpo_trainer
from vgpo_trainer.demo import __file__ as demo

version, compiled = sys.argv[1:]
assert "site-packages" in vgpo_kernels.__file__, vgpo_kernels.__file__
assert vgpo_kernels.__version__ == version, vgpo_kernels.__version__
found = vgpo_kernels.backends.describe()
assert found["built"]["cpp"] == (compiled == "True") and not found["refused"], found
assert list(Path(demo).parent.glob("assets/*/model.safetensors")), "the demo has its model"
hidden = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
mask = torch.tensor([[True, False]])
cos = vgpo_kernels.visual_focus(hidden, mask, ~mask)
assert abs(cos[0, 1].item() - 0.6) < 1e-6, cos
print(f"vgpo_kernels {version} by {found['serves']['cpu']} with torch {torch.__version__}")
print(vgpo_trainer.show_tokens(["a", "b"], cos[0]))
"""


class Unfit(Exception):
    """What a distribution lacks, or what went wrong with it."""


def sources(folder: Path) -> Iterable[Path]:
    """Files of a folder that belong to the project."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and path.suffix not in NO_SOURCE and not {"__pycache__", "site-packages"} & set(inside.parts):
            yield path


def missing_of_sdist(held: Iterable[str], root: Path = ROOT) -> set[str]:
    """Return what an sdist lacks of the names, relative to its top folder, that it must have."""
    needed = {path.relative_to(root).as_posix() for name in OF_AN_SDIST for path in sources(root / name)}
    needed = {name for name in needed if ".egg-info/" not in name}
    return (needed | set(FILES_OF_AN_SDIST)) - set(held)


def missing_of_wheel(held: Iterable[str]) -> set[str]:
    """Return what a wheel lacks of the names that it must have."""
    needed = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in OF_A_WHEEL.items()
        for path in sources(folder)
    }
    return needed - set(held)


def names_of_sdist(sdist: Path) -> list[str]:
    """Return the names in an sdist, relative to its top folder."""
    with tarfile.open(sdist) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def names_of_wheel(wheel: Path) -> list[str]:
    """Return the names in a wheel, as they are installed."""
    with zipfile.ZipFile(wheel) as archive:
        return [name.rpartition(".data/purelib/")[2] for name in archive.namelist()]


def run(command: Sequence[str | Path], folder: Path = ROOT) -> str:
    """Run a command without anything of the sources on its path; return what it printed.

    Raises:
        Unfit: It failed; the message ends with what it printed last.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise Unfit(f"{' '.join(map(str, command))}\n{result.stdout[-4000:]}")
    return result.stdout


def one(pattern: str) -> Path:
    """Return the one file in dist/ of a pattern."""
    (found,) = DIST.glob(pattern)
    return found


class Environment:
    """A virtual environment with a torch, in a folder that is removed by whoever made it."""

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder = folder
        run([sys.executable, "-m", "venv", folder])
        self.python = folder / "bin" / "python"
        self.pip("install", torch, "numpy")

    def pip(self, *arguments: str | Path) -> str:
        """Run pip of the environment; nothing that it has built before is taken."""
        return run([self.python, "-m", "pip", "--no-cache-dir", "--disable-pip-version-check", *arguments])

    def check(self, version: str, compiled: bool) -> None:
        """Check what is installed, in a folder without the sources."""
        print(run([self.python, "-c", CHECK, version, str(compiled)], self.folder), end="", flush=True)
        print(run([self.folder / "bin" / "vgpo", "doctor"], self.folder), end="", flush=True)


def version() -> str:
    """Return the version that the sources say."""
    text = (ROOT / "vgpo_kernels" / "__init__.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def build_sdist() -> Path:
    """Build the sdist and check what it holds."""
    program = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", program, DIST])
    sdist = one("*.tar.gz")
    if lacks := missing_of_sdist(names_of_sdist(sdist)):
        raise Unfit(f"{sdist.name} lacks {', '.join(sorted(lacks))}")
    return sdist


def build_wheel(environment: Environment, sdist: Path) -> Path:
    """Build the wheel of an sdist and check what it holds."""
    environment.pip("wheel", "--no-deps", "--wheel-dir", DIST, sdist)
    wheel = one("*.whl")
    if lacks := missing_of_wheel(names_of_wheel(wheel)):
        raise Unfit(f"{wheel.name} lacks {', '.join(sorted(lacks))}")
    return wheel


def main() -> int:
    """Build and check; 0 where all of it works."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--torch", default="torch", help="requirement of the torch to build for; default: the newest")
    arguments = parser.parse_args()
    compiled = os.environ.get("VGPO_BUILD") != "none"
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {what}", flush=True)

    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    try:
        sdist = build_sdist()
        say(f"built {sdist.relative_to(ROOT)}")
        with tempfile.TemporaryDirectory() as folder:
            environment = Environment(Path(folder), arguments.torch)
            wheel = build_wheel(environment, sdist)
            say(f"built {wheel.relative_to(ROOT)} of it")
            environment.pip("install", wheel)
            environment.check(version(), compiled)
            say("the wheel works where nothing else is installed")
            if changed := run(["git", "status", "--porcelain"]):
                say(f"the clone has changes that are not committed, which git+file:// leaves out:\n{changed.rstrip()}")
            environment.pip("uninstall", "--yes", "vgpo-kernels")
            environment.pip("install", f"git+file://{ROOT}")
            environment.check(version(), compiled)
            say(f"pip install git+file://{ROOT} works")
    except Unfit as error:
        say(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

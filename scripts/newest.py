"""The newest release of every package in the place of the lock's: what to install for it, and what is newer then.

    python scripts/newest.py packages       requirements of the extras, for pip; torch stays the one of this environment
    python scripts/newest.py verl           those of requirements/verl.in that are not installed yet, for pip --no-deps
    python scripts/newest.py differences    locked and installed versions where they differ, a package a line
    python scripts/newest.py newer          what pip would replace in this environment, nothing where it is the newest

Upper bounds are ours and left out; exact versions are other packages' demands and stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "test", "dev")
LOCKS = (ROOT / "requirements/lock.txt", ROOT / "requirements/verl.txt")


def requirements(text: str) -> Iterator[Requirement]:
    """Read the requirements of a file: its comments, continued lines and hashes are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        stated = line.partition("#")[0].partition("--hash")[0].strip()
        if stated:
            yield Requirement(stated)


def direct(extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """Return what pyproject.toml asks for by its dependencies and extras, an extra that names another one resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: list[Requirement] = []
    waiting = [*project["dependencies"]]
    for extra in extras:
        waiting += project["optional-dependencies"][extra]
    for stated in map(Requirement, waiting):
        found += direct_extras(stated, project["optional-dependencies"]) if stated.name == project["name"] else [stated]
    return found


def direct_extras(own: Requirement, extras: Mapping[str, list[str]]) -> list[Requirement]:
    """Return what the extras named in a requirement of the project on itself ask for."""
    return [Requirement(stated) for extra in sorted(own.extras) for stated in extras[extra]]


def without_upper_bounds(requirement: Requirement) -> Requirement:
    """Return a requirement that admits every later release."""
    freed = Requirement(str(requirement))
    freed.specifier = SpecifierSet(",".join(str(part) for part in freed.specifier if not part.operator.startswith("<")))
    return freed


def locked(texts: Iterable[str]) -> dict[str, str]:
    """Return the versions, by name, that locks name for this Python and platform."""
    return {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for text in texts
        for requirement in requirements(text)
        if requirement.marker is None or requirement.marker.evaluate()
    }


def installed() -> dict[str, str]:
    """Return the versions, by name, of what is installed."""
    return {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}


def differences(lock: Mapping[str, str], present: Mapping[str, str], given: Iterable[str]) -> list[str]:
    """Return a line for each package of a lock that is installed in another version.

    Args:
        lock: Locked versions by name.
        present: Installed versions by name.
        given: Requirements of the installed torch. What it pins is its own, as Triton where it is for CUDA.

    """
    pinned = {
        canonicalize_name(requirement.name)
        for requirement in map(Requirement, given)
        if any(part.operator == "==" for part in requirement.specifier)
    }
    return [
        f"{name}: {version} -> {present[name]}"
        for name, version in sorted(lock.items())
        if name not in pinned and present.get(name, version) != version
    ]


def packages(present: Mapping[str, str]) -> list[str]:
    """Return the requirements of the extras, and the torch of this environment."""
    return [f"torch=={present['torch']}", *(str(without_upper_bounds(one)) for one in direct())]


def replaced(requirements: Iterable[str], *options: str) -> list[str]:
    """Return what pip would install for requirements in place of what is there, a package a line.

    Raises:
        subprocess.CalledProcessError: pip finds no solution, or no network.

    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "-qq", "--report", "-", "--upgrade"]
    command += ["--upgrade-strategy", "eager", *options, *requirements]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return [f"{one['metadata']['name']} {one['metadata']['version']}" for one in report["install"]]


def newer() -> list[str]:
    """Return what the newest releases would replace, in an environment that ``make verl`` has completed."""
    adapters = [str(without_upper_bounds(one)) for one in requirements((ROOT / "requirements/verl.in").read_text())]
    return replaced(packages(installed())) + replaced(adapters, "--no-deps")


def main(what: str) -> None:
    """Print what the command line asks for."""
    present = installed()
    if what == "packages":
        lines = packages(present)
    elif what == "newer":
        lines = newer()
    elif what == "verl":
        named = requirements((ROOT / "requirements/verl.in").read_text())
        lines = [str(without_upper_bounds(one)) for one in named if canonicalize_name(one.name) not in present]
    elif what == "differences":
        lines = differences(locked(path.read_text() for path in LOCKS), present, requires("torch") or [])
    else:
        raise SystemExit(__doc__)
    print(*lines, sep="\n", end="\n" if lines else "")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else "")

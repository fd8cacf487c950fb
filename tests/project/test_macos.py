"""scripts/macos.py tells what a Mac would miss, by a compiler that only reports it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from load_script import load_script

macos = load_script("macos")


class Linker:
    """A compiler that leaves symbols undefined where none is admitted, unless OpenMP's runtime is linked."""

    def __init__(self, folder: Path, undefined: Sequence[str]) -> None:
        self.calls = folder / "calls"
        self.program = folder / "zig"
        lines = [
            f"case $* in *-undefined*) ;; *) echo 'error: undefined symbol: {name}' >&2 ;; esac" for name in undefined
        ]
        lines += [
            "case $* in *-undefined*|*-lomp*) ;; *) echo 'error: undefined symbol: ___kmpc_fork_call' >&2 ;; esac"
        ]
        lines += ["case $* in *-undefined*) exit 0 ;; *) exit 1 ;; esac"]
        self.program.write_text("\n".join(["#!/bin/sh", f'echo "$*" >> {self.calls}', *lines]))
        self.program.chmod(0o755)

    def link(self, quick: bool) -> int:
        folder = self.program.parent
        return macos.link((self.program,), [folder / "library.o"], folder / "torch", folder, quick)


@pytest.mark.parametrize("quick", [False, True])
def test_what_only_python_defines_is_counted(tmp_path: Path, quick: bool) -> None:
    linker = Linker(tmp_path, ["_PyLong_FromSsize_t", "__Py_NoneStruct"])
    assert linker.link(quick) == 2
    strict, loose = linker.calls.read_text().splitlines()
    assert "-lomp" in strict and "-lomp" not in loose, "torch's OpenMP runtime must not be linked"
    assert "-undefined dynamic_lookup" in loose


@pytest.mark.parametrize("name", ["__ZN2at6native7cpublas6brgemmEx", "_sched_getaffinity", "_PyNoSuchThing"])
def test_what_nothing_defines_is_told(tmp_path: Path, name: str) -> None:
    for quick in (False, True):
        with pytest.raises(macos.Wrong, match=f"nothing that is loaded on a Mac defines {name}"):
            Linker(tmp_path, ["_PyLong_FromSsize_t", name]).link(quick)


@pytest.mark.parametrize(
    "name",
    ["__ZNSt3__112basic_stringIcED1Ev", "__ZNKSt9exception4whatEv", "__Znwm", "___cxa_throw", "__ZTISt9exception"],
)
def test_the_cxx_library_is_taken_on_trust_where_it_is_not_linked(tmp_path: Path, name: str) -> None:
    linker = Linker(tmp_path, ["_PyLong_FromSsize_t", name])
    assert linker.link(quick=True) == 1
    with pytest.raises(macos.Wrong, match=name):
        linker.link(quick=False)


def test_a_package_that_cannot_be_had_fails_no_run_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for ziglang\n")

    monkeypatch.setattr(macos, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", refused)
    for options, code in (["--optional"], 0), ([], 1):
        monkeypatch.setattr(sys, "argv", ["macos.py", "--torch", "torch==2.13.0", *options])
        assert macos.main() == code
        said = capsys.readouterr().out
        assert "NOT RUN" in said and "No matching distribution found for ziglang" in said

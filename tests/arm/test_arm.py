"""The CPU kernels for ARM without torch: cross-compiled and run under qemu, or, on an ARM machine, as they are.

A harness runs every entry of every table on the same numbers and prints the results (harness.cpp). Compared are the
levels with each other, and the portable ones of both kinds of machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerance import FLOOR

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
HARNESS = Path(__file__).with_name("harness.cpp")
ON_ARM = platform.machine() in ("aarch64", "arm64")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-iquote", str(ROOT / "csrc"))
KERNELS = ("kernels", "kernels_portable", "kernels_avx2", "kernels_avx512", "kernels_neon")
NEEDS = "(on Debian and Ubuntu: apt-get install qemu-user-static g++-aarch64-linux-gnu)"

# Entries of which a level of ARM promises portable's bits: those without a fused product. `softmax_update` and others
# with an exponential do not.
EXACT = (
    *("sum_rows", "arrange", "smallest", "all_signals", "response_weights", "factors", "log_ratio_sum", "read"),
    *("policy_loss.counts", "extremes", "fixed_total"),
)
BF16_SCORES = "attention_scores<bfloat16>"

pytestmark = pytest.mark.slow

Results = dict[tuple[str, str, str], NDArray[np.floating]]


def compile_harness(compiler: str, folder: Path, *flags: str, kernels: Sequence[str] = KERNELS) -> Path:
    """Compile the kernels as setup.py does, and the harness, of which GCC 12 for ARM makes nothing at -O3, at -O1."""
    folder.mkdir()
    sources = {name: (CPU / f"{name}.cpp", "-O3") for name in kernels} | {"harness": (HARNESS, "-O1")}
    runs = [
        subprocess.Popen([compiler, *FLAGS, *flags, level, "-c", source, "-o", folder / f"{name}.o"])
        for name, (source, level) in sources.items()
    ]
    codes = [run.wait() for run in runs]
    assert not any(codes), "the harness does not compile, see above"
    program = folder / "harness"
    subprocess.run([compiler, *flags, *(folder / f"{name}.o" for name in sources), "-o", program], check=True)
    return program


def run(*command: str | Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "VGPO_SIMD"} | variables
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"code {result.returncode}\n{result.stdout[-300:]}\n{result.stderr}"
    return result.stdout


def results(printed: str) -> Results:
    found: Results = {}
    for line in printed.splitlines():
        level, entry, case, kind, digits = line.split(" ")
        numbers = np.frombuffer(bytes.fromhex(digits), ">f4" if kind == "f" else ">f8")
        found[level, entry, case] = numbers.astype(numbers.dtype.newbyteorder("="))
    return found


def on_processor(name: str) -> list[str]:
    """The command before a program of ARM: nothing where this machine runs it."""
    if ON_ARM:
        return []
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        pytest.skip(f"there is no qemu-aarch64 {NEEDS}")
    return [qemu, "-cpu", name]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for ARM."""
    on_processor("max")
    compiler = shutil.which("c++" if ON_ARM else "aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip(f"there is no C++ compiler for ARM {NEEDS}")
    flags = [] if ON_ARM else ["-static"]  # no ARM libraries to load
    return compile_harness(compiler, tmp_path_factory.mktemp("arm") / "build", *flags)


@pytest.fixture(scope="module")
def found(harness: Path) -> Results:
    return results(run(*on_processor("max"), harness))


def differs(actual: NDArray[np.floating], expected: NDArray[np.floating], entry: str) -> str:
    """How an array of a level differs from portable's, or nothing."""
    if actual.tobytes() == expected.tobytes():
        return ""
    if entry.startswith(EXACT):
        return "not the same bits"
    if not np.array_equal(np.isnan(actual), np.isnan(expected)):
        return "NaN in other places"
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return "infinite in other places"
    actual, expected = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    # Both keep to FLOOR, as tests/tolerance.py has it. What is rounded to bfloat16 may be the next number.
    allowed = np.full_like(expected, 2 * FLOOR * max(1.0, np.abs(expected).max(initial=0.0)))
    if entry.endswith("gradient<bfloat16>"):
        allowed += 2.0**-7 * np.abs(expected)
    return f"off by {np.abs(actual - expected).max()}" if (np.abs(actual - expected) > allowed).any() else ""


def score_differs(scores: NDArray[np.floating], exact: NDArray[np.floating], bound: NDArray[np.floating]) -> str:
    """How scores differ from the exact ones by more than their bound, or nothing.

    Where products may leave the range of floats nothing is said: a fused one may come back into it.
    """
    if not np.isnan(scores[np.isnan(exact)]).all():
        return "not NaN where a component is, or where infinite products cancel"
    if np.isfinite(scores[np.isinf(exact)]).any():
        return "finite where a component is not"
    safe = np.isfinite(exact) & (bound < 1e29)
    error = np.abs(scores[safe].astype(np.float64) - exact[safe])
    return f"off by {error.max()}" if not (error <= bound[safe]).all() else ""


def test_levels_are_those_of_the_processor(harness: Path) -> None:
    def levels(processor: str, **variables: str) -> list[str]:
        return run(*on_processor(processor), harness, "levels", **variables).splitlines()

    names = levels("max")
    assert names[:2] == ["portable", "neon"] and names[-1] == f"in use: {names[-2]}"
    assert levels("max", VGPO_SIMD="neon") == [*names[:-1], "in use: neon"]
    if not ON_ARM:
        assert names[:-1] == ["portable", "neon", "neon-bf16"]
        assert levels("cortex-a57") == ["portable", "neon", "in use: neon"]


@pytest.mark.parametrize("level", ["neon", "neon-bf16"])
def test_levels_agree_with_portable(found: Results, level: str) -> None:
    compared = {key: values for key, values in found.items() if key[0] == level and "attention_scores" not in key[1]}
    if not compared:
        pytest.skip(f"this processor has no {level}")
    assert len(compared) > 3000
    wrong = {
        f"{entry} {case}": what
        for (_, entry, case), values in compared.items()
        if (what := differs(values, found["portable", entry, case], entry))
    }
    assert not wrong


@pytest.mark.parametrize("level", ["portable", "neon", "neon-bf16"])
@pytest.mark.parametrize("dtype", ["float", "bfloat16", "half"])
def test_scores_keep_to_their_bound(found: Results, level: str, dtype: str) -> None:
    """The bound of a chain of products in fp32; with bfloat16 instructions, also what they take for zero."""
    entry = f"attention_scores<{dtype}>"
    compared = {case: values for (name, of, case), values in found.items() if (name, of) == (level, entry)}
    if not compared:
        pytest.skip(f"this processor has no {level}")
    wrong = {
        case: what
        for case, scores in compared.items()
        if (what := score_differs(scores, found["exact", entry, case], found["bound", entry, case]))
    }
    assert not wrong
    alone = [values for (name, of, _), values in found.items() if (name, of) == (level, f"{entry}.alone")]
    assert alone and all(np.array_equal(first, second, equal_nan=True) for first, second in alone)


def test_bfloat16_instructions_change_scores_alone(found: Results) -> None:
    if ("neon-bf16", BF16_SCORES, "usual-64-664") not in found:
        pytest.skip("this processor has no neon-bf16")
    other = {
        entry
        for (level, entry, case), values in found.items()
        if level == "neon-bf16" and values.tobytes() != found["neon", entry, case].tobytes()
    }
    assert other == {BF16_SCORES, f"{BF16_SCORES}.alone"}


@pytest.mark.skipif(ON_ARM, reason="there is no other kind of machine here to compare with")
def test_portable_is_the_same_on_x86(found: Results, tmp_path: Path) -> None:
    native = compile_harness(
        "c++", tmp_path / "build", "-DVGPO_PORTABLE_ALONE", kernels=("kernels", "kernels_portable")
    )
    expected = results(run(native))
    assert len(expected) > 5000
    wrong = [
        f"{entry} {case}"
        for (level, entry, case), values in expected.items()
        if values.tobytes() != found[level, entry, case].tobytes()
    ]
    assert not wrong

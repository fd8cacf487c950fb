"""Choosing a backend: nested, in several threads, and in overlapping ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from vgpo_kernels import backend, backends

NAMES = [name for name in ("cpp", "triton") if backends.describe()["built"][name]]


def chosen() -> str | None:
    return backends.describe()["forced"]  # type: ignore[no-any-return]


def run_in_a_thread(function: object) -> None:
    """Run a function to its end in another thread, and raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.skipif(not backends.describe()["built"]["cpp"], reason="the C++ extension is not built")
def test_the_environment_names_a_level_that_there_is() -> None:
    program = "from vgpo_kernels import backends; print(backends.describe()['extension']['simd'])"
    levels = backends.describe()["extension"]["simd_levels"]
    refusal = f"ValueError: VGPO_SIMD must be one of {', '.join(levels)} on this processor, got 'AVX2'"
    for level, said in (("AVX2", refusal), (levels[0], levels[0])):
        environment = os.environ | {"VGPO_SIMD": level}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert said in result.stdout + result.stderr


def test_blocks_nest() -> None:
    outside = chosen()
    with backend("reference"):
        with backend("cpp"):
            assert chosen() == "cpp"
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), backend("triton"):
            _ = 1 / 0
        assert chosen() == "reference"
    assert chosen() == outside


def test_blocks_may_be_left_in_any_order() -> None:
    """As those of coroutines, and of threads: nothing stays forced when all have been left."""
    outside = chosen()
    first, second, third = backend("cpp"), backend("reference"), backend("cpp")
    for block in (first, second, third):
        block.__enter__()
    second.__exit__(None, None, None)
    assert chosen() == "cpp"
    third.__exit__(None, None, None)
    assert chosen() == "cpp"
    first.__exit__(None, None, None)
    assert chosen() == outside


def test_a_thread_may_not_choose_another_backend() -> None:
    outside = chosen()

    def other() -> None:
        with backend("cpp"):
            raise AssertionError("entered")

    with backend("reference"):
        with pytest.raises(RuntimeError, match=r"backend\('cpp'\) .* another thread is inside backend\('reference'\)"):
            run_in_a_thread(other)
        assert chosen() == "reference"
    assert chosen() == outside


def test_threads_may_share_a_backend() -> None:
    """The one that began first leaves first: the other one's block goes on, and nothing stays."""
    outside = chosen()
    inside, left = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with backend("reference"):
            inside.set()
            assert left.wait(30)
            seen.append(chosen())

    with backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(30)
    assert chosen() == "reference"
    left.set()
    thread.join()
    assert seen == ["reference"] and chosen() == outside


def test_many_threads_leave_nothing_forced() -> None:
    outside = chosen()
    start = threading.Barrier(8)
    seen = []

    def choose(name: str) -> None:
        start.wait(30)
        for _ in range(200):
            try:
                with backend(name):
                    seen.append((name, chosen()))
            except RuntimeError:
                continue

    threads = [threading.Thread(target=choose, args=(name,)) for name in ("cpp", "reference") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen and all(name == forced for name, forced in seen)
    assert chosen() == outside


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_block_chooses_for_itself(name: str) -> None:
    if name == "triton" and not backends.triton_interpreted():
        pytest.skip("Triton takes tensors of the CPU only in its interpreter")

    def inside(values: torch.Tensor) -> str:
        with backend(name):
            return backends.select(values.device)

    outside = chosen()
    assert torch.compile(inside, fullgraph=True, backend="eager")(torch.zeros(2)) == name
    assert chosen() == outside

"""Fixtures of the whole suite: backends to test, and memory that is never accidentally zero."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vgpo_kernels import backends

torch.manual_seed(0)


def pytest_configure() -> None:
    # The reference implementation would take over, and every test of what was built be skipped: green, nothing tested.
    refused = backends.describe()["refused"]
    if refused is not None:
        raise pytest.UsageError(refused)


def quicken_triton_interpreter() -> None:
    """Keep Triton's interpreter from patching its language anew in every call of a device function.

    The launch of a kernel has patched what its helpers see, and Triton's own helpers stay patched after their first
    call. Doing it again each time is more than half of the suite's time.
    """
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__
    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        namespace = self.fn.__globals__
        if namespace.get("tl") is language or id(namespace) in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(id(namespace))
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


if backends.describe()["built"]["triton"] and backends.triton_interpreted():
    quicken_triton_interpreter()


def available_backends() -> list[str]:
    """Return the backends that can run a test in this process: device and backend are one choice."""
    names = ["reference"]
    if backends.describe()["built"]["cpp"]:
        names.append("cpp")
    if torch.cuda.is_available():
        names += ["cuda"] if backends.describe()["built"]["cuda"] else []
        names.append("triton")
    elif backends.describe()["built"]["triton"] and backends.triton_interpreted():
        names.append("triton")
    chosen = os.environ.get("VGPO_TEST_BACKENDS")
    return names if chosen is None else [name for name in names if name in chosen.split(",")]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, leave out slow tests, and most cases of a test with many that Triton's interpreter runs.

    Of such cases the first stays, and every thirtieth. With VGPO_TEST_EVERYTHING=1 all tests stay; with another
    number, as in continuous integration, slow ones and one case of so many.
    """
    step = int(os.environ.get("VGPO_TEST_EVERYTHING") or 0)
    if not backends.triton_interpreted() or step == 1:
        return
    counts: dict[str, int] = {}
    kept, left_out = [], []
    for item in items:
        case = getattr(item, "callspec", None)
        interpreted = case is not None and "triton" in map(case.params.get, ("backend_name", "exact_backend"))
        name = item.nodeid.partition("[")[0]
        index = counts.get(name, 0)
        counts[name] = index + interpreted
        repeats = interpreted and bool(index % (step or 30))
        slow = not step and item.get_closest_marker("slow")
        (left_out if repeats or slow else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a failure to the file VGPO_TEST_FAILURES the moment it is known: a run that is killed has told it."""
    path = os.environ.get("VGPO_TEST_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a process of pytest-xdist whose GPU has been taken down: a new one takes the remaining tests."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"after {nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


@pytest.fixture(params=available_backends())
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per backend, with every call inside on that backend."""
    with backends.backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in available_backends() if name != "reference"])
def exact_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per compiled backend: those promise equal bits, the reference equality up to rounding."""
    with backends.backend(request.param):
        yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of the tensors that the test's backend takes here."""
    exact = "exact_backend" in request.fixturenames
    backend_name = request.getfixturevalue("exact_backend" if exact else "backend_name")
    on_gpu = backend_name == "cuda" or (backend_name == "triton" and not backends.triton_interpreted())
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(scope="module")
def drawn_backend() -> Iterator[str]:
    """Run a module of property tests on the backend that they are drawn on."""
    from drawn import BACKEND

    with backends.backend(BACKEND):
        yield BACKEND


@pytest.fixture(autouse=True)
def poison_empty_memory() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that an output left unwritten shows."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous

"""Benchmarks under pytest-benchmark: ``pytest benchmarks --benchmark-only [--record]``."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks import measure
from benchmarks.rows import append_csv
from vgpo_kernels import backends

ROWS = pytest.StashKey[list[measure.Row]]()
RESULTS = measure.ROOT / "benchmarks" / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        action="store_true",
        default=os.environ.get("VGPO_BENCH_RECORD", "0") == "1",
        help="append the rows to benchmarks/results/<cpu or gpu>.csv (also: VGPO_BENCH_RECORD=1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    refused = backends.describe()["refused"]
    if refused is not None:  # the reference would be measured in its place
        raise pytest.UsageError(refused)
    config.stash[ROWS] = []


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def speed(benchmark, request: pytest.FixtureRequest) -> Callable[[measure.Case], list[measure.Row]]:  # type: ignore[no-untyped-def]
    """Check a case, measure it round by round, and keep its rows for the table."""

    def run(case: measure.Case) -> list[measure.Row]:
        case.check()
        stopwatch = measure.Stopwatch(case)

        def op() -> None:
            case.run()
            measure.synchronize(case.device)

        benchmark.group = f"{case.op} {case.shape}"
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
        benchmark.pedantic(op, setup=stopwatch.others, rounds=measure.rounds_for(case))
        if benchmark.stats is None:  # --benchmark-disable
            return []
        rows = stopwatch.rows(list(benchmark.stats.stats.data))
        request.config.stash[ROWS] += rows
        return rows

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.ensure_newline()
    terminalreporter.section("speed")
    measure.print_table(rows)
    if config.getoption("--record"):
        path = RESULTS / "cpu.csv"
        append_csv(rows, path)
        terminalreporter.write_line(f"{len(rows)} rows appended to {path.relative_to(measure.ROOT)}")

"""Benchmarks under pytest-benchmark, on the CPU: ``pytest benchmarks --benchmark-only [--record]``."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from benchmarks import levels

levels.hold_torch()

import torch  # noqa: E402

from benchmarks import measure  # noqa: E402
from vgpo_kernels import backends  # noqa: E402

ROWS = pytest.StashKey[list[measure.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        action="store_true",
        default=os.environ.get("VGPO_BENCH_RECORD", "0") == "1",
        help="append the rows to benchmarks/results/cpu.csv (also: VGPO_BENCH_RECORD=1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    refused = backends.describe()["refused"]
    if refused is not None:  # the reference would be measured in its place
        raise pytest.UsageError(refused)
    wanted, found = os.environ.get("VGPO_SIMD"), backends.describe()["extension"] or {}
    if wanted is not None and wanted != found.get("simd"):
        raise pytest.UsageError(f"VGPO_SIMD is {wanted!r}, but {found.get('simd', 'no extension')} is in use")
    if wanted in levels.LIMITS:
        capability = torch.backends.cpu.get_cpu_capability()
        if capability.lower() != levels.LIMITS[wanted]["ATEN_CPU_CAPABILITY"] or found["bf16_products"]:
            raise pytest.UsageError(f"PyTorch was not held to {wanted}: it uses {capability}, or matrix units")
    config.stash[ROWS] = []
    # torch.compile's own use of torch.jit, which says nothing of what is measured.
    config.addinivalue_line("filterwarnings", r"ignore:`torch\.jit\.:DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand a benchmark every size and dtype that the ops of its module declare for CPUs."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    held = os.environ.get("VGPO_SIMD") in levels.LIMITS
    settings = [
        pytest.param(measure.Setting(op, size, dtype, torch.device("cpu")), id=f"{op.name}, {size}, {names[dtype]}")
        for op in metafunc.module.OPS
        for size in (op.held if held and op.held else op.cpu)
        for dtype in op.dtypes
    ]
    metafunc.parametrize("setting", settings)


@pytest.fixture
def speed(benchmark, request: pytest.FixtureRequest) -> Callable[[measure.Setting], list[measure.Row]]:  # type: ignore[no-untyped-def]
    """Check a case, measure it round by round, and keep its rows for the table."""

    def run(setting: measure.Setting) -> list[measure.Row]:
        torch.compiler.reset()  # of another case's shapes a peer would make dynamic ones, which may not even compile
        case = setting.case()
        case.check(case.run(), measure.TIGHT)
        for peer in case.peers.values():
            if peer.same and not peer.gpu_only:
                case.check(peer.run(), measure.LOOSE)
        stopwatch = measure.Stopwatch(setting, case)
        benchmark.group = f"{setting.op.name} {setting.size}"
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
        benchmark.pedantic(case.run, setup=stopwatch.others, rounds=stopwatch.rounds())
        if benchmark.stats is None:  # --benchmark-disable
            return []
        rows = stopwatch.rows(list(benchmark.stats.stats.data))
        request.config.stash[ROWS] += rows
        return rows

    return run


@pytest.hookimpl(trylast=True)  # at the end, below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.ensure_newline()
    terminalreporter.section("speed")
    measure.print_table(rows)
    if config.getoption("--record"):
        path = measure.RESULTS / "cpu.csv"
        measure.append_csv(rows, path)
        terminalreporter.write_line(f"{len(rows)} rows appended to {path.relative_to(measure.ROOT)}")

"""Measure every op on every backend of a GPU, at shapes of a 7B model, and append rows to benchmarks/results/gpu.csv.

    python benchmarks/gpu.py [--ops NAME ...] [--sizes first|others] [--shapes TEXT ...] [--backends NAME ...]
                             [--no-peers | --only-peers] [--peers TEXT ...] [--seconds NUMBER] [--table FILE]
    python benchmarks/gpu.py --list              # the ops, their shapes, and which peers are installed
    python benchmarks/gpu.py --quick             # small shapes
    python benchmarks/gpu.py --once              # one call an op, for a profiler to watch
    python benchmarks/gpu.py --dry-run           # small shapes on a CPU, to try the command itself

Every result is compared with the reference implementation before it is timed; one that is wrong gets no row. Rows are
written as they are measured, by a second process: where an op takes it down, the next op gets a new one. A time is the
median on the device, between events. Ops that never wait for the device, and their peers where these do not either, are
replayed from a CUDA graph of some twenty calls that go through several input sets, which at the larger shapes exceed
the cache together; ``host`` rows are calls from Python, one after the other. Shares are of a large copy, or of a large
product of bf16 matrices, measured in the same process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import cycle, islice, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import measure  # noqa: E402
from benchmarks.measure import Case, Op, Run, Setting, Speed  # noqa: E402
from vgpo_kernels import backend, backends  # noqa: E402

INPUT_SETS = 3
ROUNDS = 15  # of ops that take turns with their peers
CALLS = 21  # in a graph: launching it must not show
SLOW = 0.2  # seconds: such a call is timed once more, and its launches are not counted
LIMIT = 300  # seconds that an op may take on all its sizes and backends


def seconds_on_device(run: Run, device: torch.device, repeats: int) -> list[float]:
    """Times of single calls on the device, after warming up; of a slow call one, as it is when called again."""
    if measure.seconds_of(run, device) > SLOW:
        return [measure.seconds_of(run, device)]
    if device.type == "cpu":
        return [measure.seconds_of(run, device) for _ in range(repeats)]
    run()
    # The host runs ahead: waiting after each call would add to the next what it takes to launch.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def seconds_in_graph(runs: Sequence[Run], device: torch.device, repeats: int) -> list[float]:
    """Times of one call on the device: replays of a graph of ``CALLS`` of them in turn."""
    calls = CALLS if device.type == "cuda" else len(runs)

    def all_of_them() -> None:
        for run in islice(cycle(runs), calls):
            run()

    replay = all_of_them
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        replay = graph.replay
    return [seconds / calls for seconds in seconds_on_device(replay, device, repeats)]


def seconds_in_turn(runs: Sequence[Run], device: torch.device, rounds: int) -> list[list[float]]:
    """Times of single calls on the device, each run once a round, after a round that warms up."""
    for run in runs:
        run()
    times = [[measure.seconds_of(run, device) for run in runs] for _ in range(rounds)]
    return [list(of_one) for of_one in zip(*times, strict=True)]


def count_launches(run: Run, device: torch.device) -> int | None:
    """Kernels, copies and fills of a call."""
    if device.type == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


class Bench:
    """Measures ops. It is made in one process and used in another, so nothing touches the GPU before the first op."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.trial = options.quick or options.dry_run
        self.repeats = 3 if self.trial else 50
        self.failures: list[str] = []

    @cached_property
    def ceilings(self) -> dict[str, Speed]:
        """A large copy, bytes read and bytes written, and a large product of bf16 matrices."""
        words, length = (2**20, 256) if self.trial else (2**29, 8192)
        source = torch.randint(2**31 - 1, (words,), dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        left, right = (torch.randn(length, length, device=self.device).bfloat16() for _ in range(2))
        speeds = {}
        for name, unit, work, run, labels in (
            ("copy", "bytes", 8 * words, lambda: target.copy_(source), (f"{words} numbers", "int32")),
            ("product", "flops", 2 * length**3, lambda: left @ right, (f"{length} x {length} x {length}", "bfloat16")),
        ):
            seconds = seconds_on_device(run, self.device, self.repeats)
            speeds[unit] = Speed(name, unit, work / median(seconds))
            row = partial(measure.make_row, ("ceiling", *labels), self.device, f"ceiling: {name}")
            self.keep(row(seconds, {unit: work}, speeds[unit]))
        return speeds

    def keep(self, row: measure.Row) -> None:
        """Print a row, and write it."""
        speed = f"{row.tflop_per_s:.1f} TFLOP/s" if row.ceiling == "product" else f"{row.gb_per_s:.1f} GB/s"
        print(
            f"{row.op:45}{row.implementation:46}{row.ms:11.4f} ms {speed:>14} {row.percent_of_ceiling:6.1f}% of "
            f"{row.ceiling:8}{row.peak_mib or 0:9.1f} MiB {row.launches or '-':>5} launches  {row.shape}",
            flush=True,
        )
        if self.options.table is not None:
            measure.append_csv([row], self.options.table)

    def measure_op(self, op: Op) -> list[str]:
        """Measure an op at every chosen size, and return what failed."""
        warnings.filterwarnings("ignore", module="torch")
        self.failures = []
        # In a trial on a CPU compiling would take most of the time.
        with torch.compiler.set_stance("force_eager") if self.options.dry_run else nullcontext():
            for size in sizes_of(op, self.options):
                if time.monotonic() > self.options.deadline:
                    self.failures.append(f"{op.name}, {size}: not measured, the time is up")
                    break
                setting = Setting(op, size, op.dtypes[-1], self.device)
                if self.options.once:
                    self.call_once(setting)
                elif op.in_turn:
                    self.measure_in_turn(setting)
                else:
                    self.measure_at(setting, size in (op.gpu[0], op.small))
        return self.failures

    def call_once(self, setting: Setting) -> None:
        """Call an op on every backend, after a call that warms up."""
        case = setting.case()
        for name in self.options.backends:
            with backend(name):
                for _ in range(2):
                    case.run()
        measure.synchronize(self.device)

    def measure_at(self, setting: Setting, peers: bool) -> None:
        # Drawn with different seeds: a replay finds nothing of the one before in the cache.
        captured = setting.op.captured
        cases = [setting.case(seed) for seed in range(INPUT_SETS if captured else 1)]
        runs = [case.run for case in cases]
        in_turn = cycle(runs)
        from_host = partial(seconds_on_device, lambda: next(in_turn)())
        for name in self.options.backends:
            with backend(name):
                in_graph = partial(seconds_in_graph, runs) if captured else None
                if self.attempt(setting, cases[0], name, runs[0], measure.TIGHT, in_graph) and captured:
                    self.attempt(setting, cases[0], f"{name}, host", runs[0], None, from_host)
        wanted = self.options.peers
        for name, peer in cases[0].peers.items() if peers and not self.options.no_peers else ():
            if wanted and not any(text in name for text in wanted):
                continue
            same = [case.peers[name].run for case in cases]
            in_graph = partial(seconds_in_graph, same) if captured and peer.captured else None
            self.attempt(setting, cases[0], name, peer.run, measure.LOOSE if peer.same else None, in_graph)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_in_turn(self, setting: Setting) -> None:
        """Measure an op and its peers round by round, by the first backend; neither without the other."""
        if self.options.no_peers or not self.options.backends:
            return
        case, name = setting.case(), self.options.backends[0]
        runs = {name: case.run} | {other: peer.run for other, peer in case.peers.items()}
        with backend(name):
            rounds = seconds_in_turn(list(runs.values()), self.device, 3 if self.trial else ROUNDS)
            for (implementation, run), seconds in zip(runs.items(), rounds, strict=True):
                bound = measure.TIGHT if implementation == name else None
                self.attempt(setting, case, implementation, run, bound, lambda *_, seconds=seconds: seconds)

    def attempt(
        self,
        setting: Setting,
        case: Case,
        implementation: str,
        run: Run,
        bound: float | None,
        timed: Callable[[torch.device, int], list[float]] | None = None,
    ) -> bool:
        """Keep a row of a call whose result is right within ``bound``, or not looked at; return whether it was kept."""
        device = self.device
        what = f"{setting.op.name}, {setting.size}, {implementation}"
        try:
            if bound is not None:
                case.check(run(), bound)
            seconds = (timed or partial(seconds_on_device, run))(device, self.repeats)
            launches = None if min(seconds) > SLOW else count_launches(run, device)
            work, ceiling = {"bytes": case.bytes, "flops": case.flops}, self.ceilings[case.ceiling.unit]
            peak = measure.peak_mib(run, device)
            self.keep(measure.make_row(setting.labels, device, implementation, seconds, work, ceiling, peak, launches))
            return True
        except torch.cuda.OutOfMemoryError:
            print(f"{what}: does not fit the memory of this GPU", flush=True)
            torch.cuda.empty_cache()
        except Exception as error:
            self.failures.append(f"{what}: {'wrong: ' if isinstance(error, AssertionError) else ''}{error!r}")
            print(self.failures[-1], flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
                measure.synchronize(device)  # raises where the error has taken the device down
        return False


def each(target: Callable[[Any], Any], items: Sequence[Any], limit: float) -> Iterator[tuple[Any, Any]]:
    """Call ``target`` with each item in another process, and yield item and result.

    Where that process dies, or a call takes more than ``limit`` seconds, the result is a ``RuntimeError``, and the next
    item gets a new process.
    """
    context = multiprocessing.get_context("spawn")
    remaining = list(items)
    while remaining:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_serve, args=(sender, target, remaining[:]))
        worker.start()
        sender.close()  # so that the end of the process ends the pipe
        failure = None
        while remaining and failure is None:
            result = None
            if not receiver.poll(limit):
                worker.kill()
                failure = RuntimeError(f"took more than {limit} s")
            else:
                try:
                    result = receiver.recv()
                except EOFError:
                    worker.join()
                    failure = RuntimeError(f"the process died with code {worker.exitcode}")
            yield remaining.pop(0), failure or result
        worker.join()


def _serve(sender: Connection, target: Callable[[Any], Any], items: Sequence[Any]) -> None:
    for item in items:
        sender.send(target(item))


def sizes_of(op: Op, options: argparse.Namespace) -> list[Any]:
    if options.quick or options.dry_run:
        return [op.small]
    sizes = {None: op.gpu, "first": op.gpu[:1], "others": op.gpu[1:]}[options.sizes]
    return [size for size in sizes if not options.shapes or any(text in str(size) for text in options.shapes)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    ops = [op.name for op in measure.all_ops()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops, metavar="NAME")
    parser.add_argument("--sizes", choices=("first", "others"), help="the first shape of each op, or the others")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="only shapes with one of these texts in them")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that are built")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only-peers", action="store_true")
    parser.add_argument("--peers", nargs="+", metavar="TEXT", help="only peers with one of these texts in their names")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no shape after so many")
    parser.add_argument("--list", action="store_true", help="print ops, shapes and peers' libraries, and stop")
    parser.add_argument("--quick", action="store_true", help="small shapes; no rows are written but to --table")
    parser.add_argument("--once", action="store_true", help="one call an op, after one that warms up; no times")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on a CPU, by the backend cpp")
    parser.add_argument("--table", type=Path, metavar="FILE", help="default: benchmarks/results/gpu.csv")
    options = parser.parse_args(arguments)
    if options.table is None and not (options.quick or options.dry_run):
        options.table = measure.RESULTS / "gpu.csv"
    options.deadline = time.monotonic() + options.seconds  # one clock for all processes
    wanted = ("cpp",) if options.dry_run else ("cuda", "triton")
    built = backends.describe()["built"]
    options.backends = [] if options.only_peers else options.backends or [name for name in wanted if built[name]]
    return options


def main() -> None:
    options = parse()
    ops = {op.name: op for op in measure.all_ops()}
    absent = [library for library in measure.LIBRARIES if not measure.installed(library)]
    if options.list:
        for op in ops.values():
            print(op.name, *op.gpu, sep="\n    ")
    print(f"not installed, and not measured: {', '.join(absent)}" if absent else "all peers are installed", flush=True)
    if options.list:
        return
    if options.once:  # a profiler attaches to one process faster than to two
        for name in options.ops:
            Bench(options).measure_op(ops[name])
        return
    failures = []
    for op, result in each(Bench(options).measure_op, [ops[name] for name in options.ops], LIMIT):
        failures += [f"{op.name}: {result}"] if isinstance(result, Exception) else result
    if failures:
        sys.exit("\n".join([f"{len(failures)} failed:", *failures]))


if __name__ == "__main__":
    main()

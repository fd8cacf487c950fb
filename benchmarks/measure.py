"""What benchmarks share: how an op is declared, how its times become rows, and the table of rows.

Each ``bench_<stem>.py`` declares its ops in ``OPS``. ``pytest benchmarks --benchmark-only`` measures them on the CPU,
``benchmarks/gpu.py`` on a GPU. Both compare a result with the reference implementation before they time the call, and
both write the same columns.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import backend, backends

Run = Callable[[], Any]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXTENSION: Any = sys.modules.get("vgpo_kernels._C")  # None where it is not built: a GPU can do without

# Libraries that are measured beside ours where they are installed.
LIBRARIES = ("liger_kernel", "cut_cross_entropy", "quack", "trl", "verl")
# Largest errors of results, relative to their size: of ours, and of peers that compute in bf16.
TIGHT, LOOSE = 1e-5, 0.03


# ---- declarations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """Something that no op doing as much work can beat by much, measured beside it on a CPU.

    Against a GPU's ops stand a large copy where ``unit`` is bytes, and a large matrix product where it is flops.
    """

    name: str
    unit: str  # "bytes" or "flops", as in Case
    work: int  # what one run stands for, in that unit
    run: Run


@dataclass(frozen=True)
class Peer:
    """Another implementation, or something to compare an op's time with."""

    run: Run
    same: bool = True  # gives the op's result, so it is checked before it is timed
    gpu_only: bool = False
    captured: bool = True  # fits a CUDA graph, where the op does


@dataclass(frozen=True)
class Case:
    """An op with inputs of one size: its call, its check, its peers, and the least that it has to do."""

    run: Run
    check: Callable[[Any, float], None]  # raises unless a result is right within an error relative to its size
    ceiling: Ceiling
    bytes: int  # fewest that must move
    flops: int = 0  # fewest operations, where they are counted
    peers: dict[str, Peer] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An op as it is measured on every device."""

    name: str
    make: Callable[[Any, torch.dtype, torch.device, int], Case]  # from a size, a dtype, a device and a seed
    cpu: tuple[Any, ...]  # sizes for CPUs; str() of one is the shape in the table
    gpu: tuple[Any, ...]  # sizes for GPUs, of a 7B model; peers are measured at the first
    small: Any  # size for a trial
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # of the inputs; GPUs take the last
    captured: bool = True  # fits a CUDA graph: it never waits for the device
    least_rounds: int = 11  # on CPUs; fewer only where a round takes seconds
    held: tuple[Any, ...] = ()  # sizes below a CPU's best level (levels.py), where those of `cpu` take minutes
    in_turn: bool = False  # its peers take turns with it on GPUs, too, and at every size


@dataclass(frozen=True)
class Setting:
    """An op, a size, a dtype and a device: what a group of rows is about."""

    op: Op
    size: Any
    dtype: torch.dtype
    device: torch.device

    def case(self, seed: int = 0) -> Case:
        return self.op.make(self.size, self.dtype, self.device, seed)

    @property
    def labels(self) -> tuple[str, str, str]:
        """Op, shape and dtype as a row has them."""
        return self.op.name, str(self.size), str(self.dtype).removeprefix("torch.")


def all_ops() -> list[Op]:
    """Return the ops of every ``bench_<stem>.py``."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [op for name in names for op in import_module(f"benchmarks.{name}").OPS]


class Tokens(NamedTuple):
    """A padded batch of per-token numbers."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


# Responses and their tokens in rollouts of a 7B model.
GPU_TOKENS = (Tokens(8, 2048), Tokens(32, 2048), Tokens(2, 32768))


def normals(seed: int, device: torch.device) -> Callable[..., Tensor]:
    """Return a source of normal fp32 numbers: ``normal(*sizes)``."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes: torch.randn(*sizes, generator=generator, device=device)


def by_reference(run: Run) -> Any:
    """Return what a call gives with the reference implementation, which computes in fp64."""
    with backend("reference"):
        return run()


def with_gradient(loss: Callable[[Tensor], Tensor], logp: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss and its gradient w.r.t. logp, which is a new leaf: it belongs to the stream of this call."""
    leaf = logp.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def compare(name: str, found: Tensor, exact: Tensor, bound: float) -> None:
    """Fail if an error is larger than ``bound`` times the largest magnitude of ``exact``."""
    unit = exact.abs().max()
    assert_close(found.to(exact.device) / unit, exact / unit, name=name, floor=bound)


def read_ceiling(tensor: Tensor) -> Ceiling:
    """Read a tensor once, with all threads and vector loads."""
    return Ceiling("read", "bytes", tensor.numel() * tensor.element_size(), lambda: EXTENSION.read_memory(tensor))


def copy_ceiling(size: int) -> Ceiling:
    """Copy memory so that ``size`` bytes move in all, half of them read and half written."""
    source = torch.ones(size // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return Ceiling("copy", "bytes", size, lambda: EXTENSION.copy_memory(source, target))


def installed(library: str) -> bool:
    return find_spec(library) is not None


# ---- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a table in benchmarks/results: an implementation of an op, or a ceiling."""

    date: str
    commit: str
    device: str
    torch: str
    op: str
    implementation: str
    shape: str
    dtype: str
    ms: float  # what the rates follow from: on a CPU the fastest call, on a GPU the median
    median_ms: float
    gb_per_s: float | None  # by the fewest bytes
    tflop_per_s: float | None  # by the fewest operations, where they are counted
    ceiling: str  # what the share refers to, measured in the same run
    percent_of_ceiling: float
    peak_mib: float | None  # most memory that the call held beyond its inputs, result included
    launches: int | None  # of kernels, copies and fills, on a GPU


class Speed(NamedTuple):
    """A measured ceiling."""

    name: str
    unit: str
    per_second: float


def make_row(
    labels: tuple[str, str, str],
    device: torch.device,
    implementation: str,
    seconds: Sequence[float],
    work: dict[str, int],
    ceiling: Speed,
    peak_mib: float | None = None,
    launches: int | None = None,
) -> Row:
    """Make a row of op, shape and dtype, the times of single calls, and the bytes and flops of one."""
    op, shape, dtype = labels
    # Other processes disturb a measurement on a CPU, and only ever lengthen it.
    chosen = min(seconds) if device.type == "cpu" else median(seconds)
    rates = {unit: amount / chosen for unit, amount in work.items() if amount}
    return Row(
        date=date.today().isoformat(),
        commit=commit(),
        device=device_name(device),
        torch=torch.__version__,
        op=op,
        implementation=implementation,
        shape=shape,
        dtype=dtype,
        ms=_digits(chosen * 1e3),
        median_ms=_digits(median(seconds) * 1e3),
        gb_per_s=_digits(rates["bytes"] / 1e9) if "bytes" in rates else None,
        tflop_per_s=_digits(rates["flops"] / 1e12) if "flops" in rates else None,
        ceiling=ceiling.name,
        percent_of_ceiling=round(100 * rates[ceiling.unit] / ceiling.per_second, 1),
        peak_mib=None if peak_mib is None else round(peak_mib, 2),
        launches=launches,
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def append_csv(rows: Sequence[Row], path: Path) -> None:
    """Append rows to a CSV file, which gets its heading when it is new.

    Raises:
        ValueError: The file has other columns.

    """
    columns = [column.name for column in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(f"{path} has the columns {', '.join(found)}, not {', '.join(columns)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def device_name(device: torch.device) -> str:
    """Name a GPU and its driver, or a processor with the threads and vector instructions in use."""
    if device.type == "cuda":
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return torch.cuda.get_device_name(device) + (f", driver {driver}" if driver else "")
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else _said("sysctl", "-n", "machdep.cpu.brand_string")
    extension = backends.describe()["extension"] or {}
    model = model or platform.processor() or platform.machine()
    level = extension.get("simd", "no extension") + (", AMX" if extension.get("bf16_products") else "")
    return f"{model}, {torch.get_num_threads()} threads, {level}"


def commit() -> str:
    """Abbreviated commit of the working tree, marked where files differ from it; empty outside a repository.

    A copy of the tree without its history is told the commit by VGPO_COMMIT.
    """
    return os.environ.get("VGPO_COMMIT") or _said(
        "git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"
    )


@cache
def _said(*command: str) -> str:
    """First line that a program prints, which is run once; empty without the program."""
    if shutil.which(command[0]) is None:
        return ""
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return lines[0] if lines else ""


# ---- time and memory ---------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for a device's work; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device) -> float:
    """Time one call by the host's clock, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def peak_mib(run: Run, device: torch.device) -> float | None:
    """Most memory that a call holds beyond what was held before it; ``None`` where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    # Pages that the allocator has kept from earlier calls would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before_kib = _status_kib("VmRSS")
    run()
    return float(_status_kib("VmHWM") - before_kib) / 2**10


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Stopwatch:
    """Times the ceiling and the peers of a case around the calls of its op, round by round, on the CPU."""

    # Peers may be a hundred times slower: a few rounds of them are enough.
    PEER_ROUNDS = 5

    def __init__(self, setting: Setting, case: Case) -> None:
        self.setting, self.case = setting, case
        runs = {name: peer.run for name, peer in case.peers.items() if not peer.gpu_only}
        self.ceiling: list[float] = []
        self.peers: dict[str, list[float]] = {name: [] for name in runs}
        for run in (case.run, case.ceiling.run, *runs.values()):
            run()  # compiles, and takes memory from the system
        self.peaks = {name: peak_mib(run, setting.device) for name, run in {"ours": case.run, **runs}.items()}

    def rounds(self, seconds: float = 3.0) -> int:
        """How many rounds of ceiling and op fit into a time, at least the op's least."""
        once = sum(seconds_of(run, self.setting.device) for run in (self.case.run, self.case.ceiling.run))
        return max(self.setting.op.least_rounds, min(301, int(seconds / once)))

    def others(self) -> None:
        """Time a round of everything but the op: peers first, so that the ceiling stands right before the op."""
        device = self.setting.device
        for name, times in self.peers.items():
            if len(times) < min(self.PEER_ROUNDS, self.setting.op.least_rounds):
                times.append(seconds_of(self.case.peers[name].run, device))
        self.ceiling.append(seconds_of(self.case.ceiling.run, device))

    def rows(self, ours: list[float]) -> list[Row]:
        """Make the rows of a case from the op's times in the rounds whose others were timed."""
        case, ceiling = self.case, self.case.ceiling
        speed = Speed(ceiling.name, ceiling.unit, ceiling.work / min(self.ceiling))
        work = {"bytes": case.bytes, "flops": case.flops}
        row = partial(make_row, self.setting.labels, self.setting.device)
        return [
            row("vgpo_kernels", ours, work, speed, self.peaks["ours"]),
            row(f"ceiling: {ceiling.name}", self.ceiling, {ceiling.unit: ceiling.work}, speed),
            *(row(name, times, work, speed, self.peaks[name]) for name, times in self.peers.items()),
        ]


# What the table of a CPU has, row by row and column by column.
LEGEND = {
    "vgpo_kernels": "the op as this library computes it on this machine; its result was compared with the reference",
    "ceiling": "what the machine can do: memory read or copied, or a matrix product, timed right before the op",
    "other rows": "the same by PyTorch, torch.compile and other libraries, compared too; or a familiar op beside it",
    "ms, median ms": "the fastest call, and the median of all; other processes only ever make a call longer",
    "GB/s, GFLOP/s": "by the fewest bytes and operations that the op takes; the ceiling's by what it moves or computes",
    "of ceiling": "share of the ceiling's rate: 100% is as fast as the machine can, and more is noise. A ceiling may "
    "move more than the op does, so that its ms may be more than the op's: compare rates with it, not times",
    "peak MiB": "most memory that a call held beyond its inputs, its result included",
    "time / ours": "how many times as long as vgpo_kernels: above 1 it is slower",
}


def print_table(rows: Sequence[Row], console: Any = None) -> None:
    """Print the rows of a CPU as one table, a section an op, shape and dtype, and what is in it."""
    # Not at the top: a machine with a GPU may have little more than torch.
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0].device}, torch {rows[0].torch}", title_justify="left")
    table.add_column("op and shape", overflow="fold")
    for heading in ("implementation", "ms", "median ms", "GB/s", "GFLOP/s", "of ceiling", "peak MiB", "time / ours"):
        table.add_column(heading, justify="left" if heading == "implementation" else "right")
    for _, same in groupby(rows, key=lambda row: (row.op, row.shape, row.dtype)):
        group = list(same)
        table.add_section()
        label = f"[bold]{group[0].op}[/bold] {group[0].dtype}\n{group[0].shape}"
        for row in group:
            ours = row is group[0]
            table.add_row(
                label if ours else "",
                row.implementation,
                f"{row.ms:.3f}",
                f"{row.median_ms:.3f}",
                "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
                "" if row.tflop_per_s is None else f"{1e3 * row.tflop_per_s:.1f}",
                f"{row.percent_of_ceiling:.0f}%",
                "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                "" if ours else f"{row.ms / group[0].ms:.2f}",
                style="green" if ours else None,
            )
    console = console or Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width of its own
    console.print(table)
    legend = Table.grid("name", "text", padding=(0, 2))
    for name, text in LEGEND.items():
        legend.add_row(name, text)
    console.print(legend)

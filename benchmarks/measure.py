"""What every benchmark shares: batches, ceilings, interleaved timing, peak memory, the table and the CSV rows.

Nothing here knows pytest or a backend: a benchmark module builds a :class:`Case` for any device, pytest (through
``benchmarks/conftest.py``) or a script (through :func:`measure`) runs it.

Other processes disturb a measurement, and only ever lengthen it. So ceilings, op and peers take turns, round by round,
and each is represented by its fastest round; the median is recorded beside it.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Run = Callable[[], object]
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class RolloutShape:
    """A padded rollout batch: `batch` rows of `length` hidden states, `visual` image and `response` tokens each."""

    batch: int
    length: int
    features: int
    visual: int
    response: int
    group: int = 4  # responses to one prompt

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.features}, {self.visual} visual + {self.response} response"


# Qwen2.5-VL-7B's shape, and one order smaller for CPUs.
FULL_SHAPE = RolloutShape(batch=8, length=3072, features=3584, visual=1024, response=2048)
CPU_SHAPE = RolloutShape(batch=8, length=3072, features=2048, visual=768, response=2048)


@dataclass(frozen=True)
class Rollout:
    """The tensors of a rollout batch."""

    hidden: Tensor  # [B, S, D]
    visual_mask: Tensor  # [B, S]
    response_mask: Tensor  # [B, T]
    group_ids: Tensor  # [B]
    logp: Tensor  # [B, T], requires gradient
    old_logp: Tensor  # [B, T]
    advantages: Tensor  # [B]


def make_rollout(shape: RolloutShape, dtype: torch.dtype, device: torch.device) -> Rollout:
    """Draw a batch: image tokens first, text between, response tokens last."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    logp = -normal(shape.batch, shape.response).abs()
    return Rollout(
        hidden=normal(shape.batch, shape.length, shape.features, dtype=dtype),
        visual_mask=(torch.arange(shape.length, device=device) < shape.visual).repeat(shape.batch, 1),
        response_mask=torch.ones(shape.batch, shape.response, dtype=torch.bool, device=device),
        group_ids=torch.arange(shape.batch, device=device) // shape.group,
        old_logp=logp + 0.1 * normal(shape.batch, shape.response),
        logp=logp.requires_grad_(),
        advantages=normal(shape.batch),
    )


@dataclass(frozen=True)
class Ceiling:
    """A memory operation that nothing touching as many bytes can beat by much."""

    name: str
    bytes: int
    run: Run


def read_ceiling(tensor: Tensor) -> Ceiling:
    """Read a tensor once: with all threads and vector loads on the CPU, by a reduction on a GPU."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu":
        from vgpo_kernels import _C

        return Ceiling("read", size, lambda: _C.read_memory(tensor))
    words = tensor.view(-1).view(torch.int32)
    return Ceiling("read", size, lambda: words.amax())


def copy_ceiling(size: int, device: torch.device) -> Ceiling:
    """Copy memory so that ``size`` bytes move in all, half of them read and half written."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    if device.type == "cpu":
        from vgpo_kernels import _C

        return Ceiling("copy", size, lambda: _C.copy_memory(source, target))
    return Ceiling("copy", size, lambda: target.copy_(source))


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    ``bytes`` are the fewest that must move, ``flops`` the fewest operations. ``check`` raises unless the result is
    right; it runs before anything is timed. The first ceiling is the one that the share refers to.
    """

    op: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    bytes: int
    run: Run
    check: Run
    ceilings: tuple[Ceiling, ...]
    flops: int = 0
    peers: dict[str, Run] = field(default_factory=dict)
    least_rounds: int = 11  # fewer only where a round takes seconds


@dataclass(frozen=True)
class Row:
    """One line of the CSV file: an implementation of an op, or a ceiling."""

    date: str
    commit: str
    device: str
    torch: str
    op: str
    implementation: str
    shape: str
    dtype: str
    ms: float  # fastest round, as all that follows from it
    median_ms: float
    gb_per_s: float
    percent_of_ceiling: float
    peak_mib: float | None  # beyond the inputs, result included
    times_ours: float  # its time by ours
    gflop_per_s: float | None  # by the fewest operations; none for a ceiling


class Stopwatch:
    """Times the ceilings and peers of a case around the calls of its op, round by round."""

    # Peers may be a hundred times slower: a few rounds of them are enough.
    PEER_ROUNDS = 5

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ceilings: dict[str, list[float]] = {ceiling.name: [] for ceiling in case.ceilings}
        self.peers: dict[str, list[float]] = {name: [] for name in case.peers}
        for run in (case.run, *(ceiling.run for ceiling in case.ceilings), *case.peers.values()):
            run()  # compiles, and takes memory from the system
        self.peaks = {name: peak_mib(run, case.device) for name, run in {"ours": case.run, **case.peers}.items()}

    def time(self, run: Run) -> float:
        """Seconds that one call takes, the device's work included."""
        synchronize(self.case.device)
        begin = time.perf_counter()
        run()
        synchronize(self.case.device)
        return time.perf_counter() - begin

    def others(self) -> None:
        """Time a round of everything but the op: peers first, so that the ceiling stands right before the op."""
        for name, run in self.case.peers.items():
            if len(self.peers[name]) < min(self.PEER_ROUNDS, self.case.least_rounds):
                self.peers[name].append(self.time(run))
        for ceiling in self.case.ceilings:
            self.ceilings[ceiling.name].append(self.time(ceiling.run))

    def rows(self, ours: list[float]) -> list[Row]:
        """Make the rows of a case from the op's times in the rounds whose others were timed."""
        case = self.case
        ceiling_rate = case.ceilings[0].bytes / min(self.ceilings[case.ceilings[0].name])

        def row(name: str, size: int, times: list[float], peak: float | None = None, flops: int = 0) -> Row:
            fastest = min(times)
            return Row(
                date=date.today().isoformat(),
                commit=commit(),
                device=device_name(case.device),
                torch=torch.__version__,
                op=case.op,
                implementation=name,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                ms=round(fastest * 1e3, 4),
                median_ms=round(median(times) * 1e3, 4),
                gb_per_s=round(size / fastest / 1e9, 2),
                percent_of_ceiling=round(100 * size / fastest / ceiling_rate, 1),
                peak_mib=None if peak is None else round(peak, 2),
                times_ours=round(fastest / min(ours), 2),
                gflop_per_s=round(flops / fastest / 1e9, 2) if flops else None,
            )

        rows = [row("vgpo_kernels", case.bytes, ours, self.peaks["ours"], case.flops)]
        for ceiling in case.ceilings:
            rows.append(row(f"ceiling: {ceiling.name}", ceiling.bytes, self.ceilings[ceiling.name]))
        for name, times in self.peers.items():
            rows.append(row(name, case.bytes, times, self.peaks[name], case.flops))
        return rows


def rounds_for(case: Case, seconds: float = 3.0) -> int:
    """How many rounds of ceilings and op fit into a time, at least the case's least."""
    begin = time.perf_counter()
    for run in (case.run, *(ceiling.run for ceiling in case.ceilings)):
        run()
    synchronize(case.device)
    return max(case.least_rounds, min(301, int(seconds / (time.perf_counter() - begin))))


def measure(case: Case) -> list[Row]:
    """Check a case and measure it, without pytest."""
    case.check()
    stopwatch = Stopwatch(case)
    ours = []
    for _ in range(rounds_for(case)):
        stopwatch.others()
        ours.append(stopwatch.time(case.run))
    return stopwatch.rows(ours)


def synchronize(device: torch.device) -> None:
    """Wait for a device's work; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(run: Run, device: torch.device) -> float | None:
    """Most memory that a call holds beyond what was held before it; ``None`` where the system does not say."""
    gc.collect()
    if device.type == "cuda":
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


def device_name(device: torch.device) -> str:
    """Name a GPU, or a processor with the threads and vector instructions in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    from vgpo_kernels import backends

    extension = backends.describe()["extension"] or {}
    return f"{model}, {torch.get_num_threads()} threads, {extension.get('simd', 'no extension')}"


def commit() -> str:
    """Abbreviated commit of the working tree, marked where files differ from it; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def print_table(rows: Iterable[Row], console: Console | None = None) -> None:
    """Print rows as one table, a section an op, shape and dtype."""
    rows = list(rows)
    if not rows:
        return
    table = Table(title=f"{rows[0].device}, torch {rows[0].torch}", title_justify="left")
    table.add_column("op and shape", overflow="fold")
    for heading in ("implementation", "ms", "median ms", "GB/s", "GFLOP/s", "of ceiling", "peak MiB", "time / ours"):
        table.add_column(heading, justify="left" if heading == "implementation" else "right")
    shown = None
    for row in rows:
        case = (row.op, row.shape, row.dtype)
        if case != shown:
            table.add_section()
        label = "" if case == shown else f"[bold]{row.op}[/bold] {row.dtype}\n{row.shape}"
        shown = case
        ours = row.implementation == "vgpo_kernels"
        table.add_row(
            label,
            row.implementation,
            f"{row.ms:.3f}",
            f"{row.median_ms:.3f}",
            f"{row.gb_per_s:.1f}",
            "" if row.gflop_per_s is None else f"{row.gflop_per_s:.1f}",
            f"{row.percent_of_ceiling:.0f}%",
            "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
            "" if ours else f"{row.times_ours:.2f}",
            style="green" if ours else None,
        )
    console = console or Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width of its own
    console.print(table)

"""Measure the operators on every GPU backend at shapes of a 7B model, and append rows to benchmarks/results/gpu.csv.

    python benchmarks/gpu.py [--quick]

Every case is compared with the definition before it is timed; a case that is wrong gets no row. A time is the median
over replays of a CUDA graph that holds one call for each of several input sets (together larger than the cache), so it
is the time of the device; ``host`` rows are calls from Python, one after the other. Peers (benchmarks/peers.py):
vectorised PyTorch, eager and under torch.compile, and a loop over tokens that reads every cosine back to the host.
Losses are timed with their gradients.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import peers  # noqa: E402
from rows import append_csv  # noqa: E402
from tolerance import assert_close  # noqa: E402

import vgpo_kernels  # noqa: E402
from vgpo_kernels import VGPOConfig, backend, backends  # noqa: E402
from vgpo_kernels.config import PolicyLossOptions  # noqa: E402
from vgpo_kernels.reference import policy_loss as policy_reference  # noqa: E402
from vgpo_kernels.reference import vgpo_loss as whole_reference  # noqa: E402
from vgpo_kernels.reference import visual_focus as focus_reference  # noqa: E402
from vgpo_kernels.reference import visual_weights as weights_reference  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "gpu.csv"
CONFIG = VGPOConfig.paper()
OPTIONS = PolicyLossOptions()
GPU = torch.device("cuda")
BACKENDS = tuple(name for name in ("cuda", "triton") if backends.describe()["built"][name])


@dataclass(frozen=True)
class Row:
    """One measurement."""

    date: str
    commit: str
    device: str
    driver: str
    torch: str
    op: str
    variant: str
    shape: str
    ms: float
    gb_per_s: float
    share_of_copy: float  # of a device-to-device copy measured in the same run, bytes read and written
    launches: int | None  # of kernels, copies and fills; not counted for the loop over tokens
    peak_mib: float  # allocated by the call beyond its inputs


@dataclass(frozen=True)
class Inputs:
    """One padded batch: image tokens, then response tokens."""

    hidden: Tensor  # [B, S, D]
    visual_mask: Tensor
    response_mask: Tensor  # [B, T]
    group_ids: Tensor
    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    cos: Tensor
    factors: Tensor
    score: Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch."""

    batch: int
    image: int
    response: int
    features: int

    def __str__(self) -> str:
        return f"B={self.batch} image={self.image} response={self.response} D={self.features} bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch * self.response

    @property
    def row_bytes(self) -> int:
        return 2 * self.features


def draw(shape: Shape, seed: int) -> Inputs:
    generator = torch.Generator(device=GPU).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=GPU)

    rows = shape.image + shape.response
    hidden = torch.empty(shape.batch, rows, shape.features, dtype=torch.bfloat16, device=GPU)
    for response in hidden:
        response.copy_(normal(rows, shape.features) + 0.7 * normal(1, shape.features))
    visual = torch.zeros(shape.batch, rows, dtype=torch.bool, device=GPU)
    visual[:, : shape.image] = True
    mask = torch.ones(shape.batch, shape.response, dtype=torch.bool, device=GPU)
    groups = torch.arange(shape.batch, device=GPU) // 8
    logp = -normal(*mask.shape).abs()
    cos = vgpo_kernels.visual_focus(hidden, visual, mask)
    weights = vgpo_kernels.visual_weights(cos, mask, groups, CONFIG)
    old_logp = logp + 0.1 * normal(*mask.shape)
    return Inputs(
        hidden, visual, mask, groups, logp, old_logp, normal(shape.batch), cos, weights.factors, weights.score
    )


# ---- operators and peers -----------------------------------------------------------------------------------------

Call = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Case:
    """An operator, its peers, and the fewest bytes it must move."""

    op: str
    least_bytes: Callable[[Shape], int]
    call: Call
    peer: Call
    definition: Callable[[Inputs, torch.dtype], Tensor]
    loop: Call | None = None


def with_gradient(loss: Callable[[Inputs, Tensor], Tensor]) -> Call:
    """Return a call that computes a loss and its gradient by logp; the result is the loss."""

    def call(x: Inputs) -> Tensor:
        logp = x.logp.detach().requires_grad_()
        value = loss(x, logp)
        torch.autograd.grad(value, logp)
        return value.detach()

    return call


def policy_loss(x: Inputs, logp: Tensor) -> Tensor:
    return vgpo_kernels.policy_loss(logp, x.old_logp, x.advantages, x.response_mask, factors=x.factors).loss


def peer_policy_loss(x: Inputs, logp: Tensor) -> Tensor:
    return peers.loss(logp, x.old_logp, x.advantages, x.response_mask, x.factors)


def vgpo_loss(x: Inputs, logp: Tensor) -> Tensor:
    tokens = (logp, x.old_logp, x.advantages)
    return vgpo_kernels.vgpo_loss(x.hidden, *tokens, x.visual_mask, x.response_mask, x.group_ids, CONFIG).loss


def peer_vgpo_loss(x: Inputs, logp: Tensor) -> Tensor:
    with torch.no_grad():
        cos = peers.focus(x.hidden, x.visual_mask, x.response_mask)
        factors = peers.weights(cos, x.response_mask, x.group_ids)
    return peers.loss(logp, x.old_logp, x.advantages, x.response_mask, factors)


def define_vgpo_loss(x: Inputs, dtype: torch.dtype) -> Tensor:
    return whole_reference.vgpo_loss(
        hidden=x.hidden,
        logp=x.logp,
        old_logp=x.old_logp,
        advantages=x.advantages,
        visual_mask=x.visual_mask,
        response_mask=x.response_mask,
        group_ids=x.group_ids,
        config=CONFIG.as_floats(),
        options=OPTIONS.as_floats(),
        dtype=dtype,
    )[0]


CASES = (
    Case(
        "visual_prototype",
        lambda s: s.batch * (s.image * s.row_bytes + 4 * s.features),
        lambda x: vgpo_kernels.visual_prototype(x.hidden, x.visual_mask),
        lambda x: peers.prototype(x.hidden, x.visual_mask),
        lambda x, dtype: focus_reference.visual_prototype(x.hidden, x.visual_mask, dtype=dtype),
    ),
    Case(
        "visual_focus",
        lambda s: s.batch * (s.image + s.response) * s.row_bytes + 4 * s.tokens,
        lambda x: vgpo_kernels.visual_focus(x.hidden, x.visual_mask, x.response_mask),
        lambda x: peers.focus(x.hidden, x.visual_mask, x.response_mask),
        lambda x, dtype: focus_reference.visual_focus(x.hidden, x.visual_mask, x.response_mask, dtype=dtype),
        lambda x: peers.token_loop(x.hidden, x.visual_mask, x.response_mask),
    ),
    Case(
        "visual_weights",
        lambda s: s.tokens * (4 + 1 + 3 * 4),
        lambda x: vgpo_kernels.visual_weights(x.cos, x.response_mask, x.group_ids, CONFIG).factors,
        lambda x: peers.weights(x.cos, x.response_mask, x.group_ids),
        lambda x, dtype: weights_reference.visual_weights(
            x.cos, x.response_mask, x.group_ids, None, None, CONFIG.as_floats(), dtype=dtype
        )[0],
    ),
    Case(
        "group_weights",
        lambda s: s.batch * (4 + 8 + 4),
        lambda x: vgpo_kernels.group_weights(x.score, x.group_ids, CONFIG),
        lambda x: peers.group(x.score, x.group_ids),
        lambda x, dtype: weights_reference.group_weights(x.score, x.group_ids, None, CONFIG.as_floats(), dtype=dtype),
    ),
    Case(
        "policy_loss",
        lambda s: s.tokens * (3 * 4 + 1 + 4),
        with_gradient(policy_loss),
        with_gradient(peer_policy_loss),
        lambda x, dtype: policy_reference.policy_loss(
            logp=x.logp,
            old_logp=x.old_logp,
            advantages=x.advantages,
            response_mask=x.response_mask,
            factors=x.factors,
            options=OPTIONS.as_floats(),
            dtype=dtype,
        )[0],
    ),
    Case(
        "vgpo_loss",
        lambda s: s.batch * (s.image + s.response) * s.row_bytes + s.tokens * (2 * 4 + 1 + 4),
        with_gradient(vgpo_loss),
        with_gradient(peer_vgpo_loss),
        define_vgpo_loss,
    ),
)


# ---- measuring ---------------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median device time of ``run``, after warming up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def graph_ms(call: Call, sets: list[Inputs], repeats: int) -> float:
    """Device time of one call: replays of a graph with a call for each input set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(inputs)
    return median_ms(graph.replay, repeats) / len(sets)


def count_launches(call: Call, inputs: Inputs) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(inputs)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_mib(call: Call, inputs: Inputs) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(inputs)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gb_per_s(repeats: int) -> float:
    """A large device-to-device copy, counting bytes read and bytes written."""
    source = torch.randint(0, 2**31, (2**29,), dtype=torch.int32, device=GPU)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / median_ms(lambda: target.copy_(source), repeats) / 1e6


class Bench:
    """Measures cases and keeps their rows."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.copy = copy_gb_per_s(repeats)
        self.rows: list[Row] = []
        self.wrong: list[str] = []
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        device = torch.cuda.get_device_name()
        self.origin = (date.today().isoformat(), commit(), device, driver, torch.__version__)
        print(f"copy: {self.copy:.0f} GB/s on {device}", flush=True)

    def add(self, case: Case, variant: str, shape: Shape, ms: float, launches: int | None, peak: float) -> None:
        speed = case.least_bytes(shape) / ms / 1e6
        numbers = (round(ms, 5), round(speed, 1), round(speed / self.copy, 4), launches, round(peak, 1))
        row = Row(*self.origin, case.op, variant, str(shape), *numbers)
        self.rows.append(row)
        counted = "" if launches is None else f"{launches:5} launches"
        print(
            f"{row.op:17}{row.variant:14}{row.shape}  {row.ms:10.4f} ms  {row.gb_per_s:8.1f} GB/s  "
            f"{row.share_of_copy:6.1%}  {row.peak_mib:8.1f} MiB  {counted}",
            flush=True,
        )

    def add_call(self, case: Case, variant: str, shape: Shape, ms: float, call: Call, inputs: Inputs) -> None:
        self.add(case, variant, shape, ms, count_launches(call, inputs), peak_mib(call, inputs))

    def run(self, case: Case, shape: Shape, sets: list[Inputs], with_peers: bool) -> None:
        exact, narrow = (case.definition(sets[0], dtype) for dtype in (torch.float64, torch.float32))

        def right(call: Call) -> bool:
            """Compare with the definition; what is wrong is not timed."""
            try:
                assert_close(call(sets[0]), exact, narrow, name=case.op, floor=1e-4)
            except AssertionError as error:
                self.wrong.append(str(error))
                print(error, flush=True)
                return False
            return True

        in_turn = rotating(sets)
        for name in BACKENDS:
            with backend(name):
                if right(case.call):
                    self.add_call(case, name, shape, graph_ms(case.call, sets, self.repeats), case.call, sets[0])
                    host = median_ms(lambda: case.call(next(in_turn)), self.repeats)
                    self.add_call(case, f"{name}, host", shape, host, case.call, sets[0])
        if not with_peers:
            return
        for name, peer in (("eager", case.peer), ("torch.compile", torch.compile(case.peer, dynamic=False))):
            if right(peer):
                self.add_call(case, name, shape, median_ms(lambda peer=peer: peer(sets[0]), 20), peer, sets[0])
        if case.loop is not None and right(case.loop):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            peak = peak_mib(case.loop, sets[0])
            end.record()
            end.synchronize()
            self.add(case, "token loop", shape, begin.elapsed_time(end), None, peak)


def rotating(sets: list[Inputs]) -> Iterator[Inputs]:
    while True:
        yield from sets


def said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else ""


def commit() -> str:
    """Return the commit that is measured; a copy of the tree without its history is told it."""
    name = os.environ.get("VGPO_COMMIT") or said("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    return name + ("+changes" if said("git", "status", "--porcelain", "--untracked-files=no") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, no peers, and no row is kept")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", module="torch")
    small, usual = Shape(8, 128, 256, 512), Shape(8, 1024, 2048, 3584)
    bench = Bench(repeats=5 if quick else 50)
    shapes = [small] if quick else [usual, Shape(32, 1024, 2048, 3584), Shape(2, 1024, 32768, 3584)]
    for shape in shapes:
        # Together several times the cache, so that a replay finds nothing of the one before.
        with backend(BACKENDS[0]):
            sets = [draw(shape, seed) for seed in range(3)]
        for case in CASES:
            bench.run(case, shape, sets, with_peers=shape is usual)
        del sets
        torch.cuda.empty_cache()
    if not quick:
        append_csv(bench.rows, TABLE)
    if bench.wrong:
        sys.exit(f"{len(bench.wrong)} results are wrong and were not timed")


if __name__ == "__main__":
    main()

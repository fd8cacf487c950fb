"""Prove and measure everything on an NVIDIA GPU in a given number of minutes, without a network.

    python scripts/gpu_check.py [--minutes 8] [--out FOLDER] [--stages NAME ...] [--skip NAME ...]
    python scripts/gpu_check.py --plan        # the stages with their seconds
    python scripts/gpu_check.py --dry-run     # on a CPU, at small sizes, to try the command itself

The Python that runs it must have torch for CUDA; pytest, pytest-xdist and nvcc serve some of the stages. Rows, logs and
reports are in the folder as soon as they exist, so a run that is killed has lost nothing:

    check.log     what every stage printed, line by line, with the stage's name in front
    rows.csv      measured rows, as in benchmarks/results/gpu.csv
    counters.csv  hardware counters of a call of each of five ops
    failures.txt  tests that failed, and how
    cuda_tests.xml, triton_tests.xml   results of all tests that ended
    summary.txt   a line a stage

A stage is a process of its own with its seconds: a kernel that hangs or takes the context down costs that stage. Stages
that time have the GPU to themselves; the others overlap. What the remaining time does not allow is left out from the
end, and the summary says so.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import measure  # noqa: E402

CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
COUNTED = ("vgpo_loss", "visual_weights", "attention_mass", "attention_mass and its gradient", "linear_logprob")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
KERNELS = r"regex:^(visual|vgpo|policy|group|causal|attention|head|pair|token|response)_\w*kernel"


@dataclass(frozen=True, eq=False)
class Stage:
    """A command, what it waits for, and the seconds it may take."""

    name: str
    command: Sequence[str | Path]
    seconds: float  # at most
    least: float = 5  # it is left out where less remains
    after: tuple[str, ...] = ()  # stages that must have ended
    needs: tuple[str, ...] = ()  # stages that must have passed
    alone: bool = False  # nothing else runs meanwhile
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot run here


def tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path=CUDA_HOME / "bin")


def said(*command: str | Path) -> str:
    """What a program prints; empty where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else ""


def is_built() -> bool:
    """Whether an extension with CUDA kernels of these sources is there; asked in a process of its own."""
    code = "from vgpo_kernels import backends; print(backends.describe()['built']['cuda'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    return result.stdout.strip() == "True"


def stages(options: argparse.Namespace) -> Iterator[Stage]:
    """Plan of a run, most important first."""
    python, dry, out = sys.executable, options.dry_run, options.out
    trial = ["--dry-run"] if dry else []
    ours = "cpp" if dry else "cuda"
    bench = [python, ROOT / "benchmarks" / "gpu.py", "--table", out / "rows.csv", *trial]
    small = [python, ROOT / "scripts" / "gpu_small_cases.py", *trial]
    small_ops = ["--ops", "visual_focus", "visual_weights", "attention_mass"] if dry else []

    def timed(name: str, seconds: float, *arguments: str, missing: str = "") -> Stage:
        command = [*bench, "--seconds", str(seconds - 5), *small_ops, *arguments]
        return Stage(name, command, seconds, 20, after=("small cases",), alone=True, missing=missing)

    def peers(name: str, seconds: float, of_heads: bool) -> Stage:
        chosen = [op.name for op in measure.all_ops() if op.name.startswith("linear") == of_heads]
        command = [*bench, "--seconds", str(seconds - 20), "--only-peers", "--sizes", "first"]
        return Stage(name, [*command, *(small_ops or ["--ops", *chosen])], seconds, 20, alone=of_heads)

    def tests(name: str, backend: str, seconds: float, *chosen: str | Path) -> Stage:
        workers = 2 if dry else min(12, os.cpu_count() or 1)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "--tb=short"]
        command += ["--durations=0", "--durations-min=3", f"--junitxml={out / name.replace(' ', '_')}.xml"]
        command += ["-n", str(workers), "--dist", "worksteal"] if measure.installed("xdist") else []
        command += ["--timeout=90", "--timeout-method=thread"] if measure.installed("pytest_timeout") else []
        environment = {"VGPO_TEST_BACKENDS": backend, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        environment["VGPO_TEST_FAILURES"] = str(out / "failures.txt")
        missing = "" if measure.installed("pytest") else "there is no pytest"
        return Stage(name, [*command, *chosen], seconds, 10, ("small cases",), environment=environment, missing=missing)

    def sanitized(name: str, seconds: float) -> Stage:
        program = tool("compute-sanitizer")
        missing = "" if program and not dry else "there is no compute-sanitizer"
        # Only our kernels: torch's own would take most of the time.
        choice = "--kernel-name" if "--kernel-name " in said(program or "true", "--help") else "--kernel-regex"
        command = [program or "", "--tool", name, "--error-exitcode", "1", choice, "kernel_substring=vgpo", *small]
        if name == "racecheck":  # under which cuBLAS fails in products of 16-bit numbers
            command += ["--without", "LM head, torch.bfloat16", "LM head, torch.float16"]
        # Without torch's cache every tensor is an allocation of its own: an overrun cannot land in another.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(name, command, seconds, 20, ("small cases",), environment=environment, missing=missing)

    if not dry:
        environment = {"VGPO_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 1)}
        build = [python, ROOT / "setup.py", "build_ext", "--inplace"]
        yield Stage("build", [python, "-c", ""] if is_built() else build, 240, environment=environment)
    yield peers("peers", 120, of_heads=False)  # while the compilers leave the GPU idle
    yield Stage("small cases", small, 60, needs=() if dry else ("build",))
    yield timed("timings", 100, "--backends", ours, "--no-peers", "--sizes", "first")
    yield timed("long timings", 60, "--backends", ours, "--no-peers", "--sizes", "others")
    on_gpus = sorted((ROOT / "tests" / "cuda").glob("test_cuda_gpu*.py"))
    chosen = ["tests/ops/test_visual_weights.py"] if dry else ["tests/ops", *on_gpus, "-k", "cuda"]
    yield tests("cuda tests", ours, 150, *chosen)
    yield sanitized("memcheck", 150)
    yield sanitized("racecheck", 150)
    steps = [op.name for op in measure.all_ops() if op.in_turn and op.gpu]
    if not dry:  # where it would be the stages above once more
        yield timed("triton timings", 70, "--backends", "triton", "--no-peers", "--sizes", "first")
    yield timed("training step", 150, "--backends", ours, "--ops", *steps, missing="" if steps else "there is no TRL")
    yield counters(ours, out, dry)
    if not dry:
        yield peers("head peers", 150, of_heads=True)
        few = ["tests/ops/test_conformance.py", "tests/ops/test_visibility.py"]
        yield tests("triton tests", "triton", 120, *few)


def counters(ours: str, out: Path, dry: bool) -> Stage:
    """Hardware counters of five ops; the clocks are left as they are."""
    program = tool("ncu")
    command = [program or "", "--clock-control", "none", "--csv", "--log-file", out / "counters.csv"]
    command += ["--kernel-name", KERNELS, "--launch-count", "40"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, ROOT / "benchmarks" / "gpu.py", "--once", "--ops", *COUNTED]
    command += ["--sizes", "first", "--backends", ours]
    missing = "" if program and not dry else "there is no ncu"
    return Stage("counters", command, 90, 40, ("small cases",), alone=True, missing=missing)


class Runner:
    """Runs stages as they become possible, and writes what they print."""

    def __init__(self, plan: Sequence[Stage], out: Path, seconds: float) -> None:
        self.waiting, self.out = list(plan), out
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.running: dict[Stage, subprocess.Popen[str]] = {}
        self.began: dict[str, float] = {}
        self.outcomes: dict[str, str] = {}
        self.log = (out / "check.log").open("a", buffering=1)
        self.lock = threading.Lock()

    @property
    def now(self) -> float:
        return time.monotonic() - self.begin

    def write(self, stage: str, line: str) -> None:
        with self.lock:
            self.log.write(f"[{stage}] {line}\n")

    def note(self, stage: Stage, outcome: str) -> None:
        """Keep how a stage ended."""
        self.outcomes[stage.name] = outcome
        line = f"{self.now:6.0f} s  {stage.name:16}{outcome}"
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as file:
            file.write(line + "\n")

    def follow(self, stage: Stage, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.write(stage.name, line.rstrip("\n"))

    def start(self, stage: Stage) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        if "PYTHONPATH" in os.environ:
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        environment |= {"PYTHONUNBUFFERED": "1"} | stage.environment
        self.write(stage.name, f"$ {' '.join(map(str, stage.command))}")
        process = subprocess.Popen(
            [str(part) for part in stage.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that it dies with its own processes
        )
        self.began[stage.name] = self.now
        self.running[stage] = process
        threading.Thread(target=self.follow, args=(stage, process), daemon=True).start()

    def reap(self) -> None:
        """Note what has ended, and end what has had its seconds."""
        for stage, process in list(self.running.items()):
            took = self.now - self.began[stage.name]
            code = process.poll()
            if code is None and took < stage.seconds and time.monotonic() < self.end:
                continue
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            del self.running[stage]
            how = "passed" if code == 0 else "stopped: its time was up" if code is None else f"FAILED with code {code}"
            self.note(stage, f"{how}, {took:.0f} s")

    def blocked(self, stage: Stage) -> str:
        """Why a stage will never run, or nothing."""
        for name in stage.needs:
            outcome = self.outcomes.get(name)
            if outcome is not None and not outcome.startswith("passed"):
                return f"left out: {name} did not pass"
        if stage.missing:
            return f"skipped: {stage.missing}"
        if self.end - time.monotonic() < stage.least:
            return "left out: no time"
        return ""

    def ready(self, stage: Stage) -> bool:
        pending = {other.name for other in (*self.waiting, *self.running)} - {stage.name}
        if pending & {*stage.after, *stage.needs} or any(other.alone for other in self.running):
            return False
        return not (stage.alone and self.running)

    def run(self) -> bool:
        """Run all stages; return whether none failed."""
        while self.waiting or self.running:
            self.reap()
            for stage in list(self.waiting):
                reason = self.blocked(stage)
                if reason:
                    self.waiting.remove(stage)
                    self.note(stage, reason)
                elif self.ready(stage):
                    self.waiting.remove(stage)
                    self.start(stage)
                elif stage.alone:
                    break  # what comes later must not keep it waiting
            time.sleep(0.05)
        return not any("FAILED" in outcome for outcome in self.outcomes.values())


def main() -> int:
    """Run the plan, and print how each stage ended and the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="FOLDER")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="all but these")
    parser.add_argument("--plan", action="store_true", help="print the stages with their seconds, and stop")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at small sizes")
    options = parser.parse_args()
    options.out = options.out.resolve()
    plan = list(stages(options))
    unknown = {*(options.stages or ()), *options.skip} - {stage.name for stage in plan}
    if unknown:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in plan)}")
    plan = [
        stage for stage in plan if stage.name in (options.stages or (stage.name,)) and stage.name not in options.skip
    ]
    for stage in plan if options.plan or options.dry_run else ():
        print(f"{stage.name:16}{stage.seconds:6.0f} s at most{', alone' if stage.alone else ''}")
    if options.plan:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    passed = Runner(plan, options.out, 60 * options.minutes).run()
    print(table(options.out / "rows.csv"), flush=True)
    return 0 if passed else 1


def table(path: Path) -> str:
    """Rows as one screen of text."""
    if not path.exists():
        return "no row was measured"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for row in rows:
        name = f"{row['op']}, {row['shape']}"
        share = f"{float(row['percent_of_ceiling']):6.1f}% of {row['ceiling']}"
        lines.append(f"{name[:74]:75}{row['implementation'][:34]:35}{float(row['ms']):10.4f} ms {share}")
    return "\n".join(sorted(lines))


if __name__ == "__main__":
    sys.exit(main())

"""What turns measurements into rows, the table and pictures; no speed is measured here."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from benchmarks import bench_training_step, gpu, levels, measure, plot, shaping_peers
from benchmarks.measure import append_csv

SVG = "{http://www.w3.org/2000/svg}"


def rows(flops: int = 0) -> list[measure.Row]:
    """Rows of made-up times: op 2 ms, ceiling 0.5 ms for half the bytes, peer 6 ms."""
    tensor = torch.ones(1024)

    def make(size: int, dtype: torch.dtype, device: torch.device, seed: int) -> measure.Case:
        return measure.Case(
            run=tensor.sum,
            check=lambda found, bound: None,
            ceiling=measure.Ceiling("read", "bytes", 2048, tensor.amax),
            bytes=4096,
            flops=flops,
            peers={"peer <x>": measure.Peer(tensor.sum), "for GPUs": measure.Peer(tensor.sum, gpu_only=True)},
        )

    op = measure.Op("sum", make, cpu=(1024,), gpu=(), small=8)
    setting = measure.Setting(op, 1024, torch.float32, torch.device("cpu"))
    stopwatch = measure.Stopwatch(setting, setting.case())
    stopwatch.ceiling = [0.0005, 0.0006]
    stopwatch.peers["peer <x>"] = [0.007, 0.006]
    return stopwatch.rows([0.003, 0.002])


def test_rows_follow_from_the_fastest_rounds() -> None:
    ours, ceiling, peer = rows(flops=8_000_000)
    assert (ours.op, ours.shape, ours.dtype) == ("sum", "1024", "float32")
    assert (ours.ms, ours.median_ms, peer.ms) == (2.0, 2.5, 6.0)
    assert ours.percent_of_ceiling == 50.0  # 4096 bytes in 2 ms against 2048 in 0.5 ms
    assert (ours.tflop_per_s, ceiling.tflop_per_s, peer.tflop_per_s) == (0.004, None, 0.0013333)
    assert (ceiling.implementation, ours.ceiling, peer.ceiling) == ("ceiling: read", "read", "read")
    assert rows()[0].tflop_per_s is None


@pytest.mark.parametrize(("device", "ms"), [("cpu", 2.0), ("cuda", 3.0)])
def test_a_cpus_rate_is_of_the_fastest_call_and_a_gpus_of_the_median(device, ms, monkeypatch) -> None:
    monkeypatch.setattr(measure, "device_name", str)
    copy = measure.Speed("copy", "bytes", 1e6)
    times = [0.002, 0.003, 0.009]
    row = measure.make_row(("sum", "8", "float32"), torch.device(device), "ours", times, {"bytes": 1000}, copy)
    assert (row.ms, row.median_ms, row.percent_of_ceiling) == (ms, 3.0, round(100 / ms, 1))


def test_the_table_has_every_implementation_and_figure_and_says_what_they_are() -> None:
    output = io.StringIO()
    measure.print_table(rows(flops=8_000_000), Console(file=output))
    table, _, legend = output.getvalue().partition("└")
    for expected in ("sum", "vgpo_kernels", "ceiling: read", "peer <x>", "2.000", "50%", "4.0", "3.00"):
        assert expected in table
    headings = [heading.strip() for heading in table.splitlines()[2].strip("┃").split("┃")]
    explained = ", ".join(measure.LEGEND).split(", ")
    assert headings == ["op and shape", "implementation", *explained[explained.index("ms") :]]
    assert {"vgpo_kernels", "ceiling", "other rows"} <= set(explained)
    said = " ".join(legend.split())
    assert "so that its ms may be more than the op's: compare rates with it, not times" in said
    assert all(name in said and " ".join(text.split()) in said for name, text in measure.LEGEND.items())


def test_rows_are_appended_under_one_heading(tmp_path: Path) -> None:
    table = tmp_path / "new" / "cpu.csv"
    append_csv(rows(), table)
    append_csv(rows(), table)
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 6 and list(read[0]) == [column.name for column in fields(measure.Row)]
    table.write_text("date,op\n")
    with pytest.raises(ValueError, match="has the columns date, op, not date, commit"):
        append_csv(rows(), table)


def write(table: Path, *runs: list[dict[str, object]]) -> None:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(runs[0][0]))
        writer.writeheader()
        for run in runs:
            writer.writerows(run)


def changed(run: list[measure.Row], **changes: object) -> list[dict[str, object]]:
    return [asdict(row) | changes for row in run]


def test_the_latest_run_of_the_last_device_is_drawn(tmp_path: Path) -> None:
    run = rows()
    old = changed(run, device="here", ms=9.0)
    write(tmp_path / "cpu.csv", old, changed(run, device="elsewhere", shape="7"), changed(run, device="here"))
    (found,) = plot.read_cases(tmp_path / "cpu.csv")
    assert found.ms == {"vgpo_kernels": 2.0, "peer <x>": 6.0}
    assert found.ceiling == ("read", 1.0)  # half of ours, as the share says


@pytest.mark.slow
def test_each_case_is_drawn_at_the_best_level_of_the_last_machine(tmp_path: Path) -> None:
    table = tmp_path / "cpu.csv"
    devices = [("here, avx512", 1.0), ("there, avx512, AMX", 0.2), ("here, avx512, AMX", 0.5), ("here, avx512", 0.9)]
    run = [changed(rows(), device=device, ms=ms) for device, ms in devices]
    held = [changed(rows(), device=f"here, {level}", ms=3.0, shape="8") for level in ("avx2", "portable")]
    write(table, *run, *held)
    assert [(case.device, case.ours) for case in plot.read_cases(table)] == [("here, avx512, AMX", 0.5)]
    assert [(case.device, case.shape) for case in plot.read_cases(table, "avx2")] == [("here, avx2", "8")]
    assert {file.name for file in plot.pictures(tmp_path)} == {
        *("cpu.svg", "cpu_sum.svg", "cpu_avx2.svg", "cpu_portable.svg")
    }
    assert [levels.parts_of(name) for name in ("CPU, 2 threads, avx512, AMX", "a GPU, driver 1")] == [
        *(("CPU, 2 threads", "avx512, AMX"), ("a GPU, driver 1", ""))
    ]


def test_pictures_are_well_formed_and_true_to_scale(tmp_path: Path) -> None:
    write(tmp_path / "cpu.csv", changed(rows()))
    drawn = plot.pictures(tmp_path)
    assert {file.name for file in drawn} == {"cpu.svg", "cpu_sum.svg"}
    root = ElementTree.fromstring(drawn[tmp_path / "cpu_sum.svg"])
    ours, peer = (float(bar.get("width", 0)) for bar in root.iter(f"{SVG}rect") if bar.get("class") in ("ours", "peer"))
    assert peer == plot.BARS and ours == pytest.approx(peer / 3, abs=0.1)
    (line, *_) = root.iter(f"{SVG}line")
    origin = plot.MARGIN + plot.names_width(plot.read_cases(tmp_path / "cpu.csv"))
    assert float(line.get("x1", 0)) == pytest.approx(origin + peer / 6, abs=0.1)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"sum", "1024, float32", "peer <x>", "2.00 ms", "6.00 ms, 3.0\N{MULTIPLICATION SIGN}"} <= set(words)
    assert "prefers-color-scheme: dark" in drawn[tmp_path / "cpu.svg"]


def test_tables_of_gpus_are_drawn_too(tmp_path: Path) -> None:
    row = changed(rows(), shape="B=8", device="gpu", ceiling="copy", percent_of_ceiling=50.0, launches=2)[0]
    run = [{"implementation": "ceiling: copy", "op": "ceiling"}, {"implementation": "cuda", "ms": 0.04}]
    run += [{"implementation": "cuda, host", "ms": 0.05}, {"implementation": "PyTorch", "ms": 0.4}]
    write(tmp_path / "gpu.csv", [row | changes for changes in run])
    (found,) = plot.read_cases(tmp_path / "gpu.csv")
    assert found.ours == 0.04 and found.ceiling == ("copy", 0.02)
    assert "40.0 \N{MICRO SIGN}s" in plot.pictures(tmp_path)[tmp_path / "gpu_sum.svg"]


def test_the_composite_takes_one_case_of_each_operator() -> None:
    cases = plot.read_cases(plot.RESULTS / "cpu.csv")
    picked = plot.chosen(cases)
    assert [item.op for item in picked] == list(dict.fromkeys(item.op for item in cases))
    for item in picked:
        others = [other for other in cases if other.op == item.op and other.dtype == item.dtype]
        assert item.work == max(other.work for other in others)


def test_durations_have_three_digits() -> None:
    assert [plot.duration(ms) for ms in (12345.0, 1234.5, 150.4, 5.294, 0.7221, 0.00721)] == [
        *("12.3 s", "1.23 s", "150 ms", "5.29 ms", "722 \N{MICRO SIGN}s", "7.21 \N{MICRO SIGN}s")
    ]


def test_recorded_pictures_are_those_of_the_rows() -> None:
    assert not plot.stale(), "run benchmarks/plot.py"
    with (plot.RESULTS / "cpu.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [column.name for column in fields(measure.Row)]


def test_stale_pictures_are_named(tmp_path: Path) -> None:
    write(tmp_path / "cpu.csv", changed(rows()))
    (tmp_path / "cpu_gone.svg").write_text("")
    assert set(plot.stale(tmp_path)) == {"cpu.svg", "cpu_sum.svg", "cpu_gone.svg"}
    for file, content in plot.pictures(tmp_path).items():
        file.write_text(content)
    assert plot.stale(tmp_path) == ["cpu_gone.svg"]


# Implementations that the README's tables have beside vgpo_kernels', and how its rows call ours.
PEERS = {
    "cpu.csv": (
        "vgpo_kernels",
        {"vgpo_loss": "PyTorch", "linear_logprob": "PyTorch", "attention_mass": "eager attention"},
    ),
    "gpu.csv": (
        "cuda",
        {
            "vgpo_loss": "torch.compile in fp32",
            "linear_logprob": "TRL, chunked",
            "attention_mass": "cuDNN attention, all keys",
        },
    ),
}


def test_figures_in_the_readme_are_recorded_rows() -> None:
    """Each time, size and share is the last recorded one of its op, at a CPU's best level; there are no others."""
    text = (plot.ROOT / "README.md").read_text()
    figure = r"[\d.]+ (?:ms|MiB|%)"
    tables = re.findall(r"((?:^\| `\w+`, \d.*\n)+)", text, flags=re.MULTILINE)
    typed: list[str] = []
    for table, (file, (ours, peers)) in zip(tables, PEERS.items(), strict=True):
        recorded = {}
        best = [row for row in csv.DictReader((plot.RESULTS / file).open()) if levels.is_best(row["device"])]
        for row in sorted(best, key=lambda row: levels.rank(row["device"])):
            recorded[row["op"], row["implementation"], row["shape"], row["dtype"]] = row
        lines = re.findall(r"\| `(\w+)`, (.*?) \| (.*?) \| (.*?) \| (.*?) \|", table)
        assert [op for op, *_ in lines] == list(peers)
        for op, shape, own, other, share in lines:
            (peer,) = {name for known, name, *_ in recorded if known == op and name.split(" + ")[0] == peers[op]}
            for cell, implementation in ((own, ours), (other, peer)):
                row = recorded[op, implementation, shape, "bfloat16"]
                values = {"ms": row["ms"], "MiB": row["peak_mib"]}
                for number, unit in re.findall(r"([\d.]+) (ms|MiB)", cell):
                    assert float(number) == float(f"{float(values[unit]):.3g}"), f"{op} by {implementation}: {unit}"
            assert share.startswith(f"{float(recorded[op, ours, shape, 'bfloat16']['percent_of_ceiling']):.0f} %")
            typed += re.findall(figure, own + other + share)
    # The claim at the top rounds a row of the table, and there is the host's time of the same call.
    row = recorded["vgpo_loss", "cuda", "8 x 3072 x 3584, 1024 visual + 2048 response", "bfloat16"]
    host = recorded["vgpo_loss", "cuda, host", row["shape"], "bfloat16"]
    typed += [f"{float(row['ms']):.2g} ms", f"{float(host['ms']):.3g} ms", "0.22 ms"]
    prose = re.sub(r"^```.*?^```|<[^>]*>", "", text, flags=re.DOTALL | re.MULTILINE)
    assert sorted(re.findall(figure, prose)) == sorted(typed)


STEPS = {
    "TRL's GRPOTrainer",
    "VGPOTrainer without VGPO",
    "VGPO in a pass of its own",
    "VGPO by attention",
    "TRL's GRPOTrainer with old log-probs",
    "VGPOTrainer without VGPO, with old log-probs",
    "VGPO with old log-probs",
}
# What a dry run of the command for GPUs measures beside each op at least.
MEASURED_ON_GPUS = {
    "visual_prototype": {"PyTorch", "torch.compile"},
    "visual_focus": {"PyTorch in fp32", "torch.compile in fp32", "token loop"},
    "visual_focus, causal": set(),
    "visual_focus, unit_mean": {"every cosine", "PyTorch", "torch.compile"},
    "visual_weights": {"PyTorch", "torch.compile"},
    "group_weights": {"PyTorch", "torch.compile"},
    **{f"token_shaping, {name}": {"PyTorch", "torch.compile"} for name in shaping_peers.METHODS},
    "policy_loss": {"PyTorch, no metrics", "torch.compile, no metrics"},
    "vgpo_loss": {"PyTorch in fp32", "torch.compile in fp32"},
    "attention_mass": {
        "eager attention + segment sum",
        "torch.compile",
        "scaled_dot_product_attention",
        "flash attention",
        "flash attention, all keys",
        "flash attention to segments",
    },
    "attention_mass and its gradient": {
        "eager attention",
        "torch.compile",
        "flash attention and its gradient",
        "flash attention to segments",
    },
    "attention_heatmap": {"eager attention", "torch.compile", "flash attention's gradient w.r.t. values"},
    "linear_divergence": {"two linear_logprob", "PyTorch", "torch.compile", "products alone"},
    "linear_divergence and its gradient": {"two linear_logprob", "PyTorch", "torch.compile", "products alone"},
    "linear_divergence of JS and its gradient": {"PyTorch", "torch.compile", "products alone"},
    "linear_logprob with entropy": {"PyTorch", "torch.compile", "products alone"},
    "linear_logprob with entropy and its gradient": {"PyTorch", "torch.compile", "products alone"},
    "linear_logprob": {"PyTorch", "torch.compile", "products alone"},
    "linear_logprob and its gradient": {"PyTorch", "torch.compile", "products alone"},
    "linear_policy_loss and its gradient": {"PyTorch", "products alone"},
    **{
        f"linear_divergence{of}{by}": {"two linear_logprob", "PyTorch", "torch.compile", "products alone"}
        for of in ("", " of JS")
        for by in ("", " and its gradient")
    },
    "training step": STEPS,
    "training step at 7B's widths": STEPS,
}


@pytest.mark.slow
def test_the_command_for_gpus_measures_every_op_and_peer(tmp_path: Path) -> None:
    """A dry run: everything but what torch.cuda answers, at small shapes, each result checked."""
    table = tmp_path / "gpu.csv"
    command = [sys.executable, gpu.__file__, "--dry-run", "--table", table]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured: " in done.stdout or "all peers are installed" in done.stdout
    with table.open(newline="") as file:
        found = [(row["op"], row["implementation"]) for row in csv.DictReader(file)]
    assert len(set(found)) == len(found)
    assert {("ceiling", "ceiling: copy"), ("ceiling", "ceiling: product")} <= set(found)
    for op in measure.all_ops():
        ours = {"cpp", "cpp, host"} if op.captured else {"cpp"}
        missing = (ours | MEASURED_ON_GPUS[op.name]) - {name for other, name in found if other == op.name}
        assert not missing, f"{op.name} was not measured by {missing}"


def test_what_goes_wrong_with_one_op_leaves_the_others(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("first", "last")]
    codes = [f"open({str(made[0])!r}, 'w')", "import os; os._exit(3)", f"open({str(made[1])!r}, 'w')"]
    (_, first), (_, died), (_, last) = gpu.each(exec, codes, limit=300)
    assert first is None and last is None and all(path.exists() for path in made)
    assert str(died) == "the process died with code 3"
    ((_, late),) = gpu.each(exec, ["import time; time.sleep(60)"], limit=0.01)
    assert str(late) == "took more than 0.01 s"


def test_a_wrong_result_gets_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "gpu.csv"
    options = gpu.parse(["--dry-run", "--backends", "cpp", "--table", str(table)])
    tensor = torch.ones(1024)

    def make(size: int, dtype: torch.dtype, device: torch.device, seed: int) -> measure.Case:
        peers = {
            "right": measure.Peer(lambda: 1),
            "wrong": measure.Peer(lambda: 2),
            "broken": measure.Peer(lambda: 1 // 0),
            "other": measure.Peer(lambda: 2, same=False),
        }
        return measure.Case(lambda: 1, check, measure.Ceiling("read", "bytes", 1, tensor.amax), 4096, peers=peers)

    def check(found: int, bound: float) -> None:
        assert found == 1, "it is not 1"

    failures = gpu.Bench(options).measure_op(measure.Op("one", make, cpu=(), gpu=(8,), small=8))
    assert [failure.partition(":")[0] for failure in failures] == ["one, 8, wrong", "one, 8, broken"]
    with table.open(newline="") as file:
        found = [row["implementation"] for row in csv.DictReader(file) if row["op"] == "one"]
    assert found == ["cpp", "cpp, host", "right", "other"]


def step_rows(size: object, base: float) -> list[dict[str, object]]:
    """Rows of a training step of made-up times: TRL's, half of it for our head, and 3 ms and 1 MiB more for VGPO."""
    make = {"op": "training step", "shape": str(size), "dtype": "bfloat16", "device": "gpu"}
    times = {
        "cuda": (base / 2 + 3, 11.0),
        bench_training_step.TRL: (base, 20.0),
        bench_training_step.SAME_HEAD: (base / 2, 10.0),
        "ceiling: product": (1.0, None),
    }
    return [
        asdict(rows()[0]) | make | {"implementation": name, "median_ms": ms, "peak_mib": mib}
        for name, (ms, mib) in times.items()
    ]


@pytest.mark.slow
def test_the_share_of_vgpo_follows_from_rows_and_is_extrapolated_in_depth(tmp_path: Path) -> None:
    table = tmp_path / "gpu.csv"
    deep, shallow = bench_training_step.GPU_SIZES
    write(table, step_rows(deep, 100.0))
    measured = bench_training_step.read_steps(table)
    (share,) = bench_training_step.shares(measured[0])
    assert share == ("the loss", pytest.approx(-0.47), pytest.approx(0.06), 1.0)
    assert bench_training_step.extrapolated(measured) is None  # from one depth nothing follows
    write(table, step_rows(deep, 100.0), step_rows(shallow, 60.0))
    measured = bench_training_step.read_steps(table)
    whole = bench_training_step.extrapolated(measured)
    assert whole is not None and list(whole.ms.values()) == [293.0, 580.0, 290.0]  # 20 and 10 ms a layer
    *_, last = bench_training_step.table_of(measured)
    assert "28 layers, EXTRAPOLATED from 2 and 4" in last and "| -49.48 % | +1.03 % |" in last


def test_what_takes_turns_is_run_once_a_round() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in ("ours", "peer")]
    times = gpu.seconds_in_turn(runs, torch.device("cpu"), 3)
    assert [len(of_one) for of_one in times] == [3, 3]
    assert calls == ["ours", "peer"] * 4  # the first round warms up


# What does less, or half of the work, or ours again: no form of the op in PyTorch.
OTHER_OPS = {
    *(("vgpo_loss", "visual_focus alone"), ("visual_weights", "one sort of the cosines")),
    ("attention_heatmap", "scaled_dot_product_attention"),  # once the products; a heat map needs their sums first
}
# Four matrix products where PyTorch, which keeps all logits, takes three.
MAKES_LOGITS_AGAIN = {
    f"{op} and its gradient": 4 / 3 for op in ("linear_logprob", "linear_divergence", "linear_divergence of JS")
}


def test_no_operator_is_slower_than_pytorch_at_any_recorded_level() -> None:
    """Of every op, shape and dtype, in its latest run at each level, beside all of that run's peers."""
    cases, _ = plot.latest_cases(plot.RESULTS / "cpu.csv")
    ops = {op.name for op in measure.all_ops() if op.cpu} - {"training step"}  # a model's, beside which ours is little
    for level in (*levels.LIMITS, "avx512"):
        assert ops == {case.op for case in cases if levels.parts_of(case.device)[1] == level}, level
    slower = [
        f"{case.op}, {case.shape}, {case.dtype}, {case.device}: {case.ours} ms, {name} {ms} ms"
        for case in cases
        for name, ms in case.ms.items()
        if case.ours > ms * MAKES_LOGITS_AGAIN.get(case.op, 1.0)
        and name != "two linear_logprob"
        and (case.op, name) not in OTHER_OPS
    ]
    assert not slower, "\n".join(slower)

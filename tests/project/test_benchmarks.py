"""What turns measurements into rows, the table and pictures; no speed is measured here."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from benchmarks import measure, plot
from benchmarks.rows import append_csv

SVG = "{http://www.w3.org/2000/svg}"


def case(flops: int = 0) -> measure.Case:
    tensor = torch.ones(1024)
    return measure.Case(
        op="sum",
        shape="1024",
        dtype=torch.float32,
        device=torch.device("cpu"),
        bytes=4096,
        flops=flops,
        run=tensor.sum,
        check=lambda: None,
        ceilings=(measure.Ceiling("read", 2048, tensor.amax),),
        peers={"peer <x>": tensor.sum},
    )


def rows(flops: int = 0) -> list[measure.Row]:
    """Rows of made-up times: op 2 ms, ceiling 0.5 ms for half the bytes, peer 6 ms."""
    stopwatch = measure.Stopwatch(case(flops))
    stopwatch.ceilings["read"] = [0.0005, 0.0006]
    stopwatch.peers["peer <x>"] = [0.007, 0.006]
    return stopwatch.rows([0.003, 0.002])


def test_rows_follow_from_the_fastest_rounds() -> None:
    ours, ceiling, peer = rows(flops=8_000_000)
    assert (ours.ms, ours.median_ms, ours.times_ours) == (2.0, 2.5, 1.0)
    assert ours.percent_of_ceiling == 50.0  # 4096 bytes in 2 ms against 2048 in 0.5 ms
    assert (ours.gflop_per_s, ceiling.gflop_per_s, peer.gflop_per_s) == (4.0, None, 1.33)
    assert (ceiling.implementation, peer.times_ours) == ("ceiling: read", 3.0)
    assert rows()[0].gflop_per_s is None


def test_the_table_has_every_implementation_and_figure() -> None:
    output = io.StringIO()
    measure.print_table(rows(flops=8_000_000), Console(file=output))
    for expected in ("sum", "vgpo_kernels", "ceiling: read", "peer <x>", "2.000", "50%", "4.0", "3.00"):
        assert expected in output.getvalue()


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


@pytest.mark.parametrize(
    ("table", "speed", "share", "ceiling"),
    [
        ("gpu", "gb_per_s", "share_of_copy", "copy"),
        ("gpu_products", "tflop_per_s", "share_of_product", "large matrix product"),
    ],
)
def test_tables_of_gpus_are_drawn_too(tmp_path: Path, table: str, speed: str, share: str, ceiling: str) -> None:
    row = {"date": "d", "commit": "c", "device": "gpu", "driver": "1", "torch": "2", "op": "visual_focus"}
    row |= {"shape": "B=8", speed: 1000.0, share: 0.5, "launches": 2, "peak_mib": 1.0}
    variants = ({"variant": "cuda", "ms": 0.04}, {"variant": "cuda, host", "ms": 0.05}, {"variant": "eager", "ms": 0.4})
    write(tmp_path / f"{table}.csv", [row | variant for variant in variants])
    (found,) = plot.read_cases(tmp_path / f"{table}.csv")
    assert found.ours == 0.04 and found.ceiling == (ceiling, 0.02)
    assert "40.0 \N{MICRO SIGN}s" in plot.pictures(tmp_path)[tmp_path / f"{table}_visual_focus.svg"]


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


def test_figures_in_the_readme_are_in_the_pictures_alone() -> None:
    """No figure is typed: a time or a share of a ceiling stands in what was drawn from recorded rows."""
    prose = re.sub(r"^```.*?^```|<[^>]*>", "", (plot.ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"\d ?(?:ms|\N{MICRO SIGN}s|GB/s|GFLOP/s|%|x longer|times faster)", prose)

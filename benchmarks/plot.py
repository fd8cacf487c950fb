"""Draw benchmarks/results/*.svg from the latest rows of benchmarks/results/*.csv.

    python benchmarks/plot.py [--check]

One picture an operator, and ``<table>.svg`` with one case of each: bars are times, the line is the time that the
measured ceiling leaves possible. Of a CPU those are the times of its best SIMD level; ``cpu_<level>.svg`` has a lower
one's. The colours follow the reader's light or dark scheme. The same rows always make the same files, so
``--check``, which writes nothing, can say whether the pictures are those of the rows.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import levels  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TABLES = ("cpu", "gpu")
# Implementations that are this library's; the others are peers.
OURS = ("vgpo_kernels", "cuda", "triton")
CEILING = "ceiling: "

STYLE = """\
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .muted { fill: #59636e } .paper { fill: #ffffff; stroke: #d1d9e0 }
.ours { fill: #1a7f64 } .peer { fill: #aab4bf } .ceiling { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .muted { fill: #9aa4ae } .paper { fill: #0d1117; stroke: #3d444d }
  .ours { fill: #3fb996 } .peer { fill: #57606a } .ceiling { stroke: #f0883e }
}"""

# Pixels of a panel: names to the left of the bars, figures to the right of them.
LETTER, BARS, FIGURES = 6.8, 190, 114
LINE, HEAD, GAP, MARGIN = 20, 44, 22, 18


@dataclass
class Case:
    """One operator at one shape as it was measured last."""

    op: str
    shape: str
    dtype: str
    device: str
    software: str
    ms: dict[str, float] = field(default_factory=dict)  # by implementation, ours first
    ceiling: tuple[str, float] | None = None  # its name, and the time it leaves possible
    work: float = 0.0  # bytes or operations, of ours

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.shape, self.dtype, self.device

    @property
    def ours_name(self) -> str | None:
        return next((name for name in OURS if name in self.ms), None)

    @property
    def ours(self) -> float:
        return self.ms[self.ours_name or ""]

    @property
    def height(self) -> int:
        return HEAD + LINE * len(self.ms)


def read_cases(table: Path, level: str | None = None) -> list[Case]:
    """Return the cases that were measured on the last row's device; of a CPU at a level, or each at its best.

    Sizes that are measured below the best level alone belong to that level's cases only.
    """
    cases, last = latest_cases(table)
    machine, _ = levels.parts_of(last)
    best: dict[tuple[str, ...], Case] = {}
    for case in sorted(cases, key=lambda case: levels.rank(case.device)):
        its_machine, its_level = levels.parts_of(case.device)
        wanted = levels.is_best(case.device) if level is None else its_level == level
        if its_machine == machine and wanted:
            best[case.key[:-1]] = case
    for case in best.values():
        # Ours first, whichever was measured first; beside a bar of a hundred times its length none shows.
        shown = [(name, ms) for name, ms in case.ms.items() if ms < 100 * case.ours]
        case.ms = dict(sorted(shown, key=lambda item: item[0].split(",")[0] not in OURS))
    return list(best.values())


def latest_cases(table: Path) -> tuple[list[Case], str]:
    """Return what was measured last of every case on every device, and the last row's device.

    Of a CPU that is its latest run, since the machine may have been busy in another. A GPU is steady: of it that is the
    latest row of every implementation, so that ours can be measured again without all peers.
    """
    steady = table.stem == "gpu"
    cases: dict[tuple[str, ...], Case] = {}
    last = None
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            name, ms = row["implementation"], float(row["ms"])
            if name.startswith(CEILING):
                continue
            new = Case(row["op"], row["shape"], row["dtype"], row["device"], f"torch {row['torch']}, {row['date']}")
            case = cases.get(new.key)
            if case is None or (not steady and (last is not case or name in case.ms)):
                case = cases[new.key] = new
            last = case
            case.ms[name] = ms
            case.software = new.software
            if name == case.ours_name:
                case.ceiling = (row["ceiling"], ms * float(row["percent_of_ceiling"]) / 100)
                case.work = ms * float(row["gb_per_s"])
    found = [case for case in cases.values() if case.ours_name is not None]
    return found, "" if last is None else last.device


def names_width(cases: Iterable[Case]) -> int:
    """Return the room that the longest name needs."""
    return 14 + round(LETTER * max(len(name) for case in cases for name in case.ms))


def panel(case: Case, left: int, top: int, names: int, level: str = "") -> Iterator[str]:
    """Draw a case: a bar an implementation, on one linear scale, and the ceiling as a line across them."""
    longest = max(*case.ms.values(), case.ceiling[1] if case.ceiling is not None else 0.0)
    origin = left + names
    yield text(left, top + 14, case.op, "title")
    yield text(left, top + 31, ", ".join(part for part in (case.shape, case.dtype, level) if part), "muted")
    for index, (name, ms) in enumerate(case.ms.items()):
        ours = name in OURS
        y = top + HEAD + LINE * index
        width = max(BARS * ms / longest, 1)
        yield text(origin - 8, y + 13, name, "title" if ours else "muted", anchor="end")
        yield f'<rect class="{"ours" if ours else "peer"}" x="{origin}" y="{y + 3}" width="{width:.1f}" height="13"/>'
        times = "" if ours else f", {ms / case.ours:.1f}\N{MULTIPLICATION SIGN}"
        yield text(origin + width + 6, y + 13, f"{duration(ms)}{times}", "title" if ours else "muted")
    if case.ceiling is not None:
        x = origin + BARS * case.ceiling[1] / longest
        bottom = top + HEAD + LINE * len(case.ms)
        yield f'<line class="ceiling" x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEAD}" y2="{bottom}"/>'


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    """Write a line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def duration(ms: float) -> str:
    """Write a time with three digits."""
    value, unit = (ms / 1e3, "s") if ms >= 1e3 else (ms, "ms") if ms >= 1 else (ms * 1e3, "\N{MICRO SIGN}s")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def picture(cases: Sequence[Case], columns: int) -> str:
    """Draw cases as a grid, with a line about where and how they were measured."""
    rows = [cases[index : index + columns] for index in range(0, len(cases), columns)]
    columns = max(len(row) for row in rows)
    names = names_width(cases)
    are_mixed = len({case.device for case in cases}) > 1  # of one machine at several levels: each panel says its own
    step = names + BARS + FIGURES + GAP
    width = 2 * MARGIN + columns * step - GAP
    body: list[str] = []
    top = MARGIN
    for row in rows:
        for index, case in enumerate(row):
            level = levels.parts_of(case.device)[1] if are_mixed else ""
            body += panel(case, MARGIN + index * step, top, names, level)
        top += max(case.height for case in row) + GAP
    ceilings = sorted({case.ceiling[0] for case in cases if case.ceiling is not None})
    software = sorted({case.software for case in cases})
    body.append(f'<line class="ceiling" x1="{MARGIN}" x2="{MARGIN + 24}" y1="{top + 4}" y2="{top + 4}"/>')
    legend = f"time that the ceiling leaves possible: {', '.join(ceilings)}, measured in the same run"
    body.append(text(MARGIN + 32, top + 8, legend, "muted"))
    device = levels.parts_of(cases[0].device)[0] if are_mixed else cases[0].device
    body.append(text(MARGIN, top + 28, device, "muted"))
    body.append(text(MARGIN, top + 46, "; ".join(software), "muted"))
    height = top + 46 + MARGIN
    described = "; ".join(
        f"{case.op} {case.dtype}: " + ", ".join(f"{name} {duration(ms)}" for name, ms in case.ms.items())
        for case in cases
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{escape(described)}</title>",
            f"<style>\n{STYLE}\n</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *body,
            "</svg>\n",
        ]
    )


def chosen(cases: Iterable[Case]) -> list[Case]:
    """Return one case of each operator: float32 where it was measured, then that with most peers, then the largest."""

    def rank(case: Case) -> tuple[object, ...]:
        return case.dtype == "float32", len(case.ms), case.work

    best: dict[str, Case] = {}
    for case in cases:
        other = best.get(case.op)
        if other is None or rank(case) > rank(other):
            best[case.op] = case
    return list(best.values())


def pictures(results: Path = RESULTS) -> dict[Path, str]:
    """Return every picture's file and content."""
    drawn = {}
    for name in TABLES:
        table = results / f"{name}.csv"
        cases = read_cases(table) if table.exists() else []
        for op in dict.fromkeys(case.op for case in cases):
            slug = re.sub(r"\W+", "_", op)
            drawn[results / f"{name}_{slug}.svg"] = picture([case for case in cases if case.op == op], 1)
        if cases:
            drawn[results / f"{name}.svg"] = picture(chosen(cases), 2)
        for level in levels.LIMITS:
            if held := read_cases(table, level) if table.exists() else []:
                drawn[results / f"{name}_{level}.svg"] = picture(chosen(held), 2)
    return drawn


def stale(results: Path = RESULTS) -> list[str]:
    """Return the names of pictures that are missing, are not those of the rows, or are of nothing measured."""
    drawn = pictures(results)
    wrong = [file.name for file, content in drawn.items() if not file.is_file() or file.read_text() != content]
    return wrong + [file.name for file in results.glob("*.svg") if file not in drawn]


def main() -> int:
    """Draw, or check."""
    if "--check" in sys.argv[1:]:
        wrong = stale()
        if wrong:
            print(f"not what the tables say: {', '.join(wrong)}; run benchmarks/plot.py", file=sys.stderr)
        return int(bool(wrong))
    for file, content in pictures().items():
        file.write_text(content)
        print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

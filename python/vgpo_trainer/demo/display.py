"""The demo on a terminal: a live display where there is one, a few plain lines where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from vgpo_trainer.demo.evaluation import Evaluation
    from vgpo_trainer.demo.training import DemoResult
    from vgpo_trainer.demo.warm_start import WarmStartProgress

_BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 40


class DemoDisplay:
    """Told what happens, shows it. A context manager: the live display ends with the ``with`` block.

    Args:
        steps: Optimisation steps of reinforcement to come.
        console: Where to write; default: standard output.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._stage = ""
        self._rewards: list[float] = []
        self._latest: dict[str, Any] = {}
        self._evaluations: list[tuple[int, Evaluation]] = []
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._imitation: Any = None
        self._reinforcement = self._progress.add_task("reinforcement", total=steps, visible=False)
        self._live = Live(
            get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True, screen=False
        )

    def __enter__(self) -> DemoDisplay:
        self.console.print(
            Text("vgpo demo", style="bold"), Text("add up handwritten digits, step by step", style="dim")
        )
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the live display; harmless when it has ended."""
        self._live.stop()

    def stage(self, name: str) -> None:
        """Say what starts now."""
        self._stage = name
        if not self.console.is_terminal:
            self.console.print(name, soft_wrap=True)

    def imitated(self, progress: WarmStartProgress) -> None:
        """Show a step of the warm start, whose number of steps is not known beforehand."""
        if self._imitation is None:
            self._imitation = self._progress.add_task("imitation", total=None)
        self._progress.update(self._imitation, completed=progress.step)
        self._latest = {"loss": progress.loss}
        if progress.accuracy is not None and not self.console.is_terminal:
            line = f"  step {progress.step}: loss {progress.loss:.3f}, solves {progress.accuracy:.0%}"
            self.console.print(line, soft_wrap=True)

    def stepped(self, step: int, record: Mapping[str, Any]) -> None:
        """Show the record of a step of reinforcement."""
        if self._imitation is not None:
            self._progress.update(self._imitation, visible=False)
        self._rewards.append(float(record["reward"]))
        self._latest = dict(record)
        self._progress.update(self._reinforcement, completed=step, visible=True)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Show a measurement of held-out accuracy."""
        self._evaluations.append((step, evaluation))
        if not self.console.is_terminal:
            reward = f", reward {self._rewards[-1]:.2f}" if self._rewards else ""
            self.console.print(
                f"  step {step}: held-out accuracy {describe_accuracy(evaluation)}{reward}", soft_wrap=True
            )

    def summary(self, result: DemoResult) -> None:
        """Say what came out and where it is."""
        before, after = result.before, result.after
        rows = {
            "held-out accuracy before": describe_accuracy(before),
            "held-out accuracy after": describe_accuracy(after),
            "steps, time": f"{result.steps}, {result.seconds / 60:.1f} min",
            "report": str(result.folder.report),
            "model": str(result.folder.model),
            "metrics": str(result.folder.metrics),
        }
        self.console.print()
        for name, value in rows.items():
            # Not a table: a path is to be copied whole, however narrow the terminal is.
            self.console.print(Text(f"{name:<26}{value}"), soft_wrap=True)

    def _render(self) -> Group:
        lines: list[Any] = [Text(f"  {self._stage}", style="dim"), self._progress]
        if self._evaluations:
            trail = "  ".join(f"{evaluation.accuracy:.1%}" for _, evaluation in self._evaluations[-8:])
            lines.append(Text.assemble(("  held-out accuracy  ", "dim"), trail))
        if self._rewards:
            lines.append(
                Text.assemble(
                    ("  reward             ", "dim"),
                    f"{self._rewards[-1]:.2f}  ",
                    (sparkline(self._rewards[-SPARKLINE_WIDTH:]), "cyan"),
                )
            )
        shown = {
            "visual focus": self._latest.get("vgpo/visual_focus"),
            "late/early": self._latest.get("vgpo/late_early_ratio"),
            "entropy": self._latest.get("entropy"),
            "loss": self._latest.get("loss") if not self._rewards else None,
        }
        values = [f"{name} {value:.3f}" for name, value in shown.items() if value is not None]
        if values:
            lines.append(Text("  " + "   ".join(values), style="dim"))
        return Group(*lines)


def describe_accuracy(evaluation: Evaluation) -> str:
    """An accuracy with its interval, in words."""
    low, high = evaluation.interval
    count = len(evaluation.correct)
    return f"{evaluation.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}, {count} problems)"


def sparkline(values: list[float]) -> str:
    """Values from 0 to 1 as a row of block characters; what is not finite is a blank."""
    characters = []
    for value in values:
        if not math.isfinite(value):
            characters.append(" ")
            continue
        share = min(max(value, 0.0), 1.0)
        characters.append(_BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)])
    return "".join(characters)

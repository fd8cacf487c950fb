"""The examples as people start them, with fewer and shorter responses. What they compute: test_ways.py."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl.rewards
from datasets import Dataset
from load_script import EXAMPLES, load_script
from trainer.tiny_runs import picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from vgpo_trainer import TokenView
from vgpo_trainer.demo.warm_start import SHIPPED
from vgpo_trainer.runs.metrics import read_metrics

from vgpo_kernels import VisualWeights
from vgpo_kernels.batch_checks import BatchFindings

ROOT = Path(__file__).resolve().parents[2]
README = (EXAMPLES / "README.md").read_text()
SHORT = ("--steps", "2", "--prompts", "4", "--generations", "4", "--seed", "1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def started(*command: str) -> str:
    """Run Python and return what it prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "python")),
    }
    finished = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    return finished.stdout


def numbers(printed: str) -> list[tuple[float, ...]]:
    """Step, reward, loss, focus and norm of the gradient of each step."""
    line = r"^step (\d+): reward (\S+), loss (\S+), focus (\S+), gradient (\S+)$"
    lines = re.findall(line, printed, re.MULTILINE)
    return [tuple(map(float, line)) for line in lines]


def run_here(name: str, *options: str) -> None:
    """Run an example as Python runs a file, without the seconds that a process takes to import everything."""
    load_script("grpo_own_loop", EXAMPLES)  # which the others import from beside them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_loops_print_the_same_numbers_with_logits_without_and_on_two_processes(capsys):
    one = numbers(started("examples/grpo_own_loop.py", *SHORT))
    assert [line[0] for line in one] == [1, 2]
    assert all(0 < reward < 1 and loss != 0 and -1 < focus < 1 for _, reward, loss, focus, _ in one)
    assert min(norm for *_, norm in one) > 0.1
    run_here("linear_own_loop.py", *SHORT)
    without_logits = numbers(capsys.readouterr().out)
    two = numbers(started(*TORCHRUN, "examples/grpo_own_loop.py", "--accumulation", "1", *SHORT))
    for other in (without_logits, two):
        for line, expected in zip(other, one, strict=True):
            assert line == pytest.approx(expected, abs=2e-3, rel=1e-2)


def test_a_packed_batch_is_compared_with_a_padded_one(capsys):
    run_here("packed.py", "--prompts", "3", "--seed", "1")
    printed = capsys.readouterr().out
    padded, packed = map(int, re.findall(r"^p\w+: (\d+) positions", printed, re.MULTILINE))
    assert packed < padded
    losses = re.search(r"^loss: +padded (\S+), packed (\S+)$", printed, re.MULTILINE).groups()
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-5) and float(losses[0]) != 0
    assert re.search(r"^gradients of 91 parameters: at most [\d.]+e-\d+", printed, re.MULTILINE)


def test_the_readme_has_every_example():
    links = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\)", README, re.MULTILINE)
    assert {link for _, link in links} == {
        path.name for path in EXAMPLES.iterdir() if path.name[0] not in "._" and path.name != "README.md"
    }
    assert all(name.rstrip("/") == link for name, link in links)
    assert (EXAMPLES / "../docs/integrate.md").exists() and "(../docs/integrate.md)" in README
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text(), "how to start it"


# TRL's example.

ORIGINAL = "f1cc00fda72f62cfe8d83ecaf3fce9ecd6b502e3ec221bfcf8da88ab1329a4c9"  # SHA-256 of TRL's at commit f2cd577


def test_trls_example_has_three_other_lines_and_one_for_the_dataset():
    ours = (EXAMPLES / "trl_grpo_vlm.py").read_text()
    introduction, text = (
        re.search(r"(?<=# limitations under the License\.\n)(\n# TRL's.*?\n)(?=\n)", ours, re.DOTALL),
        ours,
    )
    text = text.replace(introduction.group(), "", 1)
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith("from vgpo_trainer import")]
    assert len([line for line in kept if line.endswith("# VGPO\n")]) == 3
    text = "".join(kept).replace("  # VGPO\n", "\n").replace("VGPOTrainingConfig", "GRPOConfig")
    text = text.replace("VGPOTrainer", "GRPOTrainer").replace("script_args.dataset_name or ", "")
    assert hashlib.sha256(text.encode()).hexdigest() == ORIGINAL


def characters(completions, solution, **_) -> list[float]:
    """In place of TRL's reward, which needs math-verify."""
    assert all(answer.isdigit() for answer in solution)
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


@pytest.mark.slow
def test_trls_example_trains(tmp_path, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED)
    model.config.text_config.max_position_embeddings = 512  # its prompt is longer than the demo's
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(SHIPPED).save_pretrained(tmp_path / "model")
    rows = [{"problem": "Add the digits.", "image": picture(row), "solution": str(row)} for row in range(104)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    monkeypatch.setattr(trl.rewards, "accuracy_reward", characters)
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "vgpo": "released",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run_here("trl_grpo_vlm.py", *line)
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len(records) == 2
    assert all(record["vgpo/factor_max"] > 1 > record["vgpo/factor_min"] for record in records)
    assert any(record["loss"] != 0 for record in records)
    assert (tmp_path / "out" / "config.json").exists(), "the model is saved"


# The notebook.


class Tags(HTMLParser):
    """The tags of a page that a cell shows, those inside a frame included."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        inside = dict(attrs).get("srcdoc")
        if inside:
            self.found += Tags(inside).found


def test_the_cells_of_the_notebook_run_and_show_something(capsys):
    """Cell by cell in one namespace, which takes no Jupyter; what a cell ends with is what a notebook shows."""
    notebook = json.loads((EXAMPLES / "focus.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None, "stored without what it shows"
        *statements, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "<cell>", "eval"), names))
    picture, weights, findings, focus, factors, view = (value for value in shown if value is not None)
    assert picture.size == (192, 192) and isinstance(weights, VisualWeights)
    assert isinstance(findings, BatchFindings) and not findings
    for chart in (focus, factors):
        assert Tags(chart._repr_html_()).found.count("path") == 4
    assert isinstance(view, TokenView) and [row.name for row in view.rows] == ["focus", "factor"]
    printed = capsys.readouterr().out
    assert printed.count(" is wrong: it is ") + printed.count(" is right") == 4

"""The EasyR1 adapter in EasyR1's own code: where VGPO_EASYR1 names a checkout of it, or of a fork.

`make easyr1 EASYR1=PATH` does that, in an environment of its own: EasyR1 wants another transformers than the lock has,
and calls its package verl.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = Path(os.environ.get("VGPO_EASYR1") or os.devnull).absolute()
PYTHON = Path(os.environ.get("VGPO_EASYR1_PYTHON") or sys.executable).absolute()
CASE = Path(__file__).with_name("easyr1_case.py")
LINES = """
from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.easyr1 import patch_easyr1

patch_easyr1(VGPOConfig.paper())
"""

pytestmark = pytest.mark.skipif(not CHECKOUT.is_dir(), reason="VGPO_EASYR1 names no checkout of EasyR1")


def start(folder: Path, *command: str, checkout: Path = CHECKOUT) -> subprocess.Popen[str]:
    """Start Python with the stand-ins for what a CPU cannot have, in this process and in those that it starts."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("from integrations import easyr1_stand_ins\neasyr1_stand_ins.install()\n")
    paths = os.pathsep.join(map(str, (site, checkout, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    out = subprocess.PIPE
    return subprocess.Popen(
        [str(PYTHON), *command], env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str], code: int = 0) -> str:
    try:
        said = "\n".join(process.communicate(timeout=580)[0] for process in processes)
    finally:
        for process in processes:  # one may wait for another that failed
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def with_lines(folder: Path, place: str) -> Path:
    """A copy of the checkout's package with the lines of the adapter at the end of one file."""
    shutil.copytree(CHECKOUT / "verl", folder / "verl")
    with open(folder / "verl" / place, "a") as file:
        file.write(LINES)
    return folder


def test_losses_are_those_of_easyr1(tmp_path: Path) -> None:
    finish(start(tmp_path, str(CASE), "loss"))


@pytest.mark.parametrize("padding", ["padded", "padding-free"])
@pytest.mark.parametrize("model", ["images", "words"])
def test_a_worker_scores_and_updates(tmp_path: Path, model: str, padding: str) -> None:
    finish(start(tmp_path, str(CASE), "worker", model, padding))


def test_two_ranks_of_sequence_parallelism(tmp_path: Path) -> None:
    finish(*(start(tmp_path, str(CASE), "ulysses", str(rank), "2", str(tmp_path)) for rank in range(2)))


def test_two_steps_on_ray(tmp_path: Path) -> None:
    checkout = with_lines(tmp_path / "checkout", "__init__.py")
    call = f"from integrations.easyr1_ray_case import main; main({str(tmp_path / 'run')!r})"
    said = finish(start(tmp_path, "-c", call, checkout=checkout))
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2, said
    for step in steps:
        assert step["vgpo/weighted_responses"] == 6 and step["vgpo/groups"] == 3, "one prompt is of text alone"
        assert step["actor/own_loss"] == 0, "the loss of both workers is the adapter's"
        assert step["actor/grad_norm"] > 0
        assert step["critic/advantages/max"] != step["critic/returns/max"], "factors are in the advantages"


@pytest.mark.parametrize("first", ["verl.trainer.ray_trainer", "verl.workers.fsdp_workers"])
def test_lines_at_the_end_of_the_worker_are_refused(tmp_path: Path, first: str) -> None:
    """Ray imports the trainer before the worker's module in one process, and after it in another."""
    checkout = with_lines(tmp_path / "checkout", "workers/fsdp_workers.py")
    said = finish(start(tmp_path, "-c", f"import {first}", checkout=checkout), code=1)
    assert "is still being imported: patch_easyr1 belongs at the end of verl/__init__.py" in said

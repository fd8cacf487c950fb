"""What a trainer and the commands do on a device without float64, with real releases of transformers and TRL."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from trainer.tiny_runs import make_trainer, picture, save_model
from vgpo_trainer.cli import main
from vgpo_trainer.commands import model_checks
from vgpo_trainer.commands.doctor import check_device, diagnosis
from vgpo_trainer.commands.inspect import load_model
from vgpo_trainer.demo.display import DemoDisplay
from vgpo_trainer.demo.probes import write_probe
from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.demo.training import reinforce
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.metrics import read_metrics

from vgpo_kernels import backends


def check_models(device: torch.device) -> None:
    """Hidden states, attention, the fused head and a training step of a tiny LLaVA are right on the device."""
    for outcome in model_checks.outcomes(device.type):
        assert outcome.failure is None and not outcome.missing, outcome


def check_trainer(device: torch.device, signal: str, settings: dict[str, Any]) -> None:
    """A trainer takes a step on the device, and leaves what it leaves on the CPU: same seeds, same metrics."""
    records = []
    for place in (str(device), "cpu"):
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=place):
            torch.manual_seed(0)
            trainer = make_trainer(folder, signal=signal, use_cpu=place == "cpu", max_steps=1, **settings)
            assert str(trainer.accelerator.device) == place
            trainer.train()
            records.append(read_metrics(Path(folder) / "metrics.jsonl")[0])
    here, there = records
    assert here.keys() == there.keys()
    compared = ["loss", "grad_norm", *(name for name, value in there.items() if "vgpo/" in name and value is not None)]
    assert "vgpo/factor_mean" in compared
    for name in compared:
        assert math.isclose(here[name], there[name], rel_tol=2e-3, abs_tol=1e-5), (name, here[name], there[name])


def check_commands(device: torch.device) -> None:
    """``vgpo inspect`` takes the device by itself, and ``vgpo doctor`` finds it right."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        assert load_model(str(folder / "model"))[0].device == device
        picture(0).save(folder / "picture.png")
        asked = ["--image", str(folder / "picture.png"), "--prompt", "Add the digits.", "--max-new-tokens", "4"]
        page = folder / "page.html"
        assert main(["inspect", "--model", str(folder / "model"), *asked, "--out", str(page)]) == 0
        assert "<html" in page.read_text()
    assert check_device(device.type, "reference").passed
    lines = dict(diagnosis(backends.describe()))
    assert lines[f"{device.type} tensors"] == "handled by reference, plain PyTorch in float32"
    assert lines["gpu 0"] == device.type.upper()


def check_demo(device: torch.device) -> None:
    """The demo up to the end of its training of one step: evaluations, the probe before it, and what it records."""
    with tempfile.TemporaryDirectory() as name:
        settings = DemoSettings(out=name, steps=1, prompts=2, evaluation_problems=4)
        folder = RunFolder(name)

        def probe(*of_model: Any) -> None:
            assert write_probe(folder, "before", *of_model, settings)

        run = reinforce(settings, DemoDisplay(1, Console(quiet=True)), before_training=probe)
        assert run.trainer.accelerator.device == device and run.trainer.state.global_step == 1
        assert folder.read_config()["backend"][device.type] == "reference"


def everything(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a training step by every signal, what the commands do, and the demo."""
    yield partial(check_models, device)
    yield partial(check_trainer, device, "focus", {"fused_head": True, "view_coef": 0.1, "view": "noise"})
    yield partial(check_trainer, device, "attention", {})
    yield partial(check_trainer, device, "dependency", {"view": "noise"})
    yield partial(check_commands, device)
    yield partial(check_demo, device)

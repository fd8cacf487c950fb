"""The configurations of examples/accelerate: `vgpo train` on two processes without GPUs, as accelerate launches it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from trainer.tiny_runs import save_model, save_rows
from transformers import AutoModelForImageTextToText
from vgpo_trainer.runs.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CUT = ("fsdp2", "zero3")  # those that cut the weights, an adapter's too
CONFIGURATIONS = sorted(path.stem for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
VGPO = [*TORCHRUN, "-m", "vgpo_trainer.cli"]
# What processes without GPUs, of a machine that others use too, need beside a configuration. A port that accelerate
# finds free may be taken before it is used: the system hands out those above 32768.
PORT = str(20_000 + os.getpid() % 10_000)
OVERRIDES = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", PORT]


def accelerate(name: str) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", *OVERRIDES]
    return [*launch, "--config_file", str(ROOT / "examples" / "accelerate" / f"{name}.yaml")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model and a dataset."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_rows(folder / "data")
    return folder


def command(inputs: Path, out: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "--model": inputs / "model",
        "--dataset": inputs / "data",
        "--out": out,
        "--reward": "trainer.tiny_runs:parity_reward",
        "--batch-size": 2,
        "--generations": 4,
        "--max-completion-length": 8,
        "--learning-rate": 1e-3,
        "--steps": 2,
        "--save-every": 1,
    }
    settings = {"disable_tqdm": "true", "lr_scheduler_type": "constant", **changes.pop("settings", {})}
    options |= {f"--{name}": value for name, value in changes.items()}
    given = [str(part) for option in options.items() for part in option]
    return ["train", *given, *(f"--{name}={value}" for name, value in settings.items())]


def launch(launcher: list[str], folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "commands.json").write_text(json.dumps(commands))
    script = Path(__file__).with_name("launched_vgpo.py")
    return started([*launcher, str(script), str(folder / "commands.json")])


def started(launched: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "python", "tests")),
    }
    return subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=300)


def without_a_gpu(name: str) -> dict[str, str]:
    """DeepSpeed has a setting of its own for that, which the environment holds."""
    return {} if name.startswith("zero") else {"use_cpu": "true"}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Callable[[str], Path]:
    """Folders of a configuration's runs: ``whole``, ``resumed`` after a step, and of an ``adapter`` to cut weights."""

    @cache
    def train(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run = partial(command, inputs, settings=without_a_gpu(name))
        whole, resumed = folder / "whole", folder / "resumed"
        adapter = run(folder / "adapter", steps=1, **{"lora-rank": 2})
        commands = [run(whole), run(resumed, steps=1), run(resumed), *([adapter] if name in CUT else [])]
        finished = launch(accelerate(name), folder, *commands)
        assert finished.returncode == 0, (finished.stdout + finished.stderr)[-9000:]
        assert f"resuming from {resumed / 'checkpoint-1'}" in finished.stdout
        return folder

    return train


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_trains_saves_and_resumes_as_every_other(name, trained):
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (make verl)")
    runs = [trained("ddp") / "whole", trained(name) / "whole", trained(name) / "resumed"]
    expected, *others = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert all(record["loss"] != 0 for record in expected)
    compared = [key for key in expected[0] if key.startswith("vgpo/") or key in ("loss", "reward", "entropy")]
    for records in others:
        assert [record["step"] for record in records] == [1, 2]
        for record, other in zip(records, expected, strict=True):
            assert all(value is None or math.isfinite(value) for value in record.values())
            values = {key: other[key] for key in compared}
            assert {key: record[key] for key in compared} == pytest.approx(values, rel=1e-3, abs=1e-5)
    models = [AutoModelForImageTextToText.from_pretrained(run / "model") for run in runs]
    for weights in zip(*(model.parameters() for model in models), strict=True):
        for other in weights[1:]:
            torch.testing.assert_close(other, weights[0], atol=1e-4, rtol=1e-4)
    if name not in CUT:
        return
    adapter = load_file(trained(name) / "adapter" / "model" / "adapter_model.safetensors")
    assert adapter and all("language_model" in key for key in adapter)
    assert all(weight.isfinite().all() for weight in adapter.values())
    assert any(weight.any() for key, weight in adapter.items() if "lora_B" in key)  # zero before training


def test_what_is_wrong_at_the_start_is_said_once(inputs, tmp_path):
    """Before processes know of each other."""
    wrong = {"dataset": tmp_path / "nowhere", "settings": without_a_gpu("torchrun")}
    finished = started([*VGPO, *command(inputs, tmp_path / "run", **wrong)])
    assert finished.returncode != 0
    (said,) = re.findall("^vgpo train: .*", finished.stderr, re.MULTILINE)
    assert "nowhere" in said


def test_what_stops_several_processes_is_said_by_the_first(inputs, tmp_path):
    """Which need not be the process that says everything else."""
    (tmp_path / "bad_reward.py").write_text(
        "import os, time\n\ndef bad(completions, **_):\n    time.sleep(0.2 * (os.environ['RANK'] == '0'))\n"
        "    raise KeyError(os.environ['RANK'])\n"
    )
    bad = {"reward": f"{tmp_path / 'bad_reward.py'}:bad", "settings": without_a_gpu("torchrun")}
    finished = started([*VGPO, *command(inputs, tmp_path / "run", **bad)])
    assert finished.returncode != 0
    (said,) = re.findall("^vgpo train: .*", finished.stderr, re.MULTILINE)
    place = r"KeyError: '1' \(bad_reward\.py:5\); no checkpoint was saved"
    assert re.fullmatch(rf"vgpo train: the reward bad failed at metadata\.jsonl:\d: {place}", said)
    assert finished.stderr.count("the reward bad failed:\n") == 1
    assert not (tmp_path / "run" / "model").exists()

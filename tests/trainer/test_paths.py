"""Paths, as text or as ``Path``, and what else people have in hand: a name instead of a list, an image in any form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from PIL import Image
from trainer.tiny_runs import llava, picture, save_model, save_rows
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.data import DataSource, load_rows
from vgpo_trainer.demo.ablation import AblationFolder
from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.inspection import InspectError, inspect_answer
from vgpo_trainer.options.parser import read_config
from vgpo_trainer.reports.ablation import write_ablation
from vgpo_trainer.reports.arms import Run
from vgpo_trainer.reports.run import write_report
from vgpo_trainer.rewards import exact_answer, load_rewards
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.metrics import MetricsFile, read_metrics
from vgpo_trainer.runs.writing import write_atomically
from vgpo_trainer.trainer import VGPOTrainer

from vgpo_kernels import VGPOConfig, group_weights

PATHS = pytest.mark.parametrize("kind", [str, Path])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@PATHS
def test_a_dataset_is_named_by_either(dataset, kind):
    for source in (kind(dataset), DataSource(kind(dataset)), DataSource(kind(dataset / "metadata.jsonl"))):
        assert load_rows(source).dataset[2]["answer"] == "2"
    assert DataSource(kind(dataset)) == DataSource(str(dataset))


@PATHS
def test_a_trainer_takes_either_for_its_model_and_its_folder(checkpoint, dataset, tmp_path, kind):
    args = VGPOTrainingConfig(
        output_dir=kind(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        use_cpu=True,
        bf16=False,
    )
    trainer = VGPOTrainer(kind(checkpoint), exact_answer, args, load_rows(kind(dataset)).dataset)
    assert Path(trainer.args.output_dir) == tmp_path / "run"
    assert trainer.model.config._name_or_path == str(checkpoint)


@PATHS
def test_files_are_written_and_read_by_either(tmp_path, kind):
    write_atomically(kind(tmp_path / "a.txt"), "text")
    assert (tmp_path / "a.txt").read_text() == "text"
    (tmp_path / "run.yaml").write_text("model: m\n")
    assert read_config(kind(tmp_path / "run.yaml")) == {"model_name_or_path": "m"}
    assert AblationFolder(kind(tmp_path / "ablation")).budget == tmp_path / "ablation" / "ablation.json"
    run = Run("vgpo", 0, 0.25, 0.5, 1.0, 0.5, 1, 2.0, 1.5, 1, {"torch": "2.13.0"}, [0.5])
    budget = {"steps": 1, "prompts": 3, "generations": 4, "problems": 4, "learning_rate": 0.1, "temperature": 1.0}
    assert write_ablation(kind(tmp_path), kind(tmp_path), budget, [run]) == tmp_path / "ablation.md"
    assert RunFolder(DemoSettings(kind(tmp_path / "demo")).out).path == tmp_path / "demo"
    MetricsFile(kind(tmp_path / "metrics.jsonl"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algo": "vgpo", "seed": 0, "result": {}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5, "seconds": 2.0}) + "\n")
    assert read_metrics(kind(folder / "metrics.jsonl"))[0]["step"] == 1
    assert write_report(kind(folder)) == folder / "report.html"


def test_rewards_are_named_by_one_name_or_several(tmp_path):
    (tmp_path / "mine.py").write_text("def even(completions, **_):\n    return [0.0] * len(completions)\n")
    name = f"{tmp_path}/mine.py:even"
    assert load_rewards("exact_answer") == load_rewards(["exact_answer"]) == load_rewards(None) == [exact_answer]
    assert [reward.__name__ for names in (name, Path(name), [Path(name)]) for reward in load_rewards(names)] == [
        "even"
    ] * 3
    with pytest.raises(
        TypeError, match=r"named by text.* got .*exact_answer.*; VGPOTrainer takes functions as they are"
    ):
        load_rewards([exact_answer])


@pytest.mark.parametrize("value", [{"beta": 0.5}, VGPOConfig(), VGPOConfig.paper], ids=["dict", "config", "method"])
def test_the_preset_of_a_run_is_named_by_text(tmp_path, value):
    with pytest.raises(
        TypeError, match=r"vgpo must be the name of a preset, paper or released, or None, got .*vgpo_beta"
    ):
        VGPOTrainingConfig(tmp_path, use_cpu=True, bf16=False, vgpo=value)


def test_settings_of_a_run_are_no_settings_of_vgpo(tmp_path):
    args = VGPOTrainingConfig(tmp_path, use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=r"config must be a VGPOConfig, .*; use config.vgpo_config\(\)"):
        group_weights(torch.zeros(2), torch.zeros(2, dtype=torch.int64), args)


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    made, processor = llava()
    return made.eval(), processor


@pytest.mark.parametrize(
    "given",
    [
        lambda image, path: image.convert("RGBA"),
        lambda image, path: str(path),
        lambda image, path: path,
        lambda image, path: path.read_bytes(),
        lambda image, path: np.asarray(image),
    ],
    ids=["alpha", "text", "path", "bytes", "array"],
)
def test_an_image_is_inspected_in_any_form(model, tmp_path, given: Callable[[Image.Image, Path], Any]):
    image, path = picture(3), tmp_path / "a.png"
    image.save(path)
    expected = inspect_answer(*model, image, "Add the digits.", max_new_tokens=2)
    found = inspect_answer(*model, given(image, path), "Add the digits.", max_new_tokens=2)
    assert found.tokens == expected.tokens and found.cos == expected.cos
    assert found.save(str(tmp_path / "page.html")).is_file()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ([picture(0), picture(1)], "one image is inspected at a time, got a list of 2"),
        ("https://a.org/b.png", "download it first"),
        ("nowhere.png", "does not exist"),
        (None, "expected a path"),
        (np.zeros((4, 4, 3)), "cannot use image"),
    ],
)
def test_what_is_no_image_is_said(model, image, says):
    with pytest.raises(InspectError, match=says):
        inspect_answer(*model, image, "Add the digits.", max_new_tokens=2)

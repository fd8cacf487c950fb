"""What goes wrong while a run is trained, and what it leaves: killed, out of disk, damaged checkpoints, NaN."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from PIL import Image
from safetensors import safe_open
from trainer.test_inspect import inspection
from trainer.tiny_runs import save_model, save_rows
from transformers import AutoModelForImageTextToText
from vgpo_trainer import cli
from vgpo_trainer.commands import train
from vgpo_trainer.demo import inspections
from vgpo_trainer.runs.checkpoints import CheckpointError, check_checkpoint, checkpoints
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.writing import RunFailure, writing

from vgpo_kernels.integrations.transformers import final_norm

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
HUGE = "huge"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def command(checkpoint, dataset):
    def build(out: Path, *more: object) -> list[str]:
        given = ["train", "--model", checkpoint, "--dataset", dataset, "--out", out, "--batch-size", 4]
        given += ["--generations", 4, "--max-completion-length", 8, "--save-every", 2, "--learning-rate", 1e-3]
        given += ["--reward", "trainer.tiny_runs:parity_reward", "--use_cpu", "true", "--disable_tqdm", "true"]
        return [str(option) for option in (*given, *more)]

    return build


@pytest.fixture(scope="module")
def saved(command, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints after the second and the fourth."""
    out = tmp_path_factory.mktemp("saved") / "run"
    assert cli.main(command(out, "--steps", 4)) == 0
    return out


def one_line(capsys) -> str:
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vgpo")]
    assert len(error) == 1, error
    return error[0]


# Killed.


def test_a_killed_run_goes_on_from_its_last_checkpoint(command, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests")))}
    arguments = [sys.executable, "-m", "vgpo_trainer.cli", *command(out, "--steps", 400)]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None and not (out / "checkpoint-4").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    before = read_metrics(out / "metrics.jsonl")
    last = checkpoints(out)[-1]
    kept = int(last.name.removeprefix("checkpoint-"))
    assert 2 <= kept <= before[-1]["step"] <= kept + 3
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "seco')  # as if killed within a write

    assert cli.main(command(out, "--steps", kept + 2)) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, kept + 3))
    assert records[:kept] == before[:kept]
    assert all(isinstance(record["loss"], float) for record in records)
    assert (out / "model" / "model.safetensors").is_file()


def test_a_checkpoint_cut_short_is_not_taken_for_one(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global_step": 1'), (14, ""), (16, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


# Out of disk.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_under_the_metrics(command, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    (out / "config.json").write_text('{"run": {}}')  # of the run that filled it
    assert cli.main(command(out, "--steps", 2)) == 1
    error = one_line(capsys)
    assert error == f"vgpo train: cannot write {out}/metrics.jsonl: No space left on device; no checkpoint was saved"


def test_no_room_for_a_checkpoint(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(out, "--steps", 2)) == 0
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # No file may grow past 100 kB: the weights do not fit, the metrics do.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        assert cli.main(command(out, "--steps", 6)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = one_line(capsys)
    assert re.match(rf"vgpo train: cannot write {out}/checkpoint-4: .*File too large", error), error
    assert error.endswith("; the same command goes on from checkpoint-2")
    assert cli.main(command(out, "--steps", 6)) == 0
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("name", ["rollouts.jsonl", "metrics.jsonl"])
def test_a_full_disk_under_a_demo(tmp_path, capsys, name, monkeypatch):
    out = tmp_path / "run"
    create = RunFolder.create

    def create_on_a_full_disk(folder):
        create(folder)
        (folder.path / name).symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "create", create_on_a_full_disk)
    sizes = ["--steps", "1", "--prompts", "2", "--evaluation-problems", "4"]
    assert cli.main(["demo", "--out", str(out), *sizes]) == 1
    assert one_line(capsys) == f"vgpo demo: cannot write {out}/{name}: No space left on device"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_under_the_pages_of_a_demo(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    image = folder.store_image(Image.new("RGB", (8, 8)))
    folder.write_evaluation({"examples": [{"image": image, "answer": "7", "right_after": True}]})
    folder.inspections.mkdir()
    folder.inspection(image).symlink_to("/dev/full")
    monkeypatch.setattr(inspections, "inspect_answer", lambda *_, **__: inspection())
    with pytest.raises(RunFailure, match=f"^cannot write {folder.inspection(image)}: No space left on device$"):
        inspections.write_inspections(folder, torch.nn.Linear(1, 1), None, "a model")
    folder.inspection(image).unlink()
    folder.inspections.rmdir()
    folder.inspections.symlink_to("/dev/full")
    with pytest.raises(RunFailure, match=f"^cannot write {folder.inspections}: File exists$"):
        inspections.write_inspections(folder, torch.nn.Linear(1, 1), None, "a model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write huge: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "huge/a"), "cannot write huge/a: Permission denied"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64\nframe #0"), "is the disk full?"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "is the disk full?"),
    ],
)
def test_failures_to_write_name_the_file(error, message):
    with pytest.raises(RunFailure, match=re.escape(message)) as failure, writing(HUGE):
        raise error
    assert HUGE in str(failure.value) and "\n" not in str(failure.value)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes") as error, writing(HUGE):
        raise RuntimeError("shapes do not match")
    assert not isinstance(error.value, RunFailure)


# Damaged files.


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\x80\x04not what it was" * 64)


@pytest.mark.parametrize("how", ["truncated", "emptied", "garbled"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_a_damaged_checkpoint_names_its_file(saved, tmp_path, name, how):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    for path in (saved / "checkpoint-4").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    check_checkpoint(folder)
    damage(folder / name, how)
    with pytest.raises(CheckpointError, match=re.escape(str(folder / name))) as error:
        check_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_run_does_not_start_from_a_damaged_checkpoint(saved, command, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    damage(out / "checkpoint-4" / "model.safetensors", "truncated")
    assert cli.main(command(out, "--steps", 6)) == 2
    error = one_line(capsys)
    assert f"{out}/checkpoint-4/model.safetensors is damaged" in error
    assert error.endswith(f"; delete {out}/checkpoint-4 to go on from checkpoint-2")
    (out / "config.json").write_text("{")
    shutil.rmtree(out / "checkpoint-4")
    assert cli.main(command(out, "--steps", 6)) == 2
    assert re.search(f"--out {out} holds .* and no run of vgpo train", one_line(capsys))


def test_a_damaged_model_is_named(checkpoint, command, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    damage(model / "model.safetensors", "truncated")
    assert cli.main(command(tmp_path / "run", "--model", model)) == 2
    assert f"the weights of {model} are damaged" in one_line(capsys)


# Numbers that are not finite.


@pytest.mark.parametrize("preset", ["paper", "none"])
def test_a_loss_of_nan_stops_the_run_and_leaves_its_batch(command, tmp_path, monkeypatch, capsys, preset):
    build = train.build_trainer

    def build_sour(arguments):
        trainer = build(arguments)

        def overflow(module, arguments, hidden):
            fails = torch.is_grad_enabled() and trainer.state.global_step == 2
            return hidden * torch.nan if fails else hidden

        final_norm(trainer.model).register_forward_hook(overflow)
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_sour)
    out = tmp_path / "run"
    assert cli.main(command(out, "--steps", 6, "--vgpo", preset)) == 1
    batch = out / "nonfinite-step-3.safetensors"
    assert one_line(capsys) == (
        f"vgpo train: step 3: the loss is nan; its batch is in {batch}; the same command goes on from checkpoint-2"
    )
    with safe_open(batch, "pt") as file:
        assert file.metadata() == {"reason": "step 3: loss is nan"}
        assert set(file.keys()) >= {"completion_ids", "completion_mask", "pixel_values", "advantages", "logp", "loss"}
        assert file.get_tensor("loss").isnan()
        assert torch.equal(file.get_tensor("logp").isnan(), file.get_tensor("completion_mask").bool())
    assert [record["step"] for record in read_metrics(out / "metrics.jsonl")] == [1, 2]
    weights = AutoModelForImageTextToText.from_pretrained(out / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in weights.parameters())


def test_a_gradient_of_nan_stops_the_run_before_it_is_saved(command, tmp_path, monkeypatch, capsys):
    build = train.build_trainer

    def build_sour(arguments):
        trainer = build(arguments)
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * (torch.nan if trainer.state.global_step == 1 else 1.0))
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_sour)
    out = tmp_path / "run"
    assert cli.main(command(out, "--steps", 4)) == 1
    batch = out / "nonfinite-step-2.safetensors"
    assert f"step 2: the gradient's norm is nan; its batch is in {batch}" in one_line(capsys)
    assert batch.is_file() and not checkpoints(out)


# Without the trainer's packages.


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("PIL", "vgpo train: PIL is not installed; pip install 'vgpo-kernels[train]' brings it"),
        ("trl", "vgpo train: trl is not installed; pip install 'vgpo-kernels[train]' brings it"),
        ("safetensors", "vgpo train: safetensors is not installed; pip install 'vgpo-kernels[train]' brings it"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(dataset, tmp_path, module, message):
    code = f"import sys; sys.modules[{module!r}] = None; import vgpo_trainer.cli as c; sys.exit(c.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests")))}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "train",
            "--model",
            "M",
            "--dataset",
            str(dataset),
            "--out",
            str(tmp_path / "run"),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == message, done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_of_another_is_not_promised_by_the_extra(monkeypatch, capsys):
    def missing(_):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr("vgpo_trainer.commands.doctor.run", missing)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "vgpo doctor: timm is not installed\n"

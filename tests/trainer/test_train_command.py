"""`vgpo train`: whole runs from the command line, what goes on, what stays, and what is refused in a line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.importorskip("trl")

from trainer.tiny_runs import picture, save_model, save_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from vgpo_trainer.commands import train
from vgpo_trainer.data import DataSource, load_rows
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data"))


def options(checkpoint: Path, dataset: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", checkpoint, "--dataset", dataset, "--out", out, "--batch-size", 4, "--generations", 4]
    given += ["--max-completion-length", 8, "--use_cpu", "true", "--disable_tqdm", "true", *more]
    return [str(option) for option in given]


def test_vgpo_train_makes_a_model_that_loads_again(checkpoint, dataset, tmp_path, capsys):
    more = ["--steps", 2, "--vgpo", "released", "--vgpo_beta", "0.5", "--learning-rate", 1e-3, "--kl", 0.1]
    more += ["--entropy_coef", "0.1"]  # an untrained model gets no answer right, and would stay as it is
    out = tmp_path / "run"
    assert train.main(options(checkpoint, dataset, out, *more, "--eval-dataset", dataset, "--eval-every", 2)) == 0
    assert str(out / "model") in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["vgpo"]["beta"] == 0.5 and config["vgpo"]["score"] == "offset"
    assert config["training"]["max_steps"] == 2 and config["training"]["trust_remote_code"] is False
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert all("accuracy" in record and "kl" in record for record in records if "loss" in record)
    assert (out / "model" / "model.safetensors").is_file()
    card = (out / "model" / "README.md").read_text()
    assert f"- Training: `{dataset.name}`" in card and str(tmp_path) not in card
    assert {rollout.step for rollout in RunFolder(out).read_rollouts()} == {0, 1}
    page = (out / "report.html").read_text()
    assert f"VGPO: {checkpoint.name} on {dataset.name}" in page and "handwritten" not in page
    trained = AutoModelForImageTextToText.from_pretrained(out / "model")
    original = AutoModelForImageTextToText.from_pretrained(checkpoint)
    pairs = zip(trained.parameters(), original.parameters(), strict=True)
    assert any(not torch.equal(new, old) for new, old in pairs)
    processor = AutoProcessor.from_pretrained(out / "model")
    inputs = processor(images=picture(0), text="<image>Add the digits.", return_tensors="pt")
    assert trained(**inputs).logits.isfinite().all()


class _Stop(TrainerCallback):
    """Breaks a run off as Ctrl-C does."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_from_its_checkpoint(checkpoint, dataset, tmp_path, monkeypatch, capsys):
    def command(out: Path) -> list[str]:
        more = ["--steps", "4", "--save-every", "2", "--learning-rate", "1e-3"]
        return options(checkpoint, dataset, out, *more, "--reward", "trainer.tiny_runs:parity_reward")

    assert train.main(command(tmp_path / "whole")) == 0

    build = train.build_trainer

    def build_and_stop(arguments):
        trainer = build(arguments)
        trainer.add_callback(_Stop())
        return trainer

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_trainer", build_and_stop)
        assert train.main(command(broken)) == 130
    assert "goes on from checkpoint-2" in capsys.readouterr().err
    assert not (broken / "model").exists()
    (broken / "checkpoint-3").mkdir()  # cut short while it was written
    assert train.main([*command(broken), "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().out

    whole, resumed = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", broken))
    assert [record["step"] for record in resumed] == [1, 2, 3, 4]
    assert resumed[3]["seconds"] > resumed[2]["seconds"] > resumed[1]["seconds"]
    assert resumed[2]["loss"] != 0 != resumed[3]["loss"]
    for record, expected in zip(resumed, whole, strict=True):
        for name in ("loss", "reward", "vgpo/visual_focus", "vgpo/phi_std"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (record["step"], name)
    models = [AutoModelForImageTextToText.from_pretrained(folder / "model") for folder in (tmp_path / "whole", broken)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    assert train.main([*command(broken), "--no-resume"]) == 2
    assert "already has checkpoint-4" in capsys.readouterr().err
    assert train.main([*command(broken), "--vgpo", "none"]) == 2
    assert "holds a run with --vgpo paper, not none" in capsys.readouterr().err
    assert train.main([*command(tmp_path / "new"), "--resume"]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_vgpo_train_with_lora_and_a_reward_of_ones_own(checkpoint, dataset, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def even(completions, **_):\n    return [float(len(c[-1]['content']) % 2 == 0) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    more = ["--steps", "1", "--lora-rank", "2", "--reward", "own_reward:even", "--learning-rate", "1e-2"]
    assert train.main(options(checkpoint, dataset, tmp_path / "run", *more)) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "rewards/even/mean" in record and "vgpo/phi_std" in record
    adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["lora_alpha"] == 4
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert weights and all("language_model" in name for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dataset", "./nowhere"], "nowhere"),
        (["--los-type", "grpo"], "there is no option --los-type; did you mean --loss-type"),
        (["--loss_type", "ppo"], "loss_type must be one of"),
        (["--vgpo_beta", "foo"], "--vgpo_beta: invalid float value: 'foo'"),
        (["--generations", "3"], r"must be a multiple of --generations, got \d+ and 3"),
        (["--accumulate", "16"], "takes 16 prompts .* has 8"),
        (["--reward", "nothing"], "nothing"),
        (["--reward-weights", "1", "2"], "--reward-weights has 2 numbers for 1 rewards: exact_answer"),
        (["--model", "/nowhere/model"], "nowhere/model"),
        (["--set", "loss_type=ppo"], "--set is gone"),
        (["--lora-alpha", "8"], "lora_alpha has no effect without --lora-rank"),
        (["--lora-targets", "q_proj"], "lora_target_modules has no effect without --lora-rank"),
        (["--load-in-4bit"], "load_in_4bit needs --lora-rank"),
    ],
)
def test_vgpo_train_says_what_is_wrong(checkpoint, dataset, tmp_path, capsys, changes, message):
    assert train.main(options(checkpoint, dataset, tmp_path / "run", "--steps", "1", *changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vgpo train: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_asked_for(capsys):
    for line, missing in (
        (["--out", "run", "--dataset", "d"], "--model ID_OR_PATH is missing"),
        (["--out", "run", "--model", "m"], "--dataset ID_OR_PATH is missing"),
        (["--dataset", "d", "--model", "m"], "--out DIR is missing"),
    ):
        assert train.main(line) == 2
        assert missing in capsys.readouterr().err
    assert train.main([]) == 0
    assert "most used" in capsys.readouterr().out


def test_the_dataset_of_the_readme(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "digits.py"
    subprocess.run([sys.executable, example, tmp_path / "digits"], check=True, capture_output=True)
    for split, number in (("train", 2048), ("test", 64)):
        rows = load_rows(DataSource(str(tmp_path / "digits"), split=split, check_images=False)).dataset
        assert len(rows) == number and rows[0]["answer"].isdigit() and len(rows[0]["images"]) == 1


# The folder of a run.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", ["model", "something", "demo", "broken"])
def test_a_folder_of_something_else_is_left_as_it_is(dataset, tmp_path, capsys, kind):
    model = save_model(tmp_path / "model")
    out = model if kind == "model" else tmp_path / kind
    out.mkdir(exist_ok=True)
    if kind == "something":
        (out / "thesis.tex").write_text("x")
    elif kind == "demo":
        (out / "config.json").write_text('{"command": "demo"}')
    elif kind == "broken":
        (out / "config.json").write_text("{")
    before = contents(out)
    assert train.main(options(model, dataset, out, "--steps", "1")) == 2
    error = capsys.readouterr().err
    expected = "--out and --model are the same folder" if kind == "model" else "holds .* and no run of vgpo train"
    assert re.search(expected, error) and contents(out) == before
    out.with_suffix(".file").write_text("")
    assert train.main(options(model, dataset, out.with_suffix(".file"), "--steps", "1")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(checkpoint, dataset, tmp_path_factory) -> Path:
    """A run of two steps, and a checkpoint after each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(short(checkpoint, dataset, out)) == 0
    return out


def short(checkpoint: Path, dataset: Path, out: Path, *more: str) -> list[str]:
    given = ["--save-every", "1", "--learning-rate", "1e-3", "--reward", "trainer.tiny_runs:parity_reward"]
    return options(checkpoint, dataset, out, "--steps", "2", *given, *more)


def test_a_finished_run_stays_as_it_is(checkpoint, dataset, finished, capsys):
    before = contents(finished)
    for more in ([], ["--steps", "1"], ["--resume"], ["--epochs", "0.1", "--steps", "-1"]):
        assert train.main(short(checkpoint, dataset, finished, *more)) == 0
        assert "is finished, after 2 steps: more --steps or --epochs go on" in capsys.readouterr().out
    assert contents(finished) == before


def test_steps_go_before_epochs(checkpoint, dataset, tmp_path, capsys):
    """Eight rows, one a step: an eighth of an epoch is one step, and --steps are as many whatever --epochs says."""
    out = tmp_path / "run"
    command = [*options(checkpoint, dataset, out), "--reward", "trainer.tiny_runs:parity_reward", "--epochs", "0.125"]
    assert train.main(command) == 0
    assert RunFolder(out).read_config()["finished"]["global_step"] == 1
    assert "steps go before epochs" not in capsys.readouterr().err
    assert train.main([*command, "--steps", "2"]) == 0
    assert RunFolder(out).read_config()["finished"]["global_step"] == 2
    said = capsys.readouterr().err
    assert "--steps 2 --epochs 0.125: steps go before epochs, and the run ends after 2 steps\n" in said


def test_two_runs_do_not_share_a_folder(checkpoint, dataset, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert train.main(short(checkpoint, dataset, out)) == 2
        assert f"another process is training in {out}" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert train.main(short(checkpoint, dataset, out)) == 0


def test_an_error_that_nobody_foresaw_is_a_line_and_a_traceback_in_a_file(checkpoint, dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(short(checkpoint, dataset, out, "--eval_on_start", "true")) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vgpo train: ")]
    assert re.fullmatch(rf"vgpo train: ValueError: .*eval_dataset.*; the traceback is in {out / 'error-0.txt'}", said)
    assert "Traceback" in (out / "error-0.txt").read_text()


def test_a_run_that_lacks_only_its_model_writes_it(checkpoint, dataset, finished, tmp_path, capsys):
    """As where the disk was full at the very end."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    before = contents(out)
    assert train.main(short(checkpoint, dataset, out)) == 0
    after = contents(out)
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    weights = "model/model.safetensors"
    assert after[weights] == (finished / weights).read_bytes()
    assert after["checkpoint-2/model.safetensors"] == before["checkpoint-2/model.safetensors"]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_more_steps_go_on_with_the_schedule_of_all(checkpoint, dataset, tmp_path, schedule):
    """As if it had been asked for as many steps from the start, from here on."""
    more = ["--lr_scheduler_type", schedule]
    assert train.main(short(checkpoint, dataset, tmp_path / "run", *more)) == 0
    for out, steps in (("run", "5"), ("whole", "5")):
        assert train.main(short(checkpoint, dataset, tmp_path / out, *more, "--steps", steps)) == 0
    extended, whole = (read_metrics(tmp_path / out / "metrics.jsonl") for out in ("run", "whole"))
    assert [record["step"] for record in extended] == [1, 2, 3, 4, 5]
    rates = [[record["learning_rate"] for record in records] for records in (extended, whole)]
    assert rates[0][2:] == rates[1][2:] and len(set(rates[1])) == (1 if schedule == "constant" else 5)
    if schedule == "constant":
        assert [record["loss"] for record in extended] == pytest.approx([record["loss"] for record in whole], rel=1e-4)


def test_a_run_that_logs_no_step_is_done_without_a_report(checkpoint, dataset, tmp_path, capsys):
    line = options(checkpoint, dataset, tmp_path / "run", "--steps", 1, "--logging-steps", 2)
    assert train.main(line) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"model: {tmp_path / 'run' / 'model'}"
    assert train.main(line) == 0 and "is finished" in capsys.readouterr().out


def test_a_run_is_made_again_from_its_config(checkpoint, dataset, finished, tmp_path, capsys):
    config = finished / "config.json"
    assert train.main(["--config", str(config)]) == 0
    assert "is finished" in capsys.readouterr().out
    again = tmp_path / "again"
    assert train.main(["--config", str(config), "--out", str(again)]) == 0
    records = [read_metrics(out / "metrics.jsonl") for out in (finished, again)]
    assert [record["loss"] for record in records[0]] == [record["loss"] for record in records[1]]
    for line, message in (
        (["--learning-rate", "1e-4"], "holds a run with --learning-rate 0.001, not 0.0001"),
        (["--reward", "exact_answer"], "holds a run with --reward trainer.tiny_runs:parity_reward, not exact_answer"),
    ):
        assert train.main(["--config", str(config), *line]) == 2
        assert message in capsys.readouterr().err

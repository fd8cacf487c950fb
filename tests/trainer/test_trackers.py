"""What trackers of experiments receive: the numbers of ``metrics.jsonl``, through their own packages."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl")

from trainer.tiny_runs import make_trainer, rows
from transformers import TrainerCallback
from vgpo_trainer.runs import trackers
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.trackers import check_trackers

torch.set_num_threads(1)


def run(folder, tracker, **settings):
    """A run whose second step is of text alone, and an evaluation; its records without what is null."""
    trainer = make_trainer(
        folder,
        report_to=tracker,
        run_name="of-a-test",
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        dataset=rows([0, 1]),
        shuffle_dataset=False,
        arguments={"eval_dataset": rows([1, 1])},
        **settings,
    )
    trainer.train()
    text, image, evaluation = read_metrics(folder / "metrics.jsonl")
    assert text["vgpo/visual_focus"] is None and image["vgpo/visual_focus"] > 0
    return trainer, [
        {name: value for name, value in record.items() if value is not None} for record in (text, image, evaluation)
    ]


def as_tracked(record):
    """The names under which transformers hands a record to trackers."""
    kept = {name: value for name, value in record.items() if name not in ("step", "seconds")}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in kept.items()
    }


def test_tensorboard(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, records = run(tmp_path, "tensorboard", log_completions=True)
    (events,) = tmp_path.glob("runs/*/events*")
    read = EventAccumulator(str(events)).Reload()
    tracked = {(name, event.step): event.value for name in read.Tags()["scalars"] for event in read.Scalars(name)}
    for record in records:
        for name, value in as_tracked(record).items():
            assert tracked[name, record["step"]] == pytest.approx(value, rel=1e-6), name
    assert ("train/vgpo/visual_focus", 1) not in tracked
    assert "None" not in caplog.text


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio.utils, trackio.sqlite_storage):  # read from the environment when they were imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    _, records = run(tmp_path, "trackio", log_completions=True)
    logged = SQLiteStorage.get_logs("huggingface", "of-a-test")
    steps = [log for log in logged if "train/loss" in log]
    (measured,) = [log for log in logged if "eval/loss" in log]
    for log, record in zip([*steps, measured], records, strict=True):
        assert {name: log[name] for name in as_tracked(record)} == as_tracked(record)
        assert log["train/global_step"] == record["step"] and None not in log.values()
    tables = [log["completions"] for log in logged if "completions" in log]
    assert len(tables) == 4  # that of each record, and TRL's last one with its summary


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, (_, image, evaluation) = run(tmp_path, "wandb", log_completions=True)
    try:
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    for record in (image, evaluation):
        tracked = as_tracked(record)
        assert {name: summary[name] for name in tracked} == tracked
    assert summary["completions"]["nrows"] == 4


@pytest.mark.parametrize("name", ["tensorboard", "comet_ml"])
def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["wandb"])
    check_trackers("wandb")
    check_trackers([])
    package = {"comet_ml": "comet-ml"}.get(name, name)
    message = f"report_to={name} needs a package that is not installed: pip install {package}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_trainer(tmp_path, report_to=name)


def test_what_is_null_reaches_no_callback_and_not_finite_does(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = {}

    class Last(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.update(logs)

    trainer.add_callback(Last())
    trainer._metrics["train"]["nothing"] = [math.nan]
    trainer.log({"loss": math.nan, "grad_norm": 1.0})
    assert math.isnan(seen["loss"]) and "nothing" not in seen
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] is None and record["nothing"] is None

"""The demo end to end at its smallest, and its command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl")

from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor
from vgpo_trainer.cli import build_parser, main
from vgpo_trainer.demo.digits import make_problems
from vgpo_trainer.demo.display import DemoDisplay, describe_accuracy, sparkline
from vgpo_trainer.demo.evaluation import Evaluation, evaluate
from vgpo_trainer.demo.settings import DemoSettings
from vgpo_trainer.demo.training import build_trainer, run_demo
from vgpo_trainer.demo.warm_start import SHIPPED, load_checkpoint
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.runs.metrics import read_metrics

torch.set_num_threads(1)
SMALL = {"steps": 2, "prompts": 3, "generations": 4, "evaluation_problems": 8, "evaluate_every": 1}


def demo_command(out, *more):
    sizes = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["demo", "--out", str(out), *sizes, *more]


def quiet_display():
    return DemoDisplay(2, Console(quiet=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A demo of two steps through the command line."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(demo_command(folder)) == 0
    return RunFolder(folder)


def test_folder_holds_everything(run):
    names = {path.name for path in run.path.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "evaluation.json",
        "rollouts.jsonl",
        "images",
        "model",
        "report.html",
    }
    assert not [path for path in run.model.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_config_names_every_setting_and_version(run):
    config = run.read_config()
    settings = config["settings"]
    assert settings["out"] == str(run.path)
    assert {name: settings[name] for name in SMALL} == SMALL
    assert set(settings) == set(DemoSettings.__dataclass_fields__)
    assert config["versions"]["torch"] == torch.__version__
    assert config["vgpo"]["beta"] == 0.3
    assert config["result"]["steps"] == 2


def test_metrics_have_steps_and_evaluations(run):
    records = read_metrics(run.metrics)
    steps = [record for record in records if "reward" in record]
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert 0 <= record["reward"] == record["accuracy"] <= 1
        assert -1 <= record["vgpo/visual_focus"] <= 1
    measured = [record for record in records if "eval_accuracy" in record]
    assert [record["step"] for record in measured] == [0, 1, 2]
    assert all(
        record["eval_accuracy_low"] <= record["eval_accuracy"] <= record["eval_accuracy_high"] for record in measured
    )


def test_rollouts_are_whole_groups_with_their_image(run):
    rollouts = run.read_rollouts()
    assert len(rollouts) == SMALL["steps"] * SMALL["prompts"] * SMALL["generations"]
    for rollout in rollouts:
        assert len(rollout.tokens) == len(rollout.cos) == len(rollout.psi) == len(rollout.factors) > 0
        assert rollout.reward == float(rollout.correct)
        assert (run.images / rollout.image).is_file()
        expected = [(1 + psi) * (1 + rollout.phi) for psi in rollout.psi]
        assert rollout.factors == pytest.approx(expected, abs=1e-5)


def test_report_tells_the_evaluation(run):
    text = run.report.read_text()
    evaluation = run.read_evaluation()
    assert f"{evaluation['before']['accuracy']:.1%} → {evaluation['after']['accuracy']:.1%}" in text
    assert text.count("<svg") == 6
    assert "<script" not in text


def test_report_links_pages_of_what_the_model_looks_at(run):
    pages = sorted(path.name for path in run.inspections.iterdir())
    assert pages == sorted(set(re.findall(r'href="inspect/([0-9a-f]+\.html)"', run.report.read_text())))
    assert 1 <= len(pages) <= 4
    answers = {example["image"]: example["after"] for example in run.read_evaluation()["examples"]}
    for image, answer in answers.items():
        if run.inspection(image).is_file():
            data = json.loads(re.search(r'id="data">(.*?)</script>', run.inspection(image).read_text()).group(1))
            tokens = [token for token in data["tokens"] if not token.startswith("<")]
            assert "".join(tokens).replace(" ", "") == answer.replace(" ", "")


def test_report_links_probes_of_the_model_before_and_after_training(run):
    links = re.findall(r'href="(probe/[a-z]+\.html)"', run.report.read_text())
    assert links == ["probe/before.html", "probe/after.html"]
    before, after = (json.loads((run.path / link).with_suffix(".json").read_text()) for link in links)
    assert before["model"] == "model before training with VGPO" and after["model"] == "model after training with VGPO"
    assert before["prompts"] == after["prompts"] == SMALL["evaluation_problems"]
    # Two steps have changed the model a little.
    assert before["examples"] != after["examples"] and before["gain_at"] == after["gain_at"]
    assert all(sentence.split("'")[0] in (run.path / links[1]).read_text() for sentence in after["verdict"])


def test_checkpoint_loads_again_and_answers_as_it_did(run):
    model = AutoModelForImageTextToText.from_pretrained(run.model)
    processor = AutoProcessor.from_pretrained(run.model)
    evaluation = run.read_evaluation()
    problems = make_problems(SMALL["evaluation_problems"], "held_out", 2_000_003)
    assert [list(problem.digits) for problem in problems] == [item["digits"] for item in evaluation["responses"]]
    again = evaluate(model, processor, problems)
    assert again.responses == [item["after"] for item in evaluation["responses"]]
    assert again.accuracy == evaluation["after"]["accuracy"]


def test_same_seed_same_run(run, tmp_path):
    settings = DemoSettings(tmp_path / "again", **SMALL)
    RunFolder(settings.out).create()
    with quiet_display() as display:
        result = run_demo(settings, display)
    rewards = [[r["reward"] for r in read_metrics(f.metrics) if "reward" in r] for f in (run, result.folder)]
    assert rewards[0] == rewards[1]
    assert [r.tokens for r in run.read_rollouts()] == [r.tokens for r in result.folder.read_rollouts()]


def test_dapo_leaves_the_loss_alone_but_records_the_signal(tmp_path, capsys):
    out = tmp_path / "dapo"
    assert main(demo_command(out, "--algo", "dapo", "--steps", "1", "--evaluate-every", "1")) == 0
    run = RunFolder(out)
    assert run.read_config()["vgpo"] is None
    [record] = [record for record in read_metrics(run.metrics) if "reward" in record]
    assert record["vgpo/visual_focus"] != 0
    assert any(factor != 1 for rollout in run.read_rollouts() for factor in rollout.factors)
    assert "DAPO does not use these weights" in run.report.read_text()
    assert str(run.report) in capsys.readouterr().out


def test_stops_early_when_the_time_is_up(tmp_path):
    settings = DemoSettings(tmp_path / "short", **{**SMALL, "steps": 50, "evaluate_every": 50}, minutes=0.01)
    RunFolder(settings.out).create()
    with quiet_display() as display:
        result = run_demo(settings, display)
    assert result.steps == 1
    measured = [record["step"] for record in read_metrics(result.folder.metrics) if "eval_accuracy" in record]
    assert measured == [0, 1]
    assert result.folder.read_config()["result"]["steps"] == 1


def test_the_cpu_is_kept_to_beside_the_gpu_of_a_mac(tmp_path, monkeypatch):
    """Which transformers takes by itself, whatever the environment says of accelerate's devices."""
    monkeypatch.setattr("transformers.training_args.is_torch_mps_available", lambda: True)
    kept = build_parser().parse_args(["demo", "--use-cpu"]).use_cpu
    trainer = build_trainer(DemoSettings(tmp_path, use_cpu=kept, **SMALL), *load_checkpoint(SHIPPED))
    assert trainer.args.device.type == trainer.model.device.type == "cpu"


@pytest.mark.slow
def test_fresh_warm_start(tmp_path):
    out = tmp_path / "fresh"
    more = ["--warm-start", "fresh", "--warm-start-steps", "1", "--steps", "1"]
    assert main(demo_command(out, *more)) == 0
    assert RunFolder(out).read_evaluation()["before"]["accuracy"] == 0


def test_interruption_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vgpo_trainer.demo.training.run_demo", interrupt)
    assert main(demo_command(tmp_path / "run")) == 130
    assert capsys.readouterr().err.startswith("vgpo demo: interrupted")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generations", "1"], "--generations must be at least 2"),
        (["--learning-rate", "0"], "--learning-rate must be positive"),
        (["--learning-rate", "nan"], "--learning-rate must be positive"),
        (["--temperature", "-1"], "--temperature must be positive"),
        (["--minutes", "0"], "--minutes must be positive"),
    ],
)
def test_settings_that_cannot_run(options, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vgpo demo: {message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [["--steps", "0"], ["--steps", "many"], ["--seed", "-1"], ["--algo", "ppo"], ["--prompts", "-3"], ["--nonsense"]],
)
def test_options_that_do_not_parse(options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *options])
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_folder_in_use(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "vgpo demo" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vgpo_kernels ")


def test_missing_dependency_is_one_line(monkeypatch, capsys):
    def missing(_):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr("vgpo_trainer.commands.doctor.run", missing)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("vgpo doctor: trl is not installed; pip install")


def test_help_does_not_wait_for_torch():
    code = "import sys, vgpo_trainer.cli as c; c.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_display_on_a_terminal_shows_progress_and_no_markup(tmp_path):
    with open(tmp_path / "terminal", "w+") as file:
        console = Console(file=file, force_terminal=True, width=100)
        with DemoDisplay(4, console) as display:
            display.stage("[red]stage[/red]")
            display.stepped(1, {"reward": 0.5, "entropy": 0.25, "vgpo/visual_focus": 0.125})
            display.evaluated(1, Evaluation(["a", "b"], [True, False]))
            display._live.refresh()
        file.seek(0)
        shown = file.read()
    assert "[red]stage[/red]" in shown
    assert "1/4" in shown and "entropy 0.250" in shown and "50.0%" in shown


def test_accuracy_in_words():
    assert describe_accuracy(Evaluation(["x"] * 20, [False] * 20)) == "0.0% (95% interval 0.0% to 16.1%, 20 problems)"


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0, float("nan"), 7.0]) == "▁▅█ █"


def test_evaluation_file_is_json_with_all_responses(run):
    evaluation = json.loads(run.evaluation.read_text())
    assert len(evaluation["responses"]) == evaluation["problems"] == 8
    right = sum(item["answer"] == item["after"].rsplit(". ", 1)[-1] for item in evaluation["responses"])
    assert right == round(8 * evaluation["after"]["accuracy"])

"""The options of `vgpo train`: TRL's fields as flags, files of settings, and help that waits for nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

pytest.importorskip("trl")

from PIL import Image
from trl import GRPOConfig, ModelConfig
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.data import DataSource, load_rows
from vgpo_trainer.options.help import help_parser, settings_groups
from vgpo_trainer.options.names import DEFAULTS, SHORT_NAMES
from vgpo_trainer.options.parser import OptionError, _settle_training, parse_options, read_config
from vgpo_trainer.signals import SIGNALS, VIEWS

CPU = ["--use_cpu", "true"]
ASKED = ["--model", "m", "--dataset", "d", "--out", "run", *CPU]


def test_every_field_of_trl_and_vgpo_is_an_option_with_its_help():
    """The help reads the source; here is what the classes themselves say."""
    shown = {field.name: field for _, listed in settings_groups() for field in listed}
    real = {field.name: field for kind in (VGPOTrainingConfig, ModelConfig) for field in fields(kind) if field.init}
    assert shown.keys() == real.keys()
    for name, field in real.items():
        assert shown[name].text == " ".join(str(field.metadata.get("help", "")).split()), name
    text = help_parser().format_help()
    for name in real:
        assert f"--{name.replace('_', '-')}" in text, name
    assert all(signal in shown["signal"].text for signal in SIGNALS)
    assert all(view in shown["view"].text for view in VIEWS)


def test_the_help_waits_for_no_library():
    code = "import sys; from vgpo_trainer.cli import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--vgpo-beta" in done.stdout and done.stderr == ""
    assert time.perf_counter() - start < 10  # 0.2 s on a quiet machine


def test_the_help_shows_a_row_that_is_read(tmp_path):
    text = help_parser().format_help()
    (line,) = re.findall(r"^ *({.*})$", text, re.MULTILINE)
    row = json.loads(line)
    for name in ("image", "question", "answer"):
        assert name in row and re.search(rf"^  {name}  ", text, re.MULTILINE), name
    (tmp_path / row["image"]).parent.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    (tmp_path / "rows.jsonl").write_text(line)
    (read,) = load_rows(DataSource(tmp_path / "rows.jsonl")).dataset
    (message,) = read["prompt"]
    parts = [part.get("text", part["type"]) for part in message["content"]]
    assert parts == ["image", row["question"].removeprefix("<image>")]
    assert read["answer"] == row["answer"] and [image.size for image in read["images"]] == [(8, 8)]


def test_what_is_given_and_what_follows(tmp_path):
    options = parse_options([*ASKED, "--steps", "3", "--lora-rank", "4", "--eval-split", "test", "--batch-size", "16"])
    training = options.training
    assert type(training) is VGPOTrainingConfig and training.max_steps == 3
    assert {name: getattr(training, name) for name in DEFAULTS} == DEFAULTS
    assert training.report_to == [] and training.bf16 is False
    assert (training.eval_strategy, training.per_device_eval_batch_size) == ("steps", 16)
    assert options.model.use_peft and (options.model.lora_r, options.model.lora_alpha) == (4, 8)
    assert options.model.lora_dropout == 0
    assert options.own.eval_split == "test" and options.own.reward is None
    assert options.given["max_steps"] == 3 and "save_steps" not in options.given
    plain = parse_options(ASKED)
    assert plain.training.eval_strategy == "no" and not plain.model.use_peft


@pytest.mark.parametrize(("kind", "pins"), [("mps", False), ("xpu", True), (None, False)])
def test_an_accelerator_decides_what_is_not_given(monkeypatch, kind, pins):
    """Numbers in bf16 where transformers takes them there, and pinned memory where there is such a thing."""
    found = kind and torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    for supported in (False, True):
        monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda supported=supported: supported)
        training = {"output_dir": "run"}
        _settle_training(training, {"eval_dataset": None, "eval_split": None})
        assert training["bf16"] is supported and training.get("dataloader_pin_memory", True) is pins
    for given in ({"use_cpu": True}, {"bf16": False}, {"fp16": True}):
        training = {"output_dir": "run", **given}
        _settle_training(training, {"eval_dataset": None, "eval_split": None})
        assert not training.get("bf16")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate=1e-4"], "learning_rate", 1e-4),
        (["--vgpo-beta", "0.5"], "vgpo_beta", 0.5),
        (["--vgpo_intra_clamp", "0.5", "2"], "vgpo_intra_clamp", [0.5, 2.0]),
        (["--no-fused-head"], "fused_head", False),
        (["--vgpo_gate", "false"], "vgpo_gate", False),
        (["--mask_truncated_completions"], "mask_truncated_completions", True),
        (["--epsilon-high", "none"], "epsilon_high", None),
        (["--vgpo-gate=none"], "vgpo_gate", None),
        (["--reward_weights", "none", "--kl", "0"], "reward_weights", None),
        (["--generation-kwargs", "none"], "generation_kwargs", None),
        (["--run_name", "none"], "run_name", "none"),
        (["--lr_scheduler_kwargs", "none"], "lr_scheduler_kwargs", None),
        (["--generation_kwargs", '{"top_k": 5}'], "generation_kwargs", {"top_k": 5}),
        (["--reward-weights", "1", "0.5"], "reward_weights", [1.0, 0.5]),
        (["--kl", "0.01"], "beta", 0.01),
        (["--save_every", "7"], "save_steps", 7),
    ],
)
def test_fields_are_flags(line, name, value):
    assert getattr(parse_options([*ASKED, *line]).training, name) == value


@pytest.mark.parametrize(
    "line",
    [
        ["--reward", "a.py:f", "--reward", "m:g"],
        ["--reward", "a.py:f", "m:g"],
        ["--reward_funcs", "a.py:f", "m:g"],
    ],
)
def test_rewards_add_up(line):
    assert parse_options([*ASKED, *line]).own.reward == ["a.py:f", "m:g"]


def test_options_of_trl_grpo_are_known_by_its_names():
    line = ["--model_name_or_path", "m", "--output_dir", "run", "--dataset_name", "d", "--dataset_config", "c", *CPU]
    options = parse_options([*line, "--dataset_train_split", "a", "--dataset_test_split", "b", "--use_peft"])
    own = options.own
    assert (own.dataset, own.dataset_config, own.split, own.eval_split) == ("d", "c", "a", "b")
    assert options.model.use_peft and options.model.lora_r == 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--los-type", "grpo"], "there is no option --los-type; did you mean --loss-type?"),
        (["--step", "3"], "there is no option --step; did you mean --steps?"),  # no abbreviation of it
        (["--zzz"], "there is no option --zzz; vgpo train --help lists them"),
        (
            ["--set", "beta=1"],
            "--set is gone: every setting is an option of its own, --use_cpu true or --beta 0.01 say",
        ),
        (["--learning-rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--steps", "two"], "--max_steps: invalid int value: 'two'"),
        (["--vgpo_beta", "foo"], "--vgpo_beta: invalid float value: 'foo'"),
        (["--fused-head", "maybe"], "--fused_head: Truthy value expected: got maybe"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--learning-rate"], "--learning_rate: expected one argument"),
        (["--loss-type", "ppo", "3"], "unexpected argument '3'"),
        (["--vgpo", "best"], "vgpo must be one of paper, released or None, got 'best'"),
        (["--signal", "gaze"], "signal must be one of focus, attention, dependency, similarity, k3, logp_change, js"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0"),
        (["--vgpo_top_ratio", "2"], "top_ratio must be in"),
        (["--generations", "3"], "must be a multiple of --generations, got 8 and 3"),
        (["--generation_kwargs", "{top_k}"], "generation_kwargs"),
        (["--optim", "adam9"], "--optim: invalid choice: 'adam9'"),
        (["--lr_scheduler_type", "steep"], "--lr_scheduler_type: invalid choice: 'steep'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given more than once"),
        (["--generations", "0"], "--num_generations must be an integer of at least 1, got 0"),
        (["--steps", "0"], "--max_steps must be at least 1, or -1 where --num_train_epochs is to count, got 0"),
        (["--epochs", "0"], "--num_train_epochs must be finite and positive, got 0.0"),
        (["--epochs", "inf"], "--num_train_epochs must be finite and positive, got inf"),
        (["--batch-size", "0"], "--per_device_train_batch_size must be an integer of at least 1, got 0"),
        (["--accumulate", "-1"], "--gradient_accumulation_steps must be an integer of at least 1, got -1"),
        (["--save-every", "inf"], "a setting is out of range: cannot convert float infinity to integer"),
        (["--resume_from_checkpoint", "a"], "--resume_from_checkpoint has no effect here"),
        (["--lr_scheduler_kwargs", "x"], "--lr_scheduler_kwargs must be a JSON object, got 'x'"),
        (["--lr_scheduler_kwargs", '{"a": 1}'], "no schedule can be made"),
        (["--warmup-steps", "nan"], "no schedule can be made"),
        (["--learning-rate", "nan"], "no optimiser can be made"),
        (["--adam-beta1", "3"], "no optimiser can be made"),
        (["--optim-args", "x"], "no optimiser can be made"),
        (["--top-p", "2"], "--top_p must be at most 1, got 2.0"),
        (["--kl", "nan"], "--beta must be finite and not negative, got nan"),
        (["--scale-rewards", "x"], "--scale_rewards must be one of group, batch, none, true, false, got 'x'"),
        (["--reward-weights", "nan"], "--reward_weights must be finite, got nan"),
    ],
)
def test_a_wrong_option_is_one_line(line, message):
    with pytest.raises((ValueError, OSError)) as caught:
        parse_options([*ASKED, *line])
    assert message in str(caught.value) and "\n" not in str(caught.value).strip()


def test_the_folder_is_asked_for():
    with pytest.raises(OptionError, match="--out DIR is missing"):
        parse_options(["--model", "m", "--dataset", "d", *CPU])


def test_a_file_of_settings(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\nout: run\nuse_cpu: true\nlearning_rate: 1e-4\nsteps: 5\nkl: 0.01\nlora-rank: 8\n"
        "reward: [a.py:f, m:g]\nreward_weights: [1, 2]\nsystem: '- be brief'\ngeneration_kwargs: {top_k: 5}\n"
        "vgpo_intra_clamp: []\nfused_head: false\nepsilon_high: null\nskip_bad_rows: true\nenv: {VGPO_SAID: 7}\n"
    )
    monkeypatch.delenv("VGPO_SAID", raising=False)
    options = parse_options(["--config", str(path), "--steps", "2", "--reward", "b.py:h"])
    training = options.training
    assert training.learning_rate == 1e-4  # text to YAML
    assert (training.max_steps, training.beta, training.fused_head) == (2, 0.01, False)
    assert training.generation_kwargs == {"top_k": 5} and training.epsilon_high is None
    assert training.reward_weights == [1, 2] and training.vgpo_config().intra_clamp is None
    assert options.own.reward == ["b.py:h"] and options.own.system == "- be brief" and options.own.skip_bad_rows
    assert options.model.lora_r == 8 and options.model.use_peft
    import os

    assert os.environ.pop("VGPO_SAID") == "7"


def test_what_was_given_can_be_read_back(tmp_path):
    line = [*ASKED, "--steps", "3", "--reward", "a.py:f", "--lora-rank", "4", "--no-fused-head", "--resume"]
    first = parse_options([*line, "--vgpo_intra_clamp", "0.5", "2", "--system", "Be brief."])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"run": {}, "arguments": first.given, "versions": {}}))
    again = parse_options(["--config", str(path)])
    assert again.given == first.given and again.own == first.own and again.model == first.model
    assert again.training.to_dict() == first.training.to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold names and values, got list"),
        ("a: [", "is neither YAML nor JSON"),
        ("los_type: grpo\n", "there is no option los_type; did you mean --loss-type?"),
        ("steps: two\n", "max_steps: invalid int value: 'two'"),
        ("steps: [2]\n", "steps must be of the type <class 'int'>, got [2]"),
        ("reward: [3]\n", "reward must be a name or a list of names, got [3]"),
        ("reward: {a: 1}\n", "reward must be a name or a list of names, got {'a': 1}"),
        ("skip_bad_rows: sometimes\n", "skip_bad_rows must be true or false, got 'sometimes'"),
        ("system: [a]\n", "system must be one value, got ['a']"),
        ("max_pixels: 0\n", "max-pixels: must be positive, got 0"),
        ("config: other.yaml\n", "there is no option config"),
        ("env: 3\n", "env must hold names and values, got int"),
        ("env: {a=b: 3}\n", "env holds a name or value that no environment has"),
        ("steps: 1\nmax_steps: 2\n", "steps and max_steps are the same option"),
    ],
)
def test_a_wrong_file_of_settings_is_one_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"--config {path}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000])
def test_a_file_of_settings_that_is_no_text_or_too_deep_is_named(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"run\.json is neither YAML nor JSON"):
        read_config(path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"steps": 3}', encoding="utf-8-sig")
    assert read_config(path) == {"max_steps": 3}


def test_short_names_are_of_fields():
    known = {field.name for kind in (VGPOTrainingConfig, ModelConfig) for field in fields(kind)}
    assert known >= SHORT_NAMES.keys() and known >= DEFAULTS.keys()
    short = [name for name, _ in SHORT_NAMES.values()]
    assert len(set(short)) == len(short) and not known & set(short)
    assert all(getattr(GRPOConfig, name, None) != value for name, value in DEFAULTS.items())

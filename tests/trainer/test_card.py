"""The model card: true to the run, valid for the hub, and without what belongs to this machine alone."""

from __future__ import annotations

import re
import shlex

import pytest
import torch

pytest.importorskip("trl")

from huggingface_hub import ModelCard
from peft import LoraConfig
from trainer.tiny_runs import make_trainer, rows, save_model
from vgpo_trainer.runs.card import (
    RunFacts,
    changed_settings,
    code,
    is_hub_id,
    plain_text,
    short_name,
    shown_command,
    write_card,
)
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.writing import RunFailure

torch.set_num_threads(1)
ATTACK = "a`|<script>\n# head"


def parts(path):
    """The metadata of a card, checked as the hub reads it, and its text."""
    card = ModelCard.load(path)
    assert card.content.startswith("---\n") and card.data.to_dict()["tags"]
    return card.data, card.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps and two evaluations of a model in a folder."""
    home = tmp_path_factory.mktemp("home")
    trainer = make_trainer(
        home / "run",
        model=str(save_model(home / "tiny-vlm")),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        vgpo_beta=0.5,
        hub_token="hf_secret",
        run_name="of a test",
        arguments={"eval_dataset": rows([1] * 3)},
    )
    trainer.run_facts = RunFacts("org/data", "train", str(home / "held-out"), ("vgpo", "train", f"--out={home}/run"))
    trainer.train()
    return trainer


def test_it_says_what_was_trained_and_how(trained, tmp_path):
    data, text = parts(write_card(trained, tmp_path / "model"))
    assert data.datasets == ["org/data"] and data.base_model is None  # a folder is no model of the hub
    assert data.library_name == "transformers" and data.pipeline_tag == "image-text-to-text"
    assert data.tags == ["generated_from_trainer", "grpo", "trl", "vgpo"] and data.model_name == "run"
    assert (
        "`tiny-vlm`, trained with VGPO ([Visually-Guided Policy Optimization](https://arxiv.org/abs/2604.09349))"
        in text
    )
    assert "- Training: [org/data](https://huggingface.co/datasets/org/data), split `train`, 8 rows" in text
    assert "- Evaluation: `held-out`, 3 rows" in text
    assert "- VGPO: preset `paper`, with `vgpo_beta` `0.5`" in text and "- Visual signal: `focus`. Cosine" in text
    assert "| `learning_rate` | `0.001` |" in text and "- Loss: `dapo`, seed 42" in text
    assert "vgpo train --out=run\n" in text
    assert f"torch {torch.__version__}" in text and "2604.09349" in text


def test_its_numbers_are_those_of_the_metrics(trained, tmp_path):
    _, text = parts(write_card(trained, tmp_path))
    records = read_metrics(f"{trained.args.output_dir}/metrics.jsonl")
    first, last = [record for record in records if "reward" in record]
    before, after = [record for record in records if "eval_reward" in record]
    for name, key in (("reward", "reward"), ("accuracy", "accuracy"), ("visual focus", "vgpo/visual_focus")):
        assert f"| {name} | {first[key]:.4g} | {last[key]:.4g} | first and last step |" in text
    assert f"| held-out reward | {before['eval_reward']:.4g} | {after['eval_reward']:.4g} | after step 1 and" in text
    assert re.search(r"^2 steps in 0\.\d min on CPU\.$", text, re.MULTILINE)


def test_nothing_of_this_machine_and_no_secret_is_in_it(trained, tmp_path):
    text = write_card(trained, tmp_path).read_text()
    home = str(trained.args.output_dir).rpartition("/")[0]
    assert home not in text and "/tmp" not in text and "secret" not in text and "of a test" not in text


def test_trl_writes_ours_beside_its_checkpoints(trained, tmp_path):
    with open(f"{trained.args.output_dir}/README.md") as file:
        assert "## Method" in file.read()
    trained.create_model_card(model_name="other", dataset_name="someone/else", tags="mine")
    data, text = parts(f"{trained.args.output_dir}/README.md")
    assert data.model_name == "other" and data.datasets == ["someone/else"] and "mine" in data.tags
    assert "split `train`" in text


def test_an_adapter_and_a_loss_without_vgpo(tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        model=str(save_model(tmp_path / "tiny-vlm")),
        vgpo="none",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        arguments={"peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])},
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert str(tmp_path) in (tmp_path / "model" / "README.md").read_text()  # of PEFT, which names the folder
    write_card(trainer, tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "run" / "checkpoint-1"):
        data, text = parts(folder / "README.md")
        assert data.library_name == "peft" and str(tmp_path) not in data.to_yaml() + text
        assert "trained with TRL's dapo loss by" in text and "Visual signal: not in the loss" in text
        assert "- Trained weights: a LORA adapter of rank 4, alpha 8, on `q_proj`, `v_proj`" in text
        assert "| reward |" not in text and "a dataset in memory, 8 rows" in text


def test_names_from_data_stay_names(trained, tmp_path):
    facts = RunFacts(f"/data/{ATTACK}", ATTACK, command=("vgpo", "train", "--system", f"```\n{ATTACK}"))
    data, text = parts(write_card(trained, tmp_path, facts, name=f"x: {ATTACK}"))
    assert data.model_name == f"x: {ATTACK}" and data.datasets is None
    command = text.partition("## The same again\n\n````\n")[2].partition("\n````\n")[0]
    assert shlex.split(command) == list(facts.command)  # in a fence that it cannot close
    assert "\n# head" not in text.replace(command, "")
    assert "# x: a\\`\\|\\<script\\> \\# head\n" in text
    assert "`` a`\\|<script> # head ``" in text


def test_a_card_that_cannot_be_written_is_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match=f"cannot write {tmp_path}/file"):
        write_card(trained, tmp_path / "file")


def test_settings_that_are_places_or_secrets_are_left_out(trained):
    trained.args.model_init_kwargs = {"dtype": "bfloat16", "revision": "main"}
    assert changed_settings(trained.args)["model_init_kwargs"] == {"dtype": "bfloat16", "revision": "main"}
    for hidden in ({"cache_dir": "/home/me"}, {"token": "hf_secret"}):
        trained.args.model_init_kwargs = hidden
        assert "model_init_kwargs" not in changed_settings(trained.args)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["vgpo", "train", "--model", "/home/me/vl-7b", "--out", "runs/x"], "vgpo train --model vl-7b --out runs/x"),
        (
            ["vgpo", "--out=/home/me/run", "--hub_token", "hf_x", "--seed", "1"],
            "vgpo --out=run --hub_token ... --seed 1",
        ),
        (["vgpo", "--hub-token=hf_x", "--system", "Think first."], "vgpo --hub-token=... --system 'Think first.'"),
        (["/usr/bin/vgpo", "--columns", "image=photo"], "vgpo --columns image=photo"),
    ],
)
def test_the_command_is_that_of_any_machine(command, shown):
    assert shown_command(command) == shown


def test_names_of_places():
    assert short_name("org/model") == "org/model" and short_name("runs/x") == "runs/x" and short_name("/a/b/") == "b"
    assert short_name("/c/hub/models--org--vl-7b/snapshots/0a1b") == "org/vl-7b"
    assert short_name("~/models/vl-7b") == "vl-7b"


def test_what_is_a_repository_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").mkdir()
    assert is_hub_id("org/data") and is_hub_id("gsm8k")
    assert not any(map(is_hub_id, ("org/here", "/org/data", "a/b/c", "../data", "", "a b/c", "https://x.org/data")))


def test_markdown_finds_nothing_to_do_in_names():
    assert code("a|b") == "`a\\|b`" and code("a`b") == "`` a`b ``" and code("") == "`  `" and code(None) == "`null`"
    assert plain_text("a_b*c [d](e)\nf") == "a\\_b\\*c \\[d\\](e) f"

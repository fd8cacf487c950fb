"""The report of a run of ``vgpo train``: true for any model, data, signal and reward, and made of files alone."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from trainer.test_report import ATTACK, Page, rollout
from vgpo_trainer.reports.pages import FIRST_TOKENS, LAST_TOKENS
from vgpo_trainer.reports.run import write_report
from vgpo_trainer.reports.words import train_words
from vgpo_trainer.runs.folder import RunFolder
from vgpo_trainer.signals import SIGNALS
from vgpo_trainer.signals.words import WORDS, words_of


def config(**training):
    settings = {"vgpo": "paper", "signal": "focus", "loss_type": "dapo", "seed": 42, "learning_rate": 1e-6}
    return {
        "run": {"model": "/models/of-mine", "dataset": f"someone/{ATTACK}"},
        "arguments": {},
        "vgpo": {"beta": 0.3},
        "training": {**settings, **training},
        "versions": {"torch": "2"},
    }


def records(steps=40, **changes):
    made = [
        {
            "step": step,
            "seconds": 3.0 * step,
            "loss": 0.1,
            "reward": -4.0 + 0.1 * step,
            "accuracy": step / 100,
            "vgpo/visual_focus": 0.2,
            "completions/mean_length": 300.0,
            **changes,
        }
        for step in range(1, steps + 1)
    ]
    evaluation = {"step": 20, "seconds": 60.0, "eval_reward": -3.0, "eval_accuracy": 0.25}
    return [*made, evaluation, {**evaluation, "step": 40, "eval_reward": -1.0, "eval_accuracy": 0.5}]


def write_run(path, settings, metrics, rollouts=()):
    run = RunFolder(path)
    run.path.mkdir(parents=True)
    run.write_config(settings)
    run.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in metrics))
    run.append_rollouts(rollouts)
    return run


def report(*run):
    folder = write_run(*run)
    return Page(write_report(folder).read_text())


def test_every_signal_has_words():
    assert WORDS.keys() == SIGNALS.keys()
    assert words_of("nearest").name == "nearest"


def test_it_names_model_data_and_numbers_and_nothing_of_the_demo(tmp_path):
    page = report(tmp_path / "run", config(), records(), [rollout(prompt="How many cups?")])
    assert f"VGPO: of-mine on someone/{ATTACK}" in page.text and "/models" not in page.text
    assert "script" not in page.tags
    assert "digit" not in page.text and "sum" not in page.text and "40% →" not in page.text
    for tile in ("-3.45 → -0.45", "5.5% → 35.5%", "-3.00 → -1.00", "25.0% → 50.0%", "2.0 min"):
        assert tile in page.text
    assert "mean of the first and of the last 10 steps" in page.text
    assert page.tags.count("svg") == 8


def test_the_axis_of_a_reward_holds_the_rewards(tmp_path):
    text = write_report(write_run(tmp_path / "run", config(), records())).read_text()
    chart = text.partition("reward by step")[2].partition("</svg>")[0]
    assert ">\N{MINUS SIGN}4<" in chart and ">0<" in chart and "100%" not in chart
    bounded = [{**record, "reward": 0.5, "eval_reward": 0.5} for record in records()]
    within = write_report(write_run(tmp_path / "other", config(), bounded)).read_text()
    chart = within.partition("reward by step")[2].partition("</svg>")[0]
    assert ">1<" in chart and ">0.2<" in chart


@pytest.mark.parametrize(
    ("signal", "title", "unit", "token"),
    [
        ("focus", "Visual focus along the response", "cosine to the image", "cosine +0.50"),
        ("attention", "Attention on the image along the response", "share of attention", "attention 50.0%"),
        ("dependency", "Dependency on the image along the response", "divergence in nats", "divergence +0.50"),
        ("nearest", "Nearest along the response", "nearest", "nearest +0.50"),
    ],
)
def test_the_signal_is_called_what_it_is(tmp_path, signal, title, unit, token):
    page = report(tmp_path / "run", config(signal=signal), records(), [rollout()])
    assert title in page.text and unit in page.text
    assert f"factor 1.20, ψ +0.10, {token}" in [value for name, value in page.attributes if name == "title"]
    assert ("cosine" in page.text) == (signal == "focus")


def test_without_vgpo_there_is_no_signal_to_show(tmp_path):
    page = report(tmp_path / "run", config(vgpo=None), records(**{"vgpo/visual_focus": None}), [rollout()])
    assert "DAPO: of-mine" in page.text and "The visual signal" not in page.text
    assert "No visual signal was measured in this run." in page.text
    assert "ψ" not in page.text and "φ" not in page.text and "factor" not in page.text
    assert page.tags.count("svg") == 3
    looked_at = report(tmp_path / "other", config(vgpo=None, vgpo_diagnostics=True), records(), [rollout()])
    assert "DAPO does not use these weights" in looked_at.text


def test_prompts_without_an_image_and_with_several(tmp_path):
    folder = RunFolder(tmp_path / "run")
    images = [folder.store_image(Image.new("RGB", (64, 48), colour)) for colour in ("red", "green", "blue")]
    large = folder.store_image(Image.new("RGB", (512, 300), "red"))
    folder.write_config(config())
    folder.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records()))
    folder.append_rollouts(
        [
            rollout(image=images[0], more_images=images[1:], prompt="compare", correct=None),
            rollout(image=images[0], more_images=images[1:], prompt="compare", correct=None, reward=-2.0),
            rollout(prompt="of text alone", reward=math.nan),
            rollout(prompt="of a photo", image=large),
        ]
    )
    page = Page(write_report(folder).read_text())
    assert page.tags.count("img") == 4
    kinds = [value.partition(";")[0] for name, value in page.attributes if name == "src"]
    assert sorted(kinds) == ["data:image/jpeg", *["data:image/png"] * 3]
    assert "of text alone" in page.text and "reward -2.00" in page.text and "reward \N{EN DASH}" in page.text
    marks = [value for name, value in page.attributes if name == "class" and value.startswith("mark ")]
    assert marks == ["mark right"] * 2  # nobody says which responses of the first group are


def test_long_texts_are_cut_and_odd_tokens_are_readable(tmp_path):
    number = FIRST_TOKENS + LAST_TOKENS + 1234
    tokens = ["<think>", "\n", " a", "\x00", *["word"] * (number - 5), "<|im_end|>"]
    lists = {name: [0.1] * number for name in ("cos", "psi", "factors")}
    long = rollout(prompt="why? " * 3000, answer="42" * 500, tokens=tokens, **lists)
    page = report(tmp_path / "run", config(), records(), [long])
    assert "… 1,234 tokens left out …" in page.text
    assert page.text.count("word") == FIRST_TOKENS + LAST_TOKENS - 5
    assert page.text.count("why?") < 1000 and page.text.count("42") < 150
    assert "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n" in page.text and "\x00" not in page.text
    assert "<think>" in page.text and "<|im_end|>" in page.text
    assert [value for name, value in page.attributes if name == "class"].count("special") == 3


def test_a_run_that_has_just_begun(tmp_path):
    page = report(tmp_path / "run", config(), [])
    assert "0.0 min" in page.text and "svg" not in page.tags
    long = report(tmp_path / "long", config(), [{**records()[0], "seconds": 9000.0}])
    assert "2.5 h" in long.text


def test_of_places_on_this_machine_the_name_is_shown(tmp_path):
    words = train_words(
        {"run": {"model": "/home/me/models--org--vl-7b/snapshots/abc", "dataset": "org/data"}, "training": {}}
    )
    assert words.title == "GRPO: org/vl-7b on org/data"

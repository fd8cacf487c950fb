"""``vgpo probe``: what it measures of a real model, its file and its page, and what it says of what it cannot probe."""

from __future__ import annotations

import json
import math
import types
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

import transformers
from PIL import Image
from trainer.test_inspect import ATTACK
from trainer.test_report import Page
from trainer.tiny_runs import FAMILIES, llava, picture, qwen2_5_vl
from vgpo_trainer.cli import main
from vgpo_trainer.commands import probe as probe_command
from vgpo_trainer.data import DatasetError, DataSource, load_rows
from vgpo_trainer.demo.digits import MAX_RESPONSE_TOKENS, PROMPT, make_problems
from vgpo_trainer.demo.warm_start import SHIPPED, load_checkpoint
from vgpo_trainer.probe import ProbeError, ProbeSettings, Question, Questions, RolloutBatch, probe_model, probe_rollouts
from vgpo_trainer.probe.gradient import chosen_parameters, gradient_efficiency
from vgpo_trainer.probe.measuring import DEPENDENCY, KEYS, VIEWS, Key, measure
from vgpo_trainer.probe.record import Findings, Gradient, GradientFinding
from vgpo_trainer.probe.sampling import neighbours_differ, sample_rollouts, until_end
from vgpo_trainer.probe.statistics import Estimate
from vgpo_trainer.probe.verdict import verdict
from vgpo_trainer.reports.probe import build_page

from vgpo_kernels import VGPOConfig, visual_focus
from vgpo_kernels.integrations.transformers import spoilt_view, visual_mask

BUILDERS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}
OPTIONS: dict[str, Any] = {"temperature": 0.8, "max_new_tokens": 9, "batch_size": 8, "seed": 3}
SMALL = ProbeSettings(prompts=6, generations=3, max_new_tokens=9, batch_size=9, replicates=30, examples=2)


def question(image: Image.Image, answer: str = "3", **others: Any) -> Question:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Add the digits."}]
    return Question([{"role": "user", "content": content}], answer, others)


def questions(number: int) -> list[Question]:
    return [question(picture(seed)) for seed in range(number)]


def length_reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def whole_logits(model: Any, inputs: dict[str, Any], length: int) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits[:, -length - 1 : -1].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_what_all_logits_and_the_definitions_say(family: str) -> None:
    model, processor = BUILDERS[family]()
    model.eval()
    batches = sample_rollouts(model, processor, questions(4), generations=2, **OPTIONS)
    assert len(batches) == 1 and batches[0].groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    found = measure(model, batches, temperature=0.8, seed=5)

    inputs, mask = batches[0].inputs, batches[0].response_mask
    length, ids = mask.shape[1], batches[0].inputs["input_ids"]
    assert torch.equal(found.mask, mask)
    view = spoilt_view(inputs, "swap", model, seed=5, groups=batches[0].groups)
    with torch.no_grad():
        logits = whole_logits(model, inputs, length) / 0.8
        other = whole_logits(model, view, length) / 0.8
        output = model(**inputs, output_hidden_states=True, output_attentions=False, use_cache=False)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    mixture = torch.logaddexp(p, q) - math.log(2)
    chosen = ids[:, -length:, None]
    change = (q - p).gather(-1, chosen)[..., 0]
    kl = (p.exp() * (p - q)).sum(-1)
    half = [(one.exp() * (one - mixture)).sum(-1) / 2 for one in (p, q)]
    expected = {
        "kl": kl,
        "js": half[0] + half[1],
        "k3": change.exp() - 1 - change,
        "logp change": change.abs(),
        "entropy": -(p.exp() * p).sum(-1),
    }
    for name, value in expected.items():
        at_state, at_token = found.signals[Key(name, "state")], found.signals[Key(name, "token")]
        torch.testing.assert_close(at_state, value * mask, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(at_token[:, :-1], at_state[:, 1:])  # of the next token
        assert (at_token[:, -1] == 0).all()
    assert kl[mask].max() > 1e-4, "the model reads its images"
    gradient = torch.nn.functional.one_hot(chosen[..., 0], p.shape[-1]) - p.exp()
    torch.testing.assert_close(found.energy, gradient.square().sum(-1) * mask, atol=2e-5, rtol=1e-4)

    images = visual_mask(ids, model, mask)
    states = output.hidden_states[-1]
    everywhere = torch.ones(ids.shape[0], length + 1, dtype=torch.bool)
    cos = visual_focus(states, images, everywhere)
    torch.testing.assert_close(found.signals[Key("focus", "token")], cos[:, 1:] * mask, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.signals[Key("focus", "state")], cos[:, :-1] * mask, atol=1e-5, rtol=1e-4)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    share = torch.stack([layer.mean(1) for layer in attentions]).mean(0)  # [B, S, S]
    share = (share * images[:, None]).sum(-1)[:, -length - 1 :]
    torch.testing.assert_close(found.signals[Key("attention", "token")], share[:, 1:] * mask, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.signals[Key("attention", "state")], share[:, :-1] * mask, atol=1e-4, rtol=1e-3)
    assert set(found.views) == {"swap", "blank", "noise"}
    assert set(found.seconds) >= {"pass", "focus", "pass with attention", "view", "divergence"}


def test_a_batch_of_several_is_measured_as_each_alone() -> None:
    """Responses of different lengths in different batches stand below one another, from the first column on."""
    model, processor = llava()
    model.eval()
    together = sample_rollouts(model, processor, questions(6), generations=2, **{**OPTIONS, "batch_size": 4})
    assert [len(batch.groups) for batch in together] == [4, 4, 4]
    assert torch.cat([batch.groups for batch in together]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    found, begin = measure(model, together, view="blank"), 0
    for batch in together:
        alone = measure(model, [batch], view="blank")
        end, length = begin + len(batch.groups), alone.mask.shape[1]
        for key in KEYS:
            torch.testing.assert_close(found.signals[key][begin:end, :length], alone.signals[key])
        assert not found.mask[begin:end, length:].any()
        begin = end


def test_seeds_decide_everything() -> None:
    model, processor = llava()

    def probed(seed: int) -> Findings:
        found, _ = probe_model(model, processor, questions(9), replace(SMALL, seed=seed), reward=length_reward)
        return replace(found, seconds={}, signals=[replace(one, seconds=0.0) for one in found.signals])

    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert repr(probed(0)) == repr(probed(0)) != repr(probed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and processor.tokenizer.padding_side == "left"


def test_rollouts_that_are_there_are_probed_as_sampled_ones() -> None:
    model, processor = llava()
    found, asked = probe_model(model, processor, questions(6), SMALL)
    model.eval()
    batches = sample_rollouts(
        model, processor, asked, generations=3, temperature=1.0, max_new_tokens=9, batch_size=9, seed=0
    )
    given = probe_rollouts(model, batches, processor.tokenizer, SMALL)
    assert given.signal("focus", "token").auc == found.signal("focus", "token").auc
    assert math.isnan(given.reward) and all(math.isnan(one.reward.value) for one in given.phi)
    with pytest.raises(ProbeError, match="leaves no prompt"):
        ids = batches[0].inputs["input_ids"]
        probe_rollouts(model, [RolloutBatch(batches[0].inputs, torch.ones_like(ids), batches[0].groups)], processor)


def test_an_answer_ends_with_its_first_end() -> None:
    answers = torch.tensor([[5, 1, 1, 5], [1, 5, 5, 5], [5, 5, 5, 5], [5, 5, 2, 5]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert until_end(answers, [1, 2]).int().tolist() == expected
    assert until_end(answers, None).all()


def test_neighbours_have_different_pictures_where_they_can() -> None:
    same, other = picture(1), picture(2)
    ordered = neighbours_differ([question(same, "a"), question(same, "b"), question(same, "c"), question(other, "d")])
    assert [one.answer for one in ordered] == ["a", "d", "b", "c"]


def test_only_the_questions_that_are_asked_are_decoded(tmp_path: Path) -> None:
    rows = load_rows(DataSource(str(write_dataset(tmp_path, 9)))).dataset
    for unread in {*range(9)} - {*np.random.default_rng(0).permutation(9)[:4].tolist()}:
        (tmp_path / f"{unread}.png").unlink()
    model, processor = llava()
    found, asked = probe_model(model, processor, Questions(rows), replace(SMALL, prompts=4))
    assert found.prompts == len(asked) == 4
    with pytest.raises(DatasetError, match=r"metadata\.jsonl:\d: image .* does not exist"):
        list(Questions(rows))


def test_questions_of_a_stream_are_drawn(tmp_path: Path) -> None:
    stream = load_rows(DataSource(str(write_dataset(tmp_path, 9)), streaming=True)).dataset
    drawn = Questions.of(stream, 4, seed=1)
    assert len(drawn) == 4 and all(one.images for one in drawn[:4])
    assert [one.answer for one in drawn] == [one.answer for one in Questions.of(stream, 4, seed=1)]
    with pytest.raises(ProbeError, match=r"rows:1 has a video: a probe exchanges images"):
        Questions([{"row": "rows:1", "videos": ["film.mp4"]}])[0]


def test_a_reward_function_is_called_as_trl_does() -> None:
    seen: dict[str, Any] = {}

    def reward(
        completions: Any, prompts: Any, completion_ids: Any, answer: Any, level: Any, log_extra: Any, **rest: Any
    ):
        seen.update(completions=completions, prompts=prompts, ids=completion_ids, answer=answer, level=level)
        log_extra("correct", [True] * len(answer))
        return [None, *range(1, len(answer))]

    model, processor = llava()
    model.eval()
    asked = [question(picture(0), "7", level=1), question(picture(1), "8")]
    (batch,) = sample_rollouts(model, processor, asked, generations=2, reward=reward, **OPTIONS)
    assert seen["answer"] == ["7", "7", "8", "8"] and seen["level"] == [1, 1, None, None]
    assert seen["completions"][0][0]["role"] == "assistant" and seen["prompts"][2] is asked[1].messages
    assert [len(ids) for ids in seen["ids"]] == batch.response_mask.sum(1).tolist()
    assert batch.rewards is not None and batch.rewards.isnan().tolist() == [True, False, False, False]
    assert batch.correct == [True] * 4


# ---- the command ---------------------------------------------------------------------------------------------------


def write_dataset(folder: Path, number: int, prompt: str = PROMPT, same: bool = False) -> Path:
    """A folder of real PNG images of the demo's problems."""
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for place, problem in enumerate(make_problems(number, "held_out", 5)):
            if place == 0 or not same:
                problem.image.save(folder / f"{place}.png")
            name = "0.png" if same else f"{place}.png"
            file.write(json.dumps({"image": name, "prompt": prompt, "answer": problem.answer}) + "\n")
    return folder


def command(dataset: Path, out: Path, *more: str, model: Path | str = SHIPPED) -> list[str]:
    sizes = ["--prompts", "8", "--batch-size", "16", "--max-new-tokens", str(MAX_RESPONSE_TOKENS)]
    return ["probe", "--model", str(model), "--dataset", str(dataset), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a probe of the checkpoint that ships, through the command line."""
    folder = tmp_path_factory.mktemp("probe")
    reward = ["--reward", "vgpo_trainer.demo.digits:exact_answer_reward"]
    assert main(command(write_dataset(folder / "data", 12), folder / "new" / "out", *reward)) == 0
    return folder / "new" / "out"


def conforms(value: Any, kind: Any, where: str) -> None:
    """Fail unless a value of a JSON file is what a dataclass's field says."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        assert isinstance(value, dict) and set(value) == {field.name for field in fields(kind)}, where
        for name, item in value.items():
            conforms(item, hints[name], f"{where}.{name}")
    elif get_origin(kind) is types.UnionType:
        if value is not None:
            conforms(value, get_args(kind)[0], where)
    elif get_origin(kind) in (list, tuple):
        assert isinstance(value, list), where
        for item in value:
            conforms(item, get_args(kind)[0], where)
    elif get_origin(kind) is dict:
        assert isinstance(value, dict), where
        for name, item in value.items():
            conforms(item, get_args(kind)[1], f"{where}[{name}]")
    elif kind is float:
        assert value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)), where
    elif kind is not Any:
        assert isinstance(value, kind), where


def test_the_file_is_what_its_classes_say(probed: Path) -> None:
    record = json.loads((probed / "probe.json").read_text())
    conforms(record, Findings, "probe.json")
    assert record["version"] == 1 and record["view"] == "swap" and record["settings"]["vgpo"]["beta"] == 0.3
    assert (record["prompts"], record["responses"]) == (8, 32) and 0 <= record["reward"] <= 1
    assert {(one["signal"], one["place"]) for one in record["signals"]} == set(KEYS)
    itself = next(one for one in record["signals"] if (one["signal"], one["place"]) == DEPENDENCY)
    assert itself["auc"]["value"] > 0.999 and itself["passes"] == 1 and itself["lift"]["low"] > 1
    for one in record["signals"]:
        assert one["auc"]["low"] <= one["auc"]["value"] <= one["auc"]["high"]
        assert one["gain"] == sorted(one["gain"]) and one["gain"][-1] == pytest.approx(1, abs=1e-5)
        assert all(held <= most + 1e-5 for held, most in zip(one["gain"], record["gain"], strict=True))
    assert [view["view"] for view in record["views"]] == ["swap", "blank", "noise", "swap again"]
    assert record["gradient"] is None and len(record["examples"]) == 6
    for example in record["examples"]:
        assert len(example["tokens"]) == len(example["dependency"]) == len(example["psi"]["focus at the token"])


def test_the_page_says_everything_and_fetches_nothing(probed: Path) -> None:
    record = json.loads((probed / "probe.json").read_text())
    text = (probed / "probe.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("img") == 6 and page.tags.count("svg") == 4
    for sentence in record["verdict"]:
        assert sentence in page.text
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text and "@import" not in text
    for key in KEYS:
        assert str(key) in page.text
    first = record["examples"][0]
    assert text.count('<div class="by-signal">') == 6 and f"{first['dependency'][0]:.3f} nats" in text


def test_every_text_is_escaped() -> None:
    model, processor = llava()
    found, asked = probe_model(model, processor, questions(4), SMALL, name=ATTACK, dataset=ATTACK)
    examples = [replace(one, tokens=[ATTACK] * len(one.tokens)) for one in found.examples]
    found = replace(found, examples=examples, texts=[replace(one, text=ATTACK) for one in found.texts])
    page = Page(build_page(found, [one.images[0] for one in asked]))
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert ATTACK in page.text and page.tags.count("img") == len(examples)


def test_the_sentences_go_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], probed: Path) -> None:
    dataset = probed.parents[1] / "data"
    assert main(command(dataset, tmp_path, "--view", "blank", "--vgpo", "released", "--layers=-1")) == 0
    told = capsys.readouterr().out
    record = json.loads((tmp_path / "probe.json").read_text())
    assert all(f"- {sentence}" in told for sentence in record["verdict"]) and str(tmp_path / "probe.html") in told
    assert "With a blank image" in told and record["settings"]["vgpo"]["score"] == "offset"
    assert [view["view"] for view in record["views"]] == ["blank", "swap", "noise"]
    assert record["reward"] == 0, "exact_answer reads the whole line"


def test_the_command_offers_the_views_that_there_are() -> None:
    assert probe_command.VIEWS == VIEWS


def test_what_cannot_be_probed_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def told(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        (line,) = [line for line in lines if line.startswith("vgpo probe: ")]
        assert not [other for other in lines if "Traceback" in other]
        return line

    data = write_dataset(tmp_path / "data", 3)
    assert "does not exist" in told(*command(tmp_path / "absent", out))
    assert "about the same image" in told(*command(write_dataset(tmp_path / "same", 3, same=True), out))
    assert "two questions" in told(*command(write_dataset(tmp_path / "one", 1), out))
    assert "top must lie between 0 and 1" in told(*command(data, out, "--top", "1.5"))
    assert "temperature must be positive" in told(*command(data, out, "--temperature", "0"))
    assert "layers must lie in [-4, 4)" in told(*command(data, out, "--layers", "7"))
    assert "no function" in told(*command(data, out, "--reward", "math:absent"))
    assert "rewards differ" in told(*command(data, out, "--gradient"))
    told(*command(data, out, model=tmp_path / "absent"))

    text_only = tmp_path / "text"
    transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=23,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).save_pretrained(text_only)
    llava()[1].tokenizer.save_pretrained(text_only)
    assert "Qwen2Config" in told(*command(data, out, model=text_only))
    assert not out.exists()


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model, processor = llava()
    model.eval()
    batches = sample_rollouts(model, processor, questions(2), generations=2, **OPTIONS)
    plain = model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        output = plain(*arguments, **named)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    with pytest.raises(ProbeError, match="does more to its logits"):
        measure(model, batches)


def test_a_text_without_images_is_refused() -> None:
    model, processor = llava()
    with pytest.raises(ProbeError, match="two questions"):
        asked = [Question([{"role": "user", "content": [{"type": "text", "text": "Add."}]}])] * 3
        probe_model(model, processor, asked, SMALL)
    with pytest.raises(ValueError, match="view must be one of"):
        ProbeSettings(view="upside down")


def test_a_saved_model_of_another_family_is_probed(tmp_path: Path) -> None:
    """Qwen2.5-VL, whose images are patches of all rows in one tensor."""
    model, processor = qwen2_5_vl()
    found, _ = probe_model(model, processor, questions(6), SMALL, reward=length_reward)
    assert found.tokens > 0 and 0 <= found.signal("attention", "state").auc.value <= 1
    assert Page(build_page(found, [picture(0)] * 6)).tags.count("img") == len(found.examples)
    assert found.write(tmp_path / "probe.json").is_file()


# ---- gradients -----------------------------------------------------------------------------------------------------


def test_gradients_are_compared_and_the_model_is_left_as_it_was() -> None:
    model, processor = load_checkpoint(SHIPPED)
    asked = [question(problem.image, problem.answer) for problem in make_problems(12, "held_out", 5)]
    settings = replace(SMALL, prompts=12, max_new_tokens=MAX_RESPONSE_TOKENS, gradient=True)
    frozen = next(model.parameters()).requires_grad_(False)

    def ones(completions: Any, **_: Any) -> list[float]:
        return [float(completion[0]["content"].count("1")) for completion in completions]

    found, _ = probe_model(model, processor, asked, settings, reward=ones)
    assert found.gradient is not None and found.gradient.batches == 4
    assert found.gradient.parameters == "all of the decoder"
    none = found.gradient.findings[0]
    assert none.weighting == "none" and none.efficiency == 1 and none.change == Estimate(0.0, 0.0, 0.0)
    assert len({one.cosine.value for one in found.gradient.findings}) == len(found.gradient.findings) == 10
    assert all(-1 <= one.cosine.value <= 1 for one in found.gradient.findings)
    assert not frozen.requires_grad and all(one.requires_grad for one in model.parameters() if one is not frozen)
    assert all(one.grad is None for one in model.parameters())
    assert any("radients" in sentence for sentence in found.verdict)
    assert "Gradients" in Page(build_page(found, [])).text


def test_a_gradient_that_does_not_fit_is_of_the_last_layer() -> None:
    model, _ = llava()
    layers = model.model.language_model.layers
    one = sum(parameter.numel() for parameter in layers[-1].parameters())
    assert chosen_parameters(model, 2)[0] == "all of the decoder"
    name, parameters = chosen_parameters(model, (1 << 30) // one)
    assert name == "the last layer of the decoder" and {*parameters} == {*layers[-1].parameters()}
    with pytest.raises(ProbeError, match="even the last layer"):
        chosen_parameters(model, (1 << 30) // one + 1)


def test_gradients_without_rewards_are_refused() -> None:
    model, processor = llava()
    model.eval()
    batches = sample_rollouts(model, processor, questions(4), generations=2, **OPTIONS)
    found = measure(model, batches)
    with pytest.raises(ProbeError, match="have none"):
        gradient_efficiency(model, batches, found, VGPOConfig.paper(), temperature=1.0, replicates=5, seed=0)


# ---- the verdict ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def findings() -> Findings:
    model, processor = llava()
    found, _ = probe_model(model, processor, questions(6), SMALL, reward=length_reward)
    return found


def with_signal(found: Findings, **changes: Any) -> Findings:
    """The findings with another focus at the token, of answers that depend on the image."""
    views = [replace(found.views[0], mean=Estimate(0.5, 0.4, 0.6)), *found.views[1:]]
    signals = [
        replace(one, **changes) if (one.signal, one.place) == ("focus", "token") else one for one in found.signals
    ]
    return replace(found, views=views, signals=signals)


@pytest.mark.parametrize(
    ("auc", "lift", "expected"),
    [
        ((0.97, 0.95, 0.98), (1.09, 1.05, 1.12), "finds the tokens that need the image (AUC 0.97 [0.95, 0.98]), but"),
        ((0.97, 0.95, 0.98), (1.40, 1.30, 1.50), ", and weighting by it puts 40% more weight"),
        ((0.80, 0.72, 0.90), (1.0, 0.9, 1.1), "often tells"),
        ((0.55, 0.45, 0.65), (1.0, 0.9, 1.1), "was not seen to tell"),
        ((0.55, 0.45, 0.65), (1.0, 0.9, 1.1), "puts no more weight on what depends on the image than equal weights"),
        ((0.30, 0.20, 0.40), (0.8, 0.7, 0.9), "is lower at the tokens that need the image"),
        ((0.30, 0.20, 0.40), (0.8, 0.7, 0.9), "takes 20% of the weight away"),
    ],
)
def test_the_verdict_goes_by_the_intervals(findings: Findings, auc: Any, lift: Any, expected: str) -> None:
    found = with_signal(findings, auc=Estimate(*auc), lift=Estimate(*lift))
    (sentence,) = [one for one in verdict(found) if one.startswith("Focus at the token") and "AUC" in one]
    assert expected in sentence


def test_answers_that_need_no_image_end_the_verdict(findings: Findings) -> None:
    views = [replace(findings.views[0], mean=Estimate(1e-6, 0.0, 2e-6)), *findings.views[1:]]
    (sentence,) = verdict(replace(findings, views=views))
    assert "hardly depend on the image" in sentence


def test_the_verdict_on_gradients(findings: Findings) -> None:
    def told(plain: Estimate, change: Estimate) -> str:
        of = [
            GradientFinding("none", plain, Estimate(0.0, 0.0, 0.0), 1.0),
            GradientFinding("psi of focus", plain, change, 1.2),
        ]
        return verdict(replace(with_signal(findings), gradient=Gradient("all", 9, of)))[-1]

    clear = Estimate(0.3, 0.2, 0.4)
    assert "probe more prompts" in told(Estimate(0.1, -0.1, 0.3), Estimate(0.1, 0.05, 0.2))
    assert "psi of focus: closer to the policy gradient" in told(clear, Estimate(0.1, 0.05, 0.2))
    assert "psi of focus: farther from the policy gradient" in told(clear, Estimate(-0.1, -0.2, -0.05))
    assert "no weighting was seen" in told(clear, Estimate(0.1, -0.1, 0.3))


def test_a_numpy_seed_is_not_touched() -> None:
    model, processor = llava()
    np.random.seed(4)
    before = np.random.get_state()[1].tolist()
    probe_model(model, processor, questions(4), SMALL)
    assert np.random.get_state()[1].tolist() == before

"""What vLLM is handed and what is compared, on TRL's own prompts; with vLLM itself: tests/vllm_e2e."""

from __future__ import annotations

import warnings
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

from trainer.tiny_runs import QwenImageProcessor, make_trainer, picture
from transformers import LlavaProcessor
from trl.generation.vllm_generation import VLLMGeneration
from vgpo_trainer import vllm_rollouts
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.vllm_rollouts import CheckedGeneration, check_rollouts, collapse, remember_prompts, runs_of

# Images of 4, 6 and 36 tokens of the tiny Qwen2.5-VL.
SIZES = {"none": [], "one": [(16, 16)], "two": [(24, 16), (48, 48)]}
# An image's number of tokens in vLLM, from its width and height.
TOKENS = {
    QwenImageProcessor: lambda width, height: width // 8 * (height // 8),
    LlavaProcessor: lambda width, height: width // 16 * (height // 16),
}


def chats() -> list[list[dict[str, Any]]]:
    found = []
    for sizes in SIZES.values():
        parts = [{"type": "image", "image": picture(seed).resize(size)} for seed, size in enumerate(sizes)]
        found.append([{"role": "user", "content": [*parts, {"type": "text", "text": "Add the digits"}]}])
    return found


class Prompts:
    """Chats with images as TRL hands them to vLLM, and TRL's engine without vLLM."""

    def __init__(self, folder: Path, family: str = "qwen2_5_vl", mode: str = "colocate") -> None:
        self.trainer = make_trainer(folder, family=family)
        self.chats = chats()
        self.ids, self.images, _ = self.trainer._tokenize_prompts(self.chats)
        self.image = self.trainer.model.config.image_token_id
        self.generation = VLLMGeneration.__new__(VLLMGeneration)
        self.generation.mode, self.generation.image = mode, self.image
        self.generation.model = SimpleNamespace(name_or_path="folder/model")
        self.generation.processing_class = self.trainer.processing_class
        self.generation.accelerator = self.trainer.accelerator
        self.trainer.vllm_generation = self.generation
        check_rollouts(self.trainer, None)

    def remember(self) -> None:
        remember_prompts(self.trainer, self.chats, self.ids)

    def generate(self) -> Any:
        return self.generation.generate(self.ids, self.images, num_generations=1)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that vLLM was given: it replaces the first tokens of a row's images by all of each."""
    given: list[list[int]] = []

    def generate(self: Any, prompts: list[list[int]], images: list[Any], num_generations: int) -> Any:
        given[:] = prompts
        seen = []
        for ids, shown in zip(prompts, images or [None] * len(prompts), strict=True):
            tokens, left = [], [TOKENS[type(self.processing_class)](*one.size) for one in shown or ()]
            for token in ids:
                tokens += [token] * left.pop(0) if token == self.image and left else [token]
            seen.append(tokens)
        return seen, [[1]] * len(prompts), None, None

    monkeypatch.setattr(VLLMGeneration, "generate", generate)
    return given


def test_runs_of_two_kinds_of_tokens_are_apart() -> None:
    assert runs_of([1, 9, 9, 8, 2, 9], (8, 9)) == [2, 1, 1]
    assert runs_of([1, 2], (8, 9)) == []


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_prompt_with_another_number_of_runs_is_left_as_it_is(images: int) -> None:
    assert collapse([1, 9, 9, 2, 9, 3], images, (9,)) == [1, 9, 9, 2, 9, 3]
    assert collapse([1, 9, 9, 2, 9, 3], 2, (9,)) == [1, 9, 2, 9, 3]


def test_prompts_as_the_chat_template_writes_them(tmp_path: Path, handed: list[list[int]]) -> None:
    prompts = Prompts(tmp_path)
    assert [runs_of(ids, (prompts.image,)) for ids in prompts.ids] == [[], [4], [6, 36]]
    prompts.remember()
    seen, *_ = prompts.generate()
    assert seen == prompts.ids
    one_each = [
        [token for token, run in groupby(ids) for token in ([token] if token == prompts.image else run)]
        for ids in prompts.ids
    ]
    assert handed == one_each
    # Prompts that tools have added to are not those of chats: here each image's run becomes a token.
    handed.clear()
    prompts.generation.written = {}
    assert prompts.generate()[0] == prompts.ids
    assert handed == one_each


def test_prompts_that_are_not_expanded_pass(tmp_path: Path, handed: list[list[int]]) -> None:
    prompts = Prompts(tmp_path)
    prompts.ids = [
        collapse(ids, len(shown or ()), (prompts.image,))
        for ids, shown in zip(prompts.ids, prompts.images, strict=True)
    ]
    seen, *_ = prompts.generate()
    assert handed == prompts.ids != seen


def test_images_that_adjoin(tmp_path: Path, handed: list[list[int]]) -> None:
    """LLaVA has nothing between two images, so that their tokens are one run."""
    prompts = Prompts(tmp_path, "llava")
    assert [runs_of(ids, (prompts.image,)) for ids in prompts.ids] == [[], [1], [10]]
    prompts.remember()
    seen, *_ = prompts.generate()
    assert seen == prompts.ids
    assert [ids.count(prompts.image) for ids in handed] == [0, 1, 2]
    prompts.generation.written = {}
    found = "a prompt of 24 tokens, 18 of them of images, and the policy is trained on 16 and 10"
    with pytest.raises(RunFailure, match=rf"^row 2 of .* \(2 images\): .* {found} \(TRL #6294: .* for LlavaProcessor;"):
        prompts.generate()


def test_a_processor_that_is_not_the_one_vllm_reads(
    tmp_path: Path, handed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts(tmp_path)
    prompts.remember()
    monkeypatch.setitem(TOKENS, QwenImageProcessor, lambda *_: 7)
    found = r"7 of them of images, .* and 4 \(vLLM makes .* processor that lies with the model \(folder/model\), .*\)$"
    with pytest.raises(RunFailure, match=f"^row 1 of a generation batch .1 image.: .*{found}"):
        prompts.generate()


def test_prompts_of_a_model_whose_visual_tokens_are_unknown_are_compared(
    tmp_path: Path, handed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts(tmp_path)
    assert prompts.generation.visual_tokens == (prompts.image, prompts.trainer.model.config.video_token_id)
    check_rollouts(prompts.trainer, [prompts.image])
    assert prompts.generation.visual_tokens == (prompts.image,)
    with pytest.raises(ValueError, match=r"visual_tokens must lie in"):
        check_rollouts(prompts.trainer, [10**6])

    def unknown(*_: Any) -> Any:
        raise ValueError("no visual tokens")

    monkeypatch.setattr(vllm_rollouts, "visual_token_ids", unknown)
    check_rollouts(prompts.trainer, None)
    assert prompts.generation.visual_tokens == ()
    with pytest.raises(RunFailure, match=r"^row 1 .* a prompt of 12 tokens, 0 of them"):
        prompts.generate()
    prompts.remember()
    assert prompts.generate()[0] == prompts.ids


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_visual_tokens_without_an_image_end_the_run(tmp_path: Path, handed: list[list[int]], mode: str) -> None:
    """As a video has them, which TRL does not hand to vLLM."""
    prompts = Prompts(tmp_path, mode=mode)
    prompts.images = [None, *prompts.images[1:]]
    prompts.generate()
    prompts.images = [None, None, prompts.images[2]]
    with pytest.raises(RunFailure, match=r"^row 1 .* its prompt has 4 image or video tokens, and .* it has none"):
        prompts.generate()
    prompts.images = None
    with pytest.raises(RunFailure, match=r"^row 1 "):
        prompts.generate()


class Engine:
    """vLLM's engine in so far as TRL gives it new weights."""

    def __init__(self, **functions: Any) -> None:
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self.load)))
        executor = SimpleNamespace(driver_worker=runner)
        self.llm_engine = SimpleNamespace(model_executor=executor, **functions)
        self.done: list[str] = []

    def load(self, weights: list[tuple[str, Any]]) -> None:
        self.done.append("weights")

    def reset_prefix_cache(self) -> None:
        self.done.append("prefixes")


def colocated(prompts: Prompts, engine: Engine) -> CheckedGeneration:
    generation = prompts.generation
    generation.model, generation.llm, generation.enable_sleep_mode = prompts.trainer.model, engine, False
    generation._dist = prompts.trainer._dist
    return generation


def test_embeddings_are_forgotten_after_the_weights_have_come(tmp_path: Path) -> None:
    engine = Engine(reset_encoder_cache=lambda: engine.done.append("embeddings"))
    generation = colocated(Prompts(tmp_path), engine)
    generation.sync_weights()
    assert engine.done[0] == "weights" and engine.done[-2:] == ["prefixes", "embeddings"]


def test_an_engine_that_cannot_forget_is_warned_of_once(tmp_path: Path) -> None:
    generation = colocated(Prompts(tmp_path), Engine())
    with pytest.warns(UserWarning, match=r"no LLMEngine.reset_encoder_cache, .* \(TRL #7198\)"):
        generation.sync_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generation.sync_weights()


@pytest.mark.parametrize(
    ("status", "said"), [(200, None), (404, "has no http://host:1/reset_e"), (500, "answered 500")]
)
def test_a_server_is_asked_to_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str | None
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: asked.append("weights"))
    generation = Prompts(tmp_path, mode="server").generation
    session = SimpleNamespace(post=lambda url: asked.append(url) or SimpleNamespace(status_code=status))
    generation.vllm_client = SimpleNamespace(base_url="http://host:1", session=session)
    if status == 404:
        with pytest.warns(UserWarning, match=said):
            generation.sync_weights()
    elif status == 500:
        with pytest.raises(RunFailure, match=said):
            generation.sync_weights()
    else:
        generation.sync_weights()
    assert asked == ["weights", "http://host:1/reset_encoder_cache"]


def features(*lengths: int) -> dict[str, Any]:
    """What a server returns for the images of a prompt."""
    return {"mm_placeholders": {"image": [{"offset": 3, "length": length} for length in lengths]}, "mm_hashes": {}}


def test_features_of_a_server_are_as_many_as_image_tokens(tmp_path: Path) -> None:
    prompts = Prompts(tmp_path, mode="server")
    prompts.remember()
    generation, ids = prompts.generation, prompts.ids[2]
    placed = generation._place_features(features(6, 36), ids)
    assert [place["length"] for place in placed["mm_placeholders"]["image"]] == [6, 36]
    assert generation._place_features(None, prompts.ids[0]) is None
    generation.vllm_client = SimpleNamespace(model="org/model")
    found = r"^the vLLM server has \[6, 16\] tokens for the images of a prompt, the trainer \[6, 36\] \(.*\(org/model\)"
    for written in (generation.written, {}):
        generation.written = written
        with pytest.raises(RunFailure, match=found):
            generation._place_features(features(6, 16), ids)


def test_a_server_may_count_what_surrounds_an_image(tmp_path: Path) -> None:
    prompts = Prompts(tmp_path, "llava", mode="server")
    generation = prompts.generation
    # As if its processor put a token before and behind an image.
    ids = [*prompts.ids[1], 5, 5]
    generation.written = {tuple(ids): prompts.ids[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placed = generation._place_features(features(3), ids)
        generation._place_features(features(3), prompts.ids[1])  # nothing is known of this one
    assert [place["length"] for place in placed["mm_placeholders"]["image"]] == [1]
    with pytest.warns(UserWarning, match=r"the vLLM server has \[4\] .*, the trainer \[1\]: watch sampling/"):
        generation._place_features(features(4), ids)

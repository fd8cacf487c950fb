"""VGPOTrainer with vLLM's own engine, in its process and as a server: `make vllm-e2e`, in an environment of its own.

What vLLM samples from, and what the trainer makes of it, is computed again by transformers, a row at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="make vllm-e2e runs these")
pytest.importorskip("trl")

import transformers
from datasets import Dataset
from equations import factors, focus, positions
from peft import LoraConfig
from PIL import Image
from trl.generation.vllm_generation import VLLMGeneration
from verl_e2e import task
from vgpo_trainer import vllm_rollouts
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.runs.metrics import read_metrics
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.trainer import VGPOTrainer
from vgpo_trainer.vllm_rollouts import CheckedGeneration
from vllm_e2e import engine, internvl

from vgpo_kernels import VGPOConfig

STEPS, GROUP = 2, 4
# Images of 4, 6 and 9 tokens.
ROWS = [
    ("one", [("red", (56, 56))]),
    ("two", [("green", (84, 56)), ("blue", (84, 84))]),
    ("none", []),
    ("again", [("red", (56, 56))]),
]
EXACT = 1e-5


class Run:
    """A run of two steps: its trainer, its batches, and the weights that each was sampled with."""

    def __init__(self, model: Path, folder: Path, adapter: Any = None, **settings: Any) -> None:
        data = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": text}],
                    "images": [Image.new("RGB", size, colour) for colour, size in shown],
                }
                for text, shown in ROWS
            ]
        )
        args = VGPOTrainingConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            per_device_train_batch_size=len(ROWS) * GROUP,
            num_generations=GROUP,
            max_completion_length=12,
            max_steps=STEPS,
            learning_rate=1e-3,
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            **settings,
        )
        self.trainer = VGPOTrainer(str(model), odd_tokens, args=args, train_dataset=data, peft_config=adapter)
        self.generation = self.trainer.vllm_generation
        self.name = model
        self.batches: list[dict[str, Any]] = []
        self.weights: list[dict[str, Any]] = []
        make = self.trainer._generate_and_score_completions

        def keep(inputs: Any) -> Any:
            self.batches.append(make(inputs))
            self.weights.append(deepcopy(self.trainer.model.state_dict()))
            return self.batches[-1]

        self.trainer._generate_and_score_completions = keep
        self.trainer.train()
        self.generation.sync_weights()  # those of the last step
        self.records = read_metrics(folder / "metrics.jsonl")

    def prompts(self) -> tuple[list[list[int]], list[Any]]:
        """The prompts of the rows as TRL hands them on, and their images."""
        rows = self.trainer.train_dataset
        told = [[{"role": "user", "content": row["prompt"][0]["content"]}] for row in rows]
        for messages, row in zip(told, rows, strict=True):
            parts = [{"type": "image", "image": image} for image in row["images"]]
            messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
        ids, images, _ = self.trainer._tokenize_prompts(told)
        return ids, images

    def differences(self, generate: Any) -> list[float]:
        """How far vLLM's log-probabilities of one response to each row are from those of transformers."""
        ids, images = self.prompts()
        _, responses, logps, _ = generate(self.generation, prompts=ids, images=images, num_generations=1)
        model = recompute_model(self.trainer.model.name_or_path, self.trainer.model.state_dict())
        found = []
        for prompt, response, sampled, shown in zip(ids, responses, logps, images, strict=True):
            logp, _ = forward(model, self.trainer.processing_class, prompt, list(response), shown)
            found.append((logp - torch.tensor([one[0] for one in sampled])).abs().max().item())
        return found


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def recompute_model(name: str, weights: dict[str, Any]) -> Any:
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    model.load_state_dict(weights)
    return model.eval()


def forward(
    model: Any, processor: Any, prompt: list[int], response: list[int], images: list[Any] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a response ``[T]`` and the last hidden states ``[P + T, D]``, by transformers."""
    ids = torch.tensor([[*prompt, *response]])
    shown: dict[str, Any] = {}
    if images:
        shown = dict(processor.image_processor(images=images, return_tensors="pt"))
        kinds = ids == model.config.image_token_id
        kinds[:, len(prompt) :] = False
        shown["mm_token_type_ids"] = kinds.int()
    with torch.no_grad():
        hidden = model.model(input_ids=ids, **shown).last_hidden_state[0]
        logits = model.lm_head(hidden[len(prompt) - 1 : -1])
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0], hidden


def check(run: Run) -> None:
    """Assert that a run sampled from the prompts and weights that it trained, and weighed by the paper's equations."""
    shown = [[Image.new("RGB", size, colour) for colour, size in ROWS[row // GROUP][1]] for row in range(16)]
    for batch, weights, record in zip(run.batches, run.weights, run.records, strict=True):
        model = recompute_model(run.trainer.model.name_or_path, weights)
        logps, cosines = [], []
        for row, images in enumerate(shown):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            response = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            logp, hidden = forward(model, run.trainer.processing_class, prompt, response, images)
            logps.append(logp)
            visual = torch.tensor([*prompt, *response]) == model.config.image_token_id
            cosines.append(focus(positions(hidden, visual, torch.ones(len(response))), causal=True))
        mask = batch["completion_mask"].bool()
        wanted = torch.cat(logps)
        assert (batch["sampling_per_token_logps"][mask] - wanted).abs().max() < EXACT
        assert (batch["old_per_token_logps"][mask] - wanted).abs().max() < EXACT
        expected = factors(cosines, batch["prompt_group"].tolist(), VGPOConfig.paper())
        by_hand = torch.tensor([value for row in expected for value in row.factors])
        assert by_hand.min() < 0.9 and by_hand.max() > 1.1
        assert (batch["visual_factors"][mask] - by_hand).abs().max() < 1e-3
        # The policy is the one that sampled, so the ratio is 1 and the loss a mean of weighted advantages.
        rows = mask.nonzero()[:, 0]
        loss = -(batch["advantages"][rows] * by_hand).sum() / len(rows)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert record["sampling/sampling_logp_difference/max"] < EXACT
    before, after = (weights["model.visual.merger.mlp.2.weight"] for weights in run.weights)
    assert (after - before).abs().max() > 1e-4, "the second step is to have other vision embeddings"


def assert_sampled_as_trained(run: Run) -> None:
    """The quick half of the above: vLLM's log-probabilities are those of the trainer, whose factors differ."""
    for batch in run.batches:
        mask = batch["completion_mask"].bool()
        assert (batch["sampling_per_token_logps"] - batch["old_per_token_logps"])[mask].abs().max() < EXACT
        assert batch["visual_factors"][mask].min() < 0.9


def stale(run: Run) -> tuple[float, float]:
    """Change the vision tower alone: what differs then with TRL's own synchronisation, and with ours."""
    ours = type(run.generation).generate
    assert max(run.differences(ours)) < EXACT, "images seen before"
    with torch.no_grad():
        run.trainer.model.model.visual.merger.mlp[2].weight.mul_(3)
    VLLMGeneration.sync_weights(run.generation)
    before = max(run.differences(ours))
    run.generation.sync_weights()
    return before, max(run.differences(ours))


def other_processor(run: Run) -> None:
    """Generate from prompts whose images have at most four tokens, as vLLM's processor has them not."""
    processor = run.trainer.processing_class.image_processor
    size, area = processor.size, 4 * 28 * 28
    processor.size = {"shortest_edge": area, "longest_edge": area}
    try:
        ids, images = run.prompts()
    finally:
        processor.size = size
    run.generation.generate(prompts=ids, images=images, num_generations=1)


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    engine.prepare()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    task.write_model(folder, "qwen2_5_vl")
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """A server that starts while the tests of the other mode run."""
    with engine.server(tmp_path_factory.mktemp("server"), model) as url:
        yield url


COLOCATE = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": engine.LONGEST}


@pytest.fixture(scope="module")
def colocate(tmp_path_factory: pytest.TempPathFactory, model: Path, url: str) -> Run:
    return Run(model, tmp_path_factory.mktemp("colocate"), **COLOCATE)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory, colocate: Run) -> Run:
    """A model whose processor divides images and surrounds their tokens."""
    folder = tmp_path_factory.mktemp("internvl")
    internvl.write_model(folder)
    return Run(folder, tmp_path_factory.mktemp("tiles"), **COLOCATE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path, url: str) -> Run:
    settings = {"vllm_server_base_url": url, "vllm_server_timeout": 60.0, "vllm_group_port": engine.free_port()}
    return Run(model, tmp_path_factory.mktemp("served"), vllm_mode="server", **settings)


def test_colocate(colocate: Run) -> None:
    assert isinstance(colocate.generation, CheckedGeneration)
    check(colocate)


def test_vllm_sees_the_image_tokens_that_are_trained(colocate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, images = colocate.prompts()
    image = colocate.trainer.model.config.image_token_id
    counts = [prompt.count(image) for prompt in ids]
    assert counts == [4, 15, 0, 4]
    seen, *_ = colocate.generation.generate(prompts=ids, images=images, num_generations=1)
    assert list(map(list, seen)) == ids
    # As TRL hands them over, an image of n tokens becomes one of 2n - 1.
    seen, *_ = VLLMGeneration.generate(colocate.generation, prompts=ids, images=images, num_generations=1)
    assert [list(prompt).count(image) for prompt in seen] == [7, 19 + 9, 0, 7]
    differences = colocate.differences(VLLMGeneration.generate)
    assert differences[2] < EXACT and min(differences[0], differences[1], differences[3]) > 1e-3


def test_prompts_that_tools_have_added_to_are_mended_by_their_runs(
    colocate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, images = colocate.prompts()
    monkeypatch.setattr(colocate.generation, "written", {})
    seen, *_ = colocate.generation.generate(prompts=ids, images=images, num_generations=1)
    assert list(map(list, seen)) == ids
    monkeypatch.setattr(vllm_rollouts, "collapse", lambda ids, images, tokens: ids)
    length = len(ids[0])
    found = f"a prompt of {length + 3} tokens, 7 of them of images, and the policy is trained on {length} and 4"
    with pytest.raises(RunFailure, match=rf"^row 0 .* \(1 image\): vLLM samples from {found} \(.*\)$"):
        colocate.generation.generate(prompts=ids, images=images, num_generations=1)


def test_a_run_ends_where_vllm_reads_another_processor(colocate: Run) -> None:
    counts = "15 of them of images, and the policy is trained on [0-9]+ and 6"
    with pytest.raises(
        RunFailure, match=rf"^row 1 of .* \(2 images\): .* {counts} \(vLLM .* \({colocate.name}\), .*\)$"
    ):
        other_processor(colocate)


def test_images_are_embedded_anew_after_new_weights(colocate: Run) -> None:
    before, after = stale(colocate)
    assert before > 1e-3 and after < EXACT


def test_an_adapter_of_decoder_and_tower(tmp_path: Path, colocate: Run) -> None:
    tmp_path.joinpath("model").mkdir()
    task.write_model(tmp_path / "model", "qwen3_vl")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv"])
    run = Run(tmp_path / "model", tmp_path / "run", adapter, signal="attention", **COLOCATE)
    assert_sampled_as_trained(run)
    tower = [name for name in run.weights[1] if "visual" in name and "lora_B" in name]
    assert tower and all(run.weights[1][name].abs().max() > 1e-4 for name in tower)


def test_a_processor_that_divides_images(tiles: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, images = tiles.prompts()
    # Four tiles and a whole; the tokens of two images in a row adjoin, but for those around them.
    assert [prompt.count(tiles.trainer.model.config.image_token_id) for prompt in ids] == [20, 40, 0, 20]
    seen, *_ = tiles.generation.generate(prompts=ids, images=images, num_generations=1)
    assert list(map(list, seen)) == ids
    assert_sampled_as_trained(tiles)
    monkeypatch.setattr(tiles.generation, "written", {})
    with pytest.raises(
        RunFailure, match=r"\(TRL #6294: .* cannot be undone for InternVLProcessor; vllm_mode='server' "
    ):
        tiles.generation.generate(prompts=ids, images=images, num_generations=1)


def test_server(served: Run) -> None:
    check(served)


def test_a_server_embeds_images_anew_after_new_weights(served: Run) -> None:
    before, after = stale(served)
    assert before > 1e-3 and after < EXACT


def test_a_run_ends_where_a_server_reads_another_processor(served: Run) -> None:
    lengths = r"\[6, 9\] tokens for the images of a prompt, the trainer \[2, 4\]"
    with pytest.raises(RunFailure, match=rf"^the vLLM server has {lengths} \(vLLM .* \({served.name}\), .*\)$"):
        other_processor(served)

"""Rows with videos: what TRL leaves out of its training passes is there, and each row is passed with its own."""

from __future__ import annotations

import copy
import pickle
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from equations import factors, focus, positions
from PIL import Image
from torch import Tensor
from trainer import tiny_runs
from trainer.definition import assert_factors
from trainer.test_trainer_signal import capture_unshuffled
from trainer.tiny_runs import generation_batch, make_trainer, picture
from trainer.tiny_videos import (
    HAS_TORCHVISION,
    SHOWN,
    FrameProcessor,
    film,
    real_processor,
    row,
    tiny,
    video_rows,
)
from vgpo_trainer.generation_batch import RowError, RowFacts, refuse_mixed
from vgpo_trainer.rollouts import has_video, prompt_id, prompt_text
from vgpo_trainer.runs.writing import RunFailure
from vgpo_trainer.trl_surface import Sequences
from vgpo_trainer.videos import INPUTS, GenerationVideos, decoding, frames, in_messages

from vgpo_kernels import VGPOConfig

needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="transformers' video processors need torchvision")
PROCESSORS = [pytest.param(False, id="frames"), pytest.param(True, id="torchvision", marks=needs_torchvision)]


def video_trainer(
    folder: Path, monkeypatch: Any, family: str = "qwen2_5_vl", real: bool = False, **settings: Any
) -> Any:
    """A trainer on the rows of videos, two responses to each; its policy says no placeholder."""
    monkeypatch.setitem(tiny_runs.BUILDERS, "videos", lambda: tiny(family, real))
    config = tiny_runs.BUILDERS["videos"]()[0].config
    defaults = {
        "family": "videos",
        "dataset": video_rows(),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 6,
        "num_generations": 2,
        "generation_kwargs": {"suppress_tokens": [config.image_token_id, config.video_token_id]},
    }
    trainer = make_trainer(folder, **{**defaults, **settings})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as train() sets it
    return trainer


def alone(trainer: Any, line: dict[str, Any], batch: dict[str, Any], index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of a response, the hidden states and the places of visual tokens, from a pass of its row by itself.

    The row's prompt goes through the processor anew, so nothing of it comes from the trainer's batch.
    """
    parts = [{"type": "image", "image": image} for image in line["images"]]
    parts += [{"type": "video", "video": opened(video)} for video in line["videos"]]
    text = {"type": "text", "text": line["prompt"][0]["content"]}
    message = [{"role": "user", "content": [*parts, text]}]
    made = trainer.processing_class.apply_chat_template(
        conversation=[message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    response = batch["completion_ids"][index][batch["completion_mask"][index].bool()][None]
    inputs = {**made, "input_ids": torch.cat([made["input_ids"], response], dim=1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in made:
        inputs["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(response)], dim=1)
    if "second_per_grid_ts" in made:
        inputs["second_per_grid_ts"] = torch.as_tensor(made["second_per_grid_ts"])
    with torch.no_grad():
        output = trainer.model(**inputs, output_hidden_states=True)
    length = response.shape[1]
    logp = output.logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, response[..., None])[0, :, 0]
    visual = (inputs["input_ids"] == trainer.model.config.video_token_id) | (
        inputs["input_ids"] == trainer.model.config.image_token_id
    )
    return logp, output.hidden_states[-1], visual


def opened(video: Any) -> Any:
    """A file's name, or an array of frames, which the table of the dataset keeps undecoded."""
    if isinstance(video, str):
        return video
    decoded = [frame if isinstance(frame, Image.Image) else Image.open(BytesIO(frame["bytes"])) for frame in video]
    return np.stack([np.asarray(frame) for frame in decoded])


@pytest.mark.parametrize("real", PROCESSORS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_every_pass_sees_the_videos_of_its_rows(tmp_path, monkeypatch, family, real):
    """Policy, reference, scoring and loss, through TRL's shuffle and six micro-batches, against rows by themselves."""
    trainer = video_trainer(tmp_path, monkeypatch, family, real, num_iterations=2)
    trainer.ref_model, trainer.beta = copy.deepcopy(trainer.model), 0.1
    kept = capture_unshuffled(trainer, monkeypatch)
    torch.manual_seed(3)
    inputs = generation_batch(trainer)
    trainer._prepare_inputs(inputs)
    (batch,) = kept
    scored = Sequences.of(batch).response_mask.bool()
    rows = [alone(trainer, line, batch, index) for index, line in enumerate(inputs)]
    assert [bool(made) for made in batch[INPUTS]] == [bool(line["videos"]) for line in inputs]
    for index, (logp, _, _) in enumerate(rows):
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(batch[name][index][scored[index]], logp, atol=2e-4, rtol=1e-4)

    cosines = [
        focus(positions(hidden[0], visual[0], torch.ones_like(logp)), causal=True) for logp, hidden, visual in rows
    ]
    expected = factors(cosines, [index // 2 for index in range(len(rows))], VGPOConfig.paper())
    assert_factors(batch["visual_factors"], expected, scored)
    shown = [any(SHOWN[int(line["answer"])]) for line in inputs]
    assert [bool((found != 1).any()) for found in batch["visual_factors"]] == shown

    # The loss, in whatever micro-batch a row came; with the videos of other rows it would see something else.
    with torch.no_grad():
        for micro in trainer._buffered_inputs:
            trainer._compute_loss(trainer.model, micro)
            valid, old = Sequences.of(micro).response_mask.bool(), micro["old_per_token_logps"]
            torch.testing.assert_close(trainer._latest_logp[valid], old[valid], atol=2e-4, rtol=1e-4)
        filmed = next(micro for micro in trainer._buffered_inputs if any(micro[INPUTS]))
        trainer._compute_loss(trainer.model, {**filmed, INPUTS: [blank(made) for made in filmed[INPUTS]]})
    assert (trainer._latest_logp - filmed["old_per_token_logps"]).abs().max() > 1e-3


@needs_torchvision
def test_files_are_read_with_their_frame_rate(tmp_path, monkeypatch):
    """By PyAV where torchcodec is missing; the processor that is saved knows nothing of it."""
    av = pytest.importorskip("av")
    path = str(tmp_path / "film.mp4")
    with av.open(path, "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for seed in range(8):
            file.mux(stream.encode(av.VideoFrame.from_image(picture(seed).resize((32, 16)))))
        file.mux(stream.encode())
    lines = [{**row(0, 0, 0), "videos": [path]}, row(1, 0, 1)]
    trainer = video_trainer(
        tmp_path, monkeypatch, real=True, dataset=Dataset.from_list(lines), gradient_accumulation_steps=2
    )
    trainer.args.num_iterations = trainer.num_iterations = 2
    inputs = [line for line in lines for _ in range(2)]
    batch = trainer._generate_and_score_completions(inputs)
    made = batch[INPUTS][0]
    assert made["video_grid_thw"].tolist() == [[4, 4, 8]] and made["second_per_grid_ts"].tolist() == [0.5]
    scored = Sequences.of(batch).response_mask.bool()
    with decoding(trainer.processing_class):
        rows = [alone(trainer, line, batch, index)[0] for index, line in enumerate(inputs)]
    for index, logp in enumerate(rows):
        torch.testing.assert_close(batch["old_per_token_logps"][index][scored[index]], logp, atol=2e-4, rtol=1e-4)
    trainer.processing_class.save_pretrained(tmp_path)
    lost = [{**lines[0], "videos": [str(tmp_path / "none.mp4")], "row": "train[0]"}, lines[0]]
    with pytest.raises(RunFailure, match=r"^train\[0\]: .*video .*none\.mp4 does not exist"):
        trainer._generate_and_score_completions(lost)


@needs_torchvision
def test_videos_without_grids(tmp_path, monkeypatch):
    """As LLaVA-OneVision has them; its images beside videos are refused, and videos that it cannot stack."""
    lines = [
        {**row(seed, 0, 0), "videos": [film(10 * seed + place) for place in range(videos)]}
        for seed, videos in enumerate((1, 2, 0))
    ]
    trainer = video_trainer(
        tmp_path, monkeypatch, "llava_onevision", True, dataset=Dataset.from_list(lines), gradient_accumulation_steps=3
    )
    inputs = [line for line in lines for _ in range(2)]
    trainer.model.train()
    trainer.args.num_iterations = trainer.num_iterations = 2
    batch = trainer._generate_and_score_completions(inputs)
    scored = Sequences.of(batch).response_mask.bool()
    for index, line in enumerate(inputs):
        logp, _, _ = alone(trainer, line, batch, index)
        torch.testing.assert_close(batch["old_per_token_logps"][index][scored[index]], logp, atol=2e-4, rtol=1e-4)
    assert [len(made.get("pixel_values_videos", ())) for made in batch[INPUTS]] == [1, 1, 2, 2, 0, 0]
    with pytest.raises(
        RunFailure, match=r"^row 0 of .*: its video cannot be trained on: the processor gives batch_num_"
    ):
        trainer._generate_and_score_completions([lines[0], {**lines[2], "images": [picture(1, 16)]}])
    with pytest.raises(RunFailure, match="cannot be processed together, though each can alone: stack expects"):
        trainer._generate_and_score_completions([lines[0], {**lines[0], "videos": [film(1, 2)]}])


def blank(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) if name == "pixel_values_videos" else value for name, value in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"signal": "attention"}, {"vgpo": None}], ids=["focus", "attention", "none"])
def test_runs_train_on_videos(tmp_path, monkeypatch, settings):
    """Evaluation too; rewards and rollouts are told of what a row has."""
    seen = []

    def reward(completions: list[Any], videos: list[Any], **_: Any) -> list[float]:
        seen.extend(map(len, videos))
        return [float(len(completion[0]["content"]) % 2) for completion in completions]

    arguments = {"eval_dataset": Dataset.from_list([row(9, 1, 0), row(8, 0, 1)])}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 1}
    trainer = video_trainer(
        tmp_path, monkeypatch, reward=reward, arguments=arguments, rollout_samples=16, **evaluation, **settings
    )
    tower = {name: value.clone() for name, value in trainer.model.model.visual.named_parameters()}
    trainer.train()
    assert sorted(seen[:12]) == sorted(videos for videos, _ in SHOWN for _ in range(2)) and sorted(seen[12:]) == [
        0,
        0,
        1,
        1,
    ]
    assert any((value != tower[name]).any() for name, value in trainer.model.model.visual.named_parameters())
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 1 and np.isfinite(losses).all()
    if settings.get("vgpo", "paper") is not None:
        shares = {
            record["vgpo/weighted_share"] for record in trainer.state.log_history if "vgpo/weighted_share" in record
        }
        assert shares == {5 / 6}
    assert {len(sample.images) for sample in trainer.rollout_samples} == {0, 1}


def test_a_video_in_a_message_is_the_same_as_one_in_a_column():
    given = film(3)
    column = {"prompt": [{"role": "user", "content": "Add."}], "videos": [given]}
    message = {
        "prompt": [{"role": "user", "content": [{"type": "video", "video": given}, {"type": "text", "text": "Add."}]}]
    }
    place = {
        "prompt": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Add."}]}],
        "video": given,
    }
    placed = [in_messages(line) for line in (column, message, place)]
    for messages, files in placed:
        (first, second) = messages[0]["content"]
        assert np.array_equal(first["video"], placed[0][0][0]["content"][0]["video"]) and first["video"].shape == (
            4,
            16,
            24,
            3,
        )
        assert second == {"type": "text", "text": "Add."} and files == {False}
    assert all(map(has_video, (column, message, place))) and not has_video({"prompt": "Add.", "videos": []})
    assert prompt_text(place["prompt"]) == "<video>Add."
    assert prompt_id(column) != prompt_id({**column, "videos": [film(4)]})


def test_parts_are_filled_in_order_and_empty_fields_left_out(tmp_path):
    films = [str(tmp_path / name) for name in ("one.mp4", "two.mp4")]
    for path in films:
        Path(path).touch()
    part = {"type": "video", "text": None, "video": None}
    line = {
        "prompt": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [part, {"type": "image", "image": None}, part, {"type": "text", "text": "?"}]},
        ],
        "videos": films,
        "images": [picture(1)],
    }
    messages, files = in_messages(line)
    shown = messages[1]["content"]
    assert [one.get("video") for one in shown] == [films[0], None, films[1], None] and files == {True}
    assert shown[1]["image"] is line["images"][0] and shown[0] == {"type": "video", "video": films[0]}
    assert messages[0]["content"] == [{"type": "text", "text": "Look."}]


def test_images_come_before_videos_in_a_message_of_text():
    line = {"prompt": [{"role": "user", "content": "Add."}], "videos": [film(1)], "images": [picture(1)]}
    assert [part["type"] for part in in_messages(line)[0][0]["content"]] == ["image", "video", "text"]


def test_videos_are_read_however_a_table_keeps_them(tmp_path):
    given = film(5)
    expected = np.stack([np.asarray(frame) for frame in given])
    paths = [tmp_path / f"{index}.png" for index in range(len(given))]
    for frame, path in zip(given, paths, strict=True):
        frame.save(path)
    decoded = Features({"videos": List(List(ImageFeature()))})
    tables = [
        Dataset.from_list([{"videos": [given]}]),
        Dataset.from_list([{"videos": [given]}], features=decoded),
        Dataset.from_list([{"videos": [expected]}]),
        Dataset.from_list([{"videos": [[str(path) for path in paths]]}]),
    ]
    for video in [*(table[0]["videos"][0] for table in tables), torch.tensor(expected), expected.transpose(0, 3, 1, 2)]:
        assert np.array_equal(frames(video), expected)
    assert frames(paths[0]) == str(paths[0]) and frames("https://a.b/film.mp4") == "https://a.b/film.mp4"


def test_frames_are_neither_copied_nor_sent():
    given = film(1)
    line = {"prompt": [{"role": "user", "content": "Add."}], "videos": [given]}
    read: dict[int, Any] = {}
    (first, _), (second, _) = in_messages(line, read), in_messages(dict(line), read)
    shown = first[0]["content"][0]["video"]
    assert second[0]["content"][0]["video"] is shown and copy.deepcopy(first)[0]["content"][0]["video"] is shown
    assert pickle.loads(pickle.dumps(first))[0]["content"][0]["video"] == "<video of 4 frames>"


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (3, "got a int"),
        ([], "got a list"),
        ("none.mp4", r"video none\.mp4 does not exist"),
        (np.zeros((4, 4, 3)), r"of shape \(4, 4, 3\)"),
        ([picture(1, 8), picture(2, 16)], "one size"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    with pytest.raises((TypeError, ValueError), match=message):
        frames(video)


REFUSED = {
    "no video half": ({}, "it has a video, and QwenImageProcessor takes none: it has no video processor"),
    "vllm": ({"use_vllm": True}, "use_vllm=True generates without"),
    "continuous batching": ({"use_transformers_continuous_batching": True}, "from text alone"),
    "views": ({"signal": "dependency"}, "it has a video, and signal='dependency' spoils images alone"),
    "places": ({}, "it has 1 videos, and its messages have places for 2"),
    "text": ({}, "needs a prompt of chat messages"),
    "files and frames": ({}, "a file where others of the batch are frames"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_its_row(tmp_path, monkeypatch, case):
    settings, message = REFUSED[case]
    trainer = video_trainer(tmp_path, monkeypatch, **(settings if case == "views" else {}))
    for name, value in ({} if case == "views" else settings).items():
        setattr(trainer, name, value)
    if case == "no video half":
        trainer.processing_class = tiny_runs.BUILDERS["qwen2_5_vl"]()[1]
    lines = [row(0, 0, 1), row(1, 1, 0, row="train[1]")]
    number = "train[1]"
    if case == "places":
        lines[1]["prompt"][0]["content"] = [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "Add."}]
    elif case == "text":
        lines[1]["prompt"] = "Add."
    elif case == "files and frames":
        lines[0]["videos"], lines[0]["images"] = [__file__], []
    with pytest.raises(RunFailure, match=f"^{re.escape(number)}: .*{message}"):
        trainer._generate_and_score_completions([line for line in lines for _ in range(2)])


def test_a_layout_of_videos_that_is_not_known_is_refused():
    prompts = [in_messages(row(seed, *shown))[0] for seed, shown in enumerate([(0, 0), (1, 0), (1, 1)])]
    made = FrameProcessor()([part["video"] for prompt in prompts for part in prompt[0]["content"] if "video" in part])
    fields = {name: made[name] for name in ("pixel_values_videos", "video_grid_thw")}
    image = {"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    known = GenerationVideos([], lambda value: value)
    known.take(prompts, {**fields, **image})
    assert [len(row_made.get("pixel_values_videos", ())) for row_made in known.inputs] == [
        0,
        *made["video_grid_thw"].prod(-1),
    ]
    for changed in (
        {"video_grid_thw": fields["video_grid_thw"]},
        {**fields, "pixel_values_videos": fields["pixel_values_videos"][1:]},
        {**fields, "second_per_grid_ts": [1.0]},
        {**fields, "audio_values": torch.zeros(2)},
        {**fields, "pixel_values": torch.zeros(2, 3, 8, 8), "num_tiles": [1, 1]},
        {**fields, "pixel_values": torch.zeros(3, 2, 3, 8, 8)},
    ):
        with pytest.raises(RowError, match="its video cannot be trained on: the processor gives") as found:
            GenerationVideos([], lambda value: value).take(prompts, changed)
        assert found.value.index == 1


def test_where_a_tower_is_sharded_rows_show_one_kind():
    facts = [RowFacts.of(row(0, 1, 0)), RowFacts.of(row(1, 0, 1))]
    with pytest.raises(
        ValueError, match=r"some rows of a generation batch show videos and others images or both, .*: W;"
    ):
        refuse_mixed([], facts, "W")
    refuse_mixed([], facts[:1] * 2, "W")


@needs_torchvision
def test_our_frames_are_what_transformers_makes():
    films = [np.stack([np.asarray(frame) for frame in film(seed, number)]) for seed, number in ((1, 4), (2, 5), (3, 2))]
    ours, theirs = FrameProcessor()(films), real_processor()(films, return_tensors="pt")
    assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])
    torch.testing.assert_close(ours["pixel_values_videos"], theirs["pixel_values_videos"], atol=1e-5, rtol=1e-5)

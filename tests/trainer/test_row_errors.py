"""A row that cannot be read or processed ends a run in one line that names it, and what else fails is left alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("trl")

import transformers
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from trainer import tiny_runs
from trainer.tiny_runs import fast_tokenizer, make_trainer, picture, save_model, word_tokens
from vgpo_trainer.commands import train
from vgpo_trainer.data import DatasetError
from vgpo_trainer.row_errors import ReadRows, UnreadRow, naming_rows, readable, refuse_unread
from vgpo_trainer.runs.writing import RunFailure

QUESTION = "Add the digits."


def row(seed: int, text: str = QUESTION, images: int = 1, **columns: Any) -> dict[str, Any]:
    shown = [picture(10 * seed + index) for index in range(images)]
    return {"prompt": [{"role": "user", "content": text}], "images": shown, "answer": str(seed), **columns}


def refusal(trainer: Any, *lines: dict[str, Any]) -> RunFailure:
    """What making a generation batch of these rows ends with; nothing but a RunFailure of one line."""
    trainer.model.train()
    with pytest.raises(RunFailure) as found:
        trainer._generate_and_score_completions([line for line in lines for _ in range(4)])
    assert "\n" not in str(found.value)
    return found.value


def test_an_image_of_an_aspect_that_the_processor_refuses(tmp_path):
    """Named by its place and prompt, or by its column; the processor's own error stands behind."""
    trainer = make_trainer(tmp_path, family="qwen2_5_vl")
    thin = {**row(1, "Add."), "images": [picture(1, 16).resize((8, 2000))]}
    failure = refusal(trainer, row(0), thin)
    reason = "absolute aspect ratio must be smaller than 200, got 250.0"
    assert str(failure) == f"row 4 of the generation batch, 'Add.': {reason}"
    assert isinstance(failure.__cause__, ValueError) and str(failure.__cause__) == reason
    assert str(refusal(trainer, row(0), {**thin, "row": "train[16]"})) == f"train[16]: {reason}"
    trainer.accelerator = SimpleNamespace(num_processes=2, process_index=1, gather=None)
    with (
        pytest.raises(RunFailure, match=r"^row 1 of process 1's generation batch, 'Add\.': absolute"),
        naming_rows(trainer, [row(0), thin]),
    ):
        trainer._tokenize_prompts(trl_prompts(row(0), thin))


def trl_prompts(*lines: dict[str, Any]) -> list[Any]:
    parts = [[{"type": "image", "image": image} for image in line["images"]] for line in lines]
    return [
        [{"role": "user", "content": [*shown, {"type": "text", "text": line["prompt"][0]["content"]}]}]
        for shown, line in zip(parts, lines, strict=True)
    ]


@pytest.mark.parametrize(
    ("family", "token"), [pytest.param("qwen2_5_vl", "<|image_pad|>", marks=pytest.mark.slow), ("llava", "<image>")]
)
def test_a_text_that_holds_the_place_of_an_image(tmp_path, family, token):
    trainer = make_trainer(tmp_path, family=family)
    for images in (0, 1):
        told = str(refusal(trainer, row(0), row(1, f"Add {token}", images)))
        assert told.startswith(f"row 4 of the generation batch, 'Add {token}': ") and token in told.partition("': ")[2]


@pytest.mark.slow
def test_images_that_have_no_place_in_the_messages(tmp_path):
    trainer = make_trainer(tmp_path)
    parts = [{"type": "image"}, {"type": "text", "text": "Add."}]
    line = {**row(1, images=2), "prompt": [{"role": "user", "content": parts}]}
    told = str(refusal(trainer, row(0), line))
    assert told == (
        "row 4 of the generation batch, '<image>Add.': Number of images provided (2) does not match number of image "
        "placeholders (1)."
    )


@pytest.mark.slow
def test_a_template_that_refuses_a_row(tmp_path):
    trainer = make_trainer(tmp_path)
    refusing = "{%- if messages[0].content[-1].text == 'Stop' -%}{{ raise_exception('no such prompt') }}{%- endif -%}"
    trainer.processing_class.chat_template = refusing + trainer.processing_class.chat_template
    assert str(refusal(trainer, row(0), row(1, "Stop"))) == "row 4 of the generation batch, 'Stop': no such prompt"


def test_a_prompt_longer_than_the_models_context(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.config.text_config.max_position_embeddings = 40
    told = str(refusal(trainer, row(0), row(1, "1+" * 20)))
    assert re.match(
        r"row 4 of the generation batch, '1\+.*': its prompt has \d+ tokens, .* takes fewer than 40 \(", told
    )


def gemma() -> tuple[Any, Any]:
    """A tiny Gemma 3, whose processor checks the token before an image, not those that it puts in its place."""
    special = ["<pad>", "<eos>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    named = {"boi_token": special[3], "eoi_token": special[4], "image_token": special[5]}
    tokenizer = fast_tokenizer(word_tokens(special), "<pad>", "<eos>", extra_special_tokens=named)
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, return_tensors="pt"),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tiny_runs.QWEN_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"
        ),
    )
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=3,
        eoi_token_index=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def test_a_token_that_the_model_alone_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_runs.BUILDERS, "gemma", gemma)
    trainer = make_trainer(tmp_path, family="gemma")
    told = str(refusal(trainer, row(0), row(1, "Add <image_soft_token>")))
    assert told == (
        "row 4 of the generation batch, 'Add <image_soft_token>': its text has <image_soft_token>, which stands for "
        "what an image shows: Image features and image tokens do not match, tokens: 36, features: 32"
    )


def test_what_no_row_is_to_blame_for_is_left_as_it_is(tmp_path, monkeypatch):
    """A reward function's error, and a model's that no row explains."""

    def broken(**_: Any) -> list[float]:
        raise ValueError("of mine")

    trainer = make_trainer(tmp_path, reward=broken)
    lines = [row(0) for _ in range(4)]
    trainer.model.train()
    with pytest.raises(ValueError, match=r"^of mine$"):
        trainer._generate_and_score_completions(lines)

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    for error in (out_of_memory, broken):
        monkeypatch.setattr(trainer.model, "generate", error)
        with pytest.raises((torch.OutOfMemoryError, ValueError), match=r"^(too large|of mine)$"):
            trainer._generate_and_score_completions(lines)


@pytest.mark.slow
def test_rows_that_fail_only_together(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    plain = type(trainer.processing_class).apply_chat_template

    def batched(self: Any, conversation: list[Any], **named: Any) -> Any:
        if len(conversation) > 1:
            raise ValueError("stack expects each tensor to be equal size")
        return plain(self, conversation, **named)

    monkeypatch.setattr(type(trainer.processing_class), "apply_chat_template", batched)
    told = str(refusal(trainer, row(0), row(1)))
    assert told.endswith(
        "cannot be processed together, though each can alone: stack expects each tensor to be equal size"
    )


def test_a_placeholder_that_the_policy_says(tmp_path, monkeypatch):
    """Before the loss and in it: what is to be changed is not a row."""
    trainer = make_trainer(tmp_path, family="qwen2_5_vl", num_iterations=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([row(0) for _ in range(4)])
    said = torch.full_like(batch["completion_ids"], trainer.model.config.image_token_id)
    trainer.current_gradient_accumulation_steps = 1
    message = (
        r"^the policy said <\|image_pad\|>, which stands for .*: Image features and image tokens do not match, .*; "
        r'generation_kwargs=\{"suppress_tokens": \[5, 6\]\} keeps it from that$'
    )
    with pytest.raises(RunFailure, match=message):
        trainer._compute_loss(trainer.model, {**batch, "completion_ids": said})
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda ids, *_: ([[5, 7]] * len(ids), None))
    with pytest.raises(RunFailure, match=message):
        trainer._generate_and_score_completions([row(0) for _ in range(4)])


# Rows that cannot be read.


def broken_images(column: bool, broken: int) -> Dataset:
    """Four rows, of which one has an image cut short."""
    lines = [row(seed, row=f"train[{seed}]") if column else row(seed) for seed in range(4)]
    for line in lines:
        whole = BytesIO()
        line.pop("images")[0].save(whole, "PNG")
        cut = 100 if line["answer"] == str(broken) else None
        line["image"] = {"bytes": whole.getvalue()[:cut], "path": None}
    return Dataset.from_list(lines).cast_column("image", ImageFeature())


@pytest.mark.parametrize(
    ("column", "broken", "workers"),
    [(True, 0, 0), *(pytest.param(name, 1, 1, marks=pytest.mark.slow) for name in (0, 1))],
)
def test_an_image_that_cannot_be_read_ends_the_run_with_its_row(tmp_path, column, broken, workers):
    """At its batch, not before: the steps before it are done."""
    dataset = broken_images(column, broken)
    trainer = make_trainer(
        tmp_path, dataset=dataset, shuffle_dataset=False, dataloader_num_workers=workers, max_steps=4
    )
    name = rf"train\[{broken}\]" if column else f"row {broken} of the dataset"
    with pytest.raises(RunFailure, match=f"^{name} cannot be read: .*(truncated|cut|broken)") as found:
        trainer.train()
    assert trainer.state.global_step == broken and found.value.__cause__ is not None


@pytest.mark.slow
def test_a_row_that_cannot_be_read_ends_an_evaluation(tmp_path):
    dataset = broken_images(True, 1)
    trainer = make_trainer(tmp_path, arguments={"eval_dataset": dataset}, per_device_eval_batch_size=4)
    with pytest.raises(RunFailure, match=r"^train\[1\] cannot be read"):
        trainer.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("error", [DatasetError("train, row 3: no image"), OSError("disk gone")])
def test_a_stream_that_breaks_off(tmp_path, error):
    def lines():
        yield {"prompt": [{"role": "user", "content": QUESTION}], "answer": "1"}
        raise error

    stream = IterableDataset.from_generator(lines)
    trainer = make_trainer(tmp_path, dataset=stream, shuffle_dataset=False)
    told = {"train, row 3: no image", "a row of the dataset cannot be read: disk gone"}
    with pytest.raises(RunFailure) as found:
        trainer.train()
    assert str(found.value) in told and found.value.__cause__ is not None
    trainer = make_trainer(tmp_path, arguments={"eval_dataset": stream}, per_device_eval_batch_size=4)
    with pytest.raises(RunFailure if isinstance(error, DatasetError) else OSError, match=str(error)):
        trainer.evaluate()


class Unportable(Exception):
    """One that cannot be made again from its text."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def test_unread_rows_travel_between_processes():
    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, int]:
            if index == 1:
                raise Unportable(1, 2)
            if index == 2:
                raise KeyError("image")
            return {"index": index}

    rows = readable(Rows())
    assert isinstance(rows, ReadRows) and len(rows) == 3
    ((first, second, third),) = DataLoader(rows, batch_size=3, num_workers=1, collate_fn=list)
    assert first == {"index": 0} and isinstance(second, UnreadRow)
    refuse_unread([first])
    for unread, told in ((second, "row 1 of the dataset cannot be read: 1 and 2"), (third, "KeyError: 'image'")):
        with pytest.raises(RunFailure, match=told):
            refuse_unread([first, unread])


@pytest.mark.slow
def test_the_command_says_one_line_and_where_it_goes_on(tmp_path, capsys):
    model, data, out = save_model(tmp_path / "model"), tmp_path / "data", tmp_path / "run"
    data.mkdir()
    picture(1).save(data / "1.png")
    limit = json.loads((model / "config.json").read_text())["text_config"]["max_position_embeddings"]
    lines = [{"image": "1.png", "prompt": QUESTION, "answer": index} for index in range(4)]
    lines[2]["prompt"] = "1+" * limit
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ["--model", model, "--dataset", data, "--out", out, "--batch-size", 2, "--generations", 2, "--epochs", 1]
    given += [
        "--max-completion-length",
        4,
        "--save-every",
        1,
        "--shuffle_dataset",
        "false",
        "--use_cpu",
        "true",
    ]
    assert train.main([*map(str, given), "--disable_tqdm", "true"]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"vgpo train: .*: its prompt has \d+ tokens, .*; the same command goes on from checkpoint-2$", told)


PROCESS = """
import sys
from accelerate import PartialState
from trainer.test_row_errors import picture, row
from trainer.tiny_runs import make_trainer
from datasets import Dataset
from vgpo_trainer.runs.writing import RunFailure

state = PartialState(cpu=True)
lines = [row(0), {**row(1), "images": [picture(1, 16).resize((8, 2000))]}]
trainer = make_trainer(sys.argv[1], family="qwen2_5_vl", dataset=Dataset.from_list(lines), shuffle_dataset=False)
try:
    trainer.train()
except RunFailure as failure:
    print(f"process {state.process_index}: {failure}", file=sys.stderr, flush=True)
    sys.exit(1)
"""


@pytest.mark.slow
def test_on_two_processes_the_launcher_ends_the_other(tmp_path):
    """Process 1 has the row and says so; the other waits for its prompts' lengths, and is ended with it."""
    script = tmp_path / "run.py"
    script.write_text(PROCESS)
    paths = os.pathsep.join(str(Path(__file__).parents[2] / folder) for folder in ("tests", "python", "."))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    ended = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0 and time.monotonic() - start < 120
    failure = "process 1: row 0 of process 1's generation batch, 'Add the digits.': absolute aspect ratio"
    assert failure in ended.stderr and "process 0: " not in ended.stderr

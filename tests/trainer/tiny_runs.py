"""Tiny models with real processors, and runs of a few seconds on them: built from configs, nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trl.chat_template_utils import qwen3_vl_chat_template
from vgpo_trainer.config import VGPOTrainingConfig
from vgpo_trainer.demo.tiny_vlm import build_model, build_processor
from vgpo_trainer.trainer import VGPOTrainer
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences

FAMILIES = ("llava", "qwen2_5_vl")
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<unk>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}"
)


def llava() -> tuple[Any, Any]:
    processor = build_processor()
    return build_model(processor), processor


class QwenImageProcessor(transformers.Qwen2_5_VLProcessor):
    """The processor without its video half, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def qwen2_5_vl() -> tuple[Any, Any]:
    """A Qwen2.5-VL of 40 thousand parameters whose processor gives one token to each 8 x 8 pixels."""
    return _qwen(word_tokens(QWEN_SPECIAL), QWEN_TEMPLATE, initializer_range=0.2)


def qwen_with_tools() -> tuple[Any, Any]:
    """The same with a token for each byte, and the template of Qwen3-VL, whose tool calls TRL reads."""
    words = [*QWEN_SPECIAL, "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _qwen(backend, qwen3_vl_chat_template, initializer_range=0.2, max_position_embeddings=2048)


def word_tokens(special: Sequence[str]) -> Tokenizer:
    """A token for each special one, and for each word and sign of "Add the digits." and its answers."""
    words = [*special, *"0123456789+=,.", "Add", "the", "digits"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def fast_tokenizer(
    backend: Tokenizer, pad: str = QWEN_SPECIAL[0], eos: str = QWEN_SPECIAL[1], **named: Any
) -> transformers.PreTrainedTokenizerFast:
    """Transformers' tokenizer over that of tokenizers, padding on the left; ``named`` go to it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token="<unk>", padding_side="left", **named
    )


def _qwen(backend: Tokenizer, template: str, **changes: Any) -> tuple[Any, Any]:
    special = [word for word in (*QWEN_SPECIAL[3:], "<|im_start|>") if backend.token_to_id(word) is not None]
    tokenizer = fast_tokenizer(backend, additional_special_tokens=special)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    limits: dict[str, Any] = {"size": {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}}
    # TRL goes on with what the template's processor returns as if it were tensors, as that of torchvision returns.
    limits["return_tensors"] = "pt"
    processor = QwenImageProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(**sizes, **limits),
        tokenizer=tokenizer,
        chat_template=template,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            **changes,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=backend.token_to_id("<|image_pad|>"),
        video_token_id=backend.token_to_id("<|video_pad|>"),
        vision_start_token_id=backend.token_to_id("<|vision_start|>"),
        vision_end_token_id=backend.token_to_id("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model, processor


BUILDERS = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen_with_tools": qwen_with_tools}


def save_model(folder: str | Path, family: str = "llava") -> Path:
    """Write a tiny model and its processor as a Hugging Face checkpoint."""
    model, processor = BUILDERS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def save_rows(folder: Path, number: int = 8, prompt: str = "Add the digits.") -> Path:
    """Write a dataset of images beside a ``metadata.jsonl``; the answer is the row's number."""
    folder.mkdir(exist_ok=True)
    lines = []
    for row in range(number):
        picture(row).save(folder / f"{row}.png")
        lines.append(json.dumps({"image": f"{row}.png", "prompt": prompt, "answer": row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def picture(seed: int, size: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(images_per_row: list[int], size: int = 48) -> Dataset:
    """One row for each entry, with that many images; the answer is the row's number."""
    content = []
    for row, number in enumerate(images_per_row):
        content.append(
            {
                "prompt": [{"role": "user", "content": "Add the digits."}],
                "images": [picture(10 * row + image, size) for image in range(number)],
                "answer": str(row),
            }
        )
    return Dataset.from_list(content)


def parity_reward(completions: list[Any], answer: list[str], log_extra=None, log_metric=None, **_: Any) -> list[float]:
    """Reward that differs between the responses of a prompt: 1 for an odd number of characters."""
    rewards = [float(len(completion[0]["content"]) % 2) for completion in completions]
    if log_extra is not None:
        log_extra("correct", [reward > 0 for reward in rewards])
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


def make_trainer(
    folder: str | Path,
    *,
    family: str = "llava",
    dataset: Dataset | None = None,
    model: Any = None,
    reward: Any = parity_reward,
    trainer_class: Any = VGPOTrainer,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer of a tiny model; ``settings`` are VGPOTrainingConfig's, ``arguments`` the trainer's."""
    built, processor = BUILDERS[family]()
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 10,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return trainer_class(
        built if model is None else model,
        reward,
        VGPOTrainingConfig(**{**defaults, **settings}),
        dataset if dataset is not None else rows([1] * 8),
        processing_class=processor,
        **(arguments or {}),
    )


def generation_batch(trainer: Any) -> list[dict[str, Any]]:
    """The dataset rows of the first generation batch, each prompt repeated, as TRL's loader hands them over."""
    return next(iter(trainer.get_train_dataloader()))


def last_hidden_states(trainer: VGPOTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states of a batch after the final norm, ``[B, S, D]``, the expensive way."""
    sequence = Sequences.of(batch)
    inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch and name != "num_images"}
    with torch.no_grad():
        output = trainer.model(
            input_ids=sequence.input_ids,
            attention_mask=sequence.attention_mask,
            output_hidden_states=True,
            **inputs,
        )
    return output.hidden_states[-1]

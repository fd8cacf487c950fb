"""A tiny InternVL, whose processor divides images into tiles and puts tokens around them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from verl_e2e import task

IMAGE = "<IMG_CONTEXT>"
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE,
    "video_token": "<video>",
}
SIDE = 28


def write_model(folder: Path) -> None:
    """Write a random model with its processor: a tile of 28 x 28 pixels is 4 tokens."""
    chat = task.CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", IMAGE)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
    tokenizer = task.byte_tokenizer(special, chat, extra_special_tokens=NAMED)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    torch.manual_seed(0)
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(vocab_size=272, num_key_value_heads=2, **shape),
        vision_config={**shape, "image_size": [SIDE, SIDE], "patch_size": [7, 7]},
        image_token_id=image,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    model = transformers.InternVLForConditionalGeneration(config)
    task.never_sample(model, model.model.multi_modal_projector, [image])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=size)
    processor = transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=chat)
    processor.save_pretrained(folder)

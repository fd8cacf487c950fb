"""A tiny model with images, prompts for it and a reward: what the run trains on."""

from __future__ import annotations

import io
import random
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 56


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """verl's reward function: a number that depends on the text, so that a group's responses differ."""
    return sum(map(ord, solution_str)) % 7 / 7


def write_prompts(file: Path, count: int) -> None:
    """Write verl's table of prompts, each with one image of one colour, and of different lengths."""
    import datasets

    draw = random.Random(0)
    rows = []
    for index in range(count):
        png = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), tuple(draw.randrange(256) for _ in range(3))).save(png, "PNG")
        text = "<image>" + "what colour? " * (1 + index % 3) + f"{index}="
        rows.append(
            {
                "data_source": "colours",
                "prompt": [{"role": "user", "content": text}],
                "images": [{"bytes": png.getvalue(), "path": None}],
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": index},
            }
        )
    datasets.Dataset.from_list(rows).to_parquet(file)


def write_model(folder: Path, kind: str) -> None:
    """Write a random model of kind ``qwen2_5_vl`` or ``qwen3_vl`` with its processor; bytes are its tokens."""
    tokenizer = byte_tokenizer([*SPECIAL, *PADS], CHAT)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL, *PADS)}
    torch.manual_seed(0)
    model = _model(kind, len(tokenizer), ids)
    never_sample(model, model.model.visual.merger, [ids[name] for name in ("<|vision_start|>", *PADS)])
    model.generation_config.eos_token_id = [ids["<|im_end|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = model.config.vision_config.patch_size
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, min_pixels=4 * (2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2
    )
    if kind == "qwen3_vl":
        parts = (images, tokenizer, transformers.Qwen3VLVideoProcessor())
        processor = transformers.Qwen3VLProcessor(*parts, chat_template=CHAT)
    else:
        parts = (images, tokenizer, transformers.Qwen2VLVideoProcessor())
        processor = transformers.Qwen2_5_VLProcessor(*parts, chat_template=CHAT)
    processor.save_pretrained(folder)


def byte_tokenizer(special, chat, **named):
    """Return a tokenizer with a token for each byte and some special ones; ``named`` go to transformers'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=4096,
        **named,
    )
    tokenizer.chat_template = chat
    return tokenizer


def _model(kind: str, vocabulary: int, ids: dict[str, int]):
    text = {
        "vocab_size": vocabulary + -vocabulary % 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    if kind == "qwen3_vl":
        text["rope_parameters"] |= {"mrope_interleaved": True}
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
        config.architectures = ["Qwen3VLForConditionalGeneration"]
        return transformers.Qwen3VLForConditionalGeneration(config)
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def never_sample(model, projector, tokens: list[int]) -> None:
    """Make the logits of some tokens low: in a sampled answer they would announce an image that is not there.

    One dimension of the residual stream keeps a constant, which the head reads for these tokens alone. The last layer
    of ``projector`` makes the embeddings of images.
    """
    decoder = model.model.language_model
    with torch.no_grad():
        decoder.embed_tokens.weight[:, 0] = 0.05
        last = [layer for layer in projector.modules() if isinstance(layer, torch.nn.Linear)][-1]
        last.weight[0], last.bias[0] = 0, 0.05
        for layer in decoder.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[tokens] = 0
        model.lm_head.weight[tokens, 0] = -30

"""LLaVA and models built like it: a vision tower, a projector, and a decoder that reads features in place of tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures.zoo import ANSWER, Example, architecture, randomized, rows_of, text_config

IMAGE, VIDEO, START, END, ROW_END = 90, 91, 92, 93, 94
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def clip(**changes: Any) -> transformers.CLIPVisionConfig:
    """Four patches and a class token."""
    return transformers.CLIPVisionConfig(**{**VISION, "projection_dim": 16, "image_size": 8, **changes})


def siglip(**changes: Any) -> transformers.SiglipVisionConfig:
    """Four patches."""
    return transformers.SiglipVisionConfig(**{**VISION, "image_size": 8, "vision_use_head": False, **changes})


def pixtral() -> transformers.PixtralVisionConfig:
    return transformers.PixtralVisionConfig(**VISION, image_size=16, head_dim=8)


def four(size: int = 8) -> dict[str, torch.Tensor]:
    """An image of four tokens a row."""
    return {**rows_of([IMAGE] * 4), "pixel_values": torch.randn(2, 3, size, size)}


def tiles() -> dict[str, torch.Tensor]:
    """A wide image as one tile of the whole and two of its halves: 4 tokens, and 2 rows of 4, each with its end."""
    return {
        **rows_of([IMAGE] * (4 + 2 * (4 + 1))),
        "pixel_values": torch.randn(2, 3, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 16], [8, 16]]),
    }


@architecture("llava")
def llava() -> Example:
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    return Example(randomized(transformers.LlavaForConditionalGeneration(config)), four())


@architecture("vipllava")
def vipllava() -> Example:
    config = transformers.VipLlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=[-1, -2],
    )
    return Example(randomized(transformers.VipLlavaForConditionalGeneration(config)), four())


@architecture("llava_next")
def llava_next() -> Example:
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=transformers.MistralConfig(**text_config(), sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8]],
        image_seq_length=4,
    )
    return Example(randomized(transformers.LlavaNextForConditionalGeneration(config)), tiles())


@architecture("llava_next_video")
def llava_next_video() -> Example:
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8]],
        image_seq_length=4,
    )
    return Example(randomized(transformers.LlavaNextVideoForConditionalGeneration(config)), tiles())


@architecture("llava_onevision")
def llava_onevision() -> Example:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=transformers.Qwen2Config(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return Example(randomized(transformers.LlavaOnevisionForConditionalGeneration(config)), tiles())


@architecture("video_llava")
def video_llava() -> Example:
    config = transformers.VideoLlavaConfig(
        vision_config=clip(),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=4,
    )
    return Example(randomized(transformers.VideoLlavaForConditionalGeneration(config)), four())


@architecture("internvl")
def internvl() -> Example:
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=transformers.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    inputs = {**rows_of([START, *[IMAGE] * 4, END]), "pixel_values": torch.randn(2, 3, 16, 16)}
    return Example(randomized(transformers.InternVLForConditionalGeneration(config)), inputs)


@architecture("qianfan_ocr")
def qianfan_ocr() -> Example:
    config = transformers.QianfanOCRConfig(
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4], "drop_path_rate": 0.0},
        text_config=transformers.Qwen3Config(**text_config(head_dim=8)),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    inputs = {**rows_of([START, *[IMAGE] * 4, END]), "pixel_values": torch.randn(2, 3, 16, 16)}
    return Example(randomized(transformers.QianfanOCRForConditionalGeneration(config)), inputs)


@architecture("mistral3")
def mistral3() -> Example:
    config = transformers.Mistral3Config(
        vision_config=pixtral(),
        text_config=transformers.MistralConfig(**text_config(head_dim=8), sliding_window=None),
        image_token_index=IMAGE,
    )
    inputs = {
        **rows_of([IMAGE, IMAGE, ROW_END, IMAGE, IMAGE, END]),
        "pixel_values": torch.randn(2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16], [16, 16]]),
    }
    return Example(randomized(transformers.Mistral3ForConditionalGeneration(config)), inputs)


@architecture("lighton_ocr")
def lighton_ocr() -> Example:
    config = transformers.LightOnOcrConfig(
        vision_config=pixtral(),
        text_config=transformers.Qwen3Config(**text_config(head_dim=8)),
        image_token_id=IMAGE,
    )
    inputs = {
        **rows_of([IMAGE] * 4),
        "pixel_values": torch.randn(2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16], [16, 16]]),
    }
    return Example(randomized(transformers.LightOnOcrForConditionalGeneration(config)), inputs)


@architecture("smolvlm")
def smolvlm() -> Example:
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "image_size": 16},
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    inputs = {
        **rows_of([START, END, *[IMAGE] * 4, START]),
        "pixel_values": torch.randn(2, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.bool),
    }
    return Example(randomized(transformers.SmolVLMForConditionalGeneration(config)), inputs)


@architecture("paligemma")
def paligemma() -> Example:
    config = transformers.PaliGemmaConfig(
        vision_config=siglip(),
        text_config=transformers.GemmaConfig(**text_config(head_dim=8)),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=96,
    )
    inputs = four()
    # The prompt, whose tokens see each other in both directions, is of type 0, and the answer of type 1.
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["token_type_ids"][:, -ANSWER:] = 1
    return Example(randomized(transformers.PaliGemmaForConditionalGeneration(config)), inputs)


@architecture("shieldgemma2")
def shieldgemma2() -> Example:
    config = transformers.ShieldGemma2Config(
        vision_config=siglip(image_size=16),
        text_config=transformers.Gemma3TextConfig(
            **text_config(
                head_dim=8,
                num_hidden_layers=4,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
            )
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=4,
    )
    inputs = {**rows_of([START, *[IMAGE] * 4, END]), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Example(randomized(transformers.Gemma3ForConditionalGeneration(config)), inputs)


@architecture("janus")
def janus() -> Example:
    config = transformers.JanusConfig(
        vision_config={**VISION, "image_size": 8, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 4},
        text_config=transformers.LlamaConfig(**text_config()),
        # It makes images too, from a decoder of its own.
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=IMAGE,
    )
    inputs = {**rows_of([START, *[IMAGE] * 4, END]), "pixel_values": torch.randn(2, 3, 8, 8)}
    return Example(randomized(transformers.JanusForConditionalGeneration(config)), inputs)


@architecture("perception_lm")
def perception_lm() -> Example:
    # Its own vision tower is one of timm's; the projector reads the tower's width from the arguments for timm.
    config = transformers.PerceptionLMConfig(
        vision_config=clip(model_args={"embed_dim": 16}),
        text_config=transformers.LlamaConfig(**text_config()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    inputs = {**rows_of([IMAGE] * 4), "pixel_values": torch.randn(2, 1, 3, 8, 8)}
    return Example(randomized(transformers.PerceptionLMForConditionalGeneration(config)), inputs)


@architecture("ovis2")
def ovis2() -> Example:
    indicators = [85, 86, 87, 88, 89]
    config = transformers.Ovis2Config(
        vision_config={**VISION, "image_size": 8, "vocab_size": 24, "num_visual_indicator_tokens": 5},
        text_config=transformers.Qwen2Config(**text_config()),
        image_token_id=IMAGE,
        visual_indicator_token_ids=indicators,
        vocab_size=96,
        hidden_size=32,
    )
    # Indicators stand around the image; their embeddings do not depend on it.
    inputs = {**rows_of([85, *[IMAGE] * 4, 89]), "pixel_values": torch.randn(2, 3, 8, 8)}
    return Example(randomized(transformers.Ovis2ForConditionalGeneration(config)), inputs)

"""GLM-4.1V and its kin: multi-axis rotary positions, and a vision tower that merges 2×2 patches."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures.zoo import Example, architecture, grids, randomized, text_config

IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = 90, 91, 92, 93, 94, 95
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    return text_config(rope_parameters=rope, **changes)


def patches_and_tokens() -> dict[str, torch.Tensor]:
    """Two images of 4×4 patches, four tokens each."""
    inputs = grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 2 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


@architecture("glm4v")
def glm4v() -> Example:
    config = transformers.Glm4vConfig(text_config=text(), vision_config=VISION, **TOKENS)
    return Example(randomized(transformers.Glm4vForConditionalGeneration(config)), patches_and_tokens())


@architecture("glm46v")
def glm46v() -> Example:
    config = transformers.Glm46VConfig(
        text_config={"model_type": "glm4v_text", **text()},
        vision_config={"model_type": "glm4v_vision", **VISION},
        **TOKENS,
    )
    return Example(randomized(transformers.Glm46VForConditionalGeneration(config)), patches_and_tokens())


@architecture("glmga")
def glmga() -> Example:
    config = transformers.GlmgaConfig(
        text_config={"model_type": "glm4v_text", **text()},
        vision_config={"model_type": "glm4v_vision", **VISION},
        **TOKENS,
    )
    return Example(randomized(transformers.Glm46VForConditionalGeneration(config)), patches_and_tokens())


@architecture("glm_ocr")
def glm_ocr() -> Example:
    config = transformers.GlmOcrConfig(text_config=text(), vision_config=VISION, **TOKENS)
    return Example(randomized(transformers.GlmOcrForConditionalGeneration(config)), patches_and_tokens())


@architecture("glm4v_moe")
def glm4v_moe() -> Example:
    # The first layer is dense, and half of each head is rotated, as in the release.
    moe = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 3, "n_shared_experts": 1}
    config = transformers.Glm4vMoeConfig(text_config=text(head_dim=16, **moe), vision_config=VISION, **TOKENS)
    return Example(randomized(transformers.Glm4vMoeForConditionalGeneration(config)), patches_and_tokens())


@architecture("glm5_next")
def glm5_next() -> Example:
    config = transformers.Glm5NextConfig(
        text_config=text_config(
            num_hidden_layers=4,
            num_key_value_heads=4,
            layer_types=["linear_attention", "indexed_attention"] * 2,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            linear_head_dim=8,
            linear_num_heads=2,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            index_topk=8,
            index_kpool=2,
            index_head_dim=8,
            index_n_heads=8,  # fewer leave scores of zero, and which of them are chosen is chance
            moe_intermediate_size=16,
            n_routed_experts=3,
            num_experts_per_tok=2,
            hc_mult=2,
        ),
        vision_config={**VISION, "projection_intermediate_size": 32},
        **TOKENS,
    )
    return Example(randomized(transformers.Glm5NextForConditionalGeneration(config)), patches_and_tokens())

"""Qwen's models: those that see images of any size as patches of a grid, and their successors."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures.zoo import Example, architecture, grids, randomized, text_config

IMAGE, VIDEO, VISION_START, VISION_END, AUDIO = 90, 91, 92, 93, 94
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
VISUAL_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
}
WINDOWED_VISION = {**VISION, "window_size": 16, "fullatt_block_indexes": [0]}
GRID_VISION = {**VISION, "num_position_embeddings": 16}
AUDIO_TOWER = {
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 16,
    "n_window": 4,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # A quarter of eight dimensions would be one frequency: too few for three sections.
    "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0},
}


def images(**changes: Any) -> dict[str, torch.Tensor]:
    """Two rows of one image each: 4 by 4 patches, merged by fours."""
    inputs = grids([VISION_START, *[IMAGE] * 4, VISION_END], 3 * 2 * 4 * 4)
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(), **changes}


@architecture("qwen2_vl")
def qwen2_vl() -> Example:
    config = transformers.Qwen2VLConfig(
        text_config=text_config(rope_parameters=MROPE),
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        **VISUAL_TOKENS,
    )
    return Example(randomized(transformers.Qwen2VLForConditionalGeneration(config)), images())


@architecture("qwen2_5_vl")
def qwen2_5_vl() -> Example:
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters=MROPE), vision_config=WINDOWED_VISION, **VISUAL_TOKENS
    )
    return Example(randomized(transformers.Qwen2_5_VLForConditionalGeneration(config)), images())


@architecture("qwen3_vl")
def qwen3_vl() -> Example:
    config = transformers.Qwen3VLConfig(
        text_config=text_config(head_dim=8, rope_parameters=INTERLEAVED),
        vision_config={**GRID_VISION, "deepstack_visual_indexes": [0]},
        **VISUAL_TOKENS,
    )
    return Example(randomized(transformers.Qwen3VLForConditionalGeneration(config)), images())


@architecture("qwen3_vl_moe")
def qwen3_vl_moe() -> Example:
    config = transformers.Qwen3VLMoeConfig(
        text_config=text_config(head_dim=8, rope_parameters=INTERLEAVED, tie_word_embeddings=False, **EXPERTS),
        vision_config={**GRID_VISION, "deepstack_visual_indexes": [0]},
        **VISUAL_TOKENS,
    )
    return Example(randomized(transformers.Qwen3VLMoeForConditionalGeneration(config)), images())


@architecture("qwen3_5")
def qwen3_5() -> Example:
    config = transformers.Qwen3_5Config(
        text_config=text_config(**LINEAR_ATTENTION), vision_config=GRID_VISION, **VISUAL_TOKENS
    )
    return Example(randomized(transformers.Qwen3_5ForConditionalGeneration(config)), images())


@architecture("qwen3_5_moe")
def qwen3_5_moe() -> Example:
    config = transformers.Qwen3_5MoeConfig(
        text_config=text_config(shared_expert_intermediate_size=32, **LINEAR_ATTENTION, **EXPERTS),
        vision_config=GRID_VISION,
        **VISUAL_TOKENS,
    )
    return Example(randomized(transformers.Qwen3_5MoeForConditionalGeneration(config)), images())


@architecture("qwen4_exp")
def qwen4_exp() -> Example:
    config = transformers.Qwen4ExpConfig(
        text_config=text_config(
            **{**LINEAR_ATTENTION, "layer_types": ["linear_attention", "indexed_attention"] * 2},
            **EXPERTS,
            shared_expert_intermediate_size=32,
            hc_count=2,
            hc_lowrank=8,
            # Each query reads two blocks of two tokens, and the tokens of the block that is not yet full. Were there
            # fewer heads, many blocks would score zero in all of them: ties.
            indexer_n_heads=8,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=4,
            indexer_compress_ratio=2,
            ple_layer_ids=[1],
            heads_per_ngram=2,
            ngram_vocab_size_base=50,
            make_ngram_vocab_size_divisible_by=8,
            split_ngram_parts=1,
        ),
        vision_config=GRID_VISION,
        **VISUAL_TOKENS,
    )
    return Example(randomized(transformers.Qwen4ExpForConditionalGeneration(config)), images())


@architecture("qwen2_5_omni_thinker")
def qwen2_5_omni_thinker() -> Example:
    config = transformers.models.qwen2_5_omni.configuration_qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        text_config=text_config(rope_parameters=MROPE),
        vision_config=WINDOWED_VISION,
        audio_config=AUDIO_TOWER,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        **VISUAL_TOKENS,
    )
    inputs = images()
    del inputs["mm_token_type_ids"]
    return Example(randomized(transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)), inputs)


@architecture("qwen3_omni_moe_thinker")
def qwen3_omni_moe_thinker() -> Example:
    config = transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
        text_config=text_config(head_dim=8, rope_parameters=INTERLEAVED, **EXPERTS),
        vision_config={**GRID_VISION, "deepstack_visual_indexes": [0]},
        audio_config={**AUDIO_TOWER, "downsample_hidden_size": 8, "n_window_infer": 8},
        audio_token_id=AUDIO,
        **VISUAL_TOKENS,
    )
    inputs = images()
    del inputs["mm_token_type_ids"]
    return Example(randomized(transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)), inputs)

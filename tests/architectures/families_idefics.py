"""Idefics 2 and 3, and others that pool patches into queries: Aria, Granite Vision."""

from __future__ import annotations

import torch
import transformers
from architectures.zoo import Example, architecture, pixels, randomized, rows_of, text_config

IMAGE, AROUND, ROW_COLUMN, GLOBAL = 90, 91, 92, 93
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@architecture("idefics2")
def idefics2() -> Example:
    config = transformers.Idefics2Config(
        text_config=text_config(model_type="mistral", sliding_window=None),
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=IMAGE,
    )
    model = randomized(transformers.Idefics2ForConditionalGeneration(config))
    inputs = rows_of([AROUND, *[IMAGE] * 4, AROUND])
    inputs["pixel_attention_mask"] = torch.ones(2, 1, 16, 16, dtype=torch.long)
    return Example(model, {**inputs, "pixel_values": pixels(2, 1, 3, 16, 16)})


@architecture("idefics3")
def idefics3() -> Example:
    config = transformers.Idefics3Config(
        text_config=text_config(model_type="llama"), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )
    model = randomized(transformers.Idefics3ForConditionalGeneration(config))
    # A tile, and the whole image.
    inputs = rows_of([AROUND, ROW_COLUMN, *[IMAGE] * 4, AROUND, GLOBAL, *[IMAGE] * 4, AROUND])
    inputs["pixel_attention_mask"] = torch.ones(2, 2, 16, 16, dtype=torch.long)
    return Example(model, {**inputs, "pixel_values": pixels(2, 2, 3, 16, 16)})


@architecture("aria")
def aria() -> Example:
    config = transformers.AriaConfig(
        text_config=text_config(moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1),
        vision_config={"model_type": "idefics3_vision", **VISION},
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )
    model = randomized(transformers.AriaForConditionalGeneration(config))
    inputs = rows_of([IMAGE] * 4)
    inputs["pixel_mask"] = torch.ones(2, 16, 16, dtype=torch.bool)
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 16, 16)})


@architecture("granite4_vision")
def granite4_vision() -> Example:
    config = transformers.Granite4VisionConfig(
        text_config=text_config(
            embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.5, attention_multiplier=0.3
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,  # one head of 64 in the projectors, which cannot be chosen
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
            "vision_use_head": False,
        },
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 32},
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_rate="2/4",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1],
        image_grid_pinpoints=[[8, 8]],
        image_token_index=IMAGE,
    )
    model = randomized(transformers.Granite4VisionForConditionalGeneration(config))
    # The whole image in 2×2 tokens, then a tile of its own in two rows, each ended by a token.
    inputs = rows_of([IMAGE] * (4 + 2 * 3))
    inputs["image_sizes"] = torch.tensor([[8, 8], [8, 8]])
    return Example(model, {**inputs, "pixel_values": pixels(2, 2, 3, 8, 8)})


@architecture("granite_docling")
def granite_docling() -> Example:
    config = transformers.GraniteDoclingConfig(
        text_config=text_config(
            embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.5, attention_multiplier=0.3
        ),
        vision_config={**VISION, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    model = randomized(transformers.GraniteDoclingForConditionalGeneration(config))
    inputs = rows_of([AROUND, GLOBAL, *[IMAGE] * 4, AROUND])
    inputs["pixel_attention_mask"] = torch.ones(2, 1, dtype=torch.bool)
    return Example(model, {**inputs, "pixel_values": pixels(2, 1, 3, 16, 16)})

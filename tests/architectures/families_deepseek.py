"""DeepSeek-VL and other readers of dense pages, whose towers are SAM's or SigLIP's."""

from __future__ import annotations

import transformers
from architectures.zoo import Example, architecture, pixels, randomized, rows_of, text_config
from torch import nn

IMAGE, IMAGE_START, IMAGE_END = 90, 91, 92
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


@architecture("deepseek_vl")
def deepseek_vl() -> Example:
    config = transformers.DeepseekVLConfig(
        text_config=text_config(model_type="llama"), vision_config=SIGLIP, image_token_id=IMAGE
    )
    model = randomized(transformers.DeepseekVLForConditionalGeneration(config))
    return Example(model, {**rows_of([IMAGE] * 4), "pixel_values": pixels(2, 3, 8, 8)})


@architecture("got_ocr2")
def got_ocr2() -> Example:
    config = transformers.GotOcr2Config(
        text_config=text_config(model_type="qwen2"), vision_config=SAM, image_token_index=IMAGE, image_seq_length=4
    )
    model = randomized(transformers.GotOcr2ForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, *[IMAGE] * 4, IMAGE_END])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 32, 32)})


@architecture("deepseek_vl_hybrid")
def deepseek_vl_hybrid() -> Example:
    config = transformers.DeepseekVLHybridConfig(
        text_config=text_config(model_type="llama"),
        vision_config=SIGLIP,
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        image_token_id=IMAGE,
    )
    model = randomized(transformers.DeepseekVLHybridForConditionalGeneration(config))
    inputs = rows_of([IMAGE] * 4)
    inputs["high_res_pixel_values"] = pixels(2, 3, 32, 32)
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 8, 8)})


@architecture("deepseek_ocr2")
def deepseek_ocr2() -> Example:
    config = transformers.DeepseekOcr2Config(
        text_config=text_config(
            mlp_layer_types=["dense", "sparse"],
            n_routed_experts=3,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": text_config(num_hidden_layers=1),
        },
        image_token_id=IMAGE,
    )
    model = transformers.DeepseekOcr2ForConditionalGeneration(config)
    # A small image has 144 queries, a number that cannot be chosen.
    model.model.vision_tower.query_768_resolution = nn.Embedding(4, 32)
    # The last token separates views.
    return Example(randomized(model), {**rows_of([IMAGE] * 5), "pixel_values": pixels(2, 3, 32, 32)})

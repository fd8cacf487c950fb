"""Vision models on Cohere's decoders, whose logits are scaled."""

from __future__ import annotations

from typing import Any

import transformers
from architectures.zoo import Example, architecture, grids, pixels, randomized, rows_of, text_config

IMAGE, IMAGE_START, IMAGE_END, TILE, VIDEO = 90, 91, 92, 93, 94
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


def cohere2_text() -> dict[str, Any]:
    return text_config(
        model_type="cohere2",
        num_hidden_layers=4,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        logit_scale=0.25,
    )


@architecture("aya_vision")
def aya_vision() -> Example:
    config = transformers.AyaVisionConfig(text_config=cohere2_text(), vision_config=SIGLIP, image_token_index=IMAGE)
    model = randomized(transformers.AyaVisionForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, TILE, *[IMAGE] * 4, IMAGE_END])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 16, 16)})


@architecture("cohere2_vision")
def cohere2_vision() -> Example:
    config = transformers.Cohere2VisionConfig(
        text_config=cohere2_text(), vision_config=SIGLIP, image_token_id=IMAGE, alignment_intermediate_size=32
    )
    model = randomized(transformers.Cohere2VisionForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, *[IMAGE] * 4, TILE, IMAGE_END])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 16, 16)})


@architecture("cohere_compass")
def cohere_compass() -> Example:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.CohereCompassConfig(
        text_config=text_config(
            num_hidden_layers=4,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            # Global layers have no positions.
            rope_parameters={"sliding_attention": rope, "full_attention": None},
            logit_scale=0.25,
        ),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    model = randomized(transformers.CohereCompassForConditionalGeneration(config))
    inputs = grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 2 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(model, inputs)

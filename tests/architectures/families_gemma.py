"""Gemma 3 and later: bidirectional attention within an image, sliding windows, and logits that may be soft-capped."""

from __future__ import annotations

import torch
import transformers
from architectures.zoo import Example, architecture, pixels, randomized, rows_of, text_config

IMAGE, IMAGE_START, IMAGE_END, VIDEO, AUDIO = 90, 91, 92, 93, 94
# The last layer is global in every release.
PATTERN = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


@architecture("gemma3")
def gemma3() -> Example:
    config = transformers.Gemma3Config(
        text_config=text_config(
            num_hidden_layers=4, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=PATTERN
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )
    model = randomized(transformers.Gemma3ForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, *[IMAGE] * 4, IMAGE_END])
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 16, 16)})


@architecture("gemma3n")
def gemma3n() -> Example:
    config = transformers.Gemma3nConfig(
        text_config=text_config(
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            head_dim=8,
            laurel_rank=4,
            altup_num_inputs=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 3,
            final_logit_softcapping=3.0,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
        ),
        audio_config={
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": (4, 2),
            "input_feat_size": 16,
            "vocab_size": 4,
            "vocab_offset": 104,
        },
        vision_soft_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
        audio_token_id=AUDIO,
    )
    # The released tower is timm's MobileNetV5: another convolutional one stands for it, which the field's type forbids.
    tower = transformers.ConvNextConfig(
        num_stages=2,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        hidden_size=16,
        vocab_size=4,
        vocab_offset=100,
        rms_norm_eps=1e-6,
    )
    object.__setattr__(config, "vision_config", tower)
    model = randomized(transformers.Gemma3nForConditionalGeneration(config))
    model.model.vision_tower._supports_sdpa = True  # as timm's towers say
    inputs = rows_of([IMAGE_START, *[IMAGE] * 4, IMAGE_END])
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 16, 16)})


def gemma4_inputs(patch: int, patches_per_side: int, tokens: int) -> dict[str, torch.Tensor]:
    """Two square images as flat patches with their coordinates."""
    inputs = rows_of([IMAGE_START, *[IMAGE] * tokens, IMAGE_END])
    side = torch.arange(patches_per_side)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["pixel_values"] = pixels(2, patches_per_side**2, 3 * patch**2)
    inputs["image_position_ids"] = torch.cartesian_prod(side, side).flip(-1).expand(2, -1, -1)
    return inputs


GEMMA4_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "boi_token_id": IMAGE_START,
    "eoi_token_id": IMAGE_END,
}


@architecture("gemma4")
def gemma4() -> Example:
    config = transformers.Gemma4Config(
        # As the mixture-of-experts release: experts beside the dense MLP, keys that are values in global layers.
        text_config=text_config(
            num_hidden_layers=4,
            head_dim=8,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=96,
            enable_moe_block=True,
            num_experts=3,
            top_k_experts=2,
            moe_intermediate_size=16,
            sliding_window=8,
            layer_types=list(PATTERN),
            final_logit_softcapping=3.0,
            use_bidirectional_attention="vision",
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 8,
        },
        audio_config=None,
        **GEMMA4_TOKENS,
    )
    model = randomized(transformers.Gemma4ForConditionalGeneration(config))
    return Example(model, gemma4_inputs(patch=4, patches_per_side=4, tokens=4))


@architecture("gemma4_unified")
def gemma4_unified() -> Example:
    config = transformers.Gemma4UnifiedConfig(
        text_config=text_config(
            num_hidden_layers=4,
            head_dim=8,
            global_head_dim=16,
            num_kv_shared_layers=0,
            sliding_window=8,
            layer_types=list(PATTERN),
            final_logit_softcapping=3.0,
        ),
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        },
        audio_config=None,
        **GEMMA4_TOKENS,
    )
    model = randomized(transformers.Gemma4UnifiedForConditionalGeneration(config))
    return Example(model, gemma4_inputs(patch=4, patches_per_side=2, tokens=4))

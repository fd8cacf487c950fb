"""Architectures of the first half of transformers' list that have no family."""

from __future__ import annotations

import torch
import transformers
from architectures.zoo import NOT_APPLICABLE, Example, architecture, grids, pixels, randomized, rows_of, text_config

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 90, 91, 92, 93


@architecture("exaone4_5")
def exaone4_5() -> Example:
    config = transformers.Exaone4_5_Config(
        text_config=text_config(
            model_type="exaone4",
            num_hidden_layers=4,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": 4,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = randomized(transformers.Exaone4_5_ForConditionalGeneration(config))
    return Example(model, grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 2 * 4 * 4))


@architecture("fast_vlm")
def fast_vlm() -> Example:
    config = transformers.FastVlmConfig(
        text_config=text_config(model_type="qwen2"),
        # The released tower is timm's FastViT: another convolutional one stands for it.
        vision_config={
            "model_type": "convnext",
            "num_stages": 2,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "hidden_size": 16,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    model = randomized(transformers.FastVlmForConditionalGeneration(config))
    model.model.vision_tower._supports_sdpa = True  # as timm's towers say
    return Example(model, {**rows_of([IMAGE] * 4), "pixel_values": pixels(2, 3, 16, 16)})


@architecture("chameleon")
def chameleon() -> Example:
    codes = {f"IMGIMG{letter}Z": 80 + number for number, letter in enumerate("ABCDEFGH")}
    config = transformers.ChameleonConfig(
        **text_config(),
        vocabulary_map={"<image>": IMAGE, **codes},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    model = randomized(transformers.ChameleonForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, *[IMAGE] * 4, IMAGE_END])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 4, 4)})


@architecture("emu3")
def emu3() -> Example:
    codes = {f"<|visual token {number:06d}|>": 80 + number for number in range(8)}
    config = transformers.Emu3Config(
        text_config=text_config(),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 89, **codes},
        vq_config={
            "codebook_size": 8,
            "embed_dim": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 2,
        },
    )
    model = randomized(transformers.Emu3ForConditionalGeneration(config))
    inputs = rows_of([IMAGE_START, *[IMAGE] * 6, IMAGE_END])  # two rows of two codes, each with an end of line
    inputs["image_sizes"] = torch.tensor([[4, 4], [4, 4]])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 4, 4)})


@architecture("ernie4_5_vl_moe")
def ernie4_5_vl_moe() -> Example:
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text_config(
            num_hidden_layers=3,  # the first is dense, and the last cannot move images into the answer
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            moe_intermediate_size=[16, 8],
            moe_k=2,
            moe_num_experts=3,
            moe_num_shared_experts=1,
        ),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=94,
        video_end_token_id=95,
    )
    model = randomized(transformers.Ernie4_5_VLMoeForConditionalGeneration(config))
    inputs = grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 4 * 4)
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    inputs["moe_mm_token_type_ids"] = ((ids == IMAGE) | (ids == IMAGE_START) | (ids == IMAGE_END)).int()
    return Example(model, inputs)


@architecture("hunyuan_vl")
def hunyuan_vl() -> Example:
    config = transformers.HunYuanVLConfig(
        text_config=text_config(
            head_dim=16,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2, 2], "rope_theta": 10000.0},
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
            "patch_size": 4,
            "max_image_size": 16,
        },
        image_token_id=IMAGE,
        im_start_id=IMAGE_START,
        im_end_id=IMAGE_END,
        im_newline_id=94,
    )
    model = randomized(transformers.HunYuanVLForConditionalGeneration(config))
    # Two rows of two, each with an end of line, between a begin and an end: all of them the tower's.
    inputs = grids([IMAGE_START, *[IMAGE] * (1 + 2 * 3 + 1), IMAGE_END], 3 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(model, inputs)


@architecture("hyperclovax_vision_v2")
def hyperclovax_vision_v2() -> Example:
    config = transformers.HyperCLOVAXVisionV2Config(
        text_config=text_config(
            model_type="hyperclovax",
            embedding_multiplier=2.0,
            logits_scaling=0.5,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
        ),
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = randomized(transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config))
    return Example(model, grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 2 * 4 * 4))


@architecture("apertus1p5")
def apertus1p5() -> Example:
    config = transformers.Apertus1p5Config(
        text_config=text_config(output_vocab_size=80),
        vision_config={
            "codebook_size": 4,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "resolution": 4,
        },
        audio_config={
            "model_type": "wavtokenizer_encoder",
            "num_filters": 2,
            "upsampling_ratios": [2, 2],
            "num_lstm_layers": 1,
            "hidden_size": 8,
            "codebook_size": 4,
            "codebook_dim": 8,
        },
        image_token_id=70,
        audio_token_id=71,
        image_token_offset=80,
        audio_token_offset=84,
    )
    model = randomized(transformers.Apertus1p5ForConditionalGeneration(config))
    inputs = rows_of([72, *[70] * 4, 73])
    inputs["image_sizes"] = torch.tensor([[4, 4], [4, 4]])
    return Example(model, {**inputs, "pixel_values": pixels(2, 3, 4, 4)})


@architecture("cosmos3_edge")
def cosmos3_edge() -> Example:
    config = transformers.Cosmos3EdgeConfig(
        text_config=text_config(
            head_dim=8,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "num_patches": 16,
        },
        projector_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    model = randomized(transformers.Cosmos3EdgeForConditionalGeneration(config))
    inputs = grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(model, inputs)


@architecture("cosmos3_omni")
def cosmos3_omni() -> Example:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = transformers.Cosmos3OmniConfig(
        text_config=text_config(model_type="qwen3_vl_text", head_dim=8, rope_parameters=rope),
        vision_config={
            "model_type": "qwen3_vl_vision",
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
    model = randomized(transformers.Cosmos3OmniForConditionalGeneration(config))
    inputs = grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 2 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(model, inputs)


@architecture("fuyu")
def fuyu() -> Example:
    config = transformers.FuyuConfig(
        text_config=text_config(
            model_type="persimmon",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        image_size=16,
        patch_size=4,
        image_token_id=IMAGE,
    )
    model = randomized(transformers.FuyuForCausalLM(config))
    # Two rows of two patches, each with a newline.
    inputs = rows_of([IMAGE, IMAGE, IMAGE_START, IMAGE, IMAGE, IMAGE_START])
    return Example(model, {**inputs, "pixel_values": pixels(2, 4, 4 * 4 * 3)})


@architecture("dots3_note")
def dots3_note() -> Example:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 8, "qk_rope_head_dim": 4}
    config = transformers.Dots3NoteConfig(
        text_config=text_config(
            num_hidden_layers=4,
            num_key_value_heads=4,
            layer_types=["indexed_attention", "sliding_attention"] * 2,
            sliding_window=8,
            head_dim=8,
            **latent,
            **{f"swa_{name}": size for name, size in latent.items()},
            swa_head_dim=8,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=2,
            index_topk=8,
            index_head_dim=8,
            index_n_heads=8,  # fewer leave scores of zero, and which of them are chosen is chance
            moe_intermediate_size=16,
            n_routed_experts=3,
            num_experts_per_tok=2,
            shared_experts_intermediate_size=16,
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "moe_intermediate_size": 16,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=94,
    )
    model = randomized(transformers.Dots3NoteForConditionalGeneration(config))
    return Example(model, grids([IMAGE_START, *[IMAGE] * 4, IMAGE_END], 3 * 4 * 4))


@architecture("hy_v4_vl")
def hy_v4_vl() -> Example:
    config = transformers.HYV4VLConfig(
        text_config=text_config(
            num_hidden_layers=4,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            indexer_types=["full", "full", "shared", "shared"],
            index_topk=8,
            index_head_dim=16,
            index_n_heads=8,  # fewer leave scores of zero, and which of them are chosen is chance
            moe_intermediate_size=16,
            n_routed_experts=3,
            num_experts_per_tok=2,
            hc_mult=2,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        ),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
            "patch_size": 4,
            "max_image_size": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = randomized(transformers.HYV4VLForConditionalGeneration(config))
    inputs = grids([IMAGE_START, *[IMAGE] * 6, IMAGE_END], 3 * 4 * 4)  # two rows of two, each with an end of line
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(model, inputs)


@architecture("blip-2")
def blip_2() -> Example:
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        qformer_config={
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
        },
        text_config={**text_config(), "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    model = randomized(transformers.Blip2ForConditionalGeneration(config))
    return Example(model, {**rows_of([IMAGE] * 4), "pixel_values": pixels(2, 3, 8, 8)})


NOT_APPLICABLE.update(
    {
        "blip": "captioner that reads images by cross-attention only",
        "diffusion_gemma": "diffusion: writes blocks of tokens, not one after another",
        "evolla": "reads proteins, not images",
        "florence2": "encoder-decoder of captions and boxes",
        "git": "captioner whose images stand before the sequence, not in it",
        "idefics": "reads images by cross-attention only",
    }
)

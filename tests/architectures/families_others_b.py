"""Inkling, Muse, Molmo, Phi, MiniCPM, Step, Nemotron, Video-LLaMA and the readers of documents."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures.zoo import NOT_APPLICABLE, Example, architecture, randomized, rows_of, text_config
from transformers.utils.output_capturing import maybe_install_capturing_hooks

IMAGE, VIDEO, START, END, AUDIO, ROW_END = 90, 91, 92, 93, 94, 89
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
VIDEO_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
# SAM's tower reads 8 by 8 patches, which two strided convolutions make 2 by 2.
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
INKLING = {
    "vocab_size": 104,
    "unpadded_vocab_size": 96,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 8,
    "log_scaling_n_floor": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
MUSE = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    # No rotation in layers of full attention.
    "layer_rope_theta": [10000.0, 0, 10000.0, 0],
    "final_logit_softcapping": 5.0,
    "output_multiplier": 0.5,
}
MUSE_VISION = {
    **VISION,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
    "layer_types": ["window_attention", "full_attention"],
}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 1.0,
    },
}
QFORMER = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
GRIDS = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def images(image: list[int], *shape: int, **others: Any) -> dict[str, torch.Tensor]:
    """Two rows of an image each."""
    return {**rows_of(image), "pixel_values": torch.randn(*shape), **others}


@architecture("inkling_mm_model")
def inkling_mm_model() -> Example:
    config = transformers.InklingConfig(
        vision_config={
            "patch_size": 4,
            "temporal_patch_size": 2,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        text_config=text_config(
            **INKLING,
            num_hidden_layers=4,
            layer_types=["hybrid_sliding", "hybrid"] * 2,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            n_shared_experts=1,
            logits_mup_width_multiplier=2.0,
        ),
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_bos_token_id=START,
        audio_bos_token_id=END,
    )
    inputs = images([START, *[IMAGE] * 4], 2 * 4, 2, 4, 4, 3)
    return Example(randomized(transformers.InklingForConditionalGeneration(config)), inputs)


@architecture("inkling2")
def inkling2() -> Example:
    config = transformers.Inkling2Config(
        vision_config={**VISION, "posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32},
        text_config=text_config(
            **INKLING,
            num_hidden_layers=4,
            layer_types=["hybrid_sliding", "hybrid"] * 2,
            n_layers_per_attn_res_block=2,
            final_logit_softcapping=5.0,
        ),
        image_token_id=IMAGE,
    )
    inputs = images([START, *[IMAGE] * 4], 2 * 4, 8, 8, 3, image_grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]))
    return Example(randomized(transformers.Inkling2ForConditionalGeneration(config)), inputs)


@architecture("inkling2_loop")
def inkling2_loop() -> Example:
    config = transformers.Inkling2LoopConfig(
        vision_config={
            **VISION,
            "model_type": "inkling2_vision",
            "posemb_grid_size": 4,
            "projection_hidden_dim": 32,
            "text_hidden_size": 32,
        },
        # The two layers in the middle run twice.
        text_config=text_config(
            **INKLING,
            num_hidden_layers=6,
            layer_types=["hybrid_sliding", "hybrid"] * 3,
            n_layers_per_attn_res_block=2,
            final_logit_softcapping=5.0,
            loop_layer_index_start=2,
            loop_layer_index_end=4,
            loop_num_passes=2,
            loop_gate_rank=4,
        ),
        image_token_id=IMAGE,
    )
    inputs = images([START, *[IMAGE] * 4], 2 * 4, 8, 8, 3, image_grid_thw=torch.tensor([[1, 2, 2], [1, 2, 2]]))
    return Example(randomized(transformers.Inkling2LoopForConditionalGeneration(config)), inputs)


@architecture("muse_glimmer")
def muse_glimmer() -> Example:
    config = transformers.MuseGlimmerConfig(
        vision_config=MUSE_VISION,
        text_config=text_config(**MUSE),
        out_hidden_size=64,
        projector_hidden_size=32,
        **VIDEO_TOKENS,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2 * 16, 3 * 2 * 4 * 4, **GRIDS)
    return Example(randomized(transformers.MuseGlimmerForConditionalGeneration(config)), inputs)


@architecture("muse_spark")
def muse_spark() -> Example:
    config = transformers.MuseSparkConfig(
        vision_config=MUSE_VISION,
        text_config=text_config(
            **MUSE,
            moe_intermediate_size=16,
            moe_hidden_size=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        ),
        audio_config={
            "patch_sizes": [4, 2],
            "hidden_sizes": [8, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 32,
        },
        out_hidden_size=64,
        projector_hidden_size=32,
        audio_token_id=AUDIO,
        **VIDEO_TOKENS,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2 * 16, 3 * 2 * 4 * 4, **GRIDS)
    return Example(randomized(transformers.MuseSparkForConditionalGeneration(config)), inputs)


@architecture("molmo2")
def molmo2() -> Example:
    # Its image tokens lie beyond the vocabulary that it can say.
    start, patch, end = 96, 98, 97
    config = transformers.Molmo2Config(
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "image_size": [16, 16]},
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "text_hidden_size": 32,
        },
        text_config=text_config(head_dim=8, additional_vocab_size=8),
        image_start_token_id=start,
        image_end_token_id=end,
        image_patch_id=patch,
        low_res_image_start_token_id=99,
        frame_start_token_id=100,
        frame_end_token_id=101,
    )
    # Each token pools the features of two by two patches.
    pooled = torch.arange(2 * 16).view(2, 2, 2, 2, 2).transpose(2, 3).reshape(2 * 4, 4)
    inputs = images(
        [start, *[patch] * 4, end],
        2,
        16,
        3 * 4 * 4,
        image_token_pooling=pooled,
        image_grids=torch.tensor([[2, 2, 0, 0], [2, 2, 0, 0]]),
        image_num_crops=torch.tensor([1, 1]),
    )
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == patch).long()
    return Example(randomized(transformers.Molmo2ForConditionalGeneration(config)), inputs)


@architecture("phi4_multimodal")
def phi4_multimodal() -> Example:
    config = transformers.Phi4MultimodalConfig(
        **text_config(),
        vision_config={**VISION, "image_size": 16, "crop_size": 16, "image_token_id": IMAGE},
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "input_size": 16,
            "nemo_conv_channels": 8,
            "bias_max_distance": 8,
            "audio_token_id": AUDIO,
        },
    )
    model = transformers.Phi4MultimodalForCausalLM(config)
    # Where the first pass installs the vision tower's hooks alone, one that returns attentions installs them again, and
    # the model then reads the wrong hidden state.
    maybe_install_capturing_hooks(model.model)
    # The image as a whole, of two rows of two features and their ends, and its only crop, whose second row is padding.
    # Without padding the vision tower is causal under sdpa, and not under eager attention.
    mask = torch.ones(2, 2, 4, 4)
    mask[:, 1, 2:] = 0
    crops = torch.randn(2, 2, 3, 16, 16)
    crops[:, 1, :, 8:] = 0
    inputs = {
        **rows_of([IMAGE] * (3 + 1 + 6)),
        "image_pixel_values": crops,
        "image_sizes": torch.tensor([[16, 16], [16, 16]]),
        "image_attention_mask": mask,
    }
    return Example(randomized(model), inputs)


@architecture("minicpmv4_6")
def minicpmv4_6() -> Example:
    config = transformers.MiniCPMV4_6Config(
        vision_config={**VISION, "image_size": 32},
        text_config=transformers.Qwen3_5TextConfig(**text_config(**LINEAR_ATTENTION)),
        insert_layer_id=0,
        image_size=32,
        **VIDEO_TOKENS,
    )
    # Rows of patches, 8 by 8 an image, merged by sixteens.
    sizes = torch.tensor([[8, 8], [8, 8]], dtype=torch.int32)
    inputs = images([START, *[IMAGE] * 4, END], 1, 3, 4, 2 * 64 * 4, target_sizes=sizes)
    return Example(randomized(transformers.MiniCPMV4_6ForConditionalGeneration(config)), inputs)


@architecture("minicpmv4_7")
def minicpmv4_7() -> Example:
    config = transformers.MiniCPMV4_7Config(
        vision_config={**VISION, "image_size": 32},
        text_config=transformers.Qwen3_5TextConfig(**text_config(**LINEAR_ATTENTION)),
        insert_layer_id=0,
        image_size=32,
        image_start_id=START,
        image_end_id=END,
        slice_start_id=87,
        slice_end_id=88,
        newline_id=ROW_END,
        **VIDEO_TOKENS,
    )
    sizes = torch.tensor([[8, 8], [8, 8]], dtype=torch.int32)
    inputs = images([START, *[IMAGE] * 4, END], 1, 3, 4, 2 * 64 * 4, target_sizes=sizes)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(randomized(transformers.MiniCPMV4_7ForConditionalGeneration(config)), inputs)


@architecture("minicpm_ocr")
def minicpm_ocr() -> Example:
    config = transformers.MiniCPMOcrConfig(
        vision_config={**VISION, "image_size": 16},
        text_config=transformers.Qwen3_5TextConfig(**text_config(**LINEAR_ATTENTION)),
        insert_layer_id=0,
        **VIDEO_TOKENS,
    )
    sizes = torch.tensor([[4, 4], [4, 4]], dtype=torch.int32)
    inputs = images([START, *[IMAGE] * 4, END], 1, 3, 4, 2 * 16 * 4, target_sizes=sizes)
    return Example(randomized(transformers.MiniCPMOcrForConditionalGeneration(config)), inputs)


@architecture("step3p7")
def step3p7() -> Example:
    config = transformers.Step3p7Config(
        vision_config={**VISION, "image_size": 32, "mlp_ratio": 2.0},
        text_config=text_config(
            head_dim=8,
            num_hidden_layers=4,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2,
            num_sliding_attention_heads=6,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            share_expert_dim=16,
        ),
        image_token_id=IMAGE,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2, 3, 32, 32)
    return Example(randomized(transformers.Step3p7ForConditionalGeneration(config)), inputs)


@architecture("nemotron_h_omni")
def nemotron_h_omni() -> Example:
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=transformers.RadioConfig(
            **VISION, image_size=16, max_img_size=16, mlp_ratio=2.0, video_temporal_patch_size=2, num_registers=1
        ),
        text_config=transformers.NemotronHConfig(
            **text_config(
                head_dim=8,
                num_hidden_layers=4,
                layers_block_type=["linear_attention", "full_attention", "moe", "full_attention"],
                ssm_state_size=8,
                mamba_num_heads=4,
                mamba_head_dim=8,
                n_groups=2,
                chunk_size=8,
                n_routed_experts=4,
                moe_intermediate_size=16,
                moe_shared_expert_intermediate_size=16,
            )
        ),
        projector_hidden_size=32,
        vision_hidden_size=16,
        audio_token_id=AUDIO,
        **VIDEO_TOKENS,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2 * 16, 3 * 4 * 4, image_grid_hw=torch.tensor([[4, 4], [4, 4]]))
    return Example(randomized(transformers.NemotronH_Omni_Reasoning_V3(config)), inputs)


@architecture("paddleocr_vl")
def paddleocr_vl() -> Example:
    config = transformers.PaddleOCRVLConfig(
        vision_config={**VISION, "image_size": 16},
        text_config=text_config(head_dim=8, rope_parameters=MROPE),
        vision_start_token_id=START,
        vision_end_token_id=END,
        **VIDEO_TOKENS,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2 * 16, 3, 4, 4, **GRIDS)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return Example(randomized(transformers.PaddleOCRVLForConditionalGeneration(config)), inputs)


@architecture("video_llama_3")
def video_llama_3() -> Example:
    config = transformers.VideoLlama3Config(
        vision_config=VISION, text_config=transformers.Qwen2Config(**text_config()), **VIDEO_TOKENS
    )
    inputs = images([IMAGE] * 4, 2 * 16, 3 * 4 * 4, **GRIDS, image_merge_sizes=torch.tensor([2, 2]))
    return Example(randomized(transformers.VideoLlama3ForConditionalGeneration(config)), inputs)


@architecture("pp_chart2table")
def pp_chart2table() -> Example:
    config = transformers.PPChart2TableConfig(
        vision_config=SAM,
        text_config=transformers.Qwen2Config(**text_config()),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    inputs = images([START, *[IMAGE] * 4, END], 2, 3, 32, 32)
    return Example(randomized(transformers.GotOcr2ForConditionalGeneration(config)), inputs)


@architecture("unlimited_ocr")
def unlimited_ocr() -> Example:
    config = transformers.UnlimitedOcrConfig(
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [8, 16]},
            "encoder_config": {**VISION, "image_size": 8},
        },
        text_config=text_config(
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=16,
            sliding_window=2,
        ),
        image_token_id=IMAGE,
    )
    # Two rows of two features, each with its end, and the end of the image.
    return Example(
        randomized(transformers.UnlimitedOcrForConditionalGeneration(config)), images([IMAGE] * 7, 2, 3, 32, 32)
    )


@architecture("instructblip")
def instructblip() -> Example:
    config = transformers.InstructBlipConfig(
        vision_config={**VISION, "image_size": 8},
        qformer_config=QFORMER,
        text_config=transformers.LlamaConfig(**text_config()),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    inputs = images([IMAGE] * 4, 2, 3, 8, 8, qformer_input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]))
    return Example(randomized(transformers.InstructBlipForConditionalGeneration(config)), inputs)


@architecture("instructblipvideo")
def instructblipvideo() -> Example:
    config = transformers.InstructBlipVideoConfig(
        vision_config={**VISION, "image_size": 8},
        qformer_config=QFORMER,
        text_config=transformers.LlamaConfig(**text_config()),
        num_query_tokens=4,
        video_token_index=VIDEO,
    )
    # Two frames a video, of four tokens each.
    inputs = images([VIDEO] * 8, 2, 2, 3, 8, 8, qformer_input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]))
    return Example(randomized(transformers.InstructBlipVideoForConditionalGeneration(config)), inputs)


NOT_APPLICABLE.update(
    {
        "kosmos-2": "says by a mask, not by a token, where its image stands",
        "kosmos-2.5": "says by a mask, not by a token, where its image stands",
        "mistral4": "a decoder of text alone, which sees images as part of mistral3",
        "mllama": "reads images by cross-attention",
        "pi0": "a robot's policy",
        "pix2struct": "an encoder and a decoder that reads it by cross-attention",
        "pp_formulanet": "an encoder and a decoder that reads it by cross-attention",
        "t5gemma2": "an encoder and a decoder that reads it by cross-attention",
        "udop": "an encoder and a decoder that reads it by cross-attention",
        "vision-encoder-decoder": "an encoder and a decoder that reads it by cross-attention",
    }
)

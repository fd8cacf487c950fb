"""Decoders that attend in chunks, blocks or by convolution: Llama 4, DeepSeek's (Kimi), Mistral Large, MiniMax, LFM."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures.zoo import Example, architecture, grids, randomized, rows_of, text_config
from torch import nn

IMAGE, VIDEO, START, END, ROW_END = 90, 91, 92, 93, 94
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
VIDEO_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MULTI_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# A router in two groups, of which each token uses one.
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}


def four(image: list[int], **changes: Any) -> dict[str, torch.Tensor]:
    """An image of 16 by 16 pixels a row."""
    return {**rows_of(image), "pixel_values": torch.randn(2, 3, 16, 16), **changes}


@architecture("llama4")
def llama4() -> Example:
    config = transformers.Llama4Config(
        # The width of its projector's input is that of four patches, shuffled into one.
        vision_config={
            **VISION,
            "image_size": 16,
            "intermediate_size": 64,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=text_config(
            head_dim=8,
            num_hidden_layers=4,
            intermediate_size=32,
            intermediate_size_mlp=64,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            floor_scale=4,
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    model = transformers.Llama4ForConditionalGeneration(config)

    # transformers 5.24 reads from the decoder's output a field which that does not have.
    def add_field(decoder: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        output.image_outputs = None

    model.language_model.register_forward_hook(add_field)
    return Example(randomized(model), four([START, 89, *[IMAGE] * 4, END]))


@architecture("mistral_large4")
def mistral_large4() -> Example:
    config = transformers.MistralLarge4Config(
        vision_config={**VISION, "model_type": "pixtral", "image_size": 16, "head_dim": 8},
        text_config=text_config(
            **{**MULTI_LATENT, **ROUTED},
            num_hidden_layers=4,
            # Each query reads four tokens. The third layer reads those of the second, from its keys and values. Were
            # there fewer heads, many tokens would score zero in all of them: ties.
            index_topk=4,
            index_head_dim=8,
            index_n_heads=8,
            indexer_types=["full", "full", "shared", "full"],
            kv_source_layers=[0, 1, 1, 3],
            final_logit_softcapping=5.0,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.0,
            },
        ),
        image_token_index=IMAGE,
    )
    inputs = four([IMAGE, IMAGE, ROW_END, IMAGE, IMAGE, END], image_sizes=torch.tensor([[16, 16], [16, 16]]))
    return Example(randomized(transformers.MistralLarge4ForConditionalGeneration(config)), inputs)


@architecture("kimi_k25")
def kimi_k25() -> Example:
    config = transformers.Kimi_K25Config(
        vision_config={**VISION, "pos_emb_height": 4, "pos_emb_width": 4},
        text_config=transformers.DeepseekV3Config(
            **text_config(**{**MULTI_LATENT, **ROUTED}, q_lora_rank=16, first_k_dense_replace=1)
        ),
        projection_hidden_size=16,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
        **VIDEO_TOKENS,
    )
    inputs = grids([START, *[IMAGE] * 4, END], 3, 4, 4)
    return Example(randomized(transformers.Kimi_K25ForConditionalGeneration(config)), inputs)


@architecture("minimax_m3_vl")
def minimax_m3_vl() -> Example:
    config = transformers.MiniMaxM3VLConfig(
        vision_config={**VISION, "image_size": 16, "hidden_size": 24, "num_attention_heads": 2},
        text_config=text_config(
            head_dim=8,
            rotary_dim=4,
            num_hidden_layers=4,
            intermediate_size=32,
            dense_intermediate_size=64,
            shared_intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention", "minimax_m3_sparse"] * 2,
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
            # Two of the blocks of four keys, of which one is the query's own.
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
        ),
        projector_hidden_size=32,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    inputs = grids([START, *[IMAGE] * 4, END], 3 * 2 * 4 * 4)
    # Its index gives keys to blocks by their place in the row, padding included, but queries by their position; and it
    # reads padding, too. So no row is padded here.
    inputs["input_ids"][1, 0] = 4
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Example(randomized(transformers.MiniMaxM3SparseForConditionalGeneration(config)), inputs)


@architecture("lfm2_vl")
def lfm2_vl() -> Example:
    config = transformers.Lfm2VlConfig(
        vision_config=transformers.Siglip2VisionConfig(**VISION, num_patches=16, vision_use_head=False),
        text_config=transformers.Lfm2Config(
            **text_config(
                num_hidden_layers=4,
                layer_types=["conv", "full_attention"] * 2,
                block_auto_adjust_ff_dim=False,
            )
        ),
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    inputs = {
        **rows_of([START, *[IMAGE] * 4, END]),
        "pixel_values": torch.randn(2, 16, 3 * 4 * 4),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
    }
    return Example(randomized(transformers.Lfm2VlForConditionalGeneration(config)), inputs)


@architecture("lfm3_vl")
def lfm3_vl() -> Example:
    config = transformers.Lfm3VlConfig(
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
        },
        text_config=transformers.Lfm3Config(
            **text_config(
                head_dim=8,
                num_hidden_layers=4,
                sliding_window=8,
                layer_types=["conv", "sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        vision_start_token_id=START,
        vision_end_token_id=END,
        projector_hidden_size=32,
        **VIDEO_TOKENS,
    )
    inputs = grids([START, *[IMAGE] * 4, END], 3 * 2 * 4 * 4)
    return Example(randomized(transformers.Lfm3VlForConditionalGeneration(config)), inputs)

"""Tiny models whose processors take videos, and rows with them.

Video processors of transformers need torchvision, which the lock does not have: its wheel is built for CUDA. Where it
is missing, Qwen's own arithmetic is done here for frames that need no resizing, and everything else is real.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image
from trainer.tiny_runs import QWEN_TEMPLATE, fast_tokenizer, picture, qwen2_5_vl, word_tokens
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import make_batched_metadata, make_batched_videos

HAS_TORCHVISION = find_spec("torchvision") is not None
PATCH, MERGED, FRAMES = 4, 2, 2  # side of a patch in pixels, of a token in patches, and frames of a token
PLACE = "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_TEMPLATE = QWEN_TEMPLATE.replace("{%- else -%}{{ part.text }}", PLACE + "{%- else -%}{{ part.text }}")


class FrameProcessor(VideoProcessorMixin):
    """What Qwen2VLVideoProcessor makes of frames whose sides are multiples of a token's, without torchvision."""

    patch_size, merge_size, temporal_patch_size = PATCH, MERGED, FRAMES

    def preprocess(self, videos: Any, **_: Any) -> BatchFeature:
        films = make_batched_videos(videos)
        pixels, grids = [], []
        for film in films:
            shown = np.concatenate([film, np.repeat(film[-1:], -len(film) % FRAMES, axis=0)]) / 255.0
            shown = (shown - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
            grid = (len(shown) // FRAMES, shown.shape[1] // PATCH, shown.shape[2] // PATCH)
            cut = shown.reshape(grid[0], FRAMES, grid[1] // MERGED, MERGED, PATCH, grid[2] // MERGED, MERGED, PATCH, 3)
            pixels.append(cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(grid[0] * grid[1] * grid[2], -1))
            grids.append(grid)
        return BatchFeature(
            {
                "pixel_values_videos": torch.tensor(np.concatenate(pixels), dtype=torch.float32),
                "video_grid_thw": torch.tensor(grids),
                "video_metadata": make_batched_metadata(films, None),
            }
        )


def real_processor() -> Any:
    """The same of transformers."""
    return transformers.Qwen2VLVideoProcessor(
        patch_size=PATCH,
        merge_size=MERGED,
        temporal_patch_size=FRAMES,
        size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
        cap_pixels_per_frame=False,
    )


def _without_check(processor_class: Any) -> Any:
    """A processor class that takes any video processor."""

    class Processor(processor_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    Processor.__name__ = processor_class.__name__
    return Processor


def tiny(family: str, real: bool) -> tuple[Any, Any]:
    """A tiny model and its processor, with transformers' video processor or with ours."""
    if family == "llava_onevision":
        return llava_onevision()
    model, processor = qwen2_5_vl()
    kind = {"qwen2_5_vl": transformers.Qwen2_5_VLProcessor, "qwen3_vl": transformers.Qwen3VLProcessor}[family]
    built = (kind if real else _without_check(kind))(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=real_processor() if real else FrameProcessor(),
        chat_template=VIDEO_TEMPLATE,
    )
    return (model if family == "qwen2_5_vl" else _qwen3_vl(model.config)), built


def _qwen3_vl(like: Any) -> Any:
    text = {name: value for name, value in like.text_config.to_dict().items() if name not in ("model_type", "dtype")}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = transformers.Qwen3VLConfig(
        text_config={**text, "head_dim": 8},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **{name: getattr(like, name) for name in names},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model


def llava_onevision() -> tuple[Any, Any]:
    """A tiny LLaVA-OneVision, whose videos come without a grid and with as many frames each; needs torchvision."""
    special = ["<|endoftext|>", "<|im_end|>", "<unk>", "<image>", "<video>"]
    tokenizer = fast_tokenizer(word_tokens(special), additional_special_tokens=special[3:])
    size, pinpoints = {"height": 16, "width": 16}, [[16, 16], [16, 32]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=re.sub(r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>", r"<\1>", VIDEO_TEMPLATE),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,
            max_position_embeddings=512,
        ),
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model, processor


def film(seed: int, frames: int = 4, height: int = 16, width: int = 24) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def row(seed: int, videos: int, images: int, **columns: Any) -> dict[str, Any]:
    """A row with so many videos, of several lengths, and so many images."""
    return {
        "prompt": [{"role": "user", "content": "Add the digits."}],
        "videos": [film(10 * seed + index, 2 + 2 * ((seed + index) % 3)) for index in range(videos)],
        "images": [picture(100 + 10 * seed + index, 16) for index in range(images)],
        "answer": str(seed),
        **columns,
    }


# Videos and images of each row: films alone, one beside an image, two films, an image, and text.
SHOWN = ((1, 0), (1, 1), (2, 0), (0, 1), (0, 0), (1, 0))


def video_rows() -> Dataset:
    return Dataset.from_list([row(seed, *shown) for seed, shown in enumerate(SHOWN)])

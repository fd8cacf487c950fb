"""Tiny random models of every architecture that transformers maps to image-text-to-text, with a batch for each.

An architecture is one function, named by transformers' ``model_type`` and registered by its decorator, in the file of
its family. It builds the model from its configuration (a few thousand parameters, random weights, nothing downloaded)
and a batch as that model's processor would make it: two left-padded rows of text, an image, text and an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Example(NamedTuple):
    """A tiny model and a batch for it.

    Attributes:
        model: In fp32, with random weights.
        inputs: Keyword arguments of its forward pass: ``input_ids`` and ``attention_mask`` ``[2, S]``, the images, and
            what else it needs. The last ``ANSWER`` positions of each row are text.

    """

    model: nn.Module
    inputs: dict[str, Tensor]


ANSWER = 4  # text tokens at the end of each row that stand for an answer
ARCHITECTURES: dict[str, Callable[[], Example]] = {}
# Why an architecture of the mapping has no tiny model here: what it is, in a few words.
NOT_APPLICABLE: dict[str, str] = {}


def architecture(name: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    """Register the function that builds an architecture, by its ``model_type``."""

    def register(build: Callable[[], Example]) -> Callable[[], Example]:
        assert name not in ARCHITECTURES, name
        ARCHITECTURES[name] = build
        return build

    return register


def example(name: str) -> Example:
    """Build an architecture's model, the same each time, ready for inference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = ARCHITECTURES[name]()
    return Example(built.model.eval(), built.inputs)


def text_config(**changes: Any) -> dict[str, Any]:
    """Settings that most decoders share, small."""
    return {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def rows_of(image: list[int], *, answer: int = ANSWER) -> dict[str, Tensor]:
    """Two rows of text, the image's tokens, text and an answer; the second is padded on its left."""
    rows = [[5, 6, *image, 7, *range(10, 10 + answer)], [0, 8, *image, 9, *range(20, 20 + answer)]]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def grids(image: list[int], *patch: int) -> dict[str, Tensor]:
    """Two rows of an image of 4 by 4 patches each, which stand one after another, and the size of each grid."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {**rows_of(image), "pixel_values": pixels(2 * 16, *patch), "image_grid_thw": grid}


def randomized(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Give a model weights that tell tokens, heads and layers apart, and let it generate on without end.

    At these sizes the usual initialization leaves attention all but uniform, and some weights (projectors, gates,
    position tables) start as zeros or as whatever memory holds, so that images or layers would have no effect at all.
    """
    with torch.no_grad():
        for weight in model.parameters():
            is_scale = bool((weight == 1).all())  # of a norm
            weight.normal_(mean=float(is_scale), std=std)
    settings = model.generation_config
    settings.pad_token_id, settings.bos_token_id, settings.eos_token_id = 0, 1, None
    return model


def pixels(*shape: int) -> Tensor:
    """Normalized pixel values of this shape."""
    return torch.randn(*shape)


# Whoever imports the zoo has every family.
for _file in sorted(Path(__file__).parent.glob("families_*.py")):
    import_module(f"architectures.{_file.stem}")

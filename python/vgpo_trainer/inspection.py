"""What a vision-language model looks at while it answers: an answer, and the visual signal of each of its tokens.

The model answers a prompt about an image, greedily. A second pass over prompt and answer then reads, for every token of
the answer, the query at the token itself: the share of its attention on the image, on the question and on what was
generated before, where on the image it lies, and how close its hidden state is to the image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vgpo_kernels import VGPOConfig, visual_focus, visual_weights
from vgpo_kernels.integrations.transformers import (
    IMAGE,
    AttentionCall,
    attention_segments,
    capture_attention,
    capture_hidden_states,
    visual_token_ids,
)
from vgpo_trainer.data.errors import Unusable
from vgpo_trainer.data.images import decode, image_of
from vgpo_trainer.reports.inspection import Inspection
from vgpo_trainer.sequences import extended_inputs


class InspectError(ValueError):
    """What keeps an answer from being inspected; the message says what to change."""


def inspect_answer(
    model: Any,
    processor: Any,
    image: Any,
    prompt: str,
    *,
    name: str = "",
    image_name: str = "",
    max_new_tokens: int = 256,
    layers: Sequence[int] | None = None,
) -> Inspection:
    """Let a model answer a prompt about an image, and read what each token of the answer looks at.

    Args:
        model: A vision-language model of transformers whose image tokens are in its sequence.
        processor: Its processor, with a chat template.
        image: An image of Pillow, its path, the bytes of its file, or an array ``[H, W, 3]`` or ``[H, W]`` of 8 bits.
        prompt: What to ask.
        name: What to call the model.
        image_name: What to call the image.
        max_new_tokens: Longest answer.
        layers: Decoder layers whose attention is averaged, negative ones counted from the last; by default all.

    Returns:
        An :class:`~vgpo_trainer.Inspection`, which a notebook shows as the page of ``vgpo inspect``.

    Raises:
        InspectError: The image cannot be read, the processor has no chat template, the model answered nothing, or no
            image token reached it.
        ValueError: A layer is out of range, or attention that cannot be captured.

    """
    if isinstance(image, (list, tuple)):
        raise InspectError(f"one image is inspected at a time, got a {type(image).__name__} of {len(image)}")
    try:
        image = decode(image_of(image, "image", ()))
    except Unusable as error:
        raise InspectError(str(error)) from error
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    if not getattr(processor, "chat_template", None):
        raise InspectError(f"the processor of {name or 'the model'} has no chat template to put the prompt into")
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    # A visual token in the answer would ask the second pass for an image that there is not.
    options = {"do_sample": False, "suppress_tokens": list(visual_token_ids(model))}
    with torch.no_grad():
        sequence = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    answered = sequence.shape[1] - inputs["input_ids"].shape[1]
    if answered == 0:
        raise InspectError("the model answered nothing")
    response_mask = torch.ones(1, answered, dtype=torch.bool, device=model.device)
    segments = attention_segments(sequence, model, None, response_mask)
    visible = segments == IMAGE
    if not visible.any():
        raise InspectError("no image token reached the model: its processor left the image out of the prompt")

    gaze = Gaze(segments, answered)
    with torch.no_grad(), capture_hidden_states(model) as captured, capture_attention(model, gaze, layers=layers):
        model(**extended_inputs(inputs, sequence), use_cache=False)
    cos = visual_focus(captured.hidden, visible, response_mask)
    groups = torch.zeros(1, dtype=torch.int64, device=cos.device)
    weights = visual_weights(cos, response_mask, groups, VGPOConfig.paper())
    picture, grid = picture_and_grid(inputs, processor, model.config, image, int(visible.sum()))
    tokenizer = getattr(processor, "tokenizer", processor)
    return Inspection(
        model=name,
        prompt=prompt,
        image_name=image_name,
        picture=picture,
        tokens=[tokenizer.decode([token]) for token in sequence[0, -answered:].tolist()],
        shares=[(row[0], row[1], row[2]) for row in gaze.shares.tolist()],
        cos=cos[0].tolist(),
        psi=weights.psi[0].tolist(),
        factors=weights.factors[0].tolist(),
        maps=[] if grid is None else gaze.maps.tolist(),
        grid=grid,
        layers=gaze.layers,
    )


class Gaze:
    """Adds up, layer by layer, where the attention of the last tokens lies; a consumer for ``capture_attention``.

    Args:
        segments: Segments of one sequence, ``[1, S]``.
        number: How many tokens, counted from the last.

    """

    def __init__(self, segments: Tensor, number: int) -> None:
        self.layers: list[int] = []
        self._segments = segments
        self._number = number
        self._image = segments == IMAGE
        self._shares: Tensor | float = 0.0
        self._maps: Tensor | float = 0.0

    def __call__(self, call: AttentionCall) -> None:
        """Take the queries and keys of the next layer."""
        call = call.last(self._number)
        if call.k.shape[2] != self._segments.shape[1]:
            raise InspectError(f"layer {call.layer} has {call.k.shape[2]} keys for {self._segments.shape[1]} tokens")
        shares = call.mass(self._segments)[0]
        heat = call.one_query_each().heatmap(self._image.expand(self._number, -1))
        self._shares = shares.cpu() + self._shares
        self._maps = heat[:, self._image[0]].cpu() + self._maps
        self.layers.append(call.layer)

    @property
    def shares(self) -> Tensor:
        """Mean shares of image, question and generated tokens, ``[tokens, 3]``."""
        return self._mean(self._shares)

    @property
    def maps(self) -> Tensor:
        """Mean attention on each image token, ``[tokens, image tokens]``."""
        return self._mean(self._maps)

    def _mean(self, total: Tensor | float) -> Tensor:
        if isinstance(total, float):
            raise InspectError("no attention of the model was captured")
        return total / len(self.layers)


def picture_and_grid(
    inputs: Any, processor: Any, config: Any, image: Image.Image, tokens: int
) -> tuple[Image.Image, tuple[int, int] | None]:
    """Return the image as the model saw it, and the rows and columns of its tokens.

    Known are processors that hand over one picture (LLaVA) or say how many patches it has (Qwen-VL); for others, which
    cut an image into several crops say, there is no grid.
    """
    sizes, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if sizes is not None and len(sizes) == 1:
        frames, rows, columns = sizes[0].tolist()
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        grid = (rows // merge, columns // merge)
        return image, grid if frames == 1 and grid[0] * grid[1] == tokens else None
    if pixels is not None and pixels.dim() == 4 and pixels.shape[0] == 1:
        height, width = pixels.shape[-2:]
        rows = round((tokens * height / width) ** 0.5)
        if rows > 0 and tokens % rows == 0 and abs(rows * width / height - tokens / rows) < 0.5:
            return _picture(pixels[0], processor.image_processor), (rows, tokens // rows)
    return image, None


def _picture(pixels: Tensor, image_processor: Any) -> Image.Image:
    """Undo the normalisation of one picture ``[3, H, W]``."""
    values = pixels.detach().float().cpu()
    if getattr(image_processor, "do_normalize", False):
        mean, deviation = (
            torch.tensor(list(getattr(image_processor, f"image_{name}")), dtype=torch.float32)
            for name in ("mean", "std")
        )
        values = values * deviation[:, None, None] + mean[:, None, None]
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())

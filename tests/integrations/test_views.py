"""Spoilt views: what is in the pictures, by the processors of transformers themselves, and by what a model sees."""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from architectures.zoo import example  # noqa: E402
from trainer.test_trainer_mixed import mixed  # noqa: E402
from trainer.tiny_runs import generation_batch, llava, make_trainer, qwen2_5_vl  # noqa: E402
from vgpo_trainer.trl_surface import FORWARD_INPUTS, Sequences  # noqa: E402

from vgpo_kernels.integrations.images import read_images  # noqa: E402
from vgpo_kernels.integrations.transformers import KINDS, spoilt_view, visual_mask  # noqa: E402

WIDE, HIGH = (140, 112), (84, 168)
PROMPTS = {
    "llava": "<image>Add the digits.<respond>1+2=3",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>Add the digits 1 + 2",
}


def ramp(width: int, height: int) -> Image.Image:
    """An image whose red grows downwards and whose green grows to the right."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    pixels[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)[None]
    return Image.fromarray(pixels)


def is_ramp(picture: Tensor) -> bool:
    """Whether a picture ``[frames, 3, H, W]`` is a part of a ramp, the right way up."""
    red, green, blue = picture[:, 0].float(), picture[:, 1].float(), picture[:, 2].float()
    steps = 1e-3
    return bool(
        (red.diff(dim=1) >= -steps).all()
        and (red[:, -1] > red[:, 0]).all()
        and (red.diff(dim=2).abs() < steps).all()
        and (green.diff(dim=2) >= -steps).all()
        and (green[..., -1] > green[..., 0]).all()
        and (green.diff(dim=1).abs() < steps).all()
        and (blue - blue[0, 0, 0]).abs().max() < steps
    )


def config(kind: str, processor: Any, **changes: Any) -> Any:
    """What a model's config says of patches, from its image processor."""
    patch = getattr(processor, "patch_size", None)
    patch = patch if isinstance(patch, int) else getattr(patch, "height", 16)
    merge = getattr(processor, "merge_size", 2)
    return SimpleNamespace(
        model_type=kind, vision_config=SimpleNamespace(patch_size=patch, spatial_merge_size=merge), **changes
    )


# Image processors that run without torchvision, by architecture.
PROCESSORS = {
    "aria": "AriaImageProcessorPil",
    "cohere_compass": "CohereCompassImageProcessorPil",
    "cosmos3_edge": "Cosmos3EdgeImageProcessorPil",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeImageProcessorPil",
    "gemma3": "Gemma3ImageProcessorPil",
    "gemma4": "Gemma4ImageProcessorPil",
    "glm46v": "Glm46VImageProcessorPil",
    "glm4v": "Glm4vImageProcessorPil",
    "glm5_next": "Glm5NextImageProcessorPil",
    "hunyuan_vl": "HunYuanVLImageProcessorPil",
    "hy_v4_vl": "HYV4VLImageProcessorPil",
    "idefics2": "Idefics2ImageProcessorPil",
    "idefics3": "Idefics3ImageProcessorPil",
    "internvl": "GotOcr2ImageProcessorPil",
    "llava": "LlavaImageProcessorPil",
    "llava_next": "LlavaNextImageProcessorPil",
    "llava_onevision": "LlavaOnevisionImageProcessorPil",
    "minicpmv4_6": "MiniCPMV4_6ImageProcessorPil",
    "mistral3": "PixtralImageProcessorPil",
    "ovis2": "Ovis2ImageProcessorPil",
    "paddleocr_vl": "PaddleOCRVLImageProcessorPil",
    "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    "smolvlm": "SmolVLMImageProcessorPil",
    "video_llama_3": "VideoLlama3ImageProcessorPil",
}
# They pad an image or its tiles with black within the picture.
BORDERED = ("aria", "llava_next", "llava_onevision", "granite4_vision")


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pictures_are_those_that_the_processor_was_given(kind: str) -> None:
    processor = getattr(transformers, PROCESSORS[kind])()
    images = [ramp(*WIDE), ramp(*HIGH)]
    inputs = processor(
        images=[[image] for image in images] if "ideficssmolvlm" in kind else images, return_tensors="pt"
    )
    found = read_images(inputs, config(kind, processor))
    assert len(found) == 1 and len(found[0].pictures) >= 2
    assert torch.equal(found[0].write(found[0].pictures), inputs[found[0].name])
    if kind not in BORDERED:
        assert all(is_ramp(picture) for picture in found[0].pictures)


FOLDER = Path(transformers.__file__).parent / "models"
# Image processors that need torchvision: the function that cuts patches is taken out of their source.
CUTTERS = {
    "kimi_k25": ("patchify", {"patch_size": 4}),
    "muse_glimmer": ("patchify", {"patch_size": 4, "temporal_patch_size": 2}),
    "minimax_m3_vl": ("patchify", {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}),
    "qwen2_vl": ("patchify", {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}),
    "nemotron_h_omni": ("convert_image_to_patches", {"patch_size": 4}),
    "lfm2_vl": ("convert_image_to_patches", {"patch_size": 4}),
    "minicpm_ocr": ("reshape_by_patch", {"patch_size": 4}),
}


def function_of(kind: str, name: str) -> Any:
    text = (FOLDER / kind / f"image_processing_{kind}.py").read_text()
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch}
    source = "from __future__ import annotations\n" + textwrap.dedent(
        ast.get_source_segment(text, found[0], padded=True)
    )
    exec(source, names)
    return names[name]


@pytest.mark.parametrize("kind", CUTTERS)
def test_patches_are_put_together_as_they_were_cut(kind: str) -> None:
    name, options = CUTTERS[kind]
    cut, picture = function_of(kind, name), torch.randn(3, 16, 24)
    given = picture if kind == "minicpm_ocr" else picture[None]
    patches = cut(None, given, **options) if name != "convert_image_to_patches" else cut(given, **options)
    pixels = patches[0] if isinstance(patches, tuple) else patches
    inputs = {"pixel_values": pixels.flatten(0, 1) if kind not in ("lfm2_vl", "minicpm_ocr") else pixels}
    if kind == "minicpm_ocr":
        inputs = {"pixel_values": pixels[None], "target_sizes": torch.tensor([[4, 6]])}
    elif kind == "lfm2_vl":
        inputs["spatial_shapes"] = torch.tensor([[4, 6]])
    elif kind == "nemotron_h_omni":
        inputs["image_grid_hw"] = torch.tensor([[4, 6]])
    else:
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 6]])
    found = read_images(inputs, config(kind, SimpleNamespace(patch_size=4, merge_size=2)))[0]
    assert all(torch.equal(frame, picture) for frame in found.pictures[0])
    assert torch.equal(found.write(found.pictures), inputs["pixel_values"])


@cache
def built(family: str) -> tuple[Any, Any]:
    model, processor = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}[family]()
    return model.eval(), processor


def photo(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(family: str, images: list[list[Image.Image]]) -> dict[str, Any]:
    """A batch as the family's processor makes it: a row for each list of images, which may be empty."""
    _, processor = built(family)
    start, text = PROMPTS[family].split("Add", 1)
    rows = [start * len(shown) + "Add" + text for shown in images]
    flat = [shown for shown in images if shown] or None
    return dict(processor(images=flat, text=rows, padding=True, return_tensors="pt"))


def logits(family: str, inputs: dict[str, Any]) -> Tensor:
    model, _ = built(family)
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "num_images"}).logits


@pytest.mark.parametrize("family", PROMPTS)
def test_swap_is_the_other_image_by_the_processor(family: str) -> None:
    model, _ = built(family)
    given = batch(family, [[photo(1)], [photo(2)]])
    swapped = spoilt_view(given, "swap", model, seed=3)
    other = batch(family, [[photo(2)], [photo(1)]])
    assert torch.equal(swapped["pixel_values"], other["pixel_values"])
    assert torch.equal(logits(family, swapped), logits(family, other))
    assert not torch.equal(logits(family, swapped), logits(family, given))


def test_swap_resamples_an_image_of_another_size() -> None:
    model, _ = built("qwen2_5_vl")
    given = batch("qwen2_5_vl", [[ramp(32, 64)], [photo(1, (64, 24))]])
    swapped = spoilt_view(given, "swap", model)
    assert {name: value.shape for name, value in swapped.items()} == {n: value.shape for n, value in given.items()}
    pictures = read_images(swapped, model)[0].pictures
    assert [tuple(picture.shape[-2:]) for picture in pictures] == [(64, 32), (24, 64)]
    assert is_ramp(pictures[1]) and not is_ramp(pictures[0])
    assert logits("qwen2_5_vl", swapped).isfinite().all()


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("num_images", [False, True])
def test_rows_of_text_and_of_several_images(family: str, num_images: bool) -> None:
    model, _ = built(family)
    shown = [[photo(1), photo(2)], [], [photo(3)], [photo(1), photo(2)]]
    given = batch(family, shown)
    if num_images:
        given["num_images"] = [2, 0, 1, 2]
    before, one_row = logits(family, given), given["pixel_values"].shape[0] // 5
    for kind in KINDS:
        view = spoilt_view(given, kind, model, seed=5)
        after = logits(family, view)
        assert torch.equal(after[1], before[1]) and all(not torch.equal(after[r], before[r]) for r in (0, 2, 3)), kind
    images = spoilt_view(given, "swap", model, seed=5)["pixel_values"].split(one_row)
    first, second, third = given["pixel_values"].split(one_row)[:3]
    # Rows 0 and 3 show the same images, so that both get row 2's, and it gets the first of one of theirs.
    assert all(torch.equal(images[place], third) for place in (0, 1, 3, 4)) and torch.equal(images[2], first)
    assert second.shape == first.shape


def test_swap_keeps_groups_apart_and_takes_every_row_once() -> None:
    model, _ = built("llava")
    given = batch("llava", [[photo(number)] for number in (1, 1, 2, 2, 3, 3)])
    before = [tuple(image.flatten()[:5].tolist()) for image in given["pixel_values"]]
    views = []
    for seed in range(6):
        swapped = spoilt_view(given, "swap", model, seed=seed)["pixel_values"]
        after = [tuple(image.flatten()[:5].tolist()) for image in swapped]
        assert Counter(after) == Counter(before) and all(one != other for one, other in zip(before, after, strict=True))
        assert after[0] == after[1]  # rows of a prompt see one other image
        views.append(after)
    assert len({tuple(view) for view in views}) == 2
    # Augmented images of a prompt differ, and a group says that they are the same.
    given = batch("llava", [[photo(number)] for number in range(4)])
    swapped = spoilt_view(given, "swap", model, groups=["a", "a", "b", "b"])["pixel_values"]
    assert all(not torch.equal(swapped[row], given["pixel_values"][part]) for row in (0, 1) for part in (0, 1))
    with pytest.raises(ValueError, match=r"groups must name the 4 rows.*2 names"):
        spoilt_view(given, "swap", model, groups=["a", "b"])


def test_a_prompt_that_fills_most_of_the_batch() -> None:
    model, _ = built("llava")
    given = batch("llava", [[photo(number)] for number in (1, 1, 1, 2)])
    swapped = spoilt_view(given, "swap", model)["pixel_values"]
    assert all(torch.equal(swapped[row], given["pixel_values"][3]) for row in range(3))
    assert torch.equal(swapped[3], given["pixel_values"][0])


def test_a_batch_of_one_image_takes_others_from_elsewhere() -> None:
    model, _ = built("qwen2_5_vl")
    given = batch("qwen2_5_vl", [[photo(1)], [photo(1)]])
    with pytest.raises(ValueError, match=r"all 2 rows with images show the same one.*sources="):
        spoilt_view(given, "swap", model)
    sources = batch("qwen2_5_vl", [[photo(1)], [photo(4)]])
    swapped = spoilt_view(given, "swap", model, sources=sources)
    expected = batch("qwen2_5_vl", [[photo(4)], [photo(4)]])
    assert torch.equal(swapped["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match="no other image than those of row 0"):
        spoilt_view(given, "swap", model, sources=given)


@pytest.mark.parametrize("family", PROMPTS)
def test_kinds_and_their_strengths(family: str) -> None:
    model, _ = built(family)
    given = batch(family, [[photo(1)], [photo(2)]])
    plain = read_images(given, model)[0]

    def pictures(kind: str, **options: Any) -> list[Tensor]:
        view = spoilt_view(given, kind, model, **options)
        assert view["pixel_values"].dtype == given["pixel_values"].dtype
        return read_images(view, model)[0].pictures

    side = plain.patch
    for picture, before in zip(pictures("mask", strength=0.3), plain.pictures, strict=True):
        patches = picture.unfold(-2, side, side).unfold(-2, side, side)
        hidden = (patches == 0).all(-1).all(-1).all(1)  # in every channel
        kept = (picture == before).unfold(-2, side, side).unfold(-2, side, side).all(-1).all(-1).all(1)
        assert torch.equal(kept, ~hidden)
        assert hidden[0].sum() == round(0.3 * hidden[0].numel())
        assert all(torch.equal(frame, hidden[0]) for frame in hidden)
    for picture, before in zip(pictures("noise", strength=0.25), plain.pictures, strict=True):
        noise = (picture - before * 0.75**0.5) / 0.5
        assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
        assert all(torch.allclose(frame, noise[0], atol=1e-5) for frame in noise)
    for picture, before in zip(pictures("pixelation", strength=10), plain.pictures, strict=True):
        assert torch.allclose(picture[:, :, :10, :10], before[:, :, :10, :10].mean((2, 3), keepdim=True), atol=1e-5)
        # The last block is what is left of 48 pixels.
        assert torch.allclose(picture[:, :, 40:, 40:], before[:, :, 40:, 40:].mean((2, 3), keepdim=True), atol=1e-5)
    assert all((picture == 0).all() for picture in pictures("blank"))
    half = {**given, "pixel_values": given["pixel_values"].bfloat16()}
    assert all(spoilt_view(half, kind, model)["pixel_values"].dtype == torch.bfloat16 for kind in KINDS[:-1])


def test_seeds() -> None:
    model, _ = built("qwen2_5_vl")
    given = batch("qwen2_5_vl", [[photo(1)], [photo(2)]])
    state = torch.get_rng_state()
    for kind in ("mask", "noise"):
        one, same, other = (spoilt_view(given, kind, model, seed=seed)["pixel_values"] for seed in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)
        first, second = one.chunk(2)
        assert not torch.equal(first - given["pixel_values"].chunk(2)[0], second - given["pixel_values"].chunk(2)[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_stays_padding() -> None:
    model = example("idefics2").model
    pixels, mask = torch.randn(2, 2, 3, 16, 16), torch.ones(2, 2, 16, 16, dtype=torch.int64)
    pixels[1, 1], mask[1, 1] = 0, 0  # the second row has one image
    pixels[0, 1, :, 8:], mask[0, 1, 8:] = 0, 0  # and one image is half as high
    ids = torch.tensor([[5, 6, *[90] * 8, 7, 10, 11], [0, 0, 0, 0, 0, 6, *[90] * 4, 7, 10, 11]])
    given = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }
    image = model.config.image_token_id
    given["input_ids"] = torch.where(ids == 90, image, ids)
    for kind in KINDS[:-1]:
        spoilt = spoilt_view(given, kind, model)["pixel_values"]
        assert not spoilt[1, 1].any() and not spoilt[0, 1, :, 8:].any()
        # A grey image is not taken for padding.
        assert spoilt[0, 0].any() and spoilt[0, 1, :, :8].any() and spoilt[1, 0].any(), kind
        assert not torch.equal(spoilt[0, 0], pixels[0, 0]) and not torch.equal(spoilt[1, 0], pixels[1, 0])
    swapped = spoilt_view(given, "swap", model)["pixel_values"]
    assert torch.equal(swapped[0, 0], pixels[1, 0]) and torch.equal(swapped[1, 0], pixels[0, 0])


def test_rows_of_a_padded_batch_are_entries() -> None:
    """As many rows as there are images, of two, one and none: the layout says that an entry is a row."""
    model = example("idefics2").model
    pixels, mask = torch.randn(3, 2, 3, 16, 16), torch.ones(3, 2, 16, 16, dtype=torch.int64)
    pixels[1, 1] = pixels[2] = mask[1, 1] = mask[2] = 0
    given = {"pixel_values": pixels, "pixel_attention_mask": mask, "num_images": [2, 1, 0]}
    swapped = spoilt_view(given, "swap", model)["pixel_values"]
    assert torch.equal(swapped[1], pixels[0] * (pixels[1] != 0)) and not swapped[2].any()
    assert torch.equal(swapped[0], pixels[1, :1].expand(2, -1, -1, -1))


def test_grey_of_pixels_that_are_not_normalised() -> None:
    model, inputs = example("gemma4")
    spoilt = spoilt_view(inputs, "blank", model)["pixel_values"]
    assert (spoilt == 0.5).all()


def test_without_images_is_the_text_alone() -> None:
    model, _ = built("qwen2_5_vl")
    given = batch("qwen2_5_vl", [[photo(1)], [photo(2, (64, 24))]])
    view = spoilt_view(given, "none", model)
    assert "pixel_values" not in view and view["input_ids"] is given["input_ids"]
    found = logits("qwen2_5_vl", view)
    for row in range(2):
        kept = view["attention_mask"][row].bool()
        text = {"input_ids": given["input_ids"][row : row + 1, kept]}
        torch.testing.assert_close(found[row : row + 1, kept], logits("qwen2_5_vl", text), atol=1e-5, rtol=1e-5)
    assert visual_mask(given["input_ids"], model)[view["attention_mask"] == 0].any()


def test_rows_of_text_alone_have_no_view() -> None:
    model, _ = built("llava")
    given = {"input_ids": torch.tensor([[5, 6]]), "pixel_values": None, "num_images": [0]}
    for kind in KINDS:
        view = spoilt_view(given, kind, model)
        assert view == given and view is not given


@pytest.mark.parametrize("family", PROMPTS)
def test_trls_batches(family: str, tmp_path: Path) -> None:
    """A generation batch of TRL's as it is, with prompts of two images, of one and of none."""
    dataset = mixed("images", [2, 0, 1, 1])
    settings = {"num_generations": 2, "per_device_train_batch_size": 8, "shuffle_dataset": False}
    trainer = make_trainer(tmp_path, family=family, dataset=dataset, **settings)
    made = trainer._generate_and_score_completions(generation_batch(trainer))
    sequence = Sequences.of(made)
    assert list(made["num_images"]) == [2, 2, 0, 0, 1, 1, 1, 1]
    tokens = {"input_ids": sequence.input_ids, "attention_mask": sequence.attention_mask}

    def logps(view: dict[str, Any]) -> Tensor:
        inputs = {name: view.get(name) for name in FORWARD_INPUTS}
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(
                trainer.model, view["input_ids"], view["attention_mask"], 10, batch_size=3, **inputs
            )[0]

    before = logps({**made, **tokens})
    sampled = visual_mask(sequence.input_ids[:, -10:], trainer.model)
    assert sampled.any() == (family == "qwen2_5_vl")  # stand for no image
    for kind in KINDS:
        view = spoilt_view({**made, **tokens}, kind, trainer.model, seed=1, response_mask=sequence.response_mask)
        assert torch.equal(view["attention_mask"][:, -10:], sequence.attention_mask[:, -10:])
        assert all(view[name] is made[name] for name in ("advantages", "completion_ids", "completion_mask"))
        change = (logps(view) - before).abs().amax(1)
        least = 1e-4 if kind == "none" else 0
        assert (change > least).tolist() == [True, True, False, False, True, True, True, True], kind


def test_what_is_refused() -> None:
    model, _ = built("qwen2_5_vl")
    given = batch("qwen2_5_vl", [[photo(1)], [photo(2)]])

    def refuses(error: type[Exception], match: str, kind: Any = "mask", inputs: Any = given, **options: Any) -> None:
        with pytest.raises(error, match=match):
            spoilt_view(inputs, kind, model, **options)

    refuses(ValueError, "kind must be one of mask, noise.*'blur'", "blur")
    refuses(TypeError, "inputs must be a mapping", inputs=[given])
    refuses(ValueError, "share above 0 and at most 1, got 1.5", strength=1.5)
    refuses(ValueError, "share above 0 and at most 1, got 0", "noise", strength=0)
    refuses(ValueError, "side in pixels, at least 2, got 2.5", "pixelation", strength=2.5)
    refuses(ValueError, "swap has no strength", "swap", strength=0.5)
    refuses(TypeError, "strength must be a number, got str", strength="much")
    refuses(ValueError, "groups and sources are of swap", groups=[1, 2])
    refuses(TypeError, "seed must be an integer", seed=1.5)
    refuses(ValueError, "inputs hold pixel_values_videos", inputs={**given, "pixel_values_videos": torch.ones(1)})
    refuses(ValueError, "inputs hold image_embeds", inputs={**given, "image_embeds": torch.ones(1)})
    pixels = given["pixel_values"]
    refuses(ValueError, "not the patches of images with grids", inputs={**given, "pixel_values": pixels[1:]})
    refuses(ValueError, "no layout of images that is known", inputs={"pixel_values": pixels})
    refuses(ValueError, "not made of patches of 3 x 4 x 4", inputs={**given, "pixel_values": pixels[:, 1:]})
    refuses(TypeError, "pixel_values must be float32", inputs={**given, "pixel_values": pixels.long()})
    refuses(ValueError, "inputs hold image_grid_thw, and no pixels", inputs={**given, "pixel_values": None})
    refuses(
        ValueError, r"assigned to rows of \[3, 0\] images", "swap", {**given, "num_images": [3, 0], "input_ids": None}
    )
    refuses(ValueError, "response_mask must have", "none", response_mask=torch.ones(2, 99, dtype=torch.bool))
    without = {name: given[name] for name in ("pixel_values", "image_grid_thw")}
    refuses(ValueError, "pass num_images", "swap", without)
    refuses(TypeError, "input_ids must be", "none", without)

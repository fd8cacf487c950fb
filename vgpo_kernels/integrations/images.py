"""Reads the images of a vision-language model's inputs as pictures ``[frames, C, H, W]``, and writes them back.

Processors of transformers hand over images in many layouts: whole, in tiles, padded, or cut into patches in an order of
the model's own. Each is read by what stands beside ``pixel_values`` (``image_grid_thw``, ``spatial_shapes``, ...) and
by the model's config. A layout that is not known raises an error: no image passes as something that it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.model_surface import unwrap, visual_mask

# The tensors that hold pixels. DeepSeek-VL's hybrid reads each image at two sizes.
PIXELS = ("pixel_values", "image_pixel_values", "high_res_pixel_values")
GRIDS = "image_grid_thw"
# What else an image needs, by layout.
BESIDE_PIXELS = (
    "image_attention_mask",
    "image_grid_hw",
    GRIDS,
    "image_grids",
    "image_merge_sizes",
    "image_num_crops",
    "image_position_ids",
    "image_sizes",
    "image_token_pooling",
    "pixel_attention_mask",
    "pixel_mask",
    "spatial_shapes",
    "target_sizes",
)
IMAGES_PER_ROW = ("num_images", "num_tiles")

# Patches cut from a picture: y and x count blocks of patches and b and a patches in a block; h and w are the pixels of
# a patch, c its channels and t its frames.
PICTURE = "tcybhxaw"
# Models whose processor cuts patches in another order than Qwen's, which merges neighbours: blocks, then the patches of
# a block, then "cthw".
ROW_BY_ROW = {
    "hunyuan_vl": "cthw",
    "hy_v4_vl": "cthw",
    "inkling2": "thwc",
    "inkling2_loop": "thwc",
    "kimi_k25": "cthw",
    "muse_glimmer": "tchw",
    "muse_spark": "tchw",
    "nemotron_h_omni": "cthw",
    "paddleocr_vl": "cthw",
}
IN_BLOCKS = {"cosmos3_edge": "hwct"}
# Models whose pixels lie between 0 and 1, where others' are normalised, so that grey is 0.
UNNORMALISED = ("gemma4", "gemma4_unified")
DEFAULT_PATCH = 14  # pixels; of towers that have no patches (convolutions, codebooks)
CHANNELS = 3


class Images(NamedTuple):
    """The images of a batch.

    Attributes:
        name: The input that holds their pixels.
        pictures: ``[frames, C, H, W]`` each, in the order in which they come: an image, or a tile of one; without
            padding. Frames are copies in time of one picture.
        entries: Number of pictures in each entry of the layout, which are images, tiles or rows; 0 for padding.
        sizes: Weight of each entry: how its share of visual tokens compares with those of others.
        by_row: Whether an entry holds all images of a row; ``None`` where the layout does not tell.
        patch: Side of the model's patches, in pixels.
        grey: The mean colour.
        write: Makes the input of pictures of the same shapes.

    """

    name: str
    pictures: list[Tensor]
    entries: list[int]
    sizes: list[int]
    by_row: bool | None
    patch: int
    grey: float
    write: Callable[[Sequence[Tensor]], Tensor]


def images_given(inputs: Mapping[str, Any]) -> list[str]:
    """Return the inputs that hold pixels; none where no image is in them.

    Raises:
        ValueError: There are videos, or images in inputs that are not known.

    """
    given = [name for name, value in inputs.items() if value is not None]
    seen = [name for name in given if any(part in name for part in ("pixel", "image", "video", "mm_encoder"))]
    unknown = [name for name in seen if name not in (*PIXELS, *BESIDE_PIXELS) and "num_" not in name]
    if unknown:
        raise ValueError(f"inputs hold {', '.join(unknown)}: only images are spoilt, given as {' or '.join(PIXELS)}")
    found = [name for name in PIXELS if name in given]
    beside = [name for name in BESIDE_PIXELS if name in given]
    if not found and beside:
        raise ValueError(f"inputs hold {', '.join(beside)}, and no pixels")
    return [name for name in found if checks.require_floating(name, inputs[name]).numel()]


def read_images(inputs: Mapping[str, Any], model: Any) -> list[Images]:
    """Return the images of a model's inputs, once for each input that holds pixels; none where no image is in them.

    Args:
        inputs: Keyword arguments of a forward pass; ``None`` counts as missing.
        model: The model, or its config.

    Raises:
        TypeError: An input of pixels is no floating tensor.
        ValueError: As :func:`images_given`, or the images are in a layout that is not known.

    """
    given = {name: value for name, value in inputs.items() if value is not None}
    read = [_read(name, given[name], given, config_of(model)) for name in images_given(inputs)]
    return [images for images in read if images.pictures]


def config_of(model: Any) -> Any:
    """Return the config of a model, wrapped or not, or of what is one."""
    return getattr(unwrap(model), "config", None) if isinstance(model, nn.Module) else model


def _read(name: str, pixels: Tensor, given: Mapping[str, Any], config: Any) -> Images:
    kind = getattr(config, "model_type", type(config).__name__)
    grid = given.get(GRIDS, given.get("image_grid_hw"))
    patch = patch_size(config)
    read: Images | None = None
    if grid is not None:
        read = _grids(name, pixels, grid, given.get("image_merge_sizes"), config, patch)
    elif "image_position_ids" in given and pixels.dim() == 3:
        read = _placed_patches(name, pixels, given["image_position_ids"])
    elif "spatial_shapes" in given and pixels.dim() == 3:
        read = _padded_patches(name, pixels, given["spatial_shapes"])
    elif "target_sizes" in given and pixels.dim() == 4:
        read = _strips(name, pixels, given["target_sizes"])
    elif "image_token_pooling" in given and pixels.dim() == 3:
        read = _square_crops(name, pixels)
    elif pixels.dim() in (4, 5) and pixels.shape[-3] in (1, CHANNELS):
        mask = next(
            (given[n] for n in ("pixel_attention_mask", "pixel_mask", "image_attention_mask") if n in given), None
        )
        read = _whole(name, pixels, mask, given.get("image_sizes"), patch or DEFAULT_PATCH)
    if read is None:
        beside = ", ".join(n for n in BESIDE_PIXELS if n in given) or "nothing"
        raise ValueError(
            f"{name} {checks.describe(pixels)} of {kind}, with {beside} beside it, is no layout of images that is known"
        )
    return read._replace(grey=0.5) if kind in UNNORMALISED else read


def patch_size(config: Any) -> int | None:
    """Return the side of the vision tower's patches in pixels, if its config tells one."""
    for place in (getattr(config, "vision_config", None), config):
        size = getattr(place, "patch_size", None)
        size = size[0] if isinstance(size, (list, tuple)) and size else size
        if isinstance(size, int):
            return size
    return None


def _cut(picture: Tensor, sizes: Mapping[str, int], order: str) -> Tensor:
    """Cut a picture ``[t, c, H, W]`` into patches whose dimensions come in this order."""
    return picture.reshape([sizes[axis] for axis in PICTURE]).permute([PICTURE.index(axis) for axis in order])


def _joined(patches: Tensor, sizes: Mapping[str, int], order: str) -> Tensor:
    """Undo :func:`_cut`."""
    parts = patches.reshape([sizes[axis] for axis in order]).permute([order.index(axis) for axis in PICTURE])
    height, width = (sizes[y] * sizes[b] * sizes[h] for y, b, h in ("ybh", "xaw"))
    return parts.reshape(sizes["t"], sizes["c"], height, width)


def _patched(patch: int, rows: int, columns: int, frames: int = 1, merged: int = 1) -> dict[str, int]:
    blocks = {"y": rows // merged, "x": columns // merged, "b": merged, "a": merged}
    return {**blocks, "h": patch, "w": patch, "c": CHANNELS, "t": frames}


def _grids(name: str, pixels: Tensor, grid: Tensor, merges: Tensor | None, config: Any, patch: int | None) -> Images:
    """Patches of all images, one after another, and the grid of each (Qwen2-VL and its successors)."""
    kind = getattr(config, "model_type", type(config).__name__)
    grids = [[1, *size][-3:] for size in grid.tolist()]
    counts = [frames * height * width for frames, height, width in grids]
    if sum(counts) != pixels.shape[0] or any(frames != 1 for frames, _, _ in grids):
        raise ValueError(f"{name} {checks.describe(pixels)} is not the patches of images with grids {grids}")
    merged = [1] * len(grids)
    if kind not in ROW_BY_ROW:
        told = next(
            (
                value
                for place in (getattr(config, "vision_config", None), config)
                for value in (getattr(place, "spatial_merge_size", None), getattr(place, "merge_size", None))
                if isinstance(value, int)
            ),
            None,
        )
        if merges is None and told is None:
            raise ValueError(
                f"the config of {kind} has no vision_config.spatial_merge_size: the order of its patches is not known"
            )
        merged = [told] * len(grids) if merges is None else merges.tolist()  # type: ignore[list-item]
    order = "yxba" + ROW_BY_ROW.get(kind, IN_BLOCKS.get(kind, "cthw"))
    if pixels.dim() == 4:
        patch = pixels.shape[-1] if order.endswith("hw") else pixels.shape[-2]
    numbers = pixels[0].numel()
    if patch is None or pixels.dim() not in (2, 4) or numbers % (CHANNELS * patch * patch):
        raise ValueError(
            f"{name} {checks.describe(pixels)} is not made of patches of {CHANNELS} x {patch} x {patch} numbers"
        )
    frames = numbers // (CHANNELS * patch * patch)
    sizes = [
        _patched(patch, rows, columns, frames, block) for (_, rows, columns), block in zip(grids, merged, strict=True)
    ]
    pictures = [_joined(part, size, order) for part, size in zip(torch.split(pixels, counts), sizes, strict=True)]

    def write(changed: Sequence[Tensor]) -> Tensor:
        parts = [_cut(picture, size, order) for picture, size in zip(changed, sizes, strict=True)]
        return torch.cat([part.reshape(-1, *pixels.shape[1:]) for part in parts])

    return Images(name, pictures, [1] * len(grids), counts, False, patch, 0.0, write)


def _padded_patches(name: str, pixels: Tensor, shapes: Tensor) -> Images:
    """Patches of each image or tile, padded to the most (LFM2-VL)."""
    patch = _side(name, pixels)
    sizes = [_patched(patch, rows, columns) for rows, columns in shapes.tolist()]
    counts = [size["y"] * size["x"] for size in sizes]
    if len(sizes) != pixels.shape[0] or max(counts) > pixels.shape[1]:
        raise ValueError(f"{name} {checks.describe(pixels)} is not the patches of images with shapes {shapes.tolist()}")
    order = "yxbahwct"
    pictures = [_joined(pixels[index, :count], sizes[index], order) for index, count in enumerate(counts)]

    def write(changed: Sequence[Tensor]) -> Tensor:
        result = pixels.clone()
        for index, (picture, count) in enumerate(zip(changed, counts, strict=True)):
            result[index, :count] = _cut(picture, sizes[index], order).reshape(count, -1)
        return result

    return Images(name, pictures, [1] * len(sizes), counts, False, patch, 0.0, write)


def _placed_patches(name: str, pixels: Tensor, places: Tensor) -> Images:
    """Patches of each image, padded to the most, and the column and row of each; -1 for padding (Gemma 4)."""
    patch = _side(name, pixels)
    real = (places >= 0).all(-1)
    counts = real.sum(1).tolist()
    extents = (places.amax(1) + 1).tolist()
    if any(columns * rows != count for (columns, rows), count in zip(extents, counts, strict=True)):
        raise ValueError(f"{name} {checks.describe(pixels)}: its image_position_ids leave gaps in the images")
    order = "yxbahwct"
    sizes = [_patched(patch, rows, columns) for columns, rows in extents]
    # Where in its image's patches, taken row by row, each patch belongs.
    spots = [
        places[index, real[index], 1] * extent[0] + places[index, real[index], 0]
        for index, extent in enumerate(extents)
    ]
    pictures = []
    for index, spot in enumerate(spots):
        patches = torch.empty_like(pixels[index, : counts[index]])
        patches[spot] = pixels[index, real[index]]
        pictures.append(_joined(patches, sizes[index], order))

    def write(changed: Sequence[Tensor]) -> Tensor:
        result = pixels.clone()
        for index, picture in enumerate(changed):
            result[index, real[index]] = _cut(picture, sizes[index], order).reshape(counts[index], -1)[spots[index]]
        return result

    return Images(name, pictures, [1] * len(sizes), counts, False, patch, 0.0, write)


def _strips(name: str, pixels: Tensor, targets: Tensor) -> Images:
    """One strip ``[1, C, patch, patches * patch]`` of all images' patches (MiniCPM-V)."""
    patch = pixels.shape[2]
    sizes = [_patched(patch, rows, columns) for rows, columns in targets.tolist()]
    lengths = [size["y"] * size["x"] * patch for size in sizes]
    if pixels.shape[0] != 1 or pixels.shape[1] != CHANNELS or sum(lengths) != pixels.shape[3]:
        raise ValueError(f"{name} {checks.describe(pixels)} is not the patches of images with sizes {targets.tolist()}")
    order = "tchyxbaw"
    pictures = [
        _joined(part, size, order) for part, size in zip(torch.split(pixels, lengths, dim=3), sizes, strict=True)
    ]

    def write(changed: Sequence[Tensor]) -> Tensor:
        parts = [_cut(picture, size, order) for picture, size in zip(changed, sizes, strict=True)]
        return torch.cat([part.reshape(1, CHANNELS, patch, -1) for part in parts], dim=3)

    return Images(name, pictures, [1] * len(sizes), lengths, False, patch, 0.0, write)


def _square_crops(name: str, pixels: Tensor) -> Images:
    """Patches of square crops ``[crops, patches, features]`` (Molmo 2)."""
    patch, side = _side(name, pixels), round(pixels.shape[1] ** 0.5)
    if side * side != pixels.shape[1]:
        raise ValueError(f"{name} {checks.describe(pixels)} is not the patches of square crops")
    size, order = _patched(patch, side, side), "yxbahwct"
    pictures = [_joined(crop, size, order) for crop in pixels]

    def write(changed: Sequence[Tensor]) -> Tensor:
        return torch.stack([_cut(picture, size, order).reshape(pixels.shape[1:]) for picture in changed])

    return Images(name, pictures, [1] * len(pictures), [1] * len(pictures), False, patch, 0.0, write)


def _side(name: str, pixels: Tensor) -> int:
    side: int = round((pixels.shape[-1] / CHANNELS) ** 0.5)
    if side * side * CHANNELS != pixels.shape[-1]:
        raise ValueError(f"{name} {checks.describe(pixels)} is not made of square patches of {CHANNELS} channels")
    return side


def _whole(name: str, pixels: Tensor, mask: Tensor | None, extents: Any, patch: int) -> Images:
    """Images ``[n, C, H, W]``, or tiles ``[n, k, C, H, W]`` in which those that are all zero are padding."""
    height, width = pixels.shape[-2:]
    tiled = pixels.dim() == 5
    slots = pixels.flatten(0, -4) if tiled else pixels
    regions = [(height, width)] * len(slots)
    if mask is not None and mask.dim() == pixels.dim() - 1:
        shown = mask.reshape(-1, *mask.shape[-2:]).bool()
        scale = (height // shown.shape[-2], width // shown.shape[-1])
        if len(shown) != len(slots) or 0 in scale:
            raise ValueError(f"a mask {checks.describe(mask)} does not fit {name} {checks.describe(pixels)}")
        counts = torch.stack([shown.any(2).sum(1), shown.any(1).sum(1)], dim=1).tolist()
        regions = [(min(rows * scale[0], height), min(columns * scale[1], width)) for rows, columns in counts]
    elif not tiled and extents is not None:
        # Pixtral's batches are padded to the largest image. (Others keep the sizes that images once had.)
        told = torch.as_tensor(extents).tolist()
        if len(told) == len(slots) and all(h <= height and w <= width for h, w in told):
            regions = [(h, w) for h, w in told]
    kept = (slots != 0).flatten(1).any(1).tolist() if tiled else [True] * len(slots)
    chosen = [index for index, (real, region) in enumerate(zip(kept, regions, strict=True)) if real and min(region) > 0]
    pictures = [slots[index, :, : regions[index][0], : regions[index][1]][None] for index in chosen]

    def write(changed: Sequence[Tensor]) -> Tensor:
        result = slots.clone()
        for index, picture in zip(chosen, changed, strict=True):
            result[index, :, : picture.shape[-2], : picture.shape[-1]] = picture[0]
        return result.view_as(pixels)

    per_entry = pixels.shape[1] if tiled else 1
    entries = [sum(first <= index < first + per_entry for index in chosen) for first in range(0, len(slots), per_entry)]
    # Tiles of an image stand beside its size; images of a row do not, and a model that takes those that are all zero
    # for padding (Idefics) needs a grey that is not: the level of eight bits beside it.
    of_images = not tiled or extents is not None
    by_row = False if of_images else True if mask is not None else None
    sizes = [max(count, 1) for count in entries]
    return Images(name, pictures, entries, sizes, by_row, patch, 0.0 if of_images else 1 / 255, write)


def pictures_by_entry(images: Images) -> list[list[int]]:
    """Return the numbers of each entry's pictures."""
    begins = [sum(images.entries[:entry]) for entry in range(len(images.entries))]
    return [list(range(begin, begin + count)) for begin, count in zip(begins, images.entries, strict=True)]


def pictures_by_row(
    images: Images, inputs: Mapping[str, Any], model: Any, response_mask: Tensor | None
) -> list[list[int]]:
    """Return the numbers of the pictures that each row shows; none for rows without images.

    Args:
        images: Those of the inputs.
        inputs: Keyword arguments of a forward pass; ``num_images`` or ``num_tiles`` tell, or else ``input_ids``.
        model: The model, or its config.
        response_mask: True at tokens that the policy sampled, which stand for no image.

    Raises:
        ValueError: The inputs do not tell.

    """
    entries, counts = iter(pictures_by_entry(images)), _entries_by_row(images, inputs, model, response_mask)
    return [[number for _ in range(count) for number in next(entries)] for count in counts]


def _entries_by_row(images: Images, inputs: Mapping[str, Any], model: Any, response_mask: Tensor | None) -> list[int]:
    entries = len(images.entries)
    told = [[int(count) for count in inputs[name]] for name in IMAGES_PER_ROW if inputs.get(name) is not None]
    ids = inputs.get("input_ids")
    visual = None
    if isinstance(ids, Tensor) and ids.dim() == 2:
        visual = visual_mask(ids, model, response_mask).sum(1).tolist()
    batch = len(told[0]) if told else len(visual) if visual is not None else None
    if images.by_row and entries == batch:
        return [1] * entries
    for counts in told:
        if sum(counts) == entries:
            return counts
    if images.by_row is None and entries == batch:
        return [1] * entries
    if visual is not None:
        shown = [int(tokens > 0) for tokens in visual]
        split = shown if sum(shown) == entries else _split_by_tokens(images.sizes, visual)
        if split is not None:
            return split
    raise ValueError(
        f"the {entries} entries of {images.name} cannot be assigned to rows"
        + (f" of {told[0]} images" if told else ": pass num_images, the number of images of each row")
    )


def _split_by_tokens(sizes: Sequence[int], tokens: Sequence[int]) -> list[int] | None:
    """Number of entries of each row, where rows' visual tokens are in proportion to the entries' sizes."""
    total, number, begin, counts = sum(sizes), sum(tokens), 0, []
    for wanted in tokens:
        count = size = 0
        while size * number < wanted * total and begin + count < len(sizes):
            size += sizes[begin + count]
            count += 1
        if size * number != wanted * total:
            return None
        counts.append(count)
        begin += count
    return counts if begin == len(sizes) else None

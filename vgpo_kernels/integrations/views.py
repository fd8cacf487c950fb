"""Second views: a model's inputs with other images, to measure how much each token needs what it sees.

PAPO, VPPO and others compare the log-probabilities of a response given its image with those given a spoilt one::

    spoilt = spoilt_view(inputs, "mask", model, seed=step)
    other = model(**spoilt).logits
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.integrations.images import (
    BESIDE_PIXELS,
    GRIDS,
    IMAGES_PER_ROW,
    PIXELS,
    Images,
    images_given,
    pictures_by_entry,
    pictures_by_row,
    read_images,
)
from vgpo_kernels.integrations.surface import group_numbers
from vgpo_kernels.model_surface import unwrap, visual_mask

Kind = Literal["mask", "noise", "pixelation", "blank", "swap", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The kinds of some strength: what it is unless given; that of pixelation is two of the model's patches.
STRENGTHS: dict[str, float | None] = {"mask": 0.6, "noise": 0.8, "pixelation": None}


class NoOtherImageError(ValueError):
    """There is a single image in a batch, and so none to swap it for."""


def spoilt_view(
    inputs: Mapping[str, Any],
    kind: Kind,
    model: Any,
    *,
    strength: float | None = None,
    seed: int = 0,
    response_mask: Tensor | None = None,
    groups: Any = None,
    sources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a model's inputs with spoilt images; whatever holds no image is the same object as before.

    The sequences keep their length, so the last T positions are the same response tokens. Rows without images stay as
    they are, and so does padding in place of images.

    Args:
        inputs: Keyword arguments of a forward pass as the model's processor makes them, or a batch of TRL's, which
            says by ``num_images`` (a list or a tensor) how many images each row has. ``input_ids`` ``[B, S]`` are
            needed where ``num_images`` is missing and for ``"none"``. Values that are ``None`` count as missing.
        kind: What becomes of every image:

            - ``"mask"``: patches of the model's patch size become grey; ``strength`` is their share (0.6, as in PAPO).
            - ``"noise"``: a mixture with Gaussian noise, ``sqrt(1 - strength) x + sqrt(strength) noise``; ``strength``
              is the noise's share of the variance (0.8).
            - ``"pixelation"``: blocks of ``strength`` by ``strength`` pixels become their averages (two patches' side).
            - ``"blank"``: all of it becomes grey, the mean colour that the processor subtracts.
            - ``"swap"``: the images of another row, resampled to this row's sizes where they differ. Rows that share
              an image, or a group, do not get each other's.
            - ``"none"``: no image at all. ``pixel_values`` and its sizes are left out, so that no vision tower runs
              (BLIP's, which asks for them, keeps them), and ``attention_mask`` is 0 at visual tokens, as at padding: no
              token sees them. Models that count positions by grids (Qwen's and their like) count without them; in
              others they keep their places. Tokens that mark an image's begin and end stay.
              :func:`blind_attention` hides images and leaves all positions as they are.

        model: The model, wrapped or not, or its config: tells patch size, order of patches and visual tokens.
        strength: See ``kind``; the number in brackets is the default. Not for blank, swap and none.
        seed: Of the masked patches, the noise and the swap: the same seed gives the same view on the same device.
        response_mask: True at tokens that the policy sampled, as in :func:`visual_mask`: ``[B, T]`` for the last T
            positions. One that it sampled itself stands for no image, and ``"none"`` does not hide it.
        groups: For ``"swap"``: names of the rows' prompts, B integers or strings. By default only equal images tell.
        sources: For ``"swap"``: other inputs for the same model. Their images, or rows of images where the layout keeps
            rows, are taken in place of those of other rows, drawn for each row.

    Returns:
        A new dict.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``kind`` or ``strength`` is out of range; the inputs hold videos, or images in a layout that is not
            known; or images cannot be assigned to rows.
        NoOtherImageError: ``"swap"`` finds a single image in the batch, or a single group; a ValueError.

    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, given in {"inputs": inputs, "sources": {} if sources is None else sources}.items():
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a mapping of a model's arguments, got {type(given).__name__}")
    seed, strength = checks.not_negative_integer("seed", seed), _strength(kind, strength)
    if kind != "swap" and (groups is not None or sources is not None):
        raise ValueError(f"groups and sources are of swap, got kind={kind!r}")
    if kind == "none":
        return _without_images(inputs, model, response_mask) if images_given(inputs) else dict(inputs)
    found = read_images(inputs, model)
    if not found:
        return dict(inputs)
    if kind == "swap":
        pictures = _swapped(found, inputs, model, response_mask, groups, sources, seed)
    else:
        pictures = _spoilt(found, kind, strength, seed)
    changed = {images.name: images.write(new) for images, new in zip(found, pictures, strict=True)}
    return {name: changed.get(name, value) for name, value in inputs.items()}


def _strength(kind: str, strength: float | None) -> float | None:
    if strength is None:
        return STRENGTHS.get(kind)
    if kind not in STRENGTHS:
        raise ValueError(f"{kind} has no strength, got strength={strength!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {type(strength).__name__}")
    if kind == "pixelation" and not (strength >= 2 and strength == int(strength)):
        raise ValueError(f"the strength of pixelation is a side in pixels, at least 2, got {strength}")
    if kind != "pixelation" and not 0 < strength <= 1:
        raise ValueError(f"the strength of {kind} is a share above 0 and at most 1, got {strength}")
    return strength


def _without_images(inputs: Mapping[str, Any], model: Any, response_mask: Tensor | None) -> dict[str, Any]:
    ids = checks.integers("input_ids", inputs.get("input_ids"))
    kept, visual = inputs.get("attention_mask"), visual_mask(ids, model, response_mask)
    if kept is None:
        kept = torch.ones_like(ids)
    checks.mask("attention_mask", kept, ids.shape, "input_ids'", ids.device, "input_ids")
    forward = inspect.signature(unwrap(model).forward).parameters if isinstance(model, nn.Module) else {}
    needed = [name for name, one in forward.items() if one.default is one.empty]  # without them BLIP does not run
    dropped = {*PIXELS, *BESIDE_PIXELS, *IMAGES_PER_ROW} - set(needed)
    rest = {name: value for name, value in inputs.items() if name not in dropped}
    if inputs.get(GRIDS) is not None:
        rest[GRIDS] = inputs[GRIDS][:0]  # so that Qwen's models count positions as before, of no images
    return {**rest, "attention_mask": kept.masked_fill(visual, 0)}


def _spoilt(found: Sequence[Images], kind: str, strength: float | None, seed: int) -> list[list[Tensor]]:
    result = []
    for images in found:
        generator = torch.Generator(found[0].pictures[0].device).manual_seed(seed)
        # Where a model reads each image at two sizes, the same parts of both are spoilt.
        pairs = zip(images.pictures, found[0].pictures, strict=True)
        patch = found[0].patch
        if kind == "mask":
            assert strength is not None
            result.append([_masked(one, first, patch, strength, images.grey, generator) for one, first in pairs])
        elif kind == "noise":
            assert strength is not None
            result.append([_noisy(one, strength, generator) for one, _ in pairs])
        elif kind == "pixelation":
            side = int(strength or 2 * patch)
            result.append([_pixelated(one, max(side * one.shape[-1] // first.shape[-1], 2)) for one, first in pairs])
        else:
            result.append([torch.full_like(one, images.grey) for one in images.pictures])
    return result


def _masked(
    picture: Tensor, first: Tensor, patch: int, share: float, grey: float, generator: torch.Generator
) -> Tensor:
    """Make a share of the patches grey: those of ``first``, which shows the same at its own size."""
    rows, columns = (-(-side // patch) for side in first.shape[-2:])
    order = torch.randperm(rows * columns, generator=generator, device=picture.device)
    hidden = (order < round(share * rows * columns)).view(rows, columns)
    y, x = (
        torch.arange(side, device=picture.device) * before // side // patch
        for side, before in zip(picture.shape[-2:], first.shape[-2:], strict=True)
    )
    return picture.masked_fill(hidden[y][:, x], grey)


def _noisy(picture: Tensor, share: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(picture.shape[1:], generator=generator, device=picture.device)  # the same in every frame
    mixed: Tensor = picture.float() * (1 - share) ** 0.5 + noise * share**0.5
    return mixed.to(picture.dtype)


def _pixelated(picture: Tensor, side: int) -> Tensor:
    height, width = picture.shape[-2:]
    blocks = nn.functional.avg_pool2d(picture.float(), side, ceil_mode=True).to(picture.dtype)
    spread: Tensor = blocks.repeat_interleave(side, -2).repeat_interleave(side, -1)
    return spread[..., :height, :width]


def _swapped(
    found: Sequence[Images],
    inputs: Mapping[str, Any],
    model: Any,
    response_mask: Tensor | None,
    groups: Any,
    sources: Mapping[str, Any] | None,
    seed: int,
) -> list[list[Tensor]]:
    rows = pictures_by_row(found[0], inputs, model, response_mask)
    prints = [_fingerprint(picture) for picture in found[0].pictures]
    shown = [{prints[number] for number in row} for row in rows]
    draw = random.Random(seed)
    if sources is None:
        others, candidates = found, rows
        chosen = _another_row(shown, _group_names(groups, len(rows)), draw)
    else:
        others = read_images(sources, model)
        if [one.name for one in others] != [one.name for one in found]:
            raise ValueError(f"sources must hold images as inputs do, in {', '.join(one.name for one in found)}")
        candidates = [numbers for numbers in pictures_by_entry(others[0]) if numbers]
        known = [_fingerprint(picture) for picture in others[0].pictures]
        chosen = _from_elsewhere(shown, [{known[number] for number in numbers} for numbers in candidates], draw)
    result = []
    for images, other in zip(found, others, strict=True):
        pictures = list(images.pictures)
        for row, source in chosen.items():
            for place, number in enumerate(rows[row]):
                taken = candidates[source][place % len(candidates[source])]
                pictures[number] = _resampled(other.pictures[taken], images.pictures[number])
        result.append(pictures)
    return result


def _group_names(groups: Any, batch: int) -> list[int] | None:
    if groups is None:
        return None
    names: list[int] = group_numbers(groups, torch.device("cpu"), "groups").tolist()
    if len(names) != batch:
        raise ValueError(f"groups must name the {batch} rows of the batch, got {len(names)} names")
    return names


def _another_row(shown: Sequence[set[int]], groups: Sequence[int] | None, draw: random.Random) -> dict[int, int]:
    """Assign to each row that shows an image one that shows another.

    Rows in one group, or with an image in common, are taken together, and each gets a row of another set. With sets of
    one size every row is taken once.

    Raises:
        NoOtherImageError: There is one set only.

    """
    sets: list[tuple[set[Any], list[int]]] = []
    for row, images in enumerate(shown):
        if not images:
            continue
        keys: set[Any] = set(images) if groups is None else {*images, ("group", groups[row])}
        members = [row]
        for other in [one for one in sets if one[0] & keys]:
            sets.remove(other)
            keys, members = keys | other[0], [*other[1], *members]
        sets.append((keys, members))
    if len(sets) == 1:
        raise NoOtherImageError(
            f"all {len(sets[0][1])} rows with images show the same one, or share a group, so that swap finds no other "
            "image: pass a batch with several, or sources="
        )
    parts = [members for _, members in sets]
    draw.shuffle(parts)
    for part in parts:
        draw.shuffle(part)
    order = [row for part in parts for row in part]
    part_of = {row: number for number, part in enumerate(parts) for row in part}
    step = max(len(part) for part in parts)  # beyond the own set, unless that is more than half of all
    chosen = {}
    for place, row in enumerate(order):
        source = order[(place + step) % len(order)]
        if part_of[source] == part_of[row]:
            source = draw.choice([other for other in order if part_of[other] != part_of[row]])
        chosen[row] = source
    return chosen


def _from_elsewhere(shown: Sequence[set[int]], offered: Sequence[set[int]], draw: random.Random) -> dict[int, int]:
    chosen = {}
    for row, images in enumerate(shown):
        if not images:
            continue
        possible = [number for number, others in enumerate(offered) if not others & images]
        if not possible:
            raise ValueError(f"sources hold no other image than those of row {row}")
        chosen[row] = draw.choice(possible)
    return chosen


def _resampled(picture: Tensor, like: Tensor) -> Tensor:
    picture = picture.to(like)
    if picture.shape == like.shape:
        return picture
    resized = nn.functional.interpolate(picture.float(), like.shape[-2:], mode="bilinear", antialias=True)
    return resized.to(like.dtype)


def _fingerprint(picture: Tensor) -> int:
    """Return a number that equal pictures share and others do not: exact arithmetic, whatever the order of sums."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[picture.element_size()]
    bits = picture.contiguous().view(width).flatten().long()
    place = torch.arange(bits.numel(), device=bits.device)
    mixed = (bits + place * -7046029254386353131) * 6364136223846793005
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return hash((tuple(picture.shape), int((mixed ^ (mixed >> 32)).sum())))

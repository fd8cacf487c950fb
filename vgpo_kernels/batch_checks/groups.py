"""Checks of group ids: against the prompts of the responses, and against their advantages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vgpo_kernels.batch_checks.batch import Batch
from vgpo_kernels.batch_checks.findings import Finding
from vgpo_kernels.ops.visual_focus import visual_prototype

MOST_RESPONSES = 512  # that are compared with each other
# How far two prototypes of one image may be apart, as a share of their norm: those of a batch are computed alike.
SAME_IMAGE = {torch.float64: 1e-3, torch.float32: 1e-3}
SAME_IMAGE_HALF = 1e-2
OTHER_IMAGE = 5  # times that; between the two is rounding, or an image that looks much alike

_HOW_TO = (
    "responses to one prompt share an id: repeat_interleave(n) where they are next to each other, repeat(n) where "
    "prompts alternate"
)


def check_groups(batch: Batch) -> Iterator[Finding]:
    """Find group ids that do not fit prompts, images or advantages, and rewards in the place of advantages."""
    if batch.groups is None or batch.size < 2:
        return
    if _are_rewards(batch):
        yield Finding(
            "rewards",
            "no advantage is negative, though they differ within groups; are they rewards? What a loss takes is less "
            "the mean of its group: rewards - rewards.mean(1, keepdim=True), of rewards [prompts, n]",
        )
    groups = batch.groups[:MOST_RESPONSES]
    same_text, apart = _same_texts(batch), _images_apart(batch)
    if same_text is None and apart is None:
        yield from _advantages(batch)
        return
    known = batch.any_of(batch.prompt)[:MOST_RESPONSES]
    known = known[:, None] & known
    texts = known if same_text is None else known & same_text
    twins = texts if apart is None else texts & (apart <= 1)
    others = known & ~texts if apart is None else known & (apart > OTHER_IMAGE)
    together = groups[:, None] == groups
    one = bool(together.all())
    # Images of one group may differ, augmented by response or by dropout: they are of another prompt where that one is
    # in another group, or where there are more than an image and its augmentation.
    elsewhere = (together & (twins & ~together).any(1)).any(1)
    kinds = together.float() @ (twins & together).sum(1).clamp(min=1).float().reciprocal()
    wrong = _mixed(together, texts, known & ~texts) | (_mixed(together, twins, others) & (elsewhere | (kinds > 2.5)))
    has_twin = twins.sum(0) > 1
    # One image has many questions, and one question many images.
    no_image = batch.visual is not None and not bool(batch.visual.any())
    complete = same_text is not None and (apart is not None or no_image)
    if bool(wrong.any()):
        number = "all" if one else f"{int(wrong.sum())} of {len(groups)}"
        yield Finding(
            "group-ids",
            f"group_ids put responses to different prompts or images into one group ({number} of them); {_HOW_TO}",
        )
    elif one and bool(known.all()) and not bool((texts.sum(0) > 1).any()):
        yield Finding("group-ids", f"group_ids are all equal, but no two responses have the same prompt; {_HOW_TO}")
    # A few rows of a data set may be equal.
    elif complete and int(together.sum()) == len(groups) and int(has_twin.sum()) >= max(len(groups) / 2, 3):
        yield Finding(
            "group-ids",
            f"group_ids are all different, but {int(has_twin.sum())} of {len(groups)} responses have the prompt of "
            f"another one, so no response is compared with any; {_HOW_TO}",
        )
    else:
        yield from _advantages(batch)


def _mixed(together: Tensor, twins: Tensor, others: Tensor) -> Tensor:
    """Whether a response's group holds another prompt, though every member that is known has a twin, bool ``[b]``.

    A group whose members have no twin at all may be of one prompt that was written or shown differently.
    """
    mates = together & twins.diagonal()[:, None] & twins.diagonal()
    return (mates & others).any(1) & ((twins.sum(0) > 1) | ~mates).all(1)


def _same_texts(batch: Batch) -> Tensor | None:
    """Say which responses have prompts of the same tokens, bool ``[b, b]``; ``None`` where tokens are not known.

    Prompts end alike where padding is before them, and begin with one token over and over: of two, the end of the
    longer is compared with the shorter, without what both begin with.
    """
    if batch.ids is None or not batch.has_prompts or not _ends_alike(batch, batch.ids):
        return None
    ids = batch.ids
    end = batch.last(batch.prompt) + 1
    inside = batch.prompt
    if batch.prompt_mask is None:
        inside = inside & (ids != ids[batch.begin.clamp(max=len(ids) - 1)][batch.sequence])
    length = (end - batch.first(inside)).clamp(min=0)
    # A product with odd numbers that look random, modulo 2^64.
    place = end[batch.sequence] - torch.arange(len(ids), device=ids.device)
    mixed = (place * -7046029254386353131) ^ ((ids + 1) * -4417276706812531889)
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    sums = nn.functional.pad((mixed ^ (mixed >> 32)).cumsum(0), (1, 0))
    end, length = end[:MOST_RESPONSES], length[:MOST_RESPONSES]
    keys = sums[end, None] - sums[end[:, None] - torch.minimum(length[:, None], length)]
    return keys == keys.T


def _ends_alike(batch: Batch, ids: Tensor) -> bool:
    """Whether a chat template ends all prompts; else the mask may leave out what responses begin with."""
    if batch.prompt_mask is not None:
        return True
    first = batch.first(batch.scored)[batch.any_of(batch.scored)]
    ends = torch.stack([ids[(first - back).clamp(min=0)] for back in (1, 2)])
    return bool((ends == ends[:, :1]).all())


def _images_apart(batch: Batch) -> Tensor | None:
    """Return how far the images of prompts are apart, ``[b, b]``, in what images of one prompt may be at most.

    ``None`` where they are not known.
    """
    if batch.hidden is None or batch.visual is None:
        return None
    hidden, shown = batch.hidden, batch.visual & batch.prompt
    kept = batch.begin[:MOST_RESPONSES]
    end = int(batch.begin[len(kept)]) if batch.size > len(kept) else len(shown)
    if not bool(shown[:end].any()):
        return None
    boundaries = torch.cat([kept, kept.new_tensor([end])])
    means = visual_prototype(hidden[:end], shown[:end], cu_seqlens=boundaries)
    norms = means.norm(dim=1)
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    allowed = SAME_IMAGE.get(hidden.dtype, SAME_IMAGE_HALF) * torch.maximum(norms[:, None], norms)
    return torch.where(apart > 0, apart / allowed, 0.0)


def _are_rewards(batch: Batch) -> bool:
    """Whether advantages are never below 0, and differ in two groups: of fewer that may be chance, or a cut group."""
    assert batch.groups is not None
    values = _per_response(batch)
    if values is None or not bool((values.isfinite() & (values >= 0)).all()):
        return False
    numbers = torch.unique(batch.groups, return_inverse=True)[1]
    largest, least = (
        values.new_zeros(len(values)).scatter_reduce(0, numbers, values, how, include_self=False)
        for how in ("amax", "amin")
    )
    return len(values) >= 8 and len(torch.unique(numbers[(largest > least)[numbers]])) >= 2


def _advantages(batch: Batch) -> Iterator[Finding]:
    """Find advantages that sum to zero over blocks of responses in a row, but not over the groups."""
    assert batch.groups is not None
    values = _per_response(batch)
    if values is None or not bool(values.isfinite().all()):
        return
    numbers, sizes = torch.unique(batch.groups, return_inverse=True, return_counts=True)[1:]
    size, number = int(sizes[0]), len(sizes)
    if number < 2 or size < 2 or bool((sizes != size).any()):
        return
    scale = 1e-3 * size * float(values.abs().mean())
    uneven = _largest_sum(values, numbers, number)
    if uneven <= 50 * scale:
        return
    order = torch.arange(batch.size, device=values.device)
    orders = {f"every {size} responses in a row": order // size, f"responses {number} apart": order % number}
    for told, blocks in orders.items():
        members = values[blocks.argsort(stable=True)].view(number, size).sort(1).values
        if _largest_sum(values, blocks, number) < scale and _tells_order(members, scale):
            yield Finding(
                "group-ids",
                f"advantages sum to zero over {told}, as GRPO's do over a group, but not over group_ids (up to "
                f"{uneven:.2g}); one of the two is in another order: {_HOW_TO}",
            )
            return


def _tells_order(blocks: Tensor, scale: float) -> bool:
    """Whether blocks ``[n, size]``, sorted, that sum to zero each do not by chance.

    Advantages that are whitened over the batch do where rewards have few values: then few blocks differ.
    """
    steps = (blocks / scale).round()
    varied = len(torch.unique(steps.abs())) == steps.numel()
    return len(torch.unique(steps, dim=0)) > 2 or (blocks.shape[1] > 2 and varied)


def _largest_sum(values: Tensor, groups: Tensor, number: int) -> float:
    return float(values.new_zeros(number).index_add(0, groups, values).abs().max())


def _per_response(batch: Batch) -> Tensor | None:
    """Return one advantage a response, ``[B]``; ``None`` where they are per token, or a response has none."""
    given = batch.advantages
    if given is None or given.shape == batch.begin.shape:
        return given
    first = batch.first(batch.scored)
    if bool((first == len(given)).any()):
        return None
    values = given[first]
    same = torch.where(batch.scored, given, values[batch.sequence]) == values[batch.sequence]
    return values if bool(same.all()) else None

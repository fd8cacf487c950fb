"""Checks of group ids: against the prompts of the responses, and against their advantages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vgpo_kernels.batch_checks.batch import Batch
from vgpo_kernels.batch_checks.findings import Finding
from vgpo_kernels.ops.visual_focus import visual_prototype

MOST_RESPONSES = 512  # that are compared with each other
# How far two prototypes of one image may be apart, as a share of their norm: those of a batch are computed alike.
SAME_IMAGE = {torch.float64: 1e-3, torch.float32: 1e-3}
SAME_IMAGE_HALF = 1e-2

_HOW_TO = (
    "responses to one prompt share an id: repeat_interleave(n) where they are next to each other, repeat(n) where "
    "prompts alternate"
)


def check_groups(batch: Batch) -> Iterator[Finding]:
    """Find group ids that do not fit prompts, images or advantages."""
    if batch.groups is None or batch.size < 2:
        return
    groups = batch.groups[:MOST_RESPONSES]
    twins, complete = _twins(batch)
    if twins is None:
        yield from _advantages(batch)
        return
    together = groups[:, None] == groups
    one = bool(together.all())
    known = twins.diagonal()
    has_twin = (twins.sum(0) > 1) & known
    # A group whose members are no twins of each other, though each of them has one: its prompts are mixed. (Images that
    # are augmented by response make a group whose members have none.)
    mates = together & known[:, None] & known
    wrong = (mates & ~twins).any(1) & (has_twin | ~mates).all(1)
    if bool(wrong.any()):
        number = "all" if one else f"{int(wrong.sum())} of {len(groups)}"
        yield Finding(
            "group-ids",
            f"group_ids put responses to different prompts or images into one group ({number} of them); {_HOW_TO}",
        )
    elif one and complete and bool(known.all()) and not bool(has_twin.any()):
        yield Finding("group-ids", f"group_ids are all equal, but no two responses have the same prompt; {_HOW_TO}")
    elif int(together.sum()) == len(groups) and 2 * int(has_twin.sum()) >= len(groups):
        yield Finding(
            "group-ids",
            f"group_ids are all different, but {int(has_twin.sum())} of {len(groups)} responses have the prompt of "
            f"another one, so no response is compared with any; {_HOW_TO}",
        )
    else:
        yield from _advantages(batch)


def _twins(batch: Batch) -> tuple[Tensor | None, bool]:
    """Say which responses have the same prompt, text and images, bool ``[b, b]``.

    Returns:
        The matrix, with False on its diagonal for a response of whose prompt nothing is known; ``None`` where neither
        tokens nor images are known. And whether tokens are.

    """
    known = batch.any_of(batch.prompt)[:MOST_RESPONSES]
    twins = known[:, None] & known
    complete = batch.ids is not None and batch.has_prompts
    if complete:
        assert batch.ids is not None
        keys = _keys(batch, batch.ids)[:MOST_RESPONSES]
        twins &= keys[:, None] == keys
    images = None if batch.hidden is None or batch.visual is None else _same_images(batch, batch.hidden, batch.visual)
    if images is None and not complete:
        return None, False
    return (twins if images is None else twins & images), complete


def _keys(batch: Batch, ids: Tensor) -> Tensor:
    """Return a number for the tokens of each prompt, int64 ``[B]``: equal for equal ones."""
    place = torch.arange(len(ids), device=ids.device) - batch.begin[batch.sequence]
    # A product with odd numbers that look random, modulo 2^64.
    mixed = ((place + 1) * -7046029254386353131) ^ ((ids + 1) * -4417276706812531889)
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    mixed = torch.where(batch.prompt, mixed ^ (mixed >> 32), 0)
    return torch.zeros_like(batch.begin).index_add(0, batch.sequence, mixed)


def _same_images(batch: Batch, hidden: Tensor, visual: Tensor) -> Tensor | None:
    """Say which prompts have images of the same hidden states, bool ``[b, b]``; ``None`` where there are no images."""
    shown = visual & batch.prompt
    kept = batch.begin[:MOST_RESPONSES]
    end = int(batch.begin[len(kept)]) if batch.size > len(kept) else len(visual)
    if not bool(shown[:end].any()):
        return None
    boundaries = torch.cat([kept, kept.new_tensor([end])])
    means = visual_prototype(hidden[:end], shown[:end], cu_seqlens=boundaries)
    norms = means.norm(dim=1)
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    allowed = SAME_IMAGE.get(hidden.dtype, SAME_IMAGE_HALF) * torch.maximum(norms[:, None], norms)
    return apart <= allowed


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
        # Advantages that are whitened over the batch may cancel in other blocks by chance: then all blocks are alike.
        members = values[blocks.argsort(stable=True)].view(number, size).sort(1).values
        if _largest_sum(values, blocks, number) < scale and not torch.allclose(members, members[:1]):
            yield Finding(
                "group-ids",
                f"advantages sum to zero over {told}, as GRPO's do over a group, but not over group_ids (up to "
                f"{uneven:.2g}); one of the two is in another order: {_HOW_TO}",
            )
            return


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

"""Checks of masks: their values, what they overlap, and whether there is an image at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.batch_checks.batch import Batch
from vgpo_kernels.batch_checks.findings import Finding


def check_values(masks: Mapping[str, object]) -> Iterator[Finding]:
    """Find integer masks that hold more than 0 and 1: whatever is not 0 counts as true."""
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype not in checks.INTEGER_DTYPES:
            continue
        others = mask[(mask != 0) & (mask != 1)]
        if len(others):
            yield Finding(
                "mask-values",
                f"{name} holds {int(others.min())} beside 0 and 1, at {len(others)} of {mask.numel()} positions, and "
                f"every value but 0 counts as true; make it bool of the values that you mean ({name} == 1)",
            )


def check_masks(batch: Batch, visual_tokens: tuple[int, ...]) -> Iterator[Finding]:
    """Find masks that are empty, overlap, are swapped or do not fit the tokens."""
    scored = batch.scored
    if not bool(scored.any()):
        yield Finding("no-response", "response_mask is false everywhere, so the loss is 0 and has no gradient")
        return
    if batch.is_whole:
        yield from _prompts(batch)
    if batch.visual is None:
        return
    visual = batch.visual
    if not bool(visual.any()):
        yield Finding(
            "no-image",
            "visual_mask is false everywhere: no response has an image, so all factors are 1; is the id of the image "
            "tokens right, and were the ids taken after the processor had put one for each patch?",
        )
    elif overlap := int((visual & scored).sum()):
        yield Finding(
            "mask-overlap",
            f"visual_mask and response_mask are both true at {overlap} positions; a token that the policy sampled is "
            "no image, and an image token is not scored: visual_mask(ids, model, response_mask) leaves such tokens out",
        )
    elif _all_later(batch, visual):
        yield Finding(
            "masks-swapped",
            "every token of visual_mask comes after every token of response_mask, in each sequence that has both; are "
            "the two swapped?",
        )
    if batch.ids is not None and batch.has_prompts and visual_tokens:
        yield from _visual_tokens(batch, visual, visual_tokens)


def _all_later(batch: Batch, visual: Tensor) -> bool:
    """Whether images come after responses, where there are both."""
    both = batch.any_of(visual) & batch.any_of(batch.scored)
    later = batch.first(visual) > batch.last(batch.scored)
    if not bool(both.any()) or not bool(later[both].all()):
        return False
    if batch.ids is None or not batch.has_prompts:
        return True
    # A tool may show an image after the last scored token; few ids stand for images, and many are in responses.
    return len(torch.unique(batch.ids[visual])) > len(torch.unique(batch.ids[batch.scored]))


def _prompts(batch: Batch) -> Iterator[Finding]:
    """Find prompts that response_mask scores."""
    scored = batch.scored
    begins = int(scored[batch.begin[batch.begin < len(scored)]].sum())
    if batch.prompt_mask is not None:
        both = int((batch.prompt_mask & scored).sum())
        if both:
            yield Finding("prompt-overlap", f"response_mask is true at {both} tokens of prompt_mask; score responses")
            return
    elif begins < batch.size and batch.ids is not None and batch.has_prompts and _nothing_before(batch, batch.ids):
        yield Finding(
            "prompt-overlap",
            "nothing but padding comes before the first token of response_mask in any sequence; does it cover the "
            "prompts? It must be true at the tokens that the policy sampled alone",
        )
        return
    if begins:
        yield Finding(
            "prompt-overlap",
            f"response_mask is true at the first position of {begins} sequences, which nothing predicts: it covers "
            "their prompts, or the sequences were cut without them",
        )


def _nothing_before(batch: Batch, ids: Tensor) -> bool:
    """Whether all that comes before responses is one token over and over, as padding is; once may be a prompt."""
    others = batch.prompt & (ids != ids[batch.begin.clamp(max=len(ids) - 1)][batch.sequence])
    if batch.visual is not None:
        others |= batch.prompt & batch.visual
    return bool((batch.count(batch.prompt) > 1).any()) and not bool(others.any())


def _visual_tokens(batch: Batch, visual: Tensor, visual_tokens: tuple[int, ...]) -> Iterator[Finding]:
    """Compare visual_mask with the tokens that stand for images in the model."""
    assert batch.ids is not None
    known = torch.zeros_like(visual)
    for token in visual_tokens:
        known |= batch.ids == token
    known &= ~batch.scored
    wrong, marked = int((visual & ~known & ~batch.scored).sum()), int(visual.sum())
    if wrong:
        yield Finding(
            "visual-mask",
            f"visual_mask is true at {wrong} of its {marked} positions where ids hold no visual token of the model "
            f"({', '.join(map(str, visual_tokens))}); is it shifted, or of other sequences? "
            "integrations.transformers.visual_mask(ids, model, response_mask) makes it",
        )
    missed = int((batch.any_of(known & batch.prompt) & ~batch.any_of(visual)).sum())
    if missed and marked:
        yield Finding(
            "visual-mask",
            f"visual_mask has no token of {missed} sequences whose prompts hold visual tokens of the model",
        )

"""Checks of masks: their values, what they overlap, and whether there is an image at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vgpo_kernels import checks
from vgpo_kernels.batch_checks.batch import Batch
from vgpo_kernels.batch_checks.findings import Finding
from vgpo_kernels.batch_checks.heads import Head


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


def check_masks(batch: Batch, head: Head) -> Iterator[Finding]:
    """Find masks that are empty, overlap, are swapped or do not fit the tokens."""
    scored = batch.scored
    if not bool(scored.any()):
        yield Finding("no-response", "response_mask is false everywhere, so the loss is 0 and has no gradient")
        return
    if batch.is_whole:
        yield from _prompts(batch)
    if batch.ids is not None:
        yield from _after_the_end(batch, batch.ids, head.ends)
    if batch.visual is None:
        return
    visual = batch.visual
    if not bool(visual.any()):
        yield Finding(
            "no-image",
            "visual_mask is false everywhere: no response has an image, so all factors are 1; is the id of the image "
            "tokens right, and were the ids taken after the processor had put one for each patch? For a batch of text "
            "alone pass visual_mask=None",
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
    if batch.ids is not None and batch.has_prompts and head.visual_tokens:
        yield from _visual_tokens(batch, visual, head.visual_tokens)


def _after_the_end(batch: Batch, ids: Tensor, ends: tuple[int, ...]) -> Iterator[Finding]:
    """Find scored tokens behind one that ended a response. Between the turns of a dialogue some are not scored."""
    ended = torch.zeros_like(batch.scored)
    for token in ends:
        ended |= batch.scored & (ids == token)
    ended = nn.functional.pad(ended[:-1], (1, 0)).index_fill(0, batch.begin[batch.begin < len(ids)], False)
    number = int((batch.scored & ended).sum())
    if number:
        yield Finding(
            "after-end",
            f"{number} scored tokens follow the end of a sequence (id {', '.join(map(str, ends))}): padding? The first "
            "end is the policy's and scored, and nothing after it: "
            "ends = torch.isin(tokens, eos).int(); response_mask = ends.cumsum(1) - ends == 0",
        )


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

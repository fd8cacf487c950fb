"""Looks at the batch of a first step for mistakes that pass silently: the loss looks right, the gradient is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels import checks, head_checks
from vgpo_kernels.batch_checks.batch import Batch, read
from vgpo_kernels.batch_checks.findings import BatchError, BatchFindings, Finding
from vgpo_kernels.batch_checks.groups import check_groups
from vgpo_kernels.batch_checks.heads import find
from vgpo_kernels.batch_checks.logprobs import check_logprobs
from vgpo_kernels.batch_checks.masks import check_masks, check_values
from vgpo_kernels.hints import explained

__all__ = ["BatchError", "BatchFindings", "Finding", "check_batch"]


@explained
def check_batch(
    model_or_head: nn.Module | Tensor | None,
    hidden: Tensor | None,
    ids: Tensor | None,
    logp: Tensor | None,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float | None = None,
    softcap: float | None = None,
    samples: int = 64,
    raises: bool = False,
) -> BatchFindings:
    """Look at a batch for mistakes that raise no error and change what is learnt. Call it once, in the first step.

    It computes up to ``samples`` log-probabilities again, by :func:`linear_logprob` of hidden and head, and compares
    masks, group ids, advantages and images with each other. Where something looks wrong it says what, in words. A
    finding is a mistake as far as the batch tells; nothing is changed. Shapes and dtypes are checked as in the losses.
    The names of findings:

    - ``shifted``: log-probs stand one position off, or were taken from the row at the token itself;
    - ``temperature``: log-probs of another temperature;
    - ``logits``: logits in place of log-probs;
    - ``probabilities``: probabilities, likewise;
    - ``negated``: log-probs with the wrong sign;
    - ``entropy``: entropies in place of log-probs;
    - ``hidden-states``: hidden states of another layer, before the final norm, or of other tokens or weights;
    - ``log-probs``: ``logp`` and ``old_logp`` are not of the same tokens;
    - ``detached``: what the loss is to train through has no gradient;
    - ``nonfinite``: advantages, log-probs or hidden states that are NaN or infinite;
    - ``no-response``: no token is scored;
    - ``no-image``: no response has an image;
    - ``visual-mask``: ``visual_mask`` is true at other tokens than the model's image tokens;
    - ``mask-values``: an integer mask holds more than 0 and 1;
    - ``mask-overlap``: image tokens are scored;
    - ``masks-swapped``: ``visual_mask`` and ``response_mask`` in each other's place;
    - ``prompt-overlap``: tokens of prompts are scored;
    - ``after-end``: what follows the end of a response is scored;
    - ``rewards``: rewards in place of advantages;
    - ``group-ids``: group ids are all equal or all different, or do not fit prompts, images or advantages.

    Args:
        model_or_head: The model (of transformers, wrapped or not), its LM head, or the head's weight ``[V, D]``.
            ``None``: log-probs are not computed again. A model also says which ids its image tokens have, and how it
            scales its logits.
        hidden: The hidden states that the loss is given, ``[B, S, D]`` padded or ``[N, D]`` packed.
        ids: Tokens, integer: of the whole sequences, ``[B, S]``, or of the responses, in response_mask's shape.
        logp: Log-probabilities of the tokens, in response_mask's shape. ``None`` where a loss computes them itself
            (``linear_vgpo_loss``): then ``hidden`` has to carry the graph.
        old_logp: The same under the policy that sampled, in response_mask's shape, or ``None``.
        advantages: Per response ``[B]`` or per token.
        visual_mask: True at image tokens, bool or integer, ``[B, S]`` or ``[N]``.
        response_mask: True at scored tokens, bool or integer, ``[B, T]`` with T <= S (the last T positions) or ``[N]``.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        prompt_mask: True at the tokens of prompts, bool or integer, ``[B, S]`` or ``[N]``, where it is at hand.
        bias: The head's bias ``[V]``, where ``model_or_head`` is a weight.
        temperature: What logits are divided by, a number or a tensor in response_mask's shape.
        logit_scale: What products are multiplied by before that, as in :func:`linear_logprob`; by default what the
            model's configuration says.
        softcap: Cap of the logits, likewise.
        samples: How many log-probabilities are computed again, at most.
        raises: Raise a :class:`BatchError` where something is found.

    Returns:
        A :class:`BatchFindings`: a tuple of :class:`Finding`, empty where nothing looks wrong, and in ``unchecked``
        what could not be looked at (a head that is sharded over processes, say). Any tensor but ``response_mask`` may
        be ``None``: what needs it is not looked at. On a GPU the host waits.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.
        BatchError: Something was found, with ``raises``; a ValueError.

    """
    checks.positive_integer("samples", samples)
    checks.flag("raises", raises)
    head = find(model_or_head, bias, logit_scale, softcap)
    with torch.no_grad():
        given = {"visual_mask": visual_mask, "response_mask": response_mask, "prompt_mask": prompt_mask}
        findings = list(check_values(given))
        masks = {name: _truth(mask) for name, mask in given.items()}
        batch = read(hidden, ids, logp, old_logp, advantages, group_ids=group_ids, cu_seqlens=cu_seqlens, **masks)
        scored = masks["response_mask"]
        head_checks.logit_map(temperature, 1.0 if logit_scale is None else logit_scale, softcap, scored, scored, "its")
        findings += check_masks(batch, head)
        unchecked: list[str] = []
        if bool(batch.scored.any()):
            findings += _nonfinite(batch)
            about_logp, unchecked = check_logprobs(batch, head, temperature, samples)
            findings += [*about_logp, *check_groups(batch)]
    findings += _detached(hidden, logp)
    found = BatchFindings(findings, unchecked)
    if found and raises:
        raise BatchError(found)
    return found


def _truth(mask: Tensor | None) -> Any:
    """Return a mask of integers as the losses read it on a GPU; there, nothing says that it holds other values."""
    return mask != 0 if isinstance(mask, Tensor) and mask.dtype in checks.INTEGER_DTYPES else mask


def _detached(hidden: Tensor | None, logp: Tensor | None) -> list[Finding]:
    if not torch.is_grad_enabled():
        return []
    if logp is not None:
        if logp.requires_grad:
            return []
        return [Finding("detached", "logp has no gradient, so the loss trains nothing; was it computed in no_grad()?")]
    if hidden is None or hidden.requires_grad:
        return []
    return [
        Finding(
            "detached",
            "hidden has no gradient, and logp is None, so a loss of hidden and head trains the head alone; captured "
            "states are detached: take the decoder's last_hidden_state",
        )
    ]


def _nonfinite(batch: Batch) -> list[Finding]:
    """Find numbers that are not finite where the loss reads them."""
    found = []
    if batch.advantages is not None:
        per_response = batch.advantages.shape == batch.begin.shape
        used = batch.advantages[batch.any_of(batch.scored) if per_response else batch.scored]
        found += _count("advantages", used.isfinite(), "; a reward that failed is NaN, and so is its group")
    for name, logp in (("logp", batch.logp), ("old_logp", batch.old_logp)):
        if logp is not None:
            found += _count(name, logp[batch.scored].isfinite(), "")
    if batch.hidden is not None:
        rows = batch.scored if batch.visual is None else batch.scored | batch.visual
        # The extremes of a row take no memory, and are NaN where any number is.
        finite = batch.hidden.amax(-1).isfinite() & batch.hidden.amin(-1).isfinite()
        found += _count("hidden", finite[rows], " (rows of scored or image tokens)")
    return found


def _count(name: str, finite: Tensor, why: str) -> list[Finding]:
    wrong = int((~finite).sum())
    return [Finding("nonfinite", f"{name} is NaN or infinite at {wrong} of {finite.numel()}{why}")] if wrong else []

"""Visual focus, factors, policy loss and its gradient in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import VGPOConfig, Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.linear_vgpo_loss import with_factors
from vgpo_kernels.ops.loss_terms import NEEDS_SELECTED, ViewTerm
from vgpo_kernels.ops.policy_loss import (
    LOSS_RESULT,
    LOSS_TENSORS,
    POLICY_METRICS,
    PolicyLoss,
    call_with_views,
    fake_loss,
    keep_gradients,
    loss_arguments,
    policy_loss,
    scaled_gradients,
)
from vgpo_kernels.ops.visual_weights import FOCUS_METRICS
from vgpo_kernels.reference import vgpo_loss as reference

METRICS = POLICY_METRICS + FOCUS_METRICS


@explained
def vgpo_loss(
    hidden: Tensor,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    visual_mask: Tensor | None,
    response_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    *,
    cu_seqlens: Tensor | None = None,
    prototype: Tensor | None = None,
    prototype_index: Tensor | None = None,
    visibility: Visibility = "all",
    token_weights: Tensor | None = None,
    selected: Tensor | None = None,
    num_selected: int | float | Tensor | None = None,
    views: Sequence[ViewTerm] = (),
    **policy_loss_options: Any,
) -> PolicyLoss:
    """Visual focus, factors and policy loss of whole groups in one call (paper, Eq. 3-11).

    The same as :func:`visual_focus`, :func:`visual_weights` and :func:`policy_loss` one after the other. Every group
    must be whole. Where groups straddle micro-batches or ranks, call these three functions, and :func:`group_weights`
    before the loss. With ``token_weights`` or ``selected`` it calls the three: its kernel multiplies advantages by the
    factors alone.

    Args:
        hidden: Last-layer hidden states after the final norm, ``[B, S, D]`` padded or ``[N, D]`` packed;
            float32, bfloat16 or float16. Detached: the loss is differentiable in ``logp``, not in ``hidden``.
        logp: Log-probabilities (natural logarithm) under the policy, ``[B, T]`` or ``[N]``; differentiable.
        old_logp: The same under the policy that generated the tokens, in ``logp``'s shape; ``None``:
            ``logp.detach()``, as in :func:`policy_loss`.
        advantages: Per response ``[B]`` or per token.
        visual_mask: True at image tokens, bool or 0 and 1, ``[B, S]`` or ``[N]``; may be ``None`` where
            ``prototype`` is given.
        response_mask: True at scored response tokens, bool or 0 and 1, ``[B, T]`` with T <= S (the last T
            positions) or ``[N]``.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings of the factors.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        prototype: As in :func:`visual_focus`: ``[P, D]``, or one for each position.
        prototype_index: As in :func:`visual_focus`: a row for each response ``[B]``, or for each token.
        visibility: ``"all"``, or ``"causal"`` for images that arrive late, as in :func:`visual_focus`.
        token_weights: As in :func:`policy_loss`, beside the factors: ``[B]`` or per token.
        selected: As in :func:`policy_loss`, as all that follows.
        num_selected: As in :func:`policy_loss`.
        views: As in :func:`policy_loss`.
        **policy_loss_options: Every other keyword of :func:`policy_loss` but ``factors``.

    Returns:
        A :class:`PolicyLoss`, whose metrics are those of :func:`policy_loss` and of :func:`visual_weights`.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together.

    """
    if token_weights is not None or selected is not None:
        return with_factors(
            lambda _, **arguments: policy_loss(logp, old_logp, advantages, **arguments),
            hidden,
            visual_mask,
            response_mask,
            group_ids,
            config,
            cu_seqlens=cu_seqlens,
            prototype=prototype,
            prototype_index=prototype_index,
            visibility=visibility,
            token_weights=token_weights,
            selected=selected,
            num_selected=num_selected,
            views=views,
            **policy_loss_options,
        )
    if num_selected is not None:
        raise ValueError(NEEDS_SELECTED)
    hidden, boundaries = checks.hidden_states(hidden, cu_seqlens)
    mask, _ = checks.response_layout(response_mask, boundaries, hidden.device)
    checks.response_rows(mask, hidden)
    batch = checks.batch_size(mask, boundaries)
    arguments = {
        "hidden": hidden,
        "group_ids": checks.per_response_integers("group_ids", group_ids, batch, mask.device, "hidden"),
        "config": checks.settings("config", config, VGPOConfig).as_floats(),
        **checks.image(visual_mask, prototype, prototype_index, visibility, hidden, mask, boundaries),
    }
    of_policy, options = loss_arguments(mask, boundaries, logp, old_logp, advantages, **policy_loss_options)
    return call_with_views("vgpo_loss", METRICS, arguments | of_policy, options, views)


registry.define(
    reference.vgpo_loss,
    "(Tensor hidden, Tensor logp, Tensor old_logp, Tensor advantages, Tensor? visual_mask, Tensor response_mask, "
    "Tensor group_ids, Tensor? cu_seqlens, Tensor? prototype, Tensor? prototype_index, bool causal, "
    f"{LOSS_TENSORS}, float[] config, float[] options) -> {LOSS_RESULT}",
    partial(fake_loss, num_metrics=len(METRICS)),
    setup_context=keep_gradients,
    backward=scaled_gradients,
)

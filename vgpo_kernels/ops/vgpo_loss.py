"""Visual focus, factors, policy loss and its gradient in one call."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import VGPOConfig, Visibility
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.policy_loss import (
    LOSS_RESULT,
    LOSS_TENSORS,
    POLICY_METRICS,
    PolicyLoss,
    fake_loss,
    keep_gradients,
    loss_arguments,
    scaled_gradients,
    unpack,
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
    **policy_loss_options: Any,
) -> PolicyLoss:
    """Visual focus, factors and policy loss of whole groups in one call (paper, Eq. 3-11).

    The same as :func:`visual_focus`, :func:`visual_weights` and :func:`policy_loss` one after the other. Every group
    must be whole. Where groups straddle micro-batches or ranks, call these three functions, and :func:`group_weights`
    before the loss.

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
        **policy_loss_options: Every keyword of :func:`policy_loss` but ``factors``.

    Returns:
        A :class:`PolicyLoss`, whose metrics are those of :func:`policy_loss` and of :func:`visual_weights`.

    Raises:
        TypeError: An argument has the wrong type or dtype, or an option is unknown.
        ValueError: Shapes, devices, boundaries or options do not fit together.

    """
    hidden, boundaries = checks.hidden_states(hidden, cu_seqlens)
    mask, _ = checks.response_layout(response_mask, boundaries, hidden.device)
    checks.response_rows(mask, hidden)
    batch = checks.batch_size(mask, boundaries)
    arguments = {
        "hidden": hidden,
        "group_ids": checks.per_response_integers("group_ids", group_ids, batch, mask.device, "hidden"),
        "config": checks.settings("config", config, VGPOConfig).as_floats(),
        **checks.image(visual_mask, prototype, prototype_index, visibility, hidden, mask, boundaries),
        **loss_arguments(mask, boundaries, logp, old_logp, advantages, **policy_loss_options),
    }
    dtype = checks.compute_dtype(*arguments.values())
    return unpack(registry.call("vgpo_loss", mask.device, dtype, **arguments), METRICS, dtype, arguments)


registry.define(
    reference.vgpo_loss,
    "(Tensor hidden, Tensor logp, Tensor old_logp, Tensor advantages, Tensor? visual_mask, Tensor response_mask, "
    "Tensor group_ids, Tensor? cu_seqlens, Tensor? prototype, Tensor? prototype_index, bool causal, "
    f"{LOSS_TENSORS}, float[] config, float[] options) -> {LOSS_RESULT}",
    partial(fake_loss, num_metrics=len(METRICS)),
    setup_context=keep_gradients,
    backward=scaled_gradients,
)

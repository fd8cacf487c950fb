"""From hidden states to the loss in plain PyTorch, by the other reference implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.reference.policy_loss import policy_loss
from vgpo_kernels.reference.visual_focus import visual_focus
from vgpo_kernels.reference.visual_weights import visual_weights


def vgpo_loss(
    *,
    hidden: Tensor,  # [B, S, D] or [N, D]
    visual_mask: Tensor | None,  # [B, S] or [N]
    response_mask: Tensor,  # [B, T] or [N]
    group_ids: Tensor,  # [B]
    config: list[float],
    options: list[float],
    cu_seqlens: Tensor | None = None,  # [B + 1]
    prototype: Tensor | None = None,  # [P, D]
    prototype_index: Tensor | None = None,  # [B], or response_mask's shape
    causal: bool = False,
    dtype: torch.dtype = torch.float64,
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics: the policy's, then the focus's.

    ``loss_arguments`` are the rest of :class:`vgpo_kernels.reference.policy_loss.LossArguments`.
    """
    cos = visual_focus(hidden, visual_mask, response_mask, cu_seqlens, prototype, prototype_index, causal, dtype=dtype)
    factors, _, _, _, _, focus_metrics = visual_weights(
        cos, response_mask, group_ids, None, cu_seqlens, config, dtype=dtype
    )
    loss, policy_metrics = policy_loss(
        response_mask=response_mask,
        factors=factors,
        cu_seqlens=cu_seqlens,
        options=options,
        dtype=dtype,
        **loss_arguments,
    )
    return loss, torch.cat([policy_metrics, focus_metrics])

"""From hidden states to the loss in plain PyTorch, by the other reference implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.reference.layout import responses_of
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
    prototype_index: Tensor | None = None,  # [B]
    dtype: torch.dtype = torch.float64,
    **loss_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics: the policy's, then the focus's.

    ``loss_arguments`` are the rest of :class:`vgpo_kernels.reference.policy_loss.LossArguments`.
    """
    cos = visual_focus(hidden, visual_mask, response_mask, cu_seqlens, prototype, prototype_index, dtype=dtype)
    has_visual = images_of(hidden, visual_mask, cu_seqlens, prototype, prototype_index)
    factors, _, _, _, _, focus_metrics = visual_weights(
        cos, response_mask, group_ids, has_visual, cu_seqlens, config, dtype=dtype
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


def images_of(
    hidden: Tensor,
    visual_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prototype: Tensor | None,
    prototype_index: Tensor | None,
) -> Tensor:
    """Whether each response has an image: a visual token, or a given prototype that is not zero; bool ``[B]``."""
    if prototype is not None:
        # visual_prototype gives zeros to a response without visual tokens.
        seen = (prototype != 0).any(-1)
        return seen if prototype_index is None else seen[prototype_index.clamp(min=0)] & (prototype_index >= 0)
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    assert visual_mask is not None
    visible = visual_mask.reshape(-1)
    response, _ = responses_of(visible.shape[0], batch, cu_seqlens, hidden.device)
    return torch.zeros(batch, dtype=torch.int64, device=hidden.device).index_add(0, response, visible.long()) > 0

"""From hidden states to the loss in plain PyTorch: the composition of the other definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from vgpo_kernels.reference.layout import responses_of
from vgpo_kernels.reference.policy_loss import policy_loss
from vgpo_kernels.reference.visual_focus import visual_focus
from vgpo_kernels.reference.visual_weights import visual_weights


def vgpo_loss(
    hidden: Tensor,  # [B, S, D] or [N, D]
    logp: Tensor,  # [B, T] or [N], as every per-token tensor
    old_logp: Tensor,
    advantages: Tensor,  # [B] or per token
    visual_mask: Tensor | None,  # [B, S] or [N]
    response_mask: Tensor,
    group_ids: Tensor,  # [B]
    cu_seqlens: Tensor | None,  # [B + 1]
    prototype: Tensor | None,  # [P, D]
    prototype_index: Tensor | None,  # [B]
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    importance_weights: Tensor | None,  # [B] or per token
    num_tokens: Tensor | None,  # []
    num_sequences: Tensor | None,  # []
    config: list[float],
    options: list[float],
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics ``[20]``: the policy's, then the focus's."""
    cos = visual_focus(hidden, visual_mask, response_mask, cu_seqlens, prototype, prototype_index, dtype=dtype)
    has_visual = images_of(hidden, visual_mask, cu_seqlens, prototype, prototype_index)
    factors, _, _, _, _, focus_metrics = visual_weights(
        cos, response_mask, group_ids, has_visual, cu_seqlens, config, dtype=dtype
    )
    loss, policy_metrics = policy_loss(
        logp,
        old_logp,
        advantages,
        response_mask,
        factors,
        cu_seqlens,
        ref_logp,
        entropy,
        importance_weights,
        num_tokens,
        num_sequences,
        options,
        dtype=dtype,
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

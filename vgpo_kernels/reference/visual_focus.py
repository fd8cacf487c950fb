"""Visual prototypes and focus scores in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from vgpo_kernels.reference.layout import responses_of, rows_of, tokens_of


def visual_prototype(
    hidden: Tensor,  # [B, S, D] or [N, D]
    visual_mask: Tensor,  # [B, S] or [N]
    cu_seqlens: Tensor | None = None,  # [B + 1]
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B, D]
    """Mean hidden state of each response's visual tokens (Eq. 3); zeros where there are none."""
    batch = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    visible = visual_mask.reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    # A hidden state off the mask may be NaN, and NaN times zero is NaN: replace it instead of multiplying by zero.
    rows = torch.where(visible[:, None], rows, torch.zeros_like(rows))
    response, _ = responses_of(visible.shape[0], batch, cu_seqlens, hidden.device)
    total = rows.new_zeros(batch, hidden.shape[-1]).index_add(0, response, rows)
    count = rows.new_zeros(batch).index_add(0, response, visible.to(dtype))
    return total / count.clamp(min=1)[:, None]


def visual_focus(
    hidden: Tensor,  # [B, S, D] or [N, D]
    visual_mask: Tensor | None,  # [B, S] or [N]
    response_mask: Tensor,  # [B, T] or [N]
    cu_seqlens: Tensor | None = None,  # [B + 1]
    prototype: Tensor | None = None,  # [P, D]
    prototype_index: Tensor | None = None,  # [B]
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # response_mask's shape
    """Cosine between each response token's hidden state and its image's prototype (Eq. 4)."""
    if prototype is None:
        assert visual_mask is not None
        means = visual_prototype(hidden, visual_mask, cu_seqlens, dtype=dtype)
    elif prototype_index is None:
        means = prototype.to(dtype)
    else:
        means = prototype.to(dtype)[prototype_index.clamp(min=0)]
        means = torch.where((prototype_index >= 0)[:, None], means, torch.zeros_like(means))
    # Without an image the cosine is 0, even if the hidden state is NaN.
    tokens = tokens_of(response_mask, cu_seqlens)
    looking = tokens.valid & tokens.spread((means != 0).any(-1))
    rows = rows_of(response_mask, hidden).to(dtype)
    mean = tokens.spread(means)
    norms = torch.linalg.vector_norm(rows, dim=-1) * torch.linalg.vector_norm(mean, dim=-1)
    cos = (rows * mean).sum(-1) / norms.clamp(min=1e-8)
    return torch.where(looking, cos, torch.zeros_like(cos)).reshape(response_mask.shape)

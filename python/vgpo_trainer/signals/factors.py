"""The visual signal of a rollout batch, in two phases: per response where its hidden states are, then per group.

Phase one reduces hidden states to cosines (:class:`FocusPass`, slice by slice, as a forward pass yields them).
Phase two (:func:`compute_signal`) turns the cosines of this process into token weights, gathers a few numbers a
response from all processes, and weighs the responses of each prompt against one another. So groups may be shuffled,
split into micro-batches and spread over processes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vgpo_kernels import VGPOConfig, group_weights, visual_focus, visual_weights
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask


class FocusPass:
    """Reduces the hidden states of successive slices of a batch to cosines, so that no slice's states are kept.

    Args:
        image_mask: True at visual tokens, ``[B, S]``.
        response_mask: True at scored response tokens, ``[B, T]``: the last T positions.
        norm: The model's final norm or its name, where it has to be told.

    """

    def __init__(self, image_mask: Tensor, response_mask: Tensor, norm: str | nn.Module | None = None) -> None:
        self.image_mask = image_mask
        self.response_mask = response_mask
        self._norm = norm
        self._slices: list[Tensor] = []
        self._rows = 0

    def capture(self, model: nn.Module) -> AbstractContextManager[object]:
        """Take the hidden states of every forward pass in the block."""
        return capture_hidden_states(model, self, norm=self._norm)

    def __call__(self, hidden: Tensor) -> None:
        """Take the hidden states ``[b, S, D]`` of the next b rows."""
        rows = slice(self._rows, self._rows + hidden.shape[0])
        image_mask = self.image_mask[rows].to(hidden.device)
        response_mask = self.response_mask[rows].to(hidden.device)
        if image_mask.shape != hidden.shape[:2]:
            raise RuntimeError(
                f"the final norm gave hidden states {list(hidden.shape)} where input_ids has {list(image_mask.shape)}: "
                "VGPO needs one hidden state for each position of the sequence"
            )
        self._slices.append(visual_focus(hidden, image_mask, response_mask))
        self._rows = rows.stop

    @property
    def cos(self) -> Tensor:
        """Cosines ``[B, T]`` of all rows.

        Raises:
            RuntimeError: The forward pass did not reach the final norm for every row.

        """
        if self._rows != self.response_mask.shape[0]:
            raise RuntimeError(
                f"hidden states of {self._rows} of {self.response_mask.shape[0]} responses reached the hook on the "
                "final norm; a compiled or replaced forward pass skips hooks"
            )
        return torch.cat(self._slices).to(self.response_mask.device)

    @property
    def shown(self) -> Tensor:
        """What logs and rollouts show of the signal, ``[B, T]``: the cosines."""
        return self.cos


@dataclass(frozen=True)
class VisualSignal:
    """The signal of B responses, detached, fp32.

    Attributes:
        cos: Cosine of each response token to its prototype, ``[B, T]``; with ``signal="attention"`` its share of
            attention on the image.
        psi: Intra-trajectory weights, ``[B, T]``.
        phi: Inter-trajectory weights, ``[B]``.
        factors: What advantages are multiplied by, ``[B, T]``; 1 off the mask and for unweighted responses.
        weighted: Whether a response takes part: it has an image, and finite hidden states, ``[B]``.
        gate_rate: Share of the weighted responses' tokens that the gate lets through, 0-dimensional.
        late_early: Visual focus of the second half of a response over its first, ``[B]``; NaN where undefined.

    """

    cos: Tensor
    psi: Tensor
    phi: Tensor
    factors: Tensor
    weighted: Tensor
    gate_rate: Tensor
    late_early: Tensor


def visual_tokens_told(ids: Any, model: PreTrainedModel) -> tuple[int, ...]:
    """Return ids of visual tokens that a caller gives for a model; none, where there are none.

    Raises:
        TypeError: They are no sequence of integers.
        ValueError: One is no token of the model.

    """
    if ids is None:
        return ()
    try:
        found = tuple(operator.index(token) for token in ids)
    except TypeError:
        found = ()
    if not found or any(isinstance(token, bool) for token in ids):
        raise TypeError(f"visual_tokens must be ids, which are integers, got {ids!r}")
    number = model.get_input_embeddings().weight.shape[0]
    if not all(0 <= token < number for token in found):
        raise ValueError(f"visual_tokens must lie in [0, {number}), the tokens of the model, got {ids!r}")
    return found


def image_positions(
    input_ids: Tensor,  # [B, S]
    attention_mask: Tensor,  # [B, S]
    response_mask: Tensor,  # [B, T], the last T positions
    visual_tokens: tuple[int, ...],
) -> Tensor:
    """Return True at image and video tokens the model was shown, ``[B, S]``.

    A visual token that the model sampled itself stands for no image, so scored response tokens never count.
    """
    shown = visual_mask(input_ids, visual_tokens) & attention_mask.bool()
    shown[:, shown.shape[1] - response_mask.shape[1] :] &= ~response_mask.bool()
    return shown


def compute_signal(
    cos: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    group_ids: Tensor,  # [B]
    has_visual: Tensor,  # [B]
    config: VGPOConfig,
    *,
    gather: Callable[[Tensor], Tensor],
    process_index: int,
) -> VisualSignal:
    """Turn the cosines of this process's share of a rollout batch into factors, comparing whole groups.

    Args:
        cos: From :class:`FocusPass`.
        response_mask: True at scored response tokens.
        group_ids: Responses to one prompt share an id, on all processes.
        has_visual: Whether a response has an image.
        config: The settings. An offset left to the batch is fixed over the batches of all processes.
        gather: Concatenates a tensor ``[B, ...]`` of every process, in order; every process must call it.
        process_index: Which of the gathered shares is this one's.

    """
    config = fix_offset(config, cos, response_mask, has_visual, gather)
    batch = cos.shape[0]
    # Phase one. Each response is its own group here: phi comes from all processes' scores below.
    alone = torch.arange(batch, device=cos.device)
    local = visual_weights(cos, response_mask, alone, config, has_visual=has_visual)
    # Phase two.
    scores = gather(local.score)
    groups, images = gather(torch.stack([group_ids, has_visual.to(torch.int64)], dim=1)).unbind(dim=1)
    phi = group_weights(scores, groups, config, has_visual=images.bool())
    phi = phi[process_index * batch : (process_index + 1) * batch]

    weighted = has_visual & local.score.isfinite()
    return VisualSignal(
        cos=cos,
        psi=local.psi,
        phi=phi,
        factors=combine(local.psi, phi, response_mask.bool() & weighted[:, None], config),
        weighted=weighted,
        gate_rate=local.metrics["gate_rate"],
        late_early=late_early_ratio(cos, response_mask, weighted, config),
    )


def combine(psi: Tensor, phi: Tensor, weighted_tokens: Tensor, config: VGPOConfig) -> Tensor:
    """Return ``(1 + psi) (1 + phi)``, each clamped as ``config`` says, and 1 off ``weighted_tokens``."""
    token, trajectory = 1 + psi, 1 + phi
    if config.intra_clamp is not None:
        token = token.clamp(*config.intra_clamp)
    if config.inter_clamp is not None:
        trajectory = trajectory.clamp(*config.inter_clamp)
    return torch.where(weighted_tokens, token * trajectory[:, None], torch.ones_like(psi))


def fix_offset(
    config: VGPOConfig,
    cos: Tensor,
    response_mask: Tensor,
    has_visual: Tensor,
    gather: Callable[[Tensor], Tensor],
) -> VGPOConfig:
    """Fix an offset that the config leaves to the batch: the smallest cosine of the whole rollout batch, or 0."""
    if config.score != "offset" or config.score_offset is not None:
        return config
    counted = response_mask.bool() & has_visual[:, None] & cos.isfinite()
    smallest = torch.where(counted, cos, torch.zeros_like(cos)).amin().clamp(max=0)
    return replace(config, score_offset=gather(smallest.reshape(1)).min().item())


def late_early_ratio(cos: Tensor, response_mask: Tensor, weighted: Tensor, config: VGPOConfig) -> Tensor:
    """Mean visual focus of each response's second half over that of its first, ``[B]``.

    NaN for a response of fewer than two tokens, without image, or without focus in its first half.
    """
    mask = response_mask.bool()
    focus = (1 + cos) / 2 if config.score == "affine" else cos - (config.score_offset or 0.0)
    ordinal = mask.cumsum(dim=1) - 1
    length = mask.sum(dim=1, keepdim=True)
    late = ordinal >= (length + 1) // 2

    def mean(half: Tensor) -> Tensor:
        return torch.where(half, focus, torch.zeros_like(focus)).sum(dim=1) / half.sum(dim=1)

    early_mean = mean(mask & ~late)
    defined = weighted & (length[:, 0] >= 2) & (early_mean > 0)
    return torch.where(defined, mean(mask & late) / early_mean, torch.full_like(early_mean, torch.nan))

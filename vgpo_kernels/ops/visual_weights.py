"""Advantage factors from cosines: compensation, and re-weighting within and between trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks
from vgpo_kernels.config import VGPOConfig
from vgpo_kernels.ops import registry
from vgpo_kernels.reference import visual_weights as reference

FOCUS_METRICS = ("focus_mean", "gate_rate", "late_early_ratio", "weighted_responses", "nonfinite_responses")


class VisualWeights(NamedTuple):
    """What :func:`visual_weights` returns.

    Attributes:
        factors: Factor of each token's advantage, ``(1 + psi)(1 + phi)`` after clamping; 1 off the mask.
        psi: Intra-trajectory weight of each token (Eq. 8), unclamped; 0 off the mask.
        w: Compensated visual focus of each token (Eq. 5); 0 off the mask.
        phi: Inter-trajectory weight of each response (Eq. 10), unclamped, ``[B]``.
        score: Visual accumulation s of each response, ``[B]``, the input of :func:`group_weights` where groups straddle
            micro-batches. NaN for a response with a non-finite cosine.
        metrics: 0-dimensional tensors: ``focus_mean`` (mean cosine), ``gate_rate`` (share of tokens compensated),
            ``late_early_ratio`` (mean focus of a response's second half over that of its first),
            ``weighted_responses`` and ``nonfinite_responses`` (counts).

    """

    factors: Tensor
    psi: Tensor
    w: Tensor
    phi: Tensor
    score: Tensor
    metrics: dict[str, Tensor]


def visual_weights(
    cos: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    *,
    cu_seqlens: Tensor | None = None,
    has_visual: Tensor | None = None,
) -> VisualWeights:
    """Turn focus cosines into factors of the advantage (paper, Eq. 5-11).

    ``w = rho (1 + G c)``, with rho the visual focus, c a schedule over the response and G a gate that opens for
    the strongest tokens of the tail; psi centres the min-max normalised w within a response, phi the normalised
    accumulation of w within a group.

    Responses without an image, and responses with a NaN or infinite cosine, are not weighted: their factors are 1, and
    their group's statistics leave them out.

    Args:
        cos: Cosines of :func:`visual_focus`, ``[B, T]`` or packed ``[N]``. Values off the mask are not read.
        response_mask: True at scored response tokens, bool or integer, in ``cos``'s shape.
        group_ids: Responses to one prompt share an id, integer ``[B]``, in any order.
        config: The settings, such as ``VGPOConfig.paper()`` or ``VGPOConfig.released()``.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        has_visual: Whether a response has an image, bool ``[B]``; ``None`` means that all have.

    Returns:
        A :class:`VisualWeights` of float32 tensors.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens)
    values = checks.per_token("cos", cos, mask)
    batch = checks.batch_size(mask, boundaries)
    groups = checks.per_response_integers("group_ids", group_ids, batch, mask.device, "response_mask")
    images = checks.has_visual(has_visual, batch, mask.device, "response_mask")
    dtype = checks.compute_dtype(values)
    result = registry.call(
        "visual_weights",
        mask.device,
        dtype,
        cos=values,
        response_mask=mask,
        group_ids=groups,
        has_visual=images,
        cu_seqlens=boundaries,
        config=checks.settings("config", config, VGPOConfig).as_floats(),
    )
    factors, psi, w, phi, score, metrics = (tensor.to(dtype) for tensor in result)
    return VisualWeights(factors, psi, w, phi, score, name_metrics(FOCUS_METRICS, metrics))


def group_weights(score: Tensor, group_ids: Tensor, config: VGPOConfig, *, has_visual: Tensor | None = None) -> Tensor:
    """Inter-trajectory weights phi from the visual accumulation of each response (paper, Eq. 9-10).

    This is the second phase of :func:`visual_weights` where groups straddle micro-batches or ranks: gather ``score``
    and ``group_ids`` (one number per response) and call this once on all of them.

    Args:
        score: Visual accumulation of each response, ``[B]``. A response with a non-finite score is left out.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings; with ``inter=False`` the result is zero.
        has_visual: Whether a response has an image, bool ``[B]``; ``None`` means that all have.

    Returns:
        phi, float32 ``[B]``, unclamped; 0 for a response that is left out and for a group of one.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together.

    """
    score = checks.require_floating("score", score)
    if score.dim() != 1:
        raise ValueError(f"score must have shape [B], got {checks.describe(score)}")
    batch = score.shape[0]
    values = checks.per_response("score", score, batch, score.device)
    groups = checks.per_response_integers("group_ids", group_ids, batch, score.device, "score")
    images = checks.has_visual(has_visual, batch, score.device, "score")
    dtype = checks.compute_dtype(values)
    phi = registry.call(
        "group_weights",
        score.device,
        dtype,
        score=values,
        group_ids=groups,
        has_visual=images,
        config=checks.settings("config", config, VGPOConfig).as_floats(),
    )
    return phi.to(dtype)  # type: ignore[no-any-return]


def name_metrics(names: tuple[str, ...], values: Tensor) -> dict[str, Tensor]:
    """Split a vector of metrics into named 0-dimensional tensors, without reading them."""
    return dict(zip(names, values.detach().unbind(), strict=True))


def _fake_weights(cos: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def per_token() -> Tensor:
        return cos.new_empty(cos.shape, dtype=torch.float32)

    def vector(length: int) -> Tensor:
        return cos.new_empty((length,), dtype=torch.float32)

    batch = group_ids.shape[0]
    return per_token(), per_token(), per_token(), vector(batch), vector(batch), vector(len(FOCUS_METRICS))


def _fake_group(score: Tensor) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.float32)


registry.define(
    reference.visual_weights,
    "(Tensor cos, Tensor response_mask, Tensor group_ids, Tensor? has_visual, Tensor? cu_seqlens, float[] config) "
    "-> (Tensor factors, Tensor psi, Tensor w, Tensor phi, Tensor score, Tensor metrics)",
    _fake_weights,
)
registry.define(
    reference.group_weights,
    "(Tensor score, Tensor group_ids, Tensor? has_visual, float[] config) -> Tensor",
    _fake_group,
)

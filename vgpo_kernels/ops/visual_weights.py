"""Advantage factors from cosines: compensation, and re-weighting within and between trajectories."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks, hints
from vgpo_kernels.config import Clamp, VGPOConfig
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.reference import visual_weights as reference
from vgpo_kernels.summaries import summary

FOCUS_METRICS = (
    "focus_mean",
    "gate_rate",
    "late_early_ratio",
    "weighted_responses",
    "nonfinite_responses",
    "groups",
    "singleton_groups",
)


class VisualWeights(NamedTuple):
    """What :func:`visual_weights` returns.

    Attributes:
        factors: Factor of each token's advantage, ``(1 + psi)(1 + phi)`` after clamping; 1 off the mask.
        psi: Intra-trajectory weight of each token (Eq. 8), unclamped; 0 off the mask and at tokens without a signal.
        w: Compensated visual focus of each token (Eq. 5); 0 off the mask, at tokens without a signal, and in
            responses that are not weighted.
        phi: Inter-trajectory weight of each response (Eq. 10), unclamped, ``[B]``.
        score: Visual accumulation s of each response, ``[B]``, the input of :func:`group_weights` where groups straddle
            micro-batches. NaN for a response that is not weighted.
        metrics: 0-dimensional tensors: ``focus_mean`` (mean cosine), ``gate_rate`` (share of tokens compensated),
            ``late_early_ratio`` (mean focus of a response's second half over that of its first, mean over the responses
            that have both and whose first half is above 0), ``weighted_responses`` and ``nonfinite_responses``
            (counts), ``groups`` (that have a weighted response) and ``singleton_groups`` (that have one only, whose phi
            is 0). The first three are NaN where they are means of nothing: leave them out of averages.

    """

    factors: Tensor
    psi: Tensor
    w: Tensor
    phi: Tensor
    score: Tensor
    metrics: dict[str, Tensor]

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


@explained
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

    A response is not weighted if it has no image (all its cosines are NaN), no scored token (overlong filtering), or a
    broken cosine, which is not finite or beyond +-1024: its factors are 1, its score is NaN, and the statistics of its
    group and the offset of its batch leave it out. Cosines that are NaN up to the first number say that no image was
    seen yet: these tokens have psi 0, and no statistic counts them.

    Args:
        cos: Cosines of :func:`visual_focus`, ``[B, T]`` or packed ``[N]``. Values off the mask are not read. Of a
            response's cosines, NaN is no signal up to the first number, and spoils the response after it.
        response_mask: True at scored response tokens, bool or 0 and 1, in ``cos``'s shape.
        group_ids: Responses to one prompt share an id, integer ``[B]``, in any order.
        config: The settings, such as ``VGPOConfig.paper()`` or ``VGPOConfig.released()``.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        has_visual: Whether a response has an image, bool ``[B]``, for cosines that do not say so by NaN.

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
    images = checks.per_response_mask("has_visual", has_visual, batch, mask.device, "response_mask")
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


@explained
def group_weights(score: Tensor, group_ids: Tensor, config: VGPOConfig, *, has_visual: Tensor | None = None) -> Tensor:
    """Inter-trajectory weights phi from the visual accumulation of each response (paper, Eq. 9-10).

    This is the second phase of :func:`visual_weights` where groups straddle micro-batches or ranks: gather ``score``
    and ``group_ids`` (one number per response) and call this once on all of them; :func:`combine_factors` makes factors
    of the result.

    Args:
        score: Visual accumulation of each response, ``[B]``. A response with a non-finite score is left out: it was not
            weighted.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings; with ``inter=False`` the result is zero. With ``score="offset"`` and without a
            ``score_offset`` there is a warning: each call of :func:`visual_weights` then took an offset of its own.
        has_visual: Whether a response has an image, bool ``[B]``; ``None``: a finite score says so.

    Returns:
        phi, float32 ``[B]``, unclamped; 0 for a response that is left out and for a group of one.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together.

    """
    score = checks.require_floating("score", score)
    if score.dim() != 1:
        hint = hints.shape("score", score.shape, score.shape[:1])
        raise ValueError(f"score must have shape [B], got {checks.describe(score)}{hint}")
    batch = score.shape[0]
    values = checks.per_response("score", score, batch, score.device)
    groups = checks.per_response_integers("group_ids", group_ids, batch, score.device, "score")
    images = checks.per_response_mask("has_visual", has_visual, batch, score.device, "score")
    settings = checks.settings("config", config, VGPOConfig)
    if settings.score == "offset" and settings.score_offset is None and not torch.compiler.is_compiling():
        warnings.warn(
            "group_weights compares scores with score='offset' and score_offset=None: each call of visual_weights took "
            "the smallest cosine of its own batch for the offset, so factors depend on how the batch was cut; set "
            "score_offset to that of the whole rollout batch: min(0, its smallest cosine)",
            stacklevel=3,
        )
    dtype = checks.compute_dtype(values)
    phi = registry.call(
        "group_weights",
        score.device,
        dtype,
        score=values,
        group_ids=groups,
        has_visual=images,
        config=settings.as_floats(),
    )
    return phi.to(dtype)  # type: ignore[no-any-return]


@explained
def combine_factors(
    psi: Tensor,
    phi: Tensor,
    response_mask: Tensor,
    config: VGPOConfig,
    *,
    cu_seqlens: Tensor | None = None,
    weighted: Tensor | None = None,
) -> Tensor:
    """Factors of the advantage from both weights, ``(1 + psi)(1 + phi)``, each clamped as ``config`` says (Eq. 11).

    The last step where groups straddle micro-batches or ranks: psi comes from :func:`visual_weights` of the
    micro-batch, phi from :func:`group_weights` of all scores. Equal to ``factors`` of one :func:`visual_weights` of the
    whole batch.

    Args:
        psi: Intra-trajectory weights, ``[B, T]`` or packed ``[N]``. Values off the mask are not read.
        phi: Inter-trajectory weights of these responses, ``[B]``.
        response_mask: True at scored response tokens, bool or 0 and 1, in ``psi``'s shape.
        config: The settings; only their clamps matter here.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        weighted: Whether a response is weighted, bool ``[B]``, such as ``score.isfinite()``; others have factors of 1.
            Needed only where a clamp leaves out 1: psi and phi of other responses are 0.

    Returns:
        Factors in ``psi``'s shape, float32; 1 off the mask.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens)
    intra = checks.per_token("psi", psi, mask)
    batch = checks.batch_size(mask, boundaries)
    inter = checks.per_response("phi", phi, batch, mask.device)
    chosen = checks.per_response_mask("weighted", weighted, batch, mask.device, "response_mask")
    settings = checks.settings("config", config, VGPOConfig)
    token = factor_of(intra, settings.intra_clamp)
    trajectory = spread_to_tokens(factor_of(inter, settings.inter_clamp), mask, boundaries)
    active = mask if chosen is None else mask & spread_to_tokens(chosen, mask, boundaries)
    return torch.where(active, token * trajectory, torch.ones_like(token))


def factor_of(weight: Tensor, clamp: Clamp | None) -> Tensor:
    """Return ``1 + weight``, clamped to its range (Eq. 11)."""
    return 1 + weight if clamp is None else (1 + weight).clamp(*clamp)


def spread_to_tokens(values: Tensor, mask: Tensor, boundaries: Tensor | None) -> Tensor:
    """Return values of responses ``[B]`` in a shape that broadcasts to the tokens of ``mask``."""
    if boundaries is None:
        return values[:, None]
    place = torch.arange(mask.shape[0], device=mask.device)
    response = torch.searchsorted(boundaries[1:].contiguous(), place, right=True)
    return values[response.clamp(max=max(values.shape[0] - 1, 0))]


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

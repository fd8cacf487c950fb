"""The family of perception-aware methods: per-token signals become weights of tokens and of responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import checks, hints
from vgpo_kernels.config import VGPOConfig, type_name
from vgpo_kernels.hints import explained
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.visual_weights import (
    factor_of,
    group_weights,
    name_metrics,
    spread_to_tokens,
    visual_weights,
)
from vgpo_kernels.reference import token_shaping as reference
from vgpo_kernels.shaping import ShapingConfig
from vgpo_kernels.summaries import summary

SHAPING_METRICS = ("signal_mean", "selected_rate", "shaped_responses", "nonfinite_responses")
SIGNALS = ("visual", "entropy", "gap")


class TokenShaping(NamedTuple):
    """What :func:`shape_tokens` returns.

    Attributes:
        factors: Factor of each token's advantage: its weight times its response's factor; 1 off the mask.
        weights: Weight of each token, 0 (or ``other_weight``) where it is not selected; 1 off the mask.
        selected: Whether a token is selected, bool; all scored ones where nothing is selected from them, and in
            responses that are left as they are. False off the mask.
        response_factor: Factor of each response, ``[B]``.
        score: Mean signal of each response (VGPO: its visual accumulation), ``[B]``, the input of
            :func:`response_factors` where responses that are compared straddle micro-batches. NaN for a response that
            is left as it is.
        metrics: 0-dimensional tensors. ``signal_mean`` and ``selected_rate``, over the tokens that count (NaN where
            there is none), ``shaped_responses`` and ``nonfinite_responses`` (counts); of VGPO those of
            :class:`VisualWeights`.

    """

    factors: Tensor
    weights: Tensor
    selected: Tensor
    response_factor: Tensor
    score: Tensor
    metrics: dict[str, Tensor]

    def __repr__(self) -> str:
        """A few lines; ``tuple(...)`` shows every number."""
        return summary(self)


@explained
def shape_tokens(
    signals: Tensor | Mapping[str, Tensor],
    response_mask: Tensor,
    group_ids: Tensor,
    config: ShapingConfig | VGPOConfig,
    *,
    cu_seqlens: Tensor | None = None,
    has_visual: Tensor | None = None,
    progress: float | None = None,
) -> TokenShaping:
    """Turn per-token signals into factors of the advantage, as a published method does: ``ShapingConfig.vppo()``, ...

    A response is left as it is (factors 1, all its tokens selected, a score of NaN, no part in what others are compared
    with) if it has no image (its visual signal is NaN), no scored token, or a signal that is not finite. Tokens whose
    visual signal is NaN before the first number saw no image: their weight is 1, they are selected, and no statistic
    counts them.

    Where nothing is compared beyond a response (``scope="response"``, ``response="none"``), results are the same bits
    however a batch is padded, packed, cut or ordered. Where responses are compared (``response``), cut batches need
    :func:`response_factors`. Where tokens of several responses are (``scope`` of ``"group"`` or ``"batch"``), hand all
    of them over in one call: signals are a few megabytes.

    Args:
        signals: The visual signal, ``[B, T]`` or packed ``[N]``; or several by name: ``"visual"``, ``"entropy"`` (in
            nats) and ``"gap"`` (absolute difference of the entropies with and without the image), as far as ``config``
            needs them (``config.needs()``). Values off the mask are not read. Detached. The range of a signal that is
            normalised, the exponents of ``"softmax"``, and the squares of ``response="softmax"`` have to stay within
            float32's range.
        response_mask: True at scored response tokens, bool or 0 and 1, in the signals' shape.
        group_ids: Responses to one prompt share an id, integer ``[B]``, in any order.
        config: The settings: ``ShapingConfig.preset("vppo")``; a :class:`VGPOConfig` makes this
            :func:`visual_weights`.
        cu_seqlens: Boundaries of a packed batch, int32 or int64 ``[B + 1]``.
        has_visual: Whether a response has an image, bool ``[B]``, for signals that do not say so by NaN.
        progress: How far training is, in [0, 1], for ``schedule="linear"``: such as step / steps.

    Returns:
        A :class:`TokenShaping`, float32. For the loss: ``policy_loss(..., factors=shaping.factors)``, with
        ``selected=shaping.selected`` where a method averages over selected tokens.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together, a signal is missing or unknown, or ``progress``
            is missing or out of range.

    """
    mask, boundaries = checks.response_layout(response_mask, cu_seqlens)
    batch = checks.batch_size(mask, boundaries)
    groups = checks.per_response_integers("group_ids", group_ids, batch, mask.device, "response_mask")
    if isinstance(config, VGPOConfig):
        _progress(progress)
        visual = _signals(signals, mask, config.needs())["visual"]
        return _of_visual_weights(visual, mask, groups, config, boundaries, has_visual)
    settings = checks.settings("config", config, ShapingConfig)
    given = _signals(signals, mask, settings.needs())
    images = checks.per_response_mask("has_visual", has_visual, batch, mask.device, "response_mask")
    if images is not None:
        given["visual"] = given["visual"].masked_fill(~spread_to_tokens(images, mask, boundaries), torch.nan)
    dtype = checks.compute_dtype(*given.values())
    result = registry.call(
        "token_shaping",
        mask.device,
        dtype,
        **{name: given.get(name) for name in SIGNALS},
        response_mask=mask,
        group_ids=groups,
        cu_seqlens=boundaries,
        progress=_progress(progress, settings.schedule),
        config=settings.as_floats(),
    )
    factors, weights, selected, response_factor, score, metrics = result
    return TokenShaping(
        factors.to(dtype),
        weights.to(dtype),
        selected,
        response_factor.to(dtype),
        score.to(dtype),
        name_metrics(SHAPING_METRICS, metrics.to(dtype)),
    )


@explained
def response_factors(
    score: Tensor, group_ids: Tensor, config: ShapingConfig | VGPOConfig, *, progress: float | None = None
) -> Tensor:
    """Weigh responses by their scores: the second phase of :func:`shape_tokens` where a batch is cut.

    Gather ``score`` and ``group_ids`` (one number per response) of all micro-batches or ranks, and call this once on
    all of them. The factors of a micro-batch are then ``shaping.weights`` times what this returns for its responses
    (with ``response_on="visual"``: at the selected tokens alone).

    Args:
        score: ``TokenShaping.score`` of each response, ``[B]``; NaN for one that is left as it is.
        group_ids: Responses to one prompt share an id, integer ``[B]``.
        config: The settings; a :class:`VGPOConfig` makes this ``1 + group_weights(...)``, clamped.
        progress: As in :func:`shape_tokens`.

    Returns:
        Factors, float32 ``[B]``; 1 for a response that is left out.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, or ``progress`` is missing or out of range.

    """
    if isinstance(config, VGPOConfig):
        _progress(progress)
        return factor_of(group_weights(score, group_ids, config), config.inter_clamp)
    score = checks.require_floating("score", score)
    if score.dim() != 1:
        hint = hints.shape("score", score.shape, score.shape[:1])
        raise ValueError(f"score must have shape [B], got {checks.describe(score)}{hint}")
    batch = score.shape[0]
    values = checks.per_response("score", score, batch, score.device)
    groups = checks.per_response_integers("group_ids", group_ids, batch, score.device, "score")
    settings = checks.settings("config", config, ShapingConfig)
    dtype = checks.compute_dtype(values)
    found = registry.call(
        "response_factors",
        score.device,
        dtype,
        score=values,
        group_ids=groups,
        progress=_progress(progress, settings.schedule),
        config=settings.as_floats(),
    )
    return found.to(dtype)  # type: ignore[no-any-return]


def _signals(signals: object, mask: Tensor, needs: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the signals that are needed by name, checked; others that are given are only looked at."""
    if isinstance(signals, (list, tuple)):
        wanted = ", ".join(f"{name!r}: ..." for name in needs)
        raise TypeError(
            f"signals must be a torch.Tensor, or a mapping of them by name, got {type_name(signals)}; "
            f"name them: {{{wanted}}}"
        )
    named: Mapping[Any, Any] = signals if isinstance(signals, Mapping) else {"visual": signals}
    for name in named:
        if name not in SIGNALS:
            raise ValueError(f"signals must be of {', '.join(SIGNALS)}, got {name!r}{hints.choice(name, SIGNALS)}")
    for name in needs:
        if name not in named or (named[name] is None and isinstance(signals, Mapping)):
            raise ValueError(
                f"signals must hold {' and '.join(map(repr, needs))}, which this config reads; {name!r} is missing"
            )
    spelt = {name: f"signals[{name!r}]" if isinstance(signals, Mapping) else "signals" for name in needs}
    return {name: checks.per_token(spelt[name], named[name], mask) for name in needs}


def _progress(value: object, schedule: str = "none") -> float:
    """Return the progress of training; 1 where it is not given and does not matter."""
    if value is None and schedule == "none":
        return 1.0
    if value is None:
        raise ValueError(
            f"schedule={schedule!r} fades weights in over training: pass progress, such as step / steps (1.0: in full)"
        )
    return checks.share("progress", value)


def _of_visual_weights(
    visual: Tensor,
    mask: Tensor,
    groups: Tensor,
    config: VGPOConfig,
    boundaries: Tensor | None,
    has_visual: Tensor | None,
) -> TokenShaping:
    """VGPO's case of the family."""
    found = visual_weights(visual, mask, groups, config, cu_seqlens=boundaries, has_visual=has_visual)
    weighted = found.score.isfinite()
    response_factor = torch.where(weighted, factor_of(found.phi, config.inter_clamp), 1.0)
    weights = factor_of(found.psi, config.intra_clamp)
    weights = torch.where(mask & spread_to_tokens(weighted, mask, boundaries), weights, 1.0)
    return TokenShaping(found.factors, weights, mask, response_factor, found.score, found.metrics)


def _fake_shaping(visual: Tensor, group_ids: Tensor) -> tuple[Tensor, ...]:
    per_token = [visual.new_empty(visual.shape, dtype=torch.float32) for _ in range(2)]
    selected = visual.new_empty(visual.shape, dtype=torch.bool)
    per_response = [visual.new_empty(group_ids.shape, dtype=torch.float32) for _ in range(2)]
    return *per_token, selected, *per_response, visual.new_empty((len(SHAPING_METRICS),), dtype=torch.float32)


def _fake_factors(score: Tensor) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.float32)


registry.define(
    reference.token_shaping,
    "(Tensor visual, Tensor? entropy, Tensor? gap, Tensor response_mask, Tensor group_ids, Tensor? cu_seqlens, "
    "float progress, float[] config) -> (Tensor factors, Tensor weights, Tensor selected, Tensor response_factor, "
    "Tensor score, Tensor metrics)",
    _fake_shaping,
)
registry.define(
    reference.response_factors,
    "(Tensor score, Tensor group_ids, float progress, float[] config) -> Tensor",
    _fake_factors,
)

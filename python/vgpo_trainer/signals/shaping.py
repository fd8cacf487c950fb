"""Factors of the methods beside VGPO: what ``shape_tokens`` makes of a rollout batch that processes share.

Where a method compares nothing beyond a response, each process shapes its own. Where it compares responses by their
mean signal, these means are gathered, one number each. Where it selects among the tokens of all responses, the signals
are gathered, which are a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from vgpo_kernels import ShapingConfig, TokenShaping, VGPOConfig, response_factors, shape_tokens
from vgpo_trainer.signals import VisualSignal
from vgpo_trainer.signals.factors import Factors, compute_factors, half_ratio


@dataclass(frozen=True)
class ShapedFactors(Factors):
    """What the signals of B responses become; psi and phi are the weights of tokens and of responses, less 1.

    Attributes:
        selected: Tokens that the method selects, bool ``[B, T]``; all scored ones where it selects none, and in
            responses that are not weighted.
    """

    selected: Tensor


def batch_factors(
    signal: VisualSignal,
    response_mask: Tensor,  # [B, T]
    group_ids: Tensor,  # [B]
    config: VGPOConfig | ShapingConfig,
    accelerator: Accelerator,
    progress: float = 1.0,
) -> Factors:
    """Turn the signal of this process's share of a rollout batch into factors, by VGPO or another method.

    Every process must call it. ``progress`` is how far training is, from 0 to 1.
    """
    found, batch = signal.signals(), (response_mask, group_ids)
    gather, place = accelerator.gather, accelerator.process_index
    if isinstance(config, VGPOConfig):
        return compute_factors(found["visual"], *batch, config, gather=gather, process_index=place)
    pad = partial(accelerator.pad_across_processes, dim=1)
    return shaped_factors(found, *batch, config, progress=progress, gather=gather, pad=pad, process_index=place)


def shaped_factors(
    signals: Mapping[str, Tensor],  # [B, T] each
    response_mask: Tensor,  # [B, T]
    group_ids: Tensor,  # [B]
    config: ShapingConfig,
    *,
    progress: float,
    gather: Callable[[Tensor], Tensor],
    pad: Callable[[Tensor], Tensor],
    process_index: int,
) -> ShapedFactors:
    """Turn the signals of this process's share of a rollout batch into factors.

    Args:
        signals: Of :meth:`~vgpo_trainer.signals.VisualSignal.signals`.
        response_mask: True at scored response tokens.
        group_ids: Responses of a group share an id, on all processes.
        config: The settings.
        progress: How far training is, from 0 to 1.
        gather: Concatenates a tensor ``[B, ...]`` of every process, in order; every process must call it.
        pad: Pads a tensor ``[B, T]`` with zeros to the largest T of any process; every process must call it.
        process_index: Which of the gathered shares is this one's.
    """
    batch, length = response_mask.shape
    mask, own = response_mask.bool(), slice(process_index * batch, (process_index + 1) * batch)
    if selects_across(config):
        # Padding has no image: its signal is not read, as it is off the mask.
        together = {name: gather(pad(value)) for name, value in signals.items()}
        everywhere = gather(pad(mask.long())).bool()
        found = shape_tokens(together, everywhere, gather(group_ids), config, progress=progress)
        shaping = _rows(found, own, length)
        factors, response_factor = shaping.factors, shaping.response_factor
    else:
        shaping = shape_tokens(dict(signals), mask, group_ids, config, progress=progress)
        factors, response_factor = shaping.factors, shaping.response_factor
        if config.response != "none":
            scores, groups = gather(shaping.score), gather(group_ids)
            response_factor = response_factors(scores, groups, config, progress=progress)[own]
            factors = torch.where(mask, shaping.weights * response_factor[:, None], 1.0)

    visual = signals["visual"]
    seen, weighted = mask & ~visual.isnan(), shaping.score.isfinite()
    counted = seen & weighted[:, None]
    return ShapedFactors(
        psi=shaping.weights - 1,
        phi=response_factor - 1,
        factors=factors,
        weighted=weighted,
        counted=counted,
        late_early=half_ratio(visual, mask, counted),
        nonfinite=(seen.any(dim=1) & ~weighted).sum(),
        selected=shaping.selected,
    )


def selects_across(config: ShapingConfig) -> bool:
    """Whether tokens of several responses are compared, or which tokens have a response's factor depends on such."""
    selects = config.top_visual is not None or config.top_entropy is not None
    return (selects and config.scope != "response") or config.response_on == "visual"


def expected_selection(counted: Tensor, response_mask: Tensor, config: ShapingConfig) -> Tensor:
    """Return how many tokens of each response will be selected, int64 ``[B]``, before there is a signal.

    That depends on how many are counted and on nothing else, while signals are finite.

    Args:
        counted: True at scored tokens that have seen an image, ``[B, T]``.
        response_mask: True at scored tokens, ``[B, T]``.
        config: Settings that select within a response.
    """
    flat = torch.zeros(counted.shape, dtype=torch.float32, device=counted.device)
    signals = {**dict.fromkeys(config.needs(), flat), "visual": flat.masked_fill(~counted, torch.nan)}
    groups = torch.arange(counted.shape[0], device=counted.device)
    return shape_tokens(signals, response_mask, groups, config, progress=1.0).selected.sum(dim=1)


def _rows(shaping: TokenShaping, rows: slice, length: int) -> TokenShaping:
    """Return what was found for some responses, without the padding behind ``length``."""
    per_token = (value[rows, :length] for value in (shaping.factors, shaping.weights, shaping.selected))
    return TokenShaping(*per_token, shaping.response_factor[rows], shaping.score[rows], shaping.metrics)

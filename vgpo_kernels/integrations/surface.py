"""Shared by the adapters to other codebases: checks of the functions they attach to, settings, re-weighting."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import (
    Finding,
    ShapingConfig,
    VGPOConfig,
    backends,
    check_batch,
    checks,
    combine_factors,
    group_weights,
    shape_tokens,
    visual_weights,
)

# The releases that the adapters were tested with; `vgpo doctor` prints them beside those installed.
TESTED = {
    "torch": "2.8 to 2.15",
    "transformers": "5.17 to 5.24",
    "trl": "1.16",
    "deepspeed": "0.19",
    "verl": "0.9",
    "EasyR1": "0.3.2 and main of July 2026",
}


class UnknownSurfaceError(RuntimeError):
    """A framework no longer has the functions that an adapter attaches to."""


def known(name: str) -> str:
    """Return the releases of a framework that its adapter was tested with, in words."""
    return f"{name} {TESTED[name]}"


def require(owner: Any, name: str, parameters: Sequence[str], known: str) -> Callable[..., Any]:
    """Return the function ``owner.name``, after checking that it takes ``parameters``.

    Args:
        owner: The module or class.
        name: The function.
        parameters: Names of parameters that the adapter relies on.
        known: The versions that the adapter was written for, for the message.

    Raises:
        UnknownSurfaceError: The function does not exist, or does not take these parameters.

    """
    place = f"{getattr(owner, '__module__', '')}.{owner.__name__}".lstrip(".")
    function = getattr(owner, name, None)
    if not callable(function):
        raise UnknownSurfaceError(f"{place} has no {name}: this adapter knows {known}")
    found = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in found]
    if missing:
        raise UnknownSurfaceError(
            f"{place}.{name} takes ({', '.join(found)}), not {', '.join(missing)}: this adapter knows {known}"
        )
    return function  # type: ignore[no-any-return]


def config_from(settings: Mapping[str, Any]) -> VGPOConfig:
    """Build a :class:`VGPOConfig` from a mapping of its fields and ``preset`` (``"paper"`` unless given).

    A clamp is a list of two numbers; ``None`` or an empty list removes the preset's.

    Raises:
        TypeError: ``settings`` is no mapping, or a value has the wrong type.
        ValueError: The preset or a field is unknown, or a value is out of range.

    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping, got {type(settings).__name__}")
    changes = {name: _range(value) if name.endswith("_clamp") else value for name, value in settings.items()}
    preset = changes.pop("preset", "paper")
    if preset not in ("paper", "released"):
        raise ValueError(f"preset must be paper or released, got {preset!r}")
    unknown = set(changes) - set(VGPOConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown VGPO settings: {', '.join(sorted(unknown))}")
    return getattr(VGPOConfig, preset)(**changes)  # type: ignore[no-any-return]


def _range(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value) or None
    return value


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``values`` where the bool ``mask`` is True, whatever they are elsewhere; 0 if it is True nowhere."""
    return torch.where(mask, values, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def group_numbers(prompts: Any, device: torch.device, called: str = "prompts") -> Tensor:
    """Return group ids ``[B]``, int64, from the name of each response's prompt: equal ids for equal names.

    Args:
        prompts: B integers or strings: a list or tuple, or a tensor or array of one dimension.
        device: Where the ids are wanted.
        called: What messages call the prompts.

    Raises:
        TypeError: ``prompts`` is none of these, or a name is neither an integer nor a string.
        ValueError: A tensor or array has another number of dimensions.

    """
    names = checks.require_tensor(called, prompts) if isinstance(prompts, Tensor) else prompts
    if hasattr(prompts, "tolist"):  # a tensor's elements are tensors, which are equal to themselves alone
        if len(prompts.shape) != 1:
            raise ValueError(f"{called} must have one dimension, a name per response, got shape {list(prompts.shape)}")
        names = prompts.tolist()
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)):
        raise TypeError(f"{called} must be a list, a tensor or an array of names, got {type(prompts).__name__}")
    numbers: dict[Any, int] = {}
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, Integral)):
            raise TypeError(f"{called} must be integers or strings, got {type(name).__name__}")
        numbers.setdefault(name, len(numbers))
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64, device=device)


def look_at_first_batch(where: str, *, response_mask: Tensor, cos: Tensor | None = None, **arguments: Any) -> None:
    """Warn of what :func:`vgpo_kernels.check_batch` finds in the first batch of a run.

    Args:
        where: What warnings begin with.
        response_mask: The scored tokens, ``[B, T]`` or ``[N]``.
        cos: Cosines of :func:`visual_focus` where masks of images are not at hand, in the same shape: NaN says that no
            image was seen.
        **arguments: The others of :func:`check_batch`, by name; what is not given is not looked at.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    names = ("model_or_head", "hidden", "ids", "logp", "old_logp", "advantages", "visual_mask", "group_ids")
    given: dict[str, Any] = dict.fromkeys(names) | arguments
    findings = list(check_batch(**given, response_mask=response_mask))
    mask = response_mask.bool()
    if cos is not None and bool(mask.any()) and bool(cos[mask].isnan().all()):
        findings.append(Finding("no-image", "no scored token has a visual focus: no response has an image"))
    for finding in findings:
        warnings.warn(f"{where}: {finding.name}: {finding.message}", stacklevel=3)


def reweight(
    advantages: Tensor,
    cos: Tensor,
    response_mask: Tensor,
    prompts: Any,
    config: VGPOConfig,
    cu_seqlens: Tensor | None = None,
    finals: Sequence[int] | None = None,
    look: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Multiply advantages by VGPO's factors (paper, Eq. 11), over a whole rollout batch.

    A response keeps its advantages if it sees no image, has no scored token or a broken cosine (not finite, or beyond
    +-1024).

    Args:
        advantages: Per token, ``[B, T]`` or packed ``[N]``.
        cos: Cosines of :func:`visual_focus`, in the same shape, NaN where no image was seen yet. Not read off the mask.
        response_mask: The scored tokens, in the same shape.
        prompts: Name of each response's prompt, B integers or strings: a list, or a tensor or array of one dimension.
        config: The settings.
        cu_seqlens: Boundaries of a packed batch.
        finals: Where sessions of an agent leave several responses: for each response, which one ends its session, as
            places in the batch. Groups compare the last responses of sessions, and all responses of a session have the
            phi of its last one.
        look: Warn of what :func:`vgpo_kernels.check_batch` finds: for the first batch of a run.

    Returns:
        The new advantages, and the focus metrics by name, as ``vgpo/...``, with the mean, least and largest factor of
        the scored tokens and the share of the responses that are weighted, of those that are scored; without those that
        are NaN, means of nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    mask, boundaries, groups = _rollout_batch(advantages, {"cos": cos}, response_mask, prompts, cu_seqlens, look)
    weights = visual_weights(cos.float(), mask, groups, config, cu_seqlens=boundaries)
    factors, found = weights.factors, dict(weights.metrics)
    if finals is not None and list(finals) != list(range(len(groups))):
        phi, compared = _of_sessions(weights.score, groups, torch.tensor(finals, device=cos.device), config)
        weighted = weights.score.isfinite()
        factors = combine_factors(weights.psi, phi, mask, config, cu_seqlens=boundaries, weighted=weighted)
        found |= compared
    found |= _of_factors(factors, mask)
    found["weighted_share"] = found["weighted_responses"] / _scored_responses(mask, boundaries)
    return advantages * factors.to(advantages.dtype), _numbers(found)


def shape(
    advantages: Tensor,
    signals: Mapping[str, Tensor],
    response_mask: Tensor,
    prompts: Any,
    config: ShapingConfig,
    *,
    progress: float,
    over_selected: bool = False,
    cu_seqlens: Tensor | None = None,
    look: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Multiply advantages by the factors of a method beside VGPO, over a whole rollout batch.

    Args:
        advantages: Per token, ``[B, T]`` or packed ``[N]``.
        signals: As in :func:`vgpo_kernels.shape_tokens`, each in the same shape.
        response_mask: The scored tokens, in the same shape.
        prompts: Name of each response's prompt, as in :func:`reweight`.
        config: The settings.
        progress: How far training is, from 0 to 1.
        over_selected: The method's loss is the mean over selected tokens, and the loss that follows is the mean over
            all: factors of selected tokens are multiplied by all tokens per selected one, and others are 0.
        cu_seqlens: Boundaries of a packed batch.
        look: As in :func:`reweight`.

    Returns:
        The new advantages, and metrics by name, as ``vgpo/...``: those of :func:`vgpo_kernels.shape_tokens`, with the
        mean, least and largest factor of the scored tokens; without those that are NaN, means of nothing.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together, or a signal is missing.

    """
    mask, boundaries, groups = _rollout_batch(advantages, signals, response_mask, prompts, cu_seqlens, look)
    shaping = shape_tokens(signals, mask, groups, config, cu_seqlens=boundaries, progress=progress)
    factors = shaping.factors
    if over_selected:
        ratio = mask.sum() / shaping.selected.sum().clamp(min=1)
        factors = torch.where(shaping.selected, factors * ratio, torch.where(mask, 0.0, factors))
    found = dict(shaping.metrics) | _of_factors(factors, mask)
    return advantages * factors.to(advantages.dtype), _numbers(found)


def _rollout_batch(
    advantages: Tensor,
    signals: Mapping[str, Tensor],
    response_mask: Tensor,
    prompts: Any,
    cu_seqlens: Tensor | None,
    look: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Check a rollout batch; return its bool mask, its boundaries and its group ids ``[B]``. The first signal is shown.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    mask, boundaries = checks.response_layout(checks.require_tensor("response_mask", response_mask).bool(), cu_seqlens)
    for name, value in {"advantages": advantages, **signals}.items():
        checks.per_token(name, value, mask)
    groups = group_numbers(prompts, mask.device)
    if len(groups) != checks.batch_size(mask, boundaries):
        raise ValueError(f"prompts must name {checks.batch_size(mask, boundaries)} responses, got {len(groups)}")
    if look:
        batch = {"advantages": advantages, "group_ids": groups, "cu_seqlens": boundaries}
        look_at_first_batch("VGPO's first batch", response_mask=mask, cos=next(iter(signals.values())), **batch)
    return mask, boundaries, groups


def _numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Return metrics as numbers, as ``vgpo/...``, without those that are NaN."""
    values = torch.stack([value.float() for value in found.values()]).tolist()  # the host waits once
    numbers = zip(found, values, strict=True)
    return {f"vgpo/{name}": value for name, value in numbers if not math.isnan(value)}


def _of_sessions(score: Tensor, groups: Tensor, finals: Tensor, config: VGPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return phi of each response, that of its session's last one, and the metrics of groups of last ones."""
    last = torch.unique(finals)
    if config.score == "offset":
        # All scores are of one batch, and so of one offset, which phi does not read.
        config = replace(config, score_offset=0.0)
    phi = torch.zeros_like(score)
    phi[last] = group_weights(score[last], groups[last], config)
    sizes = torch.unique(groups[last][score[last].isfinite()], return_counts=True)[1]
    return phi[finals], {"groups": (sizes > 0).sum(), "singleton_groups": (sizes == 1).sum()}


def _of_factors(factors: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Mean, least and largest of the scored tokens' factors; NaN of none. Factors are 1 at all others."""
    tokens = mask.sum()
    mean = torch.where(mask, factors, 0.0).sum(dtype=backends.wide_dtype(factors.device)) / tokens
    if not mask.numel():
        return {"factor_mean": mean}
    least, largest = (torch.where(mask, factors, far) for far in (math.inf, -math.inf))
    none = torch.where(tokens > 0, 0.0, math.nan)
    return {"factor_mean": mean, "factor_min": least.min() + none, "factor_max": largest.max() + none}


def _scored_responses(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Count the responses that have a scored token."""
    if cu_seqlens is None:
        return mask.any(-1).sum()
    before = torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))[cu_seqlens.long()]
    return (before.diff() > 0).sum()

"""Shared by the adapters to other codebases: checks of the functions they attach to, settings, re-weighting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig, checks, visual_weights

# The releases that the adapters were tested with; `vgpo doctor` prints them beside those installed.
TESTED = {
    "torch": "2.8 to 2.15",
    "transformers": "5.17 to 5.24",
    "trl": "1.16",
    "verl": "0.9",
    "EasyR1": "0.3",
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

    Raises:
        TypeError: ``settings`` is no mapping, or a value has the wrong type.
        ValueError: The preset or a field is unknown, or a value is out of range.

    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping, got {type(settings).__name__}")
    changes = {name: tuple(value) if name.endswith("_clamp") and value else value for name, value in settings.items()}
    preset = changes.pop("preset", "paper")
    if preset not in ("paper", "released"):
        raise ValueError(f"preset must be paper or released, got {preset!r}")
    unknown = set(changes) - set(VGPOConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown VGPO settings: {', '.join(sorted(unknown))}")
    return getattr(VGPOConfig, preset)(**changes)  # type: ignore[no-any-return]


def group_numbers(names: Sequence[Any], device: torch.device) -> Tensor:
    """Return group ids ``[B]`` from the name of each response's prompt: equal ids for equal names."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64, device=device)


def reweight(
    advantages: Tensor,
    cos: Tensor,
    response_mask: Tensor,
    prompts: Sequence[Any],
    config: VGPOConfig,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Multiply advantages by VGPO's factors (paper, Eq. 11), over a whole rollout batch.

    A response keeps its advantages if it sees no image, has no scored token or a cosine that is not finite.

    Args:
        advantages: Per token, ``[B, T]`` or packed ``[N]``.
        cos: Cosines of :func:`visual_focus`, in the same shape, NaN where no image was seen yet. Not read off the mask.
        response_mask: The scored tokens, in the same shape.
        prompts: Name of each response's prompt, B of them.
        config: The settings.
        cu_seqlens: Boundaries of a packed batch.

    Returns:
        The new advantages, and the focus metrics by name, as ``vgpo/...``.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or boundaries do not fit together.

    """
    mask, boundaries = checks.response_layout(checks.require_tensor("response_mask", response_mask).bool(), cu_seqlens)
    for name, value in (("advantages", advantages), ("cos", cos)):
        checks.per_token(name, value, mask)
    if len(prompts) != checks.batch_size(mask, boundaries):
        raise ValueError(f"prompts must name {checks.batch_size(mask, boundaries)} responses, got {len(prompts)}")
    groups = group_numbers(prompts, cos.device)
    weights = visual_weights(cos.float(), mask, groups, config, cu_seqlens=boundaries)
    metrics = {f"vgpo/{name}": value.item() for name, value in weights.metrics.items()}
    return advantages * weights.factors.to(advantages.dtype), metrics

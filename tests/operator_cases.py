"""Arguments of operators by name, for tests that call operators past their public functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cases import Batch
from torch import Tensor

from vgpo_kernels import PolicyLossOptions, ShapingConfig, VGPOConfig
from vgpo_kernels.config import Bounds, Choice, Flag, Kind, Number
from vgpo_kernels.ops import registry
from vgpo_kernels.ops.policy_loss import NEEDS

SHAPING_OPERATORS = ("token_shaping", "response_factors")
BATCH_OPERATORS = (
    *("visual_prototype", "visual_focus", "visual_weights", "group_weights", "policy_loss", "vgpo_loss"),
    *SHAPING_OPERATORS,
)
CONFIG = VGPOConfig.paper().as_floats()
# Of all signals and of responses among each other.
SHAPING = ShapingConfig.vepo(weight="softmax", entropy_gate=0.5, response="median_mad", schedule="linear")
OPTIONS = PolicyLossOptions(max_length=32).as_floats()


def schema_order(operator: str, **given: Any) -> dict[str, Any]:
    """Return every argument of an operator by name, in the schema's order: those given, and ``None`` for the rest.

    Names of other operators' arguments are passed over, so that several operators may share what is given.
    """
    known = {name for definition in registry.OPERATORS.values() for name in definition.arguments}
    assert given.keys() <= known, f"no operator has the arguments {given.keys() - known}"
    return {name: given.get(name) for name in registry.OPERATORS[operator].arguments}


def operator_arguments(operator: str, batch: Batch, **given: Any) -> dict[str, Any]:
    """Return the arguments of an operator on a batch, as its public function would pass them, and ``given`` ones."""
    mask = batch.response_mask
    generator = torch.Generator().manual_seed(11)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like.device)

    of_batch = {
        "hidden": batch.hidden.nan_to_num(),
        "visual_mask": batch.visual_mask,
        "response_mask": mask,
        "group_ids": batch.group_ids,
        "has_visual": batch.has_visual,
        "cu_seqlens": None if batch.cu_seqlens is None else batch.cu_seqlens.long(),
        "logp": batch.logp.nan_to_num().requires_grad_(),
        "old_logp": batch.old_logp.nan_to_num(),
        "ref_logp": batch.ref_logp.nan_to_num(),
        "entropy": batch.entropy.nan_to_num().requires_grad_(),
        "advantages": batch.advantages,
        "cos": torch.where(mask, uniform(mask), 0.0),
        "factors": uniform(mask),
        "score": uniform(batch.group_ids),
        "config": CONFIG,
        "options": OPTIONS,
        "causal": False,
        "unit": False,
    }
    if operator in SHAPING_OPERATORS:
        signals = {name: uniform(mask) for name in ("visual", "entropy", "gap")}
        of_batch |= signals | {"progress": 0.5, "config": SHAPING.as_floats()}
    return schema_order(operator, **(of_batch | given))


def computed_metrics(names: tuple[str, ...], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return those of the metrics that a loss has with the given keyword arguments."""
    absent = {name for name, tensor in NEEDS.items() if given.get(tensor) is None}
    return tuple(name for name in names if name not in absent)


def field_kind(kind: Kind) -> str:
    """Return what C++ calls a kind of field (csrc/settings.h)."""
    if isinstance(kind, Number):
        return "ratio" if kind.expected.startswith("in") else "optional" if kind.none is not None else "number"
    return {Flag: "flag", Choice: "code", Bounds: "bounds"}[type(kind)]

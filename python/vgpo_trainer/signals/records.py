"""What is logged of the visual signal of a batch."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from vgpo_trainer.signals.factors import SignalFactors


def signal_records(shown: Tensor, found: SignalFactors, accelerator: Accelerator) -> dict[str, float]:
    """Return statistics of a signal over all processes, each of which must call this; NaN of nothing.

    Args:
        shown: The signal as it is logged, ``[B, T]``.
        found: What it became. Means are over its counted tokens and its weighted responses.
        accelerator: Of the trainer.
    """
    halves = found.late_early.isfinite()
    psi, phi = found.psi[found.counted], found.phi[found.weighted]
    sums = {
        "batch": torch.full((), len(found.weighted), device=shown.device),
        "responses": found.weighted.sum(),
        "tokens": found.counted.sum(),
        "ratios": halves.sum(),
        "shown": shown[found.counted].sum(),
        "gated": found.gate_rate * found.counted.sum(),
        "late_early": found.late_early[halves].sum(),
        "psi": psi.sum(),
        "psi_square": psi.square().sum(),
        "phi": phi.sum(),
        "phi_square": phi.square().sum(),
        "nonfinite": found.nonfinite,
    }
    reduced = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), reduction="sum")
    total = dict(zip(sums, reduced.tolist(), strict=True))
    groups, singleton_groups = torch.stack([found.groups, found.singleton_groups]).tolist()
    return {
        "visual_focus": mean(total["shown"], total["tokens"]),
        "gate_rate": mean(total["gated"], total["tokens"]),
        "late_early_ratio": mean(total["late_early"], total["ratios"]),
        "psi_std": standard_deviation(total["psi"], total["psi_square"], total["tokens"]),
        "phi_std": standard_deviation(total["phi"], total["phi_square"], total["responses"]),
        "weighted_share": mean(total["responses"], total["batch"]),
        "nonfinite_responses": total["nonfinite"],
        "groups": groups,
        "singleton_groups": singleton_groups,
    }


def mean(total: float, count: float) -> float:
    """A mean from a sum; NaN of nothing."""
    return total / count if count else float("nan")


def standard_deviation(total: float, squares: float, count: float) -> float:
    """Population standard deviation from the sums of values and of their squares; NaN of nothing."""
    if count == 0:
        return float("nan")
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5

"""The ``vgpo/`` part of a log record: each number is of all that happened since the record before."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from vgpo_trainer.signals.factors import Factors, SignalFactors
from vgpo_trainer.signals.shaping import ShapedFactors


class Statistic(NamedTuple):
    """What a batch adds to a logged number.

    Attributes:
        value: The number, from the parts of all batches.
        parts: What it is made of, such as a sum and how many were summed.
        combine: Joins a part of two batches.
    """

    value: Callable[..., float]
    parts: tuple[float, ...]
    combine: Callable[[float, float], float] = operator.add


class Running(list[float]):
    """A logged number, in a list that holds nothing else: TRL averages what a list holds, and drops it once logged."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: tuple[float, ...] = ()

    def add(self, batch: Statistic) -> None:
        """Bring the number up to date with one more batch."""
        self._parts = tuple(map(batch.combine, self._parts, batch.parts)) if self._parts else batch.parts
        self[:] = [batch.value(*self._parts)]


def add_records(kept: dict[str, list[float]], batch: Mapping[str, Statistic]) -> None:
    """Add a batch to the numbers that TRL keeps until it logs, under names with ``vgpo/``."""
    for name, statistic in batch.items():
        running = kept.setdefault(f"vgpo/{name}", Running())
        assert isinstance(running, Running)
        running.add(statistic)


def signal_records(
    shown: Tensor, found: Factors, accelerator: Accelerator, groups: bool = True
) -> dict[str, Statistic]:
    """Return statistics of a signal over all processes, each of which must call this; NaN of nothing.

    Args:
        shown: The signal as it is logged, ``[B, T]``.
        found: What it became. Means are over its counted tokens and its weighted responses.
        accelerator: Of the trainer.
        groups: Whether groups are compared. Where they are not, a batch may hold parts of them, which are not counted.
    """
    halves = found.late_early.isfinite()
    psi, phi = found.psi[found.counted], found.phi[found.weighted]
    sums = {
        "batch": torch.full((), len(found.weighted), device=shown.device),
        "responses": found.weighted.sum(),
        "tokens": found.counted.sum(),
        "ratios": halves.sum(),
        "shown": shown[found.counted].sum(),
        "chosen": chosen(found),
        "late_early": found.late_early[halves].sum(),
        "psi": psi.sum(),
        "psi_square": psi.square().sum(),
        "phi": phi.sum(),
        "phi_square": phi.square().sum(),
        "nonfinite": found.nonfinite,
    }
    reduced = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), reduction="sum")
    total = dict(zip(sums, reduced.tolist(), strict=True))
    ours = isinstance(found, SignalFactors)
    names = ("gate_rate", "psi_std", "phi_std") if ours else ("selected_rate", "weight_std", "response_factor_std")
    records = {
        "visual_focus": Statistic(mean, (total["shown"], total["tokens"])),
        names[0]: Statistic(mean, (total["chosen"], total["tokens"])),
        "late_early_ratio": Statistic(mean, (total["late_early"], total["ratios"])),
        names[1]: Statistic(standard_deviation, (total["psi"], total["psi_square"], total["tokens"])),
        names[2]: Statistic(standard_deviation, (total["phi"], total["phi_square"], total["responses"])),
        "weighted_share": Statistic(mean, (total["responses"], total["batch"])),
        "nonfinite_responses": Statistic(float, (total["nonfinite"],)),
    }
    if groups and isinstance(found, SignalFactors):
        counts = (found.groups, found.singleton_groups, found.phi_length)
        number, alone, follows = torch.stack([count.to(found.phi_length) for count in counts]).tolist()
        records["groups"] = Statistic(float, (number,))
        records["singleton_groups"] = Statistic(float, (alone,))
        there = math.isfinite(follows)
        records["phi_length_corr"] = Statistic(mean, (follows if there else 0.0, float(there)))
    return records


def chosen(found: Factors) -> Tensor:
    """How many of the counted tokens VGPO's gate lets through, or another method selects."""
    if isinstance(found, ShapedFactors):
        return (found.selected & found.counted).sum()
    assert isinstance(found, SignalFactors)
    return found.gate_rate.nan_to_num() * found.counted.sum()  # NaN where nothing is counted


class PhiLengthWatch:
    """Warns once where phi keeps following the length of responses.

    Args:
        high: Rank correlation from which phi counts as a matter of length.
        patience: Batches in a row that have to reach it.
    """

    def __init__(self, high: float = 0.7, patience: int = 10) -> None:
        self._high, self._patience = high, patience
        self._seen: list[float] = []

    def see(self, records: Mapping[str, Statistic]) -> None:
        """Look at the records of one more batch; one in which nothing varies says nothing."""
        if "phi_length_corr" not in records or len(self._seen) == self._patience:
            return
        correlation, there = records["phi_length_corr"].parts
        if not there:
            return
        self._seen = [*self._seen, correlation] if correlation >= self._high else []
        if len(self._seen) == self._patience:
            warnings.warn(
                f"phi follows the length of responses: over the last {self._patience} batches its rank correlation "
                f"with length within a group was {sum(self._seen) / self._patience:.2f} (vgpo/phi_length_corr). What a "
                "response accumulates grows with its tokens. vgpo_accumulation='mean' compares means instead of sums, "
                "and vgpo_inter=False leaves phi out; whether either trains better is not known beforehand: vgpo probe "
                "shows what phi follows for a model",
                stacklevel=2,
            )


def loss_records(metrics: Mapping[str, Tensor], accelerator: Accelerator, factors: bool) -> dict[str, Statistic]:
    """Return statistics of a loss over all processes, each of which must call this; NaN of no token.

    Args:
        metrics: Of :func:`vgpo_kernels.policy_loss`.
        accelerator: Of the trainer.
        factors: Whether advantages were multiplied by any.
    """
    number = metrics["num_tokens"].float()
    nothing = number == 0
    local = [
        number,
        metrics["approx_kl"] * number,
        metrics["factor_mean"] * number,
        metrics["nonfinite_advantages"],
        metrics["factor_min"].masked_fill(nothing, math.inf),
        metrics["factor_max"].masked_fill(nothing, -math.inf),
    ]
    gathered = accelerator.gather(torch.stack([value.float() for value in local])[None])
    tokens, kl, total, nonfinite = gathered[:, :4].sum(dim=0).tolist()
    smallest, largest = gathered[:, 4].min().item(), gathered[:, 5].max().item()
    records = {
        "old_policy_kl": Statistic(mean, (kl, tokens)),
        "nonfinite_advantages": Statistic(float, (nonfinite,)),
    }
    if factors:
        records["factor_mean"] = Statistic(mean, (total, tokens))
        records["factor_min"] = Statistic(extreme, (smallest,), min)
        records["factor_max"] = Statistic(extreme, (largest,), max)
    return records


def token_records(values: Mapping[str, Tensor], counted: Tensor, accelerator: Accelerator) -> dict[str, Statistic]:
    """Return means of numbers ``[B, T]`` over the counted tokens of all processes, each of which must call this."""
    sums = [value[counted].sum().float() for value in values.values()]
    *totals, tokens = accelerator.reduce(torch.stack([*sums, counted.sum().float()]), reduction="sum").tolist()
    return {name: Statistic(mean, (total, tokens)) for name, total in zip(values, totals, strict=True)}


def mean(total: float, count: float) -> float:
    """A mean from a sum; NaN of nothing."""
    return total / count if count else math.nan


def standard_deviation(total: float, squares: float, count: float) -> float:
    """Population standard deviation from the sums of values and of their squares; NaN of nothing."""
    if count == 0:
        return math.nan
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


def extreme(value: float) -> float:
    """A smallest or largest value; NaN of nothing, whose smallest value is infinite."""
    return value if math.isfinite(value) else math.nan

"""What GRPOTrainer logs of an update of the policy: the same numbers under the same names, for a loss of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from vgpo_trainer.trl_surface import LOSS_TYPES, VESPO_SETTINGS

Sum = tuple[Tensor, Tensor]  # of some numbers, and how many they are


def policy_records(
    trainer: GRPOTrainer,
    inputs: Mapping[str, Any],
    logp: Tensor,  # [B, T]
    old_logp: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    metrics: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return TRL's metrics of a policy loss, over all processes, by TRL's names.

    Args:
        trainer: Its settings say what is logged; every process must call this.
        inputs: TRL's batch.
        logp: Log-probabilities of the completion tokens.
        old_logp: The same under the policy that generated them.
        mask: True at scored tokens.
        metrics: Of :func:`vgpo_kernels.policy_loss`.

    """
    number = metrics["num_tokens"]
    sums = {"entropy": (metrics["entropy"] * number, number)}
    if trainer.beta != 0.0:
        sums["kl"] = (metrics["ref_kl"] * number, number)
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = logp.detach() - old_logp
    if trainer.loss_type == "vespo":
        phi = trainer.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=log_ratio,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            **{name.removeprefix("vespo_"): getattr(trainer.args, name) for name in VESPO_SETTINGS},
        )
        sums["vespo/phi_seq_mean"] = summed(phi, mask)
    low, high = clipped(trainer, log_ratio, advantages, mask)
    if trainer.loss_type == "cispo":
        sums["cispo_clip_ratio"] = summed(high, mask)
    records = {}
    if LOSS_TYPES[trainer.loss_type].clipped:
        sums["clip_ratio/low_mean"] = summed(low, mask)
        sums["clip_ratio/high_mean"] = summed(high, mask)
        sums["clip_ratio/region_mean"] = summed(low | high, mask)
        shares = torch.stack([share_of_response(low, mask), share_of_response(high, mask)], dim=1)
        of_low, of_high = trainer.accelerator.gather(shares).T.tolist()
        # A response without a scored token has no share.
        records["clip_ratio/low_min"] = min((share for share in of_low if share == share), default=math.nan)
        records["clip_ratio/high_max"] = max((share for share in of_high if share == share), default=math.nan)
    return records | means_over_processes(trainer, sums)


def clipped(trainer: GRPOTrainer, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the ratio is clipped from below and from above: of tokens ``[B, T]``, or of responses ``[B, 1]``.

    Factors are positive, so the advantages that they multiply tell which side counts.
    """
    if trainer.importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    cap = trainer.epsilon_high if trainer.loss_type == "cispo" else 1 + trainer.epsilon_high
    return (ratio < 1 - trainer.epsilon_low) & (advantages < 0), (ratio > cap) & (advantages > 0)


def summed(values: Tensor, mask: Tensor) -> Sum:
    """Return the sum and the number of values: of scored tokens ``[B, T]``, or one of each response ``[B, 1]``."""
    if values.shape[1] == 1:
        return values.float().sum(), mask.new_tensor(values.shape[0], dtype=torch.float32)
    return torch.where(mask.bool(), values.float(), 0.0).sum(), mask.sum().float()


def share_of_response(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each response's values, ``[B]``; NaN without a scored token."""
    if values.shape[1] == 1:
        return values[:, 0].float()
    return torch.where(mask.bool(), values.float(), 0.0).sum(-1) / mask.sum(-1)


def means_over_processes(trainer: GRPOTrainer, sums: Mapping[str, Sum]) -> dict[str, float]:
    """Return the mean of each set of numbers over all processes; 0 of none. Every process must call it."""
    local = torch.stack([torch.stack([total, number.to(total.dtype)]) for total, number in sums.values()])
    totals, numbers = trainer.accelerator.reduce(local, reduction="sum").T
    return dict(zip(sums, (totals / numbers.clamp(min=1)).tolist(), strict=True))

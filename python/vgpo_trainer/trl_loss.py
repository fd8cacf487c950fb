"""How TRL computes its loss: its settings by the names of ``policy_loss``, its denominators, masks and corrections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from vgpo_trainer.trl_surface import LOSS_TYPES, VESPO_SETTINGS


def loss_options(trainer: GRPOTrainer) -> dict[str, Any]:
    """Options of policy_loss that spell TRL's loss."""
    loss_type = trainer.loss_type
    if LOSS_TYPES[loss_type].clipped:  # they differ by their aggregation, which is given
        loss_type = "gspo" if trainer.importance_sampling_level == "sequence" else "grpo"
    return {
        "loss_type": loss_type,
        "aggregation": LOSS_TYPES[trainer.loss_type].aggregation,
        "epsilon_low": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "dual_clip": trainer.args.delta if LOSS_TYPES[trainer.loss_type].clipped else None,
        "cispo_cap": trainer.epsilon_high if trainer.loss_type == "cispo" else None,
        "sapo_temperature_positive": trainer.args.sapo_temperature_pos,
        "sapo_temperature_negative": trainer.args.sapo_temperature_neg,
        **{name: getattr(trainer.args, name) for name in VESPO_SETTINGS},
        "kl_coef": trainer.beta,
        "kl_estimator": "k3",
        "kl_bias_correction": trainer.args.use_bias_correction_kl,
        "ratio_clamp": None,
    }


def denominators(
    trainer: GRPOTrainer, inputs: Mapping[str, Any], mask: Tensor, mode: str, selected: Tensor | None = None
) -> dict[str, Any]:
    """Denominators of TRL's normalisation, so that the sum over micro-batches and processes is the batch's loss.

    Where tokens ``[B, T]`` are selected, that of the surrogate counts them alone: those of this micro-batch where TRL
    counts its tokens, and those of the generation batch, ``selected_in_batch``, where TRL counts these.
    """
    accumulated = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    average_over = LOSS_TYPES[trainer.loss_type].average_over
    if average_over == "generation batch":
        # The count spans the generation batches of all processes; gradients are averaged over processes.
        counts = {"num_tokens": inputs["num_items_in_batch"]}
        if selected is not None:
            counts["num_selected"] = inputs["selected_in_batch"]
        share = accumulated / trainer.args.steps_per_generation if mode == "train" else 1
        processes = trainer.accelerator.num_processes
        return {name: count.clamp(min=1) / processes * share for name, count in counts.items()}
    if average_over == "tokens":
        counts = {"num_tokens": mask.sum()} | ({} if selected is None else {"num_selected": selected.sum()})
        return {name: count.clamp(min=1) * accumulated for name, count in counts.items()}
    return {"num_sequences": mask.shape[0] * accumulated, "max_length": trainer.max_completion_length}


def importance_weights(
    trainer: GRPOTrainer,
    inputs: Mapping[str, Any],
    logp: Tensor,  # [B, T]
    old_logp: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    entropy_mask: Tensor | None,  # [B, T]
) -> tuple[Tensor, Tensor | None]:
    """Advantages, and what multiplies the surrogate, ``[B, T]``: correction of vLLM's mismatch, and TRL's masks.

    In vespo a correction belongs to the ratio of the response, so that the masks multiply the advantages.
    """
    advantages, ratio = inputs["advantages"], inputs.get("importance_sampling_ratio")
    weights = None
    if trainer.off_policy_mask_threshold is not None:
        weights = trainer.get_off_policy_mask(
            advantages=inputs["advantages"][:, None],
            per_token_logps=logp,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logp),
            mask=mask,
            off_policy_threshold=trainer.off_policy_mask_threshold,
        ).float()
    in_ratio = trainer.loss_type == "vespo"
    for factor in (entropy_mask, None if in_ratio else ratio):
        if factor is not None:
            weights = factor.float() if weights is None else weights * factor.float()
    if in_ratio:
        return advantages if weights is None else advantages[:, None] * weights.expand(mask.shape), ratio
    return advantages, None if weights is None else weights.expand(mask.shape)

"""This library's policy losses under verl's registry, with verl's signature."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import policy_loss
from vgpo_kernels.integrations.surface import known, masked_mean, require

KNOWN = known("verl")

# loss_mode in verl's configuration: what it means here, and the bound that verl puts on the log-ratio.
LOSS_MODES: dict[str, dict[str, Any]] = {
    "vgpo": {"loss_type": "grpo", "ratio_clamp": 20.0},
    "vgpo_gspo": {"loss_type": "gspo_token", "ratio_clamp": 10.0},
    "vgpo_cispo": {"loss_type": "cispo", "ratio_clamp": 20.0},
    "vgpo_sapo": {"loss_type": "sapo", "ratio_clamp": 20.0},
}

# Whether a trainer has said that it re-weights the advantages that this process is given.
_reweighted = False


def expect_reweighted_advantages() -> None:
    """Say that advantages handed to ``loss_mode=vgpo...`` in this process have VGPO's factors in them.

    Workers of verl's own trainers are told by the driver; for a trainer of your own that re-weights them.
    """
    global _reweighted
    _reweighted = True


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    loss_mode: str = "vgpo",
) -> tuple[Tensor, dict[str, float]]:
    """:func:`vgpo_kernels.policy_loss` with the signature of verl's policy losses.

    Args:
        old_log_prob: ``[B, T]``, as all that follow.
        log_prob: Differentiable.
        advantages: Per token; VGPO's factors are already in them.
        response_mask: The scored tokens.
        loss_agg_mode: verl's name of an aggregation; ``"token-sum"`` included.
        config: verl's ``ActorConfig``: clip ratios, ``global_batch_info``, sapo's temperatures.
        rollout_is_weights: Off-policy correction, per token.
        loss_mode: A key of ``LOSS_MODES``.

    Returns:
        The loss, 0-dimensional and scaled by the data-parallel size as verl's are, and verl's metrics as numbers.

    Raises:
        RuntimeError: No trainer in this run re-weights advantages, so this would be plain PPO by the name of VGPO.
        ValueError: verl's configuration has a value that :func:`vgpo_kernels.policy_loss` refuses.

    """
    if not _reweighted:
        raise RuntimeError(
            f"loss_mode={loss_mode} without re-weighted advantages is plain PPO: set +algorithm.vgpo.preset=paper (the "
            "driver has to load vgpo_kernels, too), or choose one of verl's own losses. A trainer of your own that "
            "re-weights them calls vgpo_kernels.integrations.verl.expect_reweighted_advantages in each worker"
        )
    batch = dict(config.global_batch_info)
    mask = response_mask.bool()
    tokens, sequences = batch.get("batch_num_tokens"), batch.get("global_batch_size")
    if loss_agg_mode == "token-sum":
        loss_agg_mode, tokens = "token-mean", 1
    if sequences is None:
        # verl leaves fully masked responses out of the mean.
        sequences = mask.any(-1).sum()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    options = dict(LOSS_MODES[loss_mode])
    if options["loss_type"] == "grpo":
        options["dual_clip"] = config.get("clip_ratio_c", 3.0)
    elif options["loss_type"] == "sapo":
        options |= {
            "sapo_temperature_positive": config.tau_pos,
            "sapo_temperature_negative": config.tau_neg,
            "aggregation": "seq-mean-token-mean",
        }
    options.setdefault("aggregation", loss_agg_mode)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        importance_weights=rollout_is_weights,
        num_tokens=tokens,
        num_sequences=sequences,
        max_length=batch.get("loss_scale_factor") or mask.shape[-1],
        epsilon_low=low,
        epsilon_high=high,
        **options,
    )
    gap = old_log_prob.float() - log_prob.detach().float()
    if options["loss_type"] != "gspo_token":  # there verl bounds the mean over the response, not this
        gap = gap.clamp(-options["ratio_clamp"], options["ratio_clamp"])
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    values = (metrics["clip_fraction"], masked_mean(gap, mask), metrics["dual_clip_fraction"])
    return loss * batch.get("dp_size", 1), dict(zip(names, torch.stack(values).tolist(), strict=True))


def register(core_algos: ModuleType) -> None:
    """Register ``LOSS_MODES`` with verl.

    Raises:
        UnknownSurfaceError: verl's registry is not that of the known versions.

    """
    known_here = f"{KNOWN}, and this is {_found()}"
    register_policy_loss = require(core_algos, "register_policy_loss", ("name",), known_here)
    for mode in LOSS_MODES:
        register_policy_loss(mode)(functools.partial(compute_policy_loss, loss_mode=mode))


def _found() -> str:
    try:
        return version("verl")
    except PackageNotFoundError:
        return "a source tree without a version"

"""VGPO in EasyR1, and in forks of it as the VGPO authors': three lines at the end of ``verl/__init__.py``.

::

    from vgpo_kernels import VGPOConfig
    from vgpo_kernels.integrations.easyr1 import patch_easyr1

    patch_easyr1(VGPOConfig.paper())

The driver and every worker import that file before anything else of EasyR1, so all of them are patched:

- ``DataParallelPPOActor._forward_micro_batch`` computes the visual focus while ``compute_log_prob`` runs, with a hook
  on the final norm and no extra pass. It travels beside the log-probs, so dynamic batching and sequence parallelism
  restore its order too;
- ``FSDPWorker.compute_log_probs`` sends it to the driver as ``visual_focus``;
- ``compute_advantage`` on the driver multiplies the advantages by the factors, over the whole rollout batch, with
  groups known by uid, and ``compute_data_metrics`` adds ``vgpo/...`` to the step's metrics;
- ``compute_policy_loss`` becomes :func:`vgpo_kernels.policy_loss`, unless the fork's own is to stay.

EasyR1 is installed from its repository under the name of ``verl``; nothing of it is imported before
:func:`patch_easyr1` is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig, checks, policy_loss, visual_focus
from vgpo_kernels.hints import AUTHORS_NAMES
from vgpo_kernels.integrations.sequence_parallel import parallel_focus
from vgpo_kernels.integrations.surface import UnknownSurfaceError, known, masked_mean, require, reweight
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask

KNOWN = known("EasyR1")
FIELD = "visual_focus"

# EasyR1's names of losses and aggregations.
LOSS_TYPES = {
    "default": "grpo",
    "gspo": "gspo",
    "gspo_token": "gspo_token",
    "cispo": "cispo",
    "sapo": "sapo",
}
AGGREGATIONS = {"token": "token-mean", "seq": "seq-mean-token-mean"}

# Those by which the authors' fork weighs the advantages itself, when it updates the policy.
AUTHORS_SWITCHES = ("use_intra_trajectory_reweighting", "use_inter_trajectory_reweighting")


def authors_config(settings: Mapping[str, Any]) -> VGPOConfig:
    """Translate the configuration of the authors' training script into ``VGPOConfig.released()``.

    Args:
        settings: Names and values as the script passes them under ``algorithm``: ``visual_compensation_strength``,
            ``visual_attention_threshold``, ... Names that have nothing to do with VGPO are passed over.

    Raises:
        ValueError: A value is out of range, or asks for what the released loss does not use.

    """
    changes = {ours: settings[theirs] for theirs, ours in AUTHORS_NAMES.items() if theirs in settings}
    if changes.get("schedule") == "step-function":
        changes["schedule"] = "step"
    if settings.get("use_visual_compensation", True) is False:
        changes["beta"] = 0.0
    if settings.get("inter_reweighting_gamma_late", 0.5) != 0.5:
        raise ValueError(
            "inter_reweighting_gamma_late weighs a late-stage score that the released re-weighting does not use; "
            f"got {settings['inter_reweighting_gamma_late']}"
        )
    return VGPOConfig.released(**changes)


def patch_easyr1(
    config: VGPOConfig,
    *,
    replace_loss: bool = True,
    actor_module: Any = None,
    worker_module: Any = None,
    trainer_module: Any = None,
) -> None:
    """Put VGPO into EasyR1, in this process. Calling it again changes the settings only.

    Args:
        config: The settings of the factors; :func:`authors_config` reads those of the authors' script.
        replace_loss: Compute the policy loss by :func:`vgpo_kernels.policy_loss`. False keeps the one that is there,
            for a fork whose loss is another than EasyR1's; the factors are in its advantages either way.
        actor_module: ``verl.workers.actor.dp_actor`` unless given.
        worker_module: ``verl.workers.fsdp_workers`` unless given.
        trainer_module: ``verl.trainer.ray_trainer`` unless given.

    Raises:
        TypeError: ``config`` or ``replace_loss`` has the wrong type.
        UnknownSurfaceError: EasyR1's functions are not those of the known versions.
        RuntimeError: One of the modules is still being imported, as it is for lines at its own end.

    """
    checks.settings("config", config, VGPOConfig)
    checks.flag("replace_loss", replace_loss)
    actor_module = actor_module or _imported("verl.workers.actor.dp_actor")
    worker_module = worker_module or _imported("verl.workers.fsdp_workers")
    trainer_module = trainer_module or _imported("verl.trainer.ray_trainer")
    actor, worker = actor_module.DataParallelPPOActor, worker_module.FSDPWorker
    forward = require(actor, "_forward_micro_batch", ("self", "micro_batch", "temperature"), KNOWN)
    require(actor, "compute_log_prob", ("self", "data"), KNOWN)
    log_probs = require(worker, "compute_log_probs", ("self", "data"), KNOWN)
    advantage = require(trainer_module, "compute_advantage", ("data",), KNOWN)
    data_metrics = require(trainer_module, "compute_data_metrics", ("batch",), KNOWN)
    loss = require(actor_module, "compute_policy_loss", ("old_log_probs", "log_probs", "loss_avg_mode"), KNOWN)

    actor._forward_micro_batch = _scoring(_original(forward))
    worker.compute_log_probs = _handing_over(_original(log_probs))
    latest: dict[str, float] = {}
    trainer_module.compute_advantage = _reweighting(_original(advantage), config, latest)
    trainer_module.compute_data_metrics = _reporting(_original(data_metrics), latest)
    actor_module.compute_policy_loss = _replacing(_original(loss)) if replace_loss else _original(loss)


def _imported(name: str) -> Any:
    module = import_module(name)
    if getattr(module.__spec__, "_initializing", False):
        # Ray may import the trainer first, which then has none of its functions when the worker's module ends.
        raise RuntimeError(
            f"{name} is still being imported: patch_easyr1 belongs at the end of verl/__init__.py, which every process "
            "imports first"
        )
    return module


def _original(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what an earlier patch wrapped, so that patches never pile up."""
    return function.__wrapped__ if getattr(function, "patched_by_vgpo", False) else function  # type: ignore[attr-defined]


def _patch(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        # wraps() keeps the attributes by which EasyR1 dispatches a worker's method.
        wrapped = functools.wraps(original)(function)
        wrapped.patched_by_vgpo = True  # type: ignore[attr-defined]
        return wrapped

    return mark


def _scoring(forward: Callable[..., Any]) -> Callable[..., Any]:
    @_patch(forward)
    def forward_micro_batch(self: Any, micro_batch: dict[str, Any], temperature: float) -> Any:
        if not getattr(self, "_scores_visual_focus", False):
            return forward(self, micro_batch, temperature)
        with capture_hidden_states(self.actor_module) as captured:
            found = forward(self, micro_batch, temperature)
        # Forks return the log-probs among other things, of which compute_log_prob takes nothing else.
        log_probs = found.get("log_probs") if isinstance(found, Mapping) else found
        if not isinstance(log_probs, Tensor):
            raise UnknownSurfaceError(
                "DataParallelPPOActor._forward_micro_batch returns neither log-probs nor a mapping with log_probs, but "
                f"{type(found).__name__}: this adapter knows {KNOWN}"
            )
        self._log_probs_dtype = log_probs.dtype
        # In the cosines' precision: log-probs of 16 bits are in it what they were.
        both = torch.cat([log_probs.float(), _focus(captured.hidden, micro_batch, self.actor_module)], dim=-1)
        return {**found, "log_probs": both} if isinstance(found, Mapping) else both

    return forward_micro_batch


def _focus(hidden: Tensor, micro_batch: dict[str, Any], model: Any) -> Tensor:
    """Score the sampled tokens of a micro-batch, fp32 ``[B, T]``, from padded or padding-free hidden states.

    EasyR1 samples whole responses. Where tools answer in between, as in forks of it, the micro-batch has to bring its
    ``response_mask`` along, which is 0 there.
    """
    ids, attended = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
    length = micro_batch["responses"].shape[-1]
    sampled = attended[:, -length:] & micro_batch.get("response_mask", attended[:, -length:]).bool()
    visual = visual_mask(ids, model, sampled) & attended
    if hidden.shape[:2] == ids.shape:
        return visual_focus(hidden, visual, sampled, visibility="causal")
    answered = torch.nn.functional.pad(sampled, (ids.shape[1] - length, 0))[attended]
    boundaries = torch.nn.functional.pad(attended.sum(-1).cumsum(0), (1, 0))
    rows, masks = hidden[0], (visual[attended], answered)
    if len(rows) < len(answered):  # worker.actor.ulysses_size > 1: this rank's part of the pack, the last ones padded
        group = import_module("verl.utils.ulysses").get_ulysses_sequence_parallel_group()
        packed = parallel_focus(rows, *masks, group=group, cu_seqlens=boundaries, visibility="causal")
    else:
        packed = visual_focus(rows[: len(answered)], *masks, cu_seqlens=boundaries, visibility="causal")
    return packed.new_zeros(ids.shape).masked_scatter(attended, packed)[:, -length:]


def _handing_over(log_probs: Callable[..., Any]) -> Callable[..., Any]:
    @_patch(log_probs)
    def compute_log_probs(self: Any, data: Any) -> Any:
        twice = [name for name in AUTHORS_SWITCHES if getattr(self.actor.config, name, False)]
        if twice:
            raise ValueError(
                f"the advantages would be weighted twice: {' and '.join(twice)} must be false where patch_easyr1 does "
                "the weighting"
            )
        self.actor._scores_visual_focus = True
        try:
            output = log_probs(self, data)
        finally:
            self.actor._scores_visual_focus = False
        scored, focus = output.batch["old_log_probs"].chunk(2, dim=-1)
        output.batch["old_log_probs"] = scored.to(self.actor._log_probs_dtype)
        output.batch[FIELD] = focus
        return output

    return compute_log_probs


def _reweighting(advantage: Callable[..., Any], config: VGPOConfig, latest: dict[str, float]) -> Callable[..., Any]:
    look = True

    @_patch(advantage)
    def compute_advantage(data: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal look
        data = advantage(data, *arguments, **options)
        if FIELD in data.batch:
            data.batch["advantages"], metrics = reweight(
                data.batch["advantages"],
                data.batch[FIELD],
                data.batch["response_mask"],
                list(data.non_tensor_batch["uid"]),
                config,
                look=look,
            )
            look = False
            latest.update(metrics)
        return data

    return compute_advantage


def _reporting(data_metrics: Callable[..., Any], latest: dict[str, float]) -> Callable[..., Any]:
    """Add the factors' metrics to the step's. EasyR1 asks once a step, after it has computed the advantages."""

    @_patch(data_metrics)
    def compute_data_metrics(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = {**data_metrics(*arguments, **options), **latest}
        latest.clear()
        return found

    return compute_data_metrics


def _replacing(loss: Callable[..., Any]) -> Callable[..., Any]:
    @_patch(loss)
    def policy_loss_of_easyr1(*arguments: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        return compute_policy_loss(*arguments, **options)

    return policy_loss_of_easyr1


def compute_policy_loss(
    old_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_dual: float,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    loss_type: str = "default",
    loss_avg_mode: str = "token",
    **others: Any,
) -> tuple[Tensor, dict[str, float]]:
    """EasyR1's signature for the policy loss, answered by :func:`vgpo_kernels.policy_loss`.

    Args:
        old_log_probs: ``[B, T]``, as the three that follow.
        log_probs: Differentiable.
        advantages: Per token; VGPO's factors are already in them.
        response_mask: The scored tokens.
        clip_ratio_low: Clip range below 1.
        clip_ratio_high: Clip range above 1.
        clip_ratio_dual: Bound on the ratio where the advantage is negative.
        tau_positive: Temperature of sapo where the advantage is positive.
        tau_negative: The same where it is not.
        loss_type: ``"default"``, ``"gspo"``, ``"gspo_token"``, ``"cispo"`` or ``"sapo"``.
        loss_avg_mode: ``"token"`` or ``"seq"``.
        **others: What forks pass, which has to be None: ``loss_token_mask`` is divided by all scored tokens in one
            fork, by its own ones in another.

    Returns:
        The loss, 0-dimensional, and EasyR1's metrics as numbers.

    Raises:
        TypeError: An argument has the wrong type or dtype, or one of the ``others`` is given.
        ValueError: ``loss_type`` or ``loss_avg_mode`` is none of EasyR1's, or a number is one that
            :func:`vgpo_kernels.policy_loss` refuses.

    """
    unknown = sorted(name for name, value in others.items() if value is not None)
    if unknown:
        raise TypeError(
            f"compute_policy_loss of vgpo_kernels has no {', '.join(unknown)}: patch_easyr1(config, "
            "replace_loss=False) keeps the loss of a fork that has"
        )
    mask = checks.require_tensor("response_mask", response_mask).bool()
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of EasyR1's {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    kind = LOSS_TYPES[loss_type]
    if loss_avg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_avg_mode must be one of {', '.join(AGGREGATIONS)}, got {loss_avg_mode!r}")
    aggregation = AGGREGATIONS[loss_avg_mode]
    options: dict[str, Any] = {"loss_type": kind, "aggregation": aggregation}
    if kind in ("grpo", "gspo", "gspo_token"):
        options["dual_clip"] = clip_ratio_dual
    if kind == "sapo":
        options |= {"sapo_temperature_positive": tau_positive, "sapo_temperature_negative": tau_negative}
    loss, metrics = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        epsilon_low=clip_ratio_low,
        epsilon_high=clip_ratio_high,
        **options,
    )
    # EasyR1 estimates the entropy by the negative log-prob, averaged as the loss is.
    spread = -log_probs.detach()
    entropy = masked_mean(spread, mask) if loss_avg_mode == "token" else masked_mean(spread, mask, dim=-1).mean()
    gap = masked_mean(old_log_probs - log_probs.detach(), mask)
    names = ["ppo_kl", "entropy_loss"]
    values = [gap, entropy]
    if "dual_clip" in options:
        names += ["pg_clipfrac_higher", "pg_clipfrac_lower"]
        values += [metrics["clip_fraction"], metrics["dual_clip_fraction"]]
    return loss, dict(zip(names, torch.stack(values).tolist(), strict=True))

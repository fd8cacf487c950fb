"""VGPO in verl's trainers, which keep a rollout batch in TransferQueue: sync, colocate_async, separate_async."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.surface import require, reweight, shape
from vgpo_kernels.integrations.verl import run
from vgpo_kernels.integrations.verl.losses import KNOWN
from vgpo_kernels.integrations.verl.methods import METHODS
from vgpo_kernels.integrations.verl.scoring import ALONE, FLAG, METHOD, SECONDS

SECONDS_METRIC = "vgpo/scoring_seconds_total"
NOT_REWEIGHTED = "{} computes advantages by itself, so algorithm.vgpo did not re-weight them: let it call verl's {}"


def change(trainer_base: ModuleType) -> None:
    """Make verl's base class of trainers multiply advantages by VGPO's factors where ``algorithm.vgpo`` is set.

    Raises:
        UnknownSurfaceError: The trainer's methods are not those of the known versions.

    """
    trainer: Any = require(trainer_base, "PPOTrainer", (), KNOWN)
    # First, so that it refuses algorithm.vgpo where another one is not known.
    replace(trainer, "__init__", ("self", "config"), _checking)
    replace(trainer, "_setup", ("self",), _joining)
    replace(trainer, "_compute_old_log_prob", ("self", "batch", "metrics"), _scoring)
    replace(trainer, "_compute_advantage", ("self", "batch", "metrics"), _reweighting)
    replace(trainer, "_update_actor", ("self", "batch", "metrics"), _guarding)
    replace(trainer, "_compute_metrics", ("self", "batch", "metrics"), _guarding_the_step)


def replace(owner: type, name: str, parameters: Sequence[str], around: Callable[[Any], Any]) -> None:
    """Replace a method by ``around`` it, once.

    Raises:
        UnknownSurfaceError: The method does not exist, or does not take these parameters.

    """
    method = require(owner, name, parameters, KNOWN)
    if getattr(method, "changed_by_vgpo", False):
        return
    changed = functools.wraps(method)(around(method))
    changed.changed_by_vgpo = True  # type: ignore[attr-defined]
    setattr(owner, name, changed)


def _checking(init: Any) -> Any:
    def checking(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        # Before a model is loaded or a token sampled.
        self.vgpo = run.switch(config)
        self.vgpo_reweighted = False
        self.vgpo_batches = 0
        init(self, config, *arguments, **options)

    return checking


def _joining(setup: Any) -> Any:
    def joining(self: Any) -> None:
        setup(self)
        if self.vgpo is not None:
            run.start(self.config, self.vgpo, [self.actor_rollout_wg])

    return joining


def _scoring(compute_old_log_prob: Any) -> Any:
    def scoring(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.vgpo is None:
            return compute_old_log_prob(self, batch, metrics)
        flags = self.vgpo.flags(self.global_steps)
        # The reference pass, which follows, goes over the same batch.
        silence = {FLAG: False, ALONE: False, METHOD: ""}
        if not self.vgpo.bypass:
            batch.extra_info.update(flags)
            batch = compute_old_log_prob(self, batch, metrics)
            batch.extra_info.update(silence)
            return batch
        batch = compute_old_log_prob(self, batch, metrics)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        entropy = "entropy" in self.vgpo.fields()
        batch.extra_info.update(calculate_entropy=entropy, compute_loss=False, temperature=temperature)
        batch.extra_info.update(flags)
        if len(self.actor_rollout_wg.compute_log_prob(batch)) != len(batch):
            raise RuntimeError("the pass that reads the visual signal returned another batch")
        batch.extra_info.update(silence)
        return batch

    return scoring


def _reweighting(compute_advantage: Any) -> Any:
    def reweighting(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute_advantage(self, batch, metrics)
        if self.vgpo is None:
            return batch
        import transfer_queue
        from tensordict import TensorDict
        from verl.workers.utils.padding import response_from_nested

        fields = self.vgpo.fields()
        data = transfer_queue.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["uid", "response_mask", "advantages", *fields.values(), SECONDS],
        )
        for field in fields.values():
            if data.get(field, None) is None:  # the data plane leaves out what it does not have
                raise RuntimeError(
                    f"the old-log-prob pass left no {field}: a trainer that computes old log-probs by itself has to "
                    "call verl's PPOTrainer._compute_old_log_prob"
                )
        mask, advantages = data["response_mask"], data["advantages"]
        signals = {name: response_from_nested(data[field], mask).values() for name, field in fields.items()}
        reweighted, found = apply(
            self,
            advantages.values(),
            signals,
            mask.values(),
            list(data.get("uid").tolist()),
            progress=(self.global_steps - 1) / max(self.total_training_steps, 1),
            cu_seqlens=mask.offsets(),
            finals=finals(batch.keys) if self.config.algorithm.adv_estimator == "grpo" else None,
        )
        metrics.update(found)
        if data.get(SECONDS, None) is not None:
            metrics[SECONDS_METRIC] = data[SECONDS].values().sum().item()
        nested = torch.nested.nested_tensor_from_jagged(reweighted, advantages.offsets())
        fields = TensorDict({"advantages": nested}, batch_size=len(batch))
        self.vgpo_reweighted = True
        self.vgpo_batches += 1
        return transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    return reweighting


def apply(
    trainer: Any,
    advantages: Tensor,
    signals: Mapping[str, Tensor],
    response_mask: Tensor,
    uids: list[Any],
    *,
    progress: float,
    cu_seqlens: Tensor | None = None,
    finals: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Multiply a rollout batch's advantages by the factors of the run's method.

    Args:
        trainer: verl's, with its ``vgpo``.
        advantages: Per token, ``[B, T]`` or packed ``[N]``.
        signals: By name, in the same shape.
        response_mask: Likewise.
        uids: Of each response.
        progress: How far training is; what is beyond 1 counts as 1.
        cu_seqlens: Boundaries of a packed batch.
        finals: Of :func:`~vgpo_kernels.integrations.surface.reweight`, for VGPO.

    Returns:
        The new advantages, and metrics.

    """
    look, trainer.vgpo_looked = not getattr(trainer, "vgpo_looked", False), True
    batch: dict[str, Any] = {"cu_seqlens": cu_seqlens, "look": look}
    switch: run.Switch = trainer.vgpo
    if isinstance(switch.config, VGPOConfig):
        return reweight(advantages, signals["visual"], response_mask, uids, switch.config, finals=finals, **batch)
    return shape(
        advantages,
        signals,
        response_mask,
        uids,
        switch.config,
        progress=min(max(progress, 0.0), 1.0),
        over_selected=METHODS[switch.method].over_selected,
        **batch,
    )


def _guarding(update_actor: Any) -> Any:
    def guarding(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.vgpo is not None and not self.vgpo_reweighted:
            raise RuntimeError(NOT_REWEIGHTED.format(type(self).__name__, "PPOTrainer._compute_advantage"))
        self.vgpo_reweighted = False
        return update_actor(self, batch, metrics)

    return guarding


def _guarding_the_step(compute_metrics: Any) -> Any:
    """Find out a trainer that updates by itself as well, which :func:`_guarding` does not see."""

    def guarding(self: Any, batch: Any, metrics: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        if self.vgpo is not None and not self.vgpo_batches:
            raise RuntimeError(NOT_REWEIGHTED.format(type(self).__name__, "PPOTrainer._compute_advantage"))
        self.vgpo_batches = 0
        return compute_metrics(self, batch, metrics, *arguments, **options)

    return guarding


def finals(keys: Sequence[str]) -> list[int]:
    """Return, for each trajectory, which one ends its session, as places in ``keys``.

    Args:
        keys: verl's, ``{uid}_{session}_{index}``. A session of an agent may leave several trajectories; verl gives the
            reward of its last one to all of them.

    """
    sessions = [key.rpartition("_") for key in keys]
    last: dict[str, tuple[int, int]] = {}
    for place, (session, _, index) in enumerate(sessions):
        last[session] = max(last.get(session, (-1, -1)), (int(index), place))
    return [last[session][1] for session, _, _ in sessions]

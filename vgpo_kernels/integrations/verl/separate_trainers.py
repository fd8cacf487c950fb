"""VGPO in verl's trainers that hold a padded rollout batch: one-step-off and fully async."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.integrations.surface import require
from vgpo_kernels.integrations.verl import run
from vgpo_kernels.integrations.verl.losses import KNOWN
from vgpo_kernels.integrations.verl.scoring import SECONDS
from vgpo_kernels.integrations.verl.trainers import NOT_REWEIGHTED, SECONDS_METRIC, apply, replace


def change(separation: ModuleType) -> None:
    """Make the base class of these trainers multiply advantages by VGPO's factors where ``algorithm.vgpo`` is set.

    Raises:
        UnknownSurfaceError: The trainer's methods are not those of the known versions.

    """
    trainer: Any = require(separation, "SeparateRayPPOTrainer", (), KNOWN)
    # First, as in trainers.py.
    replace(trainer, "_init_resource_pools", ("self",), _checking)
    replace(trainer, "_init_worker_groups", ("self",), _joining)
    replace(trainer, "_compute_old_log_prob", ("self", "batch"), _scoring)
    replace(trainer, "_fit_compute_log_prob", ("self", "batch"), _scoring_alone)
    replace(trainer, "_fit_compute_advantage", ("self", "batch"), _reweighting)


def refuse_legacy(ray_trainer: ModuleType) -> None:
    """Make verl's legacy trainer (``trainer.use_v1=false``) refuse ``algorithm.vgpo``, which it would not heed.

    The trainers of :func:`change` inherit its update, and so do those of your own that set up their workers themselves.

    Raises:
        UnknownSurfaceError: The trainer's methods are not those of the known versions.

    """
    trainer: Any = require(ray_trainer, "RayPPOTrainer", (), KNOWN)
    replace(trainer, "init_workers", ("self",), _refusing)
    replace(trainer, "_update_actor", ("self", "batch"), _guarding)


def _refusing(init_workers: Any) -> Any:
    def refusing(self: Any) -> Any:
        if run.switch(self.config) is not None:
            raise ValueError("algorithm.vgpo does not work with verl's legacy trainer (trainer.use_v1=false)")
        return init_workers(self)

    return refusing


def _checking(init_resource_pools: Any) -> Any:
    def checking(self: Any) -> None:
        self.vgpo = run.switch(self.config)
        self.vgpo_reweighted = False
        init_resource_pools(self)

    return checking


def _joining(init_worker_groups: Any) -> Any:
    def joining(self: Any) -> None:
        init_worker_groups(self)
        if self.vgpo is None:
            return
        init_models = self._init_models

        def and_asking() -> None:
            init_models()
            run.start(self.config, self.vgpo, self.all_wg.values())

        # Each of these trainers loads its models in a method of its own.
        self._init_models = and_asking

    return joining


def _scoring(compute_old_log_prob: Any) -> Any:
    def scoring(self: Any, batch: Any) -> Any:
        if self.vgpo is None:
            return compute_old_log_prob(self, batch)
        with _asking(self) as passes:
            old_log_prob, mfu = compute_old_log_prob(self, batch)
        for field, values in passes[0].signals.items():
            old_log_prob.batch[field] = values
        self.metrics.update(passes[0].metrics)
        return old_log_prob, mfu

    return scoring


def _scoring_alone(compute_log_prob: Any) -> Any:
    def scoring_alone(self: Any, batch: Any) -> Any:
        batch = compute_log_prob(self, batch)
        if self.vgpo is None or not self.vgpo.bypass:
            return batch
        from verl.utils import tensordict_utils
        from verl.workers.utils.padding import left_right_2_no_padding

        data = left_right_2_no_padding(batch.to_tensordict())
        entropy = "entropy" in self.vgpo.fields()
        tensordict_utils.assign_non_tensor(data, calculate_entropy=entropy, compute_loss=False)
        with _asking(self) as passes:
            self.actor_rollout_wg.compute_log_prob(data)
        for field, values in passes[0].signals.items():
            batch.batch[field] = values
        self.metrics.update(passes[0].metrics)
        return batch

    return scoring_alone


class _Pass:
    """What a pass over a batch without padding has scored.

    Attributes:
        signals: By their fields, padded as verl pads log-probs, ``[B, T]``.
        metrics: What it took the workers, together.

    """

    def __init__(self, fields: Iterable[str], data: Any, output: Any) -> None:
        from verl.workers.utils.padding import no_padding_2_padding

        self.signals: dict[str, Tensor] = {}
        for field in fields:
            if output.get(field, None) is None:
                raise RuntimeError(f"the workers' pass left no {field}")
            self.signals[field] = no_padding_2_padding(output[field], data)
        seconds = output.get(SECONDS, None)
        self.metrics = {} if seconds is None else {SECONDS_METRIC: float(seconds.values().sum())}


@contextmanager
def _asking(trainer: Any) -> Iterator[list[_Pass]]:
    """Ask for signals in the passes that are made inside, of which verl itself would drop them, and keep them."""
    from verl.utils import tensordict_utils

    passes: list[_Pass] = []
    workers, found = trainer.actor_rollout_wg, trainer.vgpo
    compute_log_prob = workers.compute_log_prob

    def asking(data: Any) -> Any:
        tensordict_utils.assign_non_tensor(data, **found.flags(trainer.global_steps))
        data["response_mask"] = _without_padding(data["response_mask"], data["attention_mask"])
        output = compute_log_prob(data)
        passes.append(_Pass(found.fields().values(), data, output))
        return output

    workers.compute_log_prob = asking
    try:
        yield passes
    finally:
        workers.compute_log_prob = compute_log_prob


def _without_padding(response_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """Nest a mask of responses ``[B, T]``, the last T places of ``attention_mask`` ``[B, S]``."""
    lengths = attention_mask[:, -response_mask.shape[1] :].sum(-1).tolist()
    rows = [row[:length] for row, length in zip(response_mask, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _reweighting(compute_advantage: Any) -> Any:
    def reweighting(self: Any, batch: Any) -> Any:
        batch = compute_advantage(self, batch)
        if self.vgpo is None:
            return batch
        batch.batch["advantages"], found = apply(
            self,
            batch.batch["advantages"],
            {name: batch.batch[field] for name, field in self.vgpo.fields().items()},
            batch.batch["response_mask"],
            list(batch.non_tensor_batch["uid"]),
            progress=_progress(self),
        )
        self.metrics.update(found)
        self.vgpo_reweighted = True
        return batch

    return reweighting


def _progress(trainer: Any) -> float:
    """Return how far training is, from 0 to 1; fully async counts versions of its weights."""
    if hasattr(trainer, "current_param_version"):
        return float(trainer.current_param_version / max(trainer.total_train_steps or 1, 1))
    return float((trainer.global_steps - 1) / max(trainer.total_training_steps, 1))


def _guarding(update_actor: Any) -> Any:
    def guarding(self: Any, batch: Any) -> Any:
        if run.switch(self.config) is not None and not getattr(self, "vgpo_reweighted", False):
            method = "SeparateRayPPOTrainer._fit_compute_advantage"
            raise RuntimeError(NOT_REWEIGHTED.format(type(self).__name__, method))
        self.vgpo_reweighted = False
        return update_actor(self, batch)

    return guarding

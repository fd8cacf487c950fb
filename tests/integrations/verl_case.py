"""Rollout batches in verl's own types, for the tests of its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue
import verl
from integrations.rollout_case import Rollout
from integrations.verl_methods_case import Row
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils, torch_functional
from verl.workers.engine.fsdp import transformer_impl

from vgpo_kernels.integrations.verl import run


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def as_verl_keeps(batch: Sequence[Rollout | Row], **more: list[Any]) -> TensorDict:
    """A rollout batch as verl's agent loop writes it: one record per response, nested where lengths differ.

    Args:
        batch: The responses.
        more: Further fields, a value for each response.

    """
    records = []
    for index, rollout in enumerate(batch):
        ids = torch.tensor(rollout.ids)
        mask = torch.tensor(rollout.response_mask)
        records.append(
            {
                "uid": rollout.uid,
                "prompts": torch.tensor(rollout.prompt),
                "responses": torch.tensor(rollout.response),
                "response_mask": mask,
                "loss_mask": mask,
                "input_ids": ids,
                "position_ids": torch.arange(len(ids)),
                **{name: values[index] for name, values in more.items()},
            }
        )
    return tensordict_utils.list_of_dict_to_tensordict(records)


def settings(**changes: Any) -> Any:
    """verl's own configuration of its trainer, with changes by dotted name (``__`` for a dot)."""
    config = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    with open_dict(config):
        for name, value in changes.items():
            OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return config


def engine_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's own engine around a model, without the distributed set-up that its constructor does."""
    engine = object.__new__(transformer_impl.FSDPEngineWithLMHead)
    engine.module = model
    engine._autocast_dtype = torch.float32
    engine.pad_to_length = None
    engine.use_ulysses_sp = False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = torch_functional.entropy_from_logits
    engine.model_config = SimpleNamespace(hf_config=model.config)
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    return engine


class Workers:
    """A worker group of one worker, in this process."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.temperature, self.packed = 1.0, False
        self.passes: list[dict[str, Any]] = []
        self.updates = 0

    def compute_log_prob(self, batch: Any) -> Any:
        if not isinstance(batch, transfer_queue.KVBatchMeta):
            return self._infer(batch)
        data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
        tensordict_utils.assign_non_tensor(data, **batch.extra_info)
        self.passes.append(dict(batch.extra_info))
        return transfer_queue.kv_batch_put(batch.keys, batch.partition_id, fields=self._infer(data).exclude("metrics"))

    def _infer(self, data: Any) -> Any:
        tensordict_utils.assign_non_tensor(data, temperature=self.temperature, use_remove_padding=self.packed)
        outputs: dict[str, list[Tensor]] = {}
        for part in tensordict_utils.chunk_tensordict(data, 1 if len(data) % 3 else 3):
            with torch.no_grad():
                _, output = self.engine.forward_step(part, None, forward_only=True)
            for name, value in output["model_output"].items():
                outputs.setdefault(name, []).extend(value.unbind())
        fields = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in outputs.items()}
        return tensordict_utils.get_tensordict(fields, {"metrics": {"mfu": 0.0}})

    def update_actor(self, batch: Any) -> Any:
        self.updates += 1
        return {"metrics": {"mfu": 0.0}}


def trainer_of(kind: type, config: Any, engine: Any) -> Any:
    """One of verl's trainers, without the set-up that its constructor does."""
    trainer = object.__new__(kind)
    trainer.config = config
    trainer.vgpo = run.switch(config)
    trainer.vgpo_reweighted = False
    trainer.vgpo_batches = 0
    trainer.actor_rollout_wg = Workers(engine)
    trainer.global_steps, trainer.total_training_steps = 3, 8
    trainer.metrics = {}
    trainer.timing_raw = {}
    return trainer


def group_relative(rewards: list[float], groups: list[str]) -> list[float]:
    """GRPO's advantages."""
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        peers = torch.tensor([one for one, name in zip(rewards, groups, strict=True) if name == group]).double()
        alone = len(peers) == 1
        found.append(reward if alone else ((reward - peers.mean()) / (peers.std() + 1e-6)).item())
    return found

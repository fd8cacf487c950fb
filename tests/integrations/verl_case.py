"""Rollout batches in verl's own types, for the tests of its adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl
from integrations.rollout_case import Rollout
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp import transformer_impl


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def as_verl_keeps(batch: list[Rollout], **more: list[Any]) -> TensorDict:
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
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False)
    engine.model_config = SimpleNamespace(hf_config=model.config)
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    return engine

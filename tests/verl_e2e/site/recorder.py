"""Writes what the driver holds before each update of the actor to a file, for the test to compute again.

verl's driver imports this for its manager of agent loops, when its trainer is made and all plugins are in place.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
import transfer_queue
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, PPOTrainer

FIELDS = [
    "uid",
    "input_ids",
    "responses",
    "response_mask",
    "rm_scores",
    "advantages",
    "old_log_probs",
    "visual_focus",
    "visual_method_visual",
]
IMAGES = "multi_modal_inputs"


class RecordingManager(AgentLoopManagerTQ):
    """verl's own manager."""


def _recording(update_actor):
    @functools.wraps(update_actor)
    def recording(self, batch, metrics):
        data = transfer_queue.kv_batch_get(batch.keys, batch.partition_id, select_fields=[*FIELDS, IMAGES])
        columns = {name: _rows(data.get(name)) for name in FIELDS if name in data}
        images = [getattr(one, "data", one) for one in list(data.get(IMAGES))]
        folder = Path(os.environ["VGPO_RECORDS"])
        folder.mkdir(exist_ok=True)
        step = {
            "keys": batch.keys,
            "padding": [tag.get("is_padding", False) for tag in batch.tags],
            "columns": columns,
            "images": [{name: value.clone() for name, value in dict(one).items()} for one in images],
            "metrics": {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))},
            "trainer": type(self).__name__,
            "replay_buffer": type(self.replay_buffer).__name__,
        }
        torch.save(step, folder / f"{self.global_steps}.pt")
        return update_actor(self, batch, metrics)

    return recording


def _rows(column):
    return [row.clone() for row in column.unbind()] if isinstance(column, torch.Tensor) else column.tolist()


PPOTrainer._update_actor = _recording(PPOTrainer._update_actor)

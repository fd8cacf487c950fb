"""Stand-ins for what the adapter relies on in EasyR1, for machines without a checkout of it.

They keep the parameters and what is returned, batches of tensors and arrays, dynamic batching that reorders rows and
puts them back, a forward pass with or without padding, split over a group of ranks or not, and what forks return.
test_easyr1_checkout.py has the same in EasyR1's own code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from integrations.rollout_case import IMAGE
from torch import Tensor

ORDER = [2, 0, 3, 1]


class DataProto(SimpleNamespace):
    """EasyR1's batch: a TensorDict where tensordict is installed, and arrays of objects."""

    def __init__(self, tensors: dict[str, Tensor], **others: list[Any]) -> None:
        try:
            from tensordict import TensorDict
        except ImportError:
            batch: Any = dict(tensors)
        else:
            batch = TensorDict(tensors, batch_size=len(next(iter(tensors.values()))))
        non_tensor_batch = {name: np.array(values, dtype=object) for name, values in others.items()}
        super().__init__(batch=batch, non_tensor_batch=non_tensor_batch)


def make_modules(*, fork: bool = False) -> dict[str, Any]:
    """A fresh double of the three modules that are patched: of EasyR1, or of a fork that returns the entropy too."""

    class DataParallelPPOActor:
        def __init__(self, actor_module: Any, padding_free: bool, **settings: Any) -> None:
            self.actor_module = actor_module
            self.config = SimpleNamespace(**{"padding_free": padding_free, "ulysses_size": 1} | settings)

        def _forward_micro_batch(self, micro_batch: dict[str, Tensor], temperature: float) -> Any:
            ids, attended = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
            length = micro_batch["responses"].shape[-1]
            positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
            if self.config.padding_free:
                flat = self.logits_of_packed(ids[attended][None], positions[attended][None])
                logits = torch.zeros(*ids.shape, flat.shape[-1]).masked_scatter(attended[..., None], flat)
            else:
                logits = self.actor_module(ids, attention_mask=attended.long(), position_ids=positions).logits
            logits = logits[:, -length - 1 : -1] / temperature
            log_probs = logits.log_softmax(-1).gather(-1, micro_batch["responses"][..., None])[..., 0]
            return {"log_probs": log_probs, "entropy": torch.zeros_like(log_probs)} if fork else log_probs

        def logits_of_packed(self, ids: Tensor, positions: Tensor) -> Tensor:
            padding = 0
            if self.config.ulysses_size > 1:
                from verl.utils import ulysses  # EasyR1's is the same

                ids, positions, padding = ulysses.ulysses_pad_and_slice_inputs(ids, positions, self.config.ulysses_size)
            logits = self.actor_module(ids, position_ids=positions).logits[0]
            if self.config.ulysses_size > 1:
                logits = ulysses.gather_outputs_and_unpad(logits, 0, unpad_dim=0, padding_size=padding)
            return logits  # type: ignore[no-any-return]

        @torch.no_grad()
        def compute_log_prob(self, data: DataProto) -> Tensor:
            rows = len(data.batch["input_ids"])
            order = ORDER + list(range(4, rows))
            outputs = []
            for part in (order[:1], order[1:]):  # dynamic batching: by length, not by place
                found = self._forward_micro_batch({name: value[part] for name, value in data.batch.items()}, 1.0)
                outputs.append(found["log_probs"] if fork else found)
            restored = torch.empty_like(torch.cat(outputs))
            restored[order] = torch.cat(outputs)
            return restored

    class FSDPWorker:
        def __init__(self, actor: DataParallelPPOActor) -> None:
            self.actor = actor

        def compute_log_probs(self, data: DataProto) -> DataProto:
            return DataProto({"old_log_probs": self.actor.compute_log_prob(data=data)})

    FSDPWorker.compute_log_probs.dispatch_mode = "DP_COMPUTE_PROTO"  # type: ignore[attr-defined]

    def compute_advantage(data: DataProto, adv_estimator: str, gamma: float = 1.0, lam: float = 1.0) -> DataProto:
        data.batch["advantages"] = data.batch["rewards"][:, None] * data.batch["response_mask"]
        return data

    def compute_data_metrics(batch: DataProto, use_critic: bool = False) -> dict[str, Any]:
        return {"critic/advantages/mean": batch.batch["advantages"].mean().item()}

    def own_policy_loss(old_log_probs: Tensor, log_probs: Tensor, loss_avg_mode: str, **_: Any) -> Any:
        return "the loss of the fork"

    named = {"__name__": "double"}
    return {
        "actor_module": SimpleNamespace(
            DataParallelPPOActor=DataParallelPPOActor, compute_policy_loss=own_policy_loss, **named
        ),
        "worker_module": SimpleNamespace(FSDPWorker=FSDPWorker, **named),
        "trainer_module": SimpleNamespace(
            compute_advantage=compute_advantage, compute_data_metrics=compute_data_metrics, **named
        ),
    }


def rollout() -> DataProto:
    """Four responses to two prompts, prompts padded to the left and responses to the right."""
    generator = torch.Generator().manual_seed(1)
    prompt, response = 6, 5
    ids = torch.randint(8, 32, (4, prompt + response), generator=generator)
    attended = torch.ones_like(ids)
    for row, (left, right) in enumerate([(0, 2), (1, 0), (2, 1), (0, 0)]):
        attended[row, :left] = 0
        attended[row, prompt + response - right :] = 0
    ids[:, 2:5] = IMAGE
    ids = ids * attended
    tensors = {"input_ids": ids, "attention_mask": attended, "responses": ids[:, prompt:]}
    return DataProto(tensors, uid=["p", "q", "p", "q"])

"""Two steps of EasyR1's own trainer on Ray, with two workers on CPUs: :func:`main`.

EasyR1's are the trainer, the worker groups, the batches, the rollout around the engine, the old-log-prob pass and the
update; not its are the model's construction (a tiny one, without FSDP), the engine's tokens and the rewards. The
checkout in PYTHONPATH has the lines of the adapter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from integrations.easyr1_case import LIMITS, TEMPERATURE, as_easyr1_keeps, make_model, make_worker, rollouts
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.config import PPOConfig
from verl.trainer.ray_trainer import RayPPOTrainer, ResourcePoolManager, Role
from verl.utils.logger import logger
from verl.workers.actor import dp_actor
from verl.workers.fsdp_workers import FSDPWorker
from verl.workers.rollout import vLLMRollout

STEPS, WORKERS, PROMPTS, SAMPLES, LENGTH, EOS = 2, 2, 4, 2, 9, 2

torch.cuda.get_device_name = lambda: "a CPU"  # type: ignore[assignment]


class Engine:
    """Random words in the place of what vLLM generates."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(rank)

    def generate(self, prompts: list[Any], sampling_params: Any, **_: Any) -> list[Any]:
        def words() -> list[int]:
            number = int(torch.randint(4, LENGTH, (), generator=self.generator))
            return [*torch.randint(8, 60, (number,), generator=self.generator).tolist(), EOS]

        samples = range(sampling_params.n)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=words()) for _ in samples]) for _ in prompts]


class TinyWorker(Worker):
    """EasyR1's worker, but for the construction of model and engine."""

    def __init__(self, config: Any, role: str) -> None:
        super().__init__()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        self.config = config

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        made = make_worker(make_model(vision=True), dynamic_batching=False, padding_free=True)
        made.config.rollout.temperature = TEMPERATURE
        vars(self).update({name: value for name, value in vars(made).items() if name not in ("_rank", "_world_size")})
        self.fsdp_module = SimpleNamespace(_handle=SimpleNamespace(reshard=lambda _: None))
        self.rollout = object.__new__(vLLMRollout)
        vars(self.rollout).update(
            config=SimpleNamespace(response_length=LENGTH + 1),
            pad_token_id=0,
            return_video_metadata=False,
            use_tqdm=False,
            lora_kwargs={},
            sampling_params=SimpleNamespace(n=SAMPLES),
            inference_engine=Engine(self.rank),
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def prepare_rollout_engine(self) -> None:
        pass

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def release_rollout_engine(self) -> None:
        pass

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, path: str, save_model_only: bool = False) -> None:
        os.makedirs(path, exist_ok=True)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate_sequences(self, prompts: DataProto) -> DataProto:
        prompts.meta_info |= {"eos_token_id": EOS, "pad_token_id": 0}
        return self.rollout.generate_sequences(prompts)

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def update_actor(self, data: DataProto) -> DataProto:
        self._process_multi_modal_inputs(data)
        metrics = self.actor.update_policy(data)
        metrics["actor/own_loss"] = [float(not hasattr(dp_actor.compute_policy_loss, "patched_by_vgpo"))]
        return DataProto(non_tensor_batch={name: np.array(value) for name, value in metrics.items()})

    _process_multi_modal_inputs = FSDPWorker._process_multi_modal_inputs
    compute_log_probs = FSDPWorker.compute_log_probs


class Rewards:
    """A number for each response, at its last token."""

    def compute_reward(self, batch: DataProto) -> tuple[Any, dict[str, list[float]]]:
        scores = torch.zeros(batch.batch["response_mask"].shape)
        last = batch.batch["response_mask"].sum(-1, keepdim=True) - 1
        values = batch.batch["responses"].float().mean(-1, keepdim=True)
        return scores.scatter(-1, last, values), {"overall": values.flatten().tolist()}


class Prompts:
    """What a data loader gives: every prompt once."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        every = rollouts()
        rows = [every.uids.index(uid) for uid in dict.fromkeys(every.uids)]
        data = as_easyr1_keeps(every, vision=True)
        width = data.batch["input_ids"].shape[-1] - data.batch["responses"].shape[-1]
        names = ("input_ids", "attention_mask", "position_ids")
        prompts = {name: data.batch[name][rows][..., :width] for name in names}
        shown = data.non_tensor_batch["multi_modal_data"][rows]
        ids = np.empty(len(rows), dtype=object)
        ids[:] = [every.prompts[row] for row in rows]
        yield {**prompts, "raw_prompt_ids": ids, "multi_modal_data": shown}

    def state_dict(self) -> dict[str, Any]:
        return {}


class StepLog:
    """Leaves what EasyR1 logs in ``steps.jsonl``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.path = Path(config["trainer"]["save_checkpoint_path"]) / "steps.jsonl"
        self.path.parent.mkdir()

    def log(self, data: dict[str, Any], step: int) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")

    def finish(self) -> None:
        pass


@ray.remote(num_cpus=1)
class Driver:
    def run(self, config: PPOConfig) -> None:
        logger.LOGGERS["steps"] = StepLog
        trainer = RayPPOTrainer(
            config=config,
            tokenizer=None,
            processor=None,
            train_dataloader=Prompts(),
            val_dataloader=None,
            role_worker_mapping={Role.ActorRolloutRef: ray.remote(TinyWorker)},
            resource_pool_manager=ResourcePoolManager({"pool": [WORKERS]}, {Role.ActorRolloutRef: "pool"}),
            reward_fn=ray.remote(Rewards).remote(),
        )
        trainer.init_workers()
        trainer.fit()


def main(folder: str) -> None:
    """Leave what the steps log in ``steps.jsonl`` of a new folder."""
    config = PPOConfig()
    config.data.rollout_batch_size = config.worker.actor.global_batch_size = PROMPTS
    config.data.min_pixels, config.data.max_pixels = LIMITS.values()
    config.worker.rollout.n = SAMPLES
    config.worker.actor.micro_batch_size_per_device_for_experience = 2
    config.algorithm.disable_kl = True
    config.trainer.max_steps, config.trainer.n_gpus_per_node = STEPS, WORKERS
    config.trainer.logger = ("steps",)
    config.trainer.save_checkpoint_path = folder
    config.deep_post_init()
    ray.init(num_cpus=WORKERS + 4, num_gpus=WORKERS, include_dashboard=False)
    ray.get(Driver.remote().run.remote(config))

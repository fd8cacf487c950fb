"""verl's own trainers with VGPO: their methods, their data plane on Ray, their engine, a rollout batch of agents.

Only the worker group is replaced, by one that calls the engine in this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from equations import factors
from integrations.rollout_case import (
    METRICS,
    Rollout,
    cosines_of,
    expected_factors,
    last_hidden_states,
    rollouts,
    tiny_model,
)
from tolerance import assert_close
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")

import ray
import transfer_queue
from integrations import verl_methods_case
from integrations.verl_case import as_verl_keeps, engine_of, group_relative, settings, trainer_of
from integrations.verl_methods_case import Row
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.fully_async_policy.fully_async_trainer import FullyAsyncTrainer
from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.trainer.ppo import v1
from verl.trainer.ppo.ray_trainer import RayPPOTrainer, ResourcePoolManager
from verl.trainer.ppo.utils import Role

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.surface import config_from
from vgpo_kernels.integrations.verl import run, scoring

FULLY_ASYNC = FullyAsyncTrainer.__ray_metadata__.modified_class  # verl has it as a Ray actor


@pytest.fixture(scope="module")
def data_plane() -> Iterator[None]:
    """verl's own, on Ray in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # its token would be written to the home folder
        # A storage unit waits for a CPU of its own.
        ray.init(num_cpus=16, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
        try:
            units = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
            transfer_queue.init(OmegaConf.create({"backend": units}))
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def model() -> Any:
    return tiny_model()


def stored(batch: Sequence[Rollout | Row], keys: list[str], **more: list[Any]) -> tuple[Any, list[float]]:
    """Put a batch, whose rewards are 0, 1, 2, ..., and more fields of it where verl keeps it."""
    rewards = [torch.zeros(len(rollout.response)) for rollout in batch]
    for value, row in enumerate(rewards):
        row[-1] = value
    logp = [torch.full((len(rollout.response),), -1.0) for rollout in batch]
    data = as_verl_keeps(batch, rm_scores=rewards, rollout_log_probs=logp, old_log_probs=logp, **more)
    tags: list[dict[str, Any]] = [{} for _ in keys]
    transfer_queue.kv_clear(keys=keys, partition_id="train")
    return transfer_queue.kv_batch_put(keys=keys, partition_id="train", fields=data, tags=tags), [*range(len(batch))]


def advantages(batch: Any) -> list[Tensor]:
    found = transfer_queue.kv_batch_get(batch.keys, batch.partition_id, select_fields=["advantages"])
    return list(found["advantages"].unbind())


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_what_agents_leave_behind(
    data_plane: None, model: Any, monkeypatch: pytest.MonkeyPatch, preset: str, bypass: bool
) -> None:
    """Filtered responses, one without an image, sampled placeholders, images that tools show: engine to advantages."""
    batch = rollouts()
    hidden = last_hidden_states(model, batch)
    keys = [f"{rollout.uid}_{index}_0" for index, rollout in enumerate(batch)]
    meta, rewards = stored(batch, keys)
    config = settings(
        algorithm__vgpo={"preset": preset},
        algorithm__adv_estimator="grpo",
        algorithm__rollout_correction={"bypass_mode": bypass},
    )
    trainer = trainer_of(v1.PPOTrainerSync, config, engine_of(model, monkeypatch))
    metrics: dict[str, Any] = {}
    meta = trainer._compute_old_log_prob(meta, metrics)
    assert not meta.extra_info.get(scoring.FLAG), "the reference pass must not score again"
    asked = [(flags[scoring.FLAG], flags.get(scoring.ALONE, False)) for flags in trainer.actor_rollout_wg.passes]
    assert asked == [(True, bypass)]
    trainer._compute_advantage(meta, metrics)

    expected = expected_factors(batch, hidden, config_from({"preset": preset}))
    plain = group_relative(rewards, [rollout.uid for rollout in batch])
    for index, (row, of_tokens, reward) in enumerate(zip(advantages(meta), expected, plain, strict=True)):
        mask = torch.tensor(batch[index].response_mask)
        assert_close(row, reward * torch.tensor(of_tokens).double() * mask, name=f"advantages {index}", floor=1e-4)
    unweighted = [index for index, of_tokens in enumerate(expected) if set(of_tokens) == {1.0}]
    assert unweighted == [3, 4]
    assert metrics.items() >= METRICS.items()
    assert metrics["vgpo/weighted_share"] == 7 / 8  # one response is filtered, one sees no image
    scored = [
        value
        for rollout, row in zip(batch, expected, strict=True)
        for value, bit in zip(row, rollout.response_mask, strict=True)
        if bit
    ]
    assert metrics["vgpo/factor_min"] == pytest.approx(min(scored), abs=1e-4)
    assert metrics["vgpo/factor_max"] == pytest.approx(max(scored), abs=1e-4)
    assert metrics["vgpo/factor_mean"] == pytest.approx(sum(scored) / len(scored), abs=1e-4)
    assert metrics["vgpo/scoring_seconds_total"] > 0
    assert all(value == value for name, value in metrics.items() if name.startswith("vgpo/"))
    trainer.config.actor_rollout_ref.actor.calculate_entropy = False
    trainer._update_actor(meta, metrics)
    assert trainer.actor_rollout_wg.updates == 1
    assert trainer.vgpo_batches == 1


@pytest.mark.parametrize("name", ["vppo", "pepo"])
def test_other_methods(data_plane: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With images in verl's data plane; the others are in test_verl_methods.py."""
    batch, seeing = verl_methods_case.rows_of_agents(), verl_methods_case.qwen3_vl()
    keys = [f"{row.uid}_{index}_0" for index, row in enumerate(batch)]
    meta, rewards = stored(
        batch,
        keys,
        position_ids=[verl_methods_case.positions(seeing, row) for row in batch],
        multi_modal_inputs=[row.multi_modal_inputs for row in batch],
    )
    config = settings(algorithm__vgpo={"method": name}, algorithm__adv_estimator="grpo")
    trainer = trainer_of(v1.PPOTrainerSync, config, engine_of(seeing, monkeypatch))
    trainer.actor_rollout_wg.temperature = verl_methods_case.TEMPERATURE
    trainer.global_steps, trainer.total_training_steps = verl_methods_case.STEP, verl_methods_case.STEPS
    metrics: dict[str, Any] = {}
    meta = trainer._compute_old_log_prob(meta, metrics)
    assert not meta.extra_info[scoring.METHOD], "the reference pass must not read signals again"
    trainer._compute_advantage(meta, metrics)
    expected, _ = verl_methods_case.expected_factors(seeing, batch, name)
    plain = group_relative(rewards, [row.uid for row in batch])
    for index, (found, of_tokens, reward) in enumerate(zip(advantages(meta), expected, plain, strict=True)):
        values = reward * of_tokens.double() * torch.tensor(batch[index].sampled)
        assert_close(found, values, name=f"advantages {index}", floor=1e-4)
    assert metrics["vgpo/shaped_responses"] == 3
    assert trainer.vgpo_batches == 1


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.filterwarnings("error:group_weights")
def test_groups_compare_the_last_outputs_of_sessions(
    data_plane: None, model: Any, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """Sessions of two and three trajectories: verl broadcasts the advantage of the last one, and we its phi."""
    batch = [rollout._replace(uid="seen", scored=True) for rollout in rollouts() if rollout.uid == "seen"]
    batch += [rollout._replace(uid="seen") for rollout in rollouts() if rollout.uid == "both"]
    # Of session 0 the places 3, 0, 4, in the order of their index; of session 1 the places 2, 1.
    keys = ["seen_0_1", "seen_1_10", "seen_1_9", "seen_0_0", "seen_0_2"]
    finals = [4, 1, 1, 4, 4]
    hidden = last_hidden_states(model, batch)
    meta, rewards = stored(batch, keys)
    config = settings(algorithm__vgpo={"preset": preset}, algorithm__adv_estimator="grpo")
    trainer = trainer_of(v1.PPOTrainerSync, config, engine_of(model, monkeypatch))
    metrics: dict[str, Any] = {}
    trainer._compute_advantage(trainer._compute_old_log_prob(meta, metrics), metrics)

    cosines = cosines_of(batch, hidden)
    given = config_from({"preset": preset})
    low, high = given.inter_clamp or (-math.inf, math.inf)
    alone = factors(cosines, list("abcde"), given)  # each its own group: psi alone
    compared = factors(cosines, ["a", "seen", "c", "d", "seen"], given)  # the two last outputs
    of_group = {place: min(max(1 + compared[place].phi, low), high) for place in (4, 1)}
    reward = dict(zip((4, 1), group_relative([rewards[4], rewards[1]], ["seen", "seen"]), strict=True))
    for index, (row, weights) in enumerate(zip(advantages(meta), alone, strict=True)):
        of_scored = iter(weights.factors)
        of_tokens = [next(of_scored) * of_group[finals[index]] if bit else 0.0 for bit in batch[index].response_mask]
        expected = reward[finals[index]] * torch.tensor(of_tokens).double()
        assert_close(row, expected, name=f"advantages {index}", floor=1e-4)
    assert (metrics["vgpo/groups"], metrics["vgpo/singleton_groups"]) == (1, 0)
    assert metrics["vgpo/weighted_responses"] == 5


def test_a_trainer_with_advantages_of_its_own_is_refused(data_plane: None) -> None:
    class Own(v1.PPOTrainerSync):
        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            return batch

    trainer = trainer_of(Own, settings(algorithm__vgpo={"preset": "paper"}), None)
    batch = trainer._compute_advantage(None, {})
    with pytest.raises(RuntimeError, match="Own computes advantages by itself, so"):
        trainer._update_actor(batch, {})


def test_a_trainer_with_updates_of_its_own_is_refused(data_plane: None) -> None:
    class Own(v1.PPOTrainerSync):
        def _step_once(self, metrics: dict[str, Any], timing_raw: dict[str, Any], sample_batch_size: int) -> Any:
            return transfer_queue.KVBatchMeta(keys=["a_0_0"], tags=[{}], partition_id="train")

        def prepare_step(self) -> dict[str, Any]:
            return {}

    trainer = trainer_of(Own, settings(algorithm__vgpo={"preset": "paper"}), None)
    trainer.parameter_sync_step = 1
    metrics: dict[str, Any] = {}
    batch = trainer.step(metrics, {})
    with pytest.raises(RuntimeError, match="Own computes advantages by itself, so"):
        trainer._compute_metrics(batch, metrics, {}, global_steps=1, epoch=0)


def test_a_pass_that_left_no_focus_is_named(data_plane: None) -> None:
    batch = rollouts()
    keys = [f"{rollout.uid}_{index}_0" for index, rollout in enumerate(batch)]
    meta, _ = stored(batch, keys)
    config = settings(algorithm__vgpo={"preset": "paper"}, algorithm__adv_estimator="grpo")
    trainer = trainer_of(v1.PPOTrainerSync, config, None)
    with pytest.raises(RuntimeError, match="the old-log-prob pass left no visual_focus"):
        trainer._compute_advantage(meta, {})


def test_runs_without_vgpo_are_left_alone(data_plane: None, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rollouts()
    keys = [f"{rollout.uid}_{index}_0" for index, rollout in enumerate(batch)]
    meta, rewards = stored(batch, keys)
    trainer = trainer_of(v1.PPOTrainerSync, settings(algorithm__adv_estimator="grpo"), engine_of(model, monkeypatch))
    metrics: dict[str, Any] = {}
    meta = trainer._compute_advantage(trainer._compute_old_log_prob(meta, metrics), metrics)
    plain = group_relative(rewards, [rollout.uid for rollout in batch])
    for row, reward, rollout in zip(advantages(meta), plain, batch, strict=True):
        expected = reward * torch.tensor(rollout.response_mask).double()
        assert_close(row, expected, name=f"advantages of {rollout.uid}", floor=1e-5)
    assert not any(name.startswith("vgpo/") for name in metrics)


@pytest.mark.parametrize("bypass", [False, True])
def test_trainers_with_padded_batches(model: Any, monkeypatch: pytest.MonkeyPatch, bypass: bool) -> None:
    """One-step-off and fully async: prompts padded to the left, responses to the right."""
    batch = rollouts()
    hidden = last_hidden_states(model, batch)
    data = padded(batch)
    config = settings(
        algorithm__vgpo={"preset": "paper"},
        algorithm__adv_estimator="grpo",
        algorithm__rollout_correction={"bypass_mode": bypass},
        actor_rollout_ref__actor__strategy="fsdp2",
    )
    trainer = trainer_of(SeparateRayPPOTrainer, config, engine_of(model, monkeypatch))
    workers = trainer.actor_rollout_wg
    trainer.reward_tensor = data.batch["rm_scores"]
    trainer.reward_extra_infos_dict = {}
    data = trainer._fit_compute_log_prob(data)
    assert "compute_log_prob" not in vars(workers) or workers.compute_log_prob.__self__ is workers
    data = trainer._fit_compute_advantage(data)
    expected = expected_factors(batch, hidden, VGPOConfig.paper())
    plain = group_relative([*range(len(batch))], [rollout.uid for rollout in batch])
    for index, (row, of_tokens, reward) in enumerate(zip(data.batch["advantages"], expected, plain, strict=True)):
        mask = torch.tensor(batch[index].response_mask)
        values = reward * torch.tensor(of_tokens).double() * mask
        assert_close(row[: len(mask)], values, name=f"advantages {index}", floor=1e-4)
        assert not row[len(mask) :].any()
    assert trainer.metrics.items() >= METRICS.items()
    assert trainer.metrics["vgpo/scoring_seconds_total"] > 0
    assert trainer.vgpo_reweighted


class Group:
    """A worker group whose model is loaded when it is told to."""

    def __init__(self) -> None:
        self.loaded = False

    def init_model(self) -> None:
        self.loaded = True


@pytest.mark.parametrize("kind", [OneStepOffRayTrainer, FULLY_ASYNC], ids=["one-step-off", "fully async"])
def test_workers_are_asked_once_their_models_are_loaded(
    data_plane: None, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = object.__new__(kind)
    trainer.config = settings(algorithm__vgpo={"preset": "paper"})
    trainer.use_critic = trainer.use_reference_policy = trainer.use_rm = False
    trainer.train_role, trainer.device_name = Role.Actor, "cpu"
    trainer.resource_pool_manager = ResourcePoolManager(resource_pool_spec={}, mapping={})
    asked: list[list[bool]] = []

    def join_all(groups: Any, method: str) -> list[run.Worker]:
        assert method == "vgpo"
        asked.append([group.loaded for group in groups])
        return [run.Worker("here", "0", "cpp")]

    monkeypatch.setattr(run, "join_all", join_all)
    trainer._init_resource_pools()
    trainer._init_worker_groups()
    trainer.all_wg[str(Role.Actor)] = Group()
    trainer._init_models()
    assert asked == [[True]]


@pytest.mark.parametrize("kind", [OneStepOffRayTrainer, FULLY_ASYNC, RayPPOTrainer])
def test_an_update_of_plain_advantages_is_refused(kind: type) -> None:
    """Of a trainer that computes them by itself, or of a legacy one that sets up its workers by itself."""
    trainer = object.__new__(kind)
    trainer.config = settings(algorithm__vgpo={"preset": "paper"})
    with pytest.raises(RuntimeError, match=r"computes advantages by itself, so algorithm\.vgpo did not re-weight"):
        trainer._update_actor(padded(rollouts()))


def padded(batch: list[Rollout]) -> DataProto:
    """A rollout batch as verl's padded trainers hold it."""
    prompt = max(len(rollout.prompt) for rollout in batch)
    response = max(len(rollout.response) for rollout in batch)
    names = ("prompts", "responses", "attention_mask", "response_mask")
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    scores = torch.zeros(len(batch), response)
    for index, rollout in enumerate(batch):
        left, right = prompt - len(rollout.prompt), response - len(rollout.response)
        columns["prompts"].append([0] * left + rollout.prompt)
        columns["responses"].append(rollout.response + [0] * right)
        columns["attention_mask"].append([0] * left + [1] * len(rollout.ids) + [0] * right)
        columns["response_mask"].append(rollout.response_mask + [0] * right)
        scores[index, len(rollout.response) - 1] = index
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    tensors["input_ids"] = torch.cat([tensors["prompts"], tensors["responses"]], dim=-1)
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    tensors["rm_scores"] = scores
    tensors["rollout_log_probs"] = torch.full(scores.shape, -1.0)
    uids = np.array([rollout.uid for rollout in batch], dtype=object)
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids}, meta_info={"temperature": 1.0})


def test_verls_legacy_trainer_is_refused() -> None:
    trainer = object.__new__(RayPPOTrainer)
    trainer.config = settings(algorithm__vgpo={"preset": "paper"})
    with pytest.raises(ValueError, match=r"does not work with verl's legacy trainer \(trainer.use_v1=false\)"):
        trainer.init_workers()

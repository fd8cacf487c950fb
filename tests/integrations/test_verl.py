"""The verl adapter against the installed verl: its registries, its losses, its engine and its nested batches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.rollout_case import IMAGE, METRICS, Rollout, expected_factors, last_hidden_states, rollouts
from tolerance import assert_close
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed (make verl installs it)")
transformers = pytest.importorskip("transformers")

from tensordict import TensorDict  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.engine.fsdp import transformer_impl  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

from vgpo_kernels import VGPOConfig, visual_focus, visual_weights  # noqa: E402
from vgpo_kernels.integrations import verl as adapter  # noqa: E402
from vgpo_kernels.integrations.surface import UnknownSurfaceError, config_from, require  # noqa: E402

PAIRS = {"vgpo": "vanilla", "vgpo_gspo": "gspo", "vgpo_cispo": "cispo", "vgpo_sapo": "sapo"}
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def draw(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(5, 9, generator=generator)

    mask = torch.rand(5, 9, generator=generator) > 0.3
    mask[3] = False
    log_prob = -normal().abs()
    return {
        "old_log_prob": log_prob + 0.4 * normal(),
        "log_prob": log_prob,
        "advantages": normal(),
        "response_mask": mask,
        "rollout_is_weights": normal().abs(),
    }


def actor_config(**global_batch: Any) -> ActorConfig:
    # Other numbers than policy_loss would take by itself.
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.15,
        clip_ratio_high=0.35,
        tau_pos=0.8,
        tau_neg=1.2,
    )
    config.global_batch_info.update(global_batch)
    return config


@pytest.mark.parametrize("global_batch", [{}, {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 10}], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", PAIRS)
def test_losses_equal_verls_own(mode: str, aggregation: str, global_batch: dict[str, Any]) -> None:
    results = []
    for name in (mode, PAIRS[mode]):
        arguments = draw()
        arguments["log_prob"].requires_grad_()
        loss_fn = core_algos.get_policy_loss_fn(name)
        loss, metrics = loss_fn(**arguments, loss_agg_mode=aggregation, config=actor_config(**global_batch))
        loss.backward()
        results.append((loss, arguments["log_prob"].grad, metrics))
    (loss, gradient, metrics), (expected_loss, expected_gradient, expected_metrics) = results
    assert_close(loss, expected_loss.double(), name="loss", floor=1e-6)
    assert_close(gradient, expected_gradient.double(), name="gradient", floor=1e-6)
    assert metrics == pytest.approx(expected_metrics, abs=1e-6)


@pytest.mark.parametrize("gap", [-40.0, -19.0, 12.0, 16.0, 19.0, 40.0])
@pytest.mark.parametrize("mode", PAIRS)
def test_metrics_of_large_ratios_are_verls(mode: str, gap: float) -> None:
    arguments = draw()
    arguments["response_mask"][0, :2] = True
    arguments["old_log_prob"][0, 0] = arguments["log_prob"][0, 0] - gap
    ours, verls = (
        core_algos.get_policy_loss_fn(name)(**arguments, loss_agg_mode="token-mean", config=actor_config())
        for name in (mode, PAIRS[mode])
    )
    assert ours[1] == pytest.approx(verls[1], rel=1e-5, abs=1e-6)
    assert_close(ours[0], verls[0].double(), name="loss", floor=1e-6)


@pytest.mark.parametrize("mode", PAIRS)
def test_a_micro_batch_without_a_scored_token(mode: str) -> None:
    """verl's metrics are 0, and its loss is 0 / 0 where the batch's number of tokens is not given; ours is 0."""
    arguments = draw()
    arguments["response_mask"][:] = False
    arguments["log_prob"].requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(mode)(**arguments, loss_agg_mode="token-mean", config=actor_config())
    _, expected = core_algos.get_policy_loss_fn(PAIRS[mode])(
        **arguments, loss_agg_mode="token-mean", config=actor_config()
    )
    assert metrics == expected == dict.fromkeys(expected, 0.0)
    loss.backward()
    assert loss == 0
    assert not arguments["log_prob"].grad.any()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    config.image_token_id = IMAGE
    return transformers.Qwen2ForCausalLM(config).eval()


LENGTHS = ((6, 4), (5, 7), (8, 3))  # prompt and response


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def micro_batch(**non_tensor: Any) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    sequences, masks = [], []
    for prompt, response in LENGTHS:
        ids = torch.randint(8, 32, (prompt + response,), generator=generator)
        ids[1:4] = IMAGE
        sequences.append(ids)
        masks.append(torch.ones(response, dtype=torch.int64))
    data = TensorDict(
        {
            "input_ids": nested(sequences),
            "position_ids": nested([torch.arange(len(ids)) for ids in sequences]),
            "response_mask": nested(masks),
        },
        batch_size=len(LENGTHS),
    )
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=False, temperature=1.0, calculate_entropy=False, compute_loss=False, **non_tensor
    )
    return data


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


def test_the_engine_scores_focus_beside_log_probs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, monkeypatch)
    with torch.no_grad():
        _, plain = engine.forward_step(micro_batch(), None, forward_only=True)
        _, scored = engine.forward_step(micro_batch(**{adapter.FLAG: True}), None, forward_only=True)
    assert adapter.FIELD not in plain["model_output"]
    assert torch.equal(plain["model_output"]["log_probs"].values(), scored["model_output"]["log_probs"].values())

    data = micro_batch()
    cos = response_from_nested(scored["model_output"][adapter.FIELD], data["response_mask"])
    for index, ids in enumerate(data["input_ids"].unbind()):
        with torch.no_grad():
            states = model.model(ids[None]).last_hidden_state
        scored_tokens = torch.arange(len(ids))[None] >= LENGTHS[index][0]
        expected = visual_focus(states, (ids == IMAGE)[None], scored_tokens)[scored_tokens]
        assert_close(cos.unbind()[index], expected.double(), name=f"focus of sequence {index}", floor=1e-5)


class Queue(ModuleType):
    """verl's data plane, in a TensorDict."""

    def __init__(self, fields: TensorDict) -> None:
        super().__init__("transfer_queue")
        self.fields = fields

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        return self.fields.select(*select_fields, strict=False)

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> Any:
        self.fields.update(fields)
        return SimpleNamespace(keys=keys, partition_id=partition_id, extra_info={})


class Settings(dict[str, Any]):
    """A configuration node."""

    __getattr__ = dict.__getitem__


class Trainer:
    """The methods of verl's trainer that the adapter builds on."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.flag_during_pass: bool | None = None

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        self.flag_during_pass = batch.extra_info[adapter.FLAG]
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return batch


def trainer_config(algorithm: dict[str, Any], strategy: str = "fsdp") -> Any:
    actor = SimpleNamespace(strategy=strategy)
    return SimpleNamespace(algorithm=Settings(algorithm), actor_rollout_ref=SimpleNamespace(actor=actor))


class Keys(SimpleNamespace):
    """A batch by reference."""

    def __len__(self) -> int:
        return len(self.keys)


def test_the_trainer_reweights_whole_groups_by_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = [5, 3, 6, 4]
    uids = ["a", "b", "a", "b"]
    cos = [torch.rand(length, generator=generator) for length in lengths]
    cos[3] = torch.full((4,), torch.nan)  # no image
    advantages = [torch.randn(length, generator=generator) for length in lengths]
    # As the engine leaves it: a prompt of two before each response, all of it one place to the left.
    focus = nested([torch.cat([torch.zeros(1), part, torch.zeros(1)]) for part in cos])
    fields = {
        "uid": uids,
        "response_mask": nested([torch.ones(length, dtype=torch.int64) for length in lengths]),
        adapter.FIELD: focus,
        "advantages": nested(advantages),
    }
    queue = Queue(tensordict_utils.get_tensordict(fields))
    monkeypatch.setitem(sys.modules, "transfer_queue", queue)
    trainer = adapter.visually_guided(Trainer)(trainer_config({"vgpo": {"beta": 0.5}}))
    batch = Keys(keys=list("wxyz"), partition_id="train", extra_info={})
    metrics: dict[str, Any] = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    assert trainer.flag_during_pass is True
    assert batch.extra_info[adapter.FLAG] is False, "the reference pass must not score again"
    trainer._compute_advantage(batch, metrics)

    padded = torch.nested.to_padded_tensor(nested(cos), 0.0)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected = visual_weights(padded, mask, torch.tensor([0, 1, 0, 1]), VGPOConfig.paper(beta=0.5)).factors
    for index, (part, before) in enumerate(zip(queue.fields["advantages"].unbind(), advantages, strict=True)):
        assert_close(part, (before * expected[index, : lengths[index]]).double(), name=f"advantages {index}")
    assert metrics["vgpo/weighted_responses"] == 3


def as_verl_keeps(batch: list[Rollout]) -> TensorDict:
    """A rollout batch as verl's agent loop writes it: one record per response, nested where lengths differ."""
    records = []
    for rollout in batch:
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
            }
        )
    return tensordict_utils.list_of_dict_to_tensordict(records)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_agents_leave_behind(model: Any, monkeypatch: pytest.MonkeyPatch, packed: bool, preset: str) -> None:
    """Filtered responses, one without an image, sampled placeholders, images that tools show: engine to advantages."""
    batch = rollouts()
    hidden = last_hidden_states(model, batch)
    data = as_verl_keeps(batch)
    if packed:
        # Without flash attention packed sequences see each other, so the engine's pass cannot run here.
        ids, mask = data["input_ids"], data["response_mask"]
        cos = adapter.focus_of_packed(torch.cat([*hidden, torch.zeros(3, 24)])[None], ids, model, mask)
        focus = torch.nested.nested_tensor_from_jagged(cos, ids.offsets())
    else:
        tensordict_utils.assign_non_tensor(
            data, use_remove_padding=False, temperature=1.0, calculate_entropy=False, compute_loss=False
        )
        tensordict_utils.assign_non_tensor(data, **{adapter.FLAG: True})
        engine = engine_of(model, monkeypatch)
        parts = []
        for part in tensordict_utils.chunk_tensordict(data, 3):
            with torch.no_grad():
                _, output = engine.forward_step(part, None, forward_only=True)
            parts += output["model_output"][adapter.FIELD].unbind()
        focus = nested(parts)
    generator = torch.Generator().manual_seed(3)
    before = [torch.randn(len(rollout.response), generator=generator) for rollout in batch]
    fields = {
        "uid": data.get("uid"),
        "response_mask": data["response_mask"],
        adapter.FIELD: focus,
        "advantages": nested(before),
    }
    queue = Queue(TensorDict(fields, batch_size=len(batch)))
    monkeypatch.setitem(sys.modules, "transfer_queue", queue)
    trainer = adapter.visually_guided(Trainer)(trainer_config({"vgpo": {"preset": preset}}))
    metrics: dict[str, Any] = {}
    trainer._compute_advantage(Keys(keys=list("abcdefghi"), partition_id="train", extra_info={}), metrics)

    expected = expected_factors(batch, hidden, config_from({"preset": preset}))
    after = queue.fields["advantages"].unbind()
    for index, (one, other, factors) in enumerate(zip(after, before, expected, strict=True)):
        assert_close(one, other.double() * torch.tensor(factors), name=f"advantages {index}", floor=1e-4)
    unweighted = [index for index, factors in enumerate(expected) if set(factors) == {1.0}]
    assert unweighted == [3, 4]
    for index in unweighted:
        assert torch.equal(after[index], before[index])
    assert metrics.items() >= METRICS.items()
    assert all(value == value for value in metrics.values())


@pytest.fixture
def data_plane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """verl's own, on Ray in processes of its own."""
    ray = pytest.importorskip("ray")
    queue = pytest.importorskip("transfer_queue")
    omegaconf = pytest.importorskip("omegaconf")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # its token would be written to the home folder
    # A storage unit waits for a CPU of its own.
    ray.init(num_cpus=16, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    try:
        units = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
        queue.init(omegaconf.OmegaConf.create({"backend": units}))
        yield queue
    finally:
        ray.shutdown()


def test_factors_through_verls_data_plane(model: Any, data_plane: Any) -> None:
    """Names of prompts, nested masks and NaN come back from another process as the adapter reads them."""
    batch = rollouts()
    hidden = last_hidden_states(model, batch)
    data = as_verl_keeps(batch)
    ids = data["input_ids"]
    cos = adapter.focus_of_packed(torch.cat(hidden)[None], ids, model, data["response_mask"])
    data[adapter.FIELD] = torch.nested.nested_tensor_from_jagged(cos, ids.offsets())
    data["advantages"] = nested([torch.ones(len(rollout.response)) for rollout in batch])
    keys = [f"{rollout.uid}_{index}_0" for index, rollout in enumerate(batch)]
    stored = data_plane.kv_batch_put(keys=keys, partition_id="train", fields=data, tags=[{} for _ in keys])
    metrics: dict[str, Any] = {}
    trainer = adapter.visually_guided(Trainer)(trainer_config({}))
    trainer._compute_advantage(stored, metrics)
    found = data_plane.kv_batch_get(keys=keys, partition_id="train", select_fields=["advantages"])["advantages"]
    expected = expected_factors(batch, hidden, VGPOConfig.paper())
    for index, (row, factors) in enumerate(zip(found.unbind(), expected, strict=True)):
        assert_close(row, torch.tensor(factors).double(), name=f"advantages {index}", floor=1e-4)
    assert metrics.items() >= METRICS.items()

    # The same batch, of an engine that computes no focus.
    plain = data.select("uid", "response_mask", "advantages")
    stored = data_plane.kv_batch_put(keys=keys, partition_id="val", fields=plain, tags=[{} for _ in keys])
    with pytest.raises(RuntimeError, match="old-log-prob pass left no visual_focus: verl's FSDP engine and those"):
        trainer._compute_advantage(stored, metrics)


def test_the_mask_of_responses_has_to_be_nested(model: Any) -> None:
    ids = as_verl_keeps(rollouts())["input_ids"]
    with pytest.raises(TypeError, match=r"response_mask must be nested as input_ids is, got .*\[9, 4\]"):
        adapter.focus_of_packed(torch.zeros(1, 200, 24), ids, model, torch.ones(9, 4))


def test_a_run_without_the_scoring_pass_is_refused() -> None:
    trainer = adapter.visually_guided(Trainer)
    with pytest.raises(ValueError, match="bypass_mode"):
        trainer(trainer_config({"rollout_correction": {"bypass_mode": True}}))


def test_an_engine_that_leaves_no_focus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"uid": ["a"], "response_mask": nested([torch.ones(2)]), "advantages": nested([torch.ones(2)])}
    monkeypatch.setitem(sys.modules, "transfer_queue", Queue(tensordict_utils.get_tensordict(fields)))
    trainer = adapter.visually_guided(Trainer)(trainer_config({}, "an engine of one's own"))
    with pytest.raises(RuntimeError, match=r"left no visual_focus: .*FSDP.*; score_focus adds it to others"):
        trainer._compute_advantage(Keys(keys=["x"], partition_id="train", extra_info={}), {})


@pytest.mark.parametrize("file", ["ppo", "ppo_megatron", "ppo_torchtitan", "ppo_veomni"])
def test_verls_configurations_are_refused_by_their_engine(file: str) -> None:
    """verl's own files of settings, one for each engine."""
    omegaconf = pytest.importorskip("omegaconf")
    folder = Path(core_algos.__file__).parents[1] / "config"
    config = omegaconf.OmegaConf.load(folder / f"_generated_{file}_trainer.yaml")
    trainer = adapter.visually_guided(Trainer)
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy in ("fsdp", "veomni"):
        assert trainer(config).config is config
        return
    with pytest.raises(ValueError, match=f"strategy={strategy} does not work with trainer_mode=vgpo: verl's FSDP"):
        trainer(config)


def test_engines_inherit_the_scoring_pass_or_are_refused() -> None:
    """Each language model's engine that verl could import here, by the strategy that it is registered as."""
    registered = transformer_impl.EngineRegistry._engines["language_model"]
    assert {"fsdp", "fsdp2", "fsdp_turbo"} <= set(registered)
    for strategy, engines in registered.items():
        for engine in engines.values():
            scores = getattr(engine.forward_step, "scores_visual_focus", False)
            assert scores == (strategy not in adapter.WITHOUT_FOCUS), strategy


def test_importing_registers_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = transformer_impl.FSDPEngineWithLMHead.forward_step
    adapter.register()
    assert transformer_impl.FSDPEngineWithLMHead.forward_step is step
    assert set(PAIRS) <= set(core_algos.POLICY_LOSS_REGISTRY)


def test_the_trainer_is_registered_where_it_can_be() -> None:
    v1 = pytest.importorskip("verl.trainer.ppo.v1", reason="verl's trainer needs its full set of dependencies")
    trainer = v1.get_trainer_cls("vgpo")
    assert issubclass(trainer, v1.PPOTrainerSync)


def test_another_surface_is_refused() -> None:
    with pytest.raises(UnknownSurfaceError, match=r"has no score: this adapter knows verl 0\.9"):
        require(Trainer, "score", (), adapter.KNOWN)
    with pytest.raises(UnknownSurfaceError, match=r"takes \(self, batch, metrics\), not data"):
        require(Trainer, "_compute_advantage", ("data",), adapter.KNOWN)


def test_settings_come_from_a_mapping() -> None:
    assert config_from({}) == VGPOConfig.paper()
    released = VGPOConfig.released()
    assert config_from({"preset": "released", "intra_clamp": [0.5, 1.5]}).intra_clamp == (0.5, 1.5)
    for none in ([], (), None):
        assert config_from({"preset": "released", "intra_clamp": none}) == replace(released, intra_clamp=None)
    omegaconf = pytest.importorskip("omegaconf")  # as verl hands its settings over
    given = omegaconf.OmegaConf.create({"preset": "released", "intra_clamp": [], "inter_clamp": [0.5, 1.5]})
    assert config_from(given) == replace(released, intra_clamp=None, inter_clamp=(0.5, 1.5))
    with pytest.raises(ValueError, match="preset"):
        config_from({"preset": "papers"})
    with pytest.raises(ValueError, match="gamma"):
        config_from({"gamma": 0.5})

"""The adapter in EasyR1's own code, one case in a process of its own: ``easyr1_case.py CASE ...``.

EasyR1 calls its package ``verl``, so its checkout comes first in PYTHONPATH. What a CPU cannot have is replaced:
the packages of :mod:`easyr1_stand_ins`, which are there already, the kernel of flash-attn, and the device's name.
"""

from __future__ import annotations

import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from equations import factors, focus, positions
from integrations import easyr1_stand_ins
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.easyr1 import compute_policy_loss, patch_easyr1

IMAGE, VIDEO, START, END = 7, 6, 5, 4
TEMPERATURE = 1.3
CONFIG = VGPOConfig.released(beta=0.4, top_ratio=0.5)
SIDE = 8  # pixels of an image token
LIMITS = {"min_pixels": SIDE**2, "max_pixels": 100 * SIDE**2}


class Batch(NamedTuple):
    uids: list[str]
    prompts: list[list[int]]
    responses: list[list[int]]
    images: list[tuple[int, int] | None]  # height and width


def rollouts() -> Batch:
    """Eight responses to four prompts in no order: of one image, of two sizes, and one of text alone."""
    generator = torch.Generator().manual_seed(3)

    def words(number: int) -> list[int]:
        return torch.randint(8, 60, (number,), generator=generator).tolist()

    images = {"a": (2, 2), "b": (2, 3), "text": None, "c": (4, 2)}
    prompts = {
        uid: words(2 + place) + ([] if size is None else [START, *[IMAGE] * (size[0] * size[1]), END]) + words(3)
        for place, (uid, size) in enumerate(images.items())
    }
    uids = ["a", "b", "text", "c", "b", "c", "a", "text"]
    return Batch(
        uids,
        [prompts[uid] for uid in uids],
        [words(number) for number in (7, 4, 5, 9, 8, 3, 6, 7)],
        [images[uid] for uid in uids],
    )


def make_model(vision: bool) -> Any:
    """A tiny model of transformers: Qwen2.5-VL, or Qwen2, in which an image token is a word like any other."""
    import transformers

    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not vision:
        config = transformers.Qwen2Config(**text, attn_implementation="sdpa")
        config.image_token_id = IMAGE
        return transformers.Qwen2ForCausalLM(config).eval()
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": SIDE // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 4 * SIDE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation="sdpa",
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def as_easyr1_keeps(batch: Batch, vision: bool) -> Any:
    """A DataProto as the rollout leaves it: prompts padded to the left, responses to the right, images as images."""
    from PIL import Image
    from verl.protocol import DataProto

    before, after = (max(map(len, rows)) for rows in (batch.prompts, batch.responses))
    ids = torch.zeros(len(batch.uids), before + after, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        place = slice(before - len(prompt), before + len(response))
        ids[row, place] = torch.tensor(prompt + response)
        attended[row, place] = 1
    text = (attended.cumsum(-1) - 1).clamp(min=0)
    tensors = {
        "input_ids": ids,
        "attention_mask": attended,
        "position_ids": text[:, None].repeat(1, 4, 1) if vision else text,
        "responses": ids[:, before:].clone(),
        "response_mask": attended[:, before:].clone(),
    }
    others = {"uid": np.array(batch.uids, dtype=object)}
    if vision:
        shades = np.random.default_rng(0)
        shown = {
            uid: {"images": [] if size is None else [Image.fromarray(picture(shades, size))]}
            for uid, size in zip(batch.uids, batch.images, strict=True)
        }
        others["multi_modal_data"] = np.array([shown[uid] for uid in batch.uids], dtype=object)
    return DataProto.from_dict(tensors, others, {"temperature": TEMPERATURE, **LIMITS, "video_fps": 2.0})


def picture(shades: np.random.Generator, size: tuple[int, int]) -> Any:
    return shades.integers(0, 256, (size[0] * SIDE, size[1] * SIDE, 3), dtype=np.uint8)


def make_worker(model: Any, mesh: Any = None, **settings: Any) -> Any:
    """A worker of EasyR1 as ``init_model`` leaves it, around this model."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from verl.workers.actor.config import ActorConfig
    from verl.workers.actor.dp_actor import DataParallelPPOActor
    from verl.workers.fsdp_workers import FSDPWorker
    from verl.workers.sharding_manager.fsdp_ulysses import FSDPUlyssesShardingManager

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    config = ActorConfig(
        micro_batch_size_per_device_for_experience=2,
        micro_batch_size_per_device_for_update=2,
        use_torch_compile=False,
        **settings,
    )
    config.global_batch_size_per_device = 4
    if config.padding_free:
        attend_without_padding(model)
    images = Qwen2VLImageProcessor(patch_size=SIDE // 2, merge_size=2, **LIMITS)
    worker = object.__new__(FSDPWorker)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vars(worker).update(
        _has_actor=True,
        _use_param_offload=False,
        _cache={},
        _world_size=1 if mesh is None else mesh.size(),
        _rank=0 if mesh is None else mesh.get_rank(),
        config=SimpleNamespace(actor=config, rollout=SimpleNamespace(temperature=TEMPERATURE)),
        processor=SimpleNamespace(image_processor=images),
        ulysses_sharding_manager=FSDPUlyssesShardingManager(mesh),
        fsdp_module=model,
        actor=DataParallelPPOActor(config, model, optimizer),
    )
    return worker


def attend_without_padding(model: Any) -> None:
    """What EasyR1 does to a model where padding is taken away, but for the kernel of flash-attn at the very end."""
    from verl.models import monkey_patch
    from verl.models.transformers import flash_attention_utils as ours

    monkey_patch.apply_ulysses_patch(model.config.model_type)
    vars(ours).update(
        flash_attn_varlen_func=easyr1_stand_ins.attention_of_packed,
        _flash_attention_forward=easyr1_stand_ins.attention_of_one,
        _flash_supports_window_size=False,
        _flash_supports_deterministic=False,
        _flash_use_top_left_mask=False,
        fa_peft_integration_check=lambda *states, target_dtype: states,  # it casts fp32 for flash-attn
    )
    getattr(model.model, "language_model", model.model).config._attn_implementation = "flash_attention_2"


def last_hidden_states(model: Any, data: Any, row: int) -> Tensor:
    """Last hidden states ``[S, D]`` of one sequence by itself, by transformers alone."""
    own = data.batch[row]
    seen = own["attention_mask"].bool()
    inputs = {"input_ids": own["input_ids"][seen][None]}
    if "multi_modal_inputs" in data.non_tensor_batch:
        inputs |= data.non_tensor_batch["multi_modal_inputs"][row]
        inputs["position_ids"] = own["position_ids"][None, :, seen].transpose(0, 1)
    with torch.no_grad():
        return model.model(**inputs).last_hidden_state[0]  # type: ignore[no-any-return]


def expected(model: Any, data: Any) -> tuple[list[list[float]], list[list[float]]]:
    """Cosines and factors of each response by the paper's equations."""
    cosines = []
    for row, attended in enumerate(data.batch["attention_mask"].bool()):
        length = int(data.batch["response_mask"][row].sum())
        ids = data.batch["input_ids"][row][attended]
        visual = ids == IMAGE
        whole = positions(last_hidden_states(model, data, row), visual, torch.ones(length))
        cosines.append(focus(whole, causal=True))
    weights = factors(cosines, list(data.non_tensor_batch["uid"]), CONFIG)
    return cosines, [one.factors for one in weights]


def with_rewards(data: Any) -> Any:
    scores = torch.zeros(data.batch["response_mask"].shape)
    last = data.batch["response_mask"].sum(-1, keepdim=True) - 1
    scores.scatter_(-1, last, torch.tensor([1.0, 0.2, 0.5, -1.0, 2.0, 1.5, -0.5, 0.1])[:, None])
    data.batch["token_level_scores"] = data.batch["token_level_rewards"] = scores
    return data


def check_worker(vision: bool, padding_free: bool) -> None:
    """From the old-log-prob pass over the advantages and the metrics to an update of the policy."""
    from verl.workers.fsdp_workers import FSDPWorker

    # update_policy sums over ranks.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    numbers_on_the_cpu()
    unpatched = FSDPWorker.compute_log_probs
    patch_easyr1(CONFIG)
    reference, model = make_model(vision), make_model(vision)
    for dynamic_batching in (False, True):
        settings = {"padding_free": padding_free, "dynamic_batching": dynamic_batching}
        data = with_rewards(as_easyr1_keeps(rollouts(), vision))
        plain = unpatched(make_worker(model, **settings), data)
        assert list(plain.batch.keys()) == ["old_log_probs"]
        worker = make_worker(model, **settings)
        found = worker.compute_log_probs(data)
        assert sorted(found.batch.keys()) == ["old_log_probs", "visual_focus"]
        assert torch.equal(found.batch["old_log_probs"], plain.batch["old_log_probs"])
        assert found.batch["old_log_probs"].dtype == plain.batch["old_log_probs"].dtype
        cosines, weights = expected(reference, data)
        for row, cos in enumerate(cosines):
            own = found.batch["visual_focus"][row, : len(cos)]
            assert_close(own, torch.tensor(cos).double(), name=f"focus {row}", floor=1e-5)
        data = data.union(found)
        check_advantages(data, weights)
        check_update(worker, data, settings)


def check_advantages(data: Any, weights: list[list[float]]) -> None:
    from verl.trainer import ray_trainer

    estimator = ray_trainer.AdvantageEstimator.GRPO
    before = ray_trainer.compute_advantage.__wrapped__(data, adv_estimator=estimator).batch["advantages"].clone()
    ray_trainer.compute_advantage(data, adv_estimator=estimator, gamma=1.0, lam=1.0)
    assert sum(len(set(row)) > 1 for row in weights) == 6
    for row, own in enumerate(weights):
        weighted = before[row, : len(own)] * torch.tensor(own)
        assert_close(data.batch["advantages"][row, : len(own)], weighted.double(), name=f"advantages {row}", floor=1e-4)
    metrics = ray_trainer.compute_data_metrics(batch=data, use_critic=False)
    assert metrics["vgpo/weighted_responses"] == 6 and metrics["vgpo/groups"] == 3
    assert metrics["critic/advantages/max"] == data.batch["advantages"].max().item()


def check_update(worker: Any, data: Any, settings: dict[str, bool]) -> None:
    """A step of EasyR1's own loss and one of the adapter's end at the same weights."""
    model = worker.actor.actor_module
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends, metrics = [], []
    for replace_loss in (False, True):
        patch_easyr1(CONFIG, replace_loss=replace_loss)
        model.load_state_dict(start)
        metrics.append(make_worker(model, **settings).actor.update_policy(data))
        ends.append(torch.cat([value.double().flatten() for value in model.state_dict().values()]))
    model.load_state_dict(start)
    moved = (ends[0] - torch.cat([value.double().flatten() for value in start.values()])).abs().max()
    assert moved > 1e-4
    assert_close(ends[1], ends[0], name="weights", floor=1e-5)
    assert metrics[0].keys() == metrics[1].keys()
    for name, values in metrics[0].items():
        assert_close(torch.tensor(metrics[1][name]), torch.tensor(values).double(), name=name, floor=1e-5)


def check_loss() -> None:
    """Every loss and average that this EasyR1 has, with responses without a token and ratios of any size."""
    from verl.trainer.core_algos import compute_policy_loss as own

    generator = torch.Generator().manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(6, 8, generator=generator)

    mask = (torch.rand(6, 8, generator=generator) > 0.3).long()
    mask[2] = 0
    logp, advantages = -normal().abs(), normal()
    old = logp + normal() * torch.tensor([0.1, 0.4, 1.0, 3.0, 0.4, 8.0])[:, None]
    logp.requires_grad_()
    rest = (old, logp, advantages, mask)
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_dual": 1.5}
    known = inspect.signature(own).parameters
    if "tau_positive" in known:
        options |= {"tau_positive": 0.8, "tau_negative": 1.1}
    kinds = ["default"]
    if "loss_type" in known:
        kinds += ["gspo_token", "cispo"] + (["gspo", "sapo"] if "tau_positive" in known else [])
    for kind in kinds:
        for average in ("token", "seq"):
            chosen = options | {"loss_avg_mode": average} | ({"loss_type": kind} if len(kinds) > 1 else {})
            exact, figures = own(*rest, **chosen)
            loss, metrics = compute_policy_loss(*rest, **chosen)
            (gradient,) = torch.autograd.grad(loss, logp)
            (wanted,) = torch.autograd.grad(exact, logp)
            assert_close(loss, exact.double(), name=f"loss {kind} {average}", floor=1e-5)
            assert_close(gradient, wanted.double(), name=f"gradient {kind} {average}", floor=1e-5)
            assert metrics.keys() == figures.keys(), (kind, metrics.keys() ^ figures.keys())
            for name, value in figures.items():
                assert math.isclose(metrics[name], value, abs_tol=1e-5), (kind, average, name, metrics[name], value)


def numbers_on_the_cpu() -> None:
    """Dynamic batching agrees on the number of micro-batches by a tensor on a GPU."""
    from verl.utils import seqlen_balancing

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def tensor(self, values: Any, **_: Any) -> Tensor:
            return torch.tensor(values)

    seqlen_balancing.torch = Torch()


def check_ulysses(rank: int, world: int, folder: Path) -> None:
    """A sequence-parallel group under FSDP: the focus of every row is that of one process, wherever its parts are."""
    from tensordict import TensorDict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    numbers_on_the_cpu()
    TensorDict.cuda = lambda self, device: self  # type: ignore[method-assign]
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "sp"))
    reference, model = make_model(vision=False), make_model(vision=False)
    attend_without_padding(model)
    sharded = FSDP(model, device_id=torch.device("cpu"), use_orig_params=True)
    data = as_easyr1_keeps(rollouts(), vision=False)
    cosines, _ = expected(reference, data)
    whole = make_worker(reference, padding_free=False, dynamic_batching=False).compute_log_probs(data)
    patch_easyr1(CONFIG)
    for dynamic_batching in (False, True):
        settings = {"padding_free": True, "dynamic_batching": dynamic_batching, "ulysses_size": world}
        own = data.chunk(world)[rank]
        found = make_worker(sharded, mesh, **settings).compute_log_probs(own).batch
        first = rank * len(found)
        for row in range(len(found)):
            cos = torch.tensor(cosines[first + row]).double()
            logp = whole.batch["old_log_probs"][first + row, : len(cos)].double()
            assert_close(found["visual_focus"][row, : len(cos)], cos, name=f"focus {first + row}", floor=1e-5)
            assert_close(found["old_log_probs"][row, : len(cos)], logp, name=f"log-probs {first + row}", floor=1e-5)
    dist.destroy_process_group()


def main(case: str, *rest: str) -> None:
    if case == "ulysses":
        check_ulysses(int(rest[0]), int(rest[1]), Path(rest[2]))
    elif case == "loss":
        check_loss()
    else:
        check_worker(vision=rest[0] == "images", padding_free=rest[1] == "padding-free")


if __name__ == "__main__":
    main(*sys.argv[1:])

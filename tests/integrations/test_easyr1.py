"""The EasyR1 adapter on a double of EasyR1's signatures: there is no package of it to install.

The double keeps what the adapter relies on: the parameters, what is returned, dynamic batching that reorders rows and
puts them back, and a forward pass with or without padding.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import VGPOConfig, visual_focus, visual_weights
from vgpo_kernels.integrations.easyr1 import AUTHORS_NAMES, authors_config, compute_policy_loss, patch_easyr1
from vgpo_kernels.integrations.surface import UnknownSurfaceError

transformers = pytest.importorskip("transformers")

IMAGE = 7
ORDER = [2, 0, 3, 1]


class DataProto(SimpleNamespace):
    batch: dict[str, Tensor]
    non_tensor_batch: dict[str, Any]


def make_modules() -> dict[str, Any]:
    """A fresh double of the three modules that are patched."""

    class DataParallelPPOActor:
        def __init__(self, actor_module: Any, padding_free: bool) -> None:
            self.actor_module, self.padding_free = actor_module, padding_free

        def _forward_micro_batch(self, micro_batch: dict[str, Tensor], temperature: float) -> Tensor:
            ids, attended = micro_batch["input_ids"], micro_batch["attention_mask"].bool()
            length = micro_batch["responses"].shape[-1]
            positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
            if self.padding_free:
                flat = self.actor_module(ids[attended][None], position_ids=positions[attended][None]).logits[0]
                logits = torch.zeros(*ids.shape, flat.shape[-1]).masked_scatter(attended[..., None], flat)
            else:
                logits = self.actor_module(ids, attention_mask=attended.long(), position_ids=positions).logits
            logits = logits[:, -length - 1 : -1] / temperature
            return logits.log_softmax(-1).gather(-1, micro_batch["responses"][..., None])[..., 0]

        @torch.no_grad()
        def compute_log_prob(self, data: DataProto) -> Tensor:
            parts = [ORDER[:1], ORDER[1:]]  # dynamic batching: by length, not by place
            outputs = [
                self._forward_micro_batch({name: value[part] for name, value in data.batch.items()}, temperature=1.0)
                for part in parts
            ]
            restored = torch.empty_like(torch.cat(outputs))
            restored[ORDER] = torch.cat(outputs)
            return restored

    class FSDPWorker:
        def __init__(self, actor: DataParallelPPOActor) -> None:
            self.actor = actor

        def compute_log_probs(self, data: DataProto) -> DataProto:
            return DataProto(batch={"old_log_probs": self.actor.compute_log_prob(data=data)})

    FSDPWorker.compute_log_probs.dispatch_mode = "DP_COMPUTE_PROTO"  # type: ignore[attr-defined]

    def compute_advantage(data: DataProto, adv_estimator: str, gamma: float = 1.0, lam: float = 1.0) -> DataProto:
        data.batch["advantages"] = data.batch["rewards"][:, None] * data.batch["response_mask"]
        return data

    def own_policy_loss(old_log_probs: Tensor, log_probs: Tensor, loss_avg_mode: str, **_: Any) -> Any:
        raise AssertionError("the adapter must have replaced this")

    named = {"__name__": "double"}
    return {
        "actor_module": SimpleNamespace(
            DataParallelPPOActor=DataParallelPPOActor, compute_policy_loss=own_policy_loss, **named
        ),
        "worker_module": SimpleNamespace(FSDPWorker=FSDPWorker, **named),
        "trainer_module": SimpleNamespace(compute_advantage=compute_advantage, **named),
    }


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    config.image_token_id = IMAGE
    return transformers.Qwen2ForCausalLM(config).eval()


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
    return DataProto(batch=tensors, non_tensor_batch={"uid": ["p", "q", "p", "q"]})


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_focus_travels_from_the_log_prob_pass_to_the_advantages(model: Any, padding_free: bool) -> None:
    config = VGPOConfig.released(beta=0.4)
    modules = make_modules()
    data = rollout()
    actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=False)
    plain = actor.compute_log_prob(data)
    patch_easyr1(config, **modules)
    # Without padding, one attention spans the packed rows of the double; rows alone keep it exact.
    actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=padding_free)
    if padding_free:
        actor.compute_log_prob = one_row_at_a_time(actor)
    worker = modules["worker_module"].FSDPWorker(actor)
    output = worker.compute_log_probs(data)
    ids, attended = data.batch["input_ids"], data.batch["attention_mask"].bool()
    mask = attended[:, 6:]
    assert_close(output.batch["old_log_probs"][mask], plain[mask].double(), name="log-probs", floor=1e-5)
    with torch.no_grad():
        positions = (attended.long().cumsum(-1) - 1).clamp(min=0)
        states = model.model(ids, attention_mask=attended.long(), position_ids=positions).last_hidden_state
    cos = visual_focus(states, ids == IMAGE, mask)
    assert_close(output.batch["visual_focus"], cos.double(), name="focus", floor=1e-5)

    data.batch |= output.batch | {"rewards": torch.tensor([1.0, -1.0, 0.5, 2.0]), "response_mask": mask.long()}
    data = modules["trainer_module"].compute_advantage(data, adv_estimator="grpo")
    factors = visual_weights(output.batch["visual_focus"], mask, torch.tensor([0, 1, 0, 1]), config).factors
    expected = data.batch["rewards"][:, None] * mask * factors
    assert_close(data.batch["advantages"], expected.double(), name="advantages")
    assert modules["actor_module"].compute_policy_loss is compute_policy_loss


def one_row_at_a_time(actor: Any) -> Any:
    def compute_log_prob(data: DataProto) -> Tensor:
        rows = [{name: value[row : row + 1] for name, value in data.batch.items()} for row in range(4)]
        with torch.no_grad():
            return torch.cat([actor._forward_micro_batch(row, 1.0) for row in rows])

    return compute_log_prob


def test_the_reference_and_update_passes_are_left_alone(model: Any) -> None:
    modules = make_modules()
    patch_easyr1(VGPOConfig.paper(), **modules)
    actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=False)
    data = rollout()
    assert actor._forward_micro_batch(data.batch, 1.0).shape == data.batch["responses"].shape


def test_patching_again_changes_the_settings_only(model: Any) -> None:
    modules = make_modules()
    patch_easyr1(VGPOConfig.paper(), **modules)
    patch_easyr1(VGPOConfig.paper(inter=False), **modules)
    actor = modules["actor_module"].DataParallelPPOActor
    assert not getattr(actor._forward_micro_batch.__wrapped__, "patched_by_vgpo", False)
    worker = modules["worker_module"].FSDPWorker
    assert worker.compute_log_probs.dispatch_mode == "DP_COMPUTE_PROTO", "dispatch marks must survive"


def test_another_surface_is_refused() -> None:
    modules = make_modules()
    modules["trainer_module"].compute_advantage = lambda batch: batch
    with pytest.raises(UnknownSurfaceError, match=r"compute_advantage takes \(batch\), not data.*EasyR1"):
        patch_easyr1(VGPOConfig.paper(), **modules)
    modules = make_modules()
    del modules["actor_module"].DataParallelPPOActor._forward_micro_batch
    with pytest.raises(UnknownSurfaceError, match="has no _forward_micro_batch"):
        patch_easyr1(VGPOConfig.paper(), **modules)


@pytest.mark.parametrize("average", ["token", "seq"])
@pytest.mark.parametrize("loss_type", ["default", "gspo", "gspo_token", "cispo", "sapo"])
def test_the_loss_is_easyr1s(loss_type: str, average: str) -> None:
    generator = torch.Generator().manual_seed(4)

    def normal() -> Tensor:
        return torch.randn(4, 6, generator=generator)

    mask = (torch.rand(4, 6, generator=generator) > 0.3).long()
    logp, advantages = -normal().abs(), normal()
    old = logp + 0.4 * normal()
    logp.requires_grad_()
    loss, metrics = compute_policy_loss(
        old, logp, advantages, mask, 0.1, 0.3, 1.5, tau_positive=0.8, tau_negative=1.1,
        loss_type=loss_type, loss_avg_mode=average,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logp)

    log_ratio = logp - old
    if loss_type.startswith("gspo"):
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        log_ratio = mean if loss_type == "gspo" else mean.detach() + logp - logp.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(0.9, 1.3)
    if loss_type == "cispo":
        token_loss = -advantages * logp * clipped.detach()
    elif loss_type == "sapo":
        tau = torch.where(advantages >= 0, 0.8, 1.1)
        token_loss = -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    else:
        upper = torch.maximum(-advantages * ratio, -advantages * clipped)
        token_loss = torch.where(advantages < 0, torch.minimum(upper, -advantages * 1.5), upper)
    if average == "token":
        expected = (token_loss * mask).sum() / mask.sum()
    else:
        expected = ((token_loss * mask).sum(-1) / mask.sum(-1)).mean()
    (expected_gradient,) = torch.autograd.grad(expected, logp)
    assert_close(loss, expected.double(), name="loss", floor=1e-6)
    assert_close(gradient, expected_gradient.double(), name="gradient", floor=1e-6)
    gap = ((old - logp) * mask).sum() / mask.sum()
    assert metrics["ppo_kl"] == pytest.approx(gap.item(), abs=1e-6)
    assert metrics["entropy_loss"] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo", "grpo", "luspo", "vespo", "ppo"])
def test_a_loss_that_easyr1_does_not_know_is_refused(loss_type: str) -> None:
    """They would be computed without EasyR1's dual clip."""
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"one of EasyR1's default, gspo, gspo_token, cispo, sapo, got '{loss_type}'"):
        compute_policy_loss(values, values, values, values.long(), 0.2, 0.3, 3.0, loss_type=loss_type)


def test_the_authors_names_are_understood() -> None:
    script = {
        "use_intra_trajectory_reweighting": True,
        "use_inter_trajectory_reweighting": False,
        "use_visual_compensation": True,
        "use_gated_visual_compensation": True,
        "gated_visual_compensation_start_ratio": 0.4,
        "visual_compensation_strength": 0.6,
        "visual_attention_threshold": 0.1,
        "visual_compensation_type": "step-function",
        "visual_compensation_step_ratio": 0.7,
        "visual_compensation_start_ratio": 0.2,
        "visual_compensation_exponent": 3.0,
        "adv_estimator": "grpo",
    }
    assert AUTHORS_NAMES.keys() <= script.keys()
    expected = VGPOConfig.released(
        inter=False,
        tail_ratio=0.4,
        beta=0.6,
        top_ratio=0.1,
        schedule="step",
        step_ratio=0.7,
        start_ratio=0.2,
        exponent=3.0,
    )
    assert authors_config(script) == expected
    assert authors_config({}) == VGPOConfig.released()
    assert authors_config({"use_visual_compensation": False}).beta == 0
    with pytest.raises(ValueError, match="inter_reweighting_gamma_late"):
        authors_config({"inter_reweighting_gamma_late": 0.9})

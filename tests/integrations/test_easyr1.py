"""The EasyR1 adapter on a double of EasyR1: there is no package of it to install.

test_easyr1_checkout.py runs it in the code of EasyR1 itself, where a checkout is.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.easyr1_double import DataProto, make_modules, rollout
from integrations.ranks import run_ranks
from integrations.rollout_case import (
    IMAGE,
    METRICS,
    Rollout,
    expected_factors,
    last_hidden_states,
    rollouts,
    tiny_model,
)
from tolerance import assert_close
from torch import Tensor

from vgpo_kernels import VGPOConfig, visual_focus, visual_weights
from vgpo_kernels.integrations.easyr1 import (
    AUTHORS_NAMES,
    AUTHORS_SWITCHES,
    authors_config,
    compute_policy_loss,
    patch_easyr1,
)
from vgpo_kernels.integrations.surface import UnknownSurfaceError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(layers=1)


@pytest.mark.parametrize("fork", [False, True], ids=["EasyR1", "fork"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_focus_travels_from_the_log_prob_pass_to_the_advantages(model: Any, padding_free: bool, fork: bool) -> None:
    config = VGPOConfig.released(beta=0.4)
    modules = make_modules(fork=fork)
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

    data.batch.update(output.batch)
    data.batch.update({"rewards": torch.tensor([1.0, -1.0, 0.5, 2.0]), "response_mask": mask.long()})
    data = modules["trainer_module"].compute_advantage(data, adv_estimator="grpo")
    factors = visual_weights(output.batch["visual_focus"], mask, torch.tensor([0, 1, 0, 1]), config).factors
    expected = data.batch["rewards"][:, None] * mask * factors
    assert_close(data.batch["advantages"], expected.double(), name="advantages")


def as_easyr1_keeps(batch: list[Rollout]) -> DataProto:
    """Prompts padded to the left, responses to the right."""
    before, after = max(len(rollout.prompt) for rollout in batch), max(len(rollout.response) for rollout in batch)

    def padded(rollout: Rollout, values: list[int]) -> list[int]:
        left, right = before - len(rollout.prompt), after - len(rollout.response)
        return [0] * left + values + [0] * right

    ids = torch.tensor([padded(rollout, rollout.ids) for rollout in batch])
    attended = torch.tensor([padded(rollout, [1] * len(rollout.ids)) for rollout in batch])
    mask = torch.tensor([padded(one, [0] * len(one.prompt) + one.response_mask)[before:] for one in batch])
    tensors = {"input_ids": ids, "attention_mask": attended, "responses": ids[:, before:], "response_mask": mask}
    return DataProto(tensors, uid=[rollout.uid for rollout in batch])


@pytest.mark.parametrize("tools", [False, True], ids=["without tools", "with tools"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_what_rollouts_leave_behind(model: Any, padding_free: bool, preset: str, tools: bool) -> None:
    """Filtered responses, one without an image, sampled placeholders; and images that a fork's tools show.

    EasyR1 itself has no tools, and does not hand its mask of responses to the pass.
    """
    batch = [rollout for rollout in rollouts() if tools or all(rollout.sampled)]
    data = as_easyr1_keeps(batch)
    config = getattr(VGPOConfig, preset)()
    modules = make_modules()
    patch_easyr1(config, **modules)
    actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=padding_free)
    if padding_free:
        actor.compute_log_prob = one_row_at_a_time(actor)
    handed = DataProto({name: value for name, value in data.batch.items() if tools or name != "response_mask"})
    data.batch.update(modules["worker_module"].FSDPWorker(actor).compute_log_probs(handed).batch)
    data.batch["rewards"] = torch.linspace(-1.0, 2.0, len(batch))
    data = modules["trainer_module"].compute_advantage(data, adv_estimator="grpo")

    expected = expected_factors(batch, last_hidden_states(model, batch), config)
    for index, (row, factors) in enumerate(zip(data.batch["advantages"], expected, strict=True)):
        before = data.batch["rewards"][index].double() * torch.tensor(batch[index].response_mask)
        found = row[: len(factors)]
        assert_close(found, before * torch.tensor(factors), name=f"advantages {index}", floor=1e-4)
        if set(factors) == {1.0}:
            assert torch.equal(found, before.float())
    metrics = modules["trainer_module"].compute_data_metrics(batch=data, use_critic=False)
    assert metrics["critic/advantages/mean"] == pytest.approx(data.batch["advantages"].mean().item())
    assert all(value == value for value in metrics.values())
    assert modules["trainer_module"].compute_data_metrics(batch=data).keys() == {"critic/advantages/mean"}, "said once"
    if tools:
        assert metrics.items() >= METRICS.items()
    else:
        assert metrics["vgpo/weighted_responses"] == 4 and metrics["vgpo/singleton_groups"] == 1


def test_log_probs_of_16_bits_do_not_round_the_focus(model: Any) -> None:
    data = rollout()
    plain, half = (make_modules() for _ in range(2))
    forward = half["actor_module"].DataParallelPPOActor._forward_micro_batch

    def in_bfloat16(self: Any, micro_batch: dict[str, Tensor], temperature: float) -> Tensor:
        return forward(self, micro_batch, temperature).bfloat16()

    half["actor_module"].DataParallelPPOActor._forward_micro_batch = in_bfloat16
    found = []
    for modules in (plain, half):
        patch_easyr1(VGPOConfig.paper(), **modules)
        actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=False)
        found.append(modules["worker_module"].FSDPWorker(actor).compute_log_probs(data).batch)
    assert torch.equal(found[0]["visual_focus"], found[1]["visual_focus"])
    assert found[1]["old_log_probs"].dtype == torch.bfloat16
    assert torch.equal(found[1]["old_log_probs"], found[0]["old_log_probs"].bfloat16())


def one_row_at_a_time(actor: Any) -> Any:
    def compute_log_prob(data: DataProto) -> Tensor:
        number = len(data.batch["input_ids"])
        rows = [{name: value[row : row + 1] for name, value in data.batch.items()} for row in range(number)]
        with torch.no_grad():
            found = [actor._forward_micro_batch(row, 1.0) for row in rows]
        return torch.cat([one if isinstance(one, Tensor) else one["log_probs"] for one in found])

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


def test_a_forward_pass_that_returns_something_else_is_refused(model: Any) -> None:
    modules = make_modules()
    actor_class = modules["actor_module"].DataParallelPPOActor
    forward = actor_class._forward_micro_batch

    def with_entropies(self: Any, micro_batch: dict[str, Tensor], temperature: float) -> Any:
        return None, forward(self, micro_batch, temperature)

    actor_class._forward_micro_batch = with_entropies
    patch_easyr1(VGPOConfig.paper(), **modules)
    worker = modules["worker_module"].FSDPWorker(actor_class(model, padding_free=False))
    with pytest.raises(UnknownSurfaceError, match=r"_forward_micro_batch returns neither log-probs.*but tuple.*EasyR1"):
        worker.compute_log_probs(rollout())


@pytest.mark.parametrize("switch", AUTHORS_SWITCHES)
def test_advantages_are_not_weighted_twice(model: Any, switch: str) -> None:
    """The authors' fork does it in its update, where its own settings are left on."""
    modules = make_modules(fork=True)
    patch_easyr1(VGPOConfig.paper(), **modules)
    for on in (True, False):
        actor = modules["actor_module"].DataParallelPPOActor(model, padding_free=False, **{switch: on})
        worker = modules["worker_module"].FSDPWorker(actor)
        if on:
            with pytest.raises(ValueError, match=f"weighted twice: {switch} must be false"):
                worker.compute_log_probs(rollout())
        else:
            assert "visual_focus" in worker.compute_log_probs(rollout()).batch.keys()  # noqa: SIM118


def test_the_loss_of_a_fork_can_stay() -> None:
    modules = make_modules(fork=True)
    values = torch.rand(2, 3)
    arguments = (values, values, values, torch.ones(2, 3), 0.2, 0.3, 3.0)
    for replace_loss in (True, False, True):
        patch_easyr1(VGPOConfig.paper(), replace_loss=replace_loss, **modules)
        loss = modules["actor_module"].compute_policy_loss
        if replace_loss:
            assert loss(*arguments)[1] == compute_policy_loss(*arguments)[1]
        else:
            assert loss(values, values, loss_avg_mode="token") == "the loss of the fork"


def test_what_a_fork_hands_to_the_loss_is_not_dropped() -> None:
    """Two forks pass loss_token_mask; one divides the loss by all scored tokens, the other by the chosen ones."""
    values = torch.rand(2, 3)
    arguments = (values, values, values, torch.ones(2, 3), 0.2, 0.3, 3.0)
    given = {"loss_token_mask": values, "loss_token_weights": values, "entropy_coef": 0.0}
    for name, value in given.items():
        message = rf"compute_policy_loss of vgpo_kernels has no {name}: patch_easyr1\(config, replace_loss=False\)"
        with pytest.raises(TypeError, match=message):
            compute_policy_loss(*arguments, **{name: value})
    assert torch.equal(compute_policy_loss(*arguments, **dict.fromkeys(given))[0], compute_policy_loss(*arguments)[0])


def test_a_module_that_is_still_imported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As EasyR1's trainer is, if it is imported first and lines at the end of the worker's module patch it."""
    call = "from vgpo_kernels.integrations.easyr1 import _imported\n_imported(__name__)\n"
    (tmp_path / "half_of_easyr1.py").write_text(call)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"half_of_easyr1 is still being imported.*end of verl/__init__.py"):
        importlib.import_module("half_of_easyr1")


@pytest.mark.slow
def test_parts_of_two_ranks_are_one_sequence(tmp_path: Path) -> None:
    """``ulysses_size=2``: each rank has a part of the packed hidden states."""
    pytest.importorskip("verl")
    run_ranks("easyr1_ranks_case.py", 2, tmp_path)


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

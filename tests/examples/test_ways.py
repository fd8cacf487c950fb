"""Every way to put VGPO into a loop gives one loss, and one gradient of every parameter, on one batch of rollouts.

The batch is what the examples sample: prompts of several lengths padded on the left, responses that end early, and two
policies apart. The models are real ones: the demo's, and a tiny Qwen2.5-VL, whose images have no row of their own.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

pytest.importorskip("trl")

from load_script import EXAMPLES, load_script
from trainer.tiny_runs import make_trainer, qwen2_5_vl
from vgpo_trainer.demo.warm_start import SHIPPED

from vgpo_kernels import (
    VGPOConfig,
    check_batch,
    combine_factors,
    group_weights,
    policy_loss,
    vgpo_loss,
    visual_focus,
    visual_weights,
)
from vgpo_kernels.integrations.transformers import capture_hidden_states, visual_mask

# In this order: the first is imported by the others.
grpo_own_loop, linear_own_loop, packed = (
    load_script(name, EXAMPLES) for name in ("grpo_own_loop", "linear_own_loop", "packed")
)
Prompt, Rollout, draw_prompts = grpo_own_loop.Prompt, grpo_own_loop.Rollout, grpo_own_loop.draw_prompts
forward, sample = grpo_own_loop.forward, grpo_own_loop.sample

QUESTIONS = ("Add the digits.", "digits", "Add digits. Add the digits.")
GENERATIONS = 4
CONFIG = VGPOConfig.paper()
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "integrate.md").read_text()
(LABELS,) = re.findall(r"^```python\n(labels = .*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@dataclass
class Case:
    model: Any
    processor: Any
    rollout: Rollout
    settings: Namespace

    @property
    def num_tokens(self) -> Tensor:
        return self.rollout.response_mask.sum()

    @property
    def ids(self) -> Tensor:
        return self.rollout.inputs["input_ids"]

    @property
    def images(self) -> Tensor:
        return visual_mask(self.ids, self.model, self.rollout.response_mask)


@pytest.fixture(scope="module", params=["demo", "qwen2_5_vl"])
def case(request) -> Case:
    settings = Namespace(model=str(SHIPPED), dtype="float32", device="cpu", generations=GENERATIONS)
    settings.temperature, settings.max_new_tokens, settings.skip_truncated = 1.3, 36, False
    model, processor = grpo_own_loop.load(settings) if request.param == "demo" else qwen2_5_vl()
    prompts = [
        Prompt(prompt.image, question, prompt.answer)
        for prompt, question in zip(draw_prompts(len(QUESTIONS), 0), QUESTIONS, strict=True)
    ]
    torch.manual_seed(0)
    rollout = sample(model, processor, prompts, settings)
    attended = rollout.inputs["attention_mask"]
    assert not attended[:, 0].all() and rollout.response_mask.sum(1).unique().numel() > 3, "padding on both sides"
    with torch.no_grad():
        logp = grpo_own_loop.log_probs(model, rollout, settings)
    rollout.old_logp = (logp + 0.3 * torch.randn(logp.shape)).clamp(max=0.0)
    rollout.advantages = torch.randn(rollout.advantages.shape)
    return Case(model, processor, rollout, settings)


def own_loss(case: Case) -> Tensor:
    """The README's first loss, with the advantage times the factors."""
    rollout = case.rollout
    logp, hidden = forward(case.model, rollout, case.settings)
    cos = visual_focus(hidden, case.images, rollout.response_mask)
    factors = visual_weights(cos, rollout.response_mask, rollout.group_ids, CONFIG).factors
    ratio = (logp - rollout.old_logp).exp()
    advantage = rollout.advantages[:, None] * factors
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    return -(surrogate * rollout.response_mask).sum() / rollout.response_mask.sum()


def three_lines(case: Case) -> Tensor:
    return grpo_own_loop.loss_of(case.model, case.rollout, case.num_tokens, case.settings, check=True).loss


def one_call(case: Case) -> Tensor:
    rollout = case.rollout
    logp, hidden = forward(case.model, rollout, case.settings)
    batch = (rollout.old_logp, rollout.advantages, case.images, rollout.response_mask, rollout.group_ids)
    return vgpo_loss(hidden, logp, *batch, CONFIG).loss


def without_logits(case: Case) -> Tensor:
    return linear_own_loop.loss_of(case.model, case.rollout, case.num_tokens, case.settings, check=True).loss


def without_padding(case: Case) -> Tensor:
    batch = packed.pack(case.model, case.rollout)
    assert batch.response_mask.numel() < case.ids.numel()
    return packed.packed_loss(case.model, case.rollout, batch, case.num_tokens, case.settings).loss


def rows_of(rollout: Rollout, rows: slice) -> Rollout:
    """Some responses of a rollout; the pixels of a row, which has one image, lie together."""
    size = len(rollout.rewards)
    inputs = {
        name: value.unflatten(0, (size, -1))[rows].flatten(0, 1).reshape(-1, *value.shape[1:])
        for name, value in rollout.inputs.items()
    }
    fields = ("response_mask", "group_ids", "rewards", "advantages", "old_logp")
    return replace(rollout, inputs=inputs, **{name: getattr(rollout, name)[rows] for name in fields})


def two_phases(case: Case) -> Tensor:
    """Micro-batches that cut every group: psi of each, phi of all, and losses that add up."""
    parts = [rows_of(case.rollout, rows) for rows in (slice(0, 2), slice(2, 7), slice(7, 12))]
    weights = []
    for part in parts:
        with torch.no_grad():
            _, hidden = forward(case.model, part, case.settings)
        images = visual_mask(part.inputs["input_ids"], case.model, part.response_mask)
        cos = visual_focus(hidden, images, part.response_mask)
        weights.append(visual_weights(cos, part.response_mask, part.group_ids, CONFIG))
    phi = group_weights(torch.cat([weight.score for weight in weights]), case.rollout.group_ids, CONFIG)
    total = torch.zeros(())
    shares = phi.split([len(part.rewards) for part in parts])
    for part, weight, share in zip(parts, weights, shares, strict=True):
        logp, _ = forward(case.model, part, case.settings)
        factors = combine_factors(weight.psi, share, part.response_mask, CONFIG)
        loss, _ = policy_loss(
            logp, part.old_logp, part.advantages, part.response_mask, factors=factors, num_tokens=case.num_tokens
        )
        loss.backward()
        total += loss.detach()
    return total


def with_labels(case: Case, *, on_the_right: bool = False) -> Tensor:
    """The layout of supervised losses, as docs/integrate.md has it: T = S - 1."""
    rollout = case.rollout
    width = case.ids.shape[1] - rollout.response_mask.shape[1]
    scored = pad(rollout.response_mask, (width, 0))
    old_logp = pad(rollout.old_logp, (width, 0))
    inputs = dict(rollout.inputs)
    if on_the_right:
        order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        inputs = {
            name: value.gather(1, order) if value.shape == order.shape else value for name, value in inputs.items()
        }
        assert inputs["attention_mask"][:, 0].all() and not inputs["attention_mask"][:, -1].all()
        scored, old_logp = scored.gather(1, order), old_logp.gather(1, order)
    ids = inputs["input_ids"]
    with capture_hidden_states(case.model) as captured:
        logits = case.model(**inputs, use_cache=False).logits
    scope = {"input_ids": ids, "sampled": scored, "logits": logits, "temperature": case.settings.temperature}
    exec(LABELS, scope)
    response_mask, logp = scope["response_mask"], scope["logp"]
    images = visual_mask(ids, case.model, response_mask)
    batch = (old_logp[:, 1:], rollout.advantages, images, response_mask, rollout.group_ids)
    check_batch(case.model, captured.hidden, ids, logp, *batch, temperature=case.settings.temperature, raises=True)
    return vgpo_loss(captured.hidden, logp, *batch, CONFIG).loss


def with_labels_padded_on_the_right(case: Case) -> Tensor:
    return with_labels(case, on_the_right=True)


def the_trainer(case: Case, folder: Any) -> Tensor:
    trainer = make_trainer(
        folder,
        model=case.model,
        family="llava" if case.model.config.model_type == "llava" else "qwen2_5_vl",
        loss_type="dapo",
        epsilon_high=0.28,
        temperature=case.settings.temperature,
        per_device_train_batch_size=len(case.rollout.rewards),
        num_generations=GENERATIONS,
        vgpo_signal="loss",
        rollout_samples=0,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rollout, width = case.rollout, case.ids.shape[1] - case.rollout.response_mask.shape[1]
    batch = {
        **{name: value for name, value in rollout.inputs.items() if name not in ("input_ids", "attention_mask")},
        "prompt_ids": case.ids[:, :width],
        "prompt_mask": rollout.inputs["attention_mask"][:, :width],
        "completion_ids": case.ids[:, width:],
        "completion_mask": rollout.response_mask.long(),
        "advantages": rollout.advantages,
        "old_per_token_logps": rollout.old_logp,
        "num_items_in_batch": case.num_tokens,
        "prompt_group": rollout.group_ids,
        "rollout_index": torch.arange(len(rollout.rewards)),
        "num_images": [1] * len(rollout.rewards),
    }
    return trainer._compute_loss(trainer.model, batch)


def gradients(case: Case, way: Callable[[Case], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    case.model.zero_grad()
    loss = way(case)
    if loss.requires_grad:
        loss.backward()
    found = {name: weight.grad.clone() for name, weight in case.model.named_parameters() if weight.grad is not None}
    return loss.detach(), found


@pytest.fixture(scope="module")
def expected(case) -> tuple[Tensor, dict[str, Tensor]]:
    loss, found = gradients(case, own_loss)
    assert len(found) > 20 and sum(gradient.abs().max() > 0 for gradient in found.values()) > 20
    return loss, found


WAYS = [
    three_lines,
    one_call,
    without_logits,
    without_padding,
    two_phases,
    with_labels,
    with_labels_padded_on_the_right,
    the_trainer,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_has_one_loss_and_one_gradient(case, expected, way, tmp_path):
    if way is the_trainer:
        loss, found = gradients(case, lambda of: the_trainer(of, tmp_path))
    else:
        loss, found = gradients(case, way)
    assert abs(loss - expected[0]) <= 2e-6 * max(1.0, abs(expected[0]))
    assert found.keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    assert largest > 1e-3
    for name, gradient in expected[1].items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * largest, name


def test_a_response_that_was_cut_off_is_left_out_on_request(case):
    prompts = draw_prompts(2, 1)
    settings = Namespace(**{**vars(case.settings), "max_new_tokens": 22, "temperature": 1.0})
    torch.manual_seed(2)
    rollout = sample(case.model, case.processor, prompts, settings)
    torch.manual_seed(2)
    settings.skip_truncated = True
    shorter = sample(case.model, case.processor, prompts, settings)
    left_out = ~shorter.response_mask.any(1)
    assert left_out.any() and rollout.response_mask.any(1).all()
    if case.model.config.model_type == "llava":
        assert not left_out.all()
    assert torch.equal(shorter.response_mask, rollout.response_mask & ~left_out[:, None])
    assert (rollout.tokens[left_out] != case.processor.tokenizer.eos_token_id).all()
    shorter.advantages = torch.randn(shorter.advantages.shape)
    loss, metrics = grpo_own_loop.loss_of(case.model, shorter, shorter.response_mask.sum(), settings)
    found = gradients(case, lambda _: loss)[1]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in found.values())
    assert metrics["weighted_responses"] == (~left_out).sum()


def test_factors_and_clipping_matter_here(case, expected):
    """Or else the equality of all ways would say less than it seems to."""
    rollout = case.rollout
    logp, _ = forward(case.model, rollout, case.settings)
    plain = policy_loss(logp, rollout.old_logp, rollout.advantages, rollout.response_mask)
    assert 0.01 < plain.metrics["clip_fraction"] < 0.5
    found = gradients(case, lambda _: plain.loss)[1]
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    assert max((found[name] - gradient).abs().max() for name, gradient in expected[1].items()) > 0.05 * largest

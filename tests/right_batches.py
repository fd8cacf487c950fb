"""Right batches of every layout, as a loop of one's own hands them to a loss: prompts, images, groups, log-probs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PAD, IMAGE = 0, 1  # ids; words follow
LAYOUTS = ("last T", "T = S", "T = S - 1", "packed")


@dataclass
class Response:
    """One sequence: its prompt and its response, token by token."""

    ids: list[int]
    rows: Tensor  # hidden states [s, D]
    scored: list[bool]
    prompt: int  # how many tokens it has
    group: int
    advantage: float = 0.0


@dataclass
class Plan:
    """What a batch is like. Whatever is not given is drawn."""

    seed: int
    prompts: int | None = None
    generations: int | None = None
    layout: str | None = None
    dtype: torch.dtype | None = None
    order: str | None = None
    images: bool | None = None  # in every prompt, or in most; none late
    odd: bool = True  # holes, overlong responses, tools, advantages per token, ...
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def draw(self, given: Any, *choices: Any) -> Any:
        chosen = self.rng.choice(choices)
        return chosen if given is None else given

    def now_and_then(self, share: float = 0.15) -> bool:
        return self.rng.random() < share and self.odd


def right_batch(plan: Plan) -> dict[str, Any]:
    """Return the arguments of ``check_batch`` by name for a batch in which nothing is wrong."""
    torch.manual_seed(plan.seed)
    dtype = plan.draw(plan.dtype, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    features, vocabulary = plan.rng.randrange(8, 33), plan.rng.randrange(20, 61)
    head = nn.Linear(features, vocabulary, bias=plan.now_and_then(0.3))
    nn.init.normal_(head.weight, std=2.0 * features**-0.5)
    head = head.to(dtype)
    responses = _responses(plan, features, vocabulary)
    layout = plan.draw(plan.layout, *LAYOUTS)
    batch = _packed(responses) if layout == "packed" else _padded(responses, layout, torch.nan if plan.odd else 3.0)
    batch["hidden"] = batch["hidden"].to(dtype)

    temperature: float | Tensor = plan.rng.choice((1.0, 0.7, 1.3))
    scale, cap = (plan.rng.choice((0.5, 2.0)), 8.0) if plan.now_and_then() else (1.0, None)
    if plan.now_and_then():
        temperature = torch.empty(batch["response_mask"].shape).uniform_(0.6, 1.4)
    logits = _logits(batch, head, scale, cap, temperature)
    batch["logits"], batch["head"] = logits, head
    batch["logp"] = _gather(logits, batch["targets"]).requires_grad_()
    kind = plan.rng.choice(("none", "same", "off-policy"))
    noise = 0.1 * torch.randn(batch["logp"].shape) if kind == "off-policy" else 0.0
    batch["old_logp"] = None if kind == "none" else (batch["logp"].detach() + noise).clamp(max=0)
    batch |= {"temperature": temperature, "logit_scale": scale, "softcap": cap}
    batch["model_or_head"] = head
    batch["group_ids"] = torch.tensor([7 * one.group - 3 for one in responses])
    advantages = torch.tensor([one.advantage for one in responses])
    if plan.now_and_then(0.3):
        advantages = _per_token(advantages, batch)
    batch["advantages"] = advantages
    if plan.now_and_then(0.3):
        batch["ids"] = batch["targets"]
    for name in ("visual_mask", "response_mask"):
        batch[name] = batch[name].to(plan.draw(None, torch.bool, torch.int64, torch.uint8) if plan.odd else torch.bool)
    if plan.now_and_then():
        batch["model_or_head"] = None
    return batch


def arguments(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what ``check_batch`` takes of a batch."""
    return {name: value for name, value in batch.items() if name not in ("targets", "logits", "head")}


def _responses(plan: Plan, features: int, vocabulary: int) -> list[Response]:
    def words(most: int, least: int = 1) -> list[int]:
        return [plan.rng.randrange(2, vocabulary) for _ in range(plan.rng.randint(least, most))]

    prompts, generations = plan.draw(plan.prompts, 1, 2, 3, 4), plan.draw(plan.generations, 1, 2, 4, 5)
    rewards = torch.randn(prompts, generations) if plan.rng.random() < 0.5 else torch.rand(prompts, generations).round()
    whitened = plan.now_and_then()
    centred = rewards - (rewards.mean() if whitened else rewards.mean(1, keepdim=True))
    deviation = centred.square().mean().sqrt() if whitened else centred.square().mean(1, keepdim=True).sqrt()
    advantages = centred / (1e-4 + deviation)
    found = []
    end = [] if plan.now_and_then() else [2, 3]  # of a chat template
    for group in range(prompts):
        shown = [IMAGE] * plan.rng.randint(1, 9)
        if plan.images is None and group and plan.rng.random() < 0.2:
            shown = []  # text alone, or an image that a tool shows
        prompt = [*words(5, 2), *shown, *words(6), *end]
        rows = torch.randn(len(prompt), features)
        for place in range(generations):
            answer = words(14)
            scored = [not plan.now_and_then(0.1) for _ in answer] if plan.now_and_then() else [True] * len(answer)
            if plan.now_and_then():
                shown = [IMAGE] * plan.rng.randint(1, 4)
                more = words(5)
                answer, scored = [*answer, *shown, *more], [*scored, *[False] * len(shown), *[True] * len(more)]
            if plan.now_and_then(0.1) and group + place:  # overlong, and filtered
                scored = [False] * len(answer)
            states = torch.cat([rows + 1e-6 * torch.randn(rows.shape), torch.randn(len(answer), features)])
            mask = [False] * len(prompt) + scored
            advantage = float(advantages[group, place])
            found.append(Response([*prompt, *answer], states, mask, len(prompt), group, advantage))
    order = plan.draw(plan.order, "blocks", "blocks", "strided", "shuffled")
    if order == "strided":
        found = [found[group * generations + place] for place in range(generations) for group in range(prompts)]
    elif order == "shuffled" and not whitened:
        plan.rng.shuffle(found)
    return found


def _padded(responses: list[Response], layout: str, garbage: float) -> dict[str, Any]:
    """Pad: prompts to the left and answers to the right, or everything to the right."""
    left = max(one.prompt for one in responses) if layout == "last T" else 0
    lengths = [len(one.ids) + (left - one.prompt if left else 0) for one in responses]
    width = max(lengths)
    ids, scored, visual, hidden = [], [], [], []
    for one, length in zip(responses, lengths, strict=True):
        before, after = (left - one.prompt if left else 0), width - length
        rows = [torch.full((number, one.rows.shape[1]), garbage) for number in (before, after)]
        ids.append([PAD] * before + one.ids + [PAD] * after)
        scored.append([False] * before + one.scored + [False] * after)
        visual.append([token == IMAGE for token in ids[-1]])
        hidden.append(torch.cat([rows[0], one.rows, rows[1]]))
    start = {"last T": left, "T = S": 0, "T = S - 1": 1}[layout]
    whole = torch.tensor(ids)
    return {
        "hidden": torch.stack(hidden),
        "ids": whole,
        "targets": whole[:, start:],
        "visual_mask": torch.tensor(visual),
        "response_mask": torch.tensor(scored)[:, start:],
    }


def _packed(responses: list[Response]) -> dict[str, Any]:
    ids = torch.tensor([token for one in responses for token in one.ids])
    lengths = torch.tensor([0, *(len(one.ids) for one in responses)])
    return {
        "hidden": torch.cat([one.rows for one in responses]),
        "ids": ids,
        "targets": ids,
        "visual_mask": ids == IMAGE,
        "response_mask": torch.tensor([scored for one in responses for scored in one.scored]),
        "cu_seqlens": lengths.cumsum(0),
    }


def _logits(
    batch: dict[str, Any], head: nn.Linear, scale: float, cap: float | None, temperature: float | Tensor
) -> Tensor:
    """Logits that predict each response token, ``[B, T, V]`` or ``[N, V]``, of the row before it; zeros before all."""
    rows = nn.functional.linear(batch["hidden"].float(), head.weight.float(), None)
    rows = (rows + (0.0 if head.bias is None else head.bias.float())) * scale
    rows = rows if cap is None else cap * torch.tanh(rows / cap)
    moved = torch.cat([torch.zeros_like(rows[..., :1, :]), rows[..., :-1, :]], -2).detach()
    moved = moved[..., moved.shape[-2] - batch["response_mask"].shape[-1] :, :]
    return moved / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def _gather(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def _per_token(advantages: Tensor, batch: dict[str, Any]) -> Tensor:
    if "cu_seqlens" in batch:
        return advantages.repeat_interleave(batch["cu_seqlens"].diff())
    return advantages[:, None].expand(batch["response_mask"].shape)

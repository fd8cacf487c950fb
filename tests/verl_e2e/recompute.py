"""Advantages of a recorded step, computed again: the model by transformers, the factors by the paper's equations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from equations import Position, factors, focus
from published import Response, vppo
from torch import Tensor

from vgpo_kernels import VGPOConfig
from vgpo_kernels.integrations.transformers import spoilt_view
from vgpo_kernels.integrations.verl.second_views import seed_of

# What the processor makes of a row's images, with the row's ids and mask: some numbers of its scored tokens.
Read = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], list[float]]


def advantages(step: dict[str, Any], model_folder: Path, config: VGPOConfig) -> list[list[float]]:
    """Return the advantage of each response token of a recorded step, for the weights in ``model_folder``.

    Rows that verl added to even out the batch have a mask of 0, and advantages of 0.
    """

    def cosines(model: Any, ids: Tensor, mask: Tensor, inputs: dict[str, Tensor]) -> list[float]:
        prompt = len(ids) - len(mask)
        with torch.no_grad():
            states = model.model(**inputs).last_hidden_state[0].double().tolist()
        scored = [False] * prompt + mask.bool().tolist()
        visual = [token == model.config.image_token_id and index < prompt for index, token in enumerate(ids.tolist())]
        return focus([Position(*one) for one in zip(states, visual, scored, strict=True)], causal=True)

    found = _read(step, model_folder, cosines)
    return _weighed(step, [weights.factors for weights in factors(found, step["columns"]["uid"], config)])


def advantages_of_vppo(step: dict[str, Any], model_folder: Path, number: int) -> list[list[float]]:
    """Return the same for VPPO, in the trainer's step of this number."""

    def k3(model: Any, ids: Tensor, mask: Tensor, inputs: dict[str, Tensor]) -> list[float]:
        spoilt = spoilt_view(inputs, "mask", model, strength=0.5, seed=seed_of(number, ids))
        logp = []
        for view in (inputs, spoilt):
            with torch.no_grad():
                logits = model(**view).logits[0, -len(mask) - 1 : -1].double()
            logp.append(logits.log_softmax(-1).gather(1, ids[-len(mask) :, None])[:, 0])
        ratios = (logp[1] - logp[0])[mask.bool()].tolist()
        return [min(math.exp(ratio) - ratio - 1, 10.0) for ratio in ratios]

    found = _read(step, model_folder, k3)
    # A row that verl added is no response.
    real = [Response(row, [], [], 0) for row in found if row]
    shaped = iter(vppo(real, progress=1.0))
    return _weighed(step, [next(shaped).factors if row else [] for row in found])


def _read(step: dict[str, Any], model_folder: Path, read: Read) -> list[list[float]]:
    """Return numbers of the scored tokens of each row."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_folder, attn_implementation="eager").eval()
    columns, found = step["columns"], []
    for ids, mask, images in zip(columns["input_ids"], columns["response_mask"], step["images"], strict=True):
        seen = {name: value for name, value in images.items() if name in ("pixel_values", "image_grid_thw")}
        kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).long()[None]}
        found.append(read(model, ids, mask, {"input_ids": ids[None], **seen, **kinds}))
    return found


def _weighed(step: dict[str, Any], of_scored: list[list[float]]) -> list[list[float]]:
    """Return GRPO's advantages times the factors of scored tokens; 0 at other tokens of the responses."""
    columns = step["columns"]
    rewards = _normalised([row.double().sum().item() for row in columns["rm_scores"]], columns["uid"])
    result = []
    for mask, reward, row in zip(columns["response_mask"], rewards, of_scored, strict=True):
        values = iter(row)
        result.append([reward * next(values) if bit else 0.0 for bit in mask.tolist()])
    return result


def _normalised(rewards: list[float], uids: list[str]) -> list[float]:
    """GRPO's advantages: rewards less their group's mean, over its standard deviation."""
    groups = defaultdict(list)
    for reward, uid in zip(rewards, uids, strict=True):
        groups[uid].append(reward)
    result = []
    for reward, uid in zip(rewards, uids, strict=True):
        group = groups[uid]
        mean = sum(group) / len(group)
        spread = math.sqrt(sum((one - mean) ** 2 for one in group) / max(1, len(group) - 1))
        result.append((reward - mean) / (spread + 1e-6) if len(group) > 1 else reward)
    return result

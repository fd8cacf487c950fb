"""Advantages of a recorded step, computed again: the model by transformers, the factors by the paper's equations."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from equations import Position, factors, focus

from vgpo_kernels import VGPOConfig


def advantages(step: dict[str, Any], model_folder: Path, config: VGPOConfig) -> list[list[float]]:
    """Return the advantage of each response token of a recorded step, for the weights in ``model_folder``.

    Rows that verl added to even out the batch have a mask of 0, and advantages of 0.
    """
    columns = step["columns"]
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_folder, attn_implementation="eager").eval()
    image = model.config.image_token_id
    cosines, uids = [], columns["uid"]
    for ids, mask, images in zip(columns["input_ids"], columns["response_mask"], step["images"], strict=True):
        prompt = len(ids) - len(mask)
        seen = {name: value for name, value in images.items() if name in ("pixel_values", "image_grid_thw")}
        kinds = {"mm_token_type_ids": (ids == image).long()[None]}
        with torch.no_grad():
            states = model.model(input_ids=ids[None], **seen, **kinds).last_hidden_state[0].double().tolist()
        scored = [False] * prompt + mask.bool().tolist()
        visual = [token == image and index < prompt for index, token in enumerate(ids.tolist())]
        cosines.append(focus([Position(*one) for one in zip(states, visual, scored, strict=True)], causal=True))
    of_scored = [weights.factors for weights in factors(cosines, uids, config)]
    rewards = _normalised([row.double().sum().item() for row in columns["rm_scores"]], uids)
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
